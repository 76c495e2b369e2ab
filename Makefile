# `make demo` and `make test` set everything up in .venv by themselves; a second call only does what changed.
# CPU-only machine: make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?= train infer step --quick
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One stamp per value of TORCH, so that another version is installed when it is asked for.
TORCH_STAMP := .venv/.torch-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
STAMP := .venv/.gru_fast
PEERS := .venv/.peers
# The oldest Triton that the kernels support, beside the one in .venv; it exists for Linux only.
OLD_TRITON := $(if $(filter Linux,$(shell uname -s)),.venv/triton-3.6.0)
TRITON_TESTS := $(wildcard tests/test_triton_*.py)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
OTHER_C := $(wildcard tests/cpp/* benchmarks/native/*.cpp examples/*.c)

.PHONY: help demo test test-all lint format bench peers gpu-peers wheel clean

help:
	@echo 'make demo      train a character model on real names and sample novel ones'
	@echo 'make test      all tests but the slow ones'
	@echo 'make test-all  all tests, those of the Triton kernels also on the oldest Triton'
	@echo 'make bench     speed beside nn.GRU and other peers on this machine, under a minute; ARGS=... for more'
	@echo 'make peers     installs the other peers: OpenVINO, JAX, Keras'
	@echo 'make gpu-peers installs other kernels for the GPU: torchrl, flashrnn, pararnn-torch'
	@echo 'make lint      ruff, mypy, clang-format: check only'
	@echo 'make format    ruff and clang-format: rewrite'
	@echo 'make wheel     manylinux wheel in dist/, installed and tried where there is no compiler'
	@echo 'make clean     remove build products (not .venv)'
	@echo 'PYTHON=python3.12 picks the Python of a new .venv, TORCH="torch==2.13.0 --index-url URL" what pip installs'

$(TORCH_STAMP):
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install 'setuptools>=77' 'pybind11>=2.13' ninja
	@rm -f .venv/.torch-*
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml setup.py gru_fast/_version.py $(CSRC)
	$(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@

$(PEERS): $(STAMP)
	$(PIP) install --no-build-isolation -e '.[dev,bench]'
	@touch $@

.venv/triton-%: $(TORCH_STAMP)
	$(PIP) install --quiet --no-deps --target $@ triton==$* 'numpy<2.4'

demo: $(STAMP)
	rm -rf build/demo
	$(BIN)/gru-fast train builtin:names --out build/demo --beside-torch
	$(BIN)/gru-fast sample build/demo --num 20 --novel --temperature 0.9 --seed 0 --beside-torch

test: $(STAMP)
	$(BIN)/pytest -m 'not slow'

test-all: $(PEERS) $(OLD_TRITON)
	$(BIN)/pytest
	$(if $(OLD_TRITON),PYTHONPATH=$(OLD_TRITON) $(BIN)/pytest $(TRITON_TESTS))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(OTHER_C)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) $(OTHER_C)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

peers: $(PEERS)

# pararnn-torch asks for Triton 3.6, torch for its own.
gpu-peers: $(STAMP)
	$(PIP) install --no-build-isolation -e '.[dev,bench-gpu]'
	$(PIP) install --no-deps pararnn-torch

wheel: $(STAMP)
	scripts/make_wheel.sh $(BIN)/python '$(TORCH)'

clean:
	rm -rf build dist gru_fast.egg-info gru_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(STAMP) $(PEERS)

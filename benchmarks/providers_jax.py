# SPDX-License-Identifier: Apache-2.0
"""JAX: `lax.scan` over the cell, compiled by XLA; the input product outside the loop."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import WEIGHTS, Problem
from benchmarks.providers import Prepared, Provider

INPUTS = ("x", "h0", *WEIGHTS)


class JaxScan(Provider):
    """What one writes in JAX, forward and by `jax.vjp`, in one jitted function."""

    name = "jax.lax.scan"
    threads: int | None = None

    def version(self) -> str:
        return version("jax")

    def why_not(self, problem: Problem) -> str | None:
        if problem.device != "cpu" or problem.dtype != "float32":
            return "JAX takes part on the CPU in float32"
        return "the JAX program here has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        jax = self._jax(threads)
        arrays = {name: jax.numpy.asarray(t.numpy()) for name, t in problem.tensors.items()}
        inputs = [arrays[name] for name in INPUTS]
        if not problem.training:
            forward = jax.jit(_forward)

            def infer() -> Any:
                return jax.block_until_ready(forward(*inputs))

            return Prepared(infer, lambda out: _named(("output", "h_n"), out))

        gradients = (arrays["grad_output"], arrays["grad_h_n"])

        @jax.jit  # type: ignore[untyped-decorator]
        def both(inputs: Any, gradients: Any) -> Any:
            out, back = jax.vjp(_forward, *inputs)
            return (*out, *back(gradients))

        def train() -> Any:
            return jax.block_until_ready(both(inputs, gradients))

        names = ("output", "h_n", *(f"grad_{name}" for name in INPUTS))
        return Prepared(train, lambda out: _named(names, out))

    @classmethod
    def _jax(cls, threads: int) -> Any:
        """The package, its CPU client with that many threads: they are counted when it starts."""
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        if cls.threads != threads:
            from jax.extend import backend

            before = os.environ.get("NPROC")
            os.environ["NPROC"] = str(threads)
            try:
                backend.clear_backends()
                jax.clear_caches()
                jax.devices()
            finally:
                os.environ.pop("NPROC")
                if before is not None:
                    os.environ["NPROC"] = before
            cls.threads = threads
        return jax


def _forward(x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    import jax
    from jax import numpy as jnp

    def step(h: Any, gates: Any) -> Any:
        r_x, z_x, n_x = jnp.split(gates, 3, -1)
        r_h, z_h, n_h = jnp.split(h @ w_hh.T + b_hh, 3, -1)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + r * n_h)
        h = (1 - z) * n + z * h
        return h, h

    h_n, output = jax.lax.scan(step, h0[0], x @ w_ih.T + b_ih)
    return output, h_n[None]


def _named(names: tuple[str, ...], arrays: Any) -> dict[str, Tensor]:
    import numpy as np

    return {n: torch.from_numpy(np.array(a)) for n, a in zip(names, arrays, strict=True)}


def providers() -> list[Provider]:
    """Nothing where jax is not installed."""
    return [JaxScan()] if find_spec("jax") else []

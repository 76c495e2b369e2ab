# SPDX-License-Identifier: Apache-2.0
"""Training in several processes, and layers that go from one process to another."""

import copy
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

import gru_fast
from process_workers import DISTRIBUTED, WORLD, add_one, train_distributed
from versions import VIEWS_DISTRIBUTED


def test_training_in_two_processes():
    """Data-parallel, sharded, and of a distributed tensor: as torch's layers, on each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = mp.spawn(train_distributed, (port, queue), nprocs=WORLD, join=False)
    while not processes.join(60):
        pass
    results = dict(queue.get() for _ in range(WORLD))
    assert sorted(results) == [0, 1] and results[0] != results[1]
    for found in results.values():
        for name in ("data_parallel", "sharded", *DISTRIBUTED):
            torch.testing.assert_close(
                torch.tensor(found[f"{name} gru_fast"]), torch.tensor(found[f"{name} torch"])
            )


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "layer",
    [
        gru_fast.GRU(8, 16, batch_first=True, bidirectional=True, learn_h0=True),
        gru_fast.GRU(8, 16, cell="no_reset", recompute=True),
        gru_fast.LayerNormGRU(8, 16),
    ],
    ids=["GRU", "no_reset", "LayerNormGRU"],
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.skipif(not VIEWS_DISTRIBUTED, reason="nn.GRU does not take one before torch 2.12")
def test_a_distributed_tensor_is_left_to_the_reference(mesh, layer, grad):
    """Also where torch's layer would not take it; our operators have no rule for its parts."""
    x = torch.randn(5, 4, 8)
    distributed = distribute_module(copy.deepcopy(layer), mesh)
    parts = distribute_tensor(x, mesh, [Shard(1)])
    with torch.set_grad_enabled(grad):
        expected, found = layer(x)[0], distributed(parts)[0]
    torch.testing.assert_close(found.full_tensor(), expected)
    assert gru_fast.explain(distributed, parts).backend == "reference"
    distributed.backend = "cpu"
    with pytest.raises(RuntimeError, match=r"cannot take this call.*DTensor"):
        distributed(parts)


def test_shared_weights_are_one():
    """As in Hogwild training: what another process writes is used by the next call here."""
    rnn = gru_fast.GRU(8, 16)
    rnn.share_memory()
    queue = mp.get_context("spawn").SimpleQueue()
    with torch.no_grad():
        before = rnn(torch.ones(5, 2, 8))[0].sum().item()
        mp.spawn(add_one, (rnn, queue))
        after = rnn(torch.ones(5, 2, 8))[0].sum().item()
    assert queue.get() == pytest.approx(after) and after != pytest.approx(before)


class Features(torch.utils.data.Dataset):
    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, i):
        return self.module(torch.full((5, 1, 8), float(i)))[0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_run_layers():
    """Workers are forked, also from a process whose threads have run a layer."""
    features = Features(gru_fast.GRU(8, 16))
    expected = torch.stack([features[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(
        features, 4, num_workers=1, timeout=60, multiprocessing_context="fork"
    )
    torch.testing.assert_close(next(iter(loader)), expected)


AFTER_A_FORK = """if True:
    import os, signal, torch, gru_fast
    torch.set_num_threads(2)
    layer, cell = gru_fast.GRU(64, 64), gru_fast.GRUCell(64, 64)
    model = gru_fast.GRULanguageModel(65, 64, 64)
    sampler = gru_fast.Sampler(model, threads=2)

    def all_of_it():
        # So small that torch's own operations take one thread: they are not ours to save.
        x = torch.randn(50, 8, 64, generator=torch.Generator().manual_seed(0))
        output, h_n = layer(x)
        (grad,) = torch.autograd.grad(output, layer.weight_hh_l0, torch.ones_like(output))
        lengths = layer(x, lengths=torch.full((8,), 20))[0]
        step = cell(x[0])
        tokens = sampler.generate(max_new_tokens=20, num_return_sequences=64, seed=1)
        return [t.detach().clone() for t in (output, h_n, grad, lengths, step, tokens)]

    before = all_of_it()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if all(map(torch.equal, before, all_of_it())) else 1)
    print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_runs_what_its_parent_ran():
    """On one thread: OpenMP would wait for those of the parent."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AFTER_A_FORK],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert run.stdout.strip() == "0"


AT_THE_END = """
import threading, time, numpy, torch, gru_fast
torch.set_num_threads(2)
started = threading.Event()
def loop():
    while True:
        call()
        started.set()
{call}
threading.Thread(target=loop, daemon=True).start()
started.wait()
time.sleep(0.05)
"""
# Without operations of PyTorch's, which have such a thread abort the process.
CALLS = {
    "generate": """
stack = gru_fast.Sampler(gru_fast.GRULanguageModel(65, 64, 256))._stack
zero, begin = numpy.zeros(1, int), numpy.array([0, 1])
call = lambda: stack.generate(
    inputs=numpy.array([65], numpy.int32), input_begin=begin, position=zero, stream=zero,
    limit=zero + 1000, eos=[], seed=1, do_sample=True, temperature=1.0, top_k=None, top_p=None,
    min_p=None, h0=None, log_probs=False, threads=2,
)
""",
    "push": """
stream, x = gru_fast.Stream(gru_fast.GRU(32, 256))._native, numpy.zeros((2000, 32), numpy.float32)
call = lambda: stream.push(x)
""",
}


@pytest.mark.skipif(not gru_fast.ops.HAS_CPU_KERNELS, reason="the pure-Python package")
@pytest.mark.parametrize("call", CALLS)
def test_the_interpreter_may_end_during_a_call_of_a_daemon_thread(call):
    program = AT_THE_END.format(call=CALLS[call])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

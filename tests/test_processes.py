# SPDX-License-Identifier: Apache-2.0
"""Training in several processes, and layers that go from one process to another."""

import socket

import pytest
import torch
import torch.multiprocessing as mp

import gru_fast
from process_workers import WORLD, add_one, train_distributed


def test_data_parallel_and_sharded_training():
    """Both give, on each of two processes, the losses that torch's layer gives."""
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
        for name in ("data_parallel", "sharded"):
            torch.testing.assert_close(
                torch.tensor(found[f"{name} gru_fast"]), torch.tensor(found[f"{name} torch"])
            )


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
    loader = torch.utils.data.DataLoader(features, 4, num_workers=1, timeout=60)
    torch.testing.assert_close(next(iter(loader)), expected)

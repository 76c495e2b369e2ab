# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_processes.py run; a module that they can import by its name."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence

import gru_fast
from versions import VIEWS_DISTRIBUTED

WORLD = 2
DISTRIBUTED = ("GRU", "GRUCell") if VIEWS_DISTRIBUTED else ("GRUCell",)


class Classifier(nn.Module):
    def __init__(self, gru):
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.gru = gru(8, 16, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens, lengths):
        x = self.embedding(tokens)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, h_n = self.gru(packed)
        return self.head(torch.cat([h_n[-2], h_n[-1]], 1))


def data_parallel(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.gru, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, rank):
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    torch.manual_seed(rank)
    losses = []
    for _ in range(4):
        tokens, lengths = torch.randint(1, 20, (6, 7)), torch.randint(1, 8, (6,))
        loss = cross_entropy(model(tokens, lengths), tokens[:, 0] % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def step_of_a_distributed_tensor(layer):
    """Norms of output and gradients: all processes have the weights, and they share the rows.

    torch's layers take distributed tensors with an hx and with time first only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    layer = distribute_module(layer, mesh)
    one_step = isinstance(layer, nn.RNNCellBase)
    x = torch.linspace(-1, 1, 5 * 4 * 8).reshape(5, 4, 8)
    x, hx = (x[0], x.new_zeros(4, 16)) if one_step else (x, x.new_zeros(1, 4, 16))
    x, hx = (distribute_tensor(t, mesh, [Shard(t.dim() - 2)]) for t in (x, hx))
    output = layer(x, hx) if one_step else layer(x, hx)[0]
    output.square().sum().backward()
    found = [output, *(p.grad for p in layer.parameters())]
    return [t.full_tensor().norm().item() for t in found]


def train_distributed(rank, port, queue):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for gru in (nn.GRU, gru_fast.GRU):
        for wrap in (data_parallel, sharded):
            torch.manual_seed(0)
            key = f"{wrap.__name__} {gru.__module__.split('.')[0]}"
            results[key] = train(wrap(Classifier(gru)), rank)
    for name in DISTRIBUTED:
        for package in (nn, gru_fast):
            torch.manual_seed(0)
            key = f"{name} {package.__name__.split('.')[0]}"
            results[key] = step_of_a_distributed_tensor(getattr(package, name)(8, 16))
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo may still hold tensors, and one that frees them while the interpreter ends
    # aborts the process (pytorch/pytorch#179291); a SimpleQueue has written what was put into it.
    os._exit(0)


def add_one(rank, module, queue):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
        queue.put(module(torch.ones(5, 2, 8))[0].sum().item())

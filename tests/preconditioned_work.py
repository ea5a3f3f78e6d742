"""What each of two processes does for the test of batch normalisation preconditioning.

A module of its own, because a spawned process has to find it by name.
"""

import torch
from torch import distributed, nn

from normlab.optim.bn_preconditioning import BatchNormPreconditioner
from normlab.optim.input_moments import InputWatcher
from synchronized_work import PROCESSES, counted

STATISTICS = ("moments", "batch")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Flatten(),
        nn.Linear(16, 3),
    ).double()  # fmt: skip


def batches():
    """Three steps with a batch for each process; the last layer has more weights than rows."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(4, 2, 6, 6, generator=generator).double() * 3 + 2 for _ in range(PROCESSES)]
        for _ in range(3)
    ]


def train(model, forward, steps, statistics):
    """Train and return parameters, statistics and the collectives of each optimiser step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    BatchNormPreconditioner(model, optimizer, momentum=0.3, statistics=statistics)
    calls = []
    for x in steps:
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        with counted() as seen:
            optimizer.step()
        calls.append(list(seen))
    state = optimizer.param_groups[0]["bn_preconditioning"]
    return [p.detach() for p in model.parameters()], state, calls


def run_uneven(rank):
    """The first layer is called on one process only, the last on none; counts differ."""
    layers = [nn.Linear(2, 1) for _ in range(3)]
    watcher = InputWatcher([[layer] for layer in layers])
    x = torch.arange(12.0).view(6, 2)
    if rank == 1:
        layers[0](x).sum().backward()
    layers[1](x[: 1 + rank * 3]).sum().backward()
    moments = watcher.take()
    again = watcher.take()
    return moments, again.called


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    trained = {}
    for statistics in STATISTICS:
        model = network()
        forward = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        trained[statistics] = train(model, forward, [x[rank] for x in batches()], statistics)
    torch.save({"trained": trained, "uneven": run_uneven(rank)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()

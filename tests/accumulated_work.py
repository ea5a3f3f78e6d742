"""What each of two processes does for the tests of accumulation and of the noise scale.

A module of its own, because a spawned process has to find it by name.
"""

import torch
from torch import distributed, nn

from normlab.optim.accumulate import accumulate, total_count
from normlab.optim.gradient_noise_scale import GradientNoiseScale
from synchronized_work import PROCESSES, counted

SIZES = ((1, 5), (4, 2))
"""Tokens of each micro-batch of each process."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def data():
    """The micro-batches of each process."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(n, 3, generator=generator).double() for n in sizes] for sizes in SIZES]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def run_tokens(rank):
    """Token means in micro-batches of any size; note the gradient before the last one."""
    model = network()
    forward = nn.parallel.DistributedDataParallel(model)
    with counted() as calls:
        total = total_count([len(part) for part in data()[rank]])
    parts = data()[rank]
    before = None
    for index, part in enumerate(parts):
        with accumulate(forward, index, len(parts), count=len(part), total=total) as factor:
            (factor * forward(part).square().mean()).backward()
        before = before or gradients(model)
    return {"total": total, "calls": list(calls), "own": before, "joint": gradients(model)}


def run_noise(rank):
    """The noise scale by a hook without accumulation, and with it."""
    found = {}
    x = torch.cat([part for parts in data() for part in parts])[: 2 * 6].chunk(PROCESSES)[rank]
    for name in ("hook", "accumulation"):
        model = network()
        forward = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-5)
        meter = GradientNoiseScale(model.parameters())
        if name == "hook":
            forward.register_comm_hook(None, meter.comm_hook(batch_size=6))
            for _ in range(2):  # the first pass has one bucket, later ones have several
                model.zero_grad()
                forward(x).square().mean().backward()
                meter.big(12)
        else:
            for index, part in enumerate(x.chunk(2)):
                with accumulate(forward, index, 2) as factor:
                    (factor * forward(part).square().mean()).backward()
                if index == 0:
                    meter.small(3, multiply=2)
            meter.big(12)
        found[name] = (meter.estimate(), gradients(model))
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    results = {run.__name__: run(rank) for run in (run_tokens, run_noise)}
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()

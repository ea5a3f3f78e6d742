"""A small network that grows, and what each of two processes does with it.

A module of its own, because a spawned process has to find it by name.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import distributed, nn

from normlab.growth.grower import Grower
from normlab.growth.new_units import gradmax_units, random_units
from normlab.growth.pairs import find_pairs
from normlab.growth.schedule import GrowthSchedule

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
OPTIMISERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def by_gradient(model, wanted, batch, generator):
    return gradmax_units(model, wanted, *batch, generator=generator)


def by_chance(model, wanted, batch, generator):
    return random_units(wanted, generator=generator)


def network(width=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def batch(index):
    half = slice(16 * (index % 2), 16 * (index % 2) + 16)
    return X[half], Y[half]


def growing(schedule, optimizer="sgd", model=None, make_units=by_gradient, **options):
    model = model or network()
    made = OPTIMISERS[optimizer](model.parameters())
    pairs = find_pairs(model, X).pairs
    options = {"make_units": make_units, "batch": batch, "schedule": schedule, **options}
    return model, made, Grower(model, made, pairs, **options)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(step)[0]), batch(step)[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank, size, folder):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=size)
    model, optimizer, grower = growing(GrowthSchedule(2, 2, 2))
    grower.batch = lambda index: (batch(index)[0][rank::size], batch(index)[1][rank::size])
    wrapped, held = nn.parallel.DistributedDataParallel(model), list(model.parameters())
    for step in range(6):
        if any(one is not two for one, two in zip(model.parameters(), held, strict=True)):
            wrapped, held = nn.parallel.DistributedDataParallel(model), list(model.parameters())
        optimizer.zero_grad()
        x, y = batch(step)
        F.cross_entropy(wrapped(x[rank::size]), y[rank::size]).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()

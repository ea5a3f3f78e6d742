"""Training of one weight that is free of scale, for tests of rescaling and of its rates."""

from functools import partial

import torch
from torch import nn


class Training:
    """One linear layer before BatchNorm in float64, trained on a fixed batch."""

    def __init__(self, scale=1.0, units=4, zero_columns=0):
        torch.manual_seed(1)
        self.x = torch.randn(16, 6, dtype=torch.float64)
        self.x[:, 6 - zero_columns :] = 0
        self.targets = torch.randn(16, units, dtype=torch.float64)
        linear = nn.Linear(6, units, bias=False)
        norm = nn.BatchNorm1d(units, eps=1e-30, affine=False)  # torch refuses 0 in training
        self.model = nn.Sequential(linear, norm).double()
        self.weight = linear.weight
        with torch.no_grad():
            self.weight.mul_(scale)

    def step(self, optimizer):
        loss = (self.model(self.x) - self.targets).square().mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def directions(self, optimizer, steps=8):
        history = []
        for _ in range(steps):
            self.step(optimizer)
            history.append(nn.functional.normalize(self.weight.detach()))
        return torch.stack(history)


OPTIMIZERS = {
    "sgd": (partial(torch.optim.SGD, momentum=0.9), False),
    "adam": (partial(torch.optim.Adam, eps=0.0), True),
}

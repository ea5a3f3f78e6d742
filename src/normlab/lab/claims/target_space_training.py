"""The two toy problems of target space, each trained by its targets or by its weights.

Two spirals: two classes of points that wind around each other, in closed form. Bit memory: a
recurrent network sees random bits and has to give the bit of D steps ago at every time.

Every run is a fixed function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.weights.target_space_layer import TargetLinear
from normlab.weights.target_space_model import TargetSpace
from normlab.weights.target_space_recurrent import RecurrentLayer, TargetRecurrent

Space = Literal["targets", "weights"]

RIDGE = 0.001


class Spirals(NamedTuple):
    """How training on the two spirals ended.

    Attributes:
        training: Accuracy on the training points, a fraction; 0 where the loss was not finite.
        test: Accuracy on the points between them.
        solved_at: The first step after which every training point was right; None for never.
    """

    training: float
    test: float
    solved_at: int | None


class BitMemory(NamedTuple):
    """How training on bit memory ended.

    Attributes:
        accuracy: Share of right bits of fresh sequences, a fraction; 0 where the loss was not
            finite.
        loss: The last training loss.
    """

    accuracy: float
    loss: float


def two_spirals(between: bool = False) -> tuple[Tensor, Tensor]:
    """Return the 194 points and their classes.

    Args:
        between: False for the training points, True for the test points halfway between them.
    """
    i = torch.arange(97) + (0.5 if between else 0.0)
    radius, angle = 0.65 + 0.0609375 * i, i * (math.pi / 16)
    one = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return torch.cat([one, -one]), torch.arange(2).repeat_interleave(97)


def train_spirals(
    space: Space, seed: int, steps: int = 1000, lr: float = 0.01, width: int = 12
) -> Spirals:
    """Train a tanh network of three hidden layers on all points at once, by Adam.

    Args:
        space: What is trained. Targets have all the training points as their realisation batch.
        seed: Of the initial targets or weights.
        steps: Adam's steps.
        lr: Its rate.
        width: Units of each hidden layer.
    """
    generator = torch.Generator().manual_seed(seed)
    points, classes = two_spirals()
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((2, width, width, width, 2)):
        if space == "targets":
            layer = TargetLinear(fan_in, fan_out, len(points), ridge=RIDGE, generator=generator)
        else:
            layer = nn.Linear(fan_in, fan_out)
            start_weights_(layer, generator)
        layers += [layer, nn.Tanh()]
    model: nn.Module = nn.Sequential(*layers[:-1])
    if space == "targets":
        model = TargetSpace(model, points)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    solved_at = None
    for step in range(steps + 1):
        outputs = model(points)
        right = bool((outputs.argmax(1) == classes).all())
        solved_at = step if right and solved_at is None else solved_at
        if step < steps:
            _descend(optimizer, F.cross_entropy(outputs, classes))
    with torch.no_grad():
        training, test = (_accuracy(model, *two_spirals(between)) for between in (False, True))
    return Spirals(training, test, solved_at)


def train_bit_memory(
    space: Space,
    seed: int,
    delay: int,
    steps: int,
    lr: float,
    batch_size: int = 32,
    realisation_size: int = 8,
    on_step: Callable[[int, float], None] | None = None,
) -> BitMemory:
    """Train a recurrent tanh network to give the bit of ``delay`` steps ago, by Adam.

    Sequences have ``delay + 50`` bits and the network ``delay + 3`` units; the loss and the
    accuracy are over the times that have such a bit.

    Args:
        space: What is trained. Targets have fixed random bits as their realisation batch.
        seed: Of the initial targets or weights, and of the bits.
        delay: The delay D.
        steps: Adam's steps, each on fresh bits.
        lr: Its rate.
        batch_size: Sequences in a step.
        realisation_size: Sequences of the realisation batch.
        on_step: Called after a step with its number and loss.
    """
    generator = torch.Generator().manual_seed(seed)
    data = torch.Generator().manual_seed(seed + 10**6)
    length, units = delay + 50, delay + 3
    model: nn.Module
    if space == "targets":
        rows = (realisation_size, length)
        model = nn.Sequential(
            TargetRecurrent(1, units, rows, ridge=RIDGE, generator=generator),
            TargetLinear(units, 2, rows, ridge=RIDGE, generator=generator),
        )
        model = TargetSpace(model, bits(rows, data)[:, :, None])
    else:
        model = nn.Sequential(RecurrentLayer(1, units), nn.Linear(units, 2))
        for layer in model:
            start_weights_(layer, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    loss = torch.tensor(math.nan)
    for step in range(1, steps + 1):
        shown = bits((batch_size, length), data)
        outputs = model(shown[:, :, None])[:, delay:]
        loss = F.cross_entropy(outputs.flatten(0, 1), shown[:, : length - delay].flatten().long())
        _descend(optimizer, loss)
        if on_step is not None:
            on_step(step, loss.item())
    shown = bits((200, length), torch.Generator().manual_seed(10**7))
    with torch.no_grad():
        outputs = model(shown[:, :, None])[:, delay:].flatten(0, 1)
    right = (outputs.argmax(1) == shown[:, : length - delay].flatten()).float().mean().item()
    finite = bool(torch.isfinite(outputs).all())
    return BitMemory(right if finite else 0.0, loss.item())


def bits(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return random bits, zeros and ones."""
    return torch.randint(2, shape, generator=generator).float()


@torch.no_grad()
def start_weights_(layer: nn.Module, generator: torch.Generator) -> None:
    """Draw weights for tanh from a cut normal of deviation sqrt(6 / (n_in + n_out)).

    The inputs of a recurrent layer are those of the time step and the units. Biases become zero.
    """
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
    fan_in, fan_out = sum(matrix.shape[1] for matrix in matrices), matrices[0].shape[0]
    std = math.sqrt(6 / (fan_in + fan_out))
    for parameter in layer.parameters():
        if parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        else:
            nn.init.zeros_(parameter)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _accuracy(model: nn.Module, points: Tensor, classes: Tensor) -> float:
    outputs = model(points)
    right = (outputs.argmax(1) == classes).float().mean().item()
    return right if bool(torch.isfinite(outputs).all()) else 0.0

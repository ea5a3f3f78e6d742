"""The multi-layer perceptron: linear layers with a norm before each activation, in one sequence.

``Flatten, (Linear, BatchNorm1d, activation) * (depth - 1), Linear``: every layer is a module of its
own, so that a method can walk the sequence and replace what it needs.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import nn

from normlab.lab.models.initialise import ACTIVATIONS, Activation, initialise_


def build(
    input_shape: tuple[int, ...],
    num_classes: int,
    depth: int = 4,
    width: int = 256,
    activation: Activation = "relu",
) -> nn.Sequential:
    """Build a multi-layer perceptron.

    Args:
        input_shape: Shape of one sample; it is flattened.
        num_classes: Number of logits.
        depth: Linear layers, the readout included; at least 1.
        width: Units in each hidden layer.
        activation: ``relu``, ``sigmoid`` or ``tanh``.

    Raises:
        ValueError: A depth or width below 1, or an unknown activation.

    Example:
        >>> [type(layer).__name__ for layer in build((1, 8, 8), 10, depth=2)]
        ['Flatten', 'Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    for option, value in (("depth", depth), ("width", width)):
        if value < 1:
            raise ValueError(
                f"mlp({option}={value}): expected at least 1, got {value}; try 4 and 256"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"mlp(activation={activation!r}): expected one of {', '.join(ACTIVATIONS)}, got "
            f"{activation!r}; choose one of these"
        )
    sizes = [prod(input_shape)] + [width] * (depth - 1)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        layers.append(nn.BatchNorm1d(fan_out))
        layers.append(ACTIVATIONS[activation]())
    layers.append(nn.Linear(sizes[-1], num_classes))
    model = nn.Sequential(*layers)
    initialise_(model, nonlinearity=activation)
    return model

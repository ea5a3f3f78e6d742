"""The plain convolutional network: no shortcuts, any depth, in one sequence.

Up to three stages of ``Conv2d 3x3, BatchNorm2d, activation``, each with twice the width of the one
before and half its size, then global average pooling and one linear layer. Without shortcuts, depth
alone makes it hard to train, which is what it is for.

Source: after K. Simonyan, A. Zisserman, Very Deep Convolutional Networks, 2014, arXiv:1409.1556.

Departs: norms, one linear layer in place of three, and stages and widths for small images.
"""

from __future__ import annotations

from torch import nn

from normlab.lab.models.initialise import ACTIVATIONS, Activation, initialise_

STAGES = 3
SMALLEST_POOLED = 4


def build(
    input_shape: tuple[int, ...],
    num_classes: int,
    depth: int = 8,
    width: int = 32,
    activation: Activation = "relu",
) -> nn.Sequential:
    """Build a plain convolutional network.

    Args:
        input_shape: ``(C, H, W)``. Max pooling between stages stops when a side is below 4 pixels.
        num_classes: Number of logits.
        depth: Weight layers, the readout included; at least 2. Later stages get what does not
            divide.
        width: Channels of the first stage.
        activation: ``relu``, ``sigmoid`` or ``tanh``.

    Raises:
        ValueError: Inputs that are not images, a depth below 2, a width below 1, or an unknown
            activation.

    Example:
        >>> model = build((1, 8, 8), 10, depth=3, width=4)
        >>> [type(layer).__name__ for layer in model if "Conv" in type(layer).__name__]
        ['Conv2d', 'Conv2d']
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"plain-conv(input_shape={tuple(input_shape)}): expected images (C, H, W), got "
            f"{len(input_shape)} dimensions; use the model mlp"
        )
    if depth < 2:
        raise ValueError(f"plain-conv(depth={depth}): expected at least 2, got {depth}; try 8")
    if width < 1:
        raise ValueError(f"plain-conv(width={width}): expected at least 1, got {width}; try 32")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"plain-conv(activation={activation!r}): expected one of {', '.join(ACTIVATIONS)}, got "
            f"{activation!r}; choose one of these"
        )
    channels, height, breadth = input_shape
    layers: list[nn.Module] = []
    for stage, convolutions in enumerate(_stage_sizes(depth - 1)):
        if stage > 0 and min(height, breadth) >= SMALLEST_POOLED:
            layers.append(nn.MaxPool2d(2))
            height, breadth = height // 2, breadth // 2
        out_channels = width * 2**stage
        for _ in range(convolutions):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(out_channels))
            layers.append(ACTIVATIONS[activation]())
            channels = out_channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    model = nn.Sequential(*layers)
    initialise_(model, nonlinearity=activation)
    return model


def _stage_sizes(convolutions: int) -> list[int]:
    stages = min(STAGES, convolutions)
    return [convolutions * (i + 1) // stages - convolutions * i // stages for i in range(stages)]

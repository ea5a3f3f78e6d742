"""What the networks here share: the activations by name, and the initialisation, stated once."""

from __future__ import annotations

from typing import Literal

from torch import nn

Activation = Literal["relu", "sigmoid", "tanh"]
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def initialise_(model: nn.Module, nonlinearity: Activation = "relu") -> nn.Module:
    """Initialise in place, whatever the layers' own defaults are, and return the model.

    Convolutions: normal with variance gain^2 / fan-out. Linear layers: normal with variance
    gain^2 / fan-in, where the last one, which no nonlinearity follows, has gain 1. Biases zero,
    norms the identity.

    Args:
        model: A network whose last linear layer is the readout.
        nonlinearity: What the gain is for: ``relu``, ``sigmoid`` or ``tanh``.

    Source: K. He, X. Zhang, S. Ren, J. Sun, Delving Deep into Rectifiers, 2015, arXiv:1502.01852.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity=nonlinearity)
        elif isinstance(module, nn.Linear):
            gain = "linear" if module is linear[-1] else nonlinearity
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity=gain)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            continue
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model

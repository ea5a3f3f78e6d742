"""Give a layer the scalars of Fixup, wherever it stands.

The scalars become children of the layer, through which its input and output go. The layer keeps its
place, its type and the names of its weights, so models that look into their layers go on working.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normlab.inits.fixup_blocks import ScalarBias, ScalarScale

BEFORE, SCALE, AFTER = "fixup_before", "fixup_scale", "fixup_after"
"""The names of the children: a bias of the input, a multiplier and a bias of the output."""


def bias_before_(layer: nn.Module, like: torch.Tensor) -> None:
    """Add a scalar bias to a layer's input; of attention to query, key and value of one tensor.

    Args:
        layer: The layer, changed in place; nothing happens if it has one.
        like: A tensor with the dtype and device for the scalar.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> bias_before_(layer, layer.weight)
        >>> list(layer.state_dict())
        ['weight', 'fixup_before.value']
    """
    if BEFORE not in layer._modules:
        layer.add_module(BEFORE, _made(ScalarBias(), layer, like))
        layer.register_forward_pre_hook(_shift_input, with_kwargs=True)


def scale_after_(layer: nn.Module, like: torch.Tensor) -> None:
    """Multiply a layer's output by a scalar; arguments as in `bias_before_`."""
    if SCALE not in layer._modules:
        layer.add_module(SCALE, _made(ScalarScale(), layer, like))
        _change_output_of(layer)


def bias_after_(layer: nn.Module, like: torch.Tensor) -> None:
    """Add a scalar bias to a layer's output, behind its scale; arguments as in `bias_before_`."""
    if AFTER not in layer._modules:
        layer.add_module(AFTER, _made(ScalarBias(), layer, like))
        _change_output_of(layer)


def _made(scalar: nn.Module, layer: nn.Module, like: torch.Tensor) -> nn.Module:
    return scalar.to(device=like.device, dtype=like.dtype).train(layer.training)


def _shift_input(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first = inputs[0] if inputs else next(iter(named.values()))
    shifted = layer.get_submodule(BEFORE)(first)
    inputs = tuple(shifted if one is first else one for one in inputs)
    return inputs, {name: shifted if one is first else one for name, one in named.items()}


def _change_output_of(layer: nn.Module) -> None:
    # One hook for both, so that the bias stands behind the scale whichever came first.
    if not any(hook is _change_output for hook in layer._forward_hooks.values()):
        layer.register_forward_hook(_change_output)


def _change_output(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return _change_output(layer, inputs, output[0]), *output[1:]
    for name in (SCALE, AFTER):
        if name in layer._modules:
            output = layer.get_submodule(name)(output)
    return output

"""Put BatchNorm layers into a model that has none, so that methods find their places."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import BATCH_NORMS, swap

_CONVOLUTIONS = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.ConvTranspose3d),
)


def insert_batch_norms(model: nn.Module, *inputs: Any) -> tuple[nn.Module, int]:
    """Put a BatchNorm behind each convolution and linear layer but the last one that is called.

    Each weight layer becomes an ``nn.Sequential`` of ``layer`` and ``norm``. A linear layer on
    sequences ``(N, L, C)`` is left: its units are not the axis that BatchNorm takes for channels.
    So is a layer that is called several times.

    Args:
        model: Any module, changed in place.
        inputs: What its forward takes; two samples are enough.

    Returns:
        The model (another root if it was itself a weight layer), and how many layers were put in.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [type(layer).__name__ for layer in insert_batch_norms(model, torch.zeros(2, 4))[0][0]]
        ['Linear', 'BatchNorm1d']
    """
    flow = trace_flow(model, *inputs)
    calls = [call for call in flow.calls if _norm_class(call.module) is not None]
    replacements: dict[nn.Module, nn.Module] = {}
    for call in calls[:-1]:
        layer, kind = call.module, _norm_class(call.module)
        flat = isinstance(layer, nn.Linear)
        sequences = flat and (call.input_shape is None or len(call.input_shape) != 2)
        if kind is None or sequences or len(flow.of(layer)) > 1:
            continue
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        norm = kind(width)
        replacements[layer] = nn.Sequential(OrderedDict(layer=layer, norm=norm))
    return swap(model, replacements), len(replacements)


def _norm_class(layer: nn.Module) -> type[nn.Module] | None:
    if type(layer) is nn.Linear:
        return nn.BatchNorm1d
    for classes, norm in zip(_CONVOLUTIONS, BATCH_NORMS, strict=True):
        if type(layer) in classes:
            return norm
    return None

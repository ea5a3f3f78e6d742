"""Take BatchNorm out of a network and give the layers in front of it the biases it stood for."""

from __future__ import annotations

import torch
from torch import nn

from normlab.surgery.flow import Call, Source, Sum, trace_flow
from normlab.surgery.swap import BATCH_NORMS, modules_of, swap

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
"""The layers that may be given a bias."""


def take_out_batch_norms(model: nn.Module, inputs: torch.Tensor) -> tuple[nn.Module, int, int]:
    """Replace each BatchNorm by the identity; the weight layers in front of it get biases of zero.

    Networks drop the bias of a layer that a BatchNorm follows, because the BatchNorm's own shift
    replaces it. The layers in front are found behind pooling, functions and sums, too.

    Args:
        model: The model, changed in place.
        inputs: A batch, of which two samples are run.

    Returns:
        The model, the number of BatchNorm layers taken out, and of layers that got a bias.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
        >>> take_out_batch_norms(model, torch.zeros(2, 4))
        (Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): Identity()
        ), 1, 1)
    """
    norms = list(modules_of(model, BATCH_NORMS).values())
    if not norms:
        return model, 0, 0
    flow = trace_flow(model, inputs[:2])
    found: dict[nn.Module, None] = {}
    for norm in norms:
        seen: set[int] = set()
        for call in flow.of(norm):
            _collect(call.source, found, seen)
    bare = [layer for layer in found if layer._parameters.get("bias") is None]
    for layer in bare:
        assert isinstance(layer, WEIGHT_LAYERS)
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(layer.weight.new_zeros(size))
    return swap(model, {norm: nn.Identity() for norm in norms}), len(norms), len(bare)


def _collect(source: Source, found: dict[nn.Module, None], seen: set[int]) -> None:
    """Add the weight layers that made a tensor, looking through whatever has no weights."""
    if source is None or id(source) in seen:
        return
    seen.add(id(source))
    if isinstance(source, Call):
        if type(source.module) in WEIGHT_LAYERS:
            found[source.module] = None
        elif not any(p.dim() > 1 for p in source.module.parameters()):
            _collect(source.source, found, seen)
    else:
        for term in source.terms if isinstance(source, Sum) else source.sources:
            _collect(term, found, seen)

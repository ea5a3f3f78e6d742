r"""Merge batch normalisation into the weight layer beside it, for networks in use.

In evaluation BatchNorm is a fixed affine map of each channel, and so is, up to its weights, the
layer beside it: one of the two can take in the other.

Departs:
    - Torch's own fusions rewrite a traced graph; here any control flow is allowed, and one pass
      shows which tensors went where. What another input would do differently is not seen.
    - Behind zero padding a shift is not the same at the border as inside, so a BatchNorm in front
      of a padded convolution stays unless its shift is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from normlab.method import Unsuitable
from normlab.surgery.freeze import FrozenBatchNorm
from normlab.surgery.merge import (
    affine_map,
    merge_norm_after,
    merge_norm_before,
    shift_is_uniform,
)
from normlab.surgery.swap import BATCH_NORMS, modules_of, swap
from normlab.surgery.watch import Watched, WatchedCall, watch

_NORMS = (*BATCH_NORMS, nn.SyncBatchNorm, FrozenBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Folded:
    """What folding did; ``str`` of it is a table.

    Attributes:
        folded: Names of normalisers, each with where it went: ``"into 'conv1' before it"``.
        skipped: Names of normalisers that stayed, each with the reason.
    """

    folded: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        rows = [(name, f"folded {where}") for name, where in self.folded.items()]
        rows += [(name, f"kept: {reason}") for name, reason in self.skipped.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def fold_batch_norms(model: nn.Module, *inputs: Any) -> Folded:
    r"""Merge each BatchNorm into the linear or convolutional layer before or after it.

    With :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`t = \beta - s \mu`:

    .. math::
        s (W x + b) + t = (s W) x + (s b + t), \qquad
        W (s x + t) + b = (W s) x + (b + W t)

    The layer before is preferred. It must be called once and its output go into the normaliser
    alone, which is seen in one pass, operation by operation; the same holds for the normaliser and
    the layer after it. New weights are computed in float64; parameters change in place, so that an
    optimiser keeps them. An `nn.Identity` takes the normaliser's place. `FrozenBatchNorm` is folded
    as well.

    Args:
        model: A model in evaluation mode, changed in place.
        inputs: What its forward takes; two samples are enough.

    Returns:
        What was folded and what was not, by name. `freeze` turns what is left into plain scale
        and shift.

    Raises:
        ValueError: The model or one of its normalisers is in training mode.
        Unsuitable: The model has no batch normalisation layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
        >>> print(fold_batch_norms(model.eval(), torch.zeros(2, 4)))
        1  folded into '0' before it
        3  kept: '2' (ReLU) makes its input, and the model returns its output
    """
    norms = modules_of(model, _NORMS)
    if not norms:
        raise Unsuitable(
            f"fold_batch_norms(model): expected a model with nn.BatchNorm layers, got "
            f"{type(model).__name__} without any; leave folding out"
        )
    training = [name for name, m in {"": model, **norms}.items() if m.training]
    if training:
        raise ValueError(
            "fold_batch_norms(model): expected evaluation mode, got "
            f"{training[0] or 'a model'} in training mode; call model.eval() first"
        )
    folded: dict[str, str] = {}
    while norms:
        watched = watch(model, *inputs)
        verdicts = {name: _fold(model, norm, watched) for name, norm in norms.items()}
        done = {name: where for name, (where, _) in verdicts.items() if where}
        folded.update(done)
        norms = {name: norm for name, norm in norms.items() if name not in done}
        # Of two normalisers in a row the second sees the layer only once the first is gone.
        if not done:
            return Folded(folded, {name: reason for name, (_, reason) in verdicts.items()})
    return Folded(folded, {})


def _fold(model: nn.Module, norm: Any, watched: Watched) -> tuple[str, str]:
    """Fold one normaliser; return where it went or ``""``, and the reason if it did not."""
    unfit = _unfit(norm, watched)
    if unfit is None and getattr(norm, "running_mean", None) is None:
        unfit = "has no running statistics"
    if unfit is not None:
        return "", f"it {unfit}"
    scale, shift = affine_map(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    (call,) = watched.calls[norm]
    before = _layer_before(norm, call, watched)
    if not isinstance(before, str):
        before_name = watched.names[before]
        new = merge_norm_after(before.weight, before.bias, scale, shift, **_layout(before))
        if _store(before, *new):
            swap(model, {norm: nn.Identity()})
            return f"into {before_name!r} before it", ""
        before = f"the weights of {before_name!r} would not be finite"
    after = _layer_after(norm, call, shift, watched)
    if not isinstance(after, str):
        after_name = watched.names[after]
        new = merge_norm_before(after.weight, after.bias, scale, shift, **_layout(after))
        if _store(after, *new):
            swap(model, {norm: nn.Identity()})
            return f"into {after_name!r} after it", ""
        after = f"the weights of {after_name!r} would not be finite"
    return "", f"{before}, and {after}"


def _layer_before(norm: nn.Module, call: WatchedCall, watched: Watched) -> Any:
    """Return the layer whose output goes into ``norm`` and nowhere else, or why there is none."""
    layer = _layer_with("output", call.input, watched)
    if layer is None:
        return f"{watched.makers.get(id(call.input), 'the user')} makes its input"
    name = watched.names[layer]
    others = [u for user, u in watched.users[id(call.input)].items() if user is not norm]
    if others:
        return f"{others[0]} the output of {name!r}, too"
    return _unfit_layer(layer, call.input, watched) or layer


def _layer_after(norm: nn.Module, call: WatchedCall, shift: Tensor, watched: Watched) -> Any:
    """Return the layer that alone takes the output of ``norm``, or why there is none."""
    users = watched.users.get(id(call.output), {})
    layer = _layer_with("input", call.output, watched)
    others = [u for user, u in users.items() if user is not layer]
    if others or layer is None:
        return f"{others[0]} its output" if others else "nothing takes its output"
    unfit = _unfit_layer(layer, call.output, watched)
    if unfit is None and shift.any() and not _shift_is_uniform(layer):
        unfit = f"at the borders of {watched.names[layer]!r} its shift would differ"
    return unfit or layer


def _layer_with(side: str, tensor: Tensor | None, watched: Watched) -> nn.Module | None:
    found = (
        module
        for module, calls in watched.calls.items()
        if isinstance(module, _LAYERS) and any(getattr(call, side) is tensor for call in calls)
    )
    return None if tensor is None else next(found, None)


def _unfit(module: nn.Module, watched: Watched) -> str | None:
    """Return why a module cannot be changed without changing something else."""
    calls = watched.calls.get(module, [])
    if len(calls) != 1:
        return f"is called {len(calls)} times" if calls else "is not called"
    if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
        return "has hooks"
    return None


def _unfit_layer(layer: Any, tensor: Tensor | None, watched: Watched) -> str | None:
    name = watched.names[layer]
    unfit = _unfit(layer, watched)
    if unfit is not None:
        return f"{name!r} {unfit}"
    if layer._parameters.get("weight") is None or is_parametrized(layer):
        return f"{name!r} is re-parametrised"
    if type(layer) not in _LAYERS:
        return f"{name!r} is of class {type(layer).__name__}, which may do more than torch's own"
    for parameter in layer.parameters():
        # A bias that this file made a moment ago is nobody else's.
        owners = watched.owners.get(id(parameter), [layer])
        users = {*owners, *watched.users.get(id(parameter), {})}
        if users != {layer}:
            return f"{name!r} shares a parameter"
    axes = 2 if isinstance(layer, nn.Linear) else layer.weight.dim()
    if tensor is None or tensor.dim() != axes:
        return f"its channels are not those of {name!r}"
    return None


def _layout(layer: nn.Module) -> dict[str, Any]:
    groups = getattr(layer, "groups", 1)
    return {"groups": groups, "transposed": isinstance(layer, _TRANSPOSED)}


def _shift_is_uniform(layer: Any) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return True
    return shift_is_uniform(
        layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.transposed
    )


@torch.no_grad()
def _store(layer: Any, weight: Tensor, bias: Tensor | None) -> bool:
    """Write new weights in the layer's dtype; False, with nothing written, if they overflow."""
    weight = weight.to(layer.weight)
    bias = None if bias is None else bias.to(layer.weight)
    if not all(bool(torch.isfinite(new).all()) for new in (weight, bias) if new is not None):
        return False
    layer.weight.copy_(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    elif bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    return True

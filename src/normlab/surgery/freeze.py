r"""Freeze batch normalisation: a fixed affine map that ``model.train()`` cannot thaw.

Setting BatchNorm to evaluation mode does not last, because the next ``model.train()`` sets it
back. A frozen layer has no mode: it applies its running statistics in training and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Unsuitable
from normlab.moments import check_channels, per_channel, wide
from normlab.surgery.swap import BATCH_NORMS, modules_of, swap

_KINDS = (*BATCH_NORMS, nn.SyncBatchNorm)


class FrozenBatchNorm(nn.Module):
    r"""BatchNorm of ``(N, C, *)`` with fixed statistics, the same in training and evaluation.

    .. math::
        y = s x + (\beta - s \mu), \quad s = \gamma / \sqrt{\sigma^2 + \epsilon}

    Its state has the keys of `nn.BatchNorm2d`, so that a ``state_dict`` loads both ways; one
    without ``num_batches_tracked`` is taken, too. Unless the affine map trains, nothing of the
    size of the input is kept for backward, where BatchNorm keeps the input.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance.
        affine: Whether there are a scale and a shift.
        train_affine: Whether scale and shift get gradients.
        momentum: Not used here; `unfreeze` gives it back.
        kind: The class that `unfreeze` gives back.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ValueError: At the call, for input of another number of channels, of integers, or empty.

    Example:
        >>> layer = FrozenBatchNorm(3).train()
        >>> layer(torch.ones(1, 3)).detach()
        tensor([[1.0000, 1.0000, 1.0000]])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        affine: bool = True,
        train_affine: bool = False,
        momentum: float | None = 0.1,
        kind: type[nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.train_affine = train_affine
        self.momentum = momentum
        self.kind = kind
        # What `unfreeze` gives back and no state_dict holds.
        self.required_grad: tuple[str, ...] = ("weight", "bias")
        self.process_group: Any = None
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            start = torch.full((num_features,), value) if affine else None
            parameter = None if start is None else nn.Parameter(start, requires_grad=train_affine)
            self.register_parameter(name, parameter)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``x`` of shape ``(N, C, *)`` by its channel's fixed factors."""
        check_channels("FrozenBatchNorm", x, self.num_features)
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if not self.train_affine:
            # Also where somebody called model.requires_grad_(True) after freezing.
            weight = None if weight is None else weight.detach()
            bias = None if bias is None else bias.detach()
        scale = torch.rsqrt(wide(self.running_var) + self.eps)
        scale = scale if weight is None else scale * weight
        shift = -self.running_mean * scale
        shift = shift if bias is None else shift + bias
        return (x * per_channel(scale, x)).add_(per_channel(shift, x)).to(x.dtype)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return (
            f"{self.num_features}, eps={self.eps}, affine={self.affine}, "
            f"train_affine={self.train_affine}, kind={self.kind.__name__}"
        )


def freeze(
    model: nn.Module,
    *,
    train_affine: bool = False,
    only: Callable[[str], bool] | Iterable[str] | None = None,
) -> list[str]:
    """Replace batch normalisation layers by `FrozenBatchNorm`, which training leaves as they are.

    The frozen layers hold the very parameters and buffers of the old ones, so an optimiser made
    before stays valid. Layers of a subclass of torch's stay as they are, and those already frozen.

    Args:
        model: The model, changed in place.
        train_affine: Whether scale and shift go on training; only the statistics are fixed then.
        only: Which layers: names of layers or of modules that hold some, or a function of a
            layer's name. None freezes all.

    Returns:
        The names of the layers frozen.

    Raises:
        ValueError: ``only`` names a module that is not there or chooses nothing; a layer has no
            running statistics, or has hooks, which would be lost. Nothing is changed then.
        Unsuitable: The model has no batch normalisation layer, or is one itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> freeze(model)
        ['1']
        >>> model.train()[1]
        FrozenBatchNorm(3, eps=1e-05, affine=True, train_affine=False, kind=BatchNorm1d)
    """
    norms = modules_of(model, _KINDS)
    if not norms and not modules_of(model, (FrozenBatchNorm,)):
        raise Unsuitable(
            f"freeze(model): expected a model with nn.BatchNorm layers, got "
            f"{type(model).__name__} without any; leave freezing out"
        )
    _refuse_root(model, norms, "freeze")
    chosen = _choose(model, norms, only)
    for name, norm in chosen.items():
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"freeze(model): expected running statistics, got {name!r} with "
                "track_running_stats=False; leave it out by `only`"
            )
    _refuse_hooks(chosen, "freeze")
    frozen = {norm: _frozen(norm, train_affine) for norm in chosen.values()}
    swap(model, dict(frozen))
    for norm, layer in frozen.items():
        layer.required_grad = tuple(n for n, p in norm.named_parameters() if p.requires_grad)
        _move_state(norm, layer)
        for parameter in () if train_affine else layer.parameters():
            parameter.requires_grad_(False)
            # An optimiser would go on with the last gradient, and with weight decay.
            parameter.grad = None
    return list(chosen)


def unfreeze(model: nn.Module) -> list[str]:
    """Put torch's layer back in the place of each `FrozenBatchNorm`, with the same tensors.

    Args:
        model: The model, changed in place.

    Returns:
        The names of the layers thawed; their mode is that of the frozen layer.

    Raises:
        ValueError: A frozen layer has hooks, which would be lost. Nothing is changed then.
        Unsuitable: The model has no frozen layer, or is one itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> freeze(model) == unfreeze(model)
        True
        >>> type(model[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    frozen = modules_of(model, (FrozenBatchNorm,))
    if not frozen:
        raise Unsuitable(
            f"unfreeze(model): expected a model with FrozenBatchNorm layers, got "
            f"{type(model).__name__} without any; leave unfreezing out"
        )
    _refuse_root(model, frozen, "unfreeze")
    _refuse_hooks(frozen, "unfreeze")
    thawed = {layer: _thawed(layer) for layer in frozen.values()}
    swap(model, thawed)
    for layer, norm in thawed.items():
        assert isinstance(layer, FrozenBatchNorm)
        _move_state(layer, norm)
        for name in layer.required_grad:
            parameter = norm._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(True)
    return list(frozen)


def _frozen(norm: Any, train_affine: bool) -> FrozenBatchNorm:
    layer = FrozenBatchNorm(
        norm.num_features,
        norm.eps,
        affine=norm.affine,
        train_affine=train_affine,
        momentum=norm.momentum,
        kind=type(norm),
    )
    layer.process_group = getattr(norm, "process_group", None)
    return layer


def _thawed(layer: Any) -> nn.Module:
    make: Callable[..., Any] = layer.kind
    norm = make(layer.num_features, layer.eps, layer.momentum, layer.affine)
    if hasattr(norm, "process_group"):
        norm.process_group = layer.process_group
    return norm


def _move_state(old: nn.Module, new: nn.Module) -> None:
    # After the swap, which would bring weights and statistics of two dtypes to one.
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)


def _refuse_root(model: nn.Module, layers: dict[str, nn.Module], operation: str) -> None:
    if "" in layers:
        raise Unsuitable(
            f"{operation}(model): expected a model that holds layers, got the layer "
            f"{type(model).__name__} itself; put it into an nn.Sequential"
        )


def _refuse_hooks(layers: dict[str, nn.Module], operation: str) -> None:
    for name, layer in layers.items():
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            raise ValueError(
                f"{operation}(model): expected layers without hooks, got {name!r} with some, "
                "which would be lost; remove them first"
            )


def _choose(
    model: nn.Module, norms: dict[str, Any], only: Callable[[str], bool] | Iterable[str] | None
) -> dict[str, Any]:
    if only is None:
        return norms
    if callable(only):
        chosen = {name: norm for name, norm in norms.items() if only(name)}
    else:
        wanted = [only] if isinstance(only, str) else list(only)
        # One module may be registered under several names; any of them will do.
        known = dict(model.named_modules(remove_duplicate=False))
        for name in wanted:
            if name not in known:
                near = get_close_matches(name, list(known), n=1, cutoff=0.0)
                raise ValueError(
                    f"freeze(only={name!r}): expected the name of a module of the model, got "
                    f"{name!r}; do you mean {near[0]!r}?"
                )
        held = {id(module) for name in wanted for module in known[name].modules()}
        chosen = {name: norm for name, norm in norms.items() if id(norm) in held}
    if not chosen:
        raise ValueError(
            f"freeze(only=...): expected to choose at least one of {', '.join(norms) or 'none'}, "
            "got none of them; name layers or modules that hold some"
        )
    return chosen

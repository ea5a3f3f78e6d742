r"""The length and the direction of each unit's weight vector as two parameters of their own.

.. math::
    w_i = g_i \, v_i / \lVert v_i \rVert_2

Registered with ``torch.nn.utils.parametrize``, so that it composes with other parametrisations,
stands in ``state_dict`` as ``parametrizations.weight.original0`` (g) and ``original1`` (v), and can
be taken off again. torch's own ``weight_norm`` does the arithmetic wherever it can; what is added
is the axis that fits each layer, and what is wrong is refused before it makes NaN.

Departs:
    - In a transposed convolution of several groups no axis of the weight is the output unit, so a
      parametrisation of our own takes the norms there.
    - A weight vector of zeros, whose direction is undefined, is refused; torch makes it NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, parametrize

from normlab.method import Unsuitable

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
WITHOUT_START = (*RECURRENT, nn.MultiheadAttention)
"""Layers whose pre-activations stay inside, where no data-dependent start sees them."""

WeightLayer: TypeAlias = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)
"""A layer with one weight and one bias, whose output units are its features or channels."""


class GroupedTransposedWeightNorm(nn.Module):
    r"""Weight normalisation of a transposed convolution's weight ``(in, out / G, *kernel)``.

    Args:
        groups: The number G of groups of the convolution.

    Example:
        >>> norm = GroupedTransposedWeightNorm(2)
        >>> length, direction = norm.right_inverse(torch.ones(4, 3, 5))
        >>> length.shape, norm(length, direction).shape
        (torch.Size([2, 1, 3, 1]), torch.Size([4, 3, 5]))
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        """Return the weight of g ``(G, 1, out / G, 1, ...)`` and v ``(in, out / G, *kernel)``."""
        units = direction.unflatten(0, (self.groups, -1))
        return (units * (length / self._norms(direction))).flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return g and v that give ``weight``."""
        return self._norms(weight), weight

    def _norms(self, weight: Tensor) -> Tensor:
        units = weight.unflatten(0, (self.groups, -1))
        axes = [1, *range(3, units.dim())]
        return torch.linalg.vector_norm(units, dim=axes, keepdim=True)


_OURS = (parametrizations._WeightNorm, GroupedTransposedWeightNorm)


@dataclass(frozen=True)
class WeightNormed:
    """One weight that is given by its length and direction.

    Attributes:
        name: The qualified name of its layer.
        layer: The layer.
        tensor: The name of the weight in it.
        parametrization: What torch registered: g is its ``original0``, v its ``original1``.
    """

    name: str
    layer: nn.Module
    tensor: str
    parametrization: parametrize.ParametrizationList

    @property
    def length(self) -> nn.Parameter:
        """The parameter g; flattened, it has one entry for each output unit, in their order."""
        return cast(nn.Parameter, self.parametrization.original0)

    @property
    def direction(self) -> nn.Parameter:
        """The parameter v, of the shape of the weight."""
        return cast(nn.Parameter, self.parametrization.original1)

    @property
    def is_alone(self) -> bool:
        """Whether no other parametrisation follows on this weight."""
        return len(self.parametrization) == 1


def weight_normed(model: nn.Module) -> list[WeightNormed]:
    """Return every weight of a model that weight normalisation parametrises."""
    return [
        WeightNormed(name, layer, tensor, chain)
        for name, layer in model.named_modules()
        for tensor, chain in _chains(layer)
        if isinstance(chain[0], _OURS)
    ]


def weight_normalize(model: nn.Module, *, skip: Iterable[nn.Module] = ()) -> nn.Module:
    r"""Give each weight of a model by its length and direction; the model computes the same.

    One length g for each output unit: a row of a linear layer, a filter of a convolution (its
    output channel where it is transposed), a row of each input and each recurrent weight of an
    ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` or cell, a row of each weight of an
    ``nn.MultiheadAttention``. Weights that do not train are left alone. The parameters are new
    ones: make the optimiser afterwards. With several processes, call it before the model is
    wrapped.

    Args:
        model: The model, changed in place.
        skip: Modules of the model that are left alone with all they hold.

    Returns:
        The model.

    Raises:
        Unsuitable: There is nothing to normalise, a unit's weights are all zero or their length is
            out of range, a weight is parametrised already, has no values yet, or is shared by
            several places. The model is not changed then.

    Example:
        >>> model = weight_normalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
        >>> for name, parameter in model[0].named_parameters():
        ...     print(name, tuple(parameter.shape))
        bias (2,)
        parametrizations.weight.original0 (2, 1)
        parametrizations.weight.original1 (2, 3)
    """
    left = {inner for module in skip for inner in module.modules()}
    chosen = [place for place in trained_weights(model) if place[1] not in left]
    if not chosen:
        raise Unsuitable(
            "weight_normalize(model): expected a linear, convolutional or recurrent layer with a "
            f"weight that trains, got {type(model).__name__} without any; leave the method out"
        )
    check_weights(model, chosen)
    for _, layer, tensor in chosen:
        _register(layer, tensor)
    return model


def remove_weight_norm(model: nn.Module) -> nn.Module:
    """Turn every weight-normalised weight back into one plain parameter; it computes the same.

    Args:
        model: The model, changed in place. Its weights are new parameters then.

    Returns:
        The model.

    Raises:
        ValueError: Another parametrisation was put on top, which would have to go first. The model
            is not changed then.

    Example:
        >>> model = remove_weight_norm(weight_normalize(nn.Linear(3, 2)))
        >>> list(model.state_dict())
        ['bias', 'weight']
    """
    found = weight_normed(model)
    for one in found:
        if not one.is_alone:
            others = ", ".join(type(part).__name__ for part in list(one.parametrization)[1:])
            raise ValueError(
                f"remove_weight_norm(model): expected weight normalisation alone on {one.tensor} "
                f"of {one.name or 'the model'}, got {others} on top of it; remove that first"
            )
    for one in found:
        _take_class_of_its_own(one.layer)
        trains = one.length.requires_grad or one.direction.requires_grad
        with torch.no_grad():
            weight = nn.Parameter(getattr(one.layer, one.tensor).clone(), requires_grad=trains)
        parametrize.remove_parametrizations(one.layer, one.tensor)
        delattr(one.layer, one.tensor)
        one.layer.register_parameter(one.tensor, weight)
    return model


def trained_weights(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return ``(layer's name, layer, weight's name)`` of the weights that train."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            tensors = ["weight"]
        elif isinstance(layer, WITHOUT_START):
            # Those behind a parametrisation are attributes of the class, no longer parameters.
            parametrised = [tensor for tensor, _ in _chains(layer)]
            own = [name for name, parameter in layer._parameters.items() if parameter is not None]
            tensors = [t for t in (*own, *parametrised) if _is_weight(layer, t)]
        else:
            continue
        for tensor in tensors:
            weight = layer._parameters.get(tensor)
            if weight is None or weight.requires_grad:
                found.append((name, layer, tensor))
    return found


def _is_weight(layer: nn.Module, tensor: str) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return tensor.endswith("proj_weight")
    return tensor.startswith("weight_")


def check_weights(
    model: nn.Module,
    chosen: Iterable[tuple[str, nn.Module, str]],
    *,
    zeros_allowed: Iterable[nn.Module] = (),
) -> None:
    """Raise `Unsuitable` for a weight that cannot be given by length and direction.

    Args:
        model: The model.
        chosen: As `trained_weights` gives them.
        zeros_allowed: Layers whose weights are drawn anew before.
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{name}.{tensor}".lstrip("."))
    drawn = set(zeros_allowed)
    for name, layer, tensor in chosen:
        label = f"{name}.{tensor}".lstrip(".")
        weight = layer._parameters.get(tensor)
        if weight is None:
            _refuse(label, "a plain weight", "a parametrised one", "weight-normalise it first")
        elif isinstance(weight, UninitializedParameter):
            _refuse(label, "a weight with values", "a lazy one", "run the model once before")
        elif len(places[id(weight)]) > 1:
            shared = " and ".join(places[id(weight)])
            _refuse(label, "a weight in one place", f"one shared by {shared}", "untie them")
        elif layer not in drawn and not weight.is_meta:
            norms = _parametrization_norms(layer, weight)
            zeros = torch.nonzero(~(norms > 0)).flatten().tolist()
            large = torch.nonzero(norms.isinf()).flatten().tolist()
            if zeros:
                _refuse(
                    label,
                    "weights other than zero in every unit",
                    f"zeros or NaN in {_few(zeros)}",
                    "start them at random (weight-norm:v_std=0.05 does), or name the layer in skip",
                )
            if large:
                _refuse(
                    label,
                    f"lengths that {weight.dtype} holds",
                    f"inf in {_few(large)}",
                    "take smaller weights, or float32",
                )


def _refuse(label: str, expected: str, got: str, do: str) -> None:
    raise Unsuitable(f"weight_normalize({label}): expected {expected}, got {got}; {do}")


def _few(units: list[int]) -> str:
    shown = ", ".join(map(str, units[:8]))
    more = f", ... ({len(units)} in all)" if len(units) > 8 else ""
    return f"unit {shown}" if len(units) == 1 else f"units {shown}{more}"


def _grouped(layer: nn.Module) -> GroupedTransposedWeightNorm | None:
    """Our own parametrisation, for the one kind of layer that torch's does not fit."""
    if isinstance(layer, TRANSPOSED) and layer.groups > 1:
        return GroupedTransposedWeightNorm(layer.groups)
    return None


def _axis(layer: nn.Module) -> int:
    """The axis of the output units in the weight."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def _parametrization_norms(layer: nn.Module, weight: Tensor) -> Tensor:
    with torch.no_grad():
        ours = _grouped(layer)
        if ours is not None:
            return ours.right_inverse(weight)[0].flatten()
        return torch.norm_except_dim(weight, 2, _axis(layer)).flatten()


def _register(layer: nn.Module, tensor: str) -> None:
    ours = _grouped(layer)
    if ours is None:
        parametrizations.weight_norm(layer, tensor, dim=_axis(layer))
    else:
        parametrize.register_parametrization(layer, tensor, ours)
    _refresh(layer)


def _refresh(layer: nn.Module) -> None:
    """Let a recurrent layer, which keeps a list of its weights, look them up anew."""
    if isinstance(layer, nn.RNNBase):
        with torch.no_grad():
            layer._init_flat_weights()
        # The class is this layer's own; torch made it for the parametrisation.
        setattr(type(layer), "__deepcopy__", _copy_recurrent)  # noqa: B010


def _copy_recurrent(layer: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    """Copy a recurrent layer; its list holds results with a graph, which torch does not copy."""
    twin = layer.__new__(type(layer))
    memo[id(layer)] = twin
    lists = ("_flat_weights", "_flat_weight_refs")
    kept = {name: value for name, value in layer.__dict__.items() if name not in lists}
    twin.__dict__ = copy.deepcopy(kept, memo)
    with torch.no_grad():
        twin._init_flat_weights()
    return twin


def _take_class_of_its_own(layer: nn.Module) -> None:
    """Undo that torch lets a deepcopy share the class from which a removal deletes the weight."""
    kind = type(layer)
    content = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    own = type(kind.__name__, kind.__bases__, content)
    object.__setattr__(layer, "__class__", own)


def _chains(layer: nn.Module) -> Iterator[tuple[str, parametrize.ParametrizationList]]:
    chains = layer._modules.get("parametrizations")
    if isinstance(chains, nn.ModuleDict):
        for tensor, chain in chains.items():
            if isinstance(chain, parametrize.ParametrizationList):
                yield tensor, chain

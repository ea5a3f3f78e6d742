"""What Fixup's general form cannot take: found, and said, before anything is changed.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from normlab.inits.fixup_blocks import ScalarBias
from normlab.inits.fixup_rules import weights_of
from normlab.method import Unsuitable
from normlab.surgery.branches import BranchPlan
from normlab.surgery.flow import evaluating
from normlab.surgery.normalisers import find_normalisers


def check_plan(model: nn.Module, plan: BranchPlan) -> None:
    """Refuse a plan that `normlab.inits.fixup_any.fixup_any_` cannot follow.

    Args:
        model: The model; nothing in it is changed.
        plan: A plan of its branches.

    Raises:
        ValueError: The plan is one of another model.
        Unsuitable: There is no branch, a weight is not free to start as the rules say, or a
            normaliser cannot be taken out.
    """
    if not plan.branches:
        raise Unsuitable(
            "fixup(model): expected a network with residual branches, got a plan without any; "
            "add one (plan.with_branch)"
        )
    layers = _layers(plan)
    own = set(model.modules())
    if not own.issuperset([*layers, *plan.norms.values()]):
        raise ValueError(
            "fixup_any_(model, plan): expected a plan of this very model, got one of another "
            "(a copy has modules of its own); call plan_branches on this one"
        )
    refuse_scalars(model)
    for layer in layers:
        _check_layer(layer, plan.graph.names[layer])
    _check_starts(model, plan)
    for found in find_normalisers(model):
        if found.is_batch_norm and found.obstacle and found.module in plan.norms.values():
            raise Unsuitable(
                f"fixup(model): expected normalisers that can be taken out, got {found.name}: "
                f"{found.obstacle}"
            )


def refuse_scalars(model: nn.Module) -> None:
    """Refuse a model that has Fixup's scalars already: it would get them twice."""
    for name, module in model.named_modules():
        if isinstance(module, ScalarBias):
            raise Unsuitable(
                f"fixup(model): expected a model without Fixup's scalars, got {name}; prepare a "
                "model once"
            )


def tied_embeddings(model: nn.Module, plan: BranchPlan) -> dict[str, nn.Embedding]:
    """Return the embedding of which a readout has the weight, by the readout's name."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {
        name: embedding
        for name, head in plan.heads.items()
        for embedding in embeddings
        if head._parameters.get("weight") is embedding.weight
    }


def _layers(plan: BranchPlan) -> list[nn.Module]:
    inside = [layer for branch in plan.branches for layer in branch.layers]
    return list(dict.fromkeys([*inside, *plan.outside.values(), *plan.heads.values()]))


def _check_layer(layer: nn.Module, name: str) -> None:
    if any(weight is None for weight in weights_of(layer)):
        raise Unsuitable(
            f"fixup(model): expected plain weights, got {name}, whose weight is computed in each "
            "pass; remove the re-parametrisation first"
        )
    if _undoes_scaling(layer):
        raise Unsuitable(
            f"fixup(model): expected layers that are linear in their weight, got {name}, a "
            f"{type(layer).__name__}, which undoes the scaling of it; use a plain one"
        )


@torch.no_grad()
def _undoes_scaling(layer: nn.Module) -> bool:
    """Whether half the weight does not give half the output, as with standardised weights."""
    if type(layer).__module__.startswith("torch."):
        return False
    # In single precision, because a half may overflow or round away what tells.
    layer = copy.deepcopy(layer).float()
    if isinstance(layer, nn.Linear):
        shape = (2, layer.in_features)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = (2, layer.in_channels, *(2 * size for size in reach))
    else:
        return False
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    with evaluating(layer):
        whole = layer(x) - layer(torch.zeros_like(x))
        layer.weight.mul_(0.5)
        half = layer(x) - layer(torch.zeros_like(x))
    # Written so that what is not a number counts as a difference.
    return not (2 * half - whole).abs().max() <= 1e-2 * whole.abs().max()


def _check_starts(model: nn.Module, plan: BranchPlan) -> None:
    """Refuse a weight that has two places, of which one starts at zero and the other does not."""
    names = plan.graph.names
    starts: dict[int, tuple[bool, nn.Module]] = {}

    def note(layer: nn.Module, ends: bool) -> None:
        weights = weights_of(layer)
        for weight in weights:
            # Of attention only the output projection, which is the last one, ends a branch.
            zero = ends and weight is weights[-1]
            known, first = starts.setdefault(id(weight), (zero, layer))
            if known != zero:
                _refuse_two_starts(names[first], names[layer])

    for branch in plan.branches:
        for layer in branch.layers:
            note(layer, any(layer is one for one in branch.last))
    for layer in plan.outside.values():
        note(layer, False)
    tied = tied_embeddings(model, plan)
    for name, head in plan.heads.items():
        note(head, name not in tied)
    known = {inner for layer in _layers(plan) for inner in layer.modules()}
    for module in names:
        for parameter in () if module in known else module._parameters.values():
            zero, first = starts.get(id(parameter), (False, module))
            if zero:
                _refuse_two_starts(names[first], names[module])


def _refuse_two_starts(one: str, two: str) -> None:
    what = (
        f"{one}, which ends one branch and begins another"
        if one == two
        else f"one that {one} and {two} share, which is zero in one place only"
    )
    raise Unsuitable(
        f"fixup(model): expected a weight to start at zero or not, got {what}; give each place a "
        "layer of its own"
    )

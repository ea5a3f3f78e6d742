r"""Fixup for any network whose residual branches can be found, or are named by its user.

The weights follow rules 1 and 2 (`normlab.inits.fixup_rules`). Normalisers go, and rule 3 puts a
scalar bias in front of every weight layer of a branch, of the readout, and of every element-wise
activation, and a scalar multiplier behind the last weight layer of every branch. What stands in
front of what is read from a forward pass, so that ReLUs before or after the addition, shared
modules and functions are understood. At the start every block is its short path, and a block
without activation behind the addition is the identity.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.

Departs:
    - The paper gives two block forms and the Transformer. Here a bias in front of an activation
      takes the place of the normaliser there; behind an addition it belongs to the branch.
    - A projection on the short path reads the raw input, not that of the branch with its bias.
    - Own biases go from all convolutions and from the linear layers of branches, because scalars
      take their place, as in the Transformer form; other linear layers keep theirs, at zero.
    - Linear layers of branches start by Xavier's rule if the network attends (Transformer form),
      else by He's.
    - LayerScale and gains, constant vectors that multiply a branch, start at 1 like Fixup's
      multiplier: at their own 1e-6 a branch that starts at zero would hardly learn.
    - Side products (squeeze and excitation) are no part of a branch and stay as they are, but
      without normalisers.
    - An activation that is a function behind another function, or a module that serves several
      places behind functions, has no place for a bias, and gets none.
    - Layers that undo the scaling of their weight (standardised convolutions) are refused.
    - A readout of a class token sees the same for every input until the branches move. It is not
      changed, but said: on batches with equally many samples of each class nothing would move.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from normlab.inits.fixup_blocks import ScalarBias
from normlab.inits.fixup_insert import bias_after_, bias_before_, scale_after_
from normlab.inits.fixup_rules import fixup_, torch_default_, xavier_uniform_, zero_
from normlab.method import Setting, Unsuitable
from normlab.surgery.branches import BranchPlan
from normlab.surgery.flow import evaluating
from normlab.surgery.normalisers import find_normalisers
from normlab.surgery.snapshot import Snapshot
from normlab.surgery.swap import swap
from normlab.surgery.tensor_graph import Node, is_weight_layer


def fixup_any_(
    model: nn.Module, plan: BranchPlan, setting: Setting, *, stem_init: str = "he"
) -> nn.Module:
    """Turn a model into a Fixup network by a plan of its branches.

    Args:
        model: The model of the plan, changed in place.
        plan: As `normlab.surgery.branches.plan_branches` returns it, corrected where needed.
        setting: The first batch serves for the proof that the logits are zero.
        stem_init: As in `normlab.inits.fixup.prepare`.

    Returns:
        The model.

    Raises:
        Unsuitable: A normaliser cannot be taken out, a layer has two places with different starts,
            or the logits are not zero afterwards; the model is as it was then.

    Example:
        >>> from normlab.surgery.branches import plan_branches
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.one, self.two = (
        ...             nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4))
        ...     def forward(self, x):
        ...         return x + self.two(self.one(self.norm(x)).relu())
        >>> model, x = nn.Sequential(Block(), nn.Linear(4, 2)), torch.randn(3, 4)
        >>> model = fixup_any_(model, plan_branches(model, x), Setting(batches=((x, x),)))
        >>> torch.equal(model[0](x), x), model(x).any().item()
        (True, False)
    """
    _check(model, plan)
    snapshot = Snapshot(model)
    try:
        notes = _insert_scalars(plan)
        _drop_biases(plan)
        _start(plan, setting, stem_init)
        gains = _start_gains(plan)
        model = swap(model, _without_norms(plan, notes.places))
        _prove(model, plan, setting)
    except BaseException:
        snapshot.restore()
        raise
    setting.say(
        f"{len(plan.branches)} residual branches follow Fixup in the general form, without "
        f"{len(plan.norms)} normalisers: {_few([branch.name for branch in plan.branches])}"
    )
    if gains:
        setting.say(f"gains that start at 1: {_few(gains)}")
    if notes.homeless:
        setting.say(f"activations without a place for a scalar bias: {_few(notes.homeless)}")
    return model


class _Notes:
    """Norms whose place a scalar bias takes, and activations in front of which none fits."""

    def __init__(self) -> None:
        self.places: set[nn.Module] = set()
        self.homeless: list[str] = []


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ... ({len(names)})"


def _check(model: nn.Module, plan: BranchPlan) -> None:
    if not plan.branches:
        raise Unsuitable(
            "fixup(model): expected a network with residual branches, got a plan without any; "
            "add one (plan.with_branch)"
        )
    names = plan.graph.names
    starts: dict[nn.Module, str] = {}
    for branch in plan.branches:
        for layer in branch.layers:
            start = "zero" if any(layer is one for one in branch.last) else "scaled"
            if starts.setdefault(layer, start) != start:
                raise Unsuitable(
                    f"fixup(model): expected a layer to start at zero or not, got {names[layer]}, "
                    "which ends one branch and begins another; give each a layer of its own"
                )
    for layer in (*starts, *plan.outside.values(), *plan.heads.values()):
        if _undoes_scaling(layer):
            raise Unsuitable(
                f"fixup(model): expected layers that are linear in their weight, got "
                f"{names[layer]}, a {type(layer).__name__}, which undoes the scaling of it; use a "
                "plain one"
            )
    for found in find_normalisers(model):
        if found.is_batch_norm and found.obstacle:
            raise Unsuitable(
                f"fixup(model): expected normalisers that can be taken out, got {found.name}: "
                f"{found.obstacle}"
            )


@torch.no_grad()
def _undoes_scaling(layer: nn.Module) -> bool:
    """Whether half the weight does not give half the output, as with standardised weights."""
    if type(layer).__module__.startswith("torch."):
        return False
    weight = layer._parameters["weight"]
    assert weight is not None
    if isinstance(layer, nn.Linear):
        shape = (2, layer.in_features)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = (2, layer.in_channels, *(2 * size for size in reach))
    else:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(weight)
    kept = weight.clone()
    with evaluating(layer):
        try:
            whole = layer(x) - layer(torch.zeros_like(x))
            weight.mul_(0.5)
            half = layer(x) - layer(torch.zeros_like(x))
        finally:
            weight.copy_(kept)
    return not torch.allclose(2 * half, whole, rtol=1e-2, atol=1e-5)


def _insert_scalars(plan: BranchPlan) -> _Notes:
    ends = {layer: layer for branch in plan.branches for layer in branch.last}
    for layer in [*(x for branch in plan.branches for x in branch.layers), *plan.heads.values()]:
        bias_before_(layer, next(layer.parameters()))
    for layer in ends:
        scale_after_(layer, next(layer.parameters()))
    notes = _Notes()
    like = next(plan.branches[0].layers[0].parameters())
    for node in plan.graph.nodes:
        if node.kind == "activation" and not node.beside and node.main:
            _bias_before_activation(plan, node, set(ends), like, notes)
    return notes


def _bias_before_activation(
    plan: BranchPlan, node: Node, ends: set[nn.Module], like: Tensor, notes: _Notes
) -> None:
    before = node.main[0]
    if before.kind == "norm":
        assert before.module is not None
        notes.places.add(before.module)
        return
    closed = _last_layers(before, ends) if before.kind == "sum" else []
    if closed:
        bias_after_(closed[0], like)
    elif before.kind == "weight" and len(before.takers) == 1:
        assert before.module is not None
        bias_after_(before.module, like)
    elif not node.operation and node.module is not None and plan.graph.calls(node.module) == 1:
        bias_before_(node.module, like)
    elif str(node) not in notes.homeless:
        notes.homeless.append(str(node))


def _last_layers(addition: Node, ends: set[nn.Module]) -> list[nn.Module]:
    """Return the last layers of the branches that an addition closes."""
    found, stack = [], [source for source in addition.sources if source not in addition.main]
    stack = stack or list(addition.sources)
    while stack:
        node = stack.pop(0)
        if node.kind == "weight":
            found += [node.module] if node.module in ends else []
        elif node.kind != "sum":
            stack += node.main
    return found


def _drop_biases(plan: BranchPlan) -> None:
    convolutions = [
        layer for layer in plan.outside.values() if isinstance(layer, nn.modules.conv._ConvNd)
    ]
    for layer in (*(x for branch in plan.branches for x in branch.layers), *convolutions):
        if isinstance(layer, nn.MultiheadAttention):
            layer._parameters["in_proj_bias"] = layer.out_proj._parameters["bias"] = None
        elif layer._parameters.get("bias") is not None:
            layer._parameters["bias"] = None


def _start(plan: BranchPlan, setting: Setting, stem_init: str) -> None:
    outside = list(plan.outside.values())
    if stem_init == "default" and outside:
        torch_default_(outside.pop(0), generator=setting.generator)
    attends = any(node.attends for node in plan.graph.nodes)
    fixup_(
        plan.branches,
        outside=outside,
        generator=setting.generator,
        linear_=xavier_uniform_ if attends else None,
    )
    for head in plan.heads.values():
        zero_(head)


def _start_gains(plan: BranchPlan) -> list[str]:
    """Set constant vectors that multiply a branch to 1, and return their names."""
    found = []
    norms = {inner for norm in plan.norms.values() for inner in norm.modules()}
    owners = [
        node.module
        for node in plan.graph.nodes
        if not node.beside
        and node.module is not None
        and node.module not in norms
        and not is_weight_layer(node.module)
        and not type(node.module).__module__.startswith("torch.")
        and (node.kind == "product" or not node.operation)
    ]
    for owner in dict.fromkeys(owners):
        for name, parameter in owner.named_parameters(recurse=False):
            if _is_gain(name, parameter):
                nn.init.ones_(parameter)
                found.append(f"{plan.graph.names[owner]}.{name}".lstrip("."))
    return found


def _is_gain(name: str, parameter: Tensor) -> bool:
    if parameter.numel() != max(parameter.shape, default=1):
        return False
    first = parameter.detach().flatten()[0]
    constant = bool((parameter == first).all()) and first.item() != 1
    named = any(word in name for word in ("gain", "gamma", "scale", "alpha"))
    return constant and (named or (first.item() != 0 and parameter.numel() > 1))


def _without_norms(plan: BranchPlan, places: set[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return what takes the place of each normaliser: a scalar bias, its activation, nothing."""
    like = next(plan.branches[0].layers[0].parameters())
    replacements: dict[nn.Module, nn.Module] = {}
    for norm in plan.norms.values():
        children = OrderedDict(norm.named_children())
        if norm in places:
            bias = ScalarBias().to(device=like.device, dtype=like.dtype)
            new = nn.Sequential(OrderedDict(bias=bias, **children)) if children else bias
        else:
            new = nn.Sequential(children) if children else nn.Identity()
        replacements[norm] = new
    return replacements


def _prove(model: nn.Module, plan: BranchPlan, setting: Setting) -> None:
    """Show that the logits are zero, and say it where the readout cannot tell inputs apart yet."""
    seen: list[Tensor] = []
    hooks = [
        head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        for head in plan.heads.values()
    ]
    try:
        with evaluating(model), torch.no_grad():
            outputs = model(setting.batches[0][0][:2])
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    if plan.heads and (not isinstance(outputs, Tensor) or outputs.any()):
        raise Unsuitable(
            "fixup(model): expected logits of zero once the readout is zero, got others; the "
            f"output does not come from {', '.join(plan.heads)} alone"
        )
    if any(len(x) == 2 and torch.equal(x[0], x[1]) for x in seen):
        setting.say(
            "at the start the readout sees the same for every input (a class token that no branch "
            "has written to yet): only batches with unequal classes get training going"
        )

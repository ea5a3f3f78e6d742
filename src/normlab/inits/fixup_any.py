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
    - Own biases go from all convolutions, from attention, and from the linear layers of branches,
      because scalars take their place, as in the Transformer form. Other linear layers keep theirs,
      at zero, and so does a layer that is not torch's own and may need it.
    - Linear layers of branches start by Xavier's rule if the network attends (Transformer form),
      else by He's.
    - Grouped convolutions start with the fan-out of a group, not of all groups.
    - A readout that has the weight of an embedding starts with variance 1 / d, not at zero, as in
      the Transformer form; then the logits are not zero.
    - LayerScale and gains, constant vectors that multiply a branch on its way to the sum, start at
      1 like Fixup's multiplier: at their own 1e-6 a branch that starts at zero would hardly learn.
    - Side products (squeeze and excitation) are no part of a branch and stay as they are, but
      without normalisers.
    - An activation that is a function behind another function, or a module that serves several
      places behind functions, has no place for a bias, and gets none.
    - Layers that undo the scaling of their weight (standardised convolutions) are refused, and so
      are weights that start at zero in one place and not in another.
    - Of a model with several outputs the first one counts: normalisers that it does not depend on
      stay.
    - A readout of a class token sees the same for every input until the branches move. It is not
      changed, but said: on batches with equally many samples of each class nothing would move.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from normlab.inits.fixup_blocks import ScalarBias
from normlab.inits.fixup_check import check_plan, tied_embeddings
from normlab.inits.fixup_gains import start_gains_
from normlab.inits.fixup_insert import bias_after_, bias_before_, scale_after_
from normlab.inits.fixup_proof import prove
from normlab.inits.fixup_rules import (
    embedding_normal_,
    fixup_,
    torch_default_,
    xavier_uniform_,
    zero_,
)
from normlab.method import Setting
from normlab.surgery.branches import BranchPlan
from normlab.surgery.snapshot import Snapshot
from normlab.surgery.swap import swap
from normlab.surgery.tensor_graph import Node


def fixup_any_(
    model: nn.Module, plan: BranchPlan, setting: Setting, *, stem_init: str = "he"
) -> nn.Module:
    """Turn a model into a Fixup network by a plan of its branches.

    Args:
        model: The model of the plan, changed in place.
        plan: As `normlab.surgery.branches.plan_branches` returns it, corrected where needed; its
            inputs serve for the proof.
        setting: For the draws, and takes what is said.
        stem_init: As in `normlab.inits.fixup.prepare`.

    Returns:
        The model.

    Raises:
        Unsuitable: A normaliser cannot be taken out, a weight has two places with different starts,
            or afterwards the logits are not zero, or a branch is not; the model is as it was then.
        ValueError: The plan is one of another model.

    Example:
        Plan, look, correct, apply:

        >>> import torch
        >>> from normlab.surgery.branches import plan_branches
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.one, self.two = (
        ...             nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4))
        ...     def forward(self, x):
        ...         return x + self.two(self.one(self.norm(x)).relu())
        >>> model, x = nn.Sequential(Block(), Block(), nn.Linear(4, 2)), torch.randn(3, 4)
        >>> plan = plan_branches(model, x)
        >>> print(plan)
        2 residual branches
        branch  m  weight layers, the zero ones in brackets
        0       2  0.one, [0.two]
        1       2  1.one, [1.two]
        outside: none
        readout: 2
        left as they are, beside the path: none
        weights of no layer here, left as they are: none
        normalisers that go (2): 0.norm, 1.norm
        >>> plan = plan.without("1")
        >>> model = fixup_any_(model, plan, Setting(batches=((x, x),)))
        >>> torch.equal(model[0](x), x), torch.equal(model[1](x), x), model(x).any().item()
        (True, False, False)
    """
    check_plan(model, plan)
    tied = tied_embeddings(model, plan)
    norms = _norms_on_the_way(plan)
    snapshot = Snapshot(model)
    try:
        notes = _insert_scalars(plan)
        _drop_biases(plan)
        _start(plan, tied, setting, stem_init)
        model = swap(model, _without_norms(plan, norms, notes.places))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                # Its way through nested tensors asks the normalisers, which are gone.
                module.use_nested_tensor = False
        gains = start_gains_(model, {end for b in plan.branches for end in b.last}, plan.inputs)
        blind = prove(model, plan.branches, plan.heads, plan.inputs, tied=tied)
    except BaseException:
        snapshot.restore()
        raise
    setting.say(
        f"{len(plan.branches)} residual branches follow Fixup in the general form, without "
        f"{len(norms)} normalisers: {_few([branch.name for branch in plan.branches])}"
    )
    if blind:
        setting.say(
            "at the start the readout sees the same for every input (a class token that no branch "
            "has written to yet): only batches with unequal classes get training going"
        )
    for name in tied:
        setting.say(f"{name} has the weight of an embedding, and starts with variance 1 / d")
    if plan.unheld:
        setting.say(f"weights that no layer holds, left as they are: {_few(list(plan.unheld))}")
    if others := [name for name in plan.norms if name not in norms]:
        setting.say(f"normalisers that stay, beside the way to the first output: {_few(others)}")
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
    # torch's encoder layer asks its normalisers, which are gone, where attention has biases.
    kinds = (nn.modules.conv._ConvNd, nn.MultiheadAttention)
    outside = [layer for layer in plan.outside.values() if isinstance(layer, kinds)]
    for layer in (*(x for branch in plan.branches for x in branch.layers), *outside):
        if isinstance(layer, nn.MultiheadAttention):
            layer._parameters["in_proj_bias"] = layer.out_proj._parameters["bias"] = None
        elif (bias := layer._parameters.get("bias")) is not None:
            if type(layer).__module__.startswith("torch."):
                layer._parameters["bias"] = None
            else:
                nn.init.zeros_(bias)


def _start(
    plan: BranchPlan, tied: dict[str, nn.Embedding], setting: Setting, stem_init: str
) -> None:
    outside = list(plan.outside.values())
    attention_first = bool(outside) and isinstance(outside[0], nn.MultiheadAttention)
    if stem_init == "default" and outside and not attention_first:
        torch_default_(outside.pop(0), generator=setting.generator)
    attends = any(node.attends for node in plan.graph.nodes)
    fixup_(
        plan.branches,
        outside=outside,
        generator=setting.generator,
        linear_=xavier_uniform_ if attends else None,
    )
    for name, head in plan.heads.items():
        if name not in tied:
            zero_(head)
        elif (bias := head._parameters.get("bias")) is not None:
            nn.init.zeros_(bias)
    for embedding in tied.values():
        embedding_normal_(embedding, generator=setting.generator)


def _norms_on_the_way(plan: BranchPlan) -> dict[str, nn.Module]:
    """Return the normalisers that the output depends on."""
    used = {node.module for node in plan.graph.nodes}
    return {name: norm for name, norm in plan.norms.items() if used & set(norm.modules())}


def _without_norms(
    plan: BranchPlan, norms: dict[str, nn.Module], places: set[nn.Module]
) -> dict[nn.Module, nn.Module]:
    """Return what takes the place of each normaliser: a scalar bias, its activation, nothing."""
    like = next(plan.branches[0].layers[0].parameters())
    replacements: dict[nn.Module, nn.Module] = {}
    for norm in norms.values():
        children = OrderedDict(norm.named_children())
        if norm in places:
            bias = ScalarBias().to(device=like.device, dtype=like.dtype)
            new = nn.Sequential(OrderedDict(bias=bias, **children)) if children else bias
        else:
            new = nn.Sequential(children) if children else nn.Identity()
        replacements[norm] = new
    return replacements

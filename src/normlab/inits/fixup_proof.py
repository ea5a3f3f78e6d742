"""Show by computing that a Fixup network starts as it should: silent, and every branch closed.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normlab.inits.fixup_rules import weights_of
from normlab.method import Setting, Unsuitable
from normlab.surgery.branches import Branch
from normlab.surgery.flow import evaluating, tensors_in


def inputs_of(setting: Setting) -> tuple[Any, ...]:
    """Return what the model's forward takes, from the first batch.

    Two samples of a tensor are enough; a tuple or list holds the inputs of a model that takes
    several, and anything else, such as a dictionary, is one input: both are taken as they are.
    """
    inputs: Any = setting.batches[0][0]
    if isinstance(inputs, Tensor):
        return (inputs[:2],)
    return tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)


@torch.no_grad()
def prove(
    model: nn.Module,
    branches: Sequence[Branch],
    heads: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    *,
    tied: Collection[str] = (),
) -> bool:
    """Show that the readout is silent and that no branch has an effect.

    What a branch holds in front of its last layers is doubled: the features that the readout sees
    may not change, because every sum equals its short path.

    Args:
        model: A Fixup network as it starts.
        branches: Its branches.
        heads: Its readouts by name.
        inputs: What its forward takes.
        tied: The names of readouts that have an embedding's weight, and do not start at zero.

    Returns:
        Whether the readout sees the same for every sample.

    Raises:
        Unsuitable: One of both does not hold.
    """
    features, logits, output = _run(model, heads, inputs)
    loud = [name for name, one in logits if name not in tied and one.any()]
    # What a softmax or a sigmoid makes of zeros is the same for every sample.
    alone = output is not None and (output.dim() == 0 or bool((output == output[:1]).all()))
    if loud or (heads and not tied and not alone):
        raise Unsuitable(
            "fixup(model): expected logits of zero once the readout is zero, got others; "
            + (
                f"{loud[0]} adds something of its own"
                if loud
                else f"the output does not come from {', '.join(heads)} alone"
            )
        )
    if _moved(model, branches, heads, inputs, features):
        open_ones = [b.name for b in branches if _moved(model, [b], heads, inputs, features)]
        raise Unsuitable(
            "fixup(model): expected every block to start as its short path, got features that "
            f"depend on the weights inside {', '.join(open_ones[:3]) or 'several branches'}; "
            "correct the plan (plan.without, plan.with_branch)"
        )
    return any(len(one) > 1 and bool((one == one[:1]).all()) for one in features if heads)


def _run(
    model: nn.Module, heads: Mapping[str, nn.Module], inputs: tuple[Any, ...]
) -> tuple[list[Tensor], list[tuple[str, Tensor]], Tensor | None]:
    """Return what the readouts saw, or else the output; what they returned; the output."""
    features: list[Tensor] = []
    logits: list[tuple[str, Tensor]] = []
    hooks = []
    for name, head in heads.items():

        def look(_: nn.Module, given: Any, named: Any, output: Any, name: str = name) -> None:
            features.append(next(tensors_in((given, named))).clone())
            logits.append((name, next(tensors_in(output)).clone()))

        hooks.append(head.register_forward_hook(look, with_kwargs=True))
    try:
        with evaluating(model):
            output = next(tensors_in(model(*inputs)), None)
    finally:
        for hook in hooks:
            hook.remove()
    if not features and output is not None:
        features.append(output)
    return features, logits, output


def _moved(
    model: nn.Module,
    branches: Sequence[Branch],
    heads: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    before: list[Tensor],
) -> bool:
    """Whether the features change where the weights inside the branches are doubled."""
    weights = {
        id(weight): weight
        for branch in branches
        for layer in branch.layers
        for weight in _inside(layer, last=any(layer is one for one in branch.last))
    }
    # Twice and half are exact, so that the weights are afterwards what they were.
    for weight in weights.values():
        weight.mul_(2)
    try:
        after = _run(model, heads, inputs)[0]
    finally:
        for weight in weights.values():
            weight.mul_(0.5)
    pairs = zip(before, after, strict=True)
    return not all((one - two).abs().max() <= 1e-3 * one.abs().max() for one, two in pairs)


def _inside(layer: nn.Module, *, last: bool) -> list[Tensor]:
    weights = weights_of(layer)
    return [weight for weight in (weights[:-1] if last else weights) if weight is not None]

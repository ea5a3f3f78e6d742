"""Give any model another normaliser, with a plan of what is touched, a proof, and a way back.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
>>> done = convert(model, "group-norm", torch.randn(4, 3, 16, 16))
>>> print(done.plan)
BatchNorm layers became GroupNorm; numbers of groups: 1 with 4
1: BatchNorm2d -> GroupNorm; kept bias, weight; dropped num_batches_tracked, running_mean,
running_var
>>> type(done.undo()[1]).__name__
'BatchNorm2d'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from normlab.catalog import find_method
from normlab.method import Method, Setting, Unsuitable
from normlab.surgery.conversion import Conversion, carry_out
from normlab.surgery.flow import trace_flow
from normlab.surgery.fold import fold_batch_norms
from normlab.surgery.freeze import freeze as freeze_batch_norms
from normlab.surgery.hold import hold, release
from normlab.surgery.insert import insert_batch_norms
from normlab.surgery.normalisers import (
    Normaliser,
    find_normalisers,
    make_plain,
    refuse_wrapped,
)


def convert(
    model: nn.Module,
    method: str | Method,
    example: Tensor,
    *,
    targets: Tensor | None = None,
    optimizers: Iterable[torch.optim.Optimizer] | torch.optim.Optimizer = (),
    skip: Iterable[str] = (),
    allow_skipped: bool = False,
    allow_none: bool = False,
    add: bool = False,
    keeps_evaluation: bool | None = None,
    tolerance: float | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Apply a method to a model: replace its BatchNorm layers, or what else the method does.

    Device, dtype, mode and ``requires_grad`` are carried over, weights and statistics where the
    method says so. A parameter that keeps its name, shape and value stays the same object.
    Subclasses of BatchNorm that are shown to be a BatchNorm followed by their children (a fused
    activation) are taken apart first; so are layers that share statistics between processes.

    Args:
        model: Any module, changed in place; not wrapped by DDP, ``torch.compile`` and the like.
        method: A method or its name with options: ``"group-norm:num_groups=8"``.
        example: An input of the model ``(N, ...)``, at least 2 samples, on the model's device.
        targets: Targets ``(N,)`` for methods that look at the loss; None for zeros.
        optimizers: An optimiser or several whose parameters follow: each new parameter joins the
            group of the one it replaces, and survivors keep their state.
        skip: Qualified names of modules to leave as they are, with all that they hold.
        allow_skipped: Whether normalisers that cannot be replaced (lazy, re-parametrised, with
            hooks, of an unknown class) may stay; otherwise they are an error.
        allow_none: Whether a model in which there is nothing to replace is fine.
        add: Whether to put a BatchNorm behind each weight layer but the last first, in a model
            that has none.
        keeps_evaluation: Whether the outputs in evaluation mode must stay the same; None for what
            the method's card promises.
        tolerance: The largest difference then, relative to the largest output; None for 5000 times
            the precision of the outputs.
        dry_run: Whether only to show what would happen.

    Returns:
        The converted model with plan, proof and ``undo()``.

    Raises:
        Unsuitable: The method does not fit, or something stands in the way; by name and reason.
        Unproven: The proof failed.
        ValueError: An unknown method, option or module name.
            In every case the model is as it was.
    """
    method = find_method(method) if isinstance(method, str) else method
    operation = f"convert to {method.label}"
    if not method.changes_model:
        raise Unsuitable(
            f"{operation}(model): expected a method that changes the model, got one that acts in "
            "training alone; use its parts in the training loop"
        )
    found = _examine(operation, model, example)
    held = _named(operation, model, skip)
    reasons = {one.name: "you asked to skip it" for one in found if one.module in _inside(held)}
    blocked = [one for one in found if one.is_batch_norm and one.obstacle]
    blocked = [one for one in blocked if one.name not in reasons]
    if blocked and not allow_skipped:
        raise Unsuitable(
            f"{operation}(model): expected BatchNorm layers that can be replaced, got "
            f"{'; '.join(f'{one.name!r}: {one.obstacle}' for one in blocked)}; or pass "
            "allow_skipped=True to leave them as they are"
        )
    held += [one.module for one in blocked]

    def change(model: nn.Module, say: Callable[[str], None]) -> nn.Module:
        given = targets
        if given is None:
            given = torch.zeros(len(example), dtype=torch.long, device=example.device)
        setting = Setting(batches=((example, given),), say=say)
        model = hold(model, held)
        if add and not _batch_norms(model):
            model, count = insert_batch_norms(model, example[:2])
            say(f"{count} BatchNorm layers were put behind weight layers first")
        if allow_none and not _batch_norms(model):
            say("no BatchNorm layer to replace")
            return release(model)
        model, notes = make_plain(model, _batch_norms(model), trace_flow(model, example[:2]))
        for note in notes:
            say(note)
        try:
            return release(method.prepare(model, setting))
        except Unsuitable as error:
            raise Unsuitable(f"{error}{_what_else(found)}") from None

    promised = method.card.keeps_evaluation and not add
    return carry_out(
        operation,
        model,
        change,
        example,
        keeps_evaluation=promised if keeps_evaluation is None else keeps_evaluation,
        optimizers=_several(optimizers),
        tolerance=tolerance,
        reasons=reasons,
        dry_run=dry_run,
    )


def fold(
    model: nn.Module,
    example: Tensor,
    *,
    optimizers: Iterable[torch.optim.Optimizer] | torch.optim.Optimizer = (),
    tolerance: float | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Merge each BatchNorm into the weight layer next to it, and show that nothing else changed.

    See `normlab.surgery.fold.fold_batch_norms` for what can be merged; what cannot is in the plan
    with its reason. Fold a model that is trained: what is left of a folded layer are weights.

    Args:
        model: Any module in evaluation mode, changed in place.
        example: As in `convert`.
        optimizers: As in `convert`.
        tolerance: As in `convert`.
        dry_run: As in `convert`.

    Returns:
        The model with plan, proof and ``undo()``.

    Raises:
        Unsuitable: There is nothing to fold, or the model is wrapped or in training mode.
        Unproven: The outputs on the example changed. In every case the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> print(fold(model, torch.randn(2, 3, 8, 8)).model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    found = _examine("fold", model, example)
    reasons: dict[str, str] = {}

    def change(model: nn.Module, say: Callable[[str], None]) -> nn.Module:
        model = hold(model, [one.module for one in found if one.is_batch_norm and one.obstacle])
        model, _ = make_plain(model, _subclasses(model), trace_flow(model, example[:2]))
        try:
            done = fold_batch_norms(model, example[:2])
        except Unsuitable as error:
            raise Unsuitable(f"{error}{_what_else(found)}") from None
        reasons.update(done.skipped)
        model = release(model)
        if not done.folded:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in done.skipped.items())
            raise Unsuitable(
                f"fold(model): expected a BatchNorm next to a weight layer, got {why}; leave the "
                "model as it is"
            )
        say(f"{len(done.folded)} BatchNorm layers were folded")
        return model

    return carry_out(
        "fold",
        model,
        change,
        example,
        keeps_evaluation=True,
        optimizers=_several(optimizers),
        tolerance=tolerance,
        reasons=reasons,
        dry_run=dry_run,
    )


def freeze(
    model: nn.Module,
    example: Tensor,
    *,
    train_affine: bool = False,
    only: Iterable[str] | None = None,
    optimizers: Iterable[torch.optim.Optimizer] | torch.optim.Optimizer = (),
    tolerance: float | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Fix the statistics of each BatchNorm for training, too, and show that evaluation stays.

    Args:
        model: Any module, changed in place.
        example: As in `convert`.
        train_affine: Whether scale and shift may go on learning.
        only: Names of the layers to freeze, or of modules that hold them; None for all.
        optimizers: As in `convert`.
        tolerance: As in `convert`.
        dry_run: As in `convert`.

    Returns:
        The model with plan, proof and ``undo()``.

    Raises:
        Unsuitable: There is nothing to freeze, or the model is wrapped.
        Unproven: The outputs on the example changed. In every case the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> freeze(model, torch.randn(2, 3, 8, 8)).model[1]
        FrozenBatchNorm(8, eps=1e-05, affine=True, train_affine=False, kind=BatchNorm2d)
    """
    found = _examine("freeze", model, example)
    chosen = None if only is None else _inside(_named("freeze", model, only))
    held = [one for one in found if chosen is not None and one.module not in chosen]
    reasons = {one.name: "you did not ask for it" for one in held}
    held += [one for one in found if one.is_batch_norm and one.obstacle]

    def change(model: nn.Module, say: Callable[[str], None]) -> nn.Module:
        model = hold(model, [one.module for one in held])
        model, notes = make_plain(model, _subclasses(model), trace_flow(model, example[:2]))
        for note in notes:
            say(note)
        try:
            freeze_batch_norms(model, train_affine=train_affine)
        except Unsuitable as error:
            raise Unsuitable(f"{error}{_what_else(found)}") from None
        return release(model)

    return carry_out(
        "freeze",
        model,
        change,
        example,
        keeps_evaluation=True,
        optimizers=_several(optimizers),
        tolerance=tolerance,
        reasons=reasons,
        dry_run=dry_run,
    )


def _examine(operation: str, model: nn.Module, example: Tensor) -> list[Normaliser]:
    """Return the model's normalisers; refuse what no surgery can begin with."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{operation}(model): expected an nn.Module, got {type(model).__name__}; pass the model"
        )
    if not isinstance(example, Tensor) or example.dim() < 1 or len(example) < 2:
        got = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example)
        raise ValueError(
            f"{operation}(example): expected one tensor (N, ...) with at least 2 samples, got "
            f"{got}; give a batch that the model takes"
        )
    refuse_wrapped(operation, model)
    return find_normalisers(model)


def _batch_norms(model: nn.Module) -> list[Normaliser]:
    return [found for found in find_normalisers(model) if found.is_batch_norm]


def _subclasses(model: nn.Module) -> list[Normaliser]:
    """The batch normalisers that only their plain form is understood of."""
    return [one for one in _batch_norms(model) if type(one.module) is not nn.SyncBatchNorm]


def _named(operation: str, model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return modules by name; an unknown name is refused with the nearest."""
    known = dict(model.named_modules(remove_duplicate=False))
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(
                f"{operation}(names): expected names of modules, got {name!r}; "
                f"do you mean {near[0]!r}?"
            )
    return [known[name] for name in names]


def _inside(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {inner for module in modules for inner in module.modules()}


def _what_else(found: Iterable[Normaliser]) -> str:
    """Say which normalisers a model has that are no BatchNorm."""
    kinds = Counter(type(one.module).__name__ for one in found if not one.is_batch_norm)
    if not kinds:
        return ""
    return f" (it has {', '.join(f'{count} {kind}' for kind, count in kinds.items())})"


def _several(
    optimizers: Iterable[torch.optim.Optimizer] | torch.optim.Optimizer,
) -> tuple[torch.optim.Optimizer, ...]:
    return (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)

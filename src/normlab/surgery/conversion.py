"""Carry out a change of a model with a plan of what it touched, a proof, and a way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normlab.surgery.flow import evaluating
from normlab.surgery.normalisers import find_normalisers
from normlab.surgery.optimizers import repoint
from normlab.surgery.plan import Plan, differences, skipped
from normlab.surgery.snapshot import Snapshot


class Unproven(ValueError):
    """A change that failed its proof; the model was put back as it was."""


@dataclass(frozen=True)
class Proof:
    """How far the outputs on the example moved, in evaluation mode.

    Attributes:
        difference: The largest absolute difference of an output.
        relative: The same over the largest absolute output before.
        tolerance: What ``relative`` is held against where the change must not alter the function.
        required: Whether it must not.
        depends: Whether the outputs before differ from sample to sample; where they hardly do,
            their agreement shows little.
        trained: Whether one pass forward and back in training mode worked; else why it was not
            tried.
    """

    difference: float
    relative: float
    tolerance: float
    required: bool
    depends: bool
    trained: str

    def __str__(self) -> str:
        """The proof in one line."""
        size = (
            f"largest difference {self.difference:.2e}, {self.relative:.1e} of the largest output"
        )
        if self.required:
            text = f"same function: {size} (tolerance {self.tolerance:.0e})"
        else:
            text = f"another function, as meant: {size}"
        if not self.depends:
            text += ", but the outputs hardly depend on the input: recalibrate the statistics"
        return f"{text}; training: {self.trained}"


@dataclass(frozen=True)
class Conversion:
    """A converted model with its plan, its proof and the way back.

    Attributes:
        model: The converted model; after a dry run, the model as it was.
        plan: What was touched and what was left.
        proof: How the outputs compare.
    """

    model: nn.Module
    plan: Plan
    proof: Proof
    _back: Callable[[], nn.Module] = field(repr=False)

    def undo(self) -> nn.Module:
        """Put model and optimisers back exactly as they were, and show that they are.

        Returns:
            The model that was given to the conversion, with its own modules, parameters, values,
            modes and hooks.

        Raises:
            Unproven: The outputs on the example are not those from before the conversion.
        """
        return self._back()

    def __str__(self) -> str:
        """Plan and proof."""
        return f"{self.plan}\n{self.proof}"


def carry_out(
    operation: str,
    model: nn.Module,
    change: Callable[[nn.Module, Callable[[str], None]], nn.Module],
    example: Tensor,
    *,
    keeps_evaluation: bool,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    tolerance: float | None = None,
    reasons: dict[str, str] | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Change a model in place; compare its outputs before and after; undo where anything fails.

    Args:
        operation: The name of what is done, for messages.
        model: The model.
        change: ``(model, say) -> model``: what is done. It may raise at any point.
        example: An input of the model ``(N, ...)``, on its device.
        keeps_evaluation: Whether the outputs in evaluation mode must stay.
        optimizers: Optimisers whose parameters follow the change.
        tolerance: The largest difference allowed then, relative to the largest output; None for
            5000 times the precision of the outputs, at most 0.05.
        reasons: Why normalisers are left, by name, where it is known; filled by ``change``.
        dry_run: Whether to put all back at the end.

    Returns:
        The model with plan, proof and undo.

    Raises:
        Unproven: The outputs moved or are not finite, a replaced module is still in use, or a
            training pass fails that worked before. All is as it was then.
        Unsuitable: ``change`` refused. All is as it was then.
    """
    optimizers = tuple(optimizers)
    snapshot = Snapshot(model, optimizers)
    before = _outputs(operation, model, example)
    left = {found.name: found for found in find_normalisers(model)}
    notes: list[str] = []
    try:
        converted = change(model, notes.append)
        _keep_parameters(snapshot, converted)
        changes = differences(snapshot, converted)
        repoint(optimizers, snapshot.parameters, converted)
        proof = _prove(operation, snapshot, converted, example, before, keeps_evaluation, tolerance)
    except BaseException:
        snapshot.restore()
        raise

    def back() -> nn.Module:
        restored = snapshot.restore()
        after = _outputs(f"undo of {operation}", restored, example)
        if any(not torch.equal(one, two) for one, two in zip(before, after, strict=True)):
            raise Unproven(
                f"undo of {operation}(model): expected the outputs from before, got others; "
                "something outside the model changed what it computes"
            )
        return restored

    plan = Plan(tuple(changes), skipped(left, converted, reasons or {}), tuple(notes))
    if dry_run:
        converted = back()
    return Conversion(converted, plan, proof, back)


def _keep_parameters(snapshot: Snapshot, converted: nn.Module) -> None:
    """Let a parameter that only went to another module stay the very same object.

    So an optimiser keeps its state for it, and whoever else refers to it goes on doing so. It is
    known by place, name, shape and values; a layer may have become a container of several.
    """
    present = {id(parameter) for parameter in converted.parameters()}
    for full_name, new in list(converted.named_parameters(remove_duplicate=False)):
        path, _, name = full_name.rpartition(".")
        owner = converted.get_submodule(path)
        while True:
            old = snapshot.parameters.get(f"{path}.{name}" if path else name)
            if old is not None and id(old) not in present and _alike(snapshot, old, new):
                owner._parameters[name] = old
                present.add(id(old))
            if old is not None or not path:
                break
            path = path.rpartition(".")[0]


def _alike(snapshot: Snapshot, old: nn.Parameter, new: nn.Parameter) -> bool:
    values = snapshot.values_of(old)
    kinds = [(one.shape, one.dtype, one.device) for one in (old, new)]
    if kinds[0] != kinds[1] or values is None:
        return False
    return torch.equal(old, new) and torch.equal(old, values)


def _prove(
    operation: str,
    snapshot: Snapshot,
    converted: nn.Module,
    example: Tensor,
    before: list[Tensor],
    required: bool,
    tolerance: float | None,
) -> Proof:
    gone = set(snapshot.modules.values()) - set(converted.modules())
    with _watched(operation, snapshot, gone):
        after = _outputs(operation, converted, example)
    if [one.shape for one in before] != [two.shape for two in after]:
        raise Unproven(
            f"{operation}(model): expected outputs of the same shapes as before, got "
            f"{[tuple(two.shape) for two in after]}; the model was put back"
        )
    pairs = list(zip(before, after, strict=True))
    difference = max(_largest(one.double() - two.double()) for one, two in pairs)
    scale = max(_largest(one) for one in before)
    relative = difference / scale if scale else difference
    precision = max(torch.finfo(one.dtype).eps for one in before)
    tolerance = min(5000 * precision, 0.05) if tolerance is None else tolerance
    if required and not relative <= tolerance:
        raise Unproven(
            f"{operation}(model): expected the same outputs in evaluation, got a largest "
            f"difference of {difference:.2e}, {relative:.1e} of the largest output, above "
            f"{tolerance:.0e}; the model was put back as it was (rounding would vanish in double "
            "precision: then allow it with a larger tolerance)"
        )
    trained = _try_training(operation, snapshot, converted, example)
    spread = max(_largest(one - one[:1]) for one in before if one.dim())
    return Proof(difference, relative, tolerance, required, spread > 1e-5 * scale, trained)


def _outputs(operation: str, model: nn.Module, example: Tensor) -> list[Tensor]:
    """Return the floating point tensors that a model gives for the example in evaluation mode."""
    with evaluating(model), torch.no_grad():
        outputs = [
            one.detach().clone() for one in _tensors(model(example)) if one.is_floating_point()
        ]
    if not outputs or not all(bool(torch.isfinite(one).all()) for one in outputs):
        what = "outputs that are not finite" if outputs else "none"
        raise Unproven(
            f"{operation}(model, example): expected finite outputs for the example, got {what}; "
            "check the model's statistics and weights, or give another example"
        )
    return outputs


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's output: nested tuples, lists, dictionaries, or one."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


@contextmanager
def _watched(operation: str, snapshot: Snapshot, gone: set[nn.Module]) -> Iterator[None]:
    """Raise if a module that was replaced is called all the same."""
    names = {module: name for name, module in snapshot.modules.items()}

    def stop(name: str, *_: Any) -> None:
        raise Unproven(
            f"{operation}(model): expected {name!r} to be replaced everywhere, got a call of the "
            "old module, to which the model keeps a reference of its own; register it as a child "
            "module only"
        )

    handles = []
    try:
        # Only what computes by itself: a container may be taken over as a mere namespace.
        leaves = [module for module in gone if module in names and not any(module.children())]
        for module in leaves:
            handles.append(module.register_forward_pre_hook(partial(stop, names[module])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _try_training(operation: str, snapshot: Snapshot, converted: nn.Module, example: Tensor) -> str:
    """Run one pass forward and back in training mode, and leave no trace of it."""
    now = Snapshot(converted)
    reason = _training_fails(now, example)
    if reason is None:
        return "one pass forward and back"
    then = Snapshot(converted, snapshot.optimizers)
    snapshot.restore()
    same = _training_fails(Snapshot(snapshot.model), example)
    if same is None:
        raise Unproven(
            f"{operation}(model): expected a training pass to work as before, got {reason}; "
            "the model was put back as it was"
        )
    then.restore()
    return f"not possible with this example, before nor after ({same.splitlines()[0]})"


def _training_fails(snapshot: Snapshot, example: Tensor) -> str | None:
    model = snapshot.model
    devices = [example.device] if example.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            model.train()
            for parameter in model.parameters():
                parameter.grad = None
            outputs = [one for one in _tensors(model(example)) if one.requires_grad]
            if outputs:
                torch.stack([one.float().square().mean() for one in outputs]).sum().backward()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        snapshot.restore()
    return None

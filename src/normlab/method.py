"""What a method is: its `Card` of typed facts, and the `Method` that a training loop calls.

A method of the literature lives in one file. The file ends with a ``CARD``, from which listing,
documentation, contract run and report legend are made, and a ``METHOD``, the little that a
workbench must know to train any model with it::

    METHOD = Method(card=CARD, prepare=prepare)

Every part of a `Method` has a default that does nothing. An *option* of a method is a keyword-only
argument of one of its parts, so that a part's signature is the one place where it is declared:

    >>> from normlab.catalog import find_method
    >>> method = find_method("ic-layer").with_options(drop_prob=0.1)
    >>> method.label
    'ic-layer:drop_prob=0.1'

Methods compose with ``+``: each part runs over what the part before it returned.

    >>> (find_method("fixup") + find_method("dropout")).label
    'fixup+dropout'
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.options import nearest_option, read_value
from normlab.parameter_groups import Group

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

Room = Literal["norms", "inits", "weights", "optim", "regularizers", "activations", "growth"]
"""The package that holds a method."""


class Unsuitable(ValueError):
    """A method that does not fit the model it was asked to change, with the reason."""


@dataclass(frozen=True)
class Source:
    """Where a method comes from: ``arxiv`` is the bare identifier, ``1911.09737``."""

    authors: str
    title: str
    year: int
    arxiv: str | None = None
    venue: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts about a method that readers and tools ask for.

    Attributes:
        name: The name on the command line, lower case with hyphens.
        title: The name in a sentence.
        summary: One sentence: what it does.
        room: The package that holds it.
        source: The paper; None for the absence of a method.
        batch_statistics: Whether a sample's training output depends on the rest of its batch.
        batch_of_one: ``"as the model"`` where the method leaves the model's layers as they are;
            ``"trains"``; ``"needs space"`` where a single sample must have more than one position
            per channel; ``"refuses"``.
        eval_differs: Whether evaluation computes another function than training.
        keeps_evaluation: Whether a prepared model computes in evaluation mode what it did before,
            so that a trained network may be converted without loss.
        stochastic: Whether the method draws random numbers in training.
        needs_closure: Whether a step takes more than one pass, so that ``optimizer.step`` has to
            be given a closure that runs forward and backward anew and returns the loss.
        replaces_optimizer: Whether its optimiser stands in the place of the task's, and does not
            act on that one.
        state: What it adds to a checkpoint beyond weights, in words.
        best_for: Whom it helps.
        limits: Where it does not fit or did not help.
        departures: Where this implementation differs from the paper, and why.
    """

    name: str
    title: str
    summary: str
    room: Room
    source: Source | None
    batch_statistics: bool = False
    batch_of_one: Literal["as the model", "trains", "needs space", "refuses"] = "trains"
    eval_differs: bool = False
    keeps_evaluation: bool = False
    stochastic: bool = False
    needs_closure: bool = False
    replaces_optimizer: bool = False
    state: tuple[str, ...] = ()
    best_for: str = ""
    limits: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()


def _say_nothing(_: str) -> None:
    pass


@dataclass(frozen=True)
class Setting:
    """What a method may know about the training that it is part of.

    Attributes:
        batches: A few fresh training batches ``(inputs, targets)``, drawn apart from training, so
            that looking at them shifts nobody's data order.
        loss: Maps ``(outputs, targets)`` to a scalar.
        num_classes: The number of outputs.
        optimizer: The kind of the task's optimiser, ``"sgd"`` or ``"adamw"``.
        lr: The base learning rate.
        total_steps: The number of optimiser steps planned.
        steps_per_epoch: The number of them in one pass over the training set.
        generator: For random draws of the method's own.
        say: Takes one sentence about what was done, for the records.
        draw: Returns the i-th of as many fresh batches as are wanted, the same on all processes;
            None where there are no more than ``batches``. See `fresh_batch`.
    """

    batches: tuple[Batch, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    num_classes: int = 10
    optimizer: str = "sgd"
    lr: float = 0.1
    total_steps: int = 1
    steps_per_epoch: int = 1
    generator: torch.Generator = field(default_factory=torch.Generator)
    say: Callable[[str], None] = _say_nothing
    draw: Callable[[int], Batch] | None = None

    def fresh_batch(self, index: int) -> Batch:
        """Return the ``index``-th fresh training batch, drawn apart from training.

        Args:
            index: 0, 1, 2, ...; the same index gives the same batch.

        Returns:
            Inputs and targets; where there are only ``batches``, these in turn.
        """
        return self.batches[index % len(self.batches)] if self.draw is None else self.draw(index)


def _keep_model(model: nn.Module, setting: Setting) -> nn.Module:
    return model


def _keep_batch(
    inputs: Tensor, targets: Tensor, generator: torch.Generator, setting: Setting
) -> Batch:
    return inputs, targets


def _keep_groups(groups: list[Group], model: nn.Module, setting: Setting) -> list[Group]:
    return groups


def _plain_optimizer(
    groups: list[Group], make: Callable[[list[Group]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    return make(groups)


def _attach_nothing(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    pass


def _no_penalty(model: nn.Module) -> Tensor | None:
    return None


_PARTS = ("prepare", "batch", "parameter_groups", "optimizer", "attach", "penalty")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a training loop must know to train any model with a method.

    Each part is a plain function, usable alone; the defaults do nothing.

    Attributes:
        card: The facts about the method.
        prepare: ``(model, setting) -> model``: surgery, re-parametrisation, initialisation. The
            model given may be changed in place; the one returned is to be used. Raises
            `Unsuitable` with the reason where the method does not fit.
        batch: ``(inputs, targets, generator, setting) -> (inputs, targets)``: mixup, label
            smoothing. Targets may become probabilities ``(N, num_classes)``.
        parameter_groups: ``(groups, model, setting) -> groups``: takes the optimiser's groups and
            returns them split or changed.
        optimizer: ``(groups, make) -> optimizer``: replaces or wraps what ``make(groups)`` returns.
        attach: ``(model, optimizer, setting)``: registers step hooks.
        penalty: ``(model) -> scalar or None``: an extra term of the loss.
        options: The values of options that differ from their defaults.
        parts: The methods of which this one is composed; empty for a single one.
    """

    card: Card
    prepare: Callable[..., nn.Module] = _keep_model
    batch: Callable[..., Batch] = _keep_batch
    parameter_groups: Callable[..., list[Group]] = _keep_groups
    optimizer: Callable[..., torch.optim.Optimizer] = _plain_optimizer
    attach: Callable[..., None] = _attach_nothing
    penalty: Callable[..., Tensor | None] = _no_penalty
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Method, ...] = ()

    @property
    def label(self) -> str:
        """The method as one writes it on the command line, options and parts included."""
        if self.parts:
            return "+".join(part.label for part in self.parts)
        chosen = ",".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        return f"{self.card.name}:{chosen}" if chosen else self.card.name

    @property
    def changes_model(self) -> bool:
        """Whether it, or a method in it, acts on the model before training."""
        return any(part.prepare is not _keep_model for part in self.parts or (self,))

    def defaults(self) -> dict[str, Any]:
        """Return each option with its default, read from the signatures of the parts."""
        return {name: option.default for name, option in self._declared().items()}

    def _declared(self) -> dict[str, inspect.Parameter]:
        functions = (getattr(self, part) for part in _PARTS)
        return {
            name: parameter
            for function in functions
            # An option that was set stands in a partial; its own default is the function's.
            for name, parameter in inspect.signature(
                function.func if isinstance(function, partial) else function
            ).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def with_options(self, **options: Any) -> Method:
        """Return the method with options set.

        Args:
            options: Values by name, as `defaults` lists them; text is read as the type of the
                default, so that values may come from a command line.

        Returns:
            A new method; this one is unchanged.

        Raises:
            ValueError: An unknown option (the nearest is named) or a value of another type.
        """
        declared = self._declared()
        defaults = {name: option.default for name, option in declared.items()}
        for name in options:
            if name not in defaults:
                known = ", ".join(sorted(defaults)) or "none"
                raise ValueError(
                    f"{self.card.name}({name}=...): expected an option of {self.card.name} "
                    f"({known}), got {name!r}; {nearest_option(name, defaults)}"
                )
        values = {
            name: read_value(self.card.name, name, value, declared[name])
            for name, value in options.items()
        }
        bound = {}
        for part in _PARTS:
            function = getattr(self, part)
            takes = inspect.signature(function).parameters
            mine = {name: value for name, value in values.items() if name in takes}
            if mine:
                bound[part] = partial(function, **mine)
        chosen = {**self.options, **values}
        kept = {name: value for name, value in chosen.items() if value != defaults[name]}
        return replace(self, **bound, options=kept)

    def __add__(self, other: Method) -> Method:
        """Compose two methods: this one first, then ``other``."""
        return compose([*(self.parts or (self,)), *(other.parts or (other,))])


def compose(methods: Iterable[Method]) -> Method:
    """Return one method that applies several in order.

    Optimisers are nested as they work together, whatever the order: one that replaces the task's
    is made first, and the others act on it; one that needs a closure is made last, because those
    inside it step without.

    Args:
        methods: At least one method, each at most once.

    Returns:
        The composed method; its card is the first one's with the joint name.

    Raises:
        ValueError: A method is named twice, there is none, or two of them replace the task's
            optimiser or need a closure.
    """
    parts = tuple(methods)
    names = [part.card.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise ValueError(
            f"compose({'+'.join(names)}): expected different methods, got "
            f"{'none' if not parts else 'one of them twice'}; name each once"
        )
    if len(parts) == 1:
        return parts[0]
    for fact, what in (
        ("replaces_optimizer", "method in place of the task's optimiser"),
        ("needs_closure", "method whose step takes several passes"),
    ):
        several = [part.card.name for part in parts if getattr(part.card, fact)]
        if len(several) > 1:
            raise ValueError(
                f"compose({'+'.join(names)}): expected at most one {what}, got "
                f"{' and '.join(several)}; keep one of them"
            )
    inside_out = sorted(
        parts, key=lambda part: part.card.needs_closure - part.card.replaces_optimizer
    )

    def prepare(model: nn.Module, setting: Setting) -> nn.Module:
        return reduce(lambda changed, part: part.prepare(changed, setting), parts, model)

    def batch(
        inputs: Tensor, targets: Tensor, generator: torch.Generator, setting: Setting
    ) -> Batch:
        for part in parts:
            inputs, targets = part.batch(inputs, targets, generator, setting)
        return inputs, targets

    def parameter_groups(groups: list[Group], model: nn.Module, setting: Setting) -> list[Group]:
        return reduce(lambda kept, part: part.parameter_groups(kept, model, setting), parts, groups)

    def optimizer(
        groups: list[Group], make: Callable[[list[Group]], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        for part in inside_out:
            make = partial(part.optimizer, make=make)
        return make(groups)

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
        for part in parts:
            part.attach(model, optimizer, setting)

    def penalty(model: nn.Module) -> Tensor | None:
        terms = [term for part in parts if (term := part.penalty(model)) is not None]
        return reduce(torch.add, terms) if terms else None

    cards = [part.card for part in parts]
    ranks = ("as the model", "trains", "needs space", "refuses")
    batch_of_one = max((card.batch_of_one for card in cards), key=ranks.index)
    card = replace(
        cards[0],
        name="+".join(names),
        title=" + ".join(card.title for card in cards),
        summary=" ".join(card.summary for card in cards),
        batch_statistics=any(card.batch_statistics for card in cards),
        batch_of_one=batch_of_one,
        eval_differs=any(card.eval_differs for card in cards),
        keeps_evaluation=all(card.keeps_evaluation for card in cards),
        stochastic=any(card.stochastic for card in cards),
        needs_closure=any(card.needs_closure for card in cards),
        replaces_optimizer=any(card.replaces_optimizer for card in cards),
        state=tuple(state for card in cards for state in card.state),
    )
    return Method(
        card=card,
        prepare=prepare,
        batch=batch,
        parameter_groups=parameter_groups,
        optimizer=optimizer,
        attach=attach,
        penalty=penalty,
        parts=parts,
    )

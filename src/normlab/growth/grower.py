"""Let pairs of layers grow on a schedule, in the middle of training, by a hook on the optimiser.

Growth happens after a step of the optimiser. It is a function of the number of steps, the seed and
the growth batch, so training that goes on from a checkpoint equals training that never stopped.
With several processes all of them grow alike, provided that the growth batch is the same on all or
each has its own of the same size; `DistributedDataParallel` has to wrap the model anew afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normlab.growth.grown_widths import remember_widths, remembered_widths
from normlab.growth.pairs import GrowthPair, Pairs, clamp_relus, find_pairs
from normlab.growth.schedule import GrowthSchedule, spread_width, units_per_growth
from normlab.growth.widen import NewUnits, check_holds, check_limits, narrow, widen
from normlab.method import Setting, Unsuitable
from normlab.optim import bn_preconditioning, effective_lr, weight_rescaling
from normlab.parameter_groups import GROWTH
from normlab.surgery.snapshot import Snapshot

Batch = tuple[Tensor, Tensor]
MakeUnits = Callable[
    [nn.Module, Mapping[GrowthPair, int], Batch, torch.Generator], dict[GrowthPair, NewUnits]
]
"""``(model, how many units for which pair, batch, generator) -> new units``."""

_HOLD_ON = {
    weight_rescaling.KEY: "weight rescaling",
    bn_preconditioning.KEY: "BN preconditioning",
    effective_lr.KEY: "learning-rate scaling",
}
"""What an optimiser's groups show of methods that hold on to parameters."""

_KEEPS_NO_ENTRIES = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimisers of torch whose state is not one value for each entry of a weight."""


class Grower:
    """Grows a model while an optimiser trains it.

    The step counter stands in ``optimizer.param_groups[0]["growth"]``, so the optimiser's
    ``state_dict`` holds it. The model remembers its pairs: a checkpoint of a grown model loads into
    one that has not grown (`normlab.growth.grown_widths`).

    Args:
        model: The model, changed in place.
        optimizer: The optimiser of its present parameters, whose steps are counted. Where there
            are several, the one that steps last.
        pairs: The pairs that grow, as `normlab.growth.pairs.find_pairs` returns them.
        make_units: Returns the weights of new units.
        batch: Returns the batch to look at in the i-th growth; the same i, the same batch.
        schedule: When to grow.
        final_widths: The width of each pair after its last growth. None: each growth adds a
            quarter of the width before the first one, at least one unit.
        seed: Of the random draws.
        max_parameters: The most parameters that the model may have.
        max_bytes: The most memory that the larger tensors of one growth may take, see
            `normlab.growth.widen.growth_bytes`; what ``make_units`` takes meanwhile is its own.
        others: The other optimisers of the model.

    Raises:
        ValueError: No pairs; an optimiser with a grower, of other parameters, or whose state cannot
            grow; a method on it that holds on to parameters; or final widths that are not one for
            each pair, or below the present ones.

    Example:
        >>> from normlab.growth.new_units import gradmax_units
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
        >>> grower = Grower(
        ...     model, optimizer, find_pairs(model, x).pairs,
        ...     make_units=lambda model, wanted, batch, generator: gradmax_units(
        ...         model, wanted, *batch, generator=generator
        ...     ),
        ...     batch=lambda growth: (x, y),
        ...     schedule=GrowthSchedule(start=2, every=2, num_growths=3),
        ... )
        >>> for _ in range(6):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> model[0].out_features
        7
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pairs: Sequence[GrowthPair],
        *,
        make_units: MakeUnits,
        batch: Callable[[int], Batch],
        schedule: GrowthSchedule,
        final_widths: Sequence[int] | None = None,
        seed: int = 0,
        max_parameters: int | None = None,
        max_bytes: int | None = None,
        others: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        if not pairs or GROWTH in optimizer.param_groups[0]:
            raise ValueError(
                "Grower(pairs, optimizer): expected at least one pair and an optimiser without a "
                f"grower, got {len(pairs)} pairs and {type(optimizer).__name__}"
                f"{' with one' if pairs else ''}; remove the other grower, or find pairs first"
            )
        self.optimizers = [optimizer, *others]
        _check_can_grow("Grower", self.optimizers)
        check_holds(self.optimizers, pairs, "Grower")
        if final_widths is not None:
            present = [pair.width for pair in pairs]
            if len(final_widths) != len(pairs) or any(
                final < width for final, width in zip(final_widths, present, strict=True)
            ):
                raise ValueError(
                    f"Grower(final_widths={list(final_widths)}): expected a width for each pair, "
                    f"at least the present {present}, got others; give as many, and no smaller ones"
                )
        widths = remembered_widths(model) or remember_widths(model, pairs, final_widths)
        # The model may have been changed since, or grown: the layers are the same.
        places = {pair.first: place for place, pair in enumerate(widths.pairs)}
        self._start = [
            widths.start[places[pair.first]] if pair.first in places else pair.width
            for pair in pairs
        ]
        widths.pairs, widths.start = list(pairs), self._start
        for one in self.optimizers:
            widths.trained_by(one)
        self._widths = widths
        self.model = model
        self.optimizer = optimizer
        self.pairs = list(pairs)
        self.make_units = make_units
        self.batch = batch
        self.schedule = schedule
        self.final_widths = None if final_widths is None else list(final_widths)
        self.seed = seed
        self.max_parameters = max_parameters
        self.max_bytes = max_bytes
        optimizer.param_groups[0][GROWTH] = {"step": 0}
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Stop growing; another grower starts from the widths that there are now."""
        self._hook.remove()
        self.optimizer.param_groups[0].pop(GROWTH, None)
        self._widths.start = [pair.width for pair in self.pairs]

    def widths_after(self, growths: int) -> list[int]:
        """Return the width of each pair after so many growths, from 0 to ``num_growths``."""
        schedule, count = self.schedule, len(self.pairs)
        widths = []
        for place, start in enumerate(self._start):
            turn = schedule.turns(place, growths, count)
            if self.final_widths is None:
                widths.append(start + turn * units_per_growth(start))
            else:
                turns = max(1, schedule.turns(place, schedule.num_growths, count))
                widths.append(spread_width(start, self.final_widths[place], turn, turns))
        return widths

    def grow(self, growth: int) -> None:
        """Do a growth now, whatever the step.

        Args:
            growth: Its number, from 0.

        Raises:
            ValueError: A limit would be passed, or the memory does not suffice. Nothing is changed
                then.
        """
        _check_can_grow("Grower.grow", self.optimizers)
        wanted = {
            pair: width - pair.width
            for pair, width in zip(self.pairs, self.widths_after(growth + 1), strict=True)
            if width > pair.width
        }
        if not wanted:
            return
        limits = {"max_parameters": self.max_parameters, "max_bytes": self.max_bytes}
        # Before the search for the units as well, which takes memory itself.
        check_limits(self.model, wanted, self.optimizers, **limits)
        generator = torch.Generator().manual_seed(self.seed + growth)
        try:
            units = self.make_units(self.model, wanted, self.batch(growth), generator)
            widen(self.model, units, self.optimizers, **limits)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                f"Grower.grow(growth={growth}): expected a growth by {list(wanted.values())} units "
                f"that fits into memory, got {str(error).splitlines()[0]}; set smaller "
                "final_widths, or a limit, max_parameters or max_bytes"
            ) from error

    def _after_step(self, *_: Any) -> None:
        # Loading a checkpoint replaces the optimiser's groups, so they are read anew each time.
        state = self.optimizer.param_groups[0].setdefault(GROWTH, {"step": 0})
        state["step"] += 1
        growth = self.schedule.growth_at(state["step"])
        if growth is not None:
            self.grow(growth)


def _check_can_grow(operation: str, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse optimisers that could not go on after a growth, or with them a method on top."""
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if kind in _KEEPS_NO_ENTRIES and isinstance(optimizer, getattr(torch.optim, kind)):
            raise ValueError(
                f"{operation}(optimizer={kind}): expected an optimiser with state for each entry "
                f"of a weight, got {kind}; use SGD, Adam or AdamW"
            )
        held = [name for key, name in _HOLD_ON.items() if key in optimizer.param_groups[0]]
        if held:
            raise ValueError(
                f"{operation}(optimizer): expected one whose parameters may be replaced, got one "
                f"with {held[0]}, which holds on to them; train without it, or without growth"
            )


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no class of error of its own.
    text = str(error)
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "out of memory" in text or "can't allocate" in text


def prepare_narrow(
    model: nn.Module,
    setting: Setting,
    operation: str,
    *,
    width_fraction: float,
    keep_norms: bool = False,
) -> nn.Module:
    """Narrow all pairs of a model to a share of their width, from which they are to grow back.

    Args:
        model: The model, changed in place.
        setting: Its first batch shows what the model computes.
        operation: The method that asks, for messages.
        width_fraction: The share, above 0 and at most 1.
        keep_norms: Whether normalisers between a pair stay. Where they go, the layer in front gets
            the bias that they had in its place.

    Returns:
        The model.

    Raises:
        Unsuitable: The model has no pair, or does not work with other widths. It is unchanged then.
        ValueError: A share out of its range.
    """
    if not 0 < width_fraction <= 1:
        raise ValueError(
            f"{operation}(width_fraction={width_fraction}): expected a share above 0 and at most "
            f"1, got {width_fraction}; use 0.25"
        )
    example = setting.batches[0][0][:2]
    pairs, skipped = find_pairs(model, example)
    if not pairs:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise Unsuitable(
            f"{operation}(model): expected two weight layers with an activation between and "
            f"nothing else that reads the first one's output, got none ({reasons or 'no layers'}); "
            "write activations as modules"
        )
    names, final = [pair.name for pair in pairs], [pair.width for pair in pairs]
    snapshot = Snapshot(model)
    try:
        count = 0 if keep_norms else sum(_drop_norms(model, pair) for pair in pairs)
        clamped = clamp_relus(model, pairs)
        pairs = find_pairs(model, example, names=names).pairs
        for pair, width in zip(pairs, final, strict=True):
            # A depth-wise convolution of one channel could not be told from another one.
            least = min(width, 2 if pair.depthwise else 1)
            narrow(pair, max(least, int(width * width_fraction)))
        pairs = find_pairs(model, example, names=names).pairs
    except Exception as error:
        snapshot.restore()
        raise Unsuitable(
            f"{operation}(model): expected a model that works with layers of another width, got "
            f"{type(error).__name__}: {error}; write no sizes into its forward"
        ) from None
    remember_widths(model, pairs, final)
    if count:
        setting.say(f"{count} normalisers between layers that grow became biases")
    if clamped:
        setting.say(f"{clamped} ReLUs have derivative 1 at zero, where new units stand")
    for reason in dict.fromkeys(skipped.values()):
        layers = [name for name, why in skipped.items() if why == reason]
        setting.say(f"of fixed width, because {reason}: {', '.join(layers)}")
    return model


def _drop_norms(model: nn.Module, pair: GrowthPair) -> int:
    """Replace the normalisers of a pair by the identity, with a bias in the layer before each."""
    norms = [norm for norm in pair.norms if isinstance(norm, _NormBase)]
    before: Any = pair.first
    for step in pair.steps:
        if step in pair.depthwise:
            before = step
        elif step in norms and before.bias is None:
            before.bias = nn.Parameter(torch.zeros_like(before.weight.detach().flatten(1)[:, 0]))
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in norms:
                parent._modules[name] = nn.Identity()
    return len(norms)


def attach_grower(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    operation: str,
    make_units: MakeUnits,
    *,
    start: float,
    end: float,
    num_growths: int,
    round_robin: bool,
) -> Grower:
    """Let a model that `prepare_narrow` made grow back to its width in the course of training.

    Args:
        model: The model.
        optimizer: The optimiser of its parameters.
        setting: The growth batch is its ``fresh_batch``, the same on all processes.
        operation: The method that asks, for messages.
        make_units: Returns the weights of new units.
        start: The share of training after which growth begins, from 0.
        end: The share after which it has ended, above ``start`` and at most 1.
        num_growths: How often each pair grows, at least 1; less often where the steps are few.
        round_robin: Whether one pair grows at a time.

    Raises:
        ValueError: A value out of its range, or a model or optimiser of another making.
    """
    for name, value, valid in (
        ("start", start, 0 <= start < 1),
        ("end", end, start < end <= 1),
        ("num_growths", num_growths, num_growths >= 1),
    ):
        if not valid:
            raise ValueError(
                f"{operation}({name}={value}): expected 0 <= start < end <= 1 and num_growths of "
                f"at least 1, got {value}; leave it out for the default"
            )
    widths = remembered_widths(model)
    found: Pairs = find_pairs(model, setting.batches[0][0][:2])
    by_layer = {pair.first: pair for pair in found.pairs}
    if widths is None or widths.final is None or any(p.first not in by_layer for p in widths.pairs):
        raise ValueError(
            f"{operation}(model): expected the model that prepare returned, got one in which "
            "layers that grow are missing or changed; let prepare have it last"
        )
    pairs = [by_layer[pair.first] for pair in widths.pairs]
    check_holds([optimizer], pairs, operation)
    first, last = (round(share * setting.total_steps) for share in (start, end))
    pairs_apart = len(pairs) if round_robin else 1
    growths = max(1, min(num_growths, (last - first) // pairs_apart)) * pairs_apart
    schedule = GrowthSchedule(
        max(1, first), max(1, (last - first) // growths), growths, round_robin
    )
    grower = Grower(
        model,
        optimizer,
        pairs,
        make_units=make_units,
        batch=setting.fresh_batch,
        schedule=schedule,
        final_widths=widths.final,
        seed=setting.generator.initial_seed() % 2**31,
    )
    steps = schedule.steps()
    setting.say(
        f"{len(pairs)} pairs of layers grow from {grower.widths_after(0)} to {widths.final} units "
        f"in {growths} growths, after steps {steps[0]} to {steps[-1]}"
    )
    return grower

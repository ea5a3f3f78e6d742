r"""GradInit: learn a scale for each parameter tensor, so that the first step lowers the loss most.

With tensors :math:`\theta_m = \{m_i W_i\}`, a batch S, the gradient g of its loss at
:math:`\theta_m` and the optimiser's first step A[g],

.. math::
    \min_m \; L(\tilde S; \theta_m - \eta A[g]) \quad
    \text{subject to} \quad \lVert g \rVert_p \le \gamma, \; m_i \ge m_{\min}

with A[g] = g / |g| or g and p = 2 for SGD, A[g] = sign(g) and p = 1 for Adam. :math:`\tilde S`
shares half of its samples with S: with all of them the scales overfit, with none they see noise.
Where the norm is above :math:`\gamma` a step lowers the norm, otherwise the objective.

Every process that is given the same batches finds the same scales. Run it before
``DistributedDataParallel``, which hands out the tensors of process 0.

Source: C. Zhu, R. Ni, Z. Xu, K. Kong, W. R. Huang, T. Goldstein, "GradInit: Learning to Initialize
Neural Networks for Stable and Efficient Training", 2021, arXiv 2102.08098.

Departs:
    - Every named parameter takes part, whatever layer it belongs to, unless it is excluded; the
      public code knows a list of layer types and leaves the others out of the gradient, too.
    - Parameters stay as they are until `GradInit.finish`: passes run on scaled copies.
    - What the public code does and the paper does not say is an option: the step is held constant
      in the derivative (``second_order``), SGD's step is normalised (``normalize_grad``), both
      kinds of step share a second moment (``shared_second_moment``), slopes are clipped (``clip``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn

from normlab.inits.gradinit_learner import GradInit, Step
from normlab.inits.gradinit_steps import Half, halves_of, joined
from normlab.method import Card, Method, Setting, Source

MOST_STEPS, LEAST_STEPS = 390, 100
"""The paper's epoch of CIFAR-10, and what scales need to move at all at the default rate."""


@dataclass(frozen=True)
class Report:
    """What GradInit did; ``print`` shows it with the table of scales.

    Attributes:
        loss: The loss before and after, on the first batch.
        gradient_norm: The gradient norm before and after, on the first batch.
        order: The norm: 2 for SGD, 1 for Adam.
        scales: The scale of each parameter that has one.
        objective_steps: How many steps lowered the loss after a trial step.
        constraint_steps: How many lowered the gradient norm.
    """

    loss: tuple[float, float]
    gradient_norm: tuple[float, float]
    order: int
    scales: dict[str, float]
    objective_steps: int
    constraint_steps: int

    def summary(self) -> str:
        """Return one sentence."""
        low, high = (choose(self.scales, key=self.scales.__getitem__) for choose in (min, max))
        return (
            f"GradInit took {self.objective_steps} steps for the loss and {self.constraint_steps} "
            f"for the gradient norm, which went from {self.gradient_norm[0]:.4g} to "
            f"{self.gradient_norm[1]:.4g} (l{self.order}), the loss from {self.loss[0]:.4g} to "
            f"{self.loss[1]:.4g}; scales from {self.scales[low]:.3g} ({low}) to "
            f"{self.scales[high]:.3g} ({high})"
        )

    def __str__(self) -> str:
        width = max(map(len, self.scales))
        rows = [f"{name:<{width}}  {scale:8.4f}" for name, scale in self.scales.items()]
        return "\n".join([self.summary(), "", f"{'parameter':<{width}}     scale", *rows])


def gradinit(
    model: nn.Module,
    batches: Iterable[Half],
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    *,
    num_steps: int = MOST_STEPS,
    progress: Callable[[Step], object] | None = None,
    **options: Any,
) -> Report:
    """Scale the parameters of a model in place, so that it trains well from its first step.

    A run that is stopped is lost. One that can be resumed is made of `GradInit`, its `state_dict`
    and ``halves_of(batches, skip=learner.num_halves)``.

    Args:
        model: A model initialised by a standard rule. It is changed at the end only, so a run that
            is stopped leaves it as it was.
        batches: Training batches ``(inputs, targets)``, a loader or a list; see `halves_of`.
        loss: As for `GradInit`.
        num_steps: How many steps to take; the paper takes an epoch or two.
        progress: Is given each `Step`.
        options: As for `GradInit`.

    Returns:
        What was done.

    Raises:
        Unsuitable: There is nothing to scale.
        ValueError: An unknown option, and as for `GradInit` and `GradInit.run`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> _ = nn.init.normal_(model[2].weight, std=10.0)
        >>> batches = [(torch.randn(12, 4), torch.arange(12) % 3)]
        >>> report = gradinit(model, batches, num_steps=50, scale_lr=0.05)
        >>> report.gradient_norm[1] < report.gradient_norm[0], report.loss[1] < report.loss[0]
        (True, True)
    """
    declared = inspect.signature(GradInit).parameters.values()
    known = [one.name for one in declared if one.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ValueError(
                f"gradinit({name}=...): expected an option of GradInit ({', '.join(known)}), got "
                f"{name!r}; do you mean {get_close_matches(name, known, 1, cutoff=0.0)[0]!r}?"
            )
    learner = GradInit(model, loss, **options)
    halves = halves_of(batches)
    first = list(islice(halves, 2))
    if len(first) < 2:
        raise ValueError(
            f"gradinit(batches): expected at least two half-batches, got {len(first)}; give a "
            "loader of the training batches"
        )
    batch = joined(*first)
    before = learner.measure(batch)
    learner.run(chain(first, halves), num_steps, progress)
    after = learner.measure(batch)
    return Report(
        loss=(before[0], after[0]),
        gradient_norm=(before[1], after[1]),
        order=learner.order,
        scales=learner.finish(),
        objective_steps=learner.counts[0],
        constraint_steps=learner.counts[1],
    )


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    num_steps: int | None = None,
    scale_lr: float = 1e-2,
    max_norm: float | None = None,
    min_scale: float = 0.01,
    min_bias_scale: float = 0.0,
    max_scale: float = math.inf,
    clip: float = 1.0,
    beta2: float = 0.999,
    second_order: bool = False,
    normalize_grad: bool = True,
    shared_second_moment: bool = True,
) -> nn.Module:
    """Learn the scales on fresh batches, at the training's rate and for its optimiser.

    Args:
        model: The model, changed in place; its normalisers stay.
        setting: The training's.
        num_steps: How many steps; None for one epoch, but at least 100 where the training is that
            long, and at most 390.
        scale_lr: As for `GradInit`, as all that follows.
        max_norm: The bound of the gradient norm.
        min_scale: The smallest scale.
        min_bias_scale: The smallest scale of a bias.
        max_scale: The largest scale.
        clip: The bound of a scale's slope.
        beta2: The second of the scales' decay rates.
        second_order: Whether the derivative follows how the step changes.
        normalize_grad: Whether SGD's trial step is normalised.
        shared_second_moment: Whether both kinds of step share a second moment.

    Returns:
        The model.

    Raises:
        Unsuitable: There is nothing to scale.
        ValueError: An option is out of range, or the loss is not finite.
    """
    if num_steps is None:
        enough = max(setting.steps_per_epoch, min(LEAST_STEPS, setting.total_steps))
        num_steps = min(enough, MOST_STEPS)
    report = gradinit(
        model,
        _fresh_batches(setting),
        setting.loss,
        num_steps=num_steps,
        optimizer=setting.optimizer,
        lr=setting.lr,
        scale_lr=scale_lr,
        max_norm=max_norm,
        min_scale=min_scale,
        min_bias_scale=min_bias_scale,
        max_scale=max_scale,
        clip=clip,
        betas=(0.9, beta2),
        second_order=second_order,
        normalize_grad=normalize_grad,
        shared_second_moment=shared_second_moment,
    )
    setting.say(report.summary())
    return model


def _fresh_batches(setting: Setting) -> Iterator[Half]:
    index = 0
    while True:
        yield setting.fresh_batch(index)
        index += 1


CARD = Card(
    name="gradinit",
    title="GradInit",
    summary="Learns one scale for each parameter tensor before training, so that the first step "
    "lowers the loss most.",
    room="inits",
    source=Source(
        authors="C. Zhu, R. Ni, Z. Xu, K. Kong, W. R. Huang, T. Goldstein",
        title="GradInit: Learning to Initialize Neural Networks for Stable and Efficient Training",
        year=2021,
        arxiv="2102.08098",
        venue="NeurIPS 2021",
    ),
    batch_of_one="as the model",
    best_for="New architectures without an initialisation of their own, and very deep networks "
    "without normalisers (none+gradinit).",
    limits=(
        "It costs about an epoch of double backward passes before training.",
        "Operations must be differentiable twice, and the loss finite at the start.",
        "Its gain is small where a good initialisation is known.",
    ),
    departures=(
        "Every named parameter takes part, not those of known layer types alone.",
        "A short training gets 100 steps, or as many as it has itself, where an epoch is shorter.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)

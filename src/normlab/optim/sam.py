r"""Sharpness-aware minimisation: descend with the gradient from the worst point nearby.

Each step takes two passes: one finds the direction in which the loss rises fastest, the other one
the gradient a small way along it, which is then applied to the weights as they were.

Source: P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur, "Sharpness-Aware Minimization for Efficiently
Improving Generalization", 2020, arXiv 2010.01412.

Departs:
    - Buffers of the model, running statistics above all, keep what the first pass left in them: the
      second one sees weights that the network never has.
    - The weights are put back from a copy, to the bit, rather than by subtraction.
    - A gradient of zero moves nothing; there is no small number under the norm.

With several processes (DistributedDataParallel) both passes average their gradients, so that all
ascend alike. Where ``no_sync`` wraps the first pass, each process ascends by its own gradient (the
paper's m-sharpness); the second pass must synchronise.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.optim.arguments import is_number, require
from normlab.optim.tensor_lists import by_kind, total_norm
from normlab.optim.wrapper import OptimizerWrapper, check_needs_no_closure, unwrapped
from normlab.parameter_groups import Group


class SAM(OptimizerWrapper):
    r"""Wraps an optimiser so that it descends by the gradient at the perturbed weights.

    .. math::
        \epsilon = \rho \frac{g(w)}{\lVert g(w) \rVert_2}, \quad
        w \leftarrow \mathrm{step}(w, g(w + \epsilon))

    The norm is that of all parameters together. Groups, state and checkpoint are those of the
    optimiser that is wrapped; ``rho`` stands in its groups and may differ between them. Step hooks
    run around its step, where the gradients are those of the second pass. Gradients scaled by
    ``torch.amp.GradScaler`` do not change the direction of the first step, but must be unscaled
    before the second.

    Args:
        optimizer: The optimiser that takes the step.
        rho: The length of the perturbation, at least 0.
        model: The model: its buffers keep what the first pass left in them. Without it both passes
            move running statistics.

    Raises:
        ValueError: ``rho`` below 0 or not finite, or an optimiser whose step needs a closure.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
        >>> x = torch.randn(8, 3)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> model[1].num_batches_tracked
        tensor(1)
    """

    needs_closure = True

    def __init__(
        self, optimizer: torch.optim.Optimizer, rho: float = 0.05, model: nn.Module | None = None
    ) -> None:
        super().__init__(optimizer)
        name = type(self).__name__
        for radius in (rho, *(group.get("rho", rho) for group in self.param_groups)):
            valid = is_number(radius) and radius >= 0
            require(valid, name, "rho", radius, "a length of at least 0")
        check_needs_no_closure(name, optimizer)
        self.rho = rho
        self.model = model
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        for group in self.param_groups:
            group.setdefault("rho", rho)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take both passes and the step.

        Args:
            closure: Drops the gradients, computes the loss, runs it backward and returns it; it is
                called twice.

        Returns:
            The loss of the first pass.

        Raises:
            ValueError: There is no closure. If the closure raises, the weights are put back.
        """
        name = type(self).__name__
        if closure is None:
            raise ValueError(
                f"{name}.step(closure=None): expected a closure that drops the gradients, runs "
                "forward and backward and returns the loss, got None; give one, or call "
                "first_step() and second_step() after a backward pass each"
            )
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            self._put_back()
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> None:
        """Move the weights to the worst point nearby, given the gradients of the first pass.

        Drop the gradients before the second pass.

        Raises:
            ValueError: The weights are there already.
        """
        if self._kept is not None:
            raise ValueError(
                f"{type(self).__name__}.first_step(): expected unperturbed weights, got those of a "
                "first step before; call second_step() after the second backward pass"
            )
        buffers = [] if self.model is None else list(self.model.buffers())
        moved = [
            (weight, weight.grad, group.get("rho", self.rho))
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        weights = [weight for weight, _, _ in moved]
        self._kept = [(tensor, tensor.detach().clone()) for tensor in (*weights, *buffers)]
        if not weights:
            return
        directions, norm = self._ascent(weights, [gradient for _, gradient, _ in moved])
        for rho in {rho for _, _, rho in moved}:
            chosen = [i for i, (_, _, own) in enumerate(moved) if own == rho]
            lists = [[weights[i] for i in chosen], [directions[i] for i in chosen]]
            length = torch.where(norm > 0, rho / norm, 0.0)
            for some, ways in by_kind(lists):
                scale = length.to(ways[0].device)
                if ways[0].dtype == scale.dtype:
                    ways = torch._foreach_mul(ways, scale)
                else:  # a length in half precision would lose more than the kernel gains
                    ways = [way * scale for way in ways]
                torch._foreach_add_(some, ways)

    def _ascent(
        self, weights: list[Tensor], gradients: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Return directions and the norm by which they are divided."""
        return gradients, total_norm(gradients)

    def second_step(self) -> None:
        """Put the weights back and take the optimiser's step, given the second pass's gradients.

        Raises:
            ValueError: There was no first step.
        """
        if self._kept is None:
            raise ValueError(
                f"{type(self).__name__}.second_step(): expected perturbed weights, got none; call "
                "first_step() after the first backward pass"
            )
        self._put_back()
        self.base.step()

    @torch.no_grad()
    def _put_back(self) -> None:
        for tensor, kept in self._kept or ():
            tensor.copy_(kept)
        self._kept = None


def optimizer(
    groups: list[Group],
    make: Callable[[list[Group]], torch.optim.Optimizer],
    *,
    rho: float = 0.05,
) -> torch.optim.Optimizer:
    """Wrap the task's optimiser."""
    return SAM(make(groups), rho=rho)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Tell the wrapper, wherever it is among several, whose buffers keep the first pass."""
    found = [one for one in unwrapped(optimizer) if isinstance(one, SAM)]
    if not found:
        raise ValueError(
            f"attach(optimizer): expected SAM or a wrapper around it, got "
            f"{type(optimizer).__name__}; wrap the optimiser first"
        )
    for one in found:
        one.model = model


CARD = Card(
    name="sam",
    title="SAM",
    summary="Descends by the gradient from the point nearby at which the loss is highest.",
    room="optim",
    source=Source(
        authors="P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur",
        title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
        year=2020,
        arxiv="2010.01412",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    needs_closure=True,
    best_for="Better generalisation where twice the work a step can be paid.",
    limits=(
        "Two passes a step.",
        "torch.amp.GradScaler takes no closures; bfloat16 needs no scaler.",
        "Both passes see the batch: averages that are not among the model's buffers, as those of "
        "bn-preconditioning, move twice a step, and buffers that a pass reads, as those of "
        "spectral-norm and cross-iteration-bn, enter the second pass as the first one left them.",
    ),
    departures=(
        "Running statistics and other buffers keep what the first pass left in them.",
        "The weights are put back from a copy.",
    ),
)

METHOD = Method(card=CARD, optimizer=optimizer, attach=attach)

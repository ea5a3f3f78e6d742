r"""Adaptive sharpness-aware minimisation: perturb each weight in proportion to its size.

SAM's ball has one radius, although scaling one layer up and the next one down leaves the function
as it is; here the neighbourhood scales with the weights.

Source: J. Kwon, J. Kim, H. Park, I. K. Choi, "ASAM: Adaptive Sharpness-Aware Minimization for
Scale-Invariant Learning of Deep Neural Networks", 2021, arXiv 2102.11600.

Departs:
    - Every parameter is scaled by its own size, biases and norm parameters included.
    - What `normlab.optim.sam` says of buffers, of the weights' return and of several processes.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Source
from normlab.optim.arguments import is_number, require
from normlab.optim.sam import SAM, attach
from normlab.optim.tensor_lists import total_norm
from normlab.parameter_groups import Group


class ASAM(SAM):
    r"""SAM whose perturbation is measured in units of each weight.

    .. math::
        T = \lvert w \rvert + \eta, \quad
        \epsilon = \rho \frac{T^2 g(w)}{\lVert T g(w) \rVert_2}

    with products by element.

    Args:
        optimizer: The optimiser that takes the step.
        rho: The length of the perturbation in units of T, at least 0; the paper takes 0.5 to 2.
        model: The model: its buffers keep what the first pass left in them. Without it both passes
            move running statistics.
        eta: The number :math:`\eta` that lets zero weights move, at least 0.

    Raises:
        ValueError: A value below 0 or not finite, or an optimiser whose step needs a closure.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = ASAM(torch.optim.SGD([weight], lr=0.1), rho=0.5, eta=0.0)
        >>> weight.grad = torch.tensor([2.0])
        >>> optimizer.first_step()
        >>> weight.item()
        1.5
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.5,
        model: nn.Module | None = None,
        *,
        eta: float = 0.01,
    ) -> None:
        require(is_number(eta) and eta >= 0, "ASAM", "eta", eta, "a number of at least 0")
        super().__init__(optimizer, rho, model)
        self.eta = eta

    def _ascent(
        self, weights: list[Tensor], gradients: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        sizes = torch._foreach_abs(weights)
        torch._foreach_add_(sizes, self.eta)
        scaled = torch._foreach_mul(sizes, gradients)
        return list(torch._foreach_mul(sizes, scaled)), total_norm(scaled)


def optimizer(
    groups: list[Group],
    make: Callable[[list[Group]], torch.optim.Optimizer],
    *,
    rho: float = 0.5,
    eta: float = 0.01,
) -> torch.optim.Optimizer:
    """Wrap the task's optimiser."""
    return ASAM(make(groups), rho=rho, eta=eta)


CARD = Card(
    name="asam",
    title="ASAM",
    summary="SAM whose perturbation of each weight is in proportion to its size.",
    room="optim",
    source=Source(
        authors="J. Kwon, J. Kim, H. Park, I. K. Choi",
        title="ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep "
        "Neural Networks",
        year=2021,
        arxiv="2102.11600",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    needs_closure=True,
    best_for="Better generalisation where twice the work a step can be paid, whatever the scale "
    "of the weights.",
    limits=(
        "Two passes a step.",
        "torch.amp.GradScaler takes no closures; bfloat16 needs no scaler.",
        "Both passes see the batch: averages that are not among the model's buffers, as those of "
        "bn-preconditioning, move twice a step, and buffers that a pass reads, as those of "
        "spectral-norm and cross-iteration-bn, enter the second pass as the first one left them.",
    ),
    departures=(
        "Every parameter is scaled by its own size, biases and norm parameters included.",
        "Running statistics and other buffers keep what the first pass left in them.",
    ),
)

METHOD = Method(card=CARD, optimizer=optimizer, attach=attach)

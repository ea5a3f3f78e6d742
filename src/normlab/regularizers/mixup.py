r"""Mixup: train on convex combinations of pairs of samples and of their targets.

With one :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` and one permutation :math:`\pi` a batch,

.. math::
    \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \quad
    \tilde y_i = \lambda y_i + (1 - \lambda) y_{\pi(i)}

where y are one-hot targets. Cross-entropy is linear in its target, so the loss is
:math:`\lambda \, CE(y_i) + (1 - \lambda) \, CE(y_{\pi(i)})`.

Source: H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk
Minimization", 2017, arXiv 1710.09412.

Departs:
    - alpha = 0, at which nothing is mixed, is refused: leave the method out instead.
    - On several processes each mixes its own part of the batch, all with one share.
    - The targets become probabilities; public code computes the two cross-entropies, which is the
      same number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normlab.method import Card, Method, Setting, Source


def mixup(
    inputs: Tensor,
    targets: Tensor,
    num_classes: int,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return a batch mixed with a permutation of itself.

    Args:
        inputs: Samples ``(N, ...)``, floating point; a batch of one stays as it is.
        targets: Class numbers ``(N,)``, or probabilities ``(N, num_classes)``.
        num_classes: The number C of classes.
        alpha: The parameter :math:`\alpha` of the Beta distribution, above 0: near 0 hardly
            anything is mixed, 1 draws every share alike. 1 on CIFAR-10, 0.2 to 0.4 on ImageNet;
            Fixup takes 0.7 there.
        generator: For share and permutation, on the CPU; torch's own by default.

    Returns:
        The mixed inputs, and the targets as probabilities ``(N, C)`` in the inputs' dtype, in
        single precision at least.

    Raises:
        ValueError: ``alpha`` is not above 0, the inputs are integers, or the targets are neither
            class numbers below ``num_classes`` nor probabilities, one for each sample.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
        >>> inputs, targets = mixup(x, y, 2, generator=torch.Generator().manual_seed(1))
        >>> torch.equal(inputs[:, 0], targets[:, 1])
        True
    """
    _check(inputs, targets, num_classes, alpha)
    generator = torch.default_generator if generator is None else generator
    share = _draw_share(alpha, generator)
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    kind = torch.promote_types(inputs.dtype, torch.float32)
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets.long(), num_classes)
    targets = targets.to(kind)
    mixed_inputs = share * inputs + (1 - share) * inputs[order]
    return mixed_inputs, share * targets + (1 - share) * targets[order]


def _draw_share(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha); torch's own Beta takes no generator."""
    # One's share of two variables Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha), in logarithms,
    # because for a small alpha both are zero in double precision.
    parameter = torch.full((2,), alpha + 1, dtype=torch.float64)
    drawn = torch._standard_gamma(parameter, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    gammas = drawn.log()
    uniforms = (1 - torch.rand(2, dtype=torch.float64, generator=generator)).log()
    difference = (gammas[0] - gammas[1]) + (uniforms[0] - uniforms[1]) / alpha
    return difference.sigmoid().item()


def _check(inputs: Tensor, targets: Tensor, num_classes: int, alpha: float) -> None:
    if not (0 < alpha < math.inf):
        raise ValueError(
            f"mixup(alpha={alpha}): expected a number above 0, got {alpha}; use 1, or leave mixup "
            "out for no mixing"
        )
    if not torch.is_floating_point(inputs):
        raise ValueError(
            f"mixup(inputs): expected floating point, got {inputs.dtype}; convert them to float32"
        )
    numbers = targets.dim() == 1 and not torch.is_floating_point(targets)
    shape = (len(inputs),) if numbers else (len(inputs), num_classes)
    if tuple(targets.shape) != shape:
        raise ValueError(
            f"mixup(targets): expected class numbers ({len(inputs)},) or probabilities "
            f"({len(inputs)}, {num_classes}), got {targets.dtype} of shape {tuple(targets.shape)}; "
            "give one for each sample"
        )
    if numbers and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"mixup(targets, num_classes={num_classes}): expected class numbers from 0 to "
            f"{num_classes - 1}, got {int(targets.min())} to {int(targets.max())}; "
            "give the number of classes"
        )


def batch(
    inputs: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    setting: Setting,
    *,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mix one training batch; see `mixup`."""
    return mixup(inputs, targets, setting.num_classes, alpha, generator)


CARD = Card(
    name="mixup",
    title="Mixup",
    summary="Trains on mixtures of pairs of samples and of their targets.",
    room="regularizers",
    source=Source(
        authors="H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz",
        title="mixup: Beyond Empirical Risk Minimization",
        year=2017,
        arxiv="1710.09412",
        venue="ICLR 2018",
    ),
    batch_of_one="as the model",
    stochastic=True,
    keeps_evaluation=True,
    best_for="Networks that memorise their training set, above all those without BatchNorm, whose "
    "noise regularises (fixup+mixup).",
    limits=(
        "The training loss is not that of plain samples, and does not go to zero.",
        "It may underfit small networks and short trainings.",
    ),
    departures=(
        "The targets become probabilities, which gives the same loss as two cross-entropies.",
    ),
)

METHOD = Method(card=CARD, batch=batch)

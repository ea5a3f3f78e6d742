r"""The effective rate of weights that are free of scale: how far a step turns their direction.

The gradient of such a weight shrinks as its norm grows, so that SGD turns it by the rate divided by
the square of the norm, and an optimiser of steps of equal size by the rate divided by the norm.

Source: Z. Liu, Y. Cui, J. Wan, Y. Mao, A. B. Chan, "Weight Rescaling: Effective and Robust
Regularization for Deep Neural Networks with Batch Normalization", 2021, arXiv 2102.03497.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normlab.optim.arguments import is_number, require
from normlab.optim.live import go_live
from normlab.optim.step_rates import StepRates
from normlab.parameter_groups import Group, check_no_growth
from normlab.surgery.scale_free import ScaleFreeWeight

KEY = "reference_square_norm"


class LearningRateScaling:
    r"""The control without rescaling: keeps the effective rate by scaling the learning rate.

    Each step runs at the rate :math:`\eta \lVert w_t \rVert^2 / \lVert w_0 \rVert^2`, with all the
    weights of a parameter group in one norm: what rescaling does beyond the rate is left out.

    Args:
        optimizer: The optimiser; parameters that should keep their rate need groups of their own.
        weights: What `find_scale_free_weights` found. Their norms now are the reference, kept in
            the groups of the optimiser; groups that have one from a checkpoint keep that.

    Raises:
        ValueError: The network grows under the optimiser, or another one acts on it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[ScaleFreeWeight]
    ) -> None:
        check_no_growth("LearningRateScaling", optimizer)
        self._weights = [weight.weight for weight in weights]
        go_live(self, optimizer, KEY)
        for group in optimizer.param_groups:
            if square := self._square_norm(group):
                group.setdefault(KEY, square)
        StepRates(optimizer, "effective_rates", self._factor)

    def _square_norm(self, group: Group) -> float:
        own = {id(parameter) for parameter in group["params"]}
        mine = [weight.detach() for weight in self._weights if id(weight) in own]
        return sum(weight.square().sum().item() for weight in mine)

    def _factor(self, group: Group) -> float:
        return self._square_norm(group) / group[KEY] if KEY in group else 1.0


def equivalent_lr(
    lr: float, norm: float, target_norm: float = 1.0, *, normalised: bool = False
) -> float:
    r"""Return the rate that moves directions at ``target_norm`` as ``lr`` does at ``norm``.

    .. math::
        \eta' = \eta \, (r / \lVert w \rVert)^2 \;\text{(SGD)}, \quad
        \eta' = \eta \, r / \lVert w \rVert \;\text{(Adam)}

    Args:
        lr: The rate at ``norm``.
        norm: The norm of a group under the old training, such as `equilibrium_norm`.
        target_norm: The norm r that rescaling sets.
        normalised: Whether the updates do not grow with the gradient, as Adam's.

    Raises:
        ValueError: A norm that is not above 0.

    Example:
        >>> equivalent_lr(0.1, norm=2.0)
        0.025
    """
    for name, value in (("norm", norm), ("target_norm", target_norm)):
        require(is_number(value) and value > 0, "equivalent_lr", name, value, "a number above 0")
    return lr * (target_norm / norm) ** (1 if normalised else 2)


def equilibrium_norm(lr: float, weight_decay: float, gradient_norm: float) -> float:
    r"""Return the norm at which SGD's growth and decay are equal.

    .. math::
        \lVert w \rVert^4 = \eta \lVert \tilde g \rVert^2 / (2 \lambda)

    Args:
        lr: The rate.
        weight_decay: The decay lambda.
        gradient_norm: The norm of the gradient of the group at unit norm.

    Raises:
        ValueError: A decay that is not above 0: without one the norm grows for ever.
    """
    valid = is_number(weight_decay) and weight_decay > 0
    require(valid, "equilibrium_norm", "weight_decay", weight_decay, "a number above 0")
    return (lr * gradient_norm**2 / (2 * weight_decay)) ** 0.25

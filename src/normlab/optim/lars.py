r"""LARS: each layer's rate is in proportion to the norm of its weights over that of its gradients.

At the rates that a large batch asks for, some layer would take steps larger than its weights; here
each step is a fixed small share of the weights' norm.

Source: Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks", 2017,
arXiv 1708.03888.

Departs:
    - The rate stands outside the velocity, as in ``torch.optim.SGD``, so that a change of rate acts
      at once; ``paper_momentum=True`` has it inside.
    - A layer whose weights or gradients are all zero takes the plain rate.
    - The method's trust coefficient is 0.1, a hundred times the paper's, because it keeps the
      task's rate, which is one of SGD. At SGD's 0.1 a step then moves a weight by up to 0.01 of its
      norm before momentum, which is :math:`\sqrt{2 \eta \beta}` for the decay 5e-4: the share by
      which SGD itself turns a weight that is free of scale, once growth and decay are in balance.
      The paper's coefficient at a hundred times the rate moves such weights alike, but also what
      does not adapt, such as biases and weights that are zero, and those a hundred times too far.
    - Biases and norm parameters keep the plain rate and do not decay, by `exclude_from_adaptation`
      or by a group with ``adapt=False``: their norms say nothing about a good step.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.optim.arguments import is_number, require
from normlab.optim.layer_adaptation import LayerAdaptiveOptimizer, split_excluded
from normlab.optim.tensor_lists import scale_, tensor_norms
from normlab.parameter_groups import Group


class LARS(LayerAdaptiveOptimizer):
    r"""Stochastic gradient descent with momentum and a local rate for each tensor.

    .. math::
        \lambda = \tau \frac{\lVert w \rVert}{\lVert g \rVert + \beta \lVert w \rVert}, \quad
        v \leftarrow \mu v + \lambda (g + \beta w), \quad w \leftarrow w - \eta v

    with :math:`\beta` the weight decay. :math:`\lambda` is 1 where w or g is zero, and in groups
    with ``adapt=False``. Tensors that are spread over processes (``DTensor``) have the norm of the
    whole.

    Args:
        params: Parameters or groups; see `exclude_from_adaptation`.
        lr: The rate :math:`\eta`, at least 0. A step moves a weight by up to
            :math:`\eta \tau / (1 - \mu)` of its norm, so rates are far above those of SGD.
        momentum: :math:`\mu`, at least 0 and below 1.
        weight_decay: :math:`\beta`, at least 0.
        trust_coefficient: :math:`\tau`, above 0.
        paper_momentum: Whether the rate goes into the velocity:
            :math:`v \leftarrow \mu v + \eta \lambda (g + \beta w), w \leftarrow w - v`.
        adapt: Whether the rate adapts; False makes a group plain SGD.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([weight], lr=10.0, momentum=0.0, weight_decay=0.0)
        >>> weight.grad = torch.tensor([0.0, 7.0])
        >>> optimizer.step()
        >>> weight
        Parameter containing: tensor([3.0000, 3.9500], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        trust_coefficient: float = 1e-3,
        paper_momentum: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "paper_momentum": paper_momentum,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def _check(self, values: Group) -> None:
        super()._check(values)
        momentum, trust = values["momentum"], values["trust_coefficient"]
        valid = is_number(momentum) and 0 <= momentum < 1
        require(valid, "LARS", "momentum", momentum, "a number of at least 0 and below 1")
        valid = is_number(trust) and trust > 0
        require(valid, "LARS", "trust_coefficient", trust, "a number above 0")

    def _state_of(self, weights: list[Tensor], group: Group) -> list[list[Tensor]]:
        if group["momentum"] == 0:
            return []
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return [[self.state[weight]["momentum_buffer"] for weight in weights]]

    def _update(self, group: Group, weights: list[Tensor], *lists: list[Tensor]) -> None:
        gradients, *state = lists
        lr, decay = group["lr"], group["weight_decay"]
        inner, outer = (lr, 1.0) if group["paper_momentum"] else (1.0, lr)
        rates = None
        if group["adapt"]:
            norms, slopes = tensor_norms([*weights, *gradients]).chunk(2)
            local = group["trust_coefficient"] * norms / (slopes + decay * norms)
            rates = inner * torch.where((norms > 0) & (slopes > 0), local, 1.0)
        if state:
            (velocities,) = state
            scale_(velocities, group["momentum"])
            if rates is None:
                directions = _decayed(gradients, weights, decay)
                torch._foreach_add_(velocities, directions, alpha=inner)
            else:
                # In two sums: g + beta w by itself would be a copy of all weights.
                torch._foreach_addcmul_(velocities, gradients, rates.unbind())
                if decay:
                    torch._foreach_addcmul_(velocities, weights, (decay * rates).unbind())
            torch._foreach_add_(weights, velocities, alpha=-outer)
        elif rates is None:
            torch._foreach_add_(weights, _decayed(gradients, weights, decay), alpha=-lr)
        else:
            directions = _decayed(gradients, weights, decay)
            torch._foreach_addcmul_(weights, directions, rates.unbind(), value=-outer)


def _decayed(gradients: list[Tensor], weights: list[Tensor], decay: float) -> list[Tensor]:
    return list(torch._foreach_add(gradients, weights, alpha=decay)) if decay else gradients


def parameter_groups(groups: list[Group], model: nn.Module, setting: Setting) -> list[Group]:
    """Exempt biases and norm parameters from adaptation and weight decay."""
    return split_excluded(groups, model)


def optimizer(
    groups: list[Group],
    make: Callable[[list[Group]], torch.optim.Optimizer],
    *,
    momentum: float = 0.9,
    trust_coefficient: float = 0.1,
    paper_momentum: bool = False,
) -> torch.optim.Optimizer:
    """Return LARS in place of the task's optimiser, whose rates and decay it takes."""
    return LARS(
        groups,
        momentum=momentum,
        trust_coefficient=trust_coefficient,
        paper_momentum=paper_momentum,
    )


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    trust_coefficient: float = 0.1,
) -> None:
    """Say how large the steps are, because they do not depend on the gradient's size."""
    share = setting.lr * trust_coefficient
    setting.say(f"at the rate {setting.lr:g} a gradient moves a weight by {share:.3g} of its norm")


CARD = Card(
    name="lars",
    title="LARS",
    summary="Gives each layer a rate in proportion to its weights' norm over its gradients' norm.",
    room="optim",
    source=Source(
        authors="Y. You, I. Gitman, B. Ginsburg",
        title="Large Batch Training of Convolutional Networks",
        year=2017,
        arxiv="1708.03888",
    ),
    batch_of_one="as the model",
    replaces_optimizer=True,
    keeps_evaluation=True,
    state=("a velocity for each weight",),
    best_for="Convolutional networks at batches of thousands.",
    limits=(
        "The rate is to be one of SGD; with the paper's trust coefficient 0.001, a hundred times "
        "that, and then biases and norm parameters take a hundred times SGD's steps.",
        "A weight that starts at zero, as Fixup's last layers do, takes the plain rate in its "
        "first step and creeps afterwards: its steps are a small share of what norm it has.",
        "At usual batches SGD does as well for less work.",
    ),
    departures=(
        "The rate stands outside the velocity unless paper_momentum is set.",
        "A layer whose weights or gradients are zero takes the plain rate.",
        "The trust coefficient is 0.1, a hundred times the paper's, in place of a hundred times "
        "the rate.",
    ),
)

METHOD = Method(card=CARD, parameter_groups=parameter_groups, optimizer=optimizer, attach=attach)

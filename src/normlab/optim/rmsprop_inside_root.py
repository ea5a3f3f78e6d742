r"""RMSProp as TensorFlow has it: epsilon inside the root, a mean square that starts at one.

With g the gradient of a weight w,

.. math::
    s \leftarrow \alpha s + (1 - \alpha) g^2, \quad
    v \leftarrow \mu v + \eta \frac{g}{\sqrt{s + \epsilon}}, \quad w \leftarrow w - v

where s starts at 1. Inception-v3 and its successors were trained with an epsilon of 1, at which
this is another optimiser than ``torch.optim.RMSprop``: torch divides by :math:`\sqrt s + \epsilon`,
starts s at 0 and keeps the rate out of the velocity. The first step at a small gradient is
:math:`\eta g / \sqrt{1.9}` here.

Source: C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, "Rethinking the Inception
Architecture for Computer Vision", 2015, arXiv 1512.00567; RMSProp is T. Tieleman's and G. Hinton's.

Departs:
    - One process at a time; the source trains on 50 asynchronous ones.
    - The source evaluates an average of the weights over the steps, which
      ``torch.optim.swa_utils.AveragedModel`` makes.
    - The source clips the norm of the whole gradient at 2, which torch's ``clip_grad_norm_`` does;
      the method has it as its option ``max_norm``.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.optim.arguments import is_number, require
from normlab.optim.layer_adaptation import LayerAdaptiveOptimizer
from normlab.parameter_groups import Group


class RMSPropInsideRoot(LayerAdaptiveOptimizer):
    r"""RMSProp with epsilon inside the root; the module's docstring has the equations.

    The source's rate falls by 6 % every two epochs, :math:`0.045 \cdot 0.94^{\lfloor n / 2
    \rfloor}`, which is ``torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.94)``.

    Args:
        params: Parameters or groups.
        lr: The rate :math:`\eta`, at least 0. It is inside the velocity: a change acts on the
            gradients from then on.
        alpha: The decay :math:`\alpha` of the mean square, at least 0 and below 1.
        eps: :math:`\epsilon`, above 0.
        weight_decay: Times the weight, added to its gradient; at least 0.
        momentum: :math:`\mu`, at least 0 and below 1.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = RMSPropInsideRoot([weight], lr=0.2, eps=3.0, alpha=0.0)
        >>> weight.grad = torch.tensor([1.0])
        >>> optimizer.step()
        >>> weight
        Parameter containing: tensor([0.9000], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.045,
        alpha: float = 0.9,
        eps: float = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        super().__init__(params, defaults)

    def _check(self, values: Group) -> None:
        super()._check(values)
        name = type(self).__name__
        for key in ("alpha", "momentum"):
            valid = is_number(values[key]) and 0 <= values[key] < 1
            require(valid, name, key, values[key], "a number of at least 0 and below 1")
        eps = values["eps"]
        require(is_number(eps) and eps > 0, name, "eps", eps, "a number above 0")

    def _state_of(self, weights: list[Tensor], group: Group) -> list[list[Tensor]]:
        names = ["square_avg"]
        if group["momentum"] > 0:
            names.append("momentum_buffer")
        for weight in weights:
            state = self.state[weight]
            if "square_avg" not in state:
                state["square_avg"] = torch.ones_like(weight)
            if group["momentum"] > 0 and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
        return [[self.state[weight][name] for weight in weights] for name in names]

    def _update(self, group: Group, weights: list[Tensor], *lists: list[Tensor]) -> None:
        gradients, squares, *velocities = lists
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
        roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        if velocities:
            torch._foreach_mul_(velocities[0], group["momentum"])
            torch._foreach_addcdiv_(velocities[0], gradients, roots, value=group["lr"])
            torch._foreach_sub_(weights, velocities[0])
        else:
            torch._foreach_addcdiv_(weights, gradients, roots, value=-group["lr"])


def optimizer(
    groups: list[Group],
    make: Callable[[list[Group]], torch.optim.Optimizer],
    *,
    alpha: float = 0.9,
    eps: float = 1.0,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Return this RMSProp in place of the task's optimiser, whose rates and decay it takes."""
    return RMSPropInsideRoot(groups, alpha=alpha, eps=eps, momentum=momentum)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    max_norm: float | None = None,
) -> None:
    """Clip the norm of the whole gradient in front of each step, if ``max_norm`` is given."""
    if max_norm is None:
        return
    require(
        is_number(max_norm) and max_norm > 0,
        "rmsprop-inside-root",
        "max_norm",
        max_norm,
        "a number above 0",
    )
    limit = max_norm

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Read anew each time: networks that grow replace their parameters.
        held = [weight for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(held, limit)

    optimizer.register_step_pre_hook(clip)


CARD = Card(
    name="rmsprop-inside-root",
    title="RMSProp with epsilon inside the root",
    summary="Divides gradients by the root of their mean square plus epsilon, as TensorFlow does.",
    room="optim",
    source=Source(
        authors="C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna",
        title="Rethinking the Inception Architecture for Computer Vision",
        year=2015,
        arxiv="1512.00567",
        venue="CVPR 2016",
    ),
    batch_of_one="as the model",
    replaces_optimizer=True,
    keeps_evaluation=True,
    state=("a mean square and a velocity for each weight",),
    best_for="Repeating trainings that were published with TensorFlow's RMSProp: Inception, "
    "MobileNet, EfficientNet.",
    limits=(
        "With an epsilon of 1 and small gradients it is nearly gradient descent with momentum, at "
        "up to 0.7 times the rate to begin with.",
    ),
    departures=(
        "The gradient is clipped only if max_norm is set; the paper's 2.0.",
        "No average of the weights for evaluation, and no asynchronous workers.",
    ),
)

METHOD = Method(card=CARD, optimizer=optimizer, attach=attach)

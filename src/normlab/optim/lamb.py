r"""LAMB: Adam's direction, at a step in proportion to the norm of each layer's weights.

Source: Y. You, J. Li, S. Reddi, J. Hseu, S. Kumar, S. Bhojanapalli, X. Song, J. Demmel, K. Keutzer,
C.-J. Hsieh, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2019, arXiv
1904.00962.

Departs:
    - Both moments are corrected for their start at zero.
    - :math:`\phi` is the identity unless ``weight_norm_clip`` bounds it.
    - Biases and norm parameters take AdamW's step and do not decay, by `exclude_from_adaptation` or
      by a group with ``adapt=False``.
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


class LAMB(LayerAdaptiveOptimizer):
    r"""Adam with a trust ratio for each tensor.

    .. math::
        u = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \beta w, \quad
        w \leftarrow w - \eta \frac{\phi(\lVert w \rVert)}{\lVert u \rVert} u

    with :math:`\hat m, \hat v` the corrected averages of g and g^2 and :math:`\beta` the weight
    decay. The ratio is 1 where w or u is zero, and in groups with ``adapt=False``, which makes
    them AdamW. Tensors that are spread over processes (``DTensor``) have the norm of the whole.

    Args:
        params: Parameters or groups; see `exclude_from_adaptation`.
        lr: The rate :math:`\eta`, at least 0: the share of its norm by which a weight moves.
        betas: The coefficients of the two averages, each at least 0 and below 1.
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\beta`, at least 0.
        weight_norm_clip: The largest value of :math:`\phi(z) = \min(z, c)`, above 0, such as 10;
            None for the identity.
        adapt: Whether the step adapts; False makes a group AdamW.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([0.0, 7.0])
        >>> optimizer.step()
        >>> weight
        Parameter containing: tensor([3.0000, 3.5000], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        weight_norm_clip: float | None = None,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_norm_clip": weight_norm_clip,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def _check(self, values: Group) -> None:
        super()._check(values)
        betas, eps, clip = values["betas"], values["eps"], values["weight_norm_clip"]
        valid = isinstance(betas, (tuple, list)) and len(betas) == 2
        valid = valid and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
        require(valid, "LAMB", "betas", betas, "two numbers of at least 0 and below 1")
        require(is_number(eps) and eps >= 0, "LAMB", "eps", eps, "a number of at least 0")
        valid = clip is None or (is_number(clip) and clip > 0)
        require(valid, "LAMB", "weight_norm_clip", clip, "a number above 0 or None")

    def _state_of(self, weights: list[Tensor], group: Group) -> list[list[Tensor]]:
        for weight in weights:
            state = self.state[weight]
            if "step" not in state:
                # On the host, where counting costs no wait for the device.
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
        return [
            [self.state[weight][name] for weight in weights]
            for name in ("exp_avg", "exp_avg_sq", "step")
        ]

    def _update(self, group: Group, weights: list[Tensor], *lists: list[Tensor]) -> None:
        gradients, means, squares, steps = lists
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1.0)
        counts = [step.item() for step in steps]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        scale_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        # The corrections are moved from the tensors into the scalars around them:
        # (m / a) / (sqrt(v / b) + eps) = (sqrt(b) / a) m / (sqrt(v) + eps sqrt(b)).
        roots = [(1 - beta2**count) ** 0.5 for count in counts]
        factors = [root / (1 - beta1**count) for root, count in zip(roots, counts, strict=True)]
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, [group["eps"] * root for root in roots])
        if group["weight_decay"]:
            updates = torch._foreach_mul(weights, group["weight_decay"])
            torch._foreach_addcdiv_(updates, means, divisors, factors)
        else:
            updates = torch._foreach_div(means, divisors)
            torch._foreach_mul_(updates, factors)
        if group["adapt"]:
            norms, sizes = tensor_norms([*weights, *updates]).chunk(2)
            ratios = norms.clamp(max=group["weight_norm_clip"] or torch.inf) / sizes
            ratios = torch.where((norms > 0) & (sizes > 0), ratios, 1.0)
            torch._foreach_addcmul_(weights, updates, ratios.unbind(), value=-group["lr"])
        else:
            torch._foreach_add_(weights, updates, alpha=-group["lr"])


def parameter_groups(groups: list[Group], model: nn.Module, setting: Setting) -> list[Group]:
    """Exempt biases and norm parameters from adaptation and weight decay."""
    return split_excluded(groups, model)


def optimizer(
    groups: list[Group],
    make: Callable[[list[Group]], torch.optim.Optimizer],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_norm_clip: float | None = None,
) -> torch.optim.Optimizer:
    """Return LAMB in place of the task's optimiser, whose rates and decay it takes."""
    return LAMB(groups, betas=(beta1, beta2), eps=eps, weight_norm_clip=weight_norm_clip)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Say how large the steps are, because the rates of SGD do not carry over."""
    setting.say(f"each step moves a weight by {setting.lr:g} of its norm")


CARD = Card(
    name="lamb",
    title="LAMB",
    summary="Adam's direction at a step in proportion to the norm of each layer's weights.",
    room="optim",
    source=Source(
        authors="Y. You, J. Li, S. Reddi, J. Hseu, S. Kumar, S. Bhojanapalli, X. Song, J. Demmel, "
        "K. Keutzer, C.-J. Hsieh",
        title="Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
        year=2019,
        arxiv="1904.00962",
    ),
    batch_of_one="as the model",
    replaces_optimizer=True,
    keeps_evaluation=True,
    state=("two averages and a step counter for each weight",),
    best_for="Transformers and convolutional networks at batches of thousands.",
    limits=(
        "Its rate is the share of its norm by which a weight moves in a step: 0.001 to 0.02, not "
        "SGD's 0.1.",
    ),
    departures=("The function phi of the weights' norm is the identity unless it is clipped.",),
)

METHOD = Method(card=CARD, parameter_groups=parameter_groups, optimizer=optimizer, attach=attach)

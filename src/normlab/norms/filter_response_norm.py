r"""Filter response normalisation with a thresholded linear unit, in place of BatchNorm and ReLU.

Each sample and channel is divided by the root mean square of its own map, so a sample's output
depends on no other sample: batches of one train as well as large ones.

Source: S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
in the Training of Deep Neural Networks", 2019, arXiv 1911.09737.

Departs:
    - The learnt epsilon is ``eps + |eps_l|``, one per channel, started at 1e-4; public ports
      differ (a scalar, or ``|eps|`` of a parameter started at 1e-6).
    - Weight decay on weight, bias and threshold is left to the caller's parameter groups; in
      `METHOD` none of the three decays (option ``decay``).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.moments import check_channels
from normlab.norms.filter_response_unit import filter_response_unit, thresholded_linear_unit
from normlab.parameter_groups import Group, split_groups
from normlab.surgery.flow import Call, Flow, Sum, trace_flow
from normlab.surgery.swap import BATCH_NORMS, batch_norms, keep_affine, swap


def filter_response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: Tensor | float) -> Tensor:
    r"""Divide each map by its root mean square, then scale and shift each channel.

    .. math::
        \nu^2 = \mathrm{mean}_{space}(x^2), \quad
        \hat x = x / \sqrt{\nu^2 + \epsilon}, \quad y = \gamma \hat x + \beta

    Args:
        x: Activations ``(N, C, *)``; without spatial axes each value is a map of its own.
        weight: The scale gamma ``(C,)``.
        bias: The shift beta ``(C,)``.
        eps: Added to the mean square: a number above 0, or one per channel ``(C,)``.

    Returns:
        A tensor of the shape and dtype of ``x``; the mean square is taken in float32 if ``x`` has
        a half precision.

    Example:
        >>> x = torch.tensor([[[3.0, 4.0, 0.0, 0.0]]])
        >>> filter_response_norm(x, torch.ones(1), torch.zeros(1), 1e-6)
        tensor([[[1.2000, 1.6000, 0.0000, 0.0000]]])
    """
    return filter_response_unit(x, weight, bias, eps)


class FilterResponseNorm(nn.Module):
    """Filter response normalisation of ``(N, C, *)``, the same in training and evaluation.

    Args:
        num_features: The number of channels C.
        eps: The constant under the root, above 0.
        learn_eps: Whether ``|eps_l|``, one per channel, is added to ``eps`` and learnt.
            ``"auto"``: where ``spatial_dims`` is 0, because there the layer would otherwise
            return little but signs.
        eps_init: The value at which ``eps_l`` starts.
        spatial_dims: The number of spatial axes that ``"auto"`` decides by.
        weight_init: The value at which the scale starts; 0 makes a residual branch start silent.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ValueError: At construction for an ``eps`` that is not above 0; at the call for input of
            another number of channels, of integers, or empty.

    Example:
        >>> layer = FilterResponseNorm(8)
        >>> layer(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        *,
        learn_eps: bool | Literal["auto"] = False,
        eps_init: float = 1e-4,
        spatial_dims: int = 2,
        weight_init: float = 1.0,
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(
                f"FilterResponseNorm(eps={eps}): expected a number above 0, got {eps}; use 1e-6"
            )
        self.num_features = num_features
        self.eps = eps
        self.eps_init = eps_init
        self.weight_init = weight_init
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        learnt = spatial_dims == 0 if learn_eps == "auto" else learn_eps
        self.eps_l = nn.Parameter(torch.empty(num_features)) if learnt else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight, bias and the learnt epsilon to their starting values."""
        nn.init.constant_(self.weight, self.weight_init)
        nn.init.zeros_(self.bias)
        if self.eps_l is not None:
            nn.init.constant_(self.eps_l, self.eps_init)

    @property
    def all_eps(self) -> Tensor | float:
        """What is added to the mean square: ``eps``, and the learnt share where there is one."""
        return self.eps if self.eps_l is None else self.eps + self.eps_l.abs()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, *)``."""
        check_channels("FilterResponseNorm", x, self.num_features)
        return filter_response_norm(x, self.weight, self.bias, self.all_eps)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"{self.num_features}, eps={self.eps}, learn_eps={self.eps_l is not None}"


class ThresholdedLinearUnit(nn.Module):
    """The activation that goes with `FilterResponseNorm`: ``max(x, tau)``, tau learnt per channel.

    Args:
        num_features: The number of channels C.
        init: The value at which every threshold starts; at 0 the unit starts as ReLU.

    Shape:
        Input and output ``(N, C, *)``.

    Example:
        >>> ThresholdedLinearUnit(2)(torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 2.]], grad_fn=<_ThresholdedLinearUnitBackward>)
    """

    def __init__(self, num_features: int, init: float = 0.0) -> None:
        super().__init__()
        self.num_features = num_features
        self.threshold = nn.Parameter(torch.full((num_features,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger of ``x`` and the threshold of its channel."""
        check_channels("ThresholdedLinearUnit", x, self.num_features)
        return thresholded_linear_unit(x, self.threshold)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"{self.num_features}"


class FRN(nn.Sequential):
    """`FilterResponseNorm` and `ThresholdedLinearUnit` in one: put it where BN and ReLU stood.

    Both are computed in one step that keeps one tensor for backward instead of two; a child that
    has hooks, a parametrisation or a replacement is called by itself.

    Args:
        num_features: The number of channels C.
        eps: As in `FilterResponseNorm`.
        learn_eps: As in `FilterResponseNorm`.
        spatial_dims: As in `FilterResponseNorm`.

    Example:
        >>> FRN(3)(torch.randn(1, 3, 4, 4)).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        *,
        learn_eps: bool | Literal["auto"] = "auto",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__(
            FilterResponseNorm(num_features, eps, learn_eps=learn_eps, spatial_dims=spatial_dims),
            ThresholdedLinearUnit(num_features),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of shape ``(N, C, *)`` and take the threshold, in one step."""
        norm, unit = self[0], self[-1]
        if not (isinstance(norm, FilterResponseNorm) and isinstance(unit, ThresholdedLinearUnit)):
            return super().forward(input)
        if len(self) != 2 or not (_is_untouched(norm) and _is_untouched(unit)):
            return super().forward(input)
        check_channels("FRN", input, norm.num_features)
        return filter_response_unit(input, norm.weight, norm.bias, norm.all_eps, unit.threshold)


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module is just what this file says: nothing listens to it or parametrises it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ours = type(module) in (FilterResponseNorm, ThresholdedLinearUnit)
    return ours and not any(hooks) and not module._backward_pre_hooks


def ramp_up_factor(
    step: int, warm_steps: int, total_steps: int, *, ramp: Literal["cosine", "linear"] = "cosine"
) -> float:
    r"""Return the learning rate's factor: a slow rise from 0 to 1, then a cosine fall to 0.

    .. math::
        f(t) = \tfrac12 (1 - \cos(\pi t / T_w)) \;(t < T_w), \quad
        f(t) = \tfrac12 (1 + \cos(\pi (t - T_w) / (T - T_w)))

    Networks with this layer that place it before the activation need the slow start at high rates.

    Args:
        step: The step t, from 0 to ``total_steps``.
        warm_steps: The length of the rise, at least 0 and below ``total_steps``.
        total_steps: The last step T.
        ramp: The shape of the rise; ``"linear"`` is ``t / T_w``.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: ``warm_steps`` is not below ``total_steps``.
    """
    if not 0 <= warm_steps < total_steps:
        raise ValueError(
            f"ramp_up_factor(warm_steps={warm_steps}, total_steps={total_steps}): expected "
            "0 <= warm_steps < total_steps, got otherwise; shorten the rise"
        )
    if step < warm_steps:
        share = step / warm_steps
        return share if ramp == "linear" else 0.5 * (1 - math.cos(math.pi * share))
    share = (step - warm_steps) / (total_steps - warm_steps)
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def from_batch_norm(norm: nn.Module, spatial_dims: int) -> FilterResponseNorm:
    """Return the layer that takes a BatchNorm's place; scale and shift are kept, statistics not.

    Args:
        norm: One of torch's BatchNorm layers.
        spatial_dims: The number of spatial axes of its input.

    Returns:
        A fresh layer; its function differs from that of ``norm``.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = FilterResponseNorm(norm.num_features, learn_eps="auto", spatial_dims=spatial_dims)
    keep_affine(layer, norm)
    return layer


def prepare(model: nn.Module, setting: Setting) -> nn.Module:
    """Replace each BatchNorm by FRN, and each ReLU after it or after a residual sum by TLU.

    Where a ReLU, in all of its places, is the only reader of the BatchNorm before it, `FRN` takes
    the norm's place with a threshold of its own and the ReLU becomes an identity. A ReLU that
    also serves a residual sum or another layer stays a ReLU: there is no one threshold for it.
    """
    norms = batch_norms(model, "filter-response-norm")
    flow = _trace(model, setting.batches[0][0][:2])
    replacements: dict[nn.Module, nn.Module] = {
        norm: from_batch_norm(norm, _spatial_dims(flow, norm)) for norm in norms.values()
    }
    joined = _alone_after_norms(flow)
    kept, units = [], 0
    for name, module in model.named_modules():
        calls = flow.of(module)
        if type(module) is not nn.ReLU or not any(_follows_norm(call.source) for call in calls):
            continue
        channels = [call.input_shape[1] for call in calls if call.input_shape is not None]
        if module in joined:
            for norm in joined[module]:
                norm_and_unit = FRN(channels[0])
                norm_and_unit[0] = replacements[norm]
                replacements[norm] = norm_and_unit
            replacements[module] = nn.Identity()
            units += len(joined[module])
        elif len(calls) == 1:
            replacements[module] = ThresholdedLinearUnit(channels[0])
            units += 1
        else:
            kept.append(name)
    kept += [relu.owner for relu in flow.functional_relus if _follows_norm(relu.sources[0])]
    if kept:
        setting.say(
            f"{len(kept)} ReLUs stay, because one module or function serves several places: "
            + ", ".join(sorted(set(kept)))
        )
    setting.say(
        f"{len(norms)} BatchNorm layers became FRN, {units} ReLUs became TLU, "
        f"{sum(map(len, joined.values()))} of them in the norm's place"
    )
    return swap(model, replacements)


def _trace(model: nn.Module, inputs: Tensor) -> Flow:
    """Trace the flow, in which what the model returns has a reader as well."""

    def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            output.detach()
        elif isinstance(output, (list, tuple, dict)):
            for value in output.values() if isinstance(output, dict) else output:
                read(_module, _inputs, value)

    handle = model.register_forward_hook(read)
    try:
        return trace_flow(model, inputs)
    finally:
        handle.remove()


def _alone_after_norms(flow: Flow) -> dict[nn.Module, list[nn.Module]]:
    """Return each ReLU whose every place is right after a norm that nothing else reads."""
    # What a container takes is read by what stands in it.
    sources = [c.source for c in flow.calls if not any(True for _ in c.module.children())]
    sources += [source for operation in flow.operations for source in operation.sources]
    readers: Counter[object] = Counter()
    while sources:
        source = sources.pop()
        readers[source] += 1
        if isinstance(source, Sum):
            sources += source.terms
    found = {}
    for relu in {call.module for call in flow.calls if type(call.module) is nn.ReLU}:
        before = [call.source for call in flow.of(relu)]
        norms = [source.module for source in before if isinstance(source, Call)]
        once = all(len(flow.of(norm)) == 1 and type(norm) in BATCH_NORMS for norm in norms)
        if len(norms) == len(before) and once and all(readers[one] == 1 for one in before):
            found[relu] = norms
    return found


def _spatial_dims(flow: Flow, norm: nn.Module) -> int:
    shapes = [call.input_shape for call in flow.of(norm) if call.input_shape is not None]
    return len(shapes[0]) - 2 if shapes else int(type(norm).__name__[-2])


def _follows_norm(source: object) -> bool:
    """Whether a ReLU's input comes from a BatchNorm, directly or through a residual sum."""
    if isinstance(source, Sum):
        return any(_follows_norm(term) for term in source.terms)
    return type(getattr(source, "module", None)) in BATCH_NORMS


def parameter_groups(
    groups: list[Group], model: nn.Module, setting: Setting, *, decay: bool = False
) -> list[Group]:
    """Exempt scale, shift, epsilon and threshold from weight decay, unless ``decay``."""
    if decay:
        return groups
    layers = (FilterResponseNorm, ThresholdedLinearUnit)
    own = [p for m in model.modules() if isinstance(m, layers) for p in m.parameters()]
    return split_groups(groups, own, weight_decay=0.0)


CARD = Card(
    name="filter-response-norm",
    title="Filter response normalisation",
    summary="Divides each map of each sample by its root mean square and learns the activation's "
    "threshold.",
    room="norms",
    source=Source(
        authors="S. Singh, S. Krishnan",
        title="Filter Response Normalization Layer: Eliminating Batch Dependence in the Training "
        "of Deep Neural Networks",
        year=2019,
        arxiv="1911.09737",
        venue="CVPR 2020",
    ),
    best_for="Convolutional networks in which an activation follows the normaliser, at any batch "
    "size, one included.",
    limits=(
        "A public re-run on a post-activation ResNet-50 found it slightly worse than BatchNorm.",
        "The mean is not removed: an input offset stays.",
    ),
    departures=(
        "The learnt epsilon is one per channel, eps + |eps_l| with eps_l started at 1e-4.",
        "Scale, shift and threshold do not decay unless decay=True.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups)

r"""Adaptive gradient clipping: a unit's gradient may not be large beside the unit's weights.

Just before the optimiser's step, for each unit i (a slice along the first axis; a parameter of at
most one axis is one unit)

.. math::
    G_i \leftarrow G_i \, \frac{\ell_i}{\max(\lVert G_i \rVert, 10^{-6})}
    \quad\text{where}\quad \lVert G_i \rVert \ge \ell_i = \lambda \max(\lVert W_i \rVert, \epsilon)

so a step of plain SGD at rate eta changes no unit by more than eta lambda of its size, or of
epsilon where it is smaller; momentum, weight decay and Adam act on what is clipped, and are not
bounded by it. Large rates and batches stay stable in networks without normalisers. The final
classifier is left alone.

Source: A. Brock, S. De, S. L. Smith, K. Simonyan, "High-Performance Large-Scale Image Recognition
Without Normalization", 2021, arXiv 2102.06171; the form here is that of T. Chen, Z. Zhang,
X. Ouyang, Z. Liu, Z. Shen, Z. Wang, "'BNN - BN = ?'", 2021, arXiv 2104.08215.

Departs:
    - The classifier is found by running the model (the last weight layer called), or named by the
      caller; the public code goes by the name "fc".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.surgery.flow import trace_flow

_SMALLEST = 1e-6


@torch.no_grad()
def clip_adaptively_(
    parameters: Iterable[nn.Parameter], clipping: float = 0.02, eps: float = 1e-3
) -> None:
    """Clip the gradients of parameters, unit by unit, in place.

    Args:
        parameters: Parameters; those without a gradient are passed over.
        clipping: The largest norm lambda of a unit's gradient as a share of its weights' norm,
            above 0; the source takes 0.01 to 0.16, less for larger batches.
        eps: The norm below which weights count as this large, above 0, so that units at zero train.

    Raises:
        ValueError: ``clipping`` or ``eps`` is not above 0, or a gradient is sparse.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[6.0, 8.0]])
        >>> clip_adaptively_([weight])
        >>> weight.grad
        tensor([[0.0600, 0.0800]])
    """
    for name, value in (("clipping", clipping), ("eps", eps)):
        if not value > 0:
            raise ValueError(
                f"clip_adaptively_({name}={value}): expected a number above 0, got {value}; "
                "leave it out for the default"
            )
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout is not torch.strided:
            raise ValueError(
                "clip_adaptively_(parameters): expected dense gradients, got a sparse one of shape "
                f"{tuple(gradient.shape)}; build its embedding with sparse=False, or leave it out"
            )
        limit = clipping * _unit_norms(parameter).clamp(min=eps)
        norm = _unit_norms(gradient)
        factor = torch.where(norm >= limit, limit / norm.clamp(min=_SMALLEST), 1.0)
        gradient.mul_(factor.to(gradient.dtype))


def _unit_norms(values: Tensor) -> Tensor:
    """Return the norm of each slice along the first axis, with axes that broadcast."""
    axes = list(range(values.dim() > 1, values.dim()))
    wide = torch.promote_types(values.dtype, torch.float32)
    if not axes:
        return values.abs().to(wide)
    return torch.linalg.vector_norm(values, dim=axes, keepdim=True, dtype=wide)


class AdaptiveClipping:
    """Clips the gradients of an optimiser in front of each of its steps.

    Where the step is given a closure, what each call of it leaves is clipped. Under
    ``torch.amp.GradScaler`` the gradients count as they are without its scale.

    Args:
        optimizer: The optimiser.
        exclude: The module or modules whose parameters are left alone: the final classifier.
        clipping: As in `clip_adaptively_`.
        eps: As in `clip_adaptively_`.

    Raises:
        ValueError: As in `clip_adaptively_`, or ``exclude`` holds something else than modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clipping = AdaptiveClipping(optimizer, exclude=[model[2]])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        exclude: nn.Module | Iterable[nn.Module] = (),
        *,
        clipping: float = 0.02,
        eps: float = 1e-3,
    ) -> None:
        clip_adaptively_([], clipping, eps)
        self.clipping = clipping
        self.eps = eps
        self._excluded = (exclude,) if isinstance(exclude, nn.Module) else tuple(exclude)
        strange = [one for one in self._excluded if not isinstance(one, nn.Module)]
        if strange:
            raise ValueError(
                f"AdaptiveClipping(exclude={strange}): expected modules, got "
                f"{type(strange[0]).__name__}; give the layers themselves, such as model.fc"
            )
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Stop clipping."""
        self._hook.remove()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = named.get("closure") or next(iter(args[1:]), None)
        if closure is None:
            self._clip(optimizer)
            return None
        # The gradients to be used are yet to be computed.
        return args[:1], named | {"closure": self._clipping(optimizer, closure)}

    def _clipping(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]
    ) -> Callable[[], Any]:
        def clipped() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._clip(optimizer)
            return loss

        return clipped

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        # Read anew each time: networks that grow replace their parameters.
        left = {id(p) for module in self._excluded for p in module.parameters()}
        held = (p for group in optimizer.param_groups for p in group["params"])
        # A scaler leaves it to a fused optimiser to unscale the gradients during the step.
        scale = getattr(optimizer, "grad_scale", None)
        clipping = self.clipping if scale is None else self.clipping * float(scale)
        clip_adaptively_((p for p in held if id(p) not in left), clipping, self.eps)


def find_classifier(model: nn.Module, *inputs: Any) -> nn.Module | None:
    """Return the last weight layer that a model calls, or None where it calls none.

    Args:
        model: Any module.
        inputs: What its forward takes.

    Example:
        >>> find_classifier(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
        Linear(in_features=4, out_features=3, bias=True)
    """
    weighted = [
        call.module
        for call in trace_flow(model, *inputs).calls
        if any(parameter.dim() > 1 for parameter in _own(call.module))
    ]
    return weighted[-1] if weighted else None


def _own(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters, those behind a parametrisation included."""
    parts = getattr(module, "parametrizations", None)
    behind = list(parts.parameters()) if isinstance(parts, nn.ModuleDict) else []
    return [*module.parameters(recurse=False), *behind]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    clipping: float = 0.02,
    eps: float = 1e-3,
) -> None:
    """Clip in front of each step, the classifier's gradient left alone."""
    classifier = find_classifier(model, setting.batches[0][0][:2])
    if classifier is None:
        raise Unsuitable(
            "adaptive-clipping(model): expected a model with weight layers, got "
            f"{type(model).__name__} without any; use AdaptiveClipping and name what to leave out"
        )
    AdaptiveClipping(optimizer, [classifier], clipping=clipping, eps=eps)
    name = next(name for name, module in model.named_modules() if module is classifier)
    setting.say(f"gradients are clipped unit by unit, but those of {name or 'the model'}")


CARD = Card(
    name="adaptive-clipping",
    title="Adaptive gradient clipping",
    summary="Limits the gradient of each unit to a share of the norm of the unit's weights.",
    room="optim",
    source=Source(
        authors="A. Brock, S. De, S. L. Smith, K. Simonyan",
        title="High-Performance Large-Scale Image Recognition Without Normalization",
        year=2021,
        arxiv="2102.06171",
        venue="ICML 2021",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    best_for="Networks without normalisers at large rates or batches.",
    limits=("Norms stay where they are: compose with none to take them out.",),
    departures=("The classifier is found by running the model, not by its name.",),
)

METHOD = Method(card=CARD, attach=attach)

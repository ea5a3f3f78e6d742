r"""Lookahead: every few steps the weights go back to the middle of the way that they came.

Source: M. Zhang, J. Lucas, G. Hinton, J. Ba, "Lookahead Optimizer: k steps forward, 1 step back",
2019, arXiv 1907.08610.

Departs:
    - The slow weights are part of the optimiser's state, so that a checkpoint holds them, and
      evaluation uses them on request only (`Lookahead.slow_weights`).
    - The state of the inner optimiser, such as momentum, is left alone.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from normlab.method import Card, Method, Source
from normlab.optim.arguments import is_count, is_number, require
from normlab.optim.live import go_live
from normlab.optim.wrapper import OptimizerWrapper
from normlab.parameter_groups import Group

_KEY = "lookahead"
_SLOW = "slow_weight"


class Lookahead(OptimizerWrapper):
    r"""Moves slow weights towards those of another optimiser every k steps.

    .. math::
        s \leftarrow s + \alpha (w - s), \quad w \leftarrow s

    Groups, state and checkpoint are those of the optimiser that is wrapped: the slow weights stand
    in ``state[parameter]["slow_weight"]`` from its first step on, the step counter with k and alpha
    in ``param_groups[0]["lookahead"]``. An optimiser that has them from a checkpoint goes on from
    there. Step hooks run around the whole step.

    Args:
        optimizer: The fast optimiser, of any kind.
        k: Fast steps between two moves of the slow weights, at least 1.
        alpha: The share of the way that they move, above 0 and at most 1; 1 changes nothing.

    Raises:
        ValueError: A value out of its range, or an optimiser that a Lookahead wraps already.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Lookahead(torch.optim.SGD([weight], lr=1.0), k=2, alpha=0.5)
        >>> weight.grad = torch.tensor([1.0])
        >>> for _ in range(2):
        ...     optimizer.step()
        >>> weight.item()
        0.0
    """

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        require(is_count(k), "Lookahead", "k", k, "1, 2, 3, ...")
        valid = is_number(alpha) and 0 < alpha <= 1
        require(valid, "Lookahead", "alpha", alpha, "a number above 0 and at most 1")
        super().__init__(optimizer)
        self._start = {"step": 0, "k": k, "alpha": alpha}
        first = self.param_groups[0]
        first[_KEY] = {**first.get(_KEY, {"step": 0}), "k": k, "alpha": alpha}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        go_live(self, self.base, _KEY)
        # A hook that sets weights must see those that the step ends with.
        self._run_hooks_around_own_step()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a fast step, and every k-th time move the slow weights.

        Args:
            closure: Handed to the fast optimiser.

        Returns:
            What the fast optimiser returns.
        """
        new = self._without_slow(whatever_gradient=closure is not None)
        loss = self.base.step() if closure is None else self.base.step(closure)
        # After the fast step: optimisers take a state that is not empty for one of their own.
        for weight, slow in new:
            if weight.grad is not None:
                self.state[weight][_SLOW] = slow
        # Loading a checkpoint replaces the groups, and an older one may know no Lookahead.
        progress = self.param_groups[0].setdefault(_KEY, dict(self._start))
        progress["step"] += 1
        if progress["step"] % progress["k"] == 0:
            weights, slow = self._pairs()
            if weights:
                torch._foreach_lerp_(slow, weights, progress["alpha"])
                # One by one, so that sharded weights (DTensor) go, too.
                for weight, value in zip(weights, slow, strict=True):
                    weight.copy_(value)
        return loss

    def _without_slow(self, whatever_gradient: bool) -> list[tuple[Tensor, Tensor]]:
        """Return the weights that are about to move for the first time, each with a copy."""
        return [
            (weight, weight.detach().clone())
            for group in self.param_groups
            for weight in group["params"]
            if _SLOW not in self.state.get(weight, {})
            and weight.requires_grad
            and (whatever_gradient or weight.grad is not None)
        ]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        moved = [
            weight
            for group in self.param_groups
            for weight in group["params"]
            if _SLOW in self.state.get(weight, {})
        ]
        return [weight.detach() for weight in moved], [
            self.state[weight][_SLOW] for weight in moved
        ]

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Put the slow weights into the model, and the fast ones back afterwards.

        Statistics of normalisers are those that the fast weights left behind.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = Lookahead(torch.optim.SGD([weight], lr=1.0))
            >>> weight.grad = torch.tensor([1.0])
            >>> optimizer.step()
            >>> with optimizer.slow_weights():
            ...     print(weight.item())
            1.0
            >>> weight.item()
            0.0
        """
        weights, slow = self._pairs()
        fast = [weight.clone() for weight in weights]
        try:
            for weight, value in zip(weights, slow, strict=True):
                weight.copy_(value)
            yield
        finally:
            for weight, value in zip(weights, fast, strict=True):
                weight.copy_(value)


def optimizer(
    groups: list[Group],
    make: Callable[[list[Group]], torch.optim.Optimizer],
    *,
    k: int = 5,
    alpha: float = 0.5,
) -> torch.optim.Optimizer:
    """Wrap the task's optimiser."""
    return Lookahead(make(groups), k=k, alpha=alpha)


CARD = Card(
    name="lookahead",
    title="Lookahead",
    summary="Every few steps moves slow weights part of the way to the optimiser's and goes on "
    "from there.",
    room="optim",
    source=Source(
        authors="M. Zhang, J. Lucas, G. Hinton, J. Ba",
        title="Lookahead Optimizer: k steps forward, 1 step back",
        year=2019,
        arxiv="1907.08610",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    state=("slow weights and a step counter",),
    best_for="Less sensitivity to the rate and momentum of the optimiser inside.",
    limits=("Keeps a second copy of the weights.",),
    departures=("Evaluation uses the fast weights, which every k-th step are the slow ones.",),
)

METHOD = Method(card=CARD, optimizer=optimizer)

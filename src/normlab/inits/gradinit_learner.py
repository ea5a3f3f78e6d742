"""The learner of GradInit's scales; `normlab.inits.gradinit` says what they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.inits.gradinit_steps import (
    Half,
    Kind,
    ScaleAdam,
    check_twice_differentiable,
    gradients,
    joined,
    learning_mode,
    run_loss,
    total_norm,
)
from normlab.method import Unsuitable
from normlab.moments import wide


class Step(NamedTuple):
    """One step: its number from 1, its kind, loss and gradient norm of S before it."""

    number: int
    kind: Kind
    loss: float
    gradient_norm: float


class GradInit:
    """Learns the scales, a step at a time; the model is not changed before `finish`.

    During a step dropout is off and batch normalisation uses batch statistics; modes, running
    statistics and gradients are as before afterwards. Random numbers are drawn only by models that
    draw them in evaluation, too. Models in half precision are scaled by passes in float32. A
    parameter that is zero has no scale, but takes part in the gradient and in the trial step, as an
    excluded one does. A bias whose scale reached 0 stays 0.

    Args:
        model: Any model; what trains of its parameters is scaled, tied ones once.
        loss: Maps ``(outputs, targets)`` to a scalar. Take the plain loss of plain targets also
            where mixup follows.
        optimizer: What will train the model: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: The rate eta of the trial step, above 0, that of the training; None for 0.1 (SGD) or
            0.001 (Adam).
        scale_lr: The rate of the scales, above 0. The paper took 0.001 to 0.1 for normalised
            networks, 0.005 to 0.05 for others.
        max_norm: The bound gamma of the gradient norm, at least 0, ``inf`` for none; None for 1
            (SGD, l2) or 1000 (Adam, l1, for millions of parameters).
        min_scale: The smallest scale, at least 0 and at most 1.
        min_bias_scale: The smallest scale of a parameter with "bias" in its name.
        max_scale: The largest scale, at least 1; the paper takes 100 for LayerNorm.
        clip: The bound of a scale's slope, above 0; ``inf`` for none, as for Transformers.
        betas: Decay rates of the scales' Adam.
        eps: Added to the root of its second moment, at least 0.
        second_order: Whether the derivative also follows how the step changes with the scales. For
            Adam that is the same, because a sign has no derivative.
        normalize_grad: Whether SGD's trial step is along g / |g|, otherwise along g.
        shared_second_moment: See `normlab.inits.gradinit_steps.ScaleAdam`.
        exclude: Names of parameters, or of modules with all they hold, that are not scaled.
        normalisers: Further classes of layers that need training mode to use batch statistics;
            see `normlab.inits.gradinit_steps.learning_mode` for those that are known.

    Raises:
        Unsuitable: There is nothing to scale.
        ValueError: An option out of its range, or an unknown name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = GradInit(model, lr=0.1)
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> learner.step((x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])).number
        1
        >>> list(learner.finish())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
        *,
        optimizer: str = "sgd",
        lr: float | None = None,
        scale_lr: float = 1e-2,
        max_norm: float | None = None,
        min_scale: float = 0.01,
        min_bias_scale: float = 0.0,
        max_scale: float = math.inf,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_order: bool = False,
        normalize_grad: bool = True,
        shared_second_moment: bool = True,
        exclude: Iterable[str] = (),
        normalisers: tuple[type[nn.Module], ...] = (),
    ) -> None:
        known = ("sgd", "adam", "adamw")
        _require(optimizer in known, "optimizer", optimizer, "'sgd', 'adam' or 'adamw'")
        self._sgd = optimizer == "sgd"
        self.order = 2 if self._sgd else 1
        lr = (0.1 if self._sgd else 1e-3) if lr is None else lr
        max_norm = (1.0 if self._sgd else 1000.0) if max_norm is None else max_norm
        for name, rate in (("lr", lr), ("scale_lr", scale_lr)):
            _require(0 < rate < math.inf, name, rate, "a finite number above 0")
        for name, least in (("min_scale", min_scale), ("min_bias_scale", min_bias_scale)):
            _require(0 <= least <= 1, name, least, "a number from 0 to 1")
        _require(max_scale >= 1, "max_scale", max_scale, "a number of at least 1")
        _require(max_norm >= 0, "max_norm", max_norm, "a number of at least 0")
        _require(clip > 0, "clip", clip, "a number above 0")
        pair = len(betas) == 2 and all(0 <= one < 1 for one in betas)
        _require(pair, "betas", betas, "two numbers from 0 to below 1")
        _require(0 <= eps < math.inf, "eps", eps, "a finite number of at least 0")
        self.model, self.loss = model, loss
        self._lr, self._max_norm, self._clip = lr, max_norm, clip
        self._second_order, self._normalize_grad = second_order and self._sgd, normalize_grad
        self._normalisers = normalisers
        self._finished = self._checked = False
        self._options = {
            "optimizer": optimizer, "lr": lr, "scale_lr": scale_lr, "max_norm": max_norm,
            "min_scale": min_scale, "min_bias_scale": min_bias_scale, "max_scale": max_scale,
            "clip": clip, "betas": list(betas), "eps": eps, "second_order": second_order,
            "normalize_grad": normalize_grad, "shared_second_moment": shared_second_moment,
            "normalisers": [f"{kind.__module__}.{kind.__qualname__}" for kind in normalisers],
        }  # fmt: skip

        left_out = _excluded(model, exclude)
        self._trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        norms = {name: wide(one.detach()).norm().item() for name, one in self._trained.items()}
        self._norms = {n: norm for n, norm in norms.items() if norm > 0 and n not in left_out}
        if not self._norms:
            raise Unsuitable(
                "gradinit(model): expected parameters that train and are not zero, got "
                f"{type(model).__name__} without any; initialise it by a standard rule first"
            )
        like = wide(self._trained[next(iter(self._norms))].detach())
        least = [
            min_bias_scale if "bias" in name.rpartition(".")[2] else min_scale
            for name in self._norms
        ]
        self._adam = ScaleAdam(
            torch.tensor(least, dtype=like.dtype, device=like.device),
            max_scale,
            lr=scale_lr,
            betas=betas,
            eps=eps,
            shared_second_moment=shared_second_moment,
        )

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each parameter that has one."""
        return dict(zip(self._norms, self._adam.scales.tolist(), strict=True))

    @property
    def num_steps(self) -> int:
        """How many steps were taken."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, int]:
        """How many steps were taken for the objective and for the constraint."""
        return self._adam.counts

    @property
    def num_halves(self) -> int:
        """How many half-batches they took: three for the objective, two for the constraint."""
        return 3 * self.counts[0] + 2 * self.counts[1]

    def step(self, batch0: Half, batch1: Half, batch2: Half | Callable[[], Half]) -> Step:
        """Take one step, of the constraint where the gradient norm is above its bound.

        Args:
            batch0: A half-batch ``(inputs, targets)``, part of both S and S~. Inputs are what the
                model takes: a tensor, a tuple of arguments or a dictionary of named ones.
            batch1: The other half of S.
            batch2: The other half of S~, or a function that draws it, called only if needed.

        Returns:
            What was seen.

        Raises:
            ValueError: The loss or a derivative is not finite, the model cannot be differentiated
                twice, the halves do not fit together, or `finish` was called. The scales stay.
        """
        self._check_unfinished("step")
        with learning_mode(self.model, self._normalisers):
            tensors = self._scaled()
            loss, found = self._gradient(tensors, joined(batch0, batch1), create_graph=True)
            norm = total_norm(found, self.order)
            seen = (loss.item(), norm.item())
            _check_finite(*seen)
            kind: Kind = "constraint" if seen[1] > self._max_norm else "objective"
            if not self._checked and (kind == "constraint" or self._second_order):
                check_twice_differentiable(norm)
                self._checked = True
            if kind == "constraint":
                slopes = self._slopes(norm, tensors)
            else:
                moved = self._moved(tensors, found, norm)
                del loss, found, norm  # and with them the first graph, unless it is needed
                second = joined(batch0, batch2() if callable(batch2) else batch2)
                after = run_loss(self.model, moved, second, self.loss) / self._lr
                slopes = self._slopes(after, tensors if self._second_order else moved)
        _check_finite(float(slopes.abs().sum()))
        self._adam.step(slopes.clamp(-self._clip, self._clip), kind)
        return Step(self.num_steps, kind, *seen)

    def run(
        self,
        halves: Iterator[Half],
        num_steps: int,
        progress: Callable[[Step], object] | None = None,
    ) -> None:
        """Take steps until there are ``num_steps`` in all, those before a resumption included.

        Args:
            halves: Half-batches, drawn in order; see `halves_of`.
            num_steps: The number of steps, a whole one of at least 0.
            progress: Is given each step; it may raise to stop.

        Raises:
            ValueError: As for `step`, or the halves are used up.
        """
        whole = isinstance(num_steps, int) and num_steps >= 0
        _require(whole, "num_steps", num_steps, "a whole number of at least 0")

        def draw() -> Half:
            for half in halves:
                return half
            raise ValueError(
                f"GradInit.run(halves): expected halves for {num_steps} steps, got none after "
                f"{self.num_steps}; give a list or a loader, which can be gone through again"
            )

        while self.num_steps < num_steps:
            taken = self.step(draw(), draw(), draw)
            if progress is not None:
                progress(taken)

    def measure(self, batch: Half) -> tuple[float, float]:
        """Return loss and gradient norm of a batch at the scales as they are now."""
        self._check_unfinished("measure")
        with learning_mode(self.model, self._normalisers):
            loss, found = self._gradient(self._scaled(), batch)
            return loss.item(), total_norm(found, self.order).item()

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """Multiply the parameters by their scales, in place, and return the scales.

        Build the optimiser afterwards, or before: the parameters stay the same objects.
        """
        self._check_unfinished("finish")
        for scale, name in zip(self._adam.scales, self._norms, strict=True):
            self._trained[name].copy_(wide(self._trained[name]) * scale)
        self._finished = True
        return self.scales

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumption needs beside the model, which is as it was at the start."""
        return {
            "norms": dict(self._norms),
            "options": dict(self._options),
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` returned, for the same model with the same start, and with the
                same options; that the loss and the batches are the same is not seen.

        Raises:
            ValueError: It belongs to another model, to other weights or options, or is no state.
        """
        self._check_unfinished("load_state_dict")
        whole = self.state_dict()
        missing = [name for name in whole if name not in state]
        missing = missing or [name for name in whole["adam"] if name not in state["adam"]]
        if missing:
            raise ValueError(
                "GradInit.load_state_dict(state): expected what state_dict() returned, got no "
                f"{missing[0]!r} in it; begin anew"
            )
        norms, mine = state["norms"], self._norms
        same = list(norms) == list(mine) and all(
            # Another machine may round a norm otherwise.
            math.isclose(norms[name], norm, rel_tol=1e-4)
            for name, norm in mine.items()
        )
        if not same:
            raise ValueError(
                "GradInit.load_state_dict(state): expected the state of a GradInit of this model "
                "with the weights it has, got that of others; load the weights that it started "
                "from, first"
            )
        for name, value in self._options.items():
            if state["options"].get(name) != value:
                other = state["options"].get(name)
                raise ValueError(
                    "GradInit.load_state_dict(state): expected the state of a GradInit with the "
                    f"options of this one, {name}={value!r} among them, got one of {name}="
                    f"{other!r}; make this one with those"
                )
        self._adam.load_state_dict(state["adam"])

    def _scaled(self) -> dict[str, Tensor]:
        factors = dict(zip(self._norms, self._adam.scales.unbind(), strict=True))
        tensors = {name: wide(one.detach()) for name, one in self._trained.items()}
        scaled = {n: one * factors[n] if n in factors else one for n, one in tensors.items()}
        return {name: one.detach().requires_grad_() for name, one in scaled.items()}

    def _gradient(
        self, tensors: dict[str, Tensor], batch: Half, create_graph: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        loss = run_loss(self.model, tensors, batch, self.loss)
        return loss, gradients(loss, list(tensors.values()), create_graph=create_graph)

    def _moved(
        self, tensors: dict[str, Tensor], found: list[Tensor], norm: Tensor
    ) -> dict[str, Tensor]:
        """Return the tensors after the optimiser's first step."""
        if not self._second_order:
            found, norm = [one.detach() for one in found], norm.detach()
        if not self._sgd:
            found = [one.sign() for one in found]
        elif self._normalize_grad:
            tiny = torch.finfo(norm.dtype).tiny
            found = [one / norm.clamp_min(tiny) for one in found]
        pairs = zip(tensors.items(), found, strict=True)
        if self._second_order:
            return {name: one - self._lr * step for (name, one), step in pairs}
        return {name: (one.detach() - self._lr * s).requires_grad_() for (name, one), s in pairs}

    def _slopes(self, value: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Return the derivative by each scale: the product of gradient and unscaled tensor."""
        found = gradients(value, [tensors[name] for name in self._norms])
        starts = (wide(self._trained[name].detach()) for name in self._norms)
        return torch.stack([(g * w).sum() for g, w in zip(found, starts, strict=True)])

    def _check_unfinished(self, operation: str) -> None:
        if self._finished:
            raise ValueError(
                f"GradInit.{operation}(): expected scales that are still learnt, got those of a "
                "model that was finished; make a new GradInit"
            )


def _excluded(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the first names of the parameters that are named, or lie in modules that are."""
    first = {id(one): name for name, one in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    left_out = set()
    for name in [names] if isinstance(names, str) else names:
        found = [one for full, one in every.items() if f"{full}.".startswith(f"{name}.")]
        if not found:
            near = get_close_matches(name, [*every, *dict(model.named_modules())], 1, cutoff=0.0)
            raise ValueError(
                f"GradInit(exclude={name!r}): expected the name of a parameter or of a module with "
                f"parameters, got {name!r}; do you mean {near[0]!r}?"
            )
        left_out |= {first[id(one)] for one in found}
    return left_out


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(
            f"GradInit({name}={value!r}): expected {expected}, got {value!r}; give {expected}"
        )


def _check_finite(*values: float) -> None:
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise ValueError(
            f"GradInit.step(model): expected a finite loss and finite derivatives, got {wrong}; "
            "start from weights that keep activations finite, such as smaller ones, or lower lr"
        )

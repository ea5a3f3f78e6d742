r"""Batch normalisation preconditioning: BatchNorm's conditioning without a BatchNorm layer.

The network stays as it is; each layer's gradient is transformed by the mean :math:`\mu` and the
variance of the layer's *input*, as if the input had been normalised. The statistics may be running
averages, so a batch of one trains; evaluation uses none at all.

Source: S. Lange, K. Helfrich, Q. Ye, "Batch Normalization Preconditioning for Neural Network
Training", 2021, arXiv 2108.01110, JMLR 23(72):1-41, 2022.

Departs:
    - The running averages are those of the first two moments, so that the variance also holds what
      a batch of one cannot show, the spread between batches; the paper averages the variances
      inside the batches, which at batch one are zero (option ``statistics="batch"``).
    - A layer without bias cannot take up the shift: its gradient is divided by the second moments.
    - The paper does not say what happens to grouped convolutions (each group is a layer of its own
      here), nor to weight decay (the optimiser's acts on the weights, after the transform).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.optim.bare_network import take_out_batch_norms
from normlab.optim.input_moments import InputMoments, InputWatcher, group_layers
from normlab.optim.live import go_live, retire
from normlab.optim.preconditioner import Preconditioner, precondition_layer
from normlab.parameter_groups import check_held, check_no_growth

Statistics = Literal["moments", "batch"]

KEY = "bn_preconditioning"


class BatchNormPreconditioner:
    r"""Transforms the gradients of linear and convolutional layers before the optimiser's step.

    .. math::
        s^2 = \mathrm{var} + \epsilon_1 \max_j \mathrm{var}_j + \epsilon_2, \quad
        q^2 = \max(m / N, 1)

    with m the number of weights of an output unit and N the rows of the step's batch (samples,
    times output positions for a convolution), over all micro-batches and processes. Momentum, decay
    and schedule of the optimiser act on the transformed gradient. Optimisers such as Adam, which
    divide each entry by its own scale, undo most of it.

    The statistics stand in ``optimizer.param_groups[0]["bn_preconditioning"]``, so that
    ``optimizer.state_dict()`` holds them and the model's stays that of a plain network; those of a
    checkpoint may be loaded before or after the preconditioner is built. Under
    ``DistributedDataParallel`` gradients are averaged before the step, and one collective a step
    joins the statistics of all layers; sharded parameters are not supported. With a closure, or
    where a gradient scaler skips a step, the statistics of all passes since the last step count.
    A pass without backward counts in a compiled model only. Build the preconditioner before such a
    model is called for the first time: the compiler does not see what is attached later.

    Args:
        model: The model; layers that share a weight are treated as one.
        optimizer: The optimiser; layers whose parameters it does not hold are left alone.
        momentum: The weight of the newest batch in the running averages (1 - rho in the paper),
            above 0 and at most 1; 1 takes the batch's own statistics.
        relative_eps: epsilon_1, at least 0.
        eps: epsilon_2, at least 0.
        statistics: ``"moments"``: var is the running second moment minus the squared running mean.
            ``"batch"``: the running average of the variances in the batches, as in the paper.
        debias: Whether averages start at nothing and are divided by ``1 - rho^t``; otherwise they
            start at mean 0 and variance 1.
        small_batch_factor: Whether to divide by q^2; otherwise q = 1.
        process_group: The processes that share gradients; None for all of them.

    Attributes:
        layers: The layers treated, those that share parameters together.
        skipped: A sentence for each layer with weights that is left alone.
        preconditioners: The matrix of each entry of ``layers`` as last used; None before, or where
            the layer was not called.

    Raises:
        ValueError: A value out of its range, a second preconditioner on one optimiser, or an
            optimiser that holds no weight of the model's layers.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> preconditioner = BatchNormPreconditioner(model, optimizer)
        >>> model(torch.tensor([[1.0], [3.0]])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state_dict()["param_groups"][0]["bn_preconditioning"]["steps"]
        [1]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        momentum: float = 0.01,
        relative_eps: float = 1e-2,
        eps: float = 1e-4,
        statistics: Statistics = "moments",
        debias: bool = False,
        small_batch_factor: bool = True,
        process_group: Any = None,
    ) -> None:
        _require(0 < momentum <= 1, "momentum", momentum, "a number above 0 and at most 1")
        for name, value in (("relative_eps", relative_eps), ("eps", eps)):
            _require(0 <= value < math.inf, name, value, "a number of at least 0")
        known = statistics in ("moments", "batch")
        _require(known, "statistics", statistics, "'moments' or 'batch'")
        check_no_growth("BatchNormPreconditioner", optimizer)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.optimizer = optimizer
        self.momentum, self.relative_eps, self.eps = momentum, relative_eps, eps
        self.statistics: Statistics = statistics
        self.debias, self.small_batch_factor = debias, small_batch_factor
        self.layers, self.skipped = group_layers(model, held)
        if not self.layers:
            reasons = "; ".join(self.skipped) or "the model has no linear or convolutional layer"
            raise ValueError(
                "BatchNormPreconditioner(optimizer): expected an optimiser of the model's present "
                f"parameters, got one that holds no layer's weight ({reasons}); build it after "
                "all that changes the model"
            )
        self.preconditioners: list[Preconditioner | None] = [None] * len(self.layers)
        self._watcher = InputWatcher(self.layers, process_group)
        self._plan()
        self._edited = False
        self._noted: set[int] = set()
        self._checked: dict[str, Any] | None = None
        try:
            self._state()
            go_live(self, optimizer, KEY)
        except ValueError:
            self._watcher.remove()
            raise
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Stop; the model is left without a trace."""
        self._hook.remove()
        self._watcher.remove()
        retire(self.optimizer, KEY)

    @torch.no_grad()
    def precondition_(self) -> None:
        """Transform the gradients now, in place of before the next step.

        For what has to see transformed gradients before the step, such as clipping. Call it after
        the step's last backward pass: the step does not transform them again unless one follows.
        """
        self._edited = True
        moments = self._watcher.take()
        matrices = self._matrices(self._average(moments), moments.num_rows)
        for place, (layer, *_) in enumerate(self.layers):
            called = moments.called[place]
            self.preconditioners[place] = matrices[place] if called else None
            if layer.weight.grad is None:
                continue
            if called:
                precondition_layer(layer, matrices[place])
            elif place not in self._noted:
                self._noted.add(place)
                warnings.warn(
                    f"BatchNormPreconditioner: {layer} has a gradient but was not called in "
                    "training mode since the last step; its gradient is left as it is (with "
                    "torch.compile, build the preconditioner before the model's first call)",
                    stacklevel=2,
                )

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = named.get("closure") or next(iter(args[1:]), None)
        if closure is not None:
            # The gradients to be used are yet to be computed.
            return (*args[:1], self._editing(closure)), {}
        # What was edited by hand and not followed by another backward is not edited twice.
        if not (self._edited and self._watcher.empty):
            self.precondition_()
        self._edited = False
        return None

    def _editing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def edited() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.precondition_()
            self._edited = False
            return loss

        return edited

    def _average(self, moments: InputMoments) -> dict[str, Any]:
        """Move the running averages of the layers that were called, and return them."""
        state = self._state()
        batch = moments.square
        if self.statistics == "batch":
            batch = (batch - moments.mean.square()).clamp_min(0)
        weight: Tensor | float = self.momentum
        if not all(moments.called):
            called = batch.new_tensor(moments.called)
            weight = self.momentum * self._watcher.repeated(called)
        state["mean"].lerp_(moments.mean, weight)
        state["square"].lerp_(batch, weight)
        state["steps"] = [
            step + called for step, called in zip(state["steps"], moments.called, strict=True)
        ]
        return state

    def _matrices(self, state: dict[str, Any], num_rows: Tensor) -> list[Preconditioner]:
        """Return each layer's matrix; all layers are computed at once, in few small calls."""
        mean, square = state["mean"], state["square"]
        if self.debias:
            known = [1 - (1 - self.momentum) ** max(step, 1) for step in state["steps"]]
            each = self._watcher.repeated(mean.new_tensor(known))
            mean, square = mean / each, square / each
        centred = self._centred.to(mean)
        # A layer without bias takes the moment about zero.
        excess = centred if self.statistics == "moments" else centred - 1
        variance = torch.addcmul(square, excess, mean.square(), value=-1).clamp_min(0)
        segments = self._segments.to(mean.device)
        largest = variance.new_zeros(self._num_segments)
        largest.scatter_reduce_(0, segments, variance, "amax")
        square_scale = variance + self.relative_eps * largest[segments] + self.eps
        square_q = torch.ones_like(num_rows)
        if self.small_batch_factor:
            square_q = (self._fan_ins.to(num_rows) / num_rows).clamp_min(1)
        sizes = self._watcher.sizes
        parts = [
            values.to(self._kind).split(lengths)
            for values, lengths in (
                (mean * centred, sizes),
                (square_scale, sizes),
                (square_q, [1] * len(sizes)),
            )
        ]
        return [
            Preconditioner(*values, groups=groups)
            for *values, groups in zip(*parts, self._groups, strict=True)
        ]

    def _plan(self) -> None:
        """Note where each layer and each group of a convolution stands in the joint tensors."""
        layers = [layer for layer, *_ in self.layers]
        self._groups = [getattr(layer, "groups", 1) for layer in layers]
        self._fan_ins = torch.tensor([layer.weight[0].numel() for layer in layers])
        shifts = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
        self._centred = self._watcher.repeated(torch.tensor(shifts).double())
        sizes = [
            size // groups
            for size, groups in zip(self._watcher.sizes, self._groups, strict=True)
            for _ in range(groups)
        ]
        self._num_segments = len(sizes)
        self._segments = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self._kind = torch.float32
        if any(layer.weight.dtype == torch.float64 for layer in layers):
            self._kind = torch.float64

    def _initial_state(self) -> dict[str, Any]:
        device = self.layers[0][0].weight.device
        mean = torch.zeros(sum(self._watcher.sizes), dtype=torch.float64, device=device)
        square = torch.zeros_like(mean) if self.debias else torch.ones_like(mean)
        return {"mean": mean, "square": square, "steps": [0] * len(self.layers)}

    def _state(self) -> dict[str, Any]:
        """Return the statistics; loading a checkpoint replaces the optimiser's groups."""
        state = self.optimizer.param_groups[0].setdefault(KEY, {})
        if state is not self._checked:
            fresh = self._initial_state()
            if not state:
                state.update(fresh)
            for name in ("mean", "square"):
                _check_loaded(state[name], fresh[name])
                state[name] = state[name].to(fresh[name])
            self._checked = state
        return state


def _check_loaded(loaded: Tensor, wanted: Tensor) -> None:
    if loaded.shape != wanted.shape:
        raise ValueError(
            f"BatchNormPreconditioner(state_dict): expected statistics of {len(wanted)} features, "
            f"got {len(loaded)}; load a checkpoint of the same model"
        )
    if not torch.isfinite(loaded).all():
        raise ValueError(
            "BatchNormPreconditioner(state_dict): expected finite statistics, got some that are "
            "not; take a checkpoint from before the training diverged"
        )


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(
            f"BatchNormPreconditioner({name}={value!r}): expected {expected}, got {value!r}; give "
            f"{expected}"
        )


def prepare(model: nn.Module, setting: Setting) -> nn.Module:
    """Take BatchNorm out; the layers in front of it get biases that start at zero.

    Other normalisers stay: behind a weight layer they go well with preconditioning.

    Raises:
        Unsuitable: The model has no layer of which the gradient could be transformed.
    """
    if not group_layers(model, model.parameters())[0]:
        raise Unsuitable(
            "bn-preconditioning(model): expected nn.Linear or nn.Conv1d/2d/3d layers, got none in "
            f"{type(model).__name__}; write the model with these"
        )
    model, norms, biases = take_out_batch_norms(model, setting.batches[0][0])
    setting.say(f"{norms} BatchNorm layers were taken out, {biases} layers got a bias")
    return model


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    momentum: float = 0.01,
    relative_eps: float = 1e-2,
    eps: float = 1e-4,
    statistics: Statistics = "moments",
    debias: bool = False,
    small_batch_factor: bool = True,
) -> None:
    """Transform gradients before each step, and say which layers are skipped.

    Raises:
        ValueError: The optimiser was built before the model was prepared; or as for
            `BatchNormPreconditioner`.
    """
    check_held("bn-preconditioning", model.parameters(), optimizer)
    preconditioner = BatchNormPreconditioner(
        model,
        optimizer,
        momentum=momentum,
        relative_eps=relative_eps,
        eps=eps,
        statistics=statistics,
        debias=debias,
        small_batch_factor=small_batch_factor,
    )
    setting.say(f"the gradients of {len(preconditioner.layers)} layers are preconditioned")
    if setting.optimizer == "adamw":
        setting.say("Adam divides each entry by its own scale, which undoes most of it")
    for note in preconditioner.skipped:
        setting.say(f"not preconditioned: {note}")


CARD = Card(
    name="bn-preconditioning",
    title="Batch normalisation preconditioning",
    summary="Transforms each layer's gradient by the mean and variance of its input, as if the "
    "input were normalised; the network itself has no normaliser.",
    room="optim",
    source=Source(
        authors="S. Lange, K. Helfrich, Q. Ye",
        title="Batch Normalization Preconditioning for Neural Network Training",
        year=2021,
        arxiv="2108.01110",
        venue="JMLR 23(72):1-41, 2022",
    ),
    state=("running first and second moments of each layer's input, with the optimiser",),
    best_for="Small batches, down to one, and networks that must be served without a normaliser.",
    limits=(
        "Transposed convolutions, embeddings and attention's joint weights are left alone.",
        "Adam's division by each entry's scale undoes most of it.",
        "A penalty on the weights that stands in the loss is transformed, too; the optimiser's "
        "weight decay is not.",
    ),
    departures=(
        "Running first and second moments in place of averaged batch variances, which a batch of "
        "one leaves at zero (statistics=batch).",
        "Layers without bias are scaled by their second moments and not shifted.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, attach=attach)

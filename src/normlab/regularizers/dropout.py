r"""Dropout in front of weight layers, with what belongs to it: max-norm, Monte Carlo, Gaussian.

In training each unit is silenced at random for each sample, so that no unit can rely on another;
evaluation approximates the average of all the thinned networks.

Source: N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: A Simple
Way to Prevent Neural Networks from Overfitting", 2014, JMLR 15:1929-1958.

Departs:
    - p is the probability of *dropping* a unit, as in torch; the paper's p is that of keeping it.
    - What is kept is divided by 1 - p in training, and evaluation is the identity; the paper
      multiplies by the probability of keeping at test time. The expectation is the same.
    - The paper's 20 % on the inputs, dropout in front of convolutions and max-norm are options, off
      by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.surgery.flow import evaluating, trace_flow

Noise = Literal["bernoulli", "gaussian"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)


def gaussian_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    r"""Multiply each value by Gaussian noise that has the first two moments of dropout's mask.

    .. math::
        y = x \, \xi, \quad \xi \sim \mathcal N(1, p / (1 - p))

    Args:
        x: A tensor of any shape.
        p: The probability of dropping that the noise stands for, at least 0 and below 1.
        training: Whether to add noise; otherwise ``x`` is returned.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: ``p`` is out of its range.

    Example:
        >>> gaussian_dropout(torch.tensor([1.0, 2.0]), p=0.0)
        tensor([1., 2.])
    """
    _check_probability("gaussian_dropout", "p", p)
    if not training or p == 0:
        return x
    return x * (1 + math.sqrt(p / (1 - p)) * torch.randn_like(x))


class GaussianDropout(nn.Module):
    """Multiplicative Gaussian noise in training, the identity in evaluation.

    Args:
        p: The probability of dropping that the noise stands for, at least 0 and below 1.

    Shape:
        Input and output of any shape.

    Raises:
        ValueError: ``p`` is out of its range.

    Example:
        >>> GaussianDropout(0.5).eval()(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        _check_probability("GaussianDropout", "p", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with noise in training, ``x`` itself in evaluation."""
        return gaussian_dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"p={self.p}"


@torch.no_grad()
def project_max_norm_(target: nn.Module | Iterable[Tensor], max_norm: float) -> None:
    r"""Scale each output unit's incoming weights back to norm c where they exceed it, in place.

    .. math::
        w_i \leftarrow w_i \min(1, c / \lVert w_i \rVert_2)

    Args:
        target: A model, whose linear and convolutional layers' weights that train are projected;
            biases and weights of other layers (recurrent ones, attention, embeddings) are not. Or
            weights with the output units on their first axis; on one axis, each is a unit's own.
        max_norm: The largest norm c, above 0; the paper takes 3 to 4.

    Raises:
        ValueError: ``max_norm`` is not above 0.
        Unsuitable: The model has no linear or convolutional layer, or one whose weight is
            re-parametrised, so that it cannot be set.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> project_max_norm_([weight], 2.5)
        >>> weight
        tensor([[1.5000, 2.0000],
                [0.3000, 0.4000]])
    """
    _check_max_norm(max_norm)
    for weight in _weights_by_unit(target) if isinstance(target, nn.Module) else target:
        wide = torch.promote_types(weight.dtype, torch.float32)
        # One axis more, because over no axis at all torch takes the norm of everything.
        axes = list(range(1, weight.dim() + 1))
        units = weight.unsqueeze(-1)
        norms = torch.linalg.vector_norm(units, dim=axes, keepdim=True, dtype=wide).squeeze(-1)
        # A norm that was just set is off by rounding; leaving it keeps a second call from moving.
        slack = max(torch.finfo(weight.dtype).eps, 8 * torch.finfo(wide).eps)
        weight.mul_(torch.where(norms > max_norm * (1 + slack), max_norm / norms, 1.0))


def _weights_by_unit(model: nn.Module) -> list[Tensor]:
    """Return views of the weights that are projected, output units first; shared weights once."""
    views: list[Tensor] = []
    for weight, layer in _projected(model).items():
        if isinstance(layer, _TRANSPOSED):
            views += [part.transpose(0, 1) for part in weight.chunk(layer.groups)]
        else:
            views.append(weight)
    return views


def _projected(model: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """Return the weights that are projected, with a layer of each."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    if not layers:
        raise Unsuitable(
            "project_max_norm_(model): expected linear or convolutional layers, got "
            f"{type(model).__name__} without any; leave max_norm out"
        )
    found: dict[nn.Parameter, nn.Module] = {}
    for name, layer in layers:
        weight = layer._parameters.get("weight")
        if weight is None:
            raise Unsuitable(
                "project_max_norm_(model): expected weights that are parameters, got "
                f"{name or type(layer).__name__} with a re-parametrised one, which cannot be set; "
                "leave out max_norm or the re-parametrisation"
            )
        if weight.requires_grad:
            found[weight] = layer
    return found


@torch.no_grad()
def monte_carlo(
    model: nn.Module,
    inputs: Any,
    passes: int = 50,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the average output over passes with dropout on and all else in evaluation mode.

    Modes are restored afterwards, also where the model raises. Dropout that a model calls as a
    function follows its own rule and stays as it is in evaluation.

    Args:
        model: A model with dropout modules, torch's or `GaussianDropout`.
        inputs: What its forward takes.
        passes: The number k of passes, at least 1; about 50 match the plain evaluation.
        transform: Applied to each output before averaging, such as a softmax; None for nothing.

    Returns:
        The average of the outputs, without gradient.

    Raises:
        ValueError: The model has no dropout module, or ``passes`` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        >>> monte_carlo(model, torch.ones(3, 4), passes=10).shape
        torch.Size([3, 2])
    """
    noisy = [m for m in model.modules() if isinstance(m, (_DropoutNd, GaussianDropout))]
    if passes < 1 or not noisy:
        raise ValueError(
            f"monte_carlo(passes={passes}): expected at least one pass through a model with "
            f"dropout modules, got {passes} and {len(noisy)} modules; convert the model first"
        )
    with evaluating(model):
        for module in noisy:
            module.train()
        total: Tensor | None = None
        for _ in range(passes):
            output = model(inputs)
            output = output if transform is None else transform(output)
            total = output if total is None else total + output
    assert total is not None
    return total / passes


def _drop_input(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first, *rest = inputs or (named.pop("input"),)
    return (layer.get_submodule("input_dropout")(first), *rest), named


def drop_input_of_(layer: nn.Module, p: float, noise: Noise = "bernoulli") -> None:
    """Give a layer a child that drops, through which its input goes first.

    The layer keeps its place, its type and its keys in ``state_dict``, so that weights go back
    and forth between the models with and without dropout.

    Args:
        layer: The layer, changed in place.
        p: The probability of dropping.
        noise: ``"bernoulli"`` for ``nn.Dropout``, ``"gaussian"`` for `GaussianDropout`.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> drop_input_of_(layer, 0.5)
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """
    dropout = GaussianDropout(p) if noise == "gaussian" else nn.Dropout(p)
    layer.add_module("input_dropout", dropout.train(layer.training))
    layer.register_forward_pre_hook(_drop_input, with_kwargs=True)


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    p: float = 0.5,
    input_p: float = 0.0,
    conv_p: float = 0.0,
    noise: Noise = "bernoulli",
) -> nn.Module:
    """Put dropout in front of weight layers.

    The first weight layer that is called reads the raw input and takes ``input_p``; the other
    linear layers take ``p``, the other convolutions ``conv_p``. The paper's networks for SVHN and
    CIFAR have 0.1, 0.5 and 0.25. A layer behind a dropout module of the model's own keeps that one.
    Noise is drawn for each value, in maps, too; ``"gaussian"`` is that of `GaussianDropout`.
    """
    for name, rate in (("p", p), ("input_p", input_p), ("conv_p", conv_p)):
        _check_probability("dropout", name, rate)
    if noise not in get_args(Noise):
        raise ValueError(
            f"dropout(noise={noise!r}): expected 'bernoulli' or 'gaussian', got {noise!r}; use "
            "'bernoulli'"
        )
    flow = trace_flow(model, setting.batches[0][0][:2])
    weighted = (c.module for c in flow.calls if any(w.dim() > 1 for w in _own_parameters(c.module)))
    first = next(weighted, None)
    rates: dict[nn.Module, float] = {}
    kept: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS):
            continue
        linear = isinstance(module, nn.Linear)
        rate = input_p if module is first else p if linear else conv_p
        if isinstance(flow.predecessor(module), (_DropoutNd, GaussianDropout)):
            reason = "has its own dropout"
        elif not flow.of(module):
            reason = "is not called"
        elif rate > 0:
            rates[module] = rate
            continue
        else:
            reason = "has the rate 0"
        # Convolutions without dropout are the rule, and named only where it was asked for.
        if linear or rate > 0:
            kept.append(f"{name} {reason}")
    if not rates:
        raise Unsuitable(
            "dropout(model): expected a linear layer behind another layer, got none "
            f"({', '.join(kept) or 'there is no linear layer'}); set input_p for the first layer, "
            "or conv_p for convolutions"
        )
    for module, rate in rates.items():
        drop_input_of_(module, rate, noise)
    linear = sum(isinstance(module, nn.Linear) for module in rates)
    counts = [f"{linear} linear"] * (linear > 0)
    counts += [f"{len(rates) - linear} convolutional"] * (linear < len(rates))
    setting.say(f"dropout stands in front of {' and '.join(counts)} layers")
    if kept:
        setting.say(f"layers without new dropout: {', '.join(kept)}")
    return model


def _own_parameters(module: nn.Module) -> list[Tensor]:
    return list(module.parameters(recurse=False))


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    max_norm: float | None = None,
) -> None:
    """Project onto ``max_norm`` after each step, if it is given; see `project_max_norm_`."""
    if max_norm is None:
        return
    _check_max_norm(max_norm)
    projected = _projected(model)
    passed_over = [
        name
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight.requires_grad and weight not in projected
    ]
    if passed_over:
        setting.say(f"max_norm leaves these weights alone: {', '.join(passed_over)}")
    optimizer.register_step_post_hook(lambda *_: project_max_norm_(model, max_norm))


def _check_max_norm(max_norm: float) -> None:
    if not max_norm > 0:
        raise ValueError(
            f"project_max_norm_(max_norm={max_norm}): expected a number above 0, got {max_norm}; "
            "use 3 or 4"
        )


def _check_probability(operation: str, name: str, p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(
            f"{operation}({name}={p}): expected a probability of dropping, at least 0 and below 1, "
            f"got {p}; use 0.5, or 1 minus the probability of keeping"
        )


CARD = Card(
    name="dropout",
    title="Dropout",
    summary="Silences units in front of the linear layers, and of convolutions on demand, at "
    "random during training.",
    room="regularizers",
    source=Source(
        authors="N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov",
        title="Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        year=2014,
        venue="JMLR 15:1929-1958",
    ),
    batch_of_one="as the model",
    eval_differs=True,
    keeps_evaluation=True,
    stochastic=True,
    best_for="Dense layers and small data.",
    limits=(
        "A model without a linear layer behind another layer has a place for it only by input_p or "
        "conv_p.",
        "max_norm projects linear and convolutional weights only, and none that is re-parametrised "
        "(weight-norm, spectral-norm).",
        "Training takes longer; the paper goes with rates 10 to 100 times as high and max-norm.",
    ),
    departures=(
        "p is the probability of dropping, the paper's that of keeping.",
        "Values are scaled in training instead of at test time.",
        "Dropout on the input and in front of convolutions, and max-norm, are off unless asked "
        "for.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, attach=attach)

r"""Spectral normalisation: a weight divided by its largest singular value, or by the mean of two.

With :math:`M_1` the kernel as a matrix with output channels as rows, :math:`M_2` with input
channels as rows, and :math:`\sigma` the largest singular value,

.. math::
    \bar W = c \, W / \sigma(M_1), \qquad
    \bar W = c \, W / \tfrac12 (\sigma(M_1) + \sigma(M_2))

The first (c = 1: SN, else SSN) sets what the layer can do to its input at most; the second (BSN,
BSSN) balances that with what it can do to the gradient. Singular values are followed by power
iteration: one step in each training forward, from vectors that a checkpoint holds; gradients take
the vectors as constants.

Source: T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, "Spectral Normalization for Generative
Adversarial Networks", 2018, arXiv 1802.05957; Z. Lin, V. Sekar, G. Fanti, "Why Spectral
Normalization Stabilizes GANs: Analysis and Improvements", 2020, arXiv 2009.02773.

Departs:
    - No gradient flows through the power iteration; the second paper's public code lets it.
    - The iteration starts with 15 steps, as torch's does, and moves with each training forward (of
      attention, which reads its weight several times in one, with each reading);
      `frozen_power_iteration` keeps it still where a step runs a layer several times.
    - The one-sided form is ours, too, and not torch's, which turns zeros into NaN: see
      `normlab.weights.spectral_norm_parametrization`. The two agree where the iteration has
      converged.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.weights.chosen_sizes import report_lost_sizes
from normlab.weights.spectral_norm_parametrization import Sides as Sides
from normlab.weights.spectral_norm_parametrization import SpectralNorm as SpectralNorm
from normlab.weights.spectral_norm_parametrization import (
    frozen_power_iteration as frozen_power_iteration,
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Embedding)
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def spectral_norm(
    target: nn.Module,
    *,
    scale: float = 1.0,
    n_power_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]:
    """Divide the weights of a model by their largest singular value, times a scale.

    Left alone are the weights of recurrent layers and of modules of one's own.

    Args:
        target: A model, whose linear, convolutional, transposed convolutional, embedding and
            attention layers are parametrised in place, or one such layer.
        scale: The scale c of all layers, above 0 and finite.
        n_power_iterations: Steps in each training forward, at least 1.
        generator: For the first vectors; torch's own by default.

    Returns:
        The layers by name. ``parametrize.remove_parametrizations(layer, "weight")`` makes one plain
        again, with the weight that it computes with; of attention it is ``"in_proj_weight"``.

    Raises:
        Unsuitable: There is no such layer, or one whose weight has no values yet or is spectrally
            normalised already. The model is not changed then.
        ValueError: An argument is out of its range.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = spectral_norm(layer, scale=1.5)
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        1.5
    """
    return _register("spectral_norm", target, 1, scale, n_power_iterations, generator)


def bidirectional_spectral_norm(
    target: nn.Module,
    *,
    scale: float = 1.0,
    n_power_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]:
    """Divide the weights of a model by the mean of two largest singular values, times a scale.

    Args:
        target: As in `spectral_norm`.
        scale: As in `spectral_norm`; the paper tries 0.7 to 4.
        n_power_iterations: As in `spectral_norm`.
        generator: As in `spectral_norm`.

    Returns:
        As `spectral_norm`.

    Raises:
        Unsuitable: As in `spectral_norm`.
        ValueError: An argument is out of its range.
    """
    name = "bidirectional_spectral_norm"
    return _register(name, target, 2, scale, n_power_iterations, generator)


def _register(
    operation: str,
    target: nn.Module,
    sides: Sides,
    scale: float,
    n_power_iterations: int,
    generator: torch.Generator | None,
) -> dict[str, nn.Module]:
    places = [
        (name, layer, tensor)
        for name, layer in target.named_modules()
        for tensor in _weights_of(layer)
    ]
    if not places:
        raise Unsuitable(
            f"{operation}(model): expected linear, convolutional, embedding or attention layers, "
            f"got {type(target).__name__} without any; there is nothing to normalise"
        )
    parts = []
    for name, layer, tensor in places:
        _check(operation, f"{name}.{tensor}".lstrip("."), layer, tensor)
        part = SpectralNorm(
            getattr(layer, tensor).detach(),
            scale,
            sides=sides,
            output_axis=1 if isinstance(layer, _TRANSPOSED) else 0,
            n_power_iterations=n_power_iterations,
            generator=generator,
        )
        parts.append(part)
    for (_, layer, tensor), part in zip(places, parts, strict=True):
        parametrize.register_parametrization(layer, tensor, part)
    return {name: layer for name, layer, _ in places}


def _weights_of(layer: nn.Module) -> list[str]:
    """Return the names of a layer's weights that are normalised."""
    if isinstance(layer, _LAYERS):
        return ["weight"]
    if isinstance(layer, nn.MultiheadAttention):
        # One for queries, keys and values together, or three.
        return [name for name in _OF_ATTENTION if getattr(layer, name) is not None]
    return []


def _check(operation: str, label: str, layer: nn.Module, tensor: str) -> None:
    if _parts_of(layer, tensor):
        expected, got = "a weight that is not spectrally normalised", "one that is"
        advice = "take that off first, by torch.nn.utils.parametrize.remove_parametrizations"
    elif isinstance(weight := getattr(layer, tensor), UninitializedParameter):
        expected, got = "a weight with values", "a lazy one"
        advice = "run the model once before"
    elif weight.is_meta:
        expected, got = "a weight with values", "one on the meta device"
        advice = "give the model its values before"
    else:
        return
    raise Unsuitable(f"{operation}({label}): expected {expected}, got {got}; {advice}")


def _parts_of(layer: nn.Module, tensor: str) -> list[SpectralNorm]:
    if not parametrize.is_parametrized(layer, tensor):
        return []
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    return _parts_in(layer.parametrizations[tensor])


def _parts_in(chain: nn.Module) -> list[SpectralNorm]:
    return [part for part in chain.children() if isinstance(part, SpectralNorm)]


def _prepare(
    model: nn.Module, setting: Setting, sides: Sides, scale: float, name: str
) -> nn.Module:
    report_lost_sizes(model, setting)
    chosen = _register(name, model, sides, scale, 1, setting.generator)
    setting.say(f"the weights of {len(chosen)} layers are divided by their largest singular value")
    left = _other_matrices(model)
    if left:
        setting.say(f"{len(left)} other weights are left as they are, such as {left[0]}")
    return model


def _other_matrices(model: nn.Module) -> list[str]:
    """Return the names of parameters of several axes behind which no spectral norm stands."""
    normalised = {
        id(parameter)
        for chain in model.modules()
        if isinstance(chain, parametrize.ParametrizationList) and _parts_in(chain)
        for parameter in chain.parameters()
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in normalised
    ]


def prepare(model: nn.Module, setting: Setting, *, scale: float = 1.0) -> nn.Module:
    """Normalise the weights from one side; normalisers stay where they are."""
    return _prepare(model, setting, 1, scale, "spectral-norm")


def prepare_bidirectional(model: nn.Module, setting: Setting, *, scale: float = 1.0) -> nn.Module:
    """Normalise the weights from both sides; normalisers stay where they are."""
    return _prepare(model, setting, 2, scale, "bidirectional-spectral-norm")


_STATE = ("one pair of singular vectors for each matrix",)
_LIMITS = (
    "It leaves the model's normalisers where they are: in front of one it does nothing.",
    "The singular value is that of the kernel as a matrix, not of the convolution: no exact bound.",
    "Behind fixup it undoes the sizes that Fixup chose: the network hardly learns.",
    "Weights of recurrent layers, and parameters of modules of one's own, are left alone.",
)

CARD = Card(
    name="spectral-norm",
    title="Spectral normalisation",
    summary="Divides each layer's weight by its largest singular value, times a scale.",
    room="weights",
    source=Source(
        authors="T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida",
        title="Spectral Normalization for Generative Adversarial Networks",
        year=2018,
        arxiv="1802.05957",
        venue="ICLR 2018",
    ),
    batch_of_one="as the model",
    state=_STATE,
    best_for="Discriminators and critics, and networks whose gain must not exceed a set value.",
    limits=_LIMITS,
    departures=("A weight of zeros stays zero and trains; torch's own form gives NaN.",),
)

METHOD = Method(card=CARD, prepare=prepare)

BIDIRECTIONAL_CARD = Card(
    name="bidirectional-spectral-norm",
    title="Bidirectional scaled spectral normalisation",
    summary="Divides each layer's weight by the mean of the largest singular values that its "
    "kernel has forwards and backwards, times a scale.",
    room="weights",
    source=Source(
        authors="Z. Lin, V. Sekar, G. Fanti",
        title="Why Spectral Normalization Stabilizes GANs: Analysis and Improvements",
        year=2020,
        arxiv="2009.02773",
        venue="NeurIPS 2021",
    ),
    batch_of_one="as the model",
    state=_STATE,
    best_for="Discriminators of convolutions, whose gradients shall neither explode nor vanish.",
    limits=_LIMITS,
    departures=(
        "No gradient flows through the power iteration, as in the first paper.",
        "The vectors move with each training forward, not with each step of the discriminator "
        "(see frozen_power_iteration).",
    ),
)

BIDIRECTIONAL = Method(card=BIDIRECTIONAL_CARD, prepare=prepare_bidirectional)

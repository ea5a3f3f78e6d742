r"""Carry the mean and variance of a normaliser's channels through the layers behind it.

What a layer makes of random features, without any data: `propagate` returns the moments that
the next normaliser will meet. `normlab.norms.batch_kalman_norm` predicts with it.

Source: the public code of G. Wang, J. Peng, P. Luo, X. Wang, L. Lin, "Kalman Normalization:
Normalizing Internal Representations Across Network Layers", 2018, arXiv 1802.03133.

Departs:
    - The code draws one random feature map; here the moments are computed
      (``propagation="analytic"``), and ``"sample"`` draws as the code does. Where a map has one
      position at the end, 256 maps are drawn in place of one, whose variance would be 0.
    - Every position counts as an interior one: the zeros of padding, which lower the moments near
      the borders, are seen by ``"sample"`` only.
    - Values are independent over channels and positions, also those that layers without a
      normaliser between them share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normlab.moments import wide
from normlab.norms.kalman_filter import Posterior

AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_LIKE_THEIR_INPUT = (nn.Identity, nn.Flatten)
_SAMPLES = 256
_TINY = 1e-12


def propagate(
    prior: Posterior,
    layers: Sequence[nn.Module],
    *,
    propagation: Literal["analytic", "sample"] = "analytic",
    space: Sequence[int] = (),
) -> Posterior:
    r"""Return the moments of the features that ``layers`` make of independent normal ones.

    For ReLU, with :math:`\alpha = \mu / \sigma` and :math:`\Phi, \varphi` at alpha,

    .. math::
        E = \mu \Phi + \sigma \varphi, \quad
        V = \sigma^2 \left(\Phi + \alpha^2 \Phi (1 - \Phi) + \alpha \varphi (1 - 2 \Phi)
        - \varphi^2\right)

    and for weights W with bias b :math:`\mu = b + \sum W E, \; v = \sum W^2 V`. The largest of k
    values in a pool is taken before the ReLU in front of it, with which it commutes.

    Args:
        prior: Means and variances of the features in front, those of a full covariance included.
        layers: Convolutions (transposed ones excepted), linear layers, ReLUs, pools of fixed
            windows, dropout, nn.Flatten and nn.Identity, in the order of the data path.
        propagation: ``"analytic"``, or ``"sample"`` for the moments of what the layers make of one
            random map.
        space: The spatial size of that map; unused by ``"analytic"``.

    Returns:
        Means and variances, of the kind of ``prior`` and in the graph of it and of the weights.

    Raises:
        ValueError: A layer of another kind, weights for another number of channels, or an unknown
            ``propagation``.

    Example:
        >>> prior = Posterior(torch.zeros(1), torch.ones(1))
        >>> [value.item() for value in propagate(prior, [nn.ReLU()])]  # doctest: +ELLIPSIS
        [0.39894..., 0.34084...]
    """
    check_propagation("propagate", propagation)
    for layer in layers:
        if not can_propagate(layer):
            raise ValueError(
                "propagate(layers): expected convolutions, linear layers, ReLUs, pools of fixed "
                f"windows, dropout or nn.Flatten, got {type(layer).__name__}; start from the "
                "normaliser behind it"
            )
    moments = Posterior(prior.mean, prior.variance)
    # The statistics are kept wide also where the data path is autocast.
    with torch.autocast(prior.mean.device.type, enabled=False):
        if propagation == "sample":
            return _sampled(moments, layers, space)
        for layer in _maximum_first(layers):
            moments = _carried(moments, layer)
    return moments


def check_propagation(operation: str, propagation: str) -> None:
    """Refuse an unknown kind of propagation with a ValueError in the name of ``operation``."""
    if propagation not in ("analytic", "sample"):
        raise ValueError(
            f"{operation}(propagation={propagation!r}): expected 'analytic' or 'sample', got "
            f"{propagation!r}; use 'analytic'"
        )


def can_propagate(layer: nn.Module) -> bool:
    """Whether `propagate` knows what a layer does to moments."""
    if isinstance(layer, _ConvTransposeNd):
        return False
    if isinstance(layer, nn.Sequential):
        return len(layer) == 0
    if isinstance(layer, MAX_POOLS):
        # Known before a graph is compiled, which then need not integrate.
        _maximum_of_normals(_window(layer))
    kinds = (*AVERAGE_POOLS, *MAX_POOLS, *_DROPOUTS, *_LIKE_THEIR_INPUT)
    return isinstance(layer, (_ConvNd, nn.Linear, nn.ReLU, *kinds))


def _carried(moments: Posterior, layer: nn.Module) -> Posterior:
    mean, variance = moments
    if isinstance(layer, nn.ReLU):
        return _rectified(mean, variance)
    if isinstance(layer, _DROPOUTS):
        kept = 1 - layer.p if layer.training else 1.0
        # With nothing kept the features are 0.
        squares = (variance + mean.square()) / kept if kept else torch.zeros_like(mean)
        mean = mean if kept else torch.zeros_like(mean)
        return Posterior(mean, squares - mean.square())
    if isinstance(layer, AVERAGE_POOLS):
        return Posterior(mean, variance / _window(layer))
    if isinstance(layer, MAX_POOLS):
        shift, factor = _maximum_of_normals(_window(layer))
        return Posterior(mean + shift * _deviation(variance), variance * factor)
    if isinstance(layer, (_ConvNd, nn.Linear)):
        return _weighted(mean, variance, layer)
    return moments


def _rectified(mean: Tensor, variance: Tensor) -> Posterior:
    deviation = _deviation(variance)
    alpha = mean / deviation
    # With both tails at hand nothing cancels where the mean is many deviations from 0.
    above, below = torch.special.ndtr(alpha), torch.special.ndtr(-alpha)
    density = torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    rest = alpha * (alpha * above * below + density * (below - above)) - density.square()
    rectified = deviation.square() * (above + rest)
    return Posterior(mean * above + deviation * density, rectified.clamp_min(0))


def _deviation(variance: Tensor) -> Tensor:
    # A channel whose scale starts at 0 has variance 0, where the root has no finite gradient.
    return variance.clamp_min(_TINY).sqrt()


def _weighted(mean: Tensor, variance: Tensor, layer: nn.Module) -> Posterior:
    assert isinstance(layer, (_ConvNd, nn.Linear))
    weight = wide(layer.weight)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    fan_in = weight.shape[1] * groups
    channels = len(mean)
    # A linear layer may have several inputs, the positions, for each channel of a flattened map.
    fits = fan_in % channels == 0 if isinstance(layer, nn.Linear) else fan_in == channels
    if not fits:
        raise ValueError(
            f"propagate(layers): expected a {type(layer).__name__} for {channels} channels, got "
            f"{fan_in}; give the layers between two normalisers in the order of the data path"
        )
    # (groups, outputs of a group, channels of a group, positions)
    weight = weight.reshape(groups, weight.shape[0] // groups, channels // groups, -1)
    mean, variance = mean.view(groups, -1, 1), variance.view(groups, -1, 1)
    new_mean = (weight.sum(-1) @ mean).flatten()
    new_variance = (weight.square().sum(-1) @ variance).flatten()
    if layer.bias is not None:
        new_mean = new_mean + layer.bias
    return Posterior(new_mean, new_variance)


def _maximum_first(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Put each max pool in front of the ReLUs before it, where its input is still normal."""
    ordered: list[nn.Module] = []
    for layer in layers:
        place = len(ordered)
        while isinstance(layer, MAX_POOLS) and place and isinstance(ordered[place - 1], nn.ReLU):
            place -= 1
        ordered.insert(place, layer)
    return ordered


def _window(pool: nn.Module) -> int:
    kernel: Any = pool.kernel_size
    axes = int(type(pool).__name__[-2])
    return kernel**axes if isinstance(kernel, int) else math.prod(kernel)


_MAXIMA: dict[int, tuple[float, float]] = {}


def _maximum_of_normals(count: int) -> tuple[float, float]:
    """Return mean and variance of the largest of ``count`` standard normal values."""
    if count in _MAXIMA:
        return _MAXIMA[count]
    points = [-9 + 18 * i / 2000 for i in range(2001)]
    density = [
        count * math.exp(-x * x / 2) * (0.5 * math.erfc(-x / math.sqrt(2))) ** (count - 1)
        for x in points
    ]
    total = sum(density)
    mean = sum(x * p for x, p in zip(points, density, strict=True)) / total
    square = sum(x * x * p for x, p in zip(points, density, strict=True)) / total
    return _MAXIMA.setdefault(count, (mean, square - mean * mean))


def _sampled(moments: Posterior, layers: Sequence[nn.Module], space: Sequence[int]) -> Posterior:
    mean, deviation = moments.mean, _deviation(moments.variance)
    maps = mean
    for samples in (1, _SAMPLES):
        shape = (1, -1, *(1,) * len(space))
        noise = torch.randn(samples, len(mean), *space, dtype=mean.dtype, device=mean.device)
        maps = mean.view(shape) + deviation.view(shape) * noise
        for layer in layers:
            if isinstance(layer, (_ConvNd, nn.Linear)):
                maps = maps.to(layer.weight.dtype)
            # Past the hooks, which expect data.
            maps = layer.forward(maps)
        if maps[0, 0].numel() > 1:
            break
    axes = [axis for axis in range(maps.dim()) if axis != 1]
    variance, mean = torch.var_mean(wide(maps), dim=axes, correction=0)
    return Posterior(mean, variance)

"""What batch layer normalisation is made of: weights, moments, their blend, and their averages.

The layer is `normlab.norms.batch_layer_norm`; here stand the plain functions under it. Activations
are ``(N, C, *)``. *Batch* moments are taken over the samples, one for each channel and position;
*layer* moments over the channels, one for each sample and position. All are biased.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normlab.moments import check_channels, per_channel, sum_over_processes, wide

Weighting = Literal["convex", "reference"]
Spatial = Literal["position", "pooled"]


class Population(NamedTuple):
    """Which moments of evaluation are population values; the others come from the input.

    Example:
        >>> Population.read("TTFF")
        Population(batch_mean=True, batch_variance=True, layer_mean=False, layer_variance=False)
    """

    batch_mean: bool = True
    batch_variance: bool = True
    layer_mean: bool = False
    layer_variance: bool = False

    @classmethod
    def read(cls, letters: str) -> Population:
        """Return the switches that four letters ``T`` or ``F`` name, in the order of the fields.

        Raises:
            ValueError: Other text.
        """
        if len(letters) != 4 or set(letters) - set("TF"):
            raise ValueError(
                f"batch-layer-norm(population={letters!r}): expected four letters T or F (batch "
                f"mean, batch variance, layer mean, layer variance), got {letters!r}; use 'TTFF'"
            )
        return cls(*(letter == "T" for letter in letters))


class FourMoments(NamedTuple):
    """Means and variances of the batch ``(1, C, *)`` and of the layer ``(N, 1, *)``."""

    batch_mean: Tensor
    batch_variance: Tensor
    layer_mean: Tensor
    layer_variance: Tensor


class BatchSummary(NamedTuple):
    """What one training batch adds to the averages.

    Attributes:
        batch: Mean and variance of the batch ``(2, C, *)``.
        layer: Mean and variance of the layer ``(2, slots, *)``: one slot for each sample, or a
            single one with their average.
        num_samples: How many samples there are, over all processes.
        num_values: How many values stand behind each batch moment, over all processes.
    """

    batch: Tensor
    layer: Tensor
    num_samples: int | Tensor
    num_values: int | Tensor


class Averages(NamedTuple):
    """Averages of the moments over the batches of an epoch, kept in a layer's buffers.

    Attributes:
        batch: Of mean and variance of the batch ``(2, C, *)``.
        layer: Of mean and variance of the layer ``(2, slots, *)``.
        counts: How many batches there were, then how many values stand behind each slot. The first
            slot has its share in every batch, so its number holds for ``batch`` as well.
    """

    batch: Tensor
    layer: Tensor
    counts: Tensor

    def add(self, summary: BatchSummary) -> None:
        """Add a batch, with the weight of its number of values."""
        slots, room = summary.layer.shape[1], self.layer.shape[1]
        if slots > room:
            raise ValueError(
                f"BatchLayerNorm(input): expected at most nominal_batch_size={room} samples under "
                f"weighting='reference', got {slots}; raise it, or take weighting='convex'"
            )
        self.counts[0] += 1
        counts = self.counts[1 : 1 + slots]
        counts += summary.num_values
        # Averages instead of sums, which half precision would soon stop counting.
        kind = self.batch.dtype
        share = (summary.num_values / counts.to(wide(self.batch).dtype)).to(kind)
        self.batch.lerp_(summary.batch.to(kind), share[0])
        share = share.reshape(-1, *(1,) * (self.layer.dim() - 2))
        self.layer[:, :slots].lerp_(summary.layer.to(kind), share)

    def take(self, other: Averages, condition: Tensor | bool = True) -> None:
        """Take over another's averages, and empty it, where ``condition`` holds."""
        where = torch.as_tensor(condition, device=self.counts.device)
        for mine, its in zip(self, other, strict=True):
            mine.copy_(torch.where(where, its, mine))
            its.masked_fill_(where, 0)

    def check(self, asked: Population, *, unbiased: bool, by_slot: bool, strict: bool) -> None:
        """Refuse with a ValueError moments that are asked for but not there; see `moments`."""
        batches, *values = self.counts.tolist()
        if batches == 0 and strict:
            raise ValueError(
                "BatchLayerNorm(input): expected a finalised population in evaluation, got an "
                "epoch not ended or no training at all; train within population_epoch(model), "
                "call finalize_population(), or set epoch_steps"
            )
        corrected = asked.batch_variance or (asked.layer_variance and by_slot)
        if batches > 0 and unbiased and corrected and values[0] == batches:
            raise ValueError(
                "BatchLayerNorm(input): expected batches of more than one value per moment behind "
                f"a population variance, got {batches} of a single one; set unbiased=False, or "
                "switch the population variance off"
            )
        if batches > 0 and (asked.layer_mean or asked.layer_variance) and min(values) == 0:
            raise ValueError(
                f"BatchLayerNorm(input): expected training batches of {len(values)} samples for "
                f"the layer's population values under weighting='reference', got at most "
                f"{sum(value > 0 for value in values)}; train with whole batches"
            )

    def moments(self, *, unbiased: bool, by_slot: bool, strict: bool) -> FourMoments:
        """Return means and variances, of the batch ``(C, *)`` and of the layer ``(slots, *)``.

        Args:
            unbiased: Whether the batch's variance is divided by its values less the batches.
            by_slot: Whether the layer's moments are kept for each place in the batch; its variance
                is then corrected as well.
            strict: Whether averages of no batch are NaN.
        """
        batch, layer = wide(self.batch), wide(self.layer)
        batches, values = self.counts[0].to(batch.dtype), self.counts[1:].to(batch.dtype)
        if strict:
            # A compiled graph cannot raise: there 0 / 0 makes NaN of what was never finalised.
            batch = batch * (values[0] / values[0])
            layer = layer * (values / values).reshape(-1, *(1,) * (layer.dim() - 2))
        factor = torch.where(batches > 0, values[0] / (values[0] - batches), 1.0)
        return FourMoments(
            batch[0],
            batch[1] * factor if unbiased else batch[1],
            layer[0],
            layer[1] * factor if unbiased and by_slot else layer[1],
        )


def batch_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weights: tuple[float, float] | None = None,
    spatial: Spatial = "position",
    eps: float = 1e-3,
    scale_by_dim: bool = True,
) -> Tensor:
    r"""Blend the normalisations over samples and over channels, as in training.

    .. math::
        y = \frac{\gamma}{\sqrt{C}} \left( w_f \frac{x - m_f}{\sqrt{v_f + \epsilon}}
            + w_b \frac{x - m_b}{\sqrt{v_b + \epsilon}} \right) + \beta

    with m_b, v_b over the samples, for each channel and position, and m_f, v_f over the channels,
    for each sample and position.

    Args:
        x: Activations ``(N, C, *)``.
        weight: The scale gamma ``(C,)``; None for 1.
        bias: The shift beta ``(C,)``; None for 0.
        weights: ``(w_f, w_b)``; None for those of a batch of N, see `blend_weights`.
        spatial: ``"pooled"`` takes m_b and v_b over the positions as well.
        eps: Added to the variances.
        scale_by_dim: Whether to divide by the root of C.

    Returns:
        A tensor of the shape and dtype of ``x``; the moments are taken in float32 if ``x`` has a
        half precision.

    Example:
        >>> batch_layer_norm(torch.tensor([[1.0, 3.0], [5.0, 11.0]])).tolist()
        [[-0.7068..., -0.0003...], [0.0001..., 0.7070...]]
    """
    moments, _ = training_moments(wide(x), spatial)
    return blend(x, moments, weights or blend_weights(x.shape[0]), weight, bias, eps, scale_by_dim)


def blend_weights(
    batch_size: float | Tensor, zeta: float = 1e-4, weighting: Weighting = "convex"
) -> tuple[float | Tensor, float | Tensor]:
    r"""Return the weights of the layer's and of the batch's normalisation for a batch size B.

    .. math::
        w_f = 1/B - \zeta, \quad w_b = 1 - w_f

    Args:
        batch_size: The batch size B, at least 1.
        zeta: The constant :math:`\zeta`.
        weighting: ``"reference"`` is the public code's :math:`w_b = 1 - (1/B + \zeta)`.

    Returns:
        ``(w_f, w_b)``, with sum 1 (``"reference"``: ``1 - 2 zeta``).

    Example:
        >>> blend_weights(2)
        (0.4999, 0.5001)
    """
    layer = 1 / batch_size - zeta
    return layer, 1 - (1 / batch_size + zeta) if weighting == "reference" else 1 - layer


def layer_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the channels ``(N, 1, *)``."""
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    return mean, variance


def batch_moments_of(x: Tensor, spatial: Spatial) -> tuple[Tensor, Tensor]:
    """Return mean and variance over samples, and over space if ``"pooled"``: ``(1, C, *)``."""
    variance, mean = torch.var_mean(x, _axes(x, spatial), correction=0, keepdim=True)
    return mean, variance


def evaluation_moments(
    x: Tensor, spatial: Spatial, asked: Population, population: FourMoments | None
) -> FourMoments:
    """Return population values where ``asked`` says so, and the input's own moments elsewhere.

    Args:
        x: Activations ``(N, C, *)``, not in half precision.
        spatial: Where the batch's moments are taken.
        asked: The choice for each moment.
        population: As `Averages.moments` returns them; None where none is asked for.

    Raises:
        ValueError: The layer's values are kept for a batch of another size.
    """
    slots = 1 if population is None else len(population.layer_mean)
    if any(asked[2:]) and slots not in (1, len(x)):
        raise ValueError(
            f"BatchLayerNorm(input): expected {slots} samples for population values of the layer "
            f"under weighting='reference', got {len(x)}; switch layer_mean and layer_variance off, "
            "or take weighting='convex'"
        )
    chosen: dict[str, Tensor] = {}
    if not all(asked[:2]):
        chosen |= zip(FourMoments._fields[:2], batch_moments_of(x, spatial), strict=True)
    if not all(asked[2:]):
        chosen |= zip(FourMoments._fields[2:], layer_moments(x), strict=True)
    for place, value in enumerate(population or ()):
        if asked[place]:
            value = value.unsqueeze(0 if place < 2 else 1)
            value = value.reshape(*value.shape, *(1,) * (x.dim() - value.dim()))
            chosen[FourMoments._fields[place]] = value
    return FourMoments(**chosen)


def training_moments(
    x: Tensor, spatial: Spatial, *, by_slot: bool = False, group: object = None
) -> tuple[FourMoments, BatchSummary]:
    """Return the moments of a training batch, and what it adds to the averages.

    Across processes each one contributes sums in float64, in one collective; the gradient flows
    back through the same sums, in one more.

    Args:
        x: Activations ``(N, C, *)``, not in half precision.
        spatial: Whether batch moments are taken at each position or over all.
        by_slot: Whether the summary keeps the layer's moments of each sample apart.
        group: A process group of several, or None for this process alone.

    Returns:
        The moments and the summary, which has no gradient.
    """
    if by_slot and group is not None:
        raise ValueError(
            "BatchLayerNorm(input): expected one process under weighting='reference', which "
            "averages by the place in the batch, got several; take weighting='convex'"
        )
    layer = layer_moments(x)
    axes = _axes(x, spatial)
    num_samples, num_values = x.shape[0], x.numel() // x.shape[1]
    if spatial == "position":
        num_values = num_samples
    both = torch.stack([moment.detach() for moment in layer])
    if group is None:
        batch = batch_moments_of(x, spatial)
        # Without slots the channel axis, of length 1, serves as the single one.
        averages = both.squeeze(2) if by_slot else both.mean([axis + 1 for axis in axes])
        if by_slot and spatial == "pooled":
            averages = averages.reshape(2, num_samples, -1).mean(2)
    else:
        exact = x.double()
        sizes = exact.new_tensor([num_samples, num_values])
        layer_sums = both.double().sum([axis + 1 for axis in axes])
        sums = [exact.sum(axes), exact.square().sum(axes), layer_sums]
        joined = sum_over_processes(torch.cat([*(one.flatten() for one in sums), sizes]), group)
        *parts, sizes = joined.split([*(one.numel() for one in sums), 2])
        num_samples, num_values = sizes.detach().unbind()
        mean, square, averages = (
            part.reshape(one.shape) / num_values for part, one in zip(parts, sums, strict=True)
        )
        variance = (square - mean.square()).clamp_min(0)
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        batch = mean.to(x.dtype).reshape(shape), variance.to(x.dtype).reshape(shape)
        averages, num_values = averages.detach(), num_values.long()
    kept = torch.stack([moment.detach()[0] for moment in batch])
    if spatial == "pooled":
        kept = kept.reshape(2, -1)
    return FourMoments(*batch, *layer), BatchSummary(kept, averages, num_samples, num_values)


def blend(
    x: Tensor,
    moments: FourMoments,
    weights: tuple[float | Tensor, float | Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale_by_dim: bool,
) -> Tensor:
    """Normalise with both pairs of moments, add the two up by their weights, scale and shift.

    The arguments are those of `batch_layer_norm`, with moments that broadcast against ``x``.
    """
    full = wide(x)
    of_layer = weights[0] * torch.rsqrt(moments.layer_variance + eps)
    of_batch = weights[1] * torch.rsqrt(moments.batch_variance + eps)
    y = (full - moments.layer_mean) * of_layer + (full - moments.batch_mean) * of_batch
    factor = 1 / math.sqrt(x.shape[1]) if scale_by_dim else 1.0
    y = y * factor if weight is None else y * per_channel(wide(weight) * factor, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    return y.to(x.dtype)


def channels_second(
    input: Tensor, num_features: int, feature_dim: int, positions: tuple[int, ...] | None
) -> Tensor:
    """Return a layer's input with channels on axis 1; ValueError where it does not fit.

    Args:
        input: The input ``(N, C, *)``, or ``(N, *, C)``.
        num_features: The number of channels expected.
        feature_dim: Where they are, 1 or -1.
        positions: The sizes of the other axes; None for any.
    """
    x = input
    if feature_dim == -1 and input.dim() > 1:
        if input.shape[-1] != num_features:
            raise ValueError(
                f"BatchLayerNorm(input): expected shape (N, *, {num_features}), got "
                f"{tuple(input.shape)}; set num_features to the size of the last axis"
            )
        x = input.movedim(-1, 1)
    check_channels("BatchLayerNorm", x, num_features)
    if positions is not None and x.shape[2:] != positions:
        raise ValueError(
            f"BatchLayerNorm(input): expected positions of shape {positions}, got input "
            f"{tuple(input.shape)}; set spatial_shape={tuple(x.shape[2:])}, or spatial='pooled' "
            "where sizes vary"
        )
    return x


def expect(name: str, value: object, holds: bool, wanted: str) -> None:
    """Refuse a constructor's argument that is not what was ``wanted``."""
    if not holds:
        raise ValueError(
            f"BatchLayerNorm({name}={value!r}): expected {wanted}, got {value!r}; change {name}"
        )


def expect_word(name: str, value: str, words: tuple[str, str]) -> None:
    """Refuse a constructor's argument that is none of ``words``, and name the nearest."""
    if value not in words:
        near = get_close_matches(str(value), words, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"BatchLayerNorm({name}={value!r}): expected {words[0]!r} or {words[1]!r}, got "
            f"{value!r}; do you mean {near!r}?"
        )


def _axes(x: Tensor, spatial: Spatial) -> list[int]:
    return [0] if spatial == "position" else [axis for axis in range(x.dim()) if axis != 1]

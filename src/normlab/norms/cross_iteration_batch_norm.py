r"""Cross-iteration batch normalisation: statistics of small batches, pooled over the last steps.

A batch of few samples has noisy statistics. Those of the last iterations would help, had the
weights not changed since then; each layer's own moments are therefore carried over to its present
weight to first order before they are pooled. The layer must know its weight, so that one module
holds both: the convolution or linear layer, and the normaliser.

Source: Z. Yao, Y. Cao, S. Zheng, G. Huang, S. Lin, "Cross-Iteration Batch Normalization", 2020,
arXiv 2002.05712.

Departs:
    - Past terms keep their variance in place of the mean square, which is the same in exact
      arithmetic and keeps its digits where a channel's mean is large.
    - The inner product of a slope with the weight of its time is kept in place of that weight,
      and the slope of the mean once a group, because it is the same for all its channels: one
      tensor of the weight's size an iteration instead of three.
    - Past terms lie in a ring, the newest taking the place of the oldest; they are kept in
      buffers, so that a checkpoint holds them. The public code keeps lists that it does not save.
    - An invalid past term counts with a variance of zero, as in the paper (``invalid="clamp"``);
      public code leaves it out (``"drop"``).
    - The output is divided by ``sqrt(var + eps)``, with the biased variance in burn-in, too; the
      public default is ``sqrt(var) + eps``. The scale starts at 1.
    - ``burn_in`` counts iterations. Only forward passes with gradients count; in public code all
      passes in training mode do.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.moments import (
    Moments,
    batch_moments,
    check_count,
    group_of_several,
    per_channel,
    wide,
)
from normlab.norms.batch_norm import SynchronizedBatchNorm, synchronize
from normlab.norms.cross_iteration_pairs import pair_with_weight_layers
from normlab.norms.cross_iteration_window import (
    CrossIterationWindow,
    WeightLayer,
    check_input,
    check_layer,
    groups_of,
    is_weight_layer,
    moments_and_slopes,
    track,
)
from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import BATCH_NORMS, batch_norms, swap


def cross_iteration_batch_norm(
    x: Tensor,
    past: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    used: Tensor | None = None,
    invalid: Literal["clamp", "drop"] = "clamp",
    moments: Moments | None = None,
) -> Tensor:
    r"""Standardise each channel with the moments of this batch and of past ones, pooled.

    .. math::
        \bar\mu = \tfrac1k \textstyle\sum_s \mu_s, \quad
        \bar v = \tfrac1k \sum_s \left(\max(v_s, 0) + (\mu_s - \bar\mu)^2\right), \quad
        y = \gamma (x - \bar\mu) / \sqrt{\bar v + \epsilon} + \beta

    The sums run over this batch and the past ones; gradients flow through the moments of this
    batch, the past ones are constants.

    Args:
        x: Activations ``(N, C, *)``.
        past: Means and variances of S past batches ``(S, 2, C)``, already compensated; S may be 0.
            A variance may be negative, as first-order compensation can make it.
        weight: The scale gamma ``(C,)``; None for 1.
        bias: The shift beta ``(C,)``; None for 0.
        eps: Added to the variance.
        used: Which past batches count ``(S,)``; None for all.
        invalid: What becomes of a past term of negative variance: ``"clamp"`` takes the variance
            as 0, ``"drop"`` leaves the term out for that channel.
        moments: The moments of this batch; None to take them from ``x``.

    Returns:
        A tensor of the shape and dtype of ``x``; the statistics are taken in float32 if ``x`` has
        a half precision.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> past = torch.tensor([[[2.0], [7.0]]])  # of mean 2 and variance 7
        >>> cross_iteration_batch_norm(x, past).flatten()
        tensor([-0.5000,  0.5000])
    """
    full = wide(x)
    now = batch_moments(full) if moments is None else moments
    kind = now.mean.dtype
    shares = torch.ones_like(past[:, 0], dtype=kind)
    if used is not None:
        shares = shares * used.unsqueeze(1)
        # Zero times what an unused slot holds is not zero where that is not finite.
        past = torch.where(used.view(-1, 1, 1), past, 0)
    past_means, past_variances = past.to(kind).unbind(1)
    if invalid == "drop":
        shares = shares * (past_variances >= 0)
    # This batch counts in any case: rounding can make its variance negative, too.
    shares = torch.cat([torch.ones_like(now.mean).unsqueeze(0), shares])
    shares = shares / shares.sum(0)
    means = torch.cat([now.mean.unsqueeze(0), past_means])
    variances = torch.cat([now.variance.unsqueeze(0), past_variances.clamp_min(0)])
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    # One product keeps only x for backward; x - mean would be a second tensor of its size.
    return torch.addcmul(per_channel(shift, x), full, per_channel(scale, x)).to(x.dtype)


class CrossIterationBatchNorm(nn.Module):
    r"""A weight layer and the batch normalisation after it, pooled over the last iterations.

    For each of the last ``window - 1`` iterations s the layer keeps mean, variance and their
    slopes with respect to the weight, and carries them to the present weight:

    .. math::
        \mu_{s,t} = \mu_s + \rho\,\partial\mu_s \cdot (\theta_t - \theta_s), \quad
        v_{s,t} = v_s + \rho\,\partial v_s \cdot (\theta_t - \theta_s)
            - \left(\mu_{s,t} - \mu_s\right)^2

    which is ``nu_s + rho d_nu_s (theta_t - theta_s) - mu_{s,t}^2`` for the mean square ``nu``.
    They are pooled with those of the batch as in `cross_iteration_batch_norm`. Evaluation uses
    running statistics, which average single batches, as batch normalisation does.

    Every forward pass in training with gradients is one iteration, also several within one step of
    the optimiser, and both passes of activation checkpointing. Without gradients, or where the
    output needs none, the layer is plain batch normalisation and the window stays as it is.

    Args:
        layer: The weight layer, without bias: an nn.Conv1d, Conv2d, Conv3d or Linear.
        window: The number k of iterations pooled, this one included; 1 is batch normalisation.
        burn_in: For how many iterations the weights move too fast to look back.
        warmup: What happens in burn-in: ``"plain"`` is batch normalisation and nothing is kept,
            ``"linear"`` lets the window grow from 1 to ``window``.
        compensation: The factor rho of the first-order terms; 0 pools past moments as they were
            and keeps no slopes.
        invalid: As in `cross_iteration_batch_norm`.
        eps: Added to the variance.
        momentum: The weight of the newest batch in the running statistics; None makes them plain
            averages over all batches.
        affine: Whether a scale and a shift are learnt.
        process_group: The processes that share statistics; None for all of them, looked up at each
            call; a process alone uses its own batch.

    Shape:
        As the weight layer's, with an axis of samples; a linear layer takes ``(N, in_features)``.

    Raises:
        ValueError: At construction for another kind of layer, one with a bias, or an option out of
            range; at the call for input of another shape, of integers, or empty, and in training
            for a single value per channel while the window holds no past iteration.

    Example:
        >>> layer = CrossIterationBatchNorm(nn.Conv2d(3, 8, 3, bias=False), window=4)
        >>> layer(torch.randn(2, 3, 7, 7)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        layer: WeightLayer,
        window: int = 4,
        *,
        burn_in: int = 0,
        warmup: Literal["plain", "linear"] = "plain",
        compensation: float = 1.0,
        invalid: Literal["clamp", "drop"] = "clamp",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_layer("CrossIterationBatchNorm", layer)
        for name, value, right, expected in (
            ("window", window, window >= 1, "at least 1, which is batch normalisation; use 4"),
            ("burn_in", burn_in, burn_in >= 0, "a number of iterations of at least 0; use 0"),
            ("warmup", warmup, warmup in ("plain", "linear"), "'plain' or 'linear'; use 'plain'"),
            ("compensation", compensation, compensation >= 0, "a factor of at least 0; use 1"),
            ("invalid", invalid, invalid in ("clamp", "drop"), "'clamp' or 'drop'; use 'clamp'"),
            ("momentum", momentum, 0 <= (momentum or 0) <= 1, "from 0 to 1, or None; use 0.1"),
        ):
            if not right:
                expected, advice = expected.split("; ")
                raise ValueError(
                    f"CrossIterationBatchNorm({name}={value!r}): expected {expected}, got "
                    f"{value!r}; {advice}"
                )
        self.invalid: Literal["clamp", "drop"] = invalid
        self.layer = layer
        self.norm = SynchronizedBatchNorm(
            layer.weight.shape[0], eps, momentum, affine, process_group=process_group
        ).to(layer.weight)
        size = (layer.weight.detach(), groups_of(layer), window - 1)
        self.window = CrossIterationWindow(*size, burn_in, warmup, compensation)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the weight layer and normalise what it returns."""
        check_input("CrossIterationBatchNorm", self.layer, input)
        y = self.layer(input)
        # The normaliser's own mode decides, too: it may be frozen, or run alone to recalibrate.
        counts = self.training and self.norm.training and y.requires_grad
        if not counts or self.window.slots == 0:
            return self._plain(y)
        if self.window.is_known_to_burn_in():
            output = self._plain(y)
            self.window.num_iterations.add_(1)
            return output
        norm, window, weight = self.norm, self.window, self.layer.weight.detach()
        group = group_of_several(norm.process_group)
        used = window.used()
        if group is None and y.numel() == y.shape[1] and not used.any():
            check_count("CrossIterationBatchNorm", y)
        full, slopes = wide(y), None
        if window.keeps_slopes:
            moments, slopes = moments_and_slopes(self.layer, input.detach(), full, group)
        else:
            moments = batch_moments(full, group)
        inputs = (full, window.compensated(weight), norm.weight, norm.bias, norm.eps)
        output = cross_iteration_batch_norm(
            *inputs, used=used, invalid=self.invalid, moments=moments
        )
        track(norm, moments)
        window.remember(moments, slopes, weight)
        return output.to(y.dtype)

    def _plain(self, y: Tensor) -> Tensor:
        if self.norm.training and group_of_several(self.norm.process_group) is None:
            check_count("CrossIterationBatchNorm", y)
        return self.norm(y)


def from_batch_norm(
    norm: nn.Module, layer: nn.Module, *, process_group: Any = None, **options: Any
) -> CrossIterationBatchNorm:
    """Join a BatchNorm and the weight layer before it; evaluation stays as it is.

    Scale, shift, eps, momentum and running statistics are kept, as the very parameters and
    buffers. A bias of the weight layer is taken out of it and out of the running mean.

    Args:
        norm: One of torch's BatchNorm layers with running statistics; not to be used afterwards.
        layer: The weight layer, which becomes part of the result.
        process_group: As in `CrossIterationBatchNorm`.
        options: ``window``, ``burn_in``, ``warmup``, ``compensation`` and ``invalid`` of
            `CrossIterationBatchNorm`.

    Returns:
        The joint layer, with an empty window.

    Raises:
        ValueError: An option is out of range, or the layers do not go together; both stay as is.
    """
    fits = type(norm) in BATCH_NORMS and norm.running_mean is not None and is_weight_layer(layer)
    if not fits or norm.num_features != cast(WeightLayer, layer).weight.shape[0]:
        raise ValueError(
            "from_batch_norm(norm, layer): expected a BatchNorm with running statistics and a "
            "convolution or linear layer of as many channels out, got "
            f"{norm} and {layer}; leave the pair as it is"
        )
    norm, bias = cast(_BatchNorm, norm), layer.bias
    layer.register_parameter("bias", None)
    try:
        joint = CrossIterationBatchNorm(cast(WeightLayer, layer), **options)
    except (TypeError, ValueError):
        layer.register_parameter("bias", cast("nn.Parameter | None", bias))
        raise
    if isinstance(bias, Tensor) and norm.running_mean is not None:
        norm.running_mean.sub_(bias.detach())
    joint.norm = cast(SynchronizedBatchNorm, synchronize(norm, process_group))
    return joint.train(norm.training)


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    window: int = 4,
    burn_in_share: float = 0.25,
    warmup: Literal["plain", "linear"] = "plain",
    compensation: float = 1.0,
    invalid: Literal["clamp", "drop"] = "clamp",
) -> nn.Module:
    """Join each BatchNorm with the weight layer directly before it, in that layer's place.

    An nn.Identity takes the BatchNorm's place, so that the model's own forward goes on working. A
    BatchNorm stays where no weight layer stands directly before it, or where one of the two is
    used more than once; `Setting.say` gets the reasons.

    Args:
        model: The model, changed in place.
        setting: The first batch shows what follows what; ``total_steps`` sets the burn-in.
        window: As in `CrossIterationBatchNorm`.
        burn_in_share: The share of the planned steps spent in burn-in, from 0 to 1. The paper's
            detectors, which start from trained weights, spend 8 of 12 epochs.
        warmup: As in `CrossIterationBatchNorm`.
        compensation: As in `CrossIterationBatchNorm`.
        invalid: As in `CrossIterationBatchNorm`.

    Returns:
        The model.

    Raises:
        Unsuitable: No BatchNorm can be joined; nothing is changed then.
        ValueError: An option is out of range.
    """
    if not 0 <= burn_in_share <= 1:
        raise ValueError(
            f"cross-iteration-bn(burn_in_share={burn_in_share}): expected a share from 0 to 1, got "
            f"{burn_in_share}; use 0.25"
        )
    burn_in = round(burn_in_share * setting.total_steps)
    norms = batch_norms(model, "cross-iteration-bn")
    # Identity takes what the model returns, so that a sum at its very end is seen, too.
    flow = trace_flow(nn.Sequential(model, nn.Identity()), setting.batches[0][0][:2])
    pairs, reasons = pair_with_weight_layers(flow, norms)
    stay = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    if not pairs:
        raise Unsuitable(
            "cross-iteration-bn(model): expected a BatchNorm directly after a weight layer, got "
            f"{stay}; use another normaliser"
        )
    options = {"window": window, "burn_in": burn_in, "warmup": warmup, "invalid": invalid}
    replacements: dict[nn.Module, nn.Module] = {norm: nn.Identity() for norm in pairs.values()}
    for layer, norm in pairs.items():
        replacements[layer] = from_batch_norm(norm, layer, compensation=compensation, **options)
    swap(model, replacements)
    setting.say(
        f"{len(pairs)} weight layers pool the moments of {window} iterations after {burn_in}"
        + (f"; these BatchNorm layers stay: {stay}" if stay else "")
    )
    return model


CARD = Card(
    name="cross-iteration-bn",
    title="Cross-iteration batch normalisation",
    summary="Pools the statistics of the last few batches, each corrected to first order for the "
    "change of the layer's weight since then.",
    room="norms",
    source=Source(
        authors="Z. Yao, Y. Cao, S. Zheng, G. Huang, S. Lin",
        title="Cross-Iteration Batch Normalization",
        year=2020,
        arxiv="2002.05712",
        venue="CVPR 2021",
    ),
    batch_statistics=True,
    batch_of_one="needs space",
    eval_differs=True,
    keeps_evaluation=True,
    state=(
        "running mean and variance of each channel",
        "for each past iteration means, variances and one slope of the weight's size",
        "number of iterations seen and kept",
    ),
    best_for="Convolutions in front of BatchNorm trained with a few samples on each device.",
    limits=(
        "No use where batches are large enough for batch normalisation.",
        "Costs one weight gradient more a layer and step, and window - 1 tensors of its size.",
        "The change of earlier layers is not corrected; a public re-run on small data sets found "
        "it worse than batch normalisation.",
        "Each forward pass takes a place in the window, in gradient accumulation and in the second "
        "pass of activation checkpointing, too.",
        "A single value per channel trains only once the window holds a past iteration.",
    ),
    departures=(
        "One tensor of the weight's size is kept an iteration, not three.",
        "Invalid past variances are clamped, as in the paper (invalid=drop as in public code).",
        "The output is divided by sqrt(var + eps); the public default is sqrt(var) + eps.",
        "Burn-in is a quarter of the planned steps (burn_in_share); the paper's detectors take 8 "
        "of 12 epochs.",
        "The window is part of the checkpoint.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)

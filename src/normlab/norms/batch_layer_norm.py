r"""Batch layer normalisation: a blend of batch and layer statistics, weighted by the batch size.

At a batch of one the layer's statistics decide almost alone, at large batches those of the batch.
In evaluation four switches say which moments are population values and which the input's own. The
formulae are plain functions in `normlab.norms.batch_layer_statistics`.

Source: A. Ziaee, E. Cano, "Batch Layer Normalization, A new normalization layer for CNNs and
RNNs", 2022, arXiv 2209.08898.

Departs:
    - The two weights sum to 1; the public code's sum to ``1 - 2 zeta``
      (``weighting="reference"``).
    - Channels stand on axis 1, as in torch, unless ``feature_dim=-1``.
    - Population values of the layer's moments are averaged over samples. The source keeps one for
      each place in the batch and multiplies the variance by ``B / (B - 1)``
      (``weighting="reference"`` does both).
    - Batches count by their size. Where each has a single value for a moment the source divides by
      zero; here evaluation refuses.
    - The source ends an epoch of averaging in a callback; here `population_epoch` does, or the
      layer after ``epoch_steps`` batches. `METHOD` takes a tenth of the training for an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.moments import group_of_several, wide
from normlab.norms.batch_layer_statistics import (
    Averages,
    FourMoments,
    Population,
    Spatial,
    Weighting,
    blend,
    blend_weights,
    channels_second,
    evaluation_moments,
    expect,
    expect_word,
    training_moments,
)
from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import batch_norms, keep_affine, swap


class BatchLayerNorm(nn.Module):
    r"""Batch layer normalisation of ``(N, C, *)``, or of sequences ``(N, T, C)``.

    In training each batch is normalised with its own moments, which are averaged over an epoch for
    evaluation. Without ``epoch_steps`` the user ends the epoch, by `population_epoch` or by
    `reset_population` and `finalize_population`; until then evaluation with population values is
    refused. With ``epoch_steps`` the layer itself does, after so many training batches: then
    evaluation takes the last full epoch; within the first one, what was averaged so far; before
    any batch, mean 0 and variance 1.

    Args:
        num_features: The number of channels C.
        nominal_batch_size: The planned batch size B over all processes, which gives the weights.
        spatial_shape: The sizes of the axes beside samples and channels, ``(H, W)`` or ``(T,)``,
            as moments are kept for each position; ``()`` for ``(N, C)`` and for ``"pooled"``.
        spatial: ``"pooled"`` takes the batch's moments over positions as well, so that sizes may
            vary; the layer's moments of the input stay at each position.
        feature_dim: The axis of the channels, 1 or -1.
        weighting: How the weights follow from B, see `blend_weights`; ``"reference"`` also keeps
            the layer's population values as the public code does.
        weights: Fixed weights ``(w_f, w_b)`` in place of those by batch size.
        batch_size: ``"actual"`` takes the weights of training from each batch's own size.
        population: Which moments of evaluation are population values; may be set at any time.
        unbiased: Whether the batch's population variance is :math:`\sum n_i v_i / \sum (n_i - 1)`
            over batches with n_i values for each moment, rather than the plain average.
        scale_by_dim: Whether to divide by the root of C; outputs then deviate by ``1 / sqrt(C)``.
        eps: Added to the variances, above 0.
        zeta: The constant of the weights, from 0 to below 1.
        epoch_steps: After how many training batches the layer ends an epoch of averaging; None
            leaves that to the user.
        process_group: The processes that share statistics in training, in one collective forward
            and one backward; None for all of them, looked up at each call; a process alone uses
            its own batch.

    Shape:
        Input and output ``(N, C, *)``, or ``(N, *, C)`` for ``feature_dim=-1``.

    Raises:
        ValueError: For an argument out of range, input of another shape, of integers, or empty,
            and in evaluation for population values that are not there.

    Example:
        >>> layer = BatchLayerNorm(8, nominal_batch_size=4, spatial_shape=(5, 5))
        >>> with population_epoch(layer):
        ...     for _ in range(3):
        ...         y = layer(torch.randn(4, 8, 5, 5))
        >>> layer.eval()(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])

        On the output sequence of a recurrent layer:

        >>> lstm = nn.LSTM(3, 16, batch_first=True)
        >>> norm = BatchLayerNorm(16, nominal_batch_size=4, spatial_shape=(7,), feature_dim=-1)
        >>> norm(lstm(torch.randn(4, 7, 3))[0]).shape
        torch.Size([4, 7, 16])
    """

    batch_statistics = True  # in training mode only

    def __init__(
        self,
        num_features: int,
        nominal_batch_size: int,
        spatial_shape: tuple[int, ...] = (),
        *,
        spatial: Spatial = "position",
        feature_dim: Literal[1, -1] = 1,
        weighting: Weighting = "convex",
        weights: tuple[float, float] | None = None,
        batch_size: Literal["nominal", "actual"] = "nominal",
        population: Population = Population(),  # noqa: B008 - a tuple of constants
        unbiased: bool = True,
        scale_by_dim: bool = True,
        eps: float = 1e-3,
        zeta: float = 1e-4,
        epoch_steps: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"num_features": num_features, "nominal_batch_size": nominal_batch_size}
        sizes |= {"epoch_steps": 1 if epoch_steps is None else epoch_steps}
        sizes |= {f"spatial_shape[{axis}]": size for axis, size in enumerate(spatial_shape)}
        for name, size in sizes.items():
            expect(name, size, type(size) is int and size > 0, "a whole number above 0")
        alone = not (spatial == "pooled" and spatial_shape)
        expect("spatial_shape", spatial_shape, alone, "() with spatial='pooled'")
        expect("feature_dim", feature_dim, feature_dim in (1, -1), "1 or -1")
        expect("eps", eps, 0 < eps < math.inf, "a number above 0")
        expect("zeta", zeta, 0 <= zeta < 1, "at least 0 and below 1")
        pair = weights is None or (len(weights) == 2 and all(map(math.isfinite, weights)))
        expect("weights", weights, pair, "two numbers (w_f, w_b)")
        expect_word("spatial", spatial, ("position", "pooled"))
        expect_word("weighting", weighting, ("convex", "reference"))
        expect_word("batch_size", batch_size, ("nominal", "actual"))
        self.num_features = num_features
        self.nominal_batch_size = nominal_batch_size
        self.spatial_shape = tuple(spatial_shape)
        self.spatial: Spatial = spatial
        self.feature_dim = feature_dim
        self.weighting: Weighting = weighting
        self.weights = weights
        self.batch_size = batch_size
        self.population = Population(*population)
        self.unbiased = unbiased
        self.scale_by_dim = scale_by_dim
        self.eps = eps
        self.zeta = zeta
        self.epoch_steps = epoch_steps
        self.process_group = process_group
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        slots = nominal_batch_size if weighting == "reference" else 1
        for span in ("epoch", "population"):
            self.register_buffer(f"{span}_batch", torch.zeros(2, num_features, *spatial_shape))
            self.register_buffer(f"{span}_layer", torch.zeros(2, slots, *spatial_shape))
            self.register_buffer(f"{span}_counts", torch.zeros(1 + slots, dtype=torch.int64))
        self.reset_population()
        self.register_load_state_dict_pre_hook(_check_loaded)

    def averages(self, span: Literal["epoch", "population"]) -> Averages:
        """Return the buffers of the epoch under way, or of the one that evaluation takes."""
        return Averages(*(self.get_buffer(f"{span}_{name}") for name in Averages._fields))

    @torch.no_grad()
    def reset_population(self) -> None:
        """Forget all averages, those for evaluation and those of the epoch under way."""
        for buffer in (*self.averages("epoch"), *self.averages("population")):
            buffer.zero_()
        batch, layer, _ = self.averages("population")
        batch[1] = layer[1] = 1

    @torch.no_grad()
    def finalize_population(self) -> None:
        """End the epoch: its averages become those of evaluation; ValueError if it had no batch."""
        epoch = self.averages("epoch")
        if not epoch.counts[0]:
            raise ValueError(
                "BatchLayerNorm.finalize_population(): expected at least one training batch since "
                "the last epoch, got none; train first"
            )
        self.averages("population").take(epoch)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of shape ``(N, C, *)``, or ``(N, *, C)`` for ``feature_dim=-1``."""
        positions = None if self.spatial == "pooled" else self.spatial_shape
        x = channels_second(input, self.num_features, self.feature_dim, positions)
        size: int | Tensor = self.nominal_batch_size
        if self.training:
            group, by_slot = group_of_several(self.process_group), self.weighting == "reference"
            moments, summary = training_moments(wide(x), self.spatial, by_slot=by_slot, group=group)
            with torch.no_grad():
                epoch, population = self.averages("epoch"), self.averages("population")
                epoch.add(summary)
                if self.epoch_steps is None:
                    population.counts.zero_()
                else:
                    population.take(epoch, epoch.counts[0] >= self.epoch_steps)
            size = summary.num_samples if self.batch_size == "actual" else size
        else:
            kept = self.population_moments(self.population) if any(self.population) else None
            moments = evaluation_moments(wide(x), self.spatial, self.population, kept)
        weights = self.weights or blend_weights(size, self.zeta, self.weighting)
        y = blend(x, moments, weights, self.weight, self.bias, self.eps, self.scale_by_dim)
        return y if self.feature_dim == 1 else y.movedim(1, -1)

    def population_moments(self, asked: Population = Population(*(True,) * 4)) -> FourMoments:  # noqa: B008
        """Return the population values that evaluation takes; ValueError where one is missing.

        The batch's are ``(C, *spatial_shape)``, the layer's ``(slots, *spatial_shape)`` with one
        slot, or B slots under ``weighting="reference"``.
        """
        kept = self.averages("population")
        strict, by_slot = self.epoch_steps is None, self.weighting == "reference"
        if not strict:
            epoch = self.averages("epoch")
            first = (kept.counts[0] == 0) & (epoch.counts[0] > 0)
            kept = Averages(*(torch.where(first, *both) for both in zip(epoch, kept, strict=True)))
        # A compiled graph cannot look at the counts; there the values become NaN.
        if not torch.compiler.is_compiling():
            kept.check(asked, unbiased=self.unbiased, by_slot=by_slot, strict=strict)
        return kept.moments(unbiased=self.unbiased, by_slot=by_slot, strict=strict)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        letters = "".join("FT"[switch] for switch in self.population)
        return (
            f"{self.num_features}, nominal_batch_size={self.nominal_batch_size}, "
            f"spatial_shape={self.spatial_shape}, spatial={self.spatial!r}, population={letters!r}"
        )


def _check_loaded(_: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in ("epoch_batch", "epoch_layer", "population_batch", "population_layer"):
        values = state_dict.get(prefix + name)
        if values is not None and not (values.isfinite().all() and (values[1] >= 0).all()):
            raise ValueError(
                f"BatchLayerNorm.load_state_dict({prefix + name}): expected finite means and "
                "variances of at least 0, got others; take an earlier checkpoint"
            )


@contextmanager
def population_epoch(model: nn.Module) -> Iterator[None]:
    """Average anew over the training batches of the body, for evaluation after it.

    A layer that no batch reaches keeps the population it had; if the body raises, all do. Within
    the body a layer's own ``epoch_steps`` rest. Raises ValueError for a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchLayerNorm)]
    if not layers:
        raise ValueError(
            "population_epoch(model): expected a model with BatchLayerNorm layers, got "
            f"{type(model).__name__} without any; leave it out"
        )
    epochs = [layer.epoch_steps for layer in layers]
    saved = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    completed = False
    try:
        for layer in layers:
            layer.reset_population()
            layer.epoch_steps = None
        yield
        completed = True
    finally:
        for layer, epoch_steps, buffers in zip(layers, epochs, saved, strict=True):
            layer.epoch_steps = epoch_steps
            if completed and layer.averages("epoch").counts[0]:
                layer.finalize_population()
                continue
            for buffer, value in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(value)


def from_batch_norm(
    norm: nn.Module, nominal_batch_size: int, spatial_shape: tuple[int, ...] = (), **options: Any
) -> BatchLayerNorm:
    """Return the layer that takes a BatchNorm's place.

    Scale and shift are kept, and the running statistics as population values of the batch at every
    position, until training brings new ones; eps and momentum are not. The arguments after
    ``norm`` are those of `BatchLayerNorm`.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = BatchLayerNorm(norm.num_features, nominal_batch_size, spatial_shape, **options)
    keep_affine(layer, norm)
    if norm.running_mean is not None and norm.running_var is not None:
        both = torch.stack([norm.running_mean, norm.running_var])
        layer.averages("population").batch.copy_(both.reshape(2, -1, *(1,) * len(spatial_shape)))
    return layer


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    nominal_batch_size: int | None = None,
    batch_size: Literal["nominal", "actual"] = "nominal",
    weighting: Weighting = "convex",
    batch_weight: float | None = None,
    spatial: Spatial = "position",
    population: str = "TTFF",
    unbiased: bool = True,
    scale_by_dim: bool = True,
    eps: float = 1e-3,
    epoch_steps: int | None = None,
) -> nn.Module:
    """Replace each BatchNorm by a `BatchLayerNorm`, whose options these are but for four.

    ``nominal_batch_size`` is by default the number of samples of the setting's first batch,
    ``epoch_steps`` a tenth of the training; ``batch_weight`` fixes the weight of the batch, the
    layer's being the rest to 1; ``population`` names the switches by four letters ``T`` or ``F``.
    """
    norms = batch_norms(model, "batch-layer-norm")
    inputs = setting.batches[0][0]
    flow = trace_flow(model, inputs[:2])
    size = len(inputs) if nominal_batch_size is None else nominal_batch_size
    steps = max(1, setting.total_steps // 10) if epoch_steps is None else epoch_steps
    weights = None if batch_weight is None else (1 - batch_weight, batch_weight)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, norm in norms.items():
        shapes = {tuple(call.input_shape or ())[2:] for call in flow.of(norm)}
        if spatial == "position" and len(shapes) != 1:
            raise Unsuitable(
                f"batch-layer-norm(model): expected {name} to see maps of one size, got "
                f"{sorted(shapes) or 'none in evaluation mode'}; take spatial=pooled"
            )
        layer = replacements[norm] = from_batch_norm(
            norm,
            size,
            min(shapes) if spatial == "position" else (),
            batch_size=batch_size,
            weighting=weighting,
            weights=weights,
            spatial=spatial,
            population=Population.read(population),
            unbiased=unbiased,
            scale_by_dim=scale_by_dim,
            eps=eps,
            epoch_steps=steps,
        )
        single = spatial == "position" or all(math.prod(shape) == 1 for shape in shapes)
        if size == 1 and single and unbiased and layer.population.batch_variance:
            raise Unsuitable(
                f"batch-layer-norm(model): expected more than one value behind each variance of "
                f"{name}, got batches of one sample; take unbiased=false or population=TFFF"
            )
    setting.say(
        f"{len(norms)} BatchNorm layers became BatchLayerNorm, for batches of {size} and epochs of "
        f"{steps} steps"
    )
    return swap(model, replacements)


CARD = Card(
    name="batch-layer-norm",
    title="Batch layer normalisation",
    summary="Blends batch and layer normalisation with weights that follow from the batch size.",
    room="norms",
    source=Source(
        authors="A. Ziaee, E. Cano",
        title="Batch Layer Normalization, A new normalization layer for CNNs and RNNs",
        year=2022,
        arxiv="2209.08898",
        venue="ICAAI 2022",
    ),
    batch_statistics=True,
    eval_differs=True,
    state=(
        "averages of the moments, over this epoch and over the last full one, and their counts",
    ),
    best_for="Small convolutional networks at small batches, and sequences: after a recurrent "
    "layer, BatchLayerNorm(128, 25, (80,), feature_dim=-1) takes the output (N, T, C) of "
    "nn.LSTM(..., batch_first=True), with batch statistics for each time step and unit.",
    limits=(
        "Statistics for each position fix the size of the maps (spatial=pooled does not).",
        "Outputs deviate by 1 / sqrt(C), which a deep network may not bear (scale_by_dim=false).",
        "The published results chose the switches of evaluation on the test set.",
        "Batches of one have no population variance (unbiased=false takes 0).",
    ),
    departures=(
        "The weights sum to 1 (weighting=reference: 1 - 2 zeta, as in the public code).",
        "Population values of the layer are averaged over samples, without B / (B - 1).",
        "An epoch of averaging is a tenth of the training unless epoch_steps says otherwise.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)

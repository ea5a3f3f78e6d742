r"""Batch Kalman normalisation: the batch's statistics are filtered with a prediction from below.

For batches of 2 to about 10 samples: a layer's mean and variance are those of a mixture of what
the batch shows and of what the statistics of the previous normaliser predict.

Source: G. Wang, J. Peng, P. Luo, X. Wang, L. Lin, "Batch Kalman Normalization: Towards Training
Deep Neural Networks with Micro-Batches", 2018, arXiv 1802.03133.

The filter: `normlab.norms.kalman_filter`. How moments are carried through given layers:
`normlab.norms.kalman_propagation`. How any model threads posteriors: `normlab.norms.kalman_chain`.

Departs:
    - The paper learns the transition A and the noise R, the public code has neither and propagates
      random features: both are here, ``transition="linear"`` and ``"propagate"``. The code feeds
      raw posterior moments into the ReLU (``apply_affine=False``); by default it is what scale and
      shift make of normalised features, as on the data path.
    - A starts as the rectangular identity and R as 0.01; the paper's start is unknown.
    - The gain is a number, or learnt (``learn_gain``); which one the paper means could not be told.
    - A full covariance is carried on request for up to 64 channels; the normalisation itself is by
      channel always.
    - The guard against wild predictions is the code's; it is left out where a channel has a single
      value, whose variance of 0 would always discard the prediction.
    - The code's simulation of micro-batches within a larger batch cuts the batch once, in front of
      the model (``micro_batches``, `normlab.norms.kalman_micro_batches`).
    - A, R and the gain do not decay in `METHOD` (option ``decay``): decay would pull the prediction
      towards 0 and its noise up to 0.69.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.moments import (
    check_channels,
    check_count,
    group_of_several,
    per_channel,
    refuse_broken_statistics,
    wide,
)
from normlab.norms.kalman_chain import ChainPlan
from normlab.norms.kalman_filter import Posterior, guard, kalman_update, observe, predict
from normlab.norms.kalman_micro_batches import MicroBatches
from normlab.norms.kalman_options import MOST_FULL, check_options
from normlab.parameter_groups import Group, split_groups
from normlab.surgery.swap import batch_norms, keep_affine, swap

_NOISE = 0.01
_FEWEST_GUARDED = 8


class BatchKalmanNorm(nn.Module):
    """Batch Kalman normalisation of ``(N, C, *)``: ``forward(x, prior) -> (y, posterior)``.

    Training normalises with the posterior of `kalman_update`, or as batch normalisation does where
    there is no prior; evaluation with running averages of the posterior, whatever the prior.
    Gradients flow through the prior into the layers before. `METHOD` puts the layers into any
    model; by hand the posterior is passed on::

        y, posterior = norm1(conv1(x))
        y, posterior = norm2(conv2(y.relu()), posterior)

    Args:
        num_features: The number of channels C.
        eps: Added to the variance.
        momentum: The weight of the newest posterior in the running statistics; None makes them
            plain averages over all batches.
        affine: Whether a scale and a shift are learnt.
        prior_features: The number of channels of the prior; None for C, 0 for a layer that never
            has one.
        gain: The weight q of the batch, from 0 to 1: 0.1 for batches up to 4, 0.95 for larger
            ones.
        learn_gain: Whether q is learnt, as the sigmoid of a scalar.
        transition: ``"linear"`` predicts with a learnt matrix and noise; with ``"propagate"`` the
            prior is the prediction, as `normlab.norms.kalman_propagation.propagate` returns it.
        covariance: ``"diagonal"``, or ``"full"`` to carry the full covariance of up to 64
            channels; linear transition only.
        max_ratio: The prediction is ignored where the mean ratio of its variances to those of the
            batch is this large; None to trust it always. Layers that see fewer than about 8 values
            per channel need None: there the ratio is mostly noise.
        process_group: The processes that share statistics; None for all of them, looked up at each
            call; a process alone uses its own batch.

    Shape:
        Input and output ``(N, C, *)``; the prior's mean is ``(prior_features,)``.

    Raises:
        ValueError: At construction for an option out of range; at the call for input of another
            number of channels, of integers, or empty, for a prior of another size, and in training
            without a prior for a single value per channel.

    Example:
        >>> first, second = BatchKalmanNorm(8, prior_features=0), BatchKalmanNorm(8)
        >>> y, posterior = first(torch.randn(2, 8, 5, 5))
        >>> y, posterior = second(y.relu(), posterior)
        >>> y.shape, posterior.variance.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([8]))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        prior_features: int | None = None,
        gain: float = 0.1,
        learn_gain: bool = False,
        transition: str = "linear",
        covariance: str = "diagonal",
        max_ratio: float | None = 100.0,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.prior_features = num_features if prior_features is None else prior_features
        self.gain = gain
        self.transition = transition
        self.covariance = covariance
        self.max_ratio = max_ratio
        self.process_group = process_group
        check_options(self, learn_gain)
        self.weight = nn.Parameter(torch.empty(num_features)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features)) if affine else None
        self.transition_matrix = self.noise_rho = self.gain_logit = None
        if self.prior_features and transition == "linear":
            self.transition_matrix = nn.Parameter(torch.empty(num_features, self.prior_features))
            self.noise_rho = nn.Parameter(torch.empty(num_features))
        if self.prior_features and learn_gain:
            self.gain_logit = nn.Parameter(torch.empty(()))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_load_state_dict_pre_hook(refuse_broken_statistics)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set parameters and running statistics to their starting values."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        if self.transition_matrix is not None and self.noise_rho is not None:
            nn.init.eye_(self.transition_matrix)
            nn.init.constant_(self.noise_rho, math.log(math.expm1(_NOISE)))
        if self.gain_logit is not None:
            nn.init.constant_(self.gain_logit, math.log(self.gain / (1 - self.gain)))

    def forward(self, x: Tensor, prior: Posterior | None = None) -> tuple[Tensor, Posterior]:
        """Normalise ``x`` of shape ``(N, C, *)``, given the posterior of the layer before."""
        check_channels("BatchKalmanNorm", x, self.num_features)
        if prior is not None:
            self._check_prior(prior)
        if not self.training:
            posterior = Posterior(self.running_mean, self.running_var)
            y = F.batch_norm(x, *posterior, self.weight, self.bias, eps=self.eps)
            return y, posterior
        group = group_of_several(self.process_group)
        if prior is None and group is None:
            check_count("BatchKalmanNorm", x)
        # Autocast would take the products with the transition in half precision.
        with torch.autocast(x.device.type, enabled=False):
            batch = observe(x, group, full=self.covariance == "full")
            posterior = batch
            if prior is not None:
                prediction = self._prediction(prior, batch.mean.dtype)
                if self.max_ratio is not None and (group or x.numel() > x.shape[1]):
                    prediction = guard(prediction, batch, self.max_ratio, self.eps)
                logit = self.gain_logit
                gain = self.gain if logit is None else logit.to(batch.mean.dtype).sigmoid()
                posterior = kalman_update(prediction, batch, gain)
            self._track(posterior)
            return self._normalised(x, posterior), posterior

    def output_moments(self) -> Posterior:
        """Return mean and variance of normalised features behind scale and shift, by channel."""
        if self.weight is None or self.bias is None:
            return Posterior(torch.zeros_like(self.running_mean), torch.ones_like(self.running_var))
        return Posterior(wide(self.bias), wide(self.weight).square())

    def _check_prior(self, prior: Posterior) -> None:
        size = self.prior_features
        if tuple(prior.mean.shape) != (size,):
            raise ValueError(
                f"BatchKalmanNorm(prior): expected the moments of {size} channels, got a mean of "
                f"shape {tuple(prior.mean.shape)}; set prior_features, or propagate the prior "
                "through the layers between"
            )

    def _prediction(self, prior: Posterior, dtype: torch.dtype) -> Posterior:
        prior = Posterior(prior.mean.to(dtype), prior.covariance.to(dtype))
        if self.transition_matrix is None or self.noise_rho is None:
            return Posterior(prior.mean, prior.variance)
        matrix, noise = self.transition_matrix.to(dtype), F.softplus(self.noise_rho.to(dtype))
        return predict(prior, matrix, noise, full=self.covariance == "full")

    def _normalised(self, x: Tensor, posterior: Posterior) -> Tensor:
        scale = torch.rsqrt(posterior.variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -posterior.mean * scale
        shift = shift if self.bias is None else shift + self.bias
        # One product of the input, which the moments keep for backward already.
        return torch.addcmul(per_channel(shift, x), wide(x), per_channel(scale, x)).to(x.dtype)

    @torch.no_grad()
    def _track(self, posterior: Posterior) -> None:
        self.num_batches_tracked.add_(1)
        share: Tensor | float | None = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        self.running_mean.lerp_(posterior.mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(posterior.variance.to(self.running_var.dtype), share)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return (
            f"{self.num_features}, eps={self.eps}, prior_features={self.prior_features}, "
            f"gain={self.gain}, learn_gain={self.gain_logit is not None}, "
            f"transition={self.transition!r}, max_ratio={self.max_ratio}"
        )


def from_batch_norm(norm: nn.Module, **options: Any) -> BatchKalmanNorm:
    """Return the layer that takes a BatchNorm's place.

    Scale, shift, eps, momentum and running statistics are kept, so that it evaluates as before; a
    layer without running statistics starts them afresh.

    Args:
        norm: One of torch's BatchNorm layers.
        options: Further arguments of `BatchKalmanNorm`.

    Returns:
        A fresh layer.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = BatchKalmanNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, **options)
    keep_affine(layer, norm)
    for name, kept in norm.named_buffers(recurse=False):
        getattr(layer, name).copy_(kept)
    return layer


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    transition: str = "linear",
    covariance: str = "diagonal",
    gain: float | None = None,
    learn_gain: bool = False,
    max_ratio: float = 100.0,
    propagation: str = "analytic",
    apply_affine: bool = True,
    micro_batches: int = 1,
) -> nn.Module:
    """Replace each BatchNorm by a layer that takes its prior from the normalisers before it.

    Args:
        model: Any model; see `normlab.norms.kalman_chain` for which of its layers have a prior.
        setting: The first batch serves to follow the data path, and its size sets the recipe.
        transition: As in `BatchKalmanNorm`.
        covariance: ``"full"`` holds for layers of up to 64 channels; the others stay diagonal.
        gain: The weight of the batch; None for 0.1 if a batch has up to 4 samples, else 0.95.
        learn_gain: As in `BatchKalmanNorm`.
        max_ratio: As in `BatchKalmanNorm`, ``inf`` to trust always; layers with fewer than 8
            values per channel in the first batch are not guarded.
        propagation: As in `normlab.norms.kalman_propagation.propagate`.
        apply_affine: Whether propagation starts from what scale and shift make of normalised
            features; else from the raw posterior, as in the public code.
        micro_batches: Into how many parts that do not see each other a training batch is cut; with
            more than 1 the result holds the model as its ``model``.

    Returns:
        The model, or its replacement if it is itself a BatchNorm layer.

    Raises:
        Unsuitable: The model has no batch normalisation layer.
        ValueError: An option is out of range.
    """
    norms = batch_norms(model, "batch-kalman-norm")
    inputs = setting.batches[0][0]
    if micro_batches < 1:
        raise ValueError(
            f"batch-kalman-norm(micro_batches={micro_batches}): expected at least 1, got "
            f"{micro_batches}; use 1 for whole batches"
        )
    size = len(inputs) // micro_batches
    if gain is None:
        gain = 0.1 if size <= 4 else 0.95
    plan = ChainPlan(
        model,
        inputs[:2],
        norms.values(),
        "batch-kalman-norm",
        transition=transition,
        propagation=propagation,
        apply_affine=apply_affine,
    )
    layers: dict[nn.Module, nn.Module] = {}
    for norm in norms.values():
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        too_wide = covariance == "full" and norm.num_features > MOST_FULL
        shapes = [call.input_shape for call in plan.flow.of(norm) if call.input_shape is not None]
        fewest = min((size * math.prod(shape[2:]) for shape in shapes), default=0)
        layer = from_batch_norm(
            norm,
            prior_features=plan.prior_features(norm),
            gain=gain,
            learn_gain=learn_gain,
            transition=transition,
            covariance="diagonal" if too_wide else covariance,
            max_ratio=max_ratio if fewest >= _FEWEST_GUARDED else None,
        )
        layers[norm] = plan.chained(norm, layer)
    with_prior = sum(plan.prior_features(norm) > 0 for norm in norms.values())
    setting.say(
        f"{len(norms)} BatchNorm layers became BatchKalmanNorm with gain {gain}: {with_prior} "
        f"have a prior, {len(norms) - with_prior} stay plain batch normalisation"
    )
    model = plan.start(swap(model, layers))
    if micro_batches == 1:
        return model
    return MicroBatches(model, micro_batches, (BatchKalmanNorm,)).train(model.training)


def parameter_groups(
    groups: list[Group], model: nn.Module, setting: Setting, *, decay: bool = False
) -> list[Group]:
    """Exempt transition, noise and gain from weight decay, unless ``decay``."""
    if decay:
        return groups
    layers = [module for module in model.modules() if isinstance(module, BatchKalmanNorm)]
    own = [p for one in layers for p in (one.transition_matrix, one.noise_rho, one.gain_logit)]
    return split_groups(groups, [p for p in own if p is not None], weight_decay=0.0)


CARD = Card(
    name="batch-kalman-norm",
    title="Batch Kalman normalisation",
    summary="Filters the statistics of small batches with a prediction from the statistics of the "
    "normaliser before.",
    room="norms",
    source=Source(
        authors="G. Wang, J. Peng, P. Luo, X. Wang, L. Lin",
        title="Batch Kalman Normalization: Towards Training Deep Neural Networks with "
        "Micro-Batches",
        year=2018,
        arxiv="1802.03133",
        venue="NeurIPS 2018",
    ),
    batch_statistics=True,
    batch_of_one="needs space",
    eval_differs=True,
    keeps_evaluation=True,
    state=(
        "running mean and variance of each posterior, number of batches seen",
        "transition matrix and noise of each layer with a prior",
    ),
    best_for="Feed-forward convolutional networks with batches of 2 to about 10 samples a device.",
    limits=(
        "Layers are coupled: one behind a concatenation, or without a normaliser before it, has no "
        "prior and stays batch normalisation.",
        "The prediction is far off at first, and with a small gain it counts most.",
        "A linear transition has C * C' weights in each layer.",
        "Activation checkpointing and nn.DataParallel take layers out of their forward pass.",
        "Propagation reads the weight layers that it found: exchange them before, not after.",
        "Drawn predictions (propagation=sample) differ between processes.",
    ),
    departures=(
        "The transition is learnt as in the paper, or propagated as in the public code "
        "(transition=propagate), then by moments instead of samples.",
        "A starts as the identity, R as 0.01; the gain is 0.1 for batches up to 4, else 0.95.",
        "Layers with fewer than 8 values per channel keep wild predictions.",
        "Transition, noise and gain do not decay unless decay=True.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups)

r"""The filter of Kalman normalisation: what a batch shows is weighed against what was predicted.

Source: G. Wang, J. Peng, P. Luo, X. Wang, L. Lin, "Batch Kalman Normalization: Towards Training
Deep Neural Networks with Micro-Batches", 2018, arXiv 1802.03133.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.moments import batch_moments, sum_over_processes, wide


class Posterior(NamedTuple):
    """What is believed of a layer's channels: ``mean`` ``(C,)`` and ``covariance``.

    The covariance is ``(C,)`` where only the variances are kept, else ``(C, C)``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """The variance of each channel, ``(C,)``."""
        return self.covariance if self.covariance.dim() == 1 else self.covariance.diagonal()


def observe(x: Tensor, group: Any = None, *, full: bool = False) -> Posterior:
    """Return mean and biased covariance of each channel over samples and space.

    Args:
        x: Activations ``(N, C, *)``.
        group: The processes whose batches count, in one collective; None for this one alone.
        full: Whether the full covariance is taken, not only its diagonal.
    """
    if not full:
        mean, variance, _ = batch_moments(x, group)
        return Posterior(mean, variance)
    # (C, values of a channel)
    rows = wide(x).transpose(0, 1).flatten(1)
    if group is None:
        mean = rows.mean(1)
        centred = rows - mean[:, None]
        return Posterior(mean, centred @ centred.T / rows.shape[1])
    exact = rows.double()
    count = exact.new_full((1,), rows.shape[1])
    sums = sum_over_processes(torch.cat([exact.sum(1), (exact @ exact.T).flatten(), count]), group)
    channels = len(rows)
    mean = sums[:channels] / sums[-1]
    products = sums[channels:-1].view(channels, channels) / sums[-1]
    covariance = products - mean[:, None] * mean
    return Posterior(mean.to(rows.dtype), covariance.to(rows.dtype))


def predict(
    prior: Posterior, transition: Tensor, noise: Tensor, *, full: bool = False
) -> Posterior:
    r"""Return what a linear transition predicts: :math:`\mu_p = A \mu'`.

    .. math::
        \Sigma_p = A \Sigma' A^T + R

    Args:
        prior: The posterior of the layer before, of ``C'`` channels.
        transition: The matrix A, ``(C, C')``.
        noise: The diagonal of R, ``(C,)``.
        full: Whether the full covariance is returned, not only its diagonal.

    Returns:
        The prediction for ``C`` channels.
    """
    mean, before = prior
    if full:
        spread = transition * before if before.dim() == 1 else transition @ before
        covariance = spread @ transition.T + torch.diag(noise)
    elif before.dim() == 1:
        covariance = transition.square() @ before + noise
    else:
        covariance = (transition @ before * transition).sum(1) + noise
    return Posterior(transition @ mean, covariance)


def kalman_update(prediction: Posterior, batch: Posterior, gain: Tensor | float) -> Posterior:
    r"""Return mean and covariance of the mixture of the batch and the prediction.

    .. math::
        \mu = \mu_p + q (\bar z - \mu_p), \quad
        \Sigma = \Sigma_p + q (S - \Sigma_p) + q (1 - q) (\bar z - \mu_p)(\bar z - \mu_p)^T

    Args:
        prediction: The predicted moments :math:`\mu_p, \Sigma_p`.
        batch: The moments :math:`\bar z, S` of the batch; both with variances ``(C,)`` or both
            with full covariances ``(C, C)``.
        gain: The weight q of the batch, from 0 to 1.

    Returns:
        The posterior.

    Example:
        >>> prior = Posterior(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> batch = Posterior(torch.tensor([3.0]), torch.tensor([5.0]))
        >>> kalman_update(prior, batch, 0.25)
        Posterior(mean=tensor([1.5000]), covariance=tensor([3.5000]))
    """
    gap = batch.mean - prediction.mean
    square = gap.square() if batch.covariance.dim() == 1 else gap[:, None] * gap
    covariance = torch.lerp(prediction.covariance, batch.covariance, gain)
    mean = torch.lerp(prediction.mean, batch.mean, gain)
    return Posterior(mean, covariance + gain * (1 - gain) * square)


def guard(prediction: Posterior, batch: Posterior, max_ratio: float, eps: float) -> Posterior:
    r"""Return the batch in place of a prediction whose variances lie far above it.

    .. math::
        \mathrm{mean}_c \left(v_p / (v_{batch} + \epsilon)\right) \ge r

    discards the whole prediction; no gradient flows through the decision.

    Args:
        prediction: The predicted moments.
        batch: The moments of the batch, of the same kind.
        max_ratio: The ratio r.
        eps: Added to the batch's variance.
    """
    observed = batch.variance.detach() + eps
    trusted = (prediction.variance.detach() / observed).mean() < max_ratio
    mean = torch.where(trusted, prediction.mean, batch.mean)
    return Posterior(mean, torch.where(trusted, prediction.covariance, batch.covariance))


def add_moments(terms: Sequence[Posterior], pads: Sequence[tuple[int, int]]) -> Posterior:
    """Return the moments of a sum of independent features, as closes a residual branch.

    Args:
        terms: The moments of each term; variances and full covariances may be mixed.
        pads: The number of zero channels before and after each term's own.
    """
    full = any(term.covariance.dim() == 2 for term in terms)
    means, covariances = [], []
    for term, (before, after) in zip(terms, pads, strict=True):
        covariance = term.covariance
        if full and covariance.dim() == 1:
            covariance = torch.diag(covariance)
        if before or after:
            means.append(F.pad(term.mean, (before, after)))
            covariances.append(F.pad(covariance, (before, after) * covariance.dim()))
        else:
            means.append(term.mean)
            covariances.append(covariance)
    mean, covariance = means[0], covariances[0]
    for other_mean, other in zip(means[1:], covariances[1:], strict=True):
        mean, covariance = mean + other_mean, covariance + other
    return Posterior(mean, covariance)

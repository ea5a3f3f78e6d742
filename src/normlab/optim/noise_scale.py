r"""What two batch sizes show of the gradient: its noise, its signal and the scale between them.

Source: S. McCandlish, J. Kaplan, D. Amodei and the OpenAI Dota team, "An Empirical Model of
Large-Batch Training", 2018, arXiv 1812.06162, appendix A.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Batch
from normlab.moments import wide
from normlab.surgery.flow import uncompiled


@dataclass(frozen=True)
class NoiseScale:
    r"""What two batch sizes show of the gradient.

    Attributes:
        noise: S, the trace of the covariance of one sample's gradient; may come out below 0 by
            chance.
        signal: :math:`|G|^2`, the square norm of the true gradient; likewise.
        num_estimates: How many pairs of gradients were averaged.
    """

    noise: float
    signal: float
    num_estimates: int = 1

    @property
    def scale(self) -> float:
        """The batch at which noise and signal are equal; infinite where no signal was seen."""
        return max(self.noise, 0.0) / self.signal if self.signal > 0 else float("inf")

    @property
    def suggested_batch_size(self) -> int | None:
        """The scale as a number of samples, at least 1; None where no signal was seen.

        At this batch training takes twice the fewest steps and twice the fewest samples.
        """
        return max(1, round(self.scale)) if self.signal > 0 else None


def noise_scale(
    small_square: float, big_square: float, small_batch: int, big_batch: int
) -> NoiseScale:
    r"""Return unbiased estimates from the square norms of two gradients at one point.

    .. math::
        |G|^2 = \frac{B_b |G_b|^2 - B_s |G_s|^2}{B_b - B_s}, \quad
        S = \frac{|G_s|^2 - |G_b|^2}{1 / B_s - 1 / B_b}

    Args:
        small_square: The square norm of the mean gradient over the small batch, or the mean of
            several such.
        big_square: That over the big batch.
        small_batch: Samples of the small batch.
        big_batch: Samples of the big one, more than that.

    Raises:
        ValueError: The batches are not in this order.

    Example:
        >>> noise_scale(5.0, 2.0, small_batch=1, big_batch=4)
        NoiseScale(noise=4.0, signal=1.0, num_estimates=1)
    """
    if not 1 <= small_batch < big_batch:
        raise ValueError(
            f"noise_scale(small_batch={small_batch}, big_batch={big_batch}): expected a small "
            f"batch of at least 1 below the big one, got {small_batch} and {big_batch}; accumulate "
            "several micro-batches or use several processes"
        )
    signal = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    noise = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
    return NoiseScale(noise, signal)


def measure_noise_scale(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy,
) -> NoiseScale:
    r"""Return the noise scale of a model as it stands, from the gradients of a few batches.

    One batch of the k is the small one, all together are the big one:

    .. math::
        |G_s|^2 = \frac{1}{k} \sum_i |g_i|^2, \quad |G_b|^2 = \Bigl|\frac{1}{k} \sum_i g_i\Bigr|^2

    It works on a copy of the model, in the modes that it is in: neither parameters nor gradients,
    buffers or random numbers of the caller move. Few batches give a rough number; average several,
    noise and signal each by itself.

    Args:
        model: The model, mostly in training mode.
        batches: At least two batches ``(inputs, targets)`` of one size, on the model's device;
            different ones, or no noise is seen.
        loss: Maps ``(outputs, targets)`` to the mean over the samples.

    Raises:
        ValueError: Fewer than two batches, or batches of several sizes; a model without gradients,
            or one that cannot be copied.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4)]
        >>> measure_noise_scale(model, batches).num_estimates
        1
    """
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"measure_noise_scale(model): expected a model that can be copied, got {error}; where "
            "torch.nn.utils.weight_norm made it so, take torch.nn.utils.parametrizations"
        ) from error
    parameters = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            "measure_noise_scale(model): expected a model with parameters that learn, got one "
            "without; call requires_grad_() on those that should"
        )
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    total = [torch.zeros_like(wide(parameter.detach())) for parameter in parameters]
    squares, sizes = [], []
    with torch.random.fork_rng(list(devices)), torch.enable_grad(), uncompiled():
        for inputs, targets in batches:
            copied.zero_grad()
            loss(copied(inputs), targets).backward()
            squares.append(square_norm(parameters))
            sizes.append(len(targets))
            for summed, parameter in zip(total, parameters, strict=True):
                if parameter.grad is not None:
                    summed += parameter.grad
    if len(sizes) < 2 or len(set(sizes)) > 1:
        raise ValueError(
            f"measure_noise_scale(batches): expected at least two of one size, got {sizes}; give "
            "four, and drop a last one that is smaller"
        )
    count = len(sizes)
    small = torch.stack(squares).mean().item()
    big = _sum_of_squares(total).item() / count**2
    return noise_scale(small, big, sizes[0], count * sizes[0])


def square_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the square norm of the gradients of parameters together, in float64.

    Raises:
        ValueError: There are no gradients.
    """
    gradients = [wide(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError(
            "square_norm(parameters): expected gradients, got none; call it between backward and "
            "the optimiser's step"
        )
    return _sum_of_squares(gradients)


@torch.no_grad()
def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).double().square().sum()

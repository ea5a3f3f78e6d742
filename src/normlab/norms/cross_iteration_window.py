r"""The moments of a weight layer's output, how they move with its weight, and those of the past.

The output ``y = theta p`` is linear in the patches p of the input, so both moments have their
derivative in closed form, one weight gradient each:

.. math::
    \mu_j = \theta_j \cdot \mathrm{mean}(p), \quad
    \partial \mu_j / \partial \theta_j = \mathrm{mean}(p), \quad
    \partial v_j / \partial \theta_j = 2\,\mathrm{mean}((y_j - \mu_j)\,p)

The slope of the mean is the same for all channels of a group, so it is found and kept once. On the
CPU this takes about half of the time of automatic differentiation, whose gradient of the mean
costs as much as that of the variance.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from normlab.moments import Moments, batch_moments, per_channel, refuse_broken_statistics, wide

WeightLayer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose slopes are known, by exact class: a subclass may use its weight otherwise."""

_WEIGHT_GRADIENTS: tuple[Any, ...] = (conv1d_weight, conv2d_weight, conv3d_weight)


class Slopes(NamedTuple):
    """Derivatives of the moments with respect to the layer's own weight.

    ``mean`` is ``(groups, in / groups, *kernel)``, for each channel of a group the same;
    ``variance`` has the shape of the weight.
    """

    mean: Tensor
    variance: Tensor


def is_weight_layer(module: nn.Module | None) -> bool:
    """Whether ``module`` is one of `WEIGHT_LAYERS`, with a parametrised weight or without."""
    if module is None or is_parametrized(module, "bias"):
        return False
    return type_before_parametrizations(module) in WEIGHT_LAYERS


def check_layer(operation: str, layer: nn.Module) -> None:
    """Refuse what is not a weight layer without bias."""
    kinds = ", ".join(f"nn.{kind.__name__}" for kind in WEIGHT_LAYERS)
    if not is_weight_layer(layer):
        raise ValueError(
            f"{operation}(layer): expected one of {kinds}, got {type(layer).__name__}; keep batch "
            "normalisation after it"
        )
    if layer.bias is not None:
        raise ValueError(
            f"{operation}(layer): expected no bias, got {layer}; set bias=False, the normaliser "
            "has a shift of its own"
        )


def check_input(operation: str, layer: WeightLayer, x: Tensor) -> None:
    """Refuse what is not a batch of floating point that ``layer`` takes."""
    linear = isinstance(layer, nn.Linear)
    channels = layer.in_features if linear else layer.in_channels
    dims = 2 if linear else 2 + len(layer.kernel_size)
    right = x.dim() == dims and x.shape[1] == channels and x.numel() > 0
    if not (right and torch.is_floating_point(x)):
        raise ValueError(
            f"{operation}(input): expected floating point of shape (N, {channels}"
            f"{', *' * (dims - 2)}) and at least one value, got {x.dtype} of shape "
            f"{tuple(x.shape)}; give a batch of what {type(layer).__name__} takes"
        )


@torch.no_grad()
def track(norm: _BatchNorm, moments: Moments) -> None:
    """Let a batch enter the running statistics; the variance of a single value says nothing."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean.dtype), share)
    count = moments.num_values
    if isinstance(count, Tensor) or count > 1:
        unbiased = moments.variance * (count / (count - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


def groups_of(layer: WeightLayer) -> int:
    """Return the number of groups of channels that share their patches."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def moments_and_slopes(
    layer: WeightLayer, x: Tensor, y: Tensor, group: Any = None
) -> tuple[Moments, Slopes]:
    """Return the moments of ``y = layer(x)`` with their slopes, over all processes if asked.

    Across processes count, sum, sum of squares and both slopes travel in float64 in one
    collective; in backward the gradients of the two sums do, in one more.

    Args:
        layer: A layer without bias.
        x: Its input.
        y: Its output, not in half precision.
        group: A process group, or None for this process alone.

    Returns:
        The moments, through which gradients flow to ``y``, and the slopes, which are constants.
    """
    if group is None:
        moments = batch_moments(y)
        num_values = y.numel() // y.shape[1]
        patch, product = _patch_sums(layer, x, y, moments.mean)
        return moments, Slopes(patch / num_values, product * (2 / num_values))
    exact = y.double()
    axes = [axis for axis in range(y.dim()) if axis != 1]
    sums = torch.cat([exact.sum(axes), exact.square().sum(axes)])
    with torch.no_grad():
        num_values = y.numel() // y.shape[1]
        own_mean = sums[: y.shape[1]] / num_values
        patch, product = (one.double() for one in _patch_sums(layer, x, y, own_mean.to(y.dtype)))
        # Each process centres by its own mean in the working precision; in float64 that is undone.
        product = product + _spread(patch, layer) * _along_rows(own_mean.to(y.dtype), product)
        constants = [sums.new_full((1,), num_values), patch.flatten(), product.flatten()]
    sums, constants = _SumWithConstants.apply(sums, torch.cat(constants), group)
    count, patch_sum, product_sum = constants.split([1, patch.numel(), product.numel()])
    total, squares = (sums / count).chunk(2)
    variance = (squares - total.square()).clamp_min(0)
    with torch.no_grad():
        mean_slope = patch_sum.view_as(patch) / count
        pulled = _spread(mean_slope, layer) * _along_rows(total, product)
        variance_slope = 2 * (product_sum.view_as(product) / count - pulled)
    return (
        Moments(total.to(y.dtype), variance.to(y.dtype), count),
        Slopes(mean_slope.to(y.dtype), variance_slope.to(y.dtype)),
    )


def inner_products(slopes: Slopes, weight: Tensor) -> Tensor:
    """Return ``<slope, weight>`` over all axes but the channel's: mean and variance ``(*, 2, C)``.

    Args:
        slopes: Slopes with any number of leading axes.
        weight: The layer's weight, not in half precision.
    """
    rows = weight.flatten(1)
    lead = slopes.variance.shape[: slopes.variance.dim() - weight.dim()]
    patches = wide(slopes.mean).reshape(*lead, -1, rows.shape[1])
    # Autocast would take the product of matrices in half precision.
    with torch.autocast(weight.device.type, enabled=False):
        rows_of_groups = rows.view(patches.shape[-2], -1, rows.shape[1])
        of_mean = torch.einsum("...gi,goi->...go", patches, rows_of_groups)
    of_variance = (slopes.variance.reshape(*lead, *rows.shape) * rows).sum(-1)
    return torch.stack([of_mean.flatten(-2), of_variance], dim=-2)


class CrossIterationWindow(nn.Module):
    """The moments of a weight layer's last iterations, with their slopes, in buffers of fixed size.

    Args:
        weight: The layer's weight ``(C, ...)``.
        groups: The layer's groups.
        slots: The number of past iterations kept, at least 0.
        burn_in: For how many iterations the weights move too fast to look back, at least 0.
        warmup: What happens in burn-in: ``"plain"`` keeps nothing, ``"linear"`` lets the number of
            iterations that count grow from 0 to ``slots``.
        compensation: The factor of the first-order terms, at least 0; 0 keeps no slopes.

    Attributes:
        num_iterations: The iterations seen.
        num_stored: The iterations stored; the newest stands in slot ``(num_stored - 1) % slots``.
        moments: Means and variances ``(slots, 2, C)``.
        products: The inner products of the slopes with the weight of their time ``(slots, 2, C)``.
        mean_slopes: ``(slots, groups, in / groups, *kernel)``.
        variance_slopes: ``(slots, *weight.shape)``.
    """

    num_iterations: Tensor
    num_stored: Tensor
    moments: Tensor
    products: Tensor | None
    mean_slopes: Tensor
    variance_slopes: Tensor

    def __init__(
        self,
        weight: Tensor,
        groups: int,
        slots: int,
        burn_in: int,
        warmup: str,
        compensation: float,
    ) -> None:
        super().__init__()
        self.slots = slots
        self.burn_in = burn_in
        self.warmup = warmup
        self.compensation = compensation
        self.register_buffer("num_iterations", torch.zeros_like(weight[0], dtype=torch.long).sum())
        self.register_buffer("num_stored", self.num_iterations.clone())
        self.register_buffer("moments", weight.new_zeros(slots, 2, len(weight)))
        kept = slots > 0 and compensation > 0
        for name, shape in {
            "products": (2, len(weight)),
            "mean_slopes": (groups, *weight.shape[1:]),
            "variance_slopes": weight.shape,
        }.items():
            self.register_buffer(name, weight.new_zeros(slots, *shape) if kept else None)
        self.register_load_state_dict_pre_hook(refuse_broken_statistics)

    @property
    def keeps_slopes(self) -> bool:
        """Whether past moments are carried to the present weight."""
        return self.products is not None

    def is_known_to_burn_in(self) -> bool:
        """Whether this is plain burn-in, as far as one may look without waiting for a device."""
        if self.warmup != "plain" or self.burn_in == 0 or torch.compiler.is_compiling():
            return False
        on_host = self.num_iterations.device.type == "cpu"
        return on_host and int(self.num_iterations) < self.burn_in

    def used(self) -> Tensor:
        """Return which slots count now ``(slots,)``."""
        slot = torch.arange(self.slots, device=self.num_stored.device)
        used = slot < self.num_stored
        if self.burn_in == 0:
            return used
        if self.warmup == "plain":
            return used & (self.num_iterations >= self.burn_in)
        age = (self.num_stored - 1 - slot) % self.slots
        return used & (age < self.slots * (self.num_iterations + 1) // self.burn_in)

    @torch.no_grad()
    def compensated(self, weight: Tensor) -> Tensor:
        """Return past means and variances ``(slots, 2, C)``, carried to the present weight."""
        past = wide(self.moments)
        if self.products is None:
            return past
        slopes = Slopes(self.mean_slopes, self.variance_slopes)
        changes = self.compensation * (inner_products(slopes, wide(weight)) - self.products)
        means = past[:, 0] + changes[:, 0]
        variances = past[:, 1] + changes[:, 1] - changes[:, 0].square()
        return torch.stack([means, variances], dim=1)

    @torch.no_grad()
    def remember(self, moments: Moments, slopes: Slopes | None, weight: Tensor) -> None:
        """Count an iteration, and put it where the oldest one lies."""
        slot = (self.num_stored % self.slots).view(1)
        new = {"moments": torch.stack([moments.mean, moments.variance])}
        if slopes is not None:
            new["products"] = inner_products(slopes, wide(weight))
            new["mean_slopes"], new["variance_slopes"] = slopes
        for name, value in new.items():
            buffer = getattr(self, name)
            buffer.index_copy_(0, slot, value.to(buffer.dtype).unsqueeze(0))
        # In plain burn-in the slot is written, too, but does not count and is written again.
        if self.warmup == "linear":
            self.num_stored.add_(1)
        else:
            self.num_stored.add_(self.num_iterations >= self.burn_in)
        self.num_iterations.add_(1)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return (
            f"slots={self.slots}, burn_in={self.burn_in}, warmup={self.warmup!r}, "
            f"compensation={self.compensation}"
        )


@torch.no_grad()
def _patch_sums(layer: WeightLayer, x: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum(p)``, once a group, and ``sum((y - mean) p)`` in the weight's shape."""
    x = wide(x)
    centred = y - per_channel(mean, y)
    if isinstance(layer, nn.Linear):
        # As a convolution with a kernel of 1: autocast leaves its weight gradient alone.
        x, centred = x.unsqueeze(-1), centred.unsqueeze(-1)
        of_patches = x.sum(0).view(1, -1)
        shape = (*layer.weight.shape, 1)
        product = conv1d_weight(x, shape, centred)
        return of_patches, product.squeeze(-1)
    weight_gradient = _WEIGHT_GRADIENTS[len(layer.kernel_size) - 1]
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    shape = layer.weight.shape
    options = (layer.stride, padding, layer.dilation, layer.groups)
    # All samples meet the same weights, so their sum is as good as one after the other.
    ones = y.new_ones((1, layer.groups, *y.shape[2:]))
    patch_shape = (layer.groups, *shape[1:])
    of_patches = weight_gradient(x.sum(0, keepdim=True), patch_shape, ones, *options)
    return of_patches, weight_gradient(x, shape, centred, *options)


def _along_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def _spread(patch: Tensor, layer: WeightLayer) -> Tensor:
    """Return the slope of the mean in the shape of the weight."""
    return patch.repeat_interleave(layer.weight.shape[0] // groups_of(layer), dim=0)


class _SumWithConstants(torch.autograd.Function):
    """The sums of two tensors over processes in one collective; only the first has a gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, constants: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        ctx.group = group
        total = torch.cat([values, constants])
        distributed.all_reduce(total, group=group)
        values, constants = total.split([values.numel(), constants.numel()])
        ctx.mark_non_differentiable(constants)
        return values, constants

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None, None

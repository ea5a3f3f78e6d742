r"""The layer of batchless normalisation, and how its loss is collected.

Source and departures: `normlab.norms.batchless_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normlab.moments import check_channels, per_channel, wide
from normlab.norms.batchless_likelihood import (
    InjectLoss,
    check_options,
    gaussian_loss,
    inverse_and_log_std,
    moments_about,
    parameter_of_std,
)


def batchless_norm(
    x: Tensor,
    mu: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Standardise with given statistics, which get no gradient; then scale and shift.

    .. math::
        \hat x = (x - \mathrm{sg}(\mu)) \, \mathrm{sg}(1 / \sigma), \quad
        y = \gamma \hat x + \beta

    where sg stops the gradient.

    Args:
        x: Activations ``(N, C, *)``.
        mu: The mean, of a shape that broadcasts against ``x``.
        inverse_std: One over the deviation, like ``mu``.
        weight: The scale gamma, like ``mu``; None for 1.
        bias: The shift beta, like ``mu``; None for 0.

    Returns:
        A tensor of the shape and dtype of ``x``, computed in float32 if that is a half precision.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> batchless_norm(x, torch.tensor(1.0), torch.tensor(0.5)).flatten()
        tensor([0.0000, 0.5000, 1.0000, 2.5000])
    """
    # Four plain operations: torch's fused addcmul is slower where it broadcasts.
    y = (wide(x) - mu.detach()) * inverse_std.detach()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


class BatchlessNorm(nn.Module):
    r"""Normalisation of ``(N, C, *)`` with a learnt mean and deviation, the same in both modes.

    The output is that of `batchless_norm`; the task's loss trains ``weight`` and ``bias`` alone.
    In training each call with gradients adds to the layer's loss, which trains ``mu`` and ``s``:

    .. math::
        z = (\mathrm{sg}(x) - \mu) / \sigma, \quad
        L = \mathrm{mean}_c(\log \sigma_c) + \tfrac12 \mathrm{mean}(z^2)
            - \mathrm{sg}(\mathrm{mean}_c(\log \sigma_c)) - \tfrac12

    .. math::
        \frac{\partial L}{\partial \mu_c} = -\frac{\mathrm{mean}(z_c)}{C \sigma_c}, \quad
        \frac{\partial L}{\partial \log \sigma_c} = \frac{1 - \mathrm{mean}(z_c^2)}{C}

    so that at rest mu and sigma are mean and deviation of the input, whatever its distribution.
    Take the sum over layers with `collect_losses`, after the forward and before the optimiser's
    step, or choose ``inject``.

    Args:
        num_features: The number of channels C.
        eps: Added to the deviation in ``"abs"`` and inside the logarithm in ``"inv"``; above 0.
        std_parametrization: What ``s`` holds: ``"log"``: :math:`\log \sigma`; ``"abs"``:
            :math:`\sigma = |s| + \epsilon`; ``"inv"``: :math:`1 / \sigma = s`, with
            :math:`-\log(|s| + \epsilon)` in the loss.
        use_output_std: Whether a scale is learnt.
        use_output_mean: Whether a shift is learnt.
        gauge_loss: Whether the last two terms are taken off the loss. They make its expectation 0
            where the statistics fit, and change no gradient.
        reduction: ``"mean"`` over channels as above; ``"sum"`` is C times as much, which SGD
            feels and Adam does not.
        nll_weight: A factor of the loss, at least 0.
        inject: Whether the loss's gradient is added in the backward pass of the output instead,
            with weight 1 whatever the objective; `collect_losses` then finds nothing. For loops
            that cannot add a loss, for activation checkpointing, which runs a forward twice, and
            for ``DistributedDataParallel`` with ``find_unused_parameters``. With k accumulated
            micro-steps set ``nll_weight`` to 1 / k; not for scaled losses (float16).
        init_mean: Where every mu starts.
        init_std: Where every sigma starts, above 0.
        shared_axes: The axes of the input that share statistics, the batch's axis 0 always among
            them; None for all but the channels'. Needs ``sample_shape``.
        sample_shape: The shape ``(C, *)`` of one sample, where ``shared_axes`` is given.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ValueError: At construction for an option out of range; at the call for input of another
            shape, of integers, or empty.

    Example:
        >>> layer = BatchlessNorm(1, init_mean=1.0, init_std=2.0)
        >>> y = layer(torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
        >>> loss = collect_losses(layer)
        >>> loss.backward()
        >>> round(loss.item(), 4), layer.mu.grad, layer.s.grad
        (0.4375, tensor([-0.5000]), tensor([-0.8750]))
    """

    _moments: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        std_parametrization: str = "log",
        use_output_std: bool = True,
        use_output_mean: bool = True,
        gauge_loss: bool = True,
        reduction: str = "mean",
        nll_weight: float = 1.0,
        inject: bool = False,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        shared_axes: Sequence[int] | None = None,
        sample_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_options("BatchlessNorm", std_parametrization, reduction, nll_weight)
        for name, value in (("eps", eps), ("init_std", init_std)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"BatchlessNorm({name}={value}): expected a number above 0, got {value}; use "
                    f"{1e-5 if name == 'eps' else 1.0}"
                )
        shape = _statistics_shape(num_features, shared_axes, sample_shape)
        self.num_features = num_features
        self.eps = eps
        self.std_parametrization = std_parametrization
        self.gauge_loss = gauge_loss
        self.reduction = reduction
        self.nll_weight = nll_weight
        self.inject = inject
        self.init_mean = init_mean
        self.init_std = init_std
        self.shared_axes = None if shared_axes is None else tuple(sorted({0, *shared_axes}))
        self.sample_shape = None if sample_shape is None else tuple(sample_shape)
        self.mu = nn.Parameter(torch.empty(shape))
        self.s = nn.Parameter(torch.empty(shape))
        self.weight = nn.Parameter(torch.empty(shape)) if use_output_std else None
        self.bias = nn.Parameter(torch.empty(shape)) if use_output_mean else None
        # All that the loss needs to know of the inputs: the number of calls, and the sums over
        # calls of mean(x - mu) and mean((x - mu)^2). So no graph outlives a call, a copy holds
        # none, and a compiled call is always the same.
        self.register_buffer("_moments", torch.empty(3, *shape), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set statistics, scale and shift to their starting values."""
        self.set_statistics(
            torch.full_like(self.mu, self.init_mean), torch.full_like(self.s, self.init_std)
        )
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, *)``; in training add to the loss of the layer."""
        self._check(x)
        mu = self.align(wide(self.mu.detach()), x)
        weight = None if self.weight is None else self.align(self.weight, x)
        bias = None if self.bias is None else self.align(self.bias, x)
        y = batchless_norm(x, mu, self.align(self._inverse_std(), x), weight, bias)
        if self.training and torch.is_grad_enabled():
            moments = moments_about(mu, wide(x), self.reduced_axes(x)).reshape(self._moments.shape)
            if self.inject:
                y = InjectLoss.apply(y, self._loss(moments))
            else:
                self._moments.add_(moments)
        return y

    @property
    def layer_loss(self) -> Tensor:
        """The loss since it was last cleared, summed over calls; 0 if there was none.

        It is formed when it is asked for, from the moments of the calls and from the parameters,
        which must be those of the calls: ask before the optimiser's step.
        """
        return self._loss(self._moments.clone())

    def clear_loss(self) -> None:
        """Forget the calls so far."""
        self._moments.zero_()

    def _loss(self, moments: Tensor) -> Tensor:
        loss = gaussian_loss(
            moments,
            self.mu,
            self.s,
            std_parametrization=self.std_parametrization,
            eps=self.eps,
            gauge_loss=self.gauge_loss,
            reduction=self.reduction,
        )
        return loss if self.nll_weight == 1 else self.nll_weight * loss

    def _inverse_std(self) -> Tensor:
        return inverse_and_log_std(self.s.detach(), self.std_parametrization, self.eps)[0]

    @property
    def std(self) -> Tensor:
        """The deviation sigma, of the shape of ``mu``, without gradient."""
        return self._inverse_std().abs().reciprocal()

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and deviation, and forget any loss; the function of the layer changes.

        Args:
            mean: The mean, of the shape of ``mu``.
            std: The deviation, like ``mean``, above 0.
        """
        self.mu.copy_(mean)
        self.s.copy_(parameter_of_std(std, self.std_parametrization, self.eps))
        self.clear_loss()

    @torch.no_grad()
    def move_statistics(self, mean: Tensor, std: Tensor) -> None:
        r"""Set mean and deviation, and scale and shift such that the layer's function stays.

        .. math::
            \gamma' = \gamma \sigma' / \sigma, \quad \beta' = \beta + \gamma (\mu' - \mu) / \sigma

        Args:
            mean: The mean, of the shape of ``mu``.
            std: The deviation, like ``mean``, above 0.

        Raises:
            ValueError: The layer has no scale or no shift.
        """
        if self.weight is None or self.bias is None:
            raise ValueError(
                "move_statistics(layer): expected a BatchlessNorm with scale and shift, got "
                f"{self}; only with both can its function stay, or call set_statistics"
            )
        # Copies: in double precision these would be views of what is about to change.
        mu, inverse = self.mu.double().clone(), self._inverse_std().double().clone()
        self.set_statistics(mean, std)
        # The statistics as they were rounded, so that their rounding is made up for, too.
        new_mu, new_inverse = self.mu.double(), self._inverse_std().double()
        weight = self.weight.double()
        self.bias.copy_(self.bias.double() + weight * (new_mu - mu) * inverse)
        self.weight.copy_(weight * inverse / new_inverse)

    def align(self, values: Tensor, x: Tensor) -> Tensor:
        """Return ``values`` of the shape of ``mu`` as a view that broadcasts against ``x``."""
        return per_channel(values, x) if self.shared_axes is None else values

    def reduced_axes(self, x: Tensor) -> list[int]:
        """Return the axes of ``x`` over which one value of ``mu`` is the mean."""
        return [
            axis
            for axis in range(x.dim())
            if (axis != 1 if self.shared_axes is None else axis in self.shared_axes)
        ]

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        shown = f"{self.num_features}, std_parametrization={self.std_parametrization!r}"
        shown += f", use_output_std={self.weight is not None}"
        shown += f", use_output_mean={self.bias is not None}"
        if self.shared_axes is not None:
            shown += f", shared_axes={self.shared_axes}, sample_shape={self.sample_shape}"
        return shown

    def _check(self, x: Tensor) -> None:
        check_channels("BatchlessNorm", x, self.num_features)
        if self.sample_shape is not None and tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"BatchlessNorm(input): expected shape (N, {', '.join(map(str, self.sample_shape))}"
                f"), got {tuple(x.shape)}; set sample_shape to the shape of one sample"
            )


def collect_losses(model: nn.Module, *, silent: bool = False) -> Tensor:
    """Return the sum of the layers' losses since the last collection, and clear them.

    Add it to the task's loss after the forward, before the optimiser's step. With gradients
    accumulated over k micro-steps, collect in each of them and divide by k as the task's loss is:
    the gradients then equal those of the large batch. Under ``DistributedDataParallel`` the losses
    of the processes are averaged as the task's are.

    Args:
        model: A model with `BatchlessNorm` layers, wrapped or not.
        silent: Whether to take the value off, so that the reported loss stays the task's; the
            gradients are the same.

    Returns:
        A scalar; 0 where no layer was called in training with gradients.

    Raises:
        ValueError: The model has no such layer.

    Example:
        >>> model = nn.Sequential(BatchlessNorm(3), nn.ReLU())
        >>> loss = model(torch.randn(2, 3)).sum() + collect_losses(model)
        >>> collect_losses(model).item()
        0.0
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            "collect_losses(model): expected a model with BatchlessNorm layers, got "
            f"{type(model).__name__} without any; leave the extra loss out"
        )
    losses = [layer.layer_loss for layer in layers]
    for layer in layers:
        layer.clear_loss()
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total - total.detach() if silent else total


def statistics_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return mu and s of every `BatchlessNorm` layer: no weight decay belongs on them.

    Example:
        >>> len(statistics_parameters(nn.Sequential(BatchlessNorm(3), BatchlessNorm(3))))
        4
    """
    return [parameter for layer in layers_of(model) for parameter in (layer.mu, layer.s)]


def layers_of(model: nn.Module) -> list[BatchlessNorm]:
    """Return the layers of a model, each once."""
    return [module for module in model.modules() if isinstance(module, BatchlessNorm)]


def _statistics_shape(
    num_features: int, shared_axes: Sequence[int] | None, sample_shape: Sequence[int] | None
) -> tuple[int, ...]:
    if shared_axes is None and sample_shape is None:
        return (num_features,)
    if shared_axes is None or sample_shape is None:
        raise ValueError(
            f"BatchlessNorm(shared_axes={shared_axes}, sample_shape={sample_shape}): expected both "
            "or neither, got one; give the shape (C, *) of a sample beside the shared axes"
        )
    if sample_shape[0] != num_features:
        raise ValueError(
            f"BatchlessNorm(sample_shape={tuple(sample_shape)}): expected {num_features} channels "
            f"first, got {sample_shape[0]}; give (C, *) without the batch"
        )
    if not set(shared_axes) <= set(range(len(sample_shape) + 1)):
        raise ValueError(
            f"BatchlessNorm(shared_axes={tuple(shared_axes)}): expected axes from 0 to "
            f"{len(sample_shape)}, got others; count the batch's axis as 0, the channels' as 1"
        )
    return tuple(1 if i + 1 in shared_axes else size for i, size in enumerate(sample_shape))

r"""Class standardisation, the layer of `normlab.norms.class_norm`: equation 9 of the paper."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from normlab.moments import (
    Moments,
    batch_moments,
    check_channels,
    check_momentum,
    group_of_several,
    refuse_broken_statistics,
    wide,
)

DivideBy: TypeAlias = Literal["deviation", "variance"]


def class_standardize(h: Tensor, eps: float = 1e-5, *, divide_by: DivideBy = "deviation") -> Tensor:
    r"""Standardise each unit over the classes (the paper's equation 9).

    .. math::
        S(h)_c = (h_c - m) / \sqrt{v + \epsilon}, \quad
        m = \tfrac1K \sum_c h_c, \quad v = \tfrac1K \sum_c (h_c - m)^2

    Args:
        h: Hidden units ``(K, H)`` of K classes, at least two.
        eps: Added to the variance.
        divide_by: ``"variance"`` for the notebook's :math:`(h_c - m) / (v' + \epsilon)` with the
            unbiased variance v'.

    Returns:
        A tensor of the shape and dtype of ``h``; the statistics are taken in float32 if ``h`` has
        a half precision.

    Raises:
        ValueError: There is a single class, which would always become 0.

    Example:
        >>> class_standardize(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).flatten()
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    check_divide_by("class_standardize", divide_by)
    check_rows("class_standardize", h, h.shape[-1] if h.dim() else 1)
    _check_several("class_standardize", h)
    moments = batch_moments(h)
    kept = moments.variance if divide_by == "deviation" else _unbiased(moments)
    return _standardize(h, moments.mean, kept, eps, divide_by)


def _standardize(
    h: Tensor, mean: Tensor, variance: Tensor, eps: float, divide_by: DivideBy
) -> Tensor:
    scale = torch.rsqrt(variance + eps) if divide_by == "deviation" else 1 / (variance + eps)
    return ((wide(h) - mean) * scale).to(h.dtype)


def _unbiased(moments: Moments) -> Tensor:
    return moments.variance * (moments.num_values / (moments.num_values - 1))


class ClassStandardization(nn.Module):
    """Standardises each unit of ``(K, H)`` over the K classes, with running statistics for later.

    Evaluation uses the running statistics, so that the prototype of a class does not depend on
    which others are looked at. There is no scale and no shift. By default the layer computes what
    ``nn.BatchNorm1d(num_features, affine=False)`` does, with the same buffers.

    Args:
        num_features: The number of units H.
        eps: Added to the variance, above 0.
        momentum: The weight of the newest statistics in the running ones, in [0, 1]; None makes
            them plain averages.
        divide_by: As in `class_standardize`.
        divided: Whether each process holds a part of the classes. Where every process embeds all
            of them, as is usual, its own statistics are those of all classes already.
        process_group: The processes that share statistics if the classes are ``divided``; None
            for all of them, looked up at each call.

    Shape:
        Input and output ``(K, H)``.

    Raises:
        ValueError: At construction for an option out of range; at the call for input of another
            shape, of integers, or empty, and in training for a single class; at loading for
            running statistics that are not finite or negative variances.

    Example:
        >>> layer = ClassStandardization(8)
        >>> layer(torch.randn(50, 8)).mean(0).abs().max() < 1e-6
        tensor(True)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        divide_by: DivideBy = "deviation",
        divided: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_divide_by("ClassStandardization", divide_by)
        if not 0 < eps < math.inf:
            raise ValueError(
                f"ClassStandardization(eps={eps!r}): expected a finite number above 0, got "
                f"{eps!r}; use 1e-5"
            )
        check_momentum("ClassStandardization", momentum)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.divide_by: DivideBy = divide_by
        self.divided = divided
        self.process_group = process_group
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_load_state_dict_pre_hook(refuse_broken_statistics)

    def forward(self, h: Tensor) -> Tensor:
        """Standardise ``h`` of shape ``(K, H)``."""
        check_rows("ClassStandardization", h, self.num_features)
        if not self.training:
            mean, variance = wide(self.running_mean), wide(self.running_var)
            return _standardize(h, mean, variance, self.eps, self.divide_by)
        group = group_of_several(self.process_group) if self.divided else None
        if group is None:
            _check_several("ClassStandardization", h)
        moments = batch_moments(h, group)
        unbiased = _unbiased(moments)
        self._track(moments.mean, unbiased)
        variance = moments.variance if self.divide_by == "deviation" else unbiased
        return _standardize(h, moments.mean, variance.to(moments.mean), self.eps, self.divide_by)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"divide_by={self.divide_by!r}"
        )


def check_divide_by(operation: str, divide_by: str) -> None:
    """Refuse an unknown ``divide_by``, in the name of ``operation``."""
    if divide_by not in ("deviation", "variance"):
        raise ValueError(
            f"{operation}(divide_by={divide_by!r}): expected 'deviation' or 'variance', got "
            f"{divide_by!r}; use 'deviation'"
        )


def check_rows(operation: str, rows: Tensor, num_columns: int) -> None:
    """Refuse what is not floating point of shape ``(K, num_columns)`` with ``K > 0``."""
    check_channels(operation, rows, num_columns)
    if rows.dim() != 2:
        raise ValueError(
            f"{operation}(input): expected shape (K, {num_columns}), one row for each class, got "
            f"{tuple(rows.shape)}; this is no layer for images"
        )


def _check_several(operation: str, h: Tensor) -> None:
    if len(h) < 2:
        raise ValueError(
            f"{operation}(input): expected at least two classes in training, got {len(h)}; "
            "embed all the classes of a step at once, or call .eval()"
        )

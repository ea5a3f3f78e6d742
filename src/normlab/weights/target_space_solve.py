"""The ridge solve of target space: the weights that come closest to wanted sums."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_weights(rows: Tensor, targets: Tensor, ridge: float) -> Tensor:
    r"""Return the ridge solution for wanted sums, differentiable in rows and targets.

    .. math::
        W = \arg\min_W \lVert A W - T \rVert_F^2 + \lambda \lVert W \rVert_F^2
          = (A^\top A + \lambda I)^{-1} A^\top T
          = A^\top (A A^\top + \lambda I)^{-1} T

    Of the two forms the one with the smaller system is solved, by Cholesky's factors. A ridge of
    zero takes the pseudo-inverse, which is the limit of both: the shortest of the W that come
    closest.

    Args:
        rows: A of shape ``(*, R, C)``.
        targets: T of shape ``(*, R, D)``, of the same dtype.
        ridge: The ridge :math:`\lambda`, at least 0; not divided by the number of rows.

    Returns:
        W of shape ``(*, C, D)``; NaN where rows or targets are not finite.

    Raises:
        ValueError: The system is singular in this precision.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> solve_weights(rows, torch.tensor([[3.0], [5.0]]), ridge=1.0)
        tensor([[1.5000],
                [2.0000]])
    """
    if ridge == 0:
        if not (torch.isfinite(rows).all() and torch.isfinite(targets).all()):
            return _undefined(rows, targets)
        return torch.linalg.pinv(rows) @ targets
    if rows.shape[-1] <= rows.shape[-2]:
        return _solve_regularised(rows.mT @ rows, rows.mT @ targets, ridge)
    return rows.mT @ _solve_regularised(rows @ rows.mT, targets, ridge)


def _solve_regularised(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Return ``(gram + ridge I)^-1 right``."""
    size = gram.shape[-1]
    system = gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not failed.any():
        return torch.cholesky_solve(right, factor)
    # Training that diverged shows as a loss that is not finite, as with ordinary weights.
    if not torch.isfinite(system).all():
        return _undefined(gram, right)
    if gram.dtype != torch.float64:
        return _solve_regularised(gram.double(), right.double(), ridge).to(gram.dtype)
    raise ValueError(
        f"solve_weights(ridge={ridge}): expected a ridge that outweighs the rounding of the "
        f"realisation's {size} x {size} products, got one too small for them; raise ridge"
    )


def _undefined(left: Tensor, right: Tensor) -> Tensor:
    # Depends on both, so that a backward pass still finds its way.
    return left.mT @ right + torch.nan

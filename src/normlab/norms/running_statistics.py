r"""The running statistics of batch normalisation, updated for several batches in one step.

.. math::
    r \leftarrow (1 - a)\, r + a\, s_g \quad\text{for } g = 1 \dots G
    \qquad\Longleftrightarrow\qquad
    r \leftarrow (1 - a)^G r + \sum_g a (1 - a)^{G-g} s_g

with a = ``momentum``. Where that is None, all batches ever seen count the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.moments import wide


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, means: Tensor, variances: Tensor) -> None:
    """Update the buffers of a layer as G training batches in a row would.

    Args:
        norm: The layer; without running statistics nothing is done.
        means: The means of the batches ``(G, C)``, the oldest first.
        variances: Their unbiased variances ``(G, C)``.

    Example:
        >>> norm = torch.nn.BatchNorm1d(1, momentum=0.5)
        >>> update_running_statistics(norm, torch.tensor([[4.0], [8.0]]), torch.ones(2, 1))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([5.]), tensor(2))
    """
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    count = len(means)
    norm.num_batches_tracked.add_(count)
    if norm.momentum is None:
        shares = means.new_ones(count) / norm.num_batches_tracked.to(means)
        kept = 1 - count / norm.num_batches_tracked.to(means)
    else:
        age = torch.arange(count - 1, -1, -1, device=means.device)
        shares = norm.momentum * (1 - norm.momentum) ** age.to(means)
        kept = (1 - norm.momentum) ** count
    for running, new in ((norm.running_mean, means), (norm.running_var, variances)):
        running.copy_(kept * wide(running) + (shares[:, None] * new).sum(0))

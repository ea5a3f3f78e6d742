r"""The shifted rectified linear unit, which ELU is compared with: a ReLU moved down its diagonal.

.. math::
    f(x) = \max(-1, x)

It has the range of an ELU with alpha 1, so that mean activations come near zero as well, with a
corner in place of the exponential.

Source: D.-A. Clevert, T. Unterthiner, S. Hochreiter, "Fast and Accurate Deep Network Learning by
Exponential Linear Units (ELUs)", 2015, arXiv 1511.07289.
"""

from __future__ import annotations

from torch import Tensor, nn


def srelu(x: Tensor) -> Tensor:
    r"""Return :math:`\max(-1, x)` by element.

    Args:
        x: A tensor of any shape.

    Returns:
        A tensor like ``x``.

    Example:
        >>> import torch
        >>> srelu(torch.tensor([-2.0, -0.5, 3.0]))
        tensor([-1.0000, -0.5000,  3.0000])
    """
    return x.clamp(min=-1)


class SReLU(nn.Module):
    r"""The activation :math:`\max(-1, x)`; without state.

    Shape:
        Input and output of any shape.

    Example:
        >>> import torch
        >>> SReLU()(torch.tensor([-2.0, 3.0]))
        tensor([-1.,  3.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        return srelu(x)

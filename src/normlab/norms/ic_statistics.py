r"""What independent dropout does to the dependence between two neurons, in closed form.

With keep probability p, masks g independent of each other and of everything, and
:math:`\tilde x_i = g_i x_i` (scaling by 1 / p changes none of the statements):

.. math::
    I(\tilde x_i; \tilde x_j) = p^2 I(x_i; x_j), \quad
    H(\tilde x_i) = p H(x_i) + H_b(p), \quad
    \mathrm{corr}(\tilde x_i, \tilde x_j) = p \, \mathrm{corr}(x_i, x_j)

with the binary entropy :math:`H_b`. The first two need P(x = 0) = 0: then the mask can be read off,
and only the event "both kept" carries information. A raw ReLU output has an atom at zero; batch
normalisation after the ReLU moves it away. The last needs zero mean, which batch normalisation
supplies until it has learnt a shift.

Source: G. Chen, P. Chen, Y. Shi, C.-Y. Hsieh, B. Liao, S. Zhang, "Rethinking the Usage of Batch
Normalization and Dropout in the Training of Deep Neural Networks", 2019, arXiv 1905.05928.

Departs:
    - The correlation is given for any mean; the paper's form is the one for mean 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    r"""Return :math:`H = -\sum_k q_k \ln q_k` in nats; :math:`0 \ln 0` is 0.

    Args:
        probabilities: A table of probabilities of any shape, with sum 1.

    Returns:
        A scalar.
    """
    return -torch.special.xlogy(probabilities, probabilities).sum()


def mutual_information(joint: Tensor) -> Tensor:
    r"""Return :math:`I(x; y) = H(x) + H(y) - H(x, y)` in nats.

    Args:
        joint: The probability of each pair of values ``(X, Y)``, with sum 1.

    Returns:
        A scalar.

    Example:
        >>> joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
        >>> f"{mutual_information(joint):.9f}"
        '0.192744757'
    """
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint)


def masked_joint(joint: Tensor, keep: float) -> Tensor:
    """Return the joint distribution after both variables were dropped independently.

    Args:
        joint: The probability of each pair of values ``(X, Y)``, none of which is zero.
        keep: The probability p that a variable stays, from 0 to 1.

    Returns:
        A table ``(1 + X, 1 + Y)`` whose first row and column stand for the value 0.

    Example:
        >>> masked_joint(torch.tensor([[1.0]]), 0.5)
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    drop = 1 - keep
    masked = joint.new_empty(joint.shape[0] + 1, joint.shape[1] + 1)
    masked[1:, 1:] = keep * keep * joint
    masked[1:, 0] = keep * drop * joint.sum(1)
    masked[0, 1:] = drop * keep * joint.sum(0)
    masked[0, 0] = drop * drop
    return masked


def correlation_after_dropout(
    correlation: float, keep: float, mean: float = 0.0, variance: float = 1.0
) -> float:
    r"""Return the correlation of two variables after independent dropout.

    .. math::
        c \to \frac{p \, c \, s^2}{s^2 + (1 - p) \mu^2}

    Args:
        correlation: The correlation c before.
        keep: The probability p that a variable stays, above 0.
        mean: The mean mu of both.
        variance: The variance s^2 of both, above 0.

    Returns:
        The correlation after; ``keep * correlation`` where the mean is 0.

    Example:
        >>> round(correlation_after_dropout(0.8, 0.6, mean=1.0), 6)
        0.342857
    """
    return keep * correlation * variance / (variance + (1 - keep) * mean**2)

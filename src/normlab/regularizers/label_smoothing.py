r"""Label smoothing: give each class a small share of the target, so that no logit need run away.

.. math::
    q'(k) = (1 - \epsilon) \, q(k) + \frac{\epsilon}{K}

where q is one-hot. The cross-entropy is then :math:`(1 - \epsilon) H(q, p) + \epsilon H(u, p)` with
u uniform, smallest at a finite distance between the logits, and its gradient by them is p - q'.

Source: C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, "Rethinking the Inception
Architecture for Computer Vision", 2015, arXiv 1512.00567.

Departs:
    - The targets become probabilities, with the same loss as the ``label_smoothing`` of torch's
      cross-entropy; so it composes with mixup, before it or after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normlab.method import Card, Method, Setting, Source


def smooth_labels(
    targets: Tensor,
    num_classes: int,
    smoothing: float = 0.1,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Return targets of which every class has its share.

    Args:
        targets: Class numbers ``(N,)``, or probabilities ``(N, num_classes)``.
        num_classes: The number K of classes.
        smoothing: The share :math:`\epsilon` that all classes divide, from 0 to 1.
        dtype: That of the result for class numbers; probabilities keep theirs.

    Returns:
        Probabilities ``(N, num_classes)``, for ``torch.nn.functional.cross_entropy``.

    Raises:
        ValueError: ``smoothing`` is out of its range, or the targets are neither class numbers
            below ``num_classes`` nor probabilities.

    Example:
        >>> smooth_labels(torch.tensor([2, 0]), 4, 0.2)
        tensor([[0.0500, 0.0500, 0.8500, 0.0500],
                [0.8500, 0.0500, 0.0500, 0.0500]])
    """
    _check(targets, num_classes, smoothing)
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets.long(), num_classes).to(dtype)
    return (1 - smoothing) * targets + smoothing / num_classes


def _check(targets: Tensor, num_classes: int, smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"smooth_labels(smoothing={smoothing}): expected a share from 0 to 1, got {smoothing}; "
            "use 0.1"
        )
    numbers = targets.dim() == 1 and not torch.is_floating_point(targets)
    probabilities = (
        targets.dim() == 2 and targets.shape[1] == num_classes and torch.is_floating_point(targets)
    )
    if not numbers and not probabilities:
        raise ValueError(
            f"smooth_labels(targets, num_classes={num_classes}): expected class numbers (N,) or "
            f"probabilities (N, {num_classes}), got {targets.dtype} of shape "
            f"{tuple(targets.shape)}; give one for each sample"
        )
    if numbers and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"smooth_labels(targets, num_classes={num_classes}): expected class numbers from 0 to "
            f"{num_classes - 1}, got {int(targets.min())} to {int(targets.max())}; "
            "give the number of classes"
        )


def batch(
    inputs: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    setting: Setting,
    *,
    smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Smooth the targets of one training batch; see `smooth_labels`."""
    kind = torch.float32
    if torch.is_floating_point(inputs):
        kind = torch.promote_types(inputs.dtype, torch.float32)
    return inputs, smooth_labels(targets, setting.num_classes, smoothing, dtype=kind)


CARD = Card(
    name="label-smoothing",
    title="Label smoothing",
    summary="Gives every class a small share of each training target.",
    room="regularizers",
    source=Source(
        authors="C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna",
        title="Rethinking the Inception Architecture for Computer Vision",
        year=2015,
        arxiv="1512.00567",
        venue="CVPR 2016",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    best_for="Classifiers with many classes and long trainings, which grow too sure of themselves.",
    limits=(
        "The training loss does not go to zero.",
        "Probabilities are less sharp: calibrate them anew before a threshold that was set without "
        "it is used.",
    ),
    departures=(
        "The targets become probabilities, which gives the loss that torch's cross-entropy gives "
        "with its own label smoothing.",
    ),
)

METHOD = Method(card=CARD, batch=batch)

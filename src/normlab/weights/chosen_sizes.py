"""Sizes of weights that an initialisation chose, and that a normalised weight forgets."""

from __future__ import annotations

from torch import nn

from normlab.method import Setting


def report_lost_sizes(model: nn.Module, setting: Setting) -> None:
    """Say so where weights start at zero, before they are normalised.

    Initialisations that zero the last weight of a branch, as Fixup's, choose the sizes of the
    others to go with it; what divides a weight by its size loses them.

    Args:
        model: The model, its weights as yet plain.
        setting: Is told.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> report_lost_sizes(layer, Setting(batches=(), say=print))
        weights that start at zero: 1; if fixup chose the sizes of the others, they are lost
    """
    zeros = sum(not p.any() for p in model.parameters() if p.dim() > 1)
    if zeros:
        setting.say(
            f"weights that start at zero: {zeros}; if fixup chose the sizes of the others, they "
            "are lost"
        )

"""Replace modules of a model by others, everywhere they are registered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from normlab.method import Unsuitable

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""torch's batch normalisation layers, by exact class: a subclass may do more than normalise."""


def modules_of(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Return the modules of exactly one of ``classes``, each once, by their first name."""
    return {name: module for name, module in model.named_modules() if type(module) in classes}


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement where the old module is registered.

    A module that is registered several times, in one parent or in many, is replaced everywhere by
    the same new module. A replacement takes over device, dtype and mode of the old module's
    parameters; it may hold the old module, which is not searched again.

    Args:
        model: The model, changed in place.
        replacements: Old module to new module.

    Returns:
        ``model``, or its replacement if the root itself is one of the old modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> swap(model, {model[1]: nn.ELU()})
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ELU(alpha=1.0)
        )
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in replacements
    ]
    for old, new in replacements.items():
        adopt(new, old)
    for parent, name, child in places:
        assert child is not None
        parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give ``new`` the device, dtype and mode of ``old``; returns ``new``."""
    tensors = [*old.parameters(), *old.buffers()]
    like = next((tensor for tensor in tensors if torch.is_floating_point(tensor)), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    return new.train(old.training)


def keep_affine(new: nn.Module, old: nn.Module) -> None:
    """Copy scale and shift of a normaliser into its replacement, where the old one has them."""
    with torch.no_grad():
        for name in ("weight", "bias"):
            kept = getattr(old, name)
            if kept is not None:
                getattr(new, name).copy_(kept)


def swap_batch_norms(
    model: nn.Module, make: Callable[[str, nn.Module], nn.Module], operation: str
) -> nn.Module:
    """Replace every batch normalisation layer of torch by what ``make(name, layer)`` returns.

    Args:
        model: The model, changed in place.
        make: Returns the new layer; raises `Unsuitable` where it cannot.
        operation: The name of the method that asks, for messages.

    Returns:
        The model.

    Raises:
        Unsuitable: The model has no batch normalisation layer. Nothing is changed then, nor
            where ``make`` raises.
    """
    norms = batch_norms(model, operation)
    return swap(model, {norm: make(name, norm) for name, norm in norms.items()})


def batch_norms(model: nn.Module, operation: str) -> dict[str, nn.Module]:
    """Return torch's batch normalisation layers by name; `Unsuitable` where there is none."""
    norms = modules_of(model, BATCH_NORMS)
    if not norms:
        raise Unsuitable(
            f"{operation}(model): expected a model with nn.BatchNorm layers, got "
            f"{type(model).__name__} without any; write the model with nn.BatchNorm1d/2d/3d "
            "where a normaliser belongs"
        )
    return norms

"""The model around target layers: holds the realisation batch and has the weights solved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.surgery.flow import evaluating
from normlab.surgery.swap import swap
from normlab.weights.target_space_layer import Pass, Solved, TargetLayer


class _Kept(NamedTuple):
    """Solved weights, and all that they were solved from."""

    values: list[Tensor]
    options: list[Any]
    solved: dict[TargetLayer, Solved]


class TargetSpace(nn.Module):
    """A model with target layers and the realisation batch from which their weights are solved.

    Every call passes the realisation batch through the model first, in evaluation mode, to solve
    the weights, and then ``x``, in the model's own mode. Without gradients the weights are kept
    until a parameter, a buffer or an option of a layer has another value.

    Args:
        model: A model with target layers, each called once in a forward pass, and possibly
            ordinary layers.
        realisation: The realisation batch, as the model's forward takes it; it is saved with the
            model and not trained.
        project: Whether to make the targets reachable first, see `project`.

    Shape:
        What the model's forward takes and returns, for any number of samples.

    Raises:
        ValueError: A model without target layers or with batch normalisation, an empty
            realisation batch, or one of another size than the targets.

    Example:
        >>> from normlab.weights.target_space_layer import TargetLinear
        >>> model = nn.Sequential(TargetLinear(4, 8, rows=6), nn.Tanh(), TargetLinear(8, 2, rows=6))
        >>> model = TargetSpace(model, torch.randn(6, 4))
        >>> model(torch.randn(50, 4)).shape
        torch.Size([50, 2])
        >>> model.to_weight_space()
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): Tanh()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """

    realisation: Tensor

    def __init__(self, model: nn.Module, realisation: Tensor, *, project: bool = True) -> None:
        super().__init__()
        norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
        if norms:
            raise ValueError(
                "TargetSpace(model): expected a model without batch normalisation, got "
                f"{', '.join(norms)}; take it out, the bias of the layer does its work"
            )
        if not any(isinstance(module, TargetLayer) for module in model.modules()):
            raise ValueError(
                "TargetSpace(model): expected a model with target layers, got "
                f"{type(model).__name__} without any; convert it with target_space"
            )
        check_realisation("TargetSpace", realisation)
        self.model = model
        self.register_buffer("realisation", realisation.detach().clone())
        self._kept: _Kept | None = None
        if project:
            self.project()
        else:
            with torch.no_grad(), self._weights():
                pass

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output for ``x``, with the weights that the targets give."""
        with self._weights():
            return self.model(x)

    def layers(self) -> list[TargetLayer]:
        """Return the target layers."""
        return [module for module in self.model.modules() if isinstance(module, TargetLayer)]

    @torch.no_grad()
    def project(self) -> None:
        """Set the targets, layer by layer, to the sums that are achieved for them.

        Each layer's weights are solved, its targets become the sums, and the weights are solved
        again from these before the batch goes on to the next layer.
        """
        with self._realised("project"):
            pass

    @torch.no_grad()
    def to_weight_space(self) -> nn.Module:
        """Return a copy of the model in which torch's layers have the place of target layers.

        It computes the same for any input and trains on as an ordinary network.
        """
        with self._weights():
            exported = copy.deepcopy(self.model)
            plain: dict[nn.Module, nn.Module] = {}
            for one, layer in zip(exported.modules(), self.model.modules(), strict=True):
                if isinstance(layer, TargetLayer):
                    assert layer._solved is not None
                    plain[one] = dressed(layer.to_weight_space(layer._solved), one)
        for module in exported.modules():
            if isinstance(module, TargetLayer):
                module._solved = None
        return swap(exported, plain)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Hold the weights in the layers, solved or kept from before."""
        if torch.is_grad_enabled():
            self._kept = None
            with self._realised("solve"):
                yield
            return
        values, options = [*self.parameters(), *self.buffers()], self._options()
        kept = self._kept
        if kept is not None and kept.options == options and _same(values, kept.values):
            for layer, solved in kept.solved.items():
                layer._solved = solved
            try:
                yield
            finally:
                self._forget()
            return
        with self._realised("solve"):
            held = {layer: layer._solved for layer in self.layers()}
            solved = {layer: one for layer, one in held.items() if one is not None}
            # By value: an optimiser, a checkpoint or `tensor.data` may change them unseen.
            self._kept = _Kept([value.detach().clone() for value in values], options, solved)
            yield

    def _options(self) -> list[Any]:
        return [(one.ridge, one.relative, one.mode, one.float64) for one in self.layers()]

    @contextmanager
    def _realised(self, purpose: Pass) -> Iterator[None]:
        """Pass the realisation batch through the model; its weights last as long as the block."""
        layers = self.layers()
        try:
            for layer in layers:
                layer._pass = purpose
            device = self.realisation.device.type
            with evaluating(self.model), torch.autocast(device, enabled=False):
                self.model(self.realisation)
            for layer in layers:
                layer._pass = None
            yield
        finally:
            self._forget()

    def _forget(self) -> None:
        for layer in self.layers():
            layer._pass, layer._solved = None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def dressed(new: nn.Module, old: nn.Module) -> nn.Module:
    """Hand the forward hooks of a layer, and children that they use, on to another layer."""
    for hooks in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(new, hooks).update(getattr(old, hooks))
    for name, child in old.named_children():
        new.add_module(name, child)
    return new


def check_realisation(operation: str, realisation: Tensor) -> None:
    """Refuse a realisation batch without samples."""
    if realisation.dim() < 2 or realisation.numel() == 0:
        raise ValueError(
            f"{operation}(realisation): expected at least one sample, shape (N, *), got shape "
            f"{tuple(realisation.shape)}; give some of the training samples"
        )


def _same(values: list[Tensor], kept: list[Tensor]) -> bool:
    return len(values) == len(kept) and all(
        one.dtype == two.dtype and one.device == two.device and torch.equal(one, two)
        for one, two in zip(values, kept, strict=True)
    )

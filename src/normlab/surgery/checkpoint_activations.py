r"""Activation checkpointing: keep a few activations of a long run of layers, recompute the others.

A run of L layers called in a row is cut into about :math:`\sqrt L` segments. The forward pass keeps
what goes into each segment; the backward pass computes a segment once more before it goes through
it. Memory falls from the order of L to that of :math:`\sqrt L`, for one more forward pass.

Source: T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost",
2016, arXiv 1604.06174.

Departs:
    - Segments need not be of one length: they are chosen so that what is kept for all of them and
      the largest one together are least, by what each layer saves if an example tells it.
    - The second pass sees the buffers that the first one saw and leaves them as they are, so that
      running statistics are moved once.
    - The last segment is not recomputed: backward starts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normlab.surgery.flow import evaluating
from normlab.surgery.segments import Layer, choose_segments

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CheckpointedSequential(nn.Sequential):
    """An ``nn.Sequential`` that computes its layers in segments, most of which are recomputed.

    `checkpoint_activations` makes it out of an ``nn.Sequential`` by a change of class, so children,
    names and hooks stay; ``module.__class__ = nn.Sequential`` undoes it.
    """

    segments: tuple[_Segment, ...] = ()
    layers: tuple[str, ...] = ()

    def forward(self, input: Any) -> Any:
        """Return what the layers in a row make of the input.

        Raises:
            ValueError: Layers were put in or taken out since it was planned.
        """
        if not torch.is_grad_enabled():
            return super().forward(input)
        present = tuple(_names(self, whole_if_hooked=False))
        if present != self.layers:
            raise ValueError(
                "CheckpointedSequential.forward(input): expected the layers it was planned with, "
                f"got {len(present)} of them; call checkpoint_activations(model) again"
            )
        called: set[str] = set()
        for names, recomputed in self.segments:
            own = dict.fromkeys(_called_for(self, name) for name in names)
            layers = [self.get_submodule(name) for name in own if name not in called]
            called.update(own)
            if recomputed and layers:
                run, contexts = partial(_run, layers), partial(_contexts, layers)
                input = checkpoint(run, input, use_reentrant=False, context_fn=contexts)
            else:
                input = _run(layers, input)
        return input


class _Segment(NamedTuple):
    """Names of layers in a row; ``recomputed`` unless they are the last ones before backward."""

    names: tuple[str, ...]
    recomputed: bool


def _run(layers: Sequence[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def checkpoint_activations(
    model: nn.Module, segments: int | None = None, *, example: Tensor | None = None
) -> nn.Module:
    """Let the runs of layers in a model recompute their activations in the backward pass.

    A run is an ``nn.Sequential`` of at least two layers; a Sequential directly in a Sequential
    belongs to the same run. Outputs and gradients stay what they are: dropout draws the same mask
    again, running statistics move once, stochastic depth keeps its gates.

    Left alone are: all that is called by a model's own code rather than by a Sequential (stem,
    readout, the inside of a block), subclasses of ``nn.Sequential``, which may do something else,
    and passes without gradients. A layer that works in place stays in one segment with the layer
    in front of it. Called again, it plans anew.

    Args:
        model: The model, changed in place: no parameter, buffer or name of it changes.
        segments: How many segments all runs together get, at least one a run; None for the number
            that needs the least memory.
        example: A few inputs of the model. Then what each layer saves is measured in one pass, in
            evaluation mode, and the order of the runs is seen; otherwise all layers count alike and
            the runs are taken in the order of registration.

    Returns:
        The model.

    Raises:
        ValueError: There is no run, or fewer segments than runs are asked for.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(16)))
        >>> [segment.names for segment in checkpoint_activations(model).segments]
        [('0', '1', '2', '3'), ('4', '5', '6', '7'), ...]
    """
    runs = [(run, layers) for run, layers in _runs(model) if len(layers) > 1]
    if not runs:
        raise ValueError(
            "checkpoint_activations(model): expected an nn.Sequential of at least two layers, got "
            f"{type(model).__name__} without any; put the repeated layers into one"
        )
    costs: dict[int, list[Layer]] = {
        id(run): [Layer(1, 1, _works_in_place(layer)) for layer in layers] for run, layers in runs
    }
    if example is not None:
        measured = _measure(model, runs, example)
        runs = sorted(runs, key=lambda pair: measured.order(pair[1]))
        costs = {id(run): [measured.layer(one) for one in layers] for run, layers in runs}
    if segments is not None and segments < len(runs):
        raise ValueError(
            f"checkpoint_activations(segments={segments}): expected at least {len(runs)}, one for "
            f"each nn.Sequential of the model, got {segments}; leave it out for the best number"
        )
    chosen = choose_segments([costs[id(run)] for run, _ in runs], segments)
    for (run, _), lengths in zip(runs, chosen, strict=True):
        starts = [0, *accumulate(lengths)]
        names = list(_names(run))
        parts = [tuple(names[i:j]) for i, j in pairwise(starts)]
        last = run is runs[-1][0]
        planned = tuple(
            _Segment(part, not (last and number == len(parts) - 1))
            for number, part in enumerate(parts)
        )
        run.__class__ = CheckpointedSequential
        run.segments = planned  # pyright: ignore[reportArgumentType]
        run.layers = tuple(_names(run, whole_if_hooked=False))  # pyright: ignore[reportArgumentType]
    return model


def _runs(model: nn.Module) -> list[tuple[nn.Sequential, list[nn.Module]]]:
    """Return the outermost Sequentials, each once, with the layers that they call in a row."""
    found: dict[int, tuple[nn.Sequential, list[nn.Module]]] = {}

    def search(module: nn.Module) -> None:
        if _is_sequential(module):
            assert isinstance(module, nn.Sequential)
            layers = [module.get_submodule(name) for name in _names(module)]
            found[id(module)] = (module, layers)
            if len(layers) > 1:
                return
        for child in module.children():
            search(child)

    search(model)
    return list(found.values())


def _names(sequence: nn.Sequential, whole_if_hooked: bool = True) -> Iterator[str]:
    """Yield the names of the layers that a Sequential calls in a row, nested ones included."""
    for name, child in sequence._modules.items():
        # A hook is called with its module, so a Sequential with hooks stays one layer.
        if _is_sequential(child) and not (whole_if_hooked and _has_hooks(child)):
            assert isinstance(child, nn.Sequential)
            yield from (f"{name}.{inner}" for inner in _names(child, whole_if_hooked))
        else:
            yield name


def _called_for(sequence: nn.Sequential, name: str) -> str:
    """Return the name of the outermost Sequential around a layer that has hooks, or the layer's."""
    outer = accumulate(name.split("."), lambda *names: ".".join(names))
    modules = ((around, sequence.get_submodule(around)) for around in outer)
    hooked = (around for around, module in modules if _is_sequential(module) and _has_hooks(module))
    return next(hooked, name)


def _has_hooks(module: nn.Module | None) -> bool:
    return any(getattr(module, kind) for kind in _HOOKS)


def _is_sequential(module: nn.Module | None) -> bool:
    return type(module) in (nn.Sequential, CheckpointedSequential)


def _works_in_place(layer: nn.Module) -> bool:
    first = next(module for module in layer.modules() if not any(True for _ in module.children()))
    return bool(getattr(layer, "inplace", False) or getattr(first, "inplace", False))


class _Measured:
    """What each layer saved in one pass: bytes, bytes of its input, and when it was called.

    And which layers changed what they were given.
    """

    def __init__(self) -> None:
        self.saved: dict[int, int] = {}
        self.inputs: dict[int, int] = {}
        self.in_place: set[int] = set()

    def layer(self, layer: nn.Module) -> Layer:
        key = id(layer)
        return Layer(
            self.saved.get(key, 0), self.inputs.get(key, 0), not_first=key in self.in_place
        )

    def order(self, layers: list[nn.Module]) -> int:
        called = list(self.saved)
        return called.index(id(layers[0])) if id(layers[0]) in self.saved else -1


def _measure(
    model: nn.Module, runs: list[tuple[nn.Sequential, list[nn.Module]]], example: Tensor
) -> _Measured:
    found = _Measured()
    inside: list[tuple[int, set[int]]] = []
    versions: list[list[tuple[Tensor, int]]] = []
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        key, tensors = id(layer), [value for value in inputs if isinstance(value, Tensor)]
        # What comes in was counted with the layer that made it.
        inside.append((key, own | {tensor.untyped_storage().data_ptr() for tensor in tensors}))
        versions.append([(tensor, tensor._version) for tensor in tensors])
        found.saved.setdefault(key, 0)
        found.inputs[key] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def leave(layer: nn.Module, inputs: Any, output: Any) -> None:
        key, _ = inside.pop()
        if any(tensor._version != version for tensor, version in versions.pop()):
            found.in_place.add(key)

    def keep(tensor: Tensor) -> None:
        # Nothing is held, so the pass needs the memory of one without gradients.
        if inside:
            key, known = inside[-1]
            address = tensor.untyped_storage().data_ptr()
            if address not in known:
                known.add(address)
                found.saved[key] += tensor.untyped_storage().nbytes()

    def refuse(_: Any) -> Tensor:
        raise AssertionError("a measuring pass has no backward")

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, refuse))
        for run, layers in runs:
            if isinstance(run, CheckpointedSequential):
                # What it recomputes could not be seen.
                stack.callback(setattr, run, "__class__", CheckpointedSequential)
                run.__class__ = nn.Sequential  # pyright: ignore[reportAttributeAccessIssue]
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
        model(example)
    return found


class _FirstPass(AbstractContextManager[None]):
    """Notes the buffers that a segment's forward changes, as they were before."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._modules = list({id(m): m for layer in layers for m in layer.modules()}.values())
        self._before: list[list[tuple[str, Tensor, int, Tensor]]] = []
        self.changed: list[tuple[nn.Module, str, Tensor]] = []
        # A module whose pass depends on more (a gate that was drawn) says how to repeat it.
        self.replays: list[Callable[[], AbstractContextManager[Any]]] = [
            type(module).replay_forward(module)  # pyright: ignore[reportAttributeAccessIssue]
            for module in self._modules
            if hasattr(type(module), "replay_forward")
        ]

    def __enter__(self) -> None:
        self._before = [
            [
                (name, buffer, buffer._version, buffer.detach().clone())
                for name, buffer in module._buffers.items()
                if buffer is not None
            ]
            for module in self._modules
        ]

    def __exit__(self, *_: Any) -> None:
        for module, buffers in zip(self._modules, self._before, strict=True):
            # Batch normalisation's kernel moves its statistics past the version counter.
            moved = module.training and "running_mean" in module._buffers
            if moved or any(
                module._buffers[name] is not buffer or buffer._version != version
                for name, buffer, version, _ in buffers
            ):
                self.changed += [(module, name, copy) for name, _, _, copy in buffers]
        self._modules, self._before = [], []


class _SecondPass(AbstractContextManager[None]):
    """Lets a segment see the buffers of its first pass; may be entered again and again."""

    def __init__(self, first: _FirstPass) -> None:
        self._first = first
        self._present: list[tuple[nn.Module, str, Tensor | None]] = []
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._present = [(m, name, m._buffers[name]) for m, name, _ in self._first.changed]
        # Other tensors in the place of the buffers, because those may be needed by other graphs.
        for module, name, before in self._first.changed:
            module._buffers[name] = before.clone()
        for replay in self._first.replays:
            self._stack.enter_context(replay())

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        for module, name, buffer in self._present:
            module._buffers[name] = buffer


def _contexts(
    layers: Sequence[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    first = _FirstPass(layers)
    return first, _SecondPass(first)

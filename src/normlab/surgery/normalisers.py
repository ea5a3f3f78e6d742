"""Find the normalisers of any model, say which ones a conversion understands, and make these plain.

Methods replace torch's own BatchNorm layers. Models bring more: layers that fuse BatchNorm and
activation, layers that share statistics between processes, subclasses of every kind. A subclass is
taken for what it is shown to be: it is run beside its plain form, in both modes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from normlab.method import Unsuitable
from normlab.surgery.flow import Flow
from normlab.surgery.swap import BATCH_NORMS, swap

_OTHERS = (_InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WRAPPERS = {
    "DistributedDataParallel": "convert its .module and wrap the result",
    "DataParallel": "convert its .module and wrap the result",
    "FullyShardedDataParallel": "convert the model before it is sharded",
    "OptimizedModule": "convert its ._orig_mod, then compile the result",
    "ScriptModule": "convert the model before it is scripted",
    "RecursiveScriptModule": "convert the model before it is scripted",
    "TopLevelTracedModule": "convert the model before it is traced",
}


@dataclass(frozen=True)
class Normaliser:
    """One normaliser of a model.

    Attributes:
        name: Its first qualified name.
        module: The layer.
        is_batch_norm: Whether it normalises with its batch, so that methods may replace it.
        obstacle: Why it cannot be replaced; empty if it can.
    """

    name: str
    module: nn.Module
    is_batch_norm: bool
    obstacle: str = ""


def find_normalisers(model: nn.Module) -> list[Normaliser]:
    """Return every normaliser that torch's classes or their subclasses stand for, each once.

    Args:
        model: Any module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
        >>> [(found.name, found.obstacle) for found in find_normalisers(model)]
        [('1', ''), ('2', 'it is lazy and has no shape yet: run one forward pass first')]
    """
    found = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, _BatchNorm):
            found.append(Normaliser(name, module, True, _obstacle(module)))
            inside |= set(module.modules())
        elif isinstance(module, _OTHERS):
            found.append(
                Normaliser(name, module, False, f"it is {_article(module)}, not BatchNorm")
            )
    return found


def _obstacle(norm: _BatchNorm) -> str:
    if isinstance(norm, LazyModuleMixin):
        return "it is lazy and has no shape yet: run one forward pass first"
    if is_parametrized(norm):
        return "its parameters are re-parametrised: remove the parametrisation first"
    hooks = [name for name in _HOOKS if getattr(norm, name)]
    if hooks:
        return f"it has {hooks[0].strip('_').replace('_', ' ')}, which would be lost: remove them"
    if type(norm) not in BATCH_NORMS and plain_form(norm) is None:
        return f"it is {_article(norm)} that computes more than BatchNorm and its children"
    return ""


def refuse_wrapped(operation: str, model: nn.Module) -> None:
    """Refuse a model that is, or holds, a wrapper which keeps its own view of the modules.

    Raises:
        Unsuitable: With the wrapper's name and what to do instead.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch"):
                place = f" at {name!r}" if name else ""
                raise Unsuitable(
                    f"{operation}(model): expected a bare model, got "
                    f"{type(module).__name__}{place}; {_WRAPPERS[kind.__name__]}"
                )


def plain_form(norm: nn.Module, num_axes: int | None = None) -> nn.Module | None:
    """Return what a subclass of BatchNorm is made of, in torch's own layers, if that can be shown.

    The plain form is a BatchNorm that holds the very parameters and buffers of ``norm``, followed
    by the children of ``norm`` (a fused activation, a dropout) in their order. It is accepted only
    if both compute the same for random input, in evaluation and in training.

    Args:
        norm: A subclass of torch's BatchNorm layers, ``nn.SyncBatchNorm`` included.
        num_axes: The number of axes of its input, for a layer that takes any number; None for the
            first that it takes.

    Returns:
        The plain form, or None where none was found to agree.
    """
    assert isinstance(norm, _BatchNorm)
    of_torch = [kind for kind in BATCH_NORMS if isinstance(norm, kind)]
    if not of_torch:
        of_torch = list(
            BATCH_NORMS if num_axes is None else BATCH_NORMS[max(num_axes - 3, 0) :][:1]
        )
    fitting = next((kind for kind in of_torch if _known_to_agree(norm, kind)), None)
    return None if fitting is None else _made_plain(norm, fitting)


_KNOWN: WeakKeyDictionary[type, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


def _known_to_agree(norm: _BatchNorm, kind: type[nn.Module]) -> bool:
    """As `_agree`, once for all layers of a class that differ in their tensors only."""
    own = {name: value for name, value in vars(norm).items() if name[0] != "_"}
    for name in ("num_features", "training"):
        own.pop(name)
    inner = [repr(child) for child in norm.children()]
    key = (kind.__name__, repr(own), *inner)
    known = _KNOWN.setdefault(type(norm), {})
    if key not in known:
        known[key] = _agree(norm, kind)
    return known[key]


def _made_plain(norm: _BatchNorm, kind: type[nn.Module]) -> nn.Module:
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        setattr(plain, name, getattr(norm, name))
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    plain.train(norm.training)
    children = dict(norm.named_children())
    return nn.Sequential(OrderedDict(norm=plain, **children)) if children else plain


def _agree(norm: _BatchNorm, kind: type[nn.Module]) -> bool:
    """Whether a layer and its plain form compute the same, in outputs and running statistics."""
    rank = 2 + BATCH_NORMS.index(kind)
    for training in (False, True):
        given = copy.deepcopy(norm).train(training)
        made = _made_plain(copy.deepcopy(given), kind)
        made.train(training)
        like = next(
            (t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), None
        )
        shape = (4, norm.num_features, *(3,) * (rank - 1))
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        x = torch.linspace(-2, 3, 4 * norm.num_features * 3 ** (rank - 1))
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        x = x.reshape(shape).to(device=device, dtype=dtype)
        try:
            with torch.no_grad(), _same_noise(x.device):
                expected = given(x)
            with torch.no_grad(), _same_noise(x.device):
                actual = made(x)
        except (RuntimeError, ValueError, TypeError):
            return False
        if not _close(actual, expected):
            return False
        states = zip(given.buffers(), made.buffers(), strict=True)
        if not all(_close(one, two) for one, two in states):
            return False
    return True


@contextmanager
def _same_noise(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _close(one: Any, two: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape
    return both and torch.allclose(one.float(), two.float(), atol=1e-4, rtol=1e-4, equal_nan=True)


def make_plain(
    model: nn.Module, norms: Iterable[Normaliser], flow: Flow
) -> tuple[nn.Module, list[str]]:
    """Replace each subclass of BatchNorm among ``norms`` by its plain form.

    Args:
        model: The model, changed in place.
        norms: Batch normalisers without an obstacle.
        flow: One pass through the model, which shows the shapes that they take.

    Returns:
        The model (the new root if it is itself replaced), and one sentence for each kind that was
        replaced.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    kinds: dict[str, int] = {}
    for found in norms:
        if type(found.module) not in BATCH_NORMS:
            shapes = [call.input_shape for call in flow.of(found.module) if call.input_shape]
            plain = plain_form(found.module, len(shapes[0]) if shapes else None)
            assert plain is not None
            replacements[found.module] = plain
            kind = type(found.module).__name__
            kinds[kind] = kinds.get(kind, 0) + 1
    model = swap(model, replacements)
    return model, [f"{count} {kind} were taken apart first" for kind, count in kinds.items()]


def _article(module: nn.Module) -> str:
    name = type(module).__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"

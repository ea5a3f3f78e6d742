"""Find the residual blocks of a ResNet by what its modules are called and what they compute.

A ResNet in the manner of torchvision has ``conv1``, ``bn1``, a pool perhaps, blocks with
``conv1``, ``bn1``, ``conv2``, ``bn2`` and so on and a ``downsample``, then a pool and ``fc``. Names
alone do not say in which order a model uses its parts (a pre-activation block has the same ones),
so what was found is computed beside the model on a few inputs, small and large ones, in evaluation
and in training, and a difference is refused. So is a block that calls other functions than ReLU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from normlab.method import Unsuitable
from normlab.surgery.flow import evaluating, trace_flow
from normlab.surgery.snapshot import Snapshot
from normlab.surgery.swap import BATCH_NORMS, swap

_NORMS = ("bn", "norm")
_SHORTCUTS = ("downsample", "shortcut")
_HEADS = ("fc", "linear", "classifier")
_SILENT = (nn.ReLU, nn.Identity, nn.Flatten)
_FUNCTIONS = ("relu", "relu_")


@dataclass(frozen=True)
class ResidualBlock:
    """One block ``relu(shortcut(x) + branch(x))``.

    Attributes:
        name: The block's qualified name in the model.
        module: The block.
        convolutions: The convolutions of the branch, in order; two or more.
        norms: The normaliser after each convolution, or None.
        shortcut: What is applied to ``x`` on the short path, or None for ``x`` itself.
    """

    name: str
    module: nn.Module
    convolutions: tuple[nn.Conv2d, ...]
    norms: tuple[nn.Module | None, ...]
    shortcut: nn.Module | None

    @property
    def in_channels(self) -> int:
        """The number of channels that come in."""
        return self.convolutions[0].in_channels

    @property
    def out_channels(self) -> int:
        """The number of channels that go out."""
        return self.convolutions[-1].out_channels

    @property
    def stride(self) -> int:
        """The factor by which the block shrinks height (and width)."""
        return prod(convolution.stride[0] for convolution in self.convolutions)


@dataclass(frozen=True)
class ResidualNetwork:
    """A ResNet's parts, in the order of use.

    Attributes:
        model: The model.
        stem: The first convolution.
        stem_norm: The normaliser after it, or None.
        stem_pool: The pool after the stem's ReLU, or None.
        blocks: The residual blocks; the output of each is the input of the next.
        pool: The pool in front of the readout; None where the model averages by a function.
        head: The readout.
    """

    model: nn.Module
    stem: nn.Conv2d
    stem_norm: nn.Module | None
    stem_pool: nn.Module | None
    blocks: tuple[ResidualBlock, ...]
    pool: nn.Module | None
    head: nn.Linear

    @cached_property
    def norm_classes(self) -> set[type[nn.Module]]:
        """The classes of the network's normalisers, torch's batch normalisation among them."""
        norms = [self.stem_norm, *(norm for block in self.blocks for norm in block.norms)]
        found = {type(norm) for norm in norms if norm is not None}
        return (found | set(BATCH_NORMS)) - {nn.Identity}

    def bare_shortcut(self, block: ResidualBlock) -> nn.Module | None:
        """Return a block's shortcut with its normalisers taken out; the module is changed."""
        if block.shortcut is None:
            return None
        classes = self.norm_classes
        norms = [module for module in block.shortcut.modules() if type(module) in classes]
        return swap(block.shortcut, {norm: nn.Identity() for norm in norms})


def find_residual_network(model: nn.Module, example: Tensor, operation: str) -> ResidualNetwork:
    """Return the parts of a ResNet with its activations after the sums.

    Args:
        model: A model with torchvision's names: ``conv1``, ``bn1``, ``fc``, and blocks with
            ``conv1``, ``bn1``, ``conv2``, ``bn2`` and so on. ``normK`` for ``bnK``, ``shortcut``
            for ``downsample``, ``linear`` or ``classifier`` for ``fc``, and ReLUs and a global
            average called as functions are understood too.
        example: A few inputs of the model.
        operation: The name of the method that asks, for messages.

    Returns:
        The parts; nothing in the model is changed.

    Raises:
        Unsuitable: The model has no residual blocks, a part that has no place in the plain form,
            or computes something else than the plain form.

    Example:
        >>> find_residual_network(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), "fixup")
        Traceback (most recent call last):
            ...
        normlab.method.Unsuitable: fixup(model): expected a ResNet with residual blocks ...
    """
    named = {m: n for n, m in model.named_modules() if n and len(_convolutions(m)) > 1}
    if not named:
        raise Unsuitable(
            f"{operation}(model): expected a ResNet with residual blocks (modules with conv1, "
            f"conv2 and a sum), got {type(model).__name__} without any; use a residual network"
        )
    stem, head = getattr(model, "conv1", None), _child(model, _HEADS)
    if not isinstance(stem, nn.Conv2d) or not isinstance(head, nn.Linear):
        wrong = "conv1" if not isinstance(stem, nn.Conv2d) else "fc"
        raise Unsuitable(
            f"{operation}(model): expected conv1 to be an nn.Conv2d and fc an nn.Linear, as in "
            f"torchvision's ResNet, got {type(model).__name__} with another {wrong}; name the "
            "first convolution and the readout so"
        )
    network = ResidualNetwork(
        model=model,
        stem=stem,
        stem_norm=_child(model, [f"{norm}1" for norm in _NORMS]),
        stem_pool=_child(model, ["maxpool"]),
        blocks=tuple(_block(name, module) for module, name in named.items()),
        pool=_child(model, ["avgpool"]),
        head=head,
    )
    strange = next(_strangers(network), None)
    if strange is not None:
        name, module = strange
        advice = (
            f"another method put it in: prepare {operation} before that one, if both are wanted"
            if type(module).__module__.startswith("normlab.")
            else "take it out first"
        )
        raise Unsuitable(
            f"{operation}(model): expected convolutions, normalisers, ReLUs, shortcuts and pools "
            f"only, got {name} ({type(module).__name__}); {advice}"
        )
    different = _first_difference(network, example)
    if different is not None:
        raise Unsuitable(
            f"{operation}(model): expected relu(shortcut(x) + branch(x)) with conv, norm, relu in "
            f"the branch, got {different}, which computes something else; write it in this form"
        )
    return network


def _convolutions(module: nn.Module) -> tuple[nn.Conv2d, ...]:
    found = []
    while isinstance(layer := module._modules.get(f"conv{len(found) + 1}"), nn.Conv2d):
        found.append(layer)
    return tuple(found)


def _child(module: nn.Module, names: tuple[str, ...] | list[str]) -> nn.Module | None:
    return next((c for name in names if (c := module._modules.get(name)) is not None), None)


def _block(name: str, module: nn.Module) -> ResidualBlock:
    convolutions = _convolutions(module)
    numbers = range(1, len(convolutions) + 1)
    shortcut = _child(module, _SHORTCUTS)
    if isinstance(shortcut, (nn.Identity, nn.Sequential)) and not any(shortcut.children()):
        shortcut = None
    return ResidualBlock(
        name=name,
        module=module,
        convolutions=convolutions,
        norms=tuple(_child(module, [f"{norm}{i}" for norm in _NORMS]) for i in numbers),
        shortcut=shortcut,
    )


def _strangers(network: ResidualNetwork) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that have no place in the plain form, and would be lost in rebuilding."""
    known = {network.stem, network.stem_norm, network.stem_pool, network.pool, network.head}
    blocks = {block.module: block for block in network.blocks}

    def walk(parent: nn.Module, prefix: str, known: set[nn.Module | None]):
        for name, child in parent.named_children():
            if child in blocks:
                block = blocks[child]
                parts = {*block.convolutions, *block.norms, block.shortcut}
                yield from walk(child, f"{prefix}{name}.", parts)
            elif child not in known and type(child) not in _SILENT:
                if any(True for _ in child.children()):
                    yield from walk(child, f"{prefix}{name}.", known)
                elif not isinstance(child, nn.Sequential):
                    yield f"{prefix}{name}", child

    yield from walk(network.model, "", known)


def _first_difference(network: ResidualNetwork, example: Tensor) -> str | None:
    for block in network.blocks:
        # Each block is fed fresh noise, because what an untrained deep network makes of the
        # example in evaluation mode may have overflowed by the time it reaches the block.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, block.in_channels, 8, 8, generator=generator)
        with evaluating(block.module):
            # To look at a re-parametrised weight in training may change it.
            x = noise.to(block.convolutions[0].weight)
        if not _has_plain_form(network, block, x):
            return f"{block.name} ({type(block.module).__name__})"
    with evaluating(network.model), torch.no_grad():
        if not _agree(network.model(example), _run_network(network, example)):
            return f"{type(network.model).__name__} around its blocks"
    return None


@torch.no_grad()
def _has_plain_form(network: ResidualNetwork, block: ResidualBlock, x: Tensor) -> bool:
    with evaluating(block.module):
        # A bound on the activations shows on large inputs only.
        if not all(_agree(block.module(one), _run_block(block, one)) for one in (x, 100 * x)):
            return False
    return not _calls_other_functions(block, x) and _trains_alike(network, block, x)


def _calls_other_functions(block: ResidualBlock, x: Tensor) -> bool:
    """Whether the block itself does; what its layers and its shortcut call is theirs."""
    operations = trace_flow(block.module, x).operations
    return any(one.owner == "" and one.name not in _FUNCTIONS for one in operations)


def _trains_alike(network: ResidualNetwork, block: ResidualBlock, x: Tensor) -> bool:
    """Whether a block is of the plain form in training, too, its normalisers held."""
    try:
        with _training(network, block, x.device):
            own = block.module(x)
        with _training(network, block, x.device):
            return _agree(own, _run_block(block, x))
    except (RuntimeError, TypeError, ValueError):
        # What cannot run alone in training is not of the plain form either.
        return False


@contextmanager
def _training(
    network: ResidualNetwork, block: ResidualBlock, device: torch.device
) -> Iterator[None]:
    """Put a block into training mode for one pass, and all back as it was, random numbers too."""
    snapshot = Snapshot(block.module)
    try:
        block.module.train()
        for module in block.module.modules():
            if type(module) in network.norm_classes:
                module.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        snapshot.restore()


def _agree(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    size = one.abs().nan_to_num(0, 0, 0).max().item()
    return torch.allclose(one, two, rtol=1e-2, atol=1e-2 * size, equal_nan=True)


def _run_block(block: ResidualBlock, x: Tensor) -> Tensor:
    out = x
    for convolution, norm in zip(block.convolutions, block.norms, strict=True):
        out = convolution(out if out is x else out.relu())
        out = out if norm is None else norm(out)
    return (out + (x if block.shortcut is None else block.shortcut(x))).relu()


def _run_network(network: ResidualNetwork, x: Tensor) -> Tensor:
    x = network.stem(x)
    x = (x if network.stem_norm is None else network.stem_norm(x)).relu()
    x = x if network.stem_pool is None else network.stem_pool(x)
    for block in network.blocks:
        x = block.module(x)
    x = x.mean((2, 3)) if network.pool is None else network.pool(x).flatten(1)
    # Where the readout does not fit, the features' shape gives the difference away.
    return network.head(x) if x.shape[1] == network.head.in_features else x

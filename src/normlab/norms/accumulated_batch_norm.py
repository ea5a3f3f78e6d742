r"""Batch normalisation over the micro-batches of one accumulated step, as if they were one batch.

Gradient accumulation splits a batch that does not fit; torch's BatchNorm then normalises each
micro-batch by itself, which is another function, and a worse one the smaller they are. Here k
micro-batches of b samples give the values, the gradients and the running statistics of one batch
of k b samples, for any model with torch's BatchNorm layers: the micro-batches pass through the
model side by side, wait for each other at every BatchNorm layer, and go on with the joint moments.

Source: S. Ioffe, C. Szegedy, 2015, arXiv 1502.03167, algorithm 1, on a batch held in parts.

Departs:
    - Running statistics are updated once, for the joint batch; plain accumulation updates them
      once for each micro-batch.
    - ``exact=False`` replaces two means in the gradient, see `backward_jointly`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.moments import Moments
from normlab.norms.joint_statistics import (
    Seen,
    joint_moments,
    norms_in_use,
    standardise,
    standing_in,
    track,
)
from normlab.norms.lockstep import Astray, Lockstep
from normlab.norms.micro_batches import (
    Noise,
    buffers_kept,
    call,
    kept_on_host,
    shares_of_samples,
)


def backward_jointly(
    model: nn.Module,
    micro_batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    *,
    exact: bool = True,
    offload: bool = False,
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Add the gradients of one joint batch, given in micro-batches, to the parameters' ``.grad``.

    .. math::
        L = \sum_i w_i\, \mathrm{loss}(\mathrm{model}(x_i), t_i), \quad w_i = n_i / \sum_j n_j

    where every BatchNorm layer in training mode takes its moments over all micro-batches. With a
    loss that is a mean over samples, L is the loss of the joint batch. Running statistics are
    updated once, with the joint moments. The optimiser's step is left to the caller.

    *Exact*: the gradients are those of the joint batch. All activations are alive at once, as for
    one batch. With ``offload`` they wait in the host's memory, and the device holds about those
    around one BatchNorm layer.

    *Not exact*: a first pass without gradients takes the joint moments; in a second one each
    micro-batch goes forward and backward on its own, so that only its activations are alive.
    Outputs, loss and running statistics are still exact. In the gradient of a BatchNorm layer,

    .. math::
        dx = (g - \mathrm{mean}(g) - \hat x\, \mathrm{mean}(g \hat x)) / \sqrt{v + \epsilon}, \quad
        g = \gamma\, dy

    both means are taken over the micro-batch in place of the joint batch. The error is nil for one
    micro-batch and falls as they grow, but it adds up over layers: for a ResNet-20 with 8
    micro-batches of 4 digits the gradient is off by 0.44 of its length at the median step, where
    plain accumulation is off by 1.2 (``benchmarks/micro_batches.py``).

    Micro-batches may differ in the number and the size of their samples. Each draws noise of its
    own, in dropout. All must call the same BatchNorm layers in the same order. A model that keeps
    values on itself from one layer to the next would hand them to another micro-batch. Activation
    checkpointing is refused, ``torch.compile`` works without ``fullgraph``. In
    DistributedDataParallel each process joins its own micro-batches; parameters that are gathered
    layer by layer, as in FSDP, are not supported.

    Args:
        model: Any module. Its BatchNorm layers in training mode must be torch's own; those in
            evaluation mode use their running statistics, as ever. ``F.batch_norm`` called by hand
            is not seen.
        micro_batches: Pairs ``(inputs, targets)`` on the model's device. The model is called with
            ``inputs``; a tuple is spread over positional arguments, a dictionary over keywords.
        loss: Maps ``(outputs, targets)`` to the mean loss of the samples.
        exact: Whether gradients must be exact.
        offload: Whether to keep what backward needs in the host's memory; on a CPU it is there.
        weights: The micro-batches' weights in L; None for their shares of the samples. Give them
            where the loss is a mean over something else, such as pixels or tokens.

    Returns:
        The joint loss, detached.

    Raises:
        ValueError: There is no micro-batch, the number of weights is another, gradients are
            disabled, a BatchNorm layer in use is not torch's own, a channel has a single value in
            the joint batch, or micro-batches call different layers. The model is as it was then,
            apart from gradients that had been added.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> micro_batches = [(torch.randn(1, 2), torch.tensor([0])) for _ in range(4)]
        >>> loss = backward_jointly(model, micro_batches, nn.functional.cross_entropy)
        >>> model[1].num_batches_tracked
        tensor(1)
    """
    pairs = list(micro_batches)
    inputs = [one for one, _ in pairs]
    _check_inputs("backward_jointly", inputs)
    if not torch.is_grad_enabled():
        raise ValueError(
            "backward_jointly(model): expected gradients to be enabled, got none recorded; leave "
            "the torch.no_grad block"
        )
    weights = shares_of_samples(inputs) if weights is None else list(weights)
    if len(weights) != len(pairs):
        raise ValueError(
            f"backward_jointly(weights): expected {len(pairs)} numbers, got {len(weights)}; give "
            "one for each micro-batch"
        )
    # Without joint statistics micro-batches do not depend on each other.
    if exact and norms_in_use("backward_jointly", model):
        with forward_jointly(model, inputs, offload=offload) as outputs, _saving(model, offload):
            losses = [
                weight * loss(output, targets)
                for weight, output, (_, targets) in zip(weights, outputs, pairs, strict=True)
            ]
            total = torch.stack(losses).sum()
            total.backward()
        return total.detach()
    return _one_by_one(model, pairs, loss, weights, offload)


@contextmanager
def forward_jointly(
    model: nn.Module, inputs: Iterable[Any], *, offload: bool = False
) -> Iterator[list[Any]]:
    """Call a model on micro-batches whose BatchNorm layers see one joint batch.

    The outputs hang together in one graph, so a loss may depend on several of them. Call backward
    inside the block. Running statistics are updated where it ends, and not if it raises.

    Args:
        model: As in `backward_jointly`.
        inputs: The micro-batches' inputs, as in `backward_jointly`.
        offload: As in `backward_jointly`.

    Yields:
        The model's outputs, one for each micro-batch.

    Raises:
        ValueError: As in `backward_jointly`.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> with forward_jointly(model, [torch.tensor([[1.0]]), torch.tensor([[3.0]])]) as outputs:
        ...     print(torch.cat(outputs).flatten().detach())
        tensor([-1.0000,  1.0000])
    """
    inputs = list(inputs)
    _check_inputs("forward_jointly", inputs)
    norms = norms_in_use("forward_jointly", model)
    seen: list[Seen] = []

    def join(norm: _BatchNorm, parts: list[Tensor]) -> tuple[Tensor, ...]:
        moments = joint_moments(parts)
        seen.append(Seen(norm, moments))
        return standardise(norm, moments, parts)

    lockstep = Lockstep(join)

    def one(inputs: Any) -> Any:
        # Hooks on saved tensors belong to the thread that enters them.
        with _saving(model, offload):
            return call(model, inputs)

    with standing_in(norms, lambda norm, x: _meet(lockstep, norm, x)):
        yield _run(lockstep, norms, [partial(one, each) for each in inputs])
    track(seen)


def _one_by_one(
    model: nn.Module,
    pairs: list[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    weights: list[float],
    offload: bool,
) -> Tensor:
    """Take each micro-batch forward and backward on its own, with moments of a pass before."""
    norms = norms_in_use("backward_jointly", model)
    noise = Noise(len(pairs))
    losses = []
    with noise.set_aside():
        seen = _moments_of_a_pass(model, norms, [one for one, _ in pairs], noise) if norms else []
        replay = _Replay(seen)
        with standing_in(norms, replay.normalise):
            for number, (inputs, targets) in enumerate(pairs):
                noise.enter(number)
                with _saving(model, offload):
                    with replay.one_pass():
                        outputs = call(model, inputs)
                    part = weights[number] * loss(outputs, targets)
                part.backward()
                losses.append(part.detach())
    track(seen)
    return torch.stack(losses).sum()


@torch.no_grad()
def _moments_of_a_pass(
    model: nn.Module, norms: dict[str, _BatchNorm], inputs: list[Any], noise: Noise
) -> list[Seen]:
    seen: list[Seen] = []

    def join(norm: _BatchNorm, parts: list[Tensor]) -> list[Moments]:
        seen.append(Seen(norm, joint_moments(parts)))
        return [seen[-1].moments] * len(parts)

    lockstep = Lockstep(join)

    def normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
        with noise.set_aside():
            moments = _meet(lockstep, norm, x)
        return standardise(norm, moments, [x])[0]

    def one(number: int) -> None:
        noise.enter(number)
        call(model, inputs[number])

    with buffers_kept(model), standing_in(norms, normalise):
        _run(lockstep, norms, [partial(one, number) for number in range(len(inputs))])
    return seen


class _Replay:
    """Normalises one micro-batch after the other with moments of a pass before."""

    def __init__(self, seen: list[Seen]) -> None:
        self._seen = seen
        self._left: Iterator[Seen] | None = None

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        self._left = iter(self._seen)
        yield
        if next(self._left, None) is not None:
            raise _changed_its_course()
        self._left = None

    def normalise(self, norm: _BatchNorm, x: Tensor) -> Tensor:
        if self._left is None:
            raise _outside_of_a_pass()
        expected = next(self._left, None)
        if expected is None or expected.norm is not norm:
            raise _changed_its_course()
        return standardise(norm, expected.moments, [x])[0]


def _meet(lockstep: Lockstep, norm: _BatchNorm, x: Tensor) -> Any:
    if not lockstep.inside:
        raise _outside_of_a_pass()
    return lockstep.meet(norm, x)


def _run(
    lockstep: Lockstep, norms: dict[str, _BatchNorm], functions: list[Callable[[], Any]]
) -> list[Any]:
    try:
        return lockstep.run(functions)
    except Astray as error:
        names = {norm: name for name, norm in norms.items()}
        places = ["the end" if place is None else repr(names[place]) for place in error.places]
        first = places.index(next(place for place in places if place != places[0]))
        raise ValueError(
            "backward_jointly(micro_batches): expected all to call the same BatchNorm layers in "
            f"the same order, got micro-batch 0 at {places[0]} and micro-batch {first} at "
            f"{places[first]}; put together those that take the same way"
        ) from None


def _check_inputs(operation: str, inputs: list[Any]) -> None:
    if not inputs:
        raise ValueError(
            f"{operation}(micro_batches): expected at least one micro-batch, got none; give a "
            "list, or a loader that is not used up"
        )


def _saving(model: nn.Module, offload: bool) -> AbstractContextManager[None]:
    on_device = any(parameter.device.type != "cpu" for parameter in model.parameters())
    return kept_on_host(model) if offload and on_device else nullcontext()


def _outside_of_a_pass() -> ValueError:
    return ValueError(
        "backward_jointly(model): expected BatchNorm layers to be called in the forward pass of a "
        "micro-batch, got a call outside of it; train without activation checkpointing "
        "(offload=True saves memory as well)"
    )


def _changed_its_course() -> ValueError:
    return ValueError(
        "backward_jointly(exact=False): expected a micro-batch to call the same BatchNorm layers "
        "in both passes, got others in the second one; draw random numbers with torch only, or "
        "take exact=True"
    )

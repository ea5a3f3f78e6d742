"""What passes over micro-batches share: calls, shares, noise, and memory of the host.

A micro-batch's inputs are what a model is called with: a tuple is spread over positional
arguments, a dictionary over keyword arguments, and anything else is the only argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, inputs: Any) -> Any:
    """Return what the model makes of a micro-batch's inputs."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def shares_of_samples(inputs: Sequence[Any]) -> list[float]:
    """Return each micro-batch's share of all samples.

    Args:
        inputs: The micro-batches' inputs. The samples are counted along the first axis of the
            first argument, or as its entries where it is a list.

    Raises:
        ValueError: The first argument is something else.

    Example:
        >>> shares_of_samples([torch.zeros(3, 5), torch.zeros(1, 5)])
        [0.75, 0.25]
    """
    counts = [_number_of_samples(one) for one in inputs]
    return [count / sum(counts) for count in counts]


def _number_of_samples(inputs: Any) -> int:
    first = inputs
    if isinstance(inputs, (tuple, dict)) and inputs:
        first = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    if isinstance(first, list) and first:
        return len(first)
    if isinstance(first, Tensor) and first.dim() > 0 and len(first) > 0:
        return len(first)
    raise ValueError(
        "backward_jointly(micro_batches): expected inputs that begin with a tensor (N, ...) or a "
        f"list of N samples, got {type(first).__name__}; give weights"
    )


class Noise:
    """Random states, one for each micro-batch, so that a second pass draws what the first drew.

    Args:
        count: The number of micro-batches; their seeds are drawn from torch's generator.
    """

    def __init__(self, count: int) -> None:
        seeds = torch.randint(2**62, (count,), device="cpu").tolist()
        with self.set_aside():
            self._starts = []
            for seed in seeds:
                torch.manual_seed(seed)
                self._starts.append(_random_state())

    def enter(self, number: int) -> None:
        """Let torch's generators start the noise of a micro-batch."""
        _set_random_state(self._starts[number])

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Put torch's generators back afterwards, whatever is drawn meanwhile."""
        state = _random_state()
        try:
            yield
        finally:
            _set_random_state(state)


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        states.append(torch.get_device_module().get_rng_state())
    return states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module().set_rng_state(state)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer of a model the value back that it had before."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                buffer.copy_(value)


def kept_on_host(model: nn.Module) -> AbstractContextManager[None]:
    """Keep what is saved for backward in the host's memory, until backward needs it.

    torch's ``save_on_cpu`` does the same with the parameters, too, once for each micro-batch.

    Args:
        model: Its parameters stay where they are.
    """
    stay = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        tensor = tensor.detach()
        if tensor.untyped_storage().data_ptr() in stay:
            return tensor.device, tensor
        # Only pinned memory is copied back while the device computes.
        pinned = tensor.device.type == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return tensor.device, host.copy_(tensor)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

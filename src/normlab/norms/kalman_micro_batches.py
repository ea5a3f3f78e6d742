"""Train as with batches smaller than those that come: the public code's simulation.

A batch is cut into parts and each goes through the model by itself, in training, so that every
normaliser has posteriors of its own for each part, zero-padded shortcuts included; only the first
part moves the running statistics of the Kalman normalisers. Evaluation is that of the model.

Departs: the public code cuts the batch inside every normaliser, which is the same function, and
pads the joined statistics of all parts at their ends, which misaligns them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MicroBatches(nn.Module):
    """A model whose training batches are cut into parts that do not see each other.

    Args:
        model: The model.
        num_parts: The number of parts, at least 1; a batch must have as many samples.
        kinds: The classes of layers whose buffers only the first part moves.

    Shape:
        As the model's; its output must be a tensor with an axis of samples.

    Raises:
        ValueError: At construction for ``num_parts`` below 1; in training for a smaller batch.

    Example:
        >>> model = MicroBatches(nn.BatchNorm1d(1), 2, (nn.BatchNorm1d,))
        >>> model(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).flatten()
        tensor([-1.0000,  1.0000, -1.0000,  1.0000], grad_fn=<ViewBackward0>)
        >>> model.model.running_mean
        tensor([0.2000])
    """

    def __init__(
        self, model: nn.Module, num_parts: int, kinds: tuple[type[nn.Module], ...]
    ) -> None:
        super().__init__()
        if num_parts < 1:
            raise ValueError(
                f"MicroBatches(num_parts={num_parts}): expected at least 1, got {num_parts}; use 1 "
                "for whole batches"
            )
        self.model = model
        self.num_parts = num_parts
        self._kinds = kinds

    def forward(self, x: Tensor) -> Tensor:
        """Apply the model to each part of ``x``."""
        if not self.training or self.num_parts == 1:
            return self.model(x)
        if len(x) < self.num_parts:
            raise ValueError(
                f"MicroBatches(input): expected at least {self.num_parts} samples, got {len(x)}; "
                "use fewer parts"
            )
        first, *others = x.tensor_split(self.num_parts)
        outputs = [self.model(first)]
        layers = [module for module in self.model.modules() if isinstance(module, self._kinds)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        kept = [buffer.clone() for buffer in buffers]
        outputs += [self.model(part) for part in others]
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
        return torch.cat(outputs)

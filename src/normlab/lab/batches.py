"""The data path for sets in memory: batches on the device, the same for every method.

Which samples a batch holds, and how each is cropped and flipped, is a pure function of (seed,
epoch, step). So every method at a given seed sees the same data, continuing an interrupted run
needs no saved state, and several processes see exactly the shards of one process's batches: order
and augmentation are drawn for the whole batch, on the CPU whatever the device, and each process
takes its contiguous part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.lab.tasks.task import AUGMENTATIONS, Split


class Batches:
    """Training batches of a split, shuffled, augmented and normalised.

    An epoch drops the samples that do not fill a last batch (others take their place in the next
    epoch); a set smaller than one batch makes one batch of all of it.

    Args:
        split: The samples; they are moved to the device once and stay as they are stored.
        mean: Mean of each channel, in the units of the inputs.
        std: Standard deviation of each channel, in the same units.
        batch_size: Samples in a batch, over all processes.
        seed: Decides order and augmentation.
        augmentation: ``none``; ``flip``, left to right with probability one half; ``crop-flip``,
            also shifted by up to an eighth of the size (4 of 32 pixels), with zeros moving in.
        device: Where batches are made.
        rank: This process's number, 0 to ``world_size - 1``.
        world_size: Number of processes, a divisor of the batch size.

    Raises:
        ValueError: An unknown augmentation, one that the inputs cannot have, or a batch that does
            not divide by the number of processes.

    Example:
        >>> split = Split(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> batches = Batches(split, mean=(0.0,), std=(1.0,), batch_size=4, seed=0)
        >>> batches.steps_per_epoch
        2
        >>> inputs, targets = batches.batch(epoch=0, step=1)
        >>> inputs.shape, inputs.dtype, targets.shape
        (torch.Size([4, 1, 8, 8]), torch.float32, torch.Size([4]))
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        augmentation: str = "none",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"Batches(augmentation={augmentation!r}): expected one of "
                f"{', '.join(AUGMENTATIONS)}, got {augmentation!r}; choose one of these"
            )
        if augmentation != "none" and split.inputs.dim() != 4:
            raise ValueError(
                f"Batches(augmentation={augmentation!r}): expected images (N, C, H, W), got inputs "
                f"of shape {tuple(split.inputs.shape)}; use augmentation 'none'"
            )
        _check_shards("Batches", batch_size, rank, world_size)
        self.batch_size = min(batch_size, len(split))
        if self.batch_size % world_size != 0:
            raise ValueError(
                f"Batches(batch_size={batch_size}): expected a batch that divides by the "
                f"{world_size} processes, got {self.batch_size} of {len(split)} samples; change "
                f"the batch size or the number of processes"
            )
        self.seed = seed
        self.augmentation = augmentation
        self.device = torch.device(device)
        self._inputs = split.inputs.to(self.device)
        self._targets = split.targets.to(self.device)
        self._mean, self._std = _column(mean, split, self.device), _column(std, split, self.device)
        shard = self.batch_size // world_size
        self._shard = slice(rank * shard, (rank + 1) * shard)
        self._order_epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the data, at least one."""
        return len(self._targets) // self.batch_size

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's part of one batch.

        Args:
            epoch: Number of the pass over the data, from 0.
            step: Number of the batch in it, 0 to ``steps_per_epoch - 1``.

        Returns:
            Normalised float32 inputs and int64 targets, on the device.

        Raises:
            ValueError: A step outside the epoch.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(
                f"batch(step={step}): expected 0 to {self.steps_per_epoch - 1}, got {step}; "
                f"count steps within an epoch"
            )
        start = step * self.batch_size
        indices = self._epoch_order(epoch)[start : start + self.batch_size][self._shard]
        inputs = self._augment(self._inputs[indices], epoch, step)
        return _normalise(inputs, self._mean, self._std), self._targets[indices]

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order_epoch != epoch:
            generator = _generator("order", self.seed, epoch)
            self._order = torch.randperm(len(self._targets), generator=generator).to(self.device)
            self._order_epoch = epoch
        return self._order

    def _augment(self, images: Tensor, epoch: int, step: int) -> Tensor:
        if self.augmentation == "none":
            return images
        generator = _generator("augmentation", self.seed, epoch, step)
        flips = torch.rand(self.batch_size, generator=generator)[self._shard] < 0.5
        if self.augmentation == "crop-flip":
            padding = padding_of(images)
            shifts = torch.stack(
                [
                    torch.randint(2 * pad + 1, (self.batch_size,), generator=generator)[self._shard]
                    for pad in padding
                ]
            ).to(self.device)
            images = crop(images, shifts[0], shifts[1], padding)
        return flip(images, flips.to(self.device))


def evaluation_batches(
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every sample once, in order and without augmentation, normalised.

    Several processes each take a contiguous part of every batch. Where the last batch has fewer
    samples than there are processes, some of them get one batch fewer: sum over processes after the
    loop.

    Args:
        split: The samples.
        mean: Mean of each channel, in the units of the inputs.
        std: Standard deviation of each channel, in the same units.
        batch_size: Samples in a batch, over all processes.
        device: Where batches are made.
        rank: This process's number, 0 to ``world_size - 1``.
        world_size: Number of processes.

    Yields:
        Normalised float32 inputs and int64 targets, on the device.

    Raises:
        ValueError: A batch size below one, or a rank that is not among the processes.

    Example:
        >>> split = Split(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> [len(t) for _, t in evaluation_batches(split, mean=(0.0,), std=(1.0,), batch_size=4)]
        [4, 4, 2]
    """
    _check_shards("evaluation_batches", batch_size, rank, world_size)
    device = torch.device(device)
    mean_column, std_column = _column(mean, split, device), _column(std, split, device)
    for start in range(0, len(split), batch_size):
        size = min(batch_size, len(split) - start)
        low, high = start + size * rank // world_size, start + size * (rank + 1) // world_size
        if low < high:
            inputs = split.inputs[low:high].to(device)
            yield _normalise(inputs, mean_column, std_column), split.targets[low:high].to(device)


def padding_of(images: Tensor) -> tuple[int, int]:
    """Return how many pixels a crop may shift (vertically, horizontally): an eighth of the size."""
    height, width = images.shape[-2:]
    return max(1, (height + 4) // 8), max(1, (width + 4) // 8)


def crop(images: Tensor, tops: Tensor, lefts: Tensor, padding: tuple[int, int]) -> Tensor:
    """Return each image cut out of itself framed with zeros.

    Args:
        images: ``(N, C, H, W)`` of any dtype.
        tops: First row of each cut in the framed image, ``(N,)``, 0 to twice the vertical padding.
        lefts: First column likewise.
        padding: Rows above and below, columns left and right, of the frame.
    """
    height, width = images.shape[-2:]
    vertical, horizontal = padding
    framed = F.pad(images, (horizontal, horizontal, vertical, vertical))
    # A view of every possible cut; indexing copies the one wanted, a whole image at a time.
    cuts = framed.unfold(2, height, 1).unfold(3, width, 1)
    return cuts[torch.arange(len(images), device=images.device), :, tops, lefts]


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Return the images with those of the boolean ``chosen`` (N,) flipped left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def _normalise(inputs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return inputs.to(torch.float32, copy=True).sub_(mean).div_(std)


def _column(values: Sequence[float], split: Split, device: torch.device) -> Tensor:
    shape = (-1,) + (1,) * (split.inputs.dim() - 2)
    return torch.tensor(tuple(values), dtype=torch.float32, device=device).reshape(shape)


def _generator(*parts: str | int) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _check_shards(operation: str, batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(
            f"{operation}(batch_size={batch_size}): expected at least 1, got {batch_size}; "
            f"choose a positive batch size"
        )
    if not 0 <= rank < world_size:
        raise ValueError(
            f"{operation}(rank={rank}, world_size={world_size}): expected a rank from 0 to "
            f"{world_size - 1}, got {rank}; pass the numbers of the process group"
        )

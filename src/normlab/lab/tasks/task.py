"""A task: a training and a test set in memory, the loss and the metric.

Inputs stay as they were stored, bytes for images, so that a data set takes a quarter of the memory
and only the batch at hand becomes float. Which samples are kept or held out is a pure function of
the arguments: every method of a study is trained, tuned and tested on the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "flip", "crop-flip")


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes.

    Args:
        inputs: Images as uint8 ``(N, C, H, W)``, anything else as float32 ``(N, F, ...)``.
        targets: The class of each sample, int64 ``(N,)``.

    Raises:
        ValueError: Wrong dtypes, or not one target for each sample, or no sample.

    Example:
        >>> split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        >>> len(split)
        4
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.dtype not in (torch.uint8, torch.float32) or self.inputs.dim() < 2:
            raise ValueError(
                f"Split(inputs): expected uint8 images (N, C, H, W) or float32 (N, F, ...), got "
                f"{self.inputs.dtype} {tuple(self.inputs.shape)}; convert the inputs first"
            )
        if self.targets.dtype != torch.int64 or self.targets.dim() != 1:
            raise ValueError(
                f"Split(targets): expected int64 classes (N,), got {self.targets.dtype} "
                f"{tuple(self.targets.shape)}; convert the targets first"
            )
        if len(self.inputs) != len(self.targets) or len(self.targets) == 0:
            raise ValueError(
                f"Split(inputs, targets): expected one target for each of at least one sample, got "
                f"{len(self.inputs)} inputs and {len(self.targets)} targets; check where they come "
                f"from"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: Tensor) -> Split:
        """Return the split of these samples only."""
        return Split(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True, eq=False)
class Task:
    """A data set with what is needed to train on it.

    Args:
        name: The name it is loaded by.
        title: The name people read, in reports.
        train: The samples to train on.
        test: The samples to measure on; never used to choose anything.
        class_names: One name for each class, in the order of the targets.
        mean: Mean of each channel (dimension 1) of the training inputs, in the units of ``inputs``:
            0 to 255 for bytes.
        std: Standard deviation of each channel, in the same units.
        augmentation: What training does to images unless told otherwise: ``none``, ``flip`` or
            ``crop-flip``.
        note: What a reader must know about the data, such as a test set that was split off; may be
            empty.

    Raises:
        ValueError: Splits of different shapes, targets without a class, wrong lengths.

    Example:
        >>> split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        >>> task = Task("tiny", "Tiny", split, split, ("a", "b"), (0.0,), (1.0,), "none")
        >>> task.input_shape, task.num_classes
        ((1, 8, 8), 2)
    """

    name: str
    title: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str = "none"
    note: str = ""

    def __post_init__(self) -> None:
        train, test = self.train.inputs, self.test.inputs
        if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
            raise ValueError(
                f"Task({self.name!r}): expected training and test inputs of one shape and dtype, "
                f"got {train.dtype} {tuple(train.shape[1:])} and {test.dtype} "
                f"{tuple(test.shape[1:])}; convert one of them"
            )
        for which, split in (("training", self.train), ("test", self.test)):
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"Task({self.name!r}): expected {which} targets from 0 to "
                    f"{self.num_classes - 1}, got {low} to {high}; check the labels or class_names"
                )
        if not len(self.mean) == len(self.std) == train.shape[1] or min(self.std) <= 0:
            raise ValueError(
                f"Task({self.name!r}): expected {train.shape[1]} means and as many positive "
                f"standard deviations, got {len(self.mean)} and {len(self.std)}; use "
                "channel_statistics"
            )
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"Task({self.name!r}): expected augmentation to be one of "
                f"{', '.join(AUGMENTATIONS)}, got {self.augmentation!r}; choose one of these"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy.

        Args:
            outputs: Logits ``(N, K)``.
            targets: Classes ``(N,)``, or probabilities ``(N, K)`` from mixed or smoothed labels.
        """
        return F.cross_entropy(outputs, targets)

    @staticmethod
    def count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how many samples have their largest logit at the target, as an int64 scalar.

        Args:
            outputs: Logits ``(N, K)``.
            targets: Classes ``(N,)``, or probabilities ``(N, K)``, of which the largest counts.
        """
        if targets.dim() == outputs.dim():
            targets = targets.argmax(dim=1)
        return (outputs.argmax(dim=1) == targets).sum()


def channel_statistics(inputs: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel (dimension 1), summed in float64.

    A channel that never changes gets a standard deviation of one, so that it normalises to zero.

    Args:
        inputs: Samples ``(N, C, ...)``.

    Example:
        >>> channel_statistics(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        ((1.0, 5.0), (1.0, 1.0))
    """
    means, stds = [], []
    for channel in range(inputs.shape[1]):
        values = inputs[:, channel].reshape(-1)
        if values.dtype == torch.uint8:
            # Counting bytes is exact and needs no float copy of the data set.
            counts = torch.bincount(values, minlength=256).double()
            levels = torch.arange(256, dtype=torch.float64)
            mean = float((counts * levels).sum() / counts.sum())
            variance = float((counts * (levels - mean).square()).sum() / counts.sum())
        else:
            values = values.double()
            mean = float(values.mean())
            variance = float((values - mean).square().mean())
        means.append(mean)
        stds.append(variance**0.5 or 1.0)
    return tuple(means), tuple(stds)


def stratified_indices(targets: Tensor, size: int, seed: int) -> Tensor:
    """Return ``size`` sample numbers, in rising order, with each class in its share of the whole.

    Shares are rounded by largest remainder, the first class winning a tie.

    Args:
        targets: Classes ``(N,)``.
        size: How many samples, 0 to N.
        seed: Decides which samples of a class are taken.

    Example:
        >>> stratified_indices(torch.tensor([0, 0, 0, 0, 1, 1]), size=3, seed=0).shape
        torch.Size([3])
    """
    counts = torch.bincount(targets).tolist()
    exact = [size * count / len(targets) for count in counts]
    take = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda k: take[k] - exact[k])
    for k in by_remainder[: size - sum(take)]:
        take[k] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for k, number in enumerate(take):
        members = torch.nonzero(targets == k).flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:number]])
    return torch.cat(chosen).sort().values


def split_off(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Return ``(rest, part)``, where ``part`` is a stratified fraction of the split.

    Args:
        split: The samples to divide.
        fraction: Share of the samples that go to ``part``, between 0 and 1.
        seed: Decides which samples go.

    Raises:
        ValueError: A fraction that leaves either side without a sample.
    """
    size = round(fraction * len(split)) if 0 < fraction < 1 else 0
    if not 0 < size < len(split):
        raise ValueError(
            f"split_off(fraction={fraction}): expected a fraction between 0 and 1 that leaves "
            f"samples on both sides of {len(split)}, got {fraction}; try 0.1"
        )
    indices = stratified_indices(split.targets, size, seed)
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[indices] = False
    return split.select(torch.nonzero(rest).flatten()), split.select(indices)


def hold_out(task: Task, fraction: float, seed: int) -> Task:
    """Return the task with a part of its training set in place of its test set.

    For tuning: whoever chooses a learning rate on the result has never seen the real test set.

    Args:
        task: The task.
        fraction: Share of the training set to hold out, between 0 and 1.
        seed: Decides which samples are held out.

    Returns:
        A task whose ``test`` is the held-out part and whose ``train`` is the rest.

    Raises:
        ValueError: A fraction that leaves either side without a sample.
    """
    train, held_out = split_off(task.train, fraction, seed)
    note = f"tested on {len(held_out)} samples held out of the training set"
    return replace(
        task, train=train, test=held_out, note="; ".join(filter(None, (task.note, note)))
    )


def limit(task: Task, train_size: int | None = None, test_size: int | None = None) -> Task:
    """Return the task with fewer samples, each class in its share, always the same ones.

    Args:
        task: The task.
        train_size: Number of training samples to keep, or None for all.
        test_size: Number of test samples to keep, or None for all.

    Raises:
        ValueError: More samples than there are, or none.
    """
    splits = {}
    for which, split, size in (("train", task.train, train_size), ("test", task.test, test_size)):
        if size is None or size == len(split):
            continue
        if not 0 < size < len(split):
            raise ValueError(
                f"limit({which}_size={size}): expected 1 to {len(split)}, the {which} samples of "
                f"{task.title}, got {size}; leave it out to keep all"
            )
        splits[which] = split.select(stratified_indices(split.targets, size, seed=0))
    if not splits:
        return task
    note = ", ".join(f"{len(split)} {which} samples kept" for which, split in splits.items())
    return replace(task, **splits, note="; ".join(filter(None, (task.note, note))))

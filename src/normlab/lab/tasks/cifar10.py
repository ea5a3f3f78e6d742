"""CIFAR-10: objects and animals, 32x32 colour, 50,000 to train and 10,000 to test.

Read from parquet files as the Hugging Face hub lays them out. Copies that store the images as JPEG
have other pixels than the original: they are titled "CIFAR-10 (JPEG)".

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

from pathlib import Path

from normlab.lab.tasks import hub
from normlab.lab.tasks.task import Split, Task, channel_statistics

CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
IMAGES = {"train": 50_000, "test": 10_000}


def load(data: Path) -> Task:
    """Return CIFAR-10, with random crops and flips in training.

    Args:
        data: The folder with ``train-*.parquet`` and ``test-*.parquet``, or with a folder
            ``plain_text`` that holds them, as on the hub.

    Raises:
        ValueError: A file that is missing or cut off, an image that cannot be decoded, another
            number of images than CIFAR-10 has, or a label out of range.
    """
    train, train_encodings = read_split(data, "train", IMAGES["train"])
    test, test_encodings = read_split(data, "test", IMAGES["test"])
    encodings = train_encodings | test_encodings
    lossy = encodings != {"PNG"}
    mean, std = channel_statistics(train.inputs)
    return Task(
        name="cifar10",
        title=f"CIFAR-10 ({'/'.join(sorted(encodings))})" if lossy else "CIFAR-10",
        train=train,
        test=test,
        class_names=CLASS_NAMES,
        mean=mean,
        std=std,
        augmentation="crop-flip",
        note="the images were stored with loss: pixels differ from the original" if lossy else "",
    )


def read_split(data: Path, which: str, count: int) -> tuple[Split, frozenset[str]]:
    """Read the training or the test set.

    Args:
        data: The folder.
        which: ``train`` or ``test``.
        count: How many images there must be.

    Returns:
        The samples, and the formats their images were stored in.

    Raises:
        ValueError: As for :func:`load`.
    """
    path = _find(data, which)
    table = hub.read_image_table(path)
    shape = tuple(table.images.shape)
    if shape != (count, 3, 32, 32):
        raise ValueError(
            f"cifar10({str(path)!r}): expected {count} images of 3x32x32, got {shape[0]} of "
            f"{'x'.join(map(str, shape[1:]))}; fetch the file again"
        )
    low, high = int(table.labels.min()), int(table.labels.max())
    if low < 0 or high >= len(CLASS_NAMES):
        raise ValueError(
            f"cifar10({str(path)!r}): expected labels from 0 to {len(CLASS_NAMES) - 1}, got {low} "
            f"to {high}; fetch the file again"
        )
    return Split(table.images, table.labels), table.encodings


def _find(data: Path, which: str) -> Path:
    pattern = f"{which}-*.parquet"
    found = sorted([*data.glob(pattern), *data.glob(f"plain_text/{pattern}")])
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"cifar10({str(data)!r}): expected one {pattern} there or in plain_text/, got "
        f"{len(found)}; fetch the files with\n"
        f'    hf download uoft-cs/cifar10 --repo-type dataset --local-dir "{data}"'
    )

"""The idx files of MNIST and its kin: a short header, then bytes.

Header: two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension
as a big-endian 32-bit number.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from normlab.lab.tasks.task import Split

UNSIGNED_BYTE = 8
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IMAGES = {"train": 60_000, "test": 10_000}


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read one file, compressed if its name ends in ``.gz``.

    Args:
        path: The file.
        dimensions: How many dimensions it must have: 3 for images, 1 for labels.

    Returns:
        The bytes in their shape, uint8.

    Raises:
        ValueError: A file that cannot be unpacked, is cut off, has bytes left over, or is of
            another kind.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"read_idx({str(path)!r}): expected a whole file, got {type(error).__name__}: {error}; "
            f"fetch the file again"
        ) from error
    magic, header = UNSIGNED_BYTE * 256 + dimensions, 4 + 4 * dimensions
    found = int.from_bytes(content[:4], "big")
    if len(content) < header or found != magic:
        raise ValueError(
            f"read_idx({str(path)!r}): expected an idx file that begins with the number {magic}, "
            f"got {found} in {len(content)} bytes; fetch the file again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != prod(shape):
        raise ValueError(
            f"read_idx({str(path)!r}): expected {prod(shape)} bytes for "
            f"{'x'.join(map(str, shape))}, got {len(content) - header}; fetch the file again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def read_split(folder: Path, which: str, command: str, num_classes: int = 10) -> Split:
    """Read the images and the labels of the training or the test set.

    Args:
        folder: Where the files are.
        which: ``train`` or ``test``.
        command: What fetches the files, for the message when one is missing.
        num_classes: Labels must be below it.

    Raises:
        ValueError: A file that is missing or not whole, another number of images than the set has
            or than there are labels, or a label out of range.
    """
    images_path, labels_path = (_find(folder, name, command) for name in FILES[which])
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    expected = (IMAGES[which], 28, 28)
    if tuple(images.shape) != expected:
        raise ValueError(
            f"read_split({str(images_path)!r}): expected {'x'.join(map(str, expected))} pixels, "
            f"got {'x'.join(map(str, images.shape))}; fetch the file again"
        )
    if len(labels) != len(images):
        raise ValueError(
            f"read_split({str(labels_path)!r}): expected {len(images)} labels, one for each image, "
            f"got {len(labels)}; fetch the file again"
        )
    if int(labels.max()) >= num_classes:
        raise ValueError(
            f"read_split({str(labels_path)!r}): expected labels from 0 to {num_classes - 1}, got "
            f"{int(labels.max())}; fetch the file again"
        )
    return Split(images.unsqueeze(1), labels.to(torch.int64))


def _find(folder: Path, name: str, command: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    files = ", ".join(f"{file}.gz" for pair in FILES.values() for file in pair)
    raise ValueError(
        f"read_split({str(folder)!r}): expected the files {files} (or unpacked) there, got no "
        f"{name}; fetch them with\n    {command}"
    )

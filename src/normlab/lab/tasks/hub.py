"""Tables and images, read by Hugging Face `datasets` and Pillow, which are imported only here.

Only local files are read, without a network and without leaving a cache behind.
"""

from __future__ import annotations

import glob
import importlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

IMAGE_COLUMNS = ("img", "image")
ROWS_AT_ONCE = 5000
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Images of one size with their labels.

    Args:
        images: uint8 ``(N, 3, H, W)``.
        labels: int64 ``(N,)``.
        encodings: The file formats the images were stored in, such as ``PNG``.
    """

    images: Tensor
    labels: Tensor
    encodings: frozenset[str]


def read_image_table(path: Path, label_column: str = "label") -> ImageTable:
    """Read a parquet file of encoded images, as the Hugging Face hub stores them.

    Args:
        path: The file; its images are in a column ``img`` or ``image``.
        label_column: The column of whole numbers.

    Raises:
        ValueError: A file that is not parquet or is cut off, without these columns, or with an
            image that cannot be decoded or differs in size.
    """
    with _offline():
        datasets = _import("datasets")
    image = _import("PIL.Image")
    blobs: list[bytes] = []
    labels: list[int] = []
    # The reader locks a file in its cache folder even when it writes nothing there.
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        try:
            table = datasets.load_dataset(
                "parquet",
                data_files=[glob.escape(str(path))],
                split="train",
                streaming=True,
                cache_dir=cache,
            )
            columns = list(table.features)
        except Exception as error:
            raise _unreadable(path, error) from error
        image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
        if image_column is None or label_column not in columns:
            raise ValueError(
                f"read_image_table({str(path)!r}): expected columns 'img' or 'image' and "
                f"{label_column!r}, got {', '.join(map(repr, columns))}; fetch the file again"
            )
        try:
            table = table.cast_column(image_column, datasets.Image(decode=False))
            for rows in table.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
                blobs += [cell["bytes"] for cell in rows[image_column].to_pylist()]
                labels += rows[label_column].to_pylist()
        except Exception as error:
            raise _unreadable(path, error) from error
    if not blobs:
        raise ValueError(
            f"read_image_table({str(path)!r}): expected images, got an empty table; fetch the file "
            f"again"
        )
    if any(type(label) is not int for label in labels):
        raise ValueError(
            f"read_image_table({str(path)!r}): expected whole numbers in {label_column!r}, got "
            f"other values; fetch the file again"
        )

    pixels = bytearray()
    encodings: set[str] = set()
    width, height = 0, 0
    for number, blob in enumerate(blobs):
        try:
            decoded = image.open(io.BytesIO(blob))
            rgb = decoded if decoded.mode == "RGB" else decoded.convert("RGB")
            pixels += rgb.tobytes()
        except Exception as error:
            raise ValueError(
                f"read_image_table({str(path)!r}): expected an image in row {number}, got "
                f"{type(error).__name__}: {error}; fetch the file again"
            ) from error
        encodings.add(decoded.format)
        if number == 0:
            width, height = rgb.size
        if rgb.size != (width, height):
            raise ValueError(
                f"read_image_table({str(path)!r}): expected images of {width}x{height}, got "
                f"{rgb.size[0]}x{rgb.size[1]} in row {number}; fetch the file again"
            )
    images = torch.frombuffer(pixels, dtype=torch.uint8).reshape(-1, height, width, 3)
    return ImageTable(
        images.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), frozenset(encodings)
    )


def read_image_files(paths: Sequence[Path], size: int) -> Tensor:
    """Read image files as squares of one size.

    Each image is cut to its central square and scaled. Colour is kept if any image has it: then all
    of them get three channels, otherwise one.

    Args:
        paths: The files, at least one.
        size: Pixels on each side.

    Returns:
        uint8 ``(N, C, size, size)``.

    Raises:
        ValueError: A file that is not an image, is cut off, or has more than 8 bits a channel.
    """
    image, operations = _import("PIL.Image"), _import("PIL.ImageOps")
    squares = [_square(image, operations, path, size) for path in paths]
    mode = "L" if all(square.mode == "L" for square in squares) else "RGB"
    pixels = bytearray().join(square.convert(mode).tobytes() for square in squares)
    images = torch.frombuffer(pixels, dtype=torch.uint8).reshape(len(paths), size, size, len(mode))
    return images.permute(0, 3, 1, 2).contiguous()


def _square(image: ModuleType, operations: ModuleType, path: Path, size: int) -> Any:
    try:
        with image.open(path) as opened:
            mode = opened.mode
            decoded = opened.convert("L" if mode in ("1", "L") else "RGB")
    except Exception as error:
        raise ValueError(
            f"read_image_files({str(path)!r}): expected an image, got {type(error).__name__}: "
            f"{error}; replace or remove the file"
        ) from error
    if mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"read_image_files({str(path)!r}): expected 8 bits a channel, got the mode {mode}; "
            f"convert the file first"
        )
    if decoded.size == (size, size):
        return decoded
    return operations.fit(decoded, (size, size), method=image.Resampling.BILINEAR)


def _unreadable(path: Path, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    return ValueError(
        f"read_image_table({str(path)!r}): expected a parquet file, got {type(cause).__name__}: "
        f"{cause}; fetch the file again"
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises more than ImportError
        raise ValueError(
            f"import {name}: expected an installation that works, got {type(error).__name__}: "
            f"{error}; install the extra normlab[hub]"
        ) from error


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Keep the reader from printing what we raise."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the hub's client, which reads this variable on import, from asking its server."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before

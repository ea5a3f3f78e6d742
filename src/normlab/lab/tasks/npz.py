"""A user's own arrays, in one NumPy ``.npz`` file.

The file holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``, or ``x`` and ``y``, of which a
stratified fifth is split off as the test set; and ``class_names`` if it likes. What an array is
follows from its dimensions:

- ``(N, F)``: features.
- ``(N, H, W)``: grey images.
- ``(N, H, W, C)`` or ``(N, C, H, W)``: images, where C is the dimension that is 1, 3 or 4. If both
  are or neither is, the option ``layout`` must say ``NHWC`` or ``NCHW``.

Images of whole numbers from 0 to 255 stay bytes; everything else becomes float32.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from normlab.lab.tasks.task import Split, Task, channel_statistics, split_off

LAYOUTS = ("NHWC", "NCHW")
CHANNELS = (1, 3, 4)
TEST_FRACTION = 0.2
FOUR, TWO = ("x_train", "y_train", "x_test", "y_test"), ("x", "y")


def load(data: Path, layout: str = "") -> Task:
    """Return the arrays of a file.

    Args:
        data: The ``.npz`` file.
        layout: ``NHWC`` or ``NCHW``, where the rule above leaves it open.

    Raises:
        ValueError: A file that is missing or cut off, arrays that are missing, of a shape that has
            no meaning or with values that are not finite, or labels that are not classes from 0.
    """
    if layout and layout not in LAYOUTS:
        raise ValueError(
            f"npz(layout={layout!r}): expected {' or '.join(LAYOUTS)}, got {layout!r}; leave it "
            f"out for features and grey images"
        )
    arrays = _read(data)
    divided = all(name in arrays for name in FOUR)
    if not divided and not all(name in arrays for name in TWO):
        raise ValueError(
            f"npz({str(data)!r}): expected the arrays {', '.join(FOUR)} or {', '.join(TWO)}, got "
            f"{', '.join(arrays) or 'none'}; write the file with numpy.savez(file, x_train=..., "
            "...)"
        )
    names = FOUR if divided else TWO
    inputs = [_inputs(data, name, arrays[name], layout) for name in names[::2]]
    targets = [_targets(data, name, arrays[name]) for name in names[1::2]]
    if len({tensor.dtype for tensor in inputs}) > 1:  # bytes in one array, fractions in the other
        inputs = [tensor.float() for tensor in inputs]
    splits = [Split(*pair) for pair in zip(inputs, targets, strict=True)]
    if divided:
        train, test = splits
        note = ""
    else:
        train, test = split_off(splits[0], TEST_FRACTION, seed=0)
        note = f"no test arrays: {len(test)} of {len(splits[0])} samples split off as the test set"
    if "class_names" in arrays:
        class_names = tuple(str(name) for name in arrays["class_names"].reshape(-1))
    else:
        class_names = tuple(str(k) for k in range(1 + max(int(t.max()) for t in targets)))
    mean, std = channel_statistics(train.inputs)
    return Task(
        name="npz",
        title=data.stem,
        train=train,
        test=test,
        class_names=class_names,
        mean=mean,
        std=std,
        augmentation="none",
        note=note,
    )


def _read(data: Path) -> dict[str, np.ndarray]:
    if not data.is_file():
        raise ValueError(
            f"npz({str(data)!r}): expected a file, got none; write it with "
            f"numpy.savez(file, x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    try:
        if not zipfile.is_zipfile(data):  # numpy would read other kinds of file, too
            raise zipfile.BadZipFile("not a zip file")
        # No pickles: no code runs from a file that a stranger gave.
        with np.load(data, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in {*FOUR, *TWO, "class_names"}}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"npz({str(data)!r}): expected a whole .npz file of plain arrays, got "
            f"{type(error).__name__}: {error}; write it again with numpy.savez"
        ) from error


def _inputs(data: Path, name: str, array: np.ndarray, layout: str) -> torch.Tensor:
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(
            f"npz({str(data)!r}, {name}): expected numbers in 2, 3 or 4 dimensions, got "
            f"{array.dtype} {array.shape}; features are (N, F), images (N, H, W) or (N, H, W, C)"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"npz({str(data)!r}, {name}): expected finite values, got NaN or infinity; remove "
            f"these samples or fill the values in"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and _layout(data, name, array, layout) == "NHWC":
        array = np.moveaxis(array, 3, 1)
    whole = array.dtype.kind in "bui" and array.min() >= 0 and array.max() <= 255
    dtype = np.uint8 if whole and array.ndim == 4 else np.float32
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def _layout(data: Path, name: str, array: np.ndarray, layout: str) -> str:
    if layout:
        return layout
    last, first = array.shape[3] in CHANNELS, array.shape[1] in CHANNELS
    if last == first:
        raise ValueError(
            f"npz({str(data)!r}, {name}): expected 1, 3 or 4 channels in either the last or the "
            f"second dimension, got the shape {array.shape}; give the option layout, NHWC or NCHW"
        )
    return "NHWC" if last else "NCHW"


def _targets(data: Path, name: str, array: np.ndarray) -> torch.Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "ui" or array.ndim != 1 or array.size == 0 or array.min() < 0:
        raise ValueError(
            f"npz({str(data)!r}, {name}): expected whole numbers from 0, one for each sample, got "
            f"{array.dtype} {array.shape}; number the classes from 0"
        )
    return torch.from_numpy(array.astype(np.int64))

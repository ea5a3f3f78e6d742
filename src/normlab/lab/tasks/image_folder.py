"""A user's own images, one folder for each class.

::

    <data>/train/<class>/*.png
    <data>/test/<class>/*.png     or val/; without either, a stratified fifth of train is split off

Each image is cut to its central square and scaled to one size.
"""

from __future__ import annotations

from pathlib import Path

import torch

from normlab.lab.tasks import hub
from normlab.lab.tasks.task import Split, Task, channel_statistics, split_off

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_FRACTION = 0.2


def load(data: Path, image_size: int = 32) -> Task:
    """Return the images of a folder.

    Args:
        data: The folder with ``train`` and, if there is one, ``test`` or ``val``.
        image_size: Pixels on each side of the scaled images, at least 1.

    Raises:
        ValueError: No such folders, a class without images or unknown in training, or a file that
            cannot be decoded.
    """
    if image_size < 1:
        raise ValueError(
            f"image-folder(image_size={image_size}): expected at least 1, got {image_size}; try 32"
        )
    files = _list(data / "train", data)
    class_names = tuple(files)
    if len(class_names) < 2:
        raise ValueError(
            f"image-folder({str(data / 'train')!r}): expected a folder for each of at least two "
            f"classes, got {len(class_names)}; see <data>/train/<class>/*.png"
        )
    test_folder = next((data / n for n in ("test", "val") if (data / n).is_dir()), None)
    if test_folder is None:
        images, targets = _read(files, class_names, image_size)
        train, test = split_off(Split(images, targets), TEST_FRACTION, seed=0)
        note = f"no test folder: {len(test)} of {len(targets)} images split off as the test set"
    else:
        test_files = _list(test_folder, data)
        for name in test_files:
            if name not in class_names:
                raise ValueError(
                    f"image-folder({str(test_folder)!r}): expected the classes of train, "
                    f"{', '.join(class_names)}, got {name!r}; add it to train or remove it"
                )
        images, targets = _read(files, class_names, image_size)
        test_images, test_targets = _read(test_files, class_names, image_size)
        if images.shape[1] != test_images.shape[1]:
            # One set has colour and the other none: give both three channels.
            images, test_images = (i.expand(-1, 3, -1, -1) for i in (images, test_images))
        train = Split(images.contiguous(), targets)
        test = Split(test_images.contiguous(), test_targets)
        note = ""
    mean, std = channel_statistics(train.inputs)
    return Task(
        name="image-folder",
        title=f"{data.resolve().name} ({image_size}x{image_size})",
        train=train,
        test=test,
        class_names=class_names,
        mean=mean,
        std=std,
        augmentation="none",
        note=note,
    )


def _list(folder: Path, data: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, both in the order of their names."""
    if not folder.is_dir():
        raise ValueError(
            f"image-folder({str(data)!r}): expected {folder.name}/<class>/*.png in it, got no "
            f"folder {folder.name}; put the images of each class into a folder of its name"
        )
    files: dict[str, list[Path]] = {}
    for class_folder in sorted(folder.iterdir()):
        if not class_folder.is_dir() or class_folder.name.startswith("."):
            continue
        files[class_folder.name] = sorted(
            path
            for path in class_folder.iterdir()
            if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
        )
        if not files[class_folder.name]:
            raise ValueError(
                f"image-folder({str(class_folder)!r}): expected images in it, got none; add some "
                f"or remove the folder"
            )
    if not files:
        raise ValueError(
            f"image-folder({str(folder)!r}): expected a folder for each class, got none; see "
            f"<data>/{folder.name}/<class>/*.png"
        )
    return files


def _read(
    files: dict[str, list[Path]], class_names: tuple[str, ...], image_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    paths = [path for name in files for path in files[name]]
    targets = [class_names.index(name) for name in files for _ in files[name]]
    return hub.read_image_files(paths, image_size), torch.tensor(targets)

"""Handwritten digits of 8x8 pixels, bundled with scikit-learn: real data without a download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test
part of 1797 images, which is what scikit-learn carries). There is no official division; ours is
stratified and fixed, 1347 to train and 450 to test.
"""

from __future__ import annotations

import torch

from normlab.lab.tasks.task import Split, Task, channel_statistics, split_off

TEST_SIZE = 450


def load() -> Task:
    """Return the digits: bytes of 0 to 16 in ``(1, 8, 8)``, ten classes, no augmentation.

    Raises:
        ValueError: scikit-learn cannot be imported.

    Example:
        >>> task = load()
        >>> task.input_shape, len(task.train), len(task.test)
        ((1, 8, 8), 1347, 450)
    """
    try:
        from sklearn.datasets import load_digits
    except Exception as error:  # a broken installation raises more than ImportError
        raise ValueError(
            f"load_task('digits'): expected scikit-learn, which carries the data, got "
            f"{type(error).__name__}: {error}; install the extra normlab[lab]"
        ) from error

    pixels, classes = load_digits(return_X_y=True)
    inputs = torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
    targets = torch.as_tensor(classes).to(torch.int64)
    train, test = split_off(Split(inputs, targets), TEST_SIZE / len(targets), seed=0)
    mean, std = channel_statistics(train.inputs)
    return Task(
        name="digits",
        title="Digits (8x8)",
        train=train,
        test=test,
        class_names=tuple("0123456789"),
        mean=mean,
        std=std,
        augmentation="none",
    )

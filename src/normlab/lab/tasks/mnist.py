"""MNIST: handwritten digits, 28x28 grey, 60,000 to train and 10,000 to test.

Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits; described in Y.
LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-Based Learning Applied to Document Recognition,
1998.
"""

from __future__ import annotations

from pathlib import Path

from normlab.lab.tasks import idx
from normlab.lab.tasks.task import Task, channel_statistics

LOCATION = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
)


def load(data: Path) -> Task:
    """Return MNIST from its four idx files, compressed or not.

    Args:
        data: The folder with the files.

    Raises:
        ValueError: A file that is missing, cut off or not what its name says.
    """
    command = f'curl -fL --create-dirs --output-dir "{data}" --remote-name-all "{LOCATION}"'
    train, test = (idx.read_split(data, which, command) for which in ("train", "test"))
    mean, std = channel_statistics(train.inputs)
    return Task(
        name="mnist",
        title="MNIST",
        train=train,
        test=test,
        class_names=tuple("0123456789"),
        mean=mean,
        std=std,
        augmentation="none",
    )

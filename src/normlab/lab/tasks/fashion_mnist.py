"""Fashion-MNIST: articles of clothing, 28x28 grey, 60,000 to train and 10,000 to test.

Source: H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms, 2017, arXiv:1708.07747.
"""

from __future__ import annotations

from pathlib import Path

from normlab.lab.tasks import idx
from normlab.lab.tasks.task import Task, channel_statistics

LOCATION = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
    "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
)
CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load(data: Path) -> Task:
    """Return Fashion-MNIST from its four idx files, compressed or not.

    Args:
        data: The folder with the files.

    Raises:
        ValueError: A file that is missing, cut off or not what its name says.
    """
    command = f'curl -fL --create-dirs --output-dir "{data}" --remote-name-all "{LOCATION}"'
    train, test = (idx.read_split(data, which, command) for which in ("train", "test"))
    mean, std = channel_statistics(train.inputs)
    return Task(
        name="fashion-mnist",
        title="Fashion-MNIST",
        train=train,
        test=test,
        class_names=CLASS_NAMES,
        mean=mean,
        std=std,
        augmentation="none",
    )

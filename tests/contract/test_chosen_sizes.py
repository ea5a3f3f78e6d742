"""What is said where normalised weights forget an initialisation."""

import pytest
import torch

from normlab.catalog import find_method
from normlab.lab.models import build_model
from normlab.method import Setting

NORMALISING = ("spectral-norm", "bidirectional-spectral-norm", "weight-standardization")


def said(label):
    sentences = []
    batch = (torch.randn(4, 2, 8, 8), torch.arange(4))
    setting = Setting(batches=(batch,), say=sentences.append)
    find_method(label).prepare(build_model("resnet", (2, 8, 8), 4, depth=8, width=4), setting)
    return [sentence for sentence in sentences if "lost" in sentence]


@pytest.mark.parametrize("name", NORMALISING)
def test_behind_fixup_it_is_said(name):
    # Three branches end in a zero weight, and the readout is zero.
    assert said(f"fixup+{name}") == [
        "weights that start at zero: 4; if fixup chose the sizes of the others, they are lost"
    ]


@pytest.mark.parametrize("name", NORMALISING)
def test_otherwise_nothing_is_said(name):
    assert said(name) == []

"""The README keeps its word: its code runs, its table is complete, its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from normlab.catalog import METHODS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    converting, training, accumulating = blocks
    names = {"inputs": torch.randn(8, 1, 8, 8), "targets": torch.arange(8) % 3, "model": network()}
    names["example_batch"] = names["inputs"]
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    exec(compile(converting, "README.md", "exec"), names)
    assert not any(type(module) is nn.BatchNorm2d for module in names["model"].modules())
    names["model"] = network()
    exec(compile(training, "README.md", "exec"), names)
    assert names["layer"](torch.randn(2, 64, 4, 4)).shape == (2, 64, 4, 4)
    pairs = zip(names["inputs"].split(2), names["targets"].split(2), strict=True)
    names |= {"micro_batches": pairs, "loss_function": nn.functional.cross_entropy}
    exec(compile(accumulating, "README.md", "exec"), names)
    assert names["loss"] > 0
    names["optimizer"].step()
    norms = names["model"][0].weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))


def test_the_table_names_every_method_in_order():
    table = re.findall(r"^\| `([\w-]+)` \|", TEXT, flags=re.MULTILINE)
    assert table == [method.card.name for method in METHODS]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.card.name)
def test_the_table_says_of_batches_what_the_card_says(method):
    card = method.card
    (row,) = re.findall(rf"^\| `{card.name}` \|.*\| (.*) \| (.*) \|$", TEXT, flags=re.MULTILINE)
    as_the_model = card.batch_of_one == "as the model" and not card.batch_statistics
    needs = "yes" if card.batch_statistics else "as the model" if as_the_model else "no"
    assert row == (needs, card.batch_of_one)


def test_local_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target

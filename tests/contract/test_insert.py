"""BatchNorm layers are put where a user would have written them."""

import torch
from torch import nn

from normlab.surgery.insert import insert_batch_norms


def norms(model):
    return [(name, type(m)) for name, m in model.named_modules() if "BatchNorm" in type(m).__name__]


def test_behind_each_weight_layer_but_the_last():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(6 * 36, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    model, count = insert_batch_norms(model, torch.randn(2, 3, 6, 6))
    assert count == 3
    assert norms(model) == [
        ("0.norm", nn.BatchNorm2d), ("2.norm", nn.BatchNorm2d), ("4.norm", nn.BatchNorm1d),
    ]  # fmt: skip
    assert [model[place].norm.num_features for place in (0, 2, 4)] == [4, 6, 5]
    model(torch.randn(2, 3, 6, 6)).sum().backward()


def test_sequences_and_shared_layers_are_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.last = (nn.Linear(4, 4) for _ in range(3))
            self.flat = nn.Linear(4, 4)

        def forward(self, x):
            x = self.twice(self.twice(self.first(x)))
            return self.last(self.flat(x.mean(1)))

    model, count = insert_batch_norms(Model(), torch.randn(2, 3, 4))
    assert count == 1
    assert norms(model) == [("flat.norm", nn.BatchNorm1d)]

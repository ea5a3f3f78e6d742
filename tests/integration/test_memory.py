"""The count of bytes alive at one time, against sums made by hand."""

import torch
from torch import nn

from normlab.lab.memory import TensorMemory, peak_memory


def test_freed_tensors_no_longer_count():
    with TensorMemory([]) as memory:
        for _ in range(5):
            x = torch.ones(1000)
            del x
    assert memory.peak == 4000


def test_views_count_once():
    with TensorMemory([]) as memory:
        x = torch.ones(10, 100)
        y = x.t().reshape(-1, 2).view(-1)[:5]
        z = x[3]
        del y, z
    assert memory.peak == 2 * 4000  # the reshape of a transposed tensor copies


def test_a_step_holds_parameters_activations_and_gradients():
    model = nn.Linear(100, 50, bias=False)
    x = torch.randn(20, 100)
    with peak_memory(model, wanted=True) as peak:
        model(x).sum().backward()
    weights, outputs = 100 * 50 * 4, 20 * 50 * 4
    # Weights and their gradient stay; outputs (or the gradient of them) are alive meanwhile.
    assert 2 * weights <= peak[0] <= 2 * weights + 3 * outputs


def test_it_may_be_left_out():
    with peak_memory(nn.Linear(2, 2), wanted=False) as peak:
        torch.ones(10)
    assert peak == []

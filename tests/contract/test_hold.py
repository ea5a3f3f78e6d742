"""Held modules are out of a surgery's sight."""

import torch
from torch import nn

from normlab.surgery.hold import Held, hold, release
from normlab.surgery.normalisers import find_normalisers


def test_held_modules_are_out_of_sight_and_compute_all_the_same():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    expected = model(torch.ones(2, 3))
    norm = model[1]
    model = hold(model, [norm])
    assert [one.name for one in find_normalisers(model)] == ["2"]
    torch.testing.assert_close(model(torch.ones(2, 3)), expected)
    model.eval()
    assert not norm.training
    assert release(model)[1] is norm
    assert isinstance(hold(norm, [norm]), Held)
    assert release(hold(norm, [norm])) is norm

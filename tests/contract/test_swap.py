"""Replacing modules wherever they stand."""

import pytest
import torch
from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.swap import adopt, keep_affine, modules_of, swap, swap_batch_norms


def test_a_shared_module_is_replaced_everywhere_by_one():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Sequential(norm), norm)
    new = nn.Identity()
    assert swap(model, {norm: new}) is model
    assert model[0] is new
    assert model[1][0] is new
    assert model[2] is new


def test_one_parent_may_hold_a_module_under_two_names():
    parent = nn.Module()
    parent.one = parent.two = nn.ReLU()
    swap(parent, {parent.one: nn.ELU()})
    assert parent.one is parent.two
    assert isinstance(parent.two, nn.ELU)


def test_the_root_itself_is_replaced():
    root, new = nn.BatchNorm2d(3), nn.Identity()
    assert swap(root, {root: new}) is new


def test_a_replacement_may_hold_what_it_replaces():
    model = nn.Sequential(nn.ReLU())
    inner = model[0]
    swap(model, {inner: nn.Sequential(inner, nn.ELU())})
    assert model[0][0] is inner


def test_dtype_and_mode_are_taken_over():
    old = nn.BatchNorm1d(3).double().eval()
    new = adopt(nn.GroupNorm(1, 3), old)
    assert new.weight.dtype is torch.float64
    assert not new.training


def test_scale_and_shift_are_kept():
    old, new = nn.BatchNorm1d(3), nn.GroupNorm(1, 3)
    nn.init.normal_(old.weight)
    nn.init.normal_(old.bias)
    keep_affine(new, old)
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)
    keep_affine(new, nn.BatchNorm1d(3, affine=False))
    assert torch.equal(new.weight, old.weight)


def test_subclasses_are_not_taken_for_plain_layers():
    class Fused(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Fused(3), nn.BatchNorm2d(3))
    assert list(modules_of(model, (nn.BatchNorm2d,))) == ["1"]


def test_no_norm_at_all_is_refused():
    with pytest.raises(Unsuitable, match=r"tidy\(model\): expected a model with nn.BatchNorm"):
        swap_batch_norms(nn.Linear(2, 2), lambda name, norm: nn.Identity(), "tidy")


def test_a_refusal_halfway_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))

    def only_the_first(name, norm):
        if name == "1":
            raise Unsuitable("no")
        return nn.Identity()

    with pytest.raises(Unsuitable):
        swap_batch_norms(model, only_the_first, "tidy")
    assert all(isinstance(layer, nn.BatchNorm1d) for layer in model)

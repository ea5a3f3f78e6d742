"""Batchless normalisation as a method: on the models of the workbench, and prepared from data."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.batchless_norm import METHOD, from_batch_norm, statistics_parameters
from normlab.testing import METHOD_CHECKS, MethodCase

MODELS = {
    "mlp": ("mlp", {"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ("plain-conv", {"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ("resnet", {"depth": 8, "width": 8}, (2, 8, 8)),
    "projection": ("resnet", {"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "bottleneck": ("resnet", {"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}


def method_case(model, method=METHOD):
    name, options, shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return MethodCase(
        method=method,
        make_model=lambda: build_model(name, shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


@pytest.mark.parametrize("model", MODELS)
def test_method_contract(model):
    for check in METHOD_CHECKS:
        check(method_case(model))


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"inject": True},
        {"std_parametrization": "abs"},
        {"std_parametrization": "inv"},
    ],
    ids=str,
)
def test_method_contract_with_options(options):
    for check in METHOD_CHECKS:
        check(method_case("resnet", METHOD.with_options(**options)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("std_parametrization", ["log", "abs", "inv"])
def test_started_from_statistics_evaluation_stays(model, std_parametrization):
    method = METHOD.with_options(start="statistics", std_parametrization=std_parametrization)
    promised = dataclasses.replace(METHOD.card, keeps_evaluation=True)
    for check in METHOD_CHECKS:
        check(method_case(model, dataclasses.replace(method, card=promised)))


def batch_norm_with_history(affine=True):
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(3, affine=affine).double()
    for _ in range(3):
        norm(torch.randn(6, 3).double() * 3 + 1)
    return norm.eval()


@pytest.mark.parametrize("affine", [True, False])
def test_from_batch_norm_keeps_its_evaluation(affine):
    norm, x = batch_norm_with_history(affine), torch.randn(5, 3).double()
    layer = from_batch_norm(norm)
    assert not layer.training
    torch.testing.assert_close(layer(x), norm(x), atol=1e-13, rtol=1e-13)
    assert (layer.weight is not None) == affine


def test_statistics_that_are_not_finite_are_refused():
    norm = batch_norm_with_history()
    norm.running_var[1] = -1.0
    with pytest.raises(ValueError, match="expected finite running statistics"):
        from_batch_norm(norm)


def model_and_setting(said=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(30, 4)
    batches = tuple((part, torch.zeros(len(part))) for part in x.split(8))
    return model, x, Setting(batches=batches, say=(said or []).append)


def test_prepare_sets_the_statistics_of_the_whole_sample():
    model, x, setting = model_and_setting(said := [])
    model[1].running_mean.fill_(7.0)
    hidden = model[0](x).detach()
    model = METHOD.prepare(model, setting)
    torch.testing.assert_close(model[1].mu.detach(), hidden.mean(0))
    torch.testing.assert_close(model[1].std, hidden.std(0, correction=0))
    assert said == [] or "1 BatchNorm layers became batchless" in said[0]


def test_statistics_do_not_decay():
    model, _, setting = model_and_setting()
    model = METHOD.prepare(model, setting)
    groups = [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.3}]
    groups = METHOD.parameter_groups(groups, model, setting)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    free = [id(p) for p in statistics_parameters(model)]
    assert free == [id(model[1].mu), id(model[1].s)]
    assert {key for key, value in decay.items() if value == 0} == set(free)


def test_the_methods_penalty_has_gradients_and_no_value():
    model, x, setting = model_and_setting()
    model = METHOD.prepare(model, setting)
    model(x + 1)
    penalty = METHOD.penalty(model)
    penalty.backward()
    assert penalty.item() == 0
    assert model[1].mu.grad.abs().max() > 0.01


def test_a_failed_preparation_leaves_the_model():
    model, x, setting = model_and_setting()
    before = list(model)
    bad = dataclasses.replace(setting, batches=((x * math.nan, x),))
    with pytest.raises(ValueError, match="expected finite values at layer '1'"):
        METHOD.prepare(model, bad)
    assert list(model) == before


def test_preparation_refuses_with_the_reason():
    model, _, setting = model_and_setting()
    with pytest.raises(ValueError, match="do you mean 'data'"):
        METHOD.with_options(start="date").prepare(model, setting)
    with pytest.raises(Unsuitable, match="without any"):
        METHOD.prepare(nn.Linear(2, 2), setting)
    model[1] = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(Unsuitable, match="got 1 without; use start='data'"):
        METHOD.with_options(start="statistics").prepare(model, setting)
    METHOD.prepare(model, setting)


@pytest.mark.parametrize("lr", [0.01, 0.05])
def test_batches_of_one_train_with_momentum(lr):
    torch.manual_seed(0)
    x = torch.randn(64, 1, 6, 6)
    t = (x.mean((1, 2, 3)) > 0).long()
    x = x + 0.5 * (2 * t - 1).reshape(-1, 1, 1, 1)
    model = build_model("plain-conv", (1, 6, 6), 2, depth=3, width=8)
    model = METHOD.prepare(model, Setting(batches=((x, t),))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for step in range(256):
        i = step % 64
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), t[i : i + 1])
        optimizer.zero_grad()
        (loss + METHOD.penalty(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-64:]) < 0.5 * sum(losses[:64])

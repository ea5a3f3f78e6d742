"""A conversion says what it did, proves it, carries everything over and can be undone."""

import copy

import pytest
import torch
from torch import nn

from normlab.conversion import convert, fold, freeze
from normlab.method import Card, Method, Unsuitable
from normlab.norms.filter_response_norm import FilterResponseNorm, ThresholdedLinearUnit
from normlab.surgery.conversion import Unproven
from resnets_of_others import TorchvisionResNet

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


def trained(model, steps=3):
    """A model whose statistics and weights are not those of the start."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model.train()(X + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before, kinds):
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def method(change, *, keeps=False):
    """A method for tests that does ``change(model)``."""
    card = Card(
        name="change", title="", summary="", room="norms", source=None, keeps_evaluation=keeps
    )
    return Method(card=card, prepare=lambda model, setting: change(model))


def replaced(layer, place="1"):
    def change(model):
        model._modules[place] = layer
        return model

    return change


def test_the_plan_names_every_place_and_what_was_kept():
    model = trained(network())
    plan = convert(model, "group-norm", X).plan
    (first, second) = plan.changes
    assert (first.name, first.old, first.new) == ("1", "BatchNorm2d", "GroupNorm")
    assert first.kept == ("bias", "weight")
    assert first.dropped == ("num_batches_tracked", "running_mean", "running_var")
    assert (first.changed, first.added) == ((), ())
    assert second.name == "4"
    assert "1, 4: BatchNorm2d -> GroupNorm; kept bias, weight" in str(plan)


def test_weights_mode_dtype_and_frozen_parameters_are_carried_over():
    model = trained(network()).double().eval()
    model[4].train()
    model[1].weight.requires_grad_(False)
    scale, shift = model[1].weight, model[4].bias
    model = convert(model, "group-norm", X.double()).model
    assert type(model[1]) is nn.GroupNorm
    assert model[1].weight is scale
    assert model[4].bias is shift
    assert not model[1].weight.requires_grad
    assert model[1].weight.dtype is torch.float64
    assert not model[1].training
    assert model[4].training


def test_undo_restores_the_model_exactly():
    model = trained(network())
    model[1].eval()
    objects = {name: id(value) for name, value in model.named_parameters()}
    kinds, before = [type(module) for module in model.modules()], state(model)
    done = convert(model, "filter-response-norm", X)
    trained(done.model)
    back = done.undo()
    assert back is model
    assert_unchanged(model, before, kinds)
    assert {name: id(value) for name, value in model.named_parameters()} == objects
    assert not model[1].training
    assert model[4].training


def test_a_method_that_builds_a_new_model_can_be_undone():
    model = trained(network())
    kinds, before = [type(module) for module in model.modules()], state(model)
    done = convert(model, "ic-layer", X)
    assert done.model is not model
    assert done.undo() is model
    assert_unchanged(model, before, kinds)


def test_a_dry_run_changes_nothing_and_shows_all():
    model = trained(network())
    kinds, before = [type(module) for module in model.modules()], state(model)
    done = convert(model, "layer-norm", X, dry_run=True)
    assert done.model is model
    assert len(done.plan.changes) == 2
    assert done.proof.difference > 0
    assert_unchanged(model, before, kinds)


@pytest.mark.parametrize("surgery", [fold, freeze])
def test_function_preserving_surgery_is_proven_and_undone(surgery):
    model = trained(network()).eval()
    expected, kinds, before = model(X), [type(m) for m in model.modules()], state(model)
    done = surgery(model, X)
    assert done.proof.required
    assert done.proof.relative < 1e-5
    torch.testing.assert_close(done.model(X), expected, atol=1e-5, rtol=1e-5)
    assert not any(type(module) is nn.BatchNorm2d for module in done.model.modules())
    done.undo()
    assert_unchanged(model, before, kinds)


def test_freezing_only_some_says_why_the_others_stay():
    model = trained(network())
    done = freeze(model, X, only=["1"])
    assert [change.name for change in done.plan.changes] == ["1"]
    assert done.plan.skipped == {"4": "you did not ask for it"}
    with pytest.raises(ValueError, match="do you mean '4'"):
        freeze(network(), X, only=["44"])


def test_folding_leaves_what_it_cannot_fold_with_the_reason():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))).eval()
    with pytest.raises(Unsuitable, match=r"next to a weight layer, got '2'"):
        fold(model, X)
    assert type(model[2]) is nn.BatchNorm2d


def test_a_change_that_breaks_its_promise_is_put_back():
    model = trained(network())
    kinds, before = [type(module) for module in model.modules()], state(model)
    with pytest.raises(Unproven, match=r"expected the same outputs .* put back"):
        convert(model, method(replaced(nn.Identity()), keeps=True), X)
    assert_unchanged(model, before, kinds)
    # The same change is fine where it is meant to alter the function, which is then reported.
    done = convert(model, method(replaced(nn.Identity())), X)
    assert not done.proof.required
    assert "another function" in str(done.proof)
    assert done.proof.difference > 1e-3


def test_the_user_may_insist_on_the_same_function():
    with pytest.raises(Unproven, match="expected the same outputs"):
        convert(trained(network()), "layer-norm", X, keeps_evaluation=True)
    batch_norm = trained(network())
    assert convert(batch_norm, "dropout", X, keeps_evaluation=True).proof.difference == 0


def test_a_method_that_raises_halfway_leaves_no_trace():
    def change(model):
        model[1] = nn.Identity()
        with torch.no_grad():
            model[0].weight.zero_()
        raise Unsuitable("change(model): expected better, got this; do otherwise")

    model = trained(network())
    kinds, before = [type(module) for module in model.modules()], state(model)
    with pytest.raises(Unsuitable, match="expected better"):
        convert(model, method(change), X)
    assert_unchanged(model, before, kinds)


def test_a_stale_reference_to_a_replaced_module_is_found():
    class Stale(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.steps = [self.conv, self.norm]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    model = Stale()
    with pytest.raises(Unproven, match="expected 'norm' to be replaced everywhere"):
        convert(model, "layer-norm", X)
    assert type(model.norm) is nn.BatchNorm2d


def test_a_training_pass_that_fails_after_and_not_before_is_found():
    class Breaks(nn.Module):
        def forward(self, x):
            y = x.sigmoid()
            return y.mul_(2) if self.training else y  # sigmoid needs its output for backward

    model = network()
    with pytest.raises(Unproven, match="expected a training pass to work as before"):
        convert(model, method(replaced(Breaks())), X)
    assert type(model[1]) is nn.BatchNorm2d


def test_the_training_pass_leaves_no_trace():
    model = trained(network())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    random = torch.get_rng_state()
    statistics = state(model)
    convert(model, "batch-norm", X)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("label", ["lars", "mixup", "lookahead+sam"])
def test_methods_that_act_in_training_alone_are_refused(label):
    with pytest.raises(Unsuitable, match=r"acts in training alone; use its parts in the training"):
        convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), label, torch.randn(4, 4))


def test_optimisers_follow_and_come_back():
    model = network()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}],
        lr=0.1,
        momentum=0.9,
    )
    model(X).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[model[1].weight]["momentum_buffer"]
    done = convert(model, "filter-response-norm", X, optimizers=optimizer)
    grouped = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    own = {id(p) for p in done.model.parameters()}
    assert grouped[0] | grouped[1] == own
    assert {id(p) for p in weights} == grouped[0]
    thresholds = [
        module.threshold for module in model.modules() if isinstance(module, ThresholdedLinearUnit)
    ]
    assert thresholds
    assert all(id(threshold) in grouped[1] for threshold in thresholds)
    # Scale and shift survive as the same parameters, with their momentum.
    scales = [m.weight for m in model.modules() if isinstance(m, FilterResponseNorm)]
    assert optimizer.state[scales[0]]["momentum_buffer"] is momentum
    model(X).square().mean().backward()
    optimizer.step()
    done.undo()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    assert all(p in optimizer.state for p in model.parameters())


def test_the_root_itself_is_replaced():
    norm = nn.BatchNorm2d(3)
    done = convert(norm, "group-norm", X)
    assert type(done.model) is nn.GroupNorm
    assert done.plan.changes[0].name == ""
    assert done.undo() is norm


def test_modules_registered_twice_or_shared_stay_one():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm), nn.ReLU())
    model.again = norm
    model = convert(model, "group-norm", X).model
    assert type(model[0]) is nn.GroupNorm
    assert model[0] is model[1][1]
    assert model[0] is model.again


def test_obstacles_stop_a_conversion_unless_allowed():
    model = trained(network())
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(Unsuitable, match=r"'1': it has forward hooks, .*allow_skipped=True"):
        convert(model, "group-norm", X)
    done = convert(model, "group-norm", X, allow_skipped=True)
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[4]) is nn.GroupNorm
    assert "forward hooks" in done.plan.skipped["1"]
    handle.remove()


def test_layers_can_be_skipped_by_name():
    model = network()
    done = convert(model, "group-norm", X, skip=["4"])
    assert (type(model[1]), type(model[4])) == (nn.GroupNorm, nn.BatchNorm2d)
    assert done.plan.skipped == {"4": "you asked to skip it"}
    with pytest.raises(ValueError, match="do you mean '4'"):
        convert(network(), "group-norm", X, skip=["4a"])


def test_a_model_without_a_normaliser():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(Unsuitable, match=r"expected a model with nn\.BatchNorm layers"):
        convert(model, "group-norm", X)
    assert convert(model, "group-norm", X, allow_none=True).plan.changes == ()
    done = convert(model, "group-norm", X, add=True)
    assert type(done.model[0].norm) is nn.GroupNorm
    assert type(done.undo()[0]) is nn.Conv2d


def test_other_normalisers_are_named_in_the_refusal():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LayerNorm(4))
    with pytest.raises(Unsuitable, match=r"it has 1 LayerNorm"):
        convert(model, "group-norm", X)


def test_removing_normalisers():
    done = convert(trained(network()), "none", X)
    assert [change.new for change in done.plan.changes] == ["ChannelBias", "ChannelBias"]


def test_an_impossible_pair_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))
    with pytest.raises(Unsuitable, match="one position"):
        convert(model, "instance-norm", X)
    assert type(model[2]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(1, 3, 8, 8), "at least 2 samples"),
        ([torch.randn(2, 3)], "expected one tensor"),
        (torch.tensor(1.0), "expected one tensor"),
    ],
)
def test_bad_examples(example, message):
    with pytest.raises(ValueError, match=message):
        convert(network(), "group-norm", example)


def test_broken_statistics_are_found_before_anything_is_done():
    model = network()
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(Unproven, match="expected finite outputs"):
        convert(model, "group-norm", X)
    assert type(model[1]) is nn.BatchNorm2d


def test_wrapped_models_are_refused():
    with pytest.raises(Unsuitable, match="OptimizedModule"):
        convert(torch.compile(network()), "group-norm", X)
    with pytest.raises(ValueError, match=r"expected an nn\.Module"):
        convert("resnet18", "group-norm", X)


def test_unknown_methods_name_the_nearest():
    with pytest.raises(ValueError, match="do you mean 'group-norm'"):
        convert(network(), "grupnorm", X)


def test_hooks_elsewhere_stay_and_fire():
    model, calls = network(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model = convert(model, "group-norm", X).model
    calls.clear()
    model(X)
    assert calls == [1]


def test_a_converted_model_can_be_copied_and_converted_again():
    model = convert(trained(network()), "group-norm", X).model
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(X), model(X))
    with pytest.raises(Unsuitable, match="2 GroupNorm"):
        convert(model, "layer-norm", X)


def test_a_torchvision_like_resnet():
    model = TorchvisionResNet()
    done = convert(model, "group-norm", X)
    assert len(done.plan.changes) == sum(
        type(module) is nn.GroupNorm for module in done.model.modules()
    )
    done.undo()

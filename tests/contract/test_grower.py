"""Growth on a schedule: closed forms, checkpoints around growth, and several processes."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing, nn

from growth_work import (
    OPTIMISERS,
    X,
    batch,
    by_chance,
    by_gradient,
    growing,
    network,
    train,
    work,
)
from normlab.growth.grower import Grower
from normlab.growth.grown_widths import remember_widths, remembered_widths
from normlab.growth.pairs import find_pairs
from normlab.growth.schedule import (
    GrowthSchedule,
    extra_epochs,
    spread_width,
    units_per_growth,
)
from normlab.optim.bn_preconditioning import BatchNormPreconditioner
from normlab.optim.effective_lr import LearningRateScaling
from normlab.optim.weight_rescaling import WeightRescaler


def scale_free(model):
    return [SimpleNamespace(weight=parameter) for parameter in model.parameters()]


def widths(model):
    return [model[0].out_features, model[2].out_features]


def test_growth_steps_and_widths_are_those_of_the_closed_form():
    schedule = GrowthSchedule(start=3, every=2, num_growths=3)
    assert schedule.steps() == [4, 6, 8]
    model, optimizer, grower = growing(schedule)
    seen = []
    for step in range(10):
        train(model, optimizer, 1, step)
        seen.append(widths(model))
    grown = [sum(step >= one for one in schedule.steps()) for step in range(1, 11)]
    assert seen == [[4 + turns, 4 + turns] for turns in grown]
    assert [grower.widths_after(growth) for growth in (0, 1, 3)] == [[4, 4], [5, 5], [7, 7]]
    assert optimizer.param_groups[0]["growth"] == {"step": 10}


def test_round_robin_grows_one_pair_at_a_time():
    schedule = GrowthSchedule(1, 1, 5, round_robin=True)
    model, optimizer, _ = growing(schedule, final_widths=[7, 6])
    seen = []
    for step in range(6):
        train(model, optimizer, 1, step)
        seen.append(widths(model))
    assert seen == [[5, 4], [5, 5], [6, 5], [6, 6], [7, 6], [7, 6]]
    assert [list(schedule.pairs_at(growth, 2)) for growth in range(3)] == [[0], [1], [0]]
    turns = [schedule.turns(pair, 5, 2) for pair in range(2)]
    counted = [sum(pair in schedule.pairs_at(g, 2) for g in range(5)) for pair in range(2)]
    assert turns == counted


def test_published_schedules():
    assert GrowthSchedule(10_000, 2500, 12).steps()[-1] == 37_500
    assert 4 + 12 * units_per_growth(4) == 16
    assert units_per_growth(3) == 1
    assert [spread_width(16, 64, turn, 12) for turn in (1, 12, 13)] == [20, 64, 64]
    # What was saved, step by step, at the sheet's own schedule.
    schedule, width, saved = GrowthSchedule(100, 10, 12), 0.25, 0.0
    for step in range(400):
        grown = sum(step >= one for one in schedule.steps())
        saved += 1 - (width + (1 - width) * grown / 12)
    assert extra_epochs(schedule, width, 1) == pytest.approx(saved)


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1.5, 1, 1)])
def test_wrong_schedules_are_refused(values):
    with pytest.raises(ValueError, match=r"GrowthSchedule\(.*expected 1, 2, 3, \.\.\., got"):
        GrowthSchedule(*values)


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("make_units", [by_gradient, by_chance])
def test_going_on_from_a_checkpoint_equals_never_stopping(tmp_path, name, make_units, stop):
    schedule = GrowthSchedule(2, 2, 3)
    model, optimizer, _ = growing(schedule, name, make_units=make_units)
    train(model, optimizer, stop)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    expected = train(model, optimizer, 9 - stop, stop)

    resumed, fresh, _ = growing(schedule, name, make_units=make_units)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert train(resumed, fresh, 9 - stop, stop) == expected
    assert widths(resumed) == [7, 7]
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_loading_replaces_no_parameter_in_a_model_of_the_same_width():
    model, _, _ = growing(GrowthSchedule(2, 2, 3))
    held = [id(parameter) for parameter in model.parameters()]
    model.load_state_dict(network().state_dict())
    assert [id(parameter) for parameter in model.parameters()] == held


def test_a_checkpoint_from_before_growth_narrows_again():
    model, optimizer, _ = growing(GrowthSchedule(1, 1, 3))
    early = copy.deepcopy(model.state_dict())
    train(model, optimizer, 3)
    assert widths(model) == [7, 7]
    model.load_state_dict(early)
    assert widths(model) == [4, 4]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]
    train(model, optimizer, 2)


def test_checkpoints_of_another_model_are_left_to_torch():
    model, _, _ = growing(GrowthSchedule(1, 1, 3))
    state = network(6).state_dict()
    state["0.bias"] = state["0.bias"][:5]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    other = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_loading_reaches_a_model_within_a_model():
    model, optimizer, _ = growing(GrowthSchedule(1, 1, 3))
    train(model, optimizer, 2)
    whole, narrow = nn.ModuleDict({"body": model}), network()
    remember_widths(narrow, find_pairs(narrow, X).pairs)
    nn.ModuleDict({"body": narrow}).load_state_dict(whole.state_dict())
    assert torch.equal(narrow(X), model(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_grows_apart(copied):
    model, optimizer, _ = growing(GrowthSchedule(1, 1, 3))
    twin = copied(model)
    train(model, optimizer, 3)
    assert widths(twin) == [4, 4]
    twin.load_state_dict(model.state_dict())
    assert widths(twin) == [7, 7]
    own = {id(module) for module in twin.modules()}
    assert {id(pair.first) for pair in remembered_widths(twin).pairs} <= own
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]


def test_a_growth_past_the_limit_is_refused_and_changes_nothing():
    total = sum(parameter.numel() for parameter in network().parameters())
    model, optimizer, _ = growing(GrowthSchedule(1, 1, 3), max_parameters=total + 1)
    with pytest.raises(ValueError, match=r"max_parameters=.*or raise the limit"):
        train(model, optimizer, 1)
    assert widths(model) == [4, 4]


def test_a_limit_is_looked_at_before_units_are_made():
    def made(*arguments):
        raise AssertionError("units were made")

    model, optimizer, _ = growing(
        GrowthSchedule(1, 1, 1), final_widths=[10**9, 4], max_bytes=10**6, make_units=made
    )
    with pytest.raises(ValueError, match=r"max_bytes=1000000\): expected a growth that takes at"):
        train(model, optimizer, 1)
    assert widths(model) == [4, 4]


def test_a_growth_past_the_memory_says_so_and_changes_nothing():
    model, optimizer, _ = growing(
        GrowthSchedule(1, 1, 1), final_widths=[10**11, 4], make_units=by_chance
    )
    message = r"Grower.grow\(growth=0\): expected a growth by \[99999999996\] units that fits into"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train(model, optimizer, 1)
    assert widths(model) == [4, 4]
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)


def test_each_growth_draws_anew():
    model, _, grower = growing(GrowthSchedule(1, 1, 2), make_units=by_chance, seed=3)
    for growth in range(2):
        grower.grow(growth)
    first, second = (vector / vector.norm() for vector in model[2].weight.detach().T[4:6])
    assert (first[:4] - second[:4]).norm() > 0.1


def test_several_optimisers_follow():
    model = network()
    first = torch.optim.Adam(model[0].parameters(), lr=0.01)
    last = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1, momentum=0.9)
    pairs = find_pairs(model, X).pairs
    with pytest.raises(ValueError, match="the model's present parameters"):
        Grower(model, last, pairs, make_units=by_gradient, batch=batch,
               schedule=GrowthSchedule(1, 1, 2))  # fmt: skip
    Grower(model, last, pairs, make_units=by_gradient, batch=batch,
           schedule=GrowthSchedule(1, 1, 2), others=[first])  # fmt: skip
    for step in range(3):
        loss = nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1])
        model.zero_grad()
        loss.backward()
        first.step()
        last.step()
    assert widths(model) == [6, 6]
    held = [p for one in (first, last) for group in one.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize(
    "attach",
    [
        lambda model, optimizer: BatchNormPreconditioner(model, optimizer),
        lambda model, optimizer: WeightRescaler(optimizer, []),
        lambda model, optimizer: LearningRateScaling(optimizer, scale_free(model)),
    ],
    ids=["bn-preconditioning", "weight-rescaling", "learning-rate scaling"],
)
def test_what_holds_on_to_parameters_does_not_go_with_growth(attach):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pairs = find_pairs(model, X).pairs
    make = partial(Grower, make_units=by_gradient, batch=batch, schedule=GrowthSchedule(1, 1, 2))
    grower = make(model, optimizer, pairs)
    with pytest.raises(ValueError, match="under which the network grows; train without growth"):
        attach(model, optimizer)
    grower.remove()
    attach(model, optimizer)
    with pytest.raises(ValueError, match=r"Grower\(optimizer\): expected one whose parameters may"):
        make(model, optimizer, pairs)


def test_optimisers_that_cannot_grow_are_refused_at_once():
    model = network()
    for kind in (torch.optim.Adafactor, torch.optim.LBFGS):
        with pytest.raises(ValueError, match=rf"Grower\(optimizer={kind.__name__}\): expected an"):
            Grower(model, kind(model.parameters()), find_pairs(model, X).pairs,
                   make_units=by_chance, batch=batch,
                   schedule=GrowthSchedule(1, 1, 1))  # fmt: skip


def test_a_second_grower_starts_from_the_widths_that_there_are():
    model, optimizer, grower = growing(GrowthSchedule(1, 1, 3))
    train(model, optimizer, 3)
    assert widths(model) == [7, 7]
    grower.remove()
    Grower(model, optimizer, grower.pairs, make_units=by_chance, batch=batch,
           schedule=GrowthSchedule(1, 1, 2))  # fmt: skip
    train(model, optimizer, 2)
    assert widths(model) == [9, 9]


def test_removing_stops_growth():
    model, optimizer, grower = growing(GrowthSchedule(2, 1, 3))
    train(model, optimizer, 2)
    grower.remove()
    train(model, optimizer, 3)
    assert widths(model) == [5, 5]
    Grower(model, optimizer, grower.pairs, make_units=by_chance, batch=batch,
           schedule=GrowthSchedule(1, 1, 1))  # fmt: skip


def test_wrong_growers_are_refused():
    model, optimizer, grower = growing(GrowthSchedule(1, 1, 3))
    more = partial(Grower, make_units=by_chance, batch=batch, schedule=GrowthSchedule(1, 1, 3))
    with pytest.raises(ValueError, match="without a grower"):
        more(model, optimizer, grower.pairs)
    grower.remove()
    with pytest.raises(ValueError, match="got 0 pairs"):
        more(model, optimizer, [])
    with pytest.raises(ValueError, match="at least the present"):
        more(model, optimizer, grower.pairs, final_widths=[3, 8])
    with pytest.raises(ValueError, match="a width for each pair"):
        more(model, optimizer, grower.pairs, final_widths=[8])
    stale = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the model's present parameters"):
        more(model, stale, grower.pairs)


@pytest.mark.slow
def test_two_processes_grow_as_one(tmp_path):
    multiprocessing.spawn(work, (2, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model, optimizer, _ = growing(GrowthSchedule(2, 2, 2))
    train(model, optimizer, 6)
    for name, values in model.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], values, atol=1e-4, rtol=1e-4)

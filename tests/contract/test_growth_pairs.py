"""Which layers can grow, why others cannot, and activations at zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.growth.at_zero import ClampReLU, at_zero
from normlab.growth.new_units import gradmax_units, random_units
from normlab.growth.pairs import clamp_relus, find_pairs
from normlab.growth.widen import widen


class Everything(nn.Module):
    """A network with something of everything."""

    def __init__(self):
        super().__init__()
        self.plain, self.act, self.next = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.by_function, self.relu_reader = nn.Linear(4, 4), nn.Linear(4, 4)
        self.sigmoid = nn.Sigmoid()
        self.squashed, self.squash_reader = nn.Linear(4, 4), nn.Linear(4, 4)
        self.added = nn.Linear(4, 4)
        self.gate, self.gated, self.gate_reader = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)
        self.linear, self.linear_reader = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.frozen, self.frozen_reader = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.layer_normed, self.layer_norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.tied, self.tied_reader = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied_reader.weight = self.tied.weight
        self.unused = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.next(self.act(self.plain(x)))
        x = self.relu_reader(F.relu(self.by_function(x)))
        x = self.squash_reader(self.sigmoid(self.squashed(x)))
        x = x + self.act(self.added(x))
        y = self.gate(x)
        x = self.gate_reader(self.gated(y)) * (y > 0) * y.exp()
        x = self.linear_reader(self.linear(x))
        x = self.act(self.shared(self.act(self.shared(x))))
        x = self.frozen_reader(self.act(self.frozen(x)))
        x = self.act(self.normed(x))
        x = self.act(self.layer_norm(self.layer_normed(x)))
        x = self.tied_reader(self.act(self.tied(x)))
        return self.fc(self.act(x))


def test_pairs_are_found_and_the_others_have_a_reason():
    pairs, skipped = find_pairs(Everything(), torch.randn(2, 4))
    assert [pair.name for pair in pairs] == ["plain"]
    assert skipped == {
        "next": "there is no activation before the next layer",
        "by_function": "relu() has derivative 0 at zero (use nn.ReLU)",
        "relu_reader": "there is no activation before the next layer",
        "squashed": "Sigmoid is not 0 at zero",
        "squash_reader": "there is no activation before the next layer",
        "added": "nothing takes its output",
        "gate": "several layers take its output",
        "gate_reader": "mul() takes its output",
        "linear": "there is no activation before the next layer",
        "linear_reader": "Linear after it: it is called several times",
        "shared": "it is called several times",
        "frozen": "it is frozen",
        "frozen_reader": "linear() takes its output",
        "layer_normed": "LayerNorm takes its output",
        "tied": "its weight is shared",
        "tied_reader": "its weight is shared",
        "fc": "nothing takes its output",
        "normed": "its weight is re-parametrised",
    }


class Leaking(nn.Module):
    """The hidden units are read once more, by an operation that no module takes."""

    def __init__(self, leak):
        super().__init__()
        self.one, self.act, self.two, self.leak = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), leak

    def forward(self, x):
        hidden = self.act(self.one(x))
        return {"out": [self.two(hidden) + hidden] if self.leak else [self.two(hidden)]}


def test_a_further_use_is_seen_whatever_it_is():
    assert len(find_pairs(Leaking(False), torch.randn(2, 4)).pairs) == 1
    pairs, skipped = find_pairs(Leaking(True), torch.randn(2, 4))
    assert not pairs
    assert skipped["one"] in (
        "something else takes its output, too",
        "several layers take its output",
    )


def test_nothing_is_left_behind():
    model = Everything().train()
    model.gated.eval()
    find_pairs(model, torch.randn(2, 4))
    assert model.training
    assert not model.gated.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Between(nn.Module):
    """A convolution of two units and a reader, with a function in the middle."""

    def __init__(self, function, second, kernel=3, first=None):
        super().__init__()
        self.first = nn.Conv2d(3, 2, kernel) if first is None else first
        self.act, self.function, self.second = nn.Tanh(), function, second

    def forward(self, x):
        return self.second(self.function(self.act(self.first(input=x))))


KEEPS_UNITS = {
    "flatten": (lambda z: torch.flatten(z, 1), nn.Linear(32, 5)),
    "view": (lambda z: z.view(z.size(0), -1), nn.Linear(32, 5)),
    "reshape": (lambda z: z.reshape(len(z), z.shape[1] * 16), nn.Linear(32, 5)),
    "mean": (lambda z: z.mean((2, 3)), nn.Linear(2, 5)),
    "two means": (lambda z: z.mean(-1).mean(-1), nn.Linear(2, 5)),
    "mean and flatten": (lambda z: z.mean((2, 3), keepdim=True).flatten(1), nn.Linear(2, 5)),
    "norm": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, groups=2), nn.Flatten()),
             nn.Linear(8, 5)),
    "norm and view": (lambda z: z.view(len(z), -1), nn.Linear(32, 5),
                      nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))),
}  # fmt: skip
MIXES_UNITS = {
    "rows of parts": (lambda z: z.reshape(len(z), 4, -1), nn.Linear(8, 5)),
    "positions": (lambda z: torch.flatten(z, 2), nn.Linear(16, 5)),
    "a written size": (lambda z: z.view(-1, 32), nn.Linear(32, 5)),
    "mean over units": (lambda z: z.mean((1, 2)), nn.Linear(4, 5)),
    "flatten from the start": (lambda z: z.flatten(0).view(-1, 32), nn.Linear(32, 5)),
}


@pytest.mark.parametrize("kept", KEEPS_UNITS.values(), ids=KEEPS_UNITS)
def test_functions_that_keep_units_apart(kept):
    model, x = Between(*kept[:2], first=kept[2] if len(kept) > 2 else None), torch.randn(2, 3, 6, 6)
    model = model.eval()
    pairs, skipped = find_pairs(model, x)
    assert len(pairs) == 1, skipped
    expected, (pair,) = model(x), pairs
    widen(model, random_units({pair: 2}, outgoing_zero=True))
    torch.testing.assert_close(model(x), expected)
    targets = torch.zeros(2, dtype=torch.long)
    assert pair.normalised or gradmax_units(model, {pair: 2}, x, targets)


@pytest.mark.parametrize("mixed", MIXES_UNITS.values(), ids=MIXES_UNITS)
def test_functions_that_mix_units(mixed):
    pairs, skipped = find_pairs(Between(*mixed), torch.randn(2, 3, 6, 6))
    assert not pairs
    assert any(part in skipped["first"] for part in ("mixes its units", "one by one", "not fit"))


def test_a_function_in_front_of_a_convolution():
    model = Between(lambda z: z.mean(-1), nn.Conv1d(2, 4, 3))
    assert find_pairs(model, torch.randn(2, 3, 6, 6)).skipped["first"] == (
        "the next layer reads another axis"
    )


def test_compiled_models_are_seen_as_they_were_written():
    model, x = Between(lambda z: z.flatten(1), nn.Linear(32, 5)), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    (pair,) = find_pairs(compiled, x).pairs
    assert pair.name == "_orig_mod.first"
    widen(compiled, gradmax_units(compiled, {pair: 2}, x, torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(compiled(x), expected)


def test_pairs_may_be_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.zeros(2, 4)
    assert [pair.name for pair in find_pairs(model, x, names=["2"]).pairs] == ["2"]
    with pytest.raises(ValueError, match="nothing takes its output; leave it out"):
        find_pairs(model, x, names=["4"])
    with pytest.raises(ValueError, match="do you mean '2'"):
        find_pairs(model, x, names=["22"])


@pytest.mark.parametrize(
    ("layers", "shape", "reason"),
    [
        ((nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1)), (2, 2, 5, 5), "groups"),
        ((nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1, groups=2)), (2, 2, 5, 5), "groups"),
        ((nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Linear(3, 2)), (2, 2, 5, 5), "one by one"),
        ((nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 1)), (2, 2, 5, 5),
         "GroupNorm takes"),
        ((nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Linear(3, 2)), (2, 2, 5, 5), "another axis"),
        ((nn.Linear(4, 3), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(3, 2)), (2, 5, 4),
         "does not fit"),
        ((nn.Conv1d(2, 4, 3), nn.Flatten(), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 2)),
         (2, 2, 5), "does not fit"),
        ((nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 2)), (2, 4), "PReLU takes"),
        ((nn.Linear(4, 3), nn.Hardshrink(), nn.Linear(3, 2)), (2, 4), "derivative 0"),
        ((nn.Linear(4, 3), nn.Softmax(-1), nn.Linear(3, 2)), (2, 4), "Softmax takes"),
        ((nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
          nn.Tanh(), nn.Conv2d(4, 2, 1)), (2, 4, 5, 5), "does not fit"),
    ],
)  # fmt: skip
def test_misfits(layers, shape, reason):
    pairs, skipped = find_pairs(nn.Sequential(*layers), torch.randn(shape))
    assert not pairs
    assert reason in skipped["0"]


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        (ClampReLU(), 1), (nn.ReLU(), 1), (nn.ReLU6(), 1), (nn.ReLU(inplace=True), 1),
        (nn.LeakyReLU(0.01), 0.01), (nn.PReLU(), 0.25), (nn.ELU(), 1), (nn.Tanh(), 1),
        (nn.GELU(), 0.5), (nn.SiLU(), 0.5), (nn.Softsign(), 1), ("tanh", 1), ("gelu", 0.5),
    ],
)  # fmt: skip
def test_slopes_at_zero(activation, slope):
    assert at_zero(activation) == (0, pytest.approx(slope))


def test_what_is_no_activation_has_no_slope():
    assert at_zero(nn.Linear(2, 2)) is None
    assert at_zero("cat") is None
    assert at_zero(nn.Sigmoid()) == (0.5, 0.25)


def test_clamping_keeps_values_and_reaches_shared_modules():
    act = nn.ReLU(inplace=True)
    model = nn.Sequential(
        nn.Linear(4, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 3), nn.ReLU6(), nn.Linear(3, 2),
        nn.ReLU(),
    )  # fmt: skip
    x = 10 * torch.randn(16, 4)
    expected = model(x)
    assert clamp_relus(model, find_pairs(model, x).pairs) == 2
    assert torch.equal(model(x), expected)
    assert [type(m).__name__ for m in model[1::2]] == ["ClampReLU"] * 3 + ["ReLU"]
    assert model[5].max_value == 6

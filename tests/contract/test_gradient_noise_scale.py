"""The meter on gradients whose noise and signal are known; the probe beside training without."""

import math

import pytest
import torch
from torch import nn

from normlab.catalog import METHODS, find_method
from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.optim.gradient_noise_scale import GradientNoiseScale, NoiseScaleProbe
from normlab.optim.noise_scale import measure_noise_scale, noise_scale
from normlab.testing import MethodCase


def gaussian(batch, signal, deviation, generator):
    return signal + deviation / math.sqrt(batch) * torch.randn(
        signal.shape, generator=generator, dtype=signal.dtype
    )


def test_gaussian_gradients():
    generator = torch.Generator().manual_seed(0)
    signal = torch.full((50,), 0.2, dtype=torch.float64)  # |G|^2 = 2
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    meter = GradientNoiseScale([weight], momentum=0.001)
    for _ in range(3000):
        parts = [gaussian(4, signal, 0.6, generator) for _ in range(8)]
        weight.grad = parts[0] / 8  # as accumulation with the loss divided leaves it
        meter.small(4, multiply=8)
        weight.grad = sum(parts) / 8
        meter.big(32)
    found = meter.estimate()
    assert found.num_estimates == 3000
    assert found.noise == pytest.approx(50 * 0.36, rel=0.05)
    assert found.signal == pytest.approx(2.0, rel=0.05)
    assert found.scale == pytest.approx(9.0, rel=0.08)


def test_accumulation_measures_what_the_formula_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    unused = nn.Parameter(torch.zeros(2))
    x = torch.randn(8, 3, dtype=torch.float64)

    def square(part):
        gradients = torch.autograd.grad(model(part).square().mean(), list(model.parameters()))
        return sum(g.square().sum() for g in gradients).item()

    meter = GradientNoiseScale([*model.parameters(), unused], momentum=0.3)
    for _ in range(2):
        model.zero_grad()
        for number, part in enumerate(x.chunk(4)):
            (model(part).square().mean() / 4).backward()
            if number == 0:
                meter.small(2, multiply=4)
        meter.big(8)
    expected = noise_scale(square(x[:2]), square(x), 2, 8)
    found = meter.estimate()
    assert (found.noise, found.signal) == pytest.approx((expected.noise, expected.signal), rel=1e-6)


def test_averages_are_corrected_and_saved():
    weight = nn.Parameter(torch.zeros(1))
    meter = GradientNoiseScale([weight], momentum=0.1)
    noises = []
    for number in range(3):
        weight.grad = torch.full((1,), 2.0 + number)
        meter.small(1)
        weight.grad = torch.ones(1)
        meter.big(2)
        noises.append(2 * ((2.0 + number) ** 2 - 1))
    weights = [0.1 * 0.9 ** (2 - number) for number in range(3)]
    expected = sum(w * n for w, n in zip(weights, noises, strict=True)) / sum(weights)
    assert meter.estimate().noise == pytest.approx(expected)
    other = GradientNoiseScale([weight], momentum=0.1)
    other.load_state_dict(meter.state_dict())
    assert other.estimate() == meter.estimate()


def test_misuse_is_refused():
    weight = nn.Parameter(torch.zeros(1))
    meter = GradientNoiseScale([weight])
    with pytest.raises(ValueError, match="expected gradients, got none"):
        meter.small(1)
    with pytest.raises(ValueError, match="a small batch measured before"):
        meter.big(2)
    with pytest.raises(ValueError, match="at least one pair"):
        meter.estimate()
    weight.grad = torch.ones(1)
    meter.small(4)
    with pytest.raises(ValueError, match="below the big one"):
        meter.big(4)
    with pytest.raises(ValueError, match="momentum=0"):
        GradientNoiseScale([weight], momentum=0.0)


NAME = "gradient-noise-scale"
FEW_STEPS = 6


def trained(label, model, shape, options):
    """Return weights and losses of a few steps under a method."""
    generator = torch.Generator().manual_seed(0)
    case = MethodCase(
        method=find_method(label),
        make_model=lambda: build_model(model, shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )
    network = case.prepared().train()
    optimizer = case.optimizer(network)
    losses = [case.step(network, optimizer, number) for number in range(FEW_STEPS)]
    return losses, network.state_dict(), optimizer


# class-norm takes none of the networks at hand.
@pytest.mark.parametrize(
    "label", [m.card.name for m in METHODS if m.card.name not in (NAME, "class-norm")]
)
def test_training_is_to_the_bit_what_it_was(label):
    network = ("resnet", (2, 8, 8), {"depth": 8, "width": 8})
    expected, state, _ = trained(label, *network)
    losses, probed, optimizer = trained(f"{label}+{NAME}", *network)
    assert sum(count for _, _, count in optimizer.param_groups[0]["gradient_noise_scale"]["sums"])
    assert losses == expected
    assert all(torch.equal(value, probed[name]) for name, value in state.items())


def probed(total_steps=8, steps=8, share=0.5, num_batches=2, say=lambda _: None, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    batches = tuple((torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(5))
    setting = Setting(batches=batches, total_steps=total_steps, say=say)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = NoiseScaleProbe(model, optimizer, setting, num_batches, share)
    for number in range(steps):
        step(model, optimizer, batches[number % 5])
    return model, optimizer, probe, setting


def step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def test_quarters_average_noise_and_signal_by_themselves():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    _, _, probe, setting = probed(16, 0, model=model)
    found = {}
    assert probe.steps_apart == 4
    _, _, probe, setting = probed(16, 0, share=1.0, model=model)
    assert probe.steps_apart == 2
    for number in range(16):
        if number % 2 == 1:
            first = number // 2 * 2
            batches = [setting.batches[index % 5] for index in (first, first + 1)]
            found[number] = measure_noise_scale(model, batches)
        step(model, probe.optimizer, setting.batches[number % 5])
    quarters = probe.quarters()
    assert len(quarters) == 4
    for index, quarter in enumerate(quarters):
        own = [one for number, one in found.items() if number // 4 == index]
        assert quarter.num_estimates == len(own) == 2
        assert quarter.noise == pytest.approx(sum(one.noise for one in own) / 2)
        assert quarter.signal == pytest.approx(sum(one.signal for one in own) / 2)


def test_each_quarter_is_reported_once_and_again_by_a_run_that_goes_on():
    said = []
    model, optimizer, probe, setting = probed(8, 5, say=said.append)
    starts = [line.partition(":")[0] for line in said]
    assert starts == [f"noise scale in quarter {quarter} of training" for quarter in (1, 2)]
    assert said[0].endswith("at batches of 8 (1 estimate)")
    saved = optimizer.state_dict()
    probe.remove()
    again = []
    resumed = torch.optim.SGD(model.parameters(), lr=0.1)
    goes_on = NoiseScaleProbe(
        model, resumed, Setting(batches=setting.batches, total_steps=8, say=again.append), 2, 0.5
    )
    resumed.load_state_dict(saved)
    for number in range(5, 10):  # two more than planned
        step(model, resumed, setting.batches[number % 5])
    assert again[:2] == said
    assert len(again) == 4
    assert [quarter.num_estimates for quarter in goes_on.quarters()] == [1, 1, 1, 2]


def test_without_a_signal_there_is_no_scale():
    said = []
    _, optimizer, _, _ = probed(8, 0, say=said.append)
    optimizer.param_groups[0]["gradient_noise_scale"]["sums"][0] = [4.0, -1.0, 1]
    optimizer.param_groups[0]["gradient_noise_scale"]["step"] = 2
    optimizer.step()
    assert said == [
        "noise scale in quarter 1 of training: no signal seen, at batches of 8 (1 estimate)"
    ]


def test_a_sentence_has_two_digits():
    said = []
    _, optimizer, _, _ = probed(8, 0, say=said.append)
    optimizer.param_groups[0]["gradient_noise_scale"]["sums"][0] = [8188.0, 6.0, 2]
    optimizer.param_groups[0]["gradient_noise_scale"]["step"] = 2
    optimizer.step()
    assert said[0].endswith(": about 1400 samples, at batches of 8 (2 estimates)")


def test_a_measurement_that_is_not_finite_is_left_out():
    model, optimizer, probe, _ = probed(8, 0)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    for _ in range(3):
        optimizer.step()
    assert probe.quarters() == []


def test_removing_the_probe_ends_it():
    model, optimizer, probe, setting = probed(8, 3)
    with pytest.raises(ValueError, match="an optimiser without a NoiseScaleProbe"):
        NoiseScaleProbe(model, optimizer, setting)
    probe.remove()
    assert "gradient_noise_scale" not in optimizer.param_groups[0]
    step(model, optimizer, setting.batches[0])
    assert "gradient_noise_scale" not in optimizer.param_groups[0]
    NoiseScaleProbe(model, optimizer, setting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_batches": 1}, "num_batches=1"),
        ({"num_batches": 2.5}, "num_batches=2.5"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": math.nan}, "share=nan"),
        ({"share": 2.0}, "share=2.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probed(**options)

"""The claim about spectral normalisation: its distance, its runs, findings that can go each way."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from data_root import require_data
from normlab.lab.claims import gan_runs, spectral_norm
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED, Claim, locate
from normlab.lab.claims.gan_runs import Arm, Bench, GanRun, Setup, features_of, frechet_distance
from normlab.lab.claims.spectral_norm import (
    Search,
    deviations,
    judge_gans,
    train_gans,
    worst_direction,
)
from normlab.lab.compare import compare
from normlab.lab.loops.adversarial import SingularValues
from normlab.lab.models import build_model
from normlab.lab.records import read_run
from normlab.lab.study import Study

CHOSEN = {1: Arm(1, 1.0, 0.001), 2: Arm(2, 2.0, 0.001)}


def test_frechet_distance_is_that_of_the_formula():
    from scipy.linalg import sqrtm

    draw = torch.Generator().manual_seed(0)
    one = torch.randn(60, 5, generator=draw) @ torch.randn(5, 5, generator=draw)
    other = torch.randn(40, 5, generator=draw) @ torch.randn(5, 5, generator=draw) + 1
    first, second = (torch.cov(rows.T.double()).numpy() for rows in (one, other))
    means = (one.double().mean(0) - other.double().mean(0)).square().sum().item()
    expected = means + (first + second - 2 * sqrtm(first @ second).real).trace()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)
    # Fewer rows than features, and a feature that never changes: singular covariances.
    assert math.isfinite(frechet_distance(one[:3], other[:4]))
    flat = torch.cat([one, torch.ones(60, 1)], 1)
    assert frechet_distance(flat, flat + 2) == pytest.approx(4 * 6, rel=1e-6)


@pytest.mark.parametrize("name", ["plain-conv", "resnet"])
def test_features_are_what_the_readout_sees(name):
    model = build_model(name, (1, 8, 8), 10, depth=8, width=4).eval()
    inputs = torch.randn(3, 1, 8, 8)
    readout = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(readout(features_of(model, inputs)), model(inputs))
    assert not readout._forward_pre_hooks


# -- made-up runs ---------------------------------------------------------------------------------


def made_up(distance, means, diverged_at=None, apart=0.25):
    """Build a run from its distance and, for each layer, the means of its singular values.

    Forwards and backwards lie ``apart`` above and below their mean.
    """
    values = {
        name: [SingularValues(mean + apart, mean - apart) for mean in measured]
        for name, measured in means.items()
    }
    return GanRun(distance, distance, 100.0, values, diverged_at)


def found(one_sided, two_sided, one_means=None, two_means=None):
    one_means = one_means or {"a": [1.3, 1.3], "b": [1.0, 1.0]}
    two_means = two_means or {"a": [2.0, 2.01], "b": [2.0, 2.0]}
    return {
        1: {s: made_up(d, one_means) for s, d in enumerate(one_sided)},
        2: {s: made_up(d, two_means) for s, d in enumerate(two_sided)},
    }


def verdicts(findings):
    return [finding.verdict for finding in findings]


@pytest.mark.parametrize(
    ("one_sided", "two_sided", "expected"),
    [
        ([10, 12, 11], [8, 9, 8.5], HOLDS),
        ([8, 9, 8.5], [10, 12, 11], FAILS),
        ([10, 12, 11], [11, 10, 12], UNDECIDED),
    ],
)
def test_distances_decide(one_sided, two_sided, expected):
    findings = judge_gans(CHOSEN, found(one_sided, two_sided), {"x": 1.0})
    assert verdicts(findings) == [HOLDS, HOLDS, HOLDS, expected]
    logarithms = [math.log(b / a) for a, b in zip(one_sided, two_sided, strict=True)]
    assert findings[3].measured == pytest.approx(sum(logarithms) / 3)
    assert findings[3].n == 3
    json.dumps([asdict(finding) for finding in findings], allow_nan=False)


def test_singular_values_decide():
    distances = [10, 12, 11], [8, 9, 8.5]
    # One layer at one moment is enough to have left the scale 2 ...
    findings = judge_gans(CHOSEN, found(*distances, two_means={"a": [2.0, 2.2], "b": [2, 2]}), {})
    assert verdicts(findings) == [FAILS, HOLDS, HOLDS, HOLDS]
    assert findings[0].measured == pytest.approx(10.0)
    # ... also below it, and one moment at which layers are near it on average to have stayed.
    findings = judge_gans(CHOSEN, found(*distances, two_means={"a": [1.6, 2.0], "b": [2, 2]}), {})
    assert findings[0].measured == pytest.approx(20.0)
    one_means = {"a": [1.3, 1.08, 1.3], "b": [1.0, 1.0, 0.5]}
    findings = judge_gans(CHOSEN, found(*distances, one_means=one_means), {})
    assert verdicts(findings) == [HOLDS, FAILS, HOLDS, HOLDS]
    assert findings[1].measured == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        ([0.6, 0.4, 0.5], HOLDS),  # 20 % to 30 %
        ([1.4, 1.6, 1.5], FAILS),  # 70 % to 80 %
        ([1.0, 0.4, 1.6], UNDECIDED),
    ],
)
def test_the_worse_direction_decides(apart, expected):
    """The one-sided runs are 55 % off, forwards in the first layer, at the end."""
    runs = found([10, 12, 11], [8, 9, 8.5], one_means={"a": [9.0, 1.3], "b": [1.0, 1.0]})
    runs[2] = {s: made_up(8, {"a": [2.0, 2.0]}, apart=one) for s, one in enumerate(apart)}
    finding = judge_gans(CHOSEN, runs, {})[2]
    assert finding.verdict == expected
    assert finding.measured == pytest.approx(50 * sum(apart) / 3 - 55)
    layer = finding.details["over scale, by layer, at the end, two-sided"]["a"]
    assert layer["forwards"] == pytest.approx(1 + sum(apart) / 6)
    assert layer["backwards"] == pytest.approx(1 - sum(apart) / 6)
    assert layer["mean"] == pytest.approx(1.0)


def test_the_worst_direction_is_that_of_any_layer_at_the_end():
    run = made_up(1.0, {"a": [9.0, 2.0], "b": [2.0, 1.0]})
    assert worst_direction(run, 2.0) == pytest.approx(62.5)


def test_deviations_are_relative_to_the_scale():
    run = made_up(1.0, {"a": [1.8, 2.2]})
    assert deviations(run, 2.0) == {"a": pytest.approx([10.0, 10.0])}


# -- choosing -------------------------------------------------------------------------------------


class MadeUpBench:
    """Distances that are known beforehand."""

    def __init__(self):
        self.asked = []

    def run(self, arm, seed, on_step):
        self.asked.append((arm, seed))
        on_step(1)
        train = abs(arm.scale - 1.2 * arm.sides) + abs(arm.lr - 0.1)
        # The test distances would choose otherwise.
        return replace(made_up(1.0, {"a": [1.0]}), train_distance=train, test_distance=10 - train)


def test_each_form_chooses_on_a_seed_of_its_own_from_the_same_grid():
    bench = MadeUpBench()
    setup = Setup(8, steps=2, batch_size=4, n_dis=1, measure_every=1, num_generated=4)
    search = Search(setup, (1.0, 2.0, 3.0), (0.1, 0.2), tuning_seed=100, seeds=range(2))
    chosen, runs, tuning = train_gans(bench, search)
    assert chosen == {1: Arm(1, 1.0, 0.1), 2: Arm(2, 2.0, 0.1)}
    tuned = [arm for arm, seed in bench.asked if seed == 100]
    assert {(a.scale, a.lr) for a in tuned if a.sides == 1} == {
        (a.scale, a.lr) for a in tuned if a.sides == 2
    }
    assert len(tuned) == len(tuning) == 12
    assert [seed for _, seed in bench.asked[12:]] == [0, 0, 1, 1]
    assert search.steps == 2 * len(bench.asked)
    assert {sides: list(of_form) for sides, of_form in runs.items()} == {1: [0, 1], 2: [0, 1]}


# -- the whole, tiny ------------------------------------------------------------------------------


def tiny_study():
    study = spectral_norm.STUDIES["small"].model_dump(exclude_none=True)
    study["task"] |= {"train_size": 64, "test_size": 40}
    study["model"] |= {"depth": 3, "width": 4}
    study["training"] |= {"epochs": 1, "device": "cpu"}
    return Study.model_validate(study)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    data = require_data("fashion-mnist").parent
    compare(locate(tiny_study(), data), folder, Console(quiet=True))
    return read_run(folder)


SETUP = Setup(64, steps=3, batch_size=4, n_dis=1, measure_every=2, num_generated=30)


def test_a_claim_runs_and_takes_up_what_it_has(features, monkeypatch):
    search = Search(SETUP, (1.0,), (1e-3, 2e-3), tuning_seed=9, seeds=range(2))
    monkeypatch.setitem(spectral_norm.SEARCHES, "fashion-mnist", search)
    findings = spectral_norm.measure_gans({"features": features})
    assert [f.statement for f in findings] == [b.statement for b in spectral_norm.CLAIM.bounds]
    assert all(finding.n == 2 and math.isfinite(finding.measured) for finding in findings)
    assert len(list((features.folder / "gans").iterdir())) == 8

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(gan_runs, "train", never)
    assert spectral_norm.measure_gans({"features": features}) == findings
    other = replace(search, setup=replace(SETUP, steps=4))
    monkeypatch.setitem(spectral_norm.SEARCHES, "fashion-mnist", other)
    with pytest.raises(AssertionError, match="trained again"):
        spectral_norm.measure_gans({"features": features})


def test_equal_terms(features, monkeypatch):
    """Both forms start from the same networks and see the same images and latent vectors."""
    seen = []

    def remember(generator, discriminator, batches, training, *, latent_size, seed, on_step):
        networks = *generator.state_dict().values(), *discriminator.parameters()
        start = [value.detach().clone() for value in networks]
        seen.append(([*start, batches.batch(0, 0)[0]], training, seed))
        return original(
            generator,
            discriminator,
            batches,
            training,
            latent_size=latent_size,
            seed=seed,
            on_step=on_step,
        )

    original = gan_runs.train
    monkeypatch.setattr(gan_runs, "train", remember)
    bench = Bench(features, SETUP)
    for sides in (1, 2):
        bench.run(Arm(sides, 1.5, 0.003), seed=5)
    (one, plan, seed), (other, other_plan, other_seed) = seen
    assert (plan, seed) == (other_plan, other_seed)
    assert plan.generator_lr == plan.discriminator_lr == 0.003
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    images = one[-1]
    assert images.shape == (4, 1, 32, 32)
    assert images.min() == -1
    assert images.max() <= 1
    assert (images[:, :, :2] == -1).all()
    assert (images[:, :, :, -2:] == -1).all()


def test_real_images_are_near_real_images(features):
    """The frame comes off and pixels get the classifier's units: copies of the set have distance 0.

    A generator that gives out the test images must be where the test images are.
    """
    bench = Bench(features, replace(SETUP, num_generated=40))

    class Copies(torch.nn.Module):
        def forward(self, latents):
            images = gan_runs._framed(bench.task.test.inputs[: len(latents)], bench.side)
            return images / 127.5 - 1

    distances = bench.distances(Copies(), seed=0)
    assert distances["test"] == pytest.approx(0.0, abs=1e-4)
    assert distances["train"] > 1e-3


def test_a_run_that_diverged_counts_as_untrained(features):
    found = Bench(features, SETUP).run(Arm(2, 1.0, math.inf), seed=3)
    assert found.diverged_at == 2
    assert found.test_distance == found.untrained_distance
    assert math.isfinite(found.train_distance)


def test_a_missing_classifier_leaves_all_undecided(features):
    run = replace(features, trials=[])
    assert verdicts(spectral_norm.measure_gans({"features": run})) == [UNDECIDED] * 4


def test_the_claim_names_its_method():
    claim = spectral_norm.CLAIM
    assert isinstance(claim, Claim)
    assert "2009.02773" in claim.paper
    assert set(claim.budget) == set(claim.departs) == set(claim.parts[0].studies)
    tasks = {study.task.name for study in spectral_norm.STUDIES.values()}
    assert tasks == set(spectral_norm.SEARCHES)

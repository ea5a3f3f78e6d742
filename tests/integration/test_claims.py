"""The claims: one rule for verdicts, findings that can go either way, evidence and ledger."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from normlab.lab import claims
from normlab.lab import compare as comparison
from normlab.lab.batches import evaluation_batches
from normlab.lab.checkpoint import WEIGHTS, load_weights
from normlab.lab.claims import (
    batch_kalman_norm,
    batch_layer_norm,
    batch_norm,
    batchless_norm,
    bn_init,
    cross_iteration_bn,
    filter_response_norm,
    fixup,
    ic_layer,
    ledger,
    micro_batches,
    recalibration,
    small_batches,
    verb,
)
from normlab.lab.claims.claim import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Bound,
    Claim,
    Part,
    append_evidence,
    locate,
    reproduce,
    verdict,
)
from normlab.lab.claims.measures import final_accuracies, judge_difference
from normlab.lab.compare import compare as original_compare
from normlab.lab.models import build_model
from normlab.lab.records import RunRecord, TrialRecord, read_run, trial_folder
from normlab.lab.statistics import share_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import limit

REPOSITORY = Path(__file__).parents[2]
QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("low", "high", "direction", "expected"),
    [
        (2.1, 3.0, "at least", HOLDS),
        (2.0, 3.0, "at least", HOLDS),
        (2.0, 3.0, "above", UNDECIDED),
        (1.9, 3.0, "at least", UNDECIDED),
        (1.0, 1.9, "at least", FAILS),
        (1.0, 2.0, "at least", UNDECIDED),
        (1.0, 2.0, "above", FAILS),
        (1.0, 2.0, "at most", HOLDS),
        (1.0, 2.0, "below", UNDECIDED),
        (2.0, 2.0, "below", FAILS),
        (2.0, 2.0, "at most", HOLDS),
        (2.1, 3.0, "at most", FAILS),
        (None, None, "at most", UNDECIDED),
        (1.0, float("nan"), "at most", UNDECIDED),
        (-float("inf"), 1.0, "at most", HOLDS),
    ],
)
def test_whole_interval_decides(low, high, direction, expected):
    assert verdict(low, high, 2.0, direction) == expected


def test_share_interval_is_clopper_pearson():
    from scipy.stats import binomtest

    for count, total in ((0, 6), (6, 6), (3, 6), (45, 450)):
        exact = binomtest(count, total).proportion_ci(0.95, method="exact")
        assert share_interval(count, total) == pytest.approx((exact.low, exact.high), abs=1e-9)


# -- made-up records ------------------------------------------------------------------------------


def made_up(trials, seeds=(0, 1, 2), evaluate_every=20, num_classes=10, test_samples=1000):
    """Build a run from ``{(method, seed): final accuracy | None for diverged | curve}``."""
    recorded = []
    for (method, seed), value in trials.items():
        points = value if isinstance(value, list) else [(0, 0.1), (100, value)]
        metrics = [
            {"kind": "eval", "step": step, "accuracy": accuracy}
            for step, accuracy in points
            if accuracy is not None
        ]
        metrics.append({"kind": "train", "step": 100, "loss": 2.0})
        result = {
            "status": "diverged" if value is None else "finished",
            "final_accuracy": None if value is None else points[-1][1],
            "lr": 0.1,
            "step": 100,
            "steps": 100,
            "seconds": 1.0,
            "peak_memory_bytes": 1000,
        }
        recorded.append(TrialRecord(method, seed, result, metrics))
    study = {"seeds": list(seeds), "training": {"evaluate_every": evaluate_every}}
    environment = {"num_classes": num_classes, "test_samples": test_samples}
    return RunRecord(Path("made-up"), study, environment, {}, recorded, [])


def level(method, accuracy, seeds=(0, 1, 2)):
    """Return trials of one method around an accuracy, with a little spread; None: diverged."""
    return {(method, s): None if accuracy is None else accuracy + 0.001 * s**2 for s in seeds}


def verdicts(findings):
    return [finding.verdict for finding in findings]


def speed_run(bare_reaches, normalised_reaches, best=0.8):
    trials = {}
    for seed in (0, 1, 2):
        for method, reaches in (("none", bare_reaches), ("batch-norm", normalised_reaches)):
            reaches = None if reaches is None else reaches + 20 * (seed % 2)
            steps = range(0, 601, 20)
            trials[method, seed] = [
                (s, best if reaches is not None and s >= reaches else 0.1) for s in steps
            ]
            if method == "batch-norm" and reaches is None:
                trials[method, seed] = [(s, 0.5 * best) for s in steps]
    return {"speed": made_up(trials)}


def test_batch_norm_finding_goes_both_ways():
    (holds,) = batch_norm.measure(speed_run(400, 100))
    assert holds.verdict == HOLDS
    assert holds.measured == pytest.approx((400 / 100) ** (2 / 3) * (420 / 120) ** (1 / 3))
    assert verdicts(batch_norm.measure(speed_run(200, 400))) == [FAILS]
    assert verdicts(batch_norm.measure(speed_run(400, 200))) == [UNDECIDED]


def test_batch_norm_that_never_arrives_cannot_hold():
    (finding,) = batch_norm.measure(speed_run(60, None))
    assert finding.verdict == FAILS
    assert finding.low == 0.0
    assert finding.details["steps batch-normalised"] == {0: None, 1: None, 2: None}
    run = speed_run(580, 20)
    for trial in run["speed"].trials:
        if (trial.method, trial.seed) == ("batch-norm", 2):
            trial.metrics[:] = [line | {"accuracy": 0.1} for line in trial.metrics[:-1]]
    (finding,) = batch_norm.measure(run)
    assert (finding.verdict, finding.low) == (UNDECIDED, 0.0)


def test_batch_norm_is_undecided_where_the_bare_network_learned_nothing():
    (finding,) = batch_norm.measure(speed_run(100, 20, best=0.2))
    assert finding.verdict == UNDECIDED
    assert finding.measured is None


def test_ic_layer_exact_findings_hold(monkeypatch):
    exact, sampled = ic_layer.measure_dependence({})
    assert (exact.verdict, sampled.verdict) == (HOLDS, HOLDS)
    assert exact.low == exact.high == exact.measured <= 1e-13
    assert sampled.high < 0.005

    # The same findings fail for a dropout that keeps the wrong share.
    right = ic_layer.IndependentComponent
    monkeypatch.setattr(
        ic_layer,
        "IndependentComponent",
        lambda n, drop_prob, spatial_dims: right(n, drop_prob**2, spatial_dims=spatial_dims),
    )
    monkeypatch.setattr(ic_layer, "mutual_information", lambda joint: (joint[-1, -1]) ** 2)
    monkeypatch.setattr(ic_layer, "_tables", lambda: [ic_layer.torch.eye(2) / 2])
    assert verdicts(ic_layer.measure_dependence({})) == [FAILS, FAILS]


def test_ic_layer_training_goes_both_ways():
    for layer, reference, expected in ((0.9, 0.8, HOLDS), (0.8, 0.9, FAILS), (None, 0.8, FAILS)):
        run = made_up(level("ic-layer", layer) | level("batch-norm", reference))
        assert verdicts(ic_layer.measure_training({"training": run})) == [expected, expected]
    mixed = {("ic-layer", s): 0.8 + 0.1 * (-1) ** s for s in range(3)}
    run = made_up(mixed | level("batch-norm", 0.83))
    assert verdicts(ic_layer.measure_training({"training": run})) == [UNDECIDED, UNDECIDED]


def depth_runs(bare_deep, fixup_deep, fixup_shallow):
    seeds = range(6)
    shallow = level("none", 0.7, seeds) | level("fixup", fixup_shallow, seeds)
    deep = level("none", bare_deep, seeds) | level("fixup", fixup_deep, seeds)
    return {"depth-8": made_up(shallow, seeds), "depth-110": made_up(deep, seeds)}


def test_fixup_depth_findings_go_both_ways():
    good = fixup.measure_depths(depth_runs(None, 0.7, 0.72))
    assert verdicts(good) == [HOLDS, HOLDS, HOLDS]
    assert good[0].details["diverged"] == {"depth-8": 0, "depth-110": 6}
    assert verdicts(fixup.measure_depths(depth_runs(0.12, 0.7, 0.72)))[0] == HOLDS
    assert verdicts(fixup.measure_depths(depth_runs(0.6, 0.2, 0.72))) == [FAILS, FAILS, FAILS]


def test_fixup_ten_thousand_layers_goes_both_ways():
    for accuracy, expected in ((0.4, [HOLDS, HOLDS]), (0.05, [HOLDS, FAILS]), (None, [FAILS] * 2)):
        run = made_up({("fixup", 0): accuracy}, seeds=[0], test_samples=4500)
        found = fixup.measure_ten_thousand({"one-epoch": run})
        assert verdicts(found) == expected
    two = made_up({("fixup", 0): 0.4, ("fixup", 1): 0.05}, seeds=[0, 1], test_samples=4500)
    assert fixup.measure_ten_thousand({"one-epoch": two})[1].verdict == FAILS
    run = made_up({}, seeds=[0])
    assert verdicts(fixup.measure_ten_thousand({"one-epoch": run})) == [UNDECIDED] * 2


def batch_runs(response, batch):
    return {
        f"batch-{size}": made_up(level("filter-response-norm", r) | level("batch-norm", b))
        for size, r, b in zip((32, 8, 2, 1), response, batch, strict=True)
    }


def test_filter_response_norm_findings_go_both_ways():
    measure = filter_response_norm.measure
    good = measure(batch_runs((0.8, 0.8, 0.79, 0.79), (0.85, 0.8, 0.6, 0.3)))
    assert verdicts(good) == [HOLDS, HOLDS, HOLDS]
    bad = measure(batch_runs((0.8, 0.7, 0.6, 0.5), (0.85, 0.8, 0.7, 0.6)))
    assert verdicts(bad) == [FAILS, FAILS, FAILS]
    assert bad[0].measured == pytest.approx(30.0)


def test_missing_trial_leaves_a_finding_undecided():
    run = made_up(level("ic-layer", 0.9) | level("batch-norm", 0.8), seeds=[0, 1, 2, 3])
    assert verdicts(ic_layer.measure_training({"training": run})) == [UNDECIDED, UNDECIDED]


# -- the claims as they stand ---------------------------------------------------------------------


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
def test_claim_is_whole(claim):
    assert claims.find_claim(claim.name) is claim
    assert claim.paper
    assert set(claim.budget) == {"small", "paper"}
    assert len({bound.statement for bound in claim.bounds}) == len(claim.bounds)
    for bound in claim.bounds:
        assert bound.reason.endswith(".")
        # Both verdicts are possible: the threshold is neither end of what can be measured.
        assert {verdict(x, x, bound.threshold, bound.direction) for x in (-1e6, 1e6)} == {
            HOLDS,
            FAILS,
        }
    for part in claim.parts:
        assert set(part.studies) in (set(), {"small", "paper"})
        for by_name in part.studies.values():
            for study in by_name.values():
                assert study.task.data is None
                for label in study.methods:
                    assert comparison.find_method(label).label == label


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="do you mean 'fixup'"):
        claims.find_claim("fixupp")
    with pytest.raises(ValueError, match="do you mean 'small'"):
        reproduce(claims.CLAIMS[0], "smal", None, tmp_path, QUIET)


def test_studies_are_told_where_data_lie(tmp_path):
    study = Study(task=TaskChoice(name="cifar10"))
    assert locate(study, tmp_path).task.data == str(tmp_path)
    assert locate(study, None).task.data is None
    assert locate(Study(), tmp_path).task.data is None


# -- a miniature claim from end to end ------------------------------------------------------------

AHEAD = Bound(
    statement="batch-norm minus none",
    direction="above",
    threshold=-100.0,
    unit="points",
    reason="For a test.",
)


def _measure_miniature(runs):
    (first, second) = (runs["first"], runs["second"])
    one, other = final_accuracies(first, "batch-norm"), final_accuracies(second, "none")
    return [judge_difference(AHEAD, one, other, True, {})]


def _miniature(threshold=-100.0):
    training = Training(epochs=1, batch_size=64, lr=0.05, device="cpu")
    study = Study(
        model=ModelChoice.model_validate({"name": "mlp", "depth": 2, "width": 8}),
        methods=["batch-norm"],
        seeds=[0, 1],
        training=training,
    )
    studies = {"first": study, "second": study.model_copy(update={"methods": ["none"]})}
    bound = replace(AHEAD, threshold=threshold)
    part = Part(
        name="part", bounds=(bound,), measure=_measure_miniature, studies={"small": studies}
    )
    return Claim(
        name="batch-norm",
        method="batch-norm",
        statement="A miniature.",
        budget={"small": "seconds"},
        parts=(part,),
    )


def test_time_of_what_a_claim_measures_without_studies_counts(tmp_path):
    def measure(runs):
        time.sleep(0.2)
        return [AHEAD.judge(1.0, (0.5, 1.5), 3)]

    part = Part(name="part", bounds=(AHEAD,), measure=measure)
    claim = replace(_miniature(), parts=(part,))
    found = reproduce(claim, "small", None, tmp_path, QUIET)
    assert found.seconds >= 0.2
    assert reproduce(claim, "small", None, tmp_path, QUIET) == found


def test_time_of_what_was_measured_before_a_stop_counts(tmp_path):
    calls = []

    def measure(runs):
        time.sleep(0.2)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return [AHEAD.judge(1.0, (0.5, 1.5), 3)]

    claim = replace(_miniature(), parts=(Part(name="part", bounds=(AHEAD,), measure=measure),))
    with pytest.raises(KeyboardInterrupt):
        reproduce(claim, "small", None, tmp_path, QUIET)
    assert reproduce(claim, "small", None, tmp_path, QUIET).seconds >= 0.4


def test_reproduce_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    calls = []

    def stopped(study, folder, console):
        calls.append(folder.name)
        if len(calls) == 2:
            raise comparison.Interrupted
        return original_compare(study, folder, console)

    run, evidence = tmp_path / "run", tmp_path / "evidence"
    monkeypatch.setattr(comparison, "compare", stopped)
    with pytest.raises(comparison.Interrupted):
        reproduce(_miniature(), "small", None, run, QUIET)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("result.json")}
    assert len(before) == 2

    found = reproduce(_miniature(), "small", tmp_path / "data", run, QUIET)
    assert len(list(run.rglob("result.json"))) == 4
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert verdicts(found.findings) == [HOLDS]
    assert (found.seeds, found.n) == ((0, 1), 4)
    assert found.seconds > 0

    assert append_evidence(found, evidence)
    again = reproduce(_miniature(), "small", None, run, QUIET)
    assert again == found
    assert not append_evidence(again, evidence)
    lines = (evidence / "batch-norm.jsonl").read_text().splitlines()
    assert len(lines) == 1
    content = json.loads(lines[0])
    assert content["findings"][0]["verdict"] == HOLDS
    assert content["studies"]["part"]["first"]["model"]["width"] == 8
    assert content["versions"]["torch"]
    assert str(tmp_path) not in lines[0]

    with pytest.raises(ValueError, match="begun with other bounds"):
        reproduce(_miniature(threshold=0.0), "small", None, run, QUIET)


def test_verb_prints_appends_and_keeps_the_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verb, "find_claim", lambda name: _miniature())
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "ledger.md"
    page.write_text("")
    evidence = tmp_path / "evidence"
    verb.reproduce_claim("batch-norm", "small", None, tmp_path / "run", evidence, Console())
    printed = capsys.readouterr().out
    assert printed.index("Held against, fixed beforehand") < printed.index("holds: batch-norm")
    assert "claimed above -100" in printed
    assert page.read_text() == ledger.ledger_text(evidence)
    assert [name for name, _, _ in verb.list_claims()] == [c.name for c in claims.CLAIMS]


# -- the ledger -----------------------------------------------------------------------------------


def _line(date, measured, low, high, commit="abc", seconds=12.3):
    finding = AHEAD.judge(measured, None if low is None else (low, high), 3)
    content = {name: getattr(finding, name) for name in finding.__dataclass_fields__}
    return json.dumps(
        {
            "claim": "fixup",
            "scale": "small",
            "statement": "It trains.",
            "paper": "A. Author, Title, 2019",
            "departs": ["a|b"],
            "findings": [content],
            "commit": commit,
            "device": "cpu: A processor",
            "threads": 2,
            "seconds": seconds,
            "date": date,
        }
    )


def test_ledger_lists_runs_newest_first(tmp_path):
    older, newer = _line("2024-01-01T00:00:00", -0.0, -1, 1), _line("2024-02-01", None, None, None)
    (tmp_path / "fixup.jsonl").write_text(older + "\n" + newer + "\n")
    text = ledger.ledger_text(tmp_path)
    assert text == ledger.ledger_text(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| batch-norm minus none")]
    assert rows[0].startswith(
        "| batch-norm minus none | **not decidable at this scale** | nothing | above -100 | small |"
    )
    assert rows[1] == (
        "| batch-norm minus none | **holds** | 0 [-1, 1] points | above -100 | small | "
        "cpu: A processor, 2 threads | 12 | abc | 2024-01-01 |"
    )


def test_ledger_refuses_a_damaged_line(tmp_path):
    (tmp_path / "fixup.jsonl").write_text(_line("2024", 1, 0, 2) + '\n{"claim"')
    with pytest.raises(ValueError, match="line 2"):
        ledger.ledger_text(tmp_path)


def test_ledger_in_the_repository_is_up_to_date():
    page = (REPOSITORY / "docs" / "ledger.md").read_text(encoding="utf-8")
    assert page == ledger.ledger_text(REPOSITORY / "evidence"), (
        "do run `python -m normlab.lab.claims.ledger evidence docs/ledger.md`"
    )


# -- small batches, scale initialisation, recalibration -------------------------------------------

SMALL_BATCH_CLAIMS = (batch_layer_norm.CLAIM, batch_kalman_norm.CLAIM, cross_iteration_bn.CLAIM)


def small_batch_runs(method, own, batch, large):
    """Return runs at 2 and 4, accuracies given in that order, and one of the reference at 32."""
    return {
        f"batch-{size}": made_up(level(method, one) | level("batch-norm", other))
        for size, one, other in zip((2, 4), own, batch, strict=True)
    } | {"batch-32": made_up(level("batch-norm", large))}


@pytest.mark.parametrize("claim", SMALL_BATCH_CLAIMS, ids=lambda claim: claim.name)
def test_small_batch_findings_go_both_ways(claim):
    (part,) = claim.parts

    def found(own, batch, large):
        return part.measure(small_batch_runs(claim.method, own, batch, large))

    good = found((0.79, 0.80), (0.60, 0.70), 0.80)
    assert verdicts(good) == [HOLDS] * 4
    assert [finding.statement for finding in good] == [bound.statement for bound in part.bounds]
    assert [finding.measured for finding in good] == pytest.approx([19.0, -1.0, 10.0, 0.0])
    assert verdicts(found((0.59, 0.69), (0.60, 0.70), 0.80)) == [FAILS] * 4
    # Each batch is judged by its own run: ahead at 2 but far from 32, near 32 at 4 but behind.
    assert verdicts(found((0.70, 0.79), (0.60, 0.80), 0.80)) == [HOLDS, FAILS, FAILS, HOLDS]
    assert verdicts(found((None, None), (0.60, 0.70), 0.80)) == [FAILS] * 4
    assert good[0].details["batch-32"]["batch-norm"]["accuracy"] == pytest.approx(80, abs=0.5)


def test_small_batch_findings_miss_only_what_is_missing():
    claim = SMALL_BATCH_CLAIMS[0]
    runs = small_batch_runs(claim.method, (0.79, 0.80), (0.60, 0.70), 0.80)
    del runs["batch-32"].trials[0]
    assert verdicts(claim.parts[0].measure(runs)) == [HOLDS, UNDECIDED, HOLDS, UNDECIDED]
    runs = small_batch_runs(claim.method, (0.79, 0.80), (0.60, 0.70), 0.80)
    runs["batch-2"].trials.remove(
        next(t for t in runs["batch-2"].trials if t.method != "batch-norm")
    )
    assert verdicts(claim.parts[0].measure(runs)) == [UNDECIDED, UNDECIDED, HOLDS, HOLDS]


@pytest.mark.parametrize(
    "claim",
    [*SMALL_BATCH_CLAIMS, micro_batches.CLAIM, batchless_norm.CLAIM],
    ids=lambda claim: claim.name,
)
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_batches_differ_in_nothing_but_batch_and_rate(claim, scale):
    for part in claim.parts:
        studies = part.studies[scale]
        assert set(studies) == {f"batch-{s.training.batch_size}" for s in studies.values()}
        alike = {
            (s.task.model_dump_json(), s.model.model_dump_json(), s.training.epochs, str(s.seeds))
            for s in studies.values()
        }
        assert len(alike) == 1
        assert len({round(s.tune.high / s.tune.low, 9) for s in studies.values()}) == 1
        assert len({s.tune.trials for s in studies.values()}) == 1
        (optimizer,) = {s.training.optimizer for s in studies.values()}
        power = {"adamw": 0.5, "sgd": 1.0}[optimizer]
        lowest = {s.tune.low / s.training.batch_size**power for s in studies.values()}
        assert max(lowest) == pytest.approx(min(lowest))


def test_small_batch_warm_up_is_a_tenth_of_training():
    study = small_batches.study(4, ["batch-norm"], "small")
    assert study.task.train_size == 2500
    assert study.training.warmup_steps == 2 * 625 // 10


def test_micro_batches_findings_go_both_ways():
    convolutional, dense = micro_batches.CLAIM.parts

    def found(part, large, small):
        runs = {"batch-32": made_up(level("batch-norm", large))}
        return part.measure(runs | {"batch-2": made_up(level("batch-norm", small))})

    for part, enough in ((convolutional, 0.03), (dense, 0.11)):
        (finding,) = found(part, 0.8, 0.8 - enough)
        assert finding.verdict == HOLDS
        assert finding.measured == pytest.approx(100 * enough)
        assert verdicts(found(part, 0.8, 0.79)) == [FAILS]
        assert verdicts(found(part, 0.8, 0.85)) == [FAILS]
        assert verdicts(found(part, 0.8, None)) == [HOLDS]
    assert verdicts(found(dense, 0.8, 0.75)) == [FAILS]


def test_batchless_norm_finding_goes_both_ways():
    def found(single, large):
        return batchless_norm.measure(
            {
                "batch-1": made_up(level("batchless-norm", single)),
                "batch-32": made_up(level("batch-norm", large)),
            }
        )

    (finding,) = found(0.78, 0.8)
    assert (finding.verdict, finding.measured) == (HOLDS, pytest.approx(-2.0))
    assert verdicts(found(0.76, 0.8)) == [FAILS]
    assert verdicts(found(None, 0.8)) == [FAILS]


def test_bn_init_holds_just_where_the_one_sided_test_is_significant():
    from scipy.stats import ttest_rel

    seeds = range(15)
    verdicts_seen = set()
    for gain in (-0.02, -0.0012, -0.0009, 0.0, 0.0009, 0.0012, 0.02):
        spread = {s: 0.002 * (-1) ** s * (1 + s % 3) for s in seeds}
        trials = {("bn-init", s): 0.8 + gain + spread[s] for s in seeds}
        run = made_up(trials | {("batch-norm", s): 0.8 for s in seeds}, seeds)
        (finding,) = bn_init.measure({"training": run})
        own, default = (
            [100 * t.result["final_accuracy"] for t in run.trials if t.method == method]
            for method in ("bn-init", "batch-norm")
        )
        right = ttest_rel(own, default, alternative="greater")
        told = finding.details["one-sided paired t-test"]
        assert (told["t"], told["p_value"]) == pytest.approx((right.statistic, right.pvalue))
        expected = UNDECIDED
        if right.pvalue < 0.05:
            expected = HOLDS
        elif right.pvalue > 0.95:
            expected = FAILS
        assert finding.verdict == expected
        assert finding.low == pytest.approx(right.confidence_interval(0.95).low)
        verdicts_seen.add(finding.verdict)
    assert verdicts_seen == {HOLDS, FAILS, UNDECIDED}


def test_bn_init_without_pairs_is_undecided():
    run = made_up(level("batch-norm", 0.8))
    (finding,) = bn_init.measure({"training": run})
    assert (finding.verdict, finding.measured) == (UNDECIDED, None)
    run = made_up(level("batch-norm", 0.8) | level("bn-init", 0.9, (0, 1)))
    assert verdicts(bn_init.measure({"training": run})) == [UNDECIDED]


def scores(batch, running, recalibrated, seeds=(0, 1, 2)):
    kinds = (recalibration.BATCH, recalibration.RUNNING, recalibration.RECALIBRATED)
    return {
        kind: {seed: (1.0, value + 0.1 * seed**2 * (kind == kinds[1])) for seed in seeds}
        for kind, value in zip(kinds, (batch, running, recalibrated), strict=True)
    }


def test_recalibration_findings_go_both_ways():
    judge = recalibration.judge_few_steps
    good = judge(scores(60, 50, 59.5), True)
    assert verdicts(good) == [HOLDS, HOLDS]
    assert good[1].measured == pytest.approx(0.5)
    assert verdicts(judge(scores(60, 50, 55), True)) == [HOLDS, FAILS]
    assert verdicts(judge(scores(60, 59, 60), True)) == [FAILS, HOLDS]
    assert verdicts(judge(scores(60, 50, 59.5), False)) == [UNDECIDED, UNDECIDED]
    judge = recalibration.judge_small_batch
    assert verdicts(judge(scores(0, 50, 52), True)) == [HOLDS]
    assert verdicts(judge(scores(0, 50, 49), True)) == [FAILS]
    assert verdicts(judge(scores(0, 50, 52), False)) == [UNDECIDED]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Twelve steps on the digits, at a rate that leaves running statistics behind."""
    study = Study(
        task=TaskChoice(name="digits", train_size=384),
        model=ModelChoice.model_validate({"name": "plain-conv", "depth": 3, "width": 4}),
        methods=["batch-norm"],
        seeds=[0, 1],
        training=Training(epochs=1, batch_size=32, lr=0.1, schedule="constant", device="cpu"),
    )
    folder = tmp_path_factory.mktemp("recalibration") / "run"
    original_compare(study, folder, QUIET)
    return folder


def test_scores_come_from_the_weights_that_a_trial_left(short_run):
    run = read_run(short_run)
    found = recalibration.scores_of(run)
    before = {trial.seed: trial.result for trial in run.trials}
    for seed in (0, 1):
        # In evaluation mode nothing but what the trial itself reported.
        loss, accuracy = found[recalibration.RUNNING][seed]
        assert loss == pytest.approx(before[seed]["final_loss"])
        assert accuracy == pytest.approx(100 * before[seed]["final_accuracy"])
        # Training mode at this loss: batch statistics, by hand.
        model = build_model("plain-conv", (1, 8, 8), 10, depth=3, width=4)
        load_weights(trial_folder(short_run, "batch-norm", seed) / WEIGHTS, model)
        task = limit(load_task("digits"), 384)
        tests = evaluation_batches(task.test, mean=task.mean, std=task.std, batch_size=32)
        correct = 0
        with torch.no_grad():
            for inputs, targets in tests:
                correct += int((model.train()(inputs).argmax(1) == targets).sum())
        assert found[recalibration.BATCH][seed][1] == pytest.approx(100 * correct / len(task.test))
        losses = {kind: found[kind][seed][0] for kind in found}
        assert losses[recalibration.RECALIBRATED] < losses[recalibration.RUNNING]
    assert found == recalibration.scores_of(read_run(short_run))


def test_scores_of_a_diverged_trial_are_those_of_guessing(short_run):
    run = read_run(short_run)
    run.trials[1].result["status"] = "diverged"
    found = recalibration.scores_of(run)
    assert {kind: by_seed[1][1] for kind, by_seed in found.items()} == {
        kind: pytest.approx(10.0) for kind in found
    }
    (gap, left) = recalibration.judge_few_steps(found, True)
    json.dumps(gap.details, allow_nan=False)
    assert left.n == 2


def test_recalibration_measures_from_a_folder(short_run):
    runs = {"training": read_run(short_run)}
    assert [f.statement for f in recalibration.measure_few_steps(runs)] == [
        recalibration.GAP.statement,
        recalibration.LEFT.statement,
    ]
    (gain,) = recalibration.measure_small_batch(runs)
    assert gain.n == 2

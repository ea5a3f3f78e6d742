"""The claims: one rule for verdicts, findings that can go either way, evidence and ledger."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from normlab.lab import claims
from normlab.lab import compare as comparison
from normlab.lab.claims import (
    batch_norm,
    filter_response_norm,
    fixup,
    ic_layer,
    ledger,
    verb,
    weight_rescaling,
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
from normlab.lab.records import RunRecord, TrialRecord
from normlab.lab.statistics import share_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training

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


def decay_runs(rescaled, low, high, none):
    return {
        "decay-low": made_up(level("batch-norm", low) | level("weight-rescaling", rescaled)),
        "decay-high": made_up(level("batch-norm", high)),
        "none": made_up(level("batch-norm", none)),
    }


def test_weight_rescaling_is_held_against_the_better_decay():
    measure = weight_rescaling.measure
    assert verdicts(measure(decay_runs(0.84, 0.82, 0.84, 0.80))) == [HOLDS, HOLDS]
    assert verdicts(measure(decay_runs(0.82, 0.82, 0.84, 0.80))) == [FAILS, HOLDS]
    assert verdicts(measure(decay_runs(0.82, 0.84, 0.82, 0.83))) == [FAILS, FAILS]


def test_missing_trial_leaves_a_finding_undecided():
    run = made_up(level("ic-layer", 0.9) | level("batch-norm", 0.8), seeds=[0, 1, 2, 3])
    assert verdicts(ic_layer.measure_training({"training": run})) == [UNDECIDED, UNDECIDED]
    runs = decay_runs(0.9, 0.8, 0.8, 0.7)
    del runs["decay-high"].trials[0]
    assert verdicts(weight_rescaling.measure(runs)) == [UNDECIDED, HOLDS]


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
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
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

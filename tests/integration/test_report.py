import html
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fake_run import FakeMethod, many_methods, write_fake_run
from normlab.lab.records import RecordError, TrialRecord, read_run
from normlab.lab.report import colours, words, write_report
from normlab.lab.report.curves import curve
from normlab.lab.report.summary import summarise
from normlab.lab.report.verdict import _by_how_much, verdict

ALL = ((0, "diverged", 0.2, "the loss was infinite"), (1, "failed", 0.3, "a wrong shape"))


def page_of(folder) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """The text a reader sees: no scripts, no tags, plain spaces."""
    page = re.sub(r"<(script|style)[ >].*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", page)))


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def verdict_of(folder):
    found = verdict(summarise(read_run(folder)))
    text = " ".join((found.headline, *found.sentences))
    return re.sub(r"\s+", " ", text)


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    folder = write_fake_run(tmp_path / "run", epochs=3)
    page = page_of(folder)
    assert write_report(folder) == folder / "report.html"
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=\"(?!data:)", markup)
    assert "@import" not in markup
    assert "url(" not in markup
    assert "default-src 'none'" in markup
    assert not list(folder.glob(".*partial"))


def test_the_numbers_are_those_of_the_records(tmp_path):
    run = read_run(write_fake_run(tmp_path, epochs=8))
    summary = summarise(run)
    for method in summary.methods:
        results = [t.result for t in run.trials if t.method == method.label]
        finals = [r["final_accuracy"] for r in results if r["status"] == "finished"]
        if finals:
            assert method.final_accuracy.mean == pytest.approx(np.mean(finals))
        assert method.num_finished == len(finals)
    assert [m.final_accuracy.mean for m in summary.methods[:-1]] == sorted(
        (m.final_accuracy.mean for m in summary.methods[:-1]), reverse=True
    )
    assert summary.methods[-1].label == "none"
    assert {m.label: len(m.failures) for m in summary.methods if m.failures} == {
        "fixup+mixup": 1,
        "none": 3,
    }
    tested = [m for m in summary.methods if m.test is not None]
    assert all(m.p_corrected >= m.test.p_value for m in tested)
    assert len(tested) == 5


def test_what_failed_is_told_with_its_step_and_reason(tmp_path):
    text = words_of(page_of(write_fake_run(tmp_path, epochs=10)))
    assert "the loss was not a number after a gradient norm of 3.1e+08" in text
    assert re.search(r"fixup\+mixup *2 *diverged *130 of 420", text)


def test_a_clear_winner_is_called_significant(tmp_path):
    methods = [
        FakeMethod("batch-norm", 0.90, 0.001, order=0),
        FakeMethod("group-norm", 0.96, 0.001, order=1),
        FakeMethod("layer-norm", 0.80, 0.001, order=2),
    ]
    text = verdict_of(write_fake_run(tmp_path, methods, seeds=range(5), epochs=3))
    assert re.search(r"group-norm beat batch-norm by [56]\.\d points\.", text)
    assert "with 5 seeds this difference is significant (Holm-corrected p" in text
    assert "Significantly below batch-norm: layer-norm." in text


def test_too_few_seeds_are_said_to_be_too_few(tmp_path):
    methods = [FakeMethod("batch-norm", 0.96), FakeMethod("group-norm", 0.975, 0.012, order=1)]
    for seeds, expected in (
        ((0, 1, 2), "3 seeds are too few to tell them apart"),
        ((0,), "a single seed cannot tell whether that is more than chance"),
    ):
        folder = tmp_path / str(len(seeds))
        text = verdict_of(write_fake_run(folder, methods, seeds=seeds, epochs=3))
        assert expected in text
        assert "this difference is significant" not in text


def test_the_reference_may_win(tmp_path):
    methods = [FakeMethod("batch-norm", 0.99, 0.001), FakeMethod("group-norm", 0.9, 0.01, order=1)]
    text = verdict_of(write_fake_run(tmp_path, methods, epochs=3))
    assert text.startswith("No method beat batch-norm, the reference.")
    assert "points below batch-norm" in text


def test_a_method_that_lost_seeds_does_not_win(tmp_path):
    lucky = FakeMethod("lucky", 0.99, 0.0, order=1, fails=ALL)
    text = verdict_of(write_fake_run(tmp_path, [FakeMethod("batch-norm", 0.9), lucky], epochs=3))
    assert text.startswith("No method beat batch-norm")
    assert "lucky stood higher, but only on the seeds that survived" in text


PARTIAL = {
    "nothing started": ([FakeMethod("batch-norm", missing=(0, 1))], "No trial has finished yet"),
    "only under way": (
        [FakeMethod("batch-norm", unfinished=(0, 1)), FakeMethod("b", missing=(0, 1))],
        "No trial has finished yet",
    ),
    "under way": (
        [FakeMethod("batch-norm"), FakeMethod("b", unfinished=(1,)), FakeMethod("c", missing=(0,))],
        "The study is not complete",
    ),
    "all diverged": (
        [FakeMethod("batch-norm", fails=ALL), FakeMethod("b", fails=ALL)],
        "No trial trained to its end",
    ),
    "no accuracy": (
        [FakeMethod("batch-norm", measured=False), FakeMethod("b", measured=False)],
        "No accuracy was measured",
    ),
    "no reference": ([FakeMethod("a"), FakeMethod("b")], "names no reference"),
    "reference lost": (
        [FakeMethod("batch-norm", fails=ALL), FakeMethod("b"), FakeMethod("c")],
        "batch-norm, the reference, finished no seed",
    ),
    "one method": ([FakeMethod("batch-norm")], "Only batch-norm has an accuracy"),
    "seeds not shared": (
        [FakeMethod("batch-norm", 0.9, missing=(0,)), FakeMethod("b", 0.95, missing=(1,))],
        "share no finished seed",
    ),
    "no memory": ([replace(m, memory=None) for m in many_methods(3)], "Results"),
}


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("seeds", [(0, 1), (0,)], ids=["two", "one"])
def test_any_run_has_a_page(tmp_path, name, seeds):
    methods, expected = PARTIAL[name]
    folder = write_fake_run(tmp_path, methods, seeds=seeds, epochs=2)
    page = page_of(folder)
    if len(seeds) == 2:
        assert expected in words_of(page)
    assert len(data_of(page)["methods"]) == len(methods)
    assert "None" not in words_of(page).replace("AllNone", "").replace("None of", "")


def test_a_bare_study_has_a_page(tmp_path):
    (tmp_path / "study.toml").write_text('name = "bare"\n')
    assert "Nothing has been recorded yet." in words_of(page_of(tmp_path))


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"expected the folder of a study"):
        write_report(tmp_path)


HOSTILE = '</script><script>document.title="hit"</script><img src=x onerror=alert(1)>%{y}&amp;'


def test_names_stay_text(tmp_path):
    hostile = FakeMethod(HOSTILE, 0.95, fails=((1, "failed", 0.5, f"oh {HOSTILE}"),), order=1)
    methods = [FakeMethod("batch-norm"), hostile]
    page = page_of(write_fake_run(tmp_path, methods, epochs=2, name=HOSTILE))
    assert HOSTILE not in page
    assert "<img" not in page
    assert 'document.title="hit"' not in page
    assert HOSTILE in html.unescape(page)
    assert HOSTILE in [method["label"] for method in data_of(page)["methods"]]


def test_only_an_arxiv_id_becomes_a_link(tmp_path):
    folder = write_fake_run(tmp_path, [FakeMethod("batch-norm"), FakeMethod("b")], epochs=1)
    cards = json.loads((folder / "cards.json").read_text())
    cards["b"]["source"]["arxiv"] = "javascript:alert(1)"
    (folder / "cards.json").write_text(json.dumps(cards))
    page = page_of(folder)
    assert 'href="https://arxiv.org/abs/1502.03167"' in page
    assert not re.search(r'href="javascript', page)


def test_curves_are_small_and_end_where_the_training_ends(tmp_path):
    run = read_run(write_fake_run(tmp_path, many_methods(1), epochs=300, lines_per_epoch=3))
    for kind, name in (("eval", "accuracy"), ("train", "loss")):
        found = curve(run.trials, kind, name)
        assert len(found["step"]) <= 200
        assert len({len(column) for column in found.values()}) == 1
        assert found["step"][-1] > 0.99 * 300 * 42
        assert all(
            low <= mean <= high
            for low, mean, high in zip(found["low"], found["mean"], found["high"], strict=True)
        )
        assert set(found["count"]) == {3}
    assert curve(run.trials, "eval", "accuracy")["step"][-1] == 300 * 42


def test_a_curve_goes_on_with_the_seeds_that_are_left():
    def trial(seed, values):
        lines = [
            {"kind": "eval", "step": step, "seconds": step + seed, "accuracy": value}
            for step, value in enumerate(values)
        ]
        return TrialRecord("m", seed, None, lines)

    found = curve([trial(0, [0.1, 0.3, 0.5]), trial(1, [0.2, None])], "eval", "accuracy")
    assert found["mean"] == pytest.approx([0.15, 0.3, 0.5])
    assert found["low"] == [0.1, 0.3, 0.5]
    assert found["high"] == [0.2, 0.3, 0.5]
    assert found["count"] == [2, 1, 1]
    assert found["seconds"] == [0.5, 1.0, 2.0]


def test_targets_of_the_study_are_used_as_given(tmp_path):
    summary = summarise(read_run(write_fake_run(tmp_path, epochs=5, targets=(0.9, 0.5))))
    assert summary.targets == [0.5, 0.9]
    assert not summary.targets_are_derived
    none = next(m for m in summary.methods if m.label == "none")
    assert (none.steps_to[1].reached, none.steps_to[1].count) == (0, 3)


def cards_of(*pairs):
    return {label: {"name": label.partition(":")[0], "order": order} for label, order in pairs}


def test_a_style_is_the_same_on_every_page():
    alone = colours.styles(cards_of(("group-norm", 1)))["group-norm"]
    among = colours.styles(cards_of(("batch-norm", 0), ("group-norm", 1), ("x", 30)))["group-norm"]
    assert alone == among
    variant = colours.styles(cards_of(("group-norm:groups=4", 1)))
    assert variant == colours.styles(cards_of(("group-norm:groups=4", 17)))


def test_a_colour_that_is_taken_gives_way_to_a_free_one():
    cards = cards_of(("batch-norm", 0), ("lars", 8), ("lars+sam", 16), ("group-norm", 1))
    found = colours.styles(cards)
    assert len({style.light for style in found.values()}) == 4
    assert found["batch-norm"].light == colours.LIGHT[0]
    assert found["group-norm"].light == colours.LIGHT[1]


def test_no_two_methods_of_a_page_look_alike():
    crowd = [(f"method-{index}", index % 10) for index in range(48)]
    found = colours.styles(cards_of(*crowd))
    assert len({(style.light, style.dash) for style in found.values()}) == 48
    assert found == {**found, **colours.styles(cards_of(*reversed(crowd)))}
    assert len(colours.styles(cards_of(*((f"m{index}", 3) for index in range(60))))) == 60


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deutan": [[0.3673, 0.8607, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritan": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("palette", [colours.LIGHT, colours.DARK], ids=["light", "dark"])
def test_colours_stay_apart_for_colour_blind_readers(palette, blindness):
    seen = [lab(np.array(BLINDNESS[blindness]) @ linear(colour)) for colour in palette]
    # A difference of 10 is plain to see when two lines lie beside each other.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize(
    ("palette", "page"), [(colours.LIGHT, colours.LIGHT_PAGE), (colours.DARK, colours.DARK_PAGE)]
)
def test_colours_stand_out_from_the_page(palette, page):
    def luminance(colour):
        return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour))

    for colour in palette:
        dark, light = sorted((luminance(colour), luminance(page)))
        assert (light + 0.05) / (dark + 0.05) > 2.9


def test_numbers_in_words():
    thin = "\u202f"
    assert words.percent(0.9789) == f"97.9{thin}%"
    assert words.points(-0.004, sign=True) == "−0.4"
    assert words.points(0.004, sign=True) == "+0.4"
    assert words.points(-0.0001, sign=True) == "0.0"
    assert words.points(0.0001, sign=True) == "0.0"
    assert words.duration(3.14159) == f"3.14{thin}s"
    assert words.duration(125) == f"2{thin}min 5{thin}s"
    assert words.duration(7800) == f"2{thin}h 10{thin}min"
    assert words.size(180 * 2**20) == f"180{thin}MiB"
    assert words.magnitude(77_000) == f"77.0{thin}k"
    assert words.magnitude(9_999) == "9,999"
    assert words.number(5120.4) == "5,120"
    assert words.number(0.05213) == "0.0521"
    assert words.p_value(0.00001) == f"<{thin}0.0001"
    assert words.p_value(0.214) == "0.21"
    assert words.percent(None) == "–"


def test_the_report_needs_no_torch(tmp_path):
    write_fake_run(tmp_path, epochs=1)
    code = (
        "import sys; from pathlib import Path; from normlab.lab.report import write_report; "
        f"write_report(Path({str(tmp_path)!r})); assert 'torch' not in sys.modules; "
        "assert 'scipy.stats' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((-0.03, 0.01), "anything from −3.0 to +1.0 points would fit the seeds."),
     ((-0.03, -0.01), "by itself it would be −3.0 to −1.0 points, but it is one of several")],
)  # fmt: skip
def test_an_interval_without_zero_is_not_called_anything(interval, expected):
    test = SimpleNamespace(
        difference=-0.02, num_pairs=3, reason=None, interval=interval
    )  # fmt: skip
    method = SimpleNamespace(test=test, p_corrected=0.15, is_significant=False)
    found = _by_how_much(method, SimpleNamespace(label="batch-norm"), 1)
    assert expected in found.replace("-", "−")


def test_what_not_every_seed_reported_is_shown_with_its_seed(tmp_path):
    folder = write_fake_run(tmp_path, epochs=2)
    results = [
        (path, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("result.json"))
    ]
    for path, result in results:
        if result["method"] == "batch-norm" and result["seed"] > 0:
            result["notes"] += [f"found {result['seed']}"] * 2
            path.write_text(json.dumps(result), encoding="utf-8")
    summary = summarise(read_run(folder))
    notes = next(method.notes for method in summary.methods if method.label == "batch-norm")
    assert notes[1:] == ["seed 1: found 1", "seed 2: found 2"]
    assert notes[0].startswith("replaced 19 of 19")

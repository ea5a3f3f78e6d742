import pytest

from fake_run import FakeMethod, write_fake_run
from normlab.lab.report import write_report

pytestmark = pytest.mark.browser

HOSTILE = '</script><script>document.title="hit"</script><img src=x onerror=alert(1)><b>%{y}'
LOST = ((0, "diverged", 0.4, "the loss was infinite"), (1, "diverged", 0.5, "no number"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(write_fake_run(tmp_path_factory.mktemp("run"), epochs=12))


def column(page, table, number):
    cells = page.locator(f"#table-{table} tbody tr > :nth-child({number})")
    return [text.split()[0] if text.split() else "" for text in cells.all_text_contents()]


def lines(page, plot):
    return page.evaluate(
        "id => document.getElementById(id).data.filter(t => t.meta).map(t => t.meta)", plot
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_and_asks_the_network_for_nothing(read, report, scheme):
    reader = read(color_scheme=scheme)
    page = reader.open(report)
    page.locator("#cost").scroll_into_view_if_needed()
    page.wait_for_selector("#plot-cost .main-svg", state="attached")
    page.emulate_media(media="print")
    page.emulate_media(media="screen")
    assert reader.complaints == []
    assert reader.requests == [report.as_uri()]
    assert page.locator(".plot .main-svg").count() > 0


def test_the_table_sorts_both_ways_and_keeps_what_is_missing_last(read, report):
    page = read().open(report)
    head = page.locator("#table-accuracy thead th", has_text="Final accuracy")
    found = []
    for direction in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = column(page, "accuracy", 2)
        assert values[-1] == "–"
        found.append([float(value.replace("%", "")) for value in values[:-1]])
    assert found[0] == sorted(found[0], reverse=True)
    assert found[1] == sorted(found[1])
    assert found[0] != found[1]
    page.locator("#table-accuracy thead th button", has_text="Method").click()
    names = column(page, "accuracy", 1)
    assert names == sorted(names)


def test_numbers_sort_as_numbers(read, report):
    page = read().open(report)
    page.locator("#table-cost thead button", has_text="Training time").click()
    cells = page.locator("#table-cost tbody tr > :nth-child(2)")
    values = [cell.get_attribute("data-value") for cell in cells.all()]
    shown = [float(value) for value in values if value]
    assert shown == sorted(shown)
    assert len(shown) == 6


def test_one_click_toggles_a_method_everywhere(read, report):
    page = read().open(report)
    page.locator("#cost").scroll_into_view_if_needed()
    page.wait_for_selector("#plot-cost .main-svg", state="attached")
    plots = ("plot-accuracy", "plot-loss", "plot-cost")
    assert all("group-norm" in lines(page, plot) for plot in plots)
    chip = page.locator(".chip", has_text="group-norm")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert all("group-norm" not in lines(page, plot) for plot in plots)
    assert all("batch-norm" in lines(page, plot) for plot in plots)
    for table in ("accuracy", "targets", "cost"):
        row = page.locator(f"#table-{table} tr", has_text="group-norm")
        assert "off" in (row.get_attribute("class") or "")
    page.locator("#table-accuracy .toggle", has_text="group-norm").click()
    assert chip.get_attribute("aria-pressed") == "true"
    assert all("group-norm" in lines(page, plot) for plot in plots)
    page.locator("[data-all=hide]").click()
    assert [lines(page, plot) for plot in plots] == [[], [], []]
    page.locator("[data-all=show]").click()
    assert len(lines(page, "plot-accuracy")) == 7


def test_axes_and_scales_can_be_chosen(read, report):
    page = read().open(report)
    axis = "id => document.getElementById(id).layout.%s"

    def ends(plot):
        return page.evaluate(
            "id => document.getElementById(id).data.find(t => t.meta).x.at(-1)", plot
        )

    steps = ends("plot-accuracy")
    page.locator("input[name=x][value=seconds]").check()
    assert ends("plot-accuracy") < steps / 10
    assert "seconds" in page.evaluate(axis % "xaxis.title.text", "plot-loss")
    assert "step" not in page.evaluate(axis % "xaxis.title.text", "plot-accuracy")
    assert page.evaluate(axis % "yaxis.type", "plot-loss") == "log"
    page.locator("#log").uncheck()
    assert page.evaluate(axis % "yaxis.type", "plot-loss") != "log"
    page.locator("input[name=loss][value=test]").check()
    assert page.locator("#loss-title").text_content() == "Loss on test data"
    before = len(page.evaluate("document.getElementById('plot-loss').data"))
    page.locator("#bands").check()
    assert len(page.evaluate("document.getElementById('plot-loss').data")) == before + 7


def test_lines_differ_without_colour(read, report):
    page = read().open(report)
    looks = page.evaluate(
        "document.getElementById('plot-accuracy').data.filter(t => t.meta)"
        ".map(t => t.line.dash + ' ' + t.marker.symbol)"
    )
    assert len(set(looks)) == len(looks) == 7


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window(read, report, width):
    page = read(viewport={"width": width, "height": 800}).open(report)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [plot.bounding_box() for plot in page.locator(".plot").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


def test_dark_mode_changes_page_and_plots(read, report):
    page = read(color_scheme="light").open(report)
    tone = "getComputedStyle(document.body).backgroundColor"
    line = "document.getElementById('plot-accuracy').data.find(t => t.meta).line.color"
    light = (page.evaluate(tone), page.evaluate(line))
    page.emulate_media(color_scheme="dark")
    for _ in range(100):
        if page.evaluate(line) != light[1]:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(line) != light[1]
    assert page.evaluate(tone) != light[0]


def test_it_prints_open_and_light(read, report):
    page = read(color_scheme="dark").open(report)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("document.getElementById('plot-accuracy').layout.width") == 660
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert len(page.pdf()) > 10_000


def test_names_with_markup_stay_text(read, tmp_path):
    hostile = FakeMethod(HOSTILE, 0.95, fails=((1, "failed", 0.5, HOSTILE),), order=1)
    run = write_fake_run(tmp_path, [FakeMethod("batch-norm"), hostile], epochs=4, name=HOSTILE)
    reader = read()
    page = reader.open(write_report(run))
    page.on("dialog", lambda dialog: reader.complaints.append(dialog.message))
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("#table-accuracy tbody .name", has_text=HOSTILE).count() == 1
    assert page.locator("main img").count() == 0
    assert page.title() == f"{HOSTILE} · normlab"
    # The name at the end of its line, cut short but not read as markup.
    names = page.locator("#plot-accuracy .annotation-text").all_text_contents()
    assert any(name.startswith("</script><script>") for name in names)
    page.locator(".chip", has_text=HOSTILE).click()
    assert lines(page, "plot-accuracy") == ["batch-norm"]
    assert reader.complaints == []


@pytest.mark.parametrize(
    "methods",
    [
        [FakeMethod("batch-norm", missing=(0, 1))],
        [FakeMethod("batch-norm", unfinished=(0, 1)), FakeMethod("b", missing=(0, 1))],
        [FakeMethod("batch-norm", fails=LOST), FakeMethod("b", fails=LOST)],
        [FakeMethod("batch-norm", measured=False), FakeMethod("b", measured=False)],
        [FakeMethod("batch-norm", memory=None)],
    ],
    ids=["not started", "under way", "all diverged", "no accuracy", "one method"],
)
@pytest.mark.parametrize("seeds", [(0, 1), (0,)], ids=["two seeds", "one seed"])
def test_partial_runs_open_quietly(read, tmp_path, methods, seeds):
    reader = read()
    path = write_report(write_fake_run(tmp_path, methods, seeds=seeds, epochs=3))
    started = any(set(seeds) - set(method.missing) for method in methods)
    page = reader.open(path, plots=started)
    assert page.evaluate("performance.getEntriesByName('sortable').length") == 1
    if started:
        page.locator("input[name=x][value=seconds]").check()
        page.locator("input[name=loss][value=test]").check()
    if page.locator("#plot-cost").count():
        page.locator("#plot-cost").scroll_into_view_if_needed()
        page.locator("input[name=cost][value=memory]").check()
    assert reader.complaints == []
    assert page.locator(".headline").text_content()

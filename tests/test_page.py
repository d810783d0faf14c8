"""The report's page: its charts as numbers, and the page itself in a real browser."""

import dataclasses
import math
import re
import shutil
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import STEPS, layer_report, report_of, svd_report

from lightning_svd.report.charts import SIZE, Axis, curve, spread, staircase
from lightning_svd.report.data import SVDReport
from lightning_svd.report.page import render_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMPARISON = {"Test accuracy": ("99.70%", "99.85%"), "CPU latency, batch 64": ("7.04 ms", "5.95 ms (84.5%)")}
SECTIONS = ["Dense against low-rank", "Over the run", "Where the MACs went", "Spectra", "Layers"]
SECTIONS += ["Left alone", "Arguments", "Rank changes"]

thoroughly = settings(max_examples=200, deadline=None, derandomize=True)

# ------------------------------------------------------------------------------------------------------------- charts


@thoroughly
@given(st.floats(-100, 100), st.floats(1e-6, 1e6), st.integers(2, 8), st.booleans())
def test_ticks_are_round_few_and_inside(low, extent, most, whole):
    extent = max(1.0, extent) if whole else extent
    axis = Axis("x", low * extent, low * extent + extent, most_ticks=most, whole=whole)
    values = axis.round_values()
    assert len(values) <= most + 1
    assert all(-1e-6 * SIZE <= axis.place(value) <= (1 + 1e-6) * SIZE for value in values)
    if whole:
        assert all(value == round(value) for value in values)
    else:
        assert len(values) >= int(most / 2.5)
        for a, b in pairwise(values):
            assert f"{b - a:.3e}"[:5] in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis("step", 0, 12000), ["0", "2,000", "4,000", "6,000", "8,000", "10,000", "12,000"]),
        (Axis("share", 0, 1.03, "{:.0%}".format), ["0%", "20%", "40%", "60%", "80%", "100%"]),
        (Axis("weight", 0, 0.00206, most_ticks=5), ["0", "0.0005", "0.001", "0.0015", "0.002"]),
        (Axis("index", 0.5, 3.5, whole=True), ["1", "2", "3"]),
        (Axis("index", 0.5, 1.5, whole=True), ["1"]),
    ],
)
def test_labels_of_ticks(axis, labels):
    assert [text for _, text in axis.ticks()] == labels


def test_a_staircase_goes_right_and_then_up_or_down_and_on_to_the_end():
    x, y = Axis("x", 0, 10), Axis("y", 0, 1)
    assert staircase(x, y, [(0, 1.0), (4, 0.5), (8, 0.25)]) == "M0 0H400V500H800V750H1000"


def test_a_curve_leaves_out_what_is_not_finite_and_what_cannot_be_seen():
    x, y = Axis("x", 0, 10), Axis("y", 0, 1)
    assert curve(x, y, [(0, math.nan), (1, 1.0), (5, math.inf), (10, 0.0)]) == "M100 0L1000 1000"
    assert curve(x, y, [(k / 1000, 0.5) for k in range(10001)]).count("L") <= 200
    assert curve(x, y, [(k / 1000, 0.5) for k in range(10001)]).endswith("L1000 500")
    assert curve(x, y, [(5, 0.5)]) == "M500 500h0"
    assert curve(x, y, [(5, math.nan)]) == curve(x, y, []) == ""


@thoroughly
@given(st.lists(st.floats(0, 1000), max_size=40), st.floats(1, 50))
def test_spread_labels_do_not_overlap_and_keep_their_order(places, gap):
    moved = spread(places, gap, 1000)
    order = sorted(range(len(places)), key=lambda index: places[index])
    needed = min(gap, 1000 / max(1, len(places) - 1))
    assert all(-1e-9 <= place <= 1000 + 1e-9 for place in moved)
    assert all(moved[b] - moved[a] >= needed - 1e-9 for a, b in pairwise(order))
    if all(places[b] - places[a] >= needed for a, b in pairwise(order)):
        assert moved == pytest.approx(places)


# --------------------------------------------------------------------------------------------------------- the source


def test_size_of_the_page():
    assert len(render_page(report_of(3), COMPARISON).encode()) < 100_000
    assert len(render_page(report_of(400), COMPARISON).encode()) < 3_000_000


def test_bars_add_up_to_the_whole_model():
    for count in (3, 400):
        report = report_of(count)
        numbers = re.findall(r"class=\"value\">([\d.]+ ?[kMG]?) → ", render_page(report, {}))
        scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
        total = sum(float(text.split()[0]) * scale["".join(text.split()[1:])] for text in numbers)
        assert total == pytest.approx(report.dense_macs, rel=0.5e-2)  # three digits of each
        assert len(numbers) == (4 if count == 3 else 26)


# -------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine's path")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@contextmanager
def shown(browser, report, folder, comparison=COMPARISON, width=1280, scheme="light", script=True):
    """The page of ``report``; fails if it asks for anything else or complains of anything."""
    path = report.to_html(folder / "report.html", comparison)
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
    )
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()] and complaints == []
    context.close()


def evaluate(page, body, *arguments):
    return page.evaluate(f"([a, b, c]) => {{ {body} }}", [*arguments, None, None, None][:3])


OVERLAPS = """
const boxes = (plot, kind) => [...plot.querySelectorAll(kind)].map((text) => text.getBoundingClientRect())
    .filter((box) => box.width > 0);
const meet = (p, q) => p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom;
const found = [];
for (const plot of document.querySelectorAll(".plot")) {
    for (const kind of [".xtick, .ytick", ".mark", ".end, .xtick"]) {
        const all = boxes(plot, kind);
        all.forEach((p, k) => all.slice(k + 1).forEach((q) => meet(p, q) && found.push([plot.ariaLabel, kind])));
    }
}
return found;
"""

# The lines that are in the page, as wide and high as they are drawn.
DRAWN = """
return [...document.querySelectorAll(a)].map((path) => {
    const box = path.getBoundingClientRect(), plot = path.closest(".plot").getBoundingClientRect();
    const style = getComputedStyle(path);
    return {left: (box.left - plot.left) / plot.width, right: (box.right - plot.left) / plot.width,
            height: box.height, stroke: style.stroke, d: path.getAttribute("d")};
});
"""


@pytest.mark.parametrize(
    ("count", "width", "scheme"),
    [
        (1, 390, "dark"),
        (3, 1280, "dark"),
        (3, 390, "light"),
        (22, 1280, "light"),
        (22, 390, "dark"),
        (400, 1280, "dark"),
        (400, 390, "light"),
    ],
)
def test_page_has_everything_and_fits(browser, tmp_path, count, width, scheme):
    with shown(browser, report_of(count), tmp_path, width=width, scheme=scheme) as page:
        assert evaluate(page, "return document.documentElement.scrollWidth") == width
        assert evaluate(page, OVERLAPS) == []
        assert page.locator("h2").all_inner_texts() == SECTIONS
        figures = [figure.split("\n")[0] for figure in page.locator(".pair figcaption").all_inner_texts()]
        assert figures == ["Budget", "Sparsity strength", "Watched metric"]
        for look, drawn in (
            ("now", 2 + min(12, count) * (count > 1)),
            ("layer", count),
            ("strength", 1),
            ("metric", 1),
        ):
            lines = evaluate(page, DRAWN, f".plot path.{look}")
            assert len(lines) == drawn and all(line["d"] for line in lines)
            assert all(line["right"] > line["left"] and line["stroke"] != "none" for line in lines)
        assert page.locator("#layers tbody tr").count() == page.locator("#layer option").count() == count
        for text in ("excluded by `exclude_modules`", "target_macs", "99.85%", "not reached"):
            assert page.get_by_text(text).first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser, tmp_path, scheme):
    """4.5 for text and 3 for lines, as WCAG 2.2 asks for in 1.4.3 and 1.4.11."""
    body = """
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const pixel = (...colors) => {
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => node ? [...behind(node.parentElement), getComputedStyle(node).backgroundColor] : ["white"];
    return [...document.querySelectorAll(a)].filter((node) => node.getBoundingClientRect().width).map((node) => {
        const grounds = behind(node);
        if (node.matches(".mark")) grounds.push(getComputedStyle(document.querySelector(".band")).backgroundColor);
        const [p, q] = [light(pixel(...grounds, getComputedStyle(node)[b])), light(pixel(...grounds))];
        return (Math.max(p, q) + 0.05) / (Math.min(p, q) + 0.05);
    });
    """
    texts = "h1, h2, p, dt, dd, li, figcaption, th, td, a, .mark, .xtick, .ytick, .end, select, input, label, caption"
    lines = ".plot .layer, .plot .now, .plot .dense, .plot .strength, .plot .metric, .plot path.cut"
    with shown(browser, report_of(22), tmp_path, scheme=scheme) as page:
        for selector, attribute, least in ((texts, "color", 4.5), (lines, "stroke", 3.0)):
            ratios = evaluate(page, body, selector, attribute)
            assert len(ratios) > 50 and min(ratios) >= least
        dark = evaluate(page, "return getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 28)"
        assert dark == (scheme == "dark")


def test_the_cut_is_drawn_where_it_was_made(browser, tmp_path):
    report = report_of(8)
    with shown(browser, report, tmp_path) as page:
        cuts = evaluate(page, DRAWN, ".many-spectra path.cut")
        ends = evaluate(page, DRAWN, ".many-spectra path.now")
        for layer, cut, end in zip(report.layers, cuts, ends, strict=True):
            middle = (cut["left"] + cut["right"]) / 2
            assert middle == pytest.approx(layer.rank / layer.full_rank, abs=0.002)
            # The last kept singular value is half a rank to the left of the cut.
            assert end["right"] == pytest.approx((layer.rank - 0.5) / layer.full_rank, abs=0.002)
        heaviest = max(report.layers, key=lambda layer: layer.dense_macs)
        assert page.locator("#spectrum figcaption").inner_text().startswith(heaviest.name)
        assert page.locator("#spectrum .mark.cut").inner_text() == f"cut: {heaviest.rank} of {heaviest.full_rank} kept"


def test_pauses_are_tinted_where_they_were(browser, tmp_path):
    bands = """return [...document.querySelectorAll(".pair .plot .band")].map((band) => {
        const box = band.getBoundingClientRect(), plot = band.closest(".plot").getBoundingClientRect();
        return [box.left, box.right].map((x) => Math.round((x - plot.left) / plot.width * a));
    });"""
    with shown(browser, report_of(3), tmp_path) as page:
        assert evaluate(page, bands, STEPS) == [[4800, 5600], [11600, STEPS]]


def test_a_layer_is_chosen_by_list_button_link_and_line(browser, tmp_path):
    report = report_of(40)
    with shown(browser, report, tmp_path) as page:

        def assert_shown(index):
            layer = report.layers[index]
            assert page.locator("#spectrum figcaption").inner_text().startswith(f"{layer.name} {layer.rank} of")
            assert page.locator("#layer").input_value() == str(index)
            chosen = page.locator(".ranks .layer.chosen")
            assert chosen.count() == 1 and chosen.get_attribute("data-layer") == str(index)

        page.select_option("#layer", "7")
        assert_shown(7)
        page.click("#next")
        assert_shown(8)
        for _ in range(9):
            page.click("#previous")
        assert_shown(39)
        page.click("#layers tbody tr:nth-child(4) a")
        assert_shown(3)
        plot = page.locator(".ranks .plot")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        highest = max(range(40), key=lambda index: report.layers[index].rank / report.layers[index].full_rank)
        layer = report.layers[highest]
        height = 1 - layer.rank / layer.full_rank / 1.03
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * height)
        said = page.locator("#readout").inner_text()
        assert said == f"{layer.name}: rank {layer.rank} of {layer.full_rank} from step {int(0.7 * STEPS):,}"
        page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * height)
        page.mouse.move(0, 0)
        assert_shown(highest)


def test_the_table_is_searched_and_sorted(browser, tmp_path):
    report = report_of(400)
    with shown(browser, report, tmp_path) as page:
        names = page.locator("#layers tbody tr:not([hidden]) th")
        page.fill("#search", "LAYERS.7.")
        assert names.all_inner_texts() == ["encoder.layers.7.self_attn.out_proj", "encoder.layers.7.mlp"]
        assert page.locator("#found").inner_text() == "2 of 400 layers"
        page.fill("#search", "")
        assert names.count() == 400

        def column(heading):
            return [row[report.headings.index(heading)] for row in shown_rows()]

        def shown_rows():
            return [text.split("\t") for text in page.locator("#layers tbody tr").all_inner_texts()]

        ranks = sorted(layer.rank for layer in report.layers)
        head = page.locator("#layers th", has_text=re.compile("^rank"))
        for direction, expected in (("ascending", ranks), ("descending", ranks[::-1])):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == direction
            assert [int(text) for text in column("rank")] == expected
        head.locator("button").click()
        assert column("layer") == [layer.name for layer in report.layers]
        page.locator("#layers th button").first.click()
        assert column("layer")[:3] == [
            "encoder.layers.0.mlp",
            "encoder.layers.0.self_attn.out_proj",
            "encoder.layers.1.mlp",
        ]
        assert column("layer")[-1] == "encoder.layers.199.self_attn.out_proj"


def test_numbers_with_units_are_sorted_by_their_values(browser, tmp_path):
    with shown(browser, report_of(3), tmp_path) as page:
        cells = page.locator("#layers tbody td:nth-child(6)")
        for cell, text in zip(cells.all(), ("0.7 ms", "12 ms", "0.66 ms"), strict=True):
            cell.evaluate("(cell, text) => cell.textContent = text", text)
        page.locator("#layers th", has_text=re.compile("^rank")).locator("button").click()
        assert cells.all_inner_texts() == ["0.66 ms", "0.7 ms", "12 ms"]


def test_print(browser, tmp_path):
    with shown(browser, report_of(40), tmp_path, scheme="dark") as page:
        assert page.pdf(format="A4").startswith(b"%PDF-")
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins
        assert evaluate(page, "return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert evaluate(page, "return document.documentElement.scrollWidth") == 718
        assert evaluate(page, OVERLAPS) == []
        assert page.locator(".controls:visible").count() == 0
        cut_off = (
            "return [...document.querySelectorAll('.scroll')].filter((box) => box.scrollHeight > box.clientHeight)"
        )
        assert evaluate(page, f"{cut_off}.length") == 0
        assert page.locator(".plot:visible").count() == 3 + 1 + 1 + 12


def test_without_script_the_page_still_tells_everything(browser, tmp_path):
    with shown(browser, report_of(3), tmp_path, script=False) as page:
        assert page.locator(".controls:visible").count() == 0
        assert page.locator(".plot:visible").count() == 3 + 1 + 1 + 3
        assert page.locator("#layers tbody tr:visible").count() == 3


def test_structure_for_people_who_do_not_see_it(browser, tmp_path):
    with shown(browser, report_of(22), tmp_path) as page:
        assert page.locator("h1").count() == page.locator("main").count() == 1
        assert page.locator("table").count() == page.locator("table caption").count() == 4
        assert page.locator("thead th:not([scope=col]), tbody th:not([scope=row])").count() == 0
        labels = [plot.get_attribute("aria-label") for plot in page.locator(".plot").all()]
        assert len(labels) == len(set(labels)) + 1 == 3 + 1 + 1 + 12  # the heaviest layer is drawn large and small
        assert all(plot.get_attribute("role") == "img" for plot in page.locator(".plot").all())
        for control in page.locator("select, input, button").all():
            assert evaluate(page, "return 0") == 0 and (
                control.get_attribute("aria-label") or control.inner_text() or control.get_attribute("id")
            )
        for name in ("layer", "search"):
            assert page.locator(f"label[for={name}]").inner_text()
        page.keyboard.press("Tab")
        assert evaluate(page, "return document.activeElement !== document.body")


HOSTILE = (
    "<script>hacked = 1</script>",
    '"><img src=x onerror="hacked = 1">',
    "</script><script>hacked = 1</script>",
    "</template></select><b onclick='hacked = 1'>b</b>",
    "{{ 7 * 7 }}{% raw %}",
    "';hacked=1;'",
    "&lt;i&gt; \u2028 ü",
)


def test_names_are_never_code(browser, tmp_path):
    layers = [layer_report(k, name, kind=f"<i>{name}</i>") for k, name in enumerate(HOSTILE)]
    plain = svd_report([layer_report(k) for k in range(len(HOSTILE))], skipped=[("a", "b", "c")] * len(HOSTILE))
    report = svd_report(
        layers,
        skipped=tuple((name, name, name) for name in HOSTILE),
        warnings=HOSTILE,
        metric=HOSTILE[1],
        arguments={name: name for name in HOSTILE},
    )
    count = (
        "return [...document.querySelectorAll('*')].map((node) => node.tagName).filter((tag) => tag !== 'WBR').sort()"
    )
    with shown(browser, plain, tmp_path) as page:
        expected = evaluate(page, "return document.scripts.length"), page.locator("main table").count()
    with shown(browser, report, tmp_path, {name: (name, name) for name in HOSTILE}) as page:
        for index in range(len(HOSTILE)):
            page.select_option("#layer", str(index))
            assert page.locator("#spectrum figcaption").inner_text().startswith(" ".join(HOSTILE[index].split())[:10])
        plot = page.locator(".ranks .plot")
        plot.scroll_into_view_if_needed()
        plot.hover()
        assert evaluate(page, "return typeof hacked") == "undefined"
        assert (evaluate(page, "return document.scripts.length"), page.locator("main table").count()) == expected
        tags = set(evaluate(page, count))
        assert not tags & {"IMG", "B"} and page.locator("i:not([class]):not([style])").count() == 0
        shown_names = page.locator("#layers tbody th").evaluate_all("heads => heads.map((head) => head.textContent)")
        assert shown_names == list(HOSTILE)


NAN = math.nan
FLAT = layer_report(0, "flat", full_rank=64, rank=10, spectrum_before=(0.0,) * 64, spectrum_after=(0.0,) * 10)
BROKEN = layer_report(1, "broken", full_rank=4, rank=2, spectrum_before=(NAN,) * 4, spectrum_after=(NAN, math.inf))
SINGLE = layer_report(2, "single", full_rank=1, rank=1)
UNUSED = layer_report(3, "", dense_macs=0, macs=0)
NOTHING = {"timeline": (), "strengths": (), "metric": None, "metric_values": (), "pauses": ()}
STRANGE = {
    "nothing at all": SVDReport((), (), 0, 0, 0, 0),
    "no layers": svd_report([]),
    "strange layers": svd_report([FLAT, BROKEN, SINGLE, UNUSED]),
    "nothing recorded": svd_report([FLAT], **NOTHING, skipped=(), warnings=(), arguments={}),
    "no MACs": svd_report([dataclasses.replace(UNUSED, name="a")], dense_macs=0, macs=0),
    "not finite": svd_report([FLAT], strengths=((0, NAN), (5, NAN)), metric_values=((3, NAN), (9, math.inf))),
    "one value": svd_report([FLAT], strengths=((3, 0.1),), metric_values=((3, -0.5),), pauses=()),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_reports_are_drawn_too(browser, tmp_path, name):
    with shown(browser, STRANGE[name], tmp_path, comparison=None, width=390) as page:
        assert evaluate(page, "return document.documentElement.scrollWidth") == 390
        assert not re.search(r"\b(nan|inf|None|undefined)\b", page.locator("body").inner_text(), re.IGNORECASE)
        assert evaluate(page, "return document.body.innerHTML.includes('NaN')") is False
        assert evaluate(page, OVERLAPS) == []

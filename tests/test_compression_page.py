"""The page of a compression: importance against cost, and quality against budget."""

import dataclasses
import json
import math
import re

import pytest
from reports import layer_report, svd_report
from test_page import HOSTILE, NOTHING, OVERLAPS, browser, evaluate  # noqa: F401

from lightning_svd.compression.page import render_compression, weighed
from lightning_svd.compression.report import CompressionReport
from lightning_svd.report.charts import SIZE, decades, spot

MEASURE = "relative squared error"
CURVE = {0.9: 1e-4, 0.5: 0.012, 0.2: 0.9}


def compression(count=5, names=None, **changes):
    layers = [layer_report(k, *([names[k]] if names else [])) for k in range(count)]
    ranks = svd_report(layers, **{**NOTHING, "arguments": {}})
    carried = {a.name: [2.0 ** -(k + i) for k in range(a.full_rank)] for i, a in enumerate(layers)}
    report = CompressionReport(
        ranks=ranks,
        target="macs",
        share=0.5,
        choice="fisher",
        tried={"fisher": 0.013},
        distance=0.0123,
        measure=MEASURE,
        shifts={a.name: 0.01 * k for k, a in enumerate(layers)},
        carried=carried,
        curve=CURVE,
        bias_corrected=True,
        batch_norm_recalibrated=False,
        reconstructed=False,
        inputs=192,
        seconds=3.5,
    )
    return dataclasses.replace(report, **changes)


def tables(page):
    found = re.findall(r"<caption>(.*?)</caption>.*?<tbody>(.*?)</tbody>", page, re.DOTALL)
    rows = {name: re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL) for name, body in found}
    strip = lambda cell: re.sub(r"<[^>]+>", "", cell)  # noqa: E731
    return {
        name: [[strip(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in body]
        for name, body in rows.items()
    }


def test_logarithms_are_between_powers_of_ten():
    axis = decades("x", [0.0, 0.02, 3.0, math.inf], "{:g}".format)
    assert (axis.low, axis.high) == (-2, 1)
    assert [text for _, text in axis.ticks()] == ["0.01", "0.1", "1", "10"]
    assert (decades("x", [], str).low, decades("x", [0.0], str).high) == (0, 1)
    assert decades("x", [1.0], str).high == 1 and decades("x", [0.001, 0.01], str).low == -3
    assert spot(axis, axis, -2, 1) == "M0 0h0" and spot(axis, axis, 1, -2) == f"M{SIZE} {SIZE}h0"


def test_the_numbers_are_those_of_the_report(tmp_path):
    report = compression()
    page = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    for text in ("Importance against cost", "Quality against budget", "192 inputs", "decided by fisher", "0.0123"):
        assert text in page
    found = tables(page)
    (sensitivity,) = (rows for name, rows in found.items() if name.startswith("Sensitivity"))
    layers = weighed(report)
    assert [row[0] for row in sensitivity] == [a.layer.name for a in layers]
    assert sum(a.cost for a in layers) == pytest.approx(1) == pytest.approx(sum(a.importance for a in layers))
    for row, a in zip(sensitivity, layers, strict=True):
        carried = report.carried[a.layer.name]
        assert a.importance == pytest.approx(sum(carried) / sum(map(sum, report.carried.values())))
        if a.layer.form == "dense":
            assert a.importance_now == a.importance and row[1] == "dense"
        else:
            assert a.importance_now / a.importance == pytest.approx(sum(carried[: a.layer.rank]) / sum(carried))
        assert float(row[2].rstrip("%")) == pytest.approx(100 * a.cost, rel=1e-2)
        assert float(row[3].rstrip("%")) == pytest.approx(100 * a.importance, rel=1e-2)
    assert found["Held-out outputs at other budgets"] == [["90%", "0.0001"], ["50%", "0.012"], ["20%", "0.9"]]
    assert "No rank was changed" not in page


def test_without_a_curve_there_is_none():
    page = render_compression(compression(curve={}))
    assert "Importance against cost" in page and "Quality against budget" not in page


def test_a_large_distance_is_a_warning_on_the_page():
    assert "outputs moved far" in render_compression(compression(distance=0.5))
    assert "outputs moved far" not in render_compression(compression())


def test_the_curve_is_a_table_in_the_terminal():
    table = str(compression()).partition("share of the MACs")[2]
    assert "0.012" in table and table.index("90%") < table.index("20%")
    assert "share of the" not in str(compression(curve={}))


def test_json_has_null_for_what_is_not_finite(tmp_path):
    report = compression(distance=math.nan, curve={0.5: math.inf})
    data = json.loads(report.to_json(tmp_path / "a.json"), parse_constant=pytest.fail)
    assert data["distance"] is None and data["curve"] == {"0.5": None}
    assert json.loads((tmp_path / "a.json").read_text()) == data


STRANGE = {
    "no layers": compression(0),
    "one layer": compression(1),
    "many layers": compression(300),
    "nothing carried": compression(carried={f"{a.name}": [0.0] * a.full_rank for a in compression().ranks.layers}),
    "not finite": compression(distance=math.nan, curve={0.5: math.inf, 0.2: math.nan}),
    "nothing moved": compression(distance=0.0, curve=dict.fromkeys(CURVE, 0.0)),
    "the loss fell": compression(measure="increase of the loss", distance=-0.1, curve={0.9: -0.2, 0.2: 0.7}),
    "of parameters": compression(target="params"),
    "hostile": compression(len(HOSTILE), HOSTILE, choice=HOSTILE[0], measure=HOSTILE[1]),
}


@pytest.mark.parametrize("name", STRANGE)
def test_any_report_is_drawn_and_fits(browser, tmp_path, name):  # noqa: F811
    path = STRANGE[name].to_html(tmp_path / "page.html")
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))  # noqa: B023
        page.on("pageerror", lambda error: complaints.append(str(error)))  # noqa: B023
        page.goto(path.as_uri())
        assert complaints == [] and evaluate(page, "return document.documentElement.scrollWidth") == width
        assert evaluate(page, OVERLAPS) == []
        assert page.locator("table").count() == page.locator("table caption").count()
        assert evaluate(page, "return typeof hacked") == "undefined"
        assert (
            evaluate(
                page,
                "return [...document.querySelectorAll('.plot path')].some((p) => /NaN/.test(p.attributes.d.value))",
            )
            is False
        )
        layers = len(STRANGE[name].ranks.layers)
        assert page.locator(".plot path.kept").count() == layers
        assert page.locator(".plot path.made").count() == (name not in ("not finite",))
        context.close()

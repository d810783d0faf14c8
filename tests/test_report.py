"""The report as data, text, Markdown and JSON."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reports import layer_report, report_of, svd_report
from torch import nn

from lightning_svd import RankChange, SVDReport, decompose, plan, summarize, svd_layers
from lightning_svd.report.data import LAYER_HEADINGS, Pause, plan_table, quantity
from lightning_svd.report.tables import ROWS_ON_SCREEN, folded, markdown_code, markdown_table, markdown_text

LONG = "encoder.layers.11.self_attn.a_projection_with_a_long_name"
NASTY = ["a|b", "<b>bold</b>", "[red]x[/]", "*x*_y_", "`tick`", "``", "a\\|b", "&amp;", "two\nlines", "ü 層"]
thoroughly = settings(max_examples=100, deadline=None, derandomize=True)


# --------------------------------------------------------------------------------------------------------------- JSON

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.integers(0, 10**15)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(st.none() | st.booleans() | numbers | texts, st.lists, max_leaves=4)


@thoroughly
@given(
    names=st.lists(texts, max_size=3),
    spectrum=st.lists(numbers, max_size=5).map(tuple),
    strengths=st.lists(st.tuples(counts, numbers), max_size=3).map(tuple),
    arguments=st.dictionaries(texts, plain, max_size=3),
    warnings=st.lists(texts, max_size=2).map(tuple),
    size=counts,
)
def test_json_gives_the_same_report_back(names, spectrum, strengths, arguments, warnings, size):
    layers = [layer_report(k, name, spectrum_before=spectrum, spectrum_after=()) for k, name in enumerate(names)]
    report = svd_report(layers, strengths=strengths, arguments=arguments, warnings=warnings, dense_macs=size)
    assert SVDReport.from_json(report.to_json()) == report


def test_json_file_of_a_real_model_is_read_back_and_drawn(tmp_path):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    decompose(model)
    for layer in svd_layers(model).values():
        layer.keep(layer.full_rank // 2)
    report = summarize(model, torch.zeros(2, 12))
    text = report.to_json(tmp_path / "report.json")
    for source in (tmp_path / "report.json", str(tmp_path / "report.json"), text):
        read = SVDReport.from_json(source)
        assert read == report and hash(read.layers) == hash(report.layers)
    assert read.to_markdown() == report.to_markdown()
    assert read.to_html(tmp_path / "a.html").read_bytes() == report.to_html(tmp_path / "b.html").read_bytes()


def test_json_has_null_for_what_is_not_finite():
    layer = layer_report(0, full_rank=3, rank=2, spectrum_before=(math.inf, 1.0, math.nan), spectrum_after=(2.0, 1.0))
    text = svd_report([layer]).to_json()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)
    infinite, one, nan = SVDReport.from_json(text).layers[0].spectrum_before
    assert math.isnan(infinite) and one == 1.0 and math.isnan(nan)


def test_json_of_an_argument_that_json_does_not_know_is_its_text():
    report = svd_report([], arguments={"pattern": re.compile("x")})
    assert SVDReport.from_json(report.to_json()).arguments == {"pattern": "re.compile('x')"}


def test_a_report_without_the_optional_fields_is_read():
    report = svd_report([layer_report(0)])
    data = json.loads(report.to_json())
    required = {"layers", "skipped", "dense_macs", "macs", "dense_params", "params", "timeline"}
    data = {name: value for name, value in data.items() if name in required}
    read = SVDReport.from_json(json.dumps(data))
    assert read.layers == report.layers and read.arguments == {} and read.pauses == ()


@pytest.mark.parametrize("text", ["{", "{}", '{"layers": 3}', '{"layers": [], "timeline": [], "color": 1}'])
def test_what_is_no_report_is_refused(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    for source in (text, tmp_path / "report.json"):
        with pytest.raises(ValueError, match="`source` must be a report that `to_json` wrote"):
            SVDReport.from_json(source)


# ----------------------------------------------------------------------------------------------------------- Markdown


def tables(markdown):
    """The tables that a Markdown reader finds: lists of rows of the cells' texts."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level > 2 and found:
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


@pytest.mark.parametrize("count", [1, 3, 400])
def test_markdown_tables_have_every_cell(count, tmp_path):
    report = report_of(count)
    text = report.to_markdown(tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    layers, skipped, arguments = tables(text)
    assert layers == [list(LAYER_HEADINGS), *map(list, report.rows())]
    assert skipped[1:] == [
        ["embedding", "Embedding", "unsupported type"],
        ["head", "Linear", "excluded by exclude_modules"],
    ]
    assert arguments[1:] == [[name, json.dumps(value)] for name, value in report.arguments.items()]
    assert "**Warning:** the target" in text


def test_markdown_of_nasty_names_is_still_a_table_and_has_no_html():
    layers = [layer_report(k, name, kind="<i>x</i>|y") for k, name in enumerate(NASTY)]
    report = svd_report(layers, skipped=(("", "<u>", "it | is *so*"),), warnings=("<script>\n\n# not a heading",))
    tokens = MarkdownIt("commonmark").enable("table").parse(report.to_markdown())
    kinds = {child.type for token in tokens for child in (token, *(token.children or ()))}
    assert not kinds & {"html_block", "html_inline", "heading_open", "link_open", "em_open"}
    first, skipped, _ = tables(report.to_markdown())
    assert [row[0] for row in first[1:]] == [" ".join(name.split()) for name in NASTY]
    assert {row[1] for row in first[1:]} == {"<i>x</i>|y, channel"}
    assert skipped[1:] == [["(model)", "<u>", "it | is *so*"]]


@thoroughly
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=30))
def test_any_name_is_read_back_from_a_cell(text):
    text = " ".join(text.split()) or "x"
    assert tables(markdown_table(("layer",), [(markdown_code(text),)], {"layer"})) == [[["layer"], [text]]]


@thoroughly
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="`"), max_size=30))
def test_any_sentence_is_read_back_from_a_cell(text):
    text = " ".join(text.split()) or "x"
    assert tables(markdown_table(("layer",), [(markdown_text(text),)], {"layer"})) == [[["layer"], [text]]]


# ----------------------------------------------------------------------------------------------------------- Terminal


@pytest.mark.parametrize("columns", [80, 118])
@pytest.mark.parametrize("count", [3, 400])
def test_text_fits_the_terminal_and_keeps_every_number_whole(columns, count, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    layers = [layer_report(k, LONG if k == 1 else None, dense_seconds=1.0, seconds=0.5) for k in range(count)]
    layers[2] = dataclasses.replace(layers[2], matrix_shape=(50257, 12288))
    text = str(svd_report(layers))
    table = text.partition("Low-rank model:")[0].splitlines()
    assert max(map(len, table)) <= columns
    assert all(len(line) <= 80 for line in text.splitlines()) or columns > 80
    for layer in layers[:ROWS_ON_SCREEN]:
        numbers = rf"{layer.matrix_shape[0]} x {layer.matrix_shape[1]} .*\b{layer.rank} .*{layer.form} +50%"
        assert any(re.search(numbers, line) for line in table)
    assert ("... and 340 more layers" in text) == (count == 400)
    assert text.splitlines()[-1] == "warning: the target, 0.35 of the macs, was not reached"
    assert LONG in "".join(line.split()[0] for line in table if line.strip())


@thoroughly
@given(st.text("ab.", max_size=60), st.integers(1, 40))
def test_names_are_folded_at_their_dots(name, width):
    lines = folded(name, width)
    assert "".join(lines) == name and max(map(len, lines)) <= width
    for line, following in itertools.pairwise(lines):
        assert line.endswith(".") or "." not in line
        assert len(line) + len("".join(following.partition(".")[:2])) > width  # no line is shorter than it must be


def test_names_in_the_table_go_on_after_a_dot(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"model.encoder.layer.{k}.attention.self.projection.query" for k in range(3)]
    table = str(svd_report([layer_report(k, name) for k, name in enumerate(names)])).partition("Low-rank model:")[0]
    parts = re.findall(r"^ *(\w+\.\S*|query)", table, re.MULTILINE)
    assert "".join(parts) == "".join(names) and {part[-1] for part in parts} == {".", "y"}


@pytest.mark.parametrize("columns", [80, 118])
def test_plan_fits_the_terminal_with_every_reason(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    layers = {f"block{k}": nn.Linear(102, 100) for k in range(400)}
    model = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3, groups=8), LONG.replace(".", "_"): nn.EmbeddingBag(5, 4), **layers})
    text = plan_table(plan(model, exclude_modules=["block2"]))
    assert max(map(len, text.splitlines())) <= columns
    assert "100 x 102" in text and "and 342 more layers" in text
    assert text.endswith("SVD training: 399 of 402 layers with a weight matrix are factorized")
    for word in ("too thin", "unsupported", "exclude_modules"):
        assert word in text


def test_a_rank_change_fits_a_line_of_80_columns():
    change = svd_report([layer_report(k) for k in range(100)]).timeline[-1]
    line = f"SVD training: {dataclasses.replace(change, step=123456, epoch=100)}"
    assert len(line) <= 80 and "12,000" not in line and f"{change.macs_ratio:.1%}" in line


def test_names_that_look_like_markup_of_the_terminal_are_shown_as_they_are():
    text = str(svd_report([layer_report(0, "[red]x[/]")]))
    assert "[red]x[/]" in text


def test_text_has_no_codes_of_a_terminal_where_the_environment_asks_for_them(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks do
    assert "\x1b" not in str(report_of(2))


def test_macs_that_are_not_known_are_not_called_none():
    report = summarize(nn.Sequential(nn.Linear(4, 4)))
    assert "MACs" not in str(report) and "100.0% of the parameters" in str(report)
    model = nn.Linear(4, 4)
    decompose(model)
    name, *_, macs, params, form = summarize(model).rows()[0]
    assert (name, macs, params, form) == ("(model)", "-", "100%", "dense")
    assert math.isnan(report.macs_ratio) and json.loads(report.to_json())["macs_ratio"] is None


def test_a_change_whose_macs_are_not_known_is_read_back_and_shown():
    pause = Pause(8, 16, math.nan, math.nan)
    report = svd_report([], metric_values=((8, math.nan), (16, 1.0)), strengths=((0, math.inf),), pauses=(pause,))
    read = SVDReport.from_json(report.to_json())
    assert math.isnan(read.metric_values[0][1]) and read.metric_values[1] == (16, 1.0)
    assert math.isnan(read.strengths[0][1]) and math.isnan(read.pauses[0].value) and read.pauses[0].end == 16
    assert str(read.pauses[0]) == "paused from step 8 to step 16: nan with no number before"
    change = RankChange(8, 1, {"a": 2}, math.nan, 0.5)
    (read,) = SVDReport.from_json(svd_report([], timeline=(change,)).to_json()).timeline
    assert math.isnan(read.macs_ratio) and str(read) == "step 8 (epoch 1): 2 ranks, parameters 50.0%"


def test_time_is_a_column_only_where_it_was_measured():
    timed = svd_report([layer_report(0, dense_seconds=2e-3, seconds=1e-3), layer_report(1)])
    assert timed.headings == (*LAYER_HEADINGS, "time") and [row[-1] for row in timed.rows()] == ["50%", "-"]
    assert report_of(2).headings == LAYER_HEADINGS


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (12100, "12.1 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (28_000_000, "28.0 M"),
        (1.5e9, "1.50 G"),
        (3e12, "3.00 T"),
    ],
)
def test_quantities(count, text):
    assert quantity(count) == text


@thoroughly
@given(st.integers(0, 999 * 10**12))
def test_a_quantity_has_three_digits_and_is_as_near_as_they_can_be(count):
    number, prefix = re.fullmatch(r"([\d.]+) ?([kMGT]?)", quantity(count)).groups()
    assert len(number.replace(".", "")) == 3 or count < 100
    scale = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[prefix]
    assert abs(float(number) * scale - count) <= 0.5e-2 * count * (1 + 1e-12)

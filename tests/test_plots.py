"""What pages draw: heat maps, curves, tables, the picture of a method; with numbers and places worked out by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import EVIL, Page, make_run, result

from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import MaskingConfig, Mixture
from nano4m_cli.report import _plots
from nano4m_cli.report._frame import SHAPES, Frame, mark_path
from nano4m_cli.report._method import blocks, method
from nano4m_cli.report._page import asset
from nano4m_cli.report._plots import drawn, look, scale, short
from nano4m_cli.report._read import Inputs, Plot
from nano4m_cli.report.build import build
from nano4m_cli.spec import Layout, TokenSpec


def plot(values, kind="matrix", rows=None, columns=None, **more):
    rows = rows or [f"r{i}" for i in range(len(values))]
    columns = columns or ([f"c{i}" for i in range(len(values[0]))] if kind != "curve" else list(range(len(values[0]))))
    return Plot(name="p", title=more.pop("title", "A plot"), kind=kind, rows=rows, columns=columns, values=values, **more)


def cells(svg):
    """Return (class, number in the cell) of every cell, in order, the legend left out."""
    groups = re.findall(r'<g class="(\w+)(?: small)?"><rect[^>]*/><title>[^<]*</title>(?:<text[^>]*>([^<]*)</text>)?</g>', svg)
    return [(css, text) for css, text in groups]


# -- colours ----------------------------------------------------------------------------------------------------------


def variables():
    """Return the colours of style.css in light and in dark."""
    text = asset("style.css")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", part)) for part in re.findall(r":root \{(.*?)\}", text, re.S)[:2])
    return {"light": light, "dark": {**light, **dark}}


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_standard_says():
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_and_lines_can_be_read_in_both_schemes(name):
    c = variables()[name]
    for text in ("ink", "soft", "blue", "orange"):
        assert contrast(c[text], c["paper"]) >= 4.5, text
    for text, ground in (("ink", "wash"), ("orange", "wash"), ("ink", "raised")):
        assert contrast(c[text], c[ground]) >= 4.5, (text, ground)
    for line in (*(f"c{i}" for i in range(6)), "train", "blue", "orange", "grey", "soft"):
        assert contrast(c[line], c["paper"]) >= 3, line


@pytest.mark.parametrize("name", ["light", "dark"])
def test_numbers_can_be_read_on_every_colour_of_a_scale(name):
    c = variables()[name]
    turn = 6 if name == "light" else 5  # from this step on the text takes the other colour (style.css)
    for step in range(_plots.STEPS):
        for ramp in ("q", "n") if step else ("q",):
            assert contrast(c["off" if step >= turn else "on"], c[f"{ramp}{step}"]) >= 4.5, (ramp, step)
    bright = [luminance(c[f"q{i}"]) for i in range(_plots.STEPS)]
    assert bright == sorted(bright, reverse=name == "light"), "more is further from the paper"


# -- heat maps --------------------------------------------------------------------------------------------------------


def test_scale_and_steps():
    assert scale([0.1, 0.7]) == (0, 1, False) and scale([0.1, 0.3]) == (0, 1, False) and scale([0.1, 0.2]) == (0, 0.2, False)
    assert scale([3.0, 9.0]) == (0, 9.0, False)
    assert scale([-1.0, 2.0]) == (-2.0, 2.0, True) and scale([-3.0, -1.0]) == (-3.0, -1.0, False) and scale([0.0]) == (0, 1, False)
    assert [look(v, 0, 1, False) for v in (0, 0.12, 0.5, 1, 2, -1)] == ["q0", "q1", "q4", "q8", "q8", "q0"]
    assert [look(v, -1, 1, True) for v in (-1, -0.5, 0, 0.01, 0.5, 1)] == ["n8", "n4", "q0", "q0", "p4", "p8"]
    assert [short(v, True, False) for v in (0, 0.001, 0.5, 0.999, 1)] == ["0", ".00", ".50", "1.0", "1"]
    assert [short(v, False, False) for v in (-0.5, 3.14159, 27.43, 412.3)] == ["-0.50", "3.14", "27.4", "412"]
    assert short(12.0, False, True) == "12" and short(25000.0, False, True) == "2.5e4"


def test_a_heat_map_has_its_numbers_and_what_is_not_measured():
    out = drawn(plot([[0.9, 0.1, None], [0.25, 0.75, 0.0]], x="answer", y="truth"))
    assert cells(out.svg) == [("q8", ".90"), ("q0", ".10"), ("void", "&#183;"), ("q2", ".25"), ("q6", ".75"), ("q0", "0")]
    assert "r0 / c2: not measured" in out.svg and ">answer</text>" in out.svg and ">truth</text>" in out.svg
    assert out.table.rows == [("r0", ["0.900", "0.100", "-"]), ("r1", ["0.250", "0.750", "0"])]
    assert out.table.corner == "truth / answer"
    assert "2 rows, 3 columns, 0 to 0.900, highest at r0 / c0" in out.svg and not out.wide
    assert out.words == ["A dot: not measured."]


def test_confusions_are_told_in_words():
    names = ["red", "green", "blue"]
    out = drawn(plot([[0.8, 0.2, 0.0], [0.5, 0.5, 0.0], [0.0, 0.1, 0.9]], rows=names, columns=names))
    assert out.words == ["Largest off the diagonal: green as red (0.500), red as green (0.200), blue as green (0.100)."]
    counts = drawn(plot([[8, 2, 0], [0, 0, 0], [0, 7, 3]], rows=names, columns=names))
    assert counts.words == ["Largest off the diagonal: blue as green (7), red as green (2)."]
    assert drawn(plot([[0.8, 0.9, 0.0], [0.5, 0.5, 0.0], [0.0, 0.1, 0.9]], rows=names, columns=names)).words == [], "no shares"


def test_fifty_classes_are_drawn_and_more_are_told():
    names = [f"class {i}" for i in range(50)]
    out = drawn(plot((np.eye(50) * 0.91).tolist(), rows=names, columns=names))
    assert len(cells(out.svg)) == 2500 and out.wide and not any(text for _, text in cells(out.svg)), "no room for numbers"
    assert len(out.table.rows) == 50
    many = [f"class {i}" for i in range(400)]
    values = np.eye(400)
    values[3, [3, 5]] = 0.9, 0.1
    out = drawn(plot(values.tolist(), rows=many, columns=many))
    assert out.svg is None and out.table is None
    text = " ".join(out.words)
    assert "too large to draw" in text and "class 3 as class 5 (0.100)" in text and "400 x 400 numbers is left out" in text


@pytest.mark.parametrize("more, told", [
    ({"values": [[1.0]], "rows": ["a", "b"]}, "do not fit"), ({"values": [], "rows": [], "columns": []}, "empty"),
    ({"values": [[None, None]]}, "Nothing was measured"),
    ({"values": [[1.0, 2.0]], "kind": "curve", "columns": ["a", "b"]}, "not numbers"),
])
def test_what_cannot_be_drawn_is_told(more, told):
    given = {"name": "p", "title": "t", "kind": "matrix", "rows": ["r"], "columns": ["c0", "c1"], **more}
    out = drawn(Plot.model_validate(given))
    assert out.svg is None and told in " ".join(out.words)


# -- curves and tables ------------------------------------------------------------------------------------------------


def test_a_curve_has_lines_marks_bands_and_a_diagonal():
    at = [0.1, 0.5, 0.9]
    out = drawn(plot([[0.1, 0.5, 0.9], [0.2, None, 0.8]], "curve", columns=at, low=[[0, 0.4, 0.8], [0.1, None, 0.7]],
                     high=[[0.2, 0.6, 1.0], [0.3, None, 0.9]], diagonal=True, x="predicted", y="right"))
    frame = Frame(at, at, "", "", size=(360, 240), bounds=(-0.02, 1.02))
    line = " ".join(f"{frame.x(v):.1f},{frame.y(v):.1f}" for v in at)
    assert f'<polyline class="through c0 d0" points="{line}"/>' in out.svg
    x1, x2, y1, y2 = frame.x(0), frame.x(1), frame.y(0), frame.y(1)
    assert f'<line class="diagonal" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>' in out.svg
    assert out.svg.count('class="mark c0') == 3 and out.svg.count('class="mark c1') == 2
    assert out.svg.count('class="band c0') == 1 and out.svg.count('class="band c1') == 2, "a gap cuts line and band"
    assert [k.name for k in out.legend] == ["r0", "r1"] and "Bands: 95 % intervals." in out.words
    assert out.table.rows[0][1][1] == "0.500 (0.400 to 0.600)" and out.table.rows[1][1][1] == "-"


def test_a_wide_range_of_columns_is_drawn_on_a_log_scale():
    out = drawn(plot([[0.1, 0.2, 0.3]], "curve", columns=[1, 10, 100], x="examples"))
    places = [float(x) for x in re.findall(r"<polyline[^>]*points=\"([\d.]+),[\d.]+ ([\d.]+),[\d.]+ ([\d.]+),", out.svg)[0]]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2) and "examples (log scale)" in out.svg
    assert "log scale" not in drawn(plot([[0.1, 0.2]], "curve", columns=[0, 100], x="examples")).svg


def test_lines_are_told_apart_by_more_than_colour():
    out = drawn(plot(np.random.default_rng(0).random((20, 3)).tolist(), "curve"))
    looks = re.findall(r'<svg class="key-line"[^>]*><line class="through (c\d d\d)"[^>]*/><path class="mark c\d d\d" d="([^"]*)"',
                       "".join(str(k.svg) for k in out.legend))
    assert len(looks) == len(set(looks)) == _plots.LINES and "The first 18 of 20 lines are drawn." in out.words
    assert len({mark_path(s, 0, 0, 3) for s in SHAPES}) == len(SHAPES)


def test_a_table_is_laid_out_as_it_is():
    out = drawn(plot([["9.14 nats", 3.21], [None, 1.0]], "table", columns=["published", "ours"]))
    assert out.svg is None and not out.table.numeric and out.table.rows == [("r0", ["9.14 nats", "3.210"]), ("r1", ["-", "1.000"])]


def test_plots_of_a_result_are_on_the_page_and_inert(tmp_path):
    run = make_run(tmp_path)
    names = [f"a{EVIL}", "b", 'c" onload="x']
    plots = [
        {"name": "m", "title": EVIL, "kind": "matrix", "rows": names, "columns": names, "values": np.eye(3).tolist(), "x": EVIL,
         "y": EVIL},
        {"name": "c", "title": "curve", "kind": "curve", "rows": names, "columns": [1, 2], "values": [[1, 2], [2, 3], [3, 4]],
         "y": EVIL},
        {"name": "t", "title": "table", "kind": "table", "rows": ["r"], "columns": [EVIL], "values": [[EVIL]]},
    ]
    (run / "eval" / "more.json").write_text(json.dumps(result("more", "More", [], plots=plots)))
    page = Page(build(run).read_text())
    assert len(page.all("script")) == 1 and not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    figures = [(a.get("class") or "").split() for a in page.all("figure")]
    assert sum("plot" in css for css in figures) == 1 + 3, "its three, and the map of directions"
    assert "This probe has no figures" not in page.text


# -- the method -------------------------------------------------------------------------------------------------------


def inputs(specs, **config):
    run = Inputs(Path("runs/x"))
    run.config = {"task": "fourm", "seed": 5, "model": {"size": "d4-2w64"}, **config}
    run.state = {"specs": [s.model_dump(mode="json") for s in specs]}
    return run


def squares(svg, css):
    return sum(d.count("M") for d in re.findall(rf'<path class="slot {css}" d="([^"]*)"', svg))


def test_the_picture_shows_a_mask_of_this_run(specs):
    masking = {"components": [{"type": "dirichlet", "alpha": 1.0, "input": [4, 12], "target": [4, 12]}]}
    found = method(inputs(specs, masking=masking))
    layout = Layout(specs)
    length = np.array([[s.slots for s in specs]])
    shown, asked = Mixture(MaskingConfig(**masking), layout).draw(length, Key(5, "mask", np.arange(1)))
    assert shown.sum() > 0 and asked.sum() > 0
    for svg in (found.wide, found.tall):
        assert squares(svg, "shown") == shown.sum() and squares(svg, "asked") == asked.sum()
        assert "pic by identity into 3 \N{MULTIPLICATION SIGN} 4 tokens of 12 ids" in svg
        assert "encoder with 4 layers, width 64, decoder with 2 layers, width 64" in svg
    assert method(inputs(specs, masking=masking)).wide == found.wide, "the same each time"
    assert [name for name, _, _ in found.shares] == layout.names and all(0 < a < 1 and 0 < b < 1 for _, a, b in found.shares)


@pytest.mark.parametrize("task, name", [("gpt", "Decoder"), ("maskgit", "Encoder")])
def test_siblings_have_one_part(specs, task, name):
    run = inputs([TokenSpec(modality="pic", kind="grid", shape=(3, 4), vocab_size=12)], task=task, model={"size": "d8w512"})
    assert [n for n, _ in blocks(run)] == [name] and "8 layers, width 512" in blocks(run)[0][1]
    assert method(run).wide.count('class="block"') == 1 and squares(method(run).wide, "asked") > 0


def test_what_cannot_be_drawn_of_a_method_is_told(specs):
    assert method(inputs([])).wide is None
    broken = inputs(specs)
    broken.state["specs"][0]["kind"] = "cube"
    assert method(broken).wide is None and "cannot be read" in method(broken).notes[0]
    odd = method(inputs(specs, masking={"components": [{"type": "nothing"}]}, model={"size": "huge"}))
    assert odd.wide is not None and "masking cannot be drawn" in odd.notes[0] and squares(odd.wide, "shown") == 0
    big = [TokenSpec(modality=f"m{i}", kind="grid", shape=(80, 80), vocab_size=12) for i in range(26)]
    found = method(inputs(big))
    assert "first 24 of 26 modalities" in found.notes[0] and len(found.wide) < 60_000, "too many slots are not drawn one by one"

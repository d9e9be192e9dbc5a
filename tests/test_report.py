"""The report page: complete, inert, self-contained, and honest about what is missing. All input here is made up."""

from __future__ import annotations

import json
import math
import shutil
import wave
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nano4m_cli.errors import DataError
from nano4m_cli.report import _numbers as numbers
from nano4m_cli.report._curves import Line, tick, ticks, y_range
from nano4m_cli.report._figures import bar, baseline, cards, scales, verdict
from nano4m_cli.report._read import Inputs, Metric, Result
from nano4m_cli.report.build import build

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}
MODALITIES = ["rgb", "depth", "normal", "caption", "audio"]
VOCAB = {"rgb": 4375, "depth": 1000, "normal": 1000, "caption": 512, "audio": 1024}


# -- a made-up run ------------------------------------------------------------------------------------------------

def png(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> None:
    """A sphere of some colour on a floor; as small as such pictures are."""
    rng = np.random.default_rng(seed)
    w, h = size
    y, x = np.mgrid[0:h, 0:w] / max(w, h)
    picture = np.full((h, w, 3), 0.75) * (1 - 0.4 * y[..., None])
    cx, cy, r = rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.28)
    d = np.hypot(x - cx, y - cy) / r
    picture[d < 1] = rng.uniform(0.1, 0.9, 3) * (1.1 - 0.6 * d[d < 1][:, None])
    Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(path)


def wav(path: Path, hz: float, seconds: float = 0.3) -> None:
    t = np.arange(int(8000 * seconds)) / 8000
    data = (np.sin(2 * np.pi * hz * t) * np.exp(-6 * t) * 20000).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(data)


def metric(name: str, value, **more) -> dict:
    n = more.get("n", 400)
    half = more.pop("half", 0.02)
    ends = None if not isinstance(value, float) or not math.isfinite(value) else [value - half, value + half]
    return {"name": name, "value": value, "n": n, "ci95": ends, "chance": None, "majority": None, "ceiling": None,
            "reference": None, "higher_is_better": True, "unit": "", "in_distribution": True, **more}


def result(probe: str, title: str, metrics: list[dict], **more) -> dict:
    return {"probe": probe, "version": 1, "title": title, "split": "test", "seed": 0, "run": "demo", "data": "scenes",
            "checkpoint": "step-00003000", "commit": "76e650e", "metrics": metrics, "in_distribution": {}, "notes": [],
            "seconds": 12.3, **more}


def results() -> list[dict]:
    rng = np.random.default_rng(0)
    cross = []
    known = {"caption": (0.95, 0.93, 0.9), "audio": (0.17, 0.88, 0.71), "depth": (0.19, 0.81, 0.84),
             "rgb": (0.97, 0.9, 0.86)}
    for source in ("caption", "audio", "depth", "rgb"):
        for target in ("rgb", "caption"):
            if source == target:
                continue
            for i, (what, k) in enumerate((("colour", 6), ("shape", 4), ("size", 2))):
                value = round(known[source][i] - float(rng.uniform(0, 0.04)), 3)
                ceiling = 1 / k + 0.02 if what == "colour" and source in ("audio", "depth") else 1.0
                cross.append(metric(f"{source}->{target}/{what}_acc", value, chance=1 / k, majority=1 / k + 0.02,
                                    ceiling=ceiling, reference=0.99 if target == "rgb" else None))
    cross.append(metric("audio+depth->rgb/colour_acc", 0.21, half=0.04, chance=1 / 6, in_distribution=False))
    cross.append(metric("audio+depth->rgb/shape_acc", 0.61, half=0.05, chance=0.25, in_distribution=False))
    cross += [metric("rgb->depth/absrel", 0.081, half=0.004, higher_is_better=False, reference=0.032, chance=0.31),
              metric("caption->depth/absrel", 0.142, half=0.01, higher_is_better=False, reference=0.032, chance=0.31),
              metric("rgb->audio/mel_distance", 0.61, half=0.03, higher_is_better=False, unit="dB", chance=1.9)]
    retrieval = [metric("audio->rgb/r1", 0.031, half=0.008, chance=0.01), metric("audio->rgb/r5", 0.142, chance=0.05),
                 metric("caption->rgb/r1", 0.22, chance=0.01), metric("caption->rgb/r5", 0.61, chance=0.05)]
    trip = [metric("rgb/psnr", 27.4, half=0.3, unit="dB"), metric("audio/ce", math.nan, higher_is_better=False),
            metric("depth/psnr", 31.0, half=0.3, unit="dB", n=None, in_distribution=None)]
    return [
        result("crossmodal", "What one modality tells the model of another", cross,
               in_distribution={"audio+depth->rgb": {"value": False, "frequency": 0.0002},
                                "caption->rgb": {"value": True, "frequency": 0.08}},
               notes=["Generated pictures are judged by a classifier trained on real pictures only."]),
        result("retrieval", "Can it find the sample that belongs to a condition?", retrieval, seconds=84.0),
        result("roundtrip", "What the tokenizers themselves lose", trip, commit=None),
    ]


def make_run(folder: Path, name: str = "demo", caption: str = "a large red metal sphere", rows: int = 2) -> Path:
    run = folder / name.replace("<", "").replace(">", "").replace("/", "")
    gallery = run / "eval" / "gallery"
    gallery.mkdir(parents=True)
    config = {"task": "fourm", "name": name, "seed": 0, "data": {"dataset": "scenes", "modalities": MODALITIES},
              "model": {"size": "d3-3w128"}, "masking": {"components": [{"type": "dirichlet", "alpha": 0.2}]},
              "loss_weights": {}, "train": {"steps": 3000, "batch": 64, "lr": 0.001}}
    (run / "config.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    rng = np.random.default_rng(1)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(25, 3001, 25):
            decay = math.exp(-step / 600)
            for kind in ("train", "val") if step % 250 == 0 else ("train",):
                noise, over = (0.05, 0.0) if kind == "train" else (0.0, 0.02)
                ce = {m: (0.35 + 0.6 * decay + 0.04 * i + over + rng.normal() * noise) * math.log(VOCAB[m])
                      for i, m in enumerate(MODALITIES)}
                record = {"kind": kind, "step": step, "time": 1.7e9 + step, "loss": sum(ce.values()) / 5,
                          **{f"ce_{m}": v for m, v in ce.items()}}
                if kind == "train":
                    record |= {"samples_per_s": 410 + rng.normal() * 8, "lr": 1e-3 * min(1, step / 300)}
                    record["grad_norm"] = 1 + decay
                file.write(json.dumps(record) + "\n")
        file.write('{"kind": "train", "step": 30')  # cut by a kill
    point = run / "checkpoints" / "step-00003000"
    point.mkdir(parents=True)
    specs = [{"modality": m, "kind": "grid", "shape": [8, 8], "vocab_size": v,
              "tokenizer": {"name": "fsq_image", "weights_sha256": "ab" * 32}} for m, v in VOCAB.items()]
    (point / "state.json").write_text(json.dumps({"step": 3000, "version": "0.1.0", "specs": specs}))
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000, 1234]}, "__metadata__": {}}).encode()
    (point / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    for doc in results():
        (run / "eval" / f"{doc['probe']}.json").write_text(json.dumps(doc))

    def image(i: int, modality: str = "rgb") -> dict:
        png(gallery / f"{modality}{i}.png", i)
        return {"modality": modality, "kind": "image", "file": f"{modality}{i}.png"}

    def sound(i: int) -> dict:
        wav(gallery / f"a{i}.wav", 220 + 50 * i)
        png(gallery / f"a{i}.png", i, (96, 64))
        return {"modality": "audio", "kind": "audio", "file": f"a{i}.wav", "picture": f"a{i}.png"}

    text = {"modality": "caption", "kind": "text", "text": caption}
    all_rows = []
    for i in range(rows):
        key = f"test-{i:09d}"
        all_rows.append({"key": key, "title": "caption -> rgb, audio", "condition": [text],
                         "output": [image(10 * i), sound(10 * i)], "truth": [image(10 * i + 1), sound(10 * i + 1)]})
    for i in range(rows):
        key = f"test-{i:09d}"
        all_rows.append({"key": key, "title": "audio -> rgb, depth, caption", "condition": [sound(10 * i + 1)],
                         "output": [image(10 * i + 2), image(10 * i + 3, "depth"), text],
                         "truth": [image(10 * i + 1), image(10 * i + 4, "depth"), text]})
    (gallery / "gallery.json").write_text(json.dumps({"rows": all_rows}))
    return run


class Page(HTMLParser):
    """Parses a page and fails on what is not closed."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute stands twice: {attrs}"
        if tag not in VOID and not self.self_closed():
            self.open.append(tag)

    def self_closed(self) -> bool:
        return self.get_starttag_text().endswith("/>")

    def handle_endtag(self, tag):
        if tag not in VOID and not self.self_closed_end(tag):
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def self_closed_end(self, tag) -> bool:
        return bool(self.tags) and self.tags[-1][0] == tag and self.self_closed()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [a for t, a in self.tags if t == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run: Path, **kw) -> Page:
    out = build(run, **kw)
    assert out == run / "report" / "index.html"
    return Page(out.read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return page_of(make_run(tmp_path_factory.mktemp("runs")))


# -- the page -----------------------------------------------------------------------------------------------------

def test_holds_every_metric_curve_and_row(page):
    wanted = [m["name"] for r in results() for m in r["metrics"]]
    assert [a["data-metric"] for a in page.all("tr") if "data-metric" in a] == wanted
    curves = [a["aria-label"] for a in page.all("svg") if "aria-label" in a]
    for m in MODALITIES:
        assert any(c.startswith(f"{m} over steps: train from") and "val from" in c for c in curves)
    assert sum(a.get("class") == "sample" for a in page.all("article")) == 4
    assert len(page.all("audio")) == 2 * 2 + 2
    for text in ("A 4M model of 1.23 M parameters", "1,234,000", "3,000 of 3,000", "192,000", "8 min", "4,375",
                 "nano4m train runs/demo/config.yaml name=demo-again", "nano4m fetch scenes", "76e650e",
                 "a large red metal sphere", "23 of 23 figures beat their baseline"):
        assert text in page.text, text


def test_is_structured_and_reachable(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"].startswith("#") and link["href"][1:] in ids
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("audio"))
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in page.all("svg"))
    assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in page.all("div") if a.get("class") == "scroll")


def test_needs_nothing_but_itself(page, tmp_path):
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:")), attrs
    text = build(make_run(tmp_path)).read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "http" not in text.replace("http-equiv", "") and ' style="' not in text


def test_is_the_same_for_the_same_files(tmp_path):
    run = make_run(tmp_path)
    first = build(run).read_bytes()
    assert build(run).read_bytes() == first
    assert not list((run / "report").glob(".*"))


def test_filters_have_a_button_per_choice_and_are_hidden_without_script(page):
    assert "hidden" in next(a for a in page.all("div") if a.get("class") == "filters")
    choices = {(a["data-filter"], a["data-value"]) for a in page.all("button")}
    sources = {a["data-from"] for a in page.all("section") if a.get("class") == "group"}
    targets = {"rgb", "audio", "depth", "caption"}
    assert choices == {("from", s) for s in sources | {""}} | {("to", t) for t in targets | {""}}
    assert not any("hidden" in a for tag in ("section", "article", "figure") for a in page.all(tag))


def test_marks_directions_that_were_not_trained(page):
    assert "audio+depth->rgb (0.02 % of samples)" in page.text
    assert page.text.count("not trained") == 1 + 1 + 2  # card, explanation, its two rows


# -- hostile and broken input --------------------------------------------------------------------------------------

def test_text_of_the_user_is_inert(tmp_path):
    run = make_run(tmp_path, name=f"a{EVIL}", caption=f"\"'>{EVIL}\x00\ud800")
    doc = result(f"p{EVIL}", EVIL, [metric(f"{EVIL}->rgb/x\" onload=\"y", 0.5, unit=EVIL)], notes=[EVIL], commit=EVIL,
                 in_distribution={f"{EVIL}->rgb": {"value": False}})
    (run / "eval" / "evil.json").write_text(json.dumps(doc))
    rows = json.loads((run / "eval/gallery/gallery.json").read_text())["rows"]
    rows[0] |= {"title": f"\"><img src=x>{EVIL}", "key": EVIL}
    (run / "eval/gallery/gallery.json").write_text(json.dumps({"rows": rows}))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"kind": "val", "step": 10, f"ce_{EVIL}": 1.0}) + "\n")
    page = page_of(run)
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not any(a.get("src") == "x" for a in page.all("img"))
    assert page.text.count(EVIL) > 8
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy


def test_an_empty_run_says_what_is_missing(tmp_path):
    (tmp_path / "bare").mkdir()
    page = page_of(tmp_path / "bare")
    for text in ("no evaluation yet", "no training records", "no gallery", "no config.yaml", "data set is not known"):
        assert text in page.text, text
    assert "bare" in page.text and "None" not in page.text and "nan" not in page.text.lower().replace("nano4m", "")


@pytest.mark.parametrize("gone", ["config.yaml", "metrics.jsonl", "eval/gallery/gallery.json", "checkpoints", "eval"])
def test_any_part_may_be_missing(tmp_path, gone):
    run = make_run(tmp_path)
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    assert "None" not in page.text
    assert "could not be read" not in page.text


def test_no_run_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no run folder"):
        build(tmp_path / "nothing")


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path)
    (run / "eval" / "crossmodal.json").write_text('{"probe": ')
    (run / "eval" / "roundtrip.json").write_text('{"probe": "roundtrip"}')
    (run / "config.yaml").write_text("a: [")
    (run / "checkpoints/step-00003000/model.safetensors").write_bytes(b"\xff" * 20)
    (run / "eval/gallery/gallery.json").write_text("[]")
    page = page_of(run)
    for name in ("crossmodal.json", "roundtrip.json", "gallery/gallery.json", "model.safetensors"):
        assert name in page.text
    assert "config.yaml is not valid YAML" in page.text
    assert str(tmp_path) not in page.text
    assert any(a.get("data-metric") == "audio->rgb/r5" for a in page.all("tr"))


def test_media_that_cannot_be_shown_are_named(tmp_path):
    run = make_run(tmp_path, rows=1)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "eval/gallery/no.png").write_bytes(b"no picture")
    files = ("../../../secret.png", "gone.png", "no.png", "x.svg", None)
    items = [{"modality": "rgb", "kind": "image", "file": f} for f in files]
    rows = [{"key": "k", "title": "t", "condition": items, "output": [], "truth": []}]
    (run / "eval/gallery/gallery.json").write_text(json.dumps({"rows": rows}))
    page = page_of(run)
    assert not page.all("img")
    for text in ("lies outside", "gone.png is missing", "no.png is no picture", "x.svg is none of", "no file is named"):
        assert text in page.text, text


def test_rows_that_do_not_fit_are_dropped_evenly(tmp_path):
    run = make_run(tmp_path, rows=6)
    whole = len(build(run).read_bytes())
    budget = whole - 15_000
    page = page_of(run, budget=budget)
    assert len((run / "report/index.html").read_bytes()) <= budget
    keys = [a["aria-label"] for a in page.all("article") if a.get("class") == "sample"]
    assert 2 <= len(keys) < 12
    first = [f"test-{i:09d}" for i in range(-(-len(keys) // 2))]
    assert keys == [*first, *first[: len(keys) // 2]], "every direction keeps its first rows"
    assert f"{12 - len(keys)} of 12 rows are left out" in page.text
    assert "12 of 12 rows are left out" in page_of(run, budget=1000).text


# -- the arithmetic ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, text", [
    (None, "-"), (math.nan, "-"), (math.inf, "-"), (10**400, "-"), ("x", "-"), (True, "-"), (0, "0"), (0.95, "0.950"),
    (-0.5, "-0.500"), (27.43, "27.4"), (412.3, "412"), (1240.4, "1,240"), (0.00002, "2.0e-05"),
    (9.999, "10.0"), (99.96, "100"),
])
def test_figure(value, text):
    assert numbers.figure(value) == text


def test_other_numbers():
    assert [numbers.rounded(v) for v in (1_234_000, 950, 3.2e9, None)] == ["1.23 M", "950", "3.2 B", "-"]
    assert [numbers.duration(v) for v in (4.2, 42, 600, 7200, math.nan)] == ["4.2 s", "42 s", "10 min", "2.0 h", "-"]
    assert [numbers.share(v) for v in (0.0002, 0.08, 0.5, None)] == ["0.02 %", "8 %", "50 %", "-"]


@pytest.mark.parametrize("more, wanted", [
    ({}, "none"),
    ({"chance": 0.2}, "better"),
    ({"chance": 0.2, "majority": 0.5}, "level"),
    ({"chance": 0.6}, "worse"),
    ({"chance": 0.2, "higher_is_better": False}, "worse"),
    ({"chance": 0.9, "majority": 0.7, "higher_is_better": False}, "better"),
    ({"chance": 0.5, "ceiling": 0.5}, "bound"),
    ({"chance": 0.2, "value": None}, "none"),
    ({"chance": 0.5, "ci95": None, "value": 0.51}, "better"),
])
def test_verdict(more, wanted):
    m = Metric.model_validate({"name": "a->b/x", "value": 0.5, "ci95": [0.45, 0.55], **more})
    assert verdict(m) == wanted
    if {"chance", "majority"} <= set(more):
        assert baseline(m) == (max if m.higher_is_better else min)(more["chance"], more["majority"])


def test_bar_and_scales():
    share = Metric(name="a->b/acc", value=0.5, ci95=(0.4, 0.6), chance=0.25, ceiling=1.0)
    loud = Metric(name="a->b/db", value=-5.0, ci95=(-6.0, -4.0), reference=10.0)
    error = Metric(name="a->b/err", value=0.1, chance=0.4, higher_is_better=False)
    scale = scales([share, loud, error, Metric(name="a->b/none", value=math.nan, higher_is_better=False)])
    assert {k[0]: v for k, v in scale.items()} == {"acc": (0, 1), "db": (-6, 10), "err": (0, 0.4), "none": (0, 0)}
    assert bar(share, (0, 1)).ticks == {"chance": 25.0, "ceiling": 100.0}
    b = bar(loud, (-6.0, 10.0))
    assert (b.start, b.width, b.interval) == (6.25, 31.25, (0.0, 12.5))
    assert bar(error, (0.0, 0.4)).start == 0 and bar(error, (0.0, 0.4)).width == 25
    assert bar(Metric(name="x/y"), (0, 1)) is None and bar(share, (0.0, 0.0)) is None


def test_ticks_and_range():
    assert ticks(0, 3000) == [0, 1000, 2000, 3000]
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert ticks(0.31, 0.58) == [0.4, 0.5]
    assert ticks(2, 2) == [2]
    assert [tick(v) for v in (0, 0.0005, 0.00025, 0.5, 7.5, 3000, 25000, 2e6)] == [
        "0", "5e-4", "2.5e-4", "0.5", "7.5", "3000", "25k", "2M"]
    train = Line("train", "train", [(0, 8.0), (10, 2.0)])
    assert y_range([train]) == pytest.approx((0, 8.4))
    assert y_range([train, Line("guess", "guess", [(0, 9.0)])]) == pytest.approx((0, 9.45))
    assert y_range([train, Line("guess", "guess", [(0, 50.0)])]) == pytest.approx((0, 8.4))
    assert y_range([]) == pytest.approx((0, 1.05))
    low, high = y_range([Line("train", "train", [(0, 3.0)])])
    assert low < 3 < high


def test_a_figure_that_rests_on_other_questions_does_not_mark_its_direction(tmp_path):
    own = metric("audio->caption/gain_last", 0.1, in_distribution=False)  # made of the loss from all other sources, never trained
    posed = {"audio->caption": {"value": True, "frequency": 0.1}}
    run = Inputs(tmp_path, results=[Result.model_validate(result("fusion", "t", [own], in_distribution=posed))])
    (card,) = cards(run)
    assert card.posed.value is True and [f.posed.value for f in card.figures] == [False]

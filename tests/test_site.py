"""The site of evaluated runs: honest words, whole and valid pages, safe to write, and used in a headless Chromium."""

import functools
import http.server
import json
import re
import shutil
import threading
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from test_cli import fails
from test_cli import run as cli
from test_report import EVIL, Page, make_run, metric, result
from workspace_factory import media, one_thread, tiny  # noqa: F401

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError, UnknownNameError
from nano4m_cli.modalities.caption import MODALITY as CAPTION
from nano4m_cli.modalities.rgb import MODALITY as RGB
from nano4m_cli.report._about import commands, without_paths
from nano4m_cli.report._cards import data_card, limits, model_card
from nano4m_cli.report._compare import compared
from nano4m_cli.report._figures import cards, scales
from nano4m_cli.report._figures import figures as figures_of
from nano4m_cli.report._method import method
from nano4m_cli.report._read import Result, read_run
from nano4m_cli.report._words import main_figures, reach, sentence, skill, verdicts
from nano4m_cli.report.site import BUDGET, build_site, render_site

DATA = {
    "name": "scenes", "source": "scenes", "version": 2, "options": {"name": "scenes", "seed": 3, "size": 32, "judge": None},
    "modalities": ["rgb", "depth", "normal", "caption", "audio"], "splits": {"train": 900, "test": 100}, "judge": 40,
    "sizes": {"rgb": {"size": [32, 32]}, "audio": {"seconds": 1.0}}, "max_objects": 2, "pairing": "instance",
    "attributes": {"shape": {"values": ["cube", "sphere"]}, "colour": {"values": ["red"]}, "mood": {"values": ["sad"]}},
    "determined": {"rgb": ["shape", "colour"], "audio": ["shape"]}, "ceilings": {"audio": {"colour": 0.2}},
    "notes": "CC BY 4.0, recorded by hand.",
}
CONFUSION = {"name": "confusion", "title": "Which is taken for which", "kind": "matrix", "rows": ["a", "b", "c"],
             "columns": ["a", "b", "c"], "values": [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.0, 0.0, 1.0]], "x": "answer", "y": "truth"}
CURVE = {"name": "reliability", "title": "Reliability", "kind": "curve", "rows": ["rgb"], "columns": [0.1, 0.5, 0.9],
         "values": [[0.2, 0.5, 0.8]], "low": [[0.1, 0.4, 0.7]], "high": [[0.3, 0.6, 0.9]], "diagonal": True}


def make_space(root, *names, rows=2, data=DATA):
    """Return a workspace of made-up runs, with plots and a data set."""
    for name in names or ("demo",):
        run = make_run(root / "runs", name=name, rows=rows)
        path = run / "eval" / "retrieval.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "plots": [CONFUSION, CURVE]}))
        gallery = json.loads((run / "eval/gallery/gallery.json").read_text())
        for i, row in enumerate(gallery["rows"]):
            row |= {"rule": "worst", "figure": "rgb differs by 9.9 of 255"} if i % rows else {"rule": "first"}
        (run / "eval/gallery/gallery.json").write_text(json.dumps({"rules": ["First: the first of the split."], **gallery}))
    if data is not None:
        (root / "data/scenes/raw").mkdir(parents=True)
        (root / "data/scenes/raw/dataset.json").write_text(json.dumps(data))
    return Workspace(root)


def render(space, *names, budget=BUDGET):
    return render_site([space.run(n) for n in names] or space.runs(), space.root / "data", budget)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return render(make_space(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return render(make_space(tmp_path_factory.mktemp("two"), "demo", "other"), "demo", "other")


def pages(files):
    return {name: Page(data.decode()) for name, data in files.items() if name.endswith(".html")}


# -- words ------------------------------------------------------------------------------------------------------------


def made(*metrics, probe="crossmodal", posed=None):
    r = Result.model_validate(result(probe, "t", list(metrics), in_distribution=posed or {}))
    return figures_of(r, scales(r.metrics))


@pytest.mark.parametrize("more, wanted", [
    ({"value": 0.9, "chance": 0.5}, 0.8), ({"value": 0.5, "chance": 0.5}, 0), ({"value": 0.75, "chance": 0.5, "ceiling": 0.75}, 1),
    ({"value": 0.9, "chance": 0.2, "majority": 0.5}, 0.8), ({"value": 0.2, "chance": 0.16, "ceiling": 0.2}, None),
    ({"value": 0.3, "chance": 0.5, "ceiling": 0.5}, None), ({"value": 0.3}, None), ({"value": None, "chance": 0.1}, None),
    ({"value": 2.0, "majority": 4.0, "reference": 1.0, "higher_is_better": False}, 2 / 3),
    ({"value": 2.0, "majority": 4.0, "higher_is_better": False}, None), ({"value": 30.0, "chance": 10.0, "unit": "dB"}, None),
    ({"value": 0.0, "chance": 0.8}, -1),
])
def test_skill_is_the_way_from_the_baseline_to_the_best(more, wanted):
    got = skill(made({**metric("a->b/x", None), **more})[0])
    assert got is None if wanted is None else got == pytest.approx(wanted)


def test_only_what_beats_its_baseline_is_claimed(tmp_path):
    run = make_run(tmp_path)
    cross = [
        metric("audio->rgb/shape_acc", 0.9, chance=0.3), metric("audio->rgb/colour_acc", 0.17, chance=0.16, ceiling=0.5),
        metric("audio->rgb/r5", 0.2, chance=0.05), metric("rgb->audio/shape_acc", 0.31, chance=0.3, half=0.05),
        metric("depth->rgb/shape_acc", 0.99, chance=0.3, in_distribution=False),
    ]
    shutil.rmtree(run / "eval")
    (run / "eval").mkdir()
    (run / "eval/crossmodal.json").write_text(json.dumps(result("crossmodal", "t", cross)))
    found = verdicts(cards(read_run(run)))
    assert (found.beat, found.judged, found.luck) == (3, 5, pytest.approx(0.125))
    assert [c.card.subject for c in found.best] == ["audio->rgb"]
    assert found.best[0].sentence == "Given audio alone, it makes rgb with the right shape, and finds the right rgb among others " \
        "more often than chance."
    assert [f.metric.short for f in found.best[0].figures] == ["shape_acc", "r5"]
    assert [f.against for f in found.best[0].figures] == ["0.880 to 0.920, chance 0.300", "0.180 to 0.220, chance 0.050"]
    assert made(metric("a->b/x", 0.5, chance=0.2, majority=0.4))[0].against == "0.480 to 0.520, majority 0.400"
    assert [c.sentence for c in found.weakest] == ["Given rgb alone, no figure of audio beats its baseline."]
    assert [c.subject for c in found.untrained] == ["depth->rgb"], "never called the best: training did not pose it"
    assert [f.metric.name for f in found.nothing] == ["audio->rgb/colour_acc", "rgb->audio/shape_acc"]


def test_variants_of_a_figure_do_not_rank_a_direction():
    found = made(*[metric(f"a->b/{n}", v, chance=0.0, half=0.0) for n, v in (
        ("r1", 0.5), ("r5", 0.7), ("likelihood_r1", 0.1), ("shape_acc", 0.9), ("shape_acc_pmi", 0.2), ("acc", 0.3))])
    card = type("C", (), {"figures": found})()
    assert [f.metric.short for f in main_figures(card)] == ["r1", "r5", "shape_acc", "acc"]
    assert reach(card) == pytest.approx((0.5 + 0.7 + 0.9 + 0.3) / 4)


def test_what_is_known_and_what_is_made_are_told_apart():
    known = made(metric("a+b->caption/colour_acc", 0.9, chance=0.3), probe="class")
    card = type("C", (), {"sources": ("a", "b"), "target": "caption", "figures": known})()
    assert sentence(card, known) == "Given a and b, it knows colour."
    error = made(metric("a->b/absrel", 0.1, majority=0.4, reference=0.05, higher_is_better=False))
    card = type("C", (), {"sources": ("a",), "target": "b", "figures": error})()
    assert sentence(card, error) == "Given a alone, it beats its baseline in absrel of b."
    loss = made(metric("a->b/ce", 1.0, chance=3.0, higher_is_better=False), probe="loss")
    card = type("C", (), {"sources": ("a",), "target": "b", "figures": loss})()
    assert sentence(card, loss) == "Given a alone, it predicts b better than its baseline does."


# -- cards ------------------------------------------------------------------------------------------------------------


def test_the_data_card_says_what_the_data_set_says(tmp_path):
    space = make_space(tmp_path)
    run = read_run(space.run("demo"), space.root / "data")
    parts = {p.title: p for p in data_card(run)}
    assert ["train", "900", "90 %"] in parts["Splits"].rows and "40 further samples" in parts["Splits"].lines[0]
    assert parts["Licence and remarks"].lines == ["CC BY 4.0, recorded by hand."]
    assert ["shape", "cube, sphere", "rgb, audio"] in parts["Labels"].rows and ["mood", "sad", "nothing"] in parts["Labels"].rows
    assert any(r[:2] == ["rgb", "size 32 \N{MULTIPLICATION SIGN} 32"] for r in parts["Preprocessing and tokenizers"].rows)
    told = " ".join(limits(run, method(run), verdicts(cards(run))))
    for text in ("from audio what it does not carry: colour (at best 20 % of answers can be right) and mood",
                 "No modality carries mood", "audio + depth \N{RIGHTWARDS ARROW} rgb", "with one seed"):
        assert text in told, text
    assert "nano4m fetch scenes seed=3 size=32\n" in commands(run)


@pytest.mark.parametrize("what", ["gone", "broken", "odd"])
def test_a_data_set_that_is_gone_is_said_so(tmp_path, what):
    space = make_space(tmp_path, data=None)
    if what != "gone":
        (tmp_path / "data/scenes/raw").mkdir(parents=True)
        (tmp_path / "data/scenes/raw/dataset.json").write_text("{" if what == "broken" else '{"name": "scenes", "splits": 3}')
    files = render(space)
    card = Page(files["data.html"].decode())
    assert "not in this workspace any more" in card.text and "fsq_image" in card.text
    assert str(tmp_path) not in files["index.html"].decode()
    assert ("could not be read" in Page(files["index.html"].decode()).text) == (what != "gone")


def test_a_run_in_mid_training_says_so(tmp_path):
    space = make_space(tmp_path)
    folder = space.run("demo")
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps({**config, "train": {**config["train"], "steps": 9000}}))
    run = read_run(folder)
    parts = {p.title: p for p in model_card(run, method(run), verdicts(cards(run)))}
    assert "had not come to its end" in parts["Training"].lines[0] and ("Steps", "3,000 of 9,000") in parts["Training"].facts
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "eval")
    text = " ".join(Page(d.decode()).text for n, d in render(space, "demo").items() if n.endswith(".html"))
    for part in ("no evaluation yet", "nothing is claimed", "no gallery", "has not been evaluated", "it has no checkpoint"):
        assert part in text, part
    assert "None" not in text


@pytest.mark.parametrize("text, wanted", [
    ("/home/anna/sets/birds", "PATH/birds"), ("weights: ~/models/x.pt, rate: 3", "weights: PATH/x.pt, rate: 3"),
    (r"C:\Users\anna\x.csv", "PATH/x.csv"), ("['/a/b/c.wav', 'd']", "['PATH/c.wav', 'd']"),
    ("CC BY 4.0 and/or MIT", "CC BY 4.0 and/or MIT"),
    ("https://example.org/a/b", "https://example.org/a/b"), ("x / 255", "x / 255"), ("me/model", "me/model"),
])
def test_paths_of_a_machine_are_not_published(text, wanted):
    assert without_paths(text) == wanted


# -- comparing --------------------------------------------------------------------------------------------------------


def test_runs_side_by_side(tmp_path):
    space = make_space(tmp_path, "demo", "other")
    path = space.run("other") / "eval/crossmodal.json"
    doc = json.loads(path.read_text())
    for m in doc["metrics"]:
        if m["name"] == "audio+depth->rgb/shape_acc":
            m |= {"value": 0.9, "ci95": [0.85, 0.95]}
        elif m["name"] == "rgb->depth/absrel":
            m |= {"value": 0.5, "ci95": [0.4, 0.6]}
    doc["version"] = 7
    path.write_text(json.dumps(doc))
    (space.run("other") / "eval/roundtrip.json").unlink()
    found = compared([(n, read_run(space.run(n))) for n in ("demo", "other")])
    lines = {li.metric.name: li for _, _, part in found.groups for li in part}
    assert lines["audio+depth->rgb/shape_acc"].apart == [False, True] and lines["rgb->depth/absrel"].apart == [True, False]
    assert lines["audio->rgb/r5"].apart == [False, False] and "rgb/psnr" not in lines
    assert any("different versions of the probe: crossmodal" in n for n in found.notes)
    assert any("3 figures that only one" in n for n in found.notes)
    one = {"name": "audio->rgb/r5", "base": 0.1, "other": 0.3, "difference": 0.2, "ci95": [0.1, 0.3], "p_holm": 0.001,
           "verdict": "other"}
    figures = [{**one, "probe": "retrieval"}, {**one, "name": "audio->rgb/r1", "verdict": None}]
    doc = {"kind": "compare", "base": "demo", "runs": [{"run": "demo"}, {"run": "other"}], "samples": 400, "split": "test",
           "pairs": [{"run": "other", "figures": figures}], "notes": [EVIL]}
    for name, change in (("demo-vs-other", {}), ("demo-vs-third", {"runs": [{"run": "demo"}, {"run": "third"}]}), ("broken", None)):
        (tmp_path / f"runs/compare-{name}").mkdir()
        (tmp_path / f"runs/compare-{name}/compare.json").write_text("{" if change is None else json.dumps({**doc, **change}))
    files = render(space, "demo", "other")
    assert json.loads(files["files/compare-demo-vs-other.json"]) == doc and sum(n.startswith("files/") for n in files) == 1
    text = Page(files["compare.html"].decode()).text
    for part in ("Of 2 figures other is better in 1 , demo in 0 ; the others", "0.100 to 0.300", EVIL,
                 "audio\N{RIGHTWARDS ARROW}rgb/r5"):
        assert part in text, part
    assert 'href="files/compare-demo-vs-other.json"' in files["compare.html"].decode()


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["one", "two"])
def test_pages_are_valid_and_whole(which, request):
    files = request.getfixturevalue(which)
    found = pages(files)
    assert len(found) == (10 if which == "one" else 2 + 2 * 10)
    for name, page in found.items():
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids)), name
        assert all(a.get("alt") for a in page.all("img")) and all(a.get("aria-label") for a in page.all("audio"))
        assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in page.all("svg")), name
        assert not any("style" in a for _, a in page.tags) and not page.all("style"), name
        levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
        assert levels[0] == 1 and levels.count(1) == 1, (name, levels)
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), (name, levels)
        for tag in ("header", "nav", "main", "footer"):
            assert len(page.all(tag)) == 1, (name, tag)
        assert page.all("html")[0]["lang"] == "en" and any(a.get("name") == "viewport" for a in page.all("meta"))
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        labelled = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
        assert labelled <= set(ids)
        for _, attrs in page.tags:
            for at in ("src", "href"):
                target = attrs.get(at)
                if target is None or target == "data:,":
                    continue
                parts = urlsplit(target)
                assert not parts.scheme and not parts.netloc and not target.startswith("/"), target
                path = unquote(urlsplit(urljoin(f"https://host/project/{name}", target)).path).removeprefix("/project/")
                assert path in files, (name, target)
                if parts.fragment:
                    assert parts.fragment in [a.get("id") for _, a in found[path].tags]
    linked = {urljoin(f"https://host/{name}", a["href"]) for name, page in found.items() for a in page.all("a")}
    linked = {urlsplit(u)._replace(fragment="").geturl() for u in linked}
    assert {f"https://host/{name}" for name in found} <= linked, "all are reached"


def test_every_file_is_listed_used_and_small(one):
    listed = json.loads(one["site.json"])["files"]
    assert listed == sorted(one) and sum(map(len, one.values())) < BUDGET
    text = b"".join(d for n, d in one.items() if n.endswith(".html")).decode()
    assert all(n in text for n in one if n.startswith("media/")) and any(n.endswith(".wav") for n in one)
    assets = (one["assets/style.css"] + one["assets/filter.js"]).decode()
    assert "url(" not in assets and "@import" not in assets and "http" not in assets


def test_the_pages_hold_what_they_promise(one):
    found = {n: p.text for n, p in pages(one).items()}
    for name, texts in {
        "index.html": ("What it does best", "Where it is weakest", "How far each direction gets", "23 of 23 figures",
                       ", chance 0.167",
                       "The first sample of the split"),
        "probe-retrieval.html": ("Which is taken for which", "Largest off the diagonal: b as a (0.200)", "Reliability",
                                 "audio \N{RIGHTWARDS ARROW} rgb"),
        "gallery.html": ("First: the first of the split.", "worst: rgb differs by 9.9 of 255", "a large red metal sphere"),
        "data.html": ("CC BY 4.0", "900"), "model.html": ("Intended use", "Limits", "1,234,000"),
        "reproduce.html": ("nano4m train runs/demo/config.yaml name=demo-again", "abababababababab", "dirichlet"),
        "training.html": ("Total loss", "Learning rate"), "probes.html": ("crossmodal", "retrieval", "roundtrip"),
    }.items():
        for text in texts:
            assert text in found[name], (name, text)


def test_the_same_files_give_the_same_bytes(tmp_path):
    space = make_space(tmp_path, "demo", "other")
    assert render(space, "demo", "other") == render(space, "demo", "other")


def test_names_with_markup_are_inert_and_addressable(tmp_path):
    space = make_space(tmp_path, f"a{EVIL}", "demo")
    evil = next(p for p in space.runs() if p.name != "demo")
    (evil / "eval/x.json").write_text(json.dumps(result(f"p/../{EVIL}", EVIL, [metric(f"{EVIL}->rgb/r1", 0.9, chance=0.1)])))
    files = render_site([evil, space.run("demo")], tmp_path / "data")
    assert all(re.fullmatch(r"[A-Za-z0-9._/-]+", n) and ".." not in n.split("/") for n in files)
    for name, page in pages(files).items():
        assert len(page.all("script")) == 1 and page.all("script")[0]["src"].endswith("assets/filter.js"), name
        assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)
    assert EVIL in Page(files["index.html"].decode()).text


def test_runs_of_one_name_are_told_apart(tmp_path):
    space = make_space(tmp_path, "demo")
    shutil.copytree(tmp_path / "runs/demo", tmp_path / "runs/Demo 2")
    files = render(space, "demo", "Demo 2")
    assert "demo/index.html" in files and "Demo-2/index.html" in files and "Demo 2" in Page(files["index.html"].decode()).text


def test_a_site_too_large_loses_gallery_rows_first(tmp_path):
    space = make_space(tmp_path, rows=6)
    whole = render(space)
    media_bytes = sum(len(d) for n, d in whole.items() if n.startswith("media/"))
    rest = sum(map(len, whole.values())) - media_bytes
    small = render(space, budget=rest + media_bytes // 2)
    assert sum(map(len, small.values())) <= rest + media_bytes // 2
    assert "rows are left out, the last of each direction" in Page(small["gallery.html"].decode()).text
    assert {n for n in small if n.endswith(".html")} == {n for n in whole if n.endswith(".html")}
    with pytest.raises(DataError, match="without any gallery"):
        render(space, budget=10_000)


# -- writing it -------------------------------------------------------------------------------------------------------


def test_it_writes_only_where_it_may(tmp_path):
    space, out = make_space(tmp_path, "demo", "other"), tmp_path / "site"
    done = build_site(space, [], out)
    assert sorted(done.runs) == ["demo", "other"] and done.size == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert sorted(done.files) == sorted(p for p in out.rglob("*") if p.is_file())
    (out / "CNAME").write_text("example.org")
    (out / "mine.txt").write_text("mine")
    build_site(space, ["demo"], out)
    assert not (out / "compare.html").exists() and (out / "probe-retrieval.html").is_file(), "the older site's pages are gone"
    assert (out / "mine.txt").read_text() == "mine" and (out / "CNAME").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        build_site(space, [], other)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="is a file"):
        build_site(space, [], other / "thesis.txt")
    (other / "site.json").write_text(json.dumps({"made_by": "nano4m eval --site", "files": ["../data/scenes/raw/dataset.json"]}))
    build_site(space, ["demo"], other)
    assert (tmp_path / "data/scenes/raw/dataset.json").is_file(), "a manifest names no file outside its folder"
    with pytest.raises(UnknownNameError):
        build_site(space, ["dmeo"], out)


def test_broken_results_are_named_and_the_rest_is_shown(tmp_path):
    space = make_space(tmp_path)
    folder = space.run("demo")
    (folder / "eval/crossmodal.json").write_text('{"probe": ')
    (folder / "eval/gallery/gallery.json").write_text("[]")
    files = render(space)
    assert "crossmodal.json" in Page(files["index.html"].decode()).text and "probe-retrieval.html" in files
    assert "has no gallery" in Page(files["gallery.html"].decode()).text


def test_the_command(tmp_path):
    root = ("--root", tmp_path)
    make_space(tmp_path, "demo", "other")
    done = cli("eval", "--site", tmp_path / "out", "--json", *root)
    doc = json.loads(done.stdout)
    assert sorted(doc["runs"]) == ["demo", "other"] and doc["bytes"] > 10_000 and len(doc["files"]) > 20
    done = cli("eval", "--site", tmp_path / "out", "--run", "demo", *root)
    assert done.stdout == f"{tmp_path / 'out/index.html'}\n" and "runs: demo" in done.stderr
    fails(cli("eval", "--site", tmp_path / "out", "--limit", 3, *root), 2, "--site measures nothing", "evaluate first")
    fails(cli("eval", "--run", "demo", "--run", "other", *root), 2, "one run is evaluated at a time", "only --site")
    shutil.rmtree(tmp_path / "runs/demo/eval")
    shutil.rmtree(tmp_path / "runs/other/eval")
    fails(cli("eval", "--site", tmp_path / "out", *root), 1, "no evaluated run", "nano4m eval")


# -- the gallery ------------------------------------------------------------------------------------------------------


def test_best_and_worst_are_those_by_the_stated_figure():
    from nano4m_cli.probes._gallery import _ends, _lead

    truth = [np.zeros((2, 2, 3), np.uint8)] * 6
    made = [np.full((2, 2, 3), v, np.uint8) for v in (9, 3, 30, 3, 50, 7)]
    assert _ends(RGB, made, truth) == [
        (1, "best", "rgb differs by 3.0 of 255"), (3, "best", "rgb differs by 3.0 of 255"),
        (4, "worst", "rgb differs by 50.0 of 255"), (2, "worst", "rgb differs by 30.0 of 255"),
    ]
    words = _ends(CAPTION, ["a red cube", "abcd", "", "a red cube"], ["a red cube", "abxy", "a red cube", "a red cub"])
    assert [(i, r) for i, r, _ in words] == [(0, "best"), (3, "best"), (2, "worst"), (1, "worst")]
    assert words[0][2] == "100% of the caption's characters agree" and words[3][2] == "50% of the caption's characters agree"
    kinds = {"rgb": RGB, "caption": CAPTION}
    assert _lead(["caption", "rgb"], kinds, "instance") == "rgb" and _lead(["caption", "rgb"], kinds, "class") == "caption"
    assert _lead(["rgb"], kinds, "class") is None


@pytest.mark.usefixtures("one_thread")
def test_a_gallery_says_its_rule_and_shows_what_all_samples_would(media, tmp_path, monkeypatch):  # noqa: F811
    from nano4m_cli.probes import _gallery
    from nano4m_cli.probes._context import Context
    from nano4m_cli.train.run import open_run

    monkeypatch.setattr(_gallery, "SHOWN", 2)
    monkeypatch.setattr(_gallery, "ENDS", 1)
    context = Context(open_run(media, "demo"), "test", 6, 0, lambda *a: None)
    some = _gallery._made(context, ["caption"], "rgb", None, [4, 1])
    every = context.decoded(["caption"], ["rgb"], "rgb")
    assert np.array_equal(some[0], every[4]) and np.array_equal(some[1], every[1])
    doc = json.loads(_gallery.write_gallery(context, tmp_path / "gallery").read_text())
    assert doc["rules"][0] == "First: the first 2 samples of the split test." and "of its first 6 samples" in doc["rules"][1]
    from_text = [r for r in doc["rows"] if r["title"].startswith("caption ->")]
    assert [r["rule"] for r in from_text] == ["first", "first", "best", "worst"]
    far = [_gallery.distance(RGB.show(a), RGB.show(b)) for a, b in zip(every, context.raw("rgb"), strict=True)]
    assert from_text[2]["key"] == context.tokens.key(int(np.argmin(far))) and f"{max(far):.1f}" in from_text[3]["figure"]


# -- in a browser -----------------------------------------------------------------------------------------------------

CONTRAST = """
(() => {
  const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3); };
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = (e) => {
    const cell = e.tagName === 'text' && e.parentElement.querySelector(':scope > rect');
    if (cell) return parse(getComputedStyle(cell).fill);
    for (let p = e; p; p = p.parentElement) {
      const c = parse(getComputedStyle(p).backgroundColor);
      if (c && !(p instanceof SVGElement)) return c;
    }
    return [255, 255, 255];
  };
  let seen = 0;
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || e.closest('.hide, .skip, title, audio')) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const text = parse(e instanceof SVGElement ? style.fill : style.color);
    if (!text) continue;
    const [a, b] = [light(text), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) low.push([e.tagName, e.getAttribute('class'), e.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return [seen, low];
})()
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return (address, browser) of a site of two runs on a static host."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    root = tmp_path_factory.mktemp("served")
    build_site(make_space(root / "space", "demo", "other"), ["demo", "other"], root / "host/project")
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root / "host")))
    threading.Thread(target=host.serve_forever, daemon=True).start()
    browser = Browser(root / "profile")
    for domain in ("Network", "Runtime", "Log"):
        browser.ask(f"{domain}.enable")
    yield f"http://127.0.0.1:{host.server_port}/project/", browser, root
    browser.close()
    host.shutdown()


def complaints(browser):
    """Return what the page said on the console, and what of its requests failed."""
    out = []
    for e in browser.events:
        if e["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            out.append(json.dumps(e["params"])[:300])
        elif e["method"] == "Network.responseReceived" and e["params"]["response"]["status"] >= 400:
            out.append(e["params"]["response"]["url"])
    return out


def test_pages_load_fit_and_can_be_read(served):
    address, browser, root = served
    names = ["index.html", "compare.html"] + [f"demo/{n}.html" for n in (
        "index", "probes", "probe-retrieval", "probe-crossmodal", "gallery", "training", "data", "model", "reproduce")]
    for name in names:
        browser.scheme("light")
        browser.size(360)
        browser.open(address + name)
        assert browser.value("document.documentElement.scrollWidth") <= 360, name
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            seen, low = browser.value(CONTRAST)
            assert seen > 10 and low == [], (name, scheme)
        browser.size(1280)
        assert browser.value("document.documentElement.scrollWidth") <= 1280, name
        assert complaints(browser) == [], name
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert len(asked) >= 3 and all(u.startswith((address, "data:")) for u in asked), (name, asked)


def test_a_report_and_a_site_from_files_load_too(served):
    from nano4m_cli.report.build import build

    _, browser, root = served
    for path in (build(root / "space/runs/demo"), root / "host/project/demo/gallery.html"):
        browser.size(360)
        browser.open(path.as_uri())
        assert complaints(browser) == [] and browser.value("document.documentElement.scrollWidth") <= 360
        assert browser.value("getComputedStyle(document.body).fontSize") == "15px", "the style sheet is there"
        assert browser.value("!document.querySelector('.filters').hidden"), "the script ran"
        seen, low = browser.value(CONTRAST)
        assert seen > 30 and low == []
        allowed = ("data:", (root / "host").as_uri(), (root / "space").as_uri())
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert all(u.startswith(allowed) for u in asked), asked


def test_players_play_one_at_a_time(served):
    address, browser, _ = served
    browser.open(address + "demo/gallery.html")
    browser.until("[...document.querySelectorAll('audio')].every(a => a.readyState >= 1)")
    lengths = browser.value("[...document.querySelectorAll('audio')].map(a => a.duration)")
    assert len(lengths) == 6 and lengths == pytest.approx([0.3] * 6, abs=0.02)
    assert browser.value("[...document.querySelectorAll('audio')].every(a => !a.error)")
    browser.value("window.all = [...document.querySelectorAll('audio')]; all.forEach(a => a.loop = true); all[0].play()")
    browser.until("all[0].currentTime > 0 && !all[0].paused")
    browser.value("all[1].play()")
    browser.until("all[1].currentTime > 0 && all[0].paused")
    assert complaints(browser) == []


def test_filters_filter_and_the_keyboard_reaches_them(served):
    address, browser, _ = served
    browser.size(1280)
    browser.open(address + "demo/gallery.html")
    shown = "[...document.querySelectorAll('.sample')].filter(s => s.checkVisibility()).length"
    assert browser.value(shown) == 4 and browser.value("document.querySelector('[role=status]').textContent") == "4 samples shown"
    reached = []
    for _ in range(40):
        browser.press("Tab")
        reached.append(browser.value("(e => e.matches('button[data-filter]') ? e.dataset.filter + ':' + e.dataset.value : "
                                     "e.className || e.tagName)(document.activeElement)"))
        if reached[-1] == "from:audio":
            break
    assert reached[0] == "skip" and reached[-1] == "from:audio", reached
    outline = browser.value("(s => s.outlineStyle + s.outlineWidth)(getComputedStyle(document.activeElement))")
    assert outline == "solid2px", "the focus is seen"
    browser.press("Enter")
    assert browser.value("document.activeElement.getAttribute('aria-pressed')") == "true" and browser.value(shown) == 2
    click = "document.querySelector('button[data-filter={}][data-value=\"{}\"]').click()"
    browser.value(click.format("to", "depth"))
    pictures = "[...document.querySelectorAll('.output .item')].filter(i => i.checkVisibility()).map(i => i.dataset.modality)"
    assert browser.value(pictures) == ["depth", "depth"]
    browser.value(click.format("rule", "worst"))
    assert browser.value(shown) == 1 and browser.value("document.querySelector('[role=status]').textContent") == "1 sample shown"
    browser.value(click.format("from", "caption"))
    assert browser.value(shown) == 0, "no caption -> depth here"
    for name in ("from", "to", "rule"):
        browser.value(click.format(name, ""))
    assert browser.value(shown) == 4
    browser.open(address + "compare.html")
    rows = "[...document.querySelectorAll('tbody tr')].filter(r => r.checkVisibility()).length"
    whole = browser.value(rows)
    browser.value(click.format("probe", "retrieval"))
    assert browser.value(rows) == 4 < whole
    assert browser.value("document.querySelector('[role=status]').textContent") == "4 figures shown"


def test_motion_is_spared_those_who_ask_for_it(served):
    address, browser, _ = served
    browser.open(address + "index.html")
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert browser.value("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "no-preference"}])
    assert browser.value("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"

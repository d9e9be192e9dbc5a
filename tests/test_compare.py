"""Comparing runs: paired statistics against theory and simulation, what is refused, and what the command prints and writes."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import fails, run
from workspace_factory import copied, media, one_thread, tiny  # noqa: F401

from nano4m_cli.errors import DataError, UsageError
from nano4m_cli.probes._compare import compare
from nano4m_cli.probes._result import mean_metric
from nano4m_cli.probes._significance import holm
from nano4m_cli.probes._statistics import beta_inc, paired, student_p

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, freedom, p", [  # tables of Student's t
    (12.7062, 1, 0.05), (2.2622, 9, 0.05), (3.2498, 9, 0.01), (1.9600, 1e7, 0.05), (0.0, 5, 1.0), (4.5869, 10, 0.001),
    (-2.2622, 9, 0.05),
])
def test_student_p_is_that_of_tables(t, freedom, p):
    assert student_p(t, freedom) == pytest.approx(p, rel=2e-4)


def test_incomplete_beta_of_integers_is_a_binomial_tail():
    for a, b, x in ((2, 3, 0.4), (5, 1, 0.9), (1, 7, 0.05), (4, 4, 0.5), (30, 20, 0.7)):
        n = a + b - 1
        tail = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
        assert beta_inc(a, b, x) == pytest.approx(tail, rel=1e-10)
    assert beta_inc(2, 2, 0) == 0 and beta_inc(2, 2, 1) == 1
    assert 0 < student_p(20, 299) < 1e-50, "small ones are told apart from nothing"


def ones(x):
    return np.asarray(x, dtype=float), np.ones(len(x))


def test_equal_weights_give_the_usual_paired_test():
    a, b = RNG(0).normal(size=50), RNG(1).normal(size=50) + 0.5
    d = b - a
    found = paired(ones(a), ones(b))
    assert found.value == pytest.approx(d.mean()) and found.effect == pytest.approx(d.mean() / d.std(ddof=1))
    assert found.p == pytest.approx(student_p(d.mean() / d.std(ddof=1) * math.sqrt(50), 49)) and found.n == 50
    half = 1.96 * d.std() / math.sqrt(50)
    assert found.ci95 == pytest.approx((d.mean() - half, d.mean() + half), abs=0.05)


def test_a_figure_against_itself():
    x = RNG(0).random(30)
    found = paired(ones(x), ones(x))
    assert (found.value, found.ci95, found.effect, found.p) == (0, (0, 0), 0, 1)
    weighted = paired((x, np.arange(30.0)), (x, np.arange(30.0)))
    assert weighted.p == 1 and weighted.value == 0 and weighted.n == 29, "what counts nothing is no sample"
    assert paired((x, np.zeros(30)), ones(x)) is None
    shifted = paired(ones(x), ones(x + 1))
    assert shifted.p == 0 and shifted.effect is None and shifted.value == pytest.approx(1)
    assert paired(ones([1.0]), ones([2.0])).p == 1, "one sample tells nothing"


@pytest.mark.parametrize("kind", ["normal", "binary", "ratio"])
def test_false_alarms_come_as_often_as_they_may_and_differences_are_found(kind):
    """Under no difference p < .05 in about a twentieth of trials, and the interval holds 0 in the others; a true one is found."""
    rng, n, trials = RNG(0), 60, 250
    alarms, misses, found = 0, 0, 0
    for t in range(trials):
        common = rng.normal(size=n)
        weight = rng.integers(1, 4, n).astype(float) if kind == "ratio" else np.ones(n)

        def draw(shift, common=common, weight=weight):
            x = common + rng.normal(size=n) + shift
            return ((x > 0).astype(float) if kind == "binary" else x), weight

        base = draw(0.0)
        none, some = paired(base, draw(0.0), seed=t % 3), paired(base, draw(1.2), seed=t % 3)
        alarms += none.p < 0.05
        misses += not none.ci95[0] <= 0 <= none.ci95[1]
        found += some.p < 0.05 and some.value > 0
    assert 0.025 <= alarms / trials <= 0.08 and 0.02 <= misses / trials <= 0.09, (alarms, misses)
    assert found / trials > 0.95


def test_holm_keeps_the_chance_of_any_false_alarm():
    rng, trials, any_alarm = RNG(1), 120, 0
    for _ in range(trials):
        p = [paired(ones(rng.normal(size=40)), ones(rng.normal(size=40))).p for _ in range(20)]
        any_alarm += min(holm(np.array(p))) < 0.05
    assert any_alarm / trials <= 0.09


# -- runs -------------------------------------------------------------------------------------------------------------

ABOUT = {"data": "scenes", "split": "test", "samples": 8, "seed": 0, "made": "m", "keys": "k", "tokens": {"rgb": "a"}}


@pytest.fixture
def space(media, tmp_path):  # noqa: F811
    return copied(media, tmp_path / "space")


def clone(space, name, **settings):
    """Copy run demo under another name, with other settings ("__" stands for the dot)."""
    path = space.root / "runs" / name
    shutil.copytree(space.root / "runs" / "demo", path)
    text = (path / "config.yaml").read_text()
    import yaml

    config = yaml.safe_load(text)
    for key, value in {"name": name, **settings}.items():
        *sections, last = key.split("__")
        node = config
        for s in sections:
            node = node[s]
        node[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def results(path, figures, probe="loss", version=1, about=None, **more):
    """Write results as evaluate does: figures {name: values or (values, weights)} of 8 samples."""
    pairs = {n: v if isinstance(v, tuple) else (v, np.ones(8)) for n, v in figures.items()}
    metrics = [mean_metric(n, *v, higher_is_better=n.endswith("acc")) for n, v in pairs.items()]
    checkpoint = sorted((path / "checkpoints").glob("step-*"))[-1].name
    doc = {"probe": probe, "version": version, "title": "", "split": "test", "seed": 0, "run": path.name, "checkpoint": checkpoint,
           "data": "scenes", "commit": None, "metrics": [m.model_dump(mode="json") for m in metrics], **more}
    (path / "eval").mkdir(exist_ok=True)
    (path / "eval" / f"{probe}.json").write_text(json.dumps(doc))
    tensors = {}
    for m in metrics:
        tensors[m.name], tensors[f"{m.name}/weight"] = (np.ascontiguousarray(x, np.float64) for x in m.per_sample)
    about = {**ABOUT, "checkpoint": checkpoint, **(about or {})}
    known = {"about": json.dumps({k: v for k, v in about.items() if v is not None})}
    save_file(tensors, path / "eval" / f"{probe}.samples.safetensors", metadata=known)


def test_a_run_against_its_copy(space):
    """Through the real evaluation: nothing differs, p is 1 everywhere, and the file says so."""
    clone(space, "twin")
    for name in ("demo", "twin"):
        assert run("eval", "--run", name, "--probe", "loss", "--root", space.root, "--device", "cpu", "--quiet").exit_code == 0
    result = run("eval", "--compare", "demo", "twin", "--root", space.root, "--json")
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    figures = doc["pairs"][0]["figures"]
    assert len(figures) >= 16 and {f["p_holm"] for f in figures} == {1.0} and {f["difference"] for f in figures} == {0.0}
    assert {f["verdict"] for f in figures} == {None} and all(f["trained"][0] is not None for f in figures if "->" in f["name"])
    assert doc["base"] == "demo" and doc["samples"] == 8 and doc["groups"] == [["demo", "twin"]]
    assert doc["spreads"] == [], "one seed has no spread"
    file = space.root / "runs" / "compare-demo-vs-twin" / "compare.json"
    assert json.loads(file.read_text()) == {k: v for k, v in doc.items() if k != "file"} and doc["file"] == str(file)
    before = file.read_bytes()
    text = run("eval", "--compare", "demo,twin", "--root", space.root)
    assert f"of {len(figures)} figures 0 better and 0 worse" in text.stdout and file.read_bytes() == before
    assert [p.name for p in space.runs() if "compare" in p.name] == [], "a comparison is no run"


def test_a_known_difference_is_found_and_told_in_the_right_direction(space):
    x = RNG(0).random(8)
    results(clone(space, "a"), {"rgb/ce": x, "audio/ce": x, "rgb/some_acc": x, "only/ce": x})
    noise = RNG(1).normal(size=8) * 1e-3
    results(clone(space, "b"), {"rgb/ce": x + 1 + noise, "audio/ce": x + RNG(2).permutation(np.tile([0.1, -0.1], 4)),
                                "rgb/some_acc": x + 1 + noise, "other/ce": x})
    made, _ = compare(space, ["a", "b"])
    found = {f.name: f for f in made.pairs[0].figures}
    assert found["rgb/ce"].verdict == "a" and found["rgb/some_acc"].verdict == "b", "a lower loss is better, a higher accuracy too"
    assert found["rgb/ce"].difference == pytest.approx(1, abs=1e-3) and found["rgb/ce"].p_holm < 1e-6
    assert found["audio/ce"].verdict is None and found["audio/ce"].p == 1
    results(space.root / "runs" / "a", {"rgb->audio/gain": x}, "fusion")
    results(space.root / "runs" / "b", {"rgb->audio/gain": x + 1 + noise}, "fusion")
    (gain,) = compare(space, ["a", "b"], ["fusion"])[0].pairs[0].figures
    assert gain.differs and gain.verdict is None, "a larger gain is no merit: it may come of knowing less without the source"
    assert made.pairs[0].left_out == {"loss: only/ce": "not measured of 'b'", "loss: other/ce": "not measured of 'a'"}


def test_several_runs_seeds_and_configs(space):
    x = RNG(0).random(8)
    runs = {"s0": {"seed": 0}, "s1": {"seed": 1}, "big": {"train__steps": 9, "seed": 0}}
    for i, (name, settings) in enumerate(runs.items()):
        results(clone(space, name, **settings), {"rgb/ce": x + i})
    made, path = compare(space, ["s0", "s1", "big"])
    assert [p.run for p in made.pairs] == ["s1", "big"] and path.parent.name == "compare-s0-vs-s1-vs-big"
    assert made.groups == [["s0", "s1"], ["big"]] and [r.settings for r in made.runs] == [{"train.steps": s} for s in (4, 4, 9)]
    (spread,) = made.spreads
    assert spread.mean == pytest.approx([x.mean() + 0.5, x.mean() + 2]) and spread.runs == [2, 1]
    assert spread.std[0] == pytest.approx(math.sqrt(0.5)) and spread.std[1] is None
    assert [r.samples_seen for r in made.runs] == [32] * 3 and made.runs[0].parameters > 100
    for i in range(3):
        results(clone(space, f"more{i}"), {"rgb/ce": x})
    assert compare(space, ["s0", "s1", "more0", "more1"])[1].parent.name.startswith("compare-s0-vs-s1-and-2-more-")


def test_what_does_not_compare_is_left_out_and_says_why(space):
    x, a, b = RNG(0).random(8), clone(space, "a"), clone(space, "b")
    results(a, {"rgb/ce": x, "audio/ce": x, "caption/ce": (x, np.ones(8))})
    results(b, {"rgb/ce": x, "audio/ce": x, "caption/ce": (x, np.full(8, 2.0))}, about={"tokens": {"rgb": "b"}})
    results(a, {"rgb->caption/shape_acc": x}, "class")
    results(b, {"rgb->caption/shape_acc": x}, "class", version=2)
    results(b, {"rgb/x": x}, "retrieval")
    made, _ = compare(space, ["a", "b"])
    assert [f.name for f in made.pairs[0].figures] == ["audio/ce"]
    left = made.pairs[0].left_out
    assert left["loss: rgb/ce"] == "tokens of rgb are of different tokenizers"
    assert "asked of other slots" in left["loss: caption/ce"]
    assert "version 1 and 2" in left["class"] and left["retrieval"] == "'a' has no results of it"


@pytest.mark.parametrize("about, more, said", [
    ({"made": "other"}, {}, "different data: 'scenes' made as m and 'scenes' made as other"),
    ({"keys": "other"}, {}, "different samples: keys k and keys other"), ({"samples": 4}, {}, "the first 8 and the first 4"),
    ({"seed": 1}, {}, "different seeds: 0 and 1"), ({}, {"split": "val"}, "different splits: test and val"),
    ({}, {"data": "digits"}, "different data: scenes and digits"), ({"keys": None}, {}, "does not say which samples it is of"),
    ({"checkpoint": "step-00000001"}, {}, "the values beside it of step-00000001"),
])
def test_results_of_other_samples_are_refused(space, about, more, said):
    x = RNG(0).random(8)
    results(clone(space, "a"), {"rgb/ce": x})
    results(clone(space, "b"), {"rgb/ce": x}, about=about, **more)
    with pytest.raises(DataError, match=said) as error:
        compare(space, ["a", "b"])
    assert error.value.hint
    assert not list((space.root / "runs").glob("compare*")), "nothing is written"


def test_results_that_are_missing_or_broken(space):
    x, a, b = RNG(0).random(8), clone(space, "a"), clone(space, "b")
    here = ("--root", space.root)
    results(a, {"rgb/ce": x})
    fails(run("eval", "--compare", "a", "b", *here), 1, "run 'b' has no results to compare", "hint: nano4m eval --run b")
    results(b, {"rgb/ce": x})
    fails(run("eval", "--compare", "a", "b", "--probe", "retrieval", *here), 1, "no results of probe 'retrieval'",
          "nano4m eval --run a --probe retrieval")
    fails(run("eval", "--compare", "a", "b", "--probe", "retreival", *here), 2, "did you mean 'retrieval'")
    fails(run("eval", "--compare", "a", *here), 2, "two runs at least", "known: ")
    fails(run("eval", "--compare", "a", "c", *here), 2, "unknown run 'c'")
    fails(run("eval", "--compare", "a", "b", "--limit", "3", *here), 2, "--limit does not go with --compare")
    fails(run("eval", "--compare", "a", "b", "loss.n=3", *here), 2, "loss.n=3 does not go with --compare")
    beside = b / "eval" / "loss.samples.safetensors"
    whole = beside.read_bytes()
    for broken in (whole[:40], b"", b"\xff" * 100):
        beside.write_bytes(broken)
        fails(run("eval", "--compare", "a", "b", *here), 1, "cannot be read", "nano4m eval --run b --probe loss")
    beside.write_bytes(whole)
    (b / "eval" / "loss.json").write_text('{"probe": ')
    fails(run("eval", "--compare", "a", "b", *here), 1, "cannot be read")
    with pytest.raises(UsageError, match="two runs"):
        compare(space, ["a"])


# -- the published table ----------------------------------------------------------------------------------------------


def test_the_published_table_takes_each_figure_from_its_probe(tmp_path):
    import importlib.util
    from pathlib import Path

    place = Path(__file__).parents[1] / "scripts" / "published_table.py"
    spec = importlib.util.spec_from_file_location("published_table", place)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["published_table"] = module
    spec.loader.exec_module(module)
    (tmp_path / "eval").mkdir()

    def write(probe, **metrics):
        found = [{"name": n, "value": v, "n": k, "ci95": [v / 2, v * 2], "chance": 0.1, "majority": None, "ceiling": None}
                 for n, (v, k) in metrics.items()]
        (tmp_path / "eval" / f"{probe}.json").write_text(json.dumps({"data": "d", "split": "test", "metrics": found}))

    write("loss", **{"rgb/ce": (3.0, 9)})
    write("retrieval", **{"rgb->audio/r5": (0.2, 200), "audio->rgb/r5": (0.1, 200), "rgb->caption/r5": (0.9, 50)})
    write("crossmodal", **{"rgb->depth/token_acc": (0.25, 9), "audio->rgb/shape_acc": (0.5, 9), "audio->rgb/size_acc": (0.4, 9)})
    rows = module.main(tmp_path)
    by_name = {r["name"]: r for r in rows if r["name"]}
    assert by_name["rgb->depth/token_acc"]["ours"] == 25 and by_name["rgb->depth/token_acc"]["published"] == 11.1
    assert by_name["rgb/ce"]["ours"] == 3 and by_name["rgb/ce"]["unit"] == "nats" and by_name["rgb/ce"]["ci95"] == [1.5, 6]
    assert by_name["rgb->audio/r5"]["ours"] == 20, "the best among as many as the published figure was"
    assert {"audio->rgb/shape_acc", "audio->rgb/size_acc"} <= set(by_name)
    assert next(r for r in rows if "PSNR" in r["what"])["missing"] == f"nano4m eval --run {tmp_path.name} --probe tokenizer"
    lines = module.markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2 and len({line.count(" | ") for line in lines if "---" not in line}) == 1

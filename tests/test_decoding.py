"""The probe of decoding: what it measures against literal numbers, its tables and plots, and a tiny run of it."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import fails, run
from workspace_factory import linked, media, one_thread, tiny  # noqa: F401

from nano4m_cli.config import build
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError
from nano4m_cli.probes import _judges, decoding
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._evaluate import listing
from nano4m_cli.probes.decoding import Probe, Task, settings, vendi
from nano4m_cli.registry import PROBES
from nano4m_cli.report._tradeoffs import tables
from nano4m_cli.train.run import open_run

pytestmark = pytest.mark.usefixtures("one_thread")


# -- figures ----------------------------------------------------------------------------------------------------------


def test_vendi_counts_what_differs():
    a, b, c = np.eye(3)
    groups = np.array([[a, a, a, a], [a, a, b, b], [a, b, c, c], [a, 2 * a, 5 * b, b]])
    mixed = np.exp(-(2 * 0.25 * np.log(0.25) + 0.5 * np.log(0.5)))
    assert np.allclose(vendi(groups), [1, 2, mixed, 2])
    assert np.allclose(vendi(np.eye(4)[None]), 4)
    half = np.array([[[1, 0], [np.cos(1.0), np.sin(1.0)]]])  # two samples of cosine c: eigenvalues (1 + c) / 2, (1 - c) / 2
    p = np.array([1 + np.cos(1.0), 1 - np.cos(1.0)]) / 2
    assert np.allclose(vendi(half), np.exp(-(p * np.log(p)).sum()))


def test_settings_are_all_that_differ():
    o = Probe.Options(schemes=("onepass", "ar", "roar", "mean"), steps=(2, 8, 9), temperatures=(0.5, 1), guidance=(1, 3))
    found = [tuple(s.values()) for s in settings(o, 8, True)]
    assert found[:4] == [("onepass", 1, 0.5, 1), ("onepass", 1, 0.5, 3), ("onepass", 1, 1, 1), ("onepass", 1, 1, 3)]
    assert [f for f in found if f[0] == "mean"] == [("mean", 1, 0, 1), ("mean", 1, 0, 3)]
    assert {f[1] for f in found if f[0] == "ar"} == {8} and {f[1] for f in found if f[0] == "roar"} == {2, 8}
    assert len(found) == len(set(found)) == 4 + 4 + 8 + 2
    assert {f[3] for f in (tuple(s.values()) for s in settings(o, 8, False))} == {1}


# -- tables and plots ---------------------------------------------------------------------------------------------------


def metric(what, setting, value, ci95=(0.1, 0.9), higher=True, unit=""):
    name = f"caption->rgb/{what}[{' '.join(map(str, setting.values()))}]"
    return SimpleNamespace(name=name, setting=setting, value=value, ci95=ci95, higher_is_better=higher, unit=unit, n=5)


def some():
    out = []
    for i, (scheme, steps) in enumerate([("roar", 4), ("roar", 8), ("<b>", 8)]):
        for scale in (1.0, 2.5):
            setting = {"scheme": scheme, "steps": steps, "guidance": scale}
            out += [metric("acc", setting, 0.5 + 0.1 * i), metric("vendi_judge", setting, 2 - 0.1 * i),
                    metric("seconds", setting, 0.1 * i + 0.1, None, False, "s")]
    return out


def test_metrics_of_settings_are_laid_out_side_by_side():
    other = SimpleNamespace(name="caption->rgb/acc", setting=None)
    (t,) = tables([other, *some()])
    assert (t.subject, t.keys, t.columns) == ("caption->rgb", ("scheme", "steps", "guidance"), ["acc", "vendi_judge", "seconds"])
    assert [r.setting for r in t.rows][:3] == [("roar", 4, 1.0), ("roar", 4, 2.5), ("roar", 8, 1.0)]
    assert [m.value for m in t.rows[2].cells] == [0.6, 1.9, 0.2]
    assert t.best == [4, 0, 0]  # of equal ones the first; of seconds the least
    assert tables([other]) == []


def test_plots_show_every_setting():
    (t,) = tables(some())
    diversity, seconds = t.plots
    assert (diversity.title, seconds.title) == ("acc over vendi_judge", "acc over seconds")
    for plot in (diversity, seconds):
        assert plot.svg.count("<circle") == 6 and plot.svg.count("hollow") >= 3 and plot.svg.count('class="whisker') == 6
        assert "<b>" not in plot.svg and "&lt;b&gt;" in plot.svg and plot.legend == [("roar", "c0"), ("<b>", "c1")]
        for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot.svg):
            assert 40 < float(x) < 340 and 10 < float(y) < 170
    assert diversity.note == "larger: more steps; hollow: guidance 1; lines: 95 % intervals"


def test_lines_over_candidates():
    found = [metric("acc", {"rank": r, "best of": n}, v) for r in ("cycle", "judge") for n, v in ((1, 0.5), (2, 0.6), (8, 0.7))]
    (t,) = tables(found)
    (plot,) = t.plots
    assert plot.svg.count("<polyline") == 2 and plot.svg.count("<circle") == 6
    assert [n for n in ("1", "2", "8") if f'text-anchor="middle">{n}</text>' in plot.svg] == ["1", "2", "8"]


def test_what_is_missing_is_left_out_of_the_plots():
    found = some()
    found[0].value, found[4].value, found[6].ci95 = None, float("nan"), None
    (t,) = tables(found)
    assert [p.svg.count("<circle") for p in t.plots] == [4, 5] and "nan" not in "".join(p.svg for p in t.plots)
    assert all(p.svg for x in tables([metric("acc", {"a": "b"}, None), metric("seconds", {"a": "b"}, 1.0)]) for p in x.plots)


# -- a run ------------------------------------------------------------------------------------------------------------

SMALL = ["steps=[2,4]", "temperatures=[1]", "guidance=[1,2]", "schemes=[onepass,roar]", "conditions=4", "each=2", "batch=3",
         "best_of=[1,2,4]", "best_conditions=6"]


@pytest.fixture(scope="module")
def space(media, tmp_path_factory):  # noqa: F811
    """The run, and judges of a few steps in a data folder of its own."""
    root = tmp_path_factory.mktemp("decoding")
    shutil.copytree(media.root, root, dirs_exist_ok=True)
    return Workspace(root)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_judges, "STEPS", {"rgb": 4, "audio": 2})


def evaluated(space, *args):
    return run("eval", "--probe", "decoding", *args, "--root", space.root, "--device", "cpu")


def test_a_tiny_run(space):
    result = evaluated(space, *(f"decoding.{s}" for s in SMALL), "decoding.direction=caption->rgb", "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    by_name = {m["name"]: m for m in found["metrics"]}
    assert len(by_name) == len(found["metrics"])
    (choices, ranks) = tables([SimpleNamespace(**m) for m in found["metrics"]])
    guided = open_run(space).directions.get("->rgb", 0) >= 1e-3
    assert len(choices.rows) == (2 + 4) // (1 if guided else 2) and len(ranks.rows) == 9
    assert choices.columns == ["acc", "distinct", "vendi_judge", "seconds", "calls"] and ranks.columns == ["acc"]
    for row in choices.rows:
        acc, distinct, vendi_judge, seconds, calls = row.cells
        assert 0 <= acc.value <= 1 and 1 <= distinct.value <= 2 and 1 <= vendi_judge.value <= 2
        assert seconds.value > 0 and calls.value == row.setting[1] * (1 + (row.setting[3] != 1))
        assert acc.ci95[0] <= acc.value <= acc.ci95[1] and acc.n == 4 and seconds.n == 3
        assert acc.in_distribution is not None
    first = {by_name[f"caption->rgb/acc[{rank} 1]"]["value"] for rank in ("likelihood", "cycle", "judge")}
    assert len(first) == 1, "the best of one is the same by any rank"
    page = (space.root / "runs" / "demo" / "report" / "index.html").read_text()
    assert "acc over vendi_judge" in page and "acc of the best of n" in page and "Bold: the best of its column" in page
    assert page.count('class="card"') == 0, "no card is made of settings"
    assert (space.dataset().judge("rgb-1") / "judge.json").is_file()
    text = evaluated(space, *(f"decoding.{s}" for s in SMALL), "--quiet").stdout
    assert "scheme" in text and "onepass" in text and "best of" in text


def test_the_first_candidate_is_what_is_generated_without_others(space):
    context = Context(open_run(space), "test", 4, 0, lambda *_: None)
    judge = _judges.open_judge(context.dataset, "rgb", context.progress)
    task = Task(context, ["caption"], "rgb", judge, ["shape"])
    options = context.sampling(["rgb"])
    alone, _ = task.make(options, 4, 1, 3)
    many, _ = task.make(options, 4, 3, 2, candidates=True)
    assert np.array_equal(many.ids_BC[::3], alone.ids_BC)
    assert np.array_equal(alone.ids_BC, context.generate(["caption"], ["rgb"], options).ids_BC)
    assert not np.array_equal(many.ids_BC[1::3], alone.ids_BC)
    labels = context.labels[:4]
    assert np.array_equal(task.right(context.raw("rgb"), 1)[1], [len(label["objects"]) for label in labels])


def test_it_runs_only_where_it_is_named(space, monkeypatch):
    assert "decoding" in listing("eval") and PROBES.get("decoding").costly
    monkeypatch.setattr(decoding.Probe, "measure", lambda *a: pytest.fail("it ran"))
    for name in listing("eval"):
        if name != "decoding":
            monkeypatch.setattr(PROBES.get(name), "missing", lambda self, context: "not now")
    monkeypatch.setattr("nano4m_cli.probes._gallery.write_gallery", lambda context, folder: folder)
    result = run("eval", "--root", space.root, "--device", "cpu", "--json")
    assert result.exit_code == 0 and "decoding" not in json.loads(result.stdout)["skipped"]


@pytest.mark.parametrize("setting, said", [
    ("decoding.direction=caption", "is no direction"), ("decoding.direction=rgb->rgb", "is no direction"),
    ("decoding.direction=captoin->rgb", "unknown modality 'captoin'"),
    ("decoding.direction=rgb->depth", "no independent judge sees"),
    ("decoding.steps=[0]", "steps.0"), ("decoding.schemes=[best]", "schemes.0"), ("decoding.temperatures=[]", "temperatures"),
    ("decoding.stepz=3", "did you mean 'steps'"), ("retrieval.n=3", "settings of 'retrieval'"), ("decoding=3", "decoding"),
    ("decoding.each=1", "each"), ("decoding.best_of=[0]", "best_of.0"), ("nonsense", "is not of the form"),
])
def test_settings_that_cannot_be(space, setting, said):
    fails(evaluated(space, setting), 2, said)


def test_settings_of_a_probe_without_any(space):
    fails(run("eval", "--probe", "loss", "loss.n=3", "--root", space.root, "--device", "cpu"), 2, "loss: unknown key 'n'")
    with pytest.raises(ConfigError, match="unknown key"):
        build(PROBES.get("loss").Options, {"n": 3}, "loss")

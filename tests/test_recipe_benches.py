"""The benches of recipes: muP's coordinate check, rates over widths, tokens to a loss."""

import argparse
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from workspace_factory import by_hand, one_thread  # noqa: F401

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def made_up(bench, tmp_path):
    from _reference import make_tokens
    from _widths import SPECS

    return make_tokens(tmp_path, 256, SPECS, classes=8)


def test_slopes_are_exponents(bench):
    from _widths import slope

    assert slope([32, 64, 256], [2 * w**0.75 for w in (32, 64, 256)]) == pytest.approx(0.75)


def test_made_up_tokens_lean_on_their_class(made_up):
    from nano4m_cli.data.loader import TokenData

    ids, length = TokenData(made_up.dataset(), "train", ["rgb", "caption"]).read(range(256))
    agree = (ids[:, None, :16] == ids[None, :, :16]).mean(-1)
    same = agree > 0.3
    assert 1 / 16 < same.mean() < 1 / 4 and agree[same].mean() > 0.6, "8 classes; both of two keep .8"
    text = ids[:, 16:]
    assert all((row[: n - 1] > 0).all() and row[n - 1] == 0 for row, n in zip(text, length[:, 1], strict=True))


def test_with_mup_no_activation_grows_with_the_width(made_up):
    """Adam's steps have the same size per weight at any width: their sum over more inputs grows unless rates shrink."""
    from mup_coordcheck import measure, slopes

    widths, steps = [32, 64, 128], 2
    sizes = {kind: [measure(made_up, kind, widths, 32, 0, steps, 1e-2)] for kind in ("plain", "mup")}
    found = {f["name"]: f["value"] for f in slopes(sizes)}
    blocks = [f"{s}.{i}" for s in ("encoder", "decoder") for i in range(2)]
    for block in blocks:
        assert abs(found[f"plain_{block}_size_t0"]) < 0.1 and abs(found[f"mup_{block}_size_t0"]) < 0.1
        assert abs(found[f"mup_{block}_size_t2"]) < 0.2 and found[f"plain_{block}_size_t2"] > 0.3, (block, found)
        assert abs(found[f"mup_{block}_change_t2"]) < 0.3 and found[f"plain_{block}_change_t2"] > 0.6, (block, found)
    assert found["mup_logits_size_t0"] == pytest.approx(-0.5, abs=0.1) and abs(found["plain_logits_size_t0"]) < 0.1
    assert found["plain_logits_change_t2"] > found["mup_logits_change_t2"] + 0.2
    base = {k: v[32] for k, v in sizes["mup"][0].items()}
    assert base == {k: v[32] for k, v in sizes["plain"][0].items()}, "at the base they are one model"


def test_rates_are_read_off_a_parabola(bench, made_up, tmp_path):
    from _widths import plot
    from mup_transfer import best_rate, measure

    rates = [2.0**-n for n in range(10, 4, -1)]
    table = {(64, r): 1 + (math.log(r) - math.log(0.005)) ** 2 for r in rates} | {(32, r): r for r in rates}
    assert best_rate(table, 64) == pytest.approx(0.005) and best_rate(table, 32) == rates[0]
    table[64, rates[-3]] = math.inf  # a neighbour of the lowest
    assert best_rate(table, 64) == pytest.approx(rates[2])
    args = argparse.Namespace(widths=[32], rates=[1e-4, 1e-2], steps=12, batch=16, base=32, optimizer="adamw")
    losses = measure(made_up, "mup", args, 0)
    assert losses[32, 1e-2] < losses[32, 1e-4] and losses[32, 1e-2] < 4.0 < math.log(64)
    plot(tmp_path / "a" / "p.svg", {"a<b": {"width 32": [(r, v) for (_, r), v in losses.items()]}}, "rate", "loss", False)
    drawn = ET.parse(tmp_path / "a" / "p.svg").getroot()
    assert sum(e.tag.endswith("polyline") for e in drawn) == 1


# -- speedrun ---------------------------------------------------------------------------------------------------------


def test_tokens_to_a_target_lie_between_two_runs(bench):
    from speedrun import Run, reach

    asked = []

    def recipe(share, at_one=3.0, fall=1.0):
        asked.append(share)
        loss = at_one - fall * math.log2(share)
        return Run(int(1024 * share), 10 * share, loss, loss, loss)

    assert reach(recipe, 3.0, 1.0) == pytest.approx((1024, 10)) and asked == [1.0, 0.5]
    asked.clear()
    assert reach(lambda s: recipe(s, 1.5), 3.0, 0.5) == pytest.approx((1024 * 2**-1.5, 10 * 2**-1.5)) and asked == [0.5, 0.25]
    assert reach(lambda s: recipe(s, 2.75), 3.0, 0.5) == pytest.approx((1024 * 2**-0.25, 10 * 2**-0.25)), "above it, all steps"
    assert reach(lambda s: recipe(s, 3.1), 3.0, 0.5) == (math.inf, math.inf)
    assert reach(lambda s: recipe(s, -9.0), 3.0, 0.5) == (64, 0.625), "no more than that can be said of the smallest run"


def test_ratios_with_intervals(bench):
    from speedrun import ratio

    value, low, high = ratio([2.0, 2.0, 4.0])
    assert value == pytest.approx(16 ** (1 / 3))
    half = 4.303 * (2 * math.log(2) / 3 * 0.75**0.5) / 3**0.5  # t times the deviation of log 2, log 2, log 4 over sqrt 3
    assert math.log(high / value) == pytest.approx(half) and math.log(value / low) == pytest.approx(half)
    assert ratio([3.0])[1:] == (0.0, math.inf) and ratio([2.0, 0.0]) == (0.0, 0.0, 0.0)


def test_recipes_are_what_their_names_say(bench):
    from speedrun import DEMO, OPTIONS, RECIPES, settings

    from nano4m_cli.train.config import load_run_config

    course = load_run_config(DEMO, settings("course"))
    c = course.model
    assert (course.train.optimizer, c.mlp, c.norm, c.positions, c.qk_norm) == ("adamw", "gelu", "layernorm", "sincos", False)
    assert course.loss_weights == {} and course.train.ema == 0
    assert [c["type"] for c in course.masking.components] == ["dirichlet"] and course.masking.components[0]["alpha"] == 1.0
    assert load_run_config(DEMO, settings("demo")) == load_run_config(DEMO, [])
    for name in (*RECIPES, *(f"course+{o}" for o in OPTIONS)):
        assert (load_run_config(DEMO, settings(name)) == course) is (name == "course")
    with pytest.raises(SystemExit, match="unknown recipe 'course\\+moun': moun"):
        settings("course+moun")


def test_a_race_is_run_kept_and_told(bench, by_hand, tmp_path, monkeypatch, capsys):  # noqa: F811
    import speedrun

    monkeypatch.setenv("NANO4M_ROOT", str(by_hand.root))
    argv = ["speedrun.py", "--steps", "4", "--seeds", "2", "--rates", "1e-3", "1e-2", "--recipes", "course+muon+rope", "--json",
            "--keep", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr("sys.argv", argv)
    speedrun.main()
    first = capsys.readouterr()
    document = json.loads(first.out)
    figures = {f["name"]: f for f in document["figures"]}
    assert document["bench"] == "speedrun" and {"target", "tokens_ratio", "course_tokens", "course_seconds"} <= set(figures)
    assert figures["course_tokens_ratio"]["value"] == 1.0 and 2 < figures["target"]["value"] < 5
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert all(run["loss"] == pytest.approx((run["any"] + run["one"]) / 2) for _, run in kept)
    same = {(r["tokens"]) for (name, seed, steps, _), r in kept if (seed, steps) == (0, 2)}
    assert len(same) == 1, "one seed, one number of steps: the same samples and masks for all that share masks"
    monkeypatch.setattr(speedrun.Race, "_train", None)  # nothing is run again
    speedrun.main()
    again = capsys.readouterr()
    assert json.loads(again.out)["figures"] == document["figures"] and "tokens " not in again.err


@torch.no_grad()
def test_questions_are_the_same_for_all_and_from_every_side(bench, by_hand, monkeypatch):  # noqa: F811
    """Another recipe, seed and masks: the same slots are asked; by hand the loss of both halves."""
    import numpy as np
    import speedrun

    from nano4m_cli.train.config import load_run_config
    from nano4m_cli.train.loop import Trainer
    from nano4m_cli.train.run import prepare

    asked = []
    real = speedrun.pack
    monkeypatch.setattr(speedrun, "pack", lambda layout, *a: asked.append(a[1:3]) or real(layout, *a))
    for recipe, seed in (("course", 0), ("demo", 3)):
        config = load_run_config(speedrun.DEMO, [*speedrun.settings(recipe), f"seed={seed}"])
        trainer = Trainer(prepare(config, by_hand).task, config.train, seed, None)
        halves = speedrun.questions(trainer)
    for a, b in zip(asked[:2], asked[2:], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    layout = trainer.task.layout
    ids, _ = trainer.task.val.read(np.arange(8))
    for (shown, target), got in zip(asked[2:], halves, strict=True):
        nll = trainer.model.nll(real(layout, ids, shown, target, 1)).numpy()
        m = layout.modality_C[np.nonzero(target)[1]]
        assert got == pytest.approx(float(np.mean([nll[m == i].mean() for i in np.unique(m)])), rel=1e-5)
    shown, target = asked[3]
    sides = [np.add.reduceat(x, layout.start[:-1], axis=1) for x in (shown, target)]
    assert all(((s > 0).sum(1) == 1).all() for s in sides), "one whole modality from another"


def test_a_scaling_law_is_found_again(bench):
    """Losses made by a known law give it back; noise moves it within its intervals."""
    from scaling_law import ahead, with_intervals

    n, d = (x.ravel() for x in np.meshgrid([1e5, 3e5, 1e6, 3e6], [1e5, 3e5, 1e6, 3e6]))
    loss = 1.5 + 40 / n**0.3 + 400 / d**0.5
    exact = with_intervals(n, d, loss)
    assert exact["a"][0] == pytest.approx(0.3, abs=0.02) and exact["b"][0] == pytest.approx(0.5, abs=0.02)
    assert exact["E"][0] == pytest.approx(1.5, abs=0.05) and exact["residual"][0] < 2e-3
    widths = [32, 64, 128, 256]
    assert all(abs(v) < 2e-3 for v, _, _ in ahead(n, d, loss, widths).values()), "the longest runs follow from the others"
    other = loss + 0.5 * (d == d.max()) * (n == 1e6)  # one of them does not
    assert ahead(n, d, other, widths)["ahead_128"][0] == pytest.approx(-0.5, abs=2e-3)
    noisy = with_intervals(n, d, loss + np.random.default_rng(0).normal(0, 0.01, len(n)))
    for name, true, grid in (("a", 0.3, 0.025), ("b", 0.5, 0.025), ("E", 1.5, 0)):  # exponents are points of a grid
        value, low, high = noisy[name]
        assert low - grid <= true <= high + grid and low < high < low + 0.3, (name, noisy)

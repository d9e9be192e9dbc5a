"""The gain of sources: Shapley values against all orders, and predictors whose gains are known."""

import itertools
import math

import numpy as np
import pytest
from predictors import ClassOnly, Marginal, Perfect, Uniform, findings, known_context, make_world
from workspace_factory import one_thread  # noqa: F401

from nano4m_cli.probes._shapley import orders, shapley, subsets

pytestmark = pytest.mark.usefixtures("one_thread")


def random_game(members):
    return {s: np.random.default_rng(i).normal(size=3) for i, s in enumerate(subsets(members))}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shapley_is_the_mean_over_all_orders(count):
    members = list("abcd"[:count])
    game = random_game(members)
    want = {m: 0.0 for m in members}
    every = list(itertools.permutations(members))
    for order in every:
        for k, m in enumerate(order):
            want[m] = want[m] + (game[frozenset(order[: k + 1])] - game[frozenset(order[:k])]) / len(every)
    found = shapley(members, game.__getitem__)
    assert all(np.allclose(found[m], want[m]) for m in members)
    drawn = shapley(members, game.__getitem__, every)
    assert all(np.allclose(drawn[m], want[m]) for m in members)


def test_drawn_orders_add_up_and_come_with_their_reverse():
    members = list("abcdefg")
    drawn = orders(members, 0)
    assert len(drawn) == 16 and drawn[1] == drawn[0][::-1] and all(sorted(o) == members for o in drawn)
    assert orders(members[:5], 0) is None
    game = random_game(members)
    found = shapley(members, game.__getitem__, drawn)
    assert np.allclose(sum(found.values()), game[frozenset(members)] - game[frozenset()])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("known"))


def entropy(world, modality):
    """Mean over slots of the entropy of what a kind holds there, nats: what a model that knows nothing but the kinds pays."""
    ids = world.ids_KC[:, world.layout.slice(modality)]
    return np.mean([-(p := np.unique(c, return_counts=True)[1] / len(c)) @ np.log(p) for c in ids.T])


def test_a_perfect_model_needs_one_source(world):
    """Each modality tells all of the others: the first source gives everything, a second one nothing more."""
    found = findings("fusion", Perfect(world))
    for target in ("rgb", "audio"):
        everything = entropy(world, target)
        for source in {"rgb", "audio", "caption"} - {target}:
            m = found.metrics[f"{source}->{target}/gain"]
            assert m.value == pytest.approx(everything, abs=1e-4) and m.in_distribution and m.unit == "nats"
            assert found.metrics[f"{source}->{target}/gain_last"].value == pytest.approx(0, abs=1e-4)
            assert found.metrics[f"{source}->{target}/gain_shapley"].value == pytest.approx(everything / 2, abs=1e-4)
    assert found.metrics["audio+caption->rgb/synergy"].value == pytest.approx(-entropy(world, "rgb"), abs=1e-4)
    assert found.metrics["rgb+audio->caption/gain"].value > 0.1
    grid = found.plots["gain"]
    assert grid.rows == grid.columns == ["rgb", "audio", "caption"] and grid.values[0][0] is None
    assert grid.values[1][0] == found.metrics["audio->rgb/gain"].value
    assert set(found.plots) == {"gain", "gain_last", "gain_shapley"}


@pytest.mark.parametrize("model", [Uniform, Marginal])
def test_a_model_that_looks_at_nothing_gains_nothing(world, model):
    for name, m in findings("fusion", model(world)).metrics.items():
        assert m.value == pytest.approx(0, abs=1e-5) and m.ci95[0] <= 1e-5 and m.ci95[1] >= -1e-5, name


def test_a_model_that_knows_the_class_gains_the_class(world):
    """A slot that says the class costs log 8 without, nothing with; one that says the member costs log 8 either way."""
    found = findings("fusion", ClassOnly(world)).metrics
    ids, kinds = world.ids_KC[:, world.layout.slice("rgb")], world.class_K
    inside = [np.mean([-(p := np.unique(c[kinds == g], return_counts=True)[1] / 8) @ np.log(p) for g in range(8)]) for c in ids.T]
    gain = entropy(world, "rgb") - np.mean(inside)
    assert gain >= math.log(8) / 6
    assert found["audio->rgb/gain"].value == pytest.approx(gain, abs=1e-4)


def test_sets_that_training_never_posed_are_flagged(world):
    one = {"components": [{"type": "directed", "sources": [1.0]}]}  # one whole source, never two, never none
    found = findings("fusion", Perfect(world), known_context(Perfect(world), masking=one))
    assert not any(m.in_distribution for m in found.metrics.values())
    assert "->rgb" in found.notes[2] and "audio+caption->rgb" in found.notes[2]

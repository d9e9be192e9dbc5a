"""The figures of probes: intervals that cover, chance that is counted, ranks that ties cannot flatter."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from nano4m_cli.data.sources.scenes import Source, draw
from nano4m_cli.probes._result import Metric, mean_metric, ratio_interval
from nano4m_cli.probes.linear import ridge_classifier
from nano4m_cli.probes.retrieval import best_rank, ceiling_at, chance_at

# -- intervals ----------------------------------------------------------------------------------------------------


def test_ratio_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits, widths, trials, n, p = np.random.default_rng(0), 0, [], 150, 80, 0.3
    for t in range(trials):
        x = rng.random(n) < p
        value, (low, high) = ratio_interval(x, np.ones(n), seed=t)
        assert value == x.mean() and low <= value <= high
        hits += low <= p <= high
        widths.append(high - low)
    assert 0.88 <= hits / trials <= 0.99, hits / trials
    assert np.isclose(np.mean(widths), 2 * 1.96 * np.sqrt(p * (1 - p) / n), rtol=0.08)


def test_ratio_interval_takes_samples_whole():
    """Ten pixels of one sample are not ten samples."""
    x = np.random.default_rng(0).random(50)
    _, (low, high) = ratio_interval(10 * x, np.full(50, 10.0))
    _, (low1, high1) = ratio_interval(x, np.ones(50))
    assert (low, high) == pytest.approx((low1, high1))


def test_ratio_interval_weighs_by_the_bottom():
    value, (low, high) = ratio_interval(np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert value == 2.5 and (low, high) == (1.0, 3.0), "two samples: each alone at the ends"


def test_ratio_interval_reproduces_and_survives_nothing():
    x = np.random.default_rng(1).random(30)
    assert ratio_interval(x, np.ones(30)) == ratio_interval(x, np.ones(30))
    assert ratio_interval(x, np.ones(30), seed=1)[1] != ratio_interval(x, np.ones(30))[1]
    value, interval = ratio_interval(np.zeros(4), np.zeros(4))
    assert math.isnan(value) and all(map(math.isnan, interval))
    value, (low, high) = ratio_interval(np.array([2.0, 0, 0]), np.array([4.0, 0, 0]))
    assert value == low == high == 0.5, "resamples without any weight are left out"


def test_mean_metric():
    m = mean_metric("a->b/acc", [1, 0, 1, 1], chance=0.25, higher_is_better=False)
    assert (m.name, m.value, m.n, m.chance, m.higher_is_better) == ("a->b/acc", 0.75, 4, 0.25, False)
    assert m.ci95[0] <= 0.75 <= m.ci95[1]
    weighted = mean_metric("x/y", [1.0, 5.0, 100.0], [3.0, 1.0, 0.0])
    assert weighted.value == 2.0 and weighted.n == 2
    empty = mean_metric("x/y", [3.0], [0.0])
    assert empty.value is None and empty.ci95 is None and empty.n == 0, "no value is None, never NaN: results are JSON"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_never_holds_what_json_cannot(bad):
    m = Metric(name="x/y", value=bad, n=1, ci95=(0.0, bad), chance=bad, ceiling=bad)
    assert m.value is None and m.ci95 is None and m.chance is None and m.ceiling is None


# -- retrieval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, right, k", [(6, 1, 1), (6, 1, 3), (6, 2, 1), (6, 2, 3), (6, 3, 5), (6, 0, 2), (6, 6, 1), (4, 1, 9), (5, 4, 2)]
)
def test_chance_equals_enumeration(n, right, k):
    draws = list(itertools.combinations(range(n), min(k, n)))
    want = sum(any(i < right for i in d) for d in draws) / len(draws)
    relevant = np.zeros((2, n), dtype=bool)
    relevant[0, :right] = relevant[1, n - right :] = True
    assert chance_at(relevant, k) == pytest.approx([want, want])


def test_chance_is_per_query():
    relevant = np.array([[True, False, False, False], [True, True, False, False]])
    assert chance_at(relevant, 1).tolist() == [0.25, 0.5]


def slow_rank(score, relevant) -> int:
    """Go through the candidates, wrong ones first among equals, until a right one comes."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], relevant[i]))
    return next(r for r, i in enumerate(order, 1) if relevant[i])


def test_best_rank_equals_a_slow_count_with_many_ties():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 4, (300, 9)).astype(float)
    relevant = rng.random((300, 9)) < 0.3
    relevant[np.arange(300), rng.integers(0, 9, 300)] = True
    assert best_rank(score, relevant).tolist() == [
        slow_rank(s, r) for s, r in zip(score.tolist(), relevant.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    "score, relevant, want",
    [
        ([3, 2, 1], [1, 0, 0], 1),
        ([3, 2, 1], [0, 0, 1], 3),
        ([2, 2, 2], [1, 0, 0], 3),  # a model that says the same of all is last, not first
        ([2, 2, 2], [1, 1, 0], 2),
        ([5, 1, 4], [0, 1, 1], 2),
        ([-np.inf, -np.inf, 0], [1, 0, 0], 3),
        ([1, 2], [0, 0], 3),
    ],
)
def test_best_rank_literal(score, relevant, want):
    assert best_rank(np.array([score], dtype=float), np.array([relevant], dtype=bool))[0] == want


def test_best_rank_of_nan_is_not_the_best():
    assert best_rank(np.array([[np.nan, 1.0, 2.0]]), np.array([[True, False, False]]))[0] == 3
    assert best_rank(np.full((1, 3), np.nan), np.array([[True, False, False]]))[0] == 3


def test_random_scores_reach_chance():
    rng = np.random.default_rng(0)
    score, relevant = rng.random((4000, 20)), np.zeros((4000, 20), dtype=bool)
    relevant[np.arange(4000), rng.integers(0, 20, 4000)] = True
    for k in (1, 5):
        hit, chance = (best_rank(score, relevant) <= k).mean(), chance_at(relevant, k).mean()
        assert abs(hit - chance) < 5 * np.sqrt(chance * (1 - chance) / 4000)


# -- linear readout -----------------------------------------------------------------------------------------------


def clouds(n: int, seed: int, apart: float = 4.0):
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(99).normal(size=(3, 12)) * apart / 3
    y = rng.integers(0, 3, n)
    return centre[y] + rng.normal(size=(n, 12)), y


def test_ridge_separates_clouds():
    x, y = clouds(300, 0)
    z, truth = clouds(300, 1)
    assert (ridge_classifier(x, y, z, 3) == truth).mean() > 0.95


def test_ridge_equals_its_normal_equations():
    x, y = clouds(60, 0, 1.0)
    z, _ = clouds(20, 1, 1.0)
    scaled, scaled_z = (x - x.mean(0)) / (x.std(0) + 1e-6), (z - x.mean(0)) / (x.std(0) + 1e-6)
    score = np.zeros((20, 3))
    for c in range(3):  # as augmented least squares: min |Xw - t|^2 + |w|^2
        t = (y == c) - (y == c).mean()
        w = np.linalg.lstsq(np.vstack([scaled, np.eye(12)]), np.concatenate([t, np.zeros(12)]), rcond=None)[0]
        score[:, c] = scaled_z @ w + (y == c).mean()
    assert ridge_classifier(x, y, z, 3).tolist() == score.argmax(1).tolist()


def test_ridge_does_not_depend_on_the_scale_of_a_feature():
    x, y = clouds(200, 0)
    z, _ = clouds(100, 1)
    scale, shift = 10.0 ** np.linspace(-2, 3, 12), np.arange(12.0)
    assert (ridge_classifier(x * scale + shift, y, z * scale + shift, 3) == ridge_classifier(x, y, z, 3)).all()


def test_ridge_on_noise_is_near_chance_and_constant_features_do_no_harm():
    rng = np.random.default_rng(0)
    x, z, y, truth = (
        rng.normal(size=(500, 8)),
        rng.normal(size=(2000, 8)),
        rng.integers(0, 4, 500),
        rng.integers(0, 4, 2000),
    )
    assert abs((ridge_classifier(x, y, z, 4) == truth).mean() - 0.25) < 0.05
    x, y = clouds(200, 0)
    z, truth = clouds(200, 1)
    add = lambda a: np.concatenate([a, np.full((len(a), 2), 7.0)], 1)  # noqa: E731
    assert (ridge_classifier(add(x), y, add(z), 3) == ridge_classifier(x, y, z, 3)).all()


def test_ridge_with_a_class_that_never_occurs():
    x, y = clouds(200, 0)
    z, truth = clouds(100, 1)
    assert (ridge_classifier(x, y, z, 5) == truth).mean() > 0.9


@pytest.mark.parametrize("source, target", [("audio", "rgb"), ("caption", "rgb"), ("depth", "audio")])
def test_the_ceiling_of_retrieval_is_what_a_perfect_reader_of_labels_reaches(source, target):
    """A reader that knows every attribute both show, and guesses among samples alike in them."""
    options = Source.Options()
    info, n = Source(options, None).info(), 60
    labels = [{"objects": [vars(b) for b in draw(options, "test", i).bodies]} for i in range(n)]
    context = SimpleNamespace(info=info, labels=labels)
    shared = sorted(set(info.determined[source]) & set(info.determined[target]))
    kind = np.array([" / ".join(" ".join(o[a] for a in shared) for o in l["objects"]) for l in labels])
    rng = np.random.default_rng(0)
    for k in (1, 5):
        draws = [(best_rank((kind[:, None] == kind) + rng.random((n, n)), np.eye(n, dtype=bool)) <= k).mean() for _ in range(400)]
        ceiling = ceiling_at(context, source, target, n, k)
        assert ceiling == pytest.approx(np.mean(draws), abs=0.01)
        assert k > 1 or 1 / n < ceiling < 1


def test_retrieval_has_no_ceiling_where_more_than_labels_is_shared():
    info = Source(Source.Options(), None).info()
    assert ceiling_at(SimpleNamespace(info=info, labels=[]), "rgb", "depth", 0, 1) is None
    by_class = info.model_copy(update={"pairing": "class"})
    assert ceiling_at(SimpleNamespace(info=by_class, labels=[]), "audio", "rgb", 0, 1) is None

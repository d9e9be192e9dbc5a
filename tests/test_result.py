"""The figures of probes: intervals that cover, chance that is counted, ranks that ties cannot flatter."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from nano4m_cli.data.sources.scenes import Source, draw
from nano4m_cli.probes._classes import confusion, hit_at, rounded
from nano4m_cli.probes._result import Metric, mean_metric, ratio_interval
from nano4m_cli.probes._significance import holm, permutation_p
from nano4m_cli.probes.linear import ridge_classifier
from nano4m_cli.probes.retrieval import Hits, ceiling_at, missed

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
    assert 1 - missed(np.array([n]), np.array([right]), np.array([k])) == pytest.approx([want])


def test_chance_is_per_group():
    hits = Hits(np.zeros((4, 4)), np.array([0, 1, 1, 2]))
    assert hits.chance(1).tolist() == [0.25, 0.5, 0.25]
    assert hits.chance(None) == pytest.approx([np.mean(1 / np.arange(1, 5)), (1 / 1 * 3 + 1 / 2 * 2 + 1 / 3) / 6, 25 / 48])


def slow(score, relevant, k):
    """Go through every order of equal scores: (share of orders with a right one among the first k, mean reciprocal rank)."""
    ranks = []
    for shuffled in itertools.permutations(range(len(score))):
        order = sorted(shuffled, key=lambda i: -score[i])  # stable
        ranks.append(next(r for r, i in enumerate(order, 1) if relevant[i]))
    return np.mean([r <= k for r in ranks]), np.mean([1 / r for r in ranks])


def test_hits_equal_all_orders_of_equal_scores():
    """Every query against every group, many ties."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        score, group = rng.integers(0, 3, (6, 6)).astype(float), np.array([0, 0, 1, 2, 2, 2])
        hits = Hits(score, group)
        for q, g in itertools.product(range(6), range(3)):
            for k in (1, 2, 4):
                want, reciprocal = slow(score[q].tolist(), (group == g).tolist(), k)
                assert hits.at(k)[q, g] == pytest.approx(want)
            assert hits.reciprocal()[q, g] == pytest.approx(reciprocal)


@pytest.mark.parametrize(
    "score, group, k, want",
    [
        ([3, 2, 1], [0, 1, 1], 1, 1.0),
        ([3, 2, 1], [1, 1, 0], 1, 0.0),
        ([2, 2, 2], [0, 1, 1], 1, 1 / 3),  # a model that says the same of all is right by chance, never more
        ([2, 2, 2], [0, 0, 1], 1, 2 / 3),
        ([np.nan, 1, 2], [0, 1, 1], 1, 0.0),  # NaN is not the best
        ([np.nan, np.nan, np.nan], [0, 1, 1], 2, 2 / 3),
        ([-np.inf, -np.inf, 0], [0, 1, 1], 2, 0.5),
    ],
)
def test_hits_literal(score, group, k, want):
    assert Hits(rounded(np.array([score], dtype=float)), np.array(group)).at(k)[0, 0] == pytest.approx(want)


def test_random_scores_reach_chance():
    rng = np.random.default_rng(0)
    for k in (1, 5):
        found = [Hits(rng.random((40, 40)), np.arange(40)).at(k)[np.arange(40), np.arange(40)].mean() for _ in range(100)]
        assert abs(np.mean(found) - k / 40) < 5 * np.sqrt(k / 40 * (1 - k / 40) / 4000)


# -- significance -------------------------------------------------------------------------------------------------


def test_permutation_p_equals_all_permutations():
    rng = np.random.default_rng(1)
    for _ in range(4):
        table = rng.random((6, 6)) < 0.4
        sums = [sum(table[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6))]
        exact = np.mean(np.array(sums) >= np.trace(table))
        assert permutation_p(table) == pytest.approx(exact, rel=0.5, abs=2e-3)


def test_permutation_p_of_nothing_is_flat_and_of_a_perfect_ranking_tiny():
    rng = np.random.default_rng(0)
    p = [permutation_p(rng.random((40, 40)) < 0.1) for _ in range(60)]
    assert 0.3 < np.mean(np.array(p) < 0.5) < 0.75 and np.mean(np.array(p) < 0.05) <= 0.15
    assert 0 < permutation_p(np.eye(100)) < 1e-7 and permutation_p(np.full((30, 30), 0.2)) == 1


def test_the_bound_holds_where_both_can_be_had():
    """Chatterjee's bound never lies below the share of permutations that reach a sum."""
    rng = np.random.default_rng(2)
    table = (rng.random((30, 30)) < 0.05).astype(float)
    sums = np.array([table[np.arange(30), rng.permutation(30)].sum() for _ in range(4000)])
    mean = table.sum() / 30
    for t in (1, 2, 3, 4):
        assert (sums - mean >= t).mean() <= 2 * np.exp(-t**2 / (4 * mean + 2 * t))


def test_holm():
    assert holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0] and holm(np.array([0.2])).tolist() == [0.2]
    assert holm(np.array([])).tolist() == []


# -- choices ------------------------------------------------------------------------------------------------------


def test_choices_count_ties_at_expectation():
    score = np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert hit_at(score, np.array([1, 1, 0])).tolist() == pytest.approx([0.5, 0, 1 / 3])
    assert hit_at(score, np.array([0, 1, 2]), 2).tolist() == pytest.approx([0, 0.5, 2 / 3])
    by_rounding = hit_at(score + 1e-9 * np.arange(3), np.array([2, 1, 2]))
    assert by_rounding.tolist() == pytest.approx([0.5, 0, 1 / 3])
    table = confusion(score, np.array([1, 1, 0]))
    assert table[0] == pytest.approx([1 / 3] * 3) and table[1] == pytest.approx([0.5, 0.25, 0.25]) and np.isnan(table[2]).all()


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
        draws = [Hits((kind[:, None] == kind) + rng.random((n, n)), np.arange(n)).at(k).trace() / n for _ in range(400)]
        ceiling = ceiling_at(context, source, target, n, k)
        assert ceiling == pytest.approx(np.mean(draws), abs=0.01)
        assert k > 1 or 1 / n < ceiling < 1


def test_retrieval_has_no_ceiling_where_more_than_labels_is_shared():
    info = Source(Source.Options(), None).info()
    assert ceiling_at(SimpleNamespace(info=info, labels=[]), "rgb", "depth", 0, 1) is None
    by_class = info.model_copy(update={"pairing": "class"})
    assert ceiling_at(SimpleNamespace(info=by_class, labels=[]), "audio", "rgb", 0, 1) is None

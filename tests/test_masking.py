"""Masks against slow obvious references: budgets, disjointness, frequencies, and independence of the batch."""

import math

import numpy as np
import pytest

from nano4m_cli.errors import ConfigError
from nano4m_cli.masking._base import Key, share
from nano4m_cli.masking._mixture import MaskingConfig, Mixture, direction
from nano4m_cli.masking._slots import choose_slots
from nano4m_cli.masking.directed import Component as Directed
from nano4m_cli.masking.dirichlet import Component as Dirichlet
from nano4m_cli.spec import Layout, TokenSpec

NAMES = ["a", "b", "c", "d"]


def key(n: int, seed: int = 0) -> Key:
    return Key(seed, "mask", np.arange(n))


# -- share --------------------------------------------------------------------------------------------------------


def slow_share(total: int, weight: list[float], room: list[int]) -> list[int]:
    """One sample, step by step: fill what cannot hold its part, split the rest again, then largest remainders."""
    m = len(room)
    out = [0] * m
    goal = min(total, sum(room))
    while True:
        left = goal - sum(out)
        w = [weight[i] if room[i] > out[i] else 0.0 for i in range(m)]
        if sum(w) <= 0:
            w = [float(room[i] - out[i]) for i in range(m)]
        ideal = [left * w[i] / sum(w) if sum(w) > 0 else 0.0 for i in range(m)]
        if not any(math.floor(ideal[i]) > room[i] - out[i] for i in range(m)):
            break
        for i in range(m):
            if ideal[i] >= room[i] - out[i]:
                out[i] = room[i]
    base = [min(math.floor(ideal[i] + 1e-9), room[i] - out[i]) for i in range(m)]
    rest = [ideal[i] - base[i] for i in range(m)]
    out = [o + b for o, b in zip(out, base, strict=True)]
    while sum(out) < goal:
        for i in sorted(range(m), key=lambda i: -rest[i]):
            if sum(out) < goal and out[i] < room[i]:
                out[i] += 1
    return out


def share_cases(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 40, (n, 4)) * (rng.random((n, 4)) < 0.8)
    weight = rng.dirichlet([0.5] * 4, n) * (rng.random((n, 4)) < 0.9)
    total = rng.integers(0, 100, n)
    return total, weight, room


def alone(total, weight, room):
    return np.stack([share(total[i : i + 1], weight[i : i + 1], room[i : i + 1])[0] for i in range(len(total))])


def test_share_one_by_one_equals_the_slow_reference():
    total, weight, room = share_cases(1500)
    got = alone(total, weight, room)
    for i in range(len(total)):
        assert got[i].tolist() == slow_share(int(total[i]), weight[i].tolist(), room[i].tolist()), i


@pytest.mark.parametrize("seed", range(3))
def test_share_is_exact_and_within_room(seed):
    total, weight, room = share_cases(4000, seed)
    out = share(total, weight, room)
    assert out.dtype == np.int64
    assert (out >= 0).all() and (out <= room).all()
    assert (out.sum(1) == np.minimum(total, room.sum(1))).all()
    spare = (weight > 0) & (room > out)  # who has a weight and still room
    starved = (weight == 0) & (out > 0)
    assert not (spare.any(1) & starved.any(1)).any(), "no weight, no slots, while one with a weight has room"


def test_share_is_proportional_where_room_is_ample():
    rng = np.random.default_rng(0)
    weight, total = rng.dirichlet([1.0] * 5, 3000), rng.integers(0, 300, 3000)
    out = share(total, weight, np.full((3000, 5), 300))
    assert (np.abs(out - total[:, None] * weight) < 1).all()


@pytest.mark.parametrize(
    "total, weight, room, want",
    [
        (10, [1, 1], [100, 100], [5, 5]),
        (10, [3, 1], [100, 100], [8, 2]),
        (10, [1, 1], [2, 100], [2, 8]),
        (10, [1, 0], [4, 100], [4, 6]),
        (10, [0, 0], [10, 30], [3, 7]),
        (7, [1, 1, 1], [100, 100, 100], [3, 2, 2]),
        (500, [1, 2, 3], [5, 6, 7], [5, 6, 7]),
        (0, [1, 2], [5, 5], [0, 0]),
        (5, [1, 1], [0, 0], [0, 0]),
    ],
)
def test_share_literal(total, weight, room, want):
    assert share(np.array([total]), np.array([weight], dtype=float), np.array([room]))[0].tolist() == want


def test_share_of_a_sample_does_not_depend_on_its_neighbours():
    total, weight, room = share_cases(4000)
    together, single = share(total, weight, room), alone(total, weight, room)
    assert (together != single).any(1).sum() == 0


def test_share_literal_neighbour():
    weight, room, total = [0.305, 0.5, 0.195], [99, 99, 1], 10
    crowded = ([1.0, 0.0, 0.0], [1, 5, 5], 9)
    one = share(np.array([total]), np.array([weight]), np.array([room]))[0]
    two = share(np.array([total, crowded[2]]), np.array([weight, crowded[0]]), np.array([room, crowded[1]]))[0]
    assert one.tolist() == two.tolist()


# -- dirichlet ----------------------------------------------------------------------------------------------------


def dirichlet(**options) -> Dirichlet:
    return Dirichlet(Dirichlet.Options(**options), NAMES)


def test_dirichlet_budgets_are_met_exactly():
    length = np.random.default_rng(0).integers(0, 60, (3000, 4))
    length[:, 2] += 1
    shown, asked = dirichlet(alpha=0.3, input=(20, 20), target=(30, 30)).counts(length, key(3000))
    total = length.sum(1)
    assert (shown.sum(1) == np.minimum(20, total - 1)).all()
    assert (asked.sum(1) == np.minimum(30, total - shown.sum(1))).all()
    assert (asked.sum(1) >= 1).all() and (shown + asked <= length).all()


def test_dirichlet_budgets_are_uniform():
    length = np.full((20_000, 4), 100)
    shown, asked = dirichlet(input=(5, 9), target=(1, 4)).counts(length, key(20_000))
    for sums, low, high in ((shown.sum(1), 5, 9), (asked.sum(1), 1, 4)):
        n = high - low + 1
        counts = np.bincount(sums - low, minlength=n)
        assert len(counts) == n and (abs(counts - 20_000 / n) < 5 * np.sqrt(20_000 / n)).all()
    assert abs(np.corrcoef(shown.sum(1), asked.sum(1))[0, 1]) < 0.04


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_marginals(alpha):
    """Each share has mean 1/M and variance (M - 1) / (M^2 (M alpha + 1))."""
    n, m, budget = 20_000, 4, 1000
    length = np.full((n, m), 5000)
    shown, asked = dirichlet(alpha=alpha, input=(budget, budget), target=(budget, budget)).counts(length, key(n))
    var = (m - 1) / (m**2 * (m * alpha + 1))
    for counts in (shown, asked):
        part = counts / budget
        assert np.allclose(part.mean(0), 1 / m, atol=5 * np.sqrt(var / n))
        assert np.allclose(part.var(0), var, rtol=0.06)
    assert abs(np.corrcoef(shown[:, 0], asked[:, 0])[0, 1]) < 0.04, "input and target are drawn apart"


def test_low_alpha_is_nearly_single_source_and_targets_have_their_own_alpha():
    n = 5000
    length = np.full((n, 4), 200)
    shown, asked = dirichlet(alpha=0.01, target_alpha=100.0, input=(50, 50), target=(80, 80)).counts(length, key(n))
    single = ((shown > 0).sum(1) == 1).mean()
    reference = (np.round(50 * np.random.default_rng(0).dirichlet([0.01] * 4, n)) > 0).sum(1) == 1
    assert single > 0.85 and abs(single - reference.mean()) < 0.025
    assert (abs(asked - 20) <= 12).mean() > 0.99


def test_missing_modalities_take_nothing_and_their_part_goes_to_the_others():
    n = 4000
    length = np.tile([50, 0, 50, 0], (n, 1))
    shown, asked = dirichlet(input=(40, 40), target=(30, 30)).counts(length, key(n))
    assert (shown[:, [1, 3]] == 0).all() and (asked[:, [1, 3]] == 0).all()
    assert (shown.sum(1) == 40).all() and (asked.sum(1) == 30).all()


@pytest.mark.parametrize("length", [[1, 0, 0, 0], [2, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
def test_dirichlet_of_almost_nothing(length):
    shown, asked = dirichlet().counts(np.tile(length, (500, 1)), key(500))
    assert (asked.sum(1) >= 1).all() and (shown.sum(1) == sum(length) - 1).all() and (shown + asked <= length).all()


@pytest.mark.parametrize("options", [{"input": (0, 4)}, {"target": (5, 4)}, {"alpha": 0}, {"target_alpha": -1}])
def test_dirichlet_refuses_impossible_options(options):
    with pytest.raises(ValueError):
        Dirichlet.Options(**options)


# -- directed -----------------------------------------------------------------------------------------------------


def directed(**options) -> Directed:
    return Directed(Directed.Options(**options), NAMES)


LENGTH = np.array([12, 20, 7, 30])


def parts(shown, asked, length):
    """Return (target, sources) per sample: the target is what is asked; sources are shown whole and not asked."""
    out = []
    for s, a, n in zip(shown.tolist(), asked.tolist(), length.tolist(), strict=True):
        target = [i for i in range(len(n)) if a[i] > 0]
        out.append((target, [i for i in range(len(n)) if s[i] > 0 and i not in target and s[i] == n[i]]))
        assert all(s[i] in (0, n[i]) for i in range(len(n)) if i not in target), "a source is shown whole"
    return out


def near(count: int, n: int, p: float):
    return abs(count - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)) + 1e-9


def test_directed_frequencies_match_the_weights():
    n = 20_000
    source, target = {"a": 0.5, "b": 0.3, "c": 0.2}, {"b": 0.6, "d": 0.4}
    length = np.tile(LENGTH, (n, 1))
    shown, asked = directed(source=source, target=target, known=0.0).counts(length, key(n))
    got = parts(shown, asked, length)
    assert all(len(t) == 1 and len(s) == 1 for t, s in got)
    for t, p in ((1, 0.6), (3, 0.4)):
        rows = [s[0] for (u,), s in got if u == t]
        assert near(len(rows), n, p)
        weights = {i: w for i, w in ((0, 0.5), (1, 0.3), (2, 0.2)) if i != t}
        for i, w in weights.items():
            assert near(rows.count(i), len(rows), w / sum(weights.values())), (t, i)
    assert (asked.sum(1) == np.where(asked[:, 1] > 0, 20, 30)).all(), "with nothing known the whole target is asked"


def test_number_of_sources_matches_its_probabilities():
    n = 20_000
    length = np.tile(LENGTH, (n, 1))
    shown, asked = directed(sources=[0.5, 0.3, 0.2], known=0.0).counts(length, key(n))
    number = [len(s) for _, s in parts(shown, asked, length)]
    assert all(near(number.count(k + 1), n, p) for k, p in enumerate([0.5, 0.3, 0.2]))
    shown, asked = directed(sources=[0, 0, 0, 0, 0, 1], known=0.0).counts(length, key(n))
    assert {len(s) for _, s in parts(shown, asked, length)} == {3}, "never more than there are"


def test_known_part_of_the_target_is_uniform_and_the_rest_is_asked():
    n = 20_000
    length = np.tile(LENGTH, (n, 1))
    shown, asked = directed(source={"a": 1}, target={"d": 1}, known=0.25, max_target=1000).counts(length, key(n))
    part = shown[:, 3]
    assert (part + asked[:, 3] == 30).all() and part.max() == 29
    assert near((part == 0).sum(), n, 0.75 + 0.25 / 30)
    counts = np.bincount(part, minlength=30)[1:]
    assert (abs(counts - n * 0.25 / 30) < 5 * np.sqrt(n * 0.25 / 30)).all()


def test_known_may_differ_from_target_to_target():
    n = 20_000
    length = np.tile(LENGTH, (n, 1))
    both = directed(source={"a": 1}, target={"c": 1, "d": 1}, known={"c": 1.0, "a": 0.3}, max_target=1000)
    shown, asked = both.counts(length, key(n))
    for m, wanted in ((2, 1.0), (3, 0.5)):  # one that is not named: a half
        rows = asked[:, m] > 0
        nothing = 1 - wanted + wanted / LENGTH[m]
        assert near((shown[rows, m] == 0).sum(), rows.sum(), nothing), (m, (shown[rows, m] == 0).mean(), nothing)


def test_max_target_cuts_what_is_asked():
    length = np.tile(LENGTH, (2000, 1))
    shown, asked = directed(target={"d": 1}, known=0.5, max_target=9).counts(length, key(2000))
    assert (asked[:, 3] == np.minimum(9, 30 - shown[:, 3])).all() and asked[:, 3].max() == 9


def test_extra_may_be_asked_with_a_probability_each():
    length = np.tile([6, 10, 8, 5], (20_000, 1))
    shown, asked = directed(known=0.0, target={"a": 1}, source={"b": 1}, extra={"c": 0.25, "d": 1.0}).counts(length, key(20_000))
    assert set(np.unique(asked[:, 2])) == {0, 8} and (asked[:, 3] == 5).all() and (shown[:, 1] == 10).all()
    assert (asked[:, 2] == 8).mean() == pytest.approx(0.25, abs=0.012)  # four standard errors
    with pytest.raises(ValueError, match="between 0 and 1"):
        directed(extra={"c": 1.5})


def test_extra_is_asked_whole_unless_shown():
    length = np.tile(LENGTH, (5000, 1))
    shown, asked = directed(known=0.5, extra=["c"], max_target=1000).counts(length, key(5000))
    whole, is_source = asked[:, 2] == 7, shown[:, 2] == 7
    is_target = (shown[:, [0, 1, 3]] == length[:, [0, 1, 3]]).sum(1) == 1
    assert ((whole | is_source) | (asked[:, 2] + shown[:, 2] == 7)).all()
    assert (is_source & (asked[:, 2] == 0)).any() and whole.any()
    others = asked[:, [0, 1, 3]].sum(1) > 0
    assert (whole[others & ~is_source]).all(), "asked as well, whole"
    assert (asked[is_source, 2] == 0).all()
    assert is_target.any()


def test_drop_hides_the_sources():
    n = 10_000
    length = np.tile(LENGTH, (n, 1))
    shown, asked = directed(drop=0.3, known=0.0).counts(length, key(n))
    assert near((shown.sum(1) == 0).sum(), n, 0.3) and (asked.sum(1) > 0).all()
    shown, _ = directed(drop=1.0, known=0.0).counts(length, key(n))
    assert shown.sum() == 0


def test_directed_uses_only_what_a_sample_has():
    rng = np.random.default_rng(0)
    n = 6000
    length = rng.integers(1, 30, (n, 4)) * (rng.random((n, 4)) < 0.5)
    length[np.arange(n), rng.integers(0, 4, n)] = 11  # one at least
    for options in (
        {},
        {"target": {"a": 1.0}},
        {"source": {"b": 1.0}, "target": {"a": 0.5, "c": 0.5}},
        {"extra": ["d"], "sources": [0, 1]},
    ):
        shown, asked = directed(**options).counts(length, key(n))
        assert (asked.sum(1) > 0).all(), options
        assert (shown + asked <= length).all() and (shown >= 0).all() and (asked >= 0).all()
        if options.get("target"):
            names = [i for i, name in enumerate(NAMES) if name in options["target"]]
            have = (length[:, names] > 0).any(1)
            assert (asked[have][:, names].sum(1) > 0).all(), "a wanted target is asked where it is there"
            assert (asked[have].sum(1) == asked[have][:, names].sum(1)).all()


@pytest.mark.parametrize("length", [[0, 0, 1, 0], [1, 1, 0, 0], [0, 2, 0, 0]])
def test_directed_of_almost_nothing(length):
    shown, asked = directed(target={"d": 1}).counts(np.tile(length, (300, 1)), key(300))
    assert (asked.sum(1) >= 1).all() and (shown + asked <= length).all()


@pytest.mark.parametrize(
    "options",
    [
        {"known": 1.5},
        {"known": {"a": 0.5, "b": -0.1}},
        {"drop": -0.1},
        {"source": {"a": -1.0}},
        {"target": {"a": 0.0}},
        {"sources": []},
        {"sources": [0.0]},
    ],
)
def test_directed_refuses_impossible_options(options):
    with pytest.raises(ValueError):
        Directed.Options(**options)


@pytest.mark.parametrize("most", [0, -1])
def test_directed_refuses_to_ask_nothing(most):
    with pytest.raises(ValueError):
        Directed.Options(max_target=most)


def test_directed_refuses_unknown_modalities():
    for options in ({"source": {"e": 1}}, {"target": {"e": 1}}, {"extra": ["e"]}, {"known": {"e": 0.5}}):
        with pytest.raises(ConfigError, match="'e' is not in this run"):
            directed(**options)


def test_directed_shows_something_where_a_sample_has_two_modalities():
    length = np.tile(LENGTH, (2000, 1))
    shown, _ = directed(source={"a": 1.0}, known=0.0).counts(length, key(2000))
    assert (shown.sum(1) > 0).all()


# -- slots --------------------------------------------------------------------------------------------------------

GRID = TokenSpec(modality="g", kind="grid", shape=(6, 8), vocab_size=5)
VIDEO = TokenSpec(modality="v", kind="grid", shape=(3, 4, 4), vocab_size=5)
CODES = TokenSpec(modality="s", kind="codes", shape=(12, 4), vocab_size=5)
TEXT = TokenSpec(modality="t", kind="sequence", shape=(48,), vocab_size=5, eos=1)
CASES = [(p, s) for p in ("random", "span", "block", "prefix") for s in (GRID, VIDEO, CODES)] + [("prefix", TEXT)]


def slot_case(spec, n=800, seed=0):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 49, n) if spec.kind == "sequence" else np.full(n, 48)
    shown = rng.integers(0, length + 1)
    asked = rng.integers(0, length - shown + 1)
    return length, shown, asked


@pytest.mark.parametrize("pattern, spec", CASES, ids=lambda v: getattr(v, "modality", v))
def test_slots_are_disjoint_exact_and_inside(pattern, spec):
    length, n_shown, n_asked = slot_case(spec)
    shown, asked = choose_slots(pattern, spec, length, n_shown, n_asked, key(800))
    assert shown.dtype == asked.dtype == bool and shown.shape == asked.shape == (800, 48)
    assert not (shown & asked).any()
    assert (shown.sum(1) == n_shown).all() and (asked.sum(1) == n_asked).all()
    assert not ((shown | asked) & (np.arange(48) >= length[:, None])).any()


@pytest.mark.parametrize("pattern, spec", CASES, ids=lambda v: getattr(v, "modality", v))
def test_slots_of_a_sample_do_not_depend_on_its_neighbours(pattern, spec):
    length, n_shown, n_asked = slot_case(spec)
    counter = np.random.default_rng(1).permutation(5000)[:800]
    whole = choose_slots(pattern, spec, length, n_shown, n_asked, Key(0, "m", counter))
    rows = np.random.default_rng(2).permutation(800)[:100]
    part = choose_slots(pattern, spec, length[rows], n_shown[rows], n_asked[rows], Key(0, "m", counter[rows]))
    assert all(np.array_equal(w[rows], p) for w, p in zip(whole, part, strict=True))


def test_random_slots_are_uniform():
    n = 8000
    shown, asked = choose_slots("random", GRID, np.full(n, 48), np.full(n, 12), np.full(n, 24), key(n))
    for mask, p in ((shown, 0.25), (asked, 0.5)):
        assert (abs(mask.sum(0) - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()
    assert abs((shown[:, 0] & shown[:, 1]).mean() - 12 / 48 * 11 / 47) < 0.015


@pytest.mark.parametrize("spec", [CODES, GRID], ids=["codes", "grid"])
def test_span_is_one_run_that_starts_on_a_whole_frame(spec):
    n, q = 3000, spec.codebooks
    n_asked = np.random.default_rng(0).integers(1, 41, n)
    n_shown = np.random.default_rng(1).integers(0, 49 - n_asked)
    shown, asked = choose_slots("span", spec, np.full(n, 48), n_shown, n_asked, key(n))
    starts = []
    for i in range(n):
        at = np.flatnonzero(asked[i])
        assert at[-1] - at[0] + 1 == n_asked[i], "contiguous"
        assert at[0] % q == 0, "a whole frame"
        starts.append(int(at[0]))
        # Shown slots are those nearest to the run: nothing hidden lies nearer than something shown.
        distance = [max(at[0] - s, s - at[-1]) for s in range(48)]
        seen = [distance[s] for s in range(48) if shown[i, s]]
        hidden = [distance[s] for s in range(48) if not shown[i, s] and not asked[i, s]]
        assert not seen or not hidden or max(seen) <= min(hidden)
    both = (shown[:, 0] & shown[:, 47]).any() and shown[:, 0].any() and shown[:, 47].any()
    assert both and 0 in starts and any(s + a == 48 for s, a in zip(starts, n_asked, strict=True)), (
        "both directions and infill"
    )


def test_span_of_whole_frames_ends_on_one():
    _, asked = choose_slots("span", CODES, np.full(500, 48), np.zeros(500, int), np.full(500, 12), key(500))
    frames = asked.reshape(500, 12, 4)
    assert (frames.all(2) == frames.any(2)).all() and (frames.all(2).sum(1) == 3).all()
    first = np.bincount(frames.all(2).argmax(1), minlength=10)
    assert len(first) == 10 and (abs(first - 50) < 36).all(), "every start is as likely"


@pytest.mark.parametrize("spec", [GRID, VIDEO], ids=["2d", "3d"])
def test_block_asks_what_is_nearest_to_a_centre(spec):
    n = 300
    n_asked = np.random.default_rng(0).integers(1, 40, n)
    _, asked = choose_slots("block", spec, np.full(n, 48), np.zeros(n, int), n_asked, key(n))
    position = spec.positions()
    for i in range(n):
        inside = position[asked[i]]
        box = inside.max(0) - inside.min(0) + 1
        shape = np.array((1, *spec.shape) if len(spec.shape) == 2 else spec.shape)
        # A filled block: its bounding box, cut by the borders, is no larger than a cube of the same count needs.
        side = next(r for r in range(1, 50) if np.prod(np.minimum(shape, r)) >= n_asked[i])
        assert (box <= np.minimum(shape, 2 * side)).all(), (box, n_asked[i])
        core = ((position > inside.min(0)) & (position < inside.max(0)) | (shape == 1)).all(1)
        assert asked[i][
            core & (np.abs(position - (inside.max(0) + inside.min(0)) / 2).max(1) < 0.5 * (box.min() - 2))
        ].all()
    whole = asked.sum(0)
    assert (whole > 0).all(), "every place is reached"


def test_prefix():
    shown, asked = choose_slots("prefix", TEXT, np.array([10, 48, 3]), np.array([4, 0, 3]), np.array([6, 5, 0]), key(3))
    assert np.flatnonzero(shown[0]).tolist() == [0, 1, 2, 3] and np.flatnonzero(asked[0]).tolist() == [4, 5, 6, 7, 8, 9]
    assert not shown[1].any() and np.flatnonzero(asked[1]).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(shown[2]).tolist() == [0, 1, 2] and not asked[2].any()


# -- mixture ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five() -> Layout:
    return Layout(
        [
            TokenSpec(modality="rgb", kind="grid", shape=(4, 4), vocab_size=9),
            TokenSpec(modality="depth", kind="grid", shape=(4, 4), vocab_size=9),
            TokenSpec(modality="audio", kind="codes", shape=(8, 2), vocab_size=9),
            TokenSpec(modality="caption", kind="sequence", shape=(12,), vocab_size=9, eos=1),
        ]
    )


MIX = MaskingConfig(
    components=[
        {"type": "directed", "weight": 0.5, "sources": [0.7, 0.3], "known": 0.4, "extra": ["caption"], "drop": 0.1},
        {"type": "dirichlet", "weight": 0.25, "alpha": 0.5, "input": (4, 24), "target": (4, 24)},
        {"type": "dirichlet", "weight": 0.25, "alpha": 0.02, "input": (1, 60), "target": (1, 60)},
    ],
    slots={"rgb": "block", "audio": "span"},
)


def lengths(n: int, missing: float = 0.2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    length = np.stack([np.full(n, 16), np.full(n, 16), np.full(n, 16), rng.integers(2, 13, n)], 1)
    drop = rng.random((n, 4)) < missing
    drop[np.arange(n), rng.integers(0, 4, n)] = False
    return np.where(drop, 0, length)


def test_draw_is_disjoint_inside_and_never_empty(five):
    length = lengths(5000)
    shown, asked = Mixture(MIX, five).draw(length, key(5000))
    slot = np.concatenate([np.arange(s.slots) for s in five.specs])
    inside = slot < length[:, five.modality_C]
    assert shown.dtype == asked.dtype == bool and shown.shape == (5000, five.columns)
    assert not (shown & asked).any() and not ((shown | asked) & ~inside).any()
    assert asked.any(1).all()


def test_the_known_part_of_a_text_is_its_beginning(five):
    length = lengths(5000)
    shown, asked = Mixture(MIX, five).draw(length, key(5000))
    text = five.slice("caption")
    some = 0
    for s, a in zip(shown[:, text], asked[:, text], strict=True):
        n, m = int(s.sum()), int(a.sum())
        assert s[:n].all() and a[n : n + m].all()
        some += n > 0 and m > 0
    assert some > 100


def test_components_are_drawn_per_sample_with_their_weights(five):
    config = MaskingConfig(
        components=[
            {"type": "directed", "weight": 3, "source": {"rgb": 1}, "target": {"depth": 1}, "known": 0.0},
            {"type": "directed", "weight": 1, "source": {"audio": 1}, "target": {"caption": 1}, "known": 0.0},
            {"type": "dirichlet", "weight": 0},
        ]
    )
    n = 10_000
    shown, _ = Mixture(config, five).draw(lengths(n, 0.0), key(n))
    rgb = shown[:, five.slice("rgb")].all(1)
    assert near(int(rgb.sum()), n, 0.75) and (shown[~rgb][:, five.slice("audio")].all())
    assert near(int((rgb[1:] == rgb[:-1]).sum()), n - 1, 0.75**2 + 0.25**2), "samples are independent"


def test_a_sample_s_mask_does_not_depend_on_its_batch(five):
    demo = {"type": "dirichlet", "weight": 0.5, "input": (4, 48), "target": (4, 40)}
    mixture, n = Mixture(MaskingConfig(components=[MIX.components[0], demo]), five), 1500
    length = lengths(n, 0.0)
    whole = mixture.draw(length, key(n))
    order = np.random.default_rng(0).permutation(n)
    bad = 0
    for rows in [order[a : a + 64] for a in range(0, n, 64)] + [np.array([i]) for i in range(700)]:
        part = mixture.draw(length[rows], Key(0, "mask", rows))
        bad += sum(not np.array_equal(w[rows], p) for w, p in zip(whole, part, strict=True))
    assert bad == 0


def test_a_directed_sample_s_mask_does_not_depend_on_its_batch(five):
    mixture = Mixture(MIX.model_copy(update={"components": MIX.components[:1]}), five)
    length = lengths(600)
    whole = mixture.draw(length, key(600))
    for rows in (np.arange(300, 600), np.random.default_rng(0).permutation(600), np.array([17])):
        part = mixture.draw(length[rows], Key(0, "mask", rows))
        assert all(np.array_equal(w[rows], p) for w, p in zip(whole, part, strict=True))


def test_seeds_and_counters_give_other_masks(five):
    mixture, length = Mixture(MIX, five), lengths(200, 0.0)
    base = mixture.draw(length, key(200))[1]
    assert (mixture.draw(length, key(200, 1))[1] != base).any(1).mean() > 0.9
    assert (mixture.draw(length, Key(0, "mask", np.arange(200, 400)))[1] != base).any(1).mean() > 0.9
    assert (mixture.draw(length, Key(0, "other", np.arange(200)))[1] != base).any(1).mean() > 0.9
    assert np.array_equal(mixture.draw(length, key(200))[1], base)


def test_two_components_of_one_type_draw_apart(five):
    item = {"type": "dirichlet", "weight": 1, "input": (8, 40), "target": (8, 40)}
    length = lengths(400, 0.0)
    one = Mixture(MaskingConfig(components=[item, {**item, "weight": 0}]), five).draw(length, key(400))[0]
    two = Mixture(MaskingConfig(components=[{**item, "weight": 0}, item]), five).draw(length, key(400))[0]
    assert (one != two).any(1).mean() > 0.9


def test_simulate_equals_a_count_by_hand(five):
    mixture, n = Mixture(MIX, five), 1200
    length = lengths(500)
    report = mixture.simulate(length, seed=3, samples=n)
    repeated = length[np.arange(n) % 500]
    shown, asked = mixture.draw(repeated, Key(3, "mask", np.arange(n)))
    names = five.names
    found: dict[str, int] = {}
    single = full_source = 0
    for i in range(n):
        s = {name: int(shown[i, five.slice(name)].sum()) for name in names}
        a = {name: int(asked[i, five.slice(name)].sum()) for name in names}
        size = dict(zip(names, repeated[i].tolist(), strict=True))
        for target in names:
            others = [o for o in names if o != target and s[o] > 0]
            if a[target] > 0 and all(s[o] == size[o] for o in others):
                name = direction(others, target, names)
                found[name] = found.get(name, 0) + 1
        single += len([o for o in names if s[o] > 0 and a[o] == 0]) == 1
        full_source += any(s[o] == size[o] > 0 and a[o] == 0 for o in names)
    assert report.directions == {name: count / n for name, count in found.items()} and len(found) > 15
    assert list(report.directions.values()) == sorted(report.directions.values(), reverse=True)
    assert report.samples == n
    assert report.single_source == single / n and report.full_source == full_source / n
    assert np.isclose(report.used, (shown.sum() + asked.sum()) / repeated.sum())
    assert np.isclose(report.encoder_tokens, shown.sum() / n) and np.isclose(report.decoder_tokens, asked.sum() / n)
    for m, name in enumerate(names):
        assert np.isclose(report.visible[name], shown[:, five.slice(name)].sum() / repeated[:, m].sum())
        assert np.isclose(report.asked[name], asked[:, five.slice(name)].sum() / repeated[:, m].sum())


def test_direction_names_follow_the_run_s_order():
    assert direction(["c", "a"], "b", NAMES) == "a+c->b"


@pytest.mark.parametrize(
    "config, said",
    [
        ({"components": [{"weight": 1}]}, "'type' is missing"),
        ({"components": [{"type": "dirichlet", "weight": -1}]}, "weight is negative"),
        ({"components": [{"type": "dirichlet", "weight": 0}]}, "all weights are zero"),
        ({"components": [{"type": "dirichlet", "alpa": 1}]}, "masking.components.0: unknown key 'alpa'"),
        ({"slots": {"rbg": "span"}}, "modality 'rbg' is not in this run"),
        ({"slots": {"caption": "random"}}, "only 'prefix' fits"),
    ],
)
def test_configs_that_cannot_be(five, config, said):
    with pytest.raises(ConfigError, match=said):
        Mixture(MaskingConfig(**config), five)

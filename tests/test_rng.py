"""Stateless randomness: the same counters give the same numbers, and the numbers are what they claim to be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nano4m_cli import rng

PINNED = [12866409154877627294, 16833041404675244172, 1947062069302717788]
PINNED_NONE = 17991801014178540869


def test_bits_are_pinned():
    """Every data set, mask and sample depends on these numbers: a change of them is a change of everything."""
    assert [int(b) for b in rng.bits(0, "mask", np.arange(3))] == PINNED
    assert int(rng.bits(0, "mask")) == PINNED_NONE


def slow_bits(seed, stream, *counters) -> int:
    """SplitMix64's finaliser over a chain of counters, in Python integers."""
    import hashlib

    golden, m1, m2, full = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * m1) & full
        x = ((x ^ (x >> 27)) * m2) & full
        return x ^ (x >> 31)

    state = mix(
        (int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little") + golden) & full
    )
    for c in counters:
        state = mix(state ^ mix((c + golden) & full))
        state = mix((state + golden) & full)
    return state


def test_bits_equal_the_slow_hash():
    got = rng.bits(7, "a/b", np.arange(4)[:, None], np.array([0, 5, 10**12]))
    assert got.dtype == np.uint64 and got.shape == (4, 3)
    for i in range(4):
        for j, c in enumerate((0, 5, 10**12)):
            assert int(got[i, j]) == slow_bits(7, "a/b", i, c)


def test_a_part_of_a_batch_gets_the_same_numbers():
    whole = rng.uniform(3, "s", np.arange(100)[:, None], np.arange(5))
    assert np.array_equal(rng.uniform(3, "s", np.arange(40, 60)[:, None], np.arange(5)), whole[40:60])
    assert float(rng.uniform(3, "s", 17, 2)) == whole[17, 2]


def test_seed_stream_and_counters_all_matter():
    base = rng.bits(0, "a", np.arange(50), 1)
    for other in (
        rng.bits(1, "a", np.arange(50), 1),
        rng.bits(0, "b", np.arange(50), 1),
        rng.bits(0, "a", np.arange(50), 2),
        rng.bits(0, "a", 1, np.arange(50)),
        rng.bits(0, "a", np.arange(50)),
    ):
        assert (other != base).sum() >= 49
    assert len(np.unique(rng.bits(0, "a", np.arange(300)[:, None], np.arange(300)))) == 300 * 300


def test_numbers_do_not_depend_on_the_process():
    code = (
        "from nano4m_cli import rng; "
        "print(int(rng.bits(5, 'x', 1, 2)), rng.permutation(6, 5, 'p', 1).tolist(), rng.torch_seed(5, 'x'))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(rng.__file__).parents[1])},
    )
    assert out.stdout.split(maxsplit=1)[0] == str(int(rng.bits(5, "x", 1, 2)))
    assert f"{rng.permutation(6, 5, 'p', 1).tolist()} {rng.torch_seed(5, 'x')}" in out.stdout


def test_uniform_is_uniform():
    u = rng.uniform(0, "u", np.arange(200_000))
    assert u.dtype == np.float64 and 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    counts = np.bincount((u * 64).astype(int), minlength=64)
    chi2 = ((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum()
    assert 28 < chi2 < 115, chi2  # 63 degrees of freedom: both tails beyond 4.5 sigma
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


def test_uniform_never_reaches_its_ends(monkeypatch):
    for word, side in ((0, "low"), (2**64 - 1, "high")):
        monkeypatch.setattr(rng, "bits", lambda *a, w=word: np.full(1, w, dtype=np.uint64))
        assert 0 < float(rng.uniform(0, "x")[0]) < 1, side


def test_normal_is_normal():
    x = rng.normal(0, "n", np.arange(100_000))
    assert abs(x.mean()) < 0.015 and abs(x.std() - 1) < 0.01
    for z, p in ((-1.0, 0.15866), (0.0, 0.5), (1.0, 0.84134), (2.0, 0.97725)):
        assert abs((x < z).mean() - p) < 0.006
    assert abs((x**3).mean()) < 0.05 and abs((x**4).mean() - 3) < 0.15


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_gamma_variates_have_the_right_moments(alpha):
    n = 60_000
    x = np.exp(rng.log_gamma_variates(np.float64(alpha), 1, "g", np.arange(n)))
    assert abs(x.mean() - alpha) < 5 * np.sqrt(alpha / n)
    fourth = 3 * alpha**2 + 6 * alpha  # fourth central moment of Gamma(alpha, 1)
    assert abs(((x - alpha) ** 2).mean() - alpha) < 5 * np.sqrt((fourth - alpha**2) / n)
    if alpha == 1.0:  # the exponential distribution
        assert abs((x < np.log(2)).mean() - 0.5) < 0.01


def test_gamma_variates_of_tiny_alpha_stay_finite_as_logs():
    x = rng.log_gamma_variates(np.float64(1e-3), 1, "g", np.arange(5000))
    assert np.isfinite(x).all() and x.min() < -750  # exp of that underflows
    # log Gamma(alpha) ~ log(U) / alpha for tiny alpha: its median is log(1/2) / alpha.
    assert abs(np.median(x) / (np.log(0.5) / 1e-3) - 1) < 0.1


def test_permutation_is_one_and_differs_by_counter():
    p = rng.permutation(1000, 0, "order", 4)
    assert p.dtype == np.int64 and sorted(p.tolist()) == list(range(1000))
    assert np.array_equal(p, rng.permutation(1000, 0, "order", 4))
    assert (p == rng.permutation(1000, 0, "order", 5)).sum() < 20
    first = np.array([rng.permutation(6, 0, "f", e)[0] for e in range(3000)])
    assert (abs(np.bincount(first, minlength=6) - 500) < 100).all()
    assert len(rng.permutation(0, 0, "x")) == 0


def test_generator_is_keyed():
    a, b = rng.generator(1, "g", 2).random(5), rng.generator(1, "g", 2).random(5)
    assert np.array_equal(a, b) and not np.array_equal(a, rng.generator(1, "g", 3).random(5))


def test_torch_seed_fits():
    seeds = {rng.torch_seed(0, "t", i) for i in range(200)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)


def test_marks_choose_every_place_and_pair_alike():
    """The lowest entries of a row are a random choice: every place and every pair of places as often as any other."""
    b, n = 40_000, 9
    mark = rng.marks(3, "slot", np.arange(b), n)
    assert mark.dtype == np.uint32 and mark.shape == (b, n)
    assert np.array_equal(mark[100:200], rng.marks(3, "slot", np.arange(100, 200), n))  # a sample's own, whatever its batch
    assert not np.array_equal(mark[:100], rng.marks(3, "other", np.arange(100), n))
    assert np.array_equal(mark[:, :4], rng.marks(3, "slot", np.arange(b), 4))  # and whatever follows
    rank = np.argsort(np.argsort(mark, axis=1), axis=1)
    lowest = np.bincount(np.argmin(mark, 1), minlength=n)
    assert (np.abs(lowest - b / n) < 4.5 * np.sqrt(b / n)).all(), lowest
    chosen = rank < 3
    together = (chosen[:, :, None] & chosen[:, None, :]).sum(0)[np.triu_indices(n, 1)]
    expected = b * 3 / n * 2 / (n - 1)
    assert (np.abs(together - expected) < 4.5 * np.sqrt(expected)).all(), together
    bit = (mark[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert (np.abs(bit.mean(0) - 0.5) < 5 * 0.5 / np.sqrt(b)).all()
    # Neighbouring counters and places do not follow each other.
    u = mark / 2.0**32
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.01

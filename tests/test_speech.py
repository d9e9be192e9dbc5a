"""Speech: word errors, alignments, cepstral distance and alignment in time, against slow or literal ones."""

import functools
import math
import sys
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
from test_cli import fails, run
from workspace_factory import media, one_thread, tiny  # noqa: F401 - fixtures

from nano4m_cli.data.sources._base import Transcript
from nano4m_cli.errors import UsageError
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.probes import _speech as speech
from nano4m_cli.probes import _speech_sound as sound
from nano4m_cli.probes.tts import partners

# -- transcripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, want", [
    ("the digit five, spoken by a man with a Greek accent", "five"),
    ("the digit , spoken by", ""),
    ("the digit five", "five"),
    ("five, spoken by a man, spoken by", "five"),
    ("a large cube", "a large cube"),
    ("", ""),
])
def test_words_between_marks(text, want):
    assert speech.spoken(text, Transcript(before="the digit ", after=", spoken by")) == want


def test_a_transcript_without_marks_is_the_whole_text():
    assert speech.spoken("any words, spoken by", Transcript()) == "any words, spoken by"


@pytest.mark.parametrize("name, text, want", [
    ("basic", "  It's  'Two' CATS,\nno\u2014dogs! 1,000 \ufb01ve d\u2019accord", "it's two cats no dogs 1 000 five d'accord"),
    ("basic", "?!", ""),
    ("basic", "caf\u00e9 \u4f60\u597d", "caf\u00e9 \u4f60\u597d"),
    ("none", " It's  TWO. ", "It's TWO."),
    ("english", "um, Three won't do", "3 will not do"),
])
def test_normalisation(name, text, want):
    assert speech.normaliser(name)(text) == want


# -- errors -----------------------------------------------------------------------------------------------------------


@functools.cache
def slow_distance(a, b):
    """The least number of edits, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b[1:]) + (a[0] != b[0]), slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


def test_errors_are_those_of_a_slow_edit_distance():
    rng = np.random.default_rng(0)
    some = lambda least: " ".join(rng.choice(list("abc"), rng.integers(least, 6)))  # noqa: E731
    said, heard = [some(1) for _ in range(60)], [some(0) for _ in range(60)]
    for of, units in (("words", str.split), ("characters", list)):
        e = speech.errors(said, heard, of)
        assert e.total.tolist() == [slow_distance(tuple(units(s)), tuple(units(h))) for s, h in zip(said, heard, strict=True)]
        assert e.length.tolist() == [len(units(s)) for s in said]
        assert (e.length - e.deletions + e.insertions).tolist() == [len(units(h)) for h in heard]
    assert speech.corpus_rate(said, heard) == pytest.approx(jiwer.wer(said, heard))
    assert speech.corpus_rate(said, heard, "characters") == pytest.approx(jiwer.cer(said, heard))


@pytest.mark.parametrize("heard, wer, counts", [
    (["one two", "three"], 0.0, (0, 0, 0)),
    (["", ""], 1.0, (0, 3, 0)),
    (["one two three four", "three"], 2 / 3, (0, 0, 2)),
    (["two one", "four"], 1.0, None),
    (["one", "three"], 1 / 3, (0, 1, 0)),
    (["one ten", "three"], 1 / 3, (1, 0, 0)),
])
def test_known_answers(heard, wer, counts):
    said = ["one two", "three"]
    e = speech.errors(said, heard)
    metric = speech.rate("audio->caption/wer", e.total, e.length)
    assert metric.value == pytest.approx(wer, abs=1e-6) and metric.n == 2 and not metric.higher_is_better
    assert counts is None or (e.substitutions.sum(), e.deletions.sum(), e.insertions.sum()) == counts
    values, weights = metric.per_sample
    assert (values * weights).sum() / weights.sum() == pytest.approx(wer)


def test_the_rate_is_a_ratio_of_sums_with_a_bootstrap_interval():
    counts, length = np.array([0, 1, 0, 4]), np.array([1, 2, 1, 8])
    metric = speech.rate("x", counts, length)
    assert metric.value == pytest.approx(5 / 12, abs=1e-6)
    rng = np.random.default_rng(1)
    draws = [counts[i].sum() / length[i].sum() for i in rng.integers(0, 4, (20000, 4))]
    assert metric.ci95 == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)


def test_empty_references_belong_to_no_rate():
    e = speech.errors(["", "a b"], ["x y", "a"])
    assert (e.insertions.tolist(), e.length.tolist()) == ([2, 0], [0, 2])
    metric = speech.rate("x", e.total, e.length)
    assert (metric.value, metric.n) == (0.5, 1)
    assert speech.rate("x", np.array([2]), np.array([0])).value is None and math.isnan(speech.corpus_rate([""], ["a"]))


def test_readers_that_hear_nothing():
    said = ["one", "two", "three", "two"]
    other, commonest = speech.guesses(said, ["two", "one", "two"], 0)
    assert sorted(other) == sorted(said) and commonest == ["two"] * 4
    assert speech.corpus_rate(said, commonest) == 0.5
    unlike = [f"w{i}" for i in range(50)]
    assert speech.corpus_rate(unlike, speech.guesses(unlike, [], 0)[0]) == 1.0, "never its own"
    assert speech.guesses(["a"], [], 3) == (["a"], [""])
    # Words drawn alike: another utterance's is right as often as two draws agree.
    digits = [str(d) for d in np.random.default_rng(0).integers(0, 10, 4000)]
    assert speech.corpus_rate(digits, speech.guesses(digits, [], 0)[0]) == pytest.approx(0.9, abs=0.02)


# -- alignments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, heard, want", [
    ("one two three", "one two three", "one two three"),
    ("one two three", "one ten three", "one two>ten three"),
    ("one two", "one", "one -two"),
    ("one", "one six seven", "one +six +seven"),
    ("one two", "", "-one -two"),
    ("", "one", "+one"),
    ("", "", ""),
])
def test_alignment_in_one_line(said, heard, want):
    assert speech.aligned(said, heard) == want


def test_steps_spell_both_sides():
    rng = np.random.default_rng(2)
    for _ in range(50):
        said, heard = (" ".join(rng.choice(list("abcd"), rng.integers(1, 7))) for _ in range(2))
        pairs = speech.steps(said, heard)
        assert " ".join(a for a, _ in pairs if a) == said and " ".join(b for _, b in pairs if b) == heard
        assert sum(a != b for a, b in pairs) == speech.errors([said], [heard]).total[0]


def test_examples_are_the_first_and_the_worst():
    said = ["a b"] * 20
    heard = ["a b"] * 9 + ["a", "c d e", "a b"] + ["x b"] * 8
    plot = speech.examples("x", "t", [f"k{i}" for i in range(20)], said, heard)
    assert plot.rows[:8] == [f"first: k{i}" for i in range(8)]
    assert plot.rows[8:] == ["worst: k10"] + ["worst: k9"] + [f"worst: k{i}" for i in range(12, 18)]
    assert plot.values[8] == ["a b", "c d e", speech.aligned("a b", "c d e"), 3.0, 2.0]
    assert len(speech.examples("x", "t", ["k"], ["a"], ["a"]).rows) == 1, "what is right is not among the worst"


def test_confusions():
    plot = speech.confusions("x", ["one two", "one", "two"], ["one ten", "two", "two six"], most=2)
    assert (plot.rows, plot.columns) == (["one", "two"], ["one", "two", "other", "left out"])
    assert plot.values == [[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]]


# -- sound ------------------------------------------------------------------------------------------------------------


def voice(seed: int, seconds: float = 0.7) -> np.ndarray:
    """A buzz whose resonances glide, as vowels do, with silence around it."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    out = np.zeros(len(t))
    for _ in range(3):
        a, b = rng.uniform(300, 3500, 2)
        centre = a + (b - a) * t / seconds
        for h in range(1, 35):
            out += np.exp(-(((110 * h - centre) / 150) ** 2)) * np.sin(2 * np.pi * 110 * h * t)
    out *= 0.2 / np.abs(out).max()
    return np.pad(out + 1e-5 * rng.normal(size=len(t)), 2400).astype(np.float32)


def test_silence_at_both_ends_is_cut():
    wave = voice(0)
    cut = sound.trimmed(wave)
    assert abs(len(cut) / RATE - 0.7) < 0.02 and np.array_equal(sound.trimmed(3 * wave), 3 * cut)
    assert not len(sound.trimmed(np.zeros(5000, np.float32))) and not len(sound.trimmed(np.zeros(0, np.float32)))
    assert sound.seconds(wave) == pytest.approx(len(cut) / RATE)


def test_cepstra_are_the_cosine_series_of_the_log_spectrum():
    """Their distance is the root mean square difference in dB of log spectra that hold 13 cosines and no more."""
    a, b = sound.cepstra(voice(1))[60], sound.cepstra(voice(2))[60]
    k = (np.arange(4000) + 0.5) / 4000 * np.pi
    smooth = lambda c: sum(c[d] * np.cos((d + 1) * k) for d in range(13)) * 20 / math.log(10)  # noqa: E731 - dB
    direct = np.sqrt(np.mean((smooth(a) - smooth(b)) ** 2))
    assert 10 / math.log(10) * math.sqrt(2 * ((a - b) ** 2).sum()) == pytest.approx(direct, rel=1e-3) and direct > 2


def test_distance_of_the_same_sound_is_zero():
    wave = voice(0)
    assert sound.mcd(wave, wave) == 0.0
    assert sound.mcd(0.3 * wave, wave) == pytest.approx(0.0, abs=1e-3), "the level does not count"
    assert sound.mcd(np.pad(wave, (4800, 0)), np.pad(wave, (0, 4800))) == pytest.approx(0.0, abs=1e-3), "nor when it begins"
    between = sound.mcd(np.pad(wave, (4860, 0)), wave)  # frames fall between the other's
    assert 0 < between < sound.mcd(voice(1), wave) / 4


def test_distance_grows_with_what_differs():
    wave, rng = voice(0), np.random.default_rng(0)
    slower = np.interp(np.arange(0, len(wave), 0.93), np.arange(len(wave)), wave)
    noisy = [wave + level * rng.normal(size=len(wave)) for level in (0.0003, 0.01)]
    near = [sound.mcd(w, wave) for w in (slower, *noisy)]
    assert near[0] < sound.mcd(voice(1), wave) / 2 and 0 < near[1] < near[2]
    assert sound.mcd(voice(1), wave) == pytest.approx(sound.mcd(wave, voice(1)), rel=0.02)


def test_distance_to_silence_is_not_a_number():
    silent, wave = np.zeros(9000, np.float32), voice(0)
    assert math.isnan(sound.mcd(silent, wave)) and math.isnan(sound.mcd(wave, silent)) and math.isnan(sound.mcd(silent, silent))
    assert math.isfinite(sound.mcd(wave[5000:5200], wave)), "shorter than a frame"


def slow_align(cost):
    """The least sum over all monotone paths, by trying each (path, sum)."""

    def go(i, j):
        if i == j == 0:
            return [[(0, 0)]]
        back = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        return [path + [(i, j)] for a, b in back if a >= 0 and b >= 0 for path in go(a, b)]

    return min(sum(cost[c] for c in path) for path in go(cost.shape[0] - 1, cost.shape[1] - 1))


def test_alignment_in_time_is_the_best_of_all_paths():
    rng = np.random.default_rng(0)
    for t, u in [(1, 1), (1, 5), (4, 1), (5, 5), (3, 6), (6, 4)]:
        cost = rng.random((t, u))
        rows, columns = sound.align(cost)
        assert cost[rows, columns].sum() == pytest.approx(slow_align(cost))
        assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, t - 1, u - 1)
        moves = {(a, b) for a, b in zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True)}
        assert moves <= {(0, 1), (1, 0), (1, 1)}
    rows, columns = sound.align(np.zeros((3, 3)))
    assert rows.tolist() == columns.tolist() == [0, 1, 2], "of equal ways the diagonal one"


def test_stoi():
    pytest.importorskip("pystoi")
    wave, rng = voice(3, 1.0), np.random.default_rng(0)
    assert sound.stoi(wave, wave) == pytest.approx(1.0, abs=1e-6)
    noisy = [sound.stoi(wave + level * rng.normal(size=len(wave)), wave) for level in (0.01, 0.1, 1.0)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] and noisy[2] < 0.4
    assert math.isnan(sound.stoi(voice(3, 0.4), voice(3, 0.4))), "under half a second it means nothing"
    assert math.isnan(sound.stoi(np.zeros_like(wave), wave))


def test_pesq():
    pytest.importorskip("pesq", reason="the extra 'pesq' is not installed")
    wave = voice(3, 1.0)
    assert sound.pesq(wave, wave) > 4.5 > sound.pesq(wave + 0.05 * np.random.default_rng(0).normal(size=len(wave)), wave)
    assert math.isnan(sound.pesq(np.zeros_like(wave), wave)) and math.isnan(sound.pesq(wave, np.zeros_like(wave)))


@pytest.mark.parametrize("name, call", [("pystoi", sound.stoi), ("pesq", sound.pesq)])
def test_without_the_package_it_says_what_to_install(name, call, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"(?s)'{name}' is not installed.*pip install"):
        call(voice(0, 1.0), voice(0, 1.0))


def test_partners():
    said = ["a", "b", "a", "c", "a"]
    for seed in range(4):
        same, other = partners(said, seed, True), partners(said, seed, False)
        assert [i is None for i in same] == [False, True, False, True, False]
        assert all(said[j] == s and i != j for i, (s, j) in enumerate(zip(said, same, strict=True)) if j is not None)
        assert all(said[j] != s for s, j in zip(said, other, strict=True))
    assert partners(["a", "a"], 0, False) == [None, None]


# -- which data sets have transcripts ---------------------------------------------------------------------------------


def context(names, transcripts=None, brought=()):
    info = SimpleNamespace(transcripts={m: Transcript() for m in transcripts or ()}, brought=list(brought))
    return SimpleNamespace(names=names, info=info, dataset=SimpleNamespace(name="d"))


@pytest.mark.parametrize("names, transcripts, brought, why", [
    (["rgb", "caption"], ["caption"], (), "the run has no sound"),
    (["audio", "rgb"], (), (), "data set 'd' has no transcripts"),
    (["audio", "caption"], (), (), "nothing says that its caption is what is said in the sound, word for word"),
    (["audio", "rgb"], ["caption"], (), "the run has no caption, where the transcripts of 'd' stand"),
    (["audio", "caption"], ["caption"], ["audio"], "the audio tokens of 'd' came without their tokenizer"),
])
def test_what_is_missing(names, transcripts, brought, why):
    assert why in speech.missing(context(names, transcripts, brought))


def test_nothing_is_missing():
    assert speech.missing(context(["audio", "caption"], ["caption"])) is None


def test_descriptions_are_no_transcripts(media, one_thread):  # noqa: F811
    for probe in ("asr", "tts"):
        fails(run("eval", "--probe", probe, "--root", media.root, "--device", "cpu"), 1, "data set 'scenes' has no transcripts",
              "not what describes it")


def test_ratings_are_asked_for(media, one_thread):  # noqa: F811
    fails(run("eval", "--probe", "mos", "--root", media.root, "--device", "cpu"), 1, "mos.ratings=DIR")

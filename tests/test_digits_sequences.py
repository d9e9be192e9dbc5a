"""Sequences of digits (`digits length=3`): held-out compositions, splits that share nothing, labels that are true."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from test_digits import REAL, all_pairs, open_digits, real, real_data, tiny  # noqa: F401 - tiny is a fixture
from workspace_factory import config, one_thread, set_up  # noqa: F401 - one_thread is a fixture

from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources import _digits_files as files
from nano4m_cli.data.sources import _digits_pairs as pairing
from nano4m_cli.data.sources import _digits_sequences as sequences
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, DataError, MediaError
from nano4m_cli.modalities import audio
from nano4m_cli.probes._classes import classes_of
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.probes._speech import spoken
from nano4m_cli.registry import MODALITIES
from nano4m_cli.train.run import prepare, start
from nano4m_cli.train.tokenizing import tokenize

SPLITS = ("train", "val", "test", "judge")


def lines_of(source):
    """Return the samples to be, by split."""
    out = {split: [] for split in SPLITS}
    for line in all_pairs(source):
        out[line.split].append(line)
    return out


def used(lines, what):
    return {s: {x for line in ls for x in what(line)} for s, ls in lines.items()}


# -- what is held out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 4])
def test_held_out_words_are_an_orthogonal_array(length):
    """With any digits at all places but one, exactly two of the ten digits complete a held-out word."""
    held = [w for w in product(range(10), repeat=length) if sequences.is_held_out(w)]
    assert len(held) == 10**length // 5
    for place in range(length):
        rest = Counter(w[:place] + w[place + 1 :] for w in held)
        assert len(rest) == 10 ** (length - 1) and set(rest.values()) == {2}
        assert set(Counter(w[place] for w in held).values()) == {10 ** (length - 1) // 5}


@pytest.mark.parametrize("length", [2, 3, 4])
def test_test_words_are_never_in_train_or_val(length, tiny):  # noqa: F811
    source = open_digits(Path("unused"), f"mirror={tiny}", f"length={length}", "train=2000")
    lines, info = lines_of(source), source.info()
    assert {s: len(ls) for s, ls in lines.items()} == {"train": 2000, "val": 300, "test": 600, "judge": 250}
    assert info.splits == {"train": 2000, "val": 300, "test": 600} and info.judge == 250
    assert info.name == f"digits{length}" and info.max_objects == length
    assert info.sizes["rgb"] == {"size": [28, 28 * length]} and info.sizes["audio"]["seconds"] == pytest.approx(0.8 * length)
    words = used(lines, lambda line: [line.digits])
    assert not (words["train"] | words["val"]) & (words["test"] | words["judge"])
    assert len(words["test"]) == min(600, 10**length // 5) and len(words["train"]) == min(2000, 10**length * 4 // 5)
    for ls in lines.values():
        uses = Counter(line.digits for line in ls)
        assert max(uses.values()) - min(uses.values()) <= 1  # all words of a split equally often
        assert all(len(line.digits) == len(line.clips) == len(line.images) == len(line.pauses) + 1 for line in ls)
    keys = [line.key for ls in lines.values() for line in ls]
    assert len(set(keys)) == len(keys)


# -- the whole real plan ----------------------------------------------------------------------------------------------


@real_data
@pytest.mark.parametrize("split, name", [("clip", "digits3"), ("speaker:theo", "digits3-speaker-theo")])
def test_recordings_and_pictures_stay_in_their_split(split, name, monkeypatch):
    monkeypatch.setattr(files, "is_release", lambda *_: True)
    source = real("length=3", f"split={split}")
    lines = lines_of(source)
    assert source.info().name == name and source.info().splits == {"train": 6000, "val": 300, "test": 600}
    words = used(lines, lambda line: [line.digits])
    assert not (words["train"] | words["val"]) & words["test"] and len(words["test"]) == 200
    clips = used(lines, lambda line: line.clips)
    pictures = used(lines, lambda line: [(line.part, i) for i in line.images])
    for things in (clips, pictures):
        assert not things["train"] & things["val"] and not things["test"] & (things["train"] | things["val"])
    assert clips["judge"] <= clips["train"] and not pictures["judge"] & (pictures["val"] | pictures["test"])
    single = defaultdict(set)  # the split of each recording and picture of single digits
    for pair in all_pairs(real(f"split={split}")):
        single[pair.clip].add(pair.split)
        single[pair.part, pair.image].add(pair.split)
    for where in ("train", "val", "test"):
        assert {s for clip in clips[where] for s in single[clip]} == {where}
        assert {s for picture in pictures[where] for s in single.get(picture, ())} <= {where}
    digits = {part: files.labels(REAL, part) for part in ("train", "t10k")}
    for line in (line for ls in lines.values() for line in ls):
        named = [files.WAV.match(clip).groups() for clip in line.clips]
        assert {(speaker, pairing.SPEAKERS[speaker]) for _, speaker, _ in named} == {(line.speaker, line.accent)}
        assert tuple(int(d) for d, _, _ in named) == line.digits == tuple(digits[line.part][list(line.images)])
    uses = Counter(clip for line in lines["train"] for clip in line.clips)
    assert len(uses) > (2200 if split == "clip" else 1800) and max(uses.values()) < 3 * np.mean(list(uses.values()))
    assert {s: n for s, n in Counter(line.speaker for line in lines["test"]).items()} == (
        dict.fromkeys(pairing.SPEAKERS, 100) if split == "clip" else {"theo": 600}
    )
    long = [c for c in files.wav_names(REAL / files.RECORDINGS) if soundfile.info(REAL / files.RECORDINGS / c).duration > 0.7]
    assert len(long) == 107 and not set(long) & set().union(*clips.values())


@pytest.mark.parametrize("data", ["tiny", pytest.param("real", marks=real_data)])
def test_samples_are_what_their_labels_say(data, tiny, monkeypatch):  # noqa: F811
    """Sound is the recordings with silence between them, read here by other means; picture, caption and labels agree."""
    monkeypatch.setattr(files, "is_release", lambda *_: True)
    root = REAL if data == "real" else tiny
    source = open_digits(Path("unused"), f"mirror={root}", "length=3", "limit=6")
    seconds = source.info().sizes["audio"]["seconds"]
    pauses = set()
    for plan in source.plan():
        for line, sample in zip(plan.items, source.samples(plan), strict=True):
            label = json.loads(sample.members["labels.json"])
            rgb, wave, caption = (MODALITIES.get(m).from_bytes(sample.members[MODALITIES.get(m).ext], sample.key)
                                  for m in ("rgb", "audio", "caption"))  # fmt: skip
            assert label["objects"] == [{"digit": str(d), "accent": label["accent"]} for d in line.digits]
            words = " ".join(pairing.WORDS[d] for d in line.digits)
            assert caption == f"the digits {words}, spoken by a man with {pairing.ACCENTS[label['accent']]} accent"
            *digit, accent = label["fields"]
            assert [(f["attribute"], f["object"]) for f in digit] == [("digit", 0), ("digit", 1), ("digit", 2)]
            assert [caption[slice(*f["span"])] for f in digit] == [pairing.WORDS[d] for d in line.digits]
            assert [f["span"][0] for f in digit] == sorted(f["span"][0] for f in digit)
            assert caption[slice(*accent["span"])] == pairing.ACCENTS[label["accent"]] and accent["attribute"] == "accent"
            images = files.images(root, label["mnist_file"])
            assert rgb.shape == (28, 84, 3)
            for place, index in enumerate(label["mnist_indices"]):
                assert (rgb[:, 28 * place : 28 * (place + 1)] == images[index][:, :, None]).all()
            at = 0
            for place, name in enumerate(label["fsdd_files"]):
                begin = round(label["onsets"][place] * audio.RATE)
                pause = line.pauses[place - 1] if place else 0
                assert abs(begin - at - pause) <= 2 and not wave[at : at + pause].any()
                raw, rate = soundfile.read(root / "fsdd" / name, dtype="float32")
                clip = audio.resample(raw, rate, audio.RATE) * 10 ** (label["gains_db"][place] / 20)
                at += pause + len(clip)
                np.testing.assert_allclose(wave[at - len(clip) : at], clip, atol=2e-3)
                pauses.add(pause / audio.RATE)
            assert at == len(wave) <= seconds * audio.RATE and label["seconds"] == round(at / audio.RATE, 4)
    pauses.remove(0)
    assert sequences.PAUSE[0] - 1e-4 <= min(pauses) < max(pauses) <= sequences.PAUSE[1] + 1e-4 and len(pauses) > 10


@real_data
@pytest.mark.parametrize("test", sorted(pairing.SPEAKERS))
def test_every_speaker_can_be_left_out(test, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_release", lambda *_: True)
    workspace, val = Workspace(tmp_path), pairing.held_out(f"speaker:{test}")[1]
    for length, more in ((1, []), (3, ["length=3", "train=20", "val=6", "test=6"])):
        options = [f"mirror={REAL}", f"split=speaker:{test}", "pairs=rule", "limit=6", *more]
        done = fetch(open_source("digits", options, workspace), workspace, workers=1)
        assert done.info.name == f"digits{'' if length == 1 else 3}-speaker-{test}"
        speakers = {}
        for split in ("train", "val", "test"):
            raw = Split(done.dataset.raw(split))
            labels = [json.loads(raw.read(i, "labels.json")) for i in range(len(raw))]
            assert len(labels) == 6 and {len(label["objects"]) for label in labels} == {length}
            speakers[split] = {label["speaker"] for label in labels}
            clips = {c for label in labels for c in label.get("fsdd_files", [label.get("fsdd_file")])}
            assert {clip.split("_")[1] for clip in clips} == speakers[split]
        assert speakers["test"] == {test} and speakers["val"] == {val} and not speakers["train"] & {test, val}


# -- tiny data --------------------------------------------------------------------------------------------------------


def test_single_digits_are_what_they_were(tiny):  # noqa: F811
    """Their options name nothing of sequences: data sets fetched before are not others now."""
    info = open_digits(Path("unused"), f"mirror={tiny}", "length=1").info()
    assert info == open_digits(Path("unused"), f"mirror={tiny}").info() and info.name == "digits"
    assert list(info.options) == ["split", "pairs", "level_db", "shard_size", "limit"]
    assert info.max_objects == 1 and info.judge == 0 and info.sizes["audio"]["seconds"] == 1.0


def test_sequences_are_functions_of_options_and_plan(tiny):  # noqa: F811
    options = (f"mirror={tiny}", "length=3", "train=50", "val=10", "test=20", "shard_size=30")
    source = open_digits(Path("unused"), *options)
    plans = source.plan()
    assert [(p.split, p.count) for p in plans] == [("train", 30), ("train", 20), ("val", 10), ("test", 20), ("judge", 6)]
    first = list(source.samples(plans[1]))
    files.clip.cache_clear()
    assert list(pickle.loads(pickle.dumps(source)).samples(pickle.loads(pickle.dumps(plans[1])))) == first
    limited = open_digits(Path("unused"), *options, "limit=7").plan()
    assert [p.items for p in limited[:2]] == [plans[0].items[:7], plans[2].items[:7]]
    assert open_digits(Path("unused"), *options, "train=60").plan()[0] == plans[0]  # counts do not move what is there


@pytest.mark.parametrize(
    "option, message",
    [("length=5", "less than or equal to 4"), ("length=0", "length"), ("train=9", "length=2"), ("test=9", "length=2")],
)
def test_bad_options(option, message):
    with pytest.raises(ConfigError, match="digits") as err:
        open_digits(Path("unused"), option)
    assert message in err.value.message


def test_recordings_that_do_not_serve(tiny, tmp_path):  # noqa: F811
    mirror = Path(shutil.copytree(tiny, tmp_path / "mirror"))
    path = mirror / files.RECORDINGS / "3_theo_0.wav"
    soundfile.write(path, np.zeros(5601), 8000, subtype="PCM_16")  # 0.7001 s
    with pytest.raises(DataError, match="split 'test' has no recording of digit 3 by theo within 0.7 s"):
        open_digits(tmp_path, f"mirror={mirror}", "length=2", "train=20").info()
    path.write_bytes(b"junk")
    (mirror / files.RECORDINGS / "3_theo_6.wav").write_bytes(b"junk")  # another entry: the folder is read again
    with pytest.raises(MediaError, match="3_theo_0.wav is no readable sound"):
        open_digits(tmp_path, f"mirror={mirror}", "length=2", "train=20").info()


def test_right_of_the_same_class_are_those_with_all_digits_alike():
    values = [["1", "2"], ["1", "3"], ["1", "2"], ["2", "1"]]
    info = SimpleNamespace(pairing="class", attributes={"digit": [], "accent": []})
    context = SimpleNamespace(info=info, values=lambda _: values)
    kind, what = classes_of(context, "audio", "rgb", 4)
    assert what == "digit"
    assert (kind[:, None] == kind).astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_probes_ask_about_every_digit(tiny, tmp_path, one_thread):  # noqa: F811
    """Judges, class scores, retrieval and readout on strips of three digits; nothing is learned in so few steps."""
    workspace = Workspace(tmp_path)
    options = [f"mirror={tiny}", "length=3", "train=48", "val=8", "test=12"]
    dataset = fetch(open_source("digits", options, workspace), workspace, workers=1).dataset
    info = dataset.info()
    assert info.judge == 6 and len(Split(dataset.raw("judge"))) == 6
    dataset.info_path.write_text(info.model_copy(update={"judge_steps": {"rgb": 2, "audio": 2}}).model_dump_json())
    set_up(dataset, "rgb", width=16, depth=1)
    set_up(dataset, "audio", width=16, depth=1, griffin_lim=2)
    specs = {m: tokenize(dataset, m, workers=1).spec for m in ("rgb", "audio", "caption")}
    assert specs["rgb"].shape == (4, 12) and specs["audio"].shape == (77, 1)
    start(prepare(config(tmp_path, train__steps=2), workspace), False, "cpu", lambda record: None)
    done = evaluate(workspace, None, ["class", "crossmodal", "retrieval"], seed=0)
    metrics = {m.name: m for result in done.results for m in result.metrics}
    for name in ("audio->caption/digit_acc", "rgb->caption/accent_acc", "caption->rgb/digit_acc", "rgb->audio/accent_acc",
                 "rgb/judge_digit_acc", "audio/judge_digit_acc", "audio->rgb/class_r1"):
        assert metrics[name].n == 12 and 0 <= metrics[name].value <= 1, name
    assert metrics["rgb->caption/digit_acc"].chance == 0.1 and metrics["rgb->caption/digit_acc"].ceiling == 1.0
    judge = json.loads((dataset.judge("rgb") / "judge.json").read_text())
    assert judge["objects"] == 3 and list(judge["attributes"]) == ["digit"]
    linear = evaluate(workspace, None, ["linear"], kind="probe").results[0].metrics
    assert {m.name for m in linear} >= {"audio/digit_acc", "rgb/accent_acc"}


def test_captions_hold_what_is_said(tiny):  # noqa: F811
    assert spoken(pairing.caption_of(5, "greek"), sequences.transcript_of(1)) == "five"
    for length in (2, 3):
        how = open_digits(Path("unused"), f"mirror={tiny}", f"length={length}", "train=20").info().transcripts["caption"]
        digits = (3, 1, 4)[:length]
        assert spoken(sequences.caption_of(digits, "german"), how) == " ".join(pairing.WORDS[d] for d in digits)

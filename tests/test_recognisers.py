"""Recognisers with weights: what they write against transformers used as its documentation does; the probes of speech on a run."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_factory import waves
from speech_factory import LETTERS, WORDS, wav2vec_small, whisper_small
from test_cli import run
from test_digits import tiny  # noqa: F401 - a fixture
from workspace_factory import config, one_thread, set_up  # noqa: F401 - a fixture

from nano4m_cli.config import build
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import RATE, resample
from nano4m_cli.probes import _speech_recogniser as recognisers
from nano4m_cli.probes import tts
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.probes._speech import guesses, spoken, texts, train_transcripts
from nano4m_cli.probes._speech_recogniser import BaselineOptions, baseline
from nano4m_cli.train.run import open_run, prepare, start
from nano4m_cli.train.tokenizing import tokenize

ensure_torchaudio()  # before anything of transformers is imported

T = np.arange(30 * 24_000) / 24_000
LOUD = [w.astype(np.float32) for w in (  # as long as Whisper hears at once
    0.3 * np.sin(2 * np.pi * 200 * T), 0.3 * np.sin(2 * np.pi * 3000 * T), 0.1 * np.random.default_rng(0).normal(size=len(T)))]
SOUNDS = [w[0].numpy()[:n] for w, n in zip(waves(3, 24_000), (24_000, 12_000, 7_001), strict=True)]


def opened(kind, weights, **more):
    return baseline(build(BaselineOptions, {"baseline": kind, "weights": weights, **more}, "asr"), "asr")


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multilingual", [True, False])
def test_whisper_writes_what_transformers_writes(multilingual):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder = whisper_small(multilingual)
    model, extractor = (c.from_pretrained(folder) for c in (WhisperForConditionalGeneration, WhisperFeatureExtractor))
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())["model"]["vocab"]
    words = {i: w.replace("\u0120", " ") for w, i in vocabulary.items()}
    sounds = [*LOUD, *SOUNDS[:2]]
    for short, long in (("en", "english"), ("de", "german"))[: 1 + multilingual]:
        want = []
        for wave in sounds:
            given = extractor(resample(wave, RATE, 16_000), sampling_rate=16_000, return_tensors="pt")
            told = {"language": long, "task": "transcribe"} if multilingual else {}
            ids = model.generate(given.input_features, **told)[0].tolist()
            want.append(" ".join("".join(words.get(i, "") for i in ids).split()))
        one = opened("whisper", folder, language=short)
        assert one.transcribe(sounds) == want and len(set(want)) > 1 and all(want)
        assert one.transcribe(sounds[::-1]) == want[::-1]
        assert any(w in " ".join(want).split() for w in WORDS)


@pytest.mark.parametrize("published", [True, False])
def test_wav2vec_writes_what_transformers_writes(published, tmp_path):
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC.from_pretrained(wav2vec_small(False))  # under today's names
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(wav2vec_small(False))
    tokenizer = Wav2Vec2CTCTokenizer(str(Path(wav2vec_small(False), "vocab.json")))
    want = []
    for wave in SOUNDS:
        given = extractor(resample(wave, RATE, 16_000), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            ids = model(given.input_values).logits.argmax(-1)
        want.append(" ".join(re.sub("<.*?>", "", tokenizer.batch_decode(ids)[0]).split()))
    one = opened("wav2vec2", wav2vec_small(published))
    assert one.transcribe(SOUNDS) == want and len(set(want)) == 3 and all(len(w) > 3 for w in want)


def test_long_sounds_are_heard_in_pieces(monkeypatch):
    one = opened("whisper", whisper_small())
    monkeypatch.setattr(recognisers, "WINDOW", 16_000)
    long = np.concatenate([SOUNDS[0], SOUNDS[0]])
    assert one.transcribe([long])[0] == " ".join(one.transcribe(SOUNDS[:1]) * 2)


def test_silence_and_very_short_sounds():
    for kind, folder in (("whisper", whisper_small()), ("wav2vec2", wav2vec_small())):
        written = opened(kind, folder).transcribe([np.zeros(5000, np.float32), np.zeros(0, np.float32), SOUNDS[0][:50]])
        assert written[:2] == ["", ""] and isinstance(written[2], str)


# -- weights ----------------------------------------------------------------------------------------------------------


def digest(folder):
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()


def test_the_hash_of_the_weights_is_told_and_pins_them():
    folder = wav2vec_small()
    one = opened("wav2vec2", folder, sha256=digest(folder)[:12])
    assert digest(folder) in one.note and "/" not in one.note, "where they lie is nobody's business"
    with pytest.raises(WeightsError, match="the sha256 of model.safetensors is .*, 0000000000 is asked for"):
        opened("wav2vec2", folder, sha256="0" * 10)
    with pytest.raises(ConfigError, match="sha256"):
        opened("wav2vec2", folder, sha256="xyz")


@pytest.fixture
def damaged(tmp_path):
    """A function (recogniser, file name, new content or None) -> folder."""

    def make(kind, name, content):
        source = whisper_small() if kind == "whisper" else wav2vec_small()
        folder = tmp_path / f"{kind}-{name}"
        shutil.copytree(source, folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return str(folder)

    return make


@pytest.mark.parametrize("kind, name, content, why", [
    ("whisper", "model.safetensors", None, "holds no model.safetensors"),
    ("whisper", "tokenizer.json", b"{}", "tokenizer.json cannot be used"),
    ("whisper", "preprocessor_config.json", b"[", "preprocessor_config.json cannot be used"),
    ("whisper", "config.json", b'{"model_type": "bert"}', "of a model of type 'bert', 'whisper' is needed"),
    ("wav2vec2", "model.safetensors", b"junk", "the weights of 'wav2vec2'"),
    ("wav2vec2", "vocab.json", b'{"a": 0}', f"it does not name {len(LETTERS)} units"),
    ("wav2vec2", "vocab.json", b'{"a": "b"}', "is damaged"),
    ("wav2vec2", "vocab.json", b"[1]", "is damaged"),
    ("wav2vec2", "config.json", b"{", "config.json is damaged"),
])
def test_weights_that_cannot_be_used(damaged, kind, name, content, why):
    with pytest.raises(WeightsError) as err:
        opened(kind, damaged(kind, name, content))
    assert why in str(err.value), str(err.value)


def test_what_would_have_to_be_unpickled_is_not_read(damaged):
    folder = Path(damaged("wav2vec2", "model.safetensors", None))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="(?s)pytorch_model.bin would have to be unpickled.*give asr.weights=DIR"):
        opened("wav2vec2", str(folder))


def test_tensors_that_are_missing_are_an_error(damaged):
    from safetensors.torch import load_file, save_file

    path = Path(damaged("wav2vec2", "model.safetensors", None)) / "model.safetensors"
    tensors = load_file(Path(wav2vec_small(), "model.safetensors"))
    tensors.pop("lm_head.bias")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="1 tensors are missing, e.g. lm_head.bias"):
        opened("wav2vec2", str(path.parent))


def test_an_unknown_language():
    with pytest.raises(WeightsError, match="(?s)knows no language 'xx'.*known: de, en"):
        opened("whisper", whisper_small(), language="xx")
    assert opened("whisper", whisper_small(False), language="xx").told == {}, "one that knows a single language is told none"


def test_without_weights_it_says_where_to_put_them(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="(?s)'openai/whisper-tiny' is no folder here.*give asr.weights=DIR.*hf download"):
        opened("whisper", "")


# -- on a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken_digits(tiny, tmp_path_factory):  # noqa: F811
    """A data set of two digits each, and a run of two steps on it."""
    root = tmp_path_factory.mktemp("spoken")
    workspace = Workspace(root)
    options = [f"mirror={tiny}", "length=2", "train=48", "val=8", "test=12"]
    dataset = fetch(open_source("digits", options, workspace), workspace, workers=1).dataset
    info = dataset.info()
    dataset.info_path.write_text(info.model_copy(update={"judge_steps": {"audio": 2}}).model_dump_json())
    set_up(dataset, "audio", width=16, depth=1, griffin_lim=2)
    for m in ("audio", "caption"):
        tokenize(dataset, m, workers=1)
    start(prepare(config(root, name="talk", train__steps=2, data__modalities="[audio,caption]"), workspace), False, "cpu",
          lambda record: None)
    return workspace


def figures(result):
    return {m.name: m for m in result.metrics}


def test_recognition_on_a_run(spoken_digits, one_thread):  # noqa: F811
    asked = ["asr.baseline=whisper", f"asr.weights={whisper_small()}", "asr.heard=5"]
    (result,) = evaluate(spoken_digits, None, ["asr"], settings=asked).results
    value = figures(result)
    wer = value["audio->caption/wer"]
    assert wer.n == 12 and wer.value >= 0 and wer.ci95 and not wer.higher_is_better
    parts = [value[f"audio->caption/{k}"].value for k in ("substitutions", "deletions", "insertions")]
    assert wer.value == pytest.approx(sum(parts), abs=1e-5)
    assert wer.chance > 0.5 and wer.majority > 0.5 and wer.reference == value["audio/wer_judge"].value
    assert value["audio/wer_whisper"].n == value["audio/wer_whisper_round_trip"].n == 5
    assert value["audio->caption/exact"].majority == 0, "words of the test split are not in training"
    assert any("sha256 " + digest(whisper_small()) in n and "heard the first 5" in n for n in result.notes)
    assert any("lower case, punctuation" in n and "'basic'" in n for n in result.notes)
    alignments, confusions = result.plots
    assert alignments.rows[0] == "first: " + next(iter(alignments.rows)).removeprefix("first: ") and len(alignments.rows) >= 8
    said = [row[0].split() for row in alignments.values]
    assert all(len(s) == 2 and set(s) <= set(WORDS) for s in said)
    assert confusions.kind == "matrix" and all(sum(r) == pytest.approx(1, abs=1e-4) for r in confusions.values)
    again = evaluate(spoken_digits, None, ["asr"], settings=asked).results[0]
    assert again.model_dump() == result.model_dump()


def knows(monkeypatch, make):
    """Put a predictor whose figures theory tells in the place of the run: make(context, n) gives what it writes or says."""
    told = lambda context, sources, targets, modality, *_, limit=None, **__: make(context, limit)  # noqa: E731
    monkeypatch.setattr(Context, "decoded", told)


def captions(context, words):
    """Captions that say `words(transcript)` where the true one says its transcript."""
    how = context.info.transcripts["caption"]
    return [t.replace(said := spoken(t, how), words(said), 1) for t in texts(context, "caption")]


@pytest.mark.parametrize("make, wer, exact", [
    (lambda c, _: captions(c, lambda said: said), 0.0, 1.0),
    (lambda c, _: captions(c, lambda said: said.upper() + "!"), 0.0, 1.0),
    (lambda c, _: ["the digits , spoken by a man"] * c.n, 1.0, 0.0),
    (lambda c, _: [""] * c.n, 1.0, 0.0),
    (lambda c, _: captions(c, lambda said: said + " " + said), 1.0, 0.0),
    (lambda c, _: captions(c, lambda said: said.split()[0]), 0.5, 0.0),
], ids=["perfect", "spelt otherwise", "silent", "without marks", "twice", "half"])
def test_recognition_of_known_predictors(spoken_digits, one_thread, monkeypatch, make, wer, exact):  # noqa: F811
    knows(monkeypatch, make)
    value = figures(evaluate(spoken_digits, None, ["asr"]).results[0])
    assert (value["audio->caption/wer"].value, value["audio->caption/exact"].value) == (wer, exact)


def test_readers_that_hear_nothing_are_at_their_baselines(spoken_digits, one_thread, monkeypatch):  # noqa: F811
    context = Context(open_run(spoken_digits), "test", None, 0, lambda *_: None)
    how = context.info.transcripts["caption"]
    said = [spoken(t, how) for t in texts(context, "caption")]
    blind = guesses(said, train_transcripts(context, "caption"), 0)
    for i, baseline_of in enumerate(("chance", "majority")):
        knows(monkeypatch, lambda c, _, i=i: [f"the digits {w}, spoken by" for w in blind[i]])
        wer = figures(evaluate(spoken_digits, None, ["asr"]).results[0])["audio->caption/wer"]
        assert wer.value == getattr(wer, baseline_of) > 0.5
    # A uniform guess of each of the two digits: wrong nine times of ten.
    rng = np.random.default_rng(0)
    knows(monkeypatch, lambda c, _: [f"the digits {' '.join(rng.choice(WORDS, 2))}, spoken by" for _ in range(c.n)])
    low, high = figures(evaluate(spoken_digits, None, ["asr"]).results[0])["audio->caption/wer"].ci95
    assert low <= 0.9 <= high


def test_synthesis_of_known_predictors(spoken_digits, one_thread, monkeypatch):  # noqa: F811
    pytest.importorskip("pystoi")
    measured = lambda: figures(evaluate(spoken_digits, None, ["tts"]).results[0])  # noqa: E731
    knows(monkeypatch, lambda c, n: c.raw("audio")[:n])
    value = measured()
    assert value["caption->audio/mcd"].value == 0 and value["caption->audio/duration"].value == 0
    assert value["caption->audio/wer_judge"].value == value["audio/wer_judge"].value and value["caption->audio/silent"].value == 0
    knows(monkeypatch, lambda c, n: [np.zeros_like(w) for w in c.raw("audio")[:n]])
    value = measured()
    assert value["caption->audio/silent"].value == 1 and value["caption->audio/mcd"].value is None
    knows(monkeypatch, lambda c, n: c.tokenizer("audio").decode(c.ids("audio")[:n]))
    value = measured()
    assert value["caption->audio/mcd"].value == value["caption->audio/mcd"].reference
    assert value["caption->audio/wer_judge"].value == value["caption->audio/wer_judge"].reference


def test_synthesis_on_a_run(spoken_digits, one_thread, tmp_path):  # noqa: F811
    pytest.importorskip("pystoi")
    (result,) = evaluate(spoken_digits, None, ["tts"], settings=["tts.clips=6", f"tts.listen={tmp_path}", "tts.items=3"]).results
    value = figures(result)
    near = value["caption->audio/mcd"]
    assert near.n <= 6 and near.unit == "dB" and near.reference == value["audio/mcd_round_trip"].value > 0
    assert value["caption->audio/stoi"].n == 0 and value["caption->audio/stoi"].value is None, "these sounds last 0.1 s"
    assert any("6 of 6 recordings hold under 0.5 s of speech" in n for n in result.notes)
    for name in ("caption->audio/wer_judge", "audio/wer_judge", "audio/wer_judge_round_trip"):
        assert value[name].n == 6 and 0 <= value[name].value <= 1, "it neither inserts nor leaves out"
    assert value["caption->audio/wer_judge"].reference == value["audio/wer_judge_round_trip"].value
    (systems,) = result.plots
    assert systems.rows == ["audio: truth", "audio: round_trip", "audio: generated"]
    at = systems.columns.index("wer_judge")
    assert [row[at] for row in systems.values] == [
        value[f"{n}"].value for n in ("audio/wer_judge", "audio/wer_judge_round_trip", "caption->audio/wer_judge")]
    key = json.loads((tmp_path / "key.json").read_text())
    assert key["run"] == "talk" and len(key["clips"]) == 9 and (tmp_path / "listen.html").stat().st_size > 10_000
    answers = [{"clip": c, "score": 5 if one["system"] == "truth" else 2, "plays": 1, "position": i}
               for i, (c, one) in enumerate(key["clips"].items())]
    (tmp_path / "a.json").write_text(json.dumps(
        {"format": "nano4m-mos", "version": 1, "test": key["test"], "rater": "Ann", "ratings": answers}))
    done = run("eval", "--probe", "mos", f"mos.ratings={tmp_path}", "--root", spoken_digits.root, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.stderr
    said = {m["name"]: m["value"] for m in json.loads(done.stdout)["results"][0]["metrics"]}
    assert said["audio/mos"] == 5 and said["caption->audio/mos"] == 2 and said["caption->audio/mos_minus_truth"] == -3


def test_without_pystoi_synthesis_is_left_out_with_its_reason(spoken_digits, one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tts, "find_spec", lambda name: None)
    context = Context(open_run(spoken_digits), "test", 2, 0, lambda *_: None)
    assert "pip install pystoi" in tts.Probe().missing(context)

"""Running text: source `text`, modality `text`, tokenizer `chars`, and what the other parts make of one modality."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from workspace_factory import config, one_thread  # noqa: F401 - one_thread is a fixture

from nano4m_cli.config import apply_overrides, build
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources.text import Source, bounds, default_name
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, DataError, FetchError, MediaError, TokenError, WeightsError
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.registry import MODALITIES, TOKENIZERS
from nano4m_cli.tokenizers._base import open_tokenizer, save_tokenizer
from nano4m_cli.train.run import prepare, start
from nano4m_cli.train.tokenizing import tokenize

REAL = Path(os.environ.get("NANO4M_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "text_shakespeare/input.txt"
real_data = pytest.mark.skipif(not REAL.is_file(), reason=f"no {REAL} (set NANO4M_TEST_DATA)")
PLAY = "".join(f"ROMEO {i}:\r\n  It is the {'east' * (i % 3)},\tand caf\xe9 \U0001f600!\n\n\n" for i in range(60))


def open_text(path, *options):
    source = Source(build(Source.Options, apply_overrides({}, [f"path={path}", *options]), "source 'text'"), Path("unused"))
    source.prepare(lambda *_: None)
    return source


def passages(source):
    """Return per split [(file, text)] in the order of the plan."""
    out = {}
    for plan in source.plan():
        samples = list(source.samples(plan))
        assert len(samples) == plan.count
        for sample in samples:
            label = json.loads(sample.members["labels.json"])
            text = sample.members["text.txt"].decode()
            assert label["end"] - label["start"] == len(text)
            out.setdefault(plan.split, []).append((label["file"], text))
    return out


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus/more").mkdir(parents=True)
    texts = {"b.txt": PLAY, "a.txt": PLAY[:777][::-1], "more/c.txt": "word " * 300}
    for name, text in texts.items():
        (tmp_path / "corpus" / name).write_bytes(text.encode())
    (tmp_path / "corpus/notes.md").write_text("no text of the corpus")
    return tmp_path / "corpus", texts


# -- source -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, shares", [((), (0.9, 0.95)), (("val=0.2", "test=0"), (0.8, 1.0)), (("val=0",), (0.95, 0.95))])
@pytest.mark.parametrize("chars", [1, 7, 256])
def test_passages_in_order_are_the_files_parts(folder, options, shares, chars):
    path, texts = folder
    source = open_text(path, f"chars={chars}", "shard_size=97", *options)
    made, info = passages(source), source.info()
    assert info.splits == {s: len(made.get(s, [])) for s in ("train", "val", "test")} and info.modalities == ["text"]
    for name, text in texts.items():
        a, b = (round(len(text) * share) for share in shares)
        for split, part in (("train", text[:a]), ("val", text[a:b]), ("test", text[b:])):
            mine = [t for file, t in made.get(split, []) if file == name]
            assert "".join(mine) == part
            assert all(len(t) == chars for t in mine[:-1]) and all(0 < len(t) <= chars for t in mine[-1:])
    order = [file for file, _ in made["train"]]
    assert order == sorted(order) and set(order) == set(texts)


def test_parts_of_a_file_meet_without_overlap():
    for length in (1, 2, 19, 20, 1000, 1_115_394):
        parts = bounds(length, 0.05, 0.05)
        assert parts["train"][0] == 0 and parts["test"][1] == length
        assert parts["train"][1] == parts["val"][0] <= parts["val"][1] == parts["test"][0]
    assert bounds(1000, 0.05, 0.05) == {"train": (0, 900), "val": (900, 950), "test": (950, 1000)}


def test_samples_are_functions_of_options_and_plan(folder):
    source = open_text(folder[0], "chars=20", "shard_size=50")
    plans = source.plan()
    assert len({s.key for p in plans for s in source.samples(p)}) == sum(p.count for p in plans)
    again = pickle.loads(pickle.dumps(source))
    assert again.plan() == plans and list(again.samples(pickle.loads(pickle.dumps(plans[1])))) == list(source.samples(plans[1]))


NAMES = [("My play (2).txt", "My-play-2"), ("input.txt", "input"), ("\u4f60.txt", "text"), ("v1.0", "v1.0")]


@pytest.mark.parametrize("given, name", NAMES)
def test_a_data_set_is_named_after_its_file(given, name, tmp_path):
    path = tmp_path / given
    if path.suffix == ".txt":
        path.write_text(PLAY)
    else:
        path.mkdir()
        (path / "x.txt").write_text(PLAY)
    assert default_name(path) == name == open_text(path).info().name
    assert open_text(path, "name=mine").info().name == "mine"


def test_another_text_is_another_data_set(tmp_path):
    path, workspace = tmp_path / "play.txt", Workspace(tmp_path)
    path.write_text(PLAY)
    made = fetch(open_source("text", [f"path={path}"], workspace), workspace, workers=1)
    assert made.made == sum(made.info.splits.values()) and "path" not in made.info.options
    (tmp_path / "elsewhere").mkdir()
    path = path.rename(tmp_path / "elsewhere/play.txt")  # where it lies does not matter
    assert fetch(open_source("text", [f"path={path}"], workspace), workspace, workers=1).kept == made.made
    path.write_text(PLAY + "one more line\n")
    with pytest.raises(FetchError, match="sha256 differ"):
        fetch(open_source("text", [f"path={path}"], workspace), workspace, workers=1)


@pytest.mark.parametrize(
    "data, error, message",
    [
        (None, FetchError, "no file or folder"),
        (b"", MediaError, "is empty"),
        (b"plain caf\xe9 text" * 9, MediaError, "not UTF-8 text: byte 9 is 0xe9"),
        (b"cut \xc3", MediaError, "byte 4 is 0xc3"),
        (b"\x7fELF\x02\x01\x01\x00\x00", MediaError, "binary, not text: byte 7"),
        ("text".encode("utf-16"), MediaError, "binary"),
        (b"short", FetchError, "too short: 5 characters, none for test"),
    ],
)
def test_bad_files(data, error, message, tmp_path):
    path = tmp_path / "x.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(error, match=message) as err:
        open_text(path)
    assert "x.txt" in err.value.message and err.value.hint
    if data is not None and error is MediaError:  # the same file among others
        (tmp_path / "a.txt").write_text(PLAY)
        with pytest.raises(error, match=message):
            open_text(tmp_path)


def test_bad_folders_and_options(tmp_path):
    with pytest.raises(FetchError, match="holds no .txt file"):
        open_text(tmp_path)
    for option, message in (("chars=0", "chars"), ("val=1", "val"), ("name=../x", "name"), ("vall=0.1", "unknown key 'vall'")):
        with pytest.raises(ConfigError, match="source 'text'") as err:
            open_text(tmp_path, option)
        assert message in err.value.message
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        open_text(tmp_path, "val=0.5", "test=0.5")
    with pytest.raises(ConfigError, match="path"):
        build(Source.Options, {}, "source 'text'")
    (tmp_path / "x.txt").write_bytes(b"short")
    assert open_text(tmp_path, "val=0", "test=0").info().splits == {"train": 1, "val": 0, "test": 0}


# -- modality and tokenizers ------------------------------------------------------------------------------------------


def test_running_text_keeps_its_lines(tmp_path):
    text = MODALITIES.get("text")
    for raw in (PLAY, "\n", "  a \r\n\tb\n"):
        assert text.from_bytes(text.to_bytes(raw), "here") == text.from_text(raw) == text.show(raw) == raw
        text.write_file(raw, tmp_path / "x.txt")
        assert text.read_file(tmp_path / "x.txt") == raw
    with pytest.raises(MediaError, match="the text is empty"):
        text.from_text("")


def fitted(name, texts, **options):
    cls = TOKENIZERS.get(name)
    tokenizer = cls("text", cls.Options(**options), {})
    tokenizer.fit(texts)
    return tokenizer


def test_chars_are_numbered_in_order_after_end_and_unknown():
    tokenizer = fitted("chars", ["ba\n", "c"])
    spec = tokenizer.spec()
    assert spec.vocab_size == 6 and spec.eos == 0 and spec.kind == "sequence" and spec.shape == (8,)
    assert [ids.tolist() for ids in tokenizer.encode(["abc\n", "", "a\u4f60A"])] == [[3, 4, 5, 2, 0], [0], [3, 1, 1, 0]]
    assert tokenizer.decode([np.array([3, 1, 2, 0, 5]), np.array([0]), np.array([4])]) == ["a\ufffd\n", "", "b"]
    assert tokenizer.comparable("a\u4f60A\n") == "a\ufffd\ufffd\n"
    assert tokenizer.adapt("abc") == ("abc", None)
    raw, said = tokenizer.adapt("aZbZ")
    assert raw == "aZbZ" and said == "text: 'Z' never stood in the train split and is read as unknown"
    for bad in (6, -1):
        with pytest.raises(TokenError, match="outside its vocabulary"):
            tokenizer.decode([np.array([3, bad])])


def test_chars_refuse_what_is_too_long_and_nothing_at_all():
    with pytest.raises(MediaError, match="here: text has 6 tokens, at most 5 fit") as err:
        fitted("chars", ["abc"], max_length=5).encode(["ab", "abcab"], ["there", "here"])
    assert err.value.hint == "shorten it, or tokenize with text.max_length=6"
    with pytest.raises(MediaError, match="every text of the train split is empty"):
        fitted("chars", ["", ""])


@pytest.mark.parametrize("damage", ["{", "[]", '{"characters": 3, "longest": 4}', '{"characters": "abc"}'])
def test_a_damaged_vocabulary_is_a_weights_error(damage, tmp_path):
    save_tokenizer(fitted("chars", ["abc"]), tmp_path)
    assert open_tokenizer(tmp_path).characters == "abc"
    (tmp_path / "chars.json").write_text(damage)
    with pytest.raises(WeightsError, match="no usable vocabulary"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [PLAY, "\n\n x\n", " lead", "trail \n", "caf\xe9 \u4f60 <eos>"])
def test_bpe_keeps_running_text_as_it_is(text, tmp_path):
    tokenizer = fitted("bpe", [PLAY], vocab=400, max_length=4000)
    assert not tokenizer.options.lower and tokenizer.decode(tokenizer.encode([text])) == [tokenizer.comparable(text)] == [text]
    save_tokenizer(tokenizer, tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.options == tokenizer.options and again.decode(again.encode([text])) == [text]


def test_bpe_folds_captions_as_ever_and_case_where_it_is_asked():
    assert fitted("bpe", [PLAY], lower=True).comparable("A\n B") == "a\n b"
    cls = TOKENIZERS.get("bpe")
    caption = cls("caption", cls.Options(vocab=300), {})
    assert caption.options.lower and caption.comparable(" A\n  B ") == "a b"


@real_data
def test_shakespeare_comes_back_whole():
    source = open_text(REAL)
    made = passages(source)
    whole = REAL.read_text(encoding="utf-8")
    assert "".join(t for split in ("train", "val", "test") for _, t in made[split]) == whole
    train, held = ([t for _, t in made["train"]], [t for split in ("val", "test") for _, t in made[split]])
    tokenizer = fitted("chars", train, max_length=257)
    assert tokenizer.characters == "".join(sorted(set(whole[: round(0.9 * len(whole))])))
    assert tokenizer.decode(tokenizer.encode(train)) == train
    assert tokenizer.decode(tokenizer.encode(held)) == [tokenizer.comparable(t) for t in held]


# -- one modality in the rest of the project --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """A workspace with a tokenised data set `play` (passages of 40 characters)."""
    workspace = Workspace(tmp_path_factory.mktemp("play"))
    path = workspace.root / "play.txt"
    path.write_bytes(PLAY.encode() * 3)
    dataset = fetch(open_source("text", [f"path={path}", "chars=40"], workspace), workspace, workers=1).dataset
    assert tokenize(dataset, "text", workers=1).spec.shape == (41,)
    return workspace


MASKS = {
    "default": "[{type: dirichlet}]",
    "dirichlet": "[{type: dirichlet, alpha: 0.01, input: [1, 16], target: [4, 40]}]",
    "directed": "[{type: directed, drop: 0.5, sources: [0.5, 0.5], extra: [text]}]",
}


@pytest.mark.parametrize("masking", MASKS.values(), ids=MASKS)
def test_a_run_of_one_modality_asks_for_the_rest_of_a_text(play, masking, one_thread):  # noqa: F811
    prepared = prepare(config(play.root, name="mask", masking__components=masking), play)
    report = prepared.masks(512)
    assert report.directions == {"->text": 1.0} and report.decoder_tokens > 1 and report.encoder_tokens > 1
    for step in range(3):
        for part in prepared.task.batch(step):
            assert np.isfinite(float(prepared.task.loss(part)[0].detach()))


def test_probes_say_what_one_modality_lacks(play, one_thread):  # noqa: F811
    start(prepare(config(play.root, name="lm", train__steps=2), play), False, "cpu", lambda record: None)
    done = evaluate(play, "lm", limit=8)
    found = {r.probe: {m.name for m in r.metrics} for r in done.results}
    assert set(found) >= {"loss", "tokenizer", "calibration", "memorization"} and done.report.is_file()
    assert found["loss"] == {"text/ce", "text/bits", "text/positional_ce", "->text/ce"}
    assert done.skipped.items() >= {
        "class": "data set 'play' states no attributes",
        "crossmodal": "no modality that a judge could name",
        "retrieval": "the run has one modality only",
        "fusion": "the run has one modality only",
        "captions": "the run has no caption",
        "sounds": "the run has no audio",
        "fid": "no generated modality has a judge, whose features distances are measured in",
    }.items()
    with pytest.raises(DataError, match="probe 'retrieval' cannot run here: the run has one modality only"):
        evaluate(play, "lm", ["retrieval"])
    assert evaluate(play, "lm", kind="probe", limit=8).skipped["linear"] == "data set 'play' states no attributes"


def test_bpe_serves_a_text_data_set(tmp_path):
    workspace, path = Workspace(tmp_path), tmp_path / "play.txt"
    path.write_bytes(PLAY.encode())
    dataset = fetch(open_source("text", [f"path={path}"], workspace), workspace, workers=1).dataset
    report = tokenize(dataset, "text", ["name=bpe", "vocab=300"], workers=1)
    assert report.spec.tokenizer.name == "bpe" and report.spec.tokenizer.config["lower"] is False
    tokenize(dataset, "text", ["name=bpe", "vocab=300"], workers=1)  # the same options again are no others
    tokenizer, raw = open_tokenizer(dataset.tokenizer("text")), Split(dataset.raw("train"))
    texts = [raw.read(i, "text.txt").decode() for i in range(len(raw))]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts

"""Variants of a sample: other sounds that mean the same, tokenised side by side and drawn in training."""

import numpy as np
import pytest
from workspace_factory import config

from nano4m_cli import rng
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, DataError
from nano4m_cli.modalities.audio import MODALITY as AUDIO
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers._base import open_tokenizer
from nano4m_cli.train.doctor import examine
from nano4m_cli.train.run import prepare
from nano4m_cli.train.tokenizing import read_raw, tokenize

SMALL = ["width=16", "depth=1", "fit_steps=12", "fit_samples=16", "griffin_lim=1"]


def test_a_varied_sound_is_the_same_tone_played_otherwise():
    t = np.arange(RATE) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 500 * t)).astype(np.float32)
    hertz, begins, loud = [], [], []
    for k in range(40):
        made = AUDIO.vary(tone, rng.generator(0, "test", k))
        assert made.dtype == np.float32 and np.abs(made).max() <= 0.99 + 1e-6
        hertz.append(np.abs(np.fft.rfft(made, RATE)).argmax())
        begins.append(int(np.argmax(np.abs(made) > 0.01)) / RATE)
        loud.append(np.abs(made).max() / 0.5)
        speed = hertz[-1] / 500
        assert len(made) / RATE == pytest.approx(1 / speed + begins[-1], abs=0.01), "no part of it is lost"
    assert min(hertz) in range(423, 450) and max(hertz) in range(550, 592)
    assert min(begins) < 0.01 and 0.04 < max(begins) < 0.055
    assert 0.62 < min(loud) < 0.75 and 1.4 < max(loud) < 1.6  # 4 dB
    assert np.array_equal(AUDIO.vary(tone, rng.generator(0, "test", 3)), AUDIO.vary(tone, rng.generator(0, "test", 3)))


@pytest.mark.parametrize("name", [n for n in MODALITIES.names() if n not in ("audio", "rgb")])
def test_what_cannot_be_varied_says_so(name):
    with pytest.raises(ConfigError, match=f"{name} has no variants"):
        MODALITIES.get(name).vary(None, np.random.default_rng(0))


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("variants"))
    options = ["train=24", "val=4", "test=4", "test_novel=0", "judge=0", "size=8", "shard_size=8"]
    fetch(open_source("scenes", options, workspace), workspace, 1)
    dataset = workspace.dataset()
    tokenize(dataset, "audio", [*SMALL, "variants=3"], workers=1)
    tokenize(dataset, "caption", workers=1)
    return workspace


def test_train_has_different_variants_and_the_other_splits_one(space):
    dataset = space.dataset()
    train, val = (TokenData(dataset, split, ["audio"]) for split in ("train", "val"))
    assert train.layout.specs[0].variants == 3
    index = np.arange(24)
    rows = [train.read(index, np.full(24, k))[0] for k in range(3)]
    plain = open_tokenizer(dataset.tokenizer("audio")).encode(read_raw(dataset, "train", "audio", range(24)))
    assert np.array_equal(rows[0], np.stack(plain)), "variant 0 is the sample as it is"
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (rows[a] != rows[b]).any(1).all(), "each sample has three different ones"
    some = np.arange(4)
    assert all(np.array_equal(val.read(some, np.full(4, k))[0], val.read(some)[0]) for k in (1, 2))
    report = examine(dataset, ["audio", "caption"])
    assert not report.errors and report.samples["train"] == {"audio": 24, "caption": 24}


def test_training_draws_the_variants(space):
    made = config(space.root, train__batch=24, train__steps=9, data__modalities=["audio", "caption"])
    task = prepare(made, space).task
    data, seen = TokenData(space.dataset(), "train", ["audio", "caption"]), set()
    audio = data.layout.slice("audio")
    known = [data.read(np.arange(24), np.full(24, k))[0][:, audio] for k in range(3)]
    read = task.train.read

    def watch(index, variant):
        ids, length = read(index, variant)
        for i, v, row in zip(index, variant, ids[:, audio], strict=True):
            assert np.array_equal(row, known[v][i])
            seen.add((int(i), int(v)))
        return ids, length

    task.train.read = watch
    for step in range(20):
        task.batch(step)
    assert len(seen) > 0.95 * 24 * 3


def test_another_number_of_variants_is_another_tokenisation(space):
    with pytest.raises((ConfigError, DataError), match="with other options|another tokenizer"):
        tokenize(space.dataset(), "audio", [*SMALL, "variants=2"], workers=1)

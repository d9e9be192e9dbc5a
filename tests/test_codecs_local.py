"""SpeechTokenizer, WavTokenizer and Cosmos: codes and sounds as plain computation makes them, and files of no use."""

import functools
import io
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from codec_factory import waves
from local_factory import (
    BOOKS,
    ENTRIES,
    FRAMES,
    LEVELS,
    LOCAL,
    STRIDES,
    cosmos_small,
    decode,
    encode,
    nearest,
    speech_state,
    speechtokenizer_small,
    vocode,
    wav_state,
    wavtokenizer_small,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

from nano4m_cli.cli._app import app
from nano4m_cli.config import build
from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.shards import Split, shard_name, write_shard
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import ConfigError, MediaError, WeightsError
from nano4m_cli.modalities.audio import MODALITY as AUDIO
from nano4m_cli.registry import MODALITIES, TOKENIZERS
from nano4m_cli.spec import read_spec
from nano4m_cli.tokenizers._base import open_tokenizer, save_tokenizer
from nano4m_cli.tokenizers._codec import resample
from nano4m_cli.tokenizers._fsq import FSQ

SOUND = {  # which: (folder, options, samples per frame, its rate)
    "speechtokenizer": (speechtokenizer_small, {"codebooks": BOOKS}, 320, 16_000),
    "speechtokenizer, snake": (lambda: speechtokenizer_small("Snake"), {"codebooks": BOOKS}, 320, 16_000),
    "wavtokenizer": (wavtokenizer_small, {}, 320, 24_000),
    "wavtokenizer at 40": (lambda: wavtokenizer_small(40), {}, 600, 24_000),
}


def make(name, weights, samples=12_031, **options):
    cls = TOKENIZERS.get(name)
    return cls("audio", build(cls.Options, {"weights": str(weights), **options}, name), {"seconds": samples / 24_000})


@functools.cache
def loaded(which):
    weights, options, _, _ = SOUND[which]
    return make(re.split(r"\W", which)[0], weights(), **options)


def codec(which, samples=12_031):
    first, (weights, options, hop, rate) = loaded(which), SOUND[which]
    tokenizer = make(first.name, weights(), samples, **options)
    tokenizer.found, tokenizer.hashes, tokenizer.model = first.found, first.hashes, first.model
    return tokenizer, hop, rate


def sounds(n=3, samples=12_031, seed=5):
    return [w[0].numpy() for w in waves(n, samples, seed)]


def saved(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    return folder


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


# -- sound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["ELU", "Snake"])
def test_speechtokenizer_is_what_a_plain_computation_makes_of_the_published_tensors(activation):
    state, raw = speech_state(activation), sounds(1)[0]
    tokenizer = codec("speechtokenizer" if activation == "ELU" else "speechtokenizer, snake")[0]
    books = torch.stack([state[f"quantizer.vq.layers.{q}._codebook.embed"] for q in range(BOOKS)])
    wanted = nearest(books, encode(state, "encoder", STRIDES, resample(torch.from_numpy(raw), 24_000, 16_000)))
    codes_TQ = tokenizer.encode([raw])[0].reshape(tokenizer.spec().shape)
    assert (codes_TQ.T == wanted.numpy()).mean() > 0.99  # a tie may go either way
    summed = sum(books[q][torch.from_numpy(codes_TQ[:, q])] for q in range(BOOKS))
    wave = decode(state, "decoder", STRIDES, summed.T)
    back = tokenizer.decode([codes_TQ.reshape(-1)])[0]
    assert wave.std() > 0.01 and np.abs(back - resample(wave, 16_000, 24_000).clamp(-1, 1).numpy()[:12_031]).max() < 1e-4


@pytest.mark.parametrize("rate", FRAMES)
def test_wavtokenizer_is_what_a_plain_computation_makes_of_the_published_tensors(rate):
    state, raw, (ratios, hop) = wav_state(rate), sounds(1)[0], FRAMES[rate]
    tokenizer, name = codec("wavtokenizer" if rate == 75 else "wavtokenizer at 40")[0], "feature_extractor.encodec"
    book = state[f"{name}.quantizer.vq.layers.0._codebook.embed"]
    wanted = nearest(book[None], encode(state, f"{name}.encoder", ratios, torch.from_numpy(raw)))
    ids = tokenizer.encode([raw])[0]
    assert (ids == wanted[0].numpy()).mean() > 0.99
    spectrum = vocode(state, book[torch.from_numpy(ids)].T, hop)
    # torch's own inverse loses half a window at both ends: so many samples fewer, half a hop later.
    wave = torch.istft(spectrum, 4 * hop, hop, window=torch.hann_window(4 * hop)).clamp(-1, 1).numpy()
    back = tokenizer.decode([ids])[0]
    part = back[hop // 2 :][: len(wave)]
    assert wave.std() > 0.01 and len(part) > 0.9 * len(back) and np.abs(part - wave[: len(part)]).max() < 1e-4


def test_the_ends_of_a_sound_of_spectra_are_those_of_overlapping_windows():
    """Against a loop over frames: the first and last samples too, which torch.istft does not give."""
    head = codec("wavtokenizer")[0].model.head
    spectrum = torch.randn(641, 7, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    total, weight = np.zeros(6 * 320 + 1280), np.zeros(6 * 320 + 1280)
    window = torch.hann_window(1280).numpy().astype(float)
    for t in range(7):
        total[t * 320 : t * 320 + 1280] += np.fft.irfft(spectrum[:, t].numpy()) * window
        weight[t * 320 : t * 320 + 1280] += window**2
    wanted = (total / np.maximum(weight, 1e-12))[480:-480]
    got = head.inverse(spectrum[None])[0].numpy()
    assert got.shape == (7 * 320,) and np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("which", SOUND)
@pytest.mark.parametrize("samples", [1, 319, 6001, 24_000])
def test_sounds_come_back_with_exactly_as_many_samples(which, samples):
    tokenizer, hop, rate = codec(which, samples)
    spec = tokenizer.spec()
    assert spec.shape == (math.ceil(math.ceil(samples * rate / 24_000) / hop), tokenizer.codebooks)
    assert spec.vocab_size == ENTRIES
    for raw in [sounds(1, max(samples, 2))[0], sounds(1, samples + 777)[0], sounds(1, 500)[0]]:
        ids = tokenizer.encode([raw])[0]
        assert len(ids) == spec.slots
        back = tokenizer.decode([ids])[0]
        assert back.shape == (samples,) == tokenizer.comparable(raw).shape and back.dtype == np.float32
        assert np.isfinite(back).all() and np.abs(back).max() <= 1


@pytest.mark.parametrize("which", SOUND)
def test_codes_depend_on_sounds_and_sounds_on_codes(which):
    tokenizer, _, rate = codec(which)
    spec, raws = tokenizer.spec(), sounds()
    ids = tokenizer.encode(raws)
    assert spec.kind == "codes" and spec.preprocess["codec_rate"] == rate
    for book in np.moveaxis(np.stack(ids).reshape(3, *spec.shape), -1, 0):
        assert len(np.unique(book)) >= 5 and (book != book[:1]).mean() > 0.1
    assert all(np.array_equal(tokenizer.encode([r])[0], i) for r, i in zip(raws, ids, strict=True)), "alone or together"
    a, b, _ = tokenizer.decode(ids)
    assert a.std() > 0.01 and (a - b).std() > 0.01 and np.std(a[-300:]) > 1e-3
    with pytest.raises(MediaError, match="^raw/x.tar, 'k7': empty, not mono, or not finite"):
        tokenizer.encode([np.array([0.1, np.nan], np.float32)], ["raw/x.tar, 'k7'"])


def test_fewer_codebooks_are_the_first_of_more():
    raw = sounds(1)
    few, all_ = (make("speechtokenizer", speechtokenizer_small(), codebooks=n) for n in (2, BOOKS))
    assert np.array_equal(few.encode(raw)[0].reshape(-1, 2), all_.encode(raw)[0].reshape(-1, BOOKS)[:, :2])
    with pytest.raises(ConfigError, match=f"codebooks=8: .* has 1 to {BOOKS} codebooks"):
        make("speechtokenizer", speechtokenizer_small()).spec()


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, file", [
    ("speechtokenizer", "SpeechTokenizer.pt"), ("wavtokenizer", "WavTokenizer_small_320_24k_4096.ckpt"),
])
def test_the_same_tensors_are_read_from_safetensors(tmp_path, name, file):
    folder = copy_of(LOCAL[name](), tmp_path / "w")
    state = torch.load(folder / file, weights_only=True)
    save_file(state.get("state_dict", state), folder / "any.safetensors")
    options = {"codebooks": 2} if name == "speechtokenizer" else {}
    a, b = make(name, LOCAL[name](), **options), make(name, folder, **options)
    assert b.found["checkpoint"].suffix == ".safetensors", "before the pickled one beside it"
    assert np.array_equal(a.encode(sounds(1))[0], b.encode(sounds(1))[0])
    assert a.spec().tokenizer.weights_sha256 != b.spec().tokenizer.weights_sha256, "another file"


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    for name, options in (("speechtokenizer", {"codebooks": 1}), ("wavtokenizer", {})):
        make(name, LOCAL[name](), **options).spec()
    assert torch.equal(before, torch.get_rng_state())


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_is_more_than_tensors_is_not_run_and_the_hint_converts_it(tmp_path):
    folder, mark = copy_of(wavtokenizer_small(), tmp_path / "w"), tmp_path / "harm"
    path = next(folder.glob("*.ckpt"))
    doc = torch.load(path, weights_only=True)
    torch.save({**doc, "hyper_parameters": {"resume_model": Harm(mark)}}, path)
    with pytest.raises(WeightsError, match="cannot be read as tensors only") as caught:
        make("wavtokenizer", folder).spec()
    assert not mark.exists() and "where you trust it" in caught.value.hint
    exec(re.search(r'python -c "(.*)"', caught.value.hint)[1], {})
    assert mark.exists(), "that runs it"
    assert np.array_equal(make("wavtokenizer", folder).encode(sounds(1))[0], codec("wavtokenizer")[0].encode(sounds(1))[0])


def test_files_that_do_not_fit_are_refused(tmp_path):
    def refuses(match, name, folder):
        with pytest.raises(WeightsError, match=match):
            saved(make(name, folder, **({"codebooks": 2} if name == "speechtokenizer" else {})), tmp_path / "out")
        assert not (tmp_path / "out" / "tokenizer.json").exists()

    folder = copy_of(speechtokenizer_small(), tmp_path / "s")
    path, config = folder / "SpeechTokenizer.pt", json.loads((folder / "config.json").read_text())
    state = torch.load(path, weights_only=True)
    lost = "encoder.model.13.lstm.weight_hh_l1_reverse"
    for match, changed in {
        f"1 tensors are missing, e.g. {lost}": {k: v for k, v in state.items() if k != lost},
        "1 tensors are not of this model, e.g. more.weight": {**state, "more.weight": torch.ones(1)},
        "1 tensors have another shape than its config says, e.g. decoder.model.0": {
            **state, "decoder.model.0.conv.conv.bias": torch.ones(1)},
        f"1 tensors hold numbers that are not finite, e.g. {lost}": {**state, lost: state[lost] * torch.nan},
        "holds no table of tensors": {"model": state},
    }.items():
        torch.save(changed, path)
        refuses(match, "speechtokenizer", folder)
    path.write_bytes(b"PK\x03\x04 and no more")
    refuses("SpeechTokenizer.pt cannot be read as tensors only", "speechtokenizer", folder)
    (folder / "config.json").write_text(json.dumps({**config, "activation": "Tanh", "n_q": None}))
    refuses(r"(?s)activation.*n_q", "speechtokenizer", folder)
    (folder / "config.json").write_text("{")
    refuses("config.json is damaged", "speechtokenizer", folder)

    folder = copy_of(wavtokenizer_small(), tmp_path / "w")
    path = next(folder.glob("*.yaml"))
    text = path.read_text()
    for match, change in {
        "hop_length and dim do not fit": ("hop_length: 320", "hop_length: 600"),
        "head.init_args.padding": ("padding: same", "padding: center"),
        "num_quantizers": ("num_quantizers: 1", "num_quantizers: 8"),
        "have another shape than its config says": ("vq_bins: 64", "vq_bins: 128"),
        "is not valid YAML": ("model:", "model: ["),
    }.items():
        assert change[0] in text
        path.write_text(text.replace(*change, 1))
        refuses(match, "wavtokenizer", folder)
    path.write_text(text)
    (folder / "other.yaml").write_text("")
    refuses("which config of 'wavtokenizer'.*holds other.yaml, wavtokenizer_small", "wavtokenizer", folder)
    (folder / "other.yaml").unlink()
    next(folder.glob("*.ckpt")).unlink()
    refuses(r"holds no \*.safetensors or \*.ckpt", "wavtokenizer", folder)


@pytest.mark.parametrize("name", LOCAL)
def test_weights_are_looked_for_here_only_and_the_error_says_where_to_put_them(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    modality, size = ("rgb", {"size": [32, 32]}) if name == "cosmos" else ("audio", {"seconds": 1})
    cls = TOKENIZERS.get(name)
    for weights, match in (("", "none is given"), ("fnlp/SpeechTokenizer", "is no folder here"), (str(tmp_path), "holds no")):
        with pytest.raises(WeightsError, match=f"no weights of '{name}': .*{match}") as caught:
            cls(modality, cls.Options(weights=weights), size).spec()
        hint = caught.value.hint
        assert "huggingface.co" in hint and f"into a folder DIR and give {modality}.weights=DIR" in hint


# -- Cosmos -----------------------------------------------------------------------------------------------------------


def cosmos(weights, height=32, width=48, frames=None, trust=True):
    cls = TOKENIZERS.get("cosmos")
    size = {"size": [height, width], **({"frames": frames} if frames else {})}
    options = {"weights": str(weights), "trust_torchscript": trust}
    return cls("video" if frames else "rgb", build(cls.Options, options, "cosmos"), size)


def scene(seed, *shape):
    """Return uint8 (..., 3): colours that change slowly, with noise."""
    rng = np.random.default_rng(seed)
    slow = sum(np.sin(np.indices(shape)[i] / rng.uniform(4, 15) + rng.uniform(0, 6))[..., None] * rng.uniform(20, 60, 3)
               for i in range(len(shape)))
    return np.clip(128 + slow + rng.normal(0, 5, (*shape, 3)), 0, 255).astype(np.uint8)


def plain_codes(raw, space, time):
    """Codes of uint8 (T, H, W, 3), code by code, with the weights of the small programs."""
    weight = 3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).numpy().astype(float)
    x = np.concatenate([raw[:1]] * (time - 1) + [raw]) / 127.5 - 1
    t, h, w = x.shape[0] // time, x.shape[1] // space, x.shape[2] // space
    out = np.zeros((t, h, w), int)
    for k, i, j in np.ndindex(t, h, w):
        patch = x[k * time : (k + 1) * time, i * space : (i + 1) * space, j * space : (j + 1) * space]
        _, code = FSQ(LEVELS)(torch.from_numpy(weight @ patch.mean((0, 1, 2))).float())
        out[k, i, j] = int(code)
    return out


@pytest.mark.parametrize("space", [8, 16])
def test_pictures_become_grids_of_codes(space):
    tokenizer, raws = cosmos(cosmos_small(space)), [scene(s, 32, 48) for s in range(3)]
    spec, ids = tokenizer.spec(), tokenizer.encode(raws)
    assert (spec.kind, spec.shape, spec.vocab_size, spec.levels) == ("grid", (32 // space, 48 // space), 64_000, LEVELS)
    assert spec.tokenizer.config == {} and spec.preprocess == {"size": [32, 48], "scale": "x / 127.5 - 1"}
    for raw, row in zip(raws, ids, strict=True):
        spec.check_ids(row, "test")
        assert (row.reshape(spec.shape) == plain_codes(raw[None], space, 1)[0]).mean() > 0.99
        assert np.array_equal(tokenizer.encode([raw])[0], row)
    assert len(np.unique(np.stack(ids))) > len(ids[0])
    for raw, back in zip(raws, tokenizer.decode(ids), strict=True):
        assert back.shape == raw.shape and back.dtype == np.uint8
        means = [x.reshape(32 // space, space, 48 // space, space, 3).mean((1, 3)) for x in (raw, back)]
        assert np.abs(means[0] - means[1]).mean() < 25, "of the colours of patches, which is what this small model codes"
    values = FSQ(LEVELS).decode(torch.from_numpy(np.stack(ids))).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(tokenizer.decode_values(values + 0.01), tokenizer.decode(ids), strict=True))


@pytest.mark.parametrize("space, time, frames", [(8, 4, 9), (8, 8, 9), (16, 8, 17), (8, 4, 1)])
def test_videos_become_grids_in_time_too(space, time, frames):
    tokenizer, raw = cosmos(cosmos_small(space, time), frames=frames), scene(1, frames, 32, 48)
    spec, ids = tokenizer.spec(), tokenizer.encode([raw])
    assert spec.shape == (1 + (frames - 1) // time, 32 // space, 48 // space) and spec.preprocess["frames"] == frames
    assert (ids[0].reshape(spec.shape) == plain_codes(raw, space, time)).mean() > 0.99
    back = tokenizer.decode(ids)[0]
    assert back.shape == raw.shape and back.dtype == np.uint8 and back.std() > 5
    longer = scene(2, frames + 5, 64, 48)
    fitted, told = tokenizer.adapt(longer)
    assert fitted.shape == raw.shape and "was cut and cropped to its centre and resized" in told
    assert tokenizer.adapt(raw) == (raw, None)
    short = tokenizer.adapt(raw[:1].repeat(max(frames - 2, 1), 0))[0]
    assert short.shape == raw.shape


def test_published_programs_of_half_precision_run_in_it():
    tokenizer, full = cosmos(cosmos_small(half=True)), cosmos(cosmos_small())
    raws = [scene(s, 32, 48) for s in range(3)]
    same = np.stack(tokenizer.encode(raws)) == np.stack(full.encode(raws))
    assert same.mean() > 0.9 and tokenizer.decode(tokenizer.encode(raws))[0].shape == (32, 48, 3)


def test_torchscript_is_run_only_where_it_is_trusted(monkeypatch):
    ran = []
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: ran.append(a))
    with pytest.raises(WeightsError, match="encoder.jit is TorchScript, a program that would be run here") as caught:
        cosmos(cosmos_small(), trust=False).spec()
    assert caught.value.hint.endswith("give rgb.trust_torchscript=true") and ran == []


def test_programs_are_checked_before_they_run_again(tmp_path, monkeypatch):
    weights = copy_of(cosmos_small(), tmp_path / "programs" / "DI8x8")
    raw = scene(0, 32, 48)
    folder = saved(cosmos(weights), tmp_path / "data" / "tokenizers" / "rgb")
    ids = open_tokenizer(folder).encode([raw])[0]
    assert np.array_equal(ids, cosmos(cosmos_small()).encode([raw])[0])
    ran, real = [], torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: ran.append(a) or real(*a, **k))
    shutil.copy(Path(cosmos_small(16)) / "decoder.jit", weights)
    with pytest.raises(WeightsError, match="decoder.jit is not what the tokens in use were made with"):
        open_tokenizer(folder).encode([raw])
    inside = copy_of(cosmos_small(), tmp_path / "data" / "tokenizers" / "programs")
    doc = json.loads((folder / "tokenizer.json").read_text())
    doc["options"]["weights"] = str(inside)
    (folder / "tokenizer.json").write_text(json.dumps(doc))
    with pytest.raises(WeightsError, match="lies in the data set: programs that come with one are not run"):
        open_tokenizer(folder)
    with pytest.raises(WeightsError, match="lies in the data set"):
        saved(cosmos(inside), tmp_path / "data" / "tokenizers" / "other")
    assert ran == []


def test_programs_and_values_that_do_not_fit_are_refused(tmp_path):
    picture, video = cosmos_small(), cosmos_small(8, 4)
    with pytest.raises(ConfigError, match="rgb of 36 x 48 .height x width. does not divide") as caught:
        cosmos(picture, 36).spec()
    assert caught.value.hint == "fetch it in multiples of 8 pixels"
    with pytest.raises(ConfigError, match="does not divide") as caught:
        cosmos(video, frames=8).spec()
    assert caught.value.hint == "fetch it in multiples of 8 pixels and 1 + multiples of 4 frames"
    with pytest.raises(ConfigError, match="the data set gives no size of 'audio'"):
        TOKENIZERS.get("cosmos")("audio", TOKENIZERS.get("cosmos").Options(), {"seconds": 1})
    with pytest.raises(MediaError, match="k1: rgb is 48 x 16 pixels, this tokenizer takes 48 x 32"):
        cosmos(picture).encode([scene(0, 32, 48), scene(0, 16, 48)], ["k0", "k1"])
    with pytest.raises(MediaError, match="k0: rgb is a picture of grey"):
        cosmos(picture).encode([scene(0, 32, 48)[..., 0]], ["k0"])
    with pytest.raises(MediaError, match="k0: video is of 5 x 32 x 48 x 3, this tokenizer takes 9 x 32 x 48 x 3"):
        cosmos(video, frames=9).encode([scene(0, 5, 32, 48)], ["k0"])

    def program(module, name, folder):
        folder.mkdir(exist_ok=True)
        shutil.copy(Path(picture) / ("decoder.jit" if name == "encoder" else "encoder.jit"), folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.trace(module, torch.zeros(1, 3, 64, 64)), str(folder / f"{name}.jit"))
        return folder

    continuous = torch.nn.AvgPool2d(8)
    with pytest.raises(WeightsError, match="encoder.jit makes .* no discrete model for rgb"):
        cosmos(program(continuous, "encoder", tmp_path / "ci")).spec()
    with pytest.raises(WeightsError, match="encoder.jit fails on video"):
        cosmos(program(torch.nn.Conv2d(3, 4, 8), "encoder", tmp_path / "conv"), frames=9).spec()
    mixed = cosmos(copy_of(picture, tmp_path / "mixed"))
    shutil.copy(Path(cosmos_small(16)) / "decoder.jit", tmp_path / "mixed")
    with pytest.raises(WeightsError, match=r"decoder.jit makes \(1, 3, 64, 96\) of \(4, 6\)"):
        mixed.decode(mixed.encode([scene(0, 32, 48)]))
    (tmp_path / "conv" / "encoder.jit").write_bytes(b"no program")
    with pytest.raises(WeightsError, match="encoder.jit is no TorchScript"):
        cosmos(tmp_path / "conv").spec()


# -- data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def space(tmp_path):
    """A workspace with a data set of sounds, pictures and videos: eight to train with, in four shards, two to validate with."""
    dataset = DatasetFolder(tmp_path / "data" / "few")
    splits = {"train": 8, "val": 2}
    write_json(dataset.info_path, {
        "name": "few", "source": "scenes", "options": {}, "version": 1, "splits": splits,
        "modalities": ["audio", "rgb", "video"],
        "sizes": {"audio": {"seconds": 0.2}, "rgb": {"size": [16, 24]}, "video": {"frames": 5, "size": [16, 16], "fps": 8.0}},
    })

    def members(i):
        audio = AUDIO.to_bytes(sounds(1, 4000 + 333 * i, seed=i)[0])
        rgb, video = (MODALITIES.get(m).to_bytes(scene(i, *n)) for m, n in (("rgb", (16, 24)), ("video", (5, 16, 16))))
        return {"audio.flac": audio, "rgb.png": rgb, "video.png": video}

    for split, count in splits.items():
        for shard in range(count // 2):
            both = [(f"{split}-{i}", members(i)) for i in (2 * shard, 2 * shard + 1)]
            write_shard(dataset.raw(split) / shard_name(shard), both)
    return tmp_path, dataset


@pytest.mark.parametrize("name, modality, weights, options, shape", [
    ("speechtokenizer", "audio", speechtokenizer_small, ["codebooks=4"], [10, 4]),
    ("wavtokenizer", "audio", wavtokenizer_small, [], [15, 1]),
    ("cosmos", "rgb", cosmos_small, ["trust_torchscript=true"], [2, 3]),
    ("cosmos", "video", lambda: cosmos_small(8, 4), ["trust_torchscript=true"], [2, 2, 2]),
])
def test_a_data_set_is_tokenised(space, name, modality, weights, options, shape):
    root, dataset = space
    settings = [f"{modality}.{o}" for o in [f"name={name}", f"weights={weights()}", *options]]
    result = CliRunner().invoke(app, ["tokenize", "-m", modality, *settings, "--root", str(root), "--workers", "1", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["modalities"][modality]
    assert (told["tokenizer"], told["shape"], told["made"]) == (name, shape, 10)
    spec, tokenizer = read_spec(dataset.spec_path(modality)), open_tokenizer(dataset.tokenizer(modality))
    assert spec == tokenizer.spec() and "trust_torchscript" not in spec.tokenizer.config
    tokens = Split(dataset.tokens(modality, "train"))
    rows = np.stack([np.load(io.BytesIO(tokens.read(i, f"{modality}.npy")), allow_pickle=False)[0] for i in range(8)])
    assert rows.shape == (8, np.prod(shape)) and rows.dtype == np.uint16 and len(np.unique(rows)) > 15
    assert len(tokenizer.decode(list(rows))) == 8
    assert CliRunner().invoke(app, ["tokenize", "--check", "--root", str(root)]).exit_code == 0


def test_without_trust_the_command_line_says_why(space):
    root, dataset = space
    command = ["tokenize", "-m", "rgb", "rgb.name=cosmos", f"rgb.weights={cosmos_small()}", "--root", str(root)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "rgb.trust_torchscript=true" in result.stderr and "Traceback" not in result.stderr
    assert not dataset.tokenizer("rgb").exists()


def test_published_settings_are_read_with_what_else_they_hold():
    """The YAML has numbers as text, classes that are not looked at, and settings of the trainer."""
    doc = yaml.safe_load(next(Path(wavtokenizer_small()).glob("*.yaml")).read_text())
    assert {"trainer", "data", "seed_everything"} <= set(doc) and "class_path" in doc["model"]["init_args"]["head"]
    assert codec("wavtokenizer")[0].model.config.sample_rate == 24_000

"""Pretrained tokenizers: codes as the libraries make them, sounds of exact length, and weights that are not there or wrong."""

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_factory import WEIGHTS, WORDS, dac_small, encodec_file, encodec_full, encodec_small, mimi_small, text_small, waves
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nano4m_cli.cli._app import app
from nano4m_cli.config import build
from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.shards import Split, shard_name, write_shard
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import ConfigError, MediaError, TokenError, WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import MODALITY as AUDIO
from nano4m_cli.registry import TOKENIZERS
from nano4m_cli.spec import read_spec
from nano4m_cli.tokenizers import _patterns, _pretrained
from nano4m_cli.tokenizers._base import open_tokenizer, save_tokenizer
from nano4m_cli.train.tokenizing import fit_missing, tokenize

SPEECH = Path(os.environ.get("NANO4M_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "librispeech3"
BANDWIDTHS = {1.5: 2, 3: 4, 6: 8, 12: 16, 24: 32}
CODECS = {
    "encodec": (encodec_small, {"bandwidth": 6}, 320, 24_000),
    "mimi": (mimi_small, {"codebooks": 4}, 1920, 24_000),
    "dac": (dac_small, {"codebooks": 3}, 320, 24_000),
    "dac at 44.1 kHz": (lambda: dac_small(44_100), {"codebooks": 3}, 512, 44_100),
    "dac at 16 kHz": (lambda: dac_small(16_000), {"codebooks": 3}, 320, 16_000),
}


def make(name, weights, samples=12_031, **options):
    cls = TOKENIZERS.get(name)
    return cls("audio", build(cls.Options, {"weights": str(weights), **options}, name), {"seconds": samples / 24_000})


@functools.cache
def loaded(which):
    weights, options, _, _ = CODECS[which]
    tokenizer = make(which.split()[0], weights(), **options)
    tokenizer.spec()
    return tokenizer


def sharing(tokenizer, other):
    """Return `tokenizer` with the model that `other` has loaded."""
    tokenizer.found, tokenizer.hashes, tokenizer.model = other.found, other.hashes, other.model
    return tokenizer


def codec(which, samples=12_031):
    weights, options, hop, rate = CODECS[which]
    return sharing(make(which.split()[0], weights(), samples, **options), loaded(which)), hop, rate


def sounds(n=3, samples=12_031, seed=5):
    return [w[0].numpy() for w in waves(n, samples, seed)]


# -- codes and sounds -------------------------------------------------------------------------------------------------


def alive(codes_STQ, fewest=5):
    """Assert that no codebook is constant, nor any frame of it the same for all sounds."""
    for book in np.moveaxis(codes_STQ, -1, 0):
        assert len(np.unique(book)) >= fewest and (book != book[:1]).mean() > 0.1


@pytest.fixture(scope="module")
def readers():
    """The same weights of the published size, read by transformers and by the package, at 24 kbit/s."""
    return make("encodec", encodec_full(), bandwidth=24), make("encodec", encodec_file(), bandwidth=24)


def test_both_readers_of_encodec_give_the_same_codes_and_sounds(readers):
    a, b = readers
    assert not a.packaged and b.packaged
    raws = sounds()
    ids = a.encode(raws)
    alive(np.stack(ids).reshape(3, 38, 32))
    for x, y in zip(ids, b.encode(raws), strict=True):
        assert np.array_equal(x, y)
    for x, y in zip(a.decode(ids), b.decode(ids), strict=True):
        assert x.std() > 0.01 and np.abs(x - y).max() < 1e-5


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_bandwidth_says_how_many_codebooks_are_used(readers, bandwidth):
    """Fewer codebooks are the first ones of more, as the residuals are coded in turn."""
    raws, codes = sounds(1, 4000), []
    for reader in readers:
        tokenizer = sharing(make("encodec", reader.options.weights, 4000, bandwidth=bandwidth), reader)
        if tokenizer.packaged:
            tokenizer.model.set_target_bandwidth(bandwidth)
        spec = tokenizer.spec()
        assert spec.shape == (13, BANDWIDTHS[bandwidth]) and spec.vocab_size == 1024
        codes.append(tokenizer.encode(raws)[0].reshape(spec.shape))
    whole = readers[0].encode([np.pad(raws[0], (0, 8031))])[0].reshape(38, 32)
    assert np.array_equal(*codes) and np.array_equal(codes[0][:12], whole[:12, : BANDWIDTHS[bandwidth]])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_ids_are_those_of_the_libraries_frame_by_frame():
    """Against the plain calls of transformers and of the package: slot t * Q + q holds codebook q of frame t."""
    ensure_torchaudio()
    import encodec
    import transformers

    raw = sounds(1)[0]
    x = torch.from_numpy(raw)[None, None]
    package = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    package.load_state_dict(torch.load(encodec_file(), weights_only=True))
    package.set_target_bandwidth(3)
    with torch.inference_mode():
        of = {
            "encodec": transformers.EncodecModel.from_pretrained(encodec_small()).encode(x, bandwidth=6.0).audio_codes[0, 0],
            "mimi": transformers.MimiModel.from_pretrained(mimi_small()).encode(x, num_quantizers=4).audio_codes[0],
            "dac": transformers.DacModel.from_pretrained(dac_small()).encode(
                torch.nn.functional.pad(x, (0, 38 * 320 - 12_031))).audio_codes[0],
        }
        own = package.encode(x)[0][0][0]
    for name, wanted in of.items():
        got = codec(name)[0].encode([raw])[0].reshape(-1, len(wanted)).T
        assert np.array_equal(got, wanted.numpy())
    got = make("encodec", encodec_file(), bandwidth=3).encode([raw])[0]
    assert all(got[t * 4 + q] == own[q, t] for t in range(38) for q in range(4))


@pytest.mark.parametrize("which", CODECS)
@pytest.mark.parametrize("samples", [1, 319, 1920, 6001, 24_000])
def test_sounds_come_back_with_exactly_as_many_samples(which, samples):
    tokenizer, hop, rate = codec(which, samples)
    inside = -(-samples * rate // 24_000)
    assert tokenizer.spec().shape[0] == -(-inside // hop)
    for raw in [*sounds(2, max(samples, 2)), sounds(1, samples + 777)[0], sounds(1, 500)[0]]:
        ids = tokenizer.encode([raw])[0]
        assert len(ids) == tokenizer.spec().slots
        back = tokenizer.decode([ids])[0]
        assert back.shape == (samples,) == tokenizer.comparable(raw).shape and back.dtype == np.float32
        assert np.isfinite(back).all() and np.abs(back).max() <= 1


@pytest.mark.parametrize("which", CODECS)
def test_codes_depend_on_sounds_and_sounds_on_codes(which):
    tokenizer, _, rate = codec(which)
    spec, ids = tokenizer.spec(), tokenizer.encode(sounds())
    assert spec.kind == "codes" and spec.preprocess["rate"] == 24_000 and spec.preprocess["samples"] == 12_031
    assert spec.preprocess["codec_rate"] == rate
    alive(np.stack(ids).reshape(3, *spec.shape), fewest=4)
    a, b, _ = tokenizer.decode(ids)
    assert a.std() > 0.01 and (a - b).std() > 0.01
    assert np.std(a[-300:]) > 1e-3, "to the end"
    longer = np.concatenate([sounds(1)[0], np.ones(999, np.float32)])
    assert np.array_equal(tokenizer.encode([longer])[0], ids[0]), "what exceeds the length is cut"
    assert "cut to 0.50 s" in tokenizer.adapt(longer)[1]


@pytest.mark.parametrize("which", CODECS)
@pytest.mark.parametrize("bad", [np.zeros(0), np.array([0.1, np.nan] * 50), np.full(99, np.inf), np.zeros((2, 99))])
def test_sounds_that_cannot_be_used_are_named(which, bad):
    with pytest.raises(MediaError, match="^raw/x.tar, 'k7': empty, not mono, or not finite"):
        codec(which)[0].encode([sounds(1)[0], bad.astype(np.float32)], ["raw/x.tar, 'k6'", "raw/x.tar, 'k7'"])


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    for tokenizer in [make("encodec", encodec_file()), make("encodec", encodec_small()), make("dac", dac_small(), codebooks=2)]:
        tokenizer.spec()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no {SPEECH} (set NANO4M_TEST_DATA)")
def test_recorded_speech_has_the_same_codes_by_both_readers():
    raws = [AUDIO.read_file(p)[24_000:] for p in sorted(SPEECH.glob("*.hq.ogg"))]
    assert len(raws) == 3
    a, b = (make("encodec", w(), 48_000, bandwidth=6) for w in (encodec_full, encodec_file))
    ids = a.encode(raws)
    alive(np.stack(ids).reshape(3, 150, 8), fewest=10)
    assert all(np.array_equal(x, y) for x, y in zip(ids, b.encode(raws), strict=True))
    assert all(w.shape == (48_000,) and w.std() > 1e-3 for w in b.decode(ids))


# -- weights ----------------------------------------------------------------------------------------------------------


def saved(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    save_tokenizer(tokenizer, folder)
    return folder


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def test_the_spec_has_the_hash_of_the_weights_and_not_their_place(tmp_path):
    here, there = make("mimi", mimi_small(), codebooks=2), make("mimi", copy_of(mimi_small(), tmp_path / "m"), codebooks=2)
    assert here.spec() == there.spec() and here.spec().tokenizer.weights_sha256 == sha256(tmp_path / "m/model.safetensors")
    assert here.spec().tokenizer.config == {"codebooks": 2}


def test_a_data_set_keeps_the_place_and_refuses_other_weights_there(tmp_path):
    weights = copy_of(mimi_small(), tmp_path / "weights")
    folder = saved(make("mimi", weights, codebooks=4), tmp_path / "audio")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2000
    ids = open_tokenizer(folder).encode(sounds(1))[0]

    moved = weights.rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match="weights") as caught:
        open_tokenizer(folder)
    assert caught.value.hint.endswith(f'into a folder DIR and write DIR as "weights" into {folder / "tokenizer.json"}')
    doc = json.loads((folder / "tokenizer.json").read_text())
    doc["options"]["weights"] = str(moved)
    (folder / "tokenizer.json").write_text(json.dumps(doc))
    assert np.array_equal(open_tokenizer(folder).encode(sounds(1))[0], ids)

    state = load_file(moved / "model.safetensors")
    next(v for k, v in state.items() if k.endswith("embed_sum"))[0, 0] += 1
    save_file(state, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"model.safetensors is not what the tokens in use were made with"):
        open_tokenizer(folder)
    (folder / "weights.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"config.json is not what .* none is expected"):
        open_tokenizer(folder)
    (folder / "weights.json").write_text("[")
    with pytest.raises(WeightsError, match=r"weights.json is damaged"):
        open_tokenizer(folder)


def test_a_relative_place_is_kept_whole(tmp_path, monkeypatch):
    copy_of(mimi_small(), tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert make("mimi", "m").options.weights == str(tmp_path / "m")


def test_names_of_earlier_weight_norm_are_read(tmp_path):
    """The published safetensors of EnCodec say weight_g and weight_v."""
    folder = copy_of(encodec_small(), tmp_path / "old")
    state = load_file(folder / "model.safetensors")
    old = {
        k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): v
        for k, v in state.items()
    }
    assert sum("weight_g" in k for k in old) > 10
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    assert np.array_equal(make("encodec", folder).encode(sounds(1))[0], make("encodec", encodec_small()).encode(sounds(1))[0])


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_run(tmp_path):
    mark, bad = tmp_path / "harm", tmp_path / "weights.th"
    torch.save({"x": Harm(mark)}, bad)
    with pytest.raises(WeightsError, match="not a table of this model's tensors"):
        make("encodec", bad).spec()
    (tmp_path / "f").mkdir()
    shutil.copy(Path(encodec_small()) / "config.json", tmp_path / "f")
    (tmp_path / "f" / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(mark)))
    with pytest.raises(WeightsError, match=r"holds no model.safetensors \(pytorch_model.bin would have to be unpickled"):
        make("encodec", tmp_path / "f").spec()
    assert not mark.exists()
    pickle.loads((tmp_path / "f" / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "it would have done harm"


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def refuses(match, name="encodec", weights=None, **options):
        with pytest.raises((WeightsError, ConfigError), match=match):
            saved(make(name, weights or encodec_small(), **options), tmp_path / "out")
        assert not (tmp_path / "out" / "tokenizer.json").exists()

    refuses("type 'mimi', 'encodec' is needed", weights=mimi_small())
    refuses("made for 1.5, 3, 6 kbit/s, not 24", bandwidth=24)
    refuses("one of 1.5, 3, 6, 12, 24 kbit/s", bandwidth=7)
    refuses("has 1 to 4 codebooks", "mimi", mimi_small(), codebooks=5)
    refuses("has 1 to 3 codebooks", "dac", dac_small(), codebooks=0)
    refuses("is no file, and its package reads one, encodec_24khz-d7cc33bc.th", backend="encodec")
    named = tmp_path / "encodec_24khz-d7cc33bc.th"
    os.link(encodec_file(), named)
    refuses("its sha256 begins with d7cc33bc", weights=named)

    stereo = copy_of(encodec_small(), tmp_path / "stereo")
    config = json.loads((stereo / "config.json").read_text())
    (stereo / "config.json").write_text(json.dumps({**config, "chunk_length_s": 1.0, "overlap": 0.01}))
    refuses("mono of 24000 Hz in one piece", weights=stereo)
    (stereo / "config.json").write_text("{")
    refuses("config.json is damaged", weights=stereo)
    for name, weights in [("encodec", encodec_small()), ("mimi", mimi_small()), ("dac", dac_small())]:
        part = copy_of(weights, tmp_path / name)
        state = load_file(part / "model.safetensors")
        lost = max(state)
        save_file({k: v for k, v in state.items() if k != lost}, part / "model.safetensors", {"format": "pt"})
        refuses("1 tensors are missing", name, part, **({} if name == "encodec" else {"codebooks": 2}))
        data = (part / "model.safetensors").read_bytes()
        (part / "model.safetensors").write_bytes(data[: len(data) // 2])
        refuses(f"the weights of '{name}'", name, part)


OFFLINE = """
import http.server, os, sys, threading, time
from pathlib import Path
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = Path(os.environ["FILES"], self.path.rsplit("/")[-1])
        known = "/some/text/resolve/" in self.path and body.is_file()
        self.send_response(200 if known else 404)
        told = {"X-Repo-Commit": "c" * 40, "ETag": '"%s"' % body.name} if known else {"X-Error-Code": "EntryNotFound"}
        for k, v in told.items():
            self.send_header(k, v)
        self.send_header("Content-Length", str(body.stat().st_size if known else 0))
        self.end_headers()
        if known and self.command == "GET":
            self.wfile.write(body.read_bytes())
    do_HEAD = do_GET
    def log_message(self, *args): pass
hub = http.server.HTTPServer(("127.0.0.1", 0), Hub)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
threading.Thread(target=hub.serve_forever, daemon=True).start()
from nano4m_cli.errors import WeightsError
from nano4m_cli.tokenizers._pretrained import find
get = lambda repo, *files: find("hf_text", repo, files, ["special.json"], "give caption.weights=DIR")
first = get("some/text", "tokenizer.json")
try:
    get("some/text", "no.json")
except WeightsError as err:
    print("NONE", err.message)
hub.shutdown(); hub.server_close()
assert get("some/text", "tokenizer.json") == first and first["tokenizer.json"].parent.name == "c" * 40, first
assert first["tokenizer.json"].read_bytes() == Path(os.environ["FILES"], "tokenizer.json").read_bytes()
start = time.monotonic()
try:
    get("some/other", "tokenizer.json")
except WeightsError as err:
    print("GONE", err.message, "|", err.hint)
print("TOOK", time.monotonic() - start)
print(sorted(first), "torch" in sys.modules and "transformers" in sys.modules)
"""


def test_weights_come_from_the_hub_and_are_not_waited_for_without_one(tmp_path):
    """A hub of our own gives a file, which is then found in the cache; with it gone, another one fails at once."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "FILES": text_small(), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "NONE no weights of 'hf_text': 'some/text' gives no no.json" in done.stdout
    assert "GONE no weights of 'hf_text': 'some/other' is no folder here and not in the hub's cache" in done.stdout
    assert "cannot be reached to fetch tokenizer.json" in done.stdout
    assert "hf download some/other tokenizer.json" in done.stdout
    assert float(done.stdout.split("TOOK ")[1].split()[0]) < 5 and "['tokenizer.json'] False" in done.stdout


# -- data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def space(tmp_path, monkeypatch):
    """A workspace with a data set of eight sounds of unequal length in four shards, and two validation ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    dataset = DatasetFolder(tmp_path / "data" / "tones")
    splits = {"train": 8, "val": 2}
    write_json(dataset.info_path, {
        "name": "tones", "source": "scenes", "options": {}, "version": 1, "modalities": ["audio", "caption"], "splits": splits,
        "sizes": {"audio": {"seconds": 0.2}},
    })
    for split, count in splits.items():
        for shard in range(count // 2):
            samples = [(f"{split}-{i}", sounds(1, 4000 + 333 * i, seed=i)[0]) for i in (2 * shard, 2 * shard + 1)]
            members = ((k, {"audio.flac": AUDIO.to_bytes(w), "caption.txt": f"sound {k}".encode()}) for k, w in samples)
            write_shard(dataset.raw(split) / shard_name(shard), members)
    return Workspace(tmp_path)


def run(*args):
    env = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="nano4m", env=env)


def test_a_data_set_is_tokenized_and_read_back(space):
    dataset, settings = space.dataset(), ["audio.name=encodec", f"audio.weights={encodec_small()}", "audio.bandwidth=3"]
    result = run("tokenize", "-m", "audio", *settings, "--root", space.root, "--workers", 1, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["modalities"]["audio"]
    assert (told["tokenizer"], told["kind"], told["shape"], told["vocab_size"]) == ("encodec", "codes", [15, 4], 1024)
    assert told["made"] == 10 and not told["fitted"] and told["figures"]["mel_wave"] > 0
    assert 2 / 1024 < told["figures"]["codes_used"] <= 30 / 1024, "of 30 frames, in each codebook"
    spec, tokenizer = read_spec(dataset.spec_path("audio")), open_tokenizer(dataset.tokenizer("audio"))
    assert spec == tokenizer.spec() and spec.tokenizer.weights_sha256 == sha256(encodec_small() + "/model.safetensors")
    raw, tokens = Split(dataset.raw("train")), Split(dataset.tokens("audio", "train"))
    for i in range(8):
        ids = np.load(io.BytesIO(tokens.read(i, "audio.npy")), allow_pickle=False)
        wave = AUDIO.from_bytes(raw.read(i, "audio.flac"), "raw")
        assert ids.shape == (1, 60) and ids.dtype == np.uint16 and len(np.unique(ids)) > 20
        assert np.array_equal(tokenizer.encode([wave])[0], ids[0]) and tokenizer.decode(ids)[0].shape == (4800,)
    assert run("tokenize", "--check", "--root", space.root).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("modality, name", [("audio", "encodec"), ("audio", "dac"), ("caption", "hf_text")])
def test_workers_find_and_load_the_weights_themselves(space, modality, name):
    """Spawned ones; each imports torch and transformers anew, which is what takes its time."""
    dataset, settings = space.dataset(), [f"name={name}", f"weights={WEIGHTS[name]()}", *["codebooks=3"] * (name == "dac")]

    def made(workers):
        assert tokenize(dataset, modality, settings, workers).made == 10
        files = {p.name: p.read_bytes() for p in dataset.tokens(modality, "train").iterdir()}
        shutil.rmtree(dataset.tokens(modality))
        return files

    assert made(2) == made(1)


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_say_what_to_put_where(space, name):
    modality = "caption" if name == "hf_text" else "audio"
    start = time.monotonic()
    result = run("tokenize", "-m", modality, f"{modality}.name={name}", "--root", space.root)
    assert time.monotonic() - start < 10
    assert result.exit_code == 1 and result.stdout == "" and "Traceback" not in result.stderr
    needed = ["tokenizer.json"] if name == "hf_text" else ["config.json", "model.safetensors"]
    for part in (f"no weights of '{name}'", TOKENIZERS.get(name).Options().weights, "HF_HUB_OFFLINE", "hf download", *needed,
                 f"{modality}.weights=DIR", str(space.root / "cache")):
        assert part in result.stderr, part
    assert not space.dataset().tokenizer(modality).exists(), "nothing that stands in the way of the next try"
    plan = run("tokenize", "-m", modality, f"{modality}.name={name}", "--root", space.root, "--dry-run")
    assert plan.exit_code == 0 and name in plan.stdout, "which tokenizer it would be needs no weights"


def test_what_comes_ready_made_is_not_trained(space):
    (space.root / "t.yaml").write_text("task: tokenizer\ntokenizer: {modality: audio, name: dac}\n")
    result = run("train", space.root / "t.yaml", "--root", space.root, "--device", "cpu")
    assert result.exit_code == 2 and "tokenizer 'dac' comes as it is: nothing of it is trained" in result.stderr
    assert "nano4m tokenize --modality audio audio.name=dac" in result.stderr


def test_missing_weights_are_told_before_anything_is_fitted(space):
    with pytest.raises(WeightsError, match="no weights of 'dac'"):
        fit_missing(space.dataset(), {"caption": [], "audio": ["name=dac"]})
    assert not space.dataset().tokenizer("caption").exists()


# -- text -------------------------------------------------------------------------------------------------------------


def text(weights=None, **options):
    cls = TOKENIZERS.get("hf_text")
    return cls("caption", build(cls.Options, {"weights": str(weights or text_small()), **options}, "hf_text"), {})


TEXTS = [*WORDS, "", " ", "  two  spaces ", "line\nbreak\ttab", "UPPER", "\U0001f600 \u0e2d", "the <|endoftext|> mark", "</s>"]


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", None])
def test_text_comes_back_letter_for_letter(end):
    tokenizer = text(text_small(end))
    spec, ids = tokenizer.spec(), tokenizer.encode(TEXTS)
    assert spec.kind == "sequence" and spec.vocab_size == spec.eos + 1 == 301 and spec.shape == (256,)
    assert tokenizer.decode(ids) == TEXTS == [tokenizer.comparable(t) for t in TEXTS]
    for row in ids:
        assert list(np.flatnonzero(row == spec.eos)) == [len(row) - 1]
    assert len(ids[TEXTS.index("")]) == 1 and len(ids[0]) < len(WORDS[0]), "merges are used"


def test_text_ids_are_those_of_transformers():
    ensure_torchaudio()
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_file=text_small() + "/tokenizer.json")
    for row, line in zip(text().encode(WORDS), WORDS, strict=True):
        assert row[:-1].tolist() == other(line, add_special_tokens=False)["input_ids"]


def test_the_end_mark_is_the_one_named(tmp_path):
    folder = copy_of(text_small(), tmp_path / "t")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    stop = {**vocabulary["added_tokens"][-1], "id": 305, "content": "<stop>"}
    vocabulary["added_tokens"].append(stop)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    known = text(folder)
    usual = known.spec().eos
    assert known.spec().vocab_size > usual == 300
    for end in ("<stop>", {"content": "<stop>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        assert text(folder).spec().eos == known.model.token_to_id("<stop>") != usual
    assert text(folder, eos="<|endoftext|>").spec().eos == usual
    with pytest.raises(ConfigError, match=r"has no '<end>'"):
        text(folder, eos="<end>").spec()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer_config.json is damaged"):
        text(folder).spec()
    with pytest.raises(MediaError, match="k1: caption holds the end mark"):
        text(folder, eos="a").encode(["a cube"], ["k1"])


def test_text_that_is_too_long_or_unknown_is_refused():
    with pytest.raises(MediaError, match="k1: caption has 12 tokens, at most 8 fit") as caught:
        text(max_length=8).encode(["q", "zzzzzzzzzzz"], ["k0", "k1"])
    assert caught.value.hint.endswith("caption.max_length=12")
    assert len(text(max_length=12).encode(["zzzzzzzzzzz"])[0]) == 12
    with pytest.raises(TokenError, match="outside its vocabulary"):
        text().decode([np.array([5, 301])])


def test_a_vocabulary_lives_in_the_data_set(tmp_path):
    source = copy_of(text_small(), tmp_path / "t")
    folder = saved(text(source), tmp_path / "caption")
    ids = text(source).encode(WORDS)
    shutil.rmtree(source)
    again = open_tokenizer(folder)
    assert again.decode(ids) == WORDS and again.spec() == text().spec()
    (folder / "vocabulary" / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="is not what the tokens in use were made with"):
        open_tokenizer(folder)
    (source).mkdir()
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="no vocabulary that the tokenizers library reads"):
        text(source).spec()


# -- reading orders ---------------------------------------------------------------------------------------------------


def slow_order(pattern, T, Q):
    """Slots in reading order, by walking the steps."""
    if pattern == "interleaved":
        return [t * Q + q for t in range(T) for q in range(Q)]
    if pattern == "codebook_major":
        return [t * Q + q for q in range(Q) for t in range(T)]
    return [t * Q + q for step in range(T + Q - 1) for q in range(Q) for t in [step - q] if 0 <= t < T]


def test_orders_in_full():
    assert _patterns.order("interleaved", 3, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert _patterns.order("delay", 3, 2).tolist() == [0, 2, 1, 4, 3, 5]
    assert _patterns.order("codebook_major", 3, 2).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("pattern", _patterns.PATTERNS)
@pytest.mark.parametrize("T, Q", [(1, 1), (1, 5), (7, 1), (2, 5), (5, 2), (9, 4)])
def test_orders_are_those_of_a_slow_loop_and_are_undone(pattern, T, Q):
    slots = slow_order(pattern, T, Q)
    assert _patterns.order(pattern, T, Q).tolist() == slots
    codes = np.random.default_rng(T * Q).integers(0, 1024, (T, Q)).astype(np.uint16)
    for offset in (0, 1024):
        flat = _patterns.flatten(codes, pattern, offset)
        assert flat.tolist() == [int(codes[s // Q, s % Q]) + offset * (s % Q) for s in slots]
        assert np.array_equal(_patterns.unflatten(flat, Q, pattern, offset), codes)


def test_ids_that_fill_no_frame_are_refused():
    with pytest.raises(TokenError, match="7 ids are no whole number of frames of 2 codebooks"):
        _patterns.unflatten(np.arange(7), 2, "delay")
    with pytest.raises(AssertionError):
        _patterns.order("sideways", 2, 2)


def test_the_hub_id_is_told_from_a_path():
    ids = ["gpt2", "kyutai/mimi", "facebook/encodec_24khz", "a.b/c-d"]
    paths = ["/a/b", "./a", "../a", "~/a", "a/b/c", "", "a/", ".hidden/x"]
    assert all(_pretrained.HUB_ID.fullmatch(i) for i in ids) and not any(_pretrained.HUB_ID.fullmatch(p) for p in paths)
    for path in paths[:6]:
        with pytest.raises(WeightsError, match="no weights of 'mimi'"):
            make("mimi", path).find()

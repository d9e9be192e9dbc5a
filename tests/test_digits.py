"""The `digits` source: splits that share nothing, labels that are true, and its download path on tiny data."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nano4m_cli.config import apply_overrides, build
from nano4m_cli.data.sources import _digits_files as files
from nano4m_cli.data.sources import _digits_pairs as pairing
from nano4m_cli.data.sources.digits import SURFACES, Source, fields_of
from nano4m_cli.errors import ConfigError, DataError, FetchError, MediaError
from nano4m_cli.registry import MODALITIES

REAL = Path(os.environ.get("NANO4M_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
real_data = pytest.mark.skipif(
    not all((REAL / name).is_dir() for name in ("fsdd/recordings", "mnist_idx", "digits_av")),
    reason=f"no fsdd, mnist_idx and digits_av in {REAL} (set NANO4M_TEST_DATA)",
)


def open_digits(cache, *options, cls=Source):
    source = cls(build(cls.Options, apply_overrides({}, options), "source 'digits'"), cache)
    source.prepare(lambda what, done, total: None)
    return source


def real(*options):
    return open_digits(Path("unused"), f"mirror={REAL}", *options)


def all_pairs(source):
    return [item for plan in source.plan() for item in plan.items]


def assert_disjoint(pairs):
    for what in (lambda p: p.clip, lambda p: (p.part, p.image), lambda p: p.key):
        splits = defaultdict(set)
        for pair in pairs:
            splits[what(pair)].add(pair.split)
        assert max(map(len, splits.values())) == 1
    assert {p.part for p in pairs if p.split == "test"} == {"t10k"}
    assert {p.part for p in pairs if p.split != "test"} == {"train"}


def assert_structure(pairs):
    """Every training clip stands eight times with eight pictures, every other clip once; digits are balanced."""
    uses = Counter((p.split, p.clip) for p in pairs)
    assert {(split, n) for (split, _), n in uses.items()} == {("train", 8), ("val", 1), ("test", 1)}
    assert len({(p.part, p.image) for p in pairs}) == len(pairs)
    digits = Counter((p.split, p.digit) for p in pairs)
    assert len({n for (split, _), n in digits.items() if split == "train"}) == 1


# -- real data --------------------------------------------------------------------------------------------------------


@real_data
@pytest.mark.parametrize("pairs", ["lists", "rule"])
def test_clip_split(pairs):
    source = real(f"pairs={pairs}")
    rows, info = all_pairs(source), source.info()
    assert info.name == "digits" and info.splits == {"train": 19200, "val": 300, "test": 300}
    assert info.ceilings == {"rgb": {"accent": pytest.approx(1 / 3, abs=1e-6)}} and info.pairing == "class"
    assert "differ" not in info.notes and info.options["pairs"] == pairs
    assert_disjoint(rows)
    assert_structure(rows)
    for row in rows:
        index = int(row.clip.removesuffix(".wav").split("_")[2])
        assert row.split == ("test" if index < 5 else "val" if index < 10 else "train")
        assert row.caption == pairing.caption_of(row.digit, row.accent)
    for part in ("train", "t10k"):
        digits = files.labels(REAL, part)
        assert all(digits[r.image] == r.digit for r in rows if r.part == part)


@real_data
@pytest.mark.parametrize(
    "split, test, val, pairs",
    [
        ("speaker", "theo", "yweweler", "lists"),
        ("speaker:theo", "theo", "yweweler", "rule"),
        ("speaker:yweweler", "yweweler", "george", "auto"),
        ("speaker:george", "george", "jackson", "auto"),
    ],
)
def test_speaker_splits(split, test, val, pairs):
    source = real(f"split={split}", f"pairs={pairs}")
    rows, info = all_pairs(source), source.info()
    assert info.name == f"digits-speaker-{test}" and info.splits == {"train": 16000, "val": 500, "test": 500}
    assert info.ceilings == {"rgb": {"accent": 1.0}} and f"Test speaker {test}" in info.notes
    assert_disjoint(rows)
    assert_structure(rows)
    speakers = {s: {r.speaker for r in rows if r.split == s} for s in ("train", "val", "test")}
    assert speakers == {"train": set(pairing.SPEAKERS) - {test, val}, "val": {val}, "test": {test}}


@real_data
def test_lists_are_used_as_they_are():
    for split in ("clip", "speaker"):
        with open(REAL / "digits_av" / f"pairs_{split}_disjoint.csv", newline="") as file:
            listed = list(csv.DictReader(file))
        wanted = {r["id"]: (r["split"], r["fsdd_file"], r["mnist_index"], r["caption"]) for r in listed}
        rows = all_pairs(real(f"split={split}"))
        assert {r.key: (r.split, f"recordings/{r.clip}", str(r.image), r.caption) for r in rows} == wanted


@real_data
def test_real_samples():
    source = real("limit=40", "shard_size=16")
    plans = source.plan()
    sizes = [(split, i, n) for split in ("train", "val", "test") for i, n in enumerate((16, 16, 8))]
    assert [(p.split, p.index, p.count) for p in plans] == sizes
    assert len({item.digit for item in plans[0].items}) > 4  # a shard mixes digits
    meta = {r.split(",")[0]: r.split(",") for r in (REAL / "fsdd/metadata.csv").read_text().splitlines()[1:]}
    for plan in plans:
        for sample in source.samples(plan):
            label = json.loads(sample.members["labels.json"])
            caption = sample.members["caption.txt"].decode()
            assert label["objects"] == [{"digit": str(label["digit"]), "accent": label["accent"]}]
            spans = {f["attribute"]: caption[slice(*f["span"])] for f in label["fields"]}
            assert spans == {a: SURFACES[a][v][0] for a, v in label["objects"][0].items()}
            rgb = MODALITIES.get("rgb").from_bytes(sample.members["rgb.png"], sample.key)
            image = files.images(REAL, label["mnist_file"])[label["mnist_index"]]
            assert rgb.shape == (28, 28, 3) and all((rgb[:, :, c] == image).all() for c in range(3))
            assert files.labels(REAL, label["mnist_file"])[label["mnist_index"]] == label["digit"]
            sound = MODALITIES.get("audio").from_bytes(sample.members["audio.flac"], sample.key)
            frames = int(meta[label["fsdd_file"].removeprefix("recordings/")][8])
            assert len(sound) == 3 * frames and label["seconds"] == round(frames / 8000, 4)
            rms = 20 * np.log10(np.sqrt(np.mean(sound.astype(np.float64) ** 2)))
            peak = np.abs(sound).max()
            assert rms == pytest.approx(-20, abs=0.05) or (rms < -20 and peak == pytest.approx(files.PEAK, abs=1e-3))


@real_data
def test_published_digests_are_those_of_the_real_files():
    assert files.is_release(files.RELEASE, REAL)


# -- tiny data of the true formats ------------------------------------------------------------------------------------

TRAIN, T10K = np.arange(300) % 10, np.arange(40) % 10


def idx(array):
    return gzip.compress(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes(), 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A mirror: 10 digits x 3 speakers x 3 recordings, 300 + 40 pictures."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "fsdd/recordings").mkdir(parents=True)
    (root / "mnist_idx").mkdir()
    gen = np.random.default_rng(0)
    for digit in range(10):
        for speaker in ("george", "theo", "yweweler"):
            for index in (0, 5, 10):
                path = root / f"fsdd/recordings/{digit}_{speaker}_{index}.wav"
                wave = 0.01 * gen.standard_normal(400 + 10 * digit)
                soundfile.write(path, wave, 8000, subtype="PCM_16")
    for part, digits in (("train", TRAIN), ("t10k", T10K)):
        pixels = gen.integers(0, 256, (len(digits), 28, 28), dtype=np.uint8)
        (root / files.IMAGES[part]).write_bytes(idx(pixels))
        (root / files.LABELS[part]).write_bytes(idx(digits.astype(np.uint8)))
    return root


@pytest.fixture
def mirror(tiny, tmp_path):
    """A copy of the tiny mirror that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "mirror"))


@pytest.fixture
def served(tiny, tmp_path, monkeypatch):
    """The tiny data as a public release: (source class that knows its addresses and digests, its folder)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    www = tmp_path / "www"
    shutil.copytree(tiny / "mnist_idx", www / "mnist")
    with tarfile.open(www / "fsdd.tar.gz", "w:gz") as box:
        box.add(tiny / "fsdd/recordings", "free-spoken-digit-dataset-26eb9aa/recordings")
        for name in ("free-spoken-digit-dataset-26eb9aa/README.md", "free-spoken-digit-dataset-26eb9aa/a/b.wav"):
            info = tarfile.TarInfo(name)
            info.size = 2
            box.addfile(info, io.BytesIO(b"hi"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list = []

        def log_message(self, *args):
            self.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(www)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    lines = [
        f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sorted((tiny / "fsdd/recordings").iterdir())
    ]
    mnist = {
        p.name: hashlib.sha256(gzip.decompress(p.read_bytes())).hexdigest() for p in (tiny / "mnist_idx").iterdir()
    }

    class Tiny(Source):
        release = files.Release(
            f"{base}/mnist", mnist, f"{base}/fsdd.tar.gz", hashlib.sha256("".join(lines).encode()).hexdigest()
        )

    Quiet.asked.clear()
    yield Tiny, www, Quiet.asked
    server.shutdown()
    server.server_close()


def test_download(served, tmp_path, tiny):
    cls, _, asked = served
    seen = []
    source = cls(cls.Options(), tmp_path / "cache")
    source.prepare(lambda what, done, total: seen.append(what))
    assert {s.split()[0] for s in seen} == {"download"} and len(asked) == 5
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["fsdd", "mnist_idx"]
    assert source.info().splits == {"train": 240, "val": 30, "test": 30}
    assert source.info().options["pairs"] == "rule"
    rows = all_pairs(source)
    assert_disjoint(rows)
    assert_structure(rows)
    source.prepare(lambda *_: None)
    assert len(asked) == 5  # nothing is fetched twice
    from_mirror = open_digits(tmp_path / "no", f"mirror={tiny}", cls=cls)
    assert from_mirror.plan() == source.plan() and from_mirror.info() == source.info()
    a, b = list(from_mirror.samples(source.plan()[0])), list(source.samples(source.plan()[0]))
    assert a == b and len(a) == 240


def test_download_that_is_not_the_release(served, tmp_path, tiny):
    cls, www, _ = served
    name = "train-labels-idx1-ubyte.gz"
    good = (www / "mnist" / name).read_bytes()
    (www / "mnist" / name).write_bytes(idx(TRAIN.astype(np.uint8)[::-1]))
    source = cls(cls.Options(), tmp_path / "cache")
    with pytest.raises(FetchError, match=f"{name} is not MNIST") as err:
        source.prepare(lambda *_: None)
    assert "mirror=DIR" in err.value.hint and not (tmp_path / "cache/mnist_idx" / name).exists()
    (www / "mnist" / name).write_bytes(good)
    with tarfile.open(www / "fsdd.tar.gz", "w:gz") as box:
        box.add(tiny / "fsdd/recordings/0_theo_0.wav", "top/recordings/0_theo_0.wav")
    with pytest.raises(FetchError, match="not those that were published"):
        source.prepare(lambda *_: None)
    (www / "fsdd.tar.gz").unlink()
    with pytest.raises(FetchError, match="HTTP 404") as err:
        source.prepare(lambda *_: None)
    assert "mirror=DIR" in err.value.hint and not (tmp_path / "cache" / files.RECORDINGS).exists()


def test_damaged_cache_is_fetched_again(served, tmp_path):
    cls, _, asked = served
    source = open_digits(tmp_path / "cache", cls=cls)
    path = tmp_path / "cache" / files.IMAGES["train"]
    path.write_bytes(path.read_bytes()[:1000])
    source.prepare(lambda *_: None)
    assert len(asked) == 6 and len(files.images(tmp_path / "cache", "train")) == 300


def test_samples_are_functions_of_options_and_plan(tiny):
    source = open_digits(Path("unused"), f"mirror={tiny}", "shard_size=100", "split=speaker:theo")
    plans = source.plan()
    assert [p.count for p in plans] == [100, 100, 40, 30, 30]
    first = list(source.samples(plans[1]))
    files.clip.cache_clear()
    other = pickle.loads(pickle.dumps(source))
    assert list(other.samples(pickle.loads(pickle.dumps(plans[1])))) == first
    assert len(pickle.dumps(source)) < 2000
    limited = open_digits(Path("unused"), f"mirror={tiny}", "shard_size=100", "split=speaker:theo", "limit=7")
    assert limited.plan()[0].items == plans[0].items[:7]


def test_level(tiny):
    path = tiny / files.RECORDINGS / "3_theo_0.wav"
    quiet, as_is = files.clip(path, -20.0), files.clip(path, None)
    assert as_is.gain_db == 0 and quiet.gain_db == pytest.approx(20, abs=3) and quiet.seconds == as_is.seconds
    assert files.gain_to(np.zeros(4, np.float32), -20.0) == 1.0
    assert files.gain_to(np.array([0.5, -0.5]), -20.0) == pytest.approx(0.2)
    assert files.gain_to(np.array([0.01] * 999 + [0.5]), -20.0) == pytest.approx(files.PEAK / 0.5)


def test_fields():
    text = "the digit one, spoken by a man with an American accent"
    assert fields_of(text, {"digit": "1", "accent": "american"}) == [
        {"attribute": "digit", "object": 0, "span": [10, 13], "wording": 0},
        {"attribute": "accent", "object": 0, "span": [36, 47], "wording": 0},
    ]
    assert fields_of("someone says something", {"digit": "1", "accent": "greek"}) == []


def test_held_out_speakers_form_a_circle():
    assert {test: pairing.held_out(f"speaker:{test}")[1] for test in pairing.SPEAKERS} == {
        "george": "jackson", "jackson": "lucas", "lucas": "nicolas", "nicolas": "theo", "theo": "yweweler",
        "yweweler": "george",
    }  # fmt: skip


@pytest.mark.parametrize(
    "option, message",
    [
        ("split=speaker:thoe", "no speaker 'thoe'; did you mean 'theo'"),
        ("split=clips", "did you mean 'clip'"),
        ("name=../x", "name"),
        ("limit=0", "limit"),
        ("mirorr=x", "unknown key 'mirorr'"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ConfigError, match="digits") as err:
        build(Source.Options, apply_overrides({}, [option]), "source 'digits'")
    assert message in err.value.message


def test_missing_files(mirror, tmp_path):
    with pytest.raises(FetchError, match="no folder"):
        open_digits(tmp_path, f"mirror={tmp_path}/none")
    with pytest.raises(FetchError, match="no list for split"):
        open_digits(tmp_path, f"mirror={mirror}", "split=speaker:lucas", "pairs=lists")
    with pytest.raises(FetchError, match="pairs_clip"):
        open_digits(tmp_path, f"mirror={mirror}", "pairs=lists")
    (mirror / files.LABELS["t10k"]).unlink()
    with pytest.raises(FetchError, match="lacks mnist_idx/t10k-labels") as err:
        open_digits(tmp_path, f"mirror={mirror}")
    assert "mirror=DIR" in err.value.hint
    shutil.rmtree(mirror / "fsdd")
    with pytest.raises(FetchError, match=r"lacks .* fsdd/recordings/\*\.wav"):
        open_digits(tmp_path, f"mirror={mirror}")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b[: len(b) // 2], "cut or no gzip"),
        (lambda b: b"PK" + b, "cut or no gzip"),
        (lambda b: idx(np.zeros((300, 27, 28), np.uint8)), "its head says"),
        (lambda b: gzip.compress(gzip.decompress(b)[:-5]), "its head says"),
        (lambda b: idx(np.zeros(300, np.uint8)), "no idx file"),
        (lambda b: idx(np.zeros((299, 28, 28), np.uint8)), "299 pictures but 300 labels"),
    ],
)
def test_damaged_pictures(damage, message, mirror, tmp_path):
    path = mirror / files.IMAGES["train"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((DataError, FetchError), match=message):
        open_digits(tmp_path, f"mirror={mirror}")


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"junk" * 50, lambda b: b"", lambda b: b[:44]])
def test_damaged_recordings(damage, mirror, tmp_path):
    path = mirror / files.RECORDINGS / "0_theo_0.wav"
    path.write_bytes(damage(path.read_bytes()))
    source = open_digits(tmp_path, f"mirror={mirror}")
    with pytest.raises(MediaError, match="0_theo_0.wav"):
        [s for plan in source.plan() for s in source.samples(plan)]


def test_recordings_and_pictures_that_do_not_fit(mirror, tmp_path):
    wav = mirror / files.RECORDINGS / "0_theo_0.wav"
    wav.rename(wav.with_name("0_nobody_0.wav"))
    with pytest.raises(DataError, match="0_nobody_0.wav is by an unknown speaker"):
        open_digits(tmp_path, f"mirror={mirror}")
    wav.with_name("0_nobody_0.wav").rename(wav)
    (mirror / files.LABELS["train"]).write_bytes(idx(np.where(TRAIN == 7, 8, TRAIN).astype(np.uint8)))
    with pytest.raises(DataError, match="0 pictures of digit 7"):
        open_digits(tmp_path, f"mirror={mirror}")


def write_list(mirror, **change):
    rows = [r._asdict() for r in all_pairs(open_digits(Path("unused"), f"mirror={mirror}", "pairs=rule"))]
    codes = {v: k for k, v in pairing.CODES.items()}
    rows[0] |= change
    rows[1] |= {"image": rows[0]["image"]} if change.get("split") == "test" else {}
    path = mirror / "digits_av/pairs_clip_disjoint.csv"
    path.parent.mkdir(exist_ok=True)
    lines = ["id,split,fsdd_file,mnist_file,mnist_index,digit,speaker,accent,caption"]
    for r in rows:
        lines.append(
            f"{r['key']},{r['split']},recordings/{r['clip']},{r['part']},{r['image']},{r['digit']},{r['speaker']},"
            f'{codes.get(r["accent"], r["accent"])},"{r["caption"]}"'
        )
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"image": 999999}, "ends before"),
        ({"digit": 11}, r"csv:2: not a row"),
        ({"image": "x"}, r"csv:2: not a row"),
        ({"accent": "Klingon"}, r"csv:2: not a row.*Klingon"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"split": "val"}, "stands in two splits"),
        ({"split": "test"}, "takes a train picture for test"),
    ],
)
def test_lists_are_checked(change, message, mirror, tmp_path):
    write_list(mirror, **change)
    if message is None:
        source = open_digits(tmp_path, f"mirror={mirror}")
        assert source.info().options["pairs"] == "lists"
        assert source.plan() == open_digits(tmp_path, f"mirror={mirror}", "pairs=rule").plan()
        (mirror / files.RECORDINGS / "0_theo_0.wav").unlink()
        with pytest.raises(FetchError, match="lacks fsdd/recordings/0_theo_0.wav"):
            open_digits(tmp_path, f"mirror={mirror}")
        return
    with pytest.raises(DataError, match=message):
        open_digits(tmp_path, f"mirror={mirror}")


def test_picture_of_another_digit_is_found(mirror, tmp_path):
    write_list(mirror)
    (mirror / files.LABELS["train"]).write_bytes(idx(((TRAIN + 1) % 10).astype(np.uint8)))
    with pytest.raises(DataError, match="is digit"):
        open_digits(tmp_path, f"mirror={mirror}")

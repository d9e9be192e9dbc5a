"""Near-duplicates: what is the same after re-encoding is found, what is not is left alone, at any number of clips."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_cli import run
from test_folder import RATE, everything, video
from test_folder import run as fetched

from nano4m_cli.data._hashes import NEAR, SIZE, UNIT, describe, from_text, repeats, to_text
from nano4m_cli.data.sources.scenes import Source, raw_scene


def apart(a, b):
    """The difference of descriptions, in standard deviations."""
    return float(np.sqrt((((a.astype(float) - b.astype(float)) / UNIT) ** 2).mean()))


def scene(i: int, size: int = 96) -> np.ndarray:
    return raw_scene(Source.Options(size=size), "train", i).rgb


def melody(seed: int, seconds: float = 3.0) -> np.ndarray:
    """Notes of random pitch, loudness and timbre over faint noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.002 * rng.normal(size=len(t))
    for start in np.arange(0, seconds, 0.25):
        hertz, gain = rng.uniform(120, 2500), rng.uniform(0.05, 0.3)
        wave += (t >= start) * np.exp(-np.maximum(t - start, 0) * 12) * gain * sum(
            np.sin(2 * np.pi * hertz * n * t) * rng.uniform(0, 1) / n for n in (1, 2, 3))
    return (wave / max(1.0, np.abs(wave).max())).astype(np.float32)


def as_jpeg(picture: np.ndarray, quality: int, side: int | None = None) -> np.ndarray:
    out = io.BytesIO()
    image = Image.fromarray(picture)
    (image.resize((side, side), Image.Resampling.LANCZOS) if side else image).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out).convert("RGB"))


def as_file(wave: np.ndarray, container: str, subtype: str) -> np.ndarray:
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format=container, subtype=subtype)
    out.seek(0)
    return soundfile.read(out, dtype="float32")[0]


def test_pictures_are_the_same_after_encoding_and_scaling():
    descriptions = []
    for i in range(12):
        picture = scene(i)
        plain = describe("rgb", picture)
        assert plain.shape == (SIZE,) and plain.dtype == np.uint8
        descriptions.append(plain)
        for other in (as_jpeg(picture, 50), as_jpeg(picture, 85, 64), as_jpeg(picture, 85, 300), (picture * 0.9).astype(np.uint8)):
            assert apart(plain, describe("rgb", other)) < NEAR["rgb"]
        for other in (picture[:, ::-1], np.roll(picture, 20, 1), picture[..., ::-1]):
            assert apart(plain, describe("rgb", np.ascontiguousarray(other))) > 1.5 * NEAR["rgb"]
    assert min(apart(a, b) for i, a in enumerate(descriptions) for b in descriptions[:i]) > NEAR["rgb"]


def test_sounds_are_the_same_after_encoding_and_at_another_volume():
    descriptions = []
    for i in range(8):
        wave = melody(i)
        plain = describe("audio", wave)
        assert plain.shape == (SIZE,)
        descriptions.append(plain)
        for other in (as_file(wave, "OGG", "VORBIS"), as_file(wave, "MP3", "MPEG_LAYER_III"), 0.3 * wave):
            assert apart(plain, describe("audio", other)) < NEAR["audio"]
        assert apart(plain, describe("audio", wave[::-1].copy())) > 2 * NEAR["audio"]
    assert min(apart(a, b) for i, a in enumerate(descriptions) for b in descriptions[:i]) > 2 * NEAR["audio"]


def test_silence_is_silence_and_a_blank_picture_blank():
    quiet = [describe("audio", w) for w in (np.zeros(RATE, np.float32), np.full(100, 1e-8, np.float32), np.zeros(1, np.float32))]
    assert all(np.array_equal(q, quiet[0]) for q in quiet) and apart(quiet[0], describe("audio", melody(0))) > 0.5
    blank = [describe("rgb", np.full((30, 40, 3), v, np.uint8)) for v in (0, 90, 255)]
    assert all(np.array_equal(b, blank[0]) for b in blank)
    faint = np.full((32, 32, 3), 90, np.uint8)
    faint[::2] += 1
    assert apart(describe("rgb", faint), blank[0]) < NEAR["rgb"], "noise of one step is no picture"


def test_descriptions_survive_json():
    one = describe("rgb", scene(1))
    assert np.array_equal(from_text(json.loads(json.dumps(to_text(one)))), one)


def by_comparing_all(parts):
    """The plain way: each clip against every earlier one that was kept."""
    scaled = [v.astype(np.float32) / (UNIT * NEAR[m]) for m, v in parts.items()]
    of: list[int] = []
    for j in range(len(scaled[0])):
        near = np.all([((v[:j] - v[j]) ** 2).mean(1) <= 1 for v in scaled], axis=0)
        of.append(next((i for i in range(j) if near[i] and of[i] < 0), -1))
    return np.array(of)


def noisy(rng, rows, step):
    return np.clip(rows.astype(int) + np.rint(rng.normal(0, step, rows.shape)).astype(int), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kinds", [("rgb",), ("audio",), ("rgb", "audio")])
def test_repeats_are_those_of_comparing_all(kinds):
    rng = np.random.default_rng(len(kinds))
    for count in (300, 900):  # all pairs, and hash tables
        parts = {}
        source = rng.integers(0, count, count // 3)
        for m in kinds:
            first = np.clip(rng.normal(128, UNIT, (count - len(source), SIZE)), 0, 255).astype(np.uint8)
            again = noisy(rng, first[source % len(first)], 0.3 * NEAR[m] * UNIT)
            parts[m] = np.concatenate([first, again])
        if len(kinds) == 2:  # half share one of the two only
            parts["audio"][-count // 6 :] = rng.integers(0, 256, (count // 6, SIZE))
        got, wanted = repeats(parts), by_comparing_all(parts)
        assert np.array_equal(got, wanted) and (wanted >= 0).sum() == (count // 3 if len(kinds) == 1 else count // 3 - count // 6)


def test_many_that_are_all_the_same_repeat_the_first():
    rng = np.random.default_rng(0)
    rows = noisy(rng, np.broadcast_to(rng.integers(60, 200, SIZE), (3000, SIZE)), 0.5)
    assert np.array_equal(repeats({"rgb": rows}), [-1] + [0] * 2999)


def test_a_chain_is_cut_where_it_leaves_what_was_kept():
    """b is near a, c near b but not near a: c is kept, for b is not there."""
    a = np.full(SIZE, 100, np.uint8)
    assert 2 < NEAR["rgb"] * UNIT < 4
    rows = np.stack([a, a + 2, a + 4, a + 6])
    assert repeats({"rgb": rows}).tolist() == [-1, 0, -1, 2]


def tape(path, seed, seconds=3.0):
    soundfile.write(path, melody(seed, seconds), RATE)


def test_a_folder_without_its_near_duplicates(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        tape(folder / f"b{i}.flac", i)
    soundfile.write(folder / "a.ogg", melody(2), RATE)  # before b2, which is the same: b2 goes
    soundfile.write(folder / "c.wav", 0.4 * melody(3), RATE)  # after b3: goes
    options = [f"path={folder}", "seconds=1", "modalities=[audio]", "val=0", "test=0"]
    info, failures, plain = fetched(tmp_path / "plain", *options)
    assert len(everything(plain)) == 18 and "distinct" not in info.options and not failures
    info, failures, apart_ = fetched(tmp_path / "apart", *options, "distinct=[audio]")
    listed = json.loads((tmp_path / "apart" / "data" / "in" / "raw" / "left_out.json").read_text())
    assert len(everything(apart_)) == 12 and not failures and "6 clips were left out (distinct 6)" in info.notes
    assert {one["file"].rsplit("/")[-1] for one in listed} == {"b2.flac", "c.wav"}
    assert all(one["by"] == ["distinct"] for one in listed)
    keys = {k for split in apart_.values() for k in split}
    assert {one["repeats"] for one in listed} <= keys and info.options["distinct"] == ["audio"]
    at = {(one["file"].rsplit("/")[-1], one["start"]): one["repeats"] for one in listed}
    assert at["b2.flac", 1.0].startswith("a-") and at["b2.flac", 1.0].endswith("-00001-00")
    assert all("looks" not in labels for labels, _ in everything(apart_))
    again, _, _ = fetched(tmp_path / "apart", *options, "distinct=[audio]")
    assert again == info


def test_clips_within_a_file_and_splits_that_are_given(tmp_path):
    """A still picture is one clip; of a sound in train and in test, the test keeps its own."""
    folder = tmp_path / "in"
    folder.mkdir()
    loop = melody(5, 1.0)
    soundfile.write(folder / "loop.wav", np.tile(loop, 4), RATE)
    soundfile.write(folder / "late.flac", 0.5 * loop, RATE)
    (folder / "t.csv").write_text("file,split\nloop.wav,train\nlate.flac,test\n")
    tape(folder / "other.wav", 9, 1.0)
    with open(folder / "t.csv", "a") as file:
        file.write("other.wav,train\n")
    _, _, out = fetched(tmp_path, f"path={folder}", "csv=t.csv", "seconds=1", "modalities=[audio]", "distinct=[audio]")
    assert {s: [labels["item"] for labels, _ in rows.values()] for s, rows in out.items()} == {
        "train": ["other"], "val": [], "test": ["late"]}


def test_pictures_and_sound_must_both_repeat(tmp_path):
    """One picture with two sounds is two clips, unless only the picture is asked about."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        video(folder / f"{name}.mp4", 2.0, sound=("aac", 2.0))
    for i, name in enumerate("xy"):
        Image.fromarray(scene(3)).save(folder / f"{name}.png")
        tape(folder / f"{name}.wav", i, 2.0)
    options = [f"path={folder}", "seconds=2", "modalities=[rgb,audio]", "val=0", "test=0"]
    names = lambda out: sorted(labels["item"] for labels, _ in everything(out))  # noqa: E731
    assert names(fetched(tmp_path / "both", *options, "distinct=[rgb,audio]")[2]) == ["a", "x", "y"]
    assert names(fetched(tmp_path / "rgb", *options, "distinct=[rgb]")[2]) == ["a", "x"]


def test_options_that_cannot_be_met(tmp_path):
    (tmp_path / "in").mkdir()
    tape(tmp_path / "in" / "a.wav", 1)
    root = ["--root", tmp_path]
    result = run("fetch", "folder", f"path={tmp_path / 'in'}", "distinct=[rgb]", *root)
    assert result.exit_code == 1 and "no clip has rgb" in result.stderr and "leave out distinct=" in result.stderr
    result = run("fetch", "folder", f"path={tmp_path / 'in'}", "distinct=[depth]", *root)
    assert result.exit_code == 2 and "distinct" in result.stderr

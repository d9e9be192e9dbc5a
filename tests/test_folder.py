"""Source `folder`: clips, frames and sound of real containers, pairing, splits, and what is broken."""

import csv
import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from nano4m_cli.data import media
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources.folder import worded
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, FetchError, MediaError
from nano4m_cli.registry import MODALITIES

DATA = Path(os.environ.get("NANO4M_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
RATE = 24_000


def grey(i: int) -> int:
    """The brightness of frame i of the videos here: each frame tells its own number."""
    return 20 + 10 * (i % 21)


def video(path: Path, seconds=3.0, fps=10, size=(64, 48), codec="mpeg4", sound=None, times=None, layout="mono", rate=RATE) -> Path:
    """Write a video whose frames tell their number; sound: (codec, seconds) of a tone of 500 Hz, louder each second."""
    with av.open(str(path), "w") as box:
        stream = box.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, fps)
        tone = None
        if sound:
            tone = box.add_stream(sound[0], rate=rate, layout=layout)
        for i in range(len(times) if times else round(seconds * fps)):
            picture = np.full((size[1], size[0], 3), grey(i), np.uint8)
            picture[: size[1] // 4, : size[0] // 4] = (250, 10, 10)  # a red corner, upper left
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[i], Fraction(1, 1000)) if times else (i, Fraction(1, fps))
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
        if sound:
            t = np.arange(round(sound[1] * rate)) / rate
            wave = (np.sin(2 * np.pi * 500 * t) * 0.1 * (1 + np.floor(t))).astype(np.float32)
            channels = tone.codec_context.layout.nb_channels
            planar = tone.codec_context.format.is_planar
            for a in range(0, len(wave), 1024):
                part = np.tile(wave[None, a : a + 1024], (channels, 1))
                flat = part if planar else part.T.reshape(1, -1)
                kind = "fltp" if planar else "flt"
                if tone.codec_context.format.name.startswith("s16"):
                    flat, kind = (flat * 32767).astype(np.int16), "s16p" if planar else "s16"
                block = av.AudioFrame.from_ndarray(np.ascontiguousarray(flat), format=kind, layout=layout)
                block.sample_rate, block.pts, block.time_base = rate, a, Fraction(1, rate)
                box.mux(tone.encode(block))
            box.mux(tone.encode())
    return path


def tone(path: Path, seconds: float, rate=RATE, channels=1, hertz=500.0, gain=0.2) -> Path:
    t = np.arange(round(seconds * rate)) / rate
    wave = (gain * np.sin(2 * np.pi * hertz * t)).astype(np.float32)
    soundfile.write(path, np.tile(wave[:, None], (1, channels)), rate)
    return path


def picture(path: Path, value=90, size=(40, 30)) -> Path:
    image = np.full((size[1], size[0], 3), value, np.uint8)
    image[:5] = (200, 30, 30)
    Image.fromarray(image).save(path)
    return path


def number(frame: np.ndarray) -> int:
    """Return which frame of `video` a picture shows."""
    return round((float(np.median(frame)) - 20) / 10)


def run(space: Path, *options: str):
    """Fetch a folder; return (info, failures by file name, samples by split: {key: (labels, raw)})."""
    workspace = Workspace(space)
    source = open_source("folder", list(options), workspace)
    report = fetch(source, workspace, 1)
    out = {}
    for split, count in report.info.splits.items():
        out[split] = {}
        if not count:
            continue
        shards = Split(report.dataset.raw(split))
        for i in range(len(shards)):
            shard, j = shards.locate(i)
            raw = {m: MODALITIES.get(m).from_bytes(shard.read(j, MODALITIES.get(m).ext), "x") for m in report.info.modalities}
            out[split][shard.keys[j]] = (json.loads(shard.read(j, "labels.json")), raw)
    return report.info, {Path(f.file).name: f.reason for f in report.failures}, out


def everything(samples: dict) -> list:
    return [v for split in samples.values() for v in split.values()]


# -- moments of media -------------------------------------------------------------------------------------------------

CONTAINERS = [
    ("x.mp4", "mpeg4", "aac"), ("x.mkv", "libx264", "libopus"), ("x.webm", "libvpx-vp9", "libopus"), ("x.mpg", "mpeg2video", "mp2"),
    ("x.mov", "mpeg4", "pcm_s16le"), ("x.avi", "mpeg4", "libmp3lame"),
]


@pytest.mark.parametrize("name, codec, sound", CONTAINERS)
def test_frames_and_sound_of_a_container_are_those_of_their_time(tmp_path, name, codec, sound):
    fps = 25 if name.endswith("mpg") else 10
    rate = 48_000 if sound in ("libopus", "mp2") else RATE
    path = video(tmp_path / name, 4.0, fps, codec=codec, sound=(sound, 4.0), rate=rate)
    holds, off = media.facts(path), 0.6 if name.endswith("mpg") else 0.15  # mpg states no length: it is estimated
    assert holds.video == pytest.approx(4.0, abs=off) and holds.audio == pytest.approx(4.0, abs=off)
    times = [0.0, 0.55, 0.57, 2.05, 3.35]
    shown = [number(f) for f in media.frames(path, times)]
    late = [0, 1] if name.endswith("avi") else [0]  # AVI holds no presentation times
    assert all((int(t * fps + 1e-6) - n) % 21 in late for n, t in zip(shown, times, strict=True)), shown
    for start in (0.0, 2.0):
        wave = media.sound(path, start, 1.0)
        assert wave.shape == (RATE,) and wave.dtype == np.float32
        middle = wave[RATE // 4 : 3 * RATE // 4]
        assert np.abs(middle).max() == pytest.approx(0.1 * (1 + start), rel=0.15), "each second has its own loudness"
        assert np.argmax(np.abs(np.fft.rfft(middle))) == 250, "500 Hz over half a second"


def test_variable_frame_rate_is_read_by_time(tmp_path):
    path = video(tmp_path / "x.mkv", times=[0, 100, 200, 1500, 1600, 3000], codec="libx264", fps=10)
    assert [number(f) for f in media.frames(path, [0.05, 0.25, 1.4, 1.55, 2.9])] == [0, 2, 2, 3, 4]


def test_a_video_that_was_held_upright_is_upright(tmp_path):
    """The display matrix of a phone that was turned by a quarter: the red corner moves from upper left to upper right."""
    path = video(tmp_path / "x.mp4", 1.0)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 4 + 4 + 4 + 4 + 4 + 4 + 8 + 8  # version, times, id, reserved, duration, reserved, layer...
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    (frame,) = media.frames(path, [0.0])
    assert frame.shape == (64, 48, 3)
    red = (frame[..., 0] > 200) & (frame[..., 1] < 80)
    assert red[:10, -8:].mean() > 0.9 and red[:10, :8].mean() < 0.1


def test_surround_sound_is_mixed_down(tmp_path):
    path = video(tmp_path / "x.mkv", 2.0, sound=("aac", 2.0), layout="5.1", rate=48_000)
    wave = media.sound(path, 0.0, 1.0)
    assert wave.shape == (RATE,) and np.isfinite(wave).all() and 0.02 < np.abs(wave).max() < 1


def test_long_sound_is_read_where_it_is_asked(tmp_path):
    t = np.arange(RATE * 40) / RATE
    soundfile.write(tmp_path / "x.flac", (0.5 * np.sin(2 * np.pi * (300 + 10 * np.floor(t)) * t)).astype(np.float32), RATE)
    wave = media.sound(tmp_path / "x.flac", 30.0, 1.0)
    assert np.argmax(np.abs(np.fft.rfft(wave))) == 600
    with pytest.raises(MediaError, match="ends early"):
        media.sound(tmp_path / "x.flac", 39.5, 1.0)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_videos_are_cut_into_clips_with_frames_and_sound(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    video(folder / "a.mp4", 4.6, sound=("aac", 4.6))
    (folder / "a.txt").write_text("a  grey\nscreen")
    info, failures, samples = run(tmp_path, f"path={folder}", "seconds=2", "frames=2", "size=16")
    assert (info.modalities, failures, info.splits) == (["rgb", "audio", "caption"], {}, {"train": 4, "val": 0, "test": 0})
    made = samples["train"]
    by_clip = sorted((l["clip"], l["frame"], number(raw["rgb"])) for l, raw in made.values())
    assert by_clip == [(0, 0, 5), (0, 1, 15), (1, 0, 4), (1, 1, 14)]  # frames 5, 15, 25, 35 of 21 greys
    for labels, raw in made.values():
        assert raw["rgb"].shape == (16, 16, 3) and raw["audio"].shape == (2 * RATE,) and raw["caption"] == "a grey screen"
        loud = np.abs(raw["audio"][: RATE - 2000]).max()
        assert loud == pytest.approx(0.1 * (1 + 2 * labels["clip"]), rel=0.2)
    assert info.sizes == {"rgb": {"size": [16, 16]}, "audio": {"seconds": 2.0, "rate": RATE}}


def test_key_frames_follow_scene_changes(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with av.open(str(folder / "b.mp4"), "w") as box:
        stream = box.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for i in range(30):
            value = 30 if i < 7 else 120 if i < 22 else 240
            box.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 48, 3), value, np.uint8), format="rgb24")))
        box.mux(stream.encode())
    _, _, samples = run(tmp_path, f"path={folder}", "seconds=3", "frames=3", "pick=scene", "size=16")
    shown = [round(float(raw["rgb"].mean()), -1) for _, raw in sorted(everything(samples), key=lambda s: s[0]["frame"])]
    assert shown == [30, 120, 240]


def test_depth_and_pictures_keep_the_same_pixels(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    x = np.arange(90)[None, :].repeat(60, 0)
    Image.fromarray((np.where(x[..., None] < 45, (250, 250, 250), (10, 10, 10))).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(np.where(x < 45, 1000, 3000).astype(np.uint16)).save(folder / "a.depth.png")
    info, failures, samples = run(tmp_path, f"path={folder}", "size=20")
    ((labels, raw),) = everything(samples)
    assert info.modalities == ["rgb", "depth"] and not failures
    assert np.array_equal(np.unique(raw["depth"]), np.float32([1.0, 3.0])), "depth is never averaged"
    assert np.array_equal(raw["rgb"][:, :, 0].mean(0) > 128, raw["depth"].mean(0) < 2)


def test_a_photo_turned_by_its_exif_is_upright(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(image).save(folder / "a.png", exif=exif)
    _, _, samples = run(tmp_path, f"path={folder}", "size=8")
    ((_, raw),) = everything(samples)
    assert raw["rgb"][:3].mean() > 250 and raw["rgb"][-3:].mean() < 5


def test_a_mixed_folder_gives_the_good_and_lists_the_bad(tmp_path):
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for i in range(6):
        video(folder / f"good{i}.mp4", 2.0, size=(48, 48 + 16 * i), sound=("aac", 2.0))
    video(folder / "deep" / "longer.mkv", 2.0, sound=("aac", 3.5), size=(80, 48))
    video(folder / "silent.mp4", 2.0, size=(96, 48))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    whole = (folder / "good0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "copy.mp4").write_bytes((folder / "good1.mp4").read_bytes())
    (folder / "good0.json").write_text("{")
    (folder / "readme.md").write_text("not media")
    wave = np.zeros(2 * RATE, np.float32)
    wave[5] = np.nan
    soundfile.write(folder / "nan.wav", wave, RATE, subtype="FLOAT")
    info, failures, samples = run(tmp_path, f"path={folder}", "seconds=1", "size=16", "modalities=[rgb,audio]")
    assert set(failures) == {"silent.mp4", "empty.mp4", "noise.mp4", "cut.mp4", "good1.mp4", "good0.json", "nan.wav"}
    assert "has no audio" in failures["silent.mp4"] and "0 bytes" in failures["empty.mp4"]
    assert "no readable video" in failures["noise.mp4"] and "NaN" in failures["nan.wav"] and "is no JSON" in failures["good0.json"]
    assert "the same content as" in failures["good1.mp4"] and "copy.mp4" in failures["good1.mp4"]
    items = {labels["item"] for labels, _ in everything(samples)}
    assert items == {"good0", "good2", "good3", "good4", "good5", "copy", "deep/longer"}
    longer = [labels for labels, _ in everything(samples) if labels["item"] == "deep/longer"]
    assert len(longer) == 2 and "the shorter counts" in info.notes
    assert all(np.abs(raw["audio"]).max() > 0.05 for _, raw in everything(samples))
    assert json.loads((tmp_path / "data" / "mine" / "raw" / "failures.json").read_text())
    homes = {}
    for split, made in samples.items():
        for labels, _ in made.values():
            assert homes.setdefault(labels["sha256"], split) == split, "no source in two splits"
    assert all(info.splits.values())


def test_a_video_that_breaks_off_keeps_what_came_before(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    path = video(folder / "a.mkv", 8.0, codec="libx264", sound=("aac", 8.0), fps=25, size=(160, 120))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 5 // 8])
    info, failures, samples = run(tmp_path, f"path={folder}", "seconds=1", "size=16")
    assert 1 <= info.splits["train"] <= 6
    assert "ends early" in failures["a.mkv"] and f"the {info.splits['train']} clips before that are used" in failures["a.mkv"]


def test_silent_videos_have_no_audio_and_it_is_said(tmp_path):
    folder = DATA / "av_com304"
    if not folder.is_dir():
        pytest.skip("no ../shared/data (or NANO4M_TEST_DATA)")
    info, failures, samples = run(tmp_path, f"path={folder}", "seconds=5", "size=32")
    assert info.modalities == ["rgb"] and not failures
    assert "5 of 5 videos have no sound: there is no audio in this data set" in info.notes
    assert len(everything(samples)) == 10 and all(raw["rgb"].std() > 5 for _, raw in everything(samples))


def test_filters_leave_out_by_recorded_scores(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    t = np.arange(RATE) / RATE
    one = 0.3 * np.sin(2 * np.pi * 300 * t)
    wave = np.concatenate([one, 0 * t, np.clip(9 * one, -1, 1), one])  # fine, silent, clipped, fine
    soundfile.write(folder / "a.wav", wave, RATE)
    video(folder / "moves.mp4", 2.0)
    with av.open(str(folder / "still.mp4"), "w") as box:
        stream = box.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for i in range(20):  # a second of black, a second of one bright picture
            frame = np.full((48, 48, 3), 4 if i < 10 else 200, np.uint8)
            box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(stream.encode())
    asked = [f"path={folder}", "seconds=1", "size=16", "filter=[silence,clipping,black,frozen]"]
    info, failures, samples = run(tmp_path, *asked, "modalities=[audio]", "name=sound")
    assert [l["start"] for l, _ in sorted(everything(samples), key=lambda s: s[0]["start"])] == [0.0, 3.0]
    assert "4 clips were left out (black 1, clipping 1, frozen 2, silence 1)" in info.notes
    listed = json.loads((tmp_path / "data" / "sound" / "raw" / "left_out.json").read_text())
    found = {(Path(one["file"]).name, one["start"]): one for one in listed}
    assert {k: v["by"] for k, v in found.items()} == {
        ("a.wav", 1.0): ["silence"], ("a.wav", 2.0): ["clipping"], ("still.mp4", 0.0): ["black", "frozen"],
        ("still.mp4", 1.0): ["frozen"],
    }
    assert found["a.wav", 1.0]["scores"]["silence"] == -120 and found["a.wav", 2.0]["scores"]["clipping"] > 0.5
    kept = {l["start"]: l["scores"] for l, _ in everything(samples)}
    assert kept[0.0]["silence"] == pytest.approx(20 * np.log10(0.3 / 2**0.5), abs=0.1), "a sine of amplitude .3"
    info, _, samples = run(tmp_path, *asked, "modalities=[audio]", "name=loud", "thresholds.silence=-130")
    assert len(everything(samples)) == 3
    info, _, samples = run(tmp_path, *asked, "modalities=[rgb]", "name=seen")
    assert {l["item"] for l, _ in everything(samples)} == {"moves"}


def table(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_table_gives_captions_labels_groups_and_splits(tmp_path):
    folder = tmp_path / "mine"
    (folder / "clips").mkdir(parents=True)
    rows = []
    for i in range(8):
        tone(folder / "clips" / f"{i}.wav", 0.5 + 0.1 * i, rate=(8000, RATE, 44100)[i % 3], channels=1 + i % 2, hertz=300 + 50 * i)
        rows.append({"file": f"clips/{i}.wav", "kind": ("Dog", "Cat")[i % 2], "fold": 1 + i // 2, "take": i // 2})
    rows.append({"file": "clips/gone.wav", "kind": "Dog", "fold": 1, "take": 9})
    rows.append({"file": "clips/0.wav", "kind": "Dog", "fold": 4, "take": 9})
    table(folder / "list.csv", rows)
    options = [f"path={folder}", "csv=list.csv", "label=kind", "caption=the sound of a {kind}", "split=fold", "test_values=4",
               "val_values=3", "group=take", "seconds=1"]
    info, failures, samples = run(tmp_path, *options)
    assert info.modalities == ["audio", "caption"] and info.splits == {"train": 4, "val": 2, "test": 2}
    assert failures == {"gone.wav": "there is no such file", "0.wav": "stands twice in the table"}
    assert info.attributes["kind"].values == ["Cat", "Dog"] and info.determined["audio"] == ["kind"]
    for labels, raw in everything(samples):
        (field,) = labels["fields"]
        value = labels["objects"][0]["kind"]
        assert raw["caption"] == f"the sound of a {value.lower()}"
        assert raw["caption"][slice(*field["span"])] == info.attributes["kind"].surfaces[value][0] == value.lower()
        i = int(labels["item"].split("/")[1])
        wave = raw["audio"]
        assert wave.shape == (RATE,) and not wave[round((0.5 + 0.1 * i) * RATE) + 400 :].any(), "padded with silence"
        assert abs(np.argmax(np.abs(np.fft.rfft(wave))) - (300 + 50 * i)) <= 1
    assert {l["labels"]["fold"] for l, _ in samples["test"].values()} == {"4"}
    again = run(tmp_path, *options)
    assert again[0] == info


@pytest.mark.parametrize("words, caption, span", [
    ("dog", "a dog barks", (2, 5)), ("dog", "hotdogs", None), ("(live) music!", "(live) music!", (0, 13)),
    ("c++", "in c++ now", (3, 6)), ("Dog", "a dog", None),
])
def test_words_are_found_whole(words, caption, span):
    assert worded(words, caption) == span


def test_labels_with_punctuation_are_worded(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(3):
        tone(folder / f"{i}.wav", 0.4, hertz=200 + 40 * i)
    table(folder / "list.csv", [{"file": f"{i}.wav", "kind": ("music (live)", "bird chirping, tweeting")[i % 2]} for i in range(3)])
    info, _, samples = run(tmp_path, f"path={folder}", "csv=list.csv", "label=kind", "caption={kind}", "seconds=0.4")
    assert info.attributes["kind"].surfaces["music (live)"] == ["music (live)"]
    for labels, raw in everything(samples):
        assert labels["fields"][0]["span"] == [0, len(raw["caption"])]


def test_a_group_in_two_splits_stays_in_the_test_split(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    split = {1: "test", 5: "test"}
    rows = [{"file": f"{i}.wav", "video": "", "id": "abc" if i < 2 else str(i), "split": split.get(i, "train")} for i in range(6)]
    for i in range(6):
        tone(folder / f"{i}.wav", 0.4, hertz=200 + 40 * i)
    table(folder / "list.csv", rows)
    info, failures, samples = run(tmp_path, f"path={folder}", "csv=list.csv", "group=id", "seconds=0.4")
    assert info.splits == {"train": 3, "val": 0, "test": 2}
    assert failures == {"0.wav": "group 'abc' stands in split test as well (a train item)"}


def test_whole_captions_word_a_label_that_they_do_not_contain(tmp_path):
    folder = DATA / "esc10"
    if not folder.is_dir():
        pytest.skip("no ../shared/data (or NANO4M_TEST_DATA)")
    small = tmp_path / "esc"
    (small / "audio").mkdir(parents=True)
    with open(folder / "metadata.csv", newline="") as file:
        rows = [r for i, r in enumerate(csv.DictReader(file)) if i % 16 == 0]
    for row in rows:
        (small / row["file"]).symlink_to((folder / row["file"]).resolve())
    table(small / "metadata.csv", rows)
    info, failures, samples = run(
        tmp_path, f"path={small}", "csv=metadata.csv", "text=caption_from_label", "label=class", "split=fold", "group=freesound_id",
        "test_values=4", "seconds=5",
    )
    assert not failures and sum(info.splits.values()) == len(rows) == 20
    assert info.attributes["class"].surfaces["Dog bark"] == ["a dog barking"]
    for labels, raw in everything(samples):
        assert labels["fields"][0]["span"] == [0, len(raw["caption"])] and raw["audio"].shape == (5 * RATE,)


def test_same_folder_same_bytes_and_changed_content_is_noticed(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(4):
        video(folder / f"{i}.mp4", 1.0, size=(48, 48 + 16 * i), sound=("aac", 1.0))
    hashes = []
    for space, workers in (("one", 1), ("two", 2)):
        workspace = Workspace(tmp_path / space)
        fetch(open_source("folder", [f"path={folder}", "seconds=1", "size=16", "shard_size=1"], workspace), workspace, workers)
        hashes.append([(p.name, p.read_bytes()) for p in sorted((tmp_path / space / "data" / "mine" / "raw").rglob("*.tar"))])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 4
    report = fetch(open_source("folder", [f"path={folder}", "seconds=1", "size=16", "shard_size=1"], workspace), workspace, 1)
    assert (report.made, report.kept) == (0, 4)
    video(folder / "4.mp4", 1.0, size=(96, 64), sound=("aac", 1.0))
    with pytest.raises(FetchError, match="made with other options .content differ"):
        fetch(open_source("folder", [f"path={folder}", "seconds=1", "size=16", "shard_size=1"], workspace), workspace, 1)


@pytest.mark.parametrize("options, said", [
    (["path=nowhere"], "no folder 'nowhere'"),
    (["path=."], "holds no video, sound or picture"),
    (["path=.", "csv=none.csv"], "no table 'none.csv'"),
])
def test_what_is_missing_is_named(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path / "space")
    with pytest.raises(FetchError, match=said):
        fetch(open_source("folder", options, workspace), workspace, 1)


def test_columns_and_labels_are_spelled_out(tmp_path):
    tone(tmp_path / "a.wav", 0.5)
    table(tmp_path / "list.csv", [{"file": "a.wav", "kind": "x"}])
    table(tmp_path / "bare.csv", [{"kind": "x"}])
    for options, said in [
        (["csv=list.csv", "label=kin"], "no column 'kin' .label=."), (["csv=bare.csv"], "no column of files"),
        (["csv=list.csv", "caption=a {kin}"], "asks for '{kin}'"),
    ]:
        with pytest.raises(FetchError, match=said):
            open_source("folder", [f"path={tmp_path}", *options], Workspace(tmp_path / "space")).prepare(lambda *_: None)


@pytest.mark.parametrize("broken, code", [("report", 1), ("skip", 0)])
def test_exit_code_and_summary_tell_of_broken_files(tmp_path, broken, code):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(3):
        picture(folder / f"{i}.png", 60 + i)
    (folder / "bad.png").write_bytes(b"nothing")
    done = subprocess.run(
        [sys.executable, "-m", "nano4m_cli", "fetch", "folder", f"path={folder}", "size=16", f"broken={broken}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == code, done.stderr
    assert "3 samples made" in done.stdout and "bad.png" in done.stdout and "no readable picture" in done.stdout
    assert ("error: 1 files could not be used" in done.stderr) == (code == 1) and "Traceback" not in done.stderr


# -- transcripts ------------------------------------------------------------------------------------------------------


def spoken(root):
    """Three sounds with what is said in them; the last is longer than the data set's clips."""
    root.mkdir()
    for i, (seconds, words) in enumerate(((0.8, "one two"), (1.0, "three"), (1.5, "four five six"))):
        tone(root / f"{i}.wav", seconds, hertz=300 + 100 * i)
        (root / f"{i}.txt").write_text(words)
    return root


def test_captions_are_transcripts_where_that_is_said(tmp_path):
    place = spoken(tmp_path / "talk")
    fetched = lambda name, *more: fetch(open_source(  # noqa: E731
        "folder", [f"path={place}", f"name={name}", "seconds=1", "broken=skip", *more], Workspace(tmp_path)),
        Workspace(tmp_path), workers=1)
    plain, said = fetched("plain"), fetched("said", "transcripts=true")
    assert plain.info.transcripts == {} and "transcripts" not in plain.info.options and sum(plain.info.splits.values()) == 3
    assert said.info.transcripts["caption"].before == "" and said.info.options["transcripts"] is True
    assert sum(said.info.splits.values()) == 2
    assert [(Path(f.file).name, f.reason) for f in said.failures] == [
        ("2.wav", "lasts 1.50 s, and its transcript is of more than seconds=1")]


def test_transcripts_are_not_made_from_pictures(tmp_path):
    with pytest.raises(ConfigError, match="captions are to be transcripts and are made from pictures"):
        open_source("folder", [f"path={tmp_path}", "transcripts=true", "derive=[caption]"], Workspace(tmp_path))

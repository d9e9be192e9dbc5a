"""Video from end to end: the modality, its tokenizer on a 3-D grid, moving scenes, clips of a folder, a run that makes some."""

import io
import json
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, PngImagePlugin
from test_cli import run
from test_layers import example, fitted
from workspace_factory import one_thread, settings  # noqa: F401

from nano4m_cli.config import build
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources import _scene_motion as motion
from nano4m_cli.data.sources import _scene_render as render
from nano4m_cli.data.sources import scenes
from nano4m_cli.data.sources.folder import Source as Folder
from nano4m_cli.data.sources.scenes import Source, draw, encode, raw_scene
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._slots import choose_slots
from nano4m_cli.modalities.video import MODALITY as VIDEO
from nano4m_cli.modalities.video import PIXELS, Video
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._gallery import write_gallery
from nano4m_cli.probes._roundtrip import fidelity
from nano4m_cli.registry import TOKENIZERS
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._patch_ae import PatchAutoencoder
from nano4m_cli.train.run import open_run


def grey(i: int) -> int:
    return 20 + 10 * i


def number(picture: np.ndarray) -> int:
    """Return which frame of `film` a picture shows."""
    return round((float(picture[-4:].mean()) - 20) / 10)


def film(path: Path, frames: int, fps: int = 10, size=(64, 48)) -> Path:
    """Write a video of which each frame tells its number by its brightness."""
    with av.open(str(path), "w") as box:
        stream = box.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey(i), np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return path


# -- the modality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 12, 3), (5, 16, 8, 3), (17, 6, 6, 3)])
def test_a_strip_is_a_picture_that_holds_every_pixel(shape):
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = VIDEO.to_bytes(raw)
    back = VIDEO.from_bytes(data, "here")
    assert back.dtype == np.uint8 and np.array_equal(back, raw)
    strip = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(strip, np.concatenate(list(raw))), "frame under frame"


def test_what_stands_still_costs_little():
    raw = raw_scene(Source.Options(video=True), "train", 0).video
    still, one, moving = (len(VIDEO.to_bytes(v)) for v in (np.repeat(raw[:1], 8, 0), raw[:1], raw))
    assert still < 2 * one < moving < raw.size / 4


@pytest.mark.parametrize("told", [None, "0", "3", "-8", "x", "9" * 30, "\u00b2"])
def test_a_strip_that_does_not_divide_is_a_media_error(told, tmp_path):
    info = PngImagePlugin.PngInfo()
    if told is not None:
        info.add_itxt("frames", told)
    Image.new("RGB", (4, 16)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(MediaError, match="sample 'k7' is no strip of frames"):
        VIDEO.from_bytes((tmp_path / "x.png").read_bytes(), "sample 'k7'")


def test_a_file_is_read_at_the_rate_of_the_data_set(tmp_path):
    path = film(tmp_path / "x.mp4", 20, fps=10)
    whole = Video(5.0).read_file(path)
    assert whole.shape == (10, 48, 64, 3) and [number(f) for f in whole] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    sized = VIDEO.sized({"size": [32, 32], "frames": 4, "fps": 10})
    assert [number(f) for f in sized.read_file(path)] == [0, 1, 2, 3]
    assert sized.conversion(path) == f"'{path}' (2.00 s at 10 frames/s) was read at 10 frames/s, its first 0.40 s"
    assert Video(5.0).conversion(path) == f"'{path}' (2.00 s at 10 frames/s) was read at 5 frames/s"
    assert Video(10.0).conversion(path) is None
    assert [number(f) for f in Video(20.0).read_file(path)[:4]] == [0, 0, 1, 1]


def test_animated_and_still_pictures_are_videos_too(tmp_path):
    pictures = [Image.new("RGB", (8, 8), (grey(i),) * 3) for i in range(3)]
    pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:], duration=[100, 300, 200])
    assert [number(f) for f in Video(10.0).read_file(tmp_path / "x.gif")] == [0, 1, 1, 1, 2, 2]
    pictures[2].save(tmp_path / "x.png")
    assert [number(f) for f in Video(10.0).read_file(tmp_path / "x.png")] == [2] and Video().conversion(tmp_path / "x.png") is None
    a, b = np.full((8, 8, 3), 7, np.uint8), np.full((8, 8, 3), 9, np.uint8)
    Video(30.0).write_file(np.stack([a, a, a, b, b, a]), tmp_path / "x.webp")  # the encoder stores frames that follow once
    assert np.array_equal(Video(30.0).read_file(tmp_path / "x.webp"), np.stack([a, a, a, b, b, a]))
    Video(30.0).write_file(np.stack([a, a]), tmp_path / "still.webp")  # nothing moves: a picture
    assert np.array_equal(Video(30.0).read_file(tmp_path / "still.webp"), a[None])


def test_unusable_files_are_media_errors(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "x.wav", np.zeros(4800), 24000)
    Video().write_file(example("video"), tmp_path / "whole.webp")
    (tmp_path / "cut.webp").write_bytes((tmp_path / "whole.webp").read_bytes()[:200])
    (tmp_path / "cut.mp4").write_bytes(film(tmp_path / "whole.mp4", 20).read_bytes()[:400])
    (tmp_path / "x.mp4").write_bytes(b"no film")
    for name in ("x.wav", "cut.webp", "cut.mp4", "x.mp4"):
        with pytest.raises(MediaError, match=name):
            VIDEO.from_text(str(tmp_path / name))
    with pytest.raises(MediaError, match="no video file") as caught:
        VIDEO.from_text("nothing.mp4")
    assert "path of a video file" in caught.value.hint


def test_show_lays_frames_out_in_reading_order():
    raw = np.stack([np.full((8, 6, 3), 10 * t, np.uint8) for t in range(8)])
    page = VIDEO.show(raw)
    assert page.shape == (3 * 9 - 1, 3 * 7 - 1, 3)
    assert [int(page[9 * (t // 3), 7 * (t % 3), 0]) for t in range(8)] == [10 * t for t in range(8)]
    assert (page[18:, 14:] == 255).all() and (page[8] == 255).all()
    many = VIDEO.show(np.stack([np.full((8, 6, 3), t, np.uint8) for t in range(100)]))
    assert many.shape == (4 * 9 - 1, 4 * 7 - 1, 3) and many[0, 0, 0] == 0 and many[-1, -1, 0] == 99


# -- the tokenizer, and grids of three axes ---------------------------------------------------------------------------


def test_a_grid_of_three_axes_is_worked_on_as_one_of_two_with_as_many_places():
    torch.manual_seed(0)
    solid = PatchAutoencoder((2, 3, 4), 5, (5, 5, 4), 16, 2, encoder_mixing=True)
    flat = PatchAutoencoder((6, 4), 5, (5, 5, 4), 16, 2, encoder_mixing=True)
    with torch.no_grad():
        for p in solid.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    state = solid.state_dict()
    flat.load_state_dict({**state, "mean": state["mean"].reshape(6, 4, 5)})
    x = torch.randn(7, 2, 3, 4, 5)
    for a in (solid, flat):
        a.centre(x.reshape(7, *a.mean.shape))
    (values, codes), (values_2, codes_2) = solid.encode(x), flat.encode(x.reshape(7, 6, 4, 5))
    assert values.shape == (7, 2, 3, 4, 3) and codes.shape == (7, 2, 3, 4) and len(codes.unique()) > 10
    assert torch.equal(codes.reshape(7, 6, 4), codes_2)
    assert torch.equal(solid.decode_values(values).reshape(7, 6, 4, 5), flat.decode_values(values_2))
    assert torch.equal(solid.loss(x, 2.0)[0], flat.loss(x.reshape(7, 6, 4, 5), 2.0)[0])


def test_a_code_stands_for_its_own_tubelet():
    tokenizer = fitted("fsq_video", "video")  # tubelets of 2 x 8 x 8 of (4, 16, 16)
    spec = tokenizer.spec()
    assert (spec.kind, spec.shape, spec.slots) == ("grid", (2, 2, 2), 8)
    assert spec.preprocess == {"frames": 4, "size": [16, 16], "fps": 8.0, "scale": "x / 255"}
    raws = [example("video", s) for s in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(tokenizer._videos(tokenizer._tubelets(raws)), raws, strict=True))
    ids = tokenizer.encode(raws)[0]
    for slot, (t, y, x) in enumerate(spec.positions().tolist()):
        other = raws[0].copy()
        own = (slice(2 * t, 2 * t + 2), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
        other[own] = 255 - other[own]
        assert np.flatnonzero(tokenizer.encode([other])[0] != ids).tolist() == [slot]


def test_other_lengths_and_sizes_are_adapted_and_it_is_said():
    tokenizer = fitted("fsq_video", "video")
    raw = example("video")
    longer, said = tokenizer.adapt(np.concatenate([raw, raw]))
    assert np.array_equal(longer, raw) and said == "video of 8 frames of 16 x 16 was cut to 4 frames of 16 x 16"
    shorter, said = tokenizer.adapt(raw[:3])
    assert np.array_equal(shorter[[0, 1, 2, 3]], raw[[0, 1, 2, 2]]) and "was continued by its last frame" in said
    wide, said = tokenizer.adapt(raw.repeat(2, 1).repeat(2, 2)[:, :, 4:])
    assert wide.shape == raw.shape
    assert said == "video of 4 frames of 28 x 32 was cropped to its centre and resized to 4 frames of 16 x 16"


@pytest.mark.parametrize("size, options, said", [
    ({"size": [16, 16]}, {}, "no size and frames"),
    ({"size": [16, 16], "frames": 6}, {}, "videos of 6 frames of 16 x 16 do not divide into tubelets of 4 frames of 8 x 8"),
    ({"size": [16, 20], "frames": 8}, {}, "do not divide"),
    ({"size": [16, 16], "frames": 8}, {"patch": 0}, "patch"),
    ({"size": [16, 16], "frames": 8}, {"levels": [1]}, "every level"),
])
def test_what_does_not_divide_is_a_config_error(size, options, said):
    cls = TOKENIZERS.get("fsq_video")
    with pytest.raises(ConfigError, match=said):
        cls("video", build(cls.Options, options, "tokenizer 'fsq_video'"), size)


def test_fidelity_of_a_video_is_that_of_its_frames():
    video, picture = fitted("fsq_video", "video"), fitted("identity", "rgb")
    raws = [example("video", s) for s in range(3)]
    figures = fidelity(video, raws, video.encode(raws))
    made = video.decode(video.encode(raws))

    class Frame:  # the same figures, by the path that pictures take
        modality, slow = "rgb", False
        comparable = staticmethod(lambda raw: raw)
        decode = staticmethod(lambda ids: list(made[1]))

    alone = fidelity(Frame, list(raws[1]), picture.encode(list(raws[1])))
    assert figures["psnr"].shape == figures["ssim"].shape == (3,)
    assert figures["ssim"][1] == pytest.approx(alone["ssim"].mean(), abs=1e-5)
    assert 10 ** (-figures["psnr"][1] / 10) == pytest.approx((10 ** (-alone["psnr"] / 10)).mean())


def test_a_block_is_solid_in_time_as_in_space():
    spec = TokenSpec(modality="video", kind="grid", shape=(4, 4, 4), vocab_size=8)
    at, n = spec.positions(), 200
    assert sorted(map(tuple, at.tolist())) == sorted(np.ndindex(4, 4, 4)) and at[17].tolist() == [1, 0, 1]
    count = np.full(n, 8)
    shown, asked = choose_slots("block", spec, np.full(n, 64), count, count, Key(0, "t", np.arange(n)))
    assert (asked.sum(1) == 8).all() and not (shown & asked).any()
    extent = np.stack([np.ptp(at[row], axis=0) + 1 for row in asked])
    assert np.median(extent.max(1)) <= 3 and (extent.max(0) >= 2).all() and (np.median(extent, 0) == np.median(extent)).all()


# -- moving scenes ----------------------------------------------------------------------------------------------------

MOVING = Source.Options(video=True)


def test_all_but_the_video_is_what_it_is_without():
    still = Source.Options()
    assert (MOVING.name, still.name, Source.Options(video=True, name="mine").name) == ("scenes-video", "scenes", "mine")
    for index in range(8):
        a, b = encode("k", raw_scene(MOVING, "val", index)).members, encode("k", raw_scene(still, "val", index)).members
        assert set(a) - set(b) == {"video.png"}
        assert all(a[m] == b[m] for m in b if m != "labels.json")
        told, plain = json.loads(a["labels.json"]), json.loads(b["labels.json"])
        for thing in told["objects"]:
            assert thing.pop("motion") in motion.WAYS and len(thing.pop("velocity")) == 2
        assert told == plain
        assert np.array_equal(raw_scene(MOVING, "val", index).video[4], raw_scene(still, "val", index).rgb)


def test_info_of_still_scenes_says_nothing_of_video():
    still, moving = (Source(o, Path("unused")).info() for o in (Source.Options(), MOVING))
    assert not {"video", "frames", "fps"} & set(still.options) and "video" not in still.modalities
    assert "motion" not in still.attributes and "video" not in still.determined
    assert moving.modalities == [*still.modalities, "video"] and moving.options["video"] is True
    assert moving.sizes["video"] == {"size": [32, 32], "frames": 8, "fps": 8.0}
    assert moving.determined == {**still.determined, "video": [*still.attributes, "motion"]}
    for limits, before in ((moving.ceilings, still.ceilings), (moving.told_ceilings, still.told_ceilings)):
        assert limits == {m: {**before.get(m, {}), "motion": 0.2} for m in still.modalities}


def test_pixels_go_where_the_label_says():
    """Told by the picture alone: what is colourful is the object."""
    seen = Counter()
    for index in range(40):
        raw = raw_scene(Source.Options(video=True, min_objects=1, max_objects=1), "train", index)
        (thing,) = raw.labels["objects"]
        solid = np.ptp(raw.video.astype(int), axis=-1) > 40  # (T, H, W)
        x = np.array([np.nonzero(m)[1].mean() for m in solid])
        low = np.array([np.nonzero(m)[0].max() for m in solid])
        go, down = x[-1] - x[0], low[-1] - low[0]
        told = {"left": go < -2, "right": go > 2, "towards": down >= 2, "away": down <= -2,
                "still": bool((raw.video == raw.video[0]).all())}
        assert [k for k, v in told.items() if v] == [thing["motion"]], (index, told)
        assert solid.sum((1, 2)).min() > 0.5 * solid[4].sum(), "it stays in sight"
        step = np.diff(x)
        assert thing["motion"] not in ("left", "right") or (np.sign(step) == np.sign(step[0])).mean() > 0.8
        sideways, ahead = thing["velocity"]
        assert (sideways < 0, sideways > 0, ahead < 0, ahead > 0) == tuple(
            thing["motion"] == way for way in ("left", "right", "towards", "away"))
        seen[thing["motion"]] += 1
    assert len(seen) == 5


@pytest.mark.parametrize("count", [2, 3])
def test_nothing_collides_or_disappears(count):
    o, cam, several = Source.Options(min_objects=count, max_objects=count), scenes.camera(count), 0
    grid = render.make_grid(cam, 32)
    for index in range(100):
        bodies = draw(o, "train", index).bodies
        moves = motion.draw_moves(o.seed, "train", index, bodies, cam)
        several += len({m.motion for m in moves}) > 1
        for part in motion.parts(8) if index < 40 else ():
            now = [m.of(b, part) for m, b in zip(moves, bodies, strict=True)]
            for (a, p), (b, q) in combinations(zip(now, bodies, strict=True), 2):
                apart = np.hypot(a.x - b.x, a.z - b.z)
                assert apart >= min(a.reach + b.reach, np.hypot(p.x - q.x, p.z - q.z)) - 1e-9
            traced = render.trace(grid, now)
            for i in range(count):
                assert len(traced.pixels(i)[0]) >= 0.35 * traced.covered[i] > 0 and traced.covered[i] >= 8, (index, part, i)
    assert several > 20, "many scenes have more than one motion"


def test_every_motion_of_every_object_is_equally_likely():
    cam, n = scenes.camera(3), 500
    o = Source.Options(min_objects=3, max_objects=3)
    counts = [Counter() for _ in range(3)]
    for index in range(n):
        for i, move in enumerate(motion.draw_moves(7, "train", index, draw(o, "train", index).bodies, cam)):
            counts[i][move.motion] += 1
            assert abs(move.x) <= 0.3 * 1.15 and abs(move.z) <= 0.5 * 1.15 and not (move.x and move.z)
    for c in counts:
        chi2 = sum((c[way] - n / 5) ** 2 / (n / 5) for way in motion.WAYS)
        assert chi2 < 18.5, c  # 4 degrees of freedom: one in a thousand
    # exactly so: whoever draws what, the test of a pair says the same
    a, b = draw(Source.Options(min_objects=2), "train", 0).bodies
    ways = list(motion.WAYS)
    free = {(v, w): motion.apart(a, b, v, w, cam) and motion.apart(a, b, w, v, cam) for v in ways for w in ways}
    first, second = Counter(), Counter()
    for (v, w), ok in free.items():
        first[v] += 1
        second[w if ok else v] += 1
    assert set(first.values()) == set(second.values()) == {5}


def test_scene_video_options_are_checked():
    for bad in (dict(frames=1), dict(frames=65), dict(fps=0)):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            build(Source.Options, {"video": True, **bad}, "source 'scenes'")
    assert motion.parts(2) == [-1, 0] and motion.parts(5) == [-1, -0.5, 0, 0.5, 1]
    assert 64 * 1024**2 <= PIXELS, "the largest can be stored"


# -- clips of a folder ------------------------------------------------------------------------------------------------


def test_clips_of_a_folder_keep_their_frames(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    film(folder / "long.mp4", 20)
    film(folder / "short.mp4", 6, size=(48, 64))
    given = [f"path={folder}", "seconds=1", "size=16", "val=0", "test=0", "video=true", "fps=5", "name=moving"]
    workspace = Workspace(tmp_path)
    info = fetch(open_source("folder", given, workspace), workspace, 1).info
    assert info.modalities == ["rgb", "video"] and info.sizes["video"] == {"size": [16, 16], "frames": 5, "fps": 5.0}
    split = Split(workspace.dataset("moving").raw("train"))
    shown = {}
    for i in range(len(split)):
        shard, j = split.locate(i)
        labels = json.loads(shard.read(j, "labels.json"))
        raw = VIDEO.from_bytes(shard.read(j, "video.png"), "x")
        assert raw.shape == (5, 16, 16, 3)
        shown[labels["item"], labels["clip"]] = [number(f) for f in raw]
    assert shown == {("long", 0): [1, 3, 5, 7, 9], ("long", 1): [11, 13, 15, 17, 19], ("short", 0): [1, 3, 5, 5, 5]}
    assert info.options["video"] is True and info.options["fps"] == 5.0
    with pytest.raises(ConfigError, match="are too large"):
        build(Folder.Options, {"path": ".", "video": True, "seconds": 600, "size": 512}, "source 'folder'")


# -- from end to end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Moving scenes, tokenised by tokenizers fitted for a few steps, and a run of a few steps, all by the command line."""
    root = tmp_path_factory.mktemp("studio")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "tiny.yaml").write_text("data: {dataset: scenes-video, modalities: [rgb, video, caption]}")
    tiny = ["train=32", "val=8", "test=8", "test_novel=0", "judge=0", "size=16", "supersample=1", "shard_size=32"]
    masking = "[{type: dirichlet, input: [4, 24], target: [4, 16]}]"
    fit = [f"{m}.{o}" for m in ("rgb", "video") for o in ("width=16", "depth=1", "fit_steps=6")]
    for args in (
        ["fetch", "scenes", "video=true", *tiny, "--workers", 1],
        ["tokenize", "--modality", "rgb,video,caption", *fit, "--workers", 1],
        ["train", root / "tiny.yaml", *settings(train__steps=4, masking__components=masking), "--device", "cpu"],
    ):
        result = run(*args, "--root", root)
        assert result.exit_code == 0, result.output
    yield Workspace(root)
    torch.set_num_threads(before)


def test_video_is_generated_and_read_again(studio, tmp_path):
    dataset = studio.dataset()
    assert dataset.name == "scenes-video" and open_run(studio).layout.specs[1].shape == (2, 2, 2)
    out, words = tmp_path / "out", "caption=a large red metal sphere"
    result = run("generate", "--from", words, "--to", "video", "--out", out, "-n", 2, "--root", studio.root, "--device", "cpu")
    assert result.exit_code == 0, result.output
    ids = np.load(out / "000-video.ids.npy")
    assert ids.shape == (8,)
    with Image.open(out / "000-video.webp") as moving:
        assert moving.n_frames > 1 and moving.info["loop"] == 0
        frames = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(moving)]
    frames, spans = zip(*frames, strict=True)
    assert sum(spans) == 1000
    assert frames[0].shape == (16, 16, 3) and np.stack(frames).std() > 1
    assert Image.open(out / "sheet.png").size[0] > 200
    given = f"video={out / '000-video.webp'}"
    here = ["--root", studio.root, "--device", "cpu"]
    again = run("generate", "--from", given, "--to", "caption", "--out", tmp_path / "words", *here)
    assert again.exit_code == 0 and "notice: video" not in again.stderr, again.output
    path = film(tmp_path / "clip.mp4", 20)
    again = run("generate", "--from", f"video={path}", "--to", "rgb", "--out", tmp_path / "rgb", *here)
    assert again.exit_code == 0, again.output
    assert "was read at 8 frames/s, its first 1.00 s" in again.stderr
    assert "was cropped to its centre and resized to 8 frames of 16 x 16" in again.stderr


def test_gallery_and_report_show_moving_pictures(studio):
    opened = open_run(studio)
    path = write_gallery(Context(opened, "test", 3, 0, lambda *_: None), opened.path / "eval" / "gallery")
    rows = json.loads(path.read_text())["rows"]
    items = [i for row in rows for side in ("condition", "output", "truth") for i in row[side] if i["modality"] == "video"]
    assert items and all(i["kind"] == "image" and i["file"].endswith(".webp") for i in items)
    given = {row["key"]: row["condition"][0] for row in rows if row["title"].startswith("video ->")}
    split = Split(opened.dataset.raw("test"))
    truth = VIDEO.from_bytes(split.shards[0].read(0, "video.png"), "x")
    shown = VIDEO.sized({"fps": 8.0}).read_file(path.parent / given[split.shards[0].keys[0]]["file"])
    assert np.array_equal(shown, truth)
    from nano4m_cli.report.build import build as build_report

    page = build_report(opened.path).read_text()
    assert "data:image/webp;base64," in page and 'class="pixels"' in page


def test_probes_read_motion_from_video(studio):
    result = run("probe", "linear", "--root", studio.root, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = {m["name"]: m for r in json.loads(result.stdout)["results"] for m in r["metrics"]}
    assert found["video/motion_acc"]["ceiling"] == 1.0 and found["rgb/motion_acc"]["ceiling"] == 0.2
    asked = [word for name in ("tokenizer", "class", "retrieval") for word in ("--probe", name)]
    result = run("eval", *asked, "--root", studio.root, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = {m["name"]: m["value"] for r in json.loads(result.stdout)["results"] for m in r["metrics"]}
    assert found["video/stored_ids_equal"] == 1.0 and found["video/psnr"] > 5 and "video->caption/colour_acc" in found
    assert "caption->video/r5" in found

"""Sounding scenes: ray-cast pictures of objects, with depth, normals, a note per object, a caption and labels.

One to three objects (shape, colour, size, material) stand on a plane, left to right without hiding each other. RGB and
caption show all attributes; sound has shape, size and material; depth and normals have shape and size. What a modality
does not determine is therefore known exactly, and so is the best accuracy anyone can reach from it.

A scene is a function of (seed, split, index) alone; the picture's size changes its sampling, not the scene. With video=true
objects move (_scene_motion.py), and everything else stays as it is without: the picture is the video's middle frame. With
hires=true each scene is rendered once more in finer pixels, smoothed by the same supersampling; rgb stays what it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from nano4m_cli import rng
from nano4m_cli.config import Config
from nano4m_cli.data.sources import _scene_motion as motion
from nano4m_cli.data.sources import _scene_render as render
from nano4m_cli.data.sources import _scene_sound as sound
from nano4m_cli.data.sources import _scene_text as text
from nano4m_cli.data.sources._base import DatasetInfo, Sample, ShardPlan
from nano4m_cli.data.sources._base import Source as BaseSource
from nano4m_cli.data.sources._scene_place import place
from nano4m_cli.data.sources._scene_render import Body, Camera
from nano4m_cli.data.sources._scene_shade import shade, shrink
from nano4m_cli.modalities.audio import MODALITY as AUDIO
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.modalities.caption import MODALITY as CAPTION
from nano4m_cli.modalities.depth import MODALITY as DEPTH
from nano4m_cli.modalities.normal import MODALITY as NORMAL
from nano4m_cli.modalities.rgb import MODALITY as RGB
from nano4m_cli.modalities.rgb_hi import MODALITY as RGB_HI
from nano4m_cli.modalities.video import MODALITY as VIDEO

SPLITS = ("train", "val", "test", "test_novel")
SHAPES, COLOURS, SIZES, MATERIALS = (text.ATTRIBUTES[a].values for a in ("shape", "colour", "size", "material"))
JUDGE = "judge"  # for judges only: the triples of test_novel, other scenes, so that a judge of it knows what it names
# Triples only test_novel (and judge) shows, and it shows no others: each (shape, material) once, each colour once. So elsewhere
# every (shape, material) has five equally likely colours.
HELD_OUT = {
    ("sphere", "rubber"): "green",
    ("sphere", "metal"): "blue",
    ("cube", "rubber"): "yellow",
    ("cube", "metal"): "cyan",
    ("cylinder", "rubber"): "purple",
    ("cylinder", "metal"): "red",
}
CELLS = list(HELD_OUT)
DETERMINED = {
    "rgb": ("shape", "colour", "size", "material"),
    "depth": ("shape", "size"),
    "normal": ("shape", "size"),
    "audio": ("shape", "size", "material"),
    "caption": ("shape", "colour", "size", "material"),
}

SCALE = {"large": 0.88, "small": 0.60}  # metres; times (radius, height) of the shape
PROPORTIONS = {"sphere": (1.0, 2.0), "cube": (0.76, 1.52), "cylinder": (0.66, 2.10)}  # cube: half edge
SCALE_JITTER = 0.05
NEAR_Z, FAR_Z = 3.6, 4.8  # metres, of the objects' middles
YAW_JITTER = math.radians(12)  # about 45 degrees to the line of sight: two faces show, and the top
LIGHT_AZIMUTH, LIGHT_ELEVATION = math.radians(56), math.radians(55)  # from the left front
LIGHT_JITTER = math.radians(10), math.radians(5)
DRAWS_SCENE, DRAWS_OBJECT, MOST = 8, 10, 3  # uniform numbers per scene, per object


class Scene(NamedTuple):
    """All that is drawn of one scene; objects stand left to right."""

    bodies: list[Body]
    light: tuple[float, float, float]
    notes: list[tuple[str, str, float, float]]  # shape, material, hertz, level
    caption: str
    fields: list[dict]


class Raw(NamedTuple):
    """A scene's raw values: rgb (n, n, 3) uint8, depth (n, n), normal (n, n, 3), audio (samples,), caption, labels,
    video (frames, n, n, 3) uint8, rgb_hi (factor n, factor n, 3) uint8."""

    rgb: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    audio: np.ndarray
    caption: str
    labels: dict
    video: np.ndarray | None = None
    rgb_hi: np.ndarray | None = None


class Source(BaseSource):
    version = 2  # 1: farther camera, duller metal

    class Options(Config):
        """Counts are samples per split (judge: None is an eighth of train).

        `supersample` smooths RGB only, depth and normals stay exact per pixel. `video`: objects move, and each sample has
        `frames` pictures of that, `fps` a second; the data set's name is then scenes-video by default. `hires`: rgb_hi is the
        picture with `factor` times as many pixels a side; the name is then scenes-hi by default.
        """

        name: str = Field("scenes", pattern=r"^[A-Za-z0-9_-]+$")
        seed: int = Field(3, ge=0)
        size: int = Field(32, ge=8, le=1024)
        supersample: int = Field(2, ge=1, le=8)
        seconds: float = Field(1.0, ge=0.3, le=60.0)
        min_objects: int = Field(1, ge=1, le=MOST)
        max_objects: int = Field(2, ge=1, le=MOST)
        train: int = Field(13_000, ge=0)
        val: int = Field(400, ge=0)
        test: int = Field(300, ge=0)
        test_novel: int = Field(300, ge=0)
        judge: int | None = Field(None, ge=0)
        shard_size: int = Field(1000, ge=1)
        video: bool = False
        frames: int = Field(8, ge=2, le=64)
        fps: float = Field(8.0, gt=0, le=120)
        hires: bool = False
        factor: int = Field(2, ge=2, le=8)

        @model_validator(mode="before")
        @classmethod
        def _named(cls, given: Any) -> Any:
            if not isinstance(given, dict):
                return given
            return {"name": "scenes" + "-video" * (given.get("video") is True) + "-hi" * (given.get("hires") is True), **given}

        @model_validator(mode="after")
        def _check(self):
            if self.min_objects > self.max_objects:
                raise ValueError(f"min_objects ({self.min_objects}) is above max_objects ({self.max_objects})")
            if self.max_objects == 3 and self.size < 16:
                raise ValueError(f"three objects need a size of 16 at least, to be seen (got {self.size})")
            factors = [("size", self.size), ("factor", self.factor if self.hires else 1), ("supersample", self.supersample)]
            side = math.prod(f for _, f in factors)
            if side > 4096:
                shown = " x ".join(n for n, _ in factors if n != "factor" or self.hires)
                raise ValueError(f"{shown} is {side} pixels a side; 4096 at most")
            return self

    options: Options

    def info(self) -> DatasetInfo:
        o = self.options
        picture = {"size": [o.size, o.size]}
        sizes = {"rgb": picture, "depth": picture, "normal": picture, "audio": {"seconds": o.seconds, "rate": RATE}}
        if o.hires:
            sizes["rgb_hi"] = {"size": [o.size * o.factor] * 2}
        attributes, determined = text.ATTRIBUTES, {modality: list(known) for modality, known in DETERMINED.items()}
        limits, told_limits = ceilings(), ceilings(told=True)
        if o.hires:
            determined["rgb_hi"] = determined["rgb"]
        if o.video:
            attributes = {**attributes, "motion": motion.MOTION}
            sizes["video"] = {**picture, "frames": o.frames, "fps": o.fps}
            for modality in determined:
                for limit in (limits, told_limits):
                    limit.setdefault(modality, {})["motion"] = 1 / len(motion.WAYS)
            determined["video"] = list(attributes)
        return DatasetInfo(
            name=o.name,
            source="scenes",
            options=o.model_dump(mode="json", exclude={
                *(() if o.video else ("video", "frames", "fps")), *(() if o.hires else ("hires", "factor"))}),
            version=self.version,
            modalities=list(determined),
            splits={split: getattr(o, split) for split in SPLITS},
            judge=self.judge_samples,
            sizes=sizes,
            attributes=attributes,
            max_objects=o.max_objects,
            determined=determined,
            ceilings=limits,
            told_ceilings=told_limits,
            through_labels=["audio", "caption"],
            wording={"caption": [round(text.wording_entropy(n), 6) for n in range(1, o.max_objects + 1)]},
            notes="Procedural, no licence attached. test_novel shows only (shape, colour, material) triples that no "
            "other split shows; ceilings are those of the other splits. "
            f"Depth is along the viewing axis; sky and far ground are at {render.FAR:g} m.",
        )

    @property
    def judge_samples(self) -> int:
        return self.options.train // 8 if self.options.judge is None else self.options.judge

    def plan(self) -> list[ShardPlan]:
        """Return the shards; `items` is (first index, end) within the split."""
        plans = []
        for split, total in [*((s, getattr(self.options, s)) for s in SPLITS), (JUDGE, self.judge_samples)]:
            for number, first in enumerate(range(0, total, self.options.shard_size)):
                end = min(first + self.options.shard_size, total)
                plans.append(ShardPlan(split, number, (first, end), end - first))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        for index in range(*plan.items):
            yield encode(f"{plan.split}-{index:09d}", raw_scene(self.options, plan.split, index))


def encode(key: str, raw: Raw) -> Sample:
    labels = json.dumps(raw.labels, sort_keys=True, separators=(",", ":"))
    members = {m.ext: m.to_bytes(v) for m, v in zip((RGB, DEPTH, NORMAL, AUDIO, CAPTION), raw[:5], strict=True)}
    members.update({m.ext: m.to_bytes(v) for m, v in ((VIDEO, raw.video), (RGB_HI, raw.rgb_hi)) if v is not None})
    return Sample(key, {**members, "labels.json": labels.encode()})


def allowed(split: str) -> list[tuple[str, str, str]]:
    """Return the (shape, colour, material) triples of a split; all are equally likely."""
    novel = split in ("test_novel", JUDGE)
    return [(s, c, m) for s, m in CELLS for c in COLOURS if (HELD_OUT[s, m] == c) == novel]


def ceilings(told: bool = False) -> dict[str, dict[str, float]]:
    """Return, per modality, the best accuracy on each attribute it leaves open (Bayes, exact, ordinary splits).

    told: the object's other attributes are known as well, so a held-out triple gives its last attribute away.
    """
    worlds = [{"shape": s, "colour": c, "material": m, "size": z} for (s, c, m), z in product(allowed("train"), SIZES)]
    out: dict[str, dict[str, float]] = {}
    for modality, known in DETERMINED.items():
        for attribute in (a for a in text.ATTRIBUTES if a not in known):
            counts: dict[tuple, dict[str, int]] = {}
            for world in worlds:
                cue = [a for a in text.ATTRIBUTES if a != attribute] if told else known
                seen = counts.setdefault(tuple(world[k] for k in cue), {})
                seen[world[attribute]] = seen.get(world[attribute], 0) + 1
            best = sum(max(seen.values()) for seen in counts.values())
            out.setdefault(modality, {})[attribute] = float(Fraction(best, len(worlds)))
    return out


def camera(max_objects: int) -> Camera:
    """Return the data set's camera, the same for every scene; three objects need a wider view."""
    return Camera(height=2.7, pitch=math.radians(24.5), focal=2.4 if max_objects <= 2 else 1.65)


def draw(options: Source.Options, split: str, index: int) -> Scene:
    """Return the scene of (seed, split, index). Attributes are drawn first and placing never rejects them."""
    u = rng.uniform(options.seed, f"scenes/{split}", index, np.arange(DRAWS_SCENE + DRAWS_OBJECT * MOST)).tolist()
    u_count, u_template, u_azimuth, u_elevation, *u_gaps = u[:DRAWS_SCENE]
    count = options.min_objects + _pick(u_count, options.max_objects - options.min_objects + 1)
    triples, bodies, notes, wordings, yaws = allowed(split), [], [], [], []
    for i in range(count):
        at = DRAWS_SCENE + DRAWS_OBJECT * i
        u_triple, u_size, u_z, u_scale, u_yaw, u_pitch, u_level, u_word, u_stuff, _ = u[at : at + DRAWS_OBJECT]
        shape, colour, material = triples[_pick(u_triple, len(triples))]
        size = SIZES[_pick(u_size, 2)]
        scale = SCALE[size] * (1 + SCALE_JITTER * (2 * u_scale - 1))
        radius, height = (scale * part for part in PROPORTIONS[shape])
        z = NEAR_Z + (FAR_Z - NEAR_Z) * u_z
        bodies.append(Body(shape, colour, size, material, radius, height, z=z))
        yaws.append(math.radians(45) + YAW_JITTER * (2 * u_yaw - 1))
        low, high = sound.LEVEL
        hertz = sound.PITCH[size] * (1 + sound.DETUNE * (2 * u_pitch - 1))
        notes.append((shape, material, hertz, low + (high - low) * u_level))
        wordings.append((text.choose(2, u_word), text.choose(2, u_stuff)))
    bodies = place(bodies, yaws, u_gaps[: count + 1], camera(options.max_objects))
    azimuth = LIGHT_AZIMUTH + LIGHT_JITTER[0] * (2 * u_azimuth - 1)
    elevation = LIGHT_ELEVATION + LIGHT_JITTER[1] * (2 * u_elevation - 1)
    flat = math.cos(elevation)
    light = (-flat * math.sin(azimuth), math.sin(elevation), -flat * math.cos(azimuth))
    values = [{a: getattr(b, a) for a in text.ATTRIBUTES} for b in bodies]
    caption, fields = text.compose(values, text.choose(len(text.TEMPLATES[count]), u_template), wordings)
    return Scene(bodies, light, notes, caption, fields)


def _pick(u: float, count: int) -> int:
    return min(int(u * count), count - 1)


def raw_scene(options: Source.Options, split: str, index: int) -> Raw:
    """Return the raw values of one scene, not encoded."""
    scene, cam = draw(options, split, index), camera(options.max_objects)
    grid = render.make_grid(cam, options.size)
    traced = render.trace(grid, scene.bodies)
    if options.supersample == 1:
        fine, fine_traced = grid, traced
    else:
        fine = render.make_grid(cam, options.size * options.supersample)
        fine_traced = render.trace(fine, scene.bodies)
    rgb = shrink(shade(fine, fine_traced, scene.bodies, scene.light), options.supersample)
    normal = render.normal_map(grid, traced, scene.bodies)
    labels = {
        "objects": [_label(i, body, scene.notes[i], traced) for i, body in enumerate(scene.bodies)],
        "fields": scene.fields,
        "split": split,
        "index": index,
        "seed": options.seed,
        "light": [round(v, 5) for v in scene.light],
        "camera": {"height": cam.height, "pitch": round(cam.pitch, 6), "focal": cam.focal, "far": render.FAR},
    }
    raw = Raw(rgb, traced.depth, normal, sound.clip(scene.notes, options.seconds), scene.caption, labels)
    if options.hires:
        finer = render.make_grid(cam, options.size * options.factor * options.supersample)
        lit = shade(finer, render.trace(finer, scene.bodies), scene.bodies, scene.light)
        raw = raw._replace(rgb_hi=shrink(lit, options.supersample))
    return raw if not options.video else _moving(options, raw, scene, fine, motion.draw_moves(
        options.seed, split, index, scene.bodies, cam))


def _moving(options: Source.Options, raw: Raw, scene: Scene, fine: render.Grid, moves: list[motion.Move]) -> Raw:
    """Return the raw values with the video and, per object, its motion and velocity (x, z) in metres a second."""
    frames = []
    for part in motion.parts(options.frames):
        if part == 0:
            frames.append(raw.rgb)
            continue
        bodies = [move.of(body, part) for move, body in zip(moves, scene.bodies, strict=True)]
        frames.append(shrink(shade(fine, render.trace(fine, bodies), bodies, scene.light), options.supersample))
    rate = options.fps / (options.frames // 2)
    told = [{**thing, "motion": m.motion, "velocity": [round(rate * m.x, 5), round(rate * m.z, 5)]}
            for thing, m in zip(raw.labels["objects"], moves, strict=True)]
    return raw._replace(labels={**raw.labels, "objects": told}, video=np.stack(frames))


def _label(i: int, body: Body, note: tuple[str, str, float, float], traced: render.Traced) -> dict:
    """Return an object's label. (x, y, z) is its middle in world metres; `box` is in pixels, ends not included."""
    rows, cols = traced.pixels(i)
    box = [int(v) for v in (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)] if len(rows) else None
    return {
        **{a: getattr(body, a) for a in text.ATTRIBUTES},
        **{k: round(v, 5) for k, v in (("x", body.x), ("y", body.height / 2), ("z", body.z), ("yaw", body.yaw))},
        **{k: round(v, 5) for k, v in (("radius", body.radius), ("height", body.height))},
        **{"hertz": round(note[2], 2), "level": round(note[3], 4)},
        **{"box": box, "pixels": len(rows), "covered": traced.covered[i]},
    }

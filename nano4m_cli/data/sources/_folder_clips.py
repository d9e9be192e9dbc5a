"""Clips of an item of a folder: which there are, and their raw values. Everything that is used is decoded twice: once to
know that it is whole, before anything is written, and once to write it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nano4m_cli.data import media
from nano4m_cli.data._settings import made
from nano4m_cli.data.sources._folder_items import Item
from nano4m_cli.data.sources._folder_near import looks
from nano4m_cli.errors import MediaError
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.registry import FILTERS, LABELS, MODALITIES

CANDIDATES = 8  # frames looked at for each frame that is chosen by scene change


def inspect(item: Item, o: Any) -> dict[str, Any]:
    """Return what an item holds, after decoding all of it that would be used: its clips, or the problem it has.

    A file that breaks off keeps the clips before the break, and the problem says where that was.
    """
    first = next(item.files[r] for r in ("video", "audio", *item.files) if r in item.files)
    look: dict[str, Any] = {"file": first, "sha256": "", "clips": [], "video": 0.0, "sound": 0.0, "problem": None, "notes": []}
    try:
        digest = hashlib.sha256()
        for role in sorted(item.files):
            with open(item.files[role], "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        look["sha256"] = digest.hexdigest()
        if "video" in item.files:
            holds = media.facts(Path(item.files["video"]))
            look["video"], look["sound"] = holds.video, holds.audio
            look["moving"] = bool(o.moving and holds.video)
            if not holds.video and not holds.audio:
                raise MediaError("has neither picture nor sound")
            if "rgb" in item.files and holds.video:
                look["notes"].append(f"{Path(item.files['rgb']).name} is not used: {Path(first).name} gives the picture")
        if "audio" in item.files:
            look["sound"] = media.facts(Path(item.files["audio"])).audio
        spans = [s for s in (look["video"], look["sound"]) if s]
        whole = min(spans, default=0.0)
        if spans and item.start >= whole:
            raise MediaError(f"lasts {whole:.2f} s, the part asked for starts at {item.start:g} s")
        if spans and max(spans) - whole > 0.5:
            look["notes"].append(f"{Path(first).name} has {look['video']:.1f} s of picture and {look['sound']:.1f} s of sound: "
                                 "the shorter counts")
        whole = min(whole, item.end or whole)
        every, starts = o.every or o.seconds, [item.start]
        while spans and starts[-1] + every + o.seconds <= whole + media.SLACK:
            starts.append(starts[-1] + every)
        lengths = [min(o.seconds, whole - start) if spans else 0.0 for start in starts]
        shown = Path(item.files["video"]) if look["video"] else None
        clips = [{"start": s, "seconds": n, "frames": _times(shown, s, n, o) if shown else []}
                 for s, n in zip(starts, lengths, strict=True)]
        seen: list[dict[str, Any]] = []
        for c, f, raw in read_clips(item, clips, o):
            seen = [*(seen if f else []), raw]
            if f + 1 >= len(clips[c]["frames"]):
                look["clips"].append({**clips[c], "scores": _scores(item, seen, clips[c], shown, o), **looks(seen, o.distinct)})
    except (MediaError, OSError, Image.DecompressionBombError) as err:
        after = f" (the {len(look['clips'])} clips before that are used)" if look["clips"] else ""
        look["problem"] = (err.message if isinstance(err, MediaError) else f"cannot be read: {err}") + after
    return look


def _scores(item: Item, frames: list[dict[str, Any]], clip: dict[str, Any], shown: Path | None, o: Any) -> dict[str, Any]:
    """Return what the filters say of a clip; one that looks at what the clip has not says nothing."""
    out = {}
    for name in o.filter:
        one = made(FILTERS, name, o.settings)
        raws = _looked_at(one, item, frames, clip, shown)
        if raws and (item.caption or not one.reads_caption):
            out[name] = _recorded(one.score(raws, item.caption) if one.reads_caption else one.score(raws), name)
    return out


def _looked_at(one: Any, item: Item, frames: list[dict[str, Any]], clip: dict[str, Any], shown: Path | None) -> list[np.ndarray]:
    """Return what a filter looks at: the clip's sound without what pads it, its key frames, or pictures over its length."""
    if one.looks_at == "audio":
        return [f["audio"][: max(round(clip["seconds"] * RATE), 1)] for f in frames[:1] if "audio" in f]
    if one.looks_at == "video":
        times = [clip["start"] + (i + 0.5) * clip["seconds"] / CANDIDATES for i in range(CANDIDATES)]
        return [square(f, one.side) for f in media.frames(shown, times)] if shown else []
    if one.side is None:
        return [f["rgb"] for f in frames if "rgb" in f]
    files = [Path(item.files["rgb"])] if "rgb" in item.files else []
    whole = media.frames(shown, clip["frames"]) if shown else (MODALITIES.get("rgb").read_file(f) for f in files)
    return [square(picture, one.side) for picture in whole]


def _recorded(score: Any, name: str) -> Any:
    """Return a score as it is written down, and as decisions read it."""
    if isinstance(score, dict):
        return {k: _recorded(v, name) for k, v in score.items()}
    if isinstance(score, float) and not np.isfinite(score):
        raise MediaError(f"filter '{name}' scores it {score}")
    return round(score, 6) if isinstance(score, float) else score


def _times(path: Path, start: float, seconds: float, o: Any) -> list[float]:
    """Return when a clip's key frames are: the middles of equal parts, or just after the greatest changes."""
    if o.pick == "even":
        return [start + (i + 0.5) * seconds / o.frames for i in range(o.frames)]
    times = [start + (i + 0.5) * seconds / (CANDIDATES * o.frames) for i in range(CANDIDATES * o.frames)]
    small = np.stack([square(f, 16).astype(np.float32) for f in media.frames(path, times)])  # of one clip at a time
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    after = np.sort(np.argsort(-change, kind="stable")[: o.frames - 1] + 1)
    return [times[i] for i in [0, *after.tolist()]]


def read_clips(
    item: Item, clips: Sequence[dict[str, Any]], o: Any, derive: Sequence[str] = ()
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (clip, frame, raw values by modality) of every frame of the clips; one without frames counts as having one."""
    raw: dict[str, Any] = {"caption": item.caption} if item.caption else {}
    for role, file in item.files.items():
        if role in MODALITIES and MODALITIES.get(role).kind == "image":
            raw[role] = square(MODALITIES.get(role).read_file(Path(file)), o.size, smooth=role == "rgb")
    source = item.files.get("audio") or item.files.get("video")
    heard = source and media.facts(Path(source)).audio
    pictures = media.frames(Path(item.files["video"]), [t for c in clips for t in c["frames"]]) if "video" in item.files else None
    for c, clip in enumerate(clips):
        if heard:
            wave = media.sound(Path(source), clip["start"], clip["seconds"])
            raw["audio"] = np.pad(wave, (0, max(0, round(o.seconds * RATE) - len(wave))))
        if o.moving and clip["frames"]:
            end = clip["start"] + clip["seconds"] - 0.5 / o.fps
            times = [min(clip["start"] + (i + 0.5) / o.fps, max(end, clip["start"])) for i in range(o.moving)]
            raw["video"] = np.stack([square(f, o.size) for f in media.frames(Path(item.files["video"]), times)])
        for f in range(len(clip["frames"])):
            raw["rgb"] = square(next(pictures), o.size)
            yield c, f, _derived(raw, derive, o.settings)
        if not clip["frames"]:
            yield c, 0, _derived(raw, derive, o.settings)


def _derived(raw: dict[str, Any], names: Sequence[str], settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the raw values with those that are made from them, or from one another; an item's own come first."""
    out = dict(raw)
    for name in labels_for(set(raw), names):
        label = made(LABELS, name, settings)
        out[label.makes] = label.make(out)
    return out


def labels_for(own: set[str], names: Sequence[str]) -> list[str]:
    """Return the labels that make what is not there, in an order in which each finds what it needs."""
    there, order = set(own), []
    while ready := [n for n in names if LABELS.get(n).makes not in there and there.issuperset(LABELS.get(n).needs)]:
        order.append(ready[0])
        there.add(LABELS.get(ready[0]).makes)
    return order


def square(picture: np.ndarray, size: int, smooth: bool = True) -> np.ndarray:
    """Return the central square of a picture, resized: averaged (rgb), or by nearest pixels (depth and normals, which are
    never averaged across an edge)."""
    h, w = picture.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    cut = picture[top : top + side, left : left + side]
    if smooth:
        return np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0))
    at = ((np.arange(size) + 0.5) * side / size).astype(int)
    return cut[at][:, at]

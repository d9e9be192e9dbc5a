"""The gallery: a few held-out samples in every direction, as files for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.generate.sampler import GenerateOptions
from nano4m_cli.modalities._base import Modality
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._directions import estimate
from nano4m_cli.registry import MODALITIES

SHOWN = 6


def write_gallery(context: Context, folder: Path) -> Path:
    """Write gallery.json and its media for the first samples of the split: from each source to all it is asked for."""
    names = [n for n in context.names if n not in context.info.brought]  # brought tokens cannot be shown
    given = [s for s in ("caption", "rgb", "audio", "depth", "video") if s in names and len(names) > 1]
    plans = [([s], [t for t in names if t != s]) for s in given]
    if not context.model.encodes:  # in the order of reading: the last given all before it, or from nothing
        plans = [(names[:-1], names[-1:])]
    elif {"audio", "caption", "rgb"} <= set(names):
        plans.append((["audio", "caption"], ["rgb"]))
    kinds = {n: MODALITIES.get(n).sized(context.info.sizes.get(n, {})) for n in names}
    rows: list[dict[str, Any]] = []
    options = None if context.model.encodes else GenerateOptions(temperature=1.0, text_temperature=0.8, guidance=1.0)
    few = Context(context.run, context.split, min(SHOWN, context.n), context.seed, context.progress)
    with atomic_folder(folder) as aside:
        for p, (sources, targets) in enumerate(plans):
            context.progress("gallery", p, len(plans))
            # From a picture the expected depth is the best one; from words or sound it would be the mean of all scenes.
            exact = [t for t in ("depth", "normal") if {"rgb", "depth"} & set(sources)]
            made = {t: few.decoded(sources, [t], t, estimate(few, t) if t in exact else options) for t in targets}
            for i in range(few.n):
                key, stem = few.tokens.key(i), f"{'-'.join(sources) or 'nothing'}-{i}"
                rows.append({
                    "key": key,
                    "title": f"{' + '.join(sources) or 'nothing'} -> {', '.join(targets)}",
                    "condition": [_item(aside, f"{stem}-given", kinds[s], few.raw(s)[i]) for s in sources],
                    "output": [_item(aside, f"{stem}-made", kinds[t], made[t][i]) for t in targets],
                    "truth": [_item(aside, f"{stem}-true", kinds[t], few.raw(t)[i]) for t in targets],
                })
        write_json(aside / "gallery.json", {"rows": rows})
    return folder / "gallery.json"


def _item(folder: Path, stem: str, kind: Modality, raw: Any) -> dict[str, str]:
    if kind.kind == "text":
        return {"modality": kind.name, "kind": "text", "text": raw}
    picture = kind.write_picture(raw, folder / f"{stem}-{kind.name}")
    if kind.kind != "audio":
        return {"modality": kind.name, "kind": "image", "file": picture.name}
    sound = folder / f"{stem}-{kind.name}{kind.suffix}"
    kind.write_file(raw, sound)
    return {"modality": kind.name, "kind": "audio", "file": sound.name, "picture": picture.name}

"""The gallery: held-out samples in every direction, chosen by a rule and never by hand, as files for the report."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli import dist
from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.generate.likelihood import CHUNK
from nano4m_cli.generate.sampler import GenerateOptions, State, chain
from nano4m_cli.modalities._base import Modality
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._directions import estimate
from nano4m_cli.registry import MODALITIES

SHOWN = 4  # first samples of the split
ENDS = 2  # best ones, and worst ones ...
POOL = 32  # ... of so many first samples


def write_gallery(context: Context, folder: Path) -> Path:
    """Write gallery.json and its media: from each source to all it is asked for, for the first samples of the split, and for
    those of its first `POOL` whose leading target is nearest to the truth and farthest from it."""
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
    pool = Context(context.run, context.split, min(POOL, context.n), context.seed, context.progress)

    def fill(sources: list[str], targets: list[str]) -> tuple[str | None, list[tuple[int, str, str]], dict[str, dict[int, Any]]]:
        """Return the leading target, (sample, rule, figure) of each row, and per target what was made for which sample."""
        # From a picture the expected depth is the best one; from words or sound it would be the mean of all scenes.
        exact = [t for t in ("depth", "normal") if {"rgb", "depth"} & set(sources)]
        how = {t: estimate(pool, t) if t in exact else options for t in targets}
        lead = _lead(targets, kinds, context.info.pairing) if pool.n > SHOWN + 2 * ENDS else None
        chosen = [(i, "first", "") for i in range(min(SHOWN, pool.n))]
        if lead is not None:
            chosen += _ends(kinds[lead], _made(pool, sources, lead, how[lead], range(pool.n)), pool.raw(lead))
        shown = sorted({i for i, _, _ in chosen})
        return lead, chosen, {t: dict(zip(shown, _made(pool, sources, t, how[t], shown), strict=True)) for t in targets}

    filled = context.spread("gallery", plans, lambda plan: fill(*plan))
    if dist.rank():
        return folder / "gallery.json"
    leads = [lead for lead, _, _ in filled if lead is not None]
    with atomic_folder(folder) as aside:
        for (sources, targets), (_, chosen, made) in zip(plans, filled, strict=True):
            for i, rule, figure in chosen:
                key, stem = pool.tokens.key(i), f"{'-'.join(sources) or 'nothing'}-{i}"
                rows.append({
                    "key": key,
                    "title": f"{' + '.join(sources) or 'nothing'} -> {', '.join(targets)}",
                    "rule": rule,
                    "figure": figure,
                    "condition": [_item(aside, f"{stem}-given", kinds[s], pool.raw(s)[i]) for s in sources],
                    "output": [_item(aside, f"{stem}-made", kinds[t], made[t][i]) for t in targets],
                    "truth": [_item(aside, f"{stem}-true", kinds[t], pool.raw(t)[i]) for t in targets],
                })
        write_json(aside / "gallery.json", {"rules": _rules(pool, leads), "rows": rows})
    return folder / "gallery.json"


def _rules(pool: Context, leads: Sequence[str]) -> list[str]:
    out = [f"First: the first {min(SHOWN, pool.n)} samples of the split {pool.split}."]
    if leads:
        out.append(f"Best and worst: of its first {pool.n} samples, the {ENDS} whose output is nearest to the truth and farthest "
                   "from it, by the first picture among the targets (mean difference of the values shown, of 255), else by the "
                   "text (share of characters that agree).")
    return out


def _lead(targets: Sequence[str], kinds: dict[str, Modality], pairing: str) -> str | None:
    """Return the target by which samples are ranked; None where no output can be compared with the truth of its sample."""
    pictures = [t for t in targets if kinds[t].kind in ("image", "video")] if pairing == "instance" else []
    return next(iter([*pictures, *(t for t in targets if kinds[t].kind == "text")]), None)


def _ends(kind: Modality, made: Sequence[Any], truth: Sequence[Any]) -> list[tuple[int, str, str]]:
    """Return (sample, "best" or "worst", its figure in words), best ones first, ties by their place in the split."""
    if kind.kind == "text":
        far = [-difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in zip(made, truth, strict=True)]
        told = [f"{-f:.0%} of the {kind.name}'s characters agree" for f in far]
    else:
        far = [distance(kind.show(a), kind.show(b)) for a, b in zip(made, truth, strict=True)]
        told = [f"{kind.name} differs by {f:.1f} of 255" for f in far]
    order = np.argsort(far, kind="stable")
    return [(int(i), "best", told[i]) for i in order[:ENDS]] + [(int(i), "worst", told[i]) for i in order[::-1][:ENDS]]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean absolute difference of two pictures as shown (uint8); the largest where their sizes differ."""
    return 255.0 if a.shape != b.shape else float(np.abs(a.astype(np.float64) - b).mean())


def _made(
    context: Context, sources: Sequence[str], target: str, options: GenerateOptions | None, index: Sequence[int]
) -> list[Any]:
    """Return the target made for some samples of the split: the same as for all of them, since draws go by the sample."""
    rows = np.array(list(index))
    known = context.inside_NC[rows] & context.columns(*sources)
    state = State(np.where(known, context.ids_NC[rows], 0), known, rows)
    chain(context.model, state, [target], context.sampling([target], options), batch=CHUNK)
    return state.decode(context.layout, target, context.tokenizer(target), CHUNK)


def _item(folder: Path, stem: str, kind: Modality, raw: Any) -> dict[str, str]:
    if kind.kind == "text":
        return {"modality": kind.name, "kind": "text", "text": raw}
    picture = kind.write_picture(raw, folder / f"{stem}-{kind.name}")
    if kind.kind != "audio":
        return {"modality": kind.name, "kind": "image", "file": picture.name}
    sound = folder / f"{stem}-{kind.name}{kind.suffix}"
    kind.write_file(raw, sound)
    return {"modality": kind.name, "kind": "audio", "file": sound.name, "picture": picture.name}

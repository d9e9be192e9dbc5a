"""Clips of a folder that nearly repeat an earlier one: described while they are read, left out once all are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nano4m_cli.data._hashes import SIZE, describe, from_text, repeats, to_text
from nano4m_cli.data.sources._folder_items import Item, key_of
from nano4m_cli.errors import FetchError

Clips = list[tuple[Item, dict[str, Any]]]


def looks(frames: Sequence[dict[str, Any]], distinct: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return {"looks": {modality: description of the clip's key frames or sound}}, {} where none is asked for."""
    found = {}
    for m in distinct:
        raws = [f[m] for f in (frames[:1] if m == "audio" else frames) if m in f]
        if raws:
            found[m] = to_text(np.concatenate([describe(m, raw) for raw in raws]))
    return {"looks": found} if distinct else {}


def without_repeats(items: Clips, distinct: Sequence[str]) -> tuple[Clips, list[dict[str, Any]]]:
    """Return the items without clips of which everything in `distinct` nearly equals that of an earlier one, and these.

    Earlier is what stands before in `items`, and in a file. A clip that lacks one of the modalities repeats nothing.
    """
    if not distinct:
        return items, []
    rows = [(i, c, clip) for i, (_, look) in enumerate(items) for c, clip in enumerate(look["clips"])]
    whole = [row for row in rows if all(m in row[2]["looks"] for m in distinct)]
    if not whole:
        raise FetchError(f"no clip has {' and '.join(distinct)}, by which they were to be told apart", "leave out distinct=")
    width = {m: max(len(from_text(row[2]["looks"][m])) for row in whole) for m in distinct}
    assert all(w % SIZE == 0 for w in width.values()), width
    padded = lambda d, w: np.pad(d, (0, w - len(d)), mode="wrap")  # a picture among clips of several frames  # noqa: E731
    parts = {m: np.stack([padded(from_text(row[2]["looks"][m]), width[m]) for row in whole]) for m in distinct}
    of = {whole[j][:2]: whole[i][:2] for j, i in enumerate(repeats(parts).tolist()) if i >= 0}
    kept: Clips = []
    keys: dict[tuple[int, int], str] = {}
    for i, (item, look) in enumerate(items):
        stay = [c for c in range(len(look["clips"])) if (i, c) not in of]
        keys |= {(i, c): f"{key_of(item)}-{look['sha256'][:8]}-{number:05d}-00" for number, c in enumerate(stay)}
        if stay:
            kept.append((item, {**look, "clips": [{k: v for k, v in look["clips"][c].items() if k != "looks"} for c in stay]}))
    out = [(items[i][1]["file"], clip, keys[of[i, c]]) for i, c, clip in rows if (i, c) in of]
    return kept, [{"file": f, "start": c["start"], "scores": c["scores"], "by": ["distinct"], "repeats": key} for f, c, key in out]

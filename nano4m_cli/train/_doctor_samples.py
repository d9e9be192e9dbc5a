"""The doctor's checks of some samples: encoded anew, decoded, and how their pictures lie on each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.data.fetch import Progress
from nano4m_cli.data.shards import Shard
from nano4m_cli.data.sheet import write_sheet
from nano4m_cli.errors import DataError, Nano4MError
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers._base import Tokenizer, open_tokenizer
from nano4m_cli.train._doctor_base import Finding, Opened, Report, finding
from nano4m_cli.train._doctor_ids import read_ids
from nano4m_cli.train.alignment import LEAST, align, figures, overlay, verdict

SAMPLED, DECODED, SECONDS = 32, 12, 300.0  # samples of a split encoded anew, decoded; of sound no more than so many seconds
AGREE = 0.9  # least share of ids that encoding anew gives again: less is another tokenizer, not rounding


def check_samples(here: Opened, report: Report, progress: Progress) -> list[Finding]:
    """Encode some samples of each split anew and compare; decode some; see how their pictures lie on each other."""
    info, out = here.dataset.info(), []
    tokenizers: dict[str, Tokenizer] = {}
    for m in here.modalities:
        if m not in here.brought:
            try:
                tokenizers[m] = open_tokenizer(here.dataset.tokenizer(m))
            except Nano4MError as err:
                out.append(finding("fresh", m, what=err.message, hint=err.hint or here.again(m)))
    wanted = {*here.modalities, "rgb"} if here.modalities else set(info.modalities)
    pictures = [m for m in info.modalities if m in wanted - set(here.brought) and MODALITIES.get(m).kind == "image"]
    fresh: dict[str, list[int]] = {m: [0, 0] for m in tokenizers}
    sheet: dict[str, list[Any]] = {}
    for number, split in enumerate(here.splits):
        progress("samples encoded anew", number, len(here.splits))
        raw_at = here.keys("raw", split)
        keys = [list(raw_at)[i] for i in np.unique(np.linspace(0, len(raw_at) - 1, SAMPLED).astype(int))] if raw_at else []
        shown: dict[str, list[Any]] = {}
        for m in dict.fromkeys([*pictures, *tokenizers]):
            long = info.sizes.get(m, {}).get("seconds")
            some = keys[: max(2, int(SECONDS / long))] if long else keys
            raws, bad = _raws(raw_at, m, some)
            if bad:
                out.append(finding("raw", m, split, keys=[k for k, _ in bad], what=bad[0][1], hint=here.again("raw")))
            if m in pictures:
                out += _sizes(here, m, split, raws, info.sizes.get(m, {}).get("size"))
                shown[f"{m} raw"] = [raws.get(k) for k in keys]
            if m in tokenizers:
                out += _agreement(here, m, split, tokenizers[m], raws, fresh[m])
                if m in pictures and keys:
                    try:
                        shown[f"{m} decoded"] = _decoded(here, m, split, tokenizers[m], keys)
                    except Nano4MError as err:
                        out.append(finding("fresh", m, split, what=f"cannot be decoded: {err.message}", hint=here.again(m)))
        out += check_alignment(here, report, split, pictures, shown)
        sheet = sheet if any(sheet.values()) else shown
    report.fresh = {m: same / total for m, (same, total) in fresh.items() if total}
    report.sheet = _sheet(here.dataset.path / "tokens" / "check.png", pictures, sheet)
    return out


def _raws(raw_at: dict[str, tuple[Shard, int]], m: str, keys: Iterable[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the raw values by key, and (key, what is wrong) of those that cannot be read."""
    kind, good, bad = MODALITIES.get(m), {}, []
    for key in keys:
        shard, i = raw_at[key]
        try:
            good[key] = kind.from_bytes(shard.read(i, kind.ext), f"{shard.path}, '{key}', {kind.ext}")
        except DataError as err:
            bad.append((key, err.message))
    return good, bad


def _sizes(here: Opened, m: str, split: str, raws: dict[str, np.ndarray], size: list[int] | None) -> list[Finding]:
    wrong = [k for k, raw in raws.items() if size and list(raw.shape[:2]) != list(size)]
    if not wrong:
        return []
    found = "x".join(map(str, raws[wrong[0]].shape[:2]))
    return [finding("shape", m, split, keys=wrong, what=f"raw pictures of {found}, dataset.json says {size[0]}x{size[1]}",
                     hint=here.again("raw"))]


def _agreement(here: Opened, m: str, split: str, tokenizer: Tokenizer, raws: dict[str, Any], total: list[int]) -> list[Finding]:
    """Compare stored ids with those that encoding gives now, shard by shard; `total` counts [equal, all]."""
    spec, stored = here.specs[m], _stored(here, m, split, raws)
    by_shard: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    try:
        made = dict(zip(stored, tokenizer.encode([raws[k] for k in stored], list(stored)), strict=True)) if stored else {}
    except Nano4MError as err:
        return [finding("fresh", m, split, what=f"cannot be encoded: {err.message}", hint=err.hint or here.again("raw"))]
    if made and spec.same_ids_as(tokenizer.spec()):
        return [finding("fresh", m, split, what=f"spec.json is of another tokenizer: {spec.same_ids_as(tokenizer.spec())}",
                         hint=here.again(m))]
    for key, (name, ids) in stored.items():
        fits = len(made[key]) == len(ids)
        by_shard[name].append((key, int((made[key] == ids).sum()) if fits else 0, len(ids)))
    out = []
    for name, rows in by_shard.items():
        same, count = sum(r[1] for r in rows), sum(r[2] for r in rows)
        total[0], total[1] = total[0] + same, total[1] + count
        if same < AGREE * count:
            worst = [k for k, equal, n in rows if equal < AGREE * n]
            what = f"tokens are not what the tokenizer gives: {same / count:.1%} of the ids of {len(rows)} samples are"
            out.append(finding("fresh", m, split, name, keys=worst, what=what, hint=here.again(m)))
    return out


def _stored(here: Opened, m: str, split: str, keys: Iterable[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Return (shard name, first variant's ids) of those of the samples that have whole tokens."""
    wanted, out, spec = set(keys), {}, here.specs[m]
    for name, shard in here.shards[m, split].items():
        if wanted.isdisjoint(shard.keys):
            continue
        for key, ids, _ in read_ids(shard, spec):
            if key in wanted and ids is not None:
                out[key] = (name, ids[0])
    return out


def _decoded(here: Opened, m: str, split: str, tokenizer: Tokenizer, keys: Sequence[str]) -> list[Any]:
    """Return what the stored tokens of some of the samples decode to, for each of `keys` (None: not decoded)."""
    most = LEAST if tokenizer.slow else DECODED
    stored = _stored(here, m, split, keys[:: max(-(-len(keys) // most), 1)])
    made = dict(zip(stored, tokenizer.decode([ids for _, ids in stored.values()]), strict=True)) if stored else {}
    return [made.get(k) for k in keys]


def check_alignment(
    here: Opened, report: Report, split: str, pictures: Sequence[str], shown: dict[str, list[Any]]
) -> list[Finding]:
    """Measure how other pictures lie on rgb, raw and decoded, and decoded ones on raw ones."""
    pairs = [(f"{m} raw", f"{m} decoded") for m in pictures]
    first = "rgb" if "rgb" in pictures else next(iter(pictures), "")
    if here.dataset.info().pairing == "instance":
        pairs += [(f"{first} {how}", f"{m} {how}") for m in pictures if m != first for how in ("raw", "decoded")]
    out = []
    for a, b in pairs:
        both = [(x, y) for x, y in zip(shown.get(a, []), shown.get(b, []), strict=False) if x is not None and y is not None]
        found = align([x for x, _ in both], [y for _, y in both])
        if found is None:
            continue
        report.alignment.setdefault(split, {})[f"{a} ~ {b}"] = figures(found)
        if wrong := verdict(found):
            m = b.split()[0]
            hint = here.again(m) if b.endswith("decoded") and m in here.modalities else here.again("raw")
            out.append(finding("alignment", m, split, severity=wrong[0], n=found.n, what=f"{b} is to {a} {wrong[1]}", hint=hint))
    return out


def _sheet(path: Path, pictures: Sequence[str], shown: dict[str, list[Any]]) -> Path | None:
    """Write six samples: pictures as they are and decoded, with the edges of the others in red; None: there are none."""
    if not pictures or not shown.get(f"{pictures[0]} raw"):
        return None
    first = "rgb" if "rgb" in pictures else pictures[0]
    columns: list[tuple[str, str, str | None]] = []  # heading, base, whose edges
    for how in ("raw", "decoded"):
        columns.append((f"{first} {how}", f"{first} {how}", None))
        columns += [(f"+ {m} {how}", f"{first} {how}", f"{m} {how}") for m in pictures if m != first]
    columns += [(f"{m} dec. + raw", f"{m} decoded", f"{m} raw") for m in pictures]
    columns = [c for c in columns if shown.get(c[1]) and (c[2] is None or shown.get(c[2]))]
    rows = [i for i, v in enumerate(shown.get(f"{first} decoded") or shown[f"{first} raw"]) if v is not None][:6]
    cells = []
    for i in rows:
        line: list[Any] = []
        for _, base, other in columns:
            kind, value = MODALITIES.get(base.split()[0]), shown[base][i]
            above = shown[other][i] if other else None
            picture = None if value is None else kind.show(value)
            line.append(picture if picture is None or above is None else overlay(picture, above))
        cells.append(line)
    try:
        return write_sheet(path, [c[0] for c in columns], cells)
    except DataError:
        return None  # a data set that may only be read is examined all the same

"""The doctor of a data set (`nano4m tokenize --check`): everything that is wrong with its raw and token shards, at once.

One function per check; each returns findings. An "error" makes training or evaluation wrong; a "notice" is for people to judge.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nano4m_cli.data._hashes import describe_shard, digest, repeats
from nano4m_cli.data.fetch import Progress, ignore_interrupts, usable_cores
from nano4m_cli.data.shards import Shard, shard_name, verify_shard
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import DataError, Nano4MError, ShardError
from nano4m_cli.registry import MODALITIES
from nano4m_cli.spec import read_spec
from nano4m_cli.train._doctor_base import Finding, Opened, Report, finding
from nano4m_cli.train._doctor_ids import check_ids
from nano4m_cli.train._doctor_samples import check_samples


def examine(
    dataset: DatasetFolder, modalities: Sequence[str], workers: int | None = None, progress: Progress | None = None,
) -> Report:
    """Return everything that the checks find in a data set and in the tokens of these modalities, and write a contact sheet.

    A data set that has no readable dataset.json is a DataError; everything else is a finding.
    """
    info, report = dataset.info(), Report()
    here = Opened(dataset, list(modalities), {s: n for s, n in info.splits.items() if n}, info.brought)
    report.findings += check_shards(here)
    report.findings += check_keys(here)
    report.findings += check_ids(here, report)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as when ids were made: products of other shapes may round differently
    try:
        report.findings += check_samples(here, report, progress or (lambda what, done, total: None))
    finally:
        torch.set_num_threads(threads)
    report.findings += check_repeated(here, workers or usable_cores(), progress or (lambda what, done, total: None))
    report.samples = {s: {m: len(here.keys(m, s)) for m in here.modalities} for s in here.splits}
    report.findings.sort(key=lambda f: f.severity != "error")
    return report


def check_shards(here: Opened) -> list[Finding]:
    """Open every shard after scanning its tar and comparing it with its index, and read the specs."""
    out = []
    for m in list(here.modalities):
        try:
            here.specs[m] = read_spec(here.dataset.spec_path(m))
        except Nano4MError as err:
            out.append(finding("shards", m, what=err.message, hint=err.hint or here.again(m)))
            here.modalities.remove(m)
    for split, expected in here.splits.items():
        for what in ("raw", *here.modalities):
            folder = here.dataset.raw(split) if what == "raw" else here.dataset.tokens(what, split)
            good = here.shards[what, split] = {}
            paths = sorted(folder.glob("shard-*.tar"))
            for i in range(len(paths)):
                if shard_name(i) not in {p.name for p in paths}:
                    out.append(finding("shards", what, split, shard_name(i), what="is missing", hint=here.again(what)))
            if not paths:
                out.append(finding("shards", what, split, what=f"no shards in {folder}", hint=here.again(what)))
            for path in paths:
                try:
                    verify_shard(path)
                    good[path.name] = Shard(path)
                except ShardError as err:
                    out.append(finding("shards", what, split, path.name, what=err.message, hint=err.hint or here.again(what)))
        n = len(here.keys("raw", split))
        if here.shards["raw", split] and n != expected and not any(f.modality == "raw" and f.split == split for f in out):
            out.append(finding("shards", "raw", split, n=abs(n - expected), what=f"{n} samples, dataset.json says {expected}",
                                hint=here.again("raw")))
    return out


def check_keys(here: Opened) -> list[Finding]:
    """Compare the keys of tokens with those of raw shards, and their order: samples meet by their place."""
    out = []
    for split in here.splits:
        raw, all_keys = here.shards["raw", split], here.keys("raw", split)
        shared = set(all_keys).intersection(*(here.keys(m, split) for m in here.modalities))
        for what in ("raw", *here.modalities):
            counts = Counter(k for s in here.shards[what, split].values() for k in s.keys)
            if twice := [k for k, n in counts.items() if n > 1]:
                out.append(finding("keys", what, split, keys=twice, what="keys stand in two shards", hint=here.again(what)))
        for m in here.modalities:
            tokens = here.shards[m, split]
            for name in sorted({*raw, *tokens}):
                if name not in raw or name not in tokens:
                    if here.shards[m, split] and raw:
                        only, lacks = (m, "raw") if name in tokens else ("raw", m)
                        out.append(finding("keys", m, split, name, len((tokens if only == m else raw)[name]),
                                            what=f"{only} has this shard, {lacks} has none that is whole", hint=here.again(m)))
                    continue
                a, b = raw[name].keys, tokens[name].keys
                place = f"{len(shared)} of {len(all_keys)} samples of {split} have everything"
                if missing := [k for k in a if k not in set(b)]:
                    out.append(finding("keys", m, split, name, keys=missing, what=f"samples have no tokens; {place}",
                                        hint=here.again(m)))
                if extra := [k for k in b if k not in set(a)]:
                    out.append(finding("keys", m, split, name, keys=extra, what=f"tokens of samples that are not in raw; {place}",
                                        hint=here.again(m)))
                moved = [x for x, y in zip(a, b, strict=False) if x != y]
                if moved and not missing and not extra:
                    out.append(finding("keys", m, split, name, keys=moved, what="samples stand in another order than in raw",
                                        hint=here.again(m)))
    return out


def check_repeated(here: Opened, workers: int, progress: Progress) -> list[Finding]:
    """Find samples whose picture or sound stands in an earlier split too: byte for byte (all media), or nearly (rgb, audio).

    Texts repeat by nature; modalities that came as tokens are compared by their ids (`check_ids`).
    """
    out = []
    for m in here.dataset.info().modalities:
        if m in here.brought or MODALITIES.get(m).kind == "text":
            continue
        kind, rows = MODALITIES.get(m), []  # (split, key, digest)
        described = []
        for split in here.splits:
            shards = [s for s in here.shards["raw", split].values() if kind.ext in s.index.offset]
            if m not in ("rgb", "audio"):
                rows += [(split, k, digest(bytes(s.read(i, kind.ext)))) for s in shards for i, k in enumerate(s.keys)]
                continue
            done = 0
            for shard, got in zip(shards, _described([s.path for s in shards], m, workers), strict=True):
                done += len(shard)
                progress(f"{m} of {split} compared", done, sum(map(len, shards)))
                if isinstance(got, str):
                    out.append(finding("raw", m, split, shard.path.name, n=len(shard), what=got, hint=here.again("raw")))
                    continue
                described.append(got[0])
                rows += [(split, k, d) for k, d in zip(shard.keys, got[1], strict=True)]
        first: dict[bytes, str] = {}
        equal: dict[tuple[str, str], list[str]] = defaultdict(list)
        for split, key, mark in rows:
            if first.setdefault(mark, split) != split:
                equal[split, first[mark]].append(key)
        out += _across("repeated", m, equal, "byte for byte")
        if described and len(rows) > 1:
            near: dict[tuple[str, str], list[str]] = defaultdict(list)
            for j, i in enumerate(repeats({m: np.concatenate(described)})):
                split, key, mark = rows[j]
                if i >= 0 and rows[i][0] != split and first[mark] == split:
                    near[split, rows[i][0]].append(key)
            out += _across("near", m, near, "nearly")
    return out


def _described(paths: list[Path], m: str, workers: int) -> Iterator[Any]:
    """Yield descriptions and digests of each shard, or what is wrong with it."""
    if workers <= 1 or len(paths) < 4:
        yield from map(_describe_one, paths, [m] * len(paths))
        return
    with ProcessPoolExecutor(min(workers, len(paths)), multiprocessing.get_context("spawn"), ignore_interrupts) as pool:
        yield from pool.map(_describe_one, paths, [m] * len(paths))


def _describe_one(path: Path, m: str) -> Any:
    try:
        return describe_shard(path, m)
    except DataError as err:
        return err.message


def _across(check: str, m: str, found: dict[tuple[str, str], list[str]], how: str) -> list[Finding]:
    return [finding(check, m, split, severity="notice", keys=keys, what=f"samples have the {m} of a sample in {earlier}, {how}",
                     hint="evaluations may be too good: leave them out of one split") for (split, earlier), keys in found.items()]

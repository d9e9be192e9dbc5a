"""The doctor's checks of ids: form and range, ids that tell samples apart, use of codebooks."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from nano4m_cli.data._hashes import digest
from nano4m_cli.data.shards import Shard
from nano4m_cli.spec import TokenSpec
from nano4m_cli.train._doctor_base import Finding, Opened, Report, finding


def read_ids(shard: Shard, spec: TokenSpec) -> Iterator[tuple[str, np.ndarray | None, str]]:
    """Yield (key, ids of shape (variants, slots) or (1, length), "") of each sample, or (key, None, what is wrong)."""
    member = f"{spec.modality}.npy"
    if member not in shard.index.offset:
        yield from ((key, None, f"no member '{member}'") for key in shard.keys)
        return
    for i, key in enumerate(shard.keys):
        data = bytes(shard.read(i, member))
        size = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape, order = _header(data[:size])
        if dtype is None:
            yield key, None, "no npy file, or a damaged one"
        elif dtype != spec.dtype or order:
            yield key, None, f"ids stored as {dtype.str}{' in Fortran order' if order else ''}, {spec.dtype.str} expected"
        elif len(data) != size + int(np.prod(shape)) * dtype.itemsize:
            yield key, None, "a cut npy file"
        elif wrong := _wrong_shape(shape, spec):
            yield key, None, wrong
        else:
            ids = np.frombuffer(data, dtype, offset=size)
            ids = ids.reshape(1, -1) if spec.kind == "sequence" else ids.reshape(spec.variants, spec.slots)
            if int(ids.max(initial=0)) >= spec.vocab_size:
                yield key, None, f"ids outside the vocabulary of {spec.vocab_size}, up to {int(ids.max())}"
            else:
                yield key, ids, ""


@lru_cache(maxsize=1024)
def _header(head: bytes) -> tuple[np.dtype | None, tuple[int, ...], bool]:
    try:
        file = io.BytesIO(head)
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, AssertionError, EOFError):
        return None, (), False
    return (None if dtype.hasobject else dtype), shape, bool(fortran and len(shape) > 1)


def _wrong_shape(shape: tuple[int, ...], spec: TokenSpec) -> str:
    if spec.kind == "sequence":
        return "" if len(shape) == 1 and 1 <= shape[0] <= spec.slots else f"ids of shape {shape}, (1 to {spec.slots},) expected"
    wanted = (spec.variants, spec.slots)
    return "" if shape == wanted else f"ids of shape {shape}, {wanted} expected"


def check_ids(here: Opened, report: Report) -> list[Finding]:
    """Read all ids: type, shape, range; ids that tell samples apart; variants that differ; use of each codebook."""
    out = []
    for m in here.modalities:
        spec, use = here.specs[m], _Use(here.specs[m])
        seen: dict[bytes, str] = {}
        for split in here.splits:
            same, flat, plain, total = [], [], [], 0
            mine: set[bytes] = set()
            for name, shard in here.shards[m, split].items():
                wrong: dict[str, list[str]] = defaultdict(list)
                for key, ids, what in read_ids(shard, spec):
                    total += 1
                    if ids is None:
                        wrong[what].append(key)
                        continue
                    if spec.kind == "sequence":
                        if spec.eos not in ids[0] or list(ids[0]).index(spec.eos) != ids.shape[1] - 1:
                            wrong[f"text that does not end in its only end mark ({spec.eos})"].append(key)
                        continue
                    use.add(ids[0])
                    mark = digest(ids.tobytes())
                    if mark in mine:
                        same.append(key)
                    elif m in here.brought and mark in seen:
                        use.across[split, seen[mark]].append(key)
                    mine.add(mark)
                    if spec.slots > 1 and (ids[0] == ids[0, 0]).all():
                        flat.append(key)
                    if spec.variants > 1 and (ids == ids[0]).all():
                        plain.append(key)
                for what, keys in wrong.items():
                    check = "range" if what.startswith("ids outside") else "shape"
                    out.append(finding(check, m, split, name, keys=keys, what=what, hint=here.again(m)))
            for mark in mine:
                seen.setdefault(mark, split)
            if total > 1 and len(same) == total - 1:
                out.append(finding("ids", m, split, keys=same, what="all samples have the same ids", hint=here.again(m)))
                continue
            notices = [(same, "samples have the ids of another sample of this split"), (flat, "samples have one id in every slot")]
            if split == "train" and len(plain) == total:
                notices.append((plain, f"all {spec.variants} variants of each sample are equal: nothing is varied"))
            out += [finding("ids", m, split, severity="notice", keys=keys, what=what) for keys, what in notices if keys]
        for (split, earlier), keys in use.across.items():
            out.append(finding("repeated", m, split, severity="notice", keys=keys, what=f"samples have the {m} tokens of one in "
                                f"{earlier}", hint="evaluations may be too good: leave them out of one split"))
        if use.n:
            report.codes[m] = use.figures()
            out += [finding("codes", m, what=what, severity=severity, hint=here.again(m)) for severity, what in use.problems()]
    return out


class _Use:
    """How often each id of each codebook is used, in even and in odd samples."""

    def __init__(self, spec: TokenSpec):
        self.spec, self.n = spec, 0
        self.counts = np.zeros((2, spec.codebooks, spec.vocab_size if spec.kind != "sequence" else 1), dtype=np.int64)
        self.equal = np.ones((spec.codebooks, spec.codebooks), dtype=bool)
        self.across: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, ids: np.ndarray) -> None:
        books = ids.reshape(-1, self.spec.codebooks).T  # slot = t * Q + q
        for q, book in enumerate(books):
            np.add.at(self.counts[self.n % 2, q], book, 1)
            if self.equal[q].sum() > 1:
                self.equal[q] &= (books == book).all(1)
        self.n += 1

    def figures(self) -> dict[str, list[float]]:
        """Return for each codebook the share of its codes that is used, and the perplexity of its ids."""
        p = self.counts.sum(0) / self.counts.sum((0, 2))[:, None]
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
        return {"used": [round(float(u), 4) for u in (p > 0).mean(1)], "perplexity": [round(float(e), 1) for e in np.exp(entropy)]}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (severity, what is wrong) with the codebooks: one that is stuck, two that are the same or used alike."""
        p = self.counts.sum(0)
        books = self.spec.codebooks
        if self.spec.kind != "codes" or self.n < 2 or self.spec.vocab_size < 2:
            return
        for q in np.flatnonzero((p > 0).sum(1) == 1) if self.spec.shape[0] * self.n > 8 else []:
            yield "error", f"codebook {q} is stuck: it only ever says {int(p[q].argmax())}"
        for q in range(books):
            for r in range(q + 1, books):
                if self.equal[q, r]:
                    yield "error", f"codebooks {q} and {r} say the same everywhere"
                elif self._alike(q, r):
                    yield "notice", f"codebooks {q} and {r} use their ids alike: is the order of slots frame by frame?"

    def _alike(self, q: int, r: int) -> bool:
        """Return whether two codebooks' ids are distributed as one codebook's are in the other half of the samples."""
        share = self.counts / np.maximum(self.counts.sum(2, keepdims=True), 1)
        apart = lambda a, b: float(np.abs(a - b).sum()) / 2  # noqa: E731
        within = max(apart(*share[:, q]), apart(*share[:, r]))
        return within < 0.25 and apart(share[0, q], share[1, r]) <= 1.2 * within

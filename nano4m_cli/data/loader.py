"""Token shards as arrays: memory-mapped random access to aligned modalities, whole batches in a few gathers."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import numpy as np

from nano4m_cli.data.shard_cache import ShardCache
from nano4m_cli.data.shards import Shard, Split, check_aligned
from nano4m_cli.data.stream import RemoteShard, RemoteSplit, cache_of, read_remote
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import DataError, ShardError, did_you_mean
from nano4m_cli.rng import permutation
from nano4m_cli.spec import Layout, TokenSpec, read_spec

HEADER = 128  # bytes before the ids in each npy of a shard of ours
TRIES = 100  # samples that may be broken on end
CHECKED = 1.0  # seconds for which a shard that was whole is taken to be so


class _Column:
    """The ids of one modality in one split: (sample, variant) -> ids, by offset into the mapped tars."""

    def __init__(self, spec: TokenSpec, split: Split, lost_too: bool = False):
        self.spec, self.split, self.member, self.lost_too = spec, split, f"{spec.modality}.npy", lost_too
        self.checked = [0.0] * len(split.shards)  # when each shard was last seen to be whole
        self.maps = [s.map for s in split.shards]
        parts = [self._opened(shard) for shard in split.shards]
        self.offset_N = np.concatenate([p[0] for p in parts])
        self.length_N = np.concatenate([p[1] for p in parts])
        self.shard_N = np.repeat(np.arange(len(parts)), [len(p[0]) for p in parts])

    def _opened(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(shard, RemoteShard):
            return self._told(shard)
        if shard.lost is None:
            try:
                return self._open(shard, np.frombuffer(shard.map, dtype=np.uint8))
            except ShardError as err:
                if not self.lost_too:
                    raise
                shard.lost = err.message
        n = len(shard)
        return np.zeros(n, dtype=np.int64), np.full(n, 1 if self.spec.kind == "sequence" else self.spec.slots)

    def _told(self, shard: RemoteShard) -> tuple[np.ndarray, np.ndarray]:
        """Return what `_open` will return once the shard is here, from its index; `_came` sees to that."""
        if self.member not in shard.index.offset:
            raise ShardError(f"{shard.path} has no '{self.member}'", "publish it again")
        length = (shard.index.size[self.member] - HEADER) // self.spec.dtype.itemsize
        return shard.index.offset[self.member] + HEADER, length if self.spec.kind == "sequence" else length // self.spec.variants

    def _came(self, s: int, data: np.ndarray) -> None:
        rows, found = self.shard_N == s, self._open(self.split.shards[s], data)
        if any(not np.array_equal(a[rows], b) for a, b in zip((self.offset_N, self.length_N), found, strict=True)):
            raise ShardError(f"{self.split.shards[s].path} is not what its index says", "publish it again")

    def check(self, index_B: np.ndarray) -> None:
        """Raise ShardError, which names the first sample concerned, where a shard of samples is no longer what was opened."""
        now = time.monotonic()
        for s in np.unique(self.shard_N[index_B]).tolist():
            if now - self.checked[s] < CHECKED:
                continue
            try:
                self.split.shards[s].check()
            except ShardError as err:
                key = self.split.keys[int(index_B[np.argmax(self.shard_N[index_B] == s)])]
                raise ShardError(f"{err.message} (sample '{key}')", err.hint) from err
            self.checked[s] = now

    def _open(self, shard, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (offset of the ids, ids per variant) of each sample of a shard, after checking its npy headers."""
        spec, where = self.spec, f"{shard.path}"
        if self.member not in shard.index.offset:
            raise ShardError(f"{where} has no '{self.member}'", f"run 'nano4m tokenize --modality {spec.modality}'")
        offset, size = shard.index.offset[self.member], shard.index.size[self.member]
        if not len(offset):
            return offset, size
        head = data[offset[:, None] + np.arange(10)]
        if (head[:, :7] != np.frombuffer(b"\x93NUMPY\x01", dtype=np.uint8)).any():
            bad = int(np.argmax((head[:, :7] != np.frombuffer(b"\x93NUMPY\x01", dtype=np.uint8)).any(1)))
            raise ShardError(f"{where}: '{self.member}' of '{shard.keys[bad]}' is no npy file")
        header = 10 + head[:, 8].astype(np.int64) + 256 * head[:, 9].astype(np.int64)
        if (header != header[0]).any() or (size < header).any():
            bad = int(np.argmax((header != header[0]) | (size < header)))
            raise ShardError(f"{where}: '{self.member}' of '{shard.keys[bad]}' has a damaged npy header")
        # The dtype stands first in every header; the shape after it differs from text to text.
        start = f"{{'descr': '{spec.dtype.str}', 'fortran_order': False, 'shape': (".encode()
        wanted = np.frombuffer(start, dtype=np.uint8)
        same = (data[offset[:, None] + 10 + np.arange(len(start))] == wanted).all(1)
        if not same.all():
            bad = int(np.argmin(same))
            found = bytes(data[offset[bad] + 10 : offset[bad] + header[bad]]).decode("latin1").strip()
            kind = re.search(r"'descr': '([^']*)'", found)
            order = " in Fortran order" if "'fortran_order': True" in found else ""
            raise ShardError(
                f"{where}: ids of '{shard.keys[bad]}' are stored as {kind.group(1) if kind else found}{order}, "
                f"{spec.dtype.str} expected"
            )
        length = (size - header) // spec.dtype.itemsize
        if spec.kind == "sequence":
            if (length > spec.slots).any() or (length < 1).any():
                bad = int(np.argmax((length > spec.slots) | (length < 1)))
                has = f"'{shard.keys[bad]}' has {length[bad]} ids of {spec.modality}"
                raise ShardError(f"{where}: {has}, 1 to {spec.slots} allowed")
            return offset + header, length
        wanted = spec.variants * spec.slots
        if (length != wanted).any():
            bad = int(np.argmax(length != wanted))
            raise ShardError(f"{where}: '{shard.keys[bad]}' has {length[bad]} ids of {spec.modality}, {wanted} expected")
        return offset + header, length // spec.variants

    def read(self, index_B: np.ndarray, variant_B: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write ids into `out` (B, slots), which holds zeros and keeps them beyond a text's end; return length (B,)."""
        spec, item = self.spec, self.spec.dtype.itemsize
        self.check(index_B)
        length = self.length_N[index_B]
        at = self.offset_N[index_B] + variant_B % spec.variants * (spec.slots * item if spec.kind != "sequence" else 0)
        maps = self.maps
        if isinstance(self.split, RemoteSplit):
            maps = self.split.open(np.unique(self.shard_N[index_B]).tolist(), self._came)
        places = zip(self.shard_N[index_B].tolist(), at.tolist(), (at + length * item).tolist(), strict=True)
        flat = np.frombuffer(b"".join([maps[shard][first:end] for shard, first, end in places]), dtype=spec.dtype)
        if spec.kind == "sequence":
            out[np.arange(spec.slots) < length[:, None]] = flat
        else:
            out[:] = flat.reshape(-1, spec.slots)
        if int(flat.max(initial=0)) >= spec.vocab_size:
            bad = int(np.argmax((out >= spec.vocab_size).any(1)))
            shard, place = self.split.locate(int(index_B[bad]))
            spec.check_ids(out[bad], f"{shard.path}, sample '{shard.keys[place]}'")
        return length


class TokenData:
    """Aligned token shards of several modalities of one split.

    Args:
        modalities: names in layout order. `layout` follows from their spec.json files.
        lost_too: whether a shard that is lost or damaged, but whose index is there, is an error only for who reads its samples.
        cache: where shards of a remote data set go (default: `cache_of`).
    """

    def __init__(
        self, dataset: DatasetFolder, split: str, modalities: Sequence[str], lost_too: bool = False, cache: ShardCache | None = None
    ):
        self.dataset, self.name = dataset, split
        specs = read_specs(dataset, modalities)
        for name in modalities:
            if not dataset.tokens(name, split).is_dir():
                have = sorted(p.name for p in dataset.tokens(name).iterdir() if p.is_dir())
                raise DataError(f"data set '{dataset.name}' has no split '{split}' of {name} tokens", did_you_mean(split, have))
        self.layout = Layout(specs)
        remote = read_remote(dataset)
        self.streamed = remote is not None
        if remote is None:
            splits = {n: Split(dataset.tokens(n, split), lost_too) for n in modalities}
        else:
            cache = cache or cache_of(dataset)
            splits = {n: RemoteSplit(dataset.tokens(n, split), remote, cache) for n in modalities}
        check_aligned(splits)
        self.columns = [_Column(s, splits[s.modality], lost_too) for s in specs]
        self.split = splits[modalities[0]]

    def __len__(self) -> int:
        return len(self.split)

    def key(self, i: int) -> str:
        shard, j = self.split.locate(i)
        return shard.keys[j]

    def read(self, index_B: np.ndarray, variant_B: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids_BC int64 over the layout's columns, length_BM)."""
        index_B = np.asarray(index_B, dtype=np.int64)
        variant_B = np.zeros_like(index_B) if variant_B is None else variant_B
        ids = np.zeros((len(index_B), self.layout.columns), dtype=np.int64)
        length = [
            c.read(index_B, variant_B, ids[:, self.layout.start[m] : self.layout.start[m + 1]]) for m, c in enumerate(self.columns)
        ]
        return ids, np.stack(length, 1)

    def soon(self, shards: Sequence[int]) -> None:
        """Fetch shards of all modalities in the background, where they are not here."""
        for column in self.columns:
            if isinstance(column.split, RemoteSplit):
                column.split.soon(shards)

    def missed(self, shards: Sequence[int]) -> dict[int, str]:
        """Return what is wrong with shards of a remote data set that cannot be had in all modalities; the others are mapped."""
        out: dict[int, str] = {}
        for column in self.columns:
            assert isinstance(column.split, RemoteSplit), column.split
            left = [s for s in shards if s not in out]
            out |= {s: err.message for s, err in column.split.missed(left, column._came).items()}
        return out

    def cache_warning(self, order: StreamOrder, max_bytes: int, share: float) -> str | None:
        """Return what to say of a cache that throws shards out before all their samples were read; None of one that will do.

        A lane reads `window` + 1 shards of every modality at a time (a window may begin within a shard), and the next ones
        come meanwhile: where twice as many fit in, none is fetched twice.

        Args:
            share: of the lanes, that processes of this node take.
        """
        whole = sum(shard.file.bytes for column in self.columns for shard in column.split.shards)
        at_once = min(max(1.0, order.lanes * share) * (order.window + 1) * whole / len(self.split.shards), whole)
        if max_bytes >= at_once:
            return None
        enough = min(2 * at_once, whole) * 1.01
        return (f"a cache of {max_bytes / 1e9:.3g} GB holds less than the {at_once / 1e9:.3g} GB of shards that this node reads at "
                f"a time: they will be fetched again and again; data.cache_gb={enough / 1e9:.3g} would do")

    def order(self, seed: int, batch: int, lanes: int | None, window: int) -> SampleOrder | StreamOrder:
        """Return the order in which training sees the samples: at random, or along the shards where these come from afar."""
        if self.streamed:
            return StreamOrder([len(s) for s in self.split.shards], seed, batch, lanes, window)
        return SampleOrder(len(self), seed)

    def broken(self, index_B: np.ndarray, variant_B: np.ndarray) -> dict[int, str]:
        """Return what is wrong with samples that cannot be read, by place in `index`."""
        try:
            self.read(index_B, variant_B)
            return {}
        except DataError as err:
            if len(index_B) == 1:
                return {0: err.message}
        half = len(index_B) // 2
        parts = [(0, slice(half)), (half, slice(half, None))]
        return {first + i: why for first, s in parts for i, why in self.broken(index_B[s], variant_B[s]).items()}

    def lengths(self, index_B: np.ndarray | slice) -> np.ndarray:
        """Return length (B, M) of samples, without reading their ids."""
        return np.stack([c.length_N[index_B] for c in self.columns], 1)


def read_specs(dataset: DatasetFolder, modalities: Sequence[str]) -> list[TokenSpec]:
    """Return the specs of the named modalities; one that is not tokenised is a DataError that says how to get it."""
    have = dataset.tokenised()
    for name in modalities:
        if name not in have:
            raise DataError(
                f"data set '{dataset.name}' has no {name} tokens", f"run 'nano4m tokenize --modality {name}'"
            )
    return [read_spec(dataset.spec_path(name)) for name in modalities]


class SampleOrder:
    """The infinite sequence of sample indices: one permutation per epoch, a function of (seed, epoch) alone."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def at(self, counter_B: np.ndarray) -> np.ndarray:
        """Return the sample index at each position of the sequence."""
        epoch, place = np.divmod(np.asarray(counter_B, dtype=np.int64), self.samples)
        out = np.empty_like(place)
        for e in np.unique(epoch):
            if self._epoch is None or self._epoch[0] != int(e):
                self._epoch = (int(e), permutation(self.samples, self.seed, "order", int(e)))
            rows = epoch == e
            out[rows] = self._epoch[1][place[rows]]
        return out

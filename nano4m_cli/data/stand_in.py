"""What stands in for samples of a stream that cannot be had: the next ones of their lane.

Which shards are lost is decided once per lane and epoch, whoever of a rank's loader processes asks first, and put into
checkpoints: so what a step trains on is a function of its number and of the losses that the records tell of, and a resumed
run repeats them, though the server may answer again. In the next epoch a lost shard is asked for anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock

from nano4m_cli.data.download import disk_errors
from nano4m_cli.data.loader import TRIES, TokenData
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.errors import DataError

LOST = 4  # shards on end that a lane may lose: more are no accident of a shard

Key = tuple[int, int, int]  # lane, epoch, shard


@dataclass
class Found:
    """Samples that can be read; what was wrong with those they stand in for, by place; the lost shards that this hangs on."""

    index_B: np.ndarray
    skipped: dict[int, str] = field(default_factory=dict)
    lost: dict[Key, str] = field(default_factory=dict)


class StandIns:
    """Finds samples that can be read, for the lanes of one rank. Copies of it in loader processes agree with each other."""

    def __init__(self, data: TokenData, order: StreamOrder):
        self.data, self.order = data, order
        handle, self.path = tempfile.mkstemp(prefix="nano4m-lost-", suffix=".jsonl")
        os.close(handle)
        self.decided: dict[Key, str] = {}  # why a shard is lost; "": it is there
        self._read = 0  # bytes of the file that `decided` knows of
        weakref.finalize(self, _remove, self.path, os.getpid())

    def restore(self, lost: Sequence[Sequence]) -> None:
        """Take over the losses that a checkpoint tells of: [[lane, epoch, shard, why], ...]."""
        self._note({(lane, epoch, shard): why for lane, epoch, shard, why in lost})

    def readable(self, counter_B: np.ndarray, variant_B: np.ndarray) -> Found:
        """Return samples that can be read for positions of the order.

        A sample that is damaged gives way to the next one of its lane; so does one whose shard is lost, but where all shards of
        its window are lost, it is the one at the same place of the next window: else one sample would stand in for a shard.

        Raises:
            DataError: too much on end cannot be had.
        """
        lane_B, k_B = self.order.places(counter_B)
        found, todo, why = Found(np.zeros_like(k_B)), np.arange(len(k_B)), ""
        for _ in range(TRIES):
            for i, lost in self._lost(lane_B[todo], k_B[todo]).items():
                found.skipped.setdefault(int(todo[i]), lost)
                k_B[todo[i]] = self._next(int(lane_B[todo[i]]), int(k_B[todo[i]]), found.lost)
            found.index_B[todo] = self.order.walk(lane_B[todo], k_B[todo])
            bad = self.data.broken(found.index_B[todo], variant_B[todo])
            if not bad:
                found.skipped = dict(sorted(found.skipped.items()))
                return found
            for i, why in sorted(bad.items()):
                found.skipped.setdefault(int(todo[i]), why)
            todo = todo[sorted(bad)]
            k_B[todo] += 1
        raise DataError(f"{TRIES} samples on end cannot be read, the last because {why}", "publish the data set again")

    def _lost(self, lane_B: np.ndarray, k_B: np.ndarray) -> dict[int, str]:
        """Return why shards are lost that samples lie in, by place."""
        shard_B = np.searchsorted(self.order.first, self.order.walk(lane_B, k_B), side="right") - 1
        epoch_B = k_B // np.diff(self.order.bounds)[lane_B]
        keys = list(zip(lane_B.tolist(), epoch_B.tolist(), shard_B.tolist(), strict=True))
        self._decide(keys)
        return {i: self.decided[key] for i, key in enumerate(keys) if self.decided[key]}

    def _next(self, lane: int, k: int, lost: dict[Key, str]) -> int:
        """Return the place of a lane's walk that stands in for one whose shard is lost; add what it hangs on to `lost`."""
        gone: set[int] = set()  # the shards of windows that are lost whole
        while True:
            epoch, shards = self.order.window_at(lane, k)
            keys = [(lane, epoch, s) for s in shards]
            self._decide(keys)
            missed = {key: self.decided[key] for key in keys if self.decided[key]}
            lost |= missed
            if len(missed) == len(keys):
                gone |= set(shards)
                if len(gone) > LOST:
                    why = missed[keys[-1]]
                    raise DataError(f"{len(gone)} shards on end cannot be had, the last because {why}", "is the server there?")
                k += self.order.span
            elif self._lost(np.array([lane]), np.array([k])):
                k += 1
            else:
                return k

    # -- deciding ---------------------------------------------------------------------------------------------------------

    def _decide(self, keys: Sequence[Key]) -> None:
        """See to it that `decided` says of each whether it is there; what another process said first counts."""
        if all(key in self.decided for key in keys):
            return
        with FileLock(self.path + ".lock"):
            self._catch_up()
            new = dict.fromkeys(key for key in keys if key not in self.decided)
            why = self.data.missed(sorted({shard for _, _, shard in new}))
            self._note({key: why.get(key[2], "") for key in new})
            self._catch_up()

    def _note(self, decided: dict[Key, str]) -> None:
        with disk_errors(Path(self.path)), open(self.path, "a") as file:
            file.writelines(json.dumps([*key, why]) + "\n" for key, why in decided.items())

    def _catch_up(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                lane, epoch, shard, why = json.loads(line)
                self.decided[lane, epoch, shard] = why
            self._read = file.tell()


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        for name in (path, path + ".lock"):
            with contextlib.suppress(OSError):
                os.unlink(name)

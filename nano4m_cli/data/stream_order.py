"""The order in which streamed shards are walked: few at a time, each rank its own, a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from nano4m_cli.errors import ConfigError
from nano4m_cli.rng import permutation


class StreamOrder:
    """An infinite order of samples that needs few shards at a time; a function of (seed, batch, lanes, window) and the shards.

    In each epoch the shards stand in a random row. The samples of that row are cut into `lanes` equal parts (to one sample):
    each lane walks its part, a window of shards after another, at random within the window. Of every batch the first
    batch/lanes samples are the first lane's, and so on: so ranks that take lanes of their own need shards of their own, every
    sample is taken once an epoch whatever the number of ranks, and step s has the same samples for each such number.

    Args:
        sizes: samples per shard.
        lanes: a divisor of `batch` (None: the largest power of two that is one, up to 8 and the number of shards). More lanes
            need more shards at once.
        window: shards that a lane mixes at a time.
    """

    def __init__(self, sizes: Sequence[int], seed: int, batch: int, lanes: int | None = None, window: int = 4):
        self.sizes, self.seed, self.batch, self.window = np.asarray(sizes, dtype=np.int64), seed, batch, window
        self.samples = int(self.sizes.sum())
        if lanes is None:
            lanes = gcd(batch, 8)
            while lanes > max(1, min(len(self.sizes), self.samples)):
                lanes //= 2
        if batch % lanes:
            raise ConfigError(f"data.lanes: {lanes} lanes do not divide a batch of {batch}", "choose a divisor of train.batch")
        if lanes > self.samples:
            raise ConfigError(f"data.lanes: {lanes} lanes for {self.samples} samples", "choose fewer")
        self.lanes = lanes
        self.first = np.cumsum([0, *self.sizes])  # of each shard, in the split's own order
        self.bounds = np.arange(lanes + 1) * self.samples // lanes
        self.span = max(1, int(window * self.sizes.mean()))  # samples per window
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._mixed: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # of each lane, the window it is in

    def at(self, counter_B: np.ndarray) -> np.ndarray:
        """Return the sample index at each position of the order."""
        return self.walk(*self.places(counter_B))

    def places(self, counter_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane of each position of the order, and its place in the lane's walk."""
        step, place = np.divmod(np.asarray(counter_B, dtype=np.int64), self.batch)
        each = self.batch // self.lanes
        return place // each, step * each + place % each

    def walk(self, lane: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Return the sample index at places of lanes' walks."""
        start, long = self.bounds[lane], np.diff(self.bounds)[lane]
        epoch, window, inside = k // long, k % long // self.span, k % long % self.span
        out = np.empty(len(lane), dtype=np.int64)
        groups, of = np.unique(np.stack([lane, epoch, window], 1), axis=0, return_inverse=True)
        for g, (at_lane, at_epoch, at_window) in enumerate(groups.tolist()):
            rows = of.reshape(-1) == g
            first = at_window * self.span
            mixed = self._order_in(at_lane, at_epoch, at_window, min(self.span, int(long[rows][0]) - first))
            out[rows] = self._samples_of(at_epoch, start[rows] + first + mixed[inside[rows]])
        return out

    def window_at(self, lane: int, k: int) -> tuple[int, list[int]]:
        """Return the epoch and the shards of the window that a place of a lane's walk is in."""
        start, end = int(self.bounds[lane]), int(self.bounds[lane + 1])
        epoch, place = divmod(k, end - start)
        first = start + place // self.span * self.span
        shards, starts = self._row(epoch)
        a = int(np.searchsorted(starts, first, side="right")) - 1
        b = int(np.searchsorted(starts, min(first + self.span, end) - 1, side="right")) - 1
        return epoch, shards[a : b + 1].tolist()

    def _order_in(self, lane: int, epoch: int, window: int, count: int) -> np.ndarray:
        found = self._mixed.get(lane)
        if found is None or found[0] != (epoch, window):
            found = (epoch, window), permutation(count, self.seed, f"stream/{lane}/{window}", epoch)
            self._mixed[lane] = found
        return found[1]

    def _row(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (shards in the epoch's order, the place in the row at which each begins and the last ends)."""
        if epoch not in self._rows:
            if len(self._rows) > 3:
                self._rows.pop(min(self._rows))
            shards = permutation(len(self.sizes), self.seed, "shards", epoch)
            self._rows[epoch] = shards, np.cumsum([0, *self.sizes[shards]])
        return self._rows[epoch]

    def _samples_of(self, epoch: int, place_B: np.ndarray) -> np.ndarray:
        shards, starts = self._row(epoch)
        at = np.searchsorted(starts, place_B, side="right") - 1
        return self.first[shards[at]] + place_B - starts[at]

    def ahead(self, rows: np.ndarray, step: int, steps: int | None = None) -> list[int]:
        """Return the shards that the lanes of some rows of a batch need in the rest of their window and in the next one.

        Args:
            steps: after which the run ends: a window that begins then is not needed.
        """
        each = self.batch // self.lanes
        out: dict[int, None] = {}
        for lane in np.unique(np.asarray(rows) // each).tolist():
            k, long = step * each, int(self.bounds[lane + 1] - self.bounds[lane])
            for offset in (0, self.span):
                if steps is None or not offset or k + offset - (k + offset) % long % self.span < steps * each:
                    out.update(dict.fromkeys(self.window_at(lane, k + offset)[1]))
        return list(out)

    def rows(self, rank: int, ranks: int) -> np.ndarray:
        """Return the places in every batch that a rank takes: whole lanes, as many as any other's.

        Raises:
            ConfigError: the lanes do not divide among the ranks.
        """
        if self.lanes % ranks:
            near = [n for n in range(1, self.batch + 1) if self.batch % n == 0 and n % ranks == 0][:4]
            raise ConfigError(
                f"data.lanes: {self.lanes} lanes of a stream do not divide among {ranks} processes",
                f"set data.lanes to one of {', '.join(map(str, near))}" if near else f"choose a train.batch that {ranks} divides",
            )
        each = self.batch // ranks
        return np.arange(rank * each, (rank + 1) * each)

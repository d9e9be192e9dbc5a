"""Writing a run's checkpoints while it trains: by rank 0 or by all ranks in shards, at once or beside the next steps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from nano4m_cli import dist
from nano4m_cli.data._atomic import sync_folder
from nano4m_cli.errors import CheckpointError, DataError, Nano4MError
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.sharding import Piece, is_shared, piece

Pieces = dict[str, dict[str, Piece]]  # by part and name
POLL = 0.05  # seconds between looks for what other ranks write


class Saver:
    """Writes checkpoints of one run. All ranks call it at the same steps.

    With train.save_async a checkpoint is copied to host memory and written by a thread while training goes on; a failure to
    write is then told at the next save, and `finish` waits for the last one.

    Args:
        written: called on rank 0 with the step of each checkpoint that is complete.
    """

    def __init__(self, run: Path, config: TrainConfig, written: Callable[[int], None]):
        self.run, self.c, self.written = run, config, written
        self.keep = checkpoint.Retention(config.keep, config.keep_every, config.keep_best)
        self._thread: threading.Thread | None = None
        self._error: Nano4MError | None = None
        self._done: int | None = None
        self._aside: Path | None = None  # where the last checkpoint in shards is being written
        self._over = threading.Event()

    def close(self) -> None:
        """Wait for no other rank any more: training has ended, one of them may be gone."""
        self._over.set()

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        self.finish()
        self._over.clear()
        shared = any(is_shared(t) for part in tensors.values() for t in part.values())
        if not shared and dist.rank():
            tensors = {}
        self._aside = aside = self._begin(step) if shared else None
        later = self.c.save_async
        pieces = {p: {k: piece(t, copy=later) for k, t in part.items()} for p, part in tensors.items()}
        if later:
            self._thread = threading.Thread(target=self._catch, args=(step, pieces, state, aside), name="save")
            self._thread.start()
        else:
            with self._all():  # whoever left earlier could end the job that writes
                self._write(step, pieces, state, aside)
            with self._all():
                self._complete(step, state, aside)
            self._done = step
        self.poll()

    @contextlib.contextmanager
    def _all(self) -> Iterator[None]:
        """Do what any rank may fail at, together; where one did, give the disk back what was written of shards."""
        try:
            with dist.together():
                yield
        except Nano4MError:
            if self._aside is not None and dist.rank() == 0:
                shutil.rmtree(self._aside, ignore_errors=True)
            raise

    def poll(self) -> None:
        """Say what has been written since the last call."""
        if self._done is not None and dist.rank() == 0:
            step, self._done = self._done, None
            self.written(step)

    def finish(self) -> None:
        """Wait for the checkpoint being written, and raise on all ranks what went wrong on any."""
        if not self.c.save_async:
            return
        with self._all():
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            if self._error is not None:
                error, self._error = self._error, None
                raise error
        self.poll()

    def _catch(self, step: int, pieces: Pieces, state: dict, aside: Path | None) -> None:
        try:
            self._write(step, pieces, state, aside)
            self._complete(step, state, aside)
            self._done = step
        except Nano4MError as err:
            self._error = err
            if aside is not None:
                with contextlib.suppress(OSError):  # on a full disk there is often room for a name
                    _told(aside, dist.rank()).with_suffix(".failed").touch()
        except Exception as err:  # a thread has nobody to raise to
            self._error = CheckpointError(f"checkpoint at step {step} was not written: {type(err).__name__}: {err}")

    def _write(self, step: int, pieces: Pieces, state: dict, aside: Path | None) -> None:
        """Write what this rank writes: all of it (rank 0), or its shard."""
        if aside is not None:
            self._write_shards(step, pieces, aside)
        elif dist.rank() == 0:
            tensors = {part: {name: p.tensor for name, p in named.items()} for part, named in pieces.items()}
            checkpoint.save(self.run, step, tensors, state, self.keep)

    # -- shards -------------------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> Path:
        """Make the folder that all ranks write into; it gets its name when all have."""
        aside = self.run / "checkpoints" / f".{checkpoint.step_folder(self.run, step).name}.shards.part"
        with dist.together():
            if dist.rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                try:
                    aside.mkdir(parents=True)
                except OSError as err:
                    raise CheckpointError(f"cannot make {aside}: {err.strerror}", "free some space or check the rights") from err
        with dist.together():
            if not aside.is_dir():
                raise CheckpointError(f"{aside} was made by rank 0 and is not here", "the workspace must be one all nodes share")
        return aside

    def _write_shards(self, step: int, pieces: Pieces, aside: Path) -> None:
        """Write this rank's pieces, then a note of them."""
        rank, ranks = dist.rank(), dist.ranks()
        note: dict[str, Any] = {"sha256": {}, "shards": {}}
        try:
            for part, named in pieces.items():
                file = aside / part / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
                known = f"{part}/{file.name}"
                # What all ranks hold is the first one's; a rank may hold no row of a small tensor.
                mine = {name: p for name, p in named.items() if p.count or (p.count is None and rank == 0)}
                offsets = {name: {"saved_offsets": [p.first, *[0] * len(p.shape)][: len(p.shape)]} for name, p in mine.items()}
                file.parent.mkdir(exist_ok=True)
                note["sha256"][known] = checkpoint.write_tensors(
                    file, {name: p.tensor for name, p in mine.items()}, {"DCP_SHARDING_INFO": json.dumps(offsets)}
                )
                note["shards"][part] = {n: {"shape": list(p.shape), "piece": [known, p.first, p.count]} for n, p in mine.items()}
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
                sync_folder(file.parent)
            told = _told(aside, rank)
            told.with_suffix(".part").write_text(json.dumps(note))
            os.replace(told.with_suffix(".part"), told)
        except OSError as err:
            reason = DataError(f"cannot write {aside}: {err.strerror or err}", "free some space or check the rights")
            raise checkpoint.not_written(self.run, step, reason) from err

    def _complete(self, step: int, state: dict, aside: Path | None) -> None:
        """Rank 0: wait until every rank has noted what it wrote, then give the checkpoint its name."""
        if aside is None or dist.rank():
            return
        try:
            self._name(step, state, aside, [self._note(aside, rank) for rank in range(dist.ranks())])
        except (OSError, DataError) as err:
            reason = err if isinstance(err, DataError) else DataError(f"cannot write {aside}: {err.strerror or err}")
            raise checkpoint.not_written(self.run, step, reason) from err

    def _note(self, aside: Path, rank: int) -> dict[str, Any]:
        told, until = _told(aside, rank), time.monotonic() + 60 * self.c.timeout
        while not told.is_file():
            if told.with_suffix(".failed").exists() or self._over.is_set():
                raise DataError(f"rank {rank} has not written its shard")
            if time.monotonic() > until:
                raise DataError(f"rank {rank} has not written its shard within {self.c.timeout:g} min")
            time.sleep(POLL)
        return json.loads(told.read_text())

    def _name(self, step: int, state: dict, aside: Path, notes: list[dict[str, Any]]) -> None:
        hashes: dict[str, str] = {}
        shards: dict[str, Any] = {}
        for note in notes:
            hashes |= note["sha256"]
            for part, about in note["shards"].items():
                for name, entry in about.items():
                    whole = shards.setdefault(part, {}).setdefault(name, {"shape": entry["shape"], "pieces": []})
                    whole["pieces"].append(entry["piece"])
        checkpoint.write_state(aside, step, hashes, {**state, "shards": shards})
        with open(aside / "state.json", "rb") as handle:
            os.fsync(handle.fileno())
        for rank in range(len(notes)):
            _told(aside, rank).unlink()
        sync_folder(aside)
        path = checkpoint.step_folder(self.run, step)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        sync_folder(path.parent)
        checkpoint.prune(self.run, self.keep)


def _told(aside: Path, rank: int) -> Path:
    """Return the file in which a rank notes what it has written."""
    return aside / f".rank-{rank:05d}.json"

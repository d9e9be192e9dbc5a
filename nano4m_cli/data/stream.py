"""Token shards that lie at an address: fetched when their samples are due, kept in a bounded cache, never read half.

`publish` writes tokens/manifest.json beside the shards of a data set: every file with its size and sha256. Whoever serves
the data set's folder (any web server, an s3 or gs bucket, the hub) has done all there is to do. `open_remote` makes the data
set known to a workspace: its description, specs and indices, which are small; a shard comes when training reads it. Since
the indices say which keys stand where, sample order, lengths and masks are known without it, so a step's samples are a
function of the step alone, as with local shards.

A random order over all shards would need all of them at once; `stream_order.StreamOrder` walks them instead.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.data.download import DiskError, digest, disk_errors, unsafe
from nano4m_cli.data.shard_cache import RemoteFile, ShardCache, check_scheme, fetch_file
from nano4m_cli.data.shards import Shard, ShardIndex, Split, index_path, read_beside, shard_paths
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import DataError, FetchError, Nano4MError, ShardError

MANIFEST, REMOTE, FORMAT = "manifest.json", "remote.json", 1
AT_ONCE = 4  # transfers of one modality in one process, due and soon each
KEPT = 16  # shards of a modality that a process keeps mapped at least
ASK_AGAIN = 60.0  # seconds after which a shard that is due soon is looked for again: it may have been thrown out


# -- publishing and opening -------------------------------------------------------------------------------------------


def publish(dataset: DatasetFolder, modalities: Sequence[str]) -> Path:
    """Write tokens/manifest.json over the named modalities' specs, shards and indices; return its path."""
    files = {}
    for name in modalities:
        paths = [dataset.spec_path(name)]
        for folder in sorted(p for p in dataset.tokens(name).iterdir() if p.is_dir()):
            for shard in shard_paths(folder):
                if not index_path(shard).is_file():
                    raise ShardError(f"{shard} has no index beside it", f"run 'nano4m tokenize --modality {name}' again")
                paths += [shard, index_path(shard)]
        for path in paths:
            relative = path.relative_to(dataset.path / "tokens").as_posix()
            files[relative] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    where = dataset.path / "tokens" / MANIFEST
    write_json(where, {"format": FORMAT, "info": dataset.info().model_dump(mode="json"), "files": files})
    return where


def open_remote(url: str, workspace: Workspace, name: str | None = None) -> DatasetFolder:
    """Return the data set at an address, known to the workspace from now on; nothing is fetched where it is known already.

    Args:
        url: of the data set's folder, which holds tokens/manifest.json.
        name: of the folder below data/ (default: the data set's own name).

    Raises:
        FetchError: it cannot be had. DataError: what came is no manifest, or the name is taken by other data.
    """
    url = url.rstrip("/")
    check_scheme(url)
    cache = workspace.cache / "stream"
    with disk_errors(cache), contextlib.ExitStack() as stack:
        cache.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(cache / "open.lock"))
        for known in workspace.datasets():
            remote = read_remote(known)
            if remote is not None and remote["url"] == url and name in (None, known.name):
                return known
        aside = cache / f"manifest-{os.getpid()}.json"
        aside.unlink(missing_ok=True)
        try:
            fetch_file(RemoteFile(f"{url}/tokens/{MANIFEST}", -1, ""), aside)
            doc = json.loads(aside.read_text())
            files = {str(k): RemoteFile(f"{url}/tokens/{k}", int(v["bytes"]), str(v["sha256"])) for k, v in doc["files"].items()}
            if doc["format"] != FORMAT or any(unsafe(k) for k in files):
                raise ValueError("another format, or names that lead elsewhere")
            own = name or str(doc["info"]["name"])
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            hint = "who publishes them runs 'nano4m tokenize --publish'"
            raise DataError(f"{url}/tokens/{MANIFEST} is no manifest of token shards: {err}", hint) from err
        finally:
            aside.unlink(missing_ok=True)
        dataset = DatasetFolder(workspace.root / "data" / own)
        if dataset.path.exists():
            raise DataError(f"{dataset.path} is there and holds other data", "give it another name: data.dataset=NAME")
        if unsafe(own) or "/" in own:
            raise DataError(f"'{own}' cannot be the name of a data set", "give it another name: data.dataset=NAME")
        with atomic_folder(dataset.path) as folder:
            write_json(folder / "raw" / "dataset.json", {**doc["info"], "name": own})
            small = {k: f for k, f in files.items() if k.endswith(".json")}
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda item: fetch_file(item[1], folder / "tokens" / item[0]), small.items()))
            tars = {k: [f.bytes, f.sha256] for k, f in files.items() if k not in small}
            write_json(folder / "tokens" / REMOTE, {"format": FORMAT, "url": url, "tars": tars})
    return dataset


def read_remote(dataset: DatasetFolder) -> dict[str, Any] | None:
    """Return what tokens/remote.json says ({url, tars}), or None of a data set whose shards are here."""
    path = dataset.path / "tokens" / REMOTE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise DataError(f"{path} is not valid JSON: {err}", f"delete {dataset.path} to open it anew") from err


# -- reading ----------------------------------------------------------------------------------------------------------


class RemoteShard(Shard):
    """A shard of which only the index is here; `path` is its address."""

    def __init__(self, path: Path, file: RemoteFile):
        index = read_beside(path)
        if index is None:
            raise ShardError(f"{index_path(path)} is missing or damaged", "delete the data set's folder to open it anew")
        self.path, self.file, self.lost = file.url, file, None  # type: ignore[assignment]
        self.index: ShardIndex = index
        self.map = b""
        if index.tar_bytes != file.bytes:
            said = f"its index is of {index.tar_bytes:,} bytes, its manifest says {file.bytes:,}"
            raise ShardError(f"{file.url}: {said}", "publish it again")

    def check(self) -> None:
        """Nothing to check: a shard in the cache is whole, and stays while it is mapped."""


class RemoteSplit(Split):
    """A split whose shards come when they are read. `open` maps some; `soon` fetches others in the background."""

    def __init__(self, folder: Path, remote: dict[str, Any], cache: ShardCache):
        self.folder, self.cache = folder, cache
        prefix = f"{folder.parent.name}/{folder.name}/"
        names = sorted(k for k in remote["tars"] if k.startswith(prefix))
        if not names:
            raise ShardError(f"no shards in {remote['url']}/tokens/{prefix}")
        files = [RemoteFile(f"{remote['url']}/tokens/{k}", *remote["tars"][k]) for k in names]
        self.shards = [RemoteShard(folder / k.rsplit("/", 1)[1], f) for k, f in zip(names, files, strict=True)]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._asked: dict[int, float] = {}  # when each was last asked for by `soon`
        self._pools: dict[tuple[int, str], ThreadPoolExecutor] = {}

    def __getstate__(self) -> dict[str, Any]:  # to loader processes: maps and threads are each one's own
        return {**self.__dict__, "_maps": OrderedDict(), "_asked": {}, "_pools": {}}

    def read(self, i: int, member: str) -> bytes:
        shard, j = self.locate(i)
        s = int(np.searchsorted(self.starts, i, side="right")) - 1
        start, size = int(shard.index.offset[member][j]), int(shard.index.size[member][j])
        return self.open([s], lambda s, data: None)[s][start : start + size]

    def open(self, wanted: Sequence[int], check: Callable[[int, np.ndarray], None]) -> dict[int, mmap.mmap]:
        """Return maps of shards, fetched if need be, several at a time; `check` looks at each that was not mapped.

        Raises:
            DataError: names the first that did not come.
        """
        for error in self.missed(wanted, check).values():
            raise error
        return {s: self._maps[s] for s in wanted}

    def missed(self, wanted: Sequence[int], check: Callable[[int, np.ndarray], None]) -> dict[int, DataError]:
        """Map shards as `open` does; return what is wrong with those that cannot be had.

        Raises:
            DataError: what is wrong is wrong here, such as a full disk.
        """
        found: dict[int, DataError] = {}
        missing = [s for s in wanted if s not in self._maps]
        for s, done in [(s, self._threads("due").submit(self.cache.get, self.shards[s].file)) for s in missing]:
            try:
                self._result(s, done)
                self._maps[s] = self._map(s)
                check(s, np.frombuffer(self._maps[s], dtype=np.uint8))
            except Nano4MError as err:
                self._maps.pop(s, None)
                found[s] = DataError(f"no data: {err.message}", err.hint)
                if isinstance(err, DiskError):
                    raise found[s] from err
        for s in wanted:
            if s in self._maps:
                self._maps.move_to_end(s)
        while len(self._maps) > max(KEPT, 2 * len(wanted)):
            self._maps.popitem(last=False)
        return found

    def _result(self, s: int, done: Future[Path]) -> None:
        try:
            done.result(3 * self.cache.wait + 1)  # another process's attempt, and one's own: only what hangs takes longer
        except TimeoutError as err:
            hint = "is the server there? data.wait is how long it may take"
            raise FetchError(f"cannot fetch {self.shards[s].path}: no answer in {3 * self.cache.wait:g} s", hint) from err

    def _map(self, s: int) -> mmap.mmap:
        for _ in range(5):  # another process may have made room in between
            with contextlib.suppress(FileNotFoundError), open(self.cache.get(self.shards[s].file), "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        raise DiskError(f"{self.shards[s].path} is thrown out of the cache as soon as it is there", "raise data.cache_gb")

    def soon(self, wanted: Sequence[int]) -> None:
        """Fetch shards that will be read next; what goes wrong is told when they are."""
        now = time.monotonic()
        for s in wanted:
            if s not in self._maps and now - self._asked.get(s, -ASK_AGAIN) >= ASK_AGAIN:
                self._asked[s] = now
                self._threads("soon").submit(self._quietly, s)

    def _quietly(self, s: int) -> None:
        with contextlib.suppress(Nano4MError, OSError):
            self.cache.get(self.shards[s].file)

    def _threads(self, of: str) -> ThreadPoolExecutor:
        """Return the threads of this process for what is due, or what is due soon: which must not hold up the former."""
        if (os.getpid(), of) not in self._pools:
            self._pools[os.getpid(), of] = ThreadPoolExecutor(AT_ONCE, "shards")
        return self._pools[os.getpid(), of]


def cache_of(dataset: DatasetFolder, folder: str | None = None, gigabytes: float = 20.0, wait: float = 300.0) -> ShardCache:
    """Return the cache of a remote data set's shards: in the workspace, or in a folder such as $TMPDIR/nano4m."""
    path = Path(os.path.expandvars(folder)).expanduser() if folder else dataset.path.parent / ".cache" / "stream"
    return ShardCache(path, int(gigabytes * 1e9), wait)

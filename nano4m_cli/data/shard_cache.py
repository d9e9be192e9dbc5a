"""Files at an address, fetched whole with retries, and a bounded cache of shards that the processes of a node share."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from nano4m_cli.data.download import DiskError, Refused, digest, disk_errors, download
from nano4m_cli.errors import ConfigError, FetchError, Nano4MError

HTTP, OTHERS = ("http", "https"), ("s3", "gs", "gcs", "hf", "az", "abfs", "file", "memory")
NEEDS = {"s3": "'nano4m[s3]'", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
REFUSALS = ("Credential", "Token", "Gated", "Auth")  # in names of errors that another attempt does not mend
RIGHTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, say who you are; FSSPEC_S3_ANON=true reads public buckets",
    "gs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS, say who you are",
    "hf": "HF_TOKEN or 'hf auth login' say who you are; a gated repository must be asked for on its page",
}
BLOCK = 1 << 20
PIECE = 8 << 20  # bytes asked for at a time, which a break costs
BACKOFF = 1.0  # seconds before the second attempt; each further wait is twice as long


@dataclass(frozen=True)
class RemoteFile:
    """What the manifest says of a file: its address, size and sha256 (-1 and "": not known)."""

    url: str
    bytes: int
    sha256: str


def check_scheme(url: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme not in (*HTTP, *OTHERS):
        raise ConfigError(f"data.url: '{url}' has no scheme that can be read", "one of " + ", ".join((*HTTP, *OTHERS)))


def fetch_file(file: RemoteFile, dest: Path, wait: float = 300.0, retries: int = 4) -> Path:
    """Fetch a file whole to `dest`, going on after breaks; size and sha256 are checked where they are known.

    Raises:
        FetchError: it did not come within about `wait` seconds or after `retries` attempts without a new byte, or is another.
    """
    began = time.monotonic()

    def late(done: int, total: int) -> None:
        if time.monotonic() - began > wait:
            why = f"{done:,} bytes came in {wait:g} s"
            raise FetchError(f"cannot fetch {file.url}: {why}", "if the connection is so slow, raise data.wait")
        if 0 <= file.bytes < done:
            raise FetchError(f"{file.url} is larger than the {file.bytes:,} bytes that its manifest says", "publish it again")

    dest.parent.mkdir(parents=True, exist_ok=True)
    if urlsplit(file.url).scheme in HTTP:
        # An eighth of the time for a silence, and less between: the rest is for further attempts.
        download(file.url, dest, file.sha256 or None, late, retries, min(30.0, wait / 8), min(BACKOFF, wait / 60),
                 hint="is the address right, and does the server answer?", longest=wait / 16)
    else:
        _fetch_other(file, dest, late, retries, wait)
    if 0 <= file.bytes != dest.stat().st_size:
        size = dest.stat().st_size
        dest.unlink()
        raise FetchError(f"{file.url} has {size:,} bytes, its manifest says {file.bytes:,}", "publish it again")
    return dest


def _fetch_other(file: RemoteFile, dest: Path, late: Callable[[int, int], None], retries: int, wait: float) -> None:
    """Fetch through fsspec, which comes with torch; the file systems behind it (s3fs, gcsfs) are the user's to install."""
    import fsspec

    scheme, until, silence = urlsplit(file.url).scheme, time.monotonic() + wait, min(30.0, wait / 8)
    options = {"s3": {"config_kwargs": {"connect_timeout": silence, "read_timeout": silence, "retries": {"max_attempts": 1}}}}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints traces of what it raises as well
    try:
        system, path = fsspec.core.url_to_fs(file.url, **options.get(scheme, {}))
    except (ImportError, ValueError) as err:
        raise FetchError(f"cannot read {scheme}:// addresses here: {err}", f"pip install {NEEDS.get(scheme, 'fsspec')}") from err
    part, failures = dest.with_name(dest.name + ".part"), 0
    while True:
        have = before = part.stat().st_size if part.is_file() else 0
        try:
            with system.open(path, "rb", block_size=PIECE) as source:
                source.seek(have)
                while block := source.read(BLOCK):
                    with disk_errors(part), open(part, "ab") as out:
                        out.write(block)
                    have += len(block)
                    late(have, 0)
            break
        except FileNotFoundError as err:
            raise FetchError(f"cannot fetch {file.url}: there is no such file", "is the address right?") from err
        except Nano4MError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        except Exception as err:  # each file system raises its own kinds
            failures, why = 1 if have > before else failures + 1, f"{type(err).__name__}: {err}"
            if isinstance(err, PermissionError) or any(word in type(err).__name__ for word in REFUSALS):
                raise Refused(f"cannot fetch {file.url}: {why}", RIGHTS.get(scheme, "may you read it?")) from err
            if failures > retries or time.monotonic() > until:
                raise FetchError(f"cannot fetch {file.url}: {why} ({failures} attempts)", "does the server answer?") from err
            time.sleep(min(BACKOFF, wait / 60) * 2 ** (failures - 1))
    if file.sha256 and (found := digest(part)) != file.sha256:
        part.unlink()
        raise FetchError(f"{file.url} is not the expected file: sha256 {found}, expected {file.sha256}", "publish it again")
    with disk_errors(dest):
        part.touch()  # a file of no bytes
        with open(part, "rb") as whole:
            os.fsync(whole.fileno())
        os.replace(part, dest)


class ShardCache:
    """Whole shards by their sha256 in one folder, at most so many bytes, shared by all processes that see it.

    One process fetches a shard and the others wait for it. What was not used for longest goes first; a process that has it
    mapped keeps it until it lets go.

    Args:
        wait: seconds for one shard, for the others' transfer as for one's own.
    """

    def __init__(self, folder: Path, max_bytes: int, wait: float = 300.0):
        self.folder, self.max_bytes, self.wait = folder, max_bytes, wait
        self._failed: dict[str, tuple[float, Nano4MError]] = {}  # when and why a shard last did not come, to this process

    def get(self, file: RemoteFile) -> Path:
        """Return the path of a shard, fetched if it is not there.

        Raises:
            FetchError: it cannot be had; DiskError: it cannot be kept.
        """
        path = self.folder / f"{file.sha256}.tar"
        try:
            with disk_errors(path):
                return path if self._use(path, file) else self._fetched(path, file)
        except DiskError as err:
            hint = err.hint if "data.cache" in (err.hint or "") else "data.cache names another folder, data.cache_gb its size"
            raise DiskError(f"{err.message} ({file.url})", hint) from err

    def _fetched(self, path: Path, file: RemoteFile) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        asked = time.monotonic()
        try:
            with FileLock(self.folder / f".{file.sha256}.lock", timeout=2 * self.wait):
                failed, error = self._failed.get(file.sha256, (0.0, None))
                if error is not None and failed >= asked:
                    raise type(error)(error.message, error.hint)  # another thread's attempt, which this one waited for
                if not self._use(path, file):
                    self._make_room(file)
                    fetch_file(file, path, self.wait)
        except Nano4MError as err:
            self._failed[file.sha256] = time.monotonic(), err
            raise
        except Timeout as err:
            why = f"another process has been at it for {2 * self.wait:g} s"
            raise FetchError(f"cannot fetch {file.url}: {why}", "look at that process, or raise data.wait") from err
        return path

    def _use(self, path: Path, file: RemoteFile) -> bool:
        """Return whether a shard is there, and note that it was used."""
        try:
            if path.stat().st_size != file.bytes:
                path.unlink()
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, file: RemoteFile) -> None:
        if file.bytes > self.max_bytes:
            raise DiskError(f"a shard has {file.bytes:,} bytes, the cache holds {self.max_bytes:,}", "raise data.cache_gb")
        with FileLock(self.folder / ".room.lock", timeout=self.wait):
            there = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    there.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            total = sum(size for _, size, _ in there)
            room = min(self.max_bytes, total + shutil.disk_usage(self.folder).free)  # others fill the disk too
            for _, size, path in sorted(there):
                if total + file.bytes <= room:
                    break
                path.unlink(missing_ok=True)
                (self.folder / f".{path.stem}.lock").unlink(missing_ok=True)
                total -= size

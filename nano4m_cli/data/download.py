"""Downloads that resume and are whole or absent, and archives that cannot write outside their folder.

A transfer goes to `NAME.part` (with `NAME.part.json`: what the server said of it), is checked, synced and renamed, so
a file that bears its final name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import httpx

from nano4m_cli.data._atomic import sync_folder
from nano4m_cli.errors import FetchError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

BLOCK = 1 << 20
LONGEST_WAIT = 60.0


class Refused(FetchError):
    """The server will not give the file, or gives another than the expected one: trying again will not help."""


class DiskError(FetchError):
    """What is wrong is wrong on this machine: a full disk, a folder without rights."""


class _Again(Exception):
    """A transfer that broke in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def download(
    url: str,
    dest: Path,
    sha256: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    retries: int = 4,
    timeout: float = 30.0,
    backoff: float = 1.0,
    max_bytes: int | None = None,
    hint: str | None = None,
    headers: dict[str, str] | None = None,
    longest: float = LONGEST_WAIT,
) -> Path:
    """Return `dest`, which holds what `url` serves; a file that is there already is kept unless `sha256` differs.

    Args:
        sha256: expected digest of the file.
        progress: called with (bytes so far, total bytes or 0).
        retries: attempts in a row that may fail without a new byte, after the first.
        timeout: seconds without an answer or a byte.
        backoff: seconds before the first retry; each further wait is twice as long.
        max_bytes: larger files are refused.
        hint: what the user can do when the download fails.
        headers: sent along, e.g. an authorisation (which a redirect to another host does not get).
        longest: seconds before a retry at most, whatever the server asks for.

    Raises:
        FetchError: names the URL and what happened. The part that came is kept and resumed by the next call.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"cannot download '{url}': only http:// and https:// addresses are allowed", hint)
    if dest.is_file() and (sha256 is None or digest(dest) == sha256):
        return dest
    part = dest.with_name(dest.name + ".part")
    hint = hint or "check the connection and try again: the download resumes where it stopped"
    with disk_errors(part), _locked(part) as file, httpx.Client(
        follow_redirects=True, timeout=timeout, headers=headers, verify=_trusted()
    ) as client:
        transfer = _Transfer(client, url, file, part, sha256, progress or (lambda done, total: None), max_bytes)
        failures, best = 0, transfer.size()
        while True:
            try:
                transfer.run()
                transfer.verify()
                break
            except _Again as again:
                failures = 1 if transfer.size() > best else failures + 1
                best = max(best, transfer.size())
                if failures > retries:
                    raise FetchError(f"cannot download {url}: {again} ({failures} attempts)", hint) from again
                wait = backoff * 2 ** (failures - 1) if again.wait is None else again.wait
                time.sleep(min(wait, longest))
            except FetchError as err:
                raise err if err.hint else type(err)(err.message, hint) from err
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, dest)
        transfer.note_path.unlink(missing_ok=True)
        sync_folder(dest.parent)
    return dest


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """Return whom TLS trusts: reading that anew for each file takes longer than a small file."""
    return httpx.create_ssl_context()


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Transfer:
    """One download in progress: the part on disk, what is known of it, and one attempt at the rest."""

    def __init__(self, client, url, file, part, sha256, progress, max_bytes):
        self.client, self.url, self.file, self.part = client, url, file, part
        self.sha256, self.progress, self.max_bytes = sha256, progress, max_bytes
        self.note_path = part.with_name(part.name + ".json")
        self.resumed = False

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def restart(self) -> None:
        self.file.truncate(0)
        self.note_path.unlink(missing_ok=True)

    def note(self) -> dict[str, Any]:
        """Return what the server said of the part; {} where that is unknown or of another address."""
        try:
            note = json.loads(self.note_path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == self.url else {}

    def run(self) -> None:
        """Fetch what is missing; returns when the part is whole."""
        note = self.note()
        validator = note.get("etag") or note.get("modified")
        if self.size() and not (note and (validator or self.sha256)):
            self.restart()  # nothing would tell the rest of another file from ours
            note = {}
        have = self.size()
        if have and note.get("total") == have:
            return
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with self.client.stream("GET", self.url, headers=headers) as response:
                self._receive(response, have)
        except httpx.UnsupportedProtocol as err:
            raise FetchError(f"cannot download {self.url}: it redirects to an address that is not http(s)") from err
        except httpx.TransportError as err:
            raise _Again(f"{type(err).__name__}: {err}" if str(err) else type(err).__name__) from err
        except (httpx.RequestError, httpx.InvalidURL) as err:
            raise FetchError(f"cannot download {self.url}: {err}") from err

    def _receive(self, response: httpx.Response, have: int) -> None:
        code = response.status_code
        ranged = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("content-range", ""))
        if code == 416:
            if ranged and ranged[2] == str(have):
                return
            self.restart()
            raise _Again("the file at the server is shorter than the part that is here")
        if code in (408, 429) or code >= 500:
            after = response.headers.get("retry-after", "")
            raise _Again(f"HTTP {code} {response.reason_phrase}", float(after) if after.isdigit() else None)
        if code not in (200, 206):
            raise Refused(f"cannot download {self.url}: HTTP {code} {response.reason_phrase}")
        if code == 206 and not (ranged and ranged[1] == str(have)):
            self.restart()
            raise _Again("the server sent another range than the one asked for")
        if code == 200 and have:
            self.restart()  # no ranges here, or the file has changed
            have = 0
        total = _total(response, have)
        if total is None and "chunked" not in response.headers.get("transfer-encoding", "") and not self.sha256:
            raise FetchError(f"cannot download {self.url}: the server does not say how long the file is")
        self._check_room(total, have)
        self.resumed = have > 0
        etag = response.headers.get("etag", "")
        self.note_path.write_text(
            json.dumps(
                {
                    "url": self.url,
                    "etag": "" if etag.startswith("W/") else etag,  # weak tags may not be used in If-Range
                    "modified": response.headers.get("last-modified", ""),
                    "total": total,
                }
            )
        )
        done = have
        for block in response.iter_raw():  # a block size would hold back what came before a break
            done += len(block)
            if self.max_bytes is not None and done > self.max_bytes:
                self.restart()
                raise FetchError(f"{self.url} is larger than the limit of {self.max_bytes:,} bytes")
            self.file.write(block)
            self.file.flush()
            self.progress(done, total or 0)
        if total is not None and done != total:
            if done > total:
                self.restart()
            raise _Again(f"the connection ended after {done:,} of {total:,} bytes")

    def _check_room(self, total: int | None, have: int) -> None:
        if total is None:
            return
        if self.max_bytes is not None and total > self.max_bytes:
            raise FetchError(f"{self.url} has {total:,} bytes, more than the limit of {self.max_bytes:,}")
        free = shutil.disk_usage(self.part.parent).free
        if total - have > free:
            raise DiskError(
                f"no room for {self.url}: {total - have:,} bytes are missing and {self.part.parent} has {free:,} free",
                "free some space, or use a root folder on another disk",
            )

    def verify(self) -> None:
        if self.sha256 is None:
            return
        found = digest(self.part)
        if found == self.sha256:
            return
        resumed, self.resumed = self.resumed, False
        self.restart()
        if resumed:
            raise _Again("the joined parts have a wrong sha256", 0.0)
        raise Refused(f"{self.url} is not the expected file: sha256 {found}, expected {self.sha256}")


def _total(response: httpx.Response, have: int) -> int | None:
    ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("content-range", ""))
    if ranged:
        return int(ranged[1])
    length = response.headers.get("content-length", "")
    return have + int(length) if length.isdigit() else None


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """Give the part opened for appending, held against other processes."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat())
            except BlockingIOError:
                mine = False
            except OSError as err:
                if err.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                mine = True  # a file system without locks
            if not mine:
                raise FetchError(f"another process is downloading {part.with_suffix('')}", "wait for it to end")
        yield file


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Make DiskErrors, which name `path`, of what the system says of files."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"the disk is full: cannot write {path}", "free some space and try again") from err
        raise DiskError(f"cannot write {path}: {err.strerror or err}", "check the rights of the folder") from err


# -- archives ---------------------------------------------------------------------------------------------------------


def extract(
    archive: Path,
    folder: Path,
    select: Callable[[str], str | None] = lambda name: name,
    max_bytes: int = 64 << 30,
    max_files: int = 1_000_000,
) -> list[str]:
    """Write the regular files of a .tar, .tar.gz or .zip below `folder`; return their names there, in order.

    Args:
        select: maps a member's name to the name to write, or None to leave it out.
        max_bytes, max_files: more than that, unpacked, is refused (archives can pack zeros 1000-fold).

    Raises:
        FetchError: for a damaged archive; for any name that leaves the folder; for a link or device that is selected;
            for a name that stands twice. What was written until then stays: extract into `atomic_folder`.
    """
    names: list[str] = []
    left = max_bytes
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for member, kind, stream in _members(archive):
            _check_name(archive, member)
            target = select(member) if kind != "folder" else None
            if target is None:
                continue
            _check_name(archive, target)
            if kind != "file":
                raise FetchError(f"{archive} holds '{member}', a {kind}; only regular files are unpacked")
            path = folder / target
            if path.exists():
                raise FetchError(f"{archive} holds '{target}' twice")
            if len(names) >= max_files:
                raise FetchError(f"{archive} holds more than {max_files:,} files")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as err:
                raise FetchError(f"{archive} holds '{target}' below a file") from err
            with _archive_errors(archive), stream() as source, open(path, "xb") as out:
                while block := source.read(BLOCK):
                    left -= len(block)
                    if left < 0:
                        raise FetchError(f"{archive} unpacks to more than {max_bytes:,} bytes (at '{member}')")
                    out.write(block)
            names.append(target)
    return names


def unsafe(name: str) -> bool:
    """Return whether a name given by others may lead out of the folder it is put into."""
    path = PurePosixPath(name)
    return bool(not name or path.is_absolute() or ".." in path.parts or re.search(r"\\|\0|^[A-Za-z]:", name))


def _check_name(archive: Path, name: str) -> None:
    if unsafe(name):
        raise FetchError(f"{archive} holds '{name}', a name that leads out of its folder; nothing of it is used")


def _members(archive: Path) -> Iterator[tuple[str, str, Callable[[], IO[bytes]]]]:
    """Yield (name, "file" | "folder" | "link or device", opener) of each member."""
    with _archive_errors(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as box:
                for info in box.infolist():
                    mode = stat.S_IFMT(info.external_attr >> 16)
                    plain = mode in (0, stat.S_IFREG)
                    kind = "folder" if info.is_dir() else "file" if plain else "link or device"
                    yield info.filename, kind, lambda info=info: box.open(info)
        else:
            with tarfile.open(archive, "r:*") as box:
                for info in box:
                    kind = "folder" if info.isdir() else "file" if info.isreg() else "link or device"
                    yield info.name, kind, lambda info=info: box.extractfile(info)


@contextlib.contextmanager
def _archive_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError,
            NotImplementedError) as err:
        raise FetchError(f"{archive} is damaged or no archive: {err}", "delete it and fetch again") from err
    except FileNotFoundError as err:
        raise FetchError(f"no archive {archive}") from err

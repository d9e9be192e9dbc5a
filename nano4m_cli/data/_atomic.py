"""Files that appear whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nano4m_cli.errors import DataError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a binary file that becomes `path` on success; on any error nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as err:
        raise DataError(f"cannot write {path}: {err.strerror or err}", "free some space or check the rights") from err
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def write_json(path: Path, data: Any) -> None:
    """Write readable JSON atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a folder that becomes `path` on success, replacing what stood there; on any error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(path.parent)
    except OSError as err:
        raise DataError(f"cannot write {path}: {err.strerror or err}", "free some space or check the rights") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Make a rename in `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

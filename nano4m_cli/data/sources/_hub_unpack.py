"""Files of a repository, or one archive, as a folder that `folder` and `text` can read.

Plain files are linked, archives unpacked (WebDataset shards as well: members of one key are files of one stem), media in
the columns of parquet files written out. Only names of media, captions, labels and tables are ever unpacked.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nano4m_cli.data._atomic import atomic_file, atomic_folder
from nano4m_cli.data.download import extract
from nano4m_cli.data.sources._base import Failure
from nano4m_cli.data.sources._folder_items import ROLE
from nano4m_cli.errors import DataError, FetchError
from nano4m_cli.registry import MODALITIES

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXTS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".csv", ".parquet")
ABOUT = ("readme", "license", "licence", "citation", "changelog")
BESIDE = (".csv", ".jsonl", ".cls")  # what archives may hold beside media and captions
MAGIC = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"BM": ".bmp", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3",
    b"\xff\xfb": ".mp3", b"\xff\xf3": ".mp3", b"\x1aE\xdf\xa3": ".mkv",
}  # fmt: skip


def readable(name: str) -> bool:
    """Return whether a file of a repository is one that is read: by its name, never by what it might run."""
    low = name.lower()
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts) or PurePosixPath(low).stem in ABOUT
    return not hidden and (low.endswith((*ARCHIVES, *TEXTS)) or Path(low).suffix in ROLE)


def is_media(path: Path) -> bool:
    return ROLE.get(path.suffix.lower(), "text") != "text"


def is_archive(name: str, path: Path) -> bool:
    if name.lower().endswith((*TEXTS, *ROLE)):
        return False
    return name.lower().endswith(ARCHIVES) or zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def unpack(
    files: dict[str, Path], view: Path, max_bytes: float, progress: Callable[[str, int, int], None], flat: bool = False
) -> list[Failure]:
    """Fill the folder `view` with what the files hold; return those that cannot be used. What is there is kept.

    Args:
        flat: a single archive is unpacked into `view` itself.
    """
    failures: list[Failure] = []
    places, left = _places(files), max_bytes
    for done, (name, path) in enumerate(sorted(files.items()), 1):
        target = view / places[name]
        try:
            if is_archive(name, path):
                target = view if flat else target
                if not target.is_dir():
                    _unpack(path, target, left)
                left -= sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
            elif name.lower().endswith(".parquet") and (media := _media_columns(path)):
                if not target.is_dir():
                    with atomic_folder(target) as aside:
                        _write_rows(path, media, aside)
            elif not (view / name).exists():
                _link(path, view / name)
        except (FetchError, DataError) as err:
            cause = err.__cause__
            if isinstance(cause, ImportError) or (isinstance(cause, OSError) and cause.errno):
                raise  # of this machine, not of this file
            failures.append(Failure(name, err.message.removeprefix(f"{path} ")))
        except (FileExistsError, NotADirectoryError):
            failures.append(Failure(name, "stands below another file"))
        progress("files unpacked", done, len(files))
    for table in sorted(view.rglob("metadata.jsonl")):
        if not table.with_suffix(".csv").exists():
            try:
                _table(table)
            except DataError as err:
                failures.append(Failure(table.relative_to(view).as_posix(), err.message))
    return failures


def _places(files: dict[str, Path]) -> dict[str, str]:
    """Return where each file that becomes a folder goes: its name without suffix, whole where another one has that."""
    ends = sorted((*ARCHIVES, ".parquet"), key=len, reverse=True)
    bare = {n: n[: -len(end)] for n in files if (end := next((e for e in ends if n.lower().endswith(e)), ""))}
    count = Counter(bare.values())
    taken = {p.as_posix() for n in files for p in (PurePosixPath(n), *PurePosixPath(n).parents)}
    return {n: n if n not in bare or count[bare[n]] > 1 or bare[n] in taken else bare[n] for n in files}


def _unpack(path: Path, target: Path, max_bytes: float) -> None:
    def select(member: str) -> str | None:
        hidden = any(p.startswith(".") or p == "__MACOSX" for p in PurePosixPath(member).parts)
        suffix = PurePosixPath(member).suffix.lower()
        return None if hidden or not (suffix in ROLE or suffix in BESIDE) else member

    with atomic_folder(target) as aside:
        if not extract(path, aside, select, max_bytes=max(int(max_bytes), 0)):
            raise DataError("holds nothing that is read here")
        for one in sorted(aside.rglob("*.cls")):  # WebDataset's class labels
            beside = one.with_suffix(".json")
            try:
                doc = json.loads(beside.read_text()) if beside.is_file() else {}
                label = one.read_text().strip()
            except ValueError:
                continue  # no text, or no JSON: `folder` says so
            if isinstance(doc, dict):
                beside.write_text(json.dumps({"cls": label, **doc}, ensure_ascii=False))


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link to what is gone
    try:
        os.symlink(path.resolve(), target)
    except OSError:  # no links on this file system
        shutil.copyfile(path, target)


def _table(path: Path) -> None:
    """Write a metadata.jsonl as the metadata.csv that says the same; what is no text or number is left out."""
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line.strip() else {}
            rows.append({k: v for k, v in row.items() if isinstance(v, (str, int, float, bool))})
    except (ValueError, AttributeError) as err:
        raise DataError(f"line {len(rows) + 1} is no JSON object: {err}") from None
    columns = dict.fromkeys(c for row in rows for c in row)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(columns), restval="")
    writer.writeheader()
    writer.writerows(filter(None, rows))
    with atomic_file(path.with_suffix(".csv")) as file:
        file.write(out.getvalue().encode())


# -- parquet ----------------------------------------------------------------------------------------------------------


def open_parquet(path: Path) -> Any:
    """Return a pyarrow ParquetFile; without pyarrow, or where the file is damaged, a FetchError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as err:
        raise FetchError("parquet files need pyarrow, which is not installed", "pip install 'nano4m[parquet]'") from err
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as err:
        raise DataError(f"is damaged or no parquet file: {err}") from None


def batches(file: Any, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a parquet file as plain Python values, a few at a time."""
    import pyarrow

    try:
        for batch in file.iter_batches(batch_size=64, columns=columns):
            yield batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as err:
        raise DataError(f"is damaged: {err}") from None


def _media_columns(path: Path) -> dict[str, str]:
    """Return the role ("rgb", "audio", a modality) of each column that holds files: bytes, or {bytes, path} of `datasets`."""
    file = open_parquet(path)
    import pyarrow

    roles: dict[str, str] = {}
    for field in file.schema_arrow:
        kind = field.type
        if pyarrow.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            kind = kind.field(index).type if index >= 0 else kind
        if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            image = field.name in MODALITIES and MODALITIES.get(field.name).kind == "image" and field.name != "rgb"
            roles[field.name] = field.name if image else ""
    return roles


def _write_rows(path: Path, media: dict[str, str], folder: Path) -> None:
    """Write each row as files of one stem: its media, named by what their bytes are, and its labels as JSON."""
    file = open_parquet(path)
    scalar = re.compile(r"(large_)?string|bool|double|(half)?float|u?int\d+")
    labels = [f.name for f in file.schema_arrow if f.name not in media and scalar.fullmatch(str(f.type))]
    names, number = class_names(file), 0
    for rows in batches(file, [*media, *labels]):
        for row in rows:
            number += 1
            stem, used = folder / f"{number - 1:08d}", set()
            for column, role in media.items():
                data = row[column]["bytes"] if isinstance(row[column], dict) else row[column]
                if not data:
                    continue
                suffix = _suffix(data)
                name = f".{role}{suffix}" if role else suffix
                if name not in used and suffix:  # a second picture of a row has no place
                    used.add(name)
                    stem.with_name(stem.name + name).write_bytes(data)
            told = {c: names[c][v] if c in names and isinstance(v, int) and 0 <= v < len(names[c]) else v
                    for c in labels if (v := row[c]) is not None}
            stem.with_name(stem.name + ".json").write_text(json.dumps(told, ensure_ascii=False))


def class_names(file: Any) -> dict[str, list[str]]:
    """Return the names behind the numbers of label columns, as `datasets` keeps them in the schema's metadata."""
    try:
        doc = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = doc["info"]["features"]
        return {c: f["names"] for c, f in features.items() if isinstance(f, dict) and isinstance(f.get("names"), list)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _suffix(data: bytes) -> str:
    """Return the suffix of the kind of media that bytes are, by how they begin; "" for what is not read here."""
    if data[:4] == b"RIFF":
        return {b"WAVE": ".wav", b"WEBP": ".webp", b"AVI ": ".avi"}.get(data[8:12], "")
    if data[:4] == b"FORM" and data[8:11] == b"AIF":
        return ".aiff"
    if data[4:8] == b"ftyp":
        return ".m4a" if data[8:11] == b"M4A" else ".mp4"
    return next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), "")

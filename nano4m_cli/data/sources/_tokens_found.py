"""What a folder of tokens holds, compared before anything is read: layout, modalities, shapes, and the same files everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano4m_cli.data.sources import _tokens_files as files
from nano4m_cli.data.sources import _tokens_layouts as layouts
from nano4m_cli.data.sources._tokens_files import Place
from nano4m_cli.data.sources._tokens_layouts import CROPS, LAYOUTS, FolderLayout, Part
from nano4m_cli.errors import AlignmentError, FetchError, did_you_mean

PEEK = 200  # captions looked at to tell whether the rows of a file share one
Places = dict[str, dict[str, dict[str, Place]]]  # split -> folder -> stem -> place


@dataclass(frozen=True)
class Found:
    """The folders that are used, and how they are read.

    Attributes:
        parts: folders of ids, in the order of the modalities. captions: folder of texts.
        crops: whether crop_settings are there.
        rows: each row of a file is a sample of its own.
    """

    layout: FolderLayout
    places: Places
    parts: tuple[Part, ...]
    captions: str | None
    crops: bool
    rows: bool
    notes: list[str]

    @property
    def variants(self) -> int:
        return self.parts[0].spec.variants

    @property
    def folders(self) -> list[str]:
        return [p.folder for p in self.parts] + ([self.captions] if self.captions else []) + ([CROPS] if self.crops else [])

    def stems(self, split: str) -> list[str]:
        return sorted(self.places[split][self.parts[0].folder])

    def digest(self) -> str:
        """Return sha256 over the names of all samples, which are the same in every folder."""
        digest = hashlib.sha256()
        for split in self.places:
            for stem in self.stems(split):
                digest.update(f"{split}/{stem}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find(root: Path, o: Any) -> Found:
    """Return what the folder holds under the options of the source; whatever does not fit is an error."""
    if not root.is_dir():
        raise FetchError(f"no folder '{o.path}'", "give path=DIR of a folder of tokens")
    splits = files.split_folders(root)
    inside = {split: {p.name: p for p in files.subfolders(path)} for split, path in (splits or {"train": root}).items()}
    names = sorted({name for folders in inside.values() for name in folders})
    layout, notes = _layout(o, inside, names)
    if not splits and layout is not layouts.FOUR_M:
        there = ", ".join(names[:8]) or "nothing"
        raise FetchError(f"'{o.path}' has no folder train, val or test; it has {there}", "give the folder that holds them")
    places, modality = _list(o, inside, names, notes)
    crops = modality.pop(CROPS, None) is not None
    captions = next((n for n, m in modality.items() if m == "caption" and _first(places, n)[0].suffix != ".npy"), None)
    _check_options(o, names, list(modality.values()))
    folder_of = {m: n for n, m in modality.items() if n != captions}
    if not folder_of:
        raise FetchError(f"'{o.path}' holds no folder of ids (.npy)", f"layout {layout.name} is {layout.sign}")
    _check_aligned(places)
    parts = tuple(_part(o, layout, places, folder_of[m], m) for m in layouts.ordered(list(folder_of)))
    for part in parts:
        if part.spec.variants != parts[0].spec.variants:
            a, b = (f"{_first(places, p.folder)[0].where} has {p.spec.variants}" for p in (parts[0], part))
            raise AlignmentError(f"{a} rows, {b}", "row k of every folder is the same crop or key frame")
    notes += [f"{p.spec.modality}: {p.folder}, {layouts.described(p)}." for p in parts]
    k = parts[0].spec.variants
    rows = k > 1 and (o.rows == "samples" or (o.rows == "auto" and captions is not None and _captions_differ(places, captions)))
    if k > 1:
        notes.append(f"{k} rows per file: " + ("each is a sample." if rows else "variants of one sample."))
    if captions and k > 1 and not rows:
        notes.append("caption.txt holds the first caption of a file, labels.json all of them.")
    if crops:
        notes.append(f"{CROPS} (top, left, height, width, flip) are in labels.json.")
    return Found(layout, places, parts, captions, crops, rows, notes)


def _layout(o: Any, inside: dict[str, dict[str, Path]], names: list[str]) -> tuple[FolderLayout, list[str]]:
    if o.layout != "auto":
        return LAYOUTS[o.layout], [f"Tokens of layout {o.layout} (as said)."]
    tars = any(next(p.glob("*.tar"), None) for folders in inside.values() for p in folders.values())
    layout = layouts.recognise(set(names), tars, o.path)
    return layout, [f"Tokens of layout {layout.name} (recognised)."]


def _list(o: Any, inside: dict[str, dict[str, Path]], names: list[str], notes: list[str]) -> tuple[Places, dict[str, str]]:
    """Return the places in the folders that are used, and the modality of each; what is left out is noted."""
    places: Places = {split: {} for split in inside}
    modality: dict[str, str] = {}
    for name in names:
        called = o.rename.get(name, layouts.modality_of(name))
        if o.modalities and called not in o.modalities and called != CROPS:
            continue
        listed = {split: files.list_folder(folders[name]) if name in folders else {} for split, folders in inside.items()}
        suffixes = sorted({p.suffix for found in listed.values() for p in found.values()})
        if suffixes != [".npy"] and (called != "caption" or not suffixes):
            notes.append(f"Left out: {name} ({' and '.join(suffixes) or 'no .npy, .json or .txt'}).")
            continue
        if len(suffixes) > 1:
            raise FetchError(f"{name} of '{o.path}' holds {' and '.join(suffixes)} files", "keep one kind")
        if called in modality.values() or not called:
            other = next((n for n, m in modality.items() if m == called), "")
            what = f"{other} and {name} of '{o.path}' would both be '{called}'" if other else f"'{name}' names no modality"
            raise FetchError(what, f"say rename.{name}=MODALITY, or move it away")
        modality[name] = called
        for split in inside:
            places[split][name] = listed[split]
    return places, modality


def _check_options(o: Any, names: list[str], modalities: list[str]) -> None:
    """Raise a FetchError for an option that names what is not there."""
    given: dict[str, tuple[Iterable[str], list[str]]] = {
        "rename": (o.rename, names), "vocab": (o.vocab, modalities), "shape": (o.shape, modalities),
        "modalities": (o.modalities, modalities),
    }  # fmt: skip
    for option, (asked, known) in given.items():
        for name in asked:
            if name not in known:
                raise FetchError(f"{option} names '{name}', which '{o.path}' does not have", did_you_mean(name, known))


def _check_aligned(places: Places) -> None:
    """Raise an AlignmentError that names a file of a split which another folder has not."""
    for folders in places.values():
        first = next(iter(folders))
        for folder, stems in folders.items():
            if lone := folders[first].keys() ^ stems.keys():
                stem = min(lone)
                has, lacks = (first, folder) if stem in folders[first] else (folder, first)
                more = f" (and {len(lone) - 1} more differ)" if len(lone) > 1 else ""
                raise AlignmentError(
                    f"{folders[has][stem].where} has no partner in {lacks}{more}",
                    "every folder needs the same files; modalities=[...] names those to take",
                )


def check_keys(found: Found, root: Path, key_of: Callable[[str, str], str]) -> None:
    """Raise an AlignmentError where a sample is in two splits, against splits.json, or two would have one key."""
    listed, seen = files.listed_splits(root), {}
    for split in found.places:
        for stem in found.stems(split):
            place, key = f"{split}/{found.parts[0].folder}/{stem}", key_of(split, stem)
            if (other := listed.get(stem, split)) != split:
                raise AlignmentError(f"'{stem}' is in {split}, {root / 'splits.json'} says {other}", "one of the two is wrong")
            if key in seen:
                what = "is in two splits" if seen[key].endswith(f"/{stem}") else f"and another would both have the key '{key}'"
                hint = "no sample may be in two; where each split counts its files from 0: keys=split-stem"
                raise AlignmentError(f"{root}: '{stem}' {what}: {seen[key]} and {place}", hint)
            seen[key] = place
    if found.rows:
        rows = {f"{key}-{number}": key for key in seen for number in numbers(found.variants)}
        if both := sorted(rows.keys() & seen.keys()):
            raise AlignmentError(f"{root}: row '{both[0]}' of '{rows[both[0]]}' has the key of another file", "say rows=variants")


def numbers(k: int) -> list[str]:
    """Return what the keys of K rows end in, e.g. "00" to "10"."""
    return [f"{i:0{len(str(k - 1))}d}" for i in range(k)]


def _first(places: Places, folder: str, n: int = 1) -> list[Place]:
    """Return the places of the first stems of the first split that has any."""
    stems = next(split[folder] for split in places.values() if split[folder])
    return [stems[s] for s in sorted(stems)[:n]]


def _part(o: Any, layout: FolderLayout, places: Places, folder: str, modality: str) -> Part:
    place = _first(places, folder)[0]
    array = files.read_array(place.read(), place.where)
    return layouts.part_of(layout, folder, modality, array, place.where, o.vocab.get(modality), o.shape.get(modality))


def _captions_differ(places: Places, folder: str) -> bool:
    looked = (files.read_texts(p.read(), p.suffix, p.where) for p in _first(places, folder, PEEK))
    return any(len(set(texts)) > 1 for texts in looked)

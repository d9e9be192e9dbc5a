"""How other projects keep their tokens: folder names, vocabularies, shapes and the order of ids, per layout."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nano4m_cli.config import build
from nano4m_cli.errors import AlignmentError, FetchError, TokenError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._patterns import order

CAPTIONS = ("caption", "captions", "scene_desc")
CROPS = "crop_settings"
ORDER = ("rgb", "depth", "normal", "semseg", "audio", "video", "label")  # then the others by name, captions last


@dataclass(frozen=True)
class Form:
    """How a layout keeps the ids of one modality.

    Attributes:
        vocab: number of ids, of one codebook where there are several; None: the user must say it.
        axes: of the lattice; where files hold one row of ids it is square, or `shape`.
        codebooks: of a codec (0: a grid); frames x codebooks are `interleaved`, the others' ids offset by `vocab` or not,
            or stand codebook after codebook.
        levels, tokenizer: what made the ids.
    """

    vocab: int | None
    axes: int = 2
    shape: tuple[int, ...] = ()
    codebooks: int = 0
    interleaved: bool = False
    levels: tuple[int, ...] = ()
    tokenizer: str = "unknown"


@dataclass(frozen=True)
class FolderLayout:
    """One project's way to lay out folders.

    Attributes:
        marks: pattern of the folder names that nobody else uses; `sign` says them in words.
        forms: by modality.
        rows: files hold (K, ids): K crops or key frames; otherwise the one sample in its own shape.
        counted: the number in a folder's name is that of its ids.
    """

    name: str
    sign: str
    marks: str
    forms: dict[str, Form] = field(default_factory=dict)
    rows: bool = True
    counted: bool = False

    def form(self, folder: str) -> Form:
        """Return the form of a folder's ids; the course's pictures are Cosmos' wherever they stand."""
        forms = COURSE.forms if re.fullmatch(COURSE.marks, folder) else self.forms
        return forms.get(modality_of(folder), Form(None))


def _cosmos(axes: int = 2, shape: tuple[int, ...] = ()) -> Form:
    """Return the form of Cosmos' discrete tokenizers: finite scalar quantisation, the first level least significant."""
    return Form(64000, axes, shape, levels=(8, 8, 8, 5, 5, 5), tokenizer="cosmos")


def _divae(*names: str, vocab: int = 8192) -> dict[str, Form]:
    return {name: Form(vocab, tokenizer="divae") for name in names}


COURSE = FolderLayout(
    "course", "SPLIT/tok_{rgb,depth,normal}@256/*.npy", r"tok_(rgb|depth|normal)@256",
    {m: _cosmos() for m in ("rgb", "depth", "normal")}, counted=True,
)
NANO4M_AUDIO = FolderLayout(
    "nano4m-audio", "SPLIT/tok_{rgb,depth,normal}@196 or tok_audio@512 (any number of digits)",
    r"tok_(rgb|depth|normal)@196|tok_audio@\d+",
    {
        **_divae("rgb", vocab=16384), **_divae("depth", "normal"),
        "audio": Form(1024, codebooks=2, interleaved=True, tokenizer="encodec"),
    },
    counted=True,
)
SAGA = FolderLayout(
    "saga", "SPLIT/tok_audio@24_000, tok_video@256 or tok_label", r"tok_(audio@24_000|video(_backup)?@\d+|label)",
    {
        "rgb": _cosmos(), "depth": _cosmos(), "video": _cosmos(3, (2, 32, 32)), "video_backup": _cosmos(3, (9, 16, 16)),
        "audio": Form(2048, codebooks=32, tokenizer="mimi"), "label": Form(310, shape=(1, 1)),
    },
    rows=False,
)
FOUR_M = FolderLayout(
    "4m", "[SPLIT/]MODALITY/*.tar, crop_settings, or tok_*@224 and tok_*@448", r"crop_settings|tok_\w+@(224|448)",
    {
        **_divae("rgb", vocab=16384), **_divae("depth", "normal", "clip", "dinov2", "imagebind", "canny_edge", "sam_edge"),
        **_divae("semseg", vocab=4096),
        **{f"{m}_global": Form(8192, shape=(1, 16), tokenizer="divae") for m in ("dinov2", "imagebind")},
    },
)
LAYOUTS = {layout.name: layout for layout in (FOUR_M, NANO4M_AUDIO, SAGA, COURSE)}


def recognise(folders: set[str], tars: bool, where: str) -> FolderLayout:
    """Return the layout that the folder names tell, or else tars in them; none or two are a FetchError."""
    found = [x for x in LAYOUTS.values() if any(re.fullmatch(x.marks, f) for f in folders)] or ([FOUR_M] if tars else [])
    if len(found) > 1 and found[-1] is COURSE:
        found.pop()  # its folder names are used by the others as well
    if len(found) == 1:
        return found[0]
    looked = "; ".join(f"{x.name}: {x.sign}" for x in LAYOUTS.values())
    if found:
        what = f"could be layout {' or '.join(x.name for x in found)}"
    else:
        what = f"is of no known layout: it has {', '.join(sorted(folders)[:12]) or 'no folders'}"
    raise FetchError(f"'{where}' {what}", f"say layout=NAME; looked for {looked}")


def modality_of(folder: str) -> str:
    """Return our name for a folder of tokens: "tok_rgb@256" is rgb."""
    name = folder.removeprefix("tok_").partition("@")[0].lower()
    return "caption" if name in CAPTIONS else re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def ordered(modalities: list[str]) -> list[str]:
    """Return modalities in the order that a data set states."""
    def rank(m: str) -> tuple[int, str]:
        return (len(ORDER) + (m == "caption") if m not in ORDER else ORDER.index(m)), m

    return sorted(modalities, key=rank)


class Part(NamedTuple):
    """A folder of ids: its spec, and how its files hold them. `offset`: codebook q's ids begin at q * vocab."""

    folder: str
    spec: TokenSpec
    rows: bool
    interleaved: bool = False
    offset: bool = False


def part_of(
    layout: FolderLayout, folder: str, modality: str, array: np.ndarray, where: str, vocab: int | None, shape: list[int] | None
) -> Part:
    """Return the spec that one array of a folder implies, with the user's vocabulary and shape where given."""
    form = layout.form(folder)
    size = vocab or form.vocab
    if size is None:
        hint = f"say vocab.{modality}=N, or leave it out: modalities=[...] names what to take"
        raise FetchError(f"{where}: layout {layout.name} knows no vocabulary of '{modality}'", hint)
    rows = layout.rows and array.ndim > 1
    slots = array[0].size if rows else array.size
    kind = "codes" if form.codebooks else "grid"
    ask = f"say shape.{modality}=" + (f"[T,{form.codebooks}]" if form.codebooks else "[H,W]" if form.axes == 2 else "[T,H,W]")
    if layout.counted and not shape and (named := re.search(r"@(\d+)$", folder)) and int(named[1]) != slots:
        raise AlignmentError(f"{where} holds {slots} ids, the name {folder} promises {named[1]}", ask + " if that is right")
    lattice = tuple(shape or _lattice(form, (array.shape[1:] if rows else array.shape), slots))
    if math.prod(lattice) != slots or not slots:
        what = f"{slots} ids, not {'x'.join(map(str, lattice))}" if lattice else f"{slots} ids of '{modality}', of no known shape"
        raise AlignmentError(f"{where} holds {what}", ask)
    usual = size == form.vocab
    spec = build(TokenSpec, {
        "modality": modality, "kind": kind, "shape": lattice, "vocab_size": size, "levels": form.levels if usual else (),
        "tokenizer": {"name": form.tokenizer if usual else "unknown"}, "preprocess": {"layout": layout.name, "folder": folder},
        "variants": len(array) if rows else 1,
    }, where)  # fmt: skip
    offset = form.interleaved and spec.codebooks > 1 and bool((array.reshape(-1, spec.shape[1])[:, 1:] >= size).all())
    return Part(folder, spec, layout.rows, form.interleaved, offset)


def _lattice(form: Form, shape: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Return the lattice of a sample's ids, () where nothing tells it."""
    if form.codebooks:
        return (slots // form.codebooks, form.codebooks)
    if len(shape) > form.axes and set(shape[: len(shape) - form.axes]) == {1}:
        shape = shape[-form.axes :]
    if len(shape) == form.axes:
        return shape
    if form.shape:
        return form.shape
    side = math.isqrt(slots)
    return (side, side) if form.axes == 2 and side * side == slots else ()


def described(part: Part) -> str:
    """Return what a folder's ids are, as text."""
    spec = part.spec
    if spec.kind == "grid":
        return f"{_times(spec.shape)} of {spec.vocab_size}"
    order = ("taking turns" + (", ids offset by codebook" if part.offset else "")) if part.interleaved else "one after the other"
    return f"{spec.shape[0]} frames of {spec.shape[1]} codebooks of {spec.vocab_size} ({order} in the files)"


def to_slots(array: np.ndarray, part: Part, where: str) -> np.ndarray:
    """Return (variants, slots) ids as the spec means them; other shapes and ids outside the vocabulary are errors."""
    spec, books = part.spec, part.spec.codebooks
    ids = array.reshape(len(array), -1) if part.rows and array.ndim > 1 else array.reshape(1, -1)
    if len(ids) != spec.variants:
        raise AlignmentError(f"{where} has {len(ids)} rows, other files have {spec.variants}", "every sample has as many rows")
    natural = spec.shape if spec.kind == "grid" or part.interleaved else spec.shape[::-1]
    inner = [n for n in (array.shape[1:] if part.rows and array.ndim > 1 else array.shape) if n != 1]
    if ids.shape[1] != spec.slots or (len(inner) > 1 and inner != [n for n in natural if n != 1]):
        hint = f"say shape.{spec.modality}=[...] if all files of {part.folder} are so"
        raise AlignmentError(f"{where} is {_times(array.shape)}, {spec.slots} ids ({_times(natural)}) expected", hint)
    below = spec.vocab_size * (books if part.offset else 1)
    _check_range(ids, below, part, where)
    ids = ids.astype(np.int64)
    if books > 1 and not part.interleaved:
        return ids[:, np.argsort(order("codebook_major", *spec.shape))]
    if not part.offset:
        return ids
    ids = ids.reshape(-1, books) - np.arange(books) * spec.vocab_size
    if ids.min() < 0 or ids.max() >= spec.vocab_size:
        at = np.flatnonzero((ids < 0) | (ids >= spec.vocab_size))[0]
        q, bad = at % books, ids.flat[at] + at % books * spec.vocab_size
        raise TokenError(
            f"{where}: id {bad} stands at place {at % spec.slots}, which is of codebook {q}: "
            f"{q * spec.vocab_size} to {(q + 1) * spec.vocab_size - 1}",
            "codebooks are expected in turn, each with its own range of ids, as in the other files",
        )
    return ids.reshape(-1, spec.slots)


def _check_range(ids: np.ndarray, below: int, part: Part, where: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        hint = "-1 marks no id here; or were ids above 32767 stored as int16?"
        raise TokenError(f"{where}: id {low} is negative", hint)
    if high >= below:
        name = part.spec.modality
        raise TokenError(
            f"{where}: id {high} of '{name}' is outside its vocabulary of {below}",
            f"say vocab.{name}=N if its tokenizer has more" + (" (per codebook)" if part.spec.codebooks > 1 else ""),
        )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"

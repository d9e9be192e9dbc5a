"""TokenSpec: what the ids of one tokenised modality mean. Written by tokenize, read by train; nobody repeats it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from nano4m_cli.config import Config, build
from nano4m_cli.errors import DataError, TokenError


class TokenizerRef(Config):
    """Which tokenizer made the ids: registry name, its full config, and the hash of its weights."""

    name: str
    config: dict[str, Any] = {}
    weights_sha256: str = ""


class TokenSpec(Config):
    """Shape and meaning of one modality's token ids.

    kind:
        grid      ids on a lattice; `shape` (H, W) or (T, H, W); slots in row-major order.
        codes     codec ids; `shape` (T frames, Q codebooks); slot = t * Q + q; ids are per codebook, 0..vocab_size-1.
        sequence  text ids of true length ending in `eos`; `shape` (longest length,); no PAD exists.
    levels: where an id is a mixed-radix number (finite scalar quantisation), its digits' bases, least
        significant first; their product is `vocab_size`. Empty otherwise.
    variants: K aligned variants (crops, key frames) per sample.
    """

    modality: str
    kind: Literal["grid", "codes", "sequence"]
    shape: tuple[int, ...]
    vocab_size: int
    levels: tuple[int, ...] = ()
    eos: int | None = None
    tokenizer: TokenizerRef = TokenizerRef(name="identity")
    preprocess: dict[str, Any] = {}
    variants: int = 1

    @model_validator(mode="after")
    def _check(self) -> TokenSpec:
        ranks = {"grid": (2, 3), "codes": (2,), "sequence": (1,)}[self.kind]
        if len(self.shape) not in ranks or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} does not suit kind '{self.kind}'")
        if self.levels and math.prod(self.levels) != self.vocab_size:
            raise ValueError(f"levels {self.levels} do not multiply to vocab_size {self.vocab_size}")
        if (self.kind == "sequence") != (self.eos is not None):
            raise ValueError("'eos' is needed for kind 'sequence' and only there")
        return self

    @property
    def slots(self) -> int:
        """Number of slots of a sample (for a sequence: the longest)."""
        return math.prod(self.shape)

    @property
    def codebooks(self) -> int:
        """Number of separate vocabularies: Q for `codes`, else 1."""
        return self.shape[1] if self.kind == "codes" else 1

    @property
    def dtype(self) -> np.dtype:
        """The dtype of stored ids."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def positions(self) -> np.ndarray:
        """Return int64 (slots, 3): (t, y, x) for a grid, (frame, codebook, 0) for codes, (index, 0, 0) for text."""
        if self.kind == "grid":
            axes = np.indices((1, *self.shape) if len(self.shape) == 2 else self.shape)
            return axes.reshape(3, -1).T.astype(np.int64)
        out = np.zeros((self.slots, 3), dtype=np.int64)
        if self.kind == "codes":
            out[:, :2] = np.indices(self.shape).reshape(2, -1).T
        else:
            out[:, 0] = np.arange(self.slots)
        return out

    def check_ids(self, ids: np.ndarray, where: str) -> None:
        """Raise TokenError unless `ids` (any shape) are integers inside the vocabulary."""
        if ids.dtype.kind not in "ui":
            raise TokenError(f"{where}: ids of '{self.modality}' are {ids.dtype}, not integers")
        if ids.size and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            bad = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise TokenError(
                f"{where}: id {bad} of '{self.modality}' is outside its vocabulary of {self.vocab_size}",
                f"the tokens and spec.json do not belong together; run 'nano4m tokenize --modality {self.modality}'",
            )

    def same_ids_as(self, other: TokenSpec) -> str | None:
        """Return what differs in the meaning of the ids (None: nothing), as text."""
        for field in ("kind", "shape", "vocab_size", "levels", "eos"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field} is {mine} here and {theirs} there"
        mine, theirs = self.tokenizer.weights_sha256, other.tokenizer.weights_sha256
        if mine != theirs:
            return f"tokenizer weights differ ({mine[:12] or 'none'} and {theirs[:12] or 'none'})"
        return None


def read_spec(path: Path) -> TokenSpec:
    """Read a spec.json; a missing or broken one is a DataError that names the file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as err:
        raise DataError(f"no {path}", "run 'nano4m tokenize' first") from err
    except ValueError as err:
        raise DataError(f"{path} is not valid JSON: {err}") from err
    return build(TokenSpec, data, str(path))


class Layout:
    """The slots of several modalities side by side: column c is one slot of one modality.

    A column determines modality, position and vocabulary, so a batch carries ids and columns only.

    Attributes:
        specs: in model order. names: their modalities. start: (M + 1,) first column of each.
        columns: total. modality_C, position_C3, group_C: per column; a group is one vocabulary (modality, codebook).
        groups: list of (modality index, codebook, vocab_size). vocab_start: first row of each group in one table.
    """

    def __init__(self, specs: list[TokenSpec]):
        assert specs, "a layout needs at least one modality"
        self.specs = list(specs)
        self.names = [s.modality for s in specs]
        assert len(set(self.names)) == len(self.names), self.names
        self.start = np.cumsum([0] + [s.slots for s in specs])
        self.columns = int(self.start[-1])
        self.modality_C = np.repeat(np.arange(len(specs)), [s.slots for s in specs])
        self.position_C3 = np.concatenate([s.positions() for s in specs])
        self.groups = [(m, q, s.vocab_size) for m, s in enumerate(specs) for q in range(s.codebooks)]
        self.vocab_start = np.cumsum([0, *self.sizes])
        first = np.cumsum([0] + [s.codebooks for s in specs])
        book_C = np.where([specs[m].kind == "codes" for m in self.modality_C], self.position_C3[:, 1], 0)
        self.group_C = first[self.modality_C] + book_C
        self.sequence_C = np.array([specs[m].kind == "sequence" for m in self.modality_C])

    @property
    def sizes(self) -> list[int]:
        """Rows of each group."""
        return [size for _, _, size in self.groups]

    def slice(self, name: str) -> slice:
        """Return the columns of a modality."""
        m = self.names.index(name)
        return slice(int(self.start[m]), int(self.start[m + 1]))

"""The contract of a tokenizer, and what the fitted ones share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nano4m_cli.config import Config, build
from nano4m_cli.errors import MediaError, WeightsError
from nano4m_cli.registry import TOKENIZERS
from nano4m_cli.spec import TokenizerRef, TokenSpec


class Tokenizer(ABC):
    """Raw values to ids and back.

    Args:
        modality: registry name of the modality it serves.
        options: its `Options`.
        size: what the data set says of this modality, e.g. {"size": [32, 32]} or {"seconds": 1.0}.

    `encode(x)` equals `encode_prepared(preprocess(x))`, and `decode` returns values comparable with `preprocess`'s
    raw form through `comparable`: the one statement of what a round trip can keep.
    """

    class Options(Config):
        pass

    name: ClassVar[str]
    fitted: ClassVar[bool] = True
    slow: ClassVar[bool] = False  # whether decoding takes seconds a value: round trips are then told of few
    train: ClassVar[dict[str, Any]] = {}  # overrides of the training defaults; empty: not fitted by gradient

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        self.modality, self.options, self.size = modality, options, size

    @abstractmethod
    def spec(self) -> TokenSpec:
        """Return the spec of the ids (after fitting)."""

    @abstractmethod
    def adapt(self, raw: Any) -> tuple[Any, str | None]:
        """Bring any raw value of the modality to the size this tokenizer takes; return it and what was done to it."""

    @abstractmethod
    def encode(self, raws: Sequence[Any], where: Sequence[str] | None = None) -> list[np.ndarray]:
        """Return ids (slots,) per raw value; a value of the wrong size is a MediaError that names `where`."""

    @abstractmethod
    def decode(self, ids: Sequence[np.ndarray]) -> list[Any]:
        """Return a raw value per ids (slots,)."""

    def decode_values(self, values_BSD: np.ndarray) -> list[Any]:
        """Return a raw value per (slots, levels) of code values in [-1, 1], which may lie between those of the codes.

        For tokenizers whose spec has levels; of the values of ids it returns what `decode` does.
        """
        raise AssertionError(f"codes of {self.name} stand for no values")

    def comparable(self, raw: Any) -> Any:
        """Return `raw` as the best possible round trip would return it (cut or padded; same for all by default)."""
        return raw

    def fit(self, raws: Iterable[Any]) -> None:
        """Fit without gradients, or set up `module` and its data for fitting by the training loop."""
        raise AssertionError(f"{self.name} is not fitted")

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `load` needs into an existing folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def notice(self) -> str | None:
        """Return what a user should know of the fitted codebook (None: it is in use)."""
        return None

    def ref(self, weights_sha256: str) -> TokenizerRef:
        return TokenizerRef(
            name=self.name, config=self.options.model_dump(mode="json"), weights_sha256=weights_sha256
        )


class GradientTokenizer(Tokenizer):
    """A tokenizer whose `module` is trained by the one training loop on `data` (N, ...) with `loss`."""

    module: nn.Module
    data: Tensor
    effort: float = 1.0  # times the usual number of steps, for what is harder than usual (known after `fit`)
    critic: nn.Module | None = None  # its adversary while fitting, made by `fit`
    chunk: int = 512  # rows that validation takes at once

    @abstractmethod
    def loss(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on rows `index` of `data`, and named parts of it."""

    def train_loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what training minimises, where that is more than `loss`: random parts of the rows, a critic's terms."""
        return self.loss(index)

    def critic_loss(self) -> Tensor | None:
        """Return the critic's own loss on what the last `train_loss` made (None: the critic has not started)."""
        return None

    def codes(self, index: Tensor) -> Tensor | None:
        """Return the codes (any number, Q) of rows of `data`, for figures of their use (None: no such figures)."""
        return None

    def save(self, folder: Path) -> None:
        state = {k: v.detach().contiguous().cpu() for k, v in self.module.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        try:
            state = load_file(path)
            self.build(state)
            self.module.load_state_dict(state)
        except FileNotFoundError as err:
            raise WeightsError(f"no tokenizer weights at {path}", f"run 'nano4m tokenize --modality {self.modality}'") from err
        except Exception as err:  # safetensors raises its own type; a missing key is a RuntimeError
            if isinstance(err, (AssertionError, KeyboardInterrupt)):
                raise
            raise WeightsError(f"{path} cannot be used: {err}", "delete the folder and tokenize again") from err
        self.module.eval()

    @abstractmethod
    def build(self, state: dict[str, Tensor]) -> None:
        """Make `module` with the sizes found in a state dict."""


def weights_hash(folder: Path) -> str:
    """Return the sha256 over the tokenizer's weight files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json") and path.name != "tokenizer.json":
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the fitted tokenizer saved in `folder` (its tokenizer.json names class, options and sizes)."""
    path = folder / "tokenizer.json"
    try:
        doc = json.loads(path.read_text())
    except FileNotFoundError as err:
        raise WeightsError(f"no tokenizer at {folder}", f"run 'nano4m tokenize --modality {folder.name}'") from err
    except ValueError as err:
        raise WeightsError(f"{path} is damaged: {err}", "delete the folder and tokenize again") from err
    if not isinstance(doc, dict) or not {"name", "modality", "options", "size"} <= set(doc):
        raise WeightsError(f"{path} is damaged: keys are missing", "delete the folder and tokenize again")
    cls = TOKENIZERS.get(doc["name"])
    tokenizer = cls(doc["modality"], build(cls.Options, doc["options"], str(path)), doc["size"])
    tokenizer.load(folder)
    tokenizer.sha256 = weights_hash(folder)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into an existing empty folder."""
    tokenizer.save(folder)
    doc = {
        "name": tokenizer.name,
        "modality": tokenizer.modality,
        "options": tokenizer.options.model_dump(mode="json"),
        "size": tokenizer.size,
    }
    (folder / "tokenizer.json").write_text(json.dumps(doc, indent=1))
    tokenizer.sha256 = weights_hash(folder)


def codebook_use(ids_NQ: np.ndarray, vocab: int) -> dict[str, float]:
    """Return the share of codes used and the perplexity of their distribution, each the mean over the codebooks."""
    used, perplexity = [], []
    for book in ids_NQ.T:
        counts = np.bincount(book, minlength=vocab)
        p = counts[counts > 0] / counts.sum()
        used.append((counts > 0).mean())
        perplexity.append(np.exp(-(p * np.log(p)).sum()))
    return {"codes_used": float(np.mean(used)), "perplexity": float(np.mean(perplexity))}


def check_ids(ids: np.ndarray, shape: tuple[int, ...], spec: TokenSpec, where: str) -> np.ndarray:
    """Return ids as int64 of `shape` after checking count and range."""
    if ids.size != int(np.prod(shape)):
        raise MediaError(f"{where}: {ids.size} ids of '{spec.modality}', {int(np.prod(shape))} expected")
    spec.check_ids(ids, where)
    return ids.astype(np.int64).reshape(shape)

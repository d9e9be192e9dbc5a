"""Text to ids of true length: byte-level BPE (the `tokenizers` library), trained on the train split's texts.

Texts are lower-cased where `lower` is set; every text ends in EOS; there is no PAD. A caption is one line, so its white
space folds into single spaces; running text (modality `text`) keeps all of it, and its case unless `lower` is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf

from nano4m_cli.config import Config
from nano4m_cli.errors import MediaError, WeightsError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import Tokenizer as Base

EOS = "<eos>"


class Tokenizer(Base):
    class Options(Config):
        """vocab: largest vocabulary (merges stop earlier on small texts). max_length: 0 = twice the longest seen.
        lower: for running text the default is False."""

        vocab: int = 1024
        lower: bool = True
        max_length: int = 0
        fit_samples: int = 50_000

    name = "bpe"

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        self.one_line = modality != "text"
        if not self.one_line and "lower" not in options.model_fields_set:
            options = options.model_copy(update={"lower": False})
        super().__init__(modality, options, size)
        self.sha256 = ""
        self.longest = options.max_length

    def _text(self, raw: str) -> str:
        text = " ".join(raw.split()) if self.one_line else raw
        return text.lower() if self.options.lower else text

    def comparable(self, raw: str) -> str:
        return self._text(raw)

    def adapt(self, raw: str) -> tuple[str, str | None]:
        return raw, None

    def fit(self, raws: Iterable[str]) -> None:
        texts = [self._text(r) for r in raws]
        if not any(texts):
            raise MediaError(f"every {self.modality} of the train split is empty: nothing to fit a vocabulary on")
        model = hf.Tokenizer(hf.models.BPE())
        model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=self.one_line)
        model.decoder = hf.decoders.ByteLevel()
        # A reduced alphabet (the bytes seen) would make unseen characters vanish silently; keep all 256.
        trainer = hf.trainers.BpeTrainer(
            vocab_size=self.options.vocab, special_tokens=[EOS], show_progress=False,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        )
        model.train_from_iterator(texts, trainer)
        model.encode_special_tokens = True  # "<eos>" written in a text is text, not its end
        self.model = model
        if not self.options.max_length:
            longest = max(len(e.ids) for e in model.encode_batch(texts)) + 1
            self.longest = 2 * longest

    @property
    def eos(self) -> int:
        return self.model.token_to_id(EOS)

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="sequence", shape=(self.longest,), vocab_size=self.model.get_vocab_size(),
            eos=self.eos, tokenizer=self.ref(self.sha256), preprocess={"lower": self.options.lower},
        )

    def encode(self, raws: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        out = []
        for i, encoding in enumerate(self.model.encode_batch([self._text(r) for r in raws])):
            ids = np.asarray([*encoding.ids, self.eos], dtype=np.int64)
            if len(ids) > self.longest:
                raise MediaError(
                    f"{where[i] if where else f'text {i}'}: {self.modality} has {len(ids)} tokens, at most {self.longest} fit",
                    f"shorten it, or tokenize with {self.modality}.max_length={len(ids)}",
                )
            out.append(ids)
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for row in ids:
            row = np.asarray(row)
            stop = np.flatnonzero(row == self.eos)
            text = self.model.decode(row[: stop[0]].tolist() if len(stop) else row.tolist())
            texts.append(text.strip() if self.one_line else text)
        return texts

    def save(self, folder: Path) -> None:
        self.model.save(str(folder / "bpe.json"))
        (folder / "length.json").write_text(f"{self.longest}\n")

    def load(self, folder: Path) -> None:
        try:
            self.model = hf.Tokenizer.from_file(str(folder / "bpe.json"))
            self.model.encode_special_tokens = True
            self.longest = int((folder / "length.json").read_text())
        except Exception as err:  # the library raises a bare Exception
            raise WeightsError(f"{folder} holds no usable vocabulary: {err}", "delete the folder and tokenize again") from err

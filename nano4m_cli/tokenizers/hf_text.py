"""Text to ids of a published vocabulary (tokenizer.json: GPT-2 and other `tokenizers` files), of true length with EOS.

Text is taken as it is; what the vocabulary itself changes (case, unknown characters) is lost, and the round trip's
`equal` says how often. No special tokens are added but EOS: the vocabulary's own end mark, else one more id. The file
is small and is copied into the data set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers as hf
from pydantic import Field

from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._pretrained import Pretrained, WeightsOptions

ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]")  # usual end marks, where no file names one


class Tokenizer(Pretrained):
    class Options(WeightsOptions):
        """weights: a folder with tokenizer.json, else a hub id. max_length: EOS included. eos: the end mark's text.

        Without `eos`: tokenizer_config.json's eos_token, else a usual end mark of the vocabulary, else one is added.
        """

        weights: str = "openai-community/gpt2"
        max_length: int = Field(256, ge=2)
        eos: str | None = None

    name, files, optional = "hf_text", ("tokenizer.json",), ("tokenizer_config.json",)

    def open(self, found: dict[str, Path]) -> hf.Tokenizer:
        try:
            model = hf.Tokenizer.from_file(str(found["tokenizer.json"]))
        except Exception as err:  # the library raises a bare Exception
            raise self.wrong(f"no vocabulary that the tokenizers library reads: {err}") from err
        model.encode_special_tokens = True  # "<|endoftext|>" written in a text is text, not its end
        model.no_padding()
        model.no_truncation()
        return model

    @cached_property
    def known(self) -> int:
        """One more than the largest id of the vocabulary, which may have holes."""
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos(self) -> int:
        asked = self.options.eos
        if asked is not None:
            if (found := self.model.token_to_id(asked)) is None:
                raise ConfigError(f"{self.modality}.eos: the vocabulary of {self.options.weights} has no '{asked}'")
            return found
        special = {t.content: i for i, t in self.model.get_added_tokens_decoder().items()}
        return next((special[e] for e in (self._named_end(), *ENDS) if e in special), self.known)

    def _named_end(self) -> str | None:
        """Return the eos_token of tokenizer_config.json, a text or a mapping with `content`."""
        path = self.found.get("tokenizer_config.json")
        if path is None:
            return None
        try:
            end = json.loads(path.read_text()).get("eos_token")
        except (ValueError, AttributeError) as err:
            raise self.wrong(f"{path} is damaged: {err}") from err
        return end.get("content") if isinstance(end, dict) else end

    @cached_property
    def leading(self) -> bool:
        """Whether the vocabulary puts a space before a text, and leaves it there when decoding."""
        return self.model.decode(self.model.encode("a", add_special_tokens=False).ids).startswith(" ")

    def adapt(self, raw: str) -> tuple[str, str | None]:
        return raw, None

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="sequence", shape=(self.options.max_length,),
            vocab_size=max(self.known, self.eos + 1), eos=self.eos, tokenizer=self.ref(self.weights_sha256),
        )

    def encode(self, raws: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        out, longest = [], self.options.max_length
        for i, encoding in enumerate(self.model.encode_batch(list(raws), add_special_tokens=False)):
            place = where[i] if where else f"text {i}"
            if self.eos in encoding.ids:
                raise MediaError(f"{place}: {self.modality} holds the end mark of the vocabulary")
            if len(encoding.ids) + 1 > longest:
                n = len(encoding.ids) + 1
                raise MediaError(
                    f"{place}: {self.modality} has {n} tokens, at most {longest} fit",
                    f"shorten it, or tokenize with {self.modality}.max_length={n}",
                )
            out.append(np.asarray([*encoding.ids, self.eos], dtype=np.int64))
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        spec, out = self.spec(), []
        for row in ids:
            row = np.asarray(row)
            spec.check_ids(row, "decode")
            stop = np.flatnonzero(row == self.eos)
            text = self.model.decode(row[: stop[0]].tolist() if len(stop) else row.tolist())
            out.append(text.removeprefix(" ") if self.leading else text)
        return out

    def save(self, folder: Path) -> None:
        super().save(folder)
        copies = folder / "vocabulary"
        copies.mkdir()
        for name, path in self.found.items():
            shutil.copyfile(path, copies / name)

    def load(self, folder: Path) -> None:
        self.found = {n: p for n in (*self.optional, *self.files) if (p := folder / "vocabulary" / n).is_file()}
        super().load(folder)

    def repair(self) -> str:
        return "delete the folder and tokenize again"

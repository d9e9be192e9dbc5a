"""Recognisers of speech that stand beside a run: published ones through transformers, and the data set's own judge.

Published weights are data only (safetensors, JSON; nothing in a repository is run), from a folder, the hub's cache or the hub;
their hash stands in the result, and `sha256=` pins it. They run in fp32 on one thread, one utterance at a time, so that what they
write depends neither on neighbours nor on the number of cores.
"""

from __future__ import annotations

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nano4m_cli import dist
from nano4m_cli.config import Config
from nano4m_cli.data._models import steadily
from nano4m_cli.errors import WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import RATE, resample
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._judges import Judge, open_judge
from nano4m_cli.probes._speech import wordings
from nano4m_cli.tokenizers import _pretrained

HEARS = 16_000  # Hz
WINDOW = 30 * HEARS  # samples that Whisper hears at once
SHORTEST = 400  # samples of wav2vec 2.0's receptive field


class BaselineOptions(Config):
    """What a recogniser of speech is to be put beside the run.

    Attributes:
        baseline: whisper or wav2vec2; null: the data set's own judge alone, where there is one.
        weights: a folder (config.json, model.safetensors, ...) or an id on the hub ("": a small published one).
        sha256: what model.safetensors must have (its first 8 digits or more).
        language: what a multilingual Whisper is told that it hears.
        heard: utterances that the baseline hears, at most.
    """

    baseline: Literal["whisper", "wav2vec2"] | None = None
    weights: str = ""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{8,64}$")
    language: str = "en"
    heard: int = Field(100, ge=1)


class Recogniser(ABC):
    """Writes down what is said. name: in the names of figures. note: what a reader must know of it."""

    name: str
    note: str

    @abstractmethod
    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Return the words heard in sounds (samples,) at RATE, as written; what cannot be heard is ""."""


class Judged(Recogniser):
    """The data set's judge of sound, whose transcripts are an attribute's words object by object."""

    name = "judge"
    note = ("judge: the data set's own classifier of sound, which names one word per place and knows how many there are: it "
            "neither inserts nor leaves out")

    def __init__(self, judge: Judge, attribute: str, words: Mapping[str, str]):
        self.judge, self.attribute = judge, attribute
        self.words = [words[v] for v in judge.attributes[attribute]]

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        return [" ".join(self.words[v] for v in row) for row in self.judge.judge(waves)[self.attribute]]


class Published(Recogniser):
    """A model of transformers. Class attributes as of `data._models.Model`; give: how its weights are given, for hints."""

    model_class: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    usual: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: BaselineOptions, give: str):
        self.weights = options.weights or self.usual
        self.language = options.language
        self.found = _pretrained.find(self.name, self.weights, self.files, (), give)
        digest = _pretrained.file_hash(self.found["model.safetensors"])
        if options.sha256 and not digest.startswith(options.sha256):
            raise self.wrong(f"the sha256 of model.safetensors is {digest[: len(options.sha256)]}, {options.sha256} is asked for")
        folder = self.found["model.safetensors"].parent
        commit = f", commit {folder.name[:12]}" if folder.parent.name == "snapshots" else ""
        place = Path(self.weights).name if Path(self.weights).is_dir() else self.weights
        self.note = f"{self.name}: {place}{commit}, sha256 {digest}"
        self.model = _pretrained.from_transformers(self.found, self.model_class, self.name, self.wrong, self.unused)
        self.extractor = self._extractor()

    def wrong(self, what: str, hint: str | None = None) -> WeightsError:
        return WeightsError(f"the weights of '{self.name}', {self.weights}: {what}", hint)

    def _extractor(self) -> Any:
        ensure_torchaudio()
        import transformers

        path = self.found["preprocessor_config.json"]
        try:
            made = getattr(transformers, self.extractor_class).from_pretrained(path.parent, local_files_only=True)
        except Exception as err:  # types of their own
            raise self.wrong(f"preprocessor_config.json cannot be used: {_pretrained.first_line(err)}") from err
        if made.sampling_rate != HEARS:
            raise self.wrong(f"it hears {made.sampling_rate} Hz, {HEARS} is expected")
        return made

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        write = lambda w: " ".join(self.hear(resample(w, RATE, HEARS)).split()) if np.abs(w).max(initial=0) > 0 else ""  # noqa: E731
        with steadily():
            return dist.spread(waves, write, [float(len(w)) for w in waves])

    @abstractmethod
    def hear(self, wave: np.ndarray) -> str:
        """Return the words in a sound at HEARS."""


class Whisper(Published):
    """Greedy, without time stamps; what is longer than 30 s is heard in pieces of 30 s (Radford et al. 2022, arXiv:2212.04356)."""

    name, usual = "whisper", "openai/whisper-tiny"
    model_class, extractor_class = "WhisperForConditionalGeneration", "WhisperFeatureExtractor"
    files = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors")

    def __init__(self, options: BaselineOptions, give: str):
        super().__init__(options, give)
        import tokenizers

        try:
            self.vocabulary = tokenizers.Tokenizer.from_file(str(self.found["tokenizer.json"]))
        except Exception as err:  # tokenizers raises bare Exceptions
            raise self.wrong(f"tokenizer.json cannot be used: {_pretrained.first_line(err)}") from err
        self.told: dict[str, str] = {}
        if getattr(self.model.generation_config, "is_multilingual", False):
            known = getattr(self.model.generation_config, "lang_to_id", {})
            if f"<|{self.language}|>" not in known:
                raise self.wrong(f"it knows no language '{self.language}'", f"known: {', '.join(k[2:-2] for k in sorted(known))}")
            self.told = {"language": self.language, "task": "transcribe"}

    def hear(self, wave: np.ndarray) -> str:
        parts = []
        for at in range(0, len(wave), WINDOW):
            given = self.extractor(wave[at : at + WINDOW], sampling_rate=HEARS, return_tensors="pt", return_attention_mask=True)
            with _pretrained.quiet_transformers():
                ids = self.model.generate(given.input_features, attention_mask=given.attention_mask, do_sample=False, num_beams=1,
                                          return_timestamps=False, **self.told)
            text = self.vocabulary.decode(ids[0].tolist(), skip_special_tokens=True)
            parts.append(re.sub(r"<\|[^|]*\|>", " ", text))
        return " ".join(parts)


class Wav2Vec2(Published):
    """Greedy CTC: the likeliest unit of each frame, repetitions joined, blanks left out (Baevski et al. 2020, arXiv:2006.11477)."""

    name, usual = "wav2vec2", "facebook/wav2vec2-base-960h"
    model_class, extractor_class = "Wav2Vec2ForCTC", "Wav2Vec2FeatureExtractor"
    files = ("config.json", "preprocessor_config.json", "vocab.json", "model.safetensors")
    unused = ("wav2vec2.masked_spec_embed",)

    def __init__(self, options: BaselineOptions, give: str):
        super().__init__(options, give)
        path, size = self.found["vocab.json"], self.model.config.vocab_size
        try:
            vocabulary = json.loads(path.read_text())
            ids = sorted(vocabulary.values())
            if ids != list(range(size)):
                raise ValueError(f"it does not name {size} units by their ids from 0")
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as err:
            raise self.wrong(f"{path} is damaged: {err}") from err
        spelt = lambda unit: " " if unit == "|" else "" if re.fullmatch(r"<.*>|\[.*\]", unit) else unit  # noqa: E731
        self.units = {i: spelt(unit) for unit, i in vocabulary.items()}

    def hear(self, wave: np.ndarray) -> str:
        wave = np.pad(wave, (0, max(0, SHORTEST - len(wave))))
        given = self.extractor(wave, sampling_rate=HEARS, return_tensors="pt")
        best = self.model(given.input_values).logits[0].argmax(-1).tolist()
        return "".join(self.units[i] for i, _ in itertools.groupby(best) if i != self.model.config.pad_token_id)


PUBLISHED: dict[str, type[Published]] = {"whisper": Whisper, "wav2vec2": Wav2Vec2}


def baseline(options: BaselineOptions, probe: str) -> Recogniser | None:
    """Return the published recogniser that is asked for; weights that cannot be had or used are a WeightsError."""
    if options.baseline is None:
        return None
    return PUBLISHED[options.baseline](options, f"give {probe}.weights=DIR")


def own_judge(context: Context, modality: str, progress: Callable[[str, int, int], None]) -> Recogniser | None:
    """Return the data set's judge as a recogniser (trained on first use), where its transcripts are an attribute's words."""
    info = context.info
    how = next((t for m, t in info.transcripts.items() if t.attribute in info.determined.get(modality, [])), None)
    if how is None or modality != "audio":
        return None
    return Judged(open_judge(context.dataset, modality, progress), how.attribute, wordings(info, how))

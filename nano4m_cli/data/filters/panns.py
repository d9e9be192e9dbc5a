"""Sounds by what is heard in them: PANNs CNN14, 527 classes of AudioSet (Kong et al. 2020, arXiv:1912.10211).

A class is heard where its probability is at or above the threshold, anywhere in the clip: it is looked at in parts of at most
10 s, the length that the model was trained on. Sound is resampled to 32 kHz. Legend: N samples, T frames, M mel bands,
F frequencies, K classes.
"""

from __future__ import annotations

import csv
import difflib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import model_validator

from nano4m_cli.data import _models
from nano4m_cli.data.filters import _base
from nano4m_cli.errors import ConfigError
from nano4m_cli.modalities.audio import RATE, resample
from nano4m_cli.tokenizers._pretrained import first_line

INSIDE, WINDOW, HOP = 32_000, 1024, 320  # the model's rate, and its frames in samples
LONGEST, SHORTEST = 10 * INSIDE, INSIDE  # parts of a sound; five halvings in time need 32 frames, 0.32 s
CLASSES, CHECKPOINT = "class_labels_indices.csv", "Cnn14_mAP=0.431.pth"
BN = ("weight", "bias", "running_mean", "running_var")
STFT = "spectrogram_extractor.stft.conv_"
TAGS = 3  # the likeliest classes, recorded beside what was asked for


class Tagger(NamedTuple):
    """Tensors by the names of the checkpoint, whatever the network's widths, and the classes' names in their order."""

    tensors: dict[str, Any]
    names: list[str]


class Filter(_models.Model, _base.Filter):
    class Options(_models.Model.Options):
        """weights: a folder with both files; by default where the package panns_inference puts them.

        keep: clips in which one of these classes is heard are kept, others are not. reject: clips in which one is heard
        are left out. Names as AudioSet has them: panns.reject=[Music,"Male speech, man speaking"].
        """

        weights: str = "~/panns_data"
        keep: tuple[str, ...] = ()
        reject: tuple[str, ...] = ()

        @model_validator(mode="after")
        def _asks(self) -> Filter.Options:
            if both := sorted({*self.keep} & {*self.reject}):
                raise ValueError(f"'{both[0]}' cannot be both kept and rejected")
            return self

    looks_at, threshold, unit = "audio", 0.3, "probability that a class is heard"
    files = (CLASSES, CHECKPOINT)

    @property
    def give(self) -> str:
        return f"{super().give} (https://zenodo.org/records/3987831 has the weights, AudioSet publishes the classes)"

    def hashes(self) -> dict[str, str]:
        if not self.options.keep and not self.options.reject:
            raise ConfigError("filter 'panns' needs to know what to hear", "give panns.keep=[Dog] or panns.reject=[Speech,Music]")
        known = self.names(self.found[CLASSES])
        for name in (*self.options.keep, *self.options.reject):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"{self.found[CLASSES]} has the names"
                raise ConfigError(f"filter 'panns': AudioSet has no class '{name}'", hint)
        return super().hashes()

    def names(self, path: Path) -> list[str]:
        """Return the names of the classes in the model's order."""
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            names = [row["display_name"] for row in rows]
            if not names or [int(row["index"]) for row in rows] != list(range(len(rows))) or not all(names):
                raise ValueError("classes numbered from 0 are needed")
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as err:
            raise self.wrong(f"{path} is no list with index and display_name: {first_line(err)}") from err
        return names

    def open(self, found: dict[str, Path]) -> Tagger:
        import torch

        path = found[CHECKPOINT]
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)["model"]
            tensors = {k: v.float() for k, v in held.items() if not k.endswith("num_batches_tracked")}
        except Exception as err:  # a pickle that is more than tensors, a damaged zip, other contents
            raise self.wrong(f"{path} holds no table of tensors: {first_line(err)}") from err
        wanted = {f"{STFT}real.weight", f"{STFT}imag.weight", "logmel_extractor.melW", *(f"bn0.{n}" for n in BN)}
        wanted |= {f"{layer}.{n}" for layer in ("fc1", "fc_audioset") for n in ("weight", "bias")}
        for block in (f"conv_block{i}" for i in range(1, 7)):
            wanted |= {f"{block}.{n}" for i in (1, 2) for n in (f"conv{i}.weight", *(f"bn{i}.{n}" for n in BN))}
        if wanted != set(tensors):
            one = min(wanted ^ set(tensors))
            raise self.wrong(f"{path} is not of a CNN14: it {'lacks' if one in wanted else 'has'} {one}")
        if broken := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
            raise self.wrong(f"{path} holds NaN or infinite numbers in {broken[0]}")
        tagger = Tagger(tensors, self.names(found[CLASSES]))
        if tensors[f"{STFT}real.weight"].shape[-1] != WINDOW:
            raise self.wrong(f"{path} is of another rate: the model for 32 kHz, with windows of {WINDOW} samples, is needed")
        try:
            count = len(probabilities(tensors, np.zeros(SHORTEST, np.float32)))
        except RuntimeError as err:
            raise self.wrong(f"{path} holds tensors that do not fit each other: {first_line(err)}") from err
        if count != len(tagger.names):
            raise self.wrong(f"{path} knows {count} classes, {found[CLASSES]} names {len(tagger.names)}")
        return tagger

    def score(self, raws: list[np.ndarray]) -> dict[str, Any]:
        tensors, names = self.model
        wave = resample(raws[0], RATE, INSIDE)
        parts = np.array_split(wave, math.ceil(len(wave) / LONGEST))
        heard_K = np.max([probabilities(tensors, part) for part in parts], axis=0)
        asked = {k: classes for k, classes in (("keep", self.options.keep), ("reject", self.options.reject)) if classes}
        return {k: float(max(heard_K[names.index(c)] for c in classes)) for k, classes in asked.items()} | {
            "tags": {names[i]: float(heard_K[i]) for i in np.argsort(-heard_K, kind="stable")[:TAGS]}}

    def keeps(self, score: dict[str, Any], threshold: float | None = None) -> bool:
        limit = self.threshold if threshold is None else threshold
        return score.get("keep", limit) >= limit and not score.get("reject", -math.inf) >= limit


def probabilities(w: dict[str, Any], wave_N: np.ndarray) -> np.ndarray:
    """Return float32 (K,): how likely each class is heard in a sound at 32 kHz; a short one is padded with silence."""
    import torch
    import torch.nn.functional as fn

    def bn(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias, mean, var = (w[f"{name}.{n}"] for n in BN)
        return fn.batch_norm(x, mean, var, weight, bias)

    with _models.steadily():
        x = torch.from_numpy(np.pad(wave_N, (0, max(0, SHORTEST - len(wave_N)))))[None, None]
        x = fn.pad(x, (WINDOW // 2, WINDOW // 2), mode="reflect")
        power_FT = sum(fn.conv1d(x, w[f"{STFT}{part}.weight"], stride=HOP) ** 2 for part in ("real", "imag"))
        mel_MT = (power_FT.transpose(1, 2) @ w["logmel_extractor.melW"]).transpose(1, 2)
        x = bn(10 * torch.log10(mel_MT.clamp(min=1e-10)), "bn0").transpose(1, 2)[None]  # (1, 1, T, M)
        for block in (f"conv_block{i}" for i in range(1, 7)):
            for i in (1, 2):
                x = fn.relu(bn(fn.conv2d(x, w[f"{block}.conv{i}.weight"], padding=1), f"{block}.bn{i}"))
            x = x if block == "conv_block6" else fn.avg_pool2d(x, 2)
        x = x.mean(3)
        x = fn.relu(fn.linear(x.amax(2) + x.mean(2), w["fc1.weight"], w["fc1.bias"]))
        return torch.sigmoid(fn.linear(x, w["fc_audioset.weight"], w["fc_audioset.bias"]))[0].numpy()

"""Sounds by how much of them is speech: Silero VAD for 16 kHz (Silero Team, github.com/snakers4/silero-vad).

Its safetensors are read by the small network below; the project's other files (TorchScript, ONNX) are programs and are not run.
Sound is resampled to 16 kHz and heard in chunks of 32 ms, one after another, each with the 4 ms before it.
Legend: C chunks, H hidden width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nano4m_cli.data import _models
from nano4m_cli.data.filters import _base
from nano4m_cli.modalities.audio import RATE, resample
from nano4m_cli.tokenizers._pretrained import first_line

INSIDE, CHUNK, BEFORE = 16_000, 512, 64  # the model's rate; samples of a chunk, and of what is heard before it
HOP, AFTER = 128, 64  # of its spectrum; samples mirrored at a chunk's end
STRIDES = (1, 2, 2, 1)  # of the four convolutions
SPEECH = 0.5  # from this probability on a chunk is speech
LAYERS = ("conv1", "conv2", "conv3", "conv4", "final_conv")
NAMES = {"stft_conv.weight", *(f"{layer}.{n}" for layer in LAYERS for n in ("weight", "bias")),
         *(f"lstm_cell.{n}_{at}" for n in ("weight", "bias") for at in ("ih", "hh"))}


class Filter(_models.Model, _base.Filter):
    class Options(_models.Model.Options):
        """weights: a folder with silero_vad_16k.safetensors; by default that of a checkout of the project in this folder.

        speech: "keep" clips of which at least the threshold is speech, or "reject" them.
        """

        weights: str = "silero-vad/src/silero_vad/data"
        speech: Literal["keep", "reject"] = "keep"

    looks_at, threshold, unit = "audio", 0.2, "share of the clip that is speech"
    files = ("silero_vad_16k.safetensors",)

    @property
    def give(self) -> str:
        return f"{super().give} (https://github.com/snakers4/silero-vad has it in src/silero_vad/data)"

    def open(self, found: dict[str, Path]) -> dict[str, Any]:
        import torch
        from safetensors.torch import load_file

        path = found[self.files[0]]
        try:
            tensors = {k: v.float() for k, v in load_file(path).items()}
        except Exception as err:  # safetensors raises types of its own
            raise self.wrong(f"{path} is damaged: {first_line(err)}") from err
        if set(tensors) != NAMES:
            one = min(set(tensors) ^ NAMES)
            raise self.wrong(f"{path} is not of Silero VAD for 16 kHz: it {'lacks' if one in NAMES else 'has'} {one}")
        if broken := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
            raise self.wrong(f"{path} holds NaN or infinite numbers in {broken[0]}")
        try:
            speech(tensors, np.zeros(CHUNK, np.float32))
        except RuntimeError as err:
            raise self.wrong(f"{path} holds tensors that do not fit each other: {first_line(err)}") from err
        return tensors

    def score(self, raws: list[np.ndarray]) -> float:
        return float((speech(self.model, resample(raws[0], RATE, INSIDE)) >= SPEECH).mean())

    def keeps(self, score: float, threshold: float | None = None) -> bool:
        enough = score >= (self.threshold if threshold is None else threshold)
        return enough == (self.options.speech == "keep")


def speech(w: dict[str, Any], wave_N: np.ndarray) -> np.ndarray:
    """Return float32 (C,): how likely each chunk of a sound at 16 kHz is speech; the last is padded with silence."""
    import torch
    import torch.nn.functional as fn

    chunks = math.ceil(len(wave_N) / CHUNK)
    with _models.steadily():
        wave = torch.from_numpy(np.pad(wave_N, (BEFORE, chunks * CHUNK - len(wave_N))))
        x = fn.pad(wave.unfold(0, BEFORE + CHUNK, CHUNK)[:, None], (0, AFTER), mode="reflect")
        real, imag = fn.conv1d(x, w["stft_conv.weight"], stride=HOP).chunk(2, dim=1)
        x = torch.sqrt(real**2 + imag**2)
        for layer, stride in zip(LAYERS, STRIDES, strict=False):
            x = fn.relu(fn.conv1d(x, w[f"{layer}.weight"], w[f"{layer}.bias"], stride=stride, padding=1))
        x_CH = x.squeeze(-1)  # four frames, halved twice
        lstm = [w[f"lstm_cell.{n}_{at}"] for n in ("weight", "bias") for at in ("ih", "hh")]
        h = c = x_CH.new_zeros(1, lstm[1].shape[1])
        said = []
        for one in x_CH:
            h, c = torch.lstm_cell(one[None], (h, c), *lstm)
            said.append(h)
        out = fn.conv1d(fn.relu(torch.cat(said))[..., None], w["final_conv.weight"], w["final_conv.bias"])
        return torch.sigmoid(out).reshape(-1).numpy()

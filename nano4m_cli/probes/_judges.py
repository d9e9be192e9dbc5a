"""Independent judges: classifiers trained on real raw samples only, kept with the data set.

They learn from the train split and, where the data set has it, from raw/judge: samples that no model is trained on and
that show what a held-out split shows.

A judge sees a picture or a log-mel spectrogram and names, object by object in caption order, every attribute that its
modality determines. Its own accuracy on real held-out samples stands beside every figure it gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nano4m_cli import dist
from nano4m_cli.compute import multiplies_bf16
from nano4m_cli.data._atomic import atomic_folder
from nano4m_cli.data.shards import Split
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.registry import MODALITIES
from nano4m_cli.rng import permutation, torch_seed
from nano4m_cli.tokenizers.fsq_mel import Tokenizer as Mel

VERSION = 6
STEPS, BATCH, SAMPLES_PER_STEP = {"rgb": 250, "audio": 80}, 64, 40
SEEN_BY = {"rgb": "rgb", "rgb_hi": "rgb", "audio": "audio"}  # which judge sees a modality; the larger picture made as small
JUDGED = tuple(SEEN_BY)
STRIDE = {"audio": (3, 4)}  # log-mel frames x bands; pictures: (2, 2)


class Net(nn.Module):
    """A small CNN over (B, C, H, W): one logit vector per object and attribute. `stride`: of its first layer."""

    def __init__(self, channels: int, outputs: int, stride: tuple[int, int], width: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 5, stride=stride, padding=2)
        self.stages = nn.ModuleList()
        for a in (width, 2 * width):
            b = 2 * a
            self.stages.append(nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                                             nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()))
        self.head = nn.Sequential(nn.Linear(4 * width * 16, 192), nn.ReLU(), nn.Linear(192, outputs))

    def features(self, x: Tensor) -> Tensor:
        """Return (B, 192): what the last layer reads."""
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head[:-1](F.adaptive_avg_pool2d(x, (4, 4)).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head[-1](self.features(x))


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    """Return real inputs blurred and noised by random amounts: what is generated is never pixel-exact, and a judge that
    leans on the finest detail would name the codec's blur, not the thing."""
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(len(x), 1, 1, 1, generator=g)
    again = F.avg_pool2d(F.pad(blur, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g) < 0.5, torch.lerp(x, blur, amount), torch.lerp(x, again, amount))
    return x + 0.25 * torch.rand(len(x), 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)


class Judge:
    """A trained classifier of one modality. `accuracy`: its own, per attribute, on real samples of the split asked."""

    def __init__(self, modality: str, attributes: dict[str, list[str]], objects: int, mel: Mel | None):
        self.modality, self.attributes, self.objects, self.mel = modality, attributes, objects, mel
        self.size: tuple[int, int] | None = None  # of the pictures it was trained on
        self.outputs = objects * sum(len(v) for v in attributes.values())

    def new_net(self, channels: int) -> Net:
        return Net(channels, self.outputs, STRIDE.get(self.modality, (2, 2)))

    def _inputs(self, raws: Sequence[Any]) -> Tensor:
        if self.modality == "audio":
            mel = torch.cat([self.mel.log_mel(np.stack([self.mel.comparable(r) for r in raws[i : i + 8]]))
                             for i in range(0, len(raws), 8)])
            return ((mel - 1.0) / 4.0)[:, None].contiguous()  # (B, 1, frames, mels)
        x = torch.from_numpy((np.stack(raws).astype(np.float32) / 255.0 - 0.5) * 2.0).permute(0, 3, 1, 2)
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = F.adaptive_avg_pool2d(x, self.size)
        return x.contiguous()

    def _split(self, out: Tensor) -> dict[str, list[Tensor]]:
        """Return logits per attribute, a list over objects."""
        parts, at = {}, 0
        for name, values in self.attributes.items():
            parts[name] = []
            for _ in range(self.objects):
                parts[name].append(out[:, at : at + len(values)])
                at += len(values)
        return parts

    def fit(
        self, raws: Sequence[Any], labels: Sequence[dict], steps: int, seed: int, progress: Callable[[int, int], None]
    ) -> None:
        """Train on real samples; objects that a sample lacks do not count."""
        torch.manual_seed(torch_seed(seed, "judge"))
        x = self._inputs(raws)
        self.net = self.new_net(x.shape[1])
        y = {a: torch.full((len(raws), self.objects), -100) for a in self.attributes}
        for i, label in enumerate(labels):
            for o, thing in enumerate(label["objects"]):
                for a, values in self.attributes.items():
                    y[a][i, o] = values.index(thing[a])
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        order = np.concatenate([permutation(len(raws), seed, "judge", e) for e in range(-(-steps * BATCH // len(raws)))])
        for step in range(steps):
            rows = torch.from_numpy(order[step * BATCH : (step + 1) * BATCH])
            image = degrade(x[rows], torch.Generator().manual_seed(torch_seed(seed, "judge-noise", step)))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bf16("cpu")):
                parts = self._split(self.net(image.to(memory_format=torch.channels_last)))
            loss = sum(F.cross_entropy(l, y[a][rows, o], ignore_index=-100) for a, ls in parts.items() for o, l in enumerate(ls)
                       if bool((y[a][rows, o] >= 0).any()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                progress(step, steps)
        self.net.eval()

    def logp(self, raws: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return per attribute the log-probability of each value (N, objects, values)."""
        x = self._inputs(raws)
        out: dict[str, list[np.ndarray]] = {a: [] for a in self.attributes}
        with torch.inference_mode():
            for i in range(0, len(x), 256):
                for a, ls in self._split(self.net(x[i : i + 256])).items():
                    out[a].append(torch.stack([l.log_softmax(-1) for l in ls], 1).numpy())
        return {a: np.concatenate(v) for a, v in out.items()}

    @property
    def width(self) -> int:
        """How many features there are."""
        return self.net.head[-1].in_features

    def features(self, raws: Sequence[Any]) -> np.ndarray:
        """Return (N, width) fp64: what the judge sees before it names anything."""
        x = self._inputs(raws)
        with torch.inference_mode():
            return torch.cat([self.net.features(x[i : i + 256]) for i in range(0, len(x), 256)]).double().numpy()

    def judge(self, raws: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return per attribute the named value's index (N, objects)."""
        return {a: p.argmax(-1) for a, p in self.logp(raws).items()}

    def named(self, raws: Sequence[Any], labels: Sequence[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return per attribute bool (named right, there), each (N, objects), objects in caption order."""
        said, out = self.judge(raws), {}
        for a, values in self.attributes.items():
            index = {v: i for i, v in enumerate(values)}
            truth = np.full((len(labels), self.objects), -1)
            for i, label in enumerate(labels):  # what it was never taught it cannot name
                truth[i, : len(label["objects"])] = [index.get(t[a], len(values)) for t in label["objects"]]
            out[a] = (said[a] == truth, truth >= 0)
        return out

    def correct(self, raws: Sequence[Any], labels: Sequence[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return per attribute (objects named right, objects there), each (N,), in caption order."""
        return {a: ((right & there).sum(1), there.sum(1)) for a, (right, there) in self.named(raws, labels).items()}


def _real(dataset: DatasetFolder, modality: str, split: str, most: int) -> tuple[list[Any], list[dict]]:
    """Return raw values and labels of up to `most` samples of a split."""
    raw, kind = Split(dataset.raw(split)), MODALITIES.get(modality)
    index = np.sort(permutation(len(raw), 0, "judge-samples")[:most])
    values = [kind.from_bytes(raw.read(int(i), kind.ext), kind.ext) for i in index]
    return values, [json.loads(raw.read(int(i), "labels.json")) for i in index]


def judge_of(dataset: DatasetFolder, modality: str) -> Judge | None:
    """Return the data set's judge of a modality, or None where there is none."""
    able = modality in JUDGED and bool(dataset.info().determined.get(modality))
    return open_judge(dataset, modality, lambda what, done, total: None) if able else None


def open_judge(
    dataset: DatasetFolder, modality: str, progress: Callable[[str, int, int], None], seed: int = 0
) -> Judge:
    """Return the data set's judge of a modality, training it on first use.

    Args:
        seed: not 0: another judge, trained apart, for where one chooses and the other measures.
    """
    info, modality = dataset.info(), SEEN_BY[modality]
    wanted = info.determined.get(modality, [])
    attributes = {a: info.attributes[a].values for a in wanted}
    mel = Mel("audio", Mel.Options(), info.sizes["audio"]) if modality == "audio" else None
    judge = Judge(modality, attributes, info.max_objects, mel)
    judge.size = tuple(info.sizes[modality]["size"]) if "size" in info.sizes.get(modality, {}) else None
    folder = dataset.judge(f"{modality}-{seed}" if seed else modality)
    meta = {"version": VERSION, "attributes": attributes, "objects": info.max_objects, "options": info.options}
    state = dist.by_first(lambda: _state(judge, dataset, folder, meta, seed, progress))
    judge.net = judge.new_net(state["stem.weight"].shape[1])
    judge.net.load_state_dict(state)
    judge.net.eval()
    return judge


def _state(
    judge: Judge, dataset: DatasetFolder, folder: Path, meta: dict[str, Any], seed: int, progress: Callable[[str, int, int], None]
) -> dict[str, Tensor]:
    """Return the weights that lie with the data set; where there are none yet, train the judge and keep it."""
    path = folder / "judge.json"
    if path.is_file() and json.loads(path.read_text()) == json.loads(json.dumps(meta)):
        return load_file(folder / "model.safetensors")
    info, modality = dataset.info(), judge.modality
    steps = info.judge_steps.get(modality, STEPS[modality])
    special = min(info.judge, steps * SAMPLES_PER_STEP // 6)  # as often as among all combinations
    values, labels = _real(dataset, modality, "train", steps * SAMPLES_PER_STEP - special)
    if special:
        more = _real(dataset, modality, "judge", special)
        values, labels = values + more[0], labels + more[1]
    judge.fit(values, labels, steps, seed, lambda done, total: progress(f"judge of {modality}", done, total))
    with atomic_folder(folder) as aside:
        save_file({k: v.contiguous() for k, v in judge.net.state_dict().items()}, aside / "model.safetensors")
        (aside / "judge.json").write_text(json.dumps(meta))
    return judge.net.state_dict()

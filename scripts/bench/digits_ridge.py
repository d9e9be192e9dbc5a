"""A plain baseline for spoken digits: ridge regression on pooled log-mel, no model of ours involved.

    python scripts/bench/digits_ridge.py [DATASET ...]      (default: every data set of single digits made by `fetch digits`)

Each distinct recording of a split counts once. Features: log-mel of the voiced part (frames within 40 dB of the
loudest), averaged over 8 equal stretches of time, 40 bands to 4 kHz, and the logarithm of its length. The penalty is
chosen on val.
"""

import argparse
import json

import numpy as np
import torch

from nano4m_cli.data.shards import Split
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.probes._result import mean_metric
from nano4m_cli.probes.linear import ridge_classifier
from nano4m_cli.registry import MODALITIES

RATE, STRETCHES, BANDS = 24_000, 8, 40


def features(wave: np.ndarray, bank: torch.Tensor) -> np.ndarray:
    power = torch.stft(torch.from_numpy(wave), 1024, 240, window=torch.hann_window(1024), return_complex=True).abs() ** 2
    mel = torch.log(power.T @ bank + 1e-6).numpy()  # (frames, bands)
    loud = mel.max(1)
    voiced = np.flatnonzero(loud > loud.max() - 40 / 10 * np.log(10))
    mel = mel[voiced[0] : voiced[-1] + 1]
    edges = np.linspace(0, len(mel), STRETCHES + 1)
    pooled = [mel[int(a) : max(int(b), int(a) + 1)].mean(0) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.concatenate([*pooled, [np.log(len(mel))]])


def read(dataset, split: str, bank: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    raw, kind, seen, x, y = Split(dataset.raw(split)), MODALITIES.get("audio"), set(), [], []
    for i in range(len(raw)):
        label = json.loads(raw.read(i, "labels.json"))
        if label["fsdd_file"] in seen:
            continue
        seen.add(label["fsdd_file"])
        x.append(features(kind.from_bytes(raw.read(i, kind.ext), str(i)), bank))
        y.append(int(label["objects"][0]["digit"]))
    return np.stack(x), np.array(y)


def ridge(train, val, test) -> np.ndarray:
    """Return whether each test recording is named right (N,), with the penalty that does best on val."""

    def right(part, penalty: float) -> np.ndarray:
        return ridge_classifier(*train, part[0], 10, penalty) == part[1]

    return right(test, max(10.0 ** np.arange(-1, 5), key=lambda penalty: right(val, penalty).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*")
    args = parser.parse_args()
    ensure_torchaudio()
    import torchaudio.functional as A

    bank = A.melscale_fbanks(513, 40.0, 4000.0, BANDS, RATE, norm=None, mel_scale="htk")
    workspace = Workspace.at()
    known = [d for d in workspace.datasets() if d.info().source == "digits" and d.info().max_objects == 1]
    for dataset in [workspace.dataset(n) for n in args.datasets] or known:
        parts = [read(dataset, s, bank) for s in ("train", "val", "test")]
        hit = ridge(*parts)
        low, high = mean_metric("digit_acc", hit).ci95
        print(f"{dataset.info().name:24} ridge on log-mel: {hit.mean():.3f} ({low:.3f} .. {high:.3f}), {len(hit)} recordings "
              f"(train {len(parts[0][1])})", flush=True)


if __name__ == "__main__":
    main()

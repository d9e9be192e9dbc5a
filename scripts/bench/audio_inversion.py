"""From codes to a waveform and back: how much of the log-mel survives, with and without non-negative inversion.

    python scripts/bench/audio_inversion.py [DATASET] [--limit 200]

Error is the mean absolute difference of log-mel values (nats of power) from those of the real clip, val split.
"""

import argparse
import time

import numpy as np
import torch

from nano4m_cli.data.shards import Split
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers import fsq_mel
from nano4m_cli.tokenizers._base import open_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--limit", type=int, default=200)
    args = parser.parse_args()
    dataset = Workspace.at().dataset(args.dataset)
    tokenizer = open_tokenizer(dataset.tokenizer("audio"))
    raw, kind = Split(dataset.raw("val")), MODALITIES.get("audio")
    waves = [kind.from_bytes(raw.read(i, kind.ext), str(i)) for i in range(min(args.limit, len(raw)))]
    mel = lambda ws: torch.cat([tokenizer.log_mel(np.stack(ws[i : i + 8])) for i in range(0, len(ws), 8)])  # noqa: E731
    truth = mel([tokenizer.comparable(w) for w in waves])
    ids = tokenizer.encode(waves)
    print(f"{len(waves)} clips; codes alone: {float((tokenizer.decode_mel(ids) - truth).abs().mean()):.3f}")
    solve = tokenizer.invert_mel
    for updates in (0, 10, 30, 100):
        tokenizer.invert_mel = solve if updates else lambda power: (power @ tokenizer.inverse).clamp_min(0)
        for iterations in (8, 16, 32):
            fsq_mel.INVERSIONS = updates
            tokenizer.options = tokenizer.options.model_copy(update={"griffin_lim": iterations})
            begin = time.perf_counter()
            made = tokenizer.decode(ids)
            spent = (time.perf_counter() - begin) / len(waves) * 1e3
            error = float((mel(list(made)) - truth).abs().mean())
            what = "clipped pseudo-inverse" if not updates else f"{updates} non-negative updates"
            print(f"{what:28} Griffin-Lim {iterations:3d}: error {error:.3f}, {spent:.1f} ms a clip", flush=True)


if __name__ == "__main__":
    main()

"""What the speed benches share: the reference configuration on made-up tokens, and its FLOPs.

The configuration is that of nano4M-Audio (cfgs/5mod.yaml with the masks that project trained with): d6-6w512; rgb 196 of
16,384; depth and normal 196 of 8,192; audio 256 frames of 2 codebooks; captions of up to 64; both budgets uniform in [16, 256].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nano4m_cli.config import Config
from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.shards import npy, shard_name, write_shard
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.rng import bits, generator
from nano4m_cli.spec import Layout, TokenSpec
from nano4m_cli.train.config import load_run_config

ROOT = Path(__file__).parents[2]
BUDGET = (16, 256)
SHARD = 1024
SPECS = [
    TokenSpec(modality="rgb", kind="grid", shape=(14, 14), vocab_size=16384),
    TokenSpec(modality="depth", kind="grid", shape=(14, 14), vocab_size=8192),
    TokenSpec(modality="normal", kind="grid", shape=(14, 14), vocab_size=8192),
    TokenSpec(modality="audio", kind="codes", shape=(256, 2), vocab_size=1024),
    TokenSpec(modality="caption", kind="sequence", shape=(64,), vocab_size=4096, eos=0),
]


def make_tokens(root: Path, samples: int, specs: Sequence[TokenSpec] = SPECS, classes: int = 0) -> Workspace:
    """Write token shards of random ids, captions of 8 to 64, as `nano4m tokenize` would; return their workspace.

    classes: each sample is of one of so many, which gives four in five of its ids, so that there is something to learn.
    """
    dataset = DatasetFolder(root / "data" / "reference")
    for spec in specs:
        draw = generator(0, spec.modality)
        write_json(dataset.spec_path(spec.modality), spec.model_dump(mode="json"))
        for shard in range(-(-samples // SHARD)):
            rows = range(shard * SHARD, min((shard + 1) * SHARD, samples))
            if spec.kind == "sequence":
                lengths = draw.integers(min(8, spec.slots), spec.slots + 1, len(rows))
                ids = [np.append(draw.integers(1, spec.vocab_size, n - 1), spec.eos) for n in lengths]
            else:
                ids = draw.integers(0, spec.vocab_size, (len(rows), 1, spec.slots))
            if classes:
                own = generator(0, f"{spec.modality}/classes").integers(1, spec.vocab_size, (classes, spec.slots))
                own = own[bits(0, "class", np.asarray(rows)) % np.uint64(classes)]
                ids = [np.where((draw.random(row.shape) < 0.8) & (row != spec.eos), o[: row.shape[-1]], row)
                       for row, o in zip(ids, own, strict=True)]
            members = ((f"train-{i:08d}", {f"{spec.modality}.npy": npy(row.astype(spec.dtype))})
                       for i, row in zip(rows, ids, strict=True))
            write_shard(dataset.tokens(spec.modality, "train") / shard_name(shard), members)
    names = [s.modality for s in specs]
    write_json(dataset.info_path, {"name": "reference", "source": "bench", "options": {}, "version": 1, "modalities": names,
                                   "splits": {"train": samples}})
    return Workspace(root)


def reference_config(settings: Sequence[str] = ()) -> Config:
    """Return cfgs/5mod.yaml with dirichlet masks only, batch 16 and fp32, changed by "KEY=VALUE" settings."""
    budget = f"[{BUDGET[0]}, {BUDGET[1]}]"
    masks = f"masking.components=[{{type: dirichlet, alpha: 1.0, input: {budget}, target: {budget}}}]"
    return load_run_config(ROOT / "cfgs" / "5mod.yaml", [masks, "train.batch=16", "train.precision=fp32", "train.ema=0", *settings])


def forward_flops(width: int, encoder: int, decoder: int, shown: np.ndarray, asked: np.ndarray, asked_pairs: float, head: float):
    """Return the forward FLOPs of a batch: shown and asked are tokens per sample; asked_pairs the pairs of targets that decoder
    self-attention compares; head the sum over targets of how many ids each chooses among. Training takes three times that."""
    d, n, m = width, np.asarray(shown, dtype=np.float64), np.asarray(asked, dtype=np.float64)
    return float(
        encoder * (24 * d * d * n + 4 * d * n**2).sum() + (2 * d * d * n).sum()
        + decoder * ((28 * d * d * m + 4 * d * d * n + 4 * d * m * n).sum() + 4 * d * asked_pairs) + 2 * d * head
    )


def useful_flops(layout: Layout, batch, width: int, encoder: int, decoder: int) -> float:
    """Return the forward FLOPs that a packed batch asks for: no padding, targets compared within their modality, each choosing
    among its own ids."""
    runs = batch.dec_self.lengths.double()
    sizes = np.array(layout.sizes)[layout.group_C]
    return forward_flops(width, encoder, decoder, batch.enc.lengths.numpy(), batch.dec.lengths.numpy(), float((runs**2).sum()),
                         float(sizes[batch.dec_col.numpy()].sum()))

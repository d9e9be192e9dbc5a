"""Samples per second of one core from raw shards to token shards, and which share of it the tokenizer takes.

    python scripts/bench/tokenizing.py [DATASET] [--samples 500] [--rounds 5] [--json] [--quick]

Reading is a shard's bytes to raw values, encoding is the tokenizer alone, writing is ids to a shard on disk; the modalities take
turns. Medians over the rounds, with the lowest and highest. The last row is a pretrained codec: EnCodec 24 kHz in its published
size (weights drawn here: their values do not matter for time) on sounds of 5 s, a hundredth as many. Without a data set in the
workspace it is the only row.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _figures import document, figure

from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.data.shards import npy, shard_name, write_shard
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers._base import Tokenizer, open_tokenizer, save_tokenizer
from nano4m_cli.tokenizers._pretrained import quiet_transformers
from nano4m_cli.train.tokenizing import BATCH, make_tokenizer, read_raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.samples, args.rounds = 200, 3
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure and print."""
    rows: dict[str, tuple[DatasetFolder, Tokenizer, int]] = {}  # by modality: where, with what, samples per round
    dataset = Workspace.at().dataset(args.dataset) if args.dataset or Workspace.at().datasets() else None
    for m in dataset.tokenised() if dataset else []:
        if (dataset.tokenizer(m) / "tokenizer.json").is_file():
            rows[m] = (dataset, open_tokenizer(dataset.tokenizer(m)), args.samples)
    rows["codec"] = codec(folder, max(args.samples // 100, 2))
    seen: dict[str, list[tuple[float, float, float]]] = {m: [] for m in rows}
    for turn in range(args.rounds + 1):  # the first warms up
        for m, (where, tokenizer, count) in rows.items():
            total = where.info().splits["train"]
            times = one(where, tokenizer, [(turn * count + i) % total for i in range(count)])
            if turn:
                seen[m].append(times)
    figures = []
    for m, times in seen.items():
        rates, shares = [rows[m][2] / sum(r) for r in times], [r[1] / sum(r) for r in times]
        for name, unit, values in (("samples_per_s_per_core", "samples/s", rates), ("encode_share", "of the time", shares)):
            figures.append(figure(f"{m}_{name}", values, unit))
    if args.json:
        document("tokenizing", figures)
        return
    print(f"{dataset.name if dataset else 'no data set'}, one core")
    print(f"{'modality':10} {'tokenizer':10} {'samples/s':>9} {'spread':>13}   read  encode  write")
    for m, times in seen.items():
        rate = sorted(rows[m][2] / sum(r) for r in times)
        read, encode, write = (statistics.median(r[i] / sum(r) for r in times) for i in range(3))
        print(f"{m:10} {rows[m][1].name:10} {statistics.median(rate):9.4g} {rate[0]:6.4g}-{rate[-1]:<6.4g}   "
              f"{read:4.1%}   {encode:4.1%}  {write:4.1%}")


def codec(folder: Path, count: int) -> tuple[DatasetFolder, Tokenizer, int]:
    """Return a data set of `count` sounds of 5 s, EnCodec of the published size, and `count`."""
    ensure_torchaudio()
    import transformers

    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.EncodecModel(transformers.EncodecConfig())
        for name, buffer in model.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()  # fresh ones are all zero
        model.save_pretrained(folder / "encodec")
    dataset, audio = DatasetFolder(folder / "data" / "sounds"), MODALITIES.get("audio")
    draw = np.random.default_rng(0)
    sounds = (0.1 * draw.normal(size=5 * RATE).cumsum() % 1 - 0.5 for _ in range(count))
    members = ((f"s-{i:06d}", {audio.ext: audio.to_bytes(sound)}) for i, sound in enumerate(sounds))
    write_shard(dataset.raw("train") / shard_name(0), members)
    write_json(dataset.info_path, {"name": "sounds", "source": "bench", "options": {}, "version": 1, "modalities": ["audio"],
                                   "splits": {"train": count}, "sizes": {"audio": {"seconds": 5.0}}})
    with atomic_folder(dataset.tokenizer("audio")) as aside:
        save_tokenizer(make_tokenizer(dataset, "audio", "encodec", {"weights": str(folder / "encodec")}), aside)
    return dataset, open_tokenizer(dataset.tokenizer("audio")), count


def one(dataset: DatasetFolder, tokenizer: Tokenizer, index: list[int]) -> tuple[float, float, float]:
    """Return the seconds that reading, encoding and writing of samples took."""
    modality = tokenizer.modality
    a = time.perf_counter()
    raws = read_raw(dataset, "train", modality, index)
    b = time.perf_counter()
    ids = [i for at in range(0, len(raws), BATCH) for i in tokenizer.encode(raws[at : at + BATCH])]
    c = time.perf_counter()
    dtype = tokenizer.spec().dtype
    with tempfile.TemporaryDirectory() as folder:
        rows = ((f"s-{n:06d}", {f"{modality}.npy": npy(np.asarray(row).astype(dtype))}) for n, row in enumerate(ids))
        write_shard(Path(folder) / "shard-000000.tar", rows)
        d = time.perf_counter()
    return b - a, c - b, d - c


if __name__ == "__main__":
    main()

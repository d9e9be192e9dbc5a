"""The constants of this machine that a plan of a large run needs, for `scaling.py --constants FILE` and docs/SCALING.md.

    python scripts/bench/constants.py [--rounds 5] [--device cpu] [--json] [--quick] > constants.json

Everything is measured as training does it, on the reference configuration's made-up tokens (`_reference.py`), one thread a process:

    gemm_flops              best rate of a square product, fp32 on a CPU, bf16 on a GPU
    share_w256, share_w512  training FLOPs (formula) of whole steps of that width over it
    counted_over_formula    operations that torch counts in forward and backward over three times the formula's forward
    update_s_per_parameter  clipping, optimizer and setting gradients to none
    reduce_bytes_per_s      all-reduce of 64 MB between two processes (gloo on this machine; nccl where it has two GPUs), sent and
                            received bytes of a ring: 2 (N - 1) / N of the tensor's; `reduce_s` is that of four bytes
    save_bytes_per_s        a whole checkpoint: written, synced and hashed, in the working folder's file system
    hash_bytes_per_s        of which sha256 alone
    copy_bytes_per_s        of a checkpoint into host memory, which is all that train.save_async holds a step up for
    load_bytes_per_s        read, hashed, filled in
    bytes_per_parameter     of a checkpoint with weights and AdamW's moments (an average of weights adds 4)
    batch_samples_per_s     reading tokens, drawing masks and packing, one process
    start_s                 from the launch of `nano4m train` to the end of its first step, of a small model
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from _figures import figure, show
from _ranks import launch
from _reference import ROOT, make_tokens, reference_config, useful_flops
from gpu_step import gemm_peak as bf16_peak
from torch.utils.flop_counter import FlopCounterMode
from train_step import gemm_peak as fp32_peak

from nano4m_cli import dist
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.train import checkpoint
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.optim import clip_gradients
from nano4m_cli.train.run import prepare
from nano4m_cli.train.sharding import fill, fill_optimizers

BUCKET = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small models, two rounds: that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--reduce", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.reduce:
        reduce(args, Path(args.reduce))
        return
    if args.quick:
        args.rounds = 2
    with tempfile.TemporaryDirectory(dir=".") as folder:
        bench = Bench(make_tokens(Path(folder), 1024), args)
        show("constants", bench.figures(), args.json)


def timed(work: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    work(*args)
    return time.perf_counter() - begin


class Bench:
    def __init__(self, workspace: Workspace, args: argparse.Namespace):
        self.workspace, self.args, self.root = workspace, args, workspace.root
        self.widths = (64, 128) if args.quick else (256, 512)

    def trainer(self, width: int, settings: tuple[str, ...] = ()) -> Trainer:
        layers = 1 if self.args.quick else 4
        c = reference_config([f"model.size=d{layers}-{layers}w{width}", *settings,
                              *(["train.precision=bf16"] if self.args.device == "cuda" else [])])
        return Trainer(prepare(c, self.workspace).task, c.train, c.seed, None, device=self.args.device)

    def figures(self) -> list[dict]:
        """Return all figures; those that are rates of one thing are of the same round."""
        cuda, n = self.args.device == "cuda", range(self.args.rounds)
        product = 256 if self.args.quick else 8192 if cuda else 2048
        peaks = [bf16_peak("cuda", product) if cuda else fp32_peak(product) for _ in n]
        out = [figure("gemm_flops", peaks, "FLOP/s")]
        for width in self.widths:
            trainer = self.trainer(width)
            trainer._one_step(trainer.task.batch(0))
            rates = []
            for i in n:
                parts = trainer.task.batch(1 + i)
                peaks[i] = max(peaks[i], bf16_peak("cuda", product, 3) if cuda else fp32_peak(product, 2))
                rates.append(self.work(trainer, parts) / timed(trainer._one_step, parts))
            out.append(figure(f"share_w{width}", [r / p for r, p in zip(rates, peaks, strict=True)], "of gemm_flops"))
        out.append(figure("counted_over_formula", [self.counted(trainer, i) for i in n], "x"))
        out += self.update(trainer) + self.files(trainer)
        making = [timed(lambda first: [trainer.task.batch(s) for s in range(first, first + 4)], 100 + 4 * i) for i in n]
        out.append(figure("batch_samples_per_s", [4 * trainer.c.batch / s for s in making], "samples/s"))
        return out + self.reduced() + [figure("start_s", [self.start(i) for i in n], "s")]

    def work(self, trainer: Trainer, parts: list) -> float:
        """Return the training FLOPs of a batch by the formula."""
        m, layout = trainer.model.config, trainer.task.layout
        return 3 * sum(useful_flops(layout, p.packed, m.width, m.encoder_layers, m.decoder_layers) for p in parts)

    def counted(self, trainer: Trainer, step: int) -> float:
        parts = trainer.task.batch(step)
        work = self.work(trainer, parts)
        counter = FlopCounterMode(display=False)
        with counter:
            for part in parts:
                trainer.task.loss(part.to(trainer.device))[0].backward()
        trainer.model.zero_grad(set_to_none=True)
        return counter.get_total_flops() / work

    def update(self, trainer: Trainer) -> list[dict]:
        count, seconds = sum(p.numel() for p in trainer.model.parameters()), []
        for i in range(self.args.rounds):
            for part in trainer.task.batch(i):
                trainer.task.loss(part.to(trainer.device))[0].backward()

            def all_of_it() -> None:
                clip_gradients(trainer.model.parameters(), trainer.c.clip)
                for optimizer in trainer.optimizers:
                    optimizer.step()
                trainer.model.zero_grad(set_to_none=True)
                if self.args.device == "cuda":
                    torch.cuda.synchronize()

            seconds.append(timed(all_of_it) / count)
        return [figure("update_s_per_parameter", seconds, "s"), figure("parameters", [count], "")]

    def files(self, trainer: Trainer) -> list[dict]:
        """Return what writing, hashing, copying and reading the trainer's checkpoint take."""
        save, check, copy, load = [], [], [], []
        parts = {"model": dict(trainer.model.state_dict()), "optimizer": checkpoint.pack_optimizers(trainer.optimizers)}
        run = self.root / "run"

        def fill_in() -> None:
            point = checkpoint.Reader(checkpoint.latest(run))
            fill(point, "model", parts["model"])
            fill_optimizers(point, trainer.optimizers)

        for i in range(self.args.rounds):
            save.append(timed(checkpoint.save, run, i + 1, parts, {}, 1))
            check.append(timed(lambda: [checkpoint._sha256(p) for p in checkpoint.latest(run).glob("*.safetensors")]))
            copy.append(timed(lambda: [t.detach().to("cpu", copy=True) for part in parts.values() for t in part.values()]))
            load.append(timed(fill_in))
        path = checkpoint.latest(run)
        size = sum(p.stat().st_size for p in path.glob("*.safetensors"))
        count = sum(p.numel() for p in trainer.model.parameters())
        rows = (("save", save), ("hash", check), ("copy", copy), ("load", load))
        return [*(figure(f"{name}_bytes_per_s", [size / s for s in seconds], "bytes/s") for name, seconds in rows),
                figure("bytes_per_parameter", [size / count], "bytes")]

    def reduced(self) -> list[dict]:
        """Return what two processes take to add up tensors."""
        if self.args.device == "cuda" and torch.cuda.device_count() < 2:
            return []
        large, small = launch(2, "--reduce", self.root / "reduce.json")
        return [figure("reduce_bytes_per_s", [BUCKET / s for s in large], "bytes/s"), figure("reduce_s", small, "s")]

    def start(self, number: int) -> float:
        """Return seconds of `nano4m train` of one step, at the moment its first line is written."""
        config, device = ROOT / "cfgs" / "5mod.yaml", self.args.device
        command = [sys.executable, "-m", "nano4m_cli", "train", str(config), "--root", str(self.root), "--device", device,
                   f"name=start-{number}", "data.dataset=reference", "model.size=d1-1w64", "train.batch=2", "train.steps=100000",
                   "train.log_every=1"]
        begin = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        try:
            for line in process.stderr:
                if line.startswith("step "):
                    return time.perf_counter() - begin
            raise SystemExit("training did not begin")
        finally:
            process.kill()
            process.wait()


def reduce(args: argparse.Namespace, file: Path) -> None:
    """One of two processes: seconds of large and of small sums."""
    with dist.joined(args.device, 5.0) as device:
        sums = []
        for values in (BUCKET // 4, 1):
            tensor, seconds = torch.ones(values, device=device), []
            for _ in range(3 + (4 if args.quick else 20)):
                dist.barrier()
                seconds.append(max(dist.gathered(timed(lambda t: (td.all_reduce(t), t[:1].item()), tensor))))
            sums.append(seconds[3:])
        if dist.rank() == 0:
            file.write_text(json.dumps(sums))


if __name__ == "__main__":
    main()

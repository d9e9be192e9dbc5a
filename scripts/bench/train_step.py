"""Time of a training step: padded with one shared head, as the field computes it, against ours, on the same samples and masks.

    python scripts/bench/train_step.py [--rounds 5] [--threads 2] [--json] [--quick]

At the reference configuration (`_reference.py`), batch 16. The ladder goes from one to the other, one change a step:

    padded      `_padded.py`: padded to the largest budget, one 50,304-way head, plain AdamW.
    packed      our model and batch, still with one 50,304-way table and head, torch's attention on rows padded inside it.
    own heads   as packed, but each modality has its own ids.
    attention   as own heads, with the attention backend that our model chooses at this width.
    optimizer   as attention, with fused AdamW, and gradients touched only where they are clipped: this is ours. "ours bf16" is
                the same under autocast (where hardware has bf16).

They take turns on each batch; speed-ups are medians of the rounds' ratios. Useful tokens are those shown and asked, without
padding and registers. `gemm_share_fp32` is useful FLOPs (of training: three times the forward's) over the best rate of a
2048 x 2048 x 2048 product in the same round. Memory is the peak resident size of a process that makes two steps, less what it has
before the model, of padded over ours.
"""

import argparse
import contextlib
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _figures import figure, show
from _padded import VOCAB, Padded4M, PaddedBatch, pad, shared_ids
from _reference import BUDGET, make_tokens, reference_config, useful_flops
from torch import nn

from nano4m_cli.compute import multiplies_bf16
from nano4m_cli.data.loader import SampleOrder, TokenData
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import Mixture
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM
from nano4m_cli.spec import Layout
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.optim import build_optimizers, clip_gradients
from nano4m_cli.train.tasks import FourMTask, Part

QUICK = ["model.size=d1-1w64", "train.batch=2"]
LADDER = ("padded", "packed", "own heads", "attention", "optimizer")
OURS = LADDER[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a narrow model and two rounds: that it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--memory-of", choices=("padded", OURS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.rounds = 2
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), QUICK if args.quick else [])
        if args.memory_of:
            print(json.dumps(bench.peak_memory(args.memory_of)))
            return
        memory = {}
        for name in ("padded", OURS):
            command = [sys.executable, __file__, f"--threads={args.threads}", "--memory-of", name] + ["--quick"] * args.quick
            memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        show("train_step", bench.run(args.rounds, memory, 256 if args.quick else 2048), args.json)


def one_vocabulary(layout: Layout, size: int = VOCAB) -> Layout:
    """Return a layout whose modalities share one table of ids (as `_padded.shared_ids` gives them)."""
    one = copy.copy(layout)
    one.groups, one.vocab_start, one.group_C = [(0, 0, size)], np.array([0, size]), np.zeros_like(layout.group_C)
    return one


class Bench:
    """The data, and each setup made when it is first asked for."""

    def __init__(self, folder: Path, settings: list[str]):
        self.config = reference_config(settings)
        self.data = TokenData(make_tokens(folder, 512).dataset(), "train", self.config.data.modalities)
        self.layout = self.data.layout
        self.one = one_vocabulary(self.layout)
        self.mixture, self.order = Mixture(self.config.masking, self.layout), SampleOrder(len(self.data), self.config.seed)

    def batches(self, step: int) -> tuple[PaddedBatch, Part, Part]:
        """Return a step's samples and masks padded, packed with one vocabulary, and packed with own ones."""
        counter = np.arange(step * self.config.train.batch, (step + 1) * self.config.train.batch)
        ids, length = self.data.read(self.order.at(counter))
        shown, asked = self.mixture.draw(length, Key(self.config.seed, "mask", counter))
        answers = torch.from_numpy(np.add.reduceat(asked.sum(0), self.layout.start[:-1]).astype(np.float32))
        together, registers = shared_ids(self.layout, ids), self.config.model.registers
        return (pad(self.layout, together, shown, asked, BUDGET[1]),
                Part(pack(self.one, together, shown, asked, registers), answers),
                Part(pack(self.layout, ids, shown, asked, registers), answers))

    def setups(self, names: tuple[str, ...]) -> dict[str, Callable]:
        """Return for each name a training step (of `batches`), models and optimizers made."""
        c, made = self.config, {}
        if "padded" in names:
            m = c.model
            padded = Padded4M(self.layout, m.width, m.encoder_layers, m.decoder_layers, m.heads)
            made["padded"] = self._step(padded, plain_adamw(padded, c.train), lambda batch: padded.loss(batch[0]), None)
        if "packed" in names:
            model = FourM(c.model.model_copy(update={"attention": "sdpa"}), self.one)
            shared = FourMTask(c, self.data, None, model)
            made["packed"] = self._step(model, plain_adamw(model, c.train), lambda batch: shared.loss(batch[1])[0], None)
        if not set(names) - {"padded", "packed"}:
            return made
        ours = FourM(c.model, self.layout)  # the rest share the model: they differ in what is set before a step
        task = FourMTask(c, self.data, None, ours)
        plain, fused = plain_adamw(ours, c.train), build_optimizers(ours, c.train)
        for name, backend, optimizers, dtype in (
            ("own heads", "sdpa", plain, None), ("attention", "auto", plain, None), (OURS, "auto", fused, None),
            ("ours bf16", "auto", fused, torch.bfloat16),
        ):
            if name in names:
                clip = nn.utils.clip_grad_norm_ if optimizers is plain else clip_gradients
                made[name] = self._step(ours, optimizers, lambda batch: task.loss(batch[2])[0], dtype, backend, clip)
        return made

    def _step(self, model: nn.Module, optimizers: list, loss_of: Callable, dtype, backend: str | None = None,
              clip: Callable = nn.utils.clip_grad_norm_) -> Callable:
        def step(batch) -> float:
            for block in [*model.encoder, *model.decoder] if backend else []:
                for attention in (block.attn, getattr(block, "cross", None)):
                    if attention is not None:
                        attention.backend = backend
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                loss = loss_of(batch)
            loss.backward()
            clip(model.parameters(), self.config.train.clip)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)  # the next setup has the memory
            return loss.item()

        return step

    def run(self, rounds: int, memory: dict[str, float], product: int) -> list[dict]:
        """Return the figures of so many rounds, after one to warm up. product: size of the matrix product that is the peak."""
        bf16 = ("ours bf16",) if multiplies_bf16("cpu") else ()
        steps, m = self.setups(LADDER + bf16), self.config.model
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        tokens, flops, peak = [], [], []
        for turn in range(rounds + 1):
            batch = self.batches(turn)
            rate = gemm_peak(product)
            for name, step in steps.items():
                begin = time.perf_counter()
                step(batch)
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
            if turn:
                packed = batch[2].packed
                tokens.append(len(packed.dec_ids) + int((packed.enc_col >= 0).sum()))
                flops.append(3 * useful_flops(self.layout, packed, m.width, m.encoder_layers, m.decoder_layers))
                peak.append(max(rate, gemm_peak(product)))
        per = lambda top, bottom: [a / b for a, b in zip(top, bottom, strict=True)]  # noqa: E731
        base, ours = seconds["padded"], seconds[OURS]
        figures = [figure("fp32_speedup", per(base, ours), "x")]
        if bf16:
            figures.append(figure("bf16_speedup", per(base, seconds["ours bf16"]), "x"))
        figures += [
            figure("gemm_share_fp32", per(per(flops, ours), peak), "of peak"),
            figure("gemm_peak_fp32", [p / 1e9 for p in peak], "GFLOP/s"),
            figure("peak_memory_ratio", [memory[OURS] / memory["padded"]], "of padded"),
            *(figure(f"peak_memory_{name}", [gib], "GiB") for name, gib in (("padded", memory["padded"]), ("ours", memory[OURS]))),
            figure("useful_tokens_per_s", per(tokens, ours), "tokens/s"),
            figure("padded_useful_tokens_per_s", per(tokens, base), "tokens/s"),
            figure("useful_flops_per_sample", [f / 3e9 / self.config.train.batch for f in flops], "GFLOP, forward"),
        ]
        for before, name in zip(LADDER, LADDER[1:], strict=False):
            figures.append(figure(f"ladder_{name.replace(' ', '_')}", per(seconds[before], seconds[name]), "x the one before"))
        for name, values in seconds.items():
            figures.append(figure(f"step_{name.replace(' ', '_')}", values, "s"))
        return figures

    def peak_memory(self, name: str) -> float:
        """Return GiB that this process holds at the peak of two steps, over what it held before the model was made."""
        batches, before = [self.batches(i) for i in range(2)], resident()
        (step,) = self.setups((name,)).values()
        for batch in batches:
            step(batch)
        return resident() - before


def plain_adamw(model: nn.Module, c: TrainConfig) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay)]


def gemm_peak(size: int, tries: int = 5) -> float:
    """Return the best rate, in FLOP/s, of fp32 products of square matrices."""
    a, b = torch.randn(2, size, size)
    best = float("inf")
    for _ in range(tries):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def resident() -> float:
    """Return the largest resident size of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    main()

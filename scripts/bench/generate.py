"""Time of generation: sample by sample with everything computed anew at each step, as the field does it, against our sampler.

    python scripts/bench/generate.py [--rounds 3] [--batch 8] [--threads 2] [--json] [--quick]

196 picture slots from a caption of 64 tokens in 49 steps of the random order (roar), at size and modalities of the reference
configuration (`_reference.py`), with random weights: time does not depend on what is drawn. They take turns in one process:

    plain         as nano4M's `generate_one_modality_roar`: one sample at a time; at each step the encoder reads all that is known,
                  the decoder answers for the slots of that step, the head has all 50,304 ids of the one table.
    exact         `fill` in a batch of a bidirectional encoder, which must read everything anew at each step.
    incremental   the same with `refresh` beyond the last step: what is known is read once. A block-causal encoder does the same
                  computation, and exactly.
    * bf16        the same with `precision=bf16` (where hardware has it), against the plain way in fp32.

Seconds are per sample; speed-ups are medians of the rounds' ratios. exact_bound is the exact_speedup that there would be if
nothing but the exact mode's multiplications took time, all at the rate of one large product of the model (product_rate): of the
FLOPs of the plain way (plain_flops), exact_flops remain, because a bidirectional encoder reads all that is known at every step.
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from _figures import figure, show
from _padded import VOCAB, Padded4M
from _reference import SPECS, forward_flops, reference_config

from nano4m_cli.compute import multiplies_bf16
from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.generate.sampler import fill
from nano4m_cli.generate.schedules import counts
from nano4m_cli.generate.state import State
from nano4m_cli.model.fourm import FourM
from nano4m_cli.rng import generator
from nano4m_cli.spec import Layout

SOURCE, TARGET, STEPS = "caption", "rgb", 49


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a narrow model and one round: that it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.batch, "d1-1w64" if args.quick else "d6-6w512")
    show("generate", bench.run(1 if args.quick else args.rounds), args.json)


class Bench:
    """Both models, of random weights, and captions to begin with."""

    def __init__(self, batch: int, size: str):
        self.batch, self.layout = batch, Layout(SPECS)
        m = reference_config([f"model.size={size}"]).model
        torch.manual_seed(0)
        self.plain = Padded4M(self.layout, m.width, m.encoder_layers, m.decoder_layers, m.heads).eval()
        self.ours = FourM(m, self.layout).eval()
        self.captions = generator(0, "caption").integers(1, SPECS[-1].vocab_size, (batch, SPECS[-1].slots))

    def setups(self) -> dict[str, tuple[Callable, int]]:
        """Return for each name what makes samples, and how many."""
        made = {"plain": (self._plain, 1), "exact": (self._fill, self.batch),
                "incremental": (lambda turn: self._fill(turn, refresh=STEPS), self.batch)}
        if multiplies_bf16("cpu"):
            made["exact_bf16"] = (lambda turn: self._fill(turn, precision="bf16"), self.batch)
            made["incremental_bf16"] = (lambda turn: self._fill(turn, refresh=STEPS, precision="bf16"), self.batch)
        return made

    def _plain(self, turn: int) -> None:
        """Make one sample, as simply as it can be written."""
        own, other = self.layout.slice(TARGET), self.layout.slice(SOURCE)
        ids = torch.from_numpy(self.captions[turn % self.batch])[None]
        col = torch.arange(other.start, other.stop)[None]
        with torch.inference_mode():
            for now in (own.start + torch.randperm(own.stop - own.start)).tensor_split(STEPS):
                logits = self.plain(ids, col, now[None])[0]
                drawn = logits.softmax(-1).multinomial(1).T
                ids, col = torch.cat([ids, drawn], 1), torch.cat([col, now[None]], 1)

    def _fill(self, turn: int, **options) -> None:
        known = np.zeros((self.batch, self.layout.columns), dtype=bool)
        ids = np.zeros(known.shape, dtype=np.int64)
        known[:, self.layout.slice(SOURCE)], ids[:, self.layout.slice(SOURCE)] = True, self.captions
        state = State(ids, known, np.arange(self.batch))
        fill(self.ours, state, TARGET, GenerateOptions(steps=STEPS, temperature=1.0, guidance=1.0, seed=turn, **options))
        assert state.known_BC[:, self.layout.slice(TARGET)].all()

    def flops(self) -> tuple[float, float]:
        """Return the FLOPs of a sample, made plainly and exactly: the exact mode has a head of the target's ids, and folds the
        keys and values of cross-attention into its few queries (a register is one more token)."""
        c, target = self.ours.config, SPECS[self.layout.names.index(TARGET)]
        d, heads, (e, l) = c.width, c.heads, c.numbers[:2]
        plain = exact = 0.0
        done = 0
        for now in counts(target.slots, STEPS):
            n, m = SPECS[self.layout.names.index(SOURCE)].slots + done, now
            plain += forward_flops(d, e, l, n, m, m * m, m * VOCAB)
            n += c.registers
            exact += forward_flops(d, e, l, n, m, m * m, m * target.vocab_size)
            exact += l * (4 * d * d * m + 4 * heads * d * m * n - 4 * d * d * n - 4 * d * m * n)
            done += now
        return plain, exact

    def product_rate(self) -> float:
        """Return the FLOPs a second of the encoder's largest product, in a batch of the middle step."""
        x, w = torch.randn(self.batch * 160, self.ours.config.width), self.ours.encoder[0].mlp.fc1.weight
        with torch.inference_mode():
            best = math.inf
            for _ in range(20):
                begin = time.perf_counter()
                torch.nn.functional.linear(x, w)
                best = min(best, time.perf_counter() - begin)
        return 2 * x.numel() * len(w) / best

    def run(self, rounds: int) -> list[dict]:
        """Return the figures of so many rounds, after one to warm up."""
        setups = self.setups()
        plain, exact = self.flops()
        rates: list[float] = []
        seconds: dict[str, list[float]] = {name: [] for name in setups}
        for turn in range(rounds + 1):
            rates += [self.product_rate()] if turn else []
            for name, (make, samples) in setups.items():
                begin = time.perf_counter()
                make(turn)
                if turn:
                    seconds[name].append((time.perf_counter() - begin) / samples)
        base = seconds["plain"]
        return [
            *(figure(f"{name}_speedup", [a / b for a, b in zip(base, own, strict=True)], "x")
              for name, own in seconds.items() if name != "plain"),
            figure("exact_bound", [a * rate / exact for a, rate in zip(base, rates, strict=True)], "x"),
            *(figure(f"{name}_sample", own, "s") for name, own in seconds.items()),
            figure("product_rate", [r / 1e9 for r in rates], "GFLOP/s"),
            figure("plain_flops", [plain / 1e9], "GFLOP"),
            figure("exact_flops", [exact / 1e9], "GFLOP"),
        ]


if __name__ == "__main__":
    main()

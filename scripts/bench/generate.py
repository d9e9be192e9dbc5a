"""Time of generation: sample by sample with everything computed anew at each step, as the field does it, against our sampler.

    python scripts/bench/generate.py [--rounds 3] [--batch 8] [--threads 2] [--json] [--quick]

196 picture slots from a caption of 64 tokens in 49 steps of the random order (roar), at size and modalities of the reference
configuration (`_reference.py`), with random weights: time does not depend on what is drawn. They take turns in one process:

    plain         as nano4M's `generate_one_modality_roar`: one sample at a time; at each step the encoder reads all that is known,
                  the decoder answers for the slots of that step, the head has all 50,304 ids of the one table.
    exact         `fill` in a batch of a bidirectional encoder, which must read everything anew at each step.
    incremental   the same with `refresh` beyond the last step: what is known is read once. A block-causal encoder does the same
                  computation, and exactly.
    * bf16        the same under autocast (where hardware has it).

Seconds are per sample; speed-ups are medians of the rounds' ratios.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from _figures import figure, show
from _padded import Padded4M
from _reference import SPECS, reference_config

from nano4m_cli.compute import multiplies_bf16
from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.generate.sampler import fill
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
            for name, (make, samples) in [(n, made[n]) for n in ("exact", "incremental")]:
                made[f"{name}_bf16"] = (lambda turn, make=make: self._bf16(make, turn), samples)
        return made

    def _bf16(self, make: Callable, turn: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            make(turn)

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

    def run(self, rounds: int) -> list[dict]:
        """Return the figures of so many rounds, after one to warm up."""
        setups = self.setups()
        seconds: dict[str, list[float]] = {name: [] for name in setups}
        for turn in range(rounds + 1):
            for name, (make, samples) in setups.items():
                begin = time.perf_counter()
                make(turn)
                if turn:
                    seconds[name].append((time.perf_counter() - begin) / samples)
        base = seconds["plain"]
        return [
            *(figure(f"{name}_speedup", [a / b for a, b in zip(base, own, strict=True)], "x")
              for name, own in seconds.items() if name != "plain"),
            *(figure(f"{name}_sample", own, "s") for name, own in seconds.items()),
        ]


if __name__ == "__main__":
    main()

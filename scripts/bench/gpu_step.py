"""Training steps of the reference configuration on one GPU: tokens per second, share of the GPU's own matrix products, memory.

    python scripts/bench/gpu_step.py [--batches 64 256] [--steps 20] [--device cuda] [--compile] [--json] [--quick]

As training runs them (`train.loop`): bf16 autocast, fused AdamW, batches made ahead by `--workers` processes and copied from pinned
memory. `mfu` is useful FLOPs (three times the forward's, no padding; `_reference.py`) over the best rate of an 8192 x 8192 x 8192
bf16 product in this process. `run_minutes` is what 18,311 steps of 64 samples (nano4M-Audio's whole training; 70 minutes on an H100
there) take at the samples per second reached with that batch. Times are of whole steps, batches and copies included, after warm-up.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _figures import figure, show
from _reference import make_tokens, reference_config, useful_flops

from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

RUN = 18311 * 64  # samples
WARM = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="train.compile=true")
    parser.add_argument("--quick", action="store_true", help="a narrow model, small batch, few steps, no workers: that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    settings = [f"train.compile={str(args.compile).lower()}", f"train.workers={0 if args.quick else args.workers}"]
    if args.quick:
        args.batches, args.steps, settings = [4], 3, [*settings, "model.size=d1-1w64"]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --quick shows that it runs")
    with tempfile.TemporaryDirectory() as folder:
        workspace, figures = make_tokens(Path(folder), 4096), []
        peak = gemm_peak(args.device, 256 if args.quick else 8192)
        figures.append(figure("gemm_peak_bf16", [peak / 1e12], "TFLOP/s"))
        for batch in args.batches:
            figures += measure(workspace, batch, args.steps, args.device, settings, peak)
    show("gpu_step", figures, args.json)


def measure(workspace, batch: int, steps: int, device: str, settings: list[str], peak: float) -> list[dict]:
    """Return the figures of one batch size."""
    config = reference_config([*settings, f"train.batch={batch}", "train.precision=bf16", f"train.steps={WARM + steps}"])
    trainer = Trainer(prepare(config, workspace).task, config.train, config.seed, None, device=device)
    m, layout = config.model, trainer.task.layout
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, tokens, work = [], [], []
    feed, begin = trainer._loader(), time.perf_counter()
    for i, parts in enumerate(feed):
        trainer._one_step(parts)  # ends by reading the loss, so all of it is done
        now = time.perf_counter()
        if i >= WARM:
            packed = [p.packed.to("cpu") for p in parts]
            tokens.append(sum(len(p.dec_ids) + int((p.enc_col >= 0).sum()) for p in packed))
            work.append(3 * sum(useful_flops(layout, p, m.width, m.encoder_layers, m.decoder_layers) for p in packed))
            seconds.append(now - begin)
        begin = time.perf_counter()
    feed.close()
    per = lambda x: [a / s for a, s in zip(x, seconds, strict=True)]  # noqa: E731
    out = [
        figure(f"b{batch}_tokens_per_s", per(tokens), "tokens/s"),
        figure(f"b{batch}_mfu", [w / peak for w in per(work)], "of peak"),
        figure(f"b{batch}_step", seconds, "s"), figure(f"b{batch}_run_minutes", [RUN / batch * s / 60 for s in seconds], "min"),
    ]
    if device == "cuda":
        out.append(figure(f"b{batch}_peak_memory", [torch.cuda.max_memory_allocated() / 2**30], "GiB"))
    return out


def gemm_peak(device: str, size: int, tries: int = 10) -> float:
    """Return the best rate, in FLOP/s, of bf16 products of square matrices."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(tries):
        wait()
        begin = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()

"""Samples per second, and the share of time spent waiting, when training's loader reads shards from a web server.

    python scripts/bench/streaming.py [--latency 50] [--bandwidth 10] [--rounds 5] [--json] [--quick]

Five modalities of the reference configuration (`_reference.py`), in shards of 256 samples. The server, a process of its own,
answers each request after `--latency` ms and sends at most `--bandwidth` MB/s per connection, as a store far away does. One and two
ranks (processes with one thread, of one node: they share a cache) make an epoch's batches of 64, without loader processes:
`local`: from memory-mapped shards; `cold`: from the server into an empty cache; `warm`: the same with all in the cache. The ranks'
samples per second are of all together. For `..._wait_share` a step computes (sleeps) for `--step` ms once its batch is there, as
training does, so that shards come meanwhile: the part of the epoch after its first batch that is not computing, making the batches
included. `..._first_batch_s` is the wait for that first one, `cold_..._mb_per_s` what came over the wire. A first round warms up.
"""

from __future__ import annotations

import argparse
import http.server
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import _reference
import torch
from _figures import figure, show
from _reference import SPECS, make_tokens, reference_config

from nano4m_cli.data import stream
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.model.fourm import FourM
from nano4m_cli.train.tasks import FourMTask

BATCH, SHARD, BLOCK = 64, 256, 1 << 16
FORK = multiprocessing.get_context("fork")
NAMES = [s.modality for s in SPECS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--latency", type=float, default=50.0, help="ms before each answer")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="MB/s of each connection")
    parser.add_argument("--step", type=float, default=50.0, help="ms that a step computes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few samples, one round, a server that is near")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.rounds, args.latency, args.bandwidth, args.step = 1024, 1, 1.0, 100.0, 5.0
    with tempfile.TemporaryDirectory() as folder:
        show("streaming", run(Path(folder), args), args.json)


def run(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Return the figures; ways and numbers of ranks take turns."""
    torch.set_num_threads(1)
    _reference.SHARD = SHARD
    origin = make_tokens(folder / "origin", args.samples).dataset()
    stream.publish(origin, NAMES)
    port = FORK.Value("i", 0)
    server = FORK.Process(target=serve, args=(origin.path, args.latency / 1e3, args.bandwidth * 1e6, port), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    (folder / "far").mkdir()
    far = stream.open_remote(f"http://127.0.0.1:{port.value}", Workspace(folder / "far"))
    wire = sum(p.stat().st_size for p in origin.path.glob("tokens/*/train/*.tar")) / 1e6
    figures: dict[str, tuple[list[float], str]] = {}

    def note(name: str, value: float, unit: str) -> None:
        figures.setdefault(name, ([], unit))[0].append(value)

    for turn in range(args.rounds + 1):
        for ranks in (1, 2):
            for pace, what in ((0.0, "samples_per_s"), (args.step / 1e3, "wait_share"))[: 2 if turn else 1]:
                cache = folder / f"cache-{turn}-{ranks}-{what}"
                for way, dataset in (("local", origin), ("cold", far), ("warm", far)):
                    seconds, waited, first = epoch(dataset, cache, ranks, pace, args.samples)
                    if not turn:
                        continue
                    if pace:
                        note(f"{way}_{ranks}_wait_share", waited / (seconds - first), "of the time after")
                        note(f"{way}_{ranks}_first_batch_s", first, "s")
                    else:
                        note(f"{way}_{ranks}_samples_per_s", args.samples // BATCH * BATCH / seconds, "samples/s")
                    if way == "cold" and not pace:
                        note(f"cold_{ranks}_mb_per_s", wire / seconds, "MB/s")
                shutil.rmtree(cache)
    server.terminate()
    return [figure(name, values, unit) for name, (values, unit) in figures.items()]


def epoch(dataset: DatasetFolder, cache: Path, ranks: int, pace: float, samples: int) -> tuple[float, ...]:
    """Return the seconds of an epoch's steps, those after the first batch that were not computing, and those before it."""
    gate, out = FORK.Barrier(ranks), FORK.Queue()
    jobs = [FORK.Process(target=_rank, args=(dataset, cache, r, ranks, pace, samples // BATCH, gate, out)) for r in range(ranks)]
    for job in jobs:
        job.start()
    found = [out.get(timeout=240) for _ in jobs]
    for job in jobs:
        job.join()
    return tuple(map(max, zip(*found, strict=True)))  # of the rank that waited longest


def _rank(dataset, cache, rank, ranks, pace, steps, gate, out) -> None:
    config = reference_config(["model.size=d1-1w64", f"train.batch={BATCH}", f"train.steps={steps}", "data.lanes=2"])
    data = TokenData(dataset, "train", NAMES, cache=stream.cache_of(dataset, str(cache)))
    task = FourMTask(config, data, None, FourM(config.model, data.layout), rank, ranks)
    gate.wait()
    begin, waits = time.perf_counter(), []
    for step in range(steps):
        asked = time.perf_counter()
        task.batch(step)
        gate.wait()  # as ranks wait for each other's gradients
        waits.append(time.perf_counter() - asked)
        time.sleep(pace)
    out.put((time.perf_counter() - begin, sum(waits[1:]), waits[0]))


def serve(folder: Path, latency: float, bandwidth: float, port) -> None:
    """Serve a folder, slowly."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            time.sleep(latency)
            due = time.perf_counter()
            while block := source.read(BLOCK):
                outputfile.write(block)
                due += len(block) / bandwidth
                time.sleep(max(0.0, due - time.perf_counter()))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


if __name__ == "__main__":
    main()

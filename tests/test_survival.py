"""Processes killed at any instant under torchrun (signals: test_train; jobs: test_slurm); arithmetic of the scaling bench."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
BENCH = REPO / "scripts" / "bench"


@pytest.mark.slow
def test_three_kills_of_two_processes_leave_no_trace():
    """The bench itself refuses weights or records that differ; one of its kills is of all processes while two train together."""
    command = [sys.executable, BENCH / "kills.py", "--quick", "--processes", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = {f["name"]: f for f in json.loads(done.stdout)["figures"]}
    assert figures["kills"]["value"] == 3 and figures["identical"]["value"] == 1
    assert done.stderr.count("kill ") == 3
    assert 0 <= figures["steps_lost"]["high"] < 120


LEAVER = """
import os, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as td
from nano4m_cli import __main__ as cli

def app(prog_name):
    td.init_process_group("gloo", timeout=timedelta(seconds=60))
    td.barrier()
    if os.environ["RANK"] == "0":
        for _ in range(4):
            td.all_reduce(torch.ones(9), async_op=True).get_future().then(lambda future: future.value()[0])
        raise SystemExit(3)
    time.sleep(0.05)  # the other is on its way out
    for _ in range(4):
        td.all_reduce(torch.ones(9), async_op=True)
    time.sleep(1)

cli.app = app
cli.main()
os._exit(0)
"""


def test_a_rank_that_leaves_while_others_still_send_keeps_its_exit_code(tmp_path):
    """Taking Python down with a collective on its way is SIGABRT nearly every time."""
    from test_dist import environment, port

    at = port()
    ranks = [subprocess.Popen([sys.executable, "-c", LEAVER], env=environment(r, 2, at), stderr=subprocess.PIPE, text=True)
             for r in range(2)]
    told = [p.communicate(timeout=120)[1] for p in ranks]
    assert ranks[0].returncode == 3 and "terminate called" not in told[0], told


def test_the_scaling_bench_counts_right():
    """Shards: no overlap, no omission. Cost: the formula. Failures: Young's interval is near the best."""
    sys.path.insert(0, str(BENCH))
    try:
        import scaling
    finally:
        sys.path.remove(str(BENCH))
    found = scaling.assignment(20_011, 32)
    assert found["in_two_workers"] == found["in_none"] == 0
    assert found["most"] - found["fewest"] <= 1 and found["fetched_per_shard"] < 1.2
    assert scaling.forward_flops(1, 2, 1, 1) == 24 * 4 + 4 * 2 + 2 * 4 + 28 * 4 + 4 * 4 + 4 * 2 + 4 * 2 + 2 * 2 * scaling.VOCABULARY
    one, many = (scaling.cost(24, 1536, g) for g in (1, 256))
    assert one["efficiency"] == 1 and 0.3 < many["efficiency"] <= 1
    assert many["loader_MB_per_s"] == pytest.approx(256 * many["efficiency"] * one["loader_MB_per_s"])
    # Ten million fp32 parameters on two ranks: 40 MB go through each link, half of them twice.
    assert scaling.together(1.0, 10e6, 2, 80e6, hidden=0.0) == pytest.approx(1.5)
    assert scaling.together(1.0, 10e6, 2, 80e6, hidden=0.3, latency=0.1) == pytest.approx(1.3)
    assert scaling.together(1.0, 10e6, 2, 80e6, hidden=0.9) == scaling.together(1.0, 10e6, 1, 80e6, hidden=0.0) == 1.0
    save, mtbf = 10.0, 36_000.0
    at = {f: scaling.lost_share(f * scaling.young(save, mtbf), save, 0.0, mtbf, 4000) for f in (0.1, 1.0, 10.0)}
    assert at[1.0] < at[0.1] and at[1.0] < at[10.0]
    assert at[1.0] == pytest.approx((2 * save / mtbf) ** 0.5, rel=0.2), "to first order"


@pytest.mark.slow
def test_constants_of_a_machine_go_into_the_plan(tmp_path):
    """What constants.py and ddp.py write is what scaling.py reads, and the check of the arithmetic is of those figures."""
    def bench(name, *args):
        command = [sys.executable, BENCH / name, "--quick", *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    for name in ("constants", "ddp"):
        (tmp_path / f"{name}.json").write_text(bench(f"{name}.py", "--json"))
    found = {f["name"]: f["value"] for f in json.loads((tmp_path / "constants.json").read_text())["figures"]}
    assert found["bytes_per_parameter"] == pytest.approx(12, abs=0.01) and all(v > 0 for v in found.values())
    assert 0.9 < found["counted_over_formula"] < 1.3
    said = bench("scaling.py", "--constants", "constants.json", "--check", "ddp.json")
    size, check = said.split("\n\n")[:2]
    seconds = [float(line.split("|")[-2]) for line in size.splitlines()[2:]]
    assert min(seconds) > found["start_s"]
    row = [c.strip() for c in check.splitlines()[2].split("|")]
    assert row[1] == "ddp" and float(row[6]) <= float(row[5]) <= 1  # none hidden, all hidden

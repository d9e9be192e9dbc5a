"""Groups of processes that evaluate: tests/dist_worker.py with small chunks and with what may go wrong on a rank.

    python tests/shared_worker.py ROOT GROUPS.json

A group as there, with "command"; and "breaks": {"rank", "how"}: what happens to that rank in the probe `loss`. Or {"ranks",
"port", "name", "check": true}: sharing by itself, against plain loops; an assertion that fails is the rank's exit code 1.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import dist_worker

from nano4m_cli import dist
from nano4m_cli.errors import DataError, UsageError
from nano4m_cli.generate import likelihood
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.probes import _features, _gallery, _pieces
from nano4m_cli.registry import PROBES

loss, attention, retrieval = (importlib.import_module(f"nano4m_cli.probes.{n}") for n in ("loss", "attention", "retrieval"))
CHUNK = 3  # of eight samples, so that there is something to share


def broken(how: str) -> None:
    """Let something go wrong in this process: in a piece of shared work, or on the way to it."""
    def fail(*args, **more):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError(f"this went wrong {how}", "try again")

    if how == "in a piece":
        likelihood.pack = fail
    elif how == "in the end":
        loss._plots = fail
    else:
        loss.marginal_nll = fail


def check() -> None:
    """Share work of every kind, and compare with plain loops."""
    with dist.joined("cpu", 2.0):
        rank, ranks, told = dist.rank(), dist.ranks(), []
        assert (rank, ranks) == (int(os.environ["RANK"]), 3)

        def work(i: int) -> dict:
            assert (dist.rank(), dist.ranks()) == (0, 1), "alone with its piece"
            with dist.together():  # says nothing to anyone
                inside = dist.spread(range(i), lambda k: k * k)  # a plain loop
            told.append(i)
            return {"squares": inside, "array": np.full(i, float(i)), "text": None if i % 2 else "x" * i}

        for n in (0, 1, 2, 3, 10):
            for costs in (None, [float(n - i) for i in range(n)]):
                told.clear()
                found = dist.spread(range(n), work, costs)
                want = [{"squares": [k * k for k in range(i)], "array": [i] * i, "text": None if i % 2 else "x" * i}
                        for i in range(n)]
                assert [f | {"array": f["array"].tolist()} for f in found] == want
                assert [sorted(t) for t in dist.gathered(list(told))] == dist.dealt(costs or [1.0] * n, 3)
                assert (dist.rank(), dist.ranks()) == (rank, 3)
        works = [dist.Work([lambda k=k: k for k in range(n)], sum, [1.0] * n) for n in (5, 0, 1, 4)]
        assert dist.answers(works) == [10, 0, 0, 6]
        seen = []
        dist.spread(range(7), lambda i: None, None, lambda done, total: seen.append((done, total)))
        assert seen[0] == (0, 7) and all(t == 7 for _, t in seen) and len(seen) == len(dist.dealt([1.0] * 7, 3)[rank])
        assert dist.by_first(lambda: f"of rank {dist.rank()}") == "of rank 0"

        def unless(bad: tuple[int, ...]):
            def one(i: int) -> int:
                if i in bad:
                    raise UsageError(f"item {i}", "none such")
                return i
            return one

        def fails(what) -> tuple[str, bool]:
            try:
                what()
            except (UsageError, DataError) as err:
                assert err.hint == "none such"
                return err.message, err.said
            raise AssertionError("no error")

        # The first rank that has one tells it; items 1 and 4 are rank 1's, 2 and 5 rank 2's.
        assert fails(lambda: dist.spread(range(6), unless((4,)))) == ("item 4", rank != 1)
        assert fails(lambda: dist.spread(range(6), unless((1, 2, 5)))) == ("item 1", rank != 1)

        def outside() -> None:
            with dist.together():
                with dist.together():
                    if rank == 2:
                        raise DataError("on the way", "none such")
                    dist.spread(range(6), unless(()))  # where the others hear of it
                dist.spread(range(6), unless(()))

        assert fails(outside) == ("on the way", rank != 2)
        assert fails(lambda: dist.by_first(lambda: unless((0,))(0))) == ("item 0", rank != 0)
        try:
            dist.spread(range(2 * (rank == 1)), unless(()))
        except AssertionError as err:
            assert "ranks share different work: [0, 2, 0] items" in str(err)
        else:
            raise SystemExit("it was not noticed")
        assert dist.spread(range(4), unless(())) == [0, 1, 2, 3], "and all go on together"


def member(root: Path, group: dict) -> int:
    likelihood.CHUNK = _pieces.CHUNK = _gallery.CHUNK = _features.BATCH = attention.BATCH = CHUNK
    if "check" in group:
        check()
        return 0
    if group.get("breaks", {}).get("rank") == int(os.environ["RANK"]):
        broken(group["breaks"]["how"])
    return dist_worker.member(root, group)


if __name__ == "__main__":
    ensure_torchaudio()
    import torchmetrics.functional.image  # noqa: F401 - once, not by every rank

    for name in PROBES.names():
        PROBES.get(name)
    dist_worker.main(member)

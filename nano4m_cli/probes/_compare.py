"""Compare runs by their results: sample by sample where two asked the same questions, and over runs that share a config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError, UsageError
from nano4m_cli.probes._comparison import About, Comparison, Figure, Found, Pair, Spread, about, results
from nano4m_cli.probes._result import Metric
from nano4m_cli.probes._significance import holm
from nano4m_cli.probes._statistics import paired
from nano4m_cli.registry import PROBES
from nano4m_cli.train import checkpoint

LEVEL = 0.05
# Probes whose figures are per token, or shares of tokens: they compare only where ids mean the same.
PER_TOKEN = ("loss", "fusion", "calibration", "forward_vs_ar", "memorization")
TOKENS = ("token_acc",)  # figures of other probes that are
DESCRIBING = ("fusion", "attention", "geometry")  # neither good nor bad: a model may gain much as it knows little without


def compare(workspace: Workspace, names: Sequence[str], probes: Sequence[str] = ()) -> tuple[Comparison, Path]:
    """Compare runs with the first of them, and groups of runs that differ in their seed only; write compare.json.

    Nothing is evaluated here: results that are missing are errors that say how to make them. Results of different data, splits,
    samples or seeds are refused.

    Args:
        probes: only these (default: all that two runs have results of).
    """
    if len(names) < 2:
        known = ", ".join(p.name for p in workspace.runs())
        raise UsageError("a comparison needs two runs at least", f"nano4m eval --compare RUN_A RUN_B; known: {known}")
    for name in probes:
        PROBES.get(name)
    paths = [workspace.run(n) for n in names]
    found = [results(path, probes) for path in paths]
    runs = about(paths)
    first = next(iter(found[0].values()))
    notes, pairs = _budget(runs), []
    for path, mine in zip(paths, found, strict=True):
        newest = checkpoint.latest(path).name
        stale = sorted(p for p, f in mine.items() if f.result.checkpoint != newest)
        if stale:
            notes.append(f"results of {path.name} ({', '.join(stale)}) are of an earlier checkpoint than its newest, {newest}")
    for path, other in zip(paths[1:], found[1:], strict=True):
        pairs.append(_pair(paths[0].name, path.name, found[0], other))
    pairs = _corrected(pairs, paths[0].name)
    groups, spreads = _groups(runs, found)
    made = Comparison(
        data=first.result.data, split=first.result.split, samples=first.about["samples"], base=paths[0].name, runs=runs,
        pairs=pairs, groups=groups, spreads=spreads, notes=[
            *notes,
            "difference: other less base, 95 % bootstrap interval over the same samples; effect: Cohen's d of paired samples; p: "
            f"paired t-test; p_holm: corrected for all {sum(f.p is not None for p in pairs for f in p.figures)} tests (Holm 1979)",
            "the test is over samples of the data, with these very weights: it does not say that training again would give the "
            "same difference; several seeds do (groups: runs that differ in their seed only)",
        ],
    )
    out = workspace.root / "runs" / _folder([p.name for p in paths]) / "compare.json"
    write_json(out, made.model_dump(mode="json"))
    return made, out


def _folder(names: list[str]) -> str:
    if len(names) <= 3:
        return "compare-" + "-vs-".join(names)
    return f"compare-{names[0]}-vs-{names[1]}-and-{len(names) - 2}-more-{hashlib.sha256('/'.join(names).encode()).hexdigest()[:8]}"


def _budget(runs: Sequence[About]) -> list[str]:
    """Return what a reader must know of runs that were not given the same."""
    notes = []
    for what, unit in (("samples_seen", "samples seen in training"), ("parameters", "parameters")):
        values = [getattr(r, what) for r in runs]
        if len(set(values)) > 1:
            notes.append(f"not at equal {unit}: " + ", ".join(f"{r.run} {v:,}" for r, v in zip(runs, values, strict=True)))
    return notes


# -- comparing --------------------------------------------------------------------------------------------------------


def _pair(base: str, name: str, mine: dict[str, Found], theirs: dict[str, Found]) -> Pair:
    figures, left_out = [], {}
    for probe in dict.fromkeys([*mine, *theirs]):
        if probe not in mine or probe not in theirs:
            left_out[probe] = f"'{base if probe in theirs else name}' has no results of it"
            continue
        a, b = mine[probe], theirs[probe]
        _same(base, name, probe, a, b)
        if a.result.version != b.result.version:
            left_out[probe] = f"version {a.result.version} and {b.result.version} of the probe measure different things"
            continue
        ours, others = a.metrics(), b.metrics()
        for metric in dict.fromkeys([*ours, *others]):
            what = f"{probe}: {metric}"
            if metric not in ours or metric not in others:
                left_out[what] = f"not measured of '{base if metric in others else name}'"
            elif reason := _other_question(a, b, probe, metric):
                left_out[what] = reason
            else:
                figures.append(_figure(probe, ours[metric], others[metric], a.pair(metric), b.pair(metric)))
    if not figures:
        raise DataError(f"runs '{base}' and '{name}' share no figure", "evaluate both with the same probes: nano4m eval --run RUN")
    return Pair(run=name, figures=figures, left_out=left_out)


def _same(base: str, name: str, probe: str, a: Found, b: Found) -> None:
    """Raise DataError unless two results are of the same samples, asked with the same seed."""
    def refuse(what: str, mine: Any, theirs: Any, hint: str) -> None:
        if mine != theirs:
            raise DataError(f"probe '{probe}' of runs '{base}' and '{name}' is of different {what}: {mine} and {theirs}", hint)

    refuse("data", a.result.data, b.result.data, "runs compare on the same held-out samples only")
    refuse("data", *(f"'{x.result.data}' made as {x.about['made']}" for x in (a, b)), "evaluate both on the data set as it is now")
    refuse("splits", a.result.split, b.result.split, "evaluate both with the same --split")
    refuse("samples", *(f"the first {x.about['samples']}" for x in (a, b)), "evaluate both with the same --limit")
    refuse("samples", *(f"keys {x.about['keys']}" for x in (a, b)), "evaluate both on the data set as it is now")
    refuse("seeds", *(x.about["seed"] for x in (a, b)), "masks and draws follow the seed: evaluate both with the same")


def _other_question(a: Found, b: Found, probe: str, metric: str) -> str | None:
    """Return why a figure of two runs does not compare, or None."""
    target = metric.rpartition("/")[0].rpartition("->")[2]
    ids = [x.about.get("tokens", {}).get(target) for x in (a, b)]
    if (probe in PER_TOKEN or metric.rpartition("/")[2] in TOKENS) and ids[0] != ids[1]:
        return f"tokens of {target} are of different tokenizers"
    x, y = a.pair(metric), b.pair(metric)
    if x and y and not (x[1].shape == y[1].shape and np.allclose(x[1], y[1])):
        return "asked of other slots or samples (masks follow each run's own masking)"
    return None


def _figure(probe: str, a: Metric, b: Metric, x: tuple | None, y: tuple | None) -> Figure:
    more: dict[str, Any] = {"n": min(a.n, b.n)}
    tested = paired(x, y) if x and y else None
    if tested:
        more = {"n": tested.n, "ci95": tested.ci95, "effect": tested.effect, "p": tested.p}
    return Figure(
        probe=probe, name=a.name, unit=a.unit, higher_is_better=a.higher_is_better, base=a.value, other=b.value,
        difference=tested.value if tested else b.value - a.value, trained=(a.in_distribution, b.in_distribution), **more,
    )


def _corrected(pairs: list[Pair], base: str) -> list[Pair]:
    """Return the pairs with p-values corrected over all of them."""
    flat = [f for p in pairs for f in p.figures if f.p is not None]
    corrected = dict(zip(map(id, flat), holm(np.array([f.p for f in flat])).tolist(), strict=True))

    def judged(run: str, f: Figure) -> Figure:
        if f.p is None:
            return f
        p = corrected[id(f)]
        better = run if (f.difference > 0) == f.higher_is_better else base
        told = p < LEVEL and f.probe not in DESCRIBING
        return f.model_copy(update={"p_holm": p, "differs": p < LEVEL, "verdict": better if told else None})

    return [p.model_copy(update={"figures": [judged(p.run, f) for f in p.figures]}) for p in pairs]


def _groups(runs: Sequence[About], found: Sequence[dict[str, Found]]) -> tuple[list[list[str]], list[Spread]]:
    """Return the runs grouped by their settings but for the seed, and, where some differ in it, every figure's mean and spread."""
    keys = [json.dumps(r.settings, sort_keys=True) for r in runs]
    kinds = list(dict.fromkeys(keys))
    together = [[r for r, k in zip(runs, keys, strict=True) if k == kind] for kind in kinds]
    groups = [[r.run for r in group] for group in together]
    if all(len({r.seed for r in group}) == 1 for group in together):
        return groups, []
    spreads = []
    metrics = [{(p, m.name): m for p, f in mine.items() for m in f.metrics().values()} for mine in found]
    for key in dict.fromkeys(k for m in metrics for k in m):
        values = [[m[key].value for m, k in zip(metrics, keys, strict=True) if k == kind and key in m] for kind in kinds]
        some = next(m[key] for m in metrics if key in m)
        spreads.append(Spread(
            probe=key[0], name=key[1], unit=some.unit, runs=[len(v) for v in values],
            mean=[float(np.mean(v)) if v else None for v in values],
            std=[float(np.std(v, ddof=1)) if len(v) > 1 else None for v in values],
        ))
    return groups, spreads

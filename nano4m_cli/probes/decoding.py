"""What the choices of generation cost and bring: schemes, steps, temperature, guidance; and the gain of best of n."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError, UnknownNameError, UsageError
from nano4m_cli.generate import best
from nano4m_cli.generate.options import STRONGEST, GenerateOptions, Scheme
from nano4m_cli.generate.sampler import State, chains
from nano4m_cli.generate.schedules import counts
from nano4m_cli.generate.state import Stage
from nano4m_cli.masking._mixture import IN_DISTRIBUTION
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._judges import JUDGED, Judge, open_judge
from nano4m_cli.probes._result import Findings, Metric, mean_metric

KIND = "eval"
ONE_CALL = ("onepass", "mean")  # schemes to which steps do not matter, as to ar, which takes one per slot
Count, Heat = Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0, le=STRONGEST)]


class Probe(Base):
    costly = True
    alone = "it measures the seconds that generation takes"

    class Options(Config):
        """direction: "caption->rgb", "audio+caption->rgb"; default: what training posed most often to a judged target.

        schemes, steps, temperatures, guidance: all of their combinations are measured, on the first `conditions` samples of
        the split, each made `each` times, `batch` at a time. best_of: sizes of the choice among candidates (empty: none),
        measured on the first `best_conditions`.
        """

        direction: str | None = None
        schemes: tuple[Scheme, ...] = Field(("onepass", "ar", "roar", "maskgit"), min_length=1)
        steps: tuple[Count, ...] = Field((4, 8, 16), min_length=1)
        temperatures: tuple[Heat, ...] = Field((0.25, 0.5, 1.0), min_length=1)
        guidance: tuple[Heat, ...] = Field((1.0, 2.5), min_length=1)
        conditions: int = Field(50, ge=2)
        each: int = Field(4, ge=2)
        batch: int = Field(50, ge=1)
        best_of: tuple[Count, ...] = (1, 2, 4, 8)
        best_conditions: int = Field(150, ge=2)

    def missing(self, context: Context) -> str | None:
        able = [t for t in JUDGED if t in context.names and context.info.determined.get(t)]
        return None if able and len(context.names) > 1 else "no modality that a judge could name"

    def measure(self, context: Context) -> Findings:
        sources, target = self._direction(context)
        judge = open_judge(context.dataset, target, context.progress)
        told = [a for a in judge.attributes if any(a in _known(context, s) for s in sources)]
        if not told:
            raise UsageError(f"{', '.join(sources)} determine nothing that a judge of {target} names", "choose another direction")
        task = Task(context, sources, target, judge, told)
        metrics = self._choices(context, task)
        metrics += self._best(context, task) if self.options.best_of else []
        usual = context.sampling([target])
        return Findings(metrics, [
            f"acc: share of what is told of each object by {' and '.join(sources)} ({', '.join(told)}) that an independent judge "
            f"names in what was made; in the truth after the tokenizer's round trip it names {task.reference:.3f} (reference)",
            f"distinct, vendi_judge: of the {self.options.each} samples of one condition, how many differ in what the judge names, "
            "and the Vendi score (Friedman and Dieng 2022, arXiv:2210.02410) with the cosine of the judge's own last features; "
            f"from 1 (all alike) to {self.options.each}",
            "calls: times the model is asked for one sample; guidance asks twice. seconds: of one sample in batches of "
            f"{self.options.batch}, decoding not counted; measured here and now, so they differ from run to run",
            f"best of n: candidates drawn with scheme {usual.scheme}, steps {usual.steps}, temperature {usual.temperature}, "
            f"guidance {usual.guidance}; rank judge is by a second judge, trained apart from the one that measures, "
            "but on the same samples: where both err alike, it gains in the figure alone",
        ])

    def _direction(self, context: Context) -> tuple[list[str], str]:
        """Return (sources, target), checked."""
        given = self.options.direction
        if given is None:
            found = [
                (context.run.directions.get(context.direction([s], t), 0.0), -i, s, t)
                for t in [t for t in JUDGED if context.info.determined.get(t) and t in context.names][:1]
                for i, s in enumerate(context.names)
                if s != t and context.model.reads([s], t) and _known(context, s)
            ]
            if not found:
                raise UsageError("no direction that could be judged", "name one: decoding.direction='caption->rgb'")
            return [max(found)[2]], max(found)[3]
        left, arrow, target = given.partition("->")
        sources = [s.strip() for s in left.split("+") if s.strip()]
        target = target.strip()
        if not arrow or not sources or target in sources:
            raise ConfigError(f"decoding.direction: '{given}' is no direction", "write SOURCE->TARGET or A+B->TARGET")
        for name in (*sources, target):
            if name not in context.names:
                raise UnknownNameError.of("modality", name, context.names)
        if target not in JUDGED or not context.info.determined.get(target):
            raise UsageError(f"no independent judge sees {target}", f"judged: {', '.join(t for t in JUDGED if t in context.names)}")
        if not context.model.reads(sources, target):
            raise UsageError(f"this run cannot tell {target} from {', '.join(sources)}")
        return sources, target

    def _choices(self, context: Context, task: Task) -> list[Metric]:
        """Return the figures of every combination."""
        o, metrics = self.options, []
        plans = list(settings(o, task.slots, task.guided))
        task.make(GenerateOptions(seed=context.seed, steps=1, guidance=1.0), min(o.conditions, context.n), 1, o.batch)  # warms up
        for i, plan in enumerate(plans):
            context.progress(f"decoding {task.name}", i, len(plans))
            options = GenerateOptions(seed=context.seed, **plan)
            state, seconds = task.make(options, min(o.conditions, context.n), o.each, o.batch)
            raws = task.decode(state)
            right, asked = task.right(raws, o.each)
            said = {"scheme": plan["scheme"], "steps": task.steps(options), "temperature": plan["temperature"],
                    "guidance": plan["guidance"]}
            row = Row(task.name, said)
            shape = (-1, o.each)
            metrics += [
                row.metric("acc", right.reshape(shape).sum(1) / np.maximum(asked.reshape(shape).sum(1), 1),
                           asked.reshape(shape).sum(1), reference=task.reference),
                row.metric("distinct", task.distinct(raws, o.each)),
                row.metric("vendi_judge", vendi(task.judge.features(raws).reshape(-1, o.each, task.judge.width))),
                row.metric("seconds", seconds, higher_is_better=False, unit="s"),
                row.metric("calls", [task.steps(options) * (1 + options.guided)], higher_is_better=False),
            ]
        return metrics

    def _best(self, context: Context, task: Task) -> list[Metric]:
        """Return the accuracy of the best of n by each rank."""
        n, most = min(self.options.best_conditions, context.n), max(self.options.best_of)
        context.progress(f"best of {most}", 0, 2)
        options = context.sampling([task.target])
        state, _ = task.make(options, n, most, self.options.batch, candidates=True)
        known = state.known_BC & context.columns(*task.sources)
        raws = task.decode(state)
        right, asked = (x.reshape(n, most) for x in task.right(raws, most))
        context.progress(f"best of {most}", 1, 2)
        second = open_judge(context.dataset, task.target, context.progress, seed=1)
        stages = [[Stage(task.target, options)]] * len(state.ids_BC)
        backward = all(context.model.reads([task.target], s) for s in task.sources)
        scores = {"likelihood": best.likelihood(context.model, state, known, stages)}
        if backward:
            scores["cycle"] = best.cycle(context.model, state, known, stages)
        scores["judge"] = np.concatenate([
            best.agreement(second, raws[i * most : (i + 1) * most],
                           {a: [o[a] for o in context.labels[i]["objects"]] for a in task.told}) for i in range(n)
        ])
        metrics = []
        for rank, score in scores.items():
            score = score.reshape(n, most)
            for size in self.options.best_of:
                pick = score[:, :size].argmax(1)
                rows = np.arange(n), pick
                metrics.append(Row(task.name, {"rank": rank, "best of": size}).metric(
                    "acc", right[rows] / np.maximum(asked[rows], 1), asked[rows], reference=task.reference))
        return metrics


def _known(context: Context, modality: str) -> list[str]:
    return context.info.determined.get(modality, [])


class Row:
    """Figures of one setting."""

    def __init__(self, direction: str, setting: dict[str, Any]):
        self.direction, self.setting = direction, setting

    def metric(self, what: str, values: Sequence[float], weights: Sequence[float] | None = None, **more) -> Metric:
        name = f"{self.direction}/{what}[{' '.join(str(v) for v in self.setting.values())}]"
        return mean_metric(name, values, weights, setting=self.setting, **more)


def settings(o: Probe.Options, slots: int, guided: bool) -> Iterator[dict[str, Any]]:
    """Yield the options of every combination that differs from the others; steps beyond the slots are as many as slots."""
    for scheme in o.schemes:
        steps = [1] if scheme in ONE_CALL else [slots] if scheme == "ar" else sorted({min(s, slots) for s in o.steps})
        heats = (0.0,) if scheme == "mean" else o.temperatures
        for s, heat, scale in product(steps, heats, o.guidance if guided else (1.0,)):
            yield {"scheme": scheme, "steps": s, "temperature": heat, "guidance": scale}


def vendi(features_NKD: np.ndarray) -> np.ndarray:
    """Return (N,): the Vendi score of each group of K: exp of the entropy of the eigenvalues of its cosines over K.

    1 where all K are alike, K where they are orthogonal.
    """
    x = features_NKD / np.maximum(np.linalg.norm(features_NKD, axis=-1, keepdims=True), 1e-12)
    value = np.clip(np.linalg.eigvalsh(x @ x.transpose(0, 2, 1) / x.shape[1]), 0, None)
    return np.exp(-(value * np.log(np.maximum(value, 1e-12))).sum(-1))


class Task:
    """One direction, judged. told: the attributes that the sources determine and the judge names."""

    def __init__(self, context: Context, sources: list[str], target: str, judge: Judge, told: list[str]):
        self.context, self.sources, self.target, self.judge, self.told = context, sources, target, judge, told
        self.name = context.direction(sources, target)
        self.slots = context.layout.specs[context.names.index(target)].slots
        nothing = context.run.directions.get(f"->{target}", 0.0) >= IN_DISTRIBUTION
        self.guided = context.model.at_once and nothing
        n = min(context.n, 200)
        right, asked = self.right(context.tokenizer(target).decode(context.ids(target)[:n]), 1)
        self.reference = float(right.sum() / max(asked.sum(), 1))

    def steps(self, options: GenerateOptions) -> int:
        if options.scheme in ONE_CALL or not self.context.model.at_once:
            return 1 if self.context.model.at_once else self.slots
        return self.slots if options.scheme == "ar" else len(counts(self.slots, options.steps, options.schedule))

    def make(
        self, options: GenerateOptions, n: int, each: int, batch: int, candidates: bool = False
    ) -> tuple[State, list[float]]:
        """Return `each` samples of the first n conditions, and the seconds per sample of each batch."""
        context = self.context
        known = np.repeat(context.inside_NC[:n] & context.columns(*self.sources), each, 0)
        ids = np.where(known, np.repeat(context.ids_NC[:n], each, 0), 0)
        number = np.repeat(np.arange(n), each) if candidates else np.arange(n * each)
        state, seconds = State(ids, known, number), []
        stage = [Stage(self.target, options)]
        stages = [best.candidate(stage, i % each) if candidates else stage for i in range(n * each)]
        for a in range(0, n * each, batch):
            index = np.arange(a, min(a + batch, n * each))
            part = state.rows(index)
            began = time.perf_counter()
            chains(context.model, part, stages[a : a + batch], batch)
            seconds.append((time.perf_counter() - began) / len(index))
            state.ids_BC[index], state.known_BC[index] = part.ids_BC, part.known_BC
            for name, values in part.values.items():
                state.values.setdefault(name, np.full((n * each, *values.shape[1:]), np.nan, np.float32))[index] = values
        return state, seconds

    def decode(self, state: State) -> list[Any]:
        return state.decode(self.context.layout, self.target, self.context.tokenizer(self.target))

    def right(self, raws: Sequence[Any], each: int) -> tuple[np.ndarray, np.ndarray]:
        """Return per sample (how much of what the sources tell the judge names, of how much)."""
        labels = [label for label in self.context.labels[: len(raws) // each] for _ in range(each)]
        parts = [v for a, v in self.judge.correct(raws, labels).items() if a in self.told]
        return sum(r for r, _ in parts), sum(n for _, n in parts)

    def distinct(self, raws: Sequence[Any], each: int) -> np.ndarray:
        """Return per condition how many combinations of everything that the judge names are among its samples."""
        said = np.stack(list(self.judge.judge(raws).values()), -1)  # (N, objects, attributes)
        objects = [len(label["objects"]) for label in self.context.labels[: len(raws) // each]]
        return np.array([len({tuple(said[i * each + k, :many].ravel()) for k in range(each)}) for i, many in enumerate(objects)])

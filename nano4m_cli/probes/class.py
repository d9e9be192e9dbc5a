"""Zero-shot classes from any modality: the likeliest caption, word by word and among whole captions of every class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.dist import Work
from nano4m_cli.masking._mixture import IN_DISTRIBUTION
from nano4m_cli.probes import _classes as classes
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import candidate_work, text_work
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric

KIND = "eval"
TEXTS = 24_000  # captions scored per source, at most: where classes are many, of fewer samples
WIDE = 40  # more classes are no readable matrix


class Probe(Base):
    version = 2  # ties count at expectation; they went to the first value

    class Options(Config):
        """prior: how much of log p(caption | nothing) is taken off in the figures "..._pmi"."""

        prior: float = Field(1.0, ge=0)

    def missing(self, context: Context) -> str | None:
        if _label_slot(context):
            return None
        if not context.info.attributes and not classes.labels_of(context):
            return f"data set '{context.dataset.name}' states no attributes"
        if "caption" not in context.names:
            return "the run has no caption"
        if "caption" in context.info.brought:
            return "the captions' tokenizer is not here: alternatives cannot be worded"
        sources = [s for s in context.names if s != "caption" and context.model.reads([s], "caption")]
        if not sources:
            return "the run has no modality to tell a class from, beside the caption"
        values = {a: classes.train_share(context, a) for a in classes.labels_of(context)}
        if values and all(len(v) < 2 for v in values.values()):
            only = next(v for shares in values.values() for v in shares)
            return f"there is one class only ('{only}'): nothing to choose from"
        return None

    def measure(self, context: Context) -> Findings:
        tasks: list[Task] = []
        notes: list[str] = []
        if "caption" in context.names and "caption" not in context.info.brought:
            if context.info.attributes:
                tasks.append(Words(context))
                notes.append(
                    "acc: each attribute word of the true caption is replaced by every alternative of the same wording; the other "
                    "words stay as they are, so they may tell (ceilings count that)")
            for attribute in classes.labels_of(context):
                values, said = classes.prompts(context, attribute)
                if len(values) > 1:
                    tasks.append(task := Whole(context, attribute, values, said))
                    notes.append(
                        f"{attribute}_top1, _top5: captions of every class of {attribute}, the train split's commonest "
                        f"(up to {classes.PROMPTS} a class), all compared in full: nothing of the sample's own caption is told"
                        + ("" if task.n == context.n else f"; the first {task.n} samples"))
        if _label_slot(context):
            tasks.append(Label(context))
        pairs = [(s, t) for s in context.names for t in tasks if s != t.target and context.model.reads([s], t.target)]
        asked = [t for t in tasks if context.model.reads([], t.target)]
        works = [*(t.prior(context) for t in asked), *(t.score(context, s) for s, t in pairs)]
        answers = context.answers("class", works)
        prior = dict.fromkeys(tasks) | dict(zip(asked, answers, strict=False))
        metrics: list[Metric] = []
        plots: list[Plot] = []
        recalls: dict[str, dict[str, dict[str, list]]] = {}
        for (source, task), score in zip(pairs, answers[len(asked) :], strict=True):
            for q in task.questions(score, prior[task], self.options.prior):
                metrics += q.metrics(context, source)
                if len(q.values) <= WIDE:
                    plots.append(q.matrix(source))
                recalls.setdefault(q.name, {})[source] = q.recall()
        plots += [_recall_table(name, found) for name, found in recalls.items()]
        directions = context.run.directions
        told = [t for t in dict.fromkeys(t.target for t in tasks) if directions.get(f"->{t}", 0.0) < IN_DISTRIBUTION]
        notes += [
            "scores are mean log-likelihoods per token of full captions; equal ones count at expectation; _pmi: less "
            f"{self.options.prior:g} times what the caption has given nothing (a caption is then not preferred for being common)",
            "_balanced: mean recall of the classes; _top5 counts the five best",
            *[f"training did not pose '->{t}': the _pmi figures rest on a question the model does not know" for t in told],
        ]
        return Findings(metrics, notes, plots)


def _label_slot(context: Context) -> bool:
    """Whether labels are a modality of one slot, whose ids are the classes."""
    if "label" not in context.names or len(context.names) < 2 or not context.model.at_once:
        return False
    spec = context.layout.specs[context.names.index("label")]
    return spec.kind != "sequence" and spec.slots == 1


@dataclass(frozen=True)
class Question:
    """One attribute asked of samples: scores of its values (Q, V), the true ones, and whose they are.

    name: of figures ("shape_acc"); pmi: the prior-corrected scores, or None where no prior can be asked.
    """

    name: str
    attribute: str
    target: str
    values: list[str]
    truth_Q: np.ndarray
    owner_Q: np.ndarray
    score_QV: np.ndarray
    pmi_QV: np.ndarray | None
    samples: int
    told: bool

    def metrics(self, context: Context, source: str) -> list[Metric]:
        direction = context.direction([source], self.target)
        base = self._baselines(context, source)
        out = [self._metric(f"{direction}/{self.name}", self.score_QV, 1, **base)]
        if self.pmi_QV is not None:
            out.append(self._metric(f"{direction}/{self.name}_pmi", self.pmi_QV, 1, **base))
        counts = np.bincount(self.truth_Q, minlength=len(self.values))
        there = int((counts > 0).sum())
        weight = 1 / counts[self.truth_Q]
        hit = classes.hit_at(self.score_QV, self.truth_Q)
        total = np.bincount(self.owner_Q, weight, self.samples)
        right = np.bincount(self.owner_Q, weight * hit, self.samples)
        out.append(mean_metric(f"{direction}/{self.name}_balanced", right / np.where(total > 0, total, 1), total,
                               chance=base["chance"], majority=1 / there, ceiling=1.0 if base["ceiling"] == 1 else None))
        if len(self.values) > 5 and self.name.endswith("_top1"):
            name = f"{direction}/{self.name.removesuffix('1')}5"
            out.append(self._metric(name, self.score_QV, 5, chance=5 / len(self.values)))
        return out

    def _metric(self, name: str, score: np.ndarray, k: int, **base) -> Metric:
        asked = np.bincount(self.owner_Q, minlength=self.samples)
        right = np.bincount(self.owner_Q, classes.hit_at(score, self.truth_Q, k), self.samples)
        return mean_metric(name, right / np.maximum(asked, 1), asked, **base)

    def _baselines(self, context: Context, source: str) -> dict[str, float | None]:
        if self.attribute in context.attributes:
            return context.baselines([source], self.attribute, told=self.told) | {"chance": 1 / len(self.values)}
        share = classes.train_share(context, self.attribute) if self.target == "caption" else {}
        commonest = max(share, key=lambda v: (share[v], v), default=None)
        majority = float((self.truth_Q == self.values.index(commonest)).mean()) if commonest in self.values else None
        return {"chance": 1 / len(self.values), "majority": majority, "ceiling": None}

    def matrix(self, source: str) -> Plot:
        return Plot(
            name=f"{source} {self.name}", title=f"{self.attribute} from {source}: the chosen value, as shares of each true one",
            kind="matrix", rows=self.values, columns=self.values, x="chosen", y="true",
            values=classes.confusion(self.score_QV, self.truth_Q).tolist(),
        )

    def recall(self) -> dict[str, list]:
        counts = np.bincount(self.truth_Q, minlength=len(self.values))
        hit = np.bincount(self.truth_Q, classes.hit_at(self.score_QV, self.truth_Q), len(self.values))
        return {v: [float(h / n) if n else None, int(n)] for v, h, n in zip(self.values, hit, counts, strict=True)}


def _recall_table(name: str, found: dict[str, dict[str, list]]) -> Plot:
    first = next(iter(found.values()))
    return Plot(
        name=f"recall {name}", title=f"Recall of each class ({name}), by source", kind="table", rows=list(first), y="class",
        columns=["asked", *found], values=[[str(first[v][1]), *(per[v][0] for per in found.values())] for v in first],
    )


class Task(ABC):
    """Texts (or ids) that stand for values, and the questions that their scores answer."""

    def __init__(self, target: str, n: int):
        self.target, self.n = target, n

    @abstractmethod
    def score(self, context: Context, source: str) -> Work[np.ndarray]:
        """Ask for the score of every text (or id), given a source."""

    @abstractmethod
    def prior(self, context: Context) -> Work[np.ndarray]:
        """Ask for the score given nothing, of a model that can be asked."""

    @abstractmethod
    def questions(self, score: np.ndarray, prior: np.ndarray | None, weight: float) -> list[Question]:
        """Return what the scores answer."""


class Words(Task):
    """Every attribute word of the true captions against its alternatives."""

    def __init__(self, context: Context):
        super().__init__("caption", context.n)
        self.rows, self.texts, self.owner = classes.questions(context)
        self.attributes = context.attributes

    def score(self, context: Context, source: str) -> Work[np.ndarray]:
        return text_work(context, [source], "caption", self.texts, self.owner)

    def prior(self, context: Context) -> Work[np.ndarray]:
        return classes.prior_work(context, self.texts)

    def questions(self, score: np.ndarray, prior: np.ndarray | None, weight: float) -> list[Question]:
        out = []
        for attribute, values in self.attributes.items():
            rows = [r for r in self.rows if r.attribute == attribute]
            if not rows or len(values) < 2:
                continue
            texts = np.array([r.texts for r in rows])
            truth = np.array([values.index(r.truth) for r in rows])
            out.append(Question(
                f"{attribute}_acc", attribute, "caption", values, truth, np.array([r.sample for r in rows]), score[texts],
                None if prior is None else (score - weight * prior)[texts], self.n, True,
            ))
        return out


class Whole(Task):
    """Captions of every class, of the train split, compared in full; a class is as likely as its captions on average."""

    def __init__(self, context: Context, attribute: str, values: list[str], said: list[list[str]]):
        flat = [c for captions in said for c in captions]
        super().__init__("caption", int(min(context.n, max(TEXTS // len(flat), 20))))
        self.attribute, self.values, self.told = attribute, values, said
        self.class_P = np.repeat(np.arange(len(values)), [len(c) for c in said])
        self.prompts = context.tokenizer("caption").encode(flat)
        truth = classes.labels_of(context)[attribute][: self.n]
        self.kept = np.flatnonzero([t in values for t in truth])  # a class that training never showed has no caption
        self.truth = np.array([values.index(truth[i]) for i in self.kept], dtype=np.int64)

    def score(self, context: Context, source: str) -> Work[np.ndarray]:
        owner = np.repeat(self.kept, len(self.prompts))
        work = text_work(context, [source], "caption", self.prompts * len(self.kept), owner)
        return replace(work, join=lambda parts: work.join(parts).reshape(len(self.kept), -1))

    def prior(self, context: Context) -> Work[np.ndarray]:
        return classes.prior_work(context, self.prompts)

    def questions(self, score: np.ndarray, prior: np.ndarray | None, weight: float) -> list[Question]:
        if not len(self.kept):
            return []
        pmi = None if prior is None else self._pooled(score - weight * prior)
        return [Question(f"{self.attribute}_top1", self.attribute, "caption", self.values, self.truth, self.kept,
                         self._pooled(score), pmi, self.n, False)]

    def _pooled(self, score_QP: np.ndarray) -> np.ndarray:
        """Return (Q, V): log of the mean of exp over each class's captions."""
        parts = [score_QP[:, self.class_P == v] for v in range(len(self.values))]
        return np.stack([np.log(np.exp(p - p.max(1, keepdims=True)).mean(1)) + p.max(1) for p in parts], 1)


class Label(Task):
    """The ids of a modality of one slot."""

    def __init__(self, context: Context):
        super().__init__("label", context.n)
        spec = context.layout.specs[context.names.index("label")]
        self.size, ids = spec.vocab_size, [int(i[0]) if len(i) else -1 for i in context.ids("label")]
        self.kept = np.flatnonzero(np.array(ids) >= 0)
        self.truth = np.array(ids)[self.kept]
        every = [np.array([v]) for v in range(self.size)]
        brought = "label" in context.info.brought
        self.values = [str(v) for v in range(self.size)] if brought else list(context.tokenizer("label").decode(every))
        known = context.info.determined.get("label", [])
        self.attribute = known[0] if len(known) == 1 else "label"

    def score(self, context: Context, source: str) -> Work[np.ndarray]:
        work = self._ask(context, [source])
        return replace(work, join=lambda parts: work.join(parts)[self.kept])

    def prior(self, context: Context) -> Work[np.ndarray]:
        return self._ask(context, [], 1)

    def _ask(self, context: Context, sources: Sequence[str], n: int | None = None) -> Work[np.ndarray]:
        shown = (context.inside_NC & context.columns(*sources))[:n]
        return candidate_work(context, shown, "label", np.arange(self.size)[:, None])

    def questions(self, score: np.ndarray, prior: np.ndarray | None, weight: float) -> list[Question]:
        pmi = None if prior is None else score - weight * prior
        return [Question("label_top1", self.attribute, "label", self.values, self.truth, self.kept, score, pmi, self.n, False)]

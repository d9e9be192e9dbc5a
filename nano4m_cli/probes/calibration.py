"""Whether predicted probabilities mean what they say: reliability curves and expected calibration error per modality."""

from __future__ import annotations

import numpy as np
import torch

from nano4m_cli.generate.likelihood import cost, posed
from nano4m_cli.masking._base import Key
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._classes import Options as Question
from nano4m_cli.probes._classes import questions, rounded
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import text_work
from nano4m_cli.probes._result import RESAMPLES, Findings, Metric, Plot, mean_metric, resamples
from nano4m_cli.rng import generator

KIND = "eval"
BINS = 10  # of equal width
CHOICES = 100  # samples whose attribute words are chosen among
SIMULATED = 200  # draws of what a calibrated model would show by chance
FEW = 10  # answers below which a bin is not drawn


class Probe(Base):
    def measure(self, context: Context) -> Findings:
        shown, asked = context.run.mixture.draw(context.length_NM, Key(context.seed, "eval-mask", np.arange(context.n)))
        confidence, right = answers(context, shown, asked)
        metrics: list[Metric] = []
        rows: dict[str, Bins] = {}
        for name in context.names:
            part = context.layout.slice(name)
            own, hit = confidence[:, part], right[:, part]
            sample = np.nonzero(~np.isnan(own))[0]
            if len(sample):
                rows[name] = Bins(own[~np.isnan(own)], hit[~np.isnan(own)], sample, context.n)
                metrics += rows[name].metrics(name, context.seed)
        plots = [_curve("tokens", "Reliability of the likeliest token, by modality", rows)]
        chosen = choices(context)
        for source, bins in chosen.items():
            metrics += bins.metrics(f"{context.direction([source], 'caption')}/choice", context.seed, joint="_")
        if chosen:
            plots.append(_curve("choices", "Reliability of the likeliest attribute word, by source", chosen))
        return Findings(metrics, [
            f"the likeliest answer's probability against how often it is right, in {BINS} bins of equal width; masks drawn as in "
            "training, with fixed seed; ece: mean distance of the two, weighted by answers; its reference is what a perfectly "
            "calibrated model of the same confidences and as many answers would show by chance (an ece is never 0 by luck)",
            "overconfidence: mean probability less accuracy",
            *(["choice: among all values of one attribute word of the true caption, by the likelihood of the full caption; the "
               f"first {min(CHOICES, context.n)} samples"] if chosen else []),
        ], plots)


class Bins:
    """Answers by their probability. confidence, right, sample: (A,); right may be a share where answers tie."""

    def __init__(self, confidence: np.ndarray, right: np.ndarray, sample: np.ndarray, samples: int):
        self.confidence, self.right, self.sample, self.samples = confidence, right.astype(np.float64), sample, samples
        self.bin = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        place = sample * BINS + self.bin
        table = lambda w: np.bincount(place, w, samples * BINS).reshape(samples, BINS)  # noqa: E731
        self.count_NB, self.confidence_NB, self.right_NB = table(np.ones(len(place))), table(confidence), table(self.right)

    def curve(self, seed: int = 0) -> tuple[list, list, list]:
        """Return accuracy per bin with its 95 % interval over samples (None where a bin has few answers)."""
        weight = resamples(self.samples, seed)
        count, right = self.count_NB.sum(0), self.right_NB.sum(0)
        drawn_count, drawn_right = weight @ self.count_NB, weight @ self.right_NB
        value, low, high = [], [], []
        for b in range(BINS):
            enough = count[b] >= FEW
            value.append(right[b] / count[b] if enough else None)
            share = drawn_right[:, b][drawn_count[:, b] > 0] / drawn_count[:, b][drawn_count[:, b] > 0]
            at = np.quantile(share, [0.025, 0.975]) if enough else (None, None)
            low.append(at[0])
            high.append(at[1])
        return value, low, high

    def metrics(self, name: str, seed: int, joint: str = "/") -> list[Metric]:
        total = self.count_NB.sum(1)
        per = lambda x: x.sum(1) / np.maximum(total, 1)  # noqa: E731
        weight = resamples(self.samples)
        drawn = weight @ self.count_NB
        gaps = np.abs(weight @ self.confidence_NB - weight @ self.right_NB).sum(1) / np.maximum(drawn.sum(1), 1)
        assert len(gaps) == RESAMPLES
        value = ece(self.confidence, self.right, self.bin)
        # Resampling adds to a mean of distances: the interval is centred on the figure itself.
        low, high = np.clip(np.quantile(gaps, [0.025, 0.975]) - np.median(gaps) + value, 0, None)
        return [
            mean_metric(f"{name}{joint}top1_acc", per(self.right_NB), total),
            Metric(name=f"{name}{joint}ece", value=value, n=int((total > 0).sum()),
                   ci95=(float(low), float(high)), reference=self._by_chance(seed), higher_is_better=False),
            mean_metric(f"{name}{joint}overconfidence", per(self.confidence_NB - self.right_NB), total, higher_is_better=False),
        ]

    def _by_chance(self, seed: int) -> float:
        draw = generator(seed, "calibration", len(self.confidence))
        return float(np.mean([ece(self.confidence, draw.random(len(self.bin)) < self.confidence, self.bin)
                              for _ in range(SIMULATED)]))


def ece(confidence: np.ndarray, right: np.ndarray, bin_A: np.ndarray) -> float:
    """Return the expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599)."""
    gap = np.bincount(bin_A, confidence - right, BINS)
    return float(np.abs(gap).sum() / max(len(bin_A), 1))


def answers(context: Context, shown_NC: np.ndarray, asked_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, C) twice, NaN where not asked: the largest probability, and whether its id is the true one (a share among
    equally likely ones)."""
    confidence, right = np.full(asked_NC.shape, np.nan), np.full(asked_NC.shape, np.nan)
    parts = posed(context.model, shown_NC, asked_NC, context.inside_NC)

    def part(rows: slice, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        packed = context.pack(context.ids_NC[rows], shown_NC[rows], asked)
        top, hit = np.zeros(len(packed.dec_ids)), np.zeros(len(packed.dec_ids))
        with torch.inference_mode():
            for index, logits in zip(packed.group_index, context.model(packed), strict=True):
                if index is None:
                    continue
                logp = logits.float().log_softmax(-1)
                best = logp.max(-1, keepdim=True).values
                alike = logp >= best - 1e-6
                own = alike.gather(1, packed.dec_ids[index, None]).squeeze(1)
                at = index.cpu().numpy()
                top[at], hit[at] = best.squeeze(1).exp().cpu().numpy(), (own / alike.sum(-1)).cpu().numpy()
        return top, hit

    costs = [cost(shown_NC[rows], asked) for rows, asked in parts]
    found = context.spread("calibration", parts, lambda item: part(*item), costs)
    for (rows, asked), (top, hit) in zip(parts, found, strict=True):
        confidence[rows][asked], right[rows][asked] = top, hit
    return np.where(asked_NC, confidence, np.nan), np.where(asked_NC, right, np.nan)


def choices(context: Context) -> dict[str, Bins]:
    """Return per source the answers to which attribute word the true caption has, as probabilities over its alternatives."""
    if "caption" not in context.names or "caption" in context.info.brought or not context.info.attributes:
        return {}
    asked, texts, owner = questions(context)
    rows = [q for q in asked if q.sample < CHOICES and len(q.texts) > 1]
    if not rows:
        return {}
    some = np.flatnonzero(owner < CHOICES)
    chosen, out = [texts[i] for i in some], {}
    sources = [s for s in context.names if s != "caption" and context.model.reads([s], "caption")]
    works = [text_work(context, [s], "caption", chosen, owner[some]) for s in sources]
    for source, found in zip(sources, context.answers("calibration of choices", works), strict=True):
        score = np.full(len(texts), np.nan)
        score[some] = found
        score *= [len(t) for t in texts]
        answered = [_answer(q, score, context.attributes[q.attribute]) for q in rows]
        confidence, right = map(np.array, zip(*answered, strict=True))
        out[source] = Bins(confidence, right, np.array([q.sample for q in rows]), min(CHOICES, context.n))
    return out


def _answer(question: Question, score: np.ndarray, values: list[str]) -> tuple[float, float]:
    logp = score[question.texts]
    p = np.exp(logp - logp.max())
    p /= p.sum()
    best = rounded(logp) == rounded(logp).max()
    return float(p.max()), float(best[values.index(question.truth)] / best.sum())


def _curve(name: str, title: str, rows: dict[str, Bins]) -> Plot:
    drawn = [bins.curve() for bins in rows.values()]
    return Plot(
        name=name, title=title, kind="curve", rows=list(rows), columns=[round((b + 0.5) / BINS, 4) for b in range(BINS)],
        values=[v for v, _, _ in drawn], low=[v for _, v, _ in drawn], high=[v for _, _, v in drawn], diagonal=True,
        x="predicted probability (middle of its bin)", y="share that is right",
    )

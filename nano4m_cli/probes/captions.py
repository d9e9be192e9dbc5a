"""Captions written from other modalities: which fields they state rightly, and how near they come to the true wording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context, Made, missing
from nano4m_cli.probes._directions import sampled_with
from nano4m_cli.probes._matching import Reader, Thing, best_reader, matched, told
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._texts import bleu_counts, bleu_interval, chrf
from nano4m_cli.rng import generator, permutation

KIND = "eval"
SHOWN = 8  # captions laid out beside the figures
TRAIN = 400  # captions of the train split that the reader is chosen on and that stand for "any caption"


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        lack = missing(context, "caption")
        if not lack and "caption" in context.info.brought:
            return "the captions' tokens were brought without texts or a tokenizer"
        return lack or (None if sources_of(context) else "the run tells captions from nothing else")

    def measure(self, context: Context) -> Findings:
        truth, todo = context.raw("caption"), sources_of(context)
        train = Context(context.run, context.run.config.data.train, TRAIN, 0, context.progress)
        # Any caption of the train split, for every sample another: what is right without looking at the source.
        some = train.raw("caption")
        any_caption = [some[i] for i in np.resize(permutation(len(some), context.seed, "any-caption"), context.n)]
        fields = Fields(context, train) if context.attributes else None
        context.ahead([(Made([s], ["caption"]), "caption") for s in todo], [("caption", None)], "captions written")
        own = context.round_trip("caption")
        plain, copied = likeness(any_caption, truth), likeness(own, truth)
        base = fields.score([fields.reader.read(c) for c in any_caption]) if fields else {}
        reference = fields.score([fields.reader.read(c) for c in own]) if fields else {}
        chance = fields.score(fields.uniform(context.seed)) if fields else {}
        metrics: list[Metric] = []
        written = {"truth": truth[:SHOWN]}
        by_luck, by_copy = (bleu_interval(bleu_counts(x, truth))[0] for x in (any_caption, own))
        share = lambda of, what: float(of[what][0].sum() / of[what][1].sum())  # noqa: E731

        def figures(source: str) -> list[Metric]:
            name, made = context.direction([source], "caption"), context.decoded([source], ["caption"], "caption")
            out = [
                mean_metric(f"{name}/{what}", values, majority=float(plain[what].mean()), reference=float(copied[what].mean()))
                for what, values in likeness(made, truth).items()
            ]
            value, interval = bleu_interval(bleu_counts(made, truth))
            out.append(Metric(name=f"{name}/bleu", value=value, ci95=interval, n=context.n, majority=by_luck, reference=by_copy))
            said = fields.score([fields.reader.read(c) for c in made]) if fields else {}
            return out + [
                mean_metric(
                    f"{name}/{what}", right / np.maximum(there, 1), there, majority=share(base, what),
                    reference=share(reference, what), ceiling=fields.ceiling(source, what),
                    chance=None if what == "objects_acc" else share(chance, what),  # their number is told to chance
                )
                for what, (right, there) in said.items()
            ]

        for source, found in zip(todo, context.spread("captions", todo, figures), strict=True):
            metrics += found
            written[f"from {source}"] = context.decoded([source], ["caption"], "caption")[:SHOWN]
        return Findings(metrics, [
            "chrf: mean of each caption's chrF (Popovic 2015); bleu: of the corpus, four words, not smoothed, lower case, against "
            "one true wording of several that would be right; exact: the very text",
            *([f"fields: of all that the true caption states, what the written one states of the object assigned to it (as many "
               f"fields as possible agree); captions are read by whole words, by rule '{fields.reader.rule}', chosen on the "
               "train split; objects: captions with as many objects; all: objects, fields and order, nothing more",
               "chance: fields drawn uniformly for the true number of objects; majority: any caption of the train split; "
               "reference: the truth after the tokenizer's round trip, read by the same rule"] if fields else []),
            *sampled_with(context, "caption"),
        ], [Plot(name="examples", title="Captions as written, of the first samples", kind="table", columns=list(written),
                 rows=[context.tokens.key(i) for i in range(len(written["truth"]))],
                 values=[list(row) for row in zip(*written.values(), strict=True)])])


def sources_of(context: Context) -> list[str]:
    return [s for s in context.names if s != "caption" and context.model.reads([s], "caption")]


def likeness(made: Sequence[str], truth: Sequence[str]) -> dict[str, np.ndarray]:
    """Return {figure: (N,)} of texts against texts."""
    pairs = [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(made, truth, strict=True)]
    return {"chrf": np.array([chrf(a, b) for a, b in pairs]), "exact": np.array([float(a == b) for a, b in pairs])}


class Fields:
    """What the true captions of a split state, and how to read others."""

    def __init__(self, context: Context, train: Context):
        self.info, self.truth = context.info, [told(label) for label in context.labels]
        stated = {a for things in self.truth for thing in things for a in thing}
        self.attributes = [a for a in self.info.attributes if a in stated]
        known = {a: self.info.attributes[a] for a in self.attributes}
        self.reader: Reader = best_reader(known, train.raw("caption"), [told(label) for label in train.labels])

    def score(self, said: Sequence[list[Thing]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {figure: (right (N,), of how many (N,))}."""
        rows = [matched(s, t) for s, t in zip(said, self.truth, strict=True)]
        there = {a: np.array([sum(a in thing for thing in t) for t in self.truth]) for a in self.attributes}
        right = {a: np.array([r[a] for r, _ in rows]) for a in self.attributes}
        some = np.array([float(bool(t)) for t in self.truth])  # captions that state anything
        out = {f"{a}_field_acc": (right[a], there[a]) for a in self.attributes}
        if len(self.attributes) > 1:
            out["fields_acc"] = (sum(right.values()), sum(there.values()))
        out["objects_acc"] = (np.array([len(s) == len(t) for s, t in zip(said, self.truth, strict=True)]) * some, some)
        out["all_acc"] = (np.array([whole for _, whole in rows]) * some, some)
        return {what: pair for what, pair in out.items() if pair[1].sum()}

    def uniform(self, seed: int) -> list[list[Thing]]:
        """Return for each caption the true number of objects with the attributes they have, values drawn uniformly."""
        draw = generator(seed, "any-fields")
        values = {a: self.info.attributes[a].values for a in self.attributes}
        return [[{a: values[a][int(draw.integers(len(values[a])))] for a in thing} for thing in t] for t in self.truth]

    def ceiling(self, source: str, what: str) -> float | None:
        """Return 1 where the source determines all that the figure asks, else None (not known)."""
        known = self.info.determined.get(source, [])
        wanted = [what.removesuffix("_field_acc")] if what.endswith("_field_acc") else self.attributes
        return 1.0 if all(a in known for a in wanted) else None

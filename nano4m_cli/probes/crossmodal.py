"""Generate and judge: media made from other modalities, named by independent classifiers or measured against the truth."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nano4m_cli.generate.sampler import GenerateOptions
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._images import absrel, angle, psnr
from nano4m_cli.probes._judges import JUDGED, Judge, open_judge
from nano4m_cli.probes._result import Metric, mean_metric

KIND = "eval"
HEARD = 200  # samples judged by ear: phase reconstruction is the slow part
# Depth and normals follow from the picture almost surely: their most likely value at once beats sampling.
LIKELIEST = GenerateOptions(scheme="onepass", temperature=0.0, guidance=1.0)


def estimate(context: Context, target: str) -> GenerateOptions:
    """Return how a picture's depth or normals are best told: by the mean, where codes stand for numbers."""
    levels = context.layout.specs[context.names.index(target)].levels
    return GenerateOptions(scheme="mean", guidance=1.0) if levels else LIKELIEST


def heard(context: Context, target: str) -> int:
    """Return how many samples of the split are judged."""
    return min(HEARD, context.n) if target == "audio" else context.n


class Probe(Base):
    version = 2  # depth and normals are told by the mean; they were by the likeliest ids, which stand beside them now

    def missing(self, context: Context) -> str | None:
        able = [t for t in JUDGED if t in context.names and context.info.determined.get(t)]
        shown = set(context.names) - set(context.info.brought)
        return None if able or {"rgb", "depth"} <= shown else "no modality that a judge could name"

    def measure(self, context: Context) -> tuple[list[Metric], list[str]]:
        metrics: list[Metric] = []
        for target in JUDGED:
            if target in context.names and context.info.determined.get(target):
                metrics += self._judged(context, target)
        if "rgb" in context.names:
            for target, error, unit in (("depth", absrel, ""), ("normal", angle, "degrees")):
                if target in context.names and context.model.reads(["rgb"], target):
                    metrics += self._measured(context, target, error, unit)
            if "rgb_hi" in context.names and context.model.reads(["rgb"], "rgb_hi"):
                metrics += self._sharpened(context)
        return metrics, [
            "judged: share of objects whose attribute an independent classifier names as the sample's labels do, in "
            "caption order; the classifier saw real samples only, none of this split",
            "reference: the same figure for the truth after the tokenizer's round trip; judge_*: the classifier on real samples",
            *[f"{t} was sampled with {', '.join(f'{k} {v}' for k, v in context.sampling([t]).model_dump().items())}"
              for t in JUDGED if t in context.names],
            "depth and normals: the expected code values in one pass (likeliest: the most likely ids), against exact "
            "values; majority: the train split's mean picture",
            *(["rgb_hi: psnr of the expected code values in one pass; enlarged_psnr: of rgb made larger (bicubic), which "
               "learned nothing; enlarged_codes_psnr: of rgb as its codes tell it made larger, which is all that the model was "
               "shown; shrunk_psnr: of the samples made as small as rgb, to rgb"] if "rgb_hi" in context.names else []),
        ]

    def _judged(self, context: Context, target: str) -> list[Metric]:
        judge = open_judge(context.dataset, target, context.progress)
        right = judge.correct(context.raw(target), context.labels)
        metrics = [mean_metric(f"{target}/judge_{a}_acc", r / np.maximum(n, 1), n) for a, (r, n) in right.items()]
        # Of sound, depth and normals say nothing that the picture does not.
        sources = [s for s in context.names if s != target and (target != "audio" or s not in ("depth", "normal"))]
        plans = [[s] for s in sources if context.model.reads([s], target)]
        if target == "rgb" and {"audio", "caption"} <= set(sources):
            plans += [p] if context.model.reads(p := ["audio", "caption"], target) else []
        round_trip = self._round_trip(context, judge, target)
        for i, plan in enumerate(plans):
            context.progress(f"{'+'.join(plan)}->{target}", i, len(plans))
            metrics += self._direction(context, judge, plan, target, round_trip)
        if target == "rgb" and ["caption"] in plans and context.split == "test" and context.has_split("test_novel"):
            novel = context.on("test_novel")
            there = self._direction(novel, judge, ["caption"], target, self._round_trip(novel, judge, target))
            metrics += [m.model_copy(update={"name": m.name.replace("_acc", "_acc_novel"), "ceiling": None}) for m in there]
        return metrics

    def _round_trip(self, context: Context, judge: Judge, target: str) -> dict[str, float]:
        n = heard(context, target)
        right = judge.correct(context.tokenizer(target).decode(context.ids(target)[:n]), context.labels[:n])
        return {a: float(r.sum() / n.sum()) for a, (r, n) in right.items()}

    def _direction(
        self, context: Context, judge: Judge, sources: list[str], target: str, reference: dict[str, float]
    ) -> list[Metric]:
        n = heard(context, target)
        made = context.decoded(sources, [target], target, limit=n)
        name = context.direction(sources, target)
        return [
            mean_metric(f"{name}/{a}_acc", r / np.maximum(n, 1), n, reference=reference[a], **context.baselines(sources, a))
            for a, (r, n) in judge.correct(made, context.labels[:n]).items()
        ]

    def _measured(self, context: Context, target: str, error, unit: str) -> list[Metric]:
        truth = context.raw(target)
        how = estimate(context, target)
        made = context.decoded(["rgb"], [target], target, how)
        ids = context.ids(target, context.generate(["rgb"], [target], how).ids_BC)  # the likeliest, of the same pass
        likeliest = error(context.tokenizer(target).decode(ids), truth)
        own = error(context.tokenizer(target).decode(context.ids(target)), truth)
        train_mean = np.mean(np.stack(Context(context.run, "train", 1000, 0, context.progress).raw(target)), 0)
        if target == "normal":
            train_mean = train_mean / np.maximum(np.linalg.norm(train_mean, axis=-1, keepdims=True), 1e-6)
        what = "absrel" if target == "depth" else "angle"
        values = error(made, truth)
        return [
            mean_metric(f"rgb->{target}/{what}", values, reference=float(own.mean()), higher_is_better=False, unit=unit,
                        majority=float(error([train_mean] * len(truth), truth).mean())),
            mean_metric(f"rgb->{target}/{what}_ratio", values / own.mean(), higher_is_better=False, reference=1.0),
            mean_metric(f"rgb->{target}/{what}_likeliest_ratio", likeliest / own.mean(), higher_is_better=False, reference=1.0),
        ]

    def _sharpened(self, context: Context) -> list[Metric]:
        """Return how near super-resolution comes to the truth, beside enlarging, and how true it stays to what it was given."""
        small, truth, name = context.raw("rgb"), context.raw("rgb_hi"), "rgb->rgb_hi"
        made = context.decoded(["rgb"], ["rgb_hi"], "rgb_hi", estimate(context, "rgb_hi"))
        drawn = context.decoded(["rgb"], ["rgb_hi"], "rgb_hi")
        own = psnr(context.tokenizer("rgb_hi").decode(context.ids("rgb_hi")), truth)
        fit = lambda x, like, how: np.asarray(Image.fromarray(x).resize(like.shape[1::-1], how))  # noqa: E731
        enlarge = lambda xs: [fit(s, t, Image.Resampling.BICUBIC) for s, t in zip(xs, truth, strict=True)]  # noqa: E731
        coded = context.tokenizer("rgb").decode(context.ids("rgb"))
        shrunk = [fit(d, s, Image.Resampling.BOX) for d, s in zip(drawn, small, strict=True)]
        return [
            mean_metric(f"{name}/psnr", psnr(made, truth), reference=float(own.mean()), unit="dB"),
            mean_metric(f"{name}/enlarged_psnr", psnr(enlarge(small), truth), unit="dB"),
            mean_metric(f"{name}/enlarged_codes_psnr", psnr(enlarge(coded), truth), unit="dB"),
            mean_metric(f"{name}/shrunk_psnr", psnr(shrunk, small), unit="dB"),
        ]

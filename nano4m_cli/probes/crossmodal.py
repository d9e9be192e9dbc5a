"""Generate and judge: media made from other modalities, named by independent classifiers or measured against the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from nano4m_cli.data.loader import TokenData
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context, Made
from nano4m_cli.probes._directions import estimate, heard, plans, sampled_with, train_mean
from nano4m_cli.probes._images import absrel, angle, angle_figures, delta1, psnr, rmse, ssim
from nano4m_cli.probes._judges import JUDGED, Judge, open_judge
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric

KIND = "eval"


class Probe(Base):
    version = 2  # depth and normals are told by the mean; they were by the likeliest ids, which stand beside them now

    def missing(self, context: Context) -> str | None:
        shown = set(context.names) - set(context.info.brought)
        able = [t for t in JUDGED if t in shown and context.info.determined.get(t)]
        return None if able or {"rgb", "depth"} <= shown or {"rgb", "normal"} <= shown else "no modality that a judge could name"

    def measure(self, context: Context) -> Findings:
        metrics: list[Metric] = []
        shown = [n for n in context.names if n not in context.info.brought]  # of others there is nothing to decode or to judge
        for target in JUDGED:
            if target in shown and context.info.determined.get(target):
                metrics += self._judged(context, target)
        if "rgb" in context.names:
            told = [t for t in ("depth", "normal") if t in shown and context.model.reads(["rgb"], t)]
            context.ahead([(Made(["rgb"], [t], estimate(context, t)), t) for t in told], [(t, None) for t in told], "rgb measured")
            for found in context.spread("measured", told, lambda target: measured(context, target)):
                metrics += found
            if "rgb_hi" in shown and "rgb" in shown and context.model.reads(["rgb"], "rgb_hi"):
                metrics += self._sharpened(context)
        return Findings(metrics, [
            "judged: share of objects whose attribute an independent classifier names as the sample's labels do, in "
            "caption order; the classifier saw real samples only, none of this split; recognised: objects of which everything "
            "that the sources tell is named right",
            "reference: the same figure for the truth after the tokenizer's round trip; judge_*: the classifier on real samples",
            *sampled_with(context, *JUDGED),
            "depth and normals: the expected code values in one pass (likeliest: the most likely ids), against exact "
            "values; majority: the train split's mean picture; angle_median and shares of pixels are of each sample, then the mean",
            "token_acc: share of slots whose likeliest id, asked all at once, is the true one; majority: the commonest id of "
            "each slot in the train split",
            *(["psnr, ssim of rgb made from others: to the one true picture, of many that the source allows; majority: the train "
               "split's mean picture"] if "rgb" in context.names else []),
            *(["rgb_hi: psnr of the expected code values in one pass; enlarged_psnr: of rgb made larger (bicubic), which "
               "learned nothing; enlarged_codes_psnr: of rgb as its codes tell it made larger, which is all that the model was "
               "shown; shrunk_psnr: of the samples made as small as rgb, to rgb"] if "rgb_hi" in context.names else []),
        ], self._plots(context, metrics))

    def _plots(self, context: Context, metrics: list[Metric]) -> list[Plot]:
        """Return, per judged modality, how often each attribute is named right from each source."""
        plots = []
        for target in JUDGED:
            found = {}
            for m in metrics:
                direction, _, what = m.name.rpartition("/")
                if direction.endswith(f"->{target}") and (what == "recognised" or what.endswith("_acc") and what != "token_acc"):
                    found.setdefault(direction.partition("->")[0], {})[what.removesuffix("_acc")] = m.value
            columns = list(dict.fromkeys(c for row in found.values() for c in row))
            if found:
                plots.append(Plot(
                    name=f"judged_{target}", title=f"Share of objects named right in generated {target}", kind="matrix",
                    rows=list(found), columns=columns, values=[[row.get(c) for c in columns] for row in found.values()],
                    x="attribute", y="source",
                ))
        return plots

    def _judged(self, context: Context, target: str) -> list[Metric]:
        judge = open_judge(context.dataset, target, context.progress)
        right = judge.correct(context.raw(target), context.labels)
        metrics = [mean_metric(f"{target}/judge_{a}_acc", r / np.maximum(n, 1), n) for a, (r, n) in right.items()]
        todo, n = plans(context, target), heard(context, target)
        context.ahead([(Made(plan, [target], None, n), target) for plan in todo], [(target, n)], f"{target} made")
        round_trip = self._round_trip(context, judge, target)
        mean = train_mean(context, "rgb") if target == "rgb" and todo else None

        def figures(plan: list[str]) -> list[Metric]:
            found = self._direction(context, judge, plan, target, round_trip)
            return found if mean is None else found + likeness(context, plan, mean)

        for found in context.spread(f"{target} judged", todo, figures):
            metrics += found
        if target == "rgb" and ["caption"] in todo and context.split == "test" and context.has_split("test_novel"):
            novel = context.on("test_novel")
            there = self._direction(novel, judge, ["caption"], target, self._round_trip(novel, judge, target))
            metrics += [m.model_copy(update={"name": m.name.replace("_acc", "_acc_novel"), "ceiling": None}) for m in there
                        if m.name.endswith("_acc")]
        return metrics

    def _round_trip(self, context: Context, judge: Judge, target: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        n = heard(context, target)
        return judge.named(context.round_trip(target, n), context.labels[:n])

    def _direction(
        self, context: Context, judge: Judge, sources: list[str], target: str, reference: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> list[Metric]:
        """Return the share of objects named right per attribute, and in all that the sources tell."""
        n = heard(context, target)
        named = judge.named(context.decoded(sources, [target], target, limit=n), context.labels[:n])
        name = context.direction(sources, target)
        share = lambda right, there: float((right & there).sum() / there.sum()) if there.any() else None  # noqa: E731
        metrics = [
            mean_metric(f"{name}/{a}_acc", (right & there).sum(1) / np.maximum(there.sum(1), 1), there.sum(1),
                        reference=share(*reference[a]), **context.baselines(sources, a))
            for a, (right, there) in named.items()
        ]
        told = [a for a in named if any(a in context.info.determined.get(s, []) for s in sources)]
        if told:
            every = lambda of: (np.all([of[a][0] for a in told], 0), of[told[0]][1])  # noqa: E731
            right, there = every(named)
            metrics.append(mean_metric(
                f"{name}/recognised", (right & there).sum(1) / np.maximum(there.sum(1), 1), there.sum(1), ceiling=1.0,
                chance=float(np.prod([1 / len(judge.attributes[a]) for a in told])), reference=share(*every(reference)),
            ))
        return metrics

    def _sharpened(self, context: Context) -> list[Metric]:
        """Return how near super-resolution comes to the truth, beside enlarging, and how true it stays to what it was given."""
        small, truth, name = context.raw("rgb"), context.raw("rgb_hi"), "rgb->rgb_hi"
        made = context.decoded(["rgb"], ["rgb_hi"], "rgb_hi", estimate(context, "rgb_hi"))
        drawn = context.decoded(["rgb"], ["rgb_hi"], "rgb_hi")
        own = psnr(context.round_trip("rgb_hi"), truth)
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


def likeness(context: Context, sources: list[str], mean: np.ndarray) -> list[Metric]:
    """Return PSNR and SSIM of generated pictures to the true ones."""
    truth, name, n = context.raw("rgb"), context.direction(sources, "rgb"), heard(context, "rgb")
    made, own = context.decoded(sources, ["rgb"], "rgb", limit=n), context.round_trip("rgb", n)
    return [
        mean_metric(f"{name}/{what}", error(made, truth), reference=float(error(own, truth).mean()), unit=unit,
                    majority=float(error([mean] * len(truth), truth).mean()))
        for what, error, unit in (("psnr", psnr, "dB"), ("ssim", ssim, ""))
        if what == "psnr" or min(mean.shape[:2]) >= 7  # the window of ssim
    ]


def depth_figures(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {"absrel": absrel(guess, truth), "rmse": rmse(guess, truth), "delta1": delta1(guess, truth)}


def normal_figures(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {"angle": angle(guess, truth), **angle_figures(guess, truth)}


# per target: its figures, the first of which is also told as a ratio to the tokenizer's own
FIGURES = {"depth": depth_figures, "normal": normal_figures}
UNITS = {"rmse": "m", "angle": "degrees", "angle_median": "degrees"}
HIGHER = ("delta1", "angle_under")


def measured(context: Context, target: str) -> list[Metric]:
    """Return the errors of depth or normals told from the picture, beside the tokenizer's own and the mean picture's."""
    figures, name = FIGURES[target], f"rgb->{target}"
    truth, how = context.raw(target), estimate(context, target)
    keep = [i for i, t in enumerate(truth) if target != "depth" or (t > 0).any()]  # some depth is known
    pick = lambda raws: [raws[i] for i in keep]  # noqa: E731
    truth = pick(truth)
    state = context.generate(["rgb"], [target], how)
    ids = context.ids(target, state.ids_BC)  # the likeliest, of the same pass
    weight = np.zeros(context.n)
    weight[keep] = 1.0

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros(context.n)
        out[keep] = values
        return out

    made = figures(pick(context.decoded(["rgb"], [target], target, how)), truth)
    own = figures(pick(context.round_trip(target)), truth)
    constant = figures([train_mean(context, target)] * len(truth), truth)
    main = next(iter(made))
    likeliest = figures(pick(context.tokenizer(target).decode(ids)), truth)[main]
    metrics = [
        mean_metric(f"{name}/{what}", spread(values), weight, reference=float(own[what].mean()), unit=UNITS.get(what, ""),
                    majority=float(constant[what].mean()), higher_is_better=what.startswith(HIGHER))
        for what, values in made.items()
    ]
    metrics += [
        mean_metric(f"{name}/{what}_ratio", spread(v / own[main].mean()), weight, higher_is_better=False, reference=1.0)
        for what, v in ((main, made[main]), (f"{main}_likeliest", likeliest))
    ]
    return [*metrics, token_accuracy(context, target, state.ids_BC)]


def token_accuracy(context: Context, target: str, ids_NC: np.ndarray) -> Metric:
    """Return the share of slots whose id is the true one, beside always saying each slot's commonest id of the train split."""
    spec, columns = context.layout.specs[context.names.index(target)], context.layout.slice(target)
    truth, inside = context.ids_NC[:, columns], context.inside_NC[:, columns]
    train = TokenData(context.dataset, context.run.config.data.train, context.names)
    seen = train.read(np.arange(min(len(train), 4000)))[0][:, columns]
    commonest = np.array([np.bincount(seen[:, c], minlength=spec.vocab_size).argmax() for c in range(seen.shape[1])])
    share = lambda guess: (inside & (guess == truth)).sum(1) / np.maximum(inside.sum(1), 1)  # noqa: E731
    return mean_metric(
        f"rgb->{target}/token_acc", share(ids_NC[:, columns]), inside.sum(1), chance=1.0 / spec.vocab_size,
        majority=float((inside & (commonest == truth)).sum() / max(inside.sum(), 1)),
    )

"""What was learned by heart: train against held-out loss, and how near generated samples are to train samples."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.data.loader import TokenData
from nano4m_cli.masking._base import Key
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context, Made
from nano4m_cli.probes._pieces import nll_work
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric

KIND = "eval"
FAR = 0.95  # a sample is suspiciously near where it is nearer to the train split than this share of real held-out ones


class Probe(Base):
    class Options(Config):
        """samples: generated per target. train: samples of the train split that tokens are compared with; pixels: with how many
        of them pictures are compared."""

        samples: Annotated[int, Field(ge=2)] = 200
        train: Annotated[int, Field(ge=1)] = 16_384
        pixels: Annotated[int, Field(ge=1)] = 4_000

    def missing(self, context: Context) -> str | None:
        train = context.run.config.data.train
        if context.split == train:
            return f"it compares a held-out split with the train split, and '{train}' was asked for"
        return None if context.dataset.tokens(context.names[0], train).is_dir() else f"the train split '{train}' has no tokens here"

    def measure(self, context: Context) -> Findings:
        metrics, notes = self._gaps(context)
        data = TokenData(context.dataset, context.run.config.data.train, context.names)
        train, length = data.read(np.arange(min(len(data), self.options.train)))
        table = []
        plans = [(s, t) for t in context.names if (s := source_of(context, t)) is not None]
        n = min(self.options.samples, context.n)
        shown = [t == "rgb" and t not in context.info.brought for _, t in plans]
        context.generated([Made(s, [t], None, n) for s, t in plans], "memorization")
        context.ahead([(Made(s, [t], None, n), t) for (s, t), decoded in zip(plans, shown, strict=True) if decoded])
        near = lambda plan: self._nearest(context, *plan, train, length[:, context.names.index(plan[1])])  # noqa: E731
        for found in context.spread("nearest", plans, near, [1.0 + 2.0 * decoded for decoded in shown]):
            metrics += found
            table.append([m.value for m in found[:3]] + [found[0].reference, found[1].reference])
        plots = [Plot(
            name="copies", title="How near generated samples are to the train split, and real held-out ones", kind="table",
            rows=[context.direction(s, t) for s, t in plans],
            columns=["nearest (share of slots)", "exact copies", "suspiciously near", "nearest, real", "exact copies, real"],
            values=table, y="direction",
        )] if plans else []
        return Findings(metrics, [
            *notes,
            f"nearest_train: share of a generated sample's slots that equal its nearest train sample's (of {len(train)}), "
            "reference: the same of real held-out samples; of text, whether it stands in the train split word for word",
            "exact_copies: share of generated samples whose tokens are those of a train sample, all of them; reference: of real "
            "held-out samples. Where whole samples repeat in the data, copies are no memorising: read both",
            f"near: share of generated samples nearer to the train split than {FAR:.0%} of the real ones (by chance {1 - FAR:.0%})",
            f"nearest_train_rmse: in pixels of 0..1, of decoded generated pictures to {self.options.pixels} real train pictures; "
            "reference: of the held-out samples' tokens decoded, so that the tokenizer's blur is on both sides",
        ], plots)

    def _gaps(self, context: Context) -> tuple[list[Metric], list[str]]:
        """Return held-out loss less train loss, at the same masks."""
        train = Context(context.run, context.run.config.data.train, context.n, context.seed, context.progress)
        n = min(train.n, context.n)
        means = []
        asks = [one.run.mixture.draw(one.length_NM, Key(context.seed, "eval-mask", np.arange(one.n))) for one in (context, train)]
        works = [nll_work(one, *ask) for one, ask in zip((context, train), asks, strict=True)]
        for nll in context.answers("train against held-out loss", works):
            parts = [nll[:n, context.layout.slice(m)] for m in context.names]
            there = [~np.isnan(p) for p in parts]
            mean = [np.where(t, p, 0).sum(1) / np.maximum(t.sum(1), 1) for p, t in zip(parts, there, strict=True)]
            means.append([(x, t.any(1)) for x, t in zip(mean, there, strict=True)])
        metrics = []
        for name, (test, has), (seen, had) in zip(context.names, *means, strict=True):
            both = (has & had).astype(np.float64)
            more = {"higher_is_better": False, "unit": "nats"}
            metrics.append(mean_metric(f"{name}/ce_train", seen, both, **more))
            metrics.append(mean_metric(f"{name}/ce_gap", test - seen, both, reference=0.0, **more))
        return metrics, [
            f"ce_gap: held-out less train cross-entropy (nats per token, mean over samples), the first {n} samples of each, masks "
            "drawn with the same keys: samples i of both are asked alike",
        ]

    def _nearest(
        self, context: Context, sources: list[str], target: str, train: np.ndarray, length: np.ndarray
    ) -> list[Metric]:
        name, columns = context.direction(sources, target), context.layout.slice(target)
        n = min(self.options.samples, context.n)
        state = context.generate(sources, [target], limit=n)
        spec, m = context.layout.specs[context.names.index(target)], context.names.index(target)
        real = context.ids_NC[:n, columns]
        if spec.kind == "sequence":
            known = {row[:l].tobytes() for row, l in zip(train[:, columns], length, strict=True)}
            made = [row[:l] for row, l in zip(state.ids_BC[:, columns], state.known_BC[:, columns].sum(1), strict=True)]
            true = [row[:l] for row, l in zip(real, context.length_NM[:n, m], strict=True)]
            near, truth = (np.array([float(x.tobytes() in known) for x in some]) for some in (made, true))
        else:
            there = train[length > 0][:, columns]
            near, truth = nearest(state.ids_BC[:, columns], there), nearest(real, there)
        limit = np.quantile(truth, FAR)
        copies, own = near >= 1, truth >= 1
        metrics = [
            mean_metric(f"{name}/nearest_train", near, higher_is_better=False, reference=float(truth.mean())),
            mean_metric(f"{name}/exact_copies", copies, higher_is_better=False, reference=float(own.mean())),
            mean_metric(f"{name}/near", near > limit, higher_is_better=False, chance=float((truth > limit).mean())),
        ]
        if target == "rgb" and target not in context.info.brought:
            seen = _flat(Context(context.run, context.run.config.data.train, self.options.pixels, 0, context.progress).raw(target))
            made = _flat(context.decoded(sources, [target], target, limit=n))
            true = _flat(context.tokenizer(target).decode(context.ids(target)[:n]))
            metrics.append(mean_metric(f"{name}/nearest_train_rmse", nearest_rmse(made, seen),
                                       reference=float(nearest_rmse(true, seen).mean())))
        return metrics


def source_of(context: Context, target: str) -> list[str] | None:
    """Return the single source that training showed most often for a target (nothing, where the model reads nothing else)."""
    able = [[s] for s in context.names if s != target and context.model.reads([s], target)]
    if not able:
        return [] if context.model.reads([], target) else None
    return max(able, key=lambda s: context.run.directions.get(context.direction(s, target), 0.0))


def nearest(ids_BL: np.ndarray, train_NL: np.ndarray) -> np.ndarray:
    """Return (B,): the largest share of slots in which a row equals one of the train split's."""
    return np.array([(train_NL == row).sum(1).max() / len(row) for row in ids_BL])


def nearest_rmse(x_BP: np.ndarray, train_NP: np.ndarray) -> np.ndarray:
    """Return (B,): root mean square error of each row to the nearest of the train split's."""
    square = (x_BP**2).sum(1)[:, None] + (train_NP**2).sum(1) - 2 * x_BP @ train_NP.T
    return np.sqrt(np.clip(square.min(1), 0, None) / x_BP.shape[1])


def _flat(raws: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(r, dtype=np.float32).ravel() / 255 for r in raws])

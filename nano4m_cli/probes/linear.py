"""Linear readout of attributes from frozen encoder features, per layer and source modality."""

from __future__ import annotations

import numpy as np
import torch

from nano4m_cli.model.fourm import FourM
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, mean_metric

KIND = "probe"
FIT = 2000
RIDGE = 1.0


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        if not isinstance(context.model, FourM):
            return f"features are read from runs of task fourm, this is one of task {context.run.config.task}"
        return None if context.info.attributes else f"data set '{context.dataset.name}' states no attributes"

    def measure(self, context: Context) -> Findings:
        fit = Context(context.run, context.run.config.data.train, FIT, context.seed, context.progress)
        metrics = []
        for source in context.names:
            context.progress(f"linear from {source}", context.names.index(source), len(context.names))
            train, test = features(fit, source), features(context, source)
            for layer, (x, z) in enumerate(zip(train, test, strict=True)):
                for attribute, values in context.attributes.items():
                    # The first object's attribute: defined for every sample.
                    y = np.array([values.index(v[0]) for v in fit.values(attribute)])
                    truth = np.array([values.index(v[0]) for v in context.values(attribute)])
                    guess = ridge_classifier(x, y, z, len(values))
                    metrics.append(mean_metric(
                        f"{source}/layer{layer}_{attribute}_acc", guess == truth, **context.baselines([source], attribute)
                    ))
        return Findings(metrics, [
            f"features: mean of the encoder's tokens when one modality is shown whole, per layer (0: embedding); readout: "
            f"ridge classifier (lambda {RIDGE}) fitted on {fit.n} train samples; target: the first object's attribute",
        ])


def features(context: Context, source: str) -> list[np.ndarray]:
    """Return per layer (N, D): mean encoder tokens of each sample with `source` shown whole; layer 0 is the embedding."""
    shown = context.inside_NC & context.columns(source)
    parts: list[list[np.ndarray]] = []
    for a in range(0, context.n, 200):
        packed = context.pack(context.ids_NC[a : a + 200], shown[a : a + 200], np.zeros_like(shown[a : a + 200]))
        layers: list[torch.Tensor] = []
        with torch.inference_mode():
            first = context.model.embed_shown(packed)
            context.model.encode(packed, layers)
        lengths = packed.enc.lengths.cpu()
        row = torch.repeat_interleave(torch.arange(packed.samples), lengths)
        means = []
        for x in [first, *layers]:
            total = torch.zeros(packed.samples, x.shape[1]).index_add(0, row, x.float().cpu())
            means.append((total / lengths[:, None]).numpy())
        parts.append(means)
    return [np.concatenate([p[i] for p in parts]) for i in range(len(parts[0]))]


def ridge_classifier(x: np.ndarray, y: np.ndarray, z: np.ndarray, classes: int, penalty: float = RIDGE) -> np.ndarray:
    """Return the guessed class (len(z),) of a ridge regression to one-hot targets on standardised features."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / std, (z - mean) / std
    target = np.eye(classes)[y]
    offset = target.mean(0)
    weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (target - offset))
    return (z @ weight + offset).argmax(1)

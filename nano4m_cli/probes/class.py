"""Zero-shot attributes from any modality: which wording of the true caption is the most likely one."""

from __future__ import annotations

import numpy as np

from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context, missing
from nano4m_cli.probes._result import Findings, mean_metric

KIND = "eval"


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        if not context.info.attributes:
            return f"data set '{context.dataset.name}' states no attributes"
        return missing(context, "caption")

    def measure(self, context: Context) -> Findings:
        rows, texts, owner = candidates(context)
        metrics = []
        for source in context.names:
            if source == "caption" or not context.model.reads([source], "caption"):
                continue
            context.progress(f"class from {source}", context.names.index(source), len(context.names))
            score = context.text_logp([source], "caption", texts, owner)
            right: dict[str, np.ndarray] = {a: np.zeros(context.n) for a in context.attributes}
            asked: dict[str, np.ndarray] = {a: np.zeros(context.n) for a in context.attributes}
            for sample, attribute, truth, options in rows:
                right[attribute][sample] += options[int(np.argmax(score[[t for _, t in options]]))][0] == truth
                asked[attribute][sample] += 1
            for attribute in context.attributes:
                if asked[attribute].sum():
                    value = right[attribute] / np.maximum(asked[attribute], 1)
                    name = f"{context.direction([source], 'caption')}/{attribute}_acc"
                    baselines = context.baselines([source], attribute, told=True)
                    metrics.append(mean_metric(name, value, asked[attribute], **baselines))
        return Findings(metrics, [
            "each attribute word of the true caption is replaced by every alternative of the same wording; the other "
            "words stay as they are, so they may tell (ceilings count that); scores are mean log-likelihood per token of the "
            "full caption",
        ])


def candidates(context: Context) -> tuple[list[tuple[int, str, str, list[tuple[str, int]]]], list[np.ndarray], np.ndarray]:
    """Return (questions, token ids of the texts they compare, the sample each text belongs to).

    A question is (sample, attribute, true value, [(value, index of its text)]); equal texts of a sample are scored once.
    """
    tokenizer, info = context.tokenizer("caption"), context.info
    captions = context.raw_captions()
    rows, strings, owner = [], [], []
    for i, label in enumerate(context.labels):
        seen: dict[str, int] = {}
        for field in label["fields"]:
            surfaces = info.attributes[field["attribute"]].surfaces
            begin, end = field["span"]
            options = []
            for value in info.attributes[field["attribute"]].values:
                text = captions[i][:begin] + surfaces[value][field["wording"]] + captions[i][end:]
                if text not in seen:
                    seen[text] = len(strings)
                    strings.append(text)
                    owner.append(i)
                options.append((value, seen[text]))
            truth = label["objects"][field["object"]][field["attribute"]]
            rows.append((i, field["attribute"], truth, options))
    return rows, tokenizer.encode(strings), np.array(owner)

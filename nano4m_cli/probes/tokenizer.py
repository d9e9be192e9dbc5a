"""The tokenizers' own round trip: what no model over these ids can exceed."""

from __future__ import annotations

from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import SOUND
from nano4m_cli.probes._result import Findings, Metric, mean_metric
from nano4m_cli.probes._roundtrip import codebook, fidelity
from nano4m_cli.registry import MODALITIES
from nano4m_cli.spec import TokenSpec

KIND = "eval"
BETTER = {"psnr", "ssim", "equal", "codes_used"}
UNITS = {"psnr": "dB", "angle": "degrees", "mel": "nats", "mel_wave": "nats"}


class Probe(Base):
    def measure(self, context: Context) -> Findings:
        specs = context.layout.specs
        costs = [SOUND if MODALITIES.get(s.modality).kind == "audio" else 1.0 for s in specs]
        found = context.spread("round trips", specs, lambda spec: figures(context, spec), costs)
        return Findings([m for metrics in found for m in metrics], [
            "stored_ids_equal: share of samples whose ids on disk are those that encoding gives now (first 50)",
        ])


def figures(context: Context, spec: TokenSpec) -> list[Metric]:
    """Return the figures of one modality."""
    name, ids, metrics = spec.modality, context.ids(spec.modality), []
    used = [Metric(name=f"{name}/{f}", value=v, n=context.n) for f, v in codebook(ids, spec).items()]
    if name in context.info.brought:  # neither the raw values nor their tokenizer are here
        return used
    for figure, values in fidelity(context.tokenizer(name), context.raw(name), ids).items():
        more = {"higher_is_better": figure in BETTER, "unit": UNITS.get(figure, "")}
        metrics.append(mean_metric(f"{name}/{figure}", values, **more))
    fresh = context.tokenizer(name).encode(context.raw(name)[:50])
    same = [float((a == b).all()) for a, b in zip(fresh, ids[:50], strict=True) if len(a) == len(b)]
    return [*metrics, *used, mean_metric(f"{name}/stored_ids_equal", same or [0.0])]

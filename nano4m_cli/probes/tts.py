"""Speech synthesis: how near it comes to recordings, whether it is understood, and a page on which people rate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nano4m_cli import dist
from nano4m_cli.probes import _speech as speech
from nano4m_cli.probes import _speech_sound as sound
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._speech_listen import write_page
from nano4m_cli.probes._speech_recogniser import BaselineOptions, Recogniser, baseline, own_judge
from nano4m_cli.rng import permutation

KIND = "eval"
NOTES = [
    "compared with the sample's own recording: chance is a recording of other words, reference the recording after the tokenizer's "
    "round trip; *_same_words: another recording of the same words, which is all that can be asked of a good speaker",
    f"mcd: mel-cepstral distance (Kubichek 1993), c1 to c{sound.ORDER} of {sound.BANDS} mel bands below "
    f"{sound.TOP_HZ / 1000:g} kHz, frames aligned by dynamic time warping, silence at both ends cut off; not comparable with "
    "other tools' cepstra",
    f"stoi: Taal et al. 2011 by pystoi; it compares moment with moment, so it judges a copy (the round trip) rather than a new "
    f"utterance; recordings whose speech lasts under {sound.SHORTEST} s are left out, where it means nothing, and those of "
    "which pystoi keeps too little; n: how many could be compared",
    "duration: how much longer or shorter the speech is than the recording's; silent: share of sounds in which nothing is heard",
    "wer_*: word errors of what a recogniser writes of the sound; its own on real recordings stands beside (audio/wer_*)",
]


class Probe(Base):
    class Options(BaselineOptions):
        """clips: of the split, at most. pesq: whether PESQ is measured as well (needs the package pesq). normalise: see asr.

        listen: folder to write a listening test into (listen.html for raters, key.json to keep). items: recordings in it.
        """

        normalise: speech.Normalise = "basic"
        clips: int = Field(200, ge=1)
        pesq: bool = False
        listen: str | None = None
        items: int = Field(12, ge=1, le=60)

    def missing(self, context: Context) -> str | None:
        if lack := speech.missing(context):
            return lack
        if find_spec("pystoi") is None:
            return f"package 'pystoi' is not installed ({sound.INSTALL['pystoi']})"
        return None if self._directions(context) else "the run cannot make sound from a transcript"

    def _directions(self, context: Context) -> list[tuple[str, str]]:
        return [(t, s) for t in speech.transcribed(context) for s in speech.sounding(context.names) if context.model.reads([t], s)]

    def measure(self, context: Context) -> Findings:
        o, metrics, rows = self.options, [], []
        published = baseline(o, "tts")
        if o.pesq and find_spec("pesq") is None:
            raise sound.lacks("pesq")
        notes, plots = list(NOTES), []
        for source, target in self._directions(context):
            name, n = context.direction([source], target), min(o.clips, context.n)
            how, plain = context.info.transcripts[source], speech.normaliser(o.normalise)
            said = [plain(speech.spoken(t, how)) for t in speech.texts(context, source)[:n]]
            truth = context.raw(target)[:n]
            context.progress(name, 0, 1)
            systems = {
                "truth": truth, "round_trip": context.tokenizer(target).decode(context.ids(target)[:n]),
                "generated": context.decoded([source], [target], target, limit=n),
            }
            near = self._near(context, name, target, systems, said)
            understood = self._understood(context, name, target, published, systems, said, plain, notes)
            metrics += near + understood
            rows += [(f"{target}: {system}", system, target, name) for system in systems]
            if short := sum(sound.seconds(t) < sound.SHORTEST for t in truth):
                notes.append(f"stoi of {name}: {short} of {n} recordings hold under {sound.SHORTEST} s of speech and are left out")
            if o.listen is not None:
                keys = [context.tokens.key(i) for i in range(n)]
                folder = Path(o.listen) if len(self._directions(context)) == 1 else Path(o.listen) / f"{source}-{target}"
                shown = dist.by_first(lambda: write_page(folder, context, name, keys, systems, o.items))  # noqa: B023
                notes.append(f"a listening test of {shown} sounds was written for {name}: send listen.html, keep key.json; "
                             "then 'nano4m eval --probe mos mos.ratings=DIR'")
            options = context.sampling([target])
            notes.append(f"{target} was sampled with {', '.join(f'{k} {v}' for k, v in options.model_dump().items())}")
        plots.append(_overview(metrics, rows))
        return Findings(metrics, list(dict.fromkeys(notes)), plots)

    def _near(
        self, context: Context, name: str, target: str, systems: dict[str, list[Any]], said: Sequence[str]
    ) -> list[Metric]:
        truth, made, trip = systems["truth"], systems["generated"], systems["round_trip"]
        other, same = (partners(said, context.seed, alike) for alike in (False, True))
        metrics = []
        figures: dict[str, tuple[Callable, str, bool]] = {"mcd": (sound.mcd, "dB", False), "stoi": (sound.stoi, "", True)}
        if self.options.pesq:
            figures["pesq"] = (sound.pesq, "", True)
        for what, (figure, unit, higher) in figures.items():
            of = lambda some, f=figure, what=what: np.array(context.spread(  # noqa: E731 - NaN where there is nothing to compare
                f"{what} of {target}", list(zip(some, truth, strict=True)),
                lambda pair: np.nan if pair[0] is None else f(*pair)))
            more = {"unit": unit, "higher_is_better": higher}
            near = of(trip)
            chance = of([None if i is None else truth[i] for i in other])
            metrics.append(_mean(f"{name}/{what}", of(made), reference=_nanmean(near), chance=_nanmean(chance), **more))
            metrics.append(_mean(f"{target}/{what}_round_trip", near, **more))
            if any(i is not None for i in same):
                metrics.append(_mean(f"{target}/{what}_same_words", of([None if i is None else truth[i] for i in same]), **more))
        off = [abs(sound.seconds(m) - sound.seconds(t)) for m, t in zip(made, truth, strict=True)]
        silent = [float(not len(sound.trimmed(m))) for m in made]
        return [
            *metrics, mean_metric(f"{name}/duration", off, unit="s", higher_is_better=False),
            mean_metric(f"{name}/silent", silent, higher_is_better=False),
        ]

    def _understood(
        self, context: Context, name: str, target: str, published: Recogniser | None, systems: dict[str, list[Any]],
        said: list[str], plain: Callable[[str], str], notes: list[str],
    ) -> list[Metric]:
        metrics = []
        keep = [i for i, s in enumerate(said) if s]
        for by in (own_judge(context, target, context.progress), published):
            if by is None or not keep:
                continue
            rows = keep if by is not published else keep[: self.options.heard]
            words = [said[i] for i in rows]
            rates = {}
            for done, (system, waves) in enumerate(systems.items()):
                context.progress(f"{by.name} hears {target}", done, len(systems))
                rates[system] = speech.errors(words, [plain(h) for h in by.transcribe([waves[i] for i in rows])])
            trip, made = rates["round_trip"], rates["generated"]
            chance = speech.corpus_rate(words, speech.guesses(words, [], context.seed)[0])
            more = {"reference": float(trip.total.sum() / trip.length.sum()), "chance": chance}
            metrics += [
                speech.rate(f"{name}/wer_{by.name}", made.total, made.length, **more),
                speech.rate(f"{target}/wer_{by.name}_round_trip", trip.total, trip.length),
                speech.rate(f"{target}/wer_{by.name}", rates["truth"].total, rates["truth"].length),
            ]
            notes.append(by.note + ("" if len(rows) == len(keep) else f"; it heard the first {len(rows)} utterances"))
        return metrics


def partners(said: Sequence[str], seed: int, alike: bool) -> list[int | None]:
    """Return for each utterance the next one, in the circle of a fixed shuffle, of the same words (or of others); None: none is."""
    order = [int(i) for i in permutation(len(said), seed, "tts/partners")]
    place = {i: p for p, i in enumerate(order)}
    circle = lambda i: order[place[i] + 1 :] + order[: place[i]]  # noqa: E731
    return [next((j for j in circle(i) if (said[j] == said[i]) == alike), None) for i in range(len(said))]


def _nanmean(values: np.ndarray) -> float | None:
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else None


def _mean(name: str, values: np.ndarray, **more: Any) -> Metric:
    """Return the mean of what could be measured."""
    return mean_metric(name, np.nan_to_num(values), np.isfinite(values).astype(float), **more)


def _overview(metrics: Sequence[Metric], rows: Sequence[tuple[str, str, str, str]]) -> Plot:
    """Return the table of all systems by all figures that more than one of them has."""
    value = {m.name: m.value for m in metrics}
    columns = sorted({m.name.rpartition("/")[2] for m in metrics if "->" in m.name} - {"duration", "silent"})
    suffix = {"truth": "", "round_trip": "_round_trip"}
    cells = [[value.get(f"{name}/{c}" if system == "generated" else f"{target}/{c}{suffix[system]}") for c in columns]
             for _, system, target, name in rows]
    return Plot(name="systems", title="The recording, its round trip through the tokenizer, and what is generated", kind="table",
                rows=[r[0] for r in rows], columns=list(columns), values=cells)

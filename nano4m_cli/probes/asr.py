"""Speech recognition: word and character errors of transcripts, beside recognisers and readers that hear nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from nano4m_cli.generate.sampler import GenerateOptions
from nano4m_cli.probes import _speech as speech
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._speech_recogniser import BaselineOptions, Recogniser, baseline, own_judge

KIND = "eval"
KINDS = ("substitutions", "deletions", "insertions")


@dataclass(frozen=True)
class Heard:
    """What a recogniser wrote of the real sound and of the tokenizer's round trip, and what was said, of the same utterances."""

    by: Recogniser
    said: list[str]
    real: list[str]
    trip: list[str]


class Probe(Base):
    class Options(BaselineOptions):
        """normalise: what is done to transcripts before they are compared: basic, english (Whisper's), none.

        temperature: of the text that the run writes; 0 takes the likeliest word at each place.
        """

        normalise: speech.Normalise = "basic"
        temperature: float = Field(0.0, ge=0)

    def missing(self, context: Context) -> str | None:
        if lack := speech.missing(context):
            return lack
        return None if self._directions(context) else "the run cannot tell a transcript from sound"

    def _directions(self, context: Context) -> list[tuple[str, str]]:
        return [(s, t) for s in speech.sounding(context.names) for t in speech.transcribed(context) if context.model.reads([s], t)]

    def measure(self, context: Context) -> Findings:
        o, plain = self.options, speech.normaliser(self.options.normalise)
        published = baseline(o, "asr")  # weights that cannot be had are told of before any work
        metrics: list[Metric] = []
        plots: list[Plot] = []
        notes = [
            f"normalisation of both sides, '{o.normalise}': {speech.SAID[o.normalise]}",
            "errors by jiwer; rates are sums of errors over sums of reference words (cer: characters), intervals by bootstrap over "
            "utterances; exact: share of utterances without an error",
            "chance: the transcript of another utterance of the split; majority: the train split's commonest transcript",
        ]
        for source, target in self._directions(context):
            how, name = context.info.transcripts[target], context.direction([source], target)
            said = [plain(speech.spoken(t, how)) for t in speech.texts(context, target)]
            keep = [i for i, s in enumerate(said) if s]
            if len(keep) < len(said):
                notes.append(f"{len(said) - len(keep)} of {len(said)} transcripts in {target} are empty: they are left out")
            if not keep:
                continue
            said = [said[i] for i in keep]
            beside = self._beside(context, published, source, keep, said, plain)
            context.progress(name, 0, 1)
            options = GenerateOptions(seed=context.seed, text_temperature=o.temperature, guidance=1.0)
            written = context.decoded([source], [target], target, options)
            heard = [plain(speech.spoken(written[i], how)) for i in keep]
            blind = speech.guesses(said, [plain(t) for t in speech.train_transcripts(context, target)], context.seed)
            metrics += _compared(name, said, heard, blind, next((b for b in beside if b.by.name == "judge"), None))
            for one in beside:
                metrics += [_wer(f"{source}/wer_{one.by.name}", one.said, one.real),
                            _wer(f"{source}/wer_{one.by.name}_round_trip", one.said, one.trip)]
                few = "" if len(one.said) == len(said) else f"; it heard the first {len(one.said)} utterances"
                notes.append(one.by.note + few)
            keys = [context.tokens.key(i) for i in keep]
            plots += [
                speech.examples(f"{name}/alignments", f"{name}: what is said, and what is written", keys, said, heard),
                speech.confusions(f"{name}/confusions", said, heard),
            ]
        return Findings(metrics, list(dict.fromkeys(notes)), plots)

    def _beside(
        self, context: Context, published: Recogniser | None, source: str, keep: Sequence[int], said: list[str],
        plain: Callable[[str], str],
    ) -> list[Heard]:
        out = []
        for by in (own_judge(context, source, context.progress), published):
            if by is None:
                continue
            rows = keep if by is not published else keep[: self.options.heard]
            real, ids = context.raw(source), context.ids(source)
            trip = context.tokenizer(source).decode([ids[i] for i in rows])
            context.progress(f"{by.name} hears {source}", 0, len(rows))
            wrote = [[plain(h) for h in by.transcribe(waves)] for waves in ([real[i] for i in rows], trip)]
            out.append(Heard(by, said[: len(rows)], *wrote))
        return out


def _wer(name: str, said: Sequence[str], heard: Sequence[str]) -> Metric:
    words = speech.errors(said, heard)
    return speech.rate(name, words.total, words.length)


def _compared(name: str, said: list[str], heard: list[str], blind: Sequence[list[str]], judge: Heard | None) -> list[Metric]:
    """Return a direction's figures; the reference is what the data set's judge makes of the real sound."""
    right = lambda a, b: [float(x == y) for x, y in zip(a, b, strict=True)]  # noqa: E731
    figures = {
        "wer": speech.corpus_rate, "cer": lambda a, b: speech.corpus_rate(a, b, "characters"),
        "exact": lambda a, b: float(np.mean(right(a, b))),
    }
    known = {
        k: {"chance": f(said, blind[0]), "majority": f(said, blind[1]), "reference": f(judge.said, judge.real) if judge else None}
        for k, f in figures.items()
    }
    words, letters = speech.errors(said, heard), speech.errors(said, heard, "characters")
    return [
        speech.rate(f"{name}/wer", words.total, words.length, **known["wer"]),
        speech.rate(f"{name}/cer", letters.total, letters.length, **known["cer"]),
        *[speech.rate(f"{name}/{kind}", getattr(words, kind), words.length) for kind in KINDS],
        mean_metric(f"{name}/exact", right(said, heard), **known["exact"]),
    ]

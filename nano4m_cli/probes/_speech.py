"""What the probes of speech share: transcripts, their normalisation, word and character errors, alignments."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources._base import DatasetInfo, Transcript
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Metric, Plot, ratio_interval
from nano4m_cli.registry import MODALITIES
from nano4m_cli.rng import permutation

Normalise = Literal["basic", "english", "none"]
SAID = {
    "basic": "Unicode NFKC, lower case, punctuation taken as a space (but ' between letters), one space between words",
    "english": "Whisper's English normaliser (Radford et al. 2022, appendix C): numbers as digits, contractions written out, "
               "fillers left out; without its list of British spellings",
    "none": "none: upper case and punctuation count",
}
TRAIN = 4000  # samples of the train split that baselines look at
SHOWN = 8  # examples of each kind in a table


# -- transcripts ------------------------------------------------------------------------------------------------------


def missing(context: Context) -> str | None:
    """Return why a run's data set cannot serve probes of speech, as text, or None."""
    sounds, texts = sounding(context.names), transcribed(context)
    name = context.dataset.name
    if not sounds:
        return "the run has no sound"
    if not context.info.transcripts:
        described = [m for m in context.names if MODALITIES.get(m).kind == "text"]
        return (
            f"data set '{name}' has no transcripts"
            + (f": nothing says that its {' and '.join(described)} is what is said in the sound, word for word, and not what "
               "describes it (a source says so, e.g. 'nano4m fetch folder transcripts=true'; fetched before it did: fetch again)"
               if described else "")
        )
    if not texts:
        return f"the run has no {' and no '.join(context.info.transcripts)}, where the transcripts of '{name}' stand"
    if brought := [m for m in (*sounds, *texts) if m in context.info.brought]:
        return f"the {brought[0]} tokens of '{name}' came without their tokenizer: nothing can be heard or read"
    return None


def sounding(names: Sequence[str]) -> list[str]:
    """Return the modalities that are sound."""
    return [n for n in names if MODALITIES.get(n).kind == "audio"]


def transcribed(context: Context) -> list[str]:
    """Return the run's modalities that hold transcripts."""
    return [n for n in context.names if n in context.info.transcripts]


def spoken(text: str, how: Transcript) -> str:
    """Return the words said in a text: what lies between the marks; where one is missing, from its begin or to its end."""
    begin = text.find(how.before)
    text = text[begin + len(how.before) :] if begin >= 0 else text
    end = text.find(how.after) if how.after else -1
    return text[:end] if end >= 0 else text


def texts(context: Context, modality: str) -> list[str]:
    """Return a text modality as written, of every sample."""
    raw, kind = Split(context.dataset.raw(context.split)), MODALITIES.get(modality)
    return [kind.from_bytes(raw.read(i, kind.ext), context.tokens.key(i)) for i in range(context.n)]


def train_transcripts(context: Context, modality: str) -> list[str]:
    """Return the words said in the first samples of the train split, as written."""
    raw, kind = Split(context.dataset.raw("train")), MODALITIES.get(modality)
    how = context.info.transcripts[modality]
    return [spoken(kind.from_bytes(raw.read(i, kind.ext), "train"), how) for i in range(min(len(raw), TRAIN))]


def wordings(info: DatasetInfo, how: Transcript) -> dict[str, str]:
    """Return the word of each value of the attribute that transcripts are made of."""
    return {value: words[0] for value, words in info.attributes[how.attribute].surfaces.items()}


# -- normalisation ----------------------------------------------------------------------------------------------------


def normaliser(name: Normalise) -> Callable[[str], str]:
    """Return what is done to references and hypotheses alike before they are compared (see SAID)."""
    if name == "none":
        return lambda text: " ".join(text.split())
    if name == "english":
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        return EnglishTextNormalizer({})
    return basic


def basic(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return " ".join("".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


# -- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Counts (N,) per utterance, by a minimal edit of the reference into the hypothesis; `length`: of the reference."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray
    length: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions


def errors(references: Sequence[str], hypotheses: Sequence[str], of: Literal["words", "characters"] = "words") -> Errors:
    """Return what it takes to edit each reference into its hypothesis, by jiwer; both are normalised already.

    An empty reference has length 0, and every word of its hypothesis is an insertion.
    """
    import jiwer

    counts = np.zeros((4, len(references)), dtype=np.int64)
    for i, (r, h) in enumerate(zip(references, hypotheses, strict=True)):
        if not r:
            counts[:, i] = 0, 0, len(h.split() if of == "words" else h), 0
            continue
        out = jiwer.process_words(r, h) if of == "words" else jiwer.process_characters(r, h)
        counts[:, i] = out.substitutions, out.deletions, out.insertions, out.hits + out.substitutions + out.deletions
    return Errors(*counts)


def rate(name: str, counts_N: np.ndarray, length_N: np.ndarray, **more) -> Metric:
    """Return errors per reference unit: the ratio of sums, with a bootstrap interval over utterances."""
    top, bottom = np.asarray(counts_N, np.float64), np.asarray(length_N, np.float64)
    there = bottom > 0  # an empty reference belongs to no rate per word: how many there are is told apart
    value, interval = ratio_interval(top[there], bottom[there]) if there.any() else (float("nan"), (float("nan"),) * 2)
    per_sample = (np.where(there, top / np.maximum(bottom, 1), 0.0), bottom)
    return Metric(name=name, value=value, n=int(there.sum()), ci95=interval, higher_is_better=False, per_sample=per_sample, **more)


def corpus_rate(references: Sequence[str], hypotheses: Sequence[str], of: Literal["words", "characters"] = "words") -> float:
    """Return errors per unit of the non-empty references (NaN without any)."""
    e = errors(references, hypotheses, of)
    there = e.length > 0
    return float(e.total[there].sum() / e.length[there].sum()) if there.any() else float("nan")


def guesses(references: Sequence[str], train: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Return what a reader that hears nothing may say: (another utterance's transcript, the train split's commonest one).

    The other utterance is that of the next place in a fixed shuffle, so that none is its own wherever there are two.
    """
    order = permutation(len(references), seed, "speech/another")
    other = np.empty_like(order)
    other[order] = np.roll(order, -1)
    commonest = min(Counter(train).items(), key=lambda c: (-c[1], c[0]))[0] if train else ""
    return [references[i] for i in other], [commonest] * len(references)


# -- alignments -------------------------------------------------------------------------------------------------------


def steps(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Return the alignment as pairs of words: ("", word) is inserted, (word, "") deleted, unequal ones substituted."""
    import jiwer

    if not reference:
        return [("", w) for w in hypothesis.split()]
    out = jiwer.process_words(reference, hypothesis)
    r, h, pairs = out.references[0], out.hypotheses[0], []
    for part in out.alignments[0]:
        said, heard = r[part.ref_start_idx : part.ref_end_idx], h[part.hyp_start_idx : part.hyp_end_idx]
        width = max(len(said), len(heard))
        pairs += zip([*said, *[""] * (width - len(said))], [*heard, *[""] * (width - len(heard))], strict=True)
    return pairs


def aligned(reference: str, hypothesis: str) -> str:
    """Return an alignment as one line: "two>ten" substituted, "-two" deleted, "+ten" inserted, words alone are right."""
    mark = lambda r, h: f"+{h}" if not r else f"-{r}" if not h else r if r == h else f"{r}>{h}"  # noqa: E731
    return " ".join(mark(r, h) for r, h in steps(reference, hypothesis))


def examples(name: str, title: str, keys: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> Plot:
    """Return the table of the first SHOWN utterances, and of the SHOWN with most errors per word (of equal ones the first)."""
    e = errors(references, hypotheses)
    worst = sorted(range(len(keys)), key=lambda i: (-e.total[i] / max(e.length[i], 1), i))
    worst = [i for i in worst if e.total[i]][:SHOWN]
    chosen = [("first", i) for i in range(min(SHOWN, len(keys)))] + [("worst", i) for i in worst]
    return Plot(
        name=name, title=title, kind="table",
        rows=[f"{kind}: {keys[i]}" for kind, i in chosen],
        columns=["reference", "hypothesis", "alignment", "errors", "words"],
        values=[[references[i], hypotheses[i], aligned(references[i], hypotheses[i]), float(e.total[i]), float(e.length[i])]
                for _, i in chosen],
        x="a>b: b written for a; -a: left out; +b: added",
    )


def confusions(name: str, references: Sequence[str], hypotheses: Sequence[str], most: int = 12) -> Plot:
    """Return the matrix of which word was written for which, of the references' `most` commonest words.

    A row sums to one with "other" (another word) and "left out"; None where a word was never said.
    """
    pairs = [p for r, h in zip(references, hypotheses, strict=True) for p in steps(r, h) if p[0]]
    count = Counter(r for r, _ in pairs)
    words = sorted(sorted(count, key=lambda w: (-count[w], w))[:most])
    table = Counter((r, h if h in words else "other" if h else "left out") for r, h in pairs)
    columns = [*words, "other", "left out"]
    return Plot(
        name=name, title="Which word is written for which (share of the word's occurrences)", kind="matrix", rows=words,
        columns=list(columns), values=[[table[w, c] / count[w] for c in columns] for w in words], x="written", y="said",
    )

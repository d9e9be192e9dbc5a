"""Real spoken digits (Free Spoken Digit Dataset) with real handwritten ones (MNIST), paired by label; also sequences."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from nano4m_cli import rng
from nano4m_cli.config import Config
from nano4m_cli.data.sources import _base
from nano4m_cli.data.sources import _digits_files as files
from nano4m_cli.data.sources import _digits_pairs as pairing
from nano4m_cli.data.sources import _digits_sequences as sequences
from nano4m_cli.data.sources._base import Attribute, DatasetInfo, Sample, ShardPlan
from nano4m_cli.data.sources._digits_pairs import ACCENTS, SPEAKERS, SPLITS, WORDS, Pair
from nano4m_cli.data.sources._digits_sequences import Line
from nano4m_cli.errors import FetchError, did_you_mean
from nano4m_cli.modalities.audio import MODALITY as AUDIO
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.modalities.rgb import MODALITY as RGB

LISTS = {
    "clip": "digits_av/pairs_clip_disjoint.csv",
    "speaker:theo": "digits_av/pairs_speaker_disjoint.csv",
}
SECONDS = 1.0  # 99.3 % of the recordings are not longer; the longest lasts 2.28 s
SURFACES = {
    "digit": {str(d): [word] for d, word in enumerate(WORDS)},
    "accent": {value: [surface] for value, surface in ACCENTS.items()},
}
NOTES = (
    "Recordings: Free Spoken Digit Dataset (Jakobovski et al., commit 26eb9aa), CC-BY-SA-4.0; six male speakers, 8 kHz "
    "(nothing above 4 kHz). Pictures: MNIST (LeCun, Cortes, Burges); the mirror it comes from states no licence. "
    "Pairs share their digit and nothing else: digit accuracy across modalities is meaningful (chance 10 %), "
    "instance retrieval is not. One gain per recording (gain_db in labels.json) brings it to a common level."
)
SEQUENCE_NOTES = (
    " Each sample is a sequence of digits by one speaker; the test split has sequences that training never shows, with "
    f"every digit at every place equally often. Recordings longer than {sequences.LONGEST} s are left out, none is cut."
)


class Source(_base.Source):
    """Clips at 24 kHz, whole; pictures 28 x 28 as published, in three equal channels; one caption.

    With length above 1, that many clips of one speaker and pictures in a row (see `_digits_sequences`).
    """

    class Options(Config):
        """What to fetch.

        Attributes:
            mirror: folder with fsdd/recordings/, mnist_idx/ and perhaps digits_av/; without it both are downloaded.
            split: "clip" (no recording in two splits), "speaker:NAME" (NAME is the test split, the next speaker in
                alphabetical circle the val split), or "speaker", which is speaker:theo.
            length: digits per sample; above 1 the test split holds out whole sequences.
            train, val, test: sequences per split (6000, 300, 600), an eighth of train more for judges. Single digits are
                as many as there are recordings.
            name: of the data set; digits, digits-speaker-NAME, digits3, digits3-speaker-NAME.
            pairs: take the pairs from the mirror's "lists", by "rule", or "auto": lists where there are any.
            level_db: RMS that recordings are scaled to, in dB under full scale; null keeps them as recorded, where 62
                are so quiet that they sink below the floor of a log-mel spectrogram.
            shard_size: samples per shard.
            limit: at most so many samples per split (of the shuffled order), for quick tests.
        """

        mirror: str | None = None
        split: str = "clip"
        length: int = Field(1, ge=1, le=4)
        train: int | None = Field(None, ge=1)
        val: int | None = Field(None, ge=0)
        test: int | None = Field(None, ge=0)
        name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
        pairs: Literal["auto", "lists", "rule"] = "auto"
        level_db: float | None = Field(-20.0, ge=-60, le=-3)
        shard_size: int = Field(1000, ge=1)
        limit: int | None = Field(None, ge=1)

        @field_validator("split")
        @classmethod
        def _known(cls, value: str) -> str:
            kind, _, speaker = value.partition(":")
            if value == "speaker":
                return "speaker:theo"
            if kind == "speaker" and speaker not in SPEAKERS:
                raise ValueError(f"no speaker '{speaker}'; {did_you_mean(speaker, SPEAKERS)}")
            if value != "clip" and kind != "speaker":
                raise ValueError(f"unknown split; {did_you_mean(value, ['clip', 'speaker', 'speaker:NAME'])}")
            return value

        @model_validator(mode="after")
        def _counts(self):
            given = [split for split in SPLITS if getattr(self, split) is not None]
            if self.length == 1 and given:
                raise ValueError(f"{', '.join(given)}: counts are of sequences (length=2 or more); limit=N takes fewer digits")
            return self

    version = 1
    release: ClassVar[files.Release] = files.RELEASE

    @property
    def folder(self) -> Path:
        """The folder that holds the files: the mirror, else the cache, laid out the same way."""
        return Path(self.options.mirror).expanduser() if self.options.mirror is not None else self.cache

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        if self.options.mirror is None:
            files.fetch_release(self.release, self.cache, progress)
        files.check_mirror(self.folder)
        files.check_mirror(self.folder, {pair.clip for pair in self._pairs()[1]})
        files.check_mnist(self.folder)

    def _pairs(self) -> tuple[str, list[Pair]]:
        """Return "lists" or "rule" and all pairs."""
        place = self._place()
        return "rule" if place[2] is None else "lists", _read(*place)

    def _place(self) -> tuple[Path, str, Path | None, tuple[int, ...]]:
        """Return what `_read` takes."""
        o, path = self.options, None
        if o.split in LISTS and o.pairs != "rule" and (self.folder / LISTS[o.split]).is_file():
            path = self.folder / LISTS[o.split]
        elif o.pairs == "lists":
            wanted = LISTS.get(o.split)
            raise FetchError(
                f"'{self.folder}' has no {wanted}" if wanted else f"there is no list for split '{o.split}'",
                "leave out pairs=lists to pair by rule",
            )
        recordings = self.folder / files.RECORDINGS
        stamps = tuple(p.stat().st_mtime_ns for p in (path or recordings, self.folder / files.LABELS["train"]))
        return self.folder, o.split, path, stamps

    def _counts(self) -> dict[str, int]:
        """Return how many sequences each split has, judge included."""
        counts = {split: usual if (n := getattr(self.options, split)) is None else n for split, usual in sequences.COUNTS.items()}
        return counts | {sequences.JUDGE: counts["train"] // 8}

    def _chosen(self, split: str) -> list[Pair] | list[Line]:
        """Return what a split holds, in the order of the data set: pairs sorted by id, then a fixed shuffle, or sequences."""
        if self.options.length > 1:
            return _lines(*self._place(), split, self._counts()[split], self.options.length)[: self.options.limit]
        pairs = sorted(p for p in self._pairs()[1] if p.split == split)
        order = rng.permutation(len(pairs), pairing.SEED, f"digits/order/{split}")
        return [pairs[i] for i in order[: self.options.limit]]

    def info(self) -> DatasetInfo:
        o, n = self.options, self.options.length
        made = {"pairs": self._pairs()[0]}
        # What single digits do not depend on stays out of their options: data sets fetched before sequences were stay as they are.
        dropped = {"mirror", "name", *(("length", *SPLITS) if n == 1 else ())}
        if n > 1:
            made |= {split: self._counts()[split] for split in SPLITS}
        chosen = {split: self._chosen(split) for split in SPLITS}
        # Voices are harder than notes; an unknown one is better understood after many that never were (docs/RESULTS.md).
        sound: dict = {"high_hz": 4000.0, "mels": 48, "fit_samples": 8_000, "fit_steps": 500}
        if o.split != "clip" and n == 1:
            sound["variants"] = 4
        accents = Counter(pair.accent for pair in chosen["test"])
        speaker_notes = ""
        if o.split != "clip":
            test, val = pairing.held_out(o.split)
            speaker_notes = (
                f" Test speaker {test}, validation speaker {val}, neither heard in training; the test split has one "
                "accent, so accent is no task there. Digit accuracy varies much between speakers: report all six."
            )
        if o.mirror is not None and not files.is_release(self.release, self.folder):
            speaker_notes += " The files of the mirror differ from the published ones."
        return DatasetInfo(
            name=o.name or "digits" + (str(n) if n > 1 else "") + ("" if o.split == "clip" else "-" + o.split.replace(":", "-")),
            source="digits",
            options=o.model_dump(mode="json", exclude=dropped) | made,
            version=self.version,
            modalities=["rgb", "audio", "caption"],
            splits={split: len(pairs) for split, pairs in chosen.items()},
            judge=len(self._chosen(sequences.JUDGE)) if n > 1 else 0,
            sizes={
                "rgb": {"size": [28, 28 * n]},
                "audio": {"seconds": round(n * sequences.SECONDS, 1) if n > 1 else SECONDS, "rate": RATE},
            },
            tokenizers={"rgb": {"patch": 7}, "audio": sound},
            judge_steps={"rgb": 320, "audio": 120 * n if n > 1 else 180},  # where one digit ends has to be heard as well
            attributes={
                name: Attribute(values=list(surfaces), surfaces=surfaces) for name, surfaces in SURFACES.items()
            },
            max_objects=n,
            # What a listener or reader can tell; pictures and voices are real, so a few are hard.
            determined={"rgb": ["digit"], "audio": ["digit", "accent"], "caption": ["digit", "accent"]},
            ceilings={"rgb": {"accent": round(max(accents.values()) / accents.total(), 6)}} if accents else {},
            transcripts={"caption": sequences.transcript_of(n)},
            pairing="class",
            notes=NOTES + (SEQUENCE_NOTES if n > 1 else "") + speaker_notes,
        )

    def plan(self) -> list[ShardPlan]:
        size, plans = self.options.shard_size, []
        for split in (*SPLITS, sequences.JUDGE) if self.options.length > 1 else SPLITS:
            pairs = self._chosen(split)
            for index, start in enumerate(range(0, len(pairs), size)):
                items = tuple(pairs[start : start + size])
                plans.append(ShardPlan(split, index, items, len(items)))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        if self.options.length > 1:
            yield from map(self._sequence, plan.items)
            return
        for item in plan.items:
            pair = Pair(*item)
            clip = files.clip(self.folder / files.RECORDINGS / pair.clip, self.options.level_db)
            grey = files.images(self.folder, pair.part)[pair.image]
            members = {
                "rgb.png": RGB.to_bytes(np.repeat(grey[:, :, None], 3, axis=2)),
                "audio.flac": clip.flac,
                "caption.txt": pair.caption.encode(),
                "labels.json": json.dumps(labels_of(pair, clip), ensure_ascii=False).encode(),
            }
            yield Sample(pair.key, members)

    def _sequence(self, item: tuple) -> Sample:
        line = Line(*item)
        clips = [files.clip(self.folder / files.RECORDINGS / clip, self.options.level_db) for clip in line.clips]
        wave, onsets = sequences.sound(clips, line.pauses)
        labels = sequences.labels_of(line, clips, onsets, len(wave) / RATE)
        return Sample(line.key, {
            "rgb.png": RGB.to_bytes(np.repeat(sequences.strip(self.folder, line)[:, :, None], 3, axis=2)),
            "audio.flac": AUDIO.to_bytes(wave),
            "caption.txt": sequences.caption_of(line.digits, line.accent).encode(),
            "labels.json": json.dumps(labels, ensure_ascii=False).encode(),
        })


def labels_of(pair: Pair, clip: files.Clip) -> dict:
    """Return the content of labels.json; `sources` names what each modality was made from."""
    state = {"digit": str(pair.digit), "accent": pair.accent}
    return {
        "objects": [state],
        "fields": fields_of(pair.caption, state),
        "digit": pair.digit,
        "speaker": pair.speaker,
        "accent": pair.accent,
        "fsdd_file": f"recordings/{pair.clip}",
        "mnist_file": pair.part,
        "mnist_index": pair.image,
        "seconds": clip.seconds,
        "gain_db": clip.gain_db,
        "sources": {"audio": f"fsdd/{pair.clip}", "rgb": f"mnist/{pair.part}/{pair.image}"},
    }


def fields_of(caption: str, state: dict[str, str]) -> list[dict]:
    """Return where the caption words each attribute; one that it does not word has no field."""
    fields = []
    for attribute, value in state.items():
        for k, surface in enumerate(SURFACES[attribute][value]):
            if found := re.search(rf"\b{re.escape(surface)}\b", caption):
                fields.append({"attribute": attribute, "object": 0, "span": list(found.span()), "wording": k})
                break
    return fields


@lru_cache(maxsize=4)
def _read(folder: Path, split: str, path: Path | None, stamps: tuple[int, ...]) -> list[Pair]:
    """Return all pairs, checked: of a list, or (path None) by rule. `stamps` tells changed files apart."""
    labels = {part: files.labels(folder, part) for part in files.LABELS}
    if path is None:
        pairs = pairing.by_rule(files.wav_names(folder / files.RECORDINGS), split, labels)
    else:
        pairs = pairing.read_list(path)
    pairing.check(pairs, labels, str(path or folder))
    return pairs


@lru_cache(maxsize=8)
def _lines(
    folder: Path, split: str, path: Path | None, stamps: tuple[int, ...], which: str, count: int, length: int
) -> list[Line]:
    """Return the sequences of one split of the data set, from the pairs that `_read` gives."""
    labels = {part: files.labels(folder, part) for part in files.LABELS}
    return sequences.draw(folder / files.RECORDINGS, _read(folder, split, path, stamps), labels, which, count, length)

"""The listening test: one page that holds sounds without their origin, and the key that tells it.

After ITU-T P.800 (absolute category rating): each rater hears every sound alone, in an order of their own, and rates it from 1
(bad) to 5 (excellent). Among the sounds are the real recordings (a hidden reference) and their round trip through the tokenizer
(an anchor); all are cut to their speech and brought to one level, so that neither silence nor loudness tells them apart.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from pydantic import ConfigDict, Field

from nano4m_cli.config import Config
from nano4m_cli.data._atomic import atomic_file, write_json
from nano4m_cli.errors import DataError
from nano4m_cli.modalities.audio import MODALITY, RATE
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._speech_json import read_strictly
from nano4m_cli.probes._speech_sound import trimmed
from nano4m_cli.rng import permutation

System = Literal["truth", "round_trip", "generated"]
SCALE = {5: "Excellent", 4: "Good", 3: "Fair", 2: "Poor", 1: "Bad"}  # ITU-T P.800, annex B: listening quality
LEVEL_DB = -26.0  # RMS of the speech under full scale, as P.800 has it
MARGIN = 0.05  # seconds of quiet before and after
EACH_S = 8  # that a rater takes for one sound
PAGE, KEY = "listen.html", "key.json"


class Clip(Config):
    model_config = ConfigDict(strict=True)
    sample: str
    system: System


class Key(Config):
    """What a listening test plays: which sound is which, by the ids that pages and ratings have."""

    model_config = ConfigDict(strict=True)
    format: Literal["nano4m-mos-key"] = "nano4m-mos-key"
    version: Literal[1] = 1
    test: str
    run: str
    checkpoint: str
    data: str
    split: str
    direction: str
    clips: dict[str, Clip] = Field(min_length=1)


def levelled(wave: np.ndarray) -> np.ndarray:
    """Return the speech of a sound with a margin of silence, at LEVEL_DB or as loud as it can be; of a silent one, the margin."""
    speech = trimmed(wave).astype(np.float64)
    if len(speech):
        rms, peak = np.sqrt(np.mean(speech**2)), np.abs(speech).max()
        speech = speech * min(10 ** (LEVEL_DB / 20) / rms, 0.99 / peak)
    return np.pad(speech, round(MARGIN * RATE)).astype(np.float32)


def write_page(
    folder: Path, context: Context, direction: str, keys: Sequence[str], systems: Mapping[str, Sequence[np.ndarray]], items: int
) -> int:
    """Write listen.html and key.json; return how many sounds there are.

    Args:
        systems: sounds by system (see System), sample by sample as `keys`. items: samples to take, drawn by the seed.
    """
    order = [int(i) for i in permutation(len(keys), context.seed, "tts/listen")]
    chosen = [i for i in order if len(trimmed(systems["truth"][i]))][:items]
    if not chosen:
        raise DataError("there is nothing to listen to: every recording is silent")
    clips, sounds = {}, {}
    for i in chosen:
        for system, waves in systems.items():
            data = MODALITY.to_bytes(levelled(waves[i]))
            name = hashlib.sha256(f"{context.run.name}/{keys[i]}/{system}/".encode() + data).hexdigest()[:16]
            clips[name], sounds[name] = Clip(sample=keys[i], system=system), data
    clips = dict(sorted(clips.items()))  # by id: the order in the page's source tells nothing either
    test = hashlib.sha256("".join(clips).encode()).hexdigest()[:16]
    key = Key(test=test, run=context.run.name, checkpoint=context.run.checkpoint.name, data=context.dataset.name,
              split=context.split, direction=direction, clips=clips)
    path = folder / KEY
    if path.exists() and read_strictly(path, Key).test != test:
        raise DataError(f"{path} is of another listening test, whose ratings would lose their meaning", "choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, key.model_dump(mode="json"))
    with atomic_file(folder / PAGE) as file:
        file.write(page(test, {name: sounds[name] for name in clips}).encode())
    return len(clips)


def page(test: str, sounds: Mapping[str, bytes]) -> str:
    """Return the page of a test: sounds as FLAC by id."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    held = {"test": test, "clips": [[name, base64.b64encode(data).decode()] for name, data in sounds.items()]}
    return environment.get_template("_speech_listen.html.j2").render(
        scale=SCALE, count=len(sounds), minutes=-(-len(sounds) * EACH_S // 60), held=json.dumps(held).replace("<", "\\u003c")
    )

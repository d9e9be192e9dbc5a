"""TinyStories: 2.7 million short stories in simple words, written by GPT-4 (Eldan and Li 2023), for language models.

The files of the second edition are read, in which every story is GPT-4's. A file begins and ends within a story; those two
pieces are left out. The published validation file is dealt into val and test, half and half, by the words of each story;
a story of the training file that stands in it as well is left out of train.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field

from nano4m_cli.data._atomic import atomic_file
from nano4m_cli.data.sources._documents import Documents, Part
from nano4m_cli.data.sources._hub_snapshot import Snapshot, choose, get, look_up, present
from nano4m_cli.errors import FetchError

REPO = "roneneldan/TinyStories"
TRAIN, HELD = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
SEPARATOR = "<|endoftext|>"
LICENCE = "TinyStories, second edition (Eldan and Li 2023, arXiv:2305.07759), CDLA-Sharing-1.0"
GIVE = f"{TRAIN} and {HELD} into a folder DIR and give mirror=DIR"


class Source(Documents):
    """A story is a sample. With limit=N, no more of the training file (2.2 GB) is downloaded than that takes."""

    class Options(Documents.Options):
        """What to fetch.

        Attributes:
            limit: stories per split at most, in the order of the files.
            chars: characters of a passage; 0: whole stories.
            mirror: folder that holds the two published .txt files, where there is no network.
            name: of the data set.
            shard_size: stories per shard.
        """

        chars: int = Field(0, ge=0)
        mirror: str | None = None
        name: str = Field("tinystories", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
        shard_size: int = Field(10_000, ge=1)

    version = 1
    separator, cut_ends = SEPARATOR, True
    commit = ""

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        self.paths = self._mirrored() if self.options.mirror else self._fetched(progress)
        super().prepare(progress)

    def _mirrored(self) -> list[Path]:
        paths = [Path(self.options.mirror).expanduser() / name for name in (TRAIN, HELD)]
        if missing := [p.name for p in paths if not p.is_file()]:
            raise FetchError(f"'{self.options.mirror}' holds no {' and no '.join(missing)}", f"put {GIVE}")
        return paths

    def _fetched(self, progress: Callable[[str, int, int], None]) -> list[Path]:
        from huggingface_hub import constants

        limit, hint = self.options.limit, f"put {GIVE}"
        snapshot = look_up(REPO, "main", self.cache, hint)
        self.commit = snapshot.commit
        train, held = (choose(snapshot, [name], lambda _: True)[0] for name in (TRAIN, HELD))
        enough = limit and limit + limit // 10 + 100  # some stand in the held-out file as well
        part = enough and enough * 1000 < train.size and not present(snapshot, train)  # a story has about 800 bytes
        part = part and not constants.HF_HUB_OFFLINE
        paths, failures = get(snapshot, [held] if part else [held, train], float("inf"), progress, hint)
        if failures:
            raise FetchError(f"'{REPO}' gives no {failures[0].file}: {failures[0].reason}", hint)
        return [_beginning(snapshot, enough, progress) if part else paths[TRAIN], paths[HELD]]

    def parts(self) -> list[Part]:
        return [Part(TRAIN, self.paths[0], 0.0, 0.0), Part(HELD, self.paths[1], 0.5, 0.5)]

    def about(self) -> dict[str, Any]:
        o, commit = self.options, f", commit {self.commit}" if self.commit else ""
        tokenizer = {"name": "bpe", "vocab": 4096} | ({"max_length": o.chars + 1} if o.chars else {})
        notes = f"{LICENCE}{commit}. {HELD} was dealt into val and test, by the words of each story"
        return {"name": o.name, "source": "tinystories", "options": {}, "tokenizers": {"text": tokenizer}, "notes": notes}


def _beginning(snapshot: Snapshot, stories: int, progress: Callable[[str, int, int], None]) -> Path:
    """Return a file with the beginning of the training file that holds so many whole stories, downloaded if need be."""
    from huggingface_hub.utils import build_hf_headers

    dest, mark = snapshot.place / f"first-{stories}-{TRAIN}", SEPARATOR.encode()
    if dest.is_file():
        return dest
    url, headers = snapshot.url(TRAIN), {**build_hf_headers(), "Accept-Encoding": "identity"}
    seen, done, last = -1, 0, b""  # what is before the first separator is no whole story
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response, atomic_file(dest) as out:
            response.raise_for_status()
            for block in response.iter_raw():
                out.write(block)
                seen, done = seen + (last + block).count(mark), done + len(block)
                last = (last + block)[1 - len(mark) :]
                progress("stories", min(max(seen, 0), stories), stories)
                if seen >= stories:
                    return dest
            if done != int(response.headers.get("Content-Length", done)):
                raise httpx.RemoteProtocolError("the connection ended early")
    except httpx.HTTPError as err:
        raise FetchError(f"cannot download {url}: {err}", f"fetch again, or put {GIVE}") from err
    return dest

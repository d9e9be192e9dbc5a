"""Files of a data set repository on the Hugging Face hub at one commit: looked up once, downloaded resumably, checked.

The hub's own client finds the endpoint (HF_ENDPOINT), the token and what its cache holds; the bytes come by `download`,
which resumes a part after the process that began it is gone (the client of 2026 begins anew).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.download import BLOCK, Refused, download, unsafe
from nano4m_cli.data.sources._base import Failure
from nano4m_cli.errors import FetchError, did_you_mean

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 20.0
JOBS = 8


class File(NamedTuple):
    """A file of a repository; `sha256` where it is stored by that (LFS), else `blob`, git's sha1 of it."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


class Snapshot(NamedTuple):
    """What a repository holds at a commit; `place` is the folder of this commit in the cache."""

    id: str
    commit: str
    licence: str
    files: tuple[File, ...]
    place: Path

    def url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.id, name, repo_type="dataset", revision=self.commit)


def look_up(repo: str, revision: str, cache: Path, hint: str | None = None) -> Snapshot:
    """Return the snapshot of a revision; one that was looked up before stays at the commit it had then.

    Without a network, what the hub's own cache holds of it is taken.

    Args:
        hint: what to do where there is no network, if not the usual.
    """
    if not HUB_ID.fullmatch(repo) or ".." in repo:
        raise FetchError(f"'{repo}' is no id of a data set repository", "ids are OWNER/NAME, as in the address of its page")
    home = cache / repo.replace("/", "--")
    seen = _read(home / "revisions.json")
    commit = revision if COMMIT.fullmatch(revision) else seen.get(revision, "")
    doc = _read(home / commit / "tree.json") if commit else {}
    if not doc:
        commit, doc = _ask(repo, revision, hint)
        write_json(home / commit / "tree.json", doc)
    if seen.get(revision) != commit:
        write_json(home / "revisions.json", {**seen, revision: commit})
    return Snapshot(repo, commit, doc["licence"], tuple(File(*f) for f in doc["files"]), home / commit)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _ask(repo: str, revision: str, hint: str | None) -> tuple[str, dict[str, Any]]:
    """Return the commit that a revision is now, and its licence and files as the hub lists them."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub

    api, where = HfApi(), constants.ENDPOINT
    page = f"{where}/datasets/{repo}"
    try:
        info = api.dataset_info(repo, revision=revision, timeout=TIMEOUT_S)
        tree = api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type="dataset")
        tree = [f for f in tree if hasattr(f, "size")]  # folders are listed as well
    except Exception as err:  # the client's own types, and those of its transport, which changes with its versions
        told = (str(err).strip() or type(err).__name__).splitlines()[0]
        if isinstance(err, hub.GatedRepoError):
            accept = f"accept its terms at {page}, then 'hf auth login' or HF_TOKEN"
            raise FetchError(f"data set '{repo}' is gated", accept) from err
        if isinstance(err, hub.RepositoryNotFoundError):
            raise FetchError(f"no data set repository '{repo}' at {where}, or it is private",
                             "look at the id on its page; for a private one: 'hf auth login' or HF_TOKEN") from err
        if isinstance(err, hub.RevisionNotFoundError):
            known = f"its branches and tags: {page}/tree/main"
            raise FetchError(f"data set '{repo}' has no revision '{revision}'", known) from err
        if isinstance(err, hub.HfHubHTTPError) and err.response.status_code < 500:
            raise FetchError(f"{where} does not give the data set '{repo}': {told}") from err
        if found := _from_cache(repo, revision):
            return found
        why = "HF_HUB_OFFLINE forbids to ask" if constants.HF_HUB_OFFLINE else f"{where} cannot be reached ({told})"
        raise FetchError(f"data set '{repo}' is not in the hub's cache {constants.HF_HUB_CACHE}, and {why}",
                         hint or f"where there is a network: hf download --repo-type dataset {repo}") from err
    licence = next((t.removeprefix("license:") for t in info.tags or [] if t.startswith("license:")), "")
    files = [(f.path, f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id) for f in tree]
    return info.sha, {"licence": licence, "files": sorted(files)}


def _from_cache(repo: str, revision: str) -> tuple[str, dict[str, Any]] | None:
    """Return what the hub's own cache holds of a revision, if it holds all that it knows of."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [(p.relative_to(folder).as_posix(), p.stat().st_size, None, None) for p in found]
    return (folder.name, {"licence": "", "files": files}) if files else None


def choose(snapshot: Snapshot, patterns: Sequence[str], wanted: Callable[[str], bool]) -> list[File]:
    """Return the files that are wanted and match a pattern ("*" spans folders; a folder stands for what is in it)."""
    names = [f.name for f in snapshot.files]
    if bad := next(filter(unsafe, names), None):
        raise FetchError(f"'{snapshot.id}' lists '{bad}', a name that leads out of its folder; nothing of it is used")
    matches = lambda n, p: fnmatchcase(n, p) or fnmatchcase(n, p.rstrip("/") + "/*")  # noqa: E731
    for pattern in patterns:
        if not any(matches(n, pattern) for n in names):
            raise FetchError(f"'{snapshot.id}' has no file '{pattern}'", did_you_mean(pattern, names[:200]))
    chosen = [f for f in snapshot.files if wanted(f.name) and (not patterns or any(matches(f.name, p) for p in patterns))]
    if not chosen:
        ends = sorted({Path(n).suffix or n for n in names})[:20]
        raise FetchError(f"'{snapshot.id}' holds no file that is read here" + (" among those chosen" if patterns else ""),
                         f"it holds {', '.join(ends)}" if ends else "it is empty")
    return chosen


def get(
    snapshot: Snapshot, files: Sequence[File], max_bytes: float, progress: Callable[[str, int, int], None],
    hint: str | None = None,
) -> tuple[dict[str, Path], list[Failure]]:
    """Return the files by name where they lie, downloaded where needed, and those that the hub will not give.

    A connection that breaks for good is a FetchError: the next call goes on from there.
    """
    there = {f.name: path for f in files if (path := present(snapshot, f))}
    missing = [f for f in files if f.name not in there]
    total = sum(f.size for f in missing)
    if total > max_bytes:
        much = f"the {len(missing)} files of '{snapshot.id}' have {total / 1e9:.1f} GB, more than max_gb={max_bytes / 1e9:g}"
        raise FetchError(much, "choose some with files=[PATTERN,...], or raise max_gb")
    failures: list[Failure] = []
    if missing:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        hint = hint or f"fetch again: it goes on from there; or, elsewhere: hf download --repo-type dataset {snapshot.id}"
        if constants.HF_HUB_OFFLINE:
            what = f"{len(missing)} files of '{snapshot.id}' are not here ({missing[0].name})"
            raise FetchError(f"{what}, and HF_HUB_OFFLINE forbids to download", hint)
        headers, done, lock = build_hf_headers(), dict.fromkeys((f.name for f in missing), 0), threading.Lock()

        def one(file: File) -> str:
            def step(now: int, _: int) -> None:
                with lock:
                    done[file.name] = now
                    progress("bytes", sum(done.values()), total)

            try:
                path = download(snapshot.url(file.name), snapshot.place / "files" / file.name, file.sha256, step, hint=hint,
                                headers=headers)
            except Refused as err:
                return err.message
            if wrong := _wrong(path, file):
                path.unlink()
            return wrong

        first = one(missing[0])
        if re.search(r"HTTP 40[13]", first):
            page = f"{constants.ENDPOINT}/datasets/{snapshot.id}"
            raise FetchError(f"data set '{snapshot.id}' is listed, but its files are refused: {first}",
                             f"accept its terms at {page}, then 'hf auth login' or HF_TOKEN")
        with ThreadPoolExecutor(JOBS) as pool:
            try:
                for file, reason in zip(missing, itertools.chain([first], pool.map(one, missing[1:])), strict=True):
                    if reason:
                        failures.append(Failure(file.name, reason))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    lost = {f.file for f in failures}
    place = snapshot.place / "files"
    return {f.name: there.get(f.name, place / f.name) for f in files if f.name not in lost}, failures


def present(snapshot: Snapshot, file: File) -> Path | None:
    """Return where a file lies, whole: in our cache or in the hub's own."""
    from huggingface_hub import try_to_load_from_cache

    for path in (snapshot.place / "files" / file.name,
                 try_to_load_from_cache(snapshot.id, file.name, repo_type="dataset", revision=snapshot.commit)):
        if isinstance(path, (str, Path)) and Path(path).is_file() and Path(path).stat().st_size == file.size:
            return Path(path)
    return None


def _wrong(path: Path, file: File) -> str:
    """Return what is wrong with a downloaded file, or "" (one with a sha256 was checked as it came)."""
    if path.stat().st_size != file.size:
        return f"has {path.stat().st_size:,} bytes, the hub lists {file.size:,}"
    if file.blob is None:
        return ""
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # as git names what it stores
    with open(path, "rb") as data:
        while block := data.read(BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    return "" if found == file.blob else f"is not the file that the hub lists: git blob {found}, not {file.blob}"

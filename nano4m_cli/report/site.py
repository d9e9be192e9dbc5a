"""`build_site(workspace, runs, out)`: a project's pages, for any static host: no server, no network, one folder of files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nano4m_cli.data._atomic import atomic_file
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError
from nano4m_cli.report._about import without_paths
from nano4m_cli.report._cards import data_card, model_card
from nano4m_cli.report._compare import compared
from nano4m_cli.report._media import Beside, ShownGallery, show
from nano4m_cli.report._page import View, asset, page, parts, view
from nano4m_cli.report._read import Inputs, Paired, read_comparisons, read_run

BUDGET = 15_000_000  # bytes of all files
MANIFEST = "site.json"
TEASERS = 3  # gallery rows of an overview
MARK = "nano4m eval --site"


@dataclass(frozen=True)
class Site:
    """What was written: the runs by name, the files, their bytes in all."""

    runs: list[str]
    files: list[Path]
    size: int


@dataclass(frozen=True)
class Link:
    href: str
    label: str
    current: bool = False


@dataclass
class _Run:
    """A run of the site. slug: its name in addresses; folder: where its pages are ("" where it is the only one)."""

    shown: View
    slug: str
    folder: str
    media: Beside
    gallery: ShownGallery

    @property
    def run(self) -> Inputs:
        return self.shown.run


def evaluated(workspace: Workspace) -> list[Path]:
    """Return the folders of all runs that have results, newest first; none is a DataError."""
    found = [p for p in workspace.runs() if any((p / "eval").glob("*.json"))]
    if not found:
        raise DataError(f"no evaluated run in {workspace.root / 'runs'}", "run 'nano4m eval' first, or name runs with --run")
    return found


def build_site(workspace: Workspace, names: Sequence[str], out: Path, budget: int = BUDGET) -> Site:
    """Write the site of the named runs (default: all that were evaluated) into the folder `out`.

    The same files of the runs give the same bytes. A folder that holds anything but a site made by this function is refused,
    unless it is empty; an older site's files are replaced. What would take it over `budget` bytes is left out of the galleries.
    """
    folders = [workspace.run(n) for n in dict.fromkeys(names)] or evaluated(workspace)
    before = _before(out)
    files = render_site(folders, workspace.root / "data", budget)
    for name in sorted(before - set(files)):
        (out / name).unlink(missing_ok=True)
    # The manifest first: a site that was cut short is still known as ours.
    for name in (MANIFEST, *sorted(set(files) - {MANIFEST})):
        with atomic_file(out / name) as file:
            file.write(files[name])
    return Site([f.resolve().name for f in folders], [out / name for name in sorted(files)], sum(map(len, files.values())))


def _before(out: Path) -> set[str]:
    """Return the files of the site that lies in `out`."""
    if out.exists() and not out.is_dir():
        raise DataError(f"'{out}' is a file, not a folder", "name a new or an empty folder with --site")
    there = [p for p in out.iterdir() if p.name not in (".git", ".nojekyll", "CNAME")] if out.is_dir() else []
    if not there:
        return set()
    try:
        known = json.loads((out / MANIFEST).read_text())
        assert known["made_by"] == MARK
        names = {n for n in known["files"] if isinstance(n, str) and (out / n).resolve().is_relative_to(out.resolve())}
    except (OSError, ValueError, AssertionError, KeyError, TypeError) as err:
        raise DataError(f"'{out}' holds other files ({there[0].name}, ...) and no site of nano4m; nothing was written",
                        "name a new or an empty folder with --site") from err
    return names


def render_site(folders: Sequence[Path], data: Path, budget: int = BUDGET) -> dict[str, bytes]:
    """Return every file of the site by its path.

    Args:
        folders: of runs. data: the folder of all data sets.
    """
    inputs = [read_run(f, data) for f in folders]
    shown = [view(i) for i in inputs]
    names = [v.name for v in shown]
    shown = [replace(v, name=v.run.folder.resolve().name) if names.count(v.name) > 1 else v for v in shown]
    slugs = _slugs([v.name for v in shown])
    room = budget
    while True:
        runs = []
        for v, slug in zip(shown, slugs, strict=True):
            store = Beside("" if len(shown) == 1 else "../")
            gallery = show(v.run.gallery, v.run.folder / "eval" / "gallery", room // len(shown), store)
            runs.append(_Run(v, slug, "" if len(shown) == 1 else f"{slug}/", store, gallery))
        files = _files(runs)
        weight = sum(map(len, files.values()))
        if weight <= budget:
            return files
        media = sum(r.gallery.weight for r in runs)
        if not media:
            raise DataError(f"the site would take {weight / 1e6:.1f} MB without any gallery, and {budget / 1e6:g} MB is the limit",
                            "name fewer runs with --run")
        room = min(room - 1, max(0, media - (weight - budget)))


def _slugs(names: Sequence[str]) -> list[str]:
    """Return names that are fit for addresses, each once."""
    out: list[str] = []
    taken = {"assets", "media", "files", "index", "compare"}
    for name in names:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "run"
        slug, n = base, 2
        while slug.lower() in taken:
            slug, n = f"{base}-{n}", n + 1
        taken.add(slug.lower())
        out.append(slug)
    return out


# -- pages ------------------------------------------------------------------------------------------------------------


def _files(runs: list[_Run]) -> dict[str, bytes]:
    files = {"assets/style.css": asset("style.css").encode(), "assets/filter.js": asset("filter.js").encode(), ".nojekyll": b""}
    several = len(runs) > 1
    paired = _comparisons(runs) if several else []
    files |= {name: path.read_bytes() for name, path, _ in paired}
    for r in runs:
        files |= _pages(r, several)
        rows = [row for group in r.gallery.groups.values() for row in group]
        used = {i for row in rows for side in (row.condition, row.output, row.truth) for i in side}
        sources = {s for i in used for s in (i.sound, i.picture.src if i.picture else "")}
        files |= {name: data for name, data in r.media.files.items() if r.media.prefix + name in sources}
    if several:
        top = [Link("index.html", "Runs"), Link("compare.html", "Compare")]
        top += [Link(f"{r.slug}/index.html", r.shown.name) for r in runs]
        files["index.html"] = page("site/runs.html.j2", False, **_around(top, "index.html", ""), runs=runs, name="Runs")
        comparison = compared([(r.shown.name, r.run) for r in runs])
        files["compare.html"] = page(
            "site/compare.html.j2", False, **_around(top, "compare.html", ""), name="Runs compared", comparison=comparison,
            paired=[(quote(name), one) for name, _, one in paired])
    listed = sorted([*files, MANIFEST])
    files[MANIFEST] = json.dumps({"made_by": MARK, "files": listed}, indent=1).encode()
    return files


def _pages(r: _Run, several: bool) -> dict[str, bytes]:
    """Return the pages of one run."""
    shown, run = r.shown, r.run
    base = "../" if several else ""
    slugs = _slugs([f"probe-{p.result.probe}" for p in shown.probes])
    links = [
        Link("index.html", "Overview"), Link("probes.html", "Figures"), Link("gallery.html", "Gallery"),
        Link("training.html", "Training"), Link("data.html", "Data card"), Link("model.html", "Model card"),
        Link("reproduce.html", "Reproduce"),
    ]
    if several:
        links = [Link("../index.html", "All runs"), *links, Link("../compare.html", "Compare")]
    made: dict[str, bytes] = {}

    def add(file: str, template: str, title: str, marked: str | None = None, **values: Any) -> None:
        all_values = {**parts(shown), **values, **_around(links, marked or file, base), "run_name": shown.name, "title": title}
        made[r.folder + file] = page(f"site/{template}.html.j2", False, about=f"{title}: {shown.sentence}", **all_values)

    listed = list(zip(shown.probes, slugs, strict=True))
    add("index.html", "overview", "Overview", problems=run.problems, teasers=_teasers(r.gallery), gallery=r.gallery, listed=listed)
    add("probes.html", "probes", "All figures", listed=listed)
    for one, slug in listed:
        add(f"{slug}.html", "probe", one.title, "probes.html", one=one, others=[(o, s) for o, s in listed if s != slug])
    add("gallery.html", "gallery", "Gallery", gallery=r.gallery)
    add("training.html", "training", "Training")
    add("data.html", "card", "Data card", card=data_card(run), card_lead=_data_lead(run))
    add("model.html", "card", "Model card", card=model_card(run, shown.method, shown.verdict), card_lead=shown.sentence)
    add("reproduce.html", "reproduce", "How to reproduce", config_text=without_paths(run.config_text), tokenizers=_tokenizers(run),
        versions=[*shown.versions, *_hashes(run)])
    return made


def _around(links: Sequence[Link], current: str, base: str) -> dict[str, Any]:
    return {"links": [Link(li.href, li.label, li.href == current) for li in links], "base": base, "nav_label": "Pages"}


def _teasers(gallery: ShownGallery) -> list[tuple[str, Any]]:
    """Return the first row of each of the first directions: the rule is the place in the split, no choice of ours."""
    return [(title, rows[0]) for title, rows in gallery.groups.items()][:TEASERS]


def _data_lead(run: Inputs) -> str:
    if run.data is None:
        return f"What the run knows of the data set {run.dataset or 'it was trained on'}."
    return f"The data set {run.data.name}: {len(run.data.modalities)} modalities, {sum(run.data.splits.values()):,} samples."


def _tokenizers(run: Inputs) -> list[tuple[str, str]]:
    """Return (modality, its tokenizer's whole config as JSON)."""
    out = []
    for spec in run.specs:
        tokenizer = spec.get("tokenizer") if isinstance(spec.get("tokenizer"), dict) else {}
        about = {"name": tokenizer.get("name"), **(tokenizer.get("config") if isinstance(tokenizer.get("config"), dict) else {})}
        out.append((str(spec["modality"]), without_paths(json.dumps(about))))
    return out


def _hashes(run: Inputs) -> list[tuple[str, str]]:
    """Return (what, sha256) of data set and tokenizers: equal ones mean that the same was made again."""
    found = [("dataset.json, sha256", run.data_sha256[:16])] if run.data_sha256 else []
    for spec in run.specs:
        tokenizer = spec.get("tokenizer") if isinstance(spec.get("tokenizer"), dict) else {}
        if tokenizer.get("weights_sha256"):
            found.append((f"Tokenizer of {spec['modality']}, sha256", str(tokenizer["weights_sha256"])[:16]))
    return found


def _comparisons(runs: list[_Run]) -> list[tuple[str, Path, Paired]]:
    """Return (name in the site, file, what it holds) of each comparison of these runs over the same samples."""
    names = [r.run.folder.resolve().name for r in runs]
    found = read_comparisons(runs[0].run.folder.resolve().parent, names)
    slugs = _slugs([path.parent.name for path, _ in found])
    return [(f"files/{slug}.json", path, one) for slug, (path, one) in zip(slugs, found, strict=True)]

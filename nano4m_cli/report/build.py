"""`build(run)`: the run's report, one HTML page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from nano4m_cli.data._atomic import atomic_file
from nano4m_cli.report._media import ShownGallery, show
from nano4m_cli.report._page import View, page, parts, view
from nano4m_cli.report._read import read_run

BUDGET = 15_000_000  # bytes of the page


def build(run: Path, budget: int = BUDGET) -> Path:
    """Write `report/index.html` of a run folder and return its path.

    The page is a function of the run's files alone. What is missing is said on the page; gallery rows that would
    take it over `budget` bytes are left out, and the page says so.
    """
    inputs = read_run(Path(run))
    shown = view(inputs)
    media = budget
    while True:
        gallery = show(inputs.gallery, inputs.folder / "eval" / "gallery", media)
        text = render(shown, gallery)
        if len(text) <= budget or not gallery.rows:
            break
        # Media took all of the budget or less; what the rest of the page takes is known now.
        media = min(media - 1, budget - (len(text) - gallery.weight))
    out = inputs.folder / "report" / "index.html"
    with atomic_file(out) as file:
        file.write(text)
    return out


def render(shown: View, gallery: ShownGallery) -> bytes:
    """Return the page as UTF-8."""
    run = shown.run
    return page("report.html.j2", True, about=shown.sentence, problems=run.problems, gallery=gallery, config_text=run.config_text,
                **parts(shown))

"""A page to try a run by hand: pick a held-out sample or upload media, choose targets and settings, see and hear what is made.

Served to this machine alone, with nothing sent or fetched elsewhere; gradio is an optional extra and imported late.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from nano4m_cli.config import build
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sheet import write_sheet
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import Nano4MError, UsageError
from nano4m_cli.generate import best
from nano4m_cli.generate.command import Request, Studio, find_sample
from nano4m_cli.generate.options import GenerateOptions, Scheme
from nano4m_cli.train.run import OpenRun

LISTED = 50  # held-out samples to pick from; any other key may be written
PREVIEW = 96  # pixels a side, of what a sample holds
HOST = "127.0.0.1"


def load_gradio() -> Any:
    """Return the module, told to keep to itself; a UsageError says how to install it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError as err:
        raise UsageError(f"--ui needs gradio, which is not here: {err}", "pip install 'nano4m[ui]'") from err
    return gradio


def serve(
    run: OpenRun, judges: Callable[[DatasetFolder, str], best.Judge | None] | None = None, port: int | None = None,
    say: Callable[[str], None] = print, wait: bool = True,
) -> Any:
    """Serve the page on this machine until it is interrupted; return gradio's Blocks.

    Args:
        port: None: the first free one from 7860.
        say: called with the page's address.
        wait: False: return at once, the page stays until `.close()`.
    """
    gr = load_gradio()
    page, looks = Page(Studio(run, judges)).blocks(gr)
    try:
        _, url, _ = page.launch(
            server_name=HOST, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            enable_monitoring=False, ssr_mode=False, footer_links=[], **looks,
        )
    except OSError as err:
        raise UsageError(f"--port {port}: {err}", "choose another, or leave it out") from err
    say(url)
    if wait:
        page.block_thread()
    return page


class Page:
    """The widgets of a run and what its button does. sources: modalities that can be given or shown."""

    def __init__(self, studio: Studio):
        self.studio, info = studio, studio.run.dataset.info()
        self.names = [n for n in studio.layout.names if n not in info.brought]
        self.split = next((s for s in ("test", "val", *info.splits) if info.splits.get(s)), None)
        self.folder = Path(tempfile.mkdtemp(prefix="nano4m-ui-"))
        self.made = 0

    def keys(self) -> list[str]:
        if self.split is None:
            return []
        shards = Split(self.studio.run.dataset.raw(self.split)).shards
        return [key for shard in shards for key in shard.keys][:LISTED]

    def _new(self) -> Path:
        self.made += 1
        path = self.folder / f"{self.made:05d}"
        path.mkdir()
        return path

    # -- what it does -------------------------------------------------------------------------------------------------

    def preview(self, key: str | None) -> tuple[str | None, str | None]:
        """Return (a sheet of all that a sample holds, its sound) as files."""
        if not key:
            return None, None
        truth = find_sample(self.studio.run.dataset, key, self.names)
        folder, kinds = self._new(), {n: self.studio.kind(n) for n in truth}
        sheet = write_sheet(folder / "sample.png", list(truth), [[kinds[n].show(v) for n, v in truth.items()]], PREVIEW)
        sound = next((n for n in truth if kinds[n].kind == "audio"), None)
        if sound is None:
            return str(sheet), None
        kinds[sound].write_file(truth[sound], folder / f"sample{kinds[sound].suffix}")
        return str(sheet), str(folder / f"sample{kinds[sound].suffix}")

    def request(self, key: str | None, taken: list[str], given: dict[str, str | None], targets: list[str], **options) -> Request:
        """Return the request that the widgets stand for: what is uploaded or written goes before what the sample has."""
        conditions: dict[str, str | None] = {n: None for n in self.names if key and n in taken}
        conditions |= {n: v for n, v in given.items() if v}
        data = {"from": conditions, "to": targets, "sample": key if None in conditions.values() else None, **options}
        if data.get("best_of") in (None, 1):
            data.pop("rank", None)
        return build(Request, {k: v for k, v in data.items() if v not in (None, "")}, "the page")

    def generate(self, request: Request) -> tuple[str, str | None, str, list[str]]:
        """Return (sheet of condition | output | truth, first sound made, texts and notices, all files)."""
        (made,) = self.studio.make([self.studio.prepare(request)])
        report = self.studio.write(made, self._new())
        sounds = [str(f) for f in report.files if f.suffix == ".wav"]
        lines = [f"{m}: {t}" for m, t in report.texts]
        if report.best is not None:
            lines += [f"best of {request.best_of} by {report.best['rank']}: candidate {report.best['chosen']}, scores "
                      f"{report.best['scores']}"]
        lines += [f"notice: {n}" for n in report.notices]
        return str(report.out / "sheet.png"), sounds[0] if sounds else None, "\n".join(lines), [str(f) for f in report.files]

    # -- what it looks like -------------------------------------------------------------------------------------------

    def blocks(self, gr: Any) -> tuple[Any, dict[str, Any]]:
        """Return (the page, what `launch` must know of its looks)."""
        names, keys, usual = self.names, self.keys(), GenerateOptions()
        texts = [n for n in names if self.studio.kind(n).kind == "text"]
        sounds = [n for n in names if self.studio.kind(n).kind == "audio"]

        def told(action):
            """An error for users is shown on the page; a bug keeps its traceback."""
            def act(*values):
                try:
                    return action(*values)
                except Nano4MError as err:
                    raise gr.Error(err.message + (f" ({err.hint})" if err.hint else ""), duration=None) from err
            return act

        def generate(key, taken, targets, scheme, steps, heat, text_heat, guidance, seed, n, best_of, rank, *given):
            return self.generate(self.request(
                key, taken or [], dict(zip(names, given, strict=True)), targets or [], scheme=scheme, steps=int(steps),
                temperature=heat, text_temperature=text_heat, guidance=guidance, seed=int(seed), n=int(n), best_of=int(best_of),
                rank=rank,
            ))

        with gr.Blocks(title=f"nano4m: {self.studio.run.name}", analytics_enabled=False) as page:
            gr.Markdown(f"## {self.studio.run.name}\nAny of {', '.join(names)} from any others; data set "
                        f"{self.studio.run.dataset.name}, {self.studio.run.checkpoint.name}.")
            with gr.Row():
                with gr.Column():
                    gr.Markdown("### Given")
                    key = gr.Dropdown(
                        keys, value=keys[0] if keys else None, label=f"Sample ({self.split})", allow_custom_value=True
                    )
                    taken = gr.CheckboxGroup(names, value=texts[:1] or names[:1], label="Taken from the sample")
                    first = told(self.preview)(keys[0]) if keys else (None, None)
                    sample = gr.Image(first[0], show_label=False, interactive=False, buttons=[], type="filepath", format="png")
                    heard = gr.Audio(first[1], label="Its sound", interactive=False, visible=bool(sounds), buttons=["download"])
                    with gr.Accordion("Your own, in place of the sample's", open=not keys):
                        given = [self._input(gr, name) for name in names]
                with gr.Column():
                    gr.Markdown("### Made")
                    targets = gr.Dropdown(names, value=[n for n in names if n not in texts][:1], multiselect=True,
                                          label="Targets, one after the other")
                    with gr.Row():
                        scheme = gr.Dropdown(list(get_args(Scheme)), value=usual.scheme, label="Scheme")
                        steps = gr.Slider(1, 64, usual.steps, step=1, label="Steps")
                    with gr.Row():
                        heat = gr.Slider(0, 2, usual.temperature, step=0.05, label="Temperature")
                        text_heat = gr.Slider(0, 2, usual.text_temperature, step=0.05, label="Temperature of text")
                    with gr.Row():
                        # A number widget would turn nothing into 0, which is a guidance too.
                        guidance = gr.Textbox(label="Guidance", placeholder="empty: the usual")
                        seed = gr.Number(usual.seed, label="Seed", precision=0, minimum=0)
                    with gr.Row():
                        n = gr.Slider(1, 8, 1, step=1, label="Samples")
                        best_of = gr.Slider(1, 16, 1, step=1, label="Best of")
                        rank = gr.Dropdown(list(get_args(best.Rank)), value="likelihood", label="Ranked by")
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                    gr.Markdown("Condition, output, truth")
                    sheet = gr.Image(show_label=False, interactive=False, type="filepath", format="png",
                                     buttons=["download", "fullscreen"], elem_id="sheet")
                    sound = gr.Audio(label="Sound", interactive=False, visible=bool(sounds), elem_id="sound", buttons=["download"])
                    words = gr.Textbox(label="Texts and notices", interactive=False, lines=2, elem_id="words")
                    files = gr.Files(label="Files", interactive=False)
            key.change(told(self.preview), key, [sample, heard], api_name="preview")
            asked = [key, taken, targets, scheme, steps, heat, text_heat, guidance, seed, n, best_of, rank, *given]
            button.click(told(generate), asked, [sheet, sound, words, files], api_name="generate")
        # Fonts of the system: others would be fetched.
        return page, {"theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])}

    def _input(self, gr: Any, name: str) -> Any:
        """Return the widget that takes a modality from a person."""
        kind = self.studio.kind(name)
        if kind.kind == "text":
            return gr.Textbox(label=name, placeholder="write here")
        if kind.kind == "audio":
            return gr.Audio(label=name, type="filepath", sources=["upload", "microphone"])
        # Only 8-bit colour goes through a picture widget unharmed.
        return gr.Image(label=name, type="filepath", sources=["upload", "clipboard"], image_mode=None, height=160) if (
            kind.ext.startswith("rgb")) else gr.File(label=f"{name} ({kind.suffix})", type="filepath", height=90)

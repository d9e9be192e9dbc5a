"""The page of `generate --ui`: what its widgets ask for, and one use of it in a headless Chromium that reaches no other host."""

import base64
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from test_cli import fails, run
from workspace_factory import media, one_thread, tiny  # noqa: F401

from nano4m_cli.errors import Nano4MError, UsageError
from nano4m_cli.generate.command import Studio
from nano4m_cli.generate.ui import Page, serve
from nano4m_cli.train.run import open_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def page(media):  # noqa: F811
    return Page(Studio(open_run(media, "demo")))


# -- what the widgets ask for -----------------------------------------------------------------------------------------


def test_widgets_are_a_request(page, tmp_path):
    key = page.keys()[0]
    asked = page.request(key, ["rgb", "caption"], {"caption": "a red cube", "audio": None}, ["depth", "audio"], steps=3, seed=5,
                         guidance=None, best_of=1, rank="cycle")
    assert asked.conditions == {"rgb": None, "caption": "a red cube"} and asked.sample == key
    assert asked.targets == ["depth", "audio"] and (asked.steps, asked.seed, asked.guidance, asked.best_of) == (3, 5, None, 1)
    assert page.request(key, ["caption"], {"caption": "a red cube"}, ["rgb"]).sample is None, "nothing is left to take from it"
    assert page.request(key, [], {"caption": "a red cube"}, ["rgb"], best_of=2, rank="cycle").rank == "cycle"


def test_what_is_made_is_what_the_command_makes(page, media, tmp_path):  # noqa: F811
    asked = page.request(None, [], {"caption": "a red cube"}, ["rgb", "audio"], seed=3, steps=4, n=2)
    sheet, sound, words, files = page.generate(asked)
    assert Image.open(sheet).size[0] > 300 and sound.endswith("000-audio.wav") and len(files) == 9
    result = run("generate", "--from", "caption=a red cube", "--to", "rgb,audio", "--seed", 3, "--steps", 4, "-n", 2,
                 "--out", tmp_path, "--root", media.root, "--device", "cpu")
    assert result.exit_code == 0
    mine = {Path(f).name: f for f in files if f.endswith(".npy")}
    assert len(mine) == 4 and all(np.array_equal(np.load(f), np.load(tmp_path / n)) for n, f in mine.items())


def test_texts_notices_and_scores_are_told(page):
    asked = page.request(page.keys()[1], ["rgb"], {}, ["caption"], best_of=2, rank="cycle", n=2)
    _, sound, words, _ = page.generate(asked)
    assert sound is None and words.count("caption: ") == 2 and "best of 2 by cycle: candidate [" in words


def test_a_sample_is_shown_and_heard(page):
    sheet, sound = page.preview(page.keys()[0])
    assert Image.open(sheet).size[0] > 4 * 96 and Path(sound).stat().st_size > 1000
    assert page.preview(None) == page.preview("") == (None, None)
    with pytest.raises(Nano4MError, match="has no sample 'x'"):
        page.preview("x")


def test_without_gradio_it_says_how_to_install_it(media, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("generate", "--ui", "--root", media.root, "--device", "cpu")
    fails(result, 2, "--ui needs gradio", "pip install 'nano4m[ui]'")


def test_what_does_not_go_with_the_page(media):  # noqa: F811
    for extra in (["--to", "rgb"], ["--steps", 3], ["--requests", "r.jsonl"], ["--json"], ["--best-of", 2]):
        fails(run("generate", "--ui", *extra, "--root", media.root), 2, "--ui asks on its page", f"leave out {extra[0]}")
    fails(run("generate", "--to", "rgb", "--port", 8000, "--root", media.root), 2, "--port goes with --ui")


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(media, tmp_path):  # noqa: F811
    pytest.importorskip("gradio", reason="the extra 'ui' is not installed")
    told = []
    server = serve(open_run(media, "demo"), None, None, told.append, wait=False)
    try:
        assert told and told[0].startswith("http://127.0.0.1:") and not server.share and server.share_url is None
        port = told[0].rstrip("/").rpartition(":")[2]
        with pytest.raises(UsageError, match=f"--port {port}"):
            serve(open_run(media, "demo"), None, int(port), told.append, wait=False)
        browser = Browser(tmp_path / "profile")
        try:
            browser.ask("Page.navigate", url=told[0])
            browser.until("!!document.querySelector('#generate')")
            assert "Condition, output, truth" in browser.value("document.body.innerText")
            browser.value("document.querySelector('#generate').click()")
            source = browser.until("(i => i && i.complete && i.naturalWidth > 300 && i.src)(document.querySelector('#sheet img'))")
            assert source.startswith(told[0])
            assert "guidance 0" not in browser.value("[...document.querySelectorAll('textarea')].map(t => t.value).join()")
            shot = base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"])
            elsewhere = browser.value(
                "performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin) && "
                "n.startsWith('http') && performance.getEntriesByName(n)[0].responseStatus > 0)")
            assert elsewhere == []
        finally:
            browser.close()
        path = Path(os.environ.get("NANO4M_SCREENSHOT", tmp_path / "page.png"))
        path.write_bytes(shot)
        assert np.asarray(Image.open(path).convert("L")).std() > 10
    finally:
        server.close()

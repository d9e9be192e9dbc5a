"""The listening test: what the page holds and does, what raters' files may hold, and the figures made of them."""

import base64
import copy
import io
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_ui import CHROMIUM, Browser

from nano4m_cli.config import build
from nano4m_cli.errors import ConfigError, DataError
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.probes import _speech_ratings as ratings
from nano4m_cli.probes._speech_listen import KEY, PAGE, Key, levelled, write_page
from nano4m_cli.probes._speech_sound import trimmed
from nano4m_cli.probes.mos import Probe

SYSTEMS = ratings.SYSTEMS


def tone(hz: float, seconds: float = 0.3, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def made_by(seed: int = 0, run: str = "demo"):
    return SimpleNamespace(
        run=SimpleNamespace(name=run, checkpoint=Path("step-00000004")), dataset=SimpleNamespace(name="digits"), split="test",
        seed=seed,
    )


def sounds(n: int = 3):
    """Systems of n samples; the first recording is silent."""
    out = {s: [tone(200 + 100 * i + 30 * k, 0.2 + 0.05 * i, 0.02 * (1 + k)) for i in range(n)] for k, s in enumerate(SYSTEMS)}
    out["truth"][0] = np.zeros(4000, np.float32)
    return out


@pytest.fixture(scope="module")
def listening(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listen")
    n = write_page(folder, made_by(), "caption->audio", ["k0", "k1", "k2"], sounds(), 12)
    assert n == 6, "a silent recording is no reference"
    return folder


def key_of(folder) -> Key:
    return ratings.read_key(folder / KEY)


def held_by(folder) -> dict:
    return json.loads(re.search(r'id="held">(.*?)</script>', (folder / PAGE).read_text(), re.S)[1])


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_sounds_and_does_not_tell_what_they_are(listening):
    key, held, text = key_of(listening), held_by(listening), (listening / PAGE).read_text()
    assert {c for c, _ in held["clips"]} == set(key.clips) and held["test"] == key.test
    assert sorted((c.sample, c.system) for c in key.clips.values()) == sorted((k, s) for k in ("k1", "k2") for s in SYSTEMS)
    for word in ("truth", "round_trip", "generated", "k1", "demo", "test/", "http:", "https:", "src=", "href="):
        assert word not in text.replace("link.href =", "").replace("audio.src", ""), word
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(held["clips"][0][1])), dtype="float32")
    assert rate == RATE and wave.ndim == 1
    assert "default-src 'none'" in text and "connect-src" not in text


def test_neither_loudness_nor_silence_tells_sounds_apart():
    quiet, loud = np.pad(tone(300, 0.3, 0.01), (9000, 100)), np.pad(tone(300, 0.3, 0.8), (0, 20_000))
    a, b = levelled(quiet), levelled(loud)
    assert len(a) == len(b) and np.abs(a - b).max() < 0.01
    assert 20 * math.log10(np.sqrt(np.mean(trimmed(a) ** 2))) == pytest.approx(-26, abs=0.06)
    click = np.zeros(9000, np.float32)
    click[4000:4010] = 0.001
    assert np.abs(levelled(click)).max() <= 0.991 and len(levelled(np.zeros(5000, np.float32))) == 2400


def test_the_same_run_gives_the_same_test_and_another_is_refused(listening, tmp_path):
    shutil.copytree(listening, tmp_path / "a")
    before = [(tmp_path / "a" / f).read_bytes() for f in (PAGE, KEY)]
    write_page(tmp_path / "a", made_by(), "caption->audio", ["k0", "k1", "k2"], sounds(), 12)
    assert before == [(tmp_path / "a" / f).read_bytes() for f in (PAGE, KEY)]
    with pytest.raises(DataError, match="(?s)another listening test, whose ratings.*hint: choose another folder"):
        write_page(tmp_path / "a", made_by(run="other"), "caption->audio", ["k0", "k1", "k2"], sounds(), 12)
    assert before == [(tmp_path / "a" / f).read_bytes() for f in (PAGE, KEY)]
    with pytest.raises(DataError, match="nothing to listen to"):
        write_page(tmp_path / "b", made_by(), "caption->audio", ["k0"], {s: [np.zeros(4000, np.float32)] for s in SYSTEMS}, 12)
    assert not (tmp_path / "b").exists()


def test_recordings_are_drawn_by_the_seed(tmp_path):
    many = {s: [tone(200 + 10 * i) for i in range(20)] for s in SYSTEMS}
    keys = [f"k{i}" for i in range(20)]
    drawn = []
    for seed in (0, 1):
        write_page(tmp_path / str(seed), made_by(seed), "caption->audio", keys, many, 4)
        drawn.append({c.sample for c in key_of(tmp_path / str(seed)).clips.values()})
    assert len(drawn[0]) == len(drawn[1]) == 4 and drawn[0] != drawn[1]


# -- raters' files ----------------------------------------------------------------------------------------------------


def answer(key: Key, rater: str, score) -> dict:
    """A rater's file: score(sample, system) or None."""
    given = [(c, score(clip.sample, clip.system)) for c, clip in key.clips.items()]
    return {"format": "nano4m-mos", "version": 1, "test": key.test, "rater": rater,
            "ratings": [{"clip": c, "score": s, "plays": 1, "position": i} for i, (c, s) in enumerate(given) if s is not None]}


@pytest.fixture
def inbox(listening, tmp_path):
    folder = tmp_path / "inbox"
    shutil.copytree(listening, folder)
    return folder


def put(folder, name, data):
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))


def test_what_raters_send_is_read(inbox):
    key = key_of(inbox)
    put(inbox, "b.json", answer(key, "Zo\u00eb", lambda sample, system: 5))
    put(inbox, "a.json", answer(key, "Ben 2", lambda sample, system: 1 + SYSTEMS.index(system) if sample == "k1" else None))
    found = ratings.read_ratings(inbox, key)
    samples, scores = ratings.table(key, found)
    assert [f.rater for f in found] == ["Ben 2", "Zo\u00eb"] and samples == ["k1", "k2"]
    assert np.array_equal(scores[0], [[1, 2, 3], [np.nan] * 3], equal_nan=True) and (scores[1] == 5).all()


def change(data, *path, to):
    data = copy.deepcopy(data)
    node = data
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = to
    return data


HOSTILE = [
    (lambda d: change(d, "ratings", 0, "score", to=6), "less than or equal to 5"),
    (lambda d: change(d, "ratings", 0, "score", to=0), "greater than or equal to 1"),
    (lambda d: change(d, "ratings", 0, "score", to=4.5), "valid integer"),
    (lambda d: change(d, "ratings", 0, "score", to=True), "valid integer"),
    (lambda d: change(d, "ratings", 0, "score", to="5"), "valid integer"),
    (lambda d: change(d, "ratings", 0, "plays", to=0), "greater than or equal to 1"),
    (lambda d: change(d, "ratings", 0, "clip", to="feedfeedfeedfeed"), "the test has no sound 'feedfeedfeedfeed'"),
    (lambda d: change(d, "ratings", 1, "clip", to=d["ratings"][0]["clip"]), "is rated twice"),
    (lambda d: change(d, "ratings", to=[]), "at least 1 item"),
    (lambda d: change(d, "test", to="another"), "it is of another listening test"),
    (lambda d: change(d, "format", to="x"), "nano4m-mos"),
    (lambda d: change(d, "version", to=2), "version"),
    (lambda d: change(d, "rater", to="<script>"), "rater"),
    (lambda d: change(d, "rater", to="a\n"), "rater"),
    (lambda d: change(d, "rater", to="x" * 41), "rater"),
    (lambda d: {**d, "admin": True}, "unknown key 'admin'"),
    (lambda d: {k: v for k, v in d.items() if k != "rater"}, "rater"),
    (lambda d: json.dumps(d).replace('"plays": 1', '"plays": NaN', 1), "NaN is no number"),
    (lambda d: json.dumps(d).replace('"plays": 1', '"plays": Infinity', 1), "Infinity is no number"),
    (lambda d: json.dumps(d).replace('"plays": 1', '"plays": 1, "plays": 2', 1), "a key stands twice"),
    (lambda d: json.dumps(d)[:-9], "cannot be used"),
    (lambda d: "[" * 100_000, "cannot be used"),
    (lambda d: "[]", "dictionary"),
    (lambda d: "null", "dictionary"),
    (lambda d: "", "cannot be used"),
    (lambda d: json.dumps(d) + " " * (1 << 20), "more than 1 MB"),
]


@pytest.mark.parametrize("harm, why", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_refused_by_name(inbox, harm, why):
    key = key_of(inbox)
    put(inbox, "good.json", answer(key, "good", lambda sample, system: 4))
    put(inbox, "ratings-evil.json", harm(answer(key, "evil", lambda sample, system: 3)))
    with pytest.raises(DataError) as err:
        ratings.read_ratings(inbox, key)
    assert "ratings-evil.json" in err.value.message and why in str(err.value), str(err.value)
    assert "take it out of the folder" in err.value.hint


def test_bytes_that_are_no_text_are_refused(inbox):
    (inbox / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="x.json cannot be used"):
        ratings.read_ratings(inbox, key_of(inbox))


def test_a_rater_counts_once(inbox):
    key = key_of(inbox)
    put(inbox, "a.json", answer(key, "Ann", lambda sample, system: 3))
    put(inbox, "b.json", answer(key, "ANN", lambda sample, system: 5))
    with pytest.raises(DataError, match="b.json: rater 'ANN' has a file already: a.json"):
        ratings.read_ratings(inbox, key)


def test_nothing_to_read(inbox, tmp_path):
    with pytest.raises(DataError, match="holds no ratings"):
        ratings.read_ratings(inbox, key_of(inbox))
    with pytest.raises(DataError, match="no folder"):
        ratings.read_ratings(tmp_path / "nowhere", key_of(inbox))
    with pytest.raises(DataError, match="(?s)no .*key.json.*mos.key=FILE"):
        ratings.read_key(tmp_path / "key.json")
    put(tmp_path, "key.json", {"format": "nano4m-mos-key"})
    with pytest.raises(DataError, match="key.json"):
        ratings.read_key(tmp_path / "key.json")


# -- figures ----------------------------------------------------------------------------------------------------------


def test_mean_and_interval_equal_a_slow_bootstrap():
    rng = np.random.default_rng(5)
    scores = 3 + 0.3 * rng.normal(size=(6, 1)) + 0.3 * rng.normal(size=(1, 8)) + 0.5 * rng.normal(size=(6, 8))
    scores[rng.random((6, 8)) < 0.2] = np.nan
    value, (low, high), n = ratings.mean_interval(scores, 0)
    given, draws = scores[~np.isnan(scores)], []
    assert (value, n) == (pytest.approx(given.mean()), len(given))
    for _ in range(4000):
        rows, columns = rng.integers(0, 6, 6), rng.integers(0, 8, 8)
        draws.append(np.nanmean(scores[rows][:, columns]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.06)


def test_scores_that_are_alike_leave_no_interval():
    assert ratings.mean_interval(np.full((4, 5), 3.0), 0) == (3.0, (3.0, 3.0), 20)
    value, interval, n = ratings.mean_interval(np.full((2, 2), np.nan), 0)
    assert math.isnan(value) and n == 0


def test_agreement_is_that_of_the_published_example():
    """Krippendorff, Computing Krippendorff's alpha-reliability (2011), section C: interval alpha 0.849."""
    x = np.nan
    data = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    ])
    assert ratings.krippendorff(data) == pytest.approx(0.849, abs=5e-4)


def test_agreement_at_its_ends():
    same = np.tile(np.arange(1.0, 6.0), (3, 1))
    assert ratings.krippendorff(same) == 1.0
    rng = np.random.default_rng(0)
    assert abs(ratings.krippendorff(rng.integers(1, 6, (4, 3000)).astype(float))) < 0.03
    assert math.isnan(ratings.krippendorff(np.full((3, 4), 2.0))) and math.isnan(ratings.krippendorff(same[:1]))


def test_who_rates_the_hidden_reference_low_is_left_out():
    x = np.nan
    scores = np.array([[[3, 1, 1], [3, 1, 1]], [[2, 5, 5], [3, 5, 5]], [[x, 5, 5], [x, 4, 4]], [[x, 1, 1], [5, 1, 1]]])
    assert ratings.reliable(scores, 3.0).tolist() == [True, False, False, True]
    assert ratings.reliable(scores, 2.5).tolist() == [True, True, False, True]


# -- the probe --------------------------------------------------------------------------------------------------------

SCORES = {  # rater: (truth, round trip, generated) of k1, then of k2
    "Ann": ((5, 4, 2), (4, 4, 3)),
    "Ben": ((5, 3, 1), (5, 4, 2)),
    "Cal": ((2, 5, 5), (3, 5, 5)),  # deaf, or has them the wrong way round
}


def asked(folder, **options):
    return Probe(build(Probe.Options, {"ratings": str(folder), **options}, "mos"))


def send(inbox, scores=SCORES):
    key = key_of(inbox)
    for name, (one, two) in scores.items():
        put(inbox, f"{name}.json", answer(key, name, lambda sample, system, a=one, b=two: (a if sample == "k1" else b)[
            SYSTEMS.index(system)]))


def test_figures_are_those_of_a_hand_computation(inbox):
    send(inbox)
    found = asked(inbox).measure(made_by())
    value = {m.name: m for m in found.metrics}
    assert value["caption->audio/mos"].value == 2.0 and value["audio/mos_round_trip"].value == 3.75
    assert value["audio/mos"].value == 4.75 and value["audio/mos"].n == 4
    assert value["caption->audio/mos_minus_truth"].value == -2.75
    assert value["caption->audio/mos_minus_round_trip"].value == -1.75
    assert value["caption->audio/mos"].reference == 4.75 and value["caption->audio/mos"].chance == 3.0
    low, high = value["caption->audio/mos"].ci95
    assert 1.0 <= low < 2.0 < high <= 3.0
    flat = np.array([[*SCORES[r][0], *SCORES[r][1]] for r in ("Ann", "Ben")], float)
    assert value["audio/agreement"].value == pytest.approx(ratings.krippendorff(flat), abs=1e-6)
    assert any("Cal" in n and "under 3" in n and "with all raters: recordings 4.00" in n for n in found.notes)
    shown = {p.name: p for p in found.plots}
    assert shown["raters"].values[2] == [2.5, 5.0, 5.0, 6.0, "left out"]
    assert shown["scores"].values[0] == [0, 0, 0, 0.25, 0.75]


def test_with_a_lower_bar_nobody_is_left_out(inbox):
    send(inbox)
    found = asked(inbox, least=2.0).measure(made_by())
    assert {m.name: m.value for m in found.metrics}["audio/mos"] == 4.0
    assert any("left out: raters" in n and ": none;" in n for n in found.notes)


def test_it_is_the_same_every_time(inbox):
    send(inbox)
    a, b = (asked(inbox).measure(made_by()) for _ in range(2))
    assert [m.model_dump() for m in a.metrics] == [m.model_dump() for m in b.metrics]


def test_ratings_of_another_run_are_refused(inbox):
    send(inbox)
    with pytest.raises(DataError, match="(?s)of run 'demo', not of 'other'.*hint: give --run demo"):
        asked(inbox).measure(made_by(run="other"))
    later = made_by()
    later.run.checkpoint = Path("step-00000009")
    with pytest.raises(DataError, match="of checkpoint 'step-00000004'"):
        asked(inbox).measure(later)


def test_nobody_left(inbox):
    send(inbox, {"Cal": SCORES["Cal"]})
    with pytest.raises(DataError, match="(?s)all 1 raters .* under 3.*mos.least"):
        asked(inbox).measure(made_by())


def test_partial_ratings_count_and_are_told(inbox):
    send(inbox)
    put(inbox, "Dan.json", answer(key_of(inbox), "Dan", lambda sample, system: 4 if sample == "k1" else None))
    found = asked(inbox).measure(made_by())
    assert {m.name: m.n for m in found.metrics}["audio/mos"] == 5
    assert "1 of 4 raters did not rate all 6 sounds" in found.notes


def test_options():
    assert "mos.ratings=DIR" in Probe().missing(None) and asked("x").missing(None) is None
    with pytest.raises(ConfigError, match="less than or equal to 5"):
        asked("x", least=6)


# -- in a browser -----------------------------------------------------------------------------------------------------


class Listener(Browser):
    """A browser that reads the page from its file, plays sound into nothing, and saves what it is given."""

    def press(self, key, code=None):
        more = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            extra = more if kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=code or "",
                     **({"windowsVirtualKeyCode": 13} if key == "Enter" else {}), **extra)

    def begin(self, rater):
        self.value(f"document.querySelector('#rater').value = {json.dumps(rater)}; document.querySelector('#begin').click()")


def order_of(browser, count):
    """Walk through the test by keys alone, rating every sound by its number of seconds; return (position, length) pairs."""
    for i in range(count):
        assert browser.value("document.querySelector('#where').textContent") == f"Recording {i + 1} of {count}"
        assert browser.value("document.querySelector('#next').disabled") is True
        browser.press("3")
        assert browser.value("document.querySelector('input[name=score]:checked')") is None, "not before it was heard"
        browser.press(" ", "Space")
        browser.until("document.querySelector('#play').textContent === 'Play again'", 30)
        browser.press(str(1 + i % 5))
        browser.press("Enter")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(listening, tmp_path):
    browser = Listener(tmp_path / "profile")
    shots = Path(os.environ.get("NANO4M_SCREENSHOTS", tmp_path))
    shots.mkdir(exist_ok=True)
    shot = lambda name: (shots / f"listen-{name}.png").write_bytes(  # noqa: E731
        base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"]))
    try:
        saved = tmp_path / "saved"
        saved.mkdir()
        browser.session, session = None, browser.session
        browser.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
        browser.session = session
        browser.ask("Emulation.setDeviceMetricsOverride", width=420, height=860, deviceScaleFactor=1, mobile=False)
        browser.ask("Page.enable")
        browser.ask("Page.addScriptToEvaluateOnNewDocument",
                    source="window.faults = []; addEventListener('error', e => faults.push(e.message));"
                           "addEventListener('securitypolicyviolation', e => faults.push(e.violatedDirective));")
        browser.ask("Page.navigate", url=(listening / PAGE).as_uri())
        browser.until("!!document.querySelector('#begin')")
        shot("intro")
        browser.begin("<b>")
        assert "letters and digits" in browser.value("document.querySelector('#said').textContent")
        browser.begin("  Zo\u00eb 1 ")
        shot("rate")
        order_of(browser, 6)
        assert browser.value("document.querySelector('#done').hidden") is False
        shot("done")
        browser.value("document.querySelector('#save').click()")
        end = time.monotonic() + 20
        while not (files := list(saved.glob("*.json"))):
            assert time.monotonic() < end, list(saved.iterdir())
            time.sleep(0.1)
        shutil.copy(listening / KEY, saved)
        key = key_of(listening)
        (one,) = ratings.read_ratings(saved, key)
        assert files[0].name.startswith("ratings-Zo\u00eb-1-") and one.rater == "Zo\u00eb 1"
        assert [r.score for r in one.ratings] == [1, 2, 3, 4, 5, 1] and [r.position for r in one.ratings] == list(range(6))
        assert {r.clip for r in one.ratings} == set(key.clips) and all(r.plays == 1 for r in one.ratings)
        assert browser.value("window.faults") == []
        assert browser.value("performance.getEntriesByType('resource').filter(e => !/^(blob|data|file):/.test(e.name)).length") == 0
        # Another rater hears them in another order, the same rater in the same.
        orders = []
        for rater in ("Zo\u00eb 1", "zo\u00eb  1", "Ben"):
            browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
            browser.ask("Page.navigate", url=(listening / PAGE).as_uri() + f"?{len(orders)}")
            browser.until("document.querySelector('#intro') && !document.querySelector('#intro').hidden && !!window.faults")
            browser.value("window.heard = []; const make = URL.createObjectURL;"
                          "URL.createObjectURL = b => { heard.push(b.size); return make.call(URL, b); }")
            browser.begin(rater)
            browser.value("document.querySelectorAll('#next, #back').forEach(b => b.disabled = false)")
            for _ in range(5):
                browser.value("document.querySelector('#next').disabled = false; document.querySelector('#next').click()")
            orders.append(browser.value("window.heard"))
            if rater == "Ben":
                shot("dark")
        assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) and len(orders[0]) == 6
    finally:
        browser.close()
    assert np.asarray(Image.open(shots / "listen-rate.png").convert("L")).std() > 5

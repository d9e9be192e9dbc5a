"""Filters `panns` and `silero` against plain implementations, on weights made here in the published formats; and how
filters with settings and weights are asked for, recorded and decided again."""

import csv
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from test_folder import RATE, everything, run, tone
from torch import nn

from nano4m_cli.config import apply_overrides, build
from nano4m_cli.data._settings import made
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.filters import panns, silero
from nano4m_cli.data.filters._base import dropped_by
from nano4m_cli.data.sources import folder as folder_source
from nano4m_cli.data.sources.folder import Source
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, FetchError, MediaError, WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import resample
from nano4m_cli.registry import FILTERS, LABELS

NAMES = ["Speech", "Male speech, man speaking", "Dog", "Bark", "Music", "Wind", "Silence"]
WIDTHS = (1, 4, 6, 8, 10, 12, 14)  # the published ones are 1, 64, 128, 256, 512, 1024, 2048


def hann(n: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def slaney(rate: int, n_fft: int, bands: int, low: float, high: float) -> np.ndarray:
    """Return (bins, bands), librosa's mel filters: linear to 1 kHz, logarithmic above, each of area one."""
    to_mel = lambda f: f * 3 / 200 if f < 1000 else 15 + math.log(f / 1000) * 27 / math.log(6.4)  # noqa: E731
    to_hz = lambda m: m * 200 / 3 if m < 15 else 1000 * math.exp((m - 15) * math.log(6.4) / 27)  # noqa: E731
    edges = [to_hz(m) for m in np.linspace(to_mel(low), to_mel(high), bands + 2)]
    out = np.zeros((n_fft // 2 + 1, bands))
    for k in range(n_fft // 2 + 1):
        f = k * rate / n_fft
        for b, (left, mid, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            out[k, b] = max(0.0, min((f - left) / (mid - left), (right - f) / (right - mid))) * 2 / (right - left)
    return out


class Cnn14(nn.Module):
    """The network as its paper tells it, in plain modules by the names of the published checkpoint."""

    def __init__(self, widths=WIDTHS, classes=len(NAMES)):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(64)
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False), 1):
            block = nn.Module()
            block.conv1, block.conv2 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.Conv2d(b, b, 3, padding=1, bias=False)
            block.bn1, block.bn2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
            setattr(self, f"conv_block{i}", block)
        self.fc1, self.fc_audioset = nn.Linear(widths[-1], widths[-1]), nn.Linear(widths[-1], classes)

    def logits(self, mel_TM):
        x = self.bn0(mel_TM.T[None, :, :, None])[0, :, :, 0].T[None, None]
        for i in range(1, 7):
            block = getattr(self, f"conv_block{i}")
            x = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
            if i < 6:
                x = nn.AvgPool2d(2)(x)
        x = x[0].mean(2)
        return self.fc_audioset(self.fc1(x.max(1).values + x.mean(1)).relu())

    def forward(self, mel_TM):
        return torch.sigmoid(self.logits(mel_TM))


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Return (frames, 64) in dB: centred frames of 1024 samples, 320 apart, mirrored at the ends."""
    wide = np.pad(wave.astype(np.float64), 512, mode="reflect")
    frames = np.stack([wide[a : a + 1024] * hann(1024) for a in range(0, len(wide) - 1023, 320)])
    return 10 * np.log10(np.maximum(np.abs(np.fft.rfft(frames)) ** 2 @ slaney(32000, 1024, 64, 50, 14000), 1e-10))


def cnn14(folder: Path, seed=0) -> Cnn14:
    """Write the two files that PANNs come as; return the network that they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Cnn14()
        for name, value in net.state_dict().items():
            if value.is_floating_point() and (".bn" in name or name.startswith("bn0")):
                value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.3)
            elif value.ndim > 1:
                nn.init.kaiming_normal_(value)
        net.bn0.running_mean.fill_(-30.0)
        net.bn0.running_var.fill_(400.0)
        mel = torch.tensor(np.stack([log_mel(sound(1, i, 32000)) for i in range(4)]), dtype=torch.float32)
        with torch.no_grad():  # centred, so that classes are heard in some sounds and not in others
            spread = torch.stack([net.eval().logits(m) for m in mel]).std(0)
            assert (spread > 1e-3).all()
            net.fc_audioset.weight /= spread[:, None]
            net.fc_audioset.bias -= torch.stack([net.logits(m) for m in mel]).mean(0)
    wave = np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(1024)) / 1024) * hann(1024)
    table = {
        "spectrogram_extractor.stft.conv_real.weight": torch.tensor(wave.real[:, None], dtype=torch.float32),
        "spectrogram_extractor.stft.conv_imag.weight": torch.tensor(wave.imag[:, None], dtype=torch.float32),
        "logmel_extractor.melW": torch.tensor(slaney(32000, 1024, 64, 50, 14000), dtype=torch.float32),
        **net.state_dict(),
    }
    torch.save({"iteration": 600000, "model": table}, folder / "Cnn14_mAP=0.431.pth",
               _use_new_zipfile_serialization=False)  # as torch wrote files when these were made; `damage` writes today's
    with open(folder / "class_labels_indices.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerows([["index", "mid", "display_name"], *([i, f"/m/{i}", n] for i, n in enumerate(NAMES))])
    return net.eval()


def vad(folder: Path, seed=0) -> dict[str, np.ndarray]:
    """Write the file that Silero VAD comes as, of true size; return its tensors."""
    g = torch.Generator().manual_seed(seed)
    shape = {"conv1": (128, 129, 3), "conv2": (64, 128, 3), "conv3": (64, 64, 3), "conv4": (128, 64, 3), "final_conv": (1, 128, 1)}
    basis = np.exp(-2j * np.pi * np.outer(np.arange(129), np.arange(256)) / 256) * hann(256)
    table = {"stft_conv.weight": torch.tensor(np.concatenate([basis.real, basis.imag])[:, None], dtype=torch.float32)}
    for name, s in shape.items():
        table[f"{name}.weight"] = torch.randn(s, generator=g) * (2 / (s[1] * s[2])) ** 0.5
        table[f"{name}.bias"] = torch.randn(s[0], generator=g) * 0.1
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        table[f"lstm_cell.{name}"] = torch.randn((512, 128) if "weight" in name else (512,), generator=g) * 0.15
    folder.mkdir(parents=True, exist_ok=True)
    probability = np.array(heard({k: v.double().numpy() for k, v in table.items()}, sound(1.5, rate=16000)))
    table["final_conv.bias"] -= float(np.median(np.log(probability / (1 - probability))))  # speech here, none there
    save_file(table, folder / "silero_vad_16k.safetensors")
    return {k: v.double().numpy() for k, v in table.items()}


def heard(w: dict[str, np.ndarray], wave: np.ndarray) -> list[float]:
    """Return the probability of speech of each chunk, chunk after chunk as a stream has them."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    h, c, before, out = np.zeros(128), np.zeros(128), np.zeros(64), []
    for a in range(0, len(wave), 512):
        chunk = wave[a : a + 512].astype(np.float64)
        x = np.concatenate([before, chunk, np.zeros(512 - len(chunk))])
        before = x[-64:]
        x = np.concatenate([x, x[-2:-66:-1]])
        x = np.stack([np.abs(np.fft.rfft(x[b : b + 256] * hann(256))) for b in range(0, 385, 128)], 1)  # (129, 4)
        for layer, stride in (("conv1", 1), ("conv2", 2), ("conv3", 2), ("conv4", 1)):
            wide = np.pad(x, ((0, 0), (1, 1)))
            steps = [wide[:, b : b + 3] for b in range(0, x.shape[1], stride)]
            x = np.stack([np.tensordot(w[f"{layer}.weight"], s, 2) + w[f"{layer}.bias"] for s in steps], 1).clip(0)
        gates = w["lstm_cell.weight_ih"] @ x[:, 0] + w["lstm_cell.bias_ih"] + w["lstm_cell.weight_hh"] @ h + w["lstm_cell.bias_hh"]
        i, f, g, o = gates.reshape(4, 128)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(float(sigmoid(w["final_conv.weight"][0, :, 0] @ h.clip(0) + w["final_conv.bias"][0])))
    return out


def sound(seconds: float, seed=0, rate=RATE) -> np.ndarray:
    """Return noise that swells and fades over a falling tone."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.1, len(t))
    return (noise * (1 + np.sin(2 * np.pi * (1 + seed) * t)) + 0.2 * np.sin(2 * np.pi * (900 - 60 * t) * t)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return folder, cnn14(folder), vad(folder)


def filter_(name: str, folder: Path, **settings):
    return made(FILTERS, name, {name: {"weights": str(folder), **settings}})


# -- panns --------------------------------------------------------------------------------------------------------


def test_the_mel_filters_here_are_the_usual_ones():
    ensure_torchaudio()
    from torchaudio.functional import melscale_fbanks

    other = melscale_fbanks(513, 50.0, 14000.0, 64, 32000, norm="slaney", mel_scale="slaney")
    assert np.allclose(slaney(32000, 1024, 64, 50, 14000), other, atol=1e-6)


@pytest.mark.parametrize("seconds, seed", [(2.0, 0), (1.37, 1), (0.01, 2)])
def test_panns_hears_what_the_plain_network_hears(weights, seconds, seed):
    folder, net, _ = weights
    wave = resample(sound(seconds, seed), RATE, 32000)
    with torch.no_grad():
        whole = np.pad(wave, (0, max(0, 32000 - len(wave))))
        wanted = net(torch.tensor(log_mel(whole), dtype=torch.float32)).numpy()
    one = filter_("panns", folder, keep=["Dog", "Bark"], reject=["Speech"])
    found = panns.probabilities(one.model.tensors, wave)
    assert np.allclose(found, wanted, atol=2e-4) and wanted.std() > 0.05
    score = one.score([sound(seconds, seed)])
    assert score["keep"] == pytest.approx(max(wanted[2:4]), abs=2e-4) and score["reject"] == pytest.approx(wanted[0], abs=2e-4)
    top = np.argsort(-wanted)[:3]
    assert list(score["tags"]) == [NAMES[i] for i in top] and list(score["tags"].values()) == pytest.approx(wanted[top], abs=2e-4)


def test_panns_hears_different_sounds_differently_and_long_ones_in_parts(weights, monkeypatch):
    one = filter_("panns", weights[0], keep=["Dog"])
    tensors = one.model.tensors
    assert np.abs(panns.probabilities(tensors, sound(2, 0)) - panns.probabilities(tensors, sound(2, 3))).max() > 0.01
    monkeypatch.setattr(panns, "LONGEST", 2 * 32000)
    whole = resample(sound(5), RATE, 32000)
    parts = [panns.probabilities(tensors, p)[2] for p in np.array_split(whole, 3)]
    assert one.score([sound(5)])["keep"] == pytest.approx(max(parts), abs=1e-6) and len(set(parts)) == 3


@pytest.mark.parametrize("score, threshold, kept", [
    ({"keep": 0.3}, None, True), ({"keep": 0.29}, None, False), ({"keep": 0.29}, 0.2, True),
    ({"reject": 0.3}, None, False), ({"reject": 0.29}, None, True), ({"reject": 0.29}, 0.2, False),
    ({"keep": 0.9, "reject": 0.9}, None, False), ({"keep": 0.9, "reject": 0.1}, None, True),
    ({"keep": 0.1, "reject": 0.1}, None, False),
])
def test_panns_keeps_what_is_wanted_and_free_of_the_unwanted(score, threshold, kept):
    """From the record alone: there are no weights here."""
    assert panns.Filter().keeps(score | {"tags": {}}, threshold) is kept


@pytest.mark.parametrize("settings, said, hint", [
    ({}, "needs to know what to hear", "panns.reject="),
    ({"keep": ["Dogs"]}, "AudioSet has no class 'Dogs'", "did you mean 'Dog'"),
    ({"reject": ["xylophone"]}, "AudioSet has no class 'xylophone'", "class_labels_indices.csv has the names"),
    ({"keep": ["Dog"], "reject": ["Dog"]}, "both kept and rejected", ""),
    ({"keeps": ["Dog"]}, "unknown key 'keeps'", "did you mean 'keep'"),
])
def test_panns_wants_classes_that_there_are(weights, settings, said, hint):
    with pytest.raises(ConfigError, match=said) as caught:
        filter_("panns", weights[0], **settings).hashes()
    assert "'panns'" in caught.value.message and hint in (caught.value.hint or "")


def damage(folder: Path, change) -> None:
    path = folder / panns.CHECKPOINT
    held = torch.load(path, weights_only=True)
    change(held["model"])
    torch.save(held, path)


class Code:
    """What a pickle may hold that is no tensor."""


@pytest.mark.parametrize("change, said", [
    (lambda m: m.pop("conv_block3.bn2.running_var"), "lacks conv_block3.bn2.running_var"),
    (lambda m: m.update({"att_block.att.weight": torch.zeros(2)}), "has att_block.att.weight"),
    (lambda m: m["fc1.weight"].view(-1)[3:4].fill_(math.nan), "NaN or infinite numbers in fc1.weight"),
    (lambda m: m.update({"conv_block4.conv1.weight": torch.zeros(10, 9, 3, 3)}), "do not fit each other"),
    (lambda m: m.update({f"fc_audioset.{n}": m[f"fc_audioset.{n}"][:5] for n in ("weight", "bias")}), "knows 5 classes.* names 7"),
    (lambda m: m.update({f"{panns.STFT}real.weight": torch.zeros(257, 1, 512)}), "of another rate"),
    (lambda m: m.update({"bn0.bias": Code()}), "holds no table of tensors"),
])
def test_panns_says_what_is_wrong_with_its_checkpoint(weights, tmp_path, change, said):
    shutil.copytree(weights[0], tmp_path / "w")
    damage(tmp_path / "w", change)
    with pytest.raises(WeightsError, match=said):
        filter_("panns", tmp_path / "w", keep=["Dog"]).score([sound(1)])


def test_panns_says_what_is_wrong_with_its_classes(weights, tmp_path):
    shutil.copytree(weights[0], tmp_path / "w")
    (tmp_path / "w" / panns.CLASSES).write_text("name\nDog\n")
    with pytest.raises(WeightsError, match="is no list with index and display_name"):
        filter_("panns", tmp_path / "w", keep=["Dog"]).hashes()


# -- silero -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, seed", [(1.5, 0), (0.7, 1), (0.01, 2)])
def test_silero_hears_what_a_stream_hears(weights, seconds, seed):
    folder, _, w = weights
    wave = resample(sound(seconds, seed), RATE, 16000)
    wanted = np.array(heard(w, wave))
    found = silero.speech(filter_("silero", folder).model, wave)
    assert len(found) == math.ceil(len(wave) / 512) and np.allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted - 0.5).min() > 1e-4, "no chunk is on the edge"
    if seconds > 1:
        assert 0 < (wanted >= 0.5).mean() < 1, "both are found"
    assert filter_("silero", folder).score([sound(seconds, seed)]) == (wanted >= 0.5).mean()


def test_silero_keeps_speech_or_rejects_it():
    keep, reject = (made(FILTERS, "silero", {"silero": {"speech": s}}) for s in ("keep", "reject"))
    for share, limit, much in ((0.2, None, True), (0.19, None, False), (0.5, 0.6, False), (0.6, 0.6, True)):
        assert keep.keeps(share, limit) is much and reject.keeps(share, limit) is not much


@pytest.mark.parametrize("change, said", [
    (lambda m: m.pop("lstm_cell.bias_hh"), "lacks lstm_cell.bias_hh"),
    (lambda m: m.update({"extra": torch.zeros(1)}), "has extra"),
    (lambda m: m["conv2.bias"][:1].fill_(math.inf), "infinite numbers in conv2.bias"),
    (lambda m: m.update({"conv3.weight": torch.zeros(64, 60, 3)}), "do not fit each other"),
])
def test_silero_says_what_is_wrong_with_its_weights(weights, tmp_path, change, said):
    table = load_file(weights[0] / "silero_vad_16k.safetensors")
    change(table)
    save_file(table, tmp_path / "silero_vad_16k.safetensors")
    with pytest.raises(WeightsError, match=said):
        filter_("silero", tmp_path).score([sound(1)])
    (tmp_path / "silero_vad_16k.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(WeightsError, match="is damaged"):
        filter_("silero", tmp_path, speech="reject").score([sound(1)])


# -- asked for, recorded, decided again ---------------------------------------------------------------------------


def media(folder: Path) -> Path:
    folder.mkdir()
    wave = np.concatenate([sound(1, 0), 0.1 * sound(1, 1), sound(1, 2)[::-1] ** 3, sound(1, 5)])
    soundfile.write(folder / "a.wav", wave, RATE, subtype="FLOAT")
    tone(folder / "b.wav", 0.5)
    return folder


def test_a_fetch_records_scores_settings_and_hashes_and_decides_again(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("nano4m_cli.data.fetch.usable_cores", lambda: 1)  # one worker: each imports torch
    folder = media(tmp_path / "mine")
    asked = [f"path={folder}", "seconds=1", "filter=[panns,silero,silence]", "silero.speech=reject", "thresholds.silero=1.1",
             f"panns.weights={weights[0]}", f"silero.weights={weights[0]}", "panns.keep=[Dog,Bark]", "test=0", "val=0"]
    info, _, samples = run(tmp_path, *asked, "name=all", "thresholds.panns=0")
    scores = {(l["item"], l["start"]): l["scores"] for l, _ in everything(samples)}
    assert len(scores) == 5 and {s["silero"] for s in scores.values()} - {0, 1}
    waves, _ = soundfile.read(folder / "a.wav", dtype="float32")
    one = filter_("panns", weights[0], keep=["Dog", "Bark"])
    for i in range(4):
        wanted = one.score([waves[i * RATE : (i + 1) * RATE]])
        assert scores["a", i]["panns"]["keep"] == pytest.approx(wanted["keep"], abs=1e-5)
        assert list(scores["a", i]["panns"]["tags"]) == list(wanted["tags"])
    short = soundfile.read(folder / "b.wav", dtype="float32")[0]
    assert scores["b", 0]["panns"]["keep"] == pytest.approx(one.score([short])["keep"], abs=1e-5), "without what pads it"
    assert info.options["settings"] == {"panns": {"keep": ["Dog", "Bark"], "reject": []}, "silero": {"speech": "reject"}}
    assert info.options["weights_sha256"]["silero"] == filter_("silero", weights[0]).hashes()
    assert set(info.options["weights_sha256"]["panns"]) == set(panns.Filter.files)
    assert "Filters decided at panns 0 (probability" in info.notes and "silence -60 (dB under full scale)" in info.notes
    assert str(weights[0]) not in json.dumps(info.model_dump(mode="json")), "the place of weights is not what a data set is"

    said = sorted(s["panns"]["keep"] for s in scores.values())
    limit = (said[1] + said[2]) / 2
    monkeypatch.setattr(folder_source, "ProcessPoolExecutor", lambda *_: pytest.fail("clips were scored again"))
    info, _, samples = run(tmp_path, *asked, "name=some", f"thresholds.panns={limit}")
    kept = {(l["item"], l["start"]) for l, _ in everything(samples)}
    left = json.loads((tmp_path / "data" / "some" / "raw" / "left_out.json").read_text())
    assert {(Path(o["file"]).stem, o["start"]) for o in left} == set(scores) - kept and len(left) == 2
    assert all(o["scores"] == scores[Path(o["file"]).stem, o["start"]] and o["by"] == ["panns"] for o in left)
    again = {k for k, s in scores.items() if not dropped_by(s, {"panns": limit, "silero": 1.1}, info.options["settings"])}
    assert again == kept, "the record alone decides as the fetch did"


def test_weights_elsewhere_are_the_same_and_other_weights_are_other_data(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_source, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    folder = media(tmp_path / "mine")
    asked = [f"path={folder}", "seconds=1", "filter=[silero]", "thresholds.silero=0", "name=x"]
    workspace = Workspace.at(tmp_path)
    go = lambda place: fetch(open_source("folder", [*asked, f"silero.weights={place}"], workspace), workspace, workers=1)  # noqa: E731
    assert go(weights[0]).made == 5
    shutil.copytree(weights[0], tmp_path / "moved")
    assert go(tmp_path / "moved").made == 0
    vad(tmp_path / "moved", seed=7)
    with pytest.raises(FetchError, match="made with other options .weights_sha256 differ"):
        go(tmp_path / "moved")


@pytest.mark.parametrize("name, needed", [
    ("panns", "Cnn14_mAP=0.431.pth"), ("panns", "class_labels_indices.csv"), ("silero", "silero_vad_16k.safetensors"),
])
@pytest.mark.parametrize("source", ["folder", "manifest"])
def test_missing_weights_are_told_of_at_once(weights, tmp_path, name, needed, source):
    place = tmp_path / "w"
    place.mkdir()
    for file in FILTERS.get(name).files:
        if file != needed:
            shutil.copy(weights[0] / file, place)
    (tmp_path / "list.csv").write_text("id,start\nabc,0\n")
    options = [f"path={media(tmp_path / 'mine')}", f"csv={tmp_path / 'list.csv'}", f"filter=[{name}]", f"{name}.weights={place}"]
    options += ["panns.keep=[Dog]"] if name == "panns" else []
    workspace = Workspace.at(tmp_path)
    opened = open_source(source, [o for o in options if source == "manifest" or "csv" not in o], workspace)
    with pytest.raises(WeightsError, match=needed) as caught:
        opened.prepare(lambda *_: pytest.fail("work was done"))
    assert f"give {name}.weights=DIR" in caught.value.hint and "https://" in caught.value.hint


@pytest.mark.parametrize("given, said", [
    (["panns.keep=[Dog]"], "settings of 'panns', which is not among"),
    (["filter=[silence]", "silence.weights=x"], "filter 'silence': unknown key 'weights'"),
    (["filter=[silero]", "silero.speech=yes"], "filter 'silero': speech"),
    (["filter=[silero]", "sileroo.speech=keep"], "unknown key 'sileroo'"),
])
def test_wrong_settings_are_told_of(given, said):
    with pytest.raises(ConfigError, match=said):
        build(Source.Options, apply_overrides({}, ["path=.", *given]), "source 'folder'")


def test_settings_leave_captions_from_a_label_alone_and_names_are_of_one_family():
    o = build(Source.Options, apply_overrides({}, ["path=.", "caption={class}", "filter=[silence]"]), "source")
    assert o.caption == "{class}" and o.settings == {}
    assert not set(FILTERS.names()) & set(LABELS.names()), "settings are given by name"


def test_a_score_that_is_no_number_is_an_error_that_names_the_filter(weights, tmp_path, monkeypatch):
    from nano4m_cli.data.sources._folder_clips import _recorded

    assert _recorded({"keep": 0.12345678, "tags": {"Dog": 1.0}}, "panns") == {"keep": 0.123457, "tags": {"Dog": 1.0}}
    with pytest.raises(MediaError, match="filter 'panns' scores it nan"):
        _recorded({"keep": math.nan}, "panns")

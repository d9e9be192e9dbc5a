"""The walls (DESIGN.md section 3), and the contract of each family over every registered name."""

import ast
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_factory import WEIGHTS
from divae_factory import divae_small
from local_factory import LOCAL
from sight_factory import WEIGHTS as SIGHT
from sight_factory import dsine_of_size

import nano4m_cli
from nano4m_cli.config import Config, build
from nano4m_cli.data.filters._base import Filter
from nano4m_cli.data.labels._base import Label
from nano4m_cli.data.sources._base import Source
from nano4m_cli.errors import ConfigError, MediaError, TokenError, UnknownNameError, WeightsError
from nano4m_cli.masking._base import Component, Key
from nano4m_cli.modalities._base import Modality
from nano4m_cli.probes._base import Probe
from nano4m_cli.probes._evaluate import kind_of
from nano4m_cli.registry import COMPONENTS, FILTERS, LABELS, MODALITIES, PROBES, SOURCES, TOKENIZERS
from nano4m_cli.tokenizers._base import GradientTokenizer, Tokenizer, open_tokenizer, save_tokenizer
from nano4m_cli.tokenizers._fsq import FSQ

ROOT = Path(nano4m_cli.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))

LAYER = {
    "errors": 0,
    "": 0,
    "config": 1,
    "registry": 1,
    "dist": 1,
    "rng": 1,
    "spec": 1,
    "media_compat": 1,
    "compute": 1,
    "tokenizers": 2,
    "model": 2,
    "modalities": 3,
    "masking": 4,
    "data": 5,
    "train": 6,
    "generate": 6,
    "probes": 7,
    "report": 7,
    "cli": 8,
    "__main__": 9,
}
# Files of layer 1 are single modules, each of which builds on the one before.
WITHIN = {("config", "registry"), ("rng", "config"), ("spec", "config")}
ALLOWED = {
    ("generate", "train"): "a command needs an open run: config, checkpoint, layout",
    ("probes", "report"): "an evaluation ends by writing the report",
}


def part(name: str) -> str:
    """Return the first part below the root package of a dotted name ("" for the root itself)."""
    return name.split(".")[1] if "." in name else ""


def imports(path: Path):
    """Yield (line, dotted name) of every import of this project in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "nano4m_cli")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == "nano4m_cli":
                if node.module == "nano4m_cli":  # from nano4m_cli import X: X may be a package
                    for a in node.names:
                        known = (ROOT / a.name).is_dir() or (ROOT / f"{a.name}.py").is_file()
                        yield node.lineno, f"nano4m_cli.{a.name}" if known else "nano4m_cli"
                else:
                    yield node.lineno, node.module


def violations(files=FILES, root=ROOT) -> list[str]:
    out = []
    for path in files:
        inside = path.relative_to(root)
        mine = inside.parts[0].removesuffix(".py") if inside.name != "__init__.py" or len(inside.parts) > 1 else ""
        for line, name in imports(path):
            theirs = part(name)
            if mine == theirs or (mine, theirs) in ALLOWED or (mine, theirs) in WITHIN:
                continue
            if not LAYER[theirs] < LAYER[mine]:
                out.append(f"{inside}:{line} ({mine}, layer {LAYER[mine]}) imports {name} (layer {LAYER[theirs]})")
    return out


def test_every_part_has_a_layer():
    parts = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert parts <= set(LAYER), parts - set(LAYER)


def test_files_import_own_package_and_lower_layers_only():
    assert violations() == []


def test_the_layer_check_finds_a_violation(tmp_path):
    (tmp_path / "masking").mkdir()
    bad = tmp_path / "masking" / "x.py"
    bad.write_text(
        "def f():\n    from nano4m_cli.train.run import open_run\n"
        "    from nano4m_cli import cli\n    import nano4m_cli.spec\n"
    )
    found = violations([bad], tmp_path)
    assert len(found) == 2 and "train.run" in found[0] and "nano4m_cli.cli" in found[1]


def test_imports_by_name_stay_where_the_walls_can_see_them():
    """The registry, the command line's lazy commands and the torchaudio stand-in; nothing else hides an import."""
    users = {
        str(p.relative_to(ROOT)) for p in FILES if "import_module" in p.read_text() or "__import__" in p.read_text()
    }
    assert users <= {"registry.py", "media_compat.py", "cli/_app.py"} and "registry.py" in users


def test_no_file_is_longer_than_the_hard_cap():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 600}
    assert long == {}


def test_no_star_import_and_no_bare_except():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert all(a.name != "*" for a in node.names), path
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"


# -- families -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "source": SOURCES,
    "modality": MODALITIES,
    "tokenizer": TOKENIZERS,
    "component": COMPONENTS,
    "filter": FILTERS,
    "label": LABELS,
    "probe": PROBES,
}
MEMBERS = [(family, name) for family, registry in FAMILIES.items() for name in registry.names()]


def test_families_have_members():
    assert {family for family, _ in MEMBERS} == set(FAMILIES)


@pytest.mark.parametrize("family, name", MEMBERS)
def test_member_has_a_docstring_and_its_symbol(family, name, monkeypatch):
    registry = FAMILIES[family]
    summary = registry.summary(name)
    assert len(summary) > 10 and len(summary) <= 120 and summary == summary.strip(), summary
    member = registry.get(name)
    kinds = {"source": Source, "filter": Filter, "label": Label, "tokenizer": Tokenizer, "component": Component, "probe": Probe}
    if family == "modality":
        assert isinstance(member, Modality) and member.name == name
    else:
        assert issubclass(member, kinds[family])
        assert not getattr(member, "__abstractmethods__", ()), member.__abstractmethods__
    if family in ("source", "tokenizer", "component"):
        assert issubclass(member.Options, Config)
    if family == "tokenizer":
        assert member.name == name
    if family == "filter":
        assert member.looks_at in ("audio", "rgb", "video") and member.unit
        record = lambda score: {"keep": score} if name == "panns" else score  # noqa: E731 - a mapping is recorded whole
        other = member.threshold + (-1 if member.keeps_above else 1)
        assert member().keeps(record(member.threshold)) and not member().keeps(record(other))
    if family == "label":
        assert member.makes in MODALITIES and member.needs and all(m in MODALITIES for m in member.needs)
        dsine_of_size(monkeypatch)
        options = {"weights": SIGHT[name]()} if name in SIGHT else {}  # small, in the published format
        made = member(member.Options(**options)).make({m: example(m) for m in member.needs})
        modality = MODALITIES.get(member.makes)
        assert close(modality.name, made, modality.from_bytes(modality.to_bytes(made), "here"))
    if family == "probe":
        assert kind_of(name) in ("eval", "probe") and member.version >= 1


@pytest.mark.parametrize("registry", FAMILIES.values(), ids=FAMILIES)
def test_unknown_member_gets_the_nearest_name(registry):
    known = registry.names()[0]
    with pytest.raises(UnknownNameError, match=f"unknown {registry.kind} '{known}x'") as caught:
        registry.get(known + "x")
    assert caught.value.hint == f"did you mean '{known}'?"


# -- modalities ---------------------------------------------------------------------------------------------------


def picture(seed: int) -> np.ndarray:
    """A bright disc on a shaded ground: smooth enough to be learned in a few steps."""
    y, x = np.mgrid[0:16, 0:16] / 15.0
    rng = np.random.default_rng(seed)
    cx, cy, r = rng.uniform(0.2, 0.8, 2).tolist() + [0.3]
    disc = ((x - cx) ** 2 + (y - cy) ** 2 < r * r)[..., None]
    return (np.where(disc, rng.uniform(120, 255, 3), 90 * (x + y)[..., None] / 2)).astype(np.uint8)


def example(modality: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    if modality in ("rgb", "rgb_hi"):
        return picture(seed)
    if modality == "depth":
        return (2.5 + picture(seed)[..., 0].astype(np.float32) / 50).round(3)
    if modality == "normal":
        n = np.dstack([picture(seed)[..., :2] / 255.0 - 0.5, np.ones((16, 16))]).astype(np.float32)
        return n / np.linalg.norm(n, axis=-1, keepdims=True)
    if modality == "edges":
        return np.where(picture(seed).max(-1) > 110, 255, 0).astype(np.uint8)  # broad lines: learned in a few steps
    if modality == "audio":
        t = np.arange(6000) / 24_000
        wave = 0.4 * np.sin(2 * np.pi * rng.uniform(300, 2000) * t) * np.exp(-t * 8)
        return (np.rint(wave * 32767) / 32768).astype(np.float32)
    if modality == "video":
        return np.stack([np.roll(picture(seed), (2 * t, t), (0, 1)) for t in range(4)])
    if modality == "caption":
        colour, thing, place = (rng.choice(w) for w in (["red", "blue", "green"], ["cube", "ball"], ["left", "right"]))
        return f"a {colour} {thing}, on the {place}"
    if modality == "text":
        return "".join(f"{rng.choice(['ROMEO', 'Nurse'])}:\n{example('caption', seed + i)}.\n\n" for i in range(2))
    if modality == "label":
        return str(rng.choice(["cat", "dog", "red fox"]))
    raise AssertionError(f"give an example of modality '{modality}' here")


SIZE = {
    "rgb": {"size": [16, 16]},
    "rgb_hi": {"size": [16, 16]},
    "depth": {"size": [16, 16]},
    "normal": {"size": [16, 16]},
    "edges": {"size": [16, 16]},
    "audio": {"seconds": 0.25},
    "video": {"size": [16, 16], "frames": 4, "fps": 8.0},
    "caption": {},
    "text": {},
    "label": {},
}


def close(modality: str, a, b) -> bool:
    """Whether b is a as storage keeps it."""
    if MODALITIES.get(modality).kind == "text":
        return a == b
    tolerance = {"rgb": 0, "rgb_hi": 0, "edges": 0, "video": 0, "depth": 5.1e-4, "normal": 0.01, "audio": 1 / 16000}[modality]
    return a.shape == b.shape and a.dtype == b.dtype and float(np.abs(a.astype(np.float64) - b).max()) <= tolerance


@pytest.mark.parametrize("name", MODALITIES.names())
def test_modality_bytes_round_trip(name, tmp_path):
    modality, raw = MODALITIES.get(name), example(name)
    assert modality.ext.split(".")[0] == name and modality.kind in ("image", "audio", "video", "text")
    assert modality.tokenizer in TOKENIZERS
    data = modality.to_bytes(raw)
    assert data == modality.to_bytes(raw), "the same value gives the same bytes"
    back = modality.from_bytes(data, "here")
    assert close(name, raw, back)
    again = modality.from_bytes(modality.to_bytes(back), "here")
    assert close(name, back, again)
    path = tmp_path / f"x{modality.suffix}"
    modality.write_file(raw, path)
    assert close(name, raw, modality.read_file(path))
    text = raw if modality.kind == "text" else str(path)
    assert close(name, raw, modality.from_text(text))


@pytest.mark.parametrize("name", MODALITIES.names())
def test_modality_show(name):
    modality, raw = MODALITIES.get(name), example(name)
    shown = modality.show(raw)
    if modality.kind == "text":
        assert shown == raw
    else:
        assert shown.dtype == np.uint8 and shown.ndim == 3 and shown.shape[2] == 3
        assert shown.std() > 1, "the picture shows something"


def broken(name: str) -> dict[str, bytes]:
    whole = MODALITIES.get(name).to_bytes(example(name))
    if MODALITIES.get(name).kind == "text":
        return {"latin1": "caf\xe9".encode("latin1"), "cut": "caf\xe9".encode()[:-1]}
    return {
        "empty": b"",
        "text": b"not media at all",
        "zeros": bytes(200),
        "head": whole[:20],
        "half": whole[: len(whole) // 2],
    }


@pytest.mark.parametrize("name, how", [(n, h) for n in MODALITIES.names() for h in broken(n)])
def test_broken_bytes_are_a_media_error_that_names_the_place(name, how):
    with pytest.raises(MediaError, match="shard-3, sample 'k7'"):
        MODALITIES.get(name).from_bytes(broken(name)[how], "shard-3, sample 'k7'")


@pytest.mark.parametrize("name", [n for n in MODALITIES.names() if MODALITIES.get(n).kind in ("image", "video")])
def test_any_damage_to_a_picture_is_a_media_error(name):
    """Every single damaged byte either still decodes or is a MediaError: no other exception gets out."""
    modality = MODALITIES.get(name)
    whole = bytearray(modality.to_bytes(example(name)))
    errors = 0
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 0x55
        try:
            modality.from_bytes(bytes(data), "here")
        except MediaError as err:
            errors += 1
            assert "here" in err.message
    assert errors > 10


@pytest.mark.parametrize("name", [n for n in MODALITIES.names() if MODALITIES.get(n).kind in ("image", "video")])
def test_a_picture_of_absurd_size_is_a_media_error(name):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(MediaError, match="here"):
        MODALITIES.get(name).from_bytes(png, "here")


# -- tokenizers ---------------------------------------------------------------------------------------------------

# Tokenizers that are no modality's default.
SERVES = {
    "identity": ["rgb"], "encodec": ["audio"], "mimi": ["audio"], "dac": ["audio"], "hf_text": ["caption", "text"], "bpe": ["text"],
    "speechtokenizer": ["audio"], "wavtokenizer": ["audio"], "cosmos": ["rgb"],
    "divae": ["rgb", "depth", "normal", "edges"],
    "vqgan": ["rgb", "depth"], "rvq_wave": ["audio"],
    "bits": ["rgb"],
}
for _m in MODALITIES.names():
    SERVES.setdefault(MODALITIES.get(_m).tokenizer, []).append(_m)
SMALL = {
    "fsq_image": {"width": 32, "depth": 1, "levels": (5, 5, 5)},
    "fsq_video": {"width": 32, "depth": 1, "levels": (5, 5, 5), "frames": 2},
    "fsq_mel": {"width": 32, "depth": 1, "griffin_lim": 2},
    "bpe": {"vocab": 300},
    "mimi": {"codebooks": 4},
    "dac": {"codebooks": 3},
    "speechtokenizer": {"codebooks": 4},
    "cosmos": {"trust_torchscript": True},
    "divae": {"steps": 2},
    "vqgan": {"downsample": 4, "width": 16, "codes": 64, "dim": 8},
    "rvq_wave": {"strides": (8, 5, 4), "width": 16, "codes": 64, "codebooks": 2, "dim": 8},
}
PAIRS = [(t, m) for t in TOKENIZERS.names() for m in SERVES.get(t, ["?"])]
_made: dict[tuple[str, str], Tokenizer] = {}


def given(name: str, modality: str, seed: int = 0):
    """Return an example of a size that the tokenizer takes."""
    raw = example(modality, seed)
    return raw.repeat(2, 0).repeat(2, 1) if name == "divae" else raw


def fitted(name: str, modality: str, steps: int = 30) -> Tokenizer:
    """Return the tokenizer fitted on 64 examples (made once)."""
    if (name, modality) not in _made:
        cls = TOKENIZERS.get(name)
        small = {**WEIGHTS, **LOCAL}.get(name)
        weights = {"weights": small()} if small else {}  # in the published format
        size = SIZE[modality]
        if name == "divae":
            weights, size = {"weights": divae_small(modality)}, {"size": [32, 32]}
        tokenizer = cls(modality, cls.Options(**SMALL.get(name, {}), **weights), size)
        if tokenizer.fitted:
            torch.manual_seed(0)
            tokenizer.fit([example(modality, s) for s in range(64)])
            if isinstance(tokenizer, GradientTokenizer):
                optimizer = torch.optim.Adam(tokenizer.module.parameters(), lr=3e-3)
                tokenizer.losses = []
                for step in range(steps):
                    rows = torch.arange(8 if name == "rvq_wave" else 32)  # its spectra take time
                    loss, parts = tokenizer.loss(rows + 32 * (step % 2))
                    assert all(torch.isfinite(v) for v in parts.values())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    tokenizer.losses.append(float(loss.detach()))
                tokenizer.module.eval()
        _made[name, modality] = tokenizer
    return _made[name, modality]


def test_every_tokenizer_is_tested_with_a_modality():
    missing = [t for t in TOKENIZERS.names() if t not in SERVES]
    assert missing == [], "say in SERVES which modality the contract tests use"


@pytest.mark.parametrize("name, modality", PAIRS)
def test_tokenizer_ids_are_as_the_spec_says(name, modality):
    tokenizer = fitted(name, modality)
    raws = [given(name, modality, s) for s in range(100, 108)]
    spec, all_ids = tokenizer.spec(), tokenizer.encode(raws)
    assert spec.modality == modality and spec.tokenizer.name == name
    assert len(all_ids) == len(raws)
    for ids in all_ids:
        assert ids.ndim == 1 and ids.dtype.kind in "ui"
        spec.check_ids(ids, "test")
        assert (ids.astype(spec.dtype) == ids).all()
        if spec.kind == "sequence":
            assert len(ids) <= spec.slots and list(np.flatnonzero(ids == spec.eos)) == [len(ids) - 1]
        else:
            assert len(ids) == spec.slots
    assert len({tuple(i) for i in all_ids}) > 1, "different values have different ids"
    alone = tokenizer.encode(raws[3:4])[0]
    assert np.array_equal(alone, all_ids[3]), "a value's ids do not depend on its neighbours"


@pytest.mark.parametrize("name, modality", PAIRS)
def test_tokenizer_decodes_to_the_raw_form(name, modality):
    tokenizer, raw = fitted(name, modality), given(name, modality, 5)
    back = tokenizer.decode(tokenizer.encode([raw]))[0]
    wanted = tokenizer.comparable(raw)
    if MODALITIES.get(modality).kind == "text":
        assert back == wanted
    else:
        assert back.dtype == wanted.dtype and back.shape == wanted.shape and np.isfinite(back.astype(float)).all()
        MODALITIES.get(modality).to_bytes(back)  # it is a value of the modality
    if modality == "normal":
        assert np.allclose(np.linalg.norm(back, axis=-1), 1, atol=1e-4)


@pytest.mark.parametrize("name, modality", PAIRS)
def test_code_values_decode_as_their_ids_do_and_between_them(name, modality):
    tokenizer, raws = fitted(name, modality), [given(name, modality, s) for s in range(4)]
    spec, ids = tokenizer.spec(), tokenizer.encode(raws)
    if not spec.levels:
        with pytest.raises(AssertionError, match="stand for no values"):
            tokenizer.decode_values(np.zeros((1, 1, 1), np.float32))
        return
    values = FSQ(spec.levels).decode(torch.from_numpy(np.stack(ids).astype(np.int64))).numpy()
    assert values.shape == (4, spec.slots, len(spec.levels)) and values.std() > 0.1
    back, wanted = tokenizer.decode_values(values), tokenizer.decode(ids)
    assert all(np.array_equal(a, b) for a, b in zip(back, wanted, strict=True))
    half = tokenizer.decode_values((values[:1] + values[1:2]) / 2)[0]
    assert half.shape == back[0].shape and not np.array_equal(half, back[0]) and not np.array_equal(half, back[1])


def test_mel_bands_are_inverted_to_power_that_has_these_bands():
    """Non-negative, near the bands asked for, and far nearer than the clipped pseudo-inverse alone."""
    tokenizer = fitted("fsq_mel", "audio")
    g = torch.Generator().manual_seed(0)
    power = torch.zeros(3, 5, len(tokenizer.bank)).scatter_(2, torch.randint(5, 400, (3, 5, 6), generator=g), 1.0)
    bands = power @ tokenizer.bank
    found = tokenizer.invert_mel(bands)
    assert found.shape == power.shape and float(found.min()) >= 0
    error = lambda x: float((x @ tokenizer.bank - bands).norm() / bands.norm())  # noqa: E731
    clipped = (bands @ tokenizer.inverse).clamp_min(0)
    assert error(found) < 0.1 and error(found) < 0.4 * error(clipped), (error(found), error(clipped))
    silent = tokenizer.invert_mel(torch.zeros(1, 2, tokenizer.bank.shape[1]))
    assert torch.isfinite(silent).all() and float(silent.max()) < 1e-6


@pytest.mark.parametrize("name, modality", [p for p in PAIRS if issubclass(TOKENIZERS.get(p[0]), GradientTokenizer)])
def test_gradient_tokenizer_learns_and_beats_the_mean(name, modality):
    tokenizer = fitted(name, modality)
    assert np.mean(tokenizer.losses[-4:]) < 0.7 * np.mean(tokenizer.losses[:4])
    _, parts = tokenizer.loss(torch.arange(64))
    data = tokenizer.data.float()
    if name == "rvq_wave":  # waves agree long after their spectra do
        assert float(parts["mel"].detach()) < 0.8 * float(tokenizer.spectral(data.mean(0).expand_as(data), data))
        return
    assert float(parts["mse"].detach()) < float(((data - data.mean(0)) ** 2).mean())


@pytest.mark.parametrize("name, modality", [p for p in PAIRS if issubclass(TOKENIZERS.get(p[0]), GradientTokenizer)])
def test_decoding_ids_is_what_the_loss_measured(name, modality):
    """encode -> ids -> decode, not just the training path, is nearer to the value than the mean of all values is."""
    tokenizer, raws = fitted(name, modality), [example(modality, s) for s in range(64)]
    ids = tokenizer.encode(raws)
    if modality == "audio":
        truth = np.stack([tokenizer.comparable(r) for r in raws])
        if name == "rvq_wave":
            truth, back = torch.from_numpy(truth), torch.from_numpy(np.stack(tokenizer.decode(ids)))
            mean = truth.mean(0).expand_as(truth)
            assert float(tokenizer.spectral(back, truth)) < 0.8 * float(tokenizer.spectral(mean, truth))
            return
        truth, back = tokenizer.log_mel(truth).numpy(), tokenizer.decode_mel(ids).numpy()
        assert np.std(tokenizer.decode(ids[:1])[0]) > 0.01
    else:
        truth, back = (np.stack(v).astype(np.float64) for v in (raws, tokenizer.decode(ids)))
    assert ((back - truth) ** 2).mean() < 0.9 * ((truth.mean(0) - truth) ** 2).mean()


@pytest.mark.parametrize("levels", [(5, 5, 5), (8, 8, 6, 5), (2, 3), (4,)])
def test_fsq_codes_are_mixed_radix_numbers(levels):
    fsq = FSQ(levels)
    codes = torch.arange(fsq.codes)
    value = fsq.decode(codes)
    assert fsq.codes == np.prod(levels) and value.shape == (fsq.codes, len(levels))
    for code in range(0, fsq.codes, 7):
        rest = code
        for d, level in enumerate(levels):
            assert float(value[code, d]) == pytest.approx((rest % level - level // 2) / (level // 2))
            rest //= level
    z = torch.randn(5000, len(levels), generator=torch.Generator().manual_seed(0)) * 2
    z.requires_grad_()
    quantised, got = fsq(z)
    torch.testing.assert_close(fsq.decode(got), quantised)
    assert got.min() >= 0 and got.max() < fsq.codes
    used = torch.stack([(got // int(np.prod(levels[:d]))) % n for d, n in enumerate(levels)], -1)
    assert [len(used[:, d].unique()) for d in range(len(levels))] == list(levels), "exactly L values are reached"
    quantised.sum().backward()
    assert (z.grad > 0).float().mean() > 0.99, "the gradient passes through the rounding"


@pytest.mark.parametrize("name, modality", PAIRS)
def test_tokenizer_saves_and_loads(name, modality, tmp_path):
    tokenizer = fitted(name, modality)
    folder = tmp_path / "saved"
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    again = open_tokenizer(folder)
    raws = [given(name, modality, s) for s in range(200, 206)]
    ids = tokenizer.encode(raws)
    assert all(np.array_equal(a, b) for a, b in zip(ids, again.encode(raws), strict=True))
    assert again.spec() == tokenizer.spec() and again.spec().same_ids_as(tokenizer.spec()) is None
    for a, b in zip(tokenizer.decode(ids), again.decode(ids), strict=True):
        assert np.array_equal(a, b)
    if tokenizer.fitted:
        assert len(tokenizer.spec().tokenizer.weights_sha256) == 64
        for file in folder.iterdir():
            if file.name != "tokenizer.json":
                file.write_bytes(b"damaged")
        with pytest.raises(WeightsError, match="saved"):
            open_tokenizer(folder)


def test_a_missing_tokenizer_says_how_to_get_it(tmp_path):
    with pytest.raises(WeightsError, match="rgb") as caught:
        open_tokenizer(tmp_path / "rgb")
    assert caught.value.hint == "run 'nano4m tokenize --modality rgb'"


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_tokenizer_json_is_a_weights_error(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(WeightsError, match="tokenizer.json"):
        open_tokenizer(tmp_path)


WRONG = {
    "edges": np.full((20, 24), 255, np.uint8),
    "rgb": np.zeros((16, 24, 3), np.uint8),
    "rgb_hi": np.zeros((24, 16, 3), np.uint8),
    "depth": np.ones((24, 16), np.float32),
    "normal": np.ones((8, 8, 3), np.float32),
    "audio": np.zeros(0, np.float32),
    "video": np.zeros((5, 16, 24, 3), np.uint8),
    "caption": "word " * 400,
    "text": "word\n" * 400,
}


@pytest.mark.parametrize("name, modality", [p for p in PAIRS if p[1] != "label"])
def test_wrong_size_is_a_media_error_that_names_the_place(name, modality):
    with pytest.raises(MediaError, match="sample 'k7'"):
        fitted(name, modality).encode([given(name, modality), WRONG[modality]], ["sample 'k1'", "sample 'k7'"])


@pytest.mark.parametrize("name, modality", [p for p in PAIRS if p[1] not in ("caption", "text", "label") and p[0] != "identity"])
def test_adapt_brings_other_sizes_to_the_size_taken(name, modality):
    tokenizer = fitted(name, modality)
    other = np.ones(4000, np.float32) if modality == "audio" else WRONG[modality]
    adapted, said = tokenizer.adapt(other)
    assert said and modality in said
    tokenizer.encode([adapted])
    same, said = tokenizer.adapt(given(name, modality))
    assert said is None and np.array_equal(same, given(name, modality))


@pytest.mark.parametrize("name, modality", [p for p in PAIRS if p[1] not in ("caption", "text")])
def test_illegal_ids_are_refused(name, modality):
    tokenizer = fitted(name, modality)
    spec = tokenizer.spec()
    with pytest.raises(MediaError, match="expected"):
        tokenizer.decode([np.zeros(spec.slots + 1, np.int64)])
    for bad in (spec.vocab_size, -1):
        ids = np.zeros(spec.slots, np.int64)
        ids[-1] = bad
        with pytest.raises(TokenError, match="outside its vocabulary"):
            tokenizer.decode([ids])


@pytest.fixture(scope="module")
def roomy_bpe():
    cls = TOKENIZERS.get("bpe")
    tokenizer = cls("caption", cls.Options(vocab=300, max_length=64), {})
    tokenizer.fit([example("caption", s) for s in range(64)])
    return tokenizer


@pytest.mark.parametrize("text", ["caf\xe9 \u4f60\u597d \U0001f600", "a  b", "UPPER, punctuation!", "x"])
def test_bpe_keeps_every_character(roomy_bpe, text):
    assert roomy_bpe.decode(roomy_bpe.encode([text]))[0] == roomy_bpe.comparable(text)


def test_bpe_takes_the_name_of_its_end_mark_as_plain_text(roomy_bpe):
    ids = roomy_bpe.encode(["the <eos> mark"])[0]
    assert list(np.flatnonzero(ids == roomy_bpe.eos)) == [len(ids) - 1]
    assert roomy_bpe.decode([ids])[0] == "the <eos> mark"


# -- components and sources ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPONENTS.names())
def test_component_counts_fit(name):
    cls = COMPONENTS.get(name)
    component = cls(cls.Options(), ["a", "b", "c"])
    length = np.random.default_rng(0).integers(0, 40, (500, 3))
    length[:, 0] += 2
    shown, asked = component.counts(length, Key(0, "t", np.arange(500)))
    assert shown.dtype == asked.dtype == np.int64 and shown.shape == asked.shape == length.shape
    assert (shown >= 0).all() and (asked >= 0).all() and (shown + asked <= length).all()
    assert (asked.sum(1) > 0).all()
    again = component.counts(length, Key(0, "t", np.arange(500)))
    assert np.array_equal(shown, again[0]) and np.array_equal(asked, again[1])
    other = component.counts(length, Key(1, "t", np.arange(500)))
    assert np.array_equal(shown, other[0]) == (name == "causal")  # where nothing is drawn


def required(name: str) -> list[str]:
    return [n for n, f in SOURCES.get(name).Options.model_fields.items() if f.is_required()]


@pytest.mark.parametrize("name", [n for n in SOURCES.names() if not required(n)])
def test_source_is_picklable(name, tmp_path):
    """Workers get the source by pickle."""
    source = SOURCES.get(name)(SOURCES.get(name).Options(), tmp_path)
    again = pickle.loads(pickle.dumps(source))
    assert type(again) is type(source) and again.options == source.options and again.cache == source.cache
    assert source.version >= 1


@pytest.mark.parametrize("name", SOURCES.names())
def test_source_options_refuse_what_they_do_not_know(name):
    with pytest.raises(ConfigError, match="unknown key 'no_such_option'"):
        build(SOURCES.get(name).Options, {"no_such_option": 1}, "source")

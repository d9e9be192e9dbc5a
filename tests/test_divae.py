"""4M's picture tokenizers: codes and pictures against a plain second implementation, what each form becomes, wrong weights."""

import functools
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from divae_factory import CHANNELS, DEPTH, DOWN, ENTRIES, LATENT, PATCH, SIDE, UP, D, U, config, divae_small, header, state, write
from typer.testing import CliRunner

from nano4m_cli.cli._app import app
from nano4m_cli.config import build
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, MediaError, WeightsError
from nano4m_cli.probes import _roundtrip
from nano4m_cli.registry import MODALITIES, TOKENIZERS
from nano4m_cli.spec import read_spec
from nano4m_cli.tokenizers import _divae_noise as noise
from nano4m_cli.tokenizers._base import open_tokenizer, save_tokenizer
from nano4m_cli.tokenizers._divae_model import IGNORED, Published, with_tensors
from nano4m_cli.tokenizers.divae import standardised


@functools.cache
def opened(modality):
    return make(modality, weights=divae_small(modality))


def make(modality="rgb", size=(64, 64), weights=None, **options):
    """Return a tokenizer; where no weights are named, one that shares the model that others have opened."""
    cls = TOKENIZERS.get("divae")
    given = {"weights": str(weights or divae_small(modality)), "steps": 3, **options}
    tokenizer = cls(modality, build(cls.Options, given, "divae"), {"size": list(size)})
    if weights is None:
        other = opened(modality)
        tokenizer.found, tokenizer.hashes, tokenizer.model = other.found, other.hashes, other.model
    return tokenizer


def picture(modality, size=(64, 64), seed=0):
    """A raw picture of stripes and noise, of the modality's form."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    wave = np.sin(x / rng.uniform(2, 9) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(2, 9)) + 0.5 * rng.normal(size=size)
    if modality == "depth":
        return (3 + 0.6 * wave).astype(np.float32)
    if modality == "edges":
        return np.where(wave > 0.3, 255, 0).astype(np.uint8)
    three = np.stack([wave, np.roll(wave, 5, 0), rng.normal(size=size)], -1)
    if modality == "normal":
        return (three / np.linalg.norm(three, axis=-1, keepdims=True)).astype(np.float32)
    return np.clip(128 + 60 * three, 0, 255).astype(np.uint8)


# -- a plain second implementation ------------------------------------------------------------------------------------


def plain(channels):
    return {k: v.double().numpy() for k, v in state(channels).items()}


def layer_norm(x, w, b):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-6) * w + b


def cubic(grid, y, x):
    """The value of (D, n, n) at a fractional place: bicubic with a = -.75, borders repeated."""

    def weight(d):
        d = abs(d)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 if d < 2 else 0.0

    total, top = 0, grid.shape[1] - 1
    for i in range(math.floor(y) - 1, math.floor(y) + 3):
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            total = total + weight(y - i) * weight(x - j) * grid[:, min(max(i, 0), top), min(max(j, 0), top)]
    return total


def plain_codes(s, x_CHW):
    """Codes of a picture as the encoder takes it, and the numbers behind them: patch by patch, head by head, entry by entry."""
    rows, cols = x_CHW.shape[1] // PATCH, x_CHW.shape[2] // PATCH
    tokens = []
    for r in range(rows):
        for c in range(cols):
            patch = x_CHW[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            place = cubic(s["encoder.pos_emb"][0], (r + 0.5) * SIDE / rows - 0.5, (c + 0.5) * SIDE / cols - 0.5)
            tokens.append(s["encoder.proj.weight"].reshape(D, -1) @ patch.ravel() + s["encoder.proj.bias"] + place)

    def dense(x, name):
        return s[f"{name}.weight"] @ x + s[f"{name}.bias"]

    for i in range(DEPTH):
        at = f"encoder.blocks.{i}"
        seen = [dense(layer_norm(t, s[f"{at}.norm1.weight"], s[f"{at}.norm1.bias"]), f"{at}.attn.qkv") for t in tokens]
        mixed = [[] for _ in tokens]
        for head in range(D // 64):
            q, k, v = ([t[part * D + head * 64 : part * D + (head + 1) * 64] for t in seen] for part in range(3))
            for n in range(len(tokens)):
                score = np.array([q[n] @ other / 8 for other in k])
                score = np.exp(score - score.max())
                mixed[n].append(sum(w * value for w, value in zip(score / score.sum(), v, strict=True)))
        tokens = [t + dense(np.concatenate(m), f"{at}.attn.proj") for t, m in zip(tokens, mixed, strict=True)]
        for n, t in enumerate(tokens):
            inner = dense(layer_norm(t, s[f"{at}.norm2.weight"], s[f"{at}.norm2.bias"]), f"{at}.mlp.fc1")
            gelu = np.array([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in inner])
            tokens[n] = t + dense(gelu, f"{at}.mlp.fc2")
    ids, numbers = [], []
    for t in tokens:
        inner = np.tanh(dense(layer_norm(t, s["encoder.norm_mlp.weight"], s["encoder.norm_mlp.bias"]), "encoder.post_mlp.fc1"))
        t = t + dense(inner, "encoder.post_mlp.fc2")
        z = s["quant_proj.weight"][:, :, 0, 0] @ t + s["quant_proj.bias"]
        angles = [z @ entry / np.linalg.norm(entry) for entry in s["quantize._codebook.embed"]]
        ids.append(int(np.argmax(angles)))
        numbers.append(z)
    return ids, numbers


def plain_unet(s, x_CHW, t, ids_hw):
    """The U-Net's answer, stage by stage from a table; float64."""
    s = {k.removeprefix("decoder."): torch.from_numpy(v) for k, v in s.items()}
    channels, height, width = x_CHW.shape
    rows, cols = height // 4, width // 4
    h = torch.zeros(channels * 16 + LATENT, rows, cols, dtype=torch.float64)
    for c in range(channels):
        for i in range(4):
            for j in range(4):
                h[c * 16 + i * 4 + j] = x_CHW[c, i::4, j::4]
    for r in range(rows):
        for c in range(cols):
            h[channels * 16 :, r, c] = s["quantize._codebook.embed"][ids_hw[r // 4][c // 4]]

    def conv(x, name, stride=1):
        w = s[f"{name}.weight"]
        return F.conv2d(x[None], w, s[f"{name}.bias"], stride, w.shape[-1] // 2)[0]

    def norm(x, name):
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return groups.reshape(x.shape) * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def residual(x, name):
        inner = conv(silu(norm(x, f"{name}.in_layers.0")), f"{name}.in_layers.2")
        inner = inner + (s[f"{name}.emb_layers.1.weight"] @ silu(time) + s[f"{name}.emb_layers.1.bias"])[:, None, None]
        inner = conv(silu(norm(inner, f"{name}.out_layers.0")), f"{name}.out_layers.3")
        return (conv(x, f"{name}.skip_connection") if f"{name}.skip_connection.weight" in s else x) + inner

    def attention(x, name):
        wide = len(x)
        qkv = s[f"{name}.qkv.weight"][:, :, 0] @ norm(x, f"{name}.norm").reshape(wide, -1) + s[f"{name}.qkv.bias"][:, None]
        out = torch.zeros(wide, qkv.shape[1], dtype=torch.float64)
        for n in range(qkv.shape[1]):
            score = torch.stack([qkv[:wide, n] @ qkv[wide : 2 * wide, m] / math.sqrt(wide) for m in range(qkv.shape[1])])
            out[:, n] = qkv[2 * wide :] @ torch.softmax(score, 0)
        out = s[f"{name}.proj_out.weight"][:, :, 0] @ out + s[f"{name}.proj_out.bias"][:, None]
        return x + out.reshape(x.shape)

    angles = [t * 10_000 ** (-i / (U // 2)) for i in range(U // 2)]
    time = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    time = s["time_embed.2.weight"] @ silu(s["time_embed.0.weight"] @ time + s["time_embed.0.bias"]) + s["time_embed.2.bias"]
    kept = []
    for i, kind in sorted(DOWN.items()):
        name = f"input_blocks.{i}"
        if kind == "conv":
            h = conv(h, f"{name}.0")
        elif kind == "d":
            h = conv(h, f"{name}.0.op", 2)
        else:
            h = residual(h, f"{name}.0")
        h = attention(h, f"{name}.1") if kind == "ra" else h
        kept.append(h)
    h = residual(attention(residual(h, "middle_block.0"), "middle_block.1"), "middle_block.2")
    for i, kind in sorted(UP.items()):
        name = f"output_blocks.{i}"
        h = residual(torch.cat([h, kept.pop()]), f"{name}.0")
        h = attention(h, f"{name}.1") if "a" in kind else h
        if "u" in kind:
            h = conv(h.repeat_interleave(2, 1).repeat_interleave(2, 2), f"{name}.{len(kind) - 1}.conv")
    assert not kept
    h = conv(silu(norm(h, "out.0")), "out.2")
    out = torch.zeros(channels, height, width, dtype=torch.float64)
    for c in range(channels):
        for i in range(4):
            for j in range(4):
                out[c, i::4, j::4] = h[c * 16 + i * 4 + j]
    return out


def plain_signal(times, schedule, zero_end):
    kept, a = 1.0, []
    for i in range(times):
        if schedule == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * i / (times - 1)
        else:
            bar = [math.cos((u / times + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (i, i + 1)]
            beta = min(1 - bar[1] / bar[0], 0.999)
        kept *= 1 - beta
        a.append(kept)
    if zero_end:
        first, last = math.sqrt(a[0]), math.sqrt(a[-1])
        a = [((math.sqrt(v) - last) * first / (first - last)) ** 2 for v in a]
    return a


def plain_ddim(x, predict, a, steps, prediction, clip):
    gap = len(a) // steps
    t = len(a) - 1
    while t >= 0:
        then = a[t - gap] if t - gap >= 0 else 1.0
        out = predict(x, t)
        if prediction == "sample":
            clean = out
            rest = (x - math.sqrt(a[t]) * clean) / math.sqrt(1 - a[t])
        else:
            clean = math.sqrt(a[t]) * x - math.sqrt(1 - a[t]) * out
            rest = math.sqrt(a[t]) * out + math.sqrt(1 - a[t]) * x
        if clip:
            clean = clean.clip(-1, 1)
        x = math.sqrt(then) * clean + math.sqrt(1 - then) * rest
        t -= gap
    return x


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality, size", [("rgb", (64, 64)), ("rgb", (32, 96)), ("depth", (64, 64)), ("normal", (32, 32)),
                                            ("edges", (96, 64))])
def test_ids_are_those_of_a_plain_loop(modality, size):
    """Also at sizes other than the one trained on, where positions are interpolated."""
    tokenizer, s, total = make(modality, size), plain(CHANNELS[modality]), 0
    assert tokenizer.spec().shape == (size[0] // 16, size[1] // 16)
    for seed in range(2):
        raw = picture(modality, size, seed)
        x = raw.astype(np.float64).reshape(*size, -1).transpose(2, 0, 1)
        if modality == "depth":
            x = x * 1000 / 65535
            middle = sorted(x.ravel())[int(0.1 * x.size) : int(0.9 * x.size)]
            x = (x - np.mean(middle)) / math.sqrt(np.var(middle, ddof=1) + 1e-6)
        elif modality != "normal":
            x = x / 255 * 2 - 1
        ids = tokenizer.encode([raw])[0]
        wanted, numbers = plain_codes(s, x)
        with torch.inference_mode():
            got = tokenizer.model.quant_proj(tokenizer.model.encoder(tokenizer._to_model(raw)))[0].flatten(1).T
        assert ids.tolist() == wanted and np.abs(got.numpy() - numbers).max() < 1e-4
        total += len(set(ids.tolist()))
    assert total > 4, "codes differ from patch to patch"


def test_the_nearest_code_is_the_nearest_in_angle():
    """The length of an entry decides nothing; it is kept where the entry is decoded."""
    model = make().model
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.inference_mode():
        ids, z = model.encode(x), model.quant_proj(model.encoder(x))
    cosine = F.cosine_similarity(z.permute(0, 2, 3, 1)[..., None, :], model.codebook, dim=-1)
    assert torch.equal(ids, cosine.argmax(-1)) and not torch.equal(ids, (z.permute(0, 2, 3, 1) @ model.codebook.T).argmax(-1))
    longer = state(3)["quantize._codebook.embed"] * torch.linspace(0.1, 9, ENTRIES)[:, None]
    other = with_tensors(Published(**config(3)), state(3) | {"quantize._codebook.embed": longer})
    with torch.inference_mode():
        assert torch.equal(other.encode(x), ids)
        z = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(other.decode(ids[:1], z, 1, False), model.decode(ids[:1], z, 1, False), atol=0.01)


def test_without_an_mlp_at_its_end():
    tensors = {k: v for k, v in state(1).items() if "_mlp." not in k}
    ids = with_tensors(Published(**config(1, post_mlp=False)), tensors).encode(torch.rand(1, 1, 64, 64))
    assert ids.shape == (1, 4, 4)


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_end", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_signal_left_at_each_time(schedule, zero_end):
    for times in (2, 10, 1000):
        a = noise.signal(times, schedule, zero_end)
        assert np.allclose(a, plain_signal(times, schedule, zero_end), atol=1e-6) and (a.diff() < 0).all()
        assert (float(a[-1]) == 0) == zero_end
    assert float(noise.signal(1000, "linear", True)[0]) == pytest.approx(1 - 1e-4)


def test_the_times_visited():
    assert noise.schedule_times(1000, 4) == [999, 749, 499, 249]
    assert noise.schedule_times(10, 3) == [9, 6, 3, 0] and noise.schedule_times(10, 1) == [9]
    assert noise.schedule_times(5, 5) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_ddim_steps_are_those_of_a_plain_loop(steps, prediction, clip):
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = noise.signal(20, "linear", True)
    predict = lambda x, t: 1.5 * torch.tanh(x * (1 + t / 7)) - 0.1 * t / 20  # noqa: E731
    got = noise.ddim(x, predict, a, steps, prediction, clip)
    slow = plain_ddim(x.numpy(), lambda x, t: predict(torch.from_numpy(x), t).numpy(), a.double().tolist(), steps, prediction, clip)
    assert np.allclose(got, slow, atol=1e-6)


def test_ddim_finds_the_picture_that_is_predicted():
    g = torch.Generator().manual_seed(0)
    truth, start, a = torch.rand(99, generator=g) * 2 - 1, torch.randn(99, generator=g), noise.signal(1000, "linear", True)
    velocity = lambda x, t: a[t].sqrt() * start - (1 - a[t]).sqrt() * truth  # noqa: E731
    assert torch.allclose(noise.ddim(start, lambda x, t: truth, a, 9, "sample", True), truth, atol=1e-5)
    assert torch.allclose(noise.ddim(start, velocity, a, 9, "v_prediction", True), truth, atol=1e-3)


@pytest.mark.parametrize("channels, size", [(3, (64, 64)), (1, (32, 64))])
def test_pictures_are_those_of_a_plain_loop(channels, size):
    model, s = with_tensors(Published(**config(channels)), state(channels)), plain(channels)
    g = torch.Generator().manual_seed(1)
    start = torch.randn(1, channels, *size, generator=g)
    ids = torch.randint(ENTRIES, (1, size[0] // 16, size[1] // 16), generator=g)
    with torch.inference_mode():
        got = model.decode(ids, start, 2, clip=True)[0]
    a = plain_signal(1000, "linear", True)
    slow = plain_ddim(start[0].double(), lambda x, t: plain_unet(s, x, t, ids[0].tolist()), a, 2, "sample", True)
    assert got.std() > 0.3 and (got - slow).abs().max() < 1e-4


@pytest.mark.parametrize("modality", ["rgb", "depth"])
def test_decoding_is_determined_by_ids_seed_and_steps(modality):
    tokenizer = make(modality, (32, 32))
    ids = [np.array(row) for row in ([1, 2, 3, 4], [9, 9, 0, 63], [1, 2, 3, 5])]
    before = torch.get_rng_state()
    a, b, c = tokenizer.decode(ids)
    assert torch.equal(before, torch.get_rng_state())
    for row, whole in zip(ids, (a, b, c), strict=True):
        assert np.array_equal(tokenizer.decode([row])[0], whole), "alone as beside others"
    raws = [picture(modality, (32, 32), seed) for seed in range(3)]
    together = tokenizer.encode(raws)
    assert all(np.array_equal(tokenizer.encode([raw])[0], row) for raw, row in zip(raws, together, strict=True))
    far = lambda x, y: np.abs(x.astype(float) - y).mean() / np.std(x.astype(float))  # noqa: E731
    assert far(a, b) > 0.05 and far(a, c) > 0.01, "codes matter, each of them"
    for options in ({"seed": 1}, {"steps": 2}):
        other = make(modality, (32, 32), **options)
        assert far(other.decode(ids[:1])[0], a) > 0.01 and np.array_equal(other.encode(raws[:1])[0], together[0])


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", CHANNELS)
def test_pictures_are_brought_to_the_encoder_and_back(modality):
    tokenizer, raw = make(modality), picture(modality)
    x = tokenizer._to_model(raw)
    assert x.shape == (1, CHANNELS[modality], 64, 64) and x.dtype == torch.float32
    assert modality == "depth" or -1 <= float(x.min()) < -0.8 < 0.8 < float(x.max()) <= 1
    back = tokenizer._from_model(x[0])
    wanted = tokenizer.comparable(raw)
    assert back.dtype == wanted.dtype == raw.dtype and np.allclose(back, wanted, atol=1e-6)
    assert modality == "depth" or np.array_equal(raw, wanted)
    MODALITIES.get(modality).to_bytes(tokenizer._from_model(torch.full((CHANNELS[modality], 64, 64), -30.0)))
    if modality == "normal":
        assert np.array_equal(tokenizer._from_model(torch.zeros(3, 2, 2)), np.broadcast_to(np.float32([0, 0, 1]), (2, 2, 3)))


def test_depth_keeps_neither_scale_nor_shift_and_says_so():
    tokenizer, raw = make("depth", metres=[2.5, 0.5]), picture("depth") * 8  # so far apart that the added 1e-6 is nothing
    assert np.array_equal(tokenizer.encode([raw])[0], tokenizer.encode([raw * 2 + 1])[0])
    seen = tokenizer.comparable(raw)
    middle = np.sort(seen.ravel())[409:3686]
    assert middle.mean() == pytest.approx(2.5, abs=0.01) and middle.std() == pytest.approx(0.5, rel=0.02)
    assert np.corrcoef(seen.ravel(), raw.ravel())[0, 1] > 0.999
    holes = raw.copy()
    holes[:8, :8] = 0
    assert (tokenizer.comparable(holes)[:8, :8] == 0).all() and (tokenizer.comparable(holes)[8:] > 0).all()
    said = tokenizer.spec().preprocess
    assert "middle 80 %" in said["scale"] and "mean of 2.5 m and a deviation of 0.5 m, not the picture's own" in said["decoded"]
    flat = standardised(torch.full((1, 1, 32, 32), 0.3))
    assert float(flat.abs().max()) < 1e-2
    made = tokenizer.decode(tokenizer.encode([raw]))[0]
    assert made.dtype == np.float32 and made.min() > 0
    assert ((made < 1.999) | (made > 3.001)).any(), "depth is not clipped to one deviation"


def test_the_form_is_that_of_the_modality_or_the_one_named():
    forms = {m: make(m).options.form for m in CHANNELS}
    assert forms == {"rgb": "colour", "depth": "metres", "normal": "vectors", "edges": "grey"}
    other = make("flow", weights=divae_small("normal"), form="vectors")
    ids = other.encode([picture("normal")])
    assert np.array_equal(ids[0], make("normal").encode([picture("normal")])[0]) and other.decode(ids)[0].dtype == np.float32
    cls = TOKENIZERS.get("divae")
    for modality, place in [("rgb", "rgb_16k_224-448"), ("depth", "depth_8k_224-448"), ("normal", "normal_8k_224-448"),
                            ("edges", "edge_8k_224-512")]:
        assert cls(modality, cls.Options(), {"size": [64, 64]}).options.weights == f"EPFL-VILAB/4M_tokenizers_{place}"


def test_pictures_that_cannot_be_used_are_named():
    tokenizer, where = make("depth", (32, 64)), ["sample 'k1'", "sample 'k2'"]
    good = picture("depth", (32, 64))
    with pytest.raises(MediaError, match="sample 'k2': depth is 64 x 64 pixels, this tokenizer takes 64 x 32"):
        tokenizer.encode([good, picture("depth")], where)
    with pytest.raises(MediaError, match="sample 'k2': depth is a picture of grey, this tokenizer takes metres"):
        tokenizer.encode([good, picture("edges", (32, 64))], where)
    bad = good.copy()
    bad[3, 3] = np.nan
    with pytest.raises(MediaError, match="sample 'k2': depth has values that are not finite"):
        tokenizer.encode([good, bad], where)


@pytest.mark.parametrize("size", [(48, 64), (64, 16), (16, 16), (20, 20)])
def test_sizes_that_do_not_divide_are_refused_with_a_hint(size):
    with pytest.raises(ConfigError, match=f"pictures of {size[0]} x {size[1]} do not suit .* multiples of 32 pixels") as caught:
        make(size=size, weights=divae_small("rgb")).spec()
    assert caught.value.hint == "fetch with another size, for example 64, the largest that it was trained on"


@pytest.mark.parametrize("options, match", [
    ({"steps": 0}, "steps"), ({"metres": [4, 0]}, "above 0 are needed"), ({"metres": [4]}, "metres"), ({"form": "round"}, "form"),
    ({"patch": 16}, "unknown key 'patch'"),
])
def test_wrong_options_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_more_steps_than_times_are_refused():
    with pytest.raises(ConfigError, match="rgb.steps=1001: there are 1000 at most"):
        make(steps=1001, weights=divae_small("rgb")).spec()
    with pytest.raises(ConfigError, match="divae serves pictures"):
        TOKENIZERS.get("divae")("audio", TOKENIZERS.get("divae").Options(), {"seconds": 1.0})


# -- weights ----------------------------------------------------------------------------------------------------------


def test_the_config_is_read_from_the_header_where_there_is_no_file(tmp_path):
    """In the header all values are text, `None` too."""
    raw = picture("rgb")
    wanted = make().encode([raw])[0]
    alone = make(weights=write(tmp_path / "header", state(3), None, header(config(3))))
    assert np.array_equal(alone.encode([raw])[0], wanted) and alone.model.config == make().model.config
    assert not alone.model.config.image_size_enc and alone.model.config.thresholding is True
    both = make(weights=write(tmp_path / "both", state(3), config(3), header(config(3, beta_schedule="squaredcos_cap_v2"))))
    assert both.model.config.beta_schedule == "linear", "the file goes first, as on the hub"
    assert set(alone.hashes) == {"model.safetensors"} and set(both.hashes) == {"config.json", "model.safetensors"}


def test_what_training_left_in_the_codebook_is_passed_over(tmp_path):
    assert IGNORED >= {"quantize._codebook.cluster_size", "quantize._codebook.initted"} and IGNORED & set(state(3))
    plain = {k: v for k, v in state(3).items() if k not in IGNORED}
    raw = picture("rgb")
    other = make(weights=write(tmp_path / "w", plain, config(3)))
    assert np.array_equal(other.encode([raw])[0], make().encode([raw])[0])


def test_half_precision_is_read(tmp_path):
    half = make(weights=write(tmp_path / "w", {k: v.half() for k, v in state(3).items()}, config(3)))
    assert half.encode([picture("rgb")])[0].shape == (16,) and half.model.codebook.dtype == torch.float32


def test_weights_that_do_not_fit_are_refused(tmp_path):
    number = iter(range(99))

    def refuses(match, tensors=None, settings=None, modality="rgb", **changes):
        folder = tmp_path / str(next(number))
        settings = config(CHANNELS[modality], **changes) if settings is None else settings
        with pytest.raises(WeightsError, match=match):
            make(modality, weights=write(folder, tensors or state(CHANNELS[modality]), settings)).spec()

    s = state(3)
    more = {"loss.y": torch.ones(1), "decoder.mid_block.x": torch.ones(2)}
    refuses(r"2 tensors are unknown \(decoder.mid_block.x, loss.y\)", s | more)
    refuses(r"1 tensors are missing \(decoder.out.2.bias\)", {k: v for k, v in s.items() if k != "decoder.out.2.bias"})
    refuses("tensors are missing: decoder.input_blocks.0.0.weight", {k: v for k, v in s.items() if not k.startswith("decoder")})
    refuses(r"1 tensors are of another shape \(quant_proj.bias \(5,\), not \(32,\)\)", s | {"quant_proj.bias": torch.ones(5)})
    nan = s["encoder.pos_emb"].clone()
    nan[0, 3, 1, 1] = math.nan
    refuses(r"1 tensors are not finite \(encoder.pos_emb\)", s | {"encoder.pos_emb": nan})
    refuses(r"another shape \(encoder.pos_emb \(1, 128, 4, 4\), not \(1, 128, 14, 14\)\)", image_size=224)
    refuses("6 tensors are unknown", post_mlp=False)
    refuses("made for pictures of 1 channels, and rgb .colour. has 3", state(1), config(1))
    for key, value in [("dec_type", "uvit_b_p4_f8"), ("quant_type", "memcodes"), ("codebook_size", "8-8-8-6-5"),
                       ("enc_type", "MLP"), ("prediction_type", "epsilon"), ("beta_schedule", "shifted_cosine:0.5"),
                       ("norm_codes", False), ("num_codebooks", 2), ("n_labels", 134), ("n_channels", 512), ("patch_size", 0)]:
        refuses(f"its config: {key}: ", **{key: value})
    refuses("holds no mapping", settings=[1])
    refuses("another shape", settings={})
    folder = Path(write(tmp_path / "none", s, None))
    with pytest.raises(WeightsError, match="no config.json, and no config in the header of model.safetensors"):
        make(weights=folder).spec()
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="the config cannot be read"):
        make(weights=folder).spec()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="model.safetensors cannot be read"):
        make(weights=folder).spec()


def test_missing_weights_name_the_files(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "rgb.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"no weights of 'divae': .* holds no model.safetensors \(rgb.pth would") as caught:
        make(weights=tmp_path / "empty").spec()
    assert "put model.safetensors into a folder DIR and give rgb.weights=DIR" in caught.value.hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cls = TOKENIZERS.get("divae")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE forbids to fetch model.safetensors") as caught:
        cls("normal", cls.Options(), {"size": [224, 224]}).spec()
    assert "hf download EPFL-VILAB/4M_tokenizers_normal_8k_224-448 model.safetensors" in caught.value.hint


def test_a_data_set_keeps_the_place_and_refuses_other_weights_there(tmp_path):
    weights = tmp_path / "w"
    shutil.copytree(divae_small("rgb"), weights)
    folder = tmp_path / "rgb"
    folder.mkdir()
    save_tokenizer(make(weights=weights), folder)
    doc = json.loads((folder / "tokenizer.json").read_text())
    assert doc["options"]["weights"] == str(weights) and sum(p.stat().st_size for p in folder.iterdir()) < 2000
    assert open_tokenizer(folder).spec() == make(weights=weights).spec() == make().spec()
    write(weights, state(3) | {"quant_proj.bias": state(3)["quant_proj.bias"] + 1}, config(3))
    with pytest.raises(WeightsError, match="model.safetensors is not what the tokens in use were made with"):
        open_tokenizer(folder)


# -- data sets --------------------------------------------------------------------------------------------------------


def run(*args):
    env = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="nano4m", env=env)


def test_a_data_set_is_tokenized_and_read_back(tmp_path):
    workspace = Workspace(tmp_path)
    options = ["train=8", "val=4", "test=1", "test_novel=1", "size=32"]
    dataset = fetch(open_source("scenes", options, workspace), workspace, workers=1).dataset
    asked = ("rgb", "depth")
    settings = [f"{m}.{o}" for m in asked for o in ("name=divae", f"weights={divae_small(m)}", "steps=2")]
    chosen = [part for m in asked for part in ("-m", m)]
    result = run("tokenize", *chosen, *settings, "depth.metres=[4.5,1]", "--root", tmp_path, "--workers", 1, "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)["modalities"]
    for modality, figure in zip(asked, ("psnr", "absrel"), strict=True):
        told = done[modality]
        assert (told["tokenizer"], told["kind"], told["shape"], told["vocab_size"]) == ("divae", "grid", [2, 2], ENTRIES)
        assert told["made"] == 14 and not told["fitted"] and math.isfinite(told["figures"][figure])
        assert told["figures"]["codes_used"] > 1 / ENTRIES and Path(told["sheet"]).stat().st_size > 1000
        tokenizer = open_tokenizer(dataset.tokenizer(modality))
        assert read_spec(dataset.spec_path(modality)) == tokenizer.spec() and tokenizer.options.steps == 2
        raw, tokens, kind = Split(dataset.raw("train")), Split(dataset.tokens(modality, "train")), MODALITIES.get(modality)
        for i in range(8):
            ids = np.load(io.BytesIO(tokens.read(i, f"{modality}.npy")), allow_pickle=False)
            assert ids.shape == (1, 4)
            assert np.array_equal(tokenizer.encode([kind.from_bytes(raw.read(i, kind.ext), "raw")])[0], ids[0])
    result = run("tokenize", "-m", "edges", "--root", tmp_path)
    assert result.exit_code != 0 and "has no edges" in result.stderr


def test_round_trips_of_slow_decoders_are_told_of_few():
    tokenizer = make(size=(32, 32), steps=1)
    raws = [picture("rgb", (32, 32), seed) for seed in range(9)]
    figures = _roundtrip.fidelity(tokenizer, raws, tokenizer.encode(raws))
    assert tokenizer.slow and len(figures["psnr"]) == len(figures["ssim"]) == _roundtrip.SLOW < 9

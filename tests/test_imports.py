"""Checkpoints of other projects: the imported model is theirs, number by number, and every tensor of the file is accounted for.

Small ones with random weights are written here in the published formats (names, shapes and heads of the files), and
computed by the plain models below, which follow the descriptions and share no code with ours.
"""

import base64
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from codec_factory import text_small
from safetensors.torch import load_file, save_file
from test_cli import run as cli
from workspace_factory import linked, media, one_thread, tiny, write_tokens  # noqa: F401 - fixtures

from nano4m_cli.config import load_yaml
from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import ConfigError, DataError, WeightsError
from nano4m_cli.generate.sampler import GenerateOptions, State, fill
from nano4m_cli.model.batch import pack
from nano4m_cli.spec import TokenSpec
from nano4m_cli.train._foreign_file import literal
from nano4m_cli.train.config import parse_run_config
from nano4m_cli.train.importing import convert
from nano4m_cli.train.run import MODELS, open_run

CLOSE = dict(rtol=1e-4, atol=1e-4)


# -- plain layers: one sample, (T, D) ---------------------------------------------------------------------------------


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.tensor(0.0))


def norm(w, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.tensor(0.0))


def attention(w, name, out, heads, x, context=None, sees=None):
    width = x.shape[1]
    if context is None:
        q, k, v = dense(w, f"{name}.qkv", x).split(width, 1)
    else:
        q, (k, v) = dense(w, f"{name}.q", x), dense(w, f"{name}.kv", context).split(width, 1)
    parts = []
    for h in range(heads):
        cut = slice(h * width // heads, (h + 1) * width // heads)
        qh, kh = q[:, cut], k[:, cut]
        if f"{name}.q_norm.weight" in w:
            qh, kh = norm(w, f"{name}.q_norm", qh), norm(w, f"{name}.k_norm", kh)
        score = qh @ kh.T / math.sqrt(width // heads)
        if sees is not None:
            score = score.masked_fill(~sees, -torch.inf)
        parts.append(score.softmax(-1) @ v[:, cut])
    return dense(w, f"{name}.{out}", torch.cat(parts, 1))


def feed_forward(w, name, x):
    if f"{name}.fc3.weight" in w:
        h = dense(w, f"{name}.fc1", x)
        return dense(w, f"{name}.fc2", h * torch.sigmoid(h) * dense(w, f"{name}.fc3", x))
    h = dense(w, f"{name}.fc1", x)
    return dense(w, f"{name}.fc2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


def trunk(w, encoder, decoder, out, heads, x):
    """The encoder's blocks over x; returns them as a function for the decoder as well."""
    for i in range(100):
        b = f"{encoder}{i}"
        if f"{b}.norm1.weight" not in w:
            return x
        x = x + attention(w, f"{b}.attn", out, heads, norm(w, f"{b}.norm1", x))
        x = x + feed_forward(w, f"{b}.mlp", norm(w, f"{b}.norm2", x))


def decode(w, decoder, out, heads, y, context, sees):
    for i in range(100):
        b = f"{decoder}{i}"
        if f"{b}.norm1.weight" not in w:
            return y
        y = y + attention(w, f"{b}.self_attn", out, heads, norm(w, f"{b}.norm1", y), sees=sees)
        y = y + attention(w, f"{b}.cross_attn", out, heads, norm(w, f"{b}.query_norm", y), norm(w, f"{b}.context_norm", context))
        y = y + feed_forward(w, f"{b}.mlp", norm(w, f"{b}.norm2", y))


def plain_course(w, heads, shown, asked):
    """Logits (n, all ids) of nanofm's FourM. shown: (id, modality, position) of one sample; asked: (modality, position)."""
    ids, mods, places = torch.tensor(shown).T
    place = w["pos_emb"][places]
    x = w["enc_tok_emb.weight"][ids] + w["enc_mod_emb.weight"][mods] + place
    x = norm(w, "enc_norm", trunk(w, "encoder.blocks.", None, "attn_out_proj", heads, x))
    mods, places = torch.tensor(asked).T
    y = w["dec_mod_emb.weight"][mods] + w["pos_emb"][places]
    y = decode(w, "decoder.blocks.", "attn_out_proj", heads, y, dense(w, "dec_context_proj", x) + place, None)
    return dense(w, "to_logits", norm(w, "dec_norm", y))


def plain_apple(w, heads, shown, asked):
    """Logits of apple's FM, a list. shown: (name, id, position); asked: (name, id before or None for a picture, position)."""
    enc, dec = (lambda t, part: w[f"encoder_embeddings.{t}.{part}"]), (lambda t, part: w[f"decoder_embeddings.{t}.{part}"])
    again = [enc(t, "mod_emb")[0, 0] + enc(t, "pos_emb")[0, p] for t, _, p in shown]
    x = [enc(t, "token_emb.weight")[i] + a for (t, i, _), a in zip(shown, again, strict=True)]
    registers = list(w["register_tokens"][0]) if "register_tokens" in w else []
    x, again = torch.stack(registers + x), torch.stack([torch.zeros_like(r) for r in registers] + again)
    x = norm(w, "encoder_norm", trunk(w, "encoder.", None, "proj", heads, x))
    y = torch.stack([(w["mask_token"][0, 0] if before is None else dec(t, "token_emb.weight")[before])
                     + dec(t, "mod_emb")[0, 0] + dec(t, "pos_emb")[0, p] for t, before, p in asked])
    sees = torch.tensor([[b[0] == a[0] and (a[1] is None or j <= i) for j, b in enumerate(asked)] for i, a in enumerate(asked)])
    y = norm(w, "decoder_norm", decode(w, "decoder.", "proj", heads, y, dense(w, "decoder_proj_context", x) + again, sees))
    return [dec(t, "to_logits.weight") @ y[n] for n, (t, _, _) in enumerate(asked)]


# -- checkpoints as they are published --------------------------------------------------------------------------------

WIDTH, HEADS = 16, 2
COURSE = {  # ids and slots
    "tok_rgb@16": (60, 16), "tok_audio@12": (32, 12), "tok_depth@16": (40, 16), "tok_normal@16": (40, 16), "scene_desc": (320, 24),
}  # fmt: skip
PAD, SOS, EOS = 301, 302, 303  # behind the words, as after GPT-2's 50257
COURSE_MODEL = {"pad": PAD, "sos": SOS, "eos": EOS}


def sincos_1d(length, width):
    angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))
    return torch.cat([angle.sin(), angle.cos()], 1)


def course_tensors(seed=0, layers=(6, 6), modalities=COURSE, bias=False):
    g, out, d = torch.Generator().manual_seed(seed), {}, WIDTH
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.3  # noqa: E731
    vocab, length = (max(v[i] for v in modalities.values()) for i in (0, 1))
    out["pos_emb"] = sincos_1d(length, d)
    m = len(modalities)
    for name, rows in {"enc_tok_emb": vocab, "enc_mod_emb": m, "dec_mod_emb": m, "to_logits": vocab}.items():
        out[f"{name}.weight"] = draw(rows, d)

    def normed(name):
        out[f"{name}.weight"], out[f"{name}.bias"] = 1 + draw(d), draw(d) * bias

    def layer(name, rows, cols):
        out[f"{name}.weight"] = draw(rows, cols)
        if bias:
            out[f"{name}.bias"] = draw(rows)

    for trunk_, n in zip(("encoder", "decoder"), layers, strict=True):
        for i in range(n):
            b = f"{trunk_}.blocks.{i}"
            for part in ("norm1", "norm2") + (("query_norm", "context_norm") if trunk_ == "decoder" else ()):
                normed(f"{b}.{part}")
            own = f"{b}.attn" if trunk_ == "encoder" else f"{b}.self_attn"
            layer(f"{own}.qkv", 3 * d, d)
            layer(f"{own}.attn_out_proj", d, d)
            if trunk_ == "decoder":
                for part, rows in (("q", d), ("kv", 2 * d), ("attn_out_proj", d)):
                    layer(f"{b}.cross_attn.{part}", rows, d)
            layer(f"{b}.mlp.fc1", 4 * d, d)
            layer(f"{b}.mlp.fc2", d, 4 * d)
    normed("enc_norm")
    normed("dec_norm")
    out["dec_context_proj.weight"], out["dec_context_proj.bias"] = draw(d, d), draw(d)
    return out


def course_head(modalities=COURSE, **more):
    """The config as the course's `save_safetensors` writes it: every value as text."""
    said = {
        "_target_": "nanofm.models.fourm.FourM", "enc_tokens_read_key": "enc_tokens", "dec_pad_mask_read_key": "dec_pad_mask",
        "modalities": list(modalities), "vocab_sizes": [v for v, _ in modalities.values()],
        "max_seq_lens": [n for _, n in modalities.values()], "dim": WIDTH, "enc_depth": 6, "dec_depth": 6,
        "head_dim": WIDTH // HEADS, "per_modality_loss_avg": True, **more,
    }
    return {k: str(v) for k, v in said.items()}


SPECS = [
    TokenSpec(modality="rgb", kind="grid", shape=(4, 4), vocab_size=60),
    TokenSpec(modality="audio", kind="codes", shape=(6, 2), vocab_size=16),
    TokenSpec(modality="depth", kind="grid", shape=(4, 4), vocab_size=40),
    TokenSpec(modality="normal", kind="grid", shape=(4, 4), vocab_size=40),
    TokenSpec(modality="caption", kind="sequence", shape=(9,), vocab_size=301, eos=300),
]


def data_set(root, specs, splits=("train", "val", "test"), n=4):
    """Tokens by hand."""
    dataset = DatasetFolder(root / "data" / "toks")
    for spec in specs:
        for s, split in enumerate(splits):
            def ids_of(i, spec=spec, s=s):
                g = np.random.default_rng([s, i])
                if spec.kind == "sequence":
                    return np.append(g.integers(10, spec.vocab_size - 1, 2 + i % 6), spec.eos)
                return g.integers(0, spec.vocab_size, spec.slots)

            write_tokens(dataset, split, n, spec, ids_of)
    write_json(dataset.info_path, {
        "name": "toks", "source": "tokens", "options": {}, "version": 1, "modalities": [s.modality for s in specs],
        "brought": [s.modality for s in specs], "splits": dict.fromkeys(splits, n),
    })
    return Workspace(root)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("imports"), SPECS)


def run_config(path, **more):
    return parse_run_config({"task": "import", "name": "imported", "checkpoint": str(path), "model": COURSE_MODEL, **more}, "test")


def imported(run, workspace):
    made = convert(run, workspace)
    model = MODELS[made.config.task](made.config.model, made.layout)
    model.load_state_dict(made.state)
    return made, model.eval()


def mixed(layout, n=6, seed=0):
    """ids, what is shown and what is asked: several modalities of each, texts of different length shown up to some place."""
    g = np.random.default_rng(seed)
    vocab = np.array([v for _, _, v in layout.groups])[layout.group_C]
    ids, shown, asked = g.integers(10, vocab, (n, layout.columns)), *(np.zeros((n, layout.columns), dtype=bool) for _ in "ab")
    for i in range(n):
        for spec in layout.specs:
            here = layout.slice(spec.modality)
            if spec.kind == "sequence":
                length = 2 + i % (spec.slots - 2)
                ids[i, here][: length - 1][ids[i, here][: length - 1] == spec.eos] -= 1
                ids[i, here.start + length - 1] = spec.eos
                told = [0, length, 1, length // 2][i % 4]
                shown[i, here.start : here.start + told] = True
                asked[i, here.start + told : here.start + length] = i != 2
            else:
                order = g.permutation(spec.slots)
                a = int(g.integers(0, spec.slots // 2))
                shown[i, here.start + order[:a]] = True
                asked[i, here.start + order[a : a + int(g.integers(0, 6))]] = True
        shown[i, 0], asked[i, 0], asked[i, 1], shown[i, 1] = True, False, True, False
    return ids, shown, asked


# -- the course's model -----------------------------------------------------------------------------------------------


def course_rows(layout, ids, shown, asked):
    """The same sample as the course keeps it: one row of ids per modality, with [SOS] and [PAD]."""
    enc, dec, answers = [], [], []
    for m, spec in enumerate(layout.specs):
        here = layout.slice(spec.modality)
        row, seen, wanted = ids[here], shown[here], asked[here]
        for slot in range(spec.slots):
            token = int(row[slot])
            if spec.kind == "codes":
                token += slot % 2 * spec.vocab_size
            if spec.kind == "sequence":
                token = EOS if token == spec.eos else token
            place = slot + (spec.kind == "sequence")
            if seen[slot]:
                enc.append((token, m, place))
            if wanted[slot]:
                dec.append((m, place))
                answers.append(token)
        if spec.kind == "sequence" and seen.any():
            enc.append((SOS, m, 0))
            if spec.eos in row[seen]:
                enc += [(PAD, m, p) for p in range(int(seen.sum()) + 1, 24)]
    return enc, dec, answers


@pytest.mark.parametrize("backend", ["padded", "loop"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_course_s_model_is_theirs(space, tmp_path, backend, bias):
    """149 tensors, as nano4M-Audio's file has them; with biases, as `use_bias` makes them."""
    w = course_tensors(bias=bias)
    assert bias or len(w) == 149
    path = tmp_path / "checkpoint-final.safetensors"
    save_file(w, path, metadata=course_head(use_bias=bias))
    made, model = imported(run_config(path, model={**COURSE_MODEL, "attention": backend}), space)
    layout = made.layout
    assert layout.names == ["rgb", "audio", "depth", "normal", "caption"] and made.config.task == "course4m"
    assert made.config.model.size == "d6-6w16" and made.config.model.norm_bias == bias
    ids, shown, asked = mixed(layout)
    packed = pack(layout, ids, shown, asked)
    with torch.no_grad():
        logits, nll = model(packed), model.nll(packed).split(asked.sum(1).tolist())
        own = [x.log_softmax(-1) if x is not None else None for x in logits]
        ours = torch.zeros(int(asked.sum()))
        for index, x in zip(packed.group_index, own, strict=True):
            if index is not None:
                ours[index] = -x.gather(1, packed.dec_ids[index][:, None])[:, 0]
        ours = ours.split(asked.sum(1).tolist())
        for i in range(len(ids)):
            enc, dec, answers = course_rows(layout, ids[i], shown[i], asked[i])
            theirs = plain_course(w, HEADS, enc, dec)
            full = torch.nn.functional.cross_entropy(theirs, torch.tensor(answers), reduction="none")
            torch.testing.assert_close(nll[i], full, **CLOSE)
            for n, (m, _) in enumerate(dec):
                spec = layout.specs[m]
                rows = {"codes": slice(answers[n] // 16 * 16, answers[n] // 16 * 16 + 16)}.get(spec.kind, slice(0, spec.vocab_size))
                kept = theirs[n, rows].clone()
                if spec.kind == "sequence":
                    kept[spec.eos] = theirs[n, EOS]
                at = answers[n] - rows.start if answers[n] != EOS or spec.kind != "sequence" else spec.eos
                torch.testing.assert_close(ours[i][n], -kept.log_softmax(0)[at], **CLOSE)


def test_its_softmax_can_be_over_the_modality_s_own_ids(space, tmp_path):
    save_file(course_tensors(), tmp_path / "c.safetensors", metadata=course_head())
    (_, over_all), (_, over_own) = (
        imported(run_config(tmp_path / "c.safetensors", model={**COURSE_MODEL, "softmax": s}), space) for s in ("all", "own")
    )
    packed = pack(over_all.layout, *mixed(over_all.layout))
    with torch.no_grad():
        a, b = over_all.nll(packed), over_own.nll(packed)
        assert bool((a > b).all()) and all(
            x is y is None or torch.equal(x, y) for x, y in zip(over_all(packed), over_own(packed), strict=True)
        )
    assert "as published" in over_all.notes[0] and "own ids" in over_own.notes[0]
    fresh = MODELS["course4m"](over_all.config, over_all.layout)  # what no file is read into begins with their positions too
    torch.testing.assert_close(fresh.position, sincos_1d(24, WIDTH))


def test_other_names_and_sizes_of_the_course(space, tmp_path):
    """Four modalities, three and two layers, wrapped for many GPUs, and the names of another project for the same layers."""
    few = {k: v for k, v in COURSE.items() if k != "tok_audio@12"}
    w = course_tensors(layers=(3, 2), modalities=few)
    renamed = {
        "module." + k.replace(".mlp.fc2", ".mlp.fc3").replace("cross_attn.q.", "cross_attn.q_proj.")
        .replace("cross_attn.kv.", "cross_attn.kv_proj."): v for k, v in w.items()
    }
    save_file(renamed, tmp_path / "c.safetensors", metadata=course_head(few, enc_depth=3, dec_depth=2))
    made, model = imported(run_config(tmp_path / "c.safetensors"), space)
    assert made.layout.names == ["rgb", "depth", "normal", "caption"] and made.config.model.size == "d3-2w16"
    assert "module.decoder.blocks.1.cross_attn.kv_proj.weight" in made.report["tensors"]["used"]
    ids, shown, asked = mixed(made.layout)
    with torch.no_grad():
        nll = model.nll(pack(made.layout, ids, shown, asked)).split(asked.sum(1).tolist())
        for i in range(3):
            enc, dec, answers = course_rows(made.layout, ids[i], shown[i], asked[i])
            full = torch.nn.functional.cross_entropy(plain_course(w, HEADS, enc, dec), torch.tensor(answers), reduction="none")
            torch.testing.assert_close(nll[i], full, **CLOSE)


def test_some_of_its_modalities_can_be_used_alone(space, tmp_path):
    save_file(course_tensors(), tmp_path / "c.safetensors", metadata=course_head())
    made, model = imported(run_config(tmp_path / "c.safetensors", data={"modalities": ["depth", "rgb"]}), space)
    assert made.layout.names == ["depth", "rgb"]
    assert [m["used"] for m in made.report["modalities"]] == [True, False, True, False, False]
    _, whole = imported(run_config(tmp_path / "c.safetensors"), space)
    g = np.random.default_rng(0)
    ids = g.integers(0, 40, (2, 32))
    mask = g.random((2, 32)) < 0.5
    there = np.concatenate([whole.layout.slice(n).indices(99)[:2] for n in ("depth", "rgb")]).reshape(2, 2)
    big, shown, asked = (np.zeros((2, whole.layout.columns), dtype=t) for t in (int, bool, bool))
    for k, (a, z) in enumerate(there):
        part = slice(16 * k, 16 * k + 16)
        big[:, a:z], shown[:, a:z], asked[:, a:z] = ids[:, part], mask[:, part], ~mask[:, part]
    with torch.no_grad():
        few = sorted(model.nll(pack(made.layout, ids, mask, ~mask)).tolist())
        many = sorted(whole.nll(pack(whole.layout, big, shown, asked)).tolist())
    np.testing.assert_allclose(few, many, rtol=1e-4)


def test_its_text_is_written_slot_by_slot(space, tmp_path):
    """Greedy writing equals asking the plain model for one slot after the other, with all that is known shown."""
    w = course_tensors()
    w["to_logits.weight"][EOS] *= 3  # so that some texts end
    save_file(w, tmp_path / "c.safetensors", metadata=course_head())
    made, model = imported(run_config(tmp_path / "c.safetensors"), space)
    layout, spec = made.layout, made.layout.specs[-1]
    here = layout.slice("caption")
    ids = np.random.default_rng(1).integers(0, 16, (4, layout.columns))
    known = np.zeros(ids.shape, dtype=bool)
    known[:, :16] = True
    state = State(np.where(known, ids, 0), known.copy(), np.arange(4))
    fill(model, state, "caption", GenerateOptions(text_temperature=0))
    lengths = state.known_BC[:, here].sum(1)
    for i in range(4):
        text: list[int] = []
        while len(text) < spec.slots and spec.eos not in text:
            enc = [(int(t), 0, p) for p, t in enumerate(ids[i, :16])] + [(t, 4, p + 1) for p, t in enumerate(text)]
            logits = plain_course(w, HEADS, enc + ([(SOS, 4, 0)] if text else []), [(4, len(text) + 1)])[0]
            kept = logits[: spec.vocab_size].clone()
            kept[spec.eos] = logits[EOS]
            text.append(int(kept.argmax()))
        assert state.ids_BC[i, here][: lengths[i]].tolist() == text


# -- apple's model ----------------------------------------------------------------------------------------------------

APPLE = {"caption": (300, 12, True), "tok_rgb@224": (60, 16, False), "tok_depth@224": (40, 16, False), "det": (300, 8, True)}
APPLE_SPECS = [
    TokenSpec(modality="rgb", kind="grid", shape=(4, 4), vocab_size=60),
    TokenSpec(modality="depth", kind="grid", shape=(4, 4), vocab_size=40),
    TokenSpec(modality="caption", kind="sequence", shape=(9,), vocab_size=300, eos=3),
]
S1 = 5


def apple_tensors(gated=True, bias=False, registers=0, pixels=True, seed=0):
    g, out, d = torch.Generator().manual_seed(seed), {}, WIDTH
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.3  # noqa: E731
    for t, (vocab, length, text) in APPLE.items():
        mod = draw(1, 1, d)
        for side in ("encoder_embeddings", "decoder_embeddings"):
            out[f"{side}.{t}.token_emb.weight"] = draw(vocab, d)
            out[f"{side}.{t}.mod_emb"] = mod.clone()
            out[f"{side}.{t}.pos_emb"] = sincos_1d(length, d)[None] if text else draw(1, length, d)
        out[f"decoder_embeddings.{t}.to_logits.weight"] = draw(vocab, d)
    if pixels:
        out["encoder_embeddings.rgb@224.proj.weight"] = draw(d, 768)
        out["encoder_embeddings.rgb@224.mod_emb"], out["encoder_embeddings.rgb@224.pos_emb"] = draw(1, 1, d), draw(1, 196, d)

    def normed(name, width=d):
        out[f"{name}.weight"], out[f"{name}.bias"] = 1 + draw(width), draw(width) * bias

    def layer(name, rows, cols, own=bias):
        out[f"{name}.weight"] = draw(rows, cols)
        if own:
            out[f"{name}.bias"] = draw(rows)

    hidden = int(2 * 4 * d / 3) if gated else 4 * d
    for side, n in (("encoder", 2), ("decoder", 3)):
        for i in range(n):
            b = f"{side}.{i}"
            for part in ("norm1", "norm2") + (("query_norm", "context_norm") if side == "decoder" else ()):
                normed(f"{b}.{part}")
            kinds = [("attn", "qkv", 3)]
            if side == "decoder":
                kinds = [("self_attn", "qkv", 3), ("cross_attn", "q", 1), ("cross_attn", "kv", 2)]
            for kind, part, times in kinds:
                layer(f"{b}.{kind}.{part}", times * d, d)
                if part != "kv":
                    layer(f"{b}.{kind}.proj", d, d)
                    if gated:  # the models with gates are those with normed queries and keys here
                        normed(f"{b}.{kind}.q_norm", d // HEADS)
                        normed(f"{b}.{kind}.k_norm", d // HEADS)
            layer(f"{b}.mlp.fc1", hidden, d)
            layer(f"{b}.mlp.fc2", d, hidden)
            if gated:
                layer(f"{b}.mlp.fc3", hidden, d)
    normed("encoder_norm")
    normed("decoder_norm")
    layer("decoder_proj_context", d, d, True)
    out["mask_token"] = draw(1, 1, d)
    if registers:
        out["register_tokens"] = draw(1, registers, d)
    return out


def apple_config(gated=True, bias=False, registers=0, **more):
    return {
        "domains_in": ["caption", "det", "tok_rgb@224", "tok_depth@224", "rgb@224"],
        "domains_out": ["caption", "det", "tok_rgb@224", "tok_depth@224"], "dim": WIDTH, "encoder_depth": 2, "decoder_depth": 3,
        "num_heads": HEADS, "mlp_ratio": 4, "qkv_bias": bias, "proj_bias": bias, "mlp_bias": bias, "norm_bias": bias,
        "act_layer": "SiLU" if gated else "GELU", "gated_mlp": gated, "qk_norm": gated, "image_size": 224, "patch_size": 16,
        "share_modality_embeddings": True, **({"num_register_tokens": registers} if registers else {}), **more,
    }


def as_on_the_hub(w, config, folder):
    """A folder as the hub's mixin writes it: what is shared once, its other name in the head; config.json beside."""
    w, twice = dict(w), {}
    for t in APPLE:
        del w[f"encoder_embeddings.{t}.mod_emb"]
        twice[f"encoder_embeddings.{t}.mod_emb"] = f"decoder_embeddings.{t}.mod_emb"
    folder.mkdir()
    save_file(w, folder / "model.safetensors", metadata={"format": "pt", **twice})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def apple_space(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("apples"), APPLE_SPECS)


def apple_rows(layout, ids, shown, asked):
    """The same sample by span masking: [S_1] for what is missing of a text, which is written from [S_1] on."""
    enc, dec, answers = [], [], []
    for spec in layout.specs:
        here = layout.slice(spec.modality)
        theirs = spec.modality if spec.kind == "sequence" else f"tok_{spec.modality}@224"
        row, seen, wanted = ids[here].tolist(), shown[here], np.flatnonzero(asked[here])
        enc += [(theirs, row[s], s) for s in np.flatnonzero(seen)]
        if spec.kind == "sequence":
            if seen.any() and spec.eos not in np.array(row)[seen]:
                enc.append((theirs, S1, int(seen.sum())))
            written = [S1, *(row[s] for s in wanted)]
            dec += [(theirs, written[k], k) for k in range(len(wanted))]
        else:
            dec += [(theirs, None, int(s)) for s in wanted]
        answers += [row[s] for s in wanted]
    return enc, dec, answers


@pytest.mark.parametrize("variant", [
    {"gated": True, "bias": False}, {"gated": False, "bias": True}, {"gated": True, "bias": False, "registers": 3},
])
@pytest.mark.parametrize("form", ["hub", "head"])
def test_apple_s_model_is_theirs(apple_space, tmp_path, variant, form):
    w = apple_tensors(**variant)
    if form == "hub":
        path = as_on_the_hub(w, apple_config(**variant), tmp_path / "hub")
    else:
        path = tmp_path / "4m.safetensors"
        save_file(w, path, metadata={k: str(v) for k, v in apple_config(**variant).items()})
    made, model = imported(run_config(path, model={}, without=["rgb@224"]), apple_space)
    layout = made.layout
    assert layout.names == ["caption", "rgb", "depth"], "the checkpoint's order"
    assert made.config.model.size == "d2-3w16" and made.config.model.texts == ["caption", "det"]
    left = made.report["tensors"]["left"]
    assert left["encoder_embeddings.rgb@224.proj.weight"] == "rgb@224 is not used" and "decoder_embeddings.det.pos_emb" in left
    assert left["decoder_embeddings.tok_rgb@224.token_emb.weight"] == "the decoder sees masks in their place"
    ids, shown, asked = mixed(layout)
    packed = pack(layout, ids, shown, asked, model.config.registers)
    with torch.no_grad():
        nll = model.nll(packed).split(asked.sum(1).tolist())
        for i in range(len(ids)):
            enc, dec, answers = apple_rows(layout, ids[i], shown[i], asked[i])
            theirs = [-x.log_softmax(0)[a] for x, a in zip(plain_apple(w, HEADS, enc, dec), answers, strict=True)]
            torch.testing.assert_close(nll[i], torch.stack(theirs), **CLOSE)


def test_apple_s_text_is_written_from_its_sentinel(apple_space, tmp_path):
    w = apple_tensors()
    w["decoder_embeddings.caption.to_logits.weight"][3] *= 3
    path = as_on_the_hub(w, apple_config(), tmp_path / "hub")
    made, model = imported(run_config(path, model={}, without=["rgb@224"]), apple_space)
    layout, spec = made.layout, made.layout.specs[0]
    here = layout.slice("caption")
    ids = np.random.default_rng(1).integers(6, 40, (4, layout.columns))
    known = np.zeros(ids.shape, dtype=bool)
    known[:, layout.slice("rgb")] = True
    known[2:, here.start : here.start + 2] = True
    state = State(np.where(known, ids, 0), known.copy(), np.arange(4))
    fill(model, state, "caption", GenerateOptions(text_temperature=0))
    for i in range(4):
        text = ids[i, here][:2].tolist() if i > 1 else []
        begun = len(text)
        start = [("tok_rgb@224", int(t), p) for p, t in enumerate(ids[i, layout.slice("rgb")])]
        start += [("caption", t, p) for p, t in enumerate(text)] + ([("caption", S1, begun)] if begun else [])
        while len(text) < spec.slots and spec.eos not in text:
            written = [S1, *text[begun:]]
            logits = plain_apple(w, HEADS, start, [("caption", t, p) for p, t in enumerate(written)])[-1]
            text.append(spec.eos if len(text) == spec.slots - 1 else int(logits.argmax()))
        assert state.ids_BC[i, here][: state.known_BC[i, here].sum()].tolist() == text


def test_what_apple_reads_as_pixels_is_left_out_by_name_only(apple_space, tmp_path):
    path = as_on_the_hub(apple_tensors(), apple_config(), tmp_path / "hub")
    with pytest.raises(WeightsError, match="rgb@224 of .* cannot be used") as caught:
        convert(run_config(path, model={}), apple_space)
    assert "without=[rgb@224]" in caught.value.hint


@pytest.mark.parametrize("said, error", [
    ({"decoder_causal_mask": True}, "sets decoder_causal_mask to True"), ({"act_layer": "GELU"}, "gated MLPs with GELU"),
    ({"num_heads": None}, "number of heads"), ({"rope": True}, "sets 'rope' to True, which is not known"),
    ({"domains_in": None}, "does not say its domains_in"), ({"mlp_ratio": 8}, "mlp.fc1.weight' is"),
])
def test_apple_options_that_are_not_known(apple_space, tmp_path, said, error):
    path = as_on_the_hub(apple_tensors(), {k: v for k, v in {**apple_config(), **said}.items() if v is not None}, tmp_path / "hub")
    with pytest.raises(WeightsError, match=error):
        convert(run_config(path, model={}, without=["rgb@224"]), apple_space)


# -- what is refused --------------------------------------------------------------------------------------------------


def course_file(folder, change=lambda w: None, **head):
    w = course_tensors(layers=(1, 1))
    change(w)
    save_file(w, folder / "c.safetensors", metadata={**course_head(), **{k: str(v) for k, v in head.items()}})
    return folder / "c.safetensors"


@pytest.mark.parametrize("change, said", [
    (lambda w: w.pop("decoder.blocks.0.cross_attn.kv.weight"), "lacks decoder.blocks.0.cross_attn.kv.weight"),
    (lambda w: w.update(frame_pos_emb=torch.ones(2)), "no place for: frame_pos_emb"),
    (lambda w: w.pop("pos_emb"), "has no 'pos_emb'"),
    (lambda w: w.update({"enc_norm.weight": torch.ones(8)}), r"'enc_norm.weight' is \(8,\), \(16,\) expected"),
    (lambda w: w["to_logits.weight"].fill_(torch.nan), "'to_logits.weight' holds numbers that are not finite"),
    (lambda w: w.update({"enc_tok_emb.weight": torch.ones(500, 16)}), "500 ids, 24 positions and 5 modalities in its tables"),
    (lambda w: [w.pop(k) for k in list(w) if "." in k], "no architecture that is known"),
])
def test_tensors_that_do_not_fit_are_errors_that_name_them(space, tmp_path, change, said):
    with pytest.raises(WeightsError, match=said):
        convert(run_config(course_file(tmp_path, change)), space)


@pytest.mark.parametrize("head, more, said", [
    ({"use_rope": True}, {}, "sets 'use_rope' to True, which is not known"),
    ({"modalities": ["tok_rgb@16"]}, {}, "does not say its modalities"),
    ({"vocab_sizes": [61, 32, 40, 40, 320]}, {}, "'rgb' has 61 ids, the data set's 60"),
    ({"vocab_sizes": [60, 64, 40, 40, 320]}, {}, "'audio' has 64 ids, the data set's 2 x 16"),
    ({"max_seq_lens": [16, 12, 9, 16, 24]}, {}, "'depth' has 9 slots, the data set's 16"),
    ({"max_seq_lens": [16, 12, 16, 16, 9]}, {}, "'caption' has 9 slots with .SOS., the data set's 9"),
    ({}, {"model": {"pad": 310, "sos": 311, "eos": 312}}, "'caption' has 310 ids of words, the data set's 301"),
    ({}, {"model": {}}, "'caption' has 320 ids, text needs id 50259"),
])
def test_heads_that_do_not_fit_are_errors_that_name_the_modality(space, tmp_path, head, more, said):
    with pytest.raises(WeightsError, match=said):
        convert(run_config(course_file(tmp_path, **head), **more), space)


def test_settings_say_what_the_file_does_not(space, tmp_path):
    save_file(course_tensors(layers=(1, 1)), tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match="does not say its modalities") as caught:
        convert(run_config(tmp_path / "bare.safetensors"), space)
    assert "settings.modalities" in caught.value.hint
    vocab_sizes, lengths = zip(*COURSE.values(), strict=True)
    said = {"modalities": list(COURSE), "vocab_sizes": list(vocab_sizes), "max_seq_lens": list(lengths), "head_dim": 8}
    assert convert(run_config(tmp_path / "bare.safetensors", settings=said), space).config.model.heads == 2
    path = course_file(tmp_path, dropout=0.1)
    assert convert(run_config(path, settings={"dropout": None}), space).config.model.heads == 2


def test_pickles_are_refused_and_never_read(space, tmp_path):
    class Boom:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    for name in ("checkpoint.pth", "checkpoint.safetensors"):  # by what it is, whatever it is called
        torch.save({"model": Boom()}, tmp_path / name)
        with pytest.raises(WeightsError, match="is a pickle, which may run code") as caught:
            convert(run_config(tmp_path / name), space)
        assert "safetensors" in caught.value.hint
    w = course_tensors(layers=(1, 1))
    for n in range(256):  # heads of every length: one begins with the byte that a pickle begins with
        save_file(w, tmp_path / "long.safetensors", metadata={**course_head(), "_target_": "x" * n})
        if (tmp_path / "long.safetensors").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "long.safetensors").read_bytes()[0] == 0x80 and convert(run_config(tmp_path / "long.safetensors"), space)
    (tmp_path / "cut.safetensors").write_bytes(course_file(tmp_path).read_bytes()[:3000])
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        convert(run_config(tmp_path / "cut.safetensors"), space)
    with pytest.raises(ConfigError, match="no checkpoint is named"):
        convert(run_config("x").model_copy(update={"checkpoint": None}), space)


def test_heads_are_text_and_nothing_else():
    assert literal("['a', 'b']") == ["a", "b"] and literal("True") is True and literal("6") == 6 and literal("none") == "none"
    assert literal("__import__('os').system('true')") == "__import__('os').system('true')"


def test_names_that_clash_or_are_missing(space, tmp_path):
    path = course_file(tmp_path, modalities=["tok_rgb@16", "tok_audio@12", "tok_rgb@8", "tok_normal@16", "scene_desc"])
    with pytest.raises(ConfigError, match="'tok_rgb@16' and 'tok_rgb@8' of the checkpoint would both be 'rgb'"):
        convert(run_config(path), space)
    made = convert(run_config(path, rename={"tok_rgb@8": "depth"}), space)
    assert made.layout.names == ["rgb", "audio", "depth", "normal", "caption"]
    with pytest.raises(ConfigError, match="rename names 'tok_x'"):
        convert(run_config(path, rename={"tok_x": "depth"}), space)
    with pytest.raises(ConfigError, match="the checkpoint has no 'video'"):
        convert(run_config(course_file(tmp_path), data={"modalities": ["video"]}), space)
    with pytest.raises(DataError, match="share no modality"):
        convert(run_config(course_file(tmp_path, modalities=["a", "b", "c", "d", "e"])), space)


# -- from a folder of foreign tokens to figures -----------------------------------------------------------------------


def foreign_folder(folder):
    for s, split in enumerate(("train", "val", "test")):
        for i in range(3):
            for m, (name, (vocab, n)) in enumerate(list(COURSE.items())[:4]):
                path = folder / split / name / f"{split}_{i}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                ids = np.random.default_rng([s, i, m]).integers(0, vocab, (2, n))
                if "audio" in name:
                    ids = ids % 16 + np.arange(n) % 2 * 16
                np.save(path, ids.astype(np.int32))
            path = folder / split / "scene_desc" / f"{split}_{i}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([["cat meowing", "dog barking", "cow"][i]] * 2))
    return folder


def test_from_a_foreign_folder_to_figures(tmp_path, monkeypatch, one_thread):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    foreign_folder(tmp_path / "tokenized_v5")
    w = course_tensors(layers=(2, 1))
    save_file(w, tmp_path / "final.safetensors", metadata=course_head(enc_depth=2, dec_depth=1))
    (tmp_path / "c.yaml").write_text(
        "task: import\nname: imported\nmodel: {pad: 301, sos: 302, eos: 303}\n"
        "masking: {components: [{type: dirichlet, input: [4, 24], target: [4, 24]}], slots: {audio: span}}\n"
        "train: {steps: 3, batch: 4, precision: fp32, val_every: 3, warmup: 1}\n"
    )

    def done(*args):
        result = cli(*args)
        assert result.exit_code == 0, result.output
        return result

    done("fetch", "tokens", "path=tokenized_v5", "layout=nano4m-audio", "name=v5", "vocab.rgb=60", "vocab.depth=40",
         "vocab.normal=40", "vocab.audio=16", "--workers", 1)
    done("tokenize", "caption.name=hf_text", f"caption.weights={text_small()}", "caption.max_length=23", "--workers", 1)
    dry = done("train", "c.yaml", "checkpoint=final.safetensors", "--dry-run")
    assert "decoder.blocks.*.cross_attn.kv.weight" in dry.stdout and not (tmp_path / "runs").exists()
    result = done("train", "c.yaml", "checkpoint=final.safetensors")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "encoder.blocks.*.attn.qkv.weight 2 used: encoder.*.attn.qkv.weight", "pos_emb 1 used: position",
        "encoder.blocks.*.norm1.bias 2 left: a bias of zeros", "to_logits.weight 1 used: head.table",
        "tok_audio@12 audio 32 12 codes 6x2 of 16", "scene_desc caption 320 24 sequence 23 of 301",
    ):
        assert line in lines, (line, result.stdout)
    run = tmp_path / "runs" / "imported"
    report = json.loads((run / "import.json").read_text())
    assert len(report["tensors"]["used"]) + len(report["tensors"]["left"]) == report["tensors"]["in_file"] == len(w)
    assert report["checkpoint"]["says"]["_target_"] == "nanofm.models.fourm.FourM" and report["architecture"] == "course4m"
    saved = load_file(run / "checkpoints" / "step-00000000" / "model.safetensors")
    assert torch.equal(saved["head.table"], w["to_logits.weight"])
    assert load_yaml(run / "config.yaml")["task"] == "course4m"
    again = cli("train", "c.yaml", "checkpoint=final.safetensors")
    assert again.exit_code == 1 and "exists already" in again.output

    document = json.loads(done("eval", "--run", "imported", "--probe", "loss", "--json").stdout)
    figures = {m["name"]: m for m in document["results"][0]["metrics"]}
    singles = [n for n in figures if n.endswith("/ce") and "+" not in n and not n.startswith("->")]
    assert len(singles) == 5 + 20 and all(m["value"] > 0 for m in figures.values())
    assert any("320 ids of its one table, as published" in n for n in document["results"][0]["notes"])
    opened = open_run(Workspace(tmp_path), "imported")
    layout = opened.layout
    data = done("eval", "--run", "imported", "--split", "train", "--limit", 1, "--probe", "loss", "--json")
    from nano4m_cli.data.loader import TokenData

    ids, _ = TokenData(opened.dataset, "train", layout.names).read(np.array([0]))
    here, depth = layout.slice("rgb"), layout.slice("depth")
    enc = [(int(t), 0, p) for p, t in enumerate(ids[0, here])]
    logits = plain_course(w, HEADS, enc, [(2, p) for p in range(16)])
    by_hand = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[0, depth])))
    figures = {m["name"]: m["value"] for m in json.loads(data.stdout)["results"][0]["metrics"]}
    assert figures["rgb->depth/ce"] == pytest.approx(by_hand, rel=1e-4)

    made = done("generate", "--run", "imported", "--from", "caption=cat", "--to", "caption", "--json")
    assert json.loads(made.stdout)["texts"][0]["modality"] == "caption"
    refused = cli("generate", "--run", "imported", "--from", "caption=cat", "--to", "rgb")
    assert refused.exit_code == 1 and "came without their tokenizer" in refused.output

    tuned = done("train", run / "config.yaml", "--resume")
    assert "loss" in tuned.stdout and (run / "checkpoints" / "step-00000003").is_dir()


# -- our own, given away ----------------------------------------------------------------------------------------------


def test_an_export_is_read_back(media, tmp_path, one_thread):  # noqa: F811
    """Averaged weights, config, tokenizers and a card; imported elsewhere it is the same model, number by number."""
    run = open_run(media, "demo")
    away = tmp_path / "away"
    done = cli("train", media.root / "runs" / "demo" / "config.yaml", "--export", away, "--root", media.root, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["run"] == "demo" and document["pushed"] is None and str(away / "model.safetensors") in document["files"]
    card = (away / "README.md").read_text()
    for part in ("# demo", "| caption | sequence |", "Procedural, no licence attached", "4 steps of 8 samples",
                 "nano4m fetch scenes", "type: dirichlet", "None were measured on this checkpoint"):
        assert part in card, (part, card)
    assert (away / "tokenizers" / "rgb" / "tokenizer.json").is_file()
    state = load_file(away / "model.safetensors")
    assert set(state) == set(run.model.state_dict()) and all(torch.equal(state[k], v) for k, v in run.model.state_dict().items())

    other = linked(media, tmp_path / "other")
    (tmp_path / "i.yaml").write_text("task: import\n")
    done = cli("train", tmp_path / "i.yaml", f"checkpoint={away}", "name=again", "--root", other.root)
    assert done.exit_code == 0, done.output
    again = open_run(other, "again")
    assert again.config.task == "fourm" and again.config.masking == run.config.masking and again.layout.names == run.layout.names
    packed = pack(run.layout, *own_sample(run.layout), run.model.config.registers)
    with torch.no_grad():
        assert torch.equal(run.model.nll(packed), again.model.nll(packed))

    assert cli("train", tmp_path / "i.yaml", f"checkpoint={away}", "--push", "me/x", "--root", other.root).exit_code == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    refused = cli("train", media.root / "runs" / "demo" / "config.yaml", "--export", tmp_path / "full", "--root", media.root)
    assert refused.exit_code == 1 and "is there and is no export" in refused.output and (tmp_path / "full" / "thesis.txt").is_file()
    doc = json.loads((away / "config.json").read_text())
    doc["specs"][0]["vocab_size"] += 1
    doc["specs"][0]["levels"] = []
    (away / "config.json").write_text(json.dumps(doc))
    refused = cli("train", tmp_path / "i.yaml", f"checkpoint={away}", "name=b", "--root", other.root)
    assert refused.exit_code == 1 and "tokens are not those this run was trained on" in refused.output


def own_sample(layout):
    g = np.random.default_rng(0)
    vocab = np.array([v for _, _, v in layout.groups])[layout.group_C]
    mask = g.random((3, layout.columns)) < 0.3
    mask[:, layout.sequence_C] = False
    return g.integers(0, vocab, mask.shape), mask, ~mask & ~layout.sequence_C


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as an upload uses; what arrives is kept."""

    kept: dict = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.kept["repo"] = json.loads(body)
            return self.answer({"url": "https://huggingface.co/me/x", "name": "me/x", "id": "me/x"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.kept[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.answer({"success": True, "commitUrl": "https://huggingface.co/me/x/commit/1", "commitOid": "1" * 40, "hookOutput": ""})

    def do_GET(self):
        known = self.path.startswith("/api/models/me/x")
        self.answer({"id": "me/x", "sha": "0" * 40, "siblings": []} if known else {}, 200 if known else 404)

    def answer(self, doc, status=200):
        data = json.dumps(doc).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_an_export_is_pushed_to_the_hub(media, tmp_path, monkeypatch):  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    demo, away = media.root / "runs" / "demo" / "config.yaml", tmp_path / "away"
    args = ("train", demo, "--export", away, "--push", "me/x", "--root", media.root)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = cli(*args)
    assert refused.exit_code == 1 and "'me/x' was not pushed" in refused.output and "hf auth login" in refused.output
    assert (away / "model.safetensors").is_file(), "the export itself is there"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    done = cli(*args)
    server.shutdown()
    assert done.exit_code == 0, done.output
    repo = Hub.kept.pop("repo")
    assert repo["name"] == "x" and repo["organization"] == "me" and (repo.get("private") or repo.get("visibility") == "private")
    files = {str(p.relative_to(away)): p.read_bytes() for p in away.rglob("*") if p.is_file()}
    assert Hub.kept == files and "README.md" in files and "config.json" in files
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in cli(*args).output

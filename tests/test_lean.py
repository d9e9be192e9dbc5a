"""Generation in bf16 and what is held for it: against autocast that casts every weight at every call."""

import numpy as np
import pytest
import torch
from test_caching import CLOSE, build, start

from nano4m_cli.errors import ConfigError
from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.generate.sampler import fill
from nano4m_cli.model.attention import Mask, attend
from nano4m_cli.model.batch import Ragged, pack
from nano4m_cli.model.layers import Linear


def held(model):
    return [m for m in model.modules() if getattr(m, "_held", None) is not None]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_held_changes_nothing_and_is_let_go(layout, sample, dtype):
    model = build(layout)
    ids, _, shown, asked = sample(5)
    batch = pack(layout, ids, shown, asked, 1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        want = model.ask(batch)
        with model.lean():
            assert len(held(model)) == (1 if dtype is None else 1 + sum(isinstance(m, Linear) for m in model.modules()))
            assert all(m._held.dtype == (dtype or torch.float32) for m in held(model))
            got = model.ask(batch)
        assert not held(model)
        with pytest.raises(ZeroDivisionError), model.lean():
            _ = 1 / 0
    assert not held(model)
    for a, b in zip(want, got, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("refresh", [None, 99])
def test_bf16_says_nearly_what_fp32_says(layout, sample, refresh):
    """Greedily most ids are the same; each precision says the same again after the other."""
    model, made, here, cast = build(layout), {}, layout.slice("pic"), []
    model.encoder[0].norm1.register_forward_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    for precision in ("fp32", "bf16", "bf16", "fp32"):
        cast.clear()
        state = start(layout, sample, 24, ["txt", "snd"])
        fill(model, state, "pic", GenerateOptions(steps=1, temperature=0, precision=precision, refresh=refresh))
        assert cast and set(cast) == {precision == "bf16"} and not torch.is_autocast_enabled("cpu")
        assert made.setdefault(precision, state.ids_BC[:, here]).tolist() == state.ids_BC[:, here].tolist(), "as it was before"
    assert (made["fp32"] == made["bf16"]).mean() > 0.8


def test_text_and_chains_go_through_bf16(layout, sample):
    model = build(layout)
    state = start(layout, sample, 4, ["pic"])
    fill(model, state, "txt", GenerateOptions(precision="bf16", text_temperature=1.0))
    fill(model, state, "snd", GenerateOptions(precision="bf16", scheme="ar", draft=2, temperature=1.0))
    spec = layout.specs[layout.names.index("txt")]
    assert ((state.ids_BC == spec.eos) & state.known_BC)[:, layout.slice("txt")].sum() == 4
    assert state.known_BC[:, layout.slice("snd")].all()


def test_a_precision_has_a_name():
    from nano4m_cli.config import build as read

    with pytest.raises(ConfigError, match="precision"):
        read(GenerateOptions, {"precision": "fp8"})


@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 3, 5], [7]])
def test_rows_of_one_length_are_a_batch(lengths):
    """Rows one by one, together where their lengths are equal, against padded ones; queries of others as well."""
    rows, draw = Ragged.of(np.array(lengths)), torch.Generator().manual_seed(0)
    few = Ragged.of(np.full(len(lengths), 2))
    for q_rows in (rows, few):
        mask = Mask(q_rows, rows) if q_rows is few else Mask(rows, rows)
        q, kv = torch.randn(int(q_rows.lengths.sum()), 8, generator=draw), torch.randn(int(rows.lengths.sum()), 16, generator=draw)
        k, v = kv.chunk(2, -1)
        torch.testing.assert_close(attend(q, k, v, 2, mask, "loop"), attend(q, k, v, 2, mask, "padded"), **CLOSE)
    causal = Mask(rows, rows, causal=torch.ones(len(lengths), dtype=torch.bool))
    q = torch.randn(int(rows.lengths.sum()), 8, generator=draw)
    torch.testing.assert_close(attend(q, k, v, 2, causal, "loop"), attend(q, k, v, 2, causal, "padded"), **CLOSE)


def test_the_hidden_layer_in_place_is_the_hidden_layer(layout):
    mlp, x = build(layout).encoder[0].mlp, torch.randn(5, 32)
    with torch.no_grad():
        without = mlp(x)
    torch.testing.assert_close(without, mlp(x), rtol=1e-6, atol=1e-6)

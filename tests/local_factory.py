"""Small weights in the published formats of SpeechTokenizer, WavTokenizer and Cosmos, made from their facts, not by our code.

`seanet`, `vocos` give tensors under the published names; `encode`, `decode`, `vocode` compute with them, plainly, what the
models compute. Codebooks hold what the encoder sends to them, so that codes differ.
"""

import functools
import json
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from codec_factory import place, waves

STRIDES, ENTRIES, BOOKS = (8, 5, 4, 2), 64, 4
LEVELS = (8, 8, 8, 5, 5, 5)


class Draw:
    """Random tensors by name."""

    def __init__(self, seed):
        self.g, self.state = torch.Generator().manual_seed(seed), {}

    def normal(self, name, *shape, scale=1.0):
        self.state[name] = scale * torch.randn(*shape, generator=self.g)

    def linear(self, name, *shape, bias=0.01, out=None):
        self.normal(f"{name}.weight", *shape, scale=math.prod(shape[1:]) ** -0.5)
        self.normal(f"{name}.bias", out or shape[0], scale=bias)

    def normed(self, name, *shape, out=None):
        """A weight-normed convolution: direction and length."""
        self.linear(name, *shape, out=out)
        v = self.state.pop(f"{name}.weight")
        length = v.flatten(1).norm(dim=1)[:, None, None] * (0.8 + 0.4 * torch.rand(len(v), 1, 1, generator=self.g))
        self.state |= {f"{name}.weight_v": 3 * v, f"{name}.weight_g": length}


def seanet(prefix, decoder, filters, dim, ratios, both=False, snake=False, seed=0):
    """Return the tensors of EnCodec's encoder or decoder with these ratios, `both`: recurrent in both directions."""
    d, widest = Draw(seed), filters * 2 ** len(ratios)
    lstm, top = (f"{prefix}.model.{1 if decoder else 3 * len(ratios) + 1}.lstm", 2 * widest if both else widest)

    def conv(at, out, inside, kernel):
        d.normed(f"{prefix}.model.{at}.conv.conv", out, inside, kernel)

    def act(at, channels):
        if snake:
            d.state[f"{prefix}.model.{at}.alpha"] = 0.5 + torch.rand(1, channels, 1, generator=d.g)

    def block(at, width):
        conv(f"{at}.block.1", width // 2, width, 3)
        conv(f"{at}.block.3", width, width // 2, 1)
        conv(f"{at}.shortcut", width, width, 1)
        act(f"{at}.block.0", width)
        act(f"{at}.block.2", width // 2)

    for layer in range(2):
        for end in ("", "_reverse") if both else ("",):
            inside = 2 * widest if both and layer else widest
            for kind, shape in {"weight_ih": (4 * widest, inside), "weight_hh": (4 * widest, widest),
                                "bias_ih": (4 * widest,), "bias_hh": (4 * widest,)}.items():
                d.normal(f"{lstm}.{kind}_l{layer}{end}", *shape, scale=widest**-0.5)
    conv(0, *((widest, dim) if decoder else (filters, 1)), 7)
    for i, r in enumerate(ratios if decoder else reversed(ratios)):
        if decoder:
            width = widest // 2**i
            act(3 * i + 2, width)
            d.normed(f"{prefix}.model.{3 * i + 3}.convtr.convtr", width, width // 2, 2 * r, out=width // 2)
            block(3 * i + 4, width // 2)
        else:
            width = filters * 2**i
            block(3 * i + 1, width)
            act(3 * i + 2, width)
            conv(3 * i + 3, 2 * width, width, 2 * r)
    last = 3 * len(ratios) + 2
    act(last, filters if decoder else top)
    conv(last + 1, *((1, filters) if decoder else (dim, top)), 7)
    return d.state


# -- what they compute, plainly ---------------------------------------------------------------------------------------


def weight(s, name):
    v = s[f"{name}.weight_v"]
    return s[f"{name}.weight_g"] * v / v.flatten(1).norm(dim=1)[:, None, None]


def conv(s, name, x, stride=1):
    w = weight(s, f"{name}.conv.conv")
    total = w.shape[-1] - stride
    more = -(x.shape[-1] - w.shape[-1] + total) % stride  # so that the last window is full
    x = F.pad(x, (total - total // 2, total // 2 + more), mode="reflect")
    return F.conv1d(x, w, s[f"{name}.conv.conv.bias"], stride)


def act(s, name, x):
    a = s.get(f"{name}.alpha")
    return F.elu(x) if a is None else x + torch.sin(a * x) ** 2 / a


def block(s, name, x):
    y = conv(s, f"{name}.block.1", act(s, f"{name}.block.0", x))
    return conv(s, f"{name}.shortcut", x) + conv(s, f"{name}.block.3", act(s, f"{name}.block.2", y))


def direction(s, name, x_TC, end, layer):
    h = c = torch.zeros(s[f"{name}.weight_hh_l{layer}{end}"].shape[1])
    out = []
    for x in x_TC.flip(0) if end else x_TC:
        part = lambda k, v: s[f"{name}.weight_{k}_l{layer}{end}"] @ v + s[f"{name}.bias_{k}_l{layer}{end}"]  # noqa: E731
        gates = part("ih", x) + part("hh", h)
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out[::-1] if end else out)


def recurrent(s, name, x_1CT):
    ends = ["", "_reverse"] if f"{name}.weight_ih_l0_reverse" in s else [""]
    x = y = x_1CT[0].T
    for layer in range(2):
        y = torch.cat([direction(s, name, y, end, layer) for end in ends], 1)
    return (y + torch.cat([x] * len(ends), 1)).T[None]


def encode(s, prefix, ratios, wave_N):
    x, last = conv(s, f"{prefix}.model.0", wave_N[None, None]), 3 * len(ratios) + 2
    for i, r in enumerate(reversed(ratios)):
        x = block(s, f"{prefix}.model.{3 * i + 1}", x)
        x = conv(s, f"{prefix}.model.{3 * i + 3}", act(s, f"{prefix}.model.{3 * i + 2}", x), r)
    x = recurrent(s, f"{prefix}.model.{last - 1}.lstm", x)
    return conv(s, f"{prefix}.model.{last + 1}", act(s, f"{prefix}.model.{last}", x))[0]


def decode(s, prefix, ratios, x_CT):
    x, last = conv(s, f"{prefix}.model.0", x_CT[None]), 3 * len(ratios) + 2
    x = recurrent(s, f"{prefix}.model.1.lstm", x)
    for i, r in enumerate(ratios):
        name = f"{prefix}.model.{3 * i + 3}.convtr.convtr"
        x = F.conv_transpose1d(act(s, f"{prefix}.model.{3 * i + 2}", x), weight(s, name), s[f"{name}.bias"], r)
        x = block(s, f"{prefix}.model.{3 * i + 4}", x[..., r - r // 2 : x.shape[-1] - r // 2])
    return conv(s, f"{prefix}.model.{last + 1}", act(s, f"{prefix}.model.{last}", x))[0, 0]


def nearest(books_QKD, z_DT):
    """Return codes (Q, T) by looking at every entry for every frame of what the books before left."""
    codes = []
    for t in range(z_DT.shape[1]):
        rest, row = z_DT[:, t].double(), []
        for book in books_QKD.double():
            row.append(min(range(len(book)), key=lambda k: float(((rest - book[k]) ** 2).sum())))
            rest = rest - book[row[-1]]
        codes.append(row)
    return torch.tensor(codes).T


def books(prefix, z_TD, count, seed=0):
    """Return the codebooks' tensors: entries are what is left of the encoder's vectors, with noise."""
    g, state = torch.Generator().manual_seed(seed), {}
    for q in range(count):
        table = z_TD[torch.randint(len(z_TD), (ENTRIES,), generator=g)]
        table = table + 0.5 * z_TD.std(0) * torch.randn(table.shape, generator=g)
        name = f"{prefix}.vq.layers.{q}._codebook"
        state |= {f"{name}.embed": table, f"{name}.embed_avg": table * 2, f"{name}.cluster_size": torch.ones(ENTRIES),
                  f"{name}.inited": torch.ones(1)}
        z_TD = z_TD - table[torch.cdist(z_TD, table).argmin(1)]
    return state


def louder(state, name, by):
    state[f"{name}.weight_g"] *= by


# -- files ------------------------------------------------------------------------------------------------------------

SPEECH = {
    "n_filters": 2, "strides": list(STRIDES), "dimension": 16, "semantic_dimension": 12, "bidirectional": True,
    "dilation_base": 2, "residual_kernel_size": 3, "n_residual_layers": 1, "lstm_layers": 2, "activation": "ELU",
    "codebook_size": ENTRIES, "n_q": BOOKS, "sample_rate": 16000, "segment_size": 48000, "learning_rate": 1e-4,
}


@functools.cache
def speech_state(activation="ELU"):
    snake = activation == "Snake"
    state = seanet("encoder", False, 2, 16, STRIDES, both=True, snake=snake)
    sent = torch.cat([encode(state, "encoder", STRIDES, w[0]) for w in waves(4, 8000)], 1)
    state |= books("quantizer", sent.T, BOOKS) | seanet("decoder", True, 2, 16, STRIDES, snake=snake, seed=1)
    made = decode(state, "decoder", STRIDES, sent)
    louder(state, "decoder.model.15.conv.conv", 0.1 / made.std())
    return state | {"transform.weight": torch.ones(12, 16), "transform.bias": torch.zeros(12)}


@functools.cache
def speechtokenizer_small(activation="ELU"):
    """Return the folder of a small SpeechTokenizer: 50 frames/s at 16 kHz, 4 codebooks of 64."""
    folder = place() / f"speechtokenizer_{activation}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SPEECH, "activation": activation}))
    torch.save(speech_state(activation), folder / ("SpeechTokenizer.pt" if activation == "ELU" else "ckpt.dev"))
    return str(folder)


FRAMES = {75: ([8, 5, 4, 2], 320), 40: ([6, 5, 5, 4], 600)}  # per second: (ratios, hop)
FEATURES, WIDTH, HIDDEN, LAYERS, BANDWIDTHS = 16, 64, 48, 2, 4


def wav_config(rate):
    ratios, hop = FRAMES[rate]
    part = lambda path, **init: {"class_path": path, "init_args": init}  # noqa: E731
    return {
        "seed_everything": 3407,
        "data": part("decoder.dataset.VocosDataModule", train_params={"sampling_rate": 24000, "num_samples": 72000}),
        "model": part(
            "decoder.experiment.WavTokenizer", sample_rate=24000, initial_learning_rate="2e-4", mel_loss_coeff=45, resume=False,
            feature_extractor=part(
                "decoder.feature_extractors.EncodecFeatures", encodec_model="encodec_24khz", bandwidths=[6.6] * 4,
                train_codebooks=True, num_quantizers=1, dowmsamples=ratios, vq_bins=ENTRIES, vq_kmeans=200,
            ),
            backbone=part(
                "decoder.models.VocosBackbone", input_channels=FEATURES, dim=WIDTH, intermediate_dim=HIDDEN, num_layers=LAYERS,
                adanorm_num_embeddings=BANDWIDTHS,
            ),
            head=part("decoder.heads.ISTFTHead", dim=WIDTH, n_fft=4 * hop, hop_length=hop, padding="same"),
        ),
        "trainer": {"max_steps": 20_000_000},
    }


def vocos(n_fft):
    d = Draw(2)

    def norm(name, affine="weight", shift="bias", shape=(WIDTH,)):
        d.state[f"{name}.{affine}"] = 1 + 0.1 * torch.randn(*shape, generator=d.g)
        d.normal(f"{name}.{shift}", *shape, scale=0.1)

    d.linear("backbone.embed", WIDTH, FEATURES, 7)
    for i in (0, 1, 3, 4):
        for n in (1, 2):
            norm(f"backbone.pos_net.{i}.norm{n}")
            d.linear(f"backbone.pos_net.{i}.conv{n}", WIDTH, WIDTH, 3)
    for name in ("q", "k", "v", "proj_out"):
        d.linear(f"backbone.pos_net.2.{name}", WIDTH, WIDTH, 1)
    for name in ("pos_net.2.norm", "pos_net.5", "final_layer_norm"):
        norm(f"backbone.{name}")
    norm("backbone.norm", "scale.weight", "shift.weight", (BANDWIDTHS, WIDTH))
    for i in range(LAYERS):
        name = f"backbone.convnext.{i}"
        d.linear(f"{name}.dwconv", WIDTH, 1, 7)
        norm(f"{name}.norm", "scale.weight", "shift.weight", (BANDWIDTHS, WIDTH))
        d.linear(f"{name}.pwconv1", HIDDEN, WIDTH)
        d.linear(f"{name}.pwconv2", WIDTH, HIDDEN)
        d.normal(f"{name}.gamma", WIDTH)
    d.linear("head.out", n_fft + 2, WIDTH, bias=0.5)
    d.state["head.istft.window"] = torch.hann_window(n_fft)
    return d.state


def vocode(s, x_CT, hop):
    """Return (spectrum (F, T), window) of features, with the first row of each bandwidth table."""

    def centred(y, dim):
        return (y - y.mean(dim, keepdim=True)) / (y.var(dim, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def groups(name, y_CT):
        y = centred(y_CT.reshape(32, -1), 1).reshape(y_CT.shape)
        return y * s[f"{name}.weight"][:, None] + s[f"{name}.bias"][:, None]

    def c(name, y_CT, **more):
        w = s[f"{name}.weight"]
        return F.conv1d(y_CT[None], w, s[f"{name}.bias"], padding=w.shape[-1] // 2, **more)[0]

    def ada(name, y_CT):
        return centred(y_CT, 0) * s[f"{name}.scale.weight"][0][:, None] + s[f"{name}.shift.weight"][0][:, None]

    swish = lambda y: y * y.sigmoid()  # noqa: E731
    x = c("backbone.embed", x_CT)
    for i in range(5):
        name = f"backbone.pos_net.{i}"
        if i != 2:
            y = c(f"{name}.conv1", swish(groups(f"{name}.norm1", x)))
            x = x + c(f"{name}.conv2", swish(groups(f"{name}.norm2", y)))
            continue
        q, k, v = (c(f"{name}.{n}", groups(f"{name}.norm", x)) for n in "qkv")
        x = x + c(f"{name}.proj_out", v @ (q.T @ k / len(q) ** 0.5).softmax(1).T)
    x = ada("backbone.norm", groups("backbone.pos_net.5", x))
    for i in range(LAYERS):
        name = f"backbone.convnext.{i}"
        y = ada(f"{name}.norm", c(f"{name}.dwconv", x, groups=WIDTH))
        y = F.gelu(s[f"{name}.pwconv1.weight"] @ y + s[f"{name}.pwconv1.bias"][:, None])
        x = x + s[f"{name}.gamma"][:, None] * (s[f"{name}.pwconv2.weight"] @ y + s[f"{name}.pwconv2.bias"][:, None])
    x = centred(x, 0) * s["backbone.final_layer_norm.weight"][:, None] + s["backbone.final_layer_norm.bias"][:, None]
    m, p = (s["head.out.weight"] @ x + s["head.out.bias"][:, None]).chunk(2)
    return m.exp().clip(max=100) * (p.cos() + 1j * p.sin())


@functools.cache
def wav_state(rate=75):
    ratios, hop = FRAMES[rate]
    name = "feature_extractor.encodec"
    state = seanet(f"{name}.encoder", False, 32, FEATURES, ratios)
    sent = torch.cat([encode(state, f"{name}.encoder", ratios, w[0]) for w in waves(4, 12_000)], 1)
    return state | books(f"{name}.quantizer", sent.T, 1) | vocos(4 * hop)


@functools.cache
def wavtokenizer_small(rate=75):
    """Return the folder of a small WavTokenizer as its training saves it: 75 or 40 frames/s at 24 kHz, 64 entries."""
    folder = place() / f"wavtokenizer_{rate}"
    folder.mkdir()
    (folder / f"wavtokenizer_smalldata_frame{rate}_3s_nq1_code4096.yaml").write_text(yaml.safe_dump(wav_config(rate)))
    left = {f"{p}.x.weight": torch.ones(3) for p in (
        "multiperioddisc.discriminators.0", "multiresddisc.discriminators.0", "dac.discriminators.0",
        "dacdiscriminator.discriminator", "melspec_loss.mel_spec", "feature_extractor.encodec.decoder.model.0")}
    torch.save({
        "epoch": 3, "global_step": 10, "pytorch-lightning_version": "1.8.6", "state_dict": wav_state(rate) | left,
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(5.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}],
        "hyper_parameters": {"sample_rate": 24000, "resume": False},
    }, folder / f"WavTokenizer_small_{FRAMES[rate][1]}_24k_4096.ckpt")
    return str(folder)


# -- Cosmos: modules with the published interface ---------------------------------------------------------------------


class Encode(torch.nn.Module):
    """(B, 3, H, W) or (B, 3, T, H, W) in [-1, 1] -> (indices int32, codes, a loss of no use): means of patches, then FSQ."""

    def __init__(self, space: int, time: int):
        super().__init__()
        self.space, self.time = space, time
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(3 * torch.randn(6, 3, generator=g))
        self.register_buffer("levels", torch.tensor(LEVELS), persistent=False)
        self.register_buffer("basis", torch.tensor([1, *np.cumprod(LEVELS[:-1]).tolist()]), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if x.dim() == 5:
            first = x[:, :, :1].repeat(1, 1, self.time - 1, 1, 1)
            x = torch.nn.functional.avg_pool3d(torch.cat([first, x], 2), (self.time, self.space, self.space))
        else:
            x = torch.nn.functional.avg_pool2d(x, self.space)
        z = torch.matmul(x.movedim(1, -1), self.weight.t()).float()
        half = (self.levels - 1) * 1.001 / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        digits = torch.round(torch.tanh(z + torch.atanh(offset / half)) * half - offset)
        indices = ((digits + self.levels // 2) * self.basis).sum(-1).to(torch.int32)
        return indices, (digits / (self.levels // 2)).movedim(-1, 1), torch.zeros(1)


class Decode(torch.nn.Module):
    """(B, h, w) or (B, t, h, w) of indices -> (B, 3, H, W) or (B, 3, T, H, W)."""

    def __init__(self, space: int, time: int):
        super().__init__()
        self.space, self.time = space, time
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.linalg.pinv(3 * torch.randn(6, 3, generator=g)))
        self.register_buffer("levels", torch.tensor(LEVELS), persistent=False)
        self.register_buffer("basis", torch.tensor([1, *np.cumprod(LEVELS[:-1]).tolist()]), persistent=False)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        half = self.levels // 2
        codes = (indices.unsqueeze(-1) // self.basis % self.levels - half) / half
        x = torch.matmul(torch.atanh(codes * 0.99).to(self.weight.dtype), self.weight.t()).movedim(-1, 1)
        x = x.repeat_interleave(self.space, -1).repeat_interleave(self.space, -2)
        return x.repeat_interleave(self.time, 2)[:, :, self.time - 1 :] if x.dim() == 5 else x


def cosmos_small(space=8, time=1, half=False):
    """Return the folder of programs with the interface of DI8x8 (time 1), DV4x8x8 and so on; `half`: in bfloat16."""
    return programs(space, time, half)


@functools.cache
def programs(space, time, half):
    folder = place() / f"cosmos_{time}_{space}_{half}"
    folder.mkdir()
    for name, cls in (("encoder", Encode), ("decoder", Decode)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            program = torch.jit.script(cls(space, time).to(torch.bfloat16 if half else torch.float32))
            torch.jit.save(program, str(folder / f"{name}.jit"))
    return str(folder)


LOCAL = {"speechtokenizer": speechtokenizer_small, "wavtokenizer": wavtokenizer_small, "cosmos": cosmos_small}

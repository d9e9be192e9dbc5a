"""Small weights in the true published formats, made when first asked for: codecs of every kind and a text vocabulary.

Fresh codebooks are all zero or far from what a random encoder gives, so that every code would be the same; and what a
random decoder makes of codes is tiny beside its biases. So entries are taken from what the encoder sends to each codebook,
biases are zero, and the decoder's last layer is scaled: codes differ, and so do the sounds they stand for.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tokenizers as hf
import torch

from nano4m_cli.media_compat import ensure_torchaudio

ENTRIES = 64  # of the small models' codebooks
WORDS = ["a red cube, on the left", "a blue ball, on the right", "two green cubes", "caf\xe9 \u4f60\u597d", "it's  loud!"]


@functools.cache
def place() -> Path:
    folder = tempfile.mkdtemp(prefix="nano4m-weights-")
    atexit.register(shutil.rmtree, folder, True)
    return Path(folder)


def waves(n: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Return (n, 1, samples): gliding tones and bursts of noise, of many levels."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 24_000
    out = []
    for _ in range(n):
        tone = np.sin(2 * np.pi * (rng.uniform(100, 2000) * t + rng.uniform(-800, 2000) * t**2))
        noise = rng.normal(size=samples) * (np.sin(2 * np.pi * rng.uniform(1, 6) * t) > 0.3)
        out.append(0.4 * tone * np.exp(-t * rng.uniform(0, 3)) + 0.2 * noise)
    return torch.from_numpy(np.stack(out)[:, None]).float()


def enliven(model) -> None:
    """Make codes depend on sounds and sounds on codes: see the module's docstring."""
    kind, convs = model.config.model_type, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)
    for layer in model.modules():
        if isinstance(layer, convs) and layer.bias is not None:
            layer.bias.zero_()
    method = "decode_latents" if kind == "dac" else "quantize"
    books = [m for m in model.modules() if hasattr(m, method)]
    g = torch.Generator().manual_seed(0)
    for book in books:

        def choose(x, book=book, original=getattr(book, method)):
            seen = x.permute(0, 2, 1).flatten(0, 1) if kind == "dac" else x  # (vectors, width)
            table = book.codebook.weight if kind == "dac" else book.embed_sum if kind == "mimi" else book.embed
            some = seen[torch.randint(len(seen), (len(table),), generator=g)]
            # So much noise that what is left for the next book is not much smaller, as it is in a fitted codec.
            table.copy_(some + 0.8 * seen.std(0) * torch.randn(some.shape, generator=g))
            if kind == "encodec":
                book.embed_avg.copy_(table)
            if kind == "mimi":
                book._embed = None  # computed from embed_sum when first needed
            return original(x)

        setattr(book, method, choose)
    most = {"bandwidth": max(model.config.target_bandwidths)} if kind == "encodec" else {}
    codes = model.encode(waves(4, 12_000), **most).audio_codes
    for book in books:
        delattr(book, method)
    made = (model.decode(codes, [None]) if kind == "encodec" else model.decode(audio_codes=codes)).audio_values
    last = [m for m in model.decoder.modules() if isinstance(m, convs)][-1]
    scale = last.parametrizations.weight.original0 if kind == "encodec" else last.weight
    scale.mul_(0.1 / made.std())


def _saved(name: str, cls, config) -> str:
    from nano4m_cli.tokenizers._pretrained import quiet_transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).eval()
    with torch.no_grad():
        enliven(model)
    with quiet_transformers():
        model.save_pretrained(place() / name)
    return str(place() / name)


@functools.cache
def encodec_small() -> str:
    """Return the folder of a small EnCodec: 75 frames/s, up to 6 kbit/s of codebooks with 1024 entries."""
    ensure_torchaudio()
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1, target_bandwidths=[1.5, 3.0, 6.0])
    return _saved("encodec_small", EncodecModel, config)


@functools.cache
def encodec_full() -> str:
    """Return the folder of an EnCodec of the published size, whose weights the `encodec` package can hold too."""
    ensure_torchaudio()
    from transformers import EncodecConfig, EncodecModel

    return _saved("encodec_full", EncodecModel, EncodecConfig())


@functools.cache
def encodec_file() -> str:
    """Return the `encodec` package's checkpoint with the weights of `encodec_full`, under its published names."""
    from safetensors.torch import load_file

    state = {package_name(k): v for k, v in load_file(encodec_full() + "/model.safetensors").items()}
    path = place() / "encodec_24khz.th"
    torch.save(state, path)
    return str(path)


def package_name(name: str) -> str:
    """Return the `encodec` package's name of a tensor that transformers names `name`."""
    if name.startswith("quantizer."):
        return name.replace("quantizer.layers", "quantizer.vq.layers").replace(".codebook.", "._codebook.")
    part, _, rest = name.partition(".layers.")
    rest = rest.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")
    number = int(rest.split(".")[0])
    if ".conv." in rest:  # a transposed one where the decoder goes up in rate
        up = part == "decoder" and number in (3, 6, 9, 12)
        rest = rest.replace(".conv.", ".convtr.convtr." if up else ".conv.conv.")
    return f"{part}.model.{rest}"


@functools.cache
def mimi_small() -> str:
    """Return the folder of a small Mimi: 12.5 frames/s, 4 codebooks of 64, one of them semantic."""
    ensure_torchaudio()
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(
        hidden_size=32, num_filters=4, codebook_size=ENTRIES, codebook_dim=16, vector_quantization_hidden_dimension=16,
        num_quantizers=4, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
        upsample_groups=32, frame_rate=12.5,
    )
    return _saved("mimi_small", MimiModel, config)


@functools.cache
def dac_small(rate: int = 24_000) -> str:
    """Return the folder of a small DAC at 16, 24 or 44.1 kHz: 3 codebooks of 64."""
    ensure_torchaudio()
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=64, downsampling_ratios=[2, 4, 8, 8] if rate == 44_100 else [2, 4, 5, 8],
        n_codebooks=3, codebook_size=ENTRIES, codebook_dim=4, sampling_rate=rate,
    )
    return _saved(f"dac_small_{rate}", DacModel, config)


@functools.cache
def text_small(end: str | None = "<|endoftext|>") -> str:
    """Return the folder of a byte-level BPE as GPT-2's (tokenizer.json), with or without an end mark."""
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    model.train_from_iterator(WORDS * 3, trainer)
    if end is not None:
        model.add_special_tokens([end])
    folder = place() / f"text_{'none' if end is None else len(end)}"
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    return str(folder)


WEIGHTS = {"encodec": encodec_small, "mimi": mimi_small, "dac": dac_small, "hf_text": text_small}

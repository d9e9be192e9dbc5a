"""The round trip of a tokenizer: raw -> ids -> raw, in figures and as a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.data.loader import read_specs
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sheet import write_sheet
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.probes._images import absrel, angle, psnr, ssim
from nano4m_cli.registry import MODALITIES
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import Tokenizer, codebook_use, open_tokenizer
from nano4m_cli.tokenizers.fsq_mel import Tokenizer as Mel

WAVES = 100  # clips whose phase is reconstructed, the slow part
SHOWN, SLOW = 12, 6  # pictures on a contact sheet; values that are decoded at all where each takes seconds


def fidelity(tokenizer: Tokenizer, raws: list[Any], ids: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return per-sample figures (N,) of decoded ids against the raw values, by their kind and form.

    psnr (dB), ssim for 8-bit pictures and videos; absrel for metres; angle (degrees) for vectors; mel (mean absolute difference of
    log-mel, nats) for sound, of the codes alone (mel, where they are codes of log-mel) and, for the first `WAVES`, of the
    decoded sound (mel_wave); equal for text. Where decoding is slow, N is `SLOW` at most.
    """
    if tokenizer.slow:
        raws, ids = raws[:SLOW], ids[:SLOW]
    kind = MODALITIES.get(tokenizer.modality).kind
    truth = [tokenizer.comparable(r) for r in raws]
    made = tokenizer.decode(ids[:WAVES] if kind == "audio" else ids)
    if kind == "image" and truth[0].dtype != np.uint8:
        return {"absrel": absrel(made, truth)} if truth[0].ndim == 2 else {"angle": angle(made, truth)}
    if kind in ("image", "video"):
        return {"psnr": psnr(made, truth), "ssim": ssim(made, truth)}
    if kind == "audio":
        out = {}
        if hasattr(tokenizer, "log_mel"):
            real = tokenizer.log_mel(np.stack(truth))
            out["mel"] = (tokenizer.decode_mel(ids) - real).abs().mean((1, 2)).numpy()
            out["mel_wave"] = (tokenizer.log_mel(np.stack(made)) - real[:WAVES]).abs().mean((1, 2)).numpy()
        else:  # a codec: by the bands that fsq_mel has by default, so that the figures compare
            bands = Mel(tokenizer.modality, Mel.Options(), tokenizer.size).log_mel
            pairs = zip(made, truth[:WAVES], strict=True)
            out["mel_wave"] = np.array([float((bands(m[None]) - bands(t[None])).abs().mean()) for m, t in pairs])
        return out
    return {"equal": np.array([float(a == b) for a, b in zip(made, truth, strict=True)])}


def codebook(ids: list[np.ndarray], spec: TokenSpec) -> dict[str, float]:
    """Return the share of codes used and the perplexity of their distribution, each the mean over the codebooks."""
    return codebook_use(np.concatenate(ids).reshape(-1, spec.codebooks), spec.vocab_size)  # slot = t * Q + q


def report(dataset: DatasetFolder, modality: str, split: str = "val", limit: int = 200) -> dict[str, Any]:
    """Return {"figures": {name: mean}, "sheet": path or None} of a tokenised modality; the sheet lies beside spec.json."""
    if not dataset.info().splits.get(split):
        split = next(s for s, n in dataset.info().splits.items() if n)
    tokenizer, kind = open_tokenizer(dataset.tokenizer(modality)), MODALITIES.get(modality)
    raw = Split(dataset.raw(split))
    n = min(limit, len(raw))
    raws = [kind.from_bytes(raw.read(i, kind.ext), kind.ext) for i in range(n)]
    ids = tokenizer.encode(raws)
    figures = {k: float(v.mean()) for k, v in fidelity(tokenizer, raws, ids).items()}
    figures |= codebook(ids, read_specs(dataset, [modality])[0])
    shown = SLOW if tokenizer.slow else SHOWN
    made = tokenizer.decode(ids[:shown])
    rows = [[kind.show(tokenizer.comparable(r)), kind.show(m)] for r, m in zip(raws[:shown], made, strict=True)]
    sheet: Path = write_sheet(dataset.tokens(modality) / "roundtrip.png", ["raw", "decoded"] * 3,
                              [sum(rows[i : i + 3], []) for i in range(0, len(rows), 3)])
    return {"figures": figures, "sheet": str(sheet), "split": split, "n": n}

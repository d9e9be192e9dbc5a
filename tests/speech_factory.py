"""Small weights in the published formats of models that hear: Whisper and wav2vec 2.0, made when first asked for."""

import functools
import json
from pathlib import Path

import torch
from codec_factory import place
from sight_factory import enliven

from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.tokenizers._pretrained import quiet_transformers

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero"]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
           "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
TIMES = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVKXJQZ'"]  # of facebook/wav2vec2-base-960h


@functools.cache
def whisper_small(multilingual: bool = True) -> str:
    """Return the folder of a small Whisper: byte-level words, special ids behind them, times last, as published."""
    ensure_torchaudio()
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    plain = ["!", *[c for c in "abcdefghijklmnopqrstuvwxyz"], "\u0120"] + [f"\u0120{w}" for w in WORDS]
    vocabulary = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(plain)}, []))
    vocabulary.pre_tokenizer, vocabulary.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    vocabulary.add_special_tokens([tokenizers.AddedToken(s, special=True) for s in SPECIAL])
    vocabulary.add_tokens([tokenizers.AddedToken(s, special=False) for s in TIMES])
    ids = {s: vocabulary.token_to_id(s) for s in [*SPECIAL, TIMES[0]]}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config = WhisperConfig(
        vocab_size=vocabulary.get_vocab_size(), num_mel_bins=80, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=24,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start, suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    enliven(model)
    with torch.no_grad():  # what is heard must weigh more than what was written before, or all sounds are alike
        for name, value in model.named_parameters():
            value.mul_(3.0 if "encoder_attn" in name and name.endswith("weight") else 1.0)
        model.model.decoder.embed_positions.weight.mul_(0.3)
        words = model.model.decoder.embed_tokens.weight
        words.copy_(torch.nn.functional.normalize(words, dim=1))
    folder = place() / f"whisper_{multilingual}"
    with quiet_transformers():
        model.save_pretrained(folder)
    never = sorted(vocabulary.token_to_id(s) for s in [*SPECIAL[1:], *TIMES])  # random weights would say hardly anything else
    generation = {
        "_from_model_config": False, "alignment_heads": [[0, 0]], "begin_suppress_tokens": [end], "bos_token_id": end,
        "decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "max_length": 16,
        "max_initial_timestamp_index": 50, "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"], "is_multilingual": multilingual, "return_timestamps": False,
        "suppress_tokens": never,
    }
    if multilingual:
        generation |= {"lang_to_id": {s: ids[s] for s in ("<|en|>", "<|de|>")},
                       "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    vocabulary.save(str(folder / "tokenizer.json"))
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return str(folder)


@functools.cache
def wav2vec_small(published: bool = True) -> str:
    """Return the folder of a small wav2vec 2.0 with letters; published: as the hub has them, with the older names of its
    normed convolution and without what only training needs."""
    ensure_torchaudio()
    from safetensors.torch import load_file, save_file
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=len(LETTERS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config).eval()
    enliven(model)
    folder = place() / f"wav2vec_{published}"
    with quiet_transformers():
        model.save_pretrained(folder)
    path = Path(folder, "model.safetensors")
    if published:
        older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        tensors = {k: v for k, v in load_file(path).items() if not k.endswith("masked_spec_embed")}
        for new, old in older.items():
            tensors = {k.replace(new, old): v for k, v in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    Path(folder, "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(LETTERS)}))
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    return str(folder)

"""Which tensors of a course or apple checkpoint become which of ours: sizes follow the tensors, the rest what the file says."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nano4m_cli.config import build
from nano4m_cli.data.loader import read_specs
from nano4m_cli.data.sources._tokens_layouts import modality_of
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import ConfigError, DataError, WeightsError, did_you_mean
from nano4m_cli.masking._mixture import MaskingConfig
from nano4m_cli.model.apple4m import Apple4M, AppleConfig
from nano4m_cli.model.base import TokenModel, TransformerConfig
from nano4m_cli.model.course4m import Course4M, CourseConfig
from nano4m_cli.spec import Layout
from nano4m_cli.train._foreign_file import Account, ForeignFile
from nano4m_cli.train.config import ImportRun

# The same layers under the names that projects of the course gave them.
ALIASES = {
    r"^module\.": "", r"\.(qkv_proj|QKV_layer)\.": ".qkv.", r"\.cross_attn\.q_proj\.": ".cross_attn.q.",
    r"\.cross_attn\.kv_proj\.": ".cross_attn.kv.", r"\.mlp\.l1\.": ".mlp.fc1.", r"\.mlp\.(l2|fc3)\.": ".mlp.fc2.",
}  # fmt: skip
COURSE_NAMES = {
    "embed": "enc_tok_emb.weight", "position": "pos_emb", "enc_modality": "enc_mod_emb.weight", "context": "dec_context_proj",
    "dec_modality": "dec_mod_emb.weight", "head.table": "to_logits.weight", "head.bias": "to_logits.bias",
}  # fmt: skip
COURSE_SAYS = {
    "_target_", "modalities", "vocab_sizes", "max_seq_lens", "dim", "enc_depth", "dec_depth", "head_dim", "mlp_ratio", "use_bias",
    "padding_idx", "init_std", "per_modality_loss_avg",
}  # fmt: skip
APPLE_NAMES = {"enc_norm": "encoder_norm", "dec_norm": "decoder_norm", "context": "decoder_proj_context"}
APPLE_SAYS = {
    "domains_in", "domains_out", "dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio", "qkv_bias", "proj_bias",
    "mlp_bias", "norm_bias", "act_layer", "gated_mlp", "qk_norm", "image_size", "patch_size", "share_modality_embeddings",
    "drop_path_rate_encoder", "drop_path_rate_decoder", "shared_drop_path", "decoder_causal_mask", "decoder_sep_mask",
    "num_register_tokens", "use_act_checkpoint",
}  # fmt: skip
NORM_BIAS = re.compile(r"norm\w*\.bias$")


def told_by(file: ForeignFile, settings: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return what the file says of its model, `settings` put over it; what is not known may change what it computes."""
    told = {k: v for k, v in {**file.told, **settings}.items() if v is not None}
    strange = [k for k in told if k not in known and not k.endswith("_read_key")]
    if strange:
        hint = f"its code must be known to say what that means; if it changes nothing: settings.{strange[0]}=null"
        raise WeightsError(f"{file.path} sets '{strange[0]}' to {str(told[strange[0]])[:60]}, which is not known here", hint)
    return told


def name_modalities(theirs: list[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Return our name for each of theirs; two of the same name are a ConfigError."""
    for name in rename:
        if name not in theirs:
            raise ConfigError(f"rename names '{name}', which the checkpoint does not have", f"it has {', '.join(theirs)}")
    out: dict[str, str] = {}
    for name in theirs:
        ours = rename.get(name, modality_of(name))
        if ours in out.values():
            raise ConfigError(
                f"'{next(t for t, o in out.items() if o == ours)}' and '{name}' of the checkpoint would both be '{ours}'",
                f"name one of them: 'rename={{{name}: NAME}}'",
            )
        out[name] = ours
    return out


def _common(account: Account, block: str) -> dict[str, Any]:
    """Return the options of the blocks, as the tensors show them. block: how the first one's names begin."""
    norms = [n for n in account.names if NORM_BIAS.search(n)]
    return {
        "qkv_bias": f"{block}attn.qkv.bias" in account, "mlp_bias": f"{block}mlp.fc1.bias" in account,
        "norm_bias": any(bool(account.file.tensors[account.names[n]].any()) for n in norms),
        "qk_norm": f"{block}attn.q_norm.weight" in account,
    }  # fmt: skip


def _layers(account: Account, pattern: str) -> int:
    return 1 + max((int(m[1]) for n in account.names if (m := re.match(pattern, n))), default=-1)


def _sized(account: Account, where: tuple[str, str], d: int) -> str:
    """Return the size; a trunk without layers is a WeightsError."""
    layers = [_layers(account, rf"{w}(\d+)\.") for w in where]
    for n, w in zip(layers, where, strict=True):
        if not n:
            raise WeightsError(f"{account.file.path} has no layers '{w}0...'")
    return f"d{layers[0]}-{layers[1]}w{d}"


class Foreign(ABC):
    """A checkpoint that is understood: `modalities` by our names, in its order; `convert` it for those of a layout.

    names: ours by theirs. sizes: ids and slots of each modality there. masking, loss_weights: of the run it becomes.
    """

    task: str
    names: dict[str, str]
    sizes: dict[str, tuple[int, int]]
    account: Account
    config: TransformerConfig
    model: type[TokenModel]
    masking: MaskingConfig
    loss_weights: dict[str, float]

    @property
    def modalities(self) -> list[str]:
        return list(self.names.values())

    def layout(self, dataset: DatasetFolder, chosen: list[str]) -> Layout:
        """Return the layout of the modalities to be used: those that the data set has, unless some are chosen."""
        tokenised, known = dataset.tokenised(), self.modalities
        for name in chosen:
            if name not in known:
                raise ConfigError(f"data.modalities: the checkpoint has no '{name}'", did_you_mean(name, known))
        chosen = chosen or [m for m in known if m in tokenised]
        if not chosen:
            raise DataError(
                f"data set '{dataset.name}' and the checkpoint share no modality: {', '.join(tokenised) or 'none'} are tokenised, "
                f"the checkpoint has {', '.join(known)}", "name them alike: 'rename={THEIRS: OURS}'",
            )
        return Layout(read_specs(dataset, chosen))

    @abstractmethod
    def convert(self, layout: Layout) -> dict[str, Tensor]:
        """Return the state of our model over the layout; tensors that are missing or unknown are a WeightsError."""

    def _form(self, layout: Layout) -> TokenModel:
        with torch.device("meta"):  # names and shapes only
            return self.model(self.config, layout)

    def shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in self._form(layout).state_dict().items()}

    def parameters(self, layout: Layout) -> int:
        return sum(p.numel() for p in self._form(layout).parameters())


class _Theirs(Foreign):
    """A checkpoint of another project; its masking is what the config of the import says."""

    config: CourseConfig | AppleConfig

    def _known(self, run: ImportRun) -> None:
        c = self.config
        self.sizes = dict(zip(c.modalities, zip(c.vocab_sizes, c.lengths, strict=True), strict=True))
        self.masking, self.loss_weights = run.masking, run.loss_weights

    def _close(self) -> None:
        if not self.config.norm_bias:
            for name in self.account.names:
                if NORM_BIAS.search(name):
                    self.account.leave(name, "a bias of zeros")
        self.account.close()


class Course(_Theirs):
    task, model = "course4m", Course4M

    def __init__(self, file: ForeignFile, run: ImportRun):
        self.account = a = Account(file, _normal(file.tensors))
        told = told_by(file, run.settings, COURSE_SAYS)
        lists = [told.get(k) for k in ("modalities", "vocab_sizes", "max_seq_lens")]
        if not all(isinstance(x, list) and len(x) == len(lists[0] or []) for x in lists):
            raise WeightsError(
                f"{file.path} does not say its modalities, vocab_sizes and max_seq_lens",
                "say them as its config did: 'settings.modalities=[tok_rgb@196, ...]' and so on",
            )
        theirs, vocab_sizes, lengths = lists
        self.names = name_modalities([str(t) for t in theirs], run.rename)
        rows, d = a.shape("enc_tok_emb.weight")
        places = a.shape("pos_emb")[0]
        if rows != max(vocab_sizes) or places < max(lengths) or a.shape("enc_mod_emb.weight")[0] != len(theirs):
            raise WeightsError(
                f"{file.path}: {rows} ids, {places} positions and {a.shape('enc_mod_emb.weight')[0]} modalities in its tables do "
                f"not go with vocab_sizes {vocab_sizes} and max_seq_lens {lengths}",
                "one table with ids of all modalities from 0 is expected",
            )
        where = ("encoder.blocks.", "decoder.blocks.")
        found = {
            **_common(a, f"{where[0]}0."), "size": _sized(a, where, d), "head_width": told.get("head_dim", 64),
            "proj_bias": f"{where[0]}0.attn.attn_out_proj.bias" in a,
            "mlp_ratio": a.shape(f"{where[0]}0.mlp.fc1.weight")[0] / d, "modalities": self.modalities,
            "vocab_sizes": vocab_sizes, "lengths": lengths, "vocab": rows, "places": places,
            "context_bias": "dec_context_proj.bias" in a, "logits_bias": "to_logits.bias" in a,
        }  # fmt: skip
        self.config = build(CourseConfig, {**found, **run.model}, "model")
        self._known(run)

    def convert(self, layout: Layout) -> dict[str, Tensor]:
        state = {k: self.account.take(_course_name(k), k, shape) for k, shape in self.shapes(layout).items()}
        self._close()
        return state


def _normal(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the name of each tensor by the name it has in nano4M-Audio."""
    out = {}
    for name in tensors:
        normal = name
        for pattern, plain in ALIASES.items():
            normal = re.sub(pattern, plain, normal)
        # Where both names are in use, neither stands for the other.
        out[name if normal in out or (normal != name and normal in tensors) else normal] = name
    return out


def _course_name(key: str) -> str:
    key = re.sub(r"^(encoder|decoder)\.", r"\1.blocks.", key).replace(".proj.", ".attn_out_proj.")
    return _renamed(key, COURSE_NAMES)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        if key == ours or key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    return key


class Apple(_Theirs):
    task, model = "apple4m", Apple4M

    def __init__(self, file: ForeignFile, run: ImportRun):
        self.account = a = Account(file)
        told = told_by(file, run.settings, APPLE_SAYS)
        _, _, d = a.shape("mask_token")
        domains = [_domains(told, k, file) for k in ("domains_in", "domains_out")]
        theirs = list(dict.fromkeys(domains[0] + domains[1]))
        usable = [t for t in theirs if all(t in x for x in domains) and all(f"{e}.token_emb.weight" in a for e in _homes(t))]
        named = name_modalities([t for t in theirs if t in usable or t in run.rename], run.rename)
        odd = [t for t in theirs if t not in usable and t not in run.without]
        if odd:
            raise WeightsError(
                f"{', '.join(odd)} of {file.path} cannot be used: only modalities that are read and written as tokens can be",
                f"leave them out: 'without=[{', '.join([*run.without, *odd])}]'",
            )
        self.names = {t: named[t] for t in usable if t not in run.without and named[t] not in run.without}
        if not self.names:
            raise WeightsError(f"{file.path}: no modality is left", "shorten 'without'")
        for key, wanted in {"decoder_causal_mask": False, "decoder_sep_mask": True}.items():
            if told.get(key, wanted) != wanted:
                raise WeightsError(f"{file.path} sets {key} to {told[key]}; only {wanted} is known here")
        gated, act = "encoder.0.mlp.fc3.weight" in a, told.get("act_layer", "GELU")
        if act != ("SiLU" if gated else "GELU"):
            raise WeightsError(f"{file.path}: {'gated' if gated else 'plain'} MLPs with {act} are not known here")
        if "num_heads" not in told:
            raise WeightsError(f"{file.path} does not say its number of heads", "say settings.num_heads=N")
        shape = lambda t, part: a.shape(f"encoder_embeddings.{t}.{part}")  # noqa: E731
        found = {
            **_common(a, "encoder.0."), "size": _sized(a, ("encoder.", "decoder."), d), "head_width": d // told["num_heads"],
            "proj_bias": "encoder.0.attn.proj.bias" in a, "mlp": "swiglu" if gated else "gelu",
            "mlp_ratio": told.get("mlp_ratio", 4.0), "modalities": self.modalities,
            "vocab_sizes": [shape(t, "token_emb.weight")[0] for t in self.names],
            "lengths": [shape(t, "pos_emb")[1] for t in self.names],
            "texts": [o for t, o in self.names.items() if not t.startswith("tok_")],
            "registers": a.shape("register_tokens")[1] if "register_tokens" in a else 0,
        }  # fmt: skip
        self.config = build(AppleConfig, {**found, **run.model}, "model")
        self._known(run)

    def convert(self, layout: Layout) -> dict[str, Tensor]:
        a, d, shapes = self.account, self.config.width, self.shapes(layout)
        theirs = {ours: t for t, ours in self.names.items()}
        tables = {k: [] for k in ("embed", "told", "head.table", *(f"{e}_{w}" for e in ("enc", "dec")
                                                                    for w in ("modality", "position")))}
        for spec in layout.specs:
            t = theirs[spec.modality]
            _, length = self.config.table(spec.modality)
            table, (enc, dec) = (spec.vocab_size, d), _homes(t)
            tables["embed"].append(a.take(f"{enc}.token_emb.weight", "embed", table))
            for ours, home, other in (("enc", enc, dec), ("dec", dec, enc)):
                # Both sides share the modality's vector: a file may hold it once.
                there = home if f"{home}.mod_emb" in a else other
                tables[f"{ours}_modality"].append(a.take(f"{there}.mod_emb", f"{ours}_modality", (1, 1, d))[0])
                position = a.take(f"{home}.pos_emb", f"{ours}_position", (1, length, d))
                tables[f"{ours}_position"].append(position[0, : spec.slots])
            own = f"{dec}.to_logits.weight"
            tables["head.table"].append(a.take(own if own in a else f"{dec}.token_emb.weight", "head.table", table))
            if spec.kind == "sequence":
                tables["told"].append(a.take(f"{dec}.token_emb.weight", "told", table))
            else:
                a.leave(f"{dec}.token_emb.weight", "the decoder sees masks in their place")
        state = {k: torch.cat(parts) if parts else torch.zeros(shapes[k]) for k, parts in tables.items()}
        for key, shape in shapes.items():
            if key in ("mask_token", "register_tokens"):
                state[key] = a.take(key, key, (1, *shape))[0]
            elif key not in state:
                state[key] = a.take(_renamed(key, APPLE_NAMES), key, shape)
        used = {theirs[s.modality] for s in layout.specs}
        for name in a.names:
            home = re.match(r"(?:en|de)coder_embeddings\.([^.]+)\.", name)
            if home and home[1] not in used:
                a.leave(name, f"{home[1]} is not used")
        self._close()
        return state


def _homes(theirs: str) -> tuple[str, str]:
    return f"encoder_embeddings.{theirs}", f"decoder_embeddings.{theirs}"


def _domains(told: Mapping[str, Any], key: str, file: ForeignFile) -> list[str]:
    value = told.get(key)
    if isinstance(value, str):
        value = value.split("-")
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise WeightsError(f"{file.path} does not say its {key}", f"say 'settings.{key}=[tok_rgb@224, caption]'")
    return value


def understand(file: ForeignFile, run: ImportRun) -> Foreign:
    """Return the checkpoint as the architecture that its tensors' names tell."""
    if any(re.sub(r"^module\.", "", n) == "enc_tok_emb.weight" for n in file.tensors):
        return Course(file, run)
    if any(n.startswith("encoder_embeddings.") for n in file.tensors):
        return Apple(file, run)
    names = ", ".join(list(file.tensors)[:6])
    raise WeightsError(
        f"{file.path} is of no architecture that is known: it holds {names}, ...",
        "known: the course's FourM (enc_tok_emb.weight) and apple's 4M (encoder_embeddings.*)",
    )

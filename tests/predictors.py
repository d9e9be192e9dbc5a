"""Models whose answers are known, on data whose probabilities are known: what a probe must return for them, theory says.

The world is a finite number of kinds, `classes` x `members`; every modality of a sample is a function of its kind, so whole
modalities determine one another. A predictor keeps some of what is shown (`knows`), and answers by exact inference over the
kinds: `Perfect` keeps all, `ClassOnly` the class, `Marginal` and `Uniform` nothing, `Memoriser` what the train split holds.
They are TokenModels whose head is an identity, so that all of the real path (packing, softmax, sampling) is under test.
"""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from workspace_factory import SHARD, write_tokens

from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.data.shards import shard_name, write_shard
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.fourm import FourMConfig
from nano4m_cli.probes._context import Context
from nano4m_cli.registry import PROBES
from nano4m_cli.rng import generator
from nano4m_cli.spec import Layout, TokenizerRef, TokenSpec, read_spec
from nano4m_cli.tokenizers import chars
from nano4m_cli.tokenizers._base import save_tokenizer
from nano4m_cli.train.config import parse_run_config
from nano4m_cli.train.run import OpenRun

COLOURS = ("red", "green", "blue", "cyan", "pink", "grey", "gold", "teal")
MODALITIES = ("rgb", "audio", "caption")
FLOOR = -60.0  # log p of what cannot be: no probe meets an infinity
# Every direction from one whole modality, and from nothing.
POSED = {"components": [{"type": "directed", "weight": 0.8, "sources": [0.7, 0.3], "drop": 0.1},
                        {"type": "dirichlet", "weight": 0.2, "input": [2, 20], "target": [2, 12]}]}


@dataclass(frozen=True)
class World:
    """The data set `known` in a workspace, and its truth.

    ids_KC, inside_KC: the tokens of every kind over the layout's columns. class_K: the class of every kind.
    splits: per split, the kind of each sample.
    """

    workspace: Workspace
    layout: Layout
    ids_KC: np.ndarray
    inside_KC: np.ndarray
    class_K: np.ndarray
    splits: dict[str, np.ndarray]

    @property
    def dataset(self) -> DatasetFolder:
        return self.workspace.dataset("known")


def caption(colour: str, number: int) -> str:
    return f"a {colour} thing, number {number}"


def make_world(root, classes: int = 8, members: int = 8, pairing: str = "instance", splits=None, label: bool = False) -> World:
    """Write the data set: rgb a grid of 2 x 3, audio of 3 frames x 2 codebooks, captions of true length, one id a character.

    Args:
        splits: kinds of each split's samples (default: train shows every kind twice, val and test once). Kind k is member
            k % members of class k // members.
        label: whether the class is a modality of its own as well, of one slot.
    """
    kinds = classes * members
    order = np.arange(kinds)
    given = {"train": np.tile(order, 2), "val": order, "test": order} if splits is None else splits
    splits = {s: np.asarray(k, dtype=np.int64) for s, k in given.items()}
    names = [*MODALITIES, *(["label"] if label else [])]
    dataset = DatasetFolder(root / "data" / "known")
    objects = [{"colour": COLOURS[k // members], "number": str(k % members)} for k in range(kinds)]
    said = [caption(o["colour"], int(o["number"])) for o in objects]
    write_json(dataset.info_path, {
        "name": "known", "source": "scenes", "options": {}, "version": 1, "modalities": names,
        "brought": [m for m in names if m != "caption"], "splits": {s: len(k) for s, k in splits.items()},
        "attributes": {
            "colour": {"values": COLOURS[:classes], "surfaces": {c: [c] for c in COLOURS[:classes]}},
            "number": {"values": [str(m) for m in range(members)], "surfaces": {str(m): [str(m)] for m in range(members)}},
        },
        "determined": {m: ["colour", "number"] for m in MODALITIES} | {"label": ["colour"]}, "pairing": pairing,
    })
    for split, chosen in splits.items():
        for shard in range(-(-len(chosen) // SHARD)):
            def samples(split=split, chosen=chosen, shard=shard):
                for i in range(shard * SHARD, min((shard + 1) * SHARD, len(chosen))):
                    kind = int(chosen[i])
                    fields = [{"attribute": a, "object": 0, "wording": 0,
                               "span": [at := said[kind].index(objects[kind][a], 2), at + len(objects[kind][a])]}
                              for a in ("colour", "number")]
                    labels = {"objects": [objects[kind]], "fields": fields, "labels": objects[kind]}
                    yield f"{split}-{i:08d}", {"caption.txt": said[kind].encode(), "labels.json": json.dumps(labels).encode()}

            write_shard(dataset.raw(split) / shard_name(shard), samples())

    text = chars.Tokenizer("caption", chars.Tokenizer.Options(), {})
    text.fit(said)
    with atomic_folder(dataset.tokenizer("caption")) as folder:
        save_tokenizer(text, folder)
    rgb = TokenSpec(modality="rgb", kind="grid", shape=(2, 3), vocab_size=12, tokenizer=TokenizerRef(name="by_hand"))
    audio = TokenSpec(modality="audio", kind="codes", shape=(3, 2), vocab_size=10, tokenizer=TokenizerRef(name="by_hand"))
    draw = generator(0, "known")
    # The first slot says the class, the second the member, the others are noise of the kind (not of the sample).
    codes = {s.modality: draw.integers(0, s.vocab_size, (kinds, s.slots)) for s in (rgb, audio)}
    for ids in codes.values():
        ids[:, 0], ids[:, 1] = order // members, order % members
    ids_of = {m: list(c) for m, c in codes.items()} | {"caption": text.encode(said)}
    specs = [rgb, audio, text.spec()]
    if label:
        ids_of["label"] = [np.array([k // members]) for k in order]
        specs.append(TokenSpec(modality="label", kind="grid", shape=(1, 1), vocab_size=classes))
    for spec in specs:
        for split, chosen in splits.items():
            write_tokens(dataset, split, len(chosen), spec, lambda i, s=spec, c=chosen: ids_of[s.modality][int(c[i])])
    layout = Layout([read_spec(dataset.spec_path(m)) for m in names])
    ids_KC, inside_KC = np.zeros((kinds, layout.columns), np.int64), np.zeros((kinds, layout.columns), bool)
    for m in names:
        first = layout.slice(m).start
        for k, ids in enumerate(ids_of[m]):
            ids_KC[k, first : first + len(ids)], inside_KC[k, first : first + len(ids)] = ids, True
    return World(Workspace(root), layout, ids_KC, inside_KC, order // members, splits)


class _Identity(nn.Module):
    """A head under which the answers are the logits."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.register_buffer("table", torch.cat([torch.eye(max(layout.sizes))[:size] for size in layout.sizes]))

    def weight(self) -> Tensor:
        return self.table


class Perfect(TokenModel):
    """Bayes over the kinds: what is shown leaves those that agree with it, equally likely, and text goes on leaving fewer.

    What agrees with no kind tells nothing.
    """

    encodes = True

    def __init__(self, world: World):
        super().__init__()
        self.world, self.layout = world, world.layout
        self.config = FourMConfig(size="d1-1w16", head_width=16, registers=1)
        self.head = _Identity(world.layout)
        self.prior_K = np.full(len(world.class_K), 1 / len(world.class_K))

    def knows(self, belief_SK: np.ndarray) -> np.ndarray:
        """Return what is kept of the belief over kinds."""
        return belief_SK

    def belief(self, batch: Packed) -> np.ndarray:
        """Return (S, K): the belief over kinds after what is shown."""
        col, ids, lengths = (x.cpu().numpy() for x in (batch.enc_col, batch.enc_ids, batch.enc.lengths))
        row = np.repeat(np.arange(len(lengths)), lengths)
        agree_TK = (self.world.ids_KC[:, col] == ids).T & self.world.inside_KC[:, col].T | (col < 0)[:, None]
        against_SK = np.zeros((len(lengths), len(self.prior_K)))
        np.add.at(against_SK, row, ~agree_TK)
        return self.knows(self._normal((against_SK == 0) * self.prior_K, self.prior_K[None]))

    @staticmethod
    def _normal(weight: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        total = weight.sum(-1, keepdims=True)
        return np.where(total > 0, weight / np.where(total > 0, total, 1), otherwise)

    def encode(self, batch: Packed, layers: list[Tensor] | None = None) -> Tensor:
        """Return (Te, K): every token carries the belief of its sample (what pooled features are made of)."""
        out = torch.from_numpy(self.belief(batch)).float().repeat_interleave(batch.enc.lengths, 0)
        if layers is not None:
            layers.append(out)
        return out

    def decode(self, batch: Packed, encoded: Tensor, few: bool = False) -> Tensor:
        return self.answers(batch)

    def answers(self, batch: Packed) -> Tensor:
        """Return (Td, V): the logits themselves."""
        world = self.world
        col, ids = batch.dec_col.cpu().numpy(), batch.dec_ids.cpu().numpy()
        look = np.arange(batch.dec.rows) if batch.dec_context is None else batch.dec_context.cpu().numpy()
        belief_TK = np.repeat(self.belief(batch)[look], batch.dec.lengths.cpu().numpy(), 0)
        # Text sees what stands before it among what is asked.
        lengths = batch.dec_self.lengths.cpu().numpy()
        causal_T = np.repeat(batch.dec_causal.cpu().numpy(), lengths)
        against_TK = np.where(causal_T[:, None], ((world.ids_KC[:, col] != ids) | ~world.inside_KC[:, col]).T, 0)
        before_TK = np.cumsum(against_TK, 0) - against_TK
        begin_T = np.repeat(np.cumsum(lengths) - lengths, lengths)
        if len(begin_T):
            before_TK -= before_TK[begin_T]
        weight_TK = self._normal(belief_TK * (before_TK == 0), belief_TK) * world.inside_KC[:, col].T
        p_TV = np.zeros((len(col), self.head.table.shape[1]))
        np.add.at(p_TV, (np.arange(len(col))[:, None], world.ids_KC[:, col].T), weight_TK)
        with np.errstate(divide="ignore"):
            logits = np.maximum(np.log(p_TV), FLOOR)
        return torch.from_numpy(logits).float()


class ClassOnly(Perfect):
    """Knows the class of what is shown and nothing else of it; within the class it is as sure as the class allows."""

    def knows(self, belief_SK: np.ndarray) -> np.ndarray:
        own_KG = np.eye(int(self.world.class_K.max()) + 1)[self.world.class_K]
        return (belief_SK @ own_KG) @ (own_KG * self.prior_K[:, None] / (self.prior_K @ own_KG)).T


class Uniform(Perfect):
    """Every id of a slot's vocabulary is equally likely."""

    def knows(self, belief_SK: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.prior_K, belief_SK.shape).copy()

    def answers(self, batch: Packed) -> Tensor:
        return torch.zeros(len(batch.dec_col), self.head.table.shape[1])


class Marginal(Uniform):
    """Knows how often each id of a vocabulary occurs in the train split (add one half), and looks at nothing."""

    def __init__(self, world: World):
        super().__init__(world)
        train, layout = world.splits["train"], world.layout
        ids, inside = world.ids_KC[train], world.inside_KC[train]
        self.logits_GV = np.full((len(layout.groups), max(layout.sizes)), FLOOR)
        for g, size in enumerate(layout.sizes):
            own = layout.group_C == g
            counts = np.bincount(ids[:, own][inside[:, own]], minlength=size) + 0.5
            self.logits_GV[g, :size] = np.log(counts / counts.sum())

    def answers(self, batch: Packed) -> Tensor:
        return torch.from_numpy(self.logits_GV[self.layout.group_C[batch.dec_col.cpu().numpy()]]).float()


class Memoriser(Perfect):
    """Knows the kinds of the train split by heart; of anything else it has no idea (every id is equally likely)."""

    def __init__(self, world: World):
        super().__init__(world)
        counts = np.bincount(world.splits["train"], minlength=len(world.class_K))
        self.prior_K = counts / counts.sum()

    def answers(self, batch: Packed) -> Tensor:
        col, ids, lengths = (x.cpu().numpy() for x in (batch.enc_col, batch.enc_ids, batch.enc.lengths))
        row = np.repeat(np.arange(len(lengths)), lengths)
        agree_TK = (self.world.ids_KC[:, col] == ids).T & self.world.inside_KC[:, col].T | (col < 0)[:, None]
        against_SK = np.zeros((len(lengths), len(self.prior_K)))
        np.add.at(against_SK, row, ~agree_TK)
        seen_S = ((against_SK == 0) & (self.prior_K > 0)).any(1)
        look = np.arange(batch.dec.rows) if batch.dec_context is None else batch.dec_context.cpu().numpy()
        seen_T = np.repeat(seen_S[look], batch.dec.lengths.cpu().numpy())
        return torch.where(torch.from_numpy(seen_T)[:, None], super().answers(batch), torch.zeros(()))


def known_run(model: TokenModel, masking=None) -> OpenRun:
    """Return a run of the predictor's world, as `open_run` would."""
    world = model.world
    config = parse_run_config({
        "name": "known", "data": {"dataset": "known", "modalities": model.layout.names}, "masking": masking or POSED,
        "model": {"size": "d1-1w16", "head_width": 16},
    }, "known")
    path = world.workspace.root / "runs" / "known"
    return OpenRun(path, config, model, model.layout, 0, world.dataset, path / "checkpoints" / "step-00000000")


def known_context(model: TokenModel, split: str = "test", limit: int | None = None, masking=None) -> Context:
    return Context(known_run(model, masking), split, limit, 0, lambda what, done, total: None)


def findings(probe: str, model: TokenModel, context: Context | None = None, **options) -> SimpleNamespace:
    """Return what a probe finds of a predictor: `metrics` by name, `plots` by name, `notes`."""
    cls = PROBES.get(probe)
    context = context or known_context(model)
    measurer = cls(cls.Options(**options))
    assert measurer.missing(context) is None, measurer.missing(context)
    found = measurer.measure(context)
    names = [m.name for m in found.metrics]
    assert len(set(names)) == len(names), "a figure stands twice"
    return SimpleNamespace(
        metrics={m.name: m for m in found.metrics}, plots={p.name: p for p in found.plots}, notes=found.notes)

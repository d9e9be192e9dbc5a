"""What a training config holds: `task: fourm`, `gpt` and `maskgit` train a model on token shards, `tokenizer` fits one, and
`import` makes a run (of task `course4m` or `apple4m`) of a checkpoint of another project."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nano4m_cli.config import Config, apply_overrides, build, load_yaml
from nano4m_cli.errors import ConfigError, did_you_mean
from nano4m_cli.masking._mixture import MaskingConfig
from nano4m_cli.model.apple4m import AppleConfig
from nano4m_cli.model.base import StackConfig, TransformerConfig
from nano4m_cli.model.course4m import CourseConfig
from nano4m_cli.model.fourm import FourMConfig


class DataConfig(Config):
    """dataset: folder below data/ (null: the only or newest one). modalities: in model order (empty: all tokenised).

    skip_broken: put the next sample of the order in the place of one that cannot be read, and count it; else that is an error.
        Of a stream, the next of its lane (StandIns), and a shard that does not come is lost for its epoch.
    url: where the data set lies, if not below data/ (http, https, s3, gs, hf, ...; docs/CLUSTER.md). Its shards are fetched
        when their samples are due, into `cache` (null: data/.cache/stream; variables such as $TMPDIR are put in), which holds at
        most `cache_gb`; a shard that does not come within `wait` seconds is an error. lanes, window: see StreamOrder.
    """

    dataset: str | None = None
    modalities: list[str] = []
    train: str = "train"
    val: str = "val"
    skip_broken: bool = False
    url: str | None = None
    cache: str | None = None
    cache_gb: float = Field(20.0, gt=0)
    wait: float = Field(300.0, gt=0)
    lanes: int | None = Field(None, ge=1)
    window: int = Field(4, ge=1)

    @field_validator("modalities")
    @classmethod
    def _once(cls, v):
        if len(set(v)) != len(v):
            raise ValueError("a modality stands twice")
        return v


class TrainConfig(Config):
    """One optimisation.

    batch: samples per step; split into `accumulate` parts that are computed one after the other.
    lr: of AdamW; muon_lr: of Muon, which takes the hidden matrices where optimizer is muon.
    schedule: warmup is linear; cosine to min_lr * lr; wsd keeps lr and decays linearly over the last `decay` share.
    ema: decay of the averaged weights that are evaluated (0: none).
    precision: auto is bf16 where the hardware multiplies bf16 and the model is wide enough to gain by it, else fp32.
    compile: whether blocks are compiled (torch.compile, for any number of tokens); the first steps then take a minute.
    workers: loader processes (0: in the training process); the data do not depend on it.
    keep, keep_every, keep_best: which checkpoints stay: the newest so many, those of every so many steps (0: none), the best
        by validation loss. save_async: write them beside the next steps.
    parallel: several processes hold the model each (ddp), or share it out by rows (fsdp): for models too large for one.
    recompute: make activations again in the backward pass instead of keeping them.
    timeout: minutes that processes of a run wait for each other and for data, at most; more than saving a checkpoint takes.
    stall: a step that takes so many times the median is told of.
    sinks: where records go besides metrics.jsonl. log_keys: write down which samples each process saw in which step.
    """

    steps: int = Field(1000, ge=1)
    batch: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    muon_lr: float = Field(0.015, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = Field(50, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay: float = Field(0.3, ge=0, le=1)
    min_lr: float = Field(0.02, ge=0, le=1)
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    log_every: int = Field(25, ge=1)
    val_every: int = Field(250, ge=1)
    val_samples: int = Field(400, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    keep_best: bool = False
    save_async: bool = False
    workers: int = Field(0, ge=0)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    recompute: bool = False
    timeout: float = Field(10.0, gt=0)
    stall: float = Field(10.0, gt=1)
    sinks: list[Literal["tensorboard", "wandb"]] = []
    log_keys: bool = False

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} does not divide into {self.accumulate} parts")
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise ValueError("muon needs whole matrices, which no process has with parallel: fsdp; choose optimizer: adamw")
        return self


class RunConfig(Config):
    """A run: data, model, masking, loss weights per modality, training."""

    task: str
    name: str
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    model: TransformerConfig
    masking: MaskingConfig = MaskingConfig()
    loss_weights: dict[str, float] = {}
    train: TrainConfig = TrainConfig()

    @field_validator("loss_weights")
    @classmethod
    def _weights(cls, v):
        if any(w < 0 for w in v.values()):
            raise ValueError("loss weights are not negative")
        return v


class FourMRun(RunConfig):
    task: Literal["fourm"] = "fourm"
    model: FourMConfig = FourMConfig()


class GPTRun(RunConfig):
    task: Literal["gpt"]
    model: StackConfig = StackConfig()
    masking: MaskingConfig = MaskingConfig(components=[{"type": "causal"}])


class MaskGITRun(RunConfig):
    task: Literal["maskgit"]
    model: StackConfig = StackConfig()
    masking: MaskingConfig = MaskingConfig(components=[{"type": "masked"}])


class CourseRun(RunConfig):
    task: Literal["course4m"]
    model: CourseConfig = CourseConfig()


class AppleRun(RunConfig):
    task: Literal["apple4m"]
    model: AppleConfig = AppleConfig()


class ImportRun(RunConfig):
    """A foreign checkpoint to make a run of; data, masking and train are those of the run.

    checkpoint: a safetensors file, a folder with model.safetensors, or an id on the hub.
    rename: our name of a modality whose own does not tell it. without: its modalities (by their names) to leave out.
    settings: what the file does not say of its model, or says wrongly (null: not said).
    model: options of ours that no file says, e.g. {softmax: own, attention: loop}.
    """

    task: Literal["import"]
    checkpoint: str | None = None
    rename: dict[str, str] = {}
    without: list[str] = []
    settings: dict[str, Any] = {}
    model: dict[str, Any] = {}


class TokenizerChoice(Config):
    modality: str
    name: str | None = None
    options: dict[str, Any] = {}


class TokenizerRunConfig(Config):
    """Fitting one tokenizer on a data set's train split."""

    task: Literal["tokenizer"]
    name: str
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    tokenizer: TokenizerChoice
    train: TrainConfig = TrainConfig()


TASKS: dict[str, type[Config]] = {
    "fourm": FourMRun, "gpt": GPTRun, "maskgit": MaskGITRun, "course4m": CourseRun, "apple4m": AppleRun,
    "tokenizer": TokenizerRunConfig, "import": ImportRun,
}  # fmt: skip


def load_run_config(path: Path, overrides: list[str]) -> RunConfig | TokenizerRunConfig:
    """Read a training config; the run is named after the file unless the config names it."""
    data = apply_overrides(load_yaml(path), overrides)
    data.setdefault("name", Path(path).stem)
    return parse_run_config(data, str(path))


def parse_run_config(data: dict, where: str) -> RunConfig | TokenizerRunConfig:
    """Validate a mapping as the config of its task."""
    task = data.get("task", "fourm")
    if task not in TASKS:
        raise ConfigError(f"{where}: unknown task '{task}'", did_you_mean(str(task), TASKS))
    config = build(TASKS[task], data, where)
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError(f"{where}: '{config.name}' cannot be the name of a run's folder")
    return config

"""A run's model as a folder to give away: averaged weights, config.json, tokenizers, a model card; and reading it back.

The card states only what the run's files hold: figures with interval, n and chance as they were measured, and the notes
of the data set, licence included.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nano4m_cli import __version__
from nano4m_cli.config import build, dump_yaml
from nano4m_cli.data._atomic import atomic_folder
from nano4m_cli.data.loader import read_specs
from nano4m_cli.errors import CheckpointError, ConfigError, WeightsError, did_you_mean
from nano4m_cli.masking._mixture import MaskingConfig
from nano4m_cli.spec import Layout, TokenSpec
from nano4m_cli.tokenizers._pretrained import first_line
from nano4m_cli.train._foreign_file import CONFIG, WEIGHTS, Account, ForeignFile
from nano4m_cli.train._foreign_models import Foreign
from nano4m_cli.train.config import TASKS, ImportRun
from nano4m_cli.train.run import MODELS, OpenRun, check_specs

LIBRARY = "nano4m"


def export(run: OpenRun, folder: Path) -> list[Path]:
    """Write model.safetensors, config.json, tokenizers/ and README.md into a new folder; return the files.

    A folder that holds anything but an earlier export is not touched.
    """
    if folder.exists() and any(folder.iterdir()) and not _is_export(folder):
        raise CheckpointError(f"{folder} is there and is no export", "name another folder with --export DIR")
    state = {k: v.detach().contiguous().cpu() for k, v in run.model.state_dict().items()}
    doc = {
        "library": LIBRARY, "version": __version__, "task": run.config.task, "name": run.config.name, "step": run.step,
        "averaged": run.config.train.ema > 0, "parameters": sum(p.numel() for p in run.model.parameters()),
        "dataset": run.dataset.name, "model": run.config.model.model_dump(mode="json"),
        "masking": run.config.masking.model_dump(mode="json"), "loss_weights": run.config.loss_weights,
        "specs": [s.model_dump(mode="json") for s in run.layout.specs],
    }  # fmt: skip
    with atomic_folder(folder) as aside:
        save_file(state, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(doc, indent=1) + "\n")
        for name in run.layout.names:
            if (run.dataset.tokenizer(name) / "tokenizer.json").is_file():
                _copy_tokenizer(run.dataset.tokenizer(name), aside / "tokenizers" / name)
        (aside / "README.md").write_text(card(run, doc), encoding="utf-8")
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / CONFIG).read_text())["library"] == LIBRARY
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer; where its weights lie on this machine is not told."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    doc = json.loads(path.read_text())
    weights = doc["options"].get("weights")
    if weights and Path(weights).is_absolute():
        doc["options"]["weights"] = Path(weights).name
        path.write_text(json.dumps(doc, indent=1))


# -- the card -----------------------------------------------------------------------------------------------------


def card(run: OpenRun, doc: dict[str, Any]) -> str:
    """Return the model card: what it is, on what data, with which figures, under what terms, how to use it."""
    info, names = run.dataset.info(), run.layout.names
    trained = f"{run.step} steps of {run.config.train.batch} samples" if run.step else "no step here: the weights were imported"
    origin = _read(run.path / "import.json").get("checkpoint", {})
    lines = [
        "---", f"library_name: {LIBRARY}", "tags: [multimodal, any-to-any, 4m]", "---", "", f"# {run.config.name}", "",
        f"A model of task `{run.config.task}`, size {run.config.model.size}, {doc['parameters']:,} parameters, over "
        f"{', '.join(names)}. Trained: {trained}{'; the weights here are averaged' if doc['averaged'] else ''}.", "",
    ]  # fmt: skip
    if origin:
        lines += [f"It began as an imported checkpoint (sha256 {origin.get('sha256')}), whose own terms apply.", ""]
    rows = [[s.modality, s.kind, "x".join(map(str, s.shape)), s.vocab_size, s.tokenizer.name] for s in run.layout.specs]
    lines += _table(["modality", "tokens", "shape", "ids", "tokenizer"], rows)
    splits = ", ".join(f"{n} {k}" for k, n in info.splits.items())
    lines += [
        "", "## Data", "",
        f"Data set `{info.name}`, made by source `{info.source}` (version {info.version}): {splits} samples.", "",
        "Licence and notes of the data, as its source states them: " + (info.notes or "none are stated."), "",
        "The licence of these weights is for whoever publishes them to state; the data's terms may bind it.", "",
    ]  # fmt: skip
    lines += ["## Masking", "", "```yaml", dump_yaml(run.config.masking).strip(), "```", "", "## Figures", "", *_figures(run), ""]
    lines += [
        "## Use", "", "With nano4m, and a data set whose tokens are of these tokenizers:", "", "```bash",
        f"nano4m fetch {info.source}", f"cp -r DIR/tokenizers data/{info.name}/", "nano4m tokenize",
        'echo "task: import" > import.yaml', f"nano4m train import.yaml checkpoint=DIR name={run.config.name}",
        f"nano4m eval --run {run.config.name}", "```", "", "DIR is this folder. Nothing in it is code.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _figures(run: OpenRun) -> list[str]:
    """Return the figures of eval/*.json that were measured on this checkpoint."""
    rows = []
    for path in sorted((run.path / "eval").glob("*.json")):
        result = _read(path)
        if result.get("checkpoint") != run.checkpoint.name:
            continue
        for m in result.get("metrics", []):
            interval = "" if not m.get("ci95") else "{:.4g} .. {:.4g}".format(*m["ci95"])
            value, chance = ("-" if m.get(k) is None else f"{m[k]:.4g}" for k in ("value", "chance"))
            rows.append([m["name"], value, interval, m.get("n"), chance, f"{result.get('data')}/{result.get('split')}"])
    if not rows:
        return ["None were measured on this checkpoint (nano4m eval)."]
    return _table(["figure", "value", "95 % interval", "n", "chance", "measured on"], rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        doc = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return doc if isinstance(doc, dict) else {}


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]]


# -- the hub ------------------------------------------------------------------------------------------------------


def push(folder: Path, repo: str) -> str:
    """Upload an export to a repository on the hub, which is made (private) where it is not there; return its address.

    The token is the hub client's own (`hf auth login`, or HF_TOKEN).
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"'{repo}' was not pushed: HF_HUB_OFFLINE forbids it", f"the export is in {folder}")
    try:
        api = HfApi()
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"nano4m {__version__}")
    except Exception as err:  # the client's own types, its transport's
        hint = f"the export is in {folder}; hf auth login, or set HF_TOKEN, and push again"
        raise WeightsError(f"'{repo}' was not pushed: {first_line(err)}", hint) from err
    return str(address)


# -- reading it back ----------------------------------------------------------------------------------------------


class Own(Foreign):
    """An export as a checkpoint to import: all of its modalities, in its order, of the same ids."""

    def __init__(self, file: ForeignFile, run: ImportRun):
        told, self.account = file.told, Account(file)
        for name in ("rename", "without", "settings"):
            if getattr(run, name):
                raise ConfigError(f"{name} is for checkpoints of other projects; {file.path.parent} is an export of nano4m")
        try:
            self.task = told["task"]
            self.specs = [build(TokenSpec, s, f"{CONFIG}: specs") for s in told["specs"]]
            model, masking, loss_weights = told["model"], told["masking"], told["loss_weights"]
        except (KeyError, TypeError) as err:
            raise WeightsError(f"{file.path.parent / CONFIG} is damaged: {err!r}", "copy it again") from err
        if self.task not in MODELS:
            raise WeightsError(f"{file.path.parent} holds a model of task '{self.task}'", did_you_mean(self.task, MODELS))
        self.model = MODELS[self.task]
        self.names = {s.modality: s.modality for s in self.specs}
        self.sizes = {s.modality: (s.vocab_size, s.slots) for s in self.specs}
        self.config = build(type(TASKS[self.task].model_fields["model"].default), {**model, **run.model}, "model")
        given = run.masking != MaskingConfig()
        self.masking = run.masking if given else build(MaskingConfig, masking, f"{CONFIG}: masking")
        self.loss_weights = run.loss_weights or loss_weights

    def layout(self, dataset: Any, chosen: list[str]) -> Layout:
        if chosen and chosen != self.modalities:
            raise ConfigError(f"data.modalities: an export has its own: {', '.join(self.modalities)}", "leave it out")
        check_specs(self.specs, read_specs(dataset, self.modalities))
        return Layout(self.specs)

    def convert(self, layout: Layout) -> dict[str, Tensor]:
        state = {k: self.account.take(k, k, shape) for k, shape in self.shapes(layout).items()}
        self.account.close()
        return state

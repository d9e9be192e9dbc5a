"""`task: import`: a checkpoint of another project, or an export, becomes a run at step 0, checked against a data set's tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nano4m_cli import __version__
from nano4m_cli.config import build, dump_yaml
from nano4m_cli.data._atomic import atomic_file, write_json
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import CheckpointError, ConfigError
from nano4m_cli.masking._mixture import Mixture
from nano4m_cli.spec import Layout
from nano4m_cli.train import checkpoint
from nano4m_cli.train._foreign_file import read
from nano4m_cli.train._foreign_models import understand
from nano4m_cli.train.config import TASKS, ImportRun, RunConfig
from nano4m_cli.train.export import LIBRARY, Own


@dataclass
class Imported:
    """A checkpoint as a run: its config, weights and layout; `report` is what import.json will hold.

    rows: (tensors, how many, what became of them), for a table.
    """

    config: RunConfig
    folder: Path
    dataset: DatasetFolder
    layout: Layout
    state: dict[str, Tensor]
    report: dict[str, Any]
    rows: list[tuple[str, int, str]]

    def write(self) -> Path:
        """Make the run's folder: config, checkpoint at step 0, import.json; return it."""
        if checkpoint.checkpoints(self.folder):
            raise CheckpointError(f"run '{self.config.name}' exists already ({self.folder})", "import under another name: name=NEW")
        state = {
            "version": __version__, "task": self.config.task, "created": round(time.time(), 1),
            "specs": [s.model_dump(mode="json") for s in self.layout.specs],
        }
        # Without optimizer state, so that training can go on from here.
        checkpoint.save(self.folder, 0, {"model": self.state, "optimizer": {}}, state, self.config.train.keep)
        write_json(self.folder / "import.json", self.report)
        with atomic_file(self.folder / "config.yaml") as file:
            file.write(dump_yaml(self.config).encode())
        return self.folder


def convert(run: ImportRun, workspace: Workspace) -> Imported:
    """Read a checkpoint and check it against the data set's tokens; nothing is written.

    The modalities are those that both have, in the checkpoint's order, unless data.modalities names them. An export of
    our own has its modalities all, of ids of the same meaning, and brings its masking where the config says none.
    """
    if not run.checkpoint:
        raise ConfigError("no checkpoint is named", "give checkpoint=FILE, a folder with model.safetensors, or an id on the hub")
    dataset = workspace.dataset(run.data.dataset)
    file = read(run.checkpoint)
    foreign = Own(file, run) if file.told.get("library") == LIBRARY else understand(file, run)
    layout = foreign.layout(dataset, run.data.modalities)
    state = foreign.convert(layout)
    data = {"dataset": dataset.name, "modalities": layout.names, "train": run.data.train, "val": run.data.val}
    config = build(TASKS[foreign.task], {
        "task": foreign.task, "name": run.name, "seed": run.seed, "data": data, "model": foreign.config.model_dump(mode="json"),
        "masking": foreign.masking.model_dump(mode="json"), "loss_weights": foreign.loss_weights,
        "train": run.train.model_dump(mode="json"),
    }, "import")  # fmt: skip
    Mixture(config.masking, layout)  # a masking that does not suit is told of now
    specs = {s.modality: s for s in layout.specs}
    modalities = [
        {"theirs": t, "ours": o, "ids": foreign.sizes[o][0], "slots": foreign.sizes[o][1], "used": o in specs,
         "tokens": f"{specs[o].kind} {'x'.join(map(str, specs[o].shape))} of {specs[o].vocab_size}" if o in specs else None}
        for t, o in foreign.names.items()
    ]  # fmt: skip
    account = foreign.account
    report = {
        "checkpoint": {"path": str(file.path), "sha256": file.sha256, "says": file.told}, "architecture": foreign.task,
        "size": foreign.config.size, "run": run.name, "dataset": dataset.name, "modalities": modalities,
        "parameters": foreign.parameters(layout),
        "tensors": {"in_file": len(file.tensors), "used": account.taken, "left": account.left},
    }  # fmt: skip
    folder = workspace.root / "runs" / run.name
    return Imported(config, folder, dataset, layout, state, report, account.summary())

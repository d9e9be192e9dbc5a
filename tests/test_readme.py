"""The README's own commands, run in order in an empty folder, made small by arguments put behind them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "fetch scenes": "train=96 val=16 test=24 test_novel=8 shard_size=48",
    "tokenize": "rgb.fit_steps=12 depth.fit_steps=8 normal.fit_steps=8 audio.fit_steps=8",
    "tokenize --modality audio": "",
    "train": "train.steps=4 train.batch=8 train.val_samples=16 model.size=d1-1w32",
    "train --status": "",
    "eval": "--limit 12",
    "eval --site": "",
    "probe": "--limit 12",
}


def commands() -> list[str]:
    """Return the nano4m commands of the README's main block, in order."""
    block = re.search(r"## Six commands.*?```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    return [line.split("  #")[0].split(" #")[0].strip() for line in block.splitlines() if line.startswith("nano4m ")]


def test_every_command_is_shown():
    assert {shlex.split(c)[1] for c in commands()} == {"fetch", "tokenize", "train", "generate", "eval", "probe"}


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:cfgs|scripts|docs)/[\w./-]+)`|\]\(((?:docs)/[\w./-]+)\)", text):
        path = ROOT / (name[0] or name[1])
        assert path.exists(), path


@pytest.mark.slow
def test_commands_run_as_written(tmp_path):
    shutil.copytree(ROOT / "cfgs", tmp_path / "cfgs")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "NANO4M_ROOT": ""}
    env.pop("NANO4M_ROOT")
    for command in commands():
        words = shlex.split(command)[1:]
        extra = next((v for k, v in sorted(SMALL.items(), key=lambda kv: -len(kv[0])) if " ".join(words).startswith(k)), "")
        if words[0] == "train" and not {"--dry-run", "--status"} & set(words):
            assert not (tmp_path / "runs" / "demo").exists()
        done = subprocess.run(
            [sys.executable, "-m", "nano4m_cli", *words, *shlex.split(extra)], cwd=tmp_path, env=env, capture_output=True,
            text=True, timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if words[0] == "generate" and not (tmp_path / "picture.png").exists():
            shutil.copy(tmp_path / "generated" / "demo" / "rgb.png", tmp_path / "picture.png")
    assert (tmp_path / "runs" / "demo" / "report" / "index.html").stat().st_size > 10_000
    assert (tmp_path / "site" / "index.html").is_file()
    assert (tmp_path / "generated" / "demo" / "audio.wav").stat().st_size > 1000
    # The same checkpoint gives the same file.
    results = tmp_path / "runs" / "demo" / "eval"
    before = {p.name: p.read_bytes() for p in results.glob("*.json")}
    assert {"class.json", "crossmodal.json", "loss.json", "retrieval.json", "tokenizer.json", "linear.json"} <= set(before)
    again = [sys.executable, "-m", "nano4m_cli", "eval", "--limit", "12"]
    assert subprocess.run(again, cwd=tmp_path, env=env, capture_output=True, timeout=600).returncode == 0
    for name, data in before.items():
        if name != "gallery.json":
            assert (results / name).read_bytes() == data, name
    for name, data in before.items():
        for metric in json.loads(data)["metrics"]:
            assert {"name", "value", "n", "ci95", "chance"} <= set(metric), (name, metric)
            assert metric["n"] > 0 and metric["value"] is not None, (name, metric)

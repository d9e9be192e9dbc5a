"""The command line: streams, exit codes, names that are nearly right, and that asking for help is cheap."""

import json
import os
import pty
import signal
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from nano4m_cli.cli import _show
from nano4m_cli.cli._app import COMMANDS, app
from nano4m_cli.registry import SOURCES

TINY = ["judge=0", "train=8", "val=4", "test=4", "test_novel=4", "shard_size=4", "size=16"]
ENV = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "NANO4M_ROOT": ""}


def run(*args, env=None):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="nano4m", env={**ENV, **(env or {})})


def shell(*args, cwd=None, **env):
    """Run the command line in its own process."""
    command = [sys.executable, "-m", "nano4m_cli", *map(str, args)]
    env = {**os.environ, **ENV, **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


def fails(result, code, *said):
    """Assert an exit code, nothing on stdout, and what stderr says; a bug's traceback is no answer."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for part in said:
        assert part in result.stderr


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A workspace with a tiny data set."""
    root = tmp_path_factory.mktemp("space")
    result = run("fetch", "scenes", *TINY, "--root", root, "--workers", 1)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """Put a module in the place of one of the core's."""

    def put(name, **symbols):
        module = types.ModuleType(name)
        vars(module).update(symbols)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def one_thread():
    """Threads that spin for cores others hold make small models a hundred times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_run(root, name):
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    return folder


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from nano4m_cli.cli._app import app\n"
        f"try: app({[c for c in [command, '--help'] if c]!r}, prog_name='nano4m')\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'yaml', 'webdataset'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **ENV})
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "Usage: nano4m" in result.stdout


def test_importing_every_command_imports_no_torch():
    code = "import sys\n" + "".join(f"import nano4m_cli.cli.{c}\n" for c in COMMANDS)
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_of_each_command_names_its_json_keys():
    for command in COMMANDS:
        text = run(command, "--help").stdout
        assert "--json:" in text and f"nano4m {command}" in text


def test_without_a_command_help_goes_to_stderr():
    fails(run(), 2, "Usage: nano4m", "tokenize")


def test_version():
    assert run("--version").stdout.startswith("nano4m 0.")
    assert shell("--version").stdout.startswith("nano4m 0.")


# -- what was typed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, said",
    [
        (["trian"], ["error: unknown command 'trian'", "hint: did you mean 'train'?"]),
        (["tokenize", "--modalty", "rgb"], ["error: unknown option '--modalty'", "hint: did you mean '--modality'?"]),
        (["train", "demo", "--train.steps=5"], ["hint: settings are written without dashes: train.steps=VALUE"]),
        (["--root", "x", "fetch"], ["error: unknown option '--root' before the command", "hint: options stand after"]),
        (["fetch", "scens"], ["error: unknown source 'scens'", "hint: did you mean 'scenes'?"]),
        (["fetch", "scenes", "tran=8"], ["unknown key 'tran'", "hint: did you mean 'train'?"]),
        (["fetch", "scenes", "train"], ["override 'train' is not of the form"]),
        (["fetch"], ["error: fetch needs a source", "scenes"]),
        (["fetch", "scenes", "--workers", "0"], ["invalid value for '--workers'", "hint: see 'nano4m fetch --help'"]),
        (["train"], ["error: missing argument 'CONFIG'"]),
        (["generate", "--from", "caption=x"], ["error: generate needs --to"]),
        (["generate", "--from", "caption", "--to", "rgb"], ["error: --from 'caption' is not of the form M=VALUE"]),
        (["generate", "--from", "caption=a", "--from", "caption=b", "--to", "rgb"], ["gives 'caption' twice"]),
        (["generate", "--from", "caption=a", "--to", "rgb", "--weight", "caption"], ["--weight 'caption' is not of the form M=W"]),
        (["generate", "--from", "caption=a", "--requests", "r.jsonl"], ["--requests says itself", "leave out --from"]),
        (["generate", "--from", "caption=a", "--to", "rgb", "--batch", "3"], ["--batch goes with --requests"]),
        (["train", "x", "--device", "gpu"], ["error: invalid value for '--device'"]),
    ],
)
def test_usage_errors(here, args, said):
    fails(run(*args), 2, *said)


def test_errors_are_the_same_in_a_shell(here):
    result = shell("fetch", "scens", cwd=here)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown source 'scens'\nhint: did you mean 'scenes'?\n"


def test_work_that_cannot_be_done_exits_1(here):
    fails(run("tokenize"), 1, "error: no data set in", "hint: run 'nano4m fetch scenes' first")
    fails(run("generate", "--from", "caption=x", "--to", "rgb"), 1, "error: no run in", "hint: run 'nano4m train")


@pytest.mark.parametrize("args", [["eval"], ["probe"], ["generate", "--from", "caption=x", "--to", "rgb"]])
def test_unknown_run(here, args):
    a_run(here, "demo")
    fails(run(*args, "--run", "dmeo"), 2, "error: unknown run 'dmeo'", "hint: did you mean 'demo'?")


def test_root_is_an_option_or_a_variable(here, space):
    args = ["tokenize", "--dry-run"]
    for result in (run(*args, "--root", space), run(*args, env={"NANO4M_ROOT": str(space)})):
        assert result.exit_code == 0, result.output
        assert "data set: scenes" in result.stderr


def test_a_bug_keeps_its_traceback(fake, here):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    fake("nano4m_cli.data.fetch", open_source=broken, fetch=broken)
    assert isinstance(run("fetch", "scenes").exception, ZeroDivisionError)


def test_a_full_disk_is_no_bug(fake, here):
    def full(*args):
        raise OSError(28, "No space left on device", "data/x.tar")

    fake("nano4m_cli.data.fetch", open_source=full, fetch=full)
    fails(run("fetch", "scenes"), 1, "error: data/x.tar: No space left on device")


def test_ctrl_c_exits_130(fake, here):
    def interrupted(*args):
        raise KeyboardInterrupt

    fake("nano4m_cli.data.fetch", open_source=interrupted, fetch=interrupted)
    fails(run("fetch", "scenes"), 130, "error: interrupted")


@pytest.mark.skipif(os.name != "posix", reason="pipes of a POSIX shell")
def test_a_reader_that_leaves_is_not_a_traceback():
    command = f"{sys.executable} -m nano4m_cli fetch --list | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, **ENV})
    assert result.stderr == ""


# -- fetch ------------------------------------------------------------------------------------------------------------


def test_list_of_sources():
    result = run("fetch", "--list")
    assert result.exit_code == 0 and "scenes" in result.stdout and "digits" in result.stdout
    assert set(json.loads(run("fetch", "--list", "--json").stdout)["sources"]) >= {"scenes", "digits"}


def test_fetch_streams(space):
    result = run("fetch", "scenes", *TINY, "--root", space, "--json")
    data = json.loads(result.stdout)
    assert data["dataset"] == "scenes" and (data["made"], data["kept"]) == (0, 20)
    assert data["splits"]["train"] == {"samples": 8, "shards": 2}
    assert data["options"]["size"] == 16
    assert "samples 20/20" in result.stderr
    plain = run("fetch", "scenes", *TINY, "--root", space)
    assert "scenes: 0 samples made, 20 kept" in plain.stdout and "samples 20/20" not in plain.stdout
    assert run("fetch", "scenes", *TINY, "--root", space, "--quiet").stderr == ""


def test_fetch_with_other_options_is_refused(space):
    fails(run("fetch", "scenes", *TINY[:-1], "size=32", "--root", space), 1, "made with other options (size differ)")


def test_fetch_dry_run_writes_nothing(here):
    result = run("fetch", "scenes", *TINY, "--dry-run", "--json")
    data = json.loads(result.stdout)
    assert data["dry_run"] and data["splits"]["train"] == {"samples": 8, "shards": 2} and "judge" not in data["splits"]
    more = json.loads(run("fetch", "scenes", *TINY[1:], "--dry-run", "--json").stdout)
    assert more["splits"]["judge"] == {"samples": 1, "shards": 1}, "an eighth of train, for judges only"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", SOURCES.names())
def test_options_of_a_source_are_listed(name):
    result = run("fetch", name, "--list")
    assert result.exit_code == 0 and SOURCES.summary(name) in result.stdout and "default" in result.stdout, result.output
    listed = json.loads(run("fetch", name, "--list", "--json").stdout)["options"]
    assert list(listed) == list(SOURCES.get(name).Options.model_fields)
    fails(run("fetch", "scens", "--list"), 2, "did you mean 'scenes'?")


# -- tokenize ---------------------------------------------------------------------------------------------------------


def test_list_of_tokenizers():
    assert "bpe" in json.loads(run("tokenize", "--list", "--json").stdout)["tokenizers"]


def test_tokenize_names(space):
    root = ["--root", space, "--dry-run"]
    fails(run("tokenize", "--modality", "audoi", *root), 2, "unknown modality 'audoi'", "did you mean 'audio'?")
    fails(run("tokenize", "audio", *root), 2, "'audio' is not of the form option=value", "'--modality audio'")
    fails(run("tokenize", "width=8", *root), 2, "does not say which modality", "write rgb.width=8")
    fails(run("tokenize", "audoi.width=8", *root), 2, "does not say which modality", "did you mean 'audio'?")
    fails(run("tokenize", "--modality", "rgb", "widht=8", *root), 2, "unknown key 'widht'", "did you mean 'width'?")
    fails(run("tokenize", "--dataset", "scene", *root), 2, "unknown data set 'scene'", "did you mean 'scenes'?")


def test_tokenize_dry_run(space):
    result = run("tokenize", "-m", "caption", "-m", "rgb", "rgb.width=8", "--root", space, "--dry-run", "--json")
    plans = json.loads(result.stdout)["modalities"]
    assert list(plans) == ["caption", "rgb"]
    assert plans["rgb"]["options"]["width"] == 8 and plans["rgb"]["samples"] == 20
    assert not (space / "data/scenes/tokens/rgb").exists()


def test_tokenize_and_check(space, fake):
    asked = []

    def report(dataset, modality):
        asked.append((dataset.name, modality))
        return {"figures": {"exact": 1.0}, "sheet": "sheet.png"}

    fake("nano4m_cli.probes._roundtrip", report=report)
    result = run("tokenize", "--modality", "caption", "--root", space, "--workers", 1, "--json")
    assert result.exit_code == 0, result.output
    caption = json.loads(result.stdout)["modalities"]["caption"]
    assert asked == [("scenes", "caption")]
    assert (caption["tokenizer"], caption["kind"], caption["samples"]) == ("bpe", "sequence", 20)
    assert caption["figures"] == {"exact": 1.0} and caption["sheet"] == "sheet.png"
    again = run("tokenize", "--modality", "caption", "--root", space)
    assert "caption: 0 samples made, 20 kept" in again.stdout and "round trip: exact 1" in again.stdout
    checked = json.loads(run("tokenize", "--check", "--root", space, "--json").stdout)
    assert checked["samples"]["train"] == {"caption": 8}


# -- train ------------------------------------------------------------------------------------------------------------


def test_configs_are_found_by_name(here):
    (here / "cfgs" / "tokenizers").mkdir(parents=True)
    for name in ("demo", "5mod", "tokenizers/rgb"):
        (here / "cfgs" / f"{name}.yaml").write_text("{}")
    for given in ("demo", "demo.yaml", "cfgs/demo.yaml", "cfgs/demo"):
        fails(run("train", given, "--dry-run"), 1, "no data set in")
    fails(run("train", "dmeo"), 2, "error: no config file 'dmeo'", "hint: did you mean 'demo'?")
    fails(run("train", "cfgs/dmeo.yaml"), 2, "hint: did you mean 'demo'?")
    fails(run("train", "tokenizers/rbg"), 2, "hint: did you mean 'tokenizers/rgb'?")


def test_config_errors(here):
    (here / "c.yaml").write_text("seed: 1\ntrain: {steps: 3}\nseed: 2\n")
    fails(run("train", "c.yaml"), 2, "c.yaml:3: key 'seed' stands twice (first on line 1)")
    (here / "c.yaml").write_text("train: {stesp: 3}\n")
    fails(run("train", "c.yaml"), 2, "unknown key 'train.stesp'", "hint: did you mean 'steps'?")
    (here / "c.yaml").write_text("{}")
    fails(run("train", "c.yaml", "train.bacth=3"), 2, "unknown key 'train.bacth'", "hint: did you mean 'batch'?")
    fails(run("train", "c.yaml", "steps"), 2, "override 'steps' is not of the form key.sub=value")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_stopped_run_says_how_to_go_on(here, monkeypatch, signum, code):
    from nano4m_cli.train import loop
    from nano4m_cli.train import run as core

    def start(prepared, resume, device, callback, set_aside):
        callback(loop.StepRecord("train", 5, 9, {"loss": 2.5, "ce_rgb": 3.25, "lr": 0.1, "samples_per_s": 80.0}))
        raise loop.Stopped(7, signum)

    def prepare(config, workspace):
        place = types.SimpleNamespace(name="d", path="data/d")
        return types.SimpleNamespace(config=config, folder=workspace.root / "runs/c", dataset=place, warnings=[])

    monkeypatch.setattr(core, "prepare", prepare)
    monkeypatch.setattr(core, "start", start)
    (here / "c.yaml").write_text("{}")
    result = run("train", "c.yaml", "--device", "cpu", "--json")
    fails(result, code, "stopped at step 7, checkpoint saved; go on with --resume")
    assert "step 5/9  loss 2.5  rgb 3.25  80 samples/s\n" in result.stderr


@pytest.mark.slow
def test_dry_run_and_run(space, here, one_thread):
    for args in (["-m", "caption"], ["-m", "rgb", "name=identity"]):
        result = run("tokenize", *args, "--root", space, "--workers", 1)
        assert result.exit_code == 0, result.output
        assert "round trip: " in result.stdout and "contact sheet: " in result.stdout
    (here / "t.yaml").write_text("model: {size: d1-1w64}\ntrain: {steps: 4, batch: 4, log_every: 2}\n")
    args = ["train", "t.yaml", "--root", space, "--device", "cpu"]
    plan = json.loads(run(*args, "--dry-run", "--json").stdout)
    assert plan["run"] == "t" and set(plan["modalities"]) == {"rgb", "caption"}
    assert set(plan["directions"]) - {"->rgb", "->caption"} == {"rgb->caption", "caption->rgb"}
    assert 0 < plan["masking"]["used"] <= 1
    assert "->rgb" in run(*args, "--dry-run").stdout
    assert not (space / "runs").exists()
    done = run(*args, "--resume", "--json")  # nothing to go on from: it starts
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["figures"]["loss"] > 0
    assert "step 4/4" in done.stderr and "val  step 4/4" in done.stderr
    fails(run(*args), 1, "exists already", "--resume")


# -- generate, eval, probe: the core is another's, what is handed over is ours ----------------------------------------


def test_generate_hands_over_what_was_given(here, fake):
    seen = {}

    def generate_files(workspace, run_name, request, out, device):
        seen.update(request=request, device=device)
        out = {"run": "demo", "out": here, "files": [here / "depth.png"], "texts": [("caption", "a cube")]}
        return types.SimpleNamespace(**out, notices=["cropped"], ids_per_call={}, best=None)

    class Request:
        model_validate = staticmethod(dict)

    fake("nano4m_cli.generate.command", Request=Request, generate_files=generate_files)
    a_run(here, "demo")
    args = ["generate", "--from", "rgb=a=b.png", "--from", "audio", "--sample", "k", "--to", "caption,depth"]
    args += ["--seed", 3, "-n", 2, "--device", "cpu", "--keep", "rgb:left-half", "--not", "label=3", "--weight", "rgb=2"]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert seen == {
        "request": {
            "from": {"rgb": "a=b.png", "audio": None}, "sample": "k", "to": ["caption", "depth"], "seed": 3, "n": 2,
            "keep": ["rgb:left-half"], "not": {"label": "3"}, "weights": {"rgb": "2"},
        },
        "device": "cpu",
    }
    assert result.stdout == f"caption: a cube\n{here / 'depth.png'}\n"
    assert "run: runs/demo" in result.stderr and "notice: cropped" in result.stderr
    data = json.loads(run(*args, "--json").stdout)
    assert data["texts"] == [{"modality": "caption", "text": "a cube"}] and data["files"] == [str(here / "depth.png")]


def test_a_recipe_is_read_and_options_go_before_it(here, fake):
    seen = {}

    class Request:
        model_validate = staticmethod(dict)

    def generate_files(workspace, run_name, request, out, device):
        seen.update(request)
        return types.SimpleNamespace(run="demo", out=here, files=[], texts=[], notices=[], ids_per_call={}, best=None)

    fake("nano4m_cli.generate.command", Request=Request, generate_files=generate_files)
    a_run(here, "demo")
    (here / "recipe.yaml").write_text("chain: [{to: depth, steps: 4}, {to: rgb}]\nsteps: 9\ntemperature: 1..0.2\n")
    assert run("generate", "--recipe", "recipe.yaml", "--steps", 3, "--device", "cpu").exit_code == 0
    assert seen == {"chain": [{"to": "depth", "steps": 4}, {"to": "rgb"}], "steps": 3, "temperature": "1..0.2"}


@pytest.mark.parametrize("command, args", [("eval", ["--probe", "a,b"]), ("probe", ["a", "b"])])
def test_eval_and_probe(here, fake, command, args):
    from nano4m_cli.probes._result import Metric, Result

    metric = Metric(name="rgb->depth/absrel", value=0.25, n=40, ci95=(0.2, 0.3), chance=1.0, in_distribution=False)
    missing = Metric(name="rgb/psnr", value=None, n=0)
    result = Result(
        probe="a", version=1, title="A title", split="test", seed=0, run="demo", checkpoint="step-1", data="scenes",
        commit=None, metrics=[metric, missing], notes=["a note"],
    )
    seen = {}

    def evaluate(workspace, run_name, probes, split, limit, kind, progress, device, settings, only_report=False):
        progress("a", 1, 2)
        seen.update(run=run_name, probes=probes, split=split, limit=limit, kind=kind, device=device)
        page = here / "index.html"
        done = {"results": [result], "report": page, "files": [here / "a.json"], "skipped": {"b": "no sound"}}
        return types.SimpleNamespace(**done, run="demo")

    fake("nano4m_cli.probes._evaluate", evaluate=evaluate, listing=lambda kind: {kind + "1": "what it is"})
    a_run(here, "demo")
    done = run(command, *args, "--limit", 7, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert seen == {"run": None, "probes": ["a", "b"], "split": None, "limit": 7, "kind": command, "device": "cpu"}
    row = next(line for line in done.stdout.splitlines() if line.startswith("rgb->depth/absrel"))
    assert row.split() == ["rgb->depth/absrel", "0.25", "0.2", "..", "0.3", "40", "1", "-", "-", "-", "no"]
    assert "a: A title" in done.stdout and done.stdout.endswith(f"\n{here / 'index.html'}\n")
    assert "run: runs/demo" in done.stderr and "notice: a: a note" in done.stderr
    assert "notice: b left out: no sound" in done.stderr
    data = json.loads(run(command, *args, "--json").stdout)
    assert data["results"][0]["metrics"][0]["ci95"] == [0.2, 0.3]
    assert json.loads(run(command, "--list", "--json").stdout) == {"probes": {command + "1": "what it is"}}
    fails(run("eval", "--report", "--probe", "a"), 2, "--report runs no probe")


# -- how it looks -----------------------------------------------------------------------------------------------------


def test_tables():
    lines = _show.table_lines(["name", "value"], [["a", 1.23456], ["long", 12], ["none", None]])
    assert lines == ["name  value", "a     1.235", "long     12", "none      -"]
    assert _show.table_lines(["", ""], [["a", 1]]) == ["a  1"]
    assert _show.table_lines(["name", "value"], []) == ["name  value"]


def test_json_has_no_nan():
    assert _show.plain({"a": [float("nan"), 1.5, True, None]}) == {"a": [None, 1.5, True, None]}


def test_a_line_per_tenth():
    said = []
    lines = _show._Lines(said.append)
    for done in range(0, 1001):
        lines.progress("samples", done, 1000)
    assert [s.split()[1] for s in said] == [f"{n}/1000" for n in range(100, 1001, 100)]


def test_clock():
    assert [_show.clock(s) for s in (0, 59.6, 3600, 86399)] == ["0:00:00", "0:01:00", "1:00:00", "23:59:59"]


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_bars_on_a_terminal(space, no_color):
    env = {**os.environ, **ENV, "TERM": "xterm", "NO_COLOR": no_color}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nano4m_cli", "fetch", "scenes", *TINY, "--root", str(space), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    out, _ = child.communicate(timeout=120)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    assert json.loads(out)["kept"] == 20
    assert b"20/20" in shown
    assert (b"\x1b[3" in shown or b"\x1b[9" in shown) == (not no_color)

#!/usr/bin/env bash
# From nothing to a report on the embedded data: minutes on two CPU cores. Safe to run again: what is there is kept.
# Everything lands in the current workspace (NANO4M_ROOT, default: this repository): data/, runs/demo/.
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

begin=$SECONDS
stage() { echo; echo "== $* ($((SECONDS - begin)) s)"; }

stage "fetch: 14,000 rendered scenes with sound and captions"
nano4m fetch scenes
stage "tokenize: fit five tokenizers, encode every sample"
nano4m tokenize
stage "train: one any-to-any model"
nano4m train cfgs/demo.yaml --resume
stage "generate: a caption to a picture and a sound"
nano4m generate --run demo --from caption="a large red metal sphere" --to rgb,audio
stage "eval: what it learned, on held-out scenes"
nano4m eval --run demo >/dev/null # hundreds of figures: the report and runs/demo/eval hold them
stage "probe: what its features hold"
nano4m probe linear --run demo --quiet >/dev/null
stage "done"
python - <<'P'
import json, os, pathlib
run = pathlib.Path(os.environ.get("NANO4M_ROOT", ".")) / "runs" / "demo"
metrics = {m["name"]: m for p in ("class", "crossmodal", "retrieval") for m in json.loads((run / "eval" / f"{p}.json").read_text())["metrics"]}
print(f"{'on held-out scenes':38} {'value':>7}  {'95% interval':>15}  {'chance':>7}  {'ceiling':>7}")
show = lambda v: "-" if v is None else f"{v:.3f}"
for name, m in metrics.items():
    source, target = name.split("/")[0].split("->") if "->" in name else ("", "")
    if name.endswith(("_acc", "_acc_novel")) and (source, target) in {("caption", "rgb"), ("audio", "rgb"), ("rgb", "caption"), ("audio", "caption"), ("caption", "audio"), ("rgb", "audio")} or name in ("rgb->depth/absrel_ratio", "rgb->normal/angle_ratio", "audio->rgb/r1", "audio->rgb/r5"):
        low, high = m["ci95"]
        print(f"{name:38} {show(m['value']):>7}  {low:6.3f} .. {high:.3f}  {show(m['chance']):>7}  {show(m['ceiling']):>7}")
print(f"\nopen {run}/report/index.html")
P

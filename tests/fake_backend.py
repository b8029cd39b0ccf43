"""A backend that trains nothing: it writes what a run would, resumes as a run would, and fails or waits on demand.

The learning rate stands for how good a trial is. What is to go wrong stands in ``plan.json`` beside the sweep
directory: {"fail": [lr, ...], "wait": {lr: step}, "interrupt": [lr, ...]}; a trial that waits goes on once there is a
file ``go`` beside it; one that is interrupted has saved and ends with 42, though nobody asked it to.
"""

import json
import signal
import sys
import time
from pathlib import Path

from dreamer4_jax.config import UserError
from launch.spec import RunSpec

STEPS = 10


def run(spec: RunSpec) -> int:
    """A run whose loss falls to 100 lr."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    directory, beside = Path(spec.directory), Path(spec.output).parent
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "starts").open("a") as file:
        file.write("x")
    lr = float(dict(item.split("=") for item in spec.overrides)["train.dynamics.lr"])
    plan = {"fail": [], "wait": {}, "refuse": [], "interrupt": []}
    if (beside / "plan.json").exists():
        plan |= json.loads((beside / "plan.json").read_text())
    metrics = directory / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if lr in plan["refuse"]:
        raise UserError("no such data")
    for step in range(done + 1, STEPS + 1):
        with metrics.open("a") as file:
            file.write(json.dumps({"phase": "dynamics", "step": step, "loss": 100 * lr + 1 / step}) + "\n")
        if lr in plan["fail"] and step == 5:
            print(f"starting\nloss is not finite at {lr}")
            return 3
        if lr in plan["interrupt"] and step == 5:
            return 42
        while plan["wait"].get(str(lr)) == step and not (beside / "go").exists():
            time.sleep(0.01)
    interval = {"mean": 1 - lr, "low": 0.9 - lr, "high": 1.1 - lr}
    (directory / "results.json").write_text(json.dumps({"models": [{"name": "ours", "score": interval}]}))
    (directory / "ledger.json").write_text(json.dumps({"dynamics": {"train": 100 * lr, "save": 1.0}}))
    return 0

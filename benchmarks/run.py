"""`make bench`: every CPU benchmark, and how its ratios stand to those of benchmarks/baseline.json.

A ratio has both of its sides from one run on one machine, so it can be compared between machines, and under load, as times cannot. A ratio
that is worse than the baseline's by more than the tolerance is marked, and makes the command fail.

    python benchmarks/run.py                  # measure and compare
    python benchmarks/run.py --update         # measure, and make this the baseline
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"


class Task(NamedTuple):
    """A script, its arguments, and whether its ratios say how many times quicker (or smaller) than the other side we are."""

    script: str
    arguments: tuple[str, ...]
    higher_is_better: bool


TASKS = (
    Task("ttt_op.py", (), True),
    Task("depth_decoder.py", ("--frames", "128", "--peer-frames", "4", "--repeats", "1"), True),
    Task("streaming.py", ("--frames", "120"), False),
)


def measure(task: Task) -> dict[str, float]:
    """Runs the script in a process of its own, its table going to the screen, and gives its ratios by name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run([sys.executable, HERE / task.script, *task.arguments, "--out", out], check=True, stderr=subprocess.DEVNULL)
        ratio: Any = json.loads(out.read_text())["ratio"]
    named = ratio if isinstance(ratio, dict) else {"": ratio}
    return {f"{task.script.removesuffix('.py')} {name}".strip(): value for name, value in named.items()}


def change(ratio: float, before: float, higher_is_better: bool) -> float:
    """How many times better than before: below 1 is worse."""
    return ratio / before if higher_is_better else before / ratio


def compare(found: dict[str, tuple[float, bool]], baseline: dict[str, float], tolerance: float) -> list[str]:
    """Prints all ratios beside their baselines and gives the names of those that are worse by more than the tolerance."""
    worse = []
    print(f"{'ratio':44}{'now':>9}{'baseline':>10}{'change':>9}")
    for name, (ratio, higher_is_better) in found.items():
        if name not in baseline:
            print(f"{name:44}{ratio:9.2f}{'new':>10}")
            continue
        better = change(ratio, baseline[name], higher_is_better)
        if better < 1 - tolerance:
            worse.append(name)
        print(f"{name:44}{ratio:9.2f}{baseline[name]:10.2f}{better:8.2f}x{'  WORSE' if name in worse else ''}")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what was measured to baseline.json")
    parser.add_argument("--tolerance", type=float, default=0.3, help="how much worse a ratio may be before the command fails")
    options = parser.parse_args()
    found = {}
    for task in TASKS:
        print(f"\n== {task.script} {' '.join(task.arguments)}", flush=True)
        found |= {name: (ratio, task.higher_is_better) for name, ratio in measure(task).items()}
    print()
    baseline = json.loads(BASELINE.read_text())["ratios"] if BASELINE.exists() else {}
    worse = compare(found, baseline, options.tolerance)
    if options.update:
        machine = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        BASELINE.write_text(
            json.dumps(machine | {"ratios": {name: round(ratio, 3) for name, (ratio, _) in found.items()}}, indent=2) + "\n"
        )
        print(f"wrote {BASELINE}")
        return 0
    if worse:
        print(f"worse than the baseline by more than {options.tolerance:.0%}: {', '.join(worse)}")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())

"""The evaluation's demonstration, in small: sets in the benchmarks' layouts from the sample dialogues, one command, one report."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demonstration_leaves_its_report(tmp_path):
    small = ["long_context.max_frames=100", "inner_loss.max_frames=60", "dialogue.max_seconds=2", "dialogue.max_recordings=1"]
    small += ["recall.steps=2", "recall.sequences=8", f"recall.output={tmp_path / 'recall'}"]
    command = [sys.executable, str(ROOT / "examples" / "evaluate_demo.py"), f"output={tmp_path / 'out'}", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: task["pairs"] for name, task in results["tasks"]["zero_shot"]["tasks"].items() if name != "sblimp"} == {
        "swuggy": 10 * 12,
        "sstorycloze": 10,
        "salmon": 10,
    }
    assert "TWIST" not in (tmp_path / "out" / "report.html").read_text()  # these sets are not the benchmarks

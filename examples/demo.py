"""The main job from end to end, as `make demo-train` runs it: train the tiny model on the sample dialogues, reload it elsewhere, talk to
it.

python examples/demo.py [key=value …] passes settings on to the recipe, as in seed=1. What an earlier run left in run_dir is removed first.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from modeling_moshi_ttt.cli import without_trace
from modeling_moshi_ttt.common.files import clear_folder
from modeling_moshi_ttt.training.report import shown
from modeling_moshi_ttt.training.run_config import load_run_config

RECIPE = "configuration/train/demo.yaml"
ACCELERATE = "configuration/accelerate/cpu.yaml"
DIALOGUES = "examples/data/dialogues/train.jsonl"


def run(*command: str) -> None:
    print("\n$ " + " ".join(command), flush=True)
    # the model's products are small: threads would wait for one another longer than they compute
    subprocess.run([sys.executable, *command], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def show(run_dir: Path) -> None:
    """Print the held-out scores before and after."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = [record for record in records if "eval_loss" in record]
    print(f"\n{'held out':<12}{'text loss':>12}{'audio loss':>12}{'words right':>12}")
    for name, record in (("before", scores[0]), ("after", scores[-1])):
        numbers = (
            shown(record[f"eval_{key}"], spec) for key, spec in (("text_loss", ".3f"), ("audio_loss", ".3f"), ("text_accuracy", ".1%"))
        )
        print(name.ljust(12) + "".join(number.rjust(12) for number in numbers))
    print(f"loss curve: {run_dir / 'loss.png'}; TensorBoard: tensorboard --logdir {run_dir}", flush=True)


def main() -> int:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings in place of those of {RECIPE}")
    overrides = parser.parse_args().overrides
    run_dir = Path(load_run_config(RECIPE, overrides).run_dir)
    clear_folder(run_dir, "run_config.json")
    try:
        run("-m", "accelerate.commands.launch", "--config_file", ACCELERATE, "examples/finetune.py", RECIPE, *overrides)
        show(run_dir)
        thresholds = ("--led", "0.95", "--free", "0.8", "--reply", str(run_dir / "reply.wav"))
        run("examples/talk.py", str(run_dir / "final"), DIALOGUES, *thresholds)
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"\nthe demonstration took {(time.perf_counter() - begin) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(without_trace(main))

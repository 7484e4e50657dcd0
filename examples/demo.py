"""The main job from end to end, as `make demo` runs it: train the tiny model on the sample dialogues, reload it elsewhere, talk to it.

python examples/demo.py [key=value …] passes settings on to the recipe, as in seed=1.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

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
        print(f"{name:<12}{record['eval_text_loss']:>12.3f}{record['eval_audio_loss']:>12.3f}{record['eval_text_accuracy']:>12.1%}")
    print(f"loss curve: {run_dir / 'loss.png'}; TensorBoard: tensorboard --logdir {run_dir}", flush=True)


def main() -> int:
    begin = time.perf_counter()
    overrides = sys.argv[1:]
    given = dict(item.split("=", 1) for item in overrides)
    run_dir = Path(given.get("run_dir", "runs/demo"))
    shutil.rmtree(run_dir, ignore_errors=True)
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
    sys.exit(main())

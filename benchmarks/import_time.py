"""How long it takes to import the package, beside torch and transformers alone, and to load the tiny model: python
benchmarks/import_time.py

Processor seconds of fresh processes, medians; the two imports take turns. --out FILE also writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TINY = Path(__file__).parent.parent / "configuration" / "model" / "tiny.json"
BASE = "import torch, transformers"
PACKAGE = BASE + ", modeling_moshi_ttt"
LOAD = PACKAGE + "; from modeling_moshi_ttt import MoshiTTTForConditionalGeneration as Model"
CLOCK = "import time; begin = time.process_time(); {work}; print(time.process_time() - begin)"
SAVE = "Model(modeling_moshi_ttt.MoshiTTTConfig.from_json_file({config!r})).save_pretrained({folder!r})"
# What must not be needed to load and run on a CPU.
EXTRAS = ("peft", "datasets", "matplotlib", "sphn", "tensorboard")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().rpartition("\n")[2]


def measure(repeats: int) -> dict[str, float]:
    """Median processor seconds of each import, and of loading the tiny model once everything is imported."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"{LOAD}; {SAVE.format(config=str(TINY), folder=folder)}")
        load = f"{LOAD}; import time; begin = time.process_time(); Model.from_pretrained({folder!r}); print(time.process_time() - begin)"
        codes = {
            "torch and transformers": CLOCK.format(work=BASE),
            "and this package": CLOCK.format(work=PACKAGE),
            "load the tiny model": load,
        }
        times: dict[str, list[float]] = {name: [] for name in codes}
        for _ in range(repeats):
            for name, code in codes.items():
                times[name].append(float(run(code)))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    found = measure(args.repeats)
    base, package = found["torch and transformers"], found["and this package"]
    extras = run(f"{PACKAGE}; import sys; print(*sorted(set({EXTRAS!r}) & sys.modules.keys()))")
    for name, seconds in found.items():
        print(f"{name:<26} {seconds:7.3f} s")
    print(
        f"the package adds {package - base:.3f} s, a factor of {package / base:.2f}; packages of the extras it imports: {extras or 'none'}"
    )
    if args.out:
        args.out.write_text(
            json.dumps({"processor_seconds": found, "added": package - base, "ratio": package / base, "extras": extras}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

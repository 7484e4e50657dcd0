"""How much faster than real time one core makes batches from cached codes, in shuffled windows and in lanes.

python benchmarks/train_loader.py --out train_loader.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from modeling_moshi_ttt.data.prepared import Prepared, PreparedSet
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.tokens_moshi_ttt import FRAME_RATE
from modeling_moshi_ttt.training.windows import Loader, WindowReader, make_plan

DELAYS = [0, 1, 1, 1, 1, 1, 1, 1]


def recordings(folder: Path, count: int, minutes: float) -> list[Prepared]:
    """Random codes of Moshi's size, as the cache keeps them."""
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        frames = round(minutes * 60 * FRAME_RATE)
        path = folder / f"{i}.safetensors"
        save_file({"codes": random.integers(2048, size=(2, 8, frames)).astype(np.int16)}, path)
        found.append(Prepared(str(i), path, frames, random.integers(32000, size=frames).astype(np.int32)))
    return found


def times_real_time(data: PreparedSet, settings: DataSettings, steps: int) -> float:
    """Seconds of recording for every second of one core's work."""
    window = round(settings.window_seconds * FRAME_RATE)
    plan = make_plan(data, settings, settings.batch_size, window, seed=0)
    loader = iter(Loader(plan, WindowReader(data.recordings, DELAYS, 8), settings.batch_size, 1, 1, 0))
    next(loader)
    begin = time.process_time()
    frames = sum(next(loader).micro_batches[0][0].frames for _ in range(steps))
    return frames / FRAME_RATE / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        found = recordings(Path(folder), 32, 10.0)
        data = PreparedSet(found, [len(found)], [1.0])
        for carry in ("none", "state+attention"):
            for seconds in (20.0, 100.0):
                settings = DataSettings(train="", carry=carry, window_seconds=seconds, batch_size=16)
                rows[f"carry {carry}, {seconds:.0f} s x 16"] = times_real_time(data, settings, options.steps)
    for name, speed in rows.items():
        print(f"{name:34}{speed:12,.0f} x real time (goal 200)")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

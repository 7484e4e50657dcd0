"""A live frame of 80 ms on one CPU thread: without and with TTT layers, eager, compiled and in int8, and Kyutai's own LMGen beside them.

Medium configuration: 131M parameters (width 512, 8 layers; depth decoder 256 wide, 6 layers), TTT-MLP in 3 of the 8 layers, random
weights. The sides take turns frame by frame, and a ratio is the median over the frames of two times taken one after the other, so that what
else the machine does falls on both. Frames late in a conversation are looked at too, to show that a frame's cost does not grow.

    python benchmarks/streaming.py                           # what `make bench` runs: float32 without and with TTT
    python benchmarks/streaming.py --full --out benchmarks/streaming.json   # all sides (`make peer`: LMGen), and what a frame costs
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import frame_cost
import torch
from medium import medium

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTInt8Config

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
TTT_LAYERS = [3, 4, 5]
PLAIN, WITH_TTT, LMGEN = "float32", "float32, TTT", "Kyutai's LMGen"
SKIPPED = 10  # first frames, in which memory is taken

Frame = Callable[[], float]  # runs one frame and returns its milliseconds of processor time


def stream_frame(model: MoshiTTTForConditionalGeneration) -> Frame:
    """A stream's frames."""
    stream = model.new_stream()

    def run() -> float:
        codes = torch.randint(0, 2048, (1, 8))
        begin = time.process_time()
        stream.step(codes)
        return 1e3 * (time.process_time() - begin)

    return run


@contextmanager
def lmgen_frame() -> Any:
    """LMGen's frames, in a process of its own."""
    command = [PEER, HERE / "lmgen_frames.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"NO_TORCH_COMPILE": "1"}) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None

        def run() -> float:
            print(file=peer.stdin, flush=True)
            return float(peer.stdout.readline())

        yield run


def compiled(model: MoshiTTTForConditionalGeneration) -> MoshiTTTForConditionalGeneration:
    model.compile_stream()
    return model


def int8(model: MoshiTTTForConditionalGeneration) -> MoshiTTTForConditionalGeneration:
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": MoshiTTTInt8Config()}
        return MoshiTTTForConditionalGeneration.from_pretrained(place, **options).eval()


def sides(full: bool) -> dict[str, Frame]:
    """What is measured, each begun."""
    frames = {PLAIN: stream_frame(medium([]).eval()), WITH_TTT: stream_frame(medium(TTT_LAYERS).eval())}
    if full:
        for name, change in (("compiled", compiled), ("int8", int8), ("int8, compiled", lambda model: compiled(int8(model)))):
            frames[name] = stream_frame(change(medium([]).eval()))
            frames[f"{name}, TTT"] = stream_frame(change(medium(TTT_LAYERS).eval()))
    return frames


def frame_times(frames: dict[str, Frame], count: int) -> dict[str, list[float]]:
    """Milliseconds of `count` frames of every side, in turns."""
    times: dict[str, list[float]] = {name: [] for name in frames}
    for _ in range(count):
        for name, run in frames.items():
            times[name].append(run())
    return times


def ratio(times: list[float], beside: list[float]) -> float:
    """Median of the ratios of frames that were run one after the other."""
    return statistics.median(one / other for one, other in zip(times[SKIPPED:], beside[SKIPPED:], strict=True))


def costs() -> dict[str, Any]:
    """Operations and host reads of a frame, and bytes of state a caller."""
    layers = {"without TTT": [], "TTT": frame_cost.TTT_LAYERS}
    operations = {name: frame_cost.frame_operations(frame_cost.deep(some)) for name, some in layers.items()}
    state = {name: {str(window): frame_cost.bytes_a_caller(window, some) for window in frame_cost.WINDOWS} for name, some in layers.items()}
    return {"operations": operations, "bytes_a_caller": state}


def print_times(rows: dict[str, dict[str, float]]) -> None:
    print(f"{'':20}{'ms a frame':>12}{'late':>8}{'/ float32':>11}{'/ LMGen':>9}")
    for name, row in rows.items():
        beside = f"{row['of_lmgen']:8.2f}x" if "of_lmgen" in row else ""
        print(f"{name:20}{row['ms']:12.1f}{row['ms_late']:8.1f}{row['of_float32']:10.2f}x{beside}")


def print_costs(found: dict[str, Any]) -> None:
    for name, kinds in found["operations"].items():
        for rows, counts in kinds.items():
            print(f"32 layers, {name:12} {rows:14} {counts['operations']:5} operations, {counts['host_reads']} host reads a frame")
    for name, windows in found["bytes_a_caller"].items():
        held = ", ".join(f"{count / 1e9:.2f} GB at window {window}" for window, count in windows.items())
        print(f"Moshi 7B, bfloat16, {name:12} a caller holds {held}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=400, help="frames of each conversation; more than the window of 256")
    parser.add_argument("--full", action="store_true", help="also compiled, int8 and LMGen, operations and bytes")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with ExitStack() as stack:
        frames = sides(options.full)
        if options.full and PEER.exists():
            frames[LMGEN] = stack.enter_context(lmgen_frame())
        times = frame_times(frames, options.frames)
    rows = {}
    for name, taken in times.items():
        rows[name] = {"ms": statistics.median(taken[SKIPPED:]), "ms_late": statistics.median(taken[-options.frames // 4 :])}
        rows[name]["of_float32"] = ratio(taken, times[PLAIN])
        if LMGEN in times:
            rows[name]["of_lmgen"] = ratio(taken, times[LMGEN])
    print_times(rows)
    if options.full and LMGEN not in times:
        print(f"{PEER} is not installed: LMGen was not measured (`make peer` installs it)")
    found: dict[str, Any] = {"rows": rows, "ratio": ratio(times[WITH_TTT], times[PLAIN])}
    print(f"with TTT a frame takes {found['ratio']:.2f}x the time of one without")
    if options.full:
        found |= costs() | {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
        print_costs(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

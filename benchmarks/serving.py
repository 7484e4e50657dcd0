"""Callers of one model against the time of a tick and the memory of a row, for windows of 64, 250 and 3000 frames, without and with TTT.

At 131M (random weights, one CPU thread) both are measured, of the model without a codec: Mimi at its real size is for GPUs. At 7B the memory
is counted on the shapes of a whole cache. Whether ticks are linear in callers is a least-squares line through their medians.

    python benchmarks/serving.py --out benchmarks/serving.json
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
from measure import fitted_line
from medium import medium

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.live.capacity import cache_bytes, quantile

WINDOWS = (64, 250, 3000)
SEED = 0
# Moshi's own sizes are the configuration's defaults; TTT as configuration/train/ttt_7b.yaml trains it.
TTT_7B = {"ttt_layers": "23-31", "ttt_mixer": "mlp", "ttt_mini_batch_size": 16}


def row_bytes_7b(window: int, ttt: bool) -> int:
    """Of a cache in bfloat16 that holds its whole window, made of shapes alone."""
    config = MoshiTTTConfig(sliding_window=window, **(TTT_7B if ttt else {"ttt_layers": []}))
    with torch.device("meta"):
        model = MoshiTTTForConditionalGeneration(config).to(torch.bfloat16)
        cache = model.new_cache(1)
        cache.fill(model)
    return cache_bytes(cache)


def measured(window: int, layers: list[int], callers: list[int], ticks: int) -> dict:
    """Ticks of full rings, in which every caller talks."""
    model, times = medium(layers, window).eval(), {}
    for rows in callers:
        stream, taken = model.new_stream(rows, seeds=[SEED] * rows), []
        stream.past_key_values.fill(model)
        for _ in range(ticks + 3):
            codes = torch.randint(0, model.config.audio_vocab_size, (rows, model.config.num_user_codebooks))
            begin = time.process_time()
            stream.step(codes)
            taken.append(1e3 * (time.process_time() - begin))
        times[rows] = taken[3:]
    p50 = {rows: statistics.median(taken) for rows, taken in times.items()}
    slope, fit = fitted_line([float(rows) for rows in callers], list(p50.values()))
    return {
        "window": window,
        "ttt_layers": len(layers),
        "row_megabytes": cache_bytes(stream.past_key_values) / 1e6,
        "p50_ms": p50,
        "p99_ms": {rows: quantile(taken, 0.99) for rows, taken in times.items()},
        "ms_a_caller": slope,
        "r2": fit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ticks", type=int, default=30, help="of each number of callers")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rows = [measured(window, layers, options.callers, options.ticks) for window in WINDOWS for layers in ([], [3, 4, 5])]
    print(f"131M, one CPU thread\n{'window':>8}{'TTT layers':>12}{'MB a row':>10}{'callers/GB':>12}{'p99 ms at':>12}", *options.callers)
    for row in rows:
        p99 = "".join(f"{ms:8.0f}" for ms in row["p99_ms"].values())
        print(
            f"{row['window']:8}{row['ttt_layers']:12}{row['row_megabytes']:10.1f}{1e3 / row['row_megabytes']:12.1f}{p99}  r2 {row['r2']:.3f}"
        )
    seven = {f"{window} {'with' if ttt else 'without'} TTT": row_bytes_7b(window, ttt) for window in WINDOWS for ttt in (False, True)}
    print("\n7B in bfloat16, computed")
    for name, size in seven.items():
        print(f"{name:>20}{size / 1e6:10.0f} MB a row{1e9 / size:8.2f} callers per GB")
    by = {(row["window"], bool(row["ttt_layers"])): row["row_megabytes"] for row in rows}
    ratios = {"131M": by[3000, False] / by[250, True], "7B": seven["3000 without TTT"] / seven["250 with TTT"]}
    print(
        "\ncallers per GB, window 250 with TTT against 3000 without:",
        ", ".join(f"{ratio:.1f}x at {name}" for name, ratio in ratios.items()),
    )
    if options.out:
        found = {
            "date": datetime.date.today().isoformat(),
            "seed": SEED,
            "ticks": options.ticks,
            "rows": rows,
            "row_bytes_7b": seven,
            "ratios": ratios,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

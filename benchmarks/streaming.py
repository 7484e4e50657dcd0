"""One live frame of 80 ms, without and with TTT layers, and Kyutai's own LMGen beside them where it is installed; one CPU thread.

Medium configuration: 131M parameters (width 512, 8 layers; depth decoder 256 wide, 6 layers), TTT-MLP in 3 of the 8 layers, random
weights. Frames are timed in turns within one run, also late in a conversation, to show that a frame's cost does not grow.

    python benchmarks/streaming.py --out streaming.json     # `benchmarks/install_peer.sh` installs LMGen's package into .venv-peer
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from medium import medium

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration

PEER = Path(__file__).resolve().parent.parent / ".venv-peer" / "bin" / "python"
PEER_CODE = """
import json, statistics, sys, time, torch
from moshi.models.lm import LMGen, LMModel
torch.set_num_threads(1)
frames, skip = int(sys.argv[1]), int(sys.argv[2])
lm = LMModel(delays=[0] + 2 * [0, 1, 1, 1, 1, 1, 1, 1], n_q=16, dep_q=8, card=2048, text_card=32000, dim=512, num_heads=8, num_layers=8,
    hidden_scale=4.125, causal=True, context=256, max_period=10000, gating="silu", norm="rms_norm_f32", positional_embedding="rope",
    depformer_dim=256, depformer_dim_feedforward=1056, depformer_num_heads=8, depformer_num_layers=6, depformer_multi_linear=True,
    depformer_context=8, depformer_gating="silu", depformer_pos_emb="none", depformer_weights_per_step=True).eval()
times = []
gen = LMGen(lm)
with torch.no_grad(), gen.streaming(1):
    for t in range(frames):
        begin = time.process_time()
        gen.step(torch.randint(0, 2048, (1, 8, 1)))
        times.append(time.process_time() - begin)
print(json.dumps({"ms": 1e3 * statistics.median(times[skip:]), "parameters": sum(p.numel() for p in lm.parameters())}))
"""


def step_times(models: dict[str, MoshiTTTForConditionalGeneration], frames: int) -> dict[str, list[float]]:
    """Milliseconds of each frame of each model's stream; the models take turns."""
    streams = {name: model.new_stream() for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(frames):
        for name, stream in streams.items():
            begin = time.process_time()
            stream.step(torch.randint(0, 2048, (1, 8)))
            times[name].append(1e3 * (time.process_time() - begin))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=400, help="frames of each conversation; more than the window of 256")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times = step_times({"without TTT": medium([]).eval(), "TTT-MLP in 3 of 8 layers": medium([3, 4, 5]).eval()}, options.frames)
    quarter = options.frames // 4
    rows = {}
    for name, taken in times.items():
        rows[name] = {"ms": statistics.median(taken[10:]), "ms_late": statistics.median(taken[-quarter:])}
    if PEER.exists():
        done = subprocess.run([PEER, "-c", PEER_CODE, str(quarter), "10"], capture_output=True, text=True, env={"NO_TORCH_COMPILE": "1"})
        if done.returncode:
            raise RuntimeError(f"LMGen did not run in {PEER}: {done.stderr[-800:]}")
        rows["Kyutai's LMGen, no TTT"] = json.loads(done.stdout.splitlines()[-1])
    else:
        print(f"{PEER} is not installed: LMGen was not measured (benchmarks/install_peer.sh installs it)")
    print(f"{'':28}{'ms a frame':>12}{'late':>8}{'x real time':>13}")
    for name, row in rows.items():
        print(f"{name:28}{row['ms']:12.1f}{row.get('ms_late', float('nan')):8.1f}{80 / row['ms']:13.1f}")
    ratio = rows["TTT-MLP in 3 of 8 layers"]["ms"] / rows["without TTT"]["ms"]
    print(f"with TTT a frame takes {ratio:.2f}x the time of one without")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()

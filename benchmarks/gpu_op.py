"""The TTT ops and one TTT layer on a GPU: Triton kernels beside the torch scan, in one run.

    python benchmarks/gpu_op.py [--json file] [--tiny]

For each case: milliseconds forward, and forward with backward; peak memory over the inputs; TFLOP/s and the share of the roofline, the time
that the same products would take at the tensor cores' dense tf32 rate or that the inputs and outputs would take through device memory,
whichever is longer. tf32 products ("high"), as bf16 models use. `--tiny` runs the same code on the CPU under TRITON_INTERPRET=1, to show
that it runs; its times mean nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from modeling_moshi_ttt import ttt_kernels
from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTLinear
from modeling_moshi_ttt.ttt_ops import TTTState, ttt_linear, ttt_mlp

OPS = {"linear": ttt_linear, "mlp": ttt_mlp}
LAYERS = {"linear": TTTLinear, "mlp": TTTMLP}
# Dense tf32 TFLOP/s and TB/s of device memory, as the makers give them.
PEAKS = {"H100": (494.7, 3.35), "H200": (494.7, 4.8)}


class Case(NamedTuple):
    mixer: str
    dim: int
    rows: int
    frames: int
    b: int = 16
    heads: int = 32


def cases() -> list[Case]:
    wanted = [Case(mixer, dim, rows, 1250) for mixer in OPS for dim in (64, 128) for rows in (1, 16)]
    over_b = [Case("mlp", 128, 1, 1250, b) for b in (4, 64)]
    over_t = [Case("mlp", 128, 1, frames) for frames in (256, 512, 2048, 8192)]
    return wanted + over_b + over_t


def multiplications(case: Case) -> tuple[float, float]:
    """Floating point operations of the matrix products, forward and with backward (what the formulas need, nothing computed twice)."""
    mini_batches = case.rows * case.heads * -(-case.frames // case.b)
    width = case.dim if case.mixer == "linear" else 4 * case.dim
    with_weights = 2 * case.b * case.dim * width
    among_tokens = 2 * case.b * case.b * case.dim
    if case.mixer == "linear":
        return mini_batches * (3 * with_weights + 2 * among_tokens), mini_batches * (9 * with_weights + 6 * among_tokens)
    hidden = 4 * among_tokens
    forward = 7 * with_weights + 2 * among_tokens + 2 * hidden
    backward = 14 * with_weights + 4 * among_tokens + 4 * hidden
    return mini_batches * forward, mini_batches * (forward + backward)


def least_bytes(case: Case) -> tuple[float, float]:
    """Bytes that must pass through device memory: the tokens in and out, the weights once in and once out, and their gradients."""
    tokens = 4 * case.rows * case.frames * case.heads * case.dim
    width = case.dim if case.mixer == "linear" else 8 * case.dim
    weights = 4 * case.rows * case.heads * case.dim * width
    return 4 * tokens + 2 * weights, 12 * tokens + 5 * weights


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time, after two runs that compile, tune and warm up."""
    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def peak_megabytes(work: Callable[[], object], device: str) -> float:
    if device != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def op_work(case: Case, backend: str, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without gradients, and forward with backward, of one op."""
    torch.manual_seed(0)
    shape = (case.rows, case.frames, case.heads, case.dim)
    q, k, v = (torch.nn.functional.normalize(torch.randn(shape, device=device), dim=-1) for _ in range(3))
    lr = torch.rand(shape[:3], device=device) * 0.1 / case.dim
    shared = [1 / torch.arange(1, case.b + 1, device=device), torch.ones(shape[2:], device=device), torch.zeros(shape[2:], device=device)]
    width = case.dim if case.mixer == "linear" else 4 * case.dim
    weights = [torch.randn(case.heads, case.dim, width, device=device) * 0.02, torch.zeros(case.heads, 1, width, device=device)]
    if case.mixer == "mlp":
        weights += [torch.randn(case.heads, width, case.dim, device=device) * 0.02, torch.zeros(case.heads, 1, case.dim, device=device)]
    leaves = [x.requires_grad_() for x in (q, k, v, lr, *shared, *weights)]

    def forward():
        state = TTTState.initial(*leaves[7:], batch_size=case.rows)
        return OPS[case.mixer](*leaves[:7], state, mini_batch_size=case.b, backend=backend)[0]

    def inference():
        with torch.no_grad():
            return forward()

    return inference, lambda: torch.autograd.grad(forward(), leaves, q.detach())


def layer_work(case: Case, backend: str, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One frame with a state, without gradients, and forward with backward of a whole layer in bf16."""
    config = SimpleNamespace(
        hidden_size=case.heads * case.dim, ttt_mixer=case.mixer, ttt_num_heads=case.heads, ttt_head_dim=case.dim,
        ttt_mini_batch_size=case.b, ttt_base_lr=0.1,
        ttt_inner_norm="layer_norm", ttt_write_threshold=0.0, ttt_rope="mini_batch", ttt_norm_eps=1e-6,
        scan_checkpoint_group_size=16, ttt_implementation=backend,
    )  # fmt: skip
    layer = LAYERS[case.mixer](config).to(device, torch.bfloat16)
    x = torch.randn(case.rows, case.frames, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        state = layer(x[:, :17])[1]

    def frame():
        with torch.no_grad():
            return layer(x[:, :1], state)

    return frame, lambda: torch.autograd.grad(layer(x)[0], [x, *(p for p in layer.parameters() if p.requires_grad)], x.detach())


def measured(work: tuple[Callable[[], object], Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Times and memory, or `nan` for what does not fit into the GPU's memory."""
    try:
        first, both = (milliseconds(piece, device, repeats) for piece in work)
        return {"first_ms": first, "both_ms": both, "peak_mb": peak_megabytes(work[1], device)}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"first_ms": float("nan"), "both_ms": float("nan"), "peak_mb": float("nan")}


def op_row(case: Case, device: str, repeats: int, peaks: tuple[float, float] | None) -> dict[str, Any]:
    row: dict[str, Any] = {**case._asdict(), "BH": case.rows * case.heads}
    for backend in ("triton", "scan"):
        row[backend] = measured(op_work(case, backend, device), device, repeats)
    flops, moved = multiplications(case), least_bytes(case)
    for i, part in enumerate(("first", "both")):
        seconds = row["triton"][f"{part}_ms"] / 1e3
        row[f"{part}_tflops"] = flops[i] / seconds / 1e12
        least = max(flops[i] / peaks[0] / 1e12, moved[i] / peaks[1] / 1e12) if peaks else float("nan")
        row[f"{part}_roofline"] = least / seconds
    row["speedup"] = row["scan"]["both_ms"] / row["triton"]["both_ms"]
    return row


def print_op(row: dict[str, Any]) -> None:
    t, s = row["triton"], row["scan"]
    print(
        f"{row['mixer']:6} D={row['dim']:3} BH={row['BH']:3} T={row['frames']:4} b={row['b']:2}  "
        f"triton {t['first_ms']:8.2f} {t['both_ms']:8.2f} ms "
        f"{t['peak_mb']:7.0f} MB   scan {s['first_ms']:8.2f} {s['both_ms']:8.2f} ms {s['peak_mb']:7.0f} MB   {row['speedup']:5.1f}x   "
        f"{row['both_tflops']:6.1f} TFLOP/s, roofline {row['first_roofline']:.1%} {row['both_roofline']:.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny != ttt_kernels.interpreted():
        parser.error("--tiny goes together with TRITON_INTERPRET=1")
    device, repeats = ("cpu", 1) if args.tiny else ("cuda", 5)
    torch.set_float32_matmul_precision("high")
    name = "CPU, interpreted" if args.tiny else torch.cuda.get_device_name()
    peaks = next((peak for key, peak in PEAKS.items() if key in name), None)
    print(f"{name}, torch {torch.__version__}\nops: forward, forward + backward, peak memory")
    small = [Case("linear", 32, 1, 5, 4, heads=2), Case("mlp", 32, 1, 5, 4, heads=2)]
    ops, layers = [], []
    for case in small if args.tiny else cases():
        ops.append(op_row(case, device, repeats, peaks))
        print_op(ops[-1])
    print("layers in bf16: one frame, forward + backward of all frames, peak memory")
    for case in (
        [small[1]._replace(frames=18)]
        if args.tiny
        else [Case("linear", 128, 16, 1250), Case("mlp", 128, 1, 188), Case("mlp", 128, 16, 1250)]
    ):
        row: dict[str, Any] = case._asdict()
        for backend in ("triton", "scan"):
            row[backend] = measured(layer_work(case, backend, device), device, repeats)
        layers.append(row)
        sides = "   ".join(
            f"{n} {row[n]['first_ms']:.3f} {row[n]['both_ms']:.2f} ms {row[n]['peak_mb']:.0f} MB" for n in ("triton", "scan")
        )
        print(f"{case.mixer:6} D={case.dim:3} B={case.rows:2} T={case.frames:4}  {sides}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "ops": ops, "layers": layers}, indent=1))


if __name__ == "__main__":
    main()

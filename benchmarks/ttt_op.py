"""The TTT op on one CPU thread: forward + backward and decoding, beside the reference body and a plain loop in the published dual form.

Hidden size 1024 in 8 heads of 128, mini-batches of 16, float32. The plain loop (baseline_loop.py) is the stand-in for the public TTT-LM
layer's op. Also: how time grows with the length, and memory with length over group. Times are processor seconds of this one-thread process.

    python benchmarks/ttt_op.py --out ttt_op.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baseline_loop import Decoder, loop
from measure import fitted_line, peak_bytes, seconds
from torch import Tensor

from modeling_moshi_ttt.ttt_ops import TTTState, ttt_linear, ttt_mlp

OPS = {"mlp": ttt_mlp, "linear": ttt_linear}
MINI_BATCH = 16
REFERENCE_FRAMES = 32  # the reference keeps several copies of all weights for every token

Rows = list[dict[str, Any]]


def inputs_of(mixer: str, length: int, heads: int = 8, dim: int = 128) -> tuple[list[Tensor], list[Tensor]]:
    """The op's seven inputs and the initial weights, all requiring grad."""
    q, k, v = (torch.randn(1, length, heads, dim) for _ in range(3))
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    shared = 1 / torch.arange(1, MINI_BATCH + 1), torch.ones(heads, dim), torch.zeros(heads, dim)
    width = dim if mixer == "linear" else 4 * dim
    weights = [0.02 * torch.randn(heads, dim, width), torch.zeros(heads, 1, width)]
    if mixer == "mlp":
        weights += [0.02 * torch.randn(heads, width, dim), torch.zeros(heads, 1, dim)]
    inputs = [q, k, v, torch.rand(1, length, heads) / dim, *shared]
    return [x.requires_grad_() for x in inputs], [w.requires_grad_() for w in weights]


def learning(mixer: str, length: int, backend: str, group: int, heads: int = 8, dim: int = 128) -> Callable[[], object]:
    """Forward and backward to every input, as work without arguments."""
    inputs, weights = inputs_of(mixer, length, heads, dim)

    def work() -> object:
        state = TTTState.initial(*weights, batch_size=1)
        out, _ = OPS[mixer](*inputs, state, mini_batch_size=MINI_BATCH, group_size=group, backend=backend)
        return torch.autograd.grad(out.sum(), inputs + weights)

    return work


def loop_learning(mixer: str, length: int) -> Callable[[], object]:
    inputs, weights = inputs_of(mixer, length)

    def work() -> object:
        out, _ = loop(*inputs, tuple(w[None] for w in weights))
        return torch.autograd.grad(out.sum(), inputs + weights)

    return work


def measure_learning(mixer: str, length: int, group: int, repeats: int, with_reference: bool) -> Rows:
    works = {"scan": (learning(mixer, length, "scan", group), length), "plain loop": (loop_learning(mixer, length), length)}
    if mixer == "mlp":
        works["products alone"] = (products_alone(length), length)
    times = seconds(*(work for work, _ in works.values()), repeats=repeats)
    if with_reference:
        works["reference"] = (learning(mixer, REFERENCE_FRAMES, "reference", group), REFERENCE_FRAMES)
        times += seconds(works["reference"][0], repeats=2)
    return [
        {"mixer": mixer, "body": body, "frames": frames, "group": group, "seconds": taken, "peak_mb": peak_bytes(work) / 1e6}
        for (body, (work, frames)), taken in zip(works.items(), times)
    ]


@torch.no_grad()
def products_alone(length: int, heads: int = 8, dim: int = 128) -> Callable[[], object]:
    """The large matrix products of the MLP's forward and backward, with nothing between them: the scan's lower bound."""
    b, width = MINI_BATCH, 4 * dim
    W1, W2, d_W1, d_W2 = (torch.zeros(heads, *shape) for shape in 2 * [(dim, width), (width, dim)])
    key, both, three = (torch.zeros(heads, rows * b, dim) for rows in (1, 2, 3))
    hidden, d_both, d_three = (torch.zeros(heads, rows * b, width) for rows in (1, 2, 3))

    def move() -> None:
        W1.baddbmm_(key.mT, hidden), W2.baddbmm_(hidden.mT, key)

    def forward() -> None:
        both @ W1, hidden @ W2, key @ W2.mT, hidden @ W2
        move()

    def backward() -> None:
        move()
        key @ W2.mT, key @ W2.mT, hidden @ W2, key @ W2.mT, d_both @ W1.mT
        key @ d_W1, hidden @ d_W2, key @ d_W2.mT, hidden @ d_W1.mT
        d_W1.baddbmm_(both.mT, d_both), d_W2.baddbmm_(d_three.mT, three)

    def work() -> None:
        for _ in range(length // b):
            forward(), backward()

    return work


@torch.no_grad()
def measure_decoding(mixer: str, mini_batches: int) -> Rows:
    """Frame by frame, the two sides in turn by whole mini-batches, so that neither spoils the other's caches; the first one warms up."""
    inputs, weights = inputs_of(mixer, mini_batches * MINI_BATCH)
    state = TTTState.initial(*weights, batch_size=1)
    decoder = Decoder(inputs[4], inputs[5], inputs[6], tuple(w[None] for w in weights))
    taken: dict[str, list[float]] = {"scan": [], "plain loop": []}
    for place in range(0, mini_batches * MINI_BATCH, MINI_BATCH):
        frames = [[x[:, t : t + 1] for x in inputs[:4]] for t in range(place, place + MINI_BATCH)]
        outputs, expected = [], []
        for frame in frames:
            begin = time.process_time()
            out, state = OPS[mixer](*frame, *inputs[4:], state, mini_batch_size=MINI_BATCH)
            taken["scan"].append(time.process_time() - begin)
            outputs.append(out)
        for q, k, v, lr in [[x.transpose(1, 2) for x in frame] for frame in frames]:
            begin = time.process_time()
            expected.append(decoder.step(q, k, v, lr[..., None]).transpose(1, 2))
            taken["plain loop"].append(time.process_time() - begin)
        torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(expected, 1), rtol=0, atol=1e-3)
    return [
        {"mixer": mixer, "body": body, "mean_ms": 1e3 * statistics.mean(times[MINI_BATCH:]), "max_ms": 1e3 * max(times[MINI_BATCH:]),
         "median_ms": 1e3 * statistics.median(times[MINI_BATCH:])}
        for body, times in taken.items()
    ]  # fmt: skip


def measure_growth(mixer: str) -> dict[str, Any]:
    """Time from 256 to 8,192 frames, and memory kept for backward, each frame's own and one state a group, in 2 heads of 64."""
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    times = seconds(*(learning(mixer, length, "scan", 16, heads=2, dim=64) for length in lengths), repeats=3)
    slope, straight = fitted_line(lengths, times)
    groups = [(length, group) for length in (1024, 2048, 4096) for group in (1, 2, 4, 8, 16)]
    kept = [kept_bytes(mixer, length, group) / length for length, group in groups]  # a frame's own, and its part of a group's state
    state_a_frame, kept_straight = fitted_line([1 / group for _, group in groups], kept)
    return {
        "mixer": mixer, "lengths": lengths, "seconds": times, "us_a_frame": 1e6 * slope, "time_r2": straight,
        "groups": groups, "kept_bytes_a_frame": kept, "own_bytes": kept[-1] - state_a_frame / groups[-1][1], "state_bytes": state_a_frame,
        "kept_r2": kept_straight,
    }  # fmt: skip


def kept_bytes(mixer: str, length: int, group: int) -> int:
    """Bytes that one call keeps for its backward beyond its own inputs."""
    inputs, weights = inputs_of(mixer, length, heads=2, dim=64)
    given = {x.untyped_storage().data_ptr() for x in (*inputs, *weights)}
    sizes = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        state = TTTState.initial(*weights, batch_size=1)
        out, _ = OPS[mixer](*inputs, state, mini_batch_size=MINI_BATCH, group_size=group, backend="scan")
    assert out.requires_grad
    return sum(size for place, size in sizes.items() if place not in given)


def print_tables(learned: Rows, decoded: Rows, growth: list[dict[str, Any]]) -> None:
    print(f"{'forward + backward':20}{'mixer':8}{'frames':>8}{'s':>9}{'ms a frame':>12}{'peak MB':>10}{'MB a frame':>12}")
    for row in learned:
        each = 1e3 * row["seconds"] / row["frames"], row["peak_mb"] / row["frames"]
        print(f"{row['body']:20}{row['mixer']:8}{row['frames']:8}{row['seconds']:9.3f}{each[0]:12.3f}{row['peak_mb']:10.1f}{each[1]:12.3f}")
    print(f"\n{'decoding, one frame':20}{'mixer':8}{'mean ms':>9}{'median':>9}{'max':>9}")
    for row in decoded:
        print(f"{row['body']:20}{row['mixer']:8}{row['mean_ms']:9.2f}{row['median_ms']:9.2f}{row['max_ms']:9.2f}")
    print()
    for row in growth:
        print(f"{row['mixer']}: {row['us_a_frame']:.0f} us a frame from 256 to 8192 frames, R2 {row['time_r2']:.4f};"
              f" kept for backward {row['own_bytes']:.0f} + {row['state_bytes']:.0f} / group bytes a frame,"
              f" R2 {row['kept_r2']:.4f}")  # fmt: skip


def ratios_of(learned: Rows, decoded: Rows) -> dict[str, float]:
    """How many times the plain loop takes what the scan takes."""
    ratios = {}
    for ours in [row for row in learned if row["body"] == "scan"]:
        theirs = next(r for r in learned if (r["body"], r["mixer"], r["frames"]) == ("plain loop", ours["mixer"], ours["frames"]))
        name = f"{ours['mixer']} {ours['frames']} frames"
        ratios[f"{name}, time"] = theirs["seconds"] / ours["seconds"]
        ratios[f"{name}, memory"] = theirs["peak_mb"] / ours["peak_mb"]
    for ours, theirs in zip(decoded[::2], decoded[1::2]):
        ratios[f"{ours['mixer']} decoding, time"] = theirs["mean_ms"] / ours["mean_ms"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=16, help="mini-batches for which backward keeps one state")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learned, decoded, growth = [], [], []
    for mixer, times in {"mlp": 1, "linear": 5}.items():  # what is short is repeated more often
        learned += measure_learning(mixer, 192, options.group, times * options.repeats, with_reference=True)
        learned += measure_learning(mixer, 1024, options.group, times * options.repeats // 2, with_reference=False)
        decoded += measure_decoding(mixer, 40)
        growth.append(measure_growth(mixer))
    print_tables(learned, decoded, growth)
    ratios = ratios_of(learned, decoded)
    print("\nthe plain loop over the scan:", *(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()), sep="\n  ")
    if options.out:
        options.out.write_text(json.dumps({"learning": learned, "decoding": decoded, "growth": growth, "ratio": ratios}, indent=2))


if __name__ == "__main__":
    main()

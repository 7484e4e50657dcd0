"""Check every Triton kernel on the GPU against the reference in float64: outputs, final state, every gradient.

    python benchmarks/gpu_check.py [--quick] [--json file]

All configurations that tuning may choose are run, both mixers, head widths 32, 64 and 128, several mini-batch sizes, resumed and masked
streams. `--quick` is one small case a mixer, in this process, for compute-sanitizer. Exits with 1 where a bound is passed.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling_moshi_ttt import ttt_kernels
from modeling_moshi_ttt.configuration_moshi_ttt import INNER_NORMS
from modeling_moshi_ttt.ttt_ops import TTTState, ttt_linear, ttt_mlp

OPS = {"linear": ttt_linear, "mlp": ttt_mlp}
TOKENS, SHARED = ("q", "k", "v", "lr"), ("token_weight", "norm_weight", "norm_bias")
BOUNDS = {"float32": 2e-5, "tf32": 1e-2, "bfloat16": 1e-2}


class Case(NamedTuple):
    """One comparison; `numbers` is float32 (tf32x3 products), tf32 (float32 tokens, one tf32 product) or bfloat16."""

    mixer: str
    dim: int
    b: int
    numbers: str
    choice: int = 0  # which of the kernels' configurations
    rows: int = 2
    frames: int = 37
    heads: int = 3
    group: int = 2
    masked: bool = False
    inner_norm: str = "layer_norm"


def cases(mixer: str, dim: int) -> list[Case]:
    choices = max(len(pairs[dim]) for name, pairs in ttt_kernels.CONFIGURATIONS.items() if name.startswith(mixer))
    found = [Case(mixer, dim, 16, "tf32", choice) for choice in range(choices)]  # what gpu_op.py times: it finds them compiled
    found += [Case(mixer, dim, 16, "bfloat16"), Case(mixer, dim, 16, "float32"), Case(mixer, dim, 16, "float32", choice=1)]
    found += [Case(mixer, dim, 5, "float32", masked=True, group=3), Case(mixer, dim, 32, "float32", frames=70, rows=1)]
    found += [Case(mixer, dim, 64, "tf32", frames=70, rows=1), Case(mixer, dim, 33, "float32", frames=70, rows=1)]
    found += [Case(mixer, dim, b, "float32", inner_norm="none") for b in (5, 16)]
    return [*found, Case(mixer, dim, 1, "float32", frames=6, group=4)] if dim == 64 else found


def make_values(case: Case, device: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    width = case.dim if case.mixer == "linear" else 4 * case.dim
    shape = (case.rows, case.frames, case.heads, case.dim)
    values = {name: torch.randn(shape, generator=g) for name in "qkv"}
    values |= {name: torch.nn.functional.normalize(values[name], dim=-1) for name in "qk"}
    values["lr"] = torch.rand(shape[:3], generator=g) * 0.3
    values["token_weight"] = 1 / torch.arange(1, case.b + 1) + 0.1 * torch.rand(case.b, generator=g)
    values["norm_weight"] = 1 + 0.1 * torch.randn(shape[2:], generator=g)
    values["norm_bias"] = 0.1 * torch.randn(shape[2:], generator=g)
    shapes = {"W1": (case.dim, width), "b1": (1, width), "W2": (width, case.dim), "b2": (1, case.dim)}
    for name in list(shapes)[: 2 if case.mixer == "linear" else 4]:
        values[name] = torch.randn(case.heads, *shapes[name], generator=g) * (0.3 if name[0] == "W" else 0.1)
    if case.numbers == "bfloat16":
        values |= {name: values[name].bfloat16() for name in "qkv"}
    return {name: x.to(device) for name, x in values.items()}


def forward(case: Case, leaves: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Output and final state; a masked stream is also cut in two."""
    names = [name for name in ("W1", "b1", "W2", "b2") if name in leaves]
    state, outputs = TTTState.initial(*(leaves[name] for name in names), batch_size=case.rows), []
    g = torch.Generator().manual_seed(3)
    mask = (torch.rand(case.rows, case.frames, generator=g) > 0.3).to(leaves["q"].device) if case.masked else None
    for part in (slice(0, 11), slice(11, None)) if case.masked else (slice(None),):
        inputs = [leaves[name][:, part] for name in TOKENS] + [leaves[name] for name in SHARED]
        options = {"mini_batch_size": case.b, "group_size": case.group, "backend": backend, "mask": None if mask is None else mask[:, part]}
        options["inner_norm"] = case.inner_norm
        out, state = OPS[case.mixer](*inputs, state, **options)
        outputs.append(out)
    return {"out": torch.cat(outputs, 1)} | {f"final_{name}": getattr(state, name) for name in names}


def everything(case: Case, values: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Output, final state and gradients of one weighted sum of them; and the first two without gradients, where other kernels run."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in values.items()}
    results, g = forward(case, leaves, backend), torch.Generator().manual_seed(4)
    with torch.no_grad():
        plain = {f"plain_{name}": x for name, x in forward(case, leaves, backend).items()}
    weights = {name: torch.randn(x.shape, generator=g).to(x.device) for name, x in results.items()}
    total = sum((x.double() * weights[name]).sum() for name, x in results.items())
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {name: x.detach().double() for name, x in (results | plain | {f"grad_{n}": x for n, x in zip(leaves, gradients)}).items()}


def check(case: Case, device: str) -> dict[str, Any]:
    """The largest error of the case, relative to the largest value of each tensor, and whether two runs agree to the bit."""
    configurations, kept = ttt_kernels.CONFIGURATIONS, dict(ttt_kernels.CONFIGURATIONS)
    try:
        for name, by_width in kept.items():
            pairs = by_width[case.dim]
            configurations[name] = {case.dim: [pairs[min(case.choice, len(pairs) - 1)]]}
        ttt_kernels._tuned.cache_clear()
        torch.set_float32_matmul_precision("high" if case.numbers == "tf32" else "highest")
        values = make_values(case, device)
        ours, again = everything(case, values, "triton"), everything(case, values, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
        configurations.update(kept)
        ttt_kernels._tuned.cache_clear()
    theirs = everything(case, {name: x if x.dtype == torch.bfloat16 else x.double() for name, x in values.items()}, "reference")
    errors = {name: float((ours[name] - x).abs().max() / x.abs().max()) for name, x in theirs.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    good = errors[worst] <= BOUNDS[case.numbers]
    return {
        **case._asdict(),
        "error": errors[worst],
        "of": worst,
        "good": good,
        "same_bits": all(torch.equal(ours[n], again[n]) for n in ours),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cpu" if ttt_kernels.interpreted() else "cuda"
    if args.quick:
        quick = {"rows": 1, "frames": 9, "heads": 2, "masked": False}
        rows = [check(Case(mixer, 32, 4, "float32", inner_norm=inner_norm, **quick), device) for mixer in OPS for inner_norm in INNER_NORMS]
    else:
        wanted = [case for mixer in ("mlp", "linear") for dim in (128, 64, 32) for case in reversed(cases(mixer, dim))]  # the slowest first
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:  # compiling is most of the time
            rows = list(pool.map(check, wanted, [device] * len(wanted)))
    print(f"{'mixer':6} {'D':>3} {'b':>2} {'numbers':8} choice masked inner_norm  largest error (of)           same bits twice")
    for row in rows:
        error = f"{row['error']:.1e} ({row['of']})" + ("" if row["good"] else f"  ABOVE {BOUNDS[row['numbers']]:.0e}")
        start = (
            f"{row['mixer']:6} {row['dim']:3} {row['b']:2} {row['numbers']:8} {row['choice']:6} {row['masked']!s:6} {row['inner_norm']:10}"
        )
        print(f"{start}  {error:28} {row['same_bits']}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    good = all(row["good"] and row["same_bits"] for row in rows)
    print("all kernels agree with the reference" if good else "SOME KERNELS DO NOT AGREE WITH THE REFERENCE")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compile every configuration of every Triton kernel for Hopper (sm_90), without a GPU: shared memory, registers, spilled bytes.

    python benchmarks/gpu_compile.py [--kernels mlp_forward ...] [--head-dims 64 ...] [--mini-batch 16] [--precision tf32] [--inner-norm
    none] [--json file]

Triton brings the compiler and ptxas along. One program may use 227 KB of shared memory; the kernels were not run for this table.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_moshi_ttt.configuration_moshi_ttt import INNER_NORMS
from modeling_moshi_ttt.ttt_kernels import CONFIGURATIONS, HOPPER_SHARED_BYTES, KERNELS, LONG_MINI_BATCH

TOKENS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "d_out_ptr", "d_q_ptr", "d_k_ptr", "d_v_ptr")
DTYPE = {"tf32": "bf16", "tf32x3": "fp32"}  # the tokens that each precision is for


def pointer_type(name: str, tokens: str) -> str:
    return "*" + (tokens if name in TOKENS else "i8" if name == "complete_ptr" else "fp32")


def compile_one(name: str, dim: int, b: int, precision: str, inner_norm: str, block: int, warps: int, stages: int) -> dict[str, Any]:
    """One kernel in one configuration, as a row of the table."""
    kernel, padded = KERNELS[name], max(16, 1 << (b - 1).bit_length())
    known = {"D": dim, "F": 4 * dim, "TOKENS": b, "BT": padded, "QUERY": True, "SAVE": True, "PRECISION": precision, "BLOCK_F": block}
    known["NORMED"] = inner_norm == "layer_norm"
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", known[parameter.name]
        elif parameter.name.endswith("_ptr"):
            signature[parameter.name], aligned[(i,)] = pointer_type(parameter.name, DTYPE[precision]), [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if parameter.name == "eps" else "i32"
    begin = time.perf_counter()
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    taken = time.perf_counter() - begin
    row = {
        "kernel": name,
        "D": dim,
        "b": b,
        "tokens": DTYPE[precision],
        "products": precision,
        "BLOCK_F": block,
        "warps": warps,
        "stages": stages,
    }
    row["inner_norm"] = inner_norm
    return row | {"shared_bytes": compiled.metadata.shared, **resources(compiled.asm["cubin"]), "seconds": round(taken, 1)}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spilled registers) of a thread, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {printed!r}")
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def choices(name: str, dim: int, b: int) -> list[tuple[int, int, int]]:
    """The configurations that tuning chooses from."""
    return CONFIGURATIONS[name][dim] if b <= 32 else [LONG_MINI_BATCH[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=(32, 64, 128), default=[32, 64, 128])
    parser.add_argument("--mini-batch", type=int, default=16)
    parser.add_argument("--precision", nargs="+", choices=DTYPE, default=list(DTYPE))
    parser.add_argument("--inner-norm", nargs="+", choices=INNER_NORMS, default=list(INNER_NORMS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        f"Triton {triton.__version__}, sm_90\n{'kernel':16} {'D':>3} {'b':>2} tokens products inner_norm "
        "BLOCK_F warps stages  shared KB registers spilled B  compiled in s"
    )
    for name in args.kernels:
        for dim in args.head_dims:
            for precision, inner_norm in product(args.precision, args.inner_norm):
                for block, warps, stages in choices(name, dim, args.mini_batch):
                    row = compile_one(name, dim, args.mini_batch, precision, inner_norm, block, warps, stages)
                    rows.append(row)
                    print(
                        f"{name:16} {dim:3} {row['b']:2} {row['tokens']:>6} {precision:>8} {inner_norm:>10} {block:7} {warps:5} {stages:6} "
                        f"{row['shared_bytes'] / 1024:10.1f} {row['registers']:9} {row['stack_bytes']:9} {row['seconds']:14.1f}",
                        flush=True,
                    )
    if args.json:
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "target": "sm_90", "shared_limit": HOPPER_SHARED_BYTES, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()

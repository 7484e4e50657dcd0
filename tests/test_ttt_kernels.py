"""The Triton kernels without a GPU: right in the interpreter, compiled for Hopper within its limits, harmless where Triton is missing."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_moshi_ttt import ttt_kernels

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def python(*arguments, timeout=900, **environment) -> str:
    """A Python of its own, since Triton chooses between compiler and interpreter when it is imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("part", ["odd_sizes and linear", "odd_sizes and mlp", "not odd_sizes"])
def test_equal_to_the_reference_in_the_interpreter(part):
    said = python(
        "-m", "pytest", "tests/interpreted_ttt_kernels.py", "-k", part, "-p", "no:cacheprovider", "-p", "no:xdist", TRITON_INTERPRET="1"
    )
    passed = re.search(r"(\d+) passed", said)
    assert passed, said
    assert int(passed[1]) >= 9
    assert "skipped" not in said


@pytest.mark.parametrize("name", ["linear_forward", "linear_backward", "mlp_forward", "mlp_backward"])
def test_compiles_for_hopper(name, tmp_path):
    rows = compile_table(tmp_path, "--kernels", name, "--head-dims", 32, "--precision", "tf32")
    assert {row["kernel"] for row in rows} == {name}


@pytest.mark.slow
@pytest.mark.parametrize("b", [16, 32, 64])
@pytest.mark.parametrize("name", list(ttt_kernels.KERNELS))
def test_every_configuration_compiles_for_hopper(name, b, tmp_path):
    rows = compile_table(tmp_path, "--kernels", name, "--mini-batch", b)
    assert len(rows) == 2 * (6 if b > 32 else 2 * sum(len(choices) for choices in ttt_kernels.CONFIGURATIONS[name].values()))


def compile_table(folder, *options):
    python(BENCHMARKS / "gpu_compile.py", *options, "--json", folder / "table.json", timeout=3000)
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert rows
    for row in rows:  # what one Hopper multiprocessor has
        assert row["shared_bytes"] <= 227 * 1024, row
        assert row["registers"] <= 65536 // (32 * row["warps"]), row  # else it could not start
        assert row["registers"] > 32, row  # what ptxas falls back to where it gives up, with all in memory
    return rows


def test_imports_without_triton():
    said = python("-c", "import sys; sys.modules['triton'] = None\nfrom modeling_moshi_ttt import ttt_kernels as k\nimport torch\n"
                  "z = torch.zeros(1, 1, 4, 1, 32)\nprint(k.is_supported(z, (z[0], z[0])))")  # fmt: skip
    assert "Triton is not installed" in said


def test_cpu_tensors_are_refused_outside_the_interpreter():
    assert not ttt_kernels.interpreted()
    q = torch.zeros(1, 1, 4, 1, 32)
    assert "the tensors are on cpu" in ttt_kernels.is_supported(q, (torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 1, 32)))


@pytest.mark.parametrize("name", list(ttt_kernels.KERNELS))
@pytest.mark.parametrize("dim", ttt_kernels.HEAD_DIMS)
def test_tuning_tries_what_is_listed_and_restores_what_a_kernel_adds_to(name, dim):
    tuned = ttt_kernels._tuned(name, dim, False)
    assert [(c.kwargs.get("BLOCK_F", 0), c.num_warps, c.num_stages) for c in tuned.configs] == ttt_kernels.CONFIGURATIONS[name][dim]
    assert {"TOKENS", "PRECISION"} <= set(tuned.keys)
    source = inspect.getsource(ttt_kernels.KERNELS[name].fn)
    changed = set(re.findall(r"add_to\((\w+_ptr)", source)) | set(re.findall(r"tl\.store\((d_[wb][12]_ptr)", source))
    assert set(tuned.restore_value or []) == changed


@pytest.mark.parametrize(
    ("b", "dim", "available", "reason"),
    [
        (64, 128, 232448, None),
        (16, 64, 101376, None),
        (17, 64, 101376, "mini-batch size 17 need"),
        (16, 128, 101376, "101376 bytes of shared memory"),
    ],
)
def test_what_does_not_fit_in_shared_memory_is_refused(b, dim, available, reason):
    said = ttt_kernels._too_large(b, dim, available)
    assert said is None if reason is None else reason in said


def test_products_follow_torchs_own_switch():
    kept, q = torch.get_float32_matmul_precision(), torch.zeros(1)
    try:
        torch.set_float32_matmul_precision("highest")
        assert (ttt_kernels._precision(q), ttt_kernels._precision(q.bfloat16())) == ("tf32x3", "tf32")
        torch.set_float32_matmul_precision("high")
        assert ttt_kernels._precision(q) == "tf32"
    finally:
        torch.set_float32_matmul_precision(kept)


@pytest.mark.parametrize(
    ("script", "options", "environment", "says"),
    [
        ("gpu_check.py", ["--quick"], {"TRITON_INTERPRET": "1"}, "all kernels agree with the reference"),
        ("gpu_op.py", ["--tiny"], {"TRITON_INTERPRET": "1"}, "TFLOP/s, roofline"),
        ("gpu_model.py", ["--tiny"], {}, "LoRA + TTT step"),
    ],
)
def test_gpu_benchmarks_run_in_small(script, options, environment, says, tmp_path):
    assert says in python(BENCHMARKS / script, *options, "--json", tmp_path / "out.json", **environment)
    assert json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(("breaks", "status", "says"), [("none", 0, "all parts ran"), ("gpu_op.py", 1, "FAILED: op (3)")])
def test_gpu_script_runs_every_part_and_names_the_one_that_broke(breaks, status, says, tmp_path):
    for name, body in {
        "nvidia-smi": "echo a GPU",
        "python-stub": f'echo "$@"; case "$1" in *{breaks}) exit 3;; esac',
        "compute-sanitizer": 'echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python-stub")}
    done = subprocess.run(["bash", BENCHMARKS / "gpu.sh", tmp_path / "out"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert says in done.stdout
    parts = ["check", "op", "step", "frame", "memcheck", "racecheck"]  # what is least known first
    assert re.findall(r"^== (\w+)$", done.stdout, re.MULTILINE) == parts
    assert {f"{part}.log" for part in (*parts, "simulated")} == {x.name for x in (tmp_path / "out").iterdir()}
    seconds = {name: int(limit) for name, limit in re.findall(r'part "?(\S+?)"? (\d+) ', (BENCHMARKS / "gpu.sh").read_text())}
    assert sum(seconds.values()) + seconds["$tool"] <= 9 * 60  # two tools


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for minutes")
def test_gpu_script_says_when_there_is_no_gpu(tmp_path):
    done = subprocess.run(["bash", BENCHMARKS / "gpu.sh", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "nothing was measured" in done.stdout

#!/usr/bin/env bash
# Everything there is to measure on one GPU, in 9 minutes on an H100 or H200, what is least known first: whether the kernels are right, how
# they do beside the scan, a 7B LoRA + TTT step at 4 x 102.4 s with its memory beside the simulated one, a frame eager and in a CUDA graph;
# then compute-sanitizer. Nothing is built.
#
#   benchmarks/gpu.sh [folder for logs and JSON; default: benchmarks/gpu]
#
# Needs torch 2.11, Triton 3.6, transformers 5.23 or 5.24, peft, accelerate and pyyaml. A package that is missing is brought along as a pure-Python
# wheel, unpacked beforehand: pip install --no-deps --target .wheels <name>. Ends with 1 when a check fails or a measurement breaks off.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-benchmarks/gpu}}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/.wheels${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/moshi_ttt_triton} HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
unset TRITON_INTERPRET
mkdir -p "$OUT"
failed=()

part() {  # name, seconds at most, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { failed+=("$name ($status)"); echo "$name ended with $status"; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || { echo "no NVIDIA GPU here: nothing was measured"; exit 1; }
# on the CPU, while the GPU is busy
"$PYTHON" benchmarks/simulate.py lora_ttt_7b data.batch_size=4 data.accumulation=1 --json "$OUT/simulated.json" >"$OUT/simulated.log" 2>&1 &
simulation=$!
part check 150 "$PYTHON" benchmarks/gpu_check.py --json "$OUT/check.json"
part op 90 "$PYTHON" benchmarks/gpu_op.py --json "$OUT/op.json"
beside=()
if wait "$simulation"; then beside=(--simulated "$OUT/simulated.json"); else failed+=("simulation ($?)"); fi
part step 100 "$PYTHON" benchmarks/gpu_model.py --only training "${beside[@]}" --json "$OUT/step.json"
part frame 110 "$PYTHON" benchmarks/gpu_model.py --only streaming --json "$OUT/frame.json"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" benchmarks/gpu_check.py --quick
    done
else
    echo "== compute-sanitizer is not installed: memory accesses were not checked" | tee "$OUT/memcheck.log"
fi

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all parts ran; logs and JSON are in $OUT"

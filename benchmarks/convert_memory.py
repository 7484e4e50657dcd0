"""How much memory converting a whole 7B checkpoint takes, beside its size: python benchmarks/convert_memory.py [--layers 32] [--out FILE]

The checkpoint has moshiko's names, shapes and dtype, and zeros for weights: a sparse file that takes no room on disk. What is written from
it takes as much room as a real one (16 GB with all 32 layers). Prints the sizes and the peak, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modeling_moshi_ttt.conversion.kyutai_config import MOSHI_7B
from modeling_moshi_ttt.conversion.tables import config_from_kyutai, moshi_groups

CODE = """
import re, sys
from modeling_moshi_ttt.conversion.convert import Options, convert
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
convert(sys.argv[1], sys.argv[2], Options(max_shard_size="5GB"))
print(before, peak())
"""


def write_sparse(folder: Path, layers: int) -> int:
    """A Kyutai checkpoint of zeros in bf16; returns its size in bytes."""
    lm_kwargs = {**MOSHI_7B, "num_layers": layers}
    header, end = {}, 0
    for group in moshi_groups(config_from_kyutai(lm_kwargs)):
        for name in group.kyutai:
            size = 2 * math.prod(group.kyutai_shape)
            header[name] = {"dtype": "BF16", "shape": group.kyutai_shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text = text.ljust(-len(text) % 8 + len(text))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(lm_kwargs))
    return end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="temporal layers; fewer need less room on disk")
    parser.add_argument("--folder", type=Path, help="where to write; needs room for a whole checkpoint")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source = Path(name) / "kyutai"
        source.mkdir()
        size, begin = write_sparse(source, args.layers), time.perf_counter()
        command = [sys.executable, "-c", CODE, str(source), str(Path(name) / "here")]
        before, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:])
        seconds = time.perf_counter() - begin
    print(f"checkpoint                 {size / 1e9:8.2f} GB")
    print(f"process before             {before / 1e9:8.2f} GB")
    print(f"its peak while converting  {peak / 1e9:8.2f} GB")
    print(f"the peak is {peak / size:.3f} of the checkpoint; {seconds:.0f} s")
    if args.out:
        args.out.write_text(
            json.dumps({"checkpoint": size, "before": before, "peak": peak, "ratio": peak / size, "seconds": seconds}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

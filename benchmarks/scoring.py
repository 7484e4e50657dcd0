"""Throughput of scoring: batches against one file at a time, on the tiny model, one CPU thread.

Words are as long as sWUGGY's (0.4 to 1 s), sentences as sBLIMP's (1 to 4 s): the shorter the file, the more a batch saves.

    python benchmarks/scoring.py --out scoring.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from measure import seconds

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.common.files import atomic_write
from modeling_moshi_ttt.evaluation.scoring import CodeSequence, score_sequences

TINY = Path(__file__).parents[1] / "configuration" / "model" / "tiny.json"


LENGTHS = {"words": (5, 13), "sentences": (12, 50)}  # frames of 80 ms
BATCHES = (1, 4, 16)


def measure(model: MoshiTTTForConditionalGeneration, kind: str, count: int) -> list[dict]:
    """Files a second at each batch size, and how many times one at a time that is."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    lengths = torch.randint(*LENGTHS[kind], (count,), generator=generator).tolist()
    files = [CodeSequence(torch.randint(config.audio_vocab_size, (config.num_codebooks, n), generator=generator)) for n in lengths]
    times = seconds(*(lambda size=size: score_sequences(model, files, size) for size in BATCHES), repeats=3)
    return [
        {"kind": kind, "batch_size": size, "files_a_second": count / taken, "ratio": times[0] / taken}
        for size, taken in zip(BATCHES, times)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MoshiTTTForConditionalGeneration(MoshiTTTConfig.from_pretrained(TINY)).eval()
    rows = [row for kind in LENGTHS for row in measure(model, kind, options.files)]
    for row in rows:
        print(
            f"{row['kind']:>9}, batch {row['batch_size']:>2}: {row['files_a_second']:7.1f} files a second, {row['ratio']:.2f} times one at a time"
        )
    if options.out:
        atomic_write(options.out, json.dumps({"benchmark": "scoring", "files": options.files, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Throughput of scoring codes: batches against a plain loop over files, on the tiny model, on the CPU; encoding sound is not in it.

Words are as long as sWUGGY's (0.4 to 1 s), sentences as sBLIMP's (1 to 4 s): the shorter the file, the more a batch saves. The sets
themselves hold thousands of files, so that most batches are of one length; 256 come near to that. Both sides give the same scores
(checked). GFLOP/s counts the matrix products that the files need, padding not; beside it stands what the same library reaches on one
product of the model's own sizes.

    python benchmarks/scoring.py --out scoring.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from measure import seconds
from torch.utils.flop_counter import FlopCounterMode

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.common.files import atomic_write
from modeling_moshi_ttt.evaluation.scoring import CodeSequence, score_sequences

TINY = Path(__file__).parents[1] / "configuration" / "model" / "tiny.json"


LENGTHS = {"words": (5, 13), "sentences": (12, 50)}  # frames of 80 ms
BATCHES = (1, 16)


@torch.no_grad()
def plain_loop(model: MoshiTTTForConditionalGeneration, files: list[CodeSequence]) -> list[float]:
    """One file at a time, by hand: mean log-likelihood a token, semantic to acoustic 100 : 1."""
    scores = []
    for file in files:
        logits = model(moshi_audio_codes=file.moshi[None], use_cache=False).audio_logits[0].log_softmax(-1)  # [K, T, card], delayed
        total = weight = 0.0
        for k, delay in enumerate(model.config.audio_delays[: len(file.moshi)]):
            codes = file.moshi[k, : file.moshi.shape[1] - delay]
            factor = 100.0 if k == 0 else 1.0
            total += factor * logits[k, delay:].gather(-1, codes[:, None]).sum().item()
            weight += factor * len(codes)
        scores.append(total / weight)
    return scores


def product_speed() -> float:
    """GFLOP/s of one product of the model's: a batch's frames times a layer's MLP."""
    x, weight = torch.randn(496, 192), torch.randn(192, 792)
    taken = seconds(lambda: [x @ weight for _ in range(20)], repeats=9)[0]
    return 20 * 2 * 496 * 192 * 792 / taken / 1e9


def measure(model: MoshiTTTForConditionalGeneration, kind: str, count: int) -> list[dict]:
    """Files a second of the plain loop and of every batch size, and how many times the plain loop that is."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    lengths = torch.randint(*LENGTHS[kind], (count,), generator=generator).tolist()
    files = [CodeSequence(torch.randint(config.audio_vocab_size, (config.num_codebooks, n), generator=generator)) for n in lengths]
    found = [sums.score() for sums in score_sequences(model, files, BATCHES[-1])]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain_loop(model, files)), atol=1e-4, rtol=0)
    sides = {"plain loop": lambda: plain_loop(model, files)}
    sides |= {f"batch {size}": lambda size=size: score_sequences(model, files, size) for size in BATCHES}
    with FlopCounterMode(display=False) as counter:
        plain_loop(model, files)
    gflop = counter.get_total_flops() / 1e9
    times = seconds(*sides.values(), repeats=3, clock=time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    return [
        {
            "kind": kind,
            "side": name,
            "files_a_second": count / taken,
            "ratio": times[0] / taken,
            "gflops": gflop / taken,
            "gflop_a_file": gflop / count,
        }
        for name, taken in zip(sides, times)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, for both sides")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = MoshiTTTForConditionalGeneration(MoshiTTTConfig.from_pretrained(TINY)).eval()
    print(f"{'':22}{'files/s':>9}{'ratio':>8}{'GFLOP/s':>9}{'GFLOP a file':>14}")
    rows = []
    for kind in LENGTHS:
        for row in measure(model, kind, options.files):
            print(
                f"{kind:>10}, {row['side']:10}"
                f"{row['files_a_second']:9.1f}{row['ratio']:7.2f}x{row['gflops']:9.1f}{row['gflop_a_file']:14.3f}"
            )
            rows.append(row)
    speed = product_speed()
    print(f"a product of the model's own size alone: {speed:.1f} GFLOP/s")
    if options.out:
        result = {"benchmark": "scoring", "files": options.files, "threads": options.threads, "rows": rows, "product_gflops": speed}
        atomic_write(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

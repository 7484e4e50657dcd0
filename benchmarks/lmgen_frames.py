"""Kyutai's LMGen at the medium configuration's size, one frame for every line that comes in: the other side of streaming.py.

Runs in .venv-peer (`benchmarks/install_peer.sh`). Each answer is a line, the milliseconds of processor time that the frame took.
"""

import sys
import time

import torch
from moshi.models.lm import LMGen, LMModel


def main() -> None:
    torch.set_num_threads(1)
    audio_delays = [0, 1, 1, 1, 1, 1, 1, 1]
    lm = LMModel(
        delays=[0, *audio_delays, *audio_delays],
        n_q=16,
        dep_q=8,
        card=2048,
        text_card=32000,
        dim=512,
        num_heads=8,
        num_layers=8,
        hidden_scale=4.125,
        causal=True,
        context=256,
        max_period=10000,
        gating="silu",
        norm="rms_norm_f32",
        positional_embedding="rope",
        depformer_dim=256,
        depformer_dim_feedforward=1056,
        depformer_num_heads=8,
        depformer_num_layers=6,
        depformer_multi_linear=True,
        depformer_context=8,
        depformer_gating="silu",
        depformer_pos_emb="none",
        depformer_weights_per_step=True,
    ).eval()
    gen = LMGen(lm)
    with torch.no_grad(), gen.streaming(1):
        for _ in sys.stdin:
            codes = torch.randint(0, 2048, (1, 8, 1))
            begin = time.process_time()
            gen.step(codes)
            print(1e3 * (time.process_time() - begin), flush=True)


if __name__ == "__main__":
    main()

"""One training step of the depth decoder, ours beside transformers' own: time and peak memory, one CPU thread.

Medium configuration: temporal width 512, depth width 256, 6 layers, 8 codebooks of 2048 entries. transformers copies the depth weights
for every frame, so its side runs on fewer frames and is compared per frame.

    python benchmarks/depth_decoder.py --out depth_decoder.json
"""

import argparse
import json
from pathlib import Path

import torch
from measure import peak_bytes, seconds
from transformers import MoshiDepthConfig
from transformers.models.moshi.modeling_moshi import MoshiDepthDecoder

from modeling_moshi_ttt.depth_decoder import MoshiTTTDepthDecoder


def medium() -> MoshiDepthConfig:
    """The configuration that both sides are built with."""
    return MoshiDepthConfig(hidden_size=256, input_size=512, num_hidden_layers=6, num_attention_heads=8, ffn_dim=1408, vocab_size=32000)


def step(decoder: torch.nn.Module, frames: int, transformers_layout: bool):
    """A forward and backward pass over random frames, as a function without arguments."""
    config = decoder.config
    hidden = torch.randn(frames, config.input_size, requires_grad=True)
    text = torch.randint(0, config.vocab_size, (frames,))
    codes = torch.randint(0, config.audio_vocab_size, (frames, config.num_codebooks))

    def run() -> None:
        if transformers_layout:
            tokens = torch.cat([text[:, None], codes[:, :-1]], dim=1)
            logits = decoder(input_ids=tokens, last_hidden_state=hidden[:, None], use_cache=False).logits.flatten(0, 1)
            targets = codes.flatten()
        else:
            logits, targets = decoder(hidden, text, codes).flatten(0, 1), codes.T.flatten()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        decoder.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=256, help="frames of our side")
    parser.add_argument("--peer-frames", type=int, default=32, help="frames of transformers' side")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, peer = MoshiTTTDepthDecoder(medium()), MoshiDepthDecoder._from_config(medium(), attn_implementation="sdpa")
    ours.load_state_dict({name: torch.randn_like(weight) * 0.02 for name, weight in ours.state_dict().items()})
    sides = {
        "ours": (step(ours, options.frames, False), options.frames),
        "transformers": (step(peer, options.peer_frames, True), options.peer_frames),
    }
    times = seconds(*(run for run, _ in sides.values()), repeats=options.repeats)
    rows = {}
    print(f"{'':14}{'frames':>8}{'s':>9}{'GB over the model':>20}{'ms a frame':>12}{'MB a frame':>12}")
    for (name, (run, frames)), taken in zip(sides.items(), times):
        peak = peak_bytes(run)
        rows[name] = {
            "frames": frames,
            "seconds": taken,
            "peak_gb": peak / 1e9,
            "ms_a_frame": taken / frames * 1e3,
            "mb_a_frame": peak / frames / 1e6,
        }
        print(f"{name:14}{frames:8}{taken:9.2f}{peak / 1e9:20.2f}{taken / frames * 1e3:12.2f}{peak / frames / 1e6:12.2f}")
    ratio = {key: rows["transformers"][key] / rows["ours"][key] for key in ("ms_a_frame", "mb_a_frame")}
    print(f"transformers' takes {ratio['ms_a_frame']:.1f}x our time and {ratio['mb_a_frame']:.1f}x our memory a frame")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()

"""Peak memory of one training step against the length of the window and the number of layers with TTT, and the account of the real 7B.

On a CPU the medium model's numbers are measured (memory over the model's own, with activation checkpointing of the whole hybrid layer and
without). The 7B account (bf16, LoRA 128 + TTT-MLP in nine layers) is computed from its shapes on the meta device; where a GPU is,
benchmarks/gpu_model.py measures it.

    python benchmarks/train_memory.py --out train_memory.json
"""

import argparse
import json
from pathlib import Path

import torch
from measure import fitted_line, peak_bytes

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training import modes
from modeling_moshi_ttt.training.run_config import LoraSettings

GOAL_GB = 19.0
DEPTH_7B = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "ffn_dim": 5632}


def model_of(layers: int, checkpointing: bool) -> MoshiTTTForConditionalGeneration:
    """A model of 8 layers, the last `layers` of them with TTT-MLP; a small vocabulary, so that the layers are what is seen."""
    config = MoshiTTTConfig(
        vocab_size=512, audio_vocab_size=128, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, ffn_dim=1408, sliding_window=256,
        ttt_layers=f"last:{layers}" if layers else [],
        depth_decoder_config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256},
    )  # fmt: skip
    model = MoshiTTTForConditionalGeneration(config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def peak(layers: int, frames: int, checkpointing: bool) -> float:
    """Most megabytes that one step holds over the model and its inputs."""
    torch.manual_seed(0)
    model = model_of(layers, checkpointing)
    text = torch.randint(4, 512, (1, frames))
    codes = torch.randint(128, (1, 8, frames))
    inputs = {"input_ids": text, "moshi_audio_codes": codes, "user_audio_codes": codes, "text_labels": text, "audio_labels": codes}

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return peak_bytes(step) / 1e6


def table(title: str, cases: dict[int, tuple[int, int]]) -> list[dict[str, float]]:
    """Print and return peaks; `cases` gives (layers, frames) by what varies."""
    print(f"\n{title:>12}{'checkpointed MB':>18}{'all kept MB':>14}")
    rows = []
    for value, (layers, frames) in cases.items():
        row = {title: value, "checkpointed": peak(layers, frames, True), "kept": peak(layers, frames, False)}
        print(f"{value:>12}{row['checkpointed']:>18.1f}{row['kept']:>14.1f}")
        rows.append(row)
    return rows


def moment_bytes(optimizer: str, parameter: torch.Tensor) -> int:
    """What the optimizer keeps of one weight: AdamW two moments, Adafactor a row and a column of each matrix (of a vector, all)."""
    if optimizer == "adamw":
        return 2 * parameter.numel() * parameter.element_size()
    if parameter.dim() < 2:
        return parameter.numel() * parameter.element_size()
    return (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]) * parameter.element_size()


def account(frames: int, rows: int, optimizer: str) -> dict[str, float]:
    """Gigabytes of the real 7B where most is held, at the end of backward: bf16 weights, LoRA 128 and TTT in float32, recomputed layers.

    Autocast's bf16 copies of the float32 weights (1.9 GB at the end of forward) are gone by then but for one layer's.
    """
    config = MoshiTTTConfig(
        hidden_size=4096, num_hidden_layers=32, ffn_dim=22528, sliding_window=3000, ttt_layers="23-31", depth_decoder_config=DEPTH_7B
    )
    with torch.device("meta"):
        model = MoshiTTTForConditionalGeneration(config).to(torch.bfloat16)
        adapted = modes.apply(model, "lora+ttt", modes.lora_config(LoraSettings(rank=128, scaling=2.0), model))
    modes.drop_copies(adapted)
    frozen = sum(p.numel() * p.element_size() for p in adapted.parameters() if not p.requires_grad)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    tokens = frames * rows
    kept_inputs = 32 * tokens * 4096 * 2  # every hybrid layer keeps its input
    one_layer = tokens * 2 * (10 * 4096 + 3 * 11264)  # one layer is recomputed at a time: projections, attention, gated MLP
    one_layer += tokens * 4 * (12 * 4096)  # and its TTT inputs and outputs in float32
    states = -(-frames // (16 * 16)) * rows * 32 * (2 * 128 * 512) * 4  # fast weights at the bounds of the scan's groups
    depth = tokens * 8 * 2 * (6 * 1024 + 10 * 1024 + 3 * 2816) + tokens * 8 * 2048 * 4 + tokens * 32000 * 6
    return {
        "weights, frozen": frozen / 1e9,
        "adapter (float32)": sum(p.numel() * p.element_size() for p in trained) / 1e9,
        "gradients": sum(p.numel() * p.element_size() for p in trained) / 1e9,
        "optimizer's moments": sum(moment_bytes(optimizer, p) for p in trained) / 1e9,
        "activations": (kept_inputs + one_layer + states + depth) / 1e9,
    }


def print_accounts() -> dict[str, dict[str, float]]:
    """The account of each optimizer, and what keeps it from the goal."""
    accounts = {}
    for name, frames, rows in (("15 s x 1", 188, 1), ("100 s x 16", 1250, 16)):
        for optimizer in ("adamw", "adafactor"):
            parts = accounts[f"{name}, {optimizer}"] = account(frames, rows, optimizer)
            print(f"\n7B, bf16, LoRA 128 + TTT-MLP in 9 layers, {name}, {optimizer} (computed):")
            for part, gigabytes in (parts | {"together": sum(parts.values())}).items():
                print(f"  {part:<20}{gigabytes:8.2f} GB")
    least = accounts["15 s x 1, adafactor"]
    over = sum(least.values()) - GOAL_GB
    print(
        f"\nThe goal at 15 s x 1 is {GOAL_GB:.0f} GB: {'met' if over <= 0 else f'missed by {over:.2f} GB'}, Adafactor. Frozen weights and",
        end="",
    )
    print(
        f" activations alone are {least['weights, frozen'] + least['activations']:.2f} GB; the rest is float32 weights and their gradients."
    )
    return accounts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[64, 128, 256, 512], help="lengths of the window, with TTT in 4 of 8 layers"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4, 8], help="numbers of layers with TTT, at 128 frames")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = table("frames", {frames: (4, frames) for frames in options.frames})
    layers = table("TTT layers", {count: (count, 128) for count in options.layers})
    slope, straight = fitted_line([row["frames"] for row in lengths], [row["checkpointed"] for row in lengths])
    print(f"\ncheckpointed, a frame costs {1000 * slope:.0f} kB (R^2 of the line {straight:.3f}); ", end="")
    print(
        f"without TTT {layers[0]['checkpointed']:.1f} MB, with it in {layers[-1]['TTT layers']} layers {layers[-1]['checkpointed']:.1f} MB"
    )
    accounts = print_accounts()
    if options.out:
        options.out.write_text(
            json.dumps({"lengths": lengths, "layers": layers, "kB a frame": 1000 * slope, "account": accounts}, indent=2)
        )


if __name__ == "__main__":
    main()

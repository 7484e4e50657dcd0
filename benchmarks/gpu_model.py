"""The 7B model with random weights on one GPU: training with LoRA + TTT, and streaming, with and without its nine TTT-MLP layers.

    python benchmarks/gpu_model.py [--only training | streaming] [--simulated file] [--json file] [--tiny | --cpu]

Training: bf16 weights, LoRA rank 128 on the temporal transformer and TTT in the last nine layers trained whole, activation checkpointing,
AdamW, at 102.4 s x 4 and x 16; `--simulated` names what benchmarks/simulate.py wrote of the first, whose peak is printed beside the measured
one. Streaming: one conversation, milliseconds a frame of 80 ms, eager and in a CUDA graph. The "without" columns are the same model with its
TTT layers taken out, in the same run; the "scan" columns run TTT in torch. `--tiny` runs the same code on the CPU with a tiny model,
`--cpu` streams with the 7B model on the CPU (17 GB of memory, five minutes) and trains nothing.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.tokens_moshi_ttt import FRAME_RATE
from modeling_moshi_ttt.training import modes
from modeling_moshi_ttt.training.run_config import LoraSettings

DEPTH_7B = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "ffn_dim": 5632}
TINY = {
    "vocab_size": 30, "hidden_size": 64, "num_hidden_layers": 10, "num_attention_heads": 2, "ffn_dim": 48, "sliding_window": 8,
    "num_codebooks": 3, "audio_vocab_size": 20,
    "depth_decoder_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
}  # fmt: skip


def make_model(tiny: bool, device: str) -> MoshiTTTForConditionalGeneration:
    """Random weights, made where they stay; 7B is what MoshiConfig gives when nothing is said, with Kyutai's widths."""
    fields = (
        TINY
        if tiny
        else {"hidden_size": 4096, "num_hidden_layers": 32, "ffn_dim": 22528, "sliding_window": 3000, "depth_decoder_config": DEPTH_7B}
    )
    config = MoshiTTTConfig(**fields, ttt_layers="last:9", ttt_mixer="mlp")
    if tiny:
        return MoshiTTTForConditionalGeneration(config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return MoshiTTTForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)


def batch(config: MoshiTTTConfig, rows: int, frames: int, device: torch.device) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(card: int, *shape: int) -> torch.Tensor:
        return torch.randint(card, shape, generator=g).to(device)

    text, codes = draw(config.vocab_size, rows, frames), draw(config.audio_vocab_size, rows, config.num_codebooks, frames)
    user = draw(config.audio_vocab_size, rows, config.num_user_codebooks, frames)
    return {"input_ids": text, "moshi_audio_codes": codes, "user_audio_codes": user, "text_labels": text, "audio_labels": codes}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Without:
    """The model without its TTT layers, and with them again afterwards."""

    def __init__(self, model: MoshiTTTForConditionalGeneration):
        self.layers = [layer for layer in model.decoder.model.layers if layer.ttt is not None]

    def __enter__(self) -> None:
        self.kept = [layer.ttt for layer in self.layers]
        for layer in self.layers:
            layer.ttt = None

    def __exit__(self, *_: object) -> None:
        for layer, ttt in zip(self.layers, self.kept):
            layer.ttt = ttt


def training_step(model: Any, inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Seconds of a whole step (median after one warm-up), peak memory; `nan` where it does not fit."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    times = []
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats + 1):
            synchronize()
            begin = time.perf_counter()
            with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronize()
            times.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        return {"seconds": statistics.median(times[1:]), "peak_gb": peak, "loss": float(loss.detach())}
    except torch.OutOfMemoryError:
        return {"seconds": float("nan"), "peak_gb": float("nan"), "loss": float("nan")}
    finally:
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def use(model: MoshiTTTForConditionalGeneration, implementation: str) -> None:
    for module in model.modules():
        if getattr(getattr(module, "config", None), "model_type", None) == "moshi_ttt":
            module.config.ttt_implementation = implementation


def measure_streaming(model: MoshiTTTForConditionalGeneration, frames: int) -> dict[str, float]:
    """Median milliseconds of a frame of three conversations that take turns, after a warm-up of a quarter of the frames."""
    model.eval()
    user = torch.randint(model.config.audio_vocab_size, (1, model.config.num_user_codebooks), device=model.device)
    sides = {"auto": contextlib.nullcontext(), "scan": contextlib.nullcontext(), "without": Without(model)}
    streams = {side: model.new_stream(batch_size=1) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(frames):
        for side, stream in streams.items():
            use(model, "scan" if side == "scan" else "auto")
            with sides[side]:
                synchronize()
                begin = time.perf_counter()
                stream.step(user)
                synchronize()
                times[side].append(time.perf_counter() - begin)
    use(model, "auto")
    found = {side: 1e3 * statistics.median(taken[frames // 4 :]) for side, taken in times.items()}
    found["added"] = found["auto"] / found["without"] - 1
    return found


def measure_graph(model: MoshiTTTForConditionalGeneration, frames: int) -> float:
    """Median milliseconds of a frame that is one graph: CUDA's on a GPU, torch.compile's alone elsewhere."""
    model.compile_stream(1, backend="cudagraphs" if torch.cuda.is_available() else "eager")
    stream, times = model.new_stream(batch_size=1), []
    user = torch.randint(model.config.audio_vocab_size, (1, model.config.num_user_codebooks), device=model.device)
    for _ in range(frames):
        synchronize()
        begin = time.perf_counter()
        stream.step(user)
        synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[frames // 4 :])


def measure_training(
    model: MoshiTTTForConditionalGeneration, sizes: list[tuple[float, int]], rank: int, repeats: int
) -> list[dict[str, Any]]:
    model.activation_checkpointing_enable()
    adapted = modes.apply(model, "lora+ttt", lora=modes.lora_config(LoraSettings(rank=rank), model)).train()
    rows = []
    for seconds, number in sizes:
        inputs = batch(model.config, number, round(seconds * FRAME_RATE), model.device)
        row: dict[str, Any] = {"seconds_of_audio": seconds, "rows": number}
        use(model, "auto")
        row["auto"] = training_step(adapted, inputs, repeats)
        with Without(model):
            row["without"] = training_step(adapted, inputs, repeats)
        if number == sizes[0][1]:  # in torch only the small size, and once, for its time
            use(model, "scan")
            row["scan"] = training_step(adapted, inputs, 1)
        row["added"] = row["auto"]["seconds"] / row["without"]["seconds"] - 1
        rows.append(row)
    return rows


def print_streaming(model: MoshiTTTForConditionalGeneration, frames: int) -> dict[str, float]:
    """A frame eager, then in a graph, each printed as soon as it is known."""
    found = measure_streaming(model, frames)
    words = "streaming, ms a frame:  with TTT {auto:.2f}  TTT in torch {scan:.2f}  without {without:.2f}  added {added:.1%}"
    print(words.format(**found), flush=True)
    found["graph"] = measure_graph(model, frames)
    print(f"streaming, ms a frame in one graph:  with TTT {found['graph']:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("training", "streaming"))
    parser.add_argument("--simulated", type=Path)
    parser.add_argument("--json", type=Path)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    place.add_argument("--cpu", action="store_true", help="streaming alone, of the 7B model on the CPU")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    name = "CPU, tiny model" if args.tiny else f"CPU, {torch.get_num_threads()} threads" if args.cpu else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    model = make_model(args.tiny, "cpu" if args.cpu else "cuda")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters, of which TTT "
          f"{sum(p.numel() for n, p in model.named_parameters() if modes.is_ttt_parameter(n)) / 1e9:.2f}e9", flush=True)  # fmt: skip
    sizes, rank, repeats = ([(1.0, 1), (1.5, 2)], 4, 1) if args.tiny else ([(102.4, 4), (102.4, 16)], 128, 3)
    streaming = {} if args.only == "training" else print_streaming(model, 8 if args.tiny else 40 if args.cpu else 200)
    rows = [] if args.cpu or args.only == "streaming" else measure_training(model, sizes, rank, repeats)
    for row in rows:
        sides = "   ".join(
            f"{side} {row[side]['seconds']:.3f} s {row[side]['peak_gb']:.1f} GB" for side in ("auto", "scan", "without") if side in row
        )
        print(f"LoRA + TTT step, {row['seconds_of_audio']:.1f} s x {row['rows']}:  {sides}   added {row['added']:.1%}", flush=True)
    if args.simulated:
        simulated, measured = json.loads(args.simulated.read_text())["peak"] / 1e9, rows[0]["auto"]["peak_gb"]
        print(f"memory of the first: measured {measured:.1f} GB, simulated {simulated:.1f} GB, ratio {measured / simulated:.2f}")
    if args.json:
        result = {
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "streaming": streaming,
            "training": rows,
        }
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

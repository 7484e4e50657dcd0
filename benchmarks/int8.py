"""What a way of holding the weights costs in talking: size, time of a live frame on one CPU thread, and the loss of a trained model.

Size and time are of the medium configuration (131M parameters, TTT-MLP in 3 of 8 layers, random weights), the ways in turns within one run.
The loss is of the checkpoint that `--model` names (`make demo` trains one: runs/demo/final), on the dialogues that it learned.

    python benchmarks/int8.py --model runs/demo/final --out int8.json
"""

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from medium import medium

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTInt8Config, MoshiTTTProcessor, packaged
from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.data.recordings import read_manifest

WAYS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8, float32 activations": {"dtype": torch.float32, "quantization_config": True},
    "int8, bfloat16 activations": {"dtype": torch.bfloat16, "quantization_config": True},
}


def load(folder: Path, way: dict) -> MoshiTTTForConditionalGeneration:
    options = {**way, "quantization_config": MoshiTTTInt8Config()} if "quantization_config" in way else way
    return MoshiTTTForConditionalGeneration.from_pretrained(folder, **options).eval()


def megabytes(model: torch.nn.Module) -> float:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers())) / 1e6


@torch.no_grad()
def loss(model: MoshiTTTForConditionalGeneration, processor: MoshiTTTProcessor) -> float:
    """Mean loss over the sample dialogues, each whole."""
    losses = []
    for recording in read_manifest(packaged("data", "dialogues/train")):
        batch = processor(torch.from_numpy(read_audio(recording.path, processor.sampling_rate)), processor.sampling_rate, recording.words)
        losses.append(model(**batch, use_cache=False).loss.item())
    return statistics.mean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a trained checkpoint, for the column of losses")
    parser.add_argument("--frames", type=int, default=120, help="frames that are timed")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        medium([3, 4, 5]).save_pretrained(place)
        models = {name: load(Path(place), way) for name, way in WAYS.items()}
    streams, times = {name: model.new_stream() for name, model in models.items()}, {name: [] for name in models}
    for _ in range(options.frames):
        for name, stream in streams.items():
            begin = time.process_time()
            stream.step(torch.randint(0, 2048, (1, 8)))
            times[name].append(1e3 * (time.process_time() - begin))
    rows = {name: {"megabytes": megabytes(model), "ms": statistics.median(times[name][20:])} for name, model in models.items()}
    if options.model:
        processor = MoshiTTTProcessor.from_pretrained(options.model)
        for name, way in WAYS.items():
            rows[name]["loss"] = loss(load(options.model, way), processor)
    first = rows["float32"]
    print(f"{'':28}{'MB':>8}{'ms a frame':>12}{'ratio':>8}{'loss':>10}{'change':>9}")
    for name, row in rows.items():
        found = f"{row['loss']:10.4f}{row['loss'] / first['loss'] - 1:+9.2%}" if "loss" in row else ""
        print(f"{name:28}{row['megabytes']:8.0f}{row['ms']:12.1f}{row['ms'] / first['ms']:7.2f}x{found}")
    if options.out:
        options.out.write_text(
            json.dumps({"date": date.today().isoformat(), "seed": 0, "frames": options.frames, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

"""What a way of holding the weights costs in talking: size, time of a live frame on one CPU thread, and the loss of a trained model.

Size and time are of the medium configuration (131M parameters, TTT-MLP in 3 of 8 layers, random weights), the ways in turns within one run.
A time's ratio is the median over the frames of two taken one after the other. The loss is of the trained checkpoint `remembering`, on
spoken dialogues of the kind that it learned, with facts and voices that it never heard.

    python benchmarks/int8.py --out benchmarks/int8.json
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from medium import medium
from transformers import BatchFeature

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTInt8Config, MoshiTTTProcessor, packaged
from modeling_moshi_ttt.data.espeak import Espeak
from modeling_moshi_ttt.data.facts import HELD_OUT_VOICES, ScriptSettings
from modeling_moshi_ttt.data.spoken_dialogues import SAMPLE_RATE, Script, speak

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


def spoken_dialogues(processor: MoshiTTTProcessor, count: int = 16) -> list[BatchFeature]:
    """Dialogues as frames with labels, from a fixed seed."""
    rng, espeak, batches = random.Random(0), Espeak(), []
    for _ in range(count):
        spoken = speak(Script(ScriptSettings(), rng, held_out=True), espeak, rng.choice(HELD_OUT_VOICES))
        batches.append(processor(torch.from_numpy(spoken.samples), SAMPLE_RATE, spoken.words))
    return batches


@torch.no_grad()
def loss(model: MoshiTTTForConditionalGeneration, batches: list[BatchFeature]) -> float:
    """Mean over the dialogues."""
    return statistics.mean(model(**batch, use_cache=False).loss.item() for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    trained = packaged("model", "remembering")
    batches = spoken_dialogues(MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny")))
    rows = {}
    for name, way in WAYS.items():
        ratios = [one / other for one, other in zip(times[name][20:], times["float32"][20:], strict=True)]
        rows[name] = {"megabytes": megabytes(models[name]), "ms": statistics.median(times[name][20:]), "ratio": statistics.median(ratios)}
        rows[name]["loss"] = loss(load(trained, way), batches)
    first = rows["float32"]["loss"]
    print(f"{'':28}{'MB':>8}{'ms a frame':>12}{'ratio':>8}{'loss':>10}{'change':>9}")
    for name, row in rows.items():
        found = f"{row['loss']:10.4f}{row['loss'] / first - 1:+9.2%}"
        print(f"{name:28}{row['megabytes']:8.0f}{row['ms']:12.1f}{row['ratio']:7.2f}x{found}")
    if options.out:
        options.out.write_text(
            json.dumps({"date": date.today().isoformat(), "seed": 0, "frames": options.frames, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

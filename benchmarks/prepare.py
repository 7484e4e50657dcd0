"""How many hours of sound an hour of one core prepares, by format, and what 10^5 hours cost at that.

Mimi at its real size with random weights (the time does not depend on them), or with --codec tiny the one that comes with the package; on a
GPU with --device cuda. Reading (decoding and resampling) and encoding are told apart.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import MimiConfig, MimiModel

from modeling_moshi_ttt.common.packaged import resolve
from modeling_moshi_ttt.data.audio import audio_pieces
from modeling_moshi_ttt.data.cache import CodesCache
from modeling_moshi_ttt.data.codec import read_processor, to_device
from modeling_moshi_ttt.data.prepared import prepare
from modeling_moshi_ttt.data.settings import DataSettings

FORMATS = {"wav 24 kHz": ("wav", 24_000), "flac 48 kHz": ("flac", 48_000), "mp3 44.1 kHz": ("mp3", 44_100), "ogg 16 kHz": ("ogg", 16_000)}
GOAL = 1e5  # hours


def make(folder: Path, suffix: str, rate: int, count: int, seconds: float) -> None:
    """Stereo noise in syllables, so that no format has it too easy."""
    random = np.random.default_rng(0)
    t = np.arange(round(seconds * rate)) / rate
    for i in range(count):
        sound = 0.1 * random.standard_normal((len(t), 2)) * (np.sin(2 * np.pi * 3 * t) > 0)[:, None]
        soundfile.write(folder / f"{i}.{suffix}", sound, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", choices=("mimi", "tiny"), default="mimi")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--count", type=int, default=2, help="recordings of each format")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    clock = time.perf_counter
    if options.device == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    processor = read_processor(resolve("processor", "tiny"), "--codec")
    if options.codec == "mimi":
        torch.manual_seed(0)
        processor.audio_tokenizer = MimiModel(MimiConfig()).eval()
    to_device(processor, options.device)
    rows = {}
    for name, (suffix, rate) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "in"
            source.mkdir()
            make(source, suffix, rate, options.count, options.seconds)
            begin = clock()
            for path in source.iterdir():
                for _ in audio_pieces(path, 24_000, 10.0):
                    pass
            read = clock() - begin
            begin = clock()
            prepare(str(source), DataSettings(str(source)), CodesCache(Path(folder) / "cache", processor, options.batch_size))
            rows[name] = {
                "read": options.count * options.seconds / read,
                "prepare": options.count * options.seconds / (clock() - begin),
            }
    print(
        f"{options.codec} on {options.device}, {options.batch_size} recordings side by side: hours of sound an hour of one core or device"
    )
    print(f"{'format':16}{'read':>12}{'prepare':>12}{f'{GOAL:,.0f} h take':>20}")
    for name, row in rows.items():
        print(f"{name:16}{row['read']:12,.0f}{row['prepare']:12,.1f}{GOAL / row['prepare']:14,.0f} hours")
    if options.out:
        options.out.write_text(json.dumps({"codec": options.codec, "device": options.device, "speeds": rows}, indent=1))


if __name__ == "__main__":
    main()

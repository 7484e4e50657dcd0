"""Every evaluation on the tiny model, as `make evaluate-demo` runs it; leaves runs/evaluate-demo/report.html.

The model is `model=FOLDER` where given, else the one that `make demo-train` trained (runs/demo/final) where it is there, else an untrained
one, which scores at chance. Beside the demo's model the untrained one answers the held-out dialogues; beside yours, dialogue.before=FOLDER.
The small zero-shot sets, in the benchmarks' own layouts, are cut from examples/data/dialogues: words against the same words backwards,
phrases against their words in another order, the right ending of a dialogue against another's, one voice against a change of voice.

    python examples/evaluate_demo.py [key=value ...]    # settings for `moshi-ttt evaluate`, as in recall.steps=100 or output=FOLDER
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor
from modeling_moshi_ttt.cli import without_trace
from modeling_moshi_ttt.common.files import clear_folder
from modeling_moshi_ttt.data.audio import read_audio, write_audio
from modeling_moshi_ttt.data.recordings import Recording, read_manifest
from modeling_moshi_ttt.tokens_moshi_ttt import MAIN_SPEAKER

ROOT = Path(__file__).resolve().parents[1]
DIALOGUES = ROOT / "examples" / "data" / "dialogues"
RATE = 24000
MARK = ".evaluate-demo"  # stands in a folder that this script may remove


def untrained(place: Path) -> Path:
    """The tiny model as training finds it."""
    torch.manual_seed(0)
    model = MoshiTTTForConditionalGeneration(MoshiTTTConfig.from_pretrained(ROOT / "configuration" / "model" / "tiny.json"))
    model.save_pretrained(place / "untrained")
    MoshiTTTProcessor.from_pretrained(ROOT / "configuration" / "model" / "tiny").save_pretrained(place / "untrained")
    return place / "untrained"


def trained() -> str | None:
    """The model that `make demo-train` left; None: there is none."""
    folder = ROOT / "runs" / "demo" / "final"
    return os.path.relpath(folder) if (folder / "config.json").is_file() else None


def main_words(recording: Recording) -> list[tuple[str, np.ndarray]]:
    """Every word of Moshi's side, with its sound."""
    samples = read_audio(recording.path, RATE)[0]
    return [
        (word, samples[round(start * RATE) : round(end * RATE)])
        for word, (start, end), speaker in recording.words or ()
        if speaker == MAIN_SPEAKER and end - start > 0.15
    ]


def write_gold(folder: Path, columns: list[str], rows: list[list[str]]) -> None:
    with (folder / "gold.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def cut_words(folder: Path, recordings: list[Recording]) -> None:
    """sWUGGY's layout: a word, and the same word backwards."""
    root, rows = folder / "lexical" / "dev", []
    for recording in recordings:
        for number, (word, sound) in enumerate(main_words(recording)[:12]):
            item = f"{recording.path.stem}-{number}"
            for correct, samples in ((1, sound), (0, sound[::-1].copy())):
                write_audio(root / f"{item}-{correct}.wav", samples, RATE)
                rows.append(
                    [
                        item,
                        f"{item}-{correct}",
                        recording.path.stem,
                        str(number % 7),
                        word if correct else "",
                        "",
                        str(len(word)),
                        str(correct),
                    ]
                )
    write_gold(root, ["id", "filename", "voice", "frequency", "word", "phones", "length", "correct"], rows)


def cut_phrases(folder: Path, recordings: list[Recording]) -> None:
    """sBLIMP's layout: four words in order, and in another order."""
    root, rows = folder / "syntactic" / "dev", []
    for recording in recordings:
        words = main_words(recording)
        for number in range(len(words) // 4):
            part = words[4 * number : 4 * number + 4]
            item = f"{recording.path.stem}-{number}"
            for correct, order in ((1, (0, 1, 2, 3)), (0, (2, 0, 3, 1))):
                write_audio(root / f"{item}-{correct}.wav", np.concatenate([part[i][1] for i in order]), RATE)
                text = " ".join(part[i][0] for i in order)
                rows.append([item, f"{item}-{correct}", recording.path.stem, "order", "four_words", text, str(correct)])
    write_gold(root, ["id", "filename", "voice", "type", "subtype", "transcription", "correct"], rows)


def cut_stories(folder: Path, recordings: list[Recording]) -> None:
    """StoryCloze's layout: a dialogue with its own last words, and with another's."""
    halves = []
    for recording in recordings:
        sounds = [sound for _, sound in main_words(recording)]
        halves.append((np.concatenate(sounds[: len(sounds) // 2]), np.concatenate(sounds[len(sounds) // 2 :])))
    for number, (start, end) in enumerate(halves):
        other = halves[(number + 1) % len(halves)][1]
        for label, ending, offset in (("correct", end, 0), ("incorrect", other, 1)):
            write_audio(folder / f"{2 * number + offset}_story-{number}_{label}.wav", np.concatenate([start, ending]), RATE)


def cut_voices(folder: Path, recordings: list[Recording]) -> None:
    """SALMon's layout: one voice, and a change of voice in the middle."""
    for number, recording in enumerate(recordings):
        other = recordings[(number + 1) % len(recordings)]
        mine, theirs = ([sound for _, sound in main_words(one)] for one in (recording, other))
        half = len(mine) // 2
        for side, sounds in enumerate((mine, mine[:half] + theirs[half:])):
            write_audio(folder / "speaker_consistency" / f"sample_{number}_{side}.wav", np.concatenate(sounds), RATE)


def join_dialogues(folder: Path, recordings: list[Recording]) -> Path:
    """All dialogues one after the other as one conversation of minutes, with its words; the manifest of it."""
    samples, words, start = [], [], 0.0
    for recording in recordings:
        samples.append(read_audio(recording.path, RATE))
        words += [[word, [start + begin, start + end], speaker] for word, (begin, end), speaker in recording.words or ()]
        start += samples[-1].shape[1] / RATE
    write_audio(folder / "dialogues.wav", np.concatenate(samples, axis=1), RATE)
    (folder / "dialogues.json").write_text(json.dumps({"alignments": words}))
    (folder / "data.jsonl").write_text(json.dumps({"path": "dialogues.wav", "duration": start}) + "\n")
    return folder / "data.jsonl"


def settings(place: Path, model: str, before: str | None) -> dict:
    """All sections of `moshi-ttt evaluate`, in small; `before` is the model before its training."""
    tasks = [{"task": name, "folder": str(place / "data" / "sLM21")} for name in ("swuggy", "sblimp")]
    tasks.append({"task": "sstorycloze", "folder": str(place / "data" / "stories")})
    tasks.append({"task": "salmon", "folder": str(place / "data" / "salmon"), "parts": ["speaker_consistency"]})
    return {
        "model": model,
        "output": str(place),
        "zero_shot": {"tasks": tasks, "submission": True, "published": False},  # these small sets are not the benchmarks
        "long_context": {"manifest": str(place / "data" / "long" / "data.jsonl")},
        "inner_loss": {"manifest": str(DIALOGUES / "eval.jsonl"), "smooth": 3},
        "dialogue": {"manifest": str(DIALOGUES / "eval.jsonl"), "before": before},
        # minutes; the README's picture is `moshi-ttt recall`, and as long here: recall.pairs=[4,8] recall.steps=1500 recall.seconds=600
        "recall": {
            "output": str(place / "recall"),
            "pairs": [4],
            "steps": 400,
            "seconds": 120.0,
            "variants": [{"mixer": "none"}, {"mixer": "mlp", "mini_batch_size": 16}],
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of those written here, as output=FOLDER")
    overrides = parser.parse_args().overrides
    begin, given = time.perf_counter(), dict(item.split("=", 1) for item in overrides if "=" in item)
    place = Path(given.get("output", os.path.relpath(ROOT / "runs" / "evaluate-demo")))
    clear_folder(place, MARK)
    place.mkdir(parents=True)
    (place / MARK).touch()
    fresh, demo = str(untrained(place)), trained()
    model = given.get("model", demo)
    print(f"model: {model}" if model else "model: untrained (make demo-train trains one, or give model=FOLDER); expect chance", flush=True)
    recordings = read_manifest(DIALOGUES / "train.jsonl") + read_manifest(DIALOGUES / "eval.jsonl")
    cut_words(place / "data" / "sLM21", recordings)
    cut_phrases(place / "data" / "sLM21", recordings)
    cut_stories(place / "data" / "stories", recordings)
    cut_voices(place / "data" / "salmon", recordings)
    join_dialogues(place / "data" / "long", recordings)
    file = place / "settings.yaml"
    file.write_text(yaml.safe_dump(settings(place, model or fresh, fresh if model and model == demo else None), sort_keys=False))
    command = [sys.executable, "-m", "modeling_moshi_ttt.cli", "evaluate", str(file), *overrides]
    # the model's products are small: threads would wait for one another longer than they compute
    code = subprocess.run(command, check=False, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    if code == 0:
        parts = json.loads((place / "results.json").read_text())["tasks"]
        scores = parts["zero_shot"]["tasks"]
        print("  ".join(f"{name} {100 * task['accuracy']:.1f}%" for name, task in scores.items()), "(chance 50%)")
        print("  ".join(f"{name} {part['seconds']:.0f} s" for name, part in parts.items()))
        print(f"the evaluation took {(time.perf_counter() - begin) / 60:.1f} minutes; read {place / 'report.html'}")
    return code


if __name__ == "__main__":
    sys.exit(without_trace(main))

"""Write word times beside recordings, with a speech recogniser of transformers.

Each channel is heard by itself: the left one is Moshi's (SPEAKER_MAIN), the right one the user's (SPEAKER_USER). The words of a.wav go to
a.json in moshi-finetune's format.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER

SAMPLE_RATE = 16000
Recogniser = Callable[[np.ndarray], list[dict[str, Any]]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("paths", nargs="+", type=Path, help="sound files, or folders of them")
    parser.add_argument("--model", default="openai/whisper-small", help="recogniser that gives word times")
    parser.add_argument("--language", help="language of the recordings, if the recogniser takes one")
    parser.add_argument("--device", help="where the recogniser runs, as in cuda:0")
    parser.add_argument("--mono-is", choices=("moshi", "user"), default="moshi", help="whose voice a mono recording is")
    parser.add_argument("--overwrite", action="store_true", help="write over words that are there")


def run(args: argparse.Namespace) -> int:
    """Annotate every file; files that cannot be read are reported together at the end, with exit code 1."""
    from tqdm import tqdm

    files = find_sounds(args.paths)
    todo = [path for path in files if args.overwrite or not path.with_suffix(".json").exists()]
    problems = []
    if todo:
        recognise = load_recogniser(args.model, args.language, args.device)
        for path in tqdm(todo, desc="annotating"):
            try:
                annotate(path, recognise, args.mono_is)
            except (ValueError, OSError) as error:
                problems.append(str(error))
    print(f"{len(todo) - len(problems)} files annotated, {len(files) - len(todo)} had words already")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def find_sounds(paths: list[Path]) -> list[Path]:
    """The sound files named, and those below the folders named; ValueError when there is none."""
    from .sources import SOUND_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in SOUND_SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise MoshiTTTError(f"There is no sound file ({', '.join(SOUND_SUFFIXES)}) in {', '.join(map(str, paths))}.")
    return files


def load_recogniser(model: str, language: str | None, device: str | None) -> Recogniser:
    """A function from mono samples at 16 kHz to the pipeline's chunks, one a word; ValueError for a language that the model does not take."""
    from transformers import pipeline

    recogniser: Any = pipeline("automatic-speech-recognition", model=model, device=device)
    if language and recogniser.type != "seq2seq_whisper":  # the pipeline would leave it out in silence
        raise MoshiTTTError(f"--language is {language!r}, but the recogniser {model} takes none; leave it out.")
    options = {"generate_kwargs": {"language": language}} if language else {}

    def recognise(samples: np.ndarray) -> list[dict[str, Any]]:
        heard = recogniser({"raw": samples, "sampling_rate": SAMPLE_RATE}, return_timestamps="word", chunk_length_s=30, **options)
        return list(heard["chunks"])

    return recognise


def annotate(path: Path, recognise: Recogniser, mono_is: str) -> Path:
    """Write the words of one recording beside it; returns the file. ValueError for more than two channels."""
    from ..common.files import atomic_write
    from .audio import read_audio

    channels = read_audio(path, SAMPLE_RATE)
    if channels.shape[0] > 2:
        raise MoshiTTTError(f"{path}: the recording has {channels.shape[0]} channels; it must have one or two.")
    speakers = [MAIN_SPEAKER, USER_SPEAKER]
    if channels.shape[0] == 1 and mono_is == "user":
        speakers = [USER_SPEAKER]
    words: list[list[Any]] = []
    length = channels.shape[1] / SAMPLE_RATE
    for samples, speaker in zip(channels, speakers):
        words += [word for chunk in recognise(samples) if (word := _word(chunk, speaker, length)) is not None]
    target = path.with_suffix(".json")
    atomic_write(target, json.dumps({"alignments": sorted(words, key=lambda word: word[1][0])}, ensure_ascii=False))
    return target


def _word(chunk: dict[str, Any], speaker: str, length: float) -> list[Any] | None:
    """One word as moshi-finetune writes it; a recogniser may leave the last word's end open. None for nothing said."""
    text, (start, end) = chunk["text"].strip(), chunk["timestamp"]
    end = length if end is None else min(end, length)
    if not text or start is None or not start < end:
        return None
    return [text, [round(float(start), 3), round(float(end), 3)], speaker]

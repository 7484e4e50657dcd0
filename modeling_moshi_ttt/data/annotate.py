"""Write word times beside recordings, with a speech recogniser.

Each channel is heard by itself: the left one is Moshi's (SPEAKER_MAIN), the right one the user's (SPEAKER_USER). Where nobody speaks nothing
is asked of the recogniser, which would make words up. The words of a.wav go to a.json in moshi-finetune's format. Files that have words are
passed over, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER
from .recognizers import SAMPLE_RATE, Chunk, Recognizer, load_recognizer
from .shard import add_shard, read_shard
from .voice import IndistinctVoice, voice_activity

BLOCK = 300.0  # seconds in which voices are looked for at once
LONGEST = 28.0  # seconds of a piece for the recogniser, which hears 30
PAUSE = 3.0  # seconds of silence that part two pieces
MARGIN = 0.2  # seconds kept around a voice
AT_ONCE = 32  # pieces given to the recogniser


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("paths", nargs="+", type=Path, help="sound files, or folders of them")
    parser.add_argument("--model", default="openai/whisper-small", help="recogniser that gives word times: a folder or a Hub name")
    parser.add_argument(
        "--recognizer", choices=("auto", "transformers", "faster-whisper"), default="auto", help="what runs it (default: as the model is)"
    )
    parser.add_argument("--language", help="language of the recordings, if the recogniser takes one; else each recording's is found out")
    parser.add_argument("--device", help="where the recogniser runs, as in cuda:0")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pieces of up to 28 s heard side by side (default: 8)")
    parser.add_argument("--mono-is", choices=("moshi", "user"), default="moshi", help="whose voice a mono recording is")
    parser.add_argument("--overwrite", action="store_true", help="write over words that are there")
    add_shard(parser, "the recordings")


def run(args: argparse.Namespace) -> int:
    """Annotate every file; files that cannot be read are reported together at the end, with exit code 1."""
    from ..common.progress import progress_bar
    from .word_files import find_words

    shard = read_shard(args.shard)
    files = find_sounds(args.paths)[shard.number :: shard.total]
    todo = [path for path in files if args.overwrite or find_words(path, "") is None]
    problems = []
    if todo:
        recognize = load_recognizer(args.model, args.recognizer, args.language, args.device, args.batch_size)
        for path in progress_bar(todo, desc="annotating"):
            try:
                annotate(path, recognize, args.mono_is)
            except (MoshiTTTError, OSError) as error:
                problems.append(str(error))
    print(f"{len(todo) - len(problems)} files annotated, {len(files) - len(todo)} had words already")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def find_sounds(paths: list[Path]) -> list[Path]:
    """The sound files named, and those below the folders named; ValueError when there is none."""
    from .audio import SOUND_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in SOUND_SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise MoshiTTTError(f"There is no sound file ({', '.join(SOUND_SUFFIXES)}) in {', '.join(map(str, paths))}.")
    return files


def annotate(path: Path, recognize: Callable[[np.ndarray], list[Chunk]], mono_is: str) -> Path:
    """Write the words of one recording beside it; returns the file. ValueError for more than two channels.

    recognise: gives the words of samples [N] at 16 kHz; a `Recogniser` hears several pieces together.
    """
    from ..common.files import atomic_write
    from .audio import audio_channels, audio_pieces
    from .sound_worker import in_worker, pieces_in_worker

    channels = in_worker(audio_channels, path)
    if channels > 2:
        raise MoshiTTTError(f"{path}: the recording has {channels} channels; it must have one or two.")
    speakers = [USER_SPEAKER] if channels == 1 and mono_is == "user" else [MAIN_SPEAKER, USER_SPEAKER][:channels]
    words: list[list[Any]] = []
    for channel, speaker in enumerate(speakers):
        pieces = voiced_pieces(block[channel] for block in pieces_in_worker(audio_pieces, path, SAMPLE_RATE, BLOCK))
        while group := list(islice(pieces, AT_ONCE)):
            heard = (
                recognize.several([piece for _, piece in group])
                if isinstance(recognize, Recognizer)
                else [recognize(piece) for _, piece in group]
            )
            for (start, piece), chunks in zip(group, heard, strict=True):
                length = len(piece) / SAMPLE_RATE
                words += [word for chunk in chunks if (word := _word(chunk, speaker, start, length)) is not None]
    target = path.with_suffix(".json")
    atomic_write(target, json.dumps({"alignments": sorted(words, key=lambda word: word[1][0])}, ensure_ascii=False))
    return target


def voiced_pieces(blocks: Iterable[np.ndarray]) -> Iterator[tuple[float, np.ndarray]]:
    """(start in seconds, samples) of what is voice in one channel [n], at most 28 s at a time; all of it where voice and noise cannot be told
    apart. What a block ends in the midst of is heard with the next block.
    """
    rest, begin = np.zeros(0, np.float32), 0
    waiting = chain(blocks, [None])
    block = next(waiting)
    while block is not None:
        following = next(waiting)
        samples = np.concatenate([rest, block])
        pieces = _pieces(samples)
        kept = len(samples)
        if following is not None:
            kept = max(len(samples) - round(MARGIN * SAMPLE_RATE), 0)
            if pieces and pieces[-1][1] >= kept:
                kept, _ = pieces.pop()
        yield from (((begin + start) / SAMPLE_RATE, samples[start:end]) for start, end in pieces)
        rest, begin, block = samples[kept:], begin + kept, following


def _pieces(samples: np.ndarray) -> list[tuple[int, int]]:
    """Voices with short pauses between them joined, long ones cut, as [start, end) in samples."""
    try:
        voices = voice_activity(samples, SAMPLE_RATE)
    except IndistinctVoice:
        voices = [(0.0, len(samples) / SAMPLE_RATE)]
    joined: list[tuple[float, float]] = []
    for start, end in voices:
        if joined and start - joined[-1][1] < PAUSE and end - joined[-1][0] < LONGEST - 2 * MARGIN:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    longest, pieces = round(LONGEST * SAMPLE_RATE), []
    for start, end in joined:
        first, last = max(round((start - MARGIN) * SAMPLE_RATE), 0), min(round((end + MARGIN) * SAMPLE_RATE), len(samples))
        pieces += [(at, min(at + longest, last)) for at in range(first, last, longest)]
    return pieces


def _word(chunk: Chunk, speaker: str, begin: float, length: float) -> list[Any] | None:
    """One word as moshi-finetune writes it; a recogniser may leave the last word's end open. None for nothing said."""
    text, (start, end) = chunk["text"].strip(), chunk["timestamp"]
    end = length if end is None else min(end, length)
    if not text or start is None or not start < end:
        return None
    return [text, [round(float(begin + start), 3), round(float(begin + end), 3)], speaker]

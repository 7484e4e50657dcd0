"""Recordings with word times, as moshi-finetune's users hold them: a jsonl of paths, and beside each sound file its words."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import inside, parse_json, read_text
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER

Word = tuple[str, tuple[float, float], str]  # (text, (start, end) in seconds, speaker)


@dataclass(frozen=True)
class Recording:
    """One stereo recording: left channel Moshi, right channel the user.

    `words` are (text, (start, end), speaker) sorted by start, times in seconds; None when nothing was aligned.
    """

    path: Path
    duration: float
    words: tuple[Word, ...] | None = None


def read_manifest(path: str | os.PathLike[str], allow_outside: bool = False, problems: list[str] | None = None) -> list[Recording]:
    """Read a jsonl of {"path", "duration"} lines; paths are relative to the file, words come from the .json beside each sound.

    `path` may be the bare name of a packaged manifest.
    `allow_outside` permits absolute paths and '..'. With a list in `problems`, bad lines are described there and left out;
    without it they raise one ValueError that names them all. A missing or empty manifest always raises.
    """
    path = Path(resolve("data", path))
    if not path.is_file():
        raise MoshiTTTFileNotFoundError(f'{path}: there is no such manifest (a .jsonl of {{"path": …, "duration": …}} lines).')
    found: list[str] = []
    recordings: list[Recording] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                recordings.append(_read_line(path, line, allow_outside))
            except (ValueError, OSError) as error:
                found.append(f"{path}, line {number}: {error}")
    if not recordings and not found:
        raise MoshiTTTError(f"{path}: the manifest is empty.")
    if problems is None and found:
        raise MoshiTTTError("\n".join(found))
    if problems is not None:
        problems += found
    return recordings


def _read_line(manifest: Path, line: str, allow_outside: bool) -> Recording:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise MoshiTTTError(f"not JSON ({error}).") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise MoshiTTTError('a line must be {"path": "a.wav", "duration": seconds}.')
    duration = entry.get("duration")
    if isinstance(duration, bool) or not isinstance(duration, (int, float)) or not (math.isfinite(duration) and duration > 0):
        raise MoshiTTTError(f"duration is {duration!r}, it must be a number of seconds > 0.")
    sound = manifest.parent / entry["path"] if allow_outside else inside(manifest.parent, entry["path"])
    if not sound.is_file():
        raise MoshiTTTFileNotFoundError(f"there is no sound file {sound}.")
    return Recording(sound, float(duration), read_words(sound.with_suffix(".json")))


def read_words(path: str | os.PathLike[str]) -> tuple[Word, ...] | None:
    """Words of a JSON file in a layout that `parse_words` knows; None when the file is missing."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise MoshiTTTError(f"{path}: the words are not JSON ({error}).") from None
    return parse_words(path, data)


def parse_words(path: str | os.PathLike[str], data: Any) -> tuple[Word, ...]:
    """Words sorted by start, from moshi-finetune's {"alignments": […]}, from such a list itself, from J-Moshi's list of
    {speaker, word, start, end}, or from Behavior-SD's {"utterances": […]}, whose words share their utterance's time by their length.

    Raises:
        ValueError: names `path` and the word that is wrong.
    """
    path = Path(path)
    if isinstance(data, dict) and isinstance(data.get("alignments"), list):
        items = data["alignments"]
    elif isinstance(data, dict) and isinstance(data.get("utterances"), list):
        items = _utterance_words(path, data["utterances"])
    elif isinstance(data, list):
        items = data
    else:
        raise MoshiTTTError(f'{path}: words must be {{"alignments": [["word", [start, end], "{MAIN_SPEAKER}"], …]}}.')
    words = [_word(path, i, item) for i, item in enumerate(items)]
    return tuple(sorted(words, key=lambda word: word[1][0]))


def _utterance_words(path: Path, utterances: list[Any]) -> list[Any]:
    """Behavior-SD: speaker i is channel i, and the other one says an utterance's backchannels."""
    items: list[Any] = []
    for index, utterance in enumerate(utterances):
        try:
            speaker = (0, 1).index(int(utterance["speaker_idx"]))
            spoken = [(utterance, speaker)] + [(said, 1 - speaker) for said in utterance.get("backchannels") or []]
            for said, channel in spoken:
                label = (MAIN_SPEAKER, USER_SPEAKER)[channel]
                items += _share_time(str(said["tts_text"] or ""), float(said["start_time"]), float(said["end_time"]), label)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
            raise MoshiTTTError(
                f"{path}: utterance {index} is {utterance!r}; it must hold speaker_idx (0 or 1), tts_text, start_time and end_time."
            ) from None
    return items


def _share_time(text: str, start: float, end: float, speaker: str) -> list[Any]:
    """The words of a text over its seconds, each as long as its share of the letters."""
    words = text.split()
    bounds = [sum(map(len, words[:i])) / max(len("".join(words)), 1) for i in range(len(words) + 1)]
    at = [start + (end - start) * bound for bound in bounds]
    return [[word, [at[i], at[i + 1]], speaker] for i, word in enumerate(words)]


def _word(path: Path, index: int, item: Any) -> Word:
    try:
        if isinstance(item, dict):  # J-Moshi: speaker A is the left channel
            text, start, end = item["word"], float(item["start"]), float(item["end"])
            speaker = {"A": MAIN_SPEAKER, "B": USER_SPEAKER}.get(item["speaker"], item["speaker"])
        else:
            text, (start, end), speaker = item[0], map(float, item[1]), item[2]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise MoshiTTTError(f'{path}: word {index} is {item!r}, it must be ["word", [start, end], "speaker"].') from None
    if not (isinstance(text, str) and isinstance(speaker, str) and math.isfinite(start) and math.isfinite(end)):
        raise MoshiTTTError(f"{path}: word {index} is {item!r}: text and speaker must be strings, times finite.")
    return text, (start, end), speaker

"""Files of words in the layouts that people have: moshi-finetune's, J-Moshi's, Behavior-SD's and WhisperX's JSON, CTM, TextGrid."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER
from . import limits
from .words import Policy, Said, Word, WordReport, mend, seconds_of, share_time

SUFFIXES = (".json", ".ctm", ".TextGrid")
# Other names of the two channels, in lower case: J-Moshi's, those of CTM, and plain ones.
CHANNELS = {"a": MAIN_SPEAKER, "1": MAIN_SPEAKER, "left": MAIN_SPEAKER, "moshi": MAIN_SPEAKER}
CHANNELS |= {"b": USER_SPEAKER, "2": USER_SPEAKER, "right": USER_SPEAKER, "user": USER_SPEAKER}


def find_words(sound: Path, pattern: str) -> Path | None:
    """The file of a sound's words; None where there is none.

    pattern: from the sound's folder on, with {stem} for its name: "../text/{stem}.json". Where it is "", a .json, .ctm or .TextGrid beside
    the sound, or, for a sound below a folder `audio`, in the same place below its sibling `text`, as J-Moshi's sets have it.
    """
    if pattern:
        path = sound.parent / pattern.replace("{stem}", sound.stem)
        return path if path.is_file() else None
    places = [sound]
    if "audio" in sound.parts:
        at = len(sound.parts) - 1 - sound.parts[::-1].index("audio")
        places.append(Path(*sound.parts[:at], "text", *sound.parts[at + 1 :]))
    candidates = (place.with_suffix(suffix) for place in places for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def read_words(
    path: str | os.PathLike[str], seconds: float = float("inf"), policy: Policy = "keep"
) -> tuple[tuple[Word, ...] | None, WordReport]:
    """Words of a file in a layout that is known, as `mend` leaves them, with its report; None when the file is missing.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        return None, WordReport()
    if path.stat().st_size > limits.WORDS_BYTES:
        raise MoshiTTTError(f"{path}: the words take {path.stat().st_size} bytes; a recording's take {limits.WORDS_BYTES} at most.")
    if path.suffix == ".TextGrid":
        said = list(_text_grid(path))
    elif path.suffix == ".ctm":
        said = list(_ctm(path))
    else:
        said = list(_of_json(path, _json(path)))
    return mend(said, seconds, policy, str(path))


def parse_words(
    path: str | os.PathLike[str], data: Any, seconds: float = float("inf"), policy: Policy = "keep"
) -> tuple[tuple[Word, ...], WordReport]:
    """The same of parsed JSON that comes from elsewhere than a file; `path` names it in messages."""
    return mend(list(_of_json(Path(path), data)), seconds, policy, str(path))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except RecursionError:
        raise MoshiTTTError(f"{path}: the words are not JSON (it is nested too deep).") from None
    except ValueError as error:
        raise MoshiTTTError(f"{path}: the words are not JSON ({error}).") from None


def _of_json(path: Path, data: Any) -> Iterator[Said]:
    if isinstance(data, dict) and isinstance(data.get("alignments"), list):
        return map(_said, data["alignments"])
    if isinstance(data, dict) and isinstance(data.get("utterances"), list):
        return _utterances(path, data["utterances"])
    if isinstance(data, dict) and isinstance(data.get("segments"), list):
        return _whisper_x(data["segments"])
    if isinstance(data, list):
        return map(_said, data)
    raise MoshiTTTError(
        f'{path}: words must be {{"alignments": [["word", [start, end], "{MAIN_SPEAKER}"], …]}}, or the JSON of WhisperX or J-Moshi.'
    )


def _said(item: Any) -> Said:
    """A word of moshi-finetune's or of J-Moshi's; one of another shape has no text."""
    if isinstance(item, dict):
        return Said(item.get("word"), seconds_of(item.get("start")), seconds_of(item.get("end")), speaker(item.get("speaker")))
    try:
        text, (start, end), label = item
    except (TypeError, ValueError):
        return Said(item if isinstance(item, (int, float)) else None, None, None, MAIN_SPEAKER)
    return Said(text, seconds_of(start), seconds_of(end), label if isinstance(label, str) else MAIN_SPEAKER)


def speaker(label: Any) -> str:
    """Moshi's or the user's label where the name is a channel's; others stay. Words without a label are Moshi's."""
    return CHANNELS.get(label.lower(), label) if isinstance(label, str) else MAIN_SPEAKER


def _whisper_x(segments: list[Any]) -> Iterator[Said]:
    """WhisperX leaves out the times of words that it cannot align, such as numbers, and labels speakers by word or by segment."""
    for segment in segments:
        if isinstance(segment, dict):
            for word in segment.get("words") or []:
                label = {"speaker": segment.get("speaker")}
                yield _said(label | word if isinstance(word, dict) else None)


def _utterances(path: Path, utterances: list[Any]) -> Iterator[Said]:
    """Behavior-SD: speaker i is channel i, the other one says an utterance's backchannels, and words share their utterance's time."""
    for index, utterance in enumerate(utterances):
        try:
            channel = (0, 1).index(int(utterance["speaker_idx"]))
            spoken = [(utterance, channel)] + [(said, 1 - channel) for said in utterance.get("backchannels") or []]
            shared = [
                word
                for said, by in spoken
                for word in share_time(
                    str(said["tts_text"] or ""), float(said["start_time"]), float(said["end_time"]), (MAIN_SPEAKER, USER_SPEAKER)[by]
                )
            ]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
            raise MoshiTTTError(
                f"{path}: utterance {index} is {str(utterance)[:200]}; it must hold speaker_idx (0 or 1), tts_text, start_time and end_time."
            ) from None
        yield from (Said(text, *times, label) for text, times, label in shared)


def _ctm(path: Path) -> Iterator[Said]:
    """NIST's CTM: `recording channel start duration word [confidence]`. Lines of other recordings are passed over where some are ours."""
    lines = [line.split() for line in _text(path).split("\n") if line.strip() and not line.startswith(";;")]
    ours = [fields for fields in lines if fields[0] == path.stem] or lines
    for fields in ours:
        start, duration = (seconds_of(field) for field in (*fields[2:4], None, None)[:2])
        end = None if start is None or duration is None else start + duration
        yield Said(fields[4] if len(fields) > 4 else None, start, end, speaker(fields[1] if len(fields) > 1 else None))


def _text_grid(path: Path) -> Iterator[Said]:
    """Praat's TextGrid: a tier of intervals a speaker, by its name. Of the Montreal aligner's "name - words" and "name - phones" the words."""
    from praatio import textgrid
    from praatio.utilities.errors import PraatioException

    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="silence")
    except (PraatioException, ValueError, IndexError, KeyError, UnicodeError) as error:
        raise MoshiTTTError(f"{path}: the TextGrid cannot be read ({type(error).__name__}: {error}).") from None
    for tier in grid.tiers:
        name, _, kind = tier.name.rpartition(" - ")
        if kind == "phones" or not isinstance(tier, textgrid.IntervalTier):
            continue
        label = tier.name if kind != "words" else name
        for start, end, text in tier.entries:
            yield Said(text, start, end, MAIN_SPEAKER if label == "words" else speaker(label or None))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MoshiTTTError(f"{path} is not a text file in UTF-8.") from None

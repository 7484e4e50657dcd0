"""Words with times: what is odd about them, how it is mended or refused, and the text stream that they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER, ZERO
from . import limits

Policy = Literal["repair", "refuse", "keep"]
Word = tuple[str, tuple[float, float], str]  # (text, (start, end) in seconds, speaker)
MOST_OUTSIDE = 0.5  # share of words outside a recording above which the times are those of something else


class Said(NamedTuple):
    """A word as its file has it. A time that is missing or no number is None; a text that is no text stays what it is."""

    text: Any
    start: float | None
    end: float | None
    speaker: str


@dataclass(frozen=True)
class WordReport:
    """How many words of a recording were odd, by what became of them; `kept`: odd, and left as they are."""

    clamped: int = 0
    dropped: int = 0
    interpolated: int = 0
    split: int = 0
    kept: int = 0

    def __add__(self, other: WordReport) -> WordReport:
        return WordReport(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, one.name)} {one.name}" for one in fields(self) if getattr(self, one.name))


def seconds_of(value: Any) -> float | None:
    """A time from outside as float seconds; None where it is missing, no number, or not finite."""
    try:
        time = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return time if math.isfinite(time) and not isinstance(value, bool) else None


def mend(said: Sequence[Said], seconds: float, policy: Policy, where: str) -> tuple[tuple[Word, ...], WordReport]:
    """Words sorted by start, and what was odd about them.

    policy: "repair" interpolates missing times, clamps times to the recording, splits words with spaces inside, and drops what cannot be
    mended: words without text or duration, outside the recording, twice the same. "refuse" raises for the first odd word. "keep" changes
    nothing and raises only for what cannot be read.

    Args:
        seconds: length of the recording; inf where it is not known.
        where: the file, for messages.

    Raises:
        ValueError: as the policy says; or most words stand outside the recording; or there are more than `limits.WORDS`.
    """
    if len(said) > limits.WORDS:
        raise MoshiTTTError(f"{where}: {len(said)} words are more than the {limits.WORDS} of a recording; cut it into shorter ones.")
    outside = [word for word in said if word.start is not None and not (word.start < seconds and (word.end is None or word.end >= 0))]
    if policy != "keep" and len(outside) > MOST_OUTSIDE * len(said):
        first = outside[0]
        raise MoshiTTTError(
            f"{where}: {len(outside)} of {len(said)} words, such as {str(first.text)[:40]!r} at {first.start:g} s, stand outside the "
            f"recording of {seconds:.2f} s; are the times in seconds?"
        )
    odd = {index: what for index, word in enumerate(said) if (what := _oddity(word, seconds))}
    places: dict[Said, int] = {}
    odd |= {index: "it is there twice" for index, word in enumerate(said) if index not in odd and places.setdefault(word, index) != index}
    for index, what in odd.items():
        if policy == "refuse" or (policy == "keep" and not _is_readable(said[index])):
            cure = "mend it, or set data.words: repair"
            raise MoshiTTTError(f"{where}: word {index} is {str(tuple(said[index]))[:100]}: {what}; {cure}.")
    if policy != "repair":
        words = [(word.text, (word.start, word.end), word.speaker) for word in said]
        return tuple(sorted(words, key=lambda word: word[1][0])), WordReport(kept=len(odd))  # type: ignore[arg-type, return-value]
    return _repaired(said, seconds)


def _is_readable(word: Said) -> bool:
    return not _illegible(word.text) and None not in (word.start, word.end)


def _illegible(text: Any) -> str:
    if not isinstance(text, str):
        return "its text is no string"
    if len(text) > limits.LONGEST_WORD:
        return f"its text has {len(text)} characters"
    return "its text holds half a character" if any("\ud800" <= letter <= "\udfff" for letter in text) else ""


def _oddity(word: Said, seconds: float) -> str:
    """What is odd about a word; "" where nothing is."""
    if illegible := _illegible(word.text):
        return illegible
    if not word.text.strip():
        return "it has no text"
    if word.start is None or word.end is None:
        return "it has no start or no end in finite seconds"
    if word.end <= word.start:
        return "it ends before it starts, or as it starts"
    if not (word.start >= 0 and word.end <= seconds):
        return f"it stands outside the recording of {seconds:.2f} s, or reaches out of it"
    return "there are spaces inside" if len(word.text.split()) > 1 else ""


def _repaired(said: Sequence[Said], seconds: float) -> tuple[tuple[Word, ...], WordReport]:
    legible = [word for word in said if not _illegible(word.text) and word.text.strip()]
    timed, interpolated = _with_times(legible, seconds)
    words: dict[Word, None] = {}  # in order, each once
    clamped = dropped = split = 0
    for text, start, end, speaker in timed:
        if not (start < end and start < seconds and end > 0):
            dropped += 1
            continue
        begin, stop = max(start, 0.0), min(end, seconds)
        clamped += (begin, stop) != (start, end)
        parts = share_time(text, begin, stop, speaker)
        split += len(parts) > 1
        if all(part in words for part in parts):
            dropped += 1
        words |= dict.fromkeys(parts)
    report = WordReport(clamped, dropped + len(said) - len(legible), interpolated, split)
    return tuple(sorted(words, key=lambda word: word[1][0])), report


def _with_times(said: Sequence[Said], seconds: float) -> tuple[list[tuple[str, float, float, str]], int]:
    """Words with all of their times: those that lack one share the time up to the next that is known, as long as their letters are."""
    timed: list[tuple[str, float, float, str]] = []
    count = index = 0
    before = 0.0
    while index < len(said):
        word = said[index]
        if word.start is not None and word.end is not None:
            timed.append((word.text, word.start, word.end, word.speaker))
            before, index = word.end, index + 1
            continue
        stop = index + 1
        while stop < len(said) and said[stop].start is None:
            stop += 1
        run = said[index:stop]
        begin = before if run[0].start is None else run[0].start
        after = seconds if stop == len(said) else said[stop].start
        if run[-1].end is not None:
            after = run[-1].end
        if after is None or not math.isfinite(after) or after <= begin:
            after = begin + 0.08 * len(run)  # a frame each
        letters = [max(len(one.text), 1) for one in run]
        at = [begin + (after - begin) * sum(letters[:i]) / sum(letters) for i in range(len(run) + 1)]
        timed += [(one.text, at[i], at[i + 1], one.speaker) for i, one in enumerate(run)]
        count, before, index = count + len(run), after, stop
    return timed, count


def share_time(text: str, start: float, end: float, speaker: str) -> list[Word]:
    """The words of a text over its seconds, each as long as its share of the letters."""
    words = text.split()
    bounds = [sum(map(len, words[:i])) / max(len("".join(words)), 1) for i in range(len(words) + 1)]
    at = [start + (end - start) * bound for bound in bounds]
    return [(word, (at[i], at[i + 1]), speaker) for i, word in enumerate(words)]


# ---- the text stream


def recording_text(
    processor: Any, words: Sequence[Word] | None, frames: int, policy: Policy = "refuse", main_speaker: str = MAIN_SPEAKER
) -> tuple[np.ndarray, WordReport]:
    """The text stream [T] int32 of a whole recording, by moshi-finetune's rules, and the words that it lacks; all -1 where nothing was
    aligned.

    Raises:
        ValueError: no label of a speaker is known; or a word cannot be encoded and the policy is not "repair", which drops it.
    """
    if words is None:
        return np.full(frames, ZERO, dtype=np.int32), WordReport()
    _check_speakers({speaker for _, _, speaker in words}, main_speaker)
    kept = [word for word in words if word[2] != main_speaker or _can_encode(processor.encode_word, word[0], policy)]
    text = processor.text_frames(kept, frames, main_speaker=main_speaker)
    return np.array(text, dtype=np.int32), WordReport(dropped=len(words) - len(kept))


def _can_encode(encode: Callable[[str], list[int]], text: str, policy: Policy) -> bool:
    try:
        encode(text)
    except MoshiTTTError:
        if policy != "repair":
            raise
        return False
    return True


def says_words(text: np.ndarray, padding_ids: Sequence[int]) -> bool:
    """Whether anything but padding stands in a text stream [T]; a recording in which only the user speaks holds padding alone."""
    return bool((~np.isin(text, (ZERO, *padding_ids))).any())


def _check_speakers(speakers: set[str], main_speaker: str) -> None:
    """Labels beside Moshi's may be any, as for moshi-finetune; but without Moshi's, an unknown one may well be Moshi under another name."""
    unknown = sorted(speakers - {MAIN_SPEAKER, USER_SPEAKER, main_speaker})
    if unknown and main_speaker not in speakers:
        raise MoshiTTTError(
            f"the words' speakers are {', '.join(map(repr, unknown))} and none is {main_speaker!r}, so no text would be learned; "
            f"name Moshi's label with data.main_speaker, or call Moshi {MAIN_SPEAKER!r} and the user {USER_SPEAKER!r} in the words."
        )

"""How a conversation behaves: reply delay, overlap, silence, words a minute, word error rate of the text stream.

Users lose the greeting and the pace when they fine-tune; these numbers, taken before and after on the same recordings, show it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.voice import IndistinctVoice, Segment, voice_activity
from ..errors_moshi_ttt import MoshiTTTError

LONGEST_REPLY = 10.0  # seconds; what starts later answers nothing


@dataclass(frozen=True)
class Behaviour:
    """One conversation. Numbers are None where nothing was said to measure them by, and where `withheld` says why they cannot be known."""

    duration: float  # seconds
    reply_delays: list[float]  # seconds from the end of each answered user turn to Moshi's voice
    unanswered: int  # user turns that nobody answered before the next one
    greeting: float | None  # seconds until Moshi's first sound
    overlap: float | None  # share of the time in which both speak
    silence: float | None  # share of the time in which neither speaks
    words_per_minute: float | None
    word_errors: int | None
    reference_words: int | None
    withheld: str | None = None  # why nothing is known of who spoke when


def reply_delays(user: Sequence[Segment], moshi: Sequence[Segment]) -> tuple[list[float], int]:
    """(delays of the answered user turns, number of unanswered ones).

    A turn is answered by the first sound of Moshi that starts after its end, within 10 s and before the user's next turn ends; where
    Moshi is already speaking at the turn's end and goes on, the delay is 0.
    """
    delays, unanswered = [], 0
    for index, (_, end) in enumerate(user):
        limit = min(end + LONGEST_REPLY, user[index + 1][1] if index + 1 < len(user) else np.inf)
        if any(start < end < stop for start, stop in moshi):
            delays.append(0.0)
            continue
        starts = [start for start, _ in moshi if end <= start < limit]
        if starts:
            delays.append(starts[0] - end)
        else:
            unanswered += 1
    return delays, unanswered


def shares(moshi: Sequence[Segment], user: Sequence[Segment], duration: float) -> tuple[float, float]:
    """(share of overlap, share of silence) of `duration` seconds, exact from the segments."""
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in moshi for b in user)
    spoken = sum(end - start for start, end in moshi) + sum(end - start for start, end in user) - both
    return both / duration, 1.0 - spoken / duration


def normalise_words(text: str) -> list[str]:
    """Lower case, letters, digits and apostrophes of any script; what is left counts as words."""
    return re.findall(r"[\w']+", text.lower().replace("’", "'"))


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Least number of substitutions, deletions and insertions (Levenshtein) that turn one word list into the other."""
    row = np.arange(len(hypothesis) + 1)
    for i, word in enumerate(reference, start=1):
        same = np.array([word != other for other in hypothesis], dtype=np.int64)
        best = np.minimum(row[1:] + 1, row[:-1] + same)  # deletion, substitution
        new = np.concatenate([[i], best])
        # insertions run along the row: new[j] = min over m <= j of new[m] + (j - m)
        row = np.minimum.accumulate(new - np.arange(len(new))) + np.arange(len(new))
    return int(row[-1])


def measure(samples: np.ndarray, sample_rate: int, text: str | None = None, reference: str | None = None) -> Behaviour:
    """Behaviour of a stereo recording `samples` [2, N] (Moshi left, user right), with what its text stream said and should have said."""
    if samples.ndim != 2 or samples.shape[0] != 2:
        raise MoshiTTTError(f"measure: samples must be stereo [2, N] with Moshi on the left, their shape is {samples.shape}")
    duration = samples.shape[1] / sample_rate
    turns: dict[str, Any] = {"reply_delays": [], "unanswered": 0, "greeting": None, "overlap": None, "silence": None}
    try:
        moshi, user = (_voice(name, channel, sample_rate) for name, channel in zip(("Moshi", "user"), samples))
    except IndistinctVoice as reason:
        turns["withheld"] = str(reason)
    else:
        delays, unanswered = reply_delays(user, moshi)
        overlap, silence = shares(moshi, user, duration)
        greeting = moshi[0][0] if moshi else None
        turns = {"reply_delays": delays, "unanswered": unanswered, "greeting": greeting, "overlap": overlap, "silence": silence}
    said = None if text is None else normalise_words(text)
    wanted = None if reference is None else normalise_words(reference)
    return Behaviour(
        duration=duration,
        **turns,
        words_per_minute=None if said is None else 60.0 * len(said) / duration,
        word_errors=None if said is None or wanted is None else word_errors(wanted, said),
        reference_words=None if wanted is None else len(wanted),
    )


def _voice(name: str, channel: np.ndarray, sample_rate: int) -> list[Segment]:
    try:
        return voice_activity(channel, sample_rate)
    except IndistinctVoice as reason:
        raise IndistinctVoice(f"{name}'s channel: {reason}") from None


def summarise(behaviours: Sequence[Behaviour]) -> dict[str, float | str | None]:
    """One row of a table: times weigh by duration, word errors by words, delays each alike; None over nothing.

    Conversations of which nothing is known of who spoke when count in the words alone; "withheld" says how many, and why the first.
    """
    if not behaviours:
        raise MoshiTTTError("summarise: no recordings; check the manifest")
    known = [b for b in behaviours if b.withheld is None]
    delays = [delay for b in known for delay in b.reply_delays]
    turns = len(delays) + sum(b.unanswered for b in known)
    greetings = [b.greeting for b in known if b.greeting is not None]
    worded = [b for b in behaviours if b.word_errors is not None and b.reference_words]
    words = sum(b.reference_words or 0 for b in worded)
    reasons = [b.withheld for b in behaviours if b.withheld is not None]
    return {
        "reply delay, median s": float(np.median(delays)) if delays else None,
        "turns answered, share": len(delays) / turns if turns else None,
        "first sound, median s": float(np.median(greetings)) if greetings else None,
        "overlap, share": _over_time([(b.overlap, b.duration) for b in known]),
        "silence, share": _over_time([(b.silence, b.duration) for b in known]),
        "words a minute": _over_time([(b.words_per_minute, b.duration) for b in behaviours]),
        "word error rate": sum(b.word_errors or 0 for b in worded) / words if words else None,
        "withheld": f"{len(reasons)} of {len(behaviours)} recordings: {reasons[0]}" if reasons else None,
    }


def _over_time(values: Sequence[tuple[float | None, float]]) -> float | None:
    """The mean of (value, seconds) weighed by the seconds, of the values that are known; None over no time."""
    known = [(value, seconds) for value, seconds in values if value is not None]
    total = sum(seconds for _, seconds in known)
    return sum(value * seconds for value, seconds in known) / total if total else None

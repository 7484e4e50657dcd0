"""How a conversation behaves: reply delay, overlap, silence, words a minute, word error rate of the text stream.

Users lose the greeting and the pace when they fine-tune; these numbers, taken before and after on the same recordings, show it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .voice import IndistinctVoice, Segment, voice_activity

LONGEST_REPLY = 10.0  # seconds; what starts later answers nothing
WITHHELD = "withheld"  # of a row: why some of its numbers leave out recordings, or are null


@dataclass(frozen=True)
class Behaviour:
    """One conversation. Delays and pace are None where nothing was said to measure them by.

    Where a channel's voice cannot be told from its noise, `withheld` says so, and what rests on it is None or empty.
    """

    duration: float  # seconds
    reply_delays: list[float]  # seconds from the end of each answered user turn to Moshi's voice
    unanswered: int  # user turns that nobody answered before the next one
    greeting: float | None  # seconds until Moshi's first sound
    overlap: float | None  # share of the time in which both speak
    silence: float | None  # share of the time in which neither speaks
    words_per_minute: float | None
    word_errors: int | None
    reference_words: int | None
    withheld: str | None = None


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
        raise ValueError(f"measure: samples must be stereo [2, N] with Moshi on the left, their shape is {samples.shape}")
    duration = samples.shape[1] / sample_rate
    (moshi, user), reasons = _voices(samples, sample_rate)
    delays, unanswered = ([], 0) if reasons else reply_delays(user, moshi)
    overlap, silence = (None, None) if reasons else shares(moshi, user, duration)
    said = None if text is None else normalise_words(text)
    wanted = None if reference is None else normalise_words(reference)
    return Behaviour(
        duration=duration,
        reply_delays=delays,
        unanswered=unanswered,
        greeting=moshi[0][0] if moshi else None,
        overlap=overlap,
        silence=silence,
        words_per_minute=None if said is None else 60.0 * len(said) / duration,
        word_errors=None if said is None or wanted is None else word_errors(wanted, said),
        reference_words=None if wanted is None else len(wanted),
        withheld="; ".join(reasons) or None,
    )


def _voices(samples: np.ndarray, sample_rate: int) -> tuple[list[list[Segment]], list[str]]:
    """Segments of both channels, empty where they are withheld, and the reasons."""
    voices: list[list[Segment]] = []
    reasons: list[str] = []
    for name, channel in zip(("Moshi's channel", "the user's channel"), samples):
        try:
            voices.append(voice_activity(channel, sample_rate))
        except IndistinctVoice as error:
            voices.append([])
            reasons.append(f"{name}: {error}")
    return voices, reasons


def summarise(behaviours: Sequence[Behaviour]) -> dict[str, float | str | None]:
    """One row of a table: times weigh by duration, word errors by words, delays each alike.

    A number is over the recordings that have it, and None where none has; "withheld" is a sentence about those whose voices are unclear.
    """
    if not behaviours:
        raise ValueError("summarise: no recordings; check the manifest")
    heard = [b for b in behaviours if b.withheld is None]
    total = sum(b.duration for b in heard)
    unclear = [b.withheld for b in behaviours if b.withheld is not None]
    delays = [delay for b in behaviours for delay in b.reply_delays]
    turns = len(delays) + sum(b.unanswered for b in behaviours)
    greetings = [b.greeting for b in behaviours if b.greeting is not None]
    paced = [b for b in behaviours if b.words_per_minute is not None]
    worded = [b for b in behaviours if b.word_errors is not None and b.reference_words]
    words = sum(b.reference_words or 0 for b in worded)
    return {
        "reply delay, median s": float(np.median(delays)) if delays else None,
        "turns answered, share": len(delays) / turns if turns else None,
        "first sound, median s": float(np.median(greetings)) if greetings else None,
        "overlap, share": sum((b.overlap or 0) * b.duration for b in heard) / total if heard else None,
        "silence, share": sum((b.silence or 0) * b.duration for b in heard) / total if heard else None,
        "words a minute": sum((b.words_per_minute or 0) * b.duration for b in paced) / sum(b.duration for b in paced) if paced else None,
        "word error rate": sum(b.word_errors or 0 for b in worded) / words if words else None,
        WITHHELD: f"Delays, overlap and silence leave out {len(unclear)} of {len(behaviours)} recordings ({unclear[0]})." if unclear else None,
    }

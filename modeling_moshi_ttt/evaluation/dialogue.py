"""How a conversation behaves: reply delay, overlap, silence, words a minute, word error rate of the text stream.

Users lose the greeting and the pace when they fine-tune; these numbers, taken before and after on the same recordings, show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from torch import Tensor

from ..common.results import Part
from ..common.settings import Count, Positive, settings_group
from ..data.audio import read_audio
from ..data.recordings import Recording, read_manifest
from ..data.voice import IndistinctVoice, Segment, voice_activity
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER
from .formatting import number
from .kept_numbers import recording_line
from .task import Context, Measure, Table, Task

LONGEST_REPLY = 10.0  # seconds; what starts later answers nothing
WITHHELD = "withheld"  # why numbers of a conversation are not given


@settings_group
class DialogueSettings:
    """The model listens to the user's side of each recording and answers."""

    manifest: Path
    """Stereo dialogues, a .jsonl."""
    before: str | None = None
    """The model before fine-tuning (a folder or a Hub name), to stand beside this one."""
    max_recordings: Count | None = None
    """How many dialogues; null: all."""
    max_seconds: Positive = 120.0
    """How much of each dialogue."""
    temperature: Positive = 0.8
    """Temperature of the codes."""
    text_temperature: Positive = 0.7
    """Temperature of the text."""


@dataclass(frozen=True)
class Behavior:
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


def normalize_words(text: str) -> list[str]:
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


def behavior_of(samples: np.ndarray, sample_rate: int, text: str | None = None, reference: str | None = None) -> Behavior:
    """Behavior of a stereo recording `samples` [2, N] (Moshi left, user right), with what its text stream said and should have said."""
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
    said = None if text is None else normalize_words(text)
    wanted = None if reference is None else normalize_words(reference)
    return Behavior(
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


def summarize(behaviors: Sequence[Behavior]) -> dict[str, float | str | None]:
    """One row of a table: times weigh by duration, word errors by words, delays each alike; None over nothing.

    Conversations of which nothing is known of who spoke when count in the words alone; "withheld" says how many, and why the first.
    """
    known = [b for b in behaviors if b.withheld is None]
    delays = [delay for b in known for delay in b.reply_delays]
    turns = len(delays) + sum(b.unanswered for b in known)
    greetings = [b.greeting for b in known if b.greeting is not None]
    worded = [b for b in behaviors if b.word_errors is not None and b.reference_words]
    words = sum(b.reference_words or 0 for b in worded)
    reasons = [b.withheld for b in behaviors if b.withheld is not None]
    return {
        "reply delay, median s": float(np.median(delays)) if delays else None,
        "turns answered, share": len(delays) / turns if turns else None,
        "first sound, median s": float(np.median(greetings)) if greetings else None,
        "overlap, share": _over_time([(b.overlap, b.duration) for b in known]),
        "silence, share": _over_time([(b.silence, b.duration) for b in known]),
        "words a minute": _over_time([(b.words_per_minute, b.duration) for b in behaviors]),
        "word error rate": sum(b.word_errors or 0 for b in worded) / words if words else None,
        WITHHELD: f"{len(reasons)} of {len(behaviors)} recordings: {reasons[0]}" if reasons else None,
    }


def _over_time(values: Sequence[tuple[float | None, float]]) -> float | None:
    """The mean of (value, seconds) weighed by the seconds, of the values that are known; None over no time."""
    known = [(value, seconds) for value, seconds in values if value is not None]
    total = sum(seconds for _, seconds in known)
    return sum(value * seconds for value, seconds in known) / total if total else None


# ---------------------------------------------------------------- the model answers


def answer(model: Any, user_codes: Tensor, **sampling: Any) -> tuple[Tensor, Tensor]:
    """What the model says while it hears `user_codes` [K, T]: text [T] and audio codes [K, T]; `sampling` as in its `hear`."""
    text, codes = model.hear(user_codes[None].to(model.device), **sampling)
    return text[0].cpu(), codes[0].cpu()


def measure(
    model: Any,
    processor: Any,
    recordings: Sequence[Recording],
    max_seconds: float = 120.0,
    seed: int = 0,
    sampling: Mapping[str, float] | None = None,
    progress: Callable[[Sequence[Recording]], Iterable[Recording]] = lambda items: items,
    before: Any = None,
) -> dict[str, Any]:
    """How the recordings themselves behave ("reference"), of the model over the same user ("model"), and of the model `before`."""
    speakers = {name: one for name, one in (("before", before), ("model", model)) if one is not None}
    found: dict[str, list[Behavior]] = {name: [] for name in ("reference", *speakers)}
    rate = processor.sampling_rate
    for index, recording in enumerate(progress(recordings)):
        samples = read_audio(recording.path, rate, 0.0, max_seconds)
        if len(samples) != 2:
            raise MoshiTTTError(f"{recording.path}: has {len(samples)} channel(s); a dialogue is stereo, Moshi left and the user right")
        words = " ".join(word for word, (start, _), who in recording.words or () if who == MAIN_SPEAKER and start < max_seconds)
        transcript = words if recording.words is not None else None
        found["reference"].append(behavior_of(samples, rate, transcript, transcript))
        user_codes = processor.encode_audio(torch.from_numpy(samples[1:]))[0]
        for name, speaker in speakers.items():
            generator = torch.Generator(speaker.device).manual_seed(seed + index)
            text, codes = answer(speaker, user_codes, generator=generator, **(sampling or {}))
            voice = processor.decode_audio(codes[None])[0, : samples.shape[1]].float().numpy()  # the last frame may go on past the sound
            both = np.stack([voice, samples[1]])
            found[name].append(behavior_of(both, rate, processor.decode_text(text), transcript))
    each = {side: {one.path.stem: summarize([b]) for one, b in zip(recordings, behaviors)} for side, behaviors in found.items()}
    hours = sum(behavior.duration for behavior in found["reference"]) / 3600
    about = {"kind": "dialogue", "recordings": len(recordings), "hours": hours, "each": each}
    return about | {side: summarize(behaviors) for side, behaviors in found.items()}


def dialogues(section: DialogueSettings) -> list[Recording]:
    """The recordings of a section."""
    return read_manifest(section.manifest, allow_outside=True)[: section.max_recordings]


# ---------------------------------------------------------------- the evaluation

Row = dict[str, float | str | None]
BETTER = {"turns answered, share": True, "reply delay, median s": False, "overlap, share": False, "word error rate": False}


class DialoguePart(Part):
    """How each side behaves: the recorded answer, the model before fine-tuning, this model. each: side -> recording -> numbers."""

    recordings: int
    reference: Row
    model: Row
    before: NotRequired[Row]
    each: NotRequired[dict[str, dict[str, Row]]]


def sides(part: DialoguePart) -> dict[str, Row]:
    """Name of each side in tables -> its numbers."""
    heads = {"reference": "recorded answer", "before": "before fine-tuning", "model": "this model"}
    return {head: part[side] for side, head in heads.items() if side in part}  # type: ignore[literal-required]


class Dialogue(Task):
    name, settings, shape = "dialogue", DialogueSettings, DialoguePart
    question = "Does it behave in a conversation?"
    reading = "It hears the user's side of each recording and answers; beside it stands the recorded answer."

    def inputs(self, section: DialogueSettings) -> Iterable[str]:
        found = dialogues(section)
        return (recording_line(one) for one in found)

    def models(self, section: DialogueSettings) -> dict[str, str]:
        return {"before": section.before} if section.before else {}

    def run(self, subject: Any, section: DialogueSettings, context: Context) -> dict[str, Any]:
        model, processor = subject.load()
        sampling = {"temperature": section.temperature, "text_temperature": section.text_temperature}
        before = context.others["before"].model if section.before else None
        found = dialogues(section)
        return measure(model, processor, found, section.max_seconds, context.seed, sampling, context.bar("dialogue"), before)

    def table(self, part: DialoguePart) -> Table:
        """The recordings beside what the model, and the one before fine-tuning, said over the same user."""
        columns = sides(part)
        names = [name for name in part["reference"] if name != WITHHELD]
        rows = [[name, *[number(one.get(name)) for one in columns.values()]] for name in names]  # type: ignore[arg-type]
        why = [f"Who spoke when is not known of {one[WITHHELD]} ({head})." for head, one in columns.items() if one.get(WITHHELD)]
        return Table(["", *columns], rows, " ".join([f"{part['recordings']} recordings.", *why]))

    def finding(self, part: DialoguePart) -> str:
        share, delay = "turns answered, share", "reply delay, median s"
        said = [
            f"{head}: {number(one.get(share))} of the user's turns answered, after {number(one.get(delay))} s"  # type: ignore[arg-type]
            for head, one in sides(part).items()
        ]
        return "; ".join(said) + "."

    def measures(self, part: DialoguePart) -> list[Measure]:
        found = []
        for name, value in part["model"].items():
            if isinstance(value, float):
                rows = part.get("each", {}).get("model", {})
                each = {recording: row[name] for recording, row in rows.items() if isinstance(row.get(name), float)}
                found.append(Measure(name, "this model", None, value, name.rpartition(" ")[2], each, BETTER.get(name)))  # type: ignore[arg-type]
        return found


TASK = Dialogue()

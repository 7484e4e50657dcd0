"""Lets the model listen to the user's side of recordings and answer, and measures how it behaves beside the recorded answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from torch import Tensor

from ..common.results import Part
from ..common.settings import Count, Positive, settings_group
from ..data.audio import read_audio
from ..data.recordings import Recording, read_manifest
from ..tokens_moshi_ttt import MAIN_SPEAKER
from .behavior import WITHHELD, Behavior, behavior_of, summarize
from .formatting import number
from .inputs import check_stereo
from .kept_numbers import recording_line
from .task import Context, Measure, Table, Task


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
        check_stereo(recording.path, len(samples))
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

"""Does it remember what it was told, and what it was told last? Facts are told in speech, then other things, then the model is asked.

Every condition and every model beside hears the same dialogues. "free": it hears the user alone, and what it said itself. "led": it is
given the true past. Shapes: K codebooks, T frames of 80 ms.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.files import read_json
from ..data.audio import read_audio
from ..data.facts import DIGITS, HELD_OUT_VOICES, VALUES, VOICES, Fact, ScriptSettings
from ..data.recordings import Recording, read_manifest
from ..data.spoken_dialogues import Question, Script, speak
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE, ZERO
from .evaluate import SpokenRecallSettings
from .long_context import condition_parameters
from .statistics import bootstrap_interval

TIMES = (0, 8, 35, 120, 480, 1620, 3600)  # seconds since told at which the columns begin
CHUNK = 512  # frames in one led forward pass
ANSWER = (8, 8)  # frames in which an answer counts: these many, and these for each of its words


@dataclass(frozen=True)
class Heard:
    """One dialogue as frames, with its questions: user and moshi [K, T], text [T]."""

    name: str
    user: Tensor
    moshi: Tensor
    text: Tensor
    questions: Sequence[Question]


# ---------------------------------------------------------------- inputs


def read_questions(recording: Recording) -> list[Question]:
    """The "questions" of the .json beside a recording.

    Raises:
        ValueError: malformed questions, or times that cannot be: asked before told, or outside the recording.
    """
    path = recording.path.with_suffix(".json")
    found = read_json(path).get("questions", []) if path.is_file() else []
    questions = []
    for index, item in enumerate(found):
        try:
            before = tuple(tuple(value) for value in item.get("before", []))
            one = Question(Fact(item["kind"], tuple(item["value"])), before, float(item["told"]), float(item["asked"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise MoshiTTTError(
                f'{path}: questions[{index}] is {item!r}; it must hold "kind", "value" (words), "told" and "asked" (seconds).'
            ) from None
        if not 0 <= one.told < one.asked <= recording.duration:
            raise MoshiTTTError(
                f"{path}: questions[{index}] is told at {one.told:g} s and asked at {one.asked:g} s of {recording.duration:g} s; "
                "a fact must be told before it is asked, and both within the recording."
            )
        questions.append(one)
    return questions


def recordings(section: SpokenRecallSettings) -> list[tuple[Recording, list[Question]]]:
    """What a manifest holds; ValueError where nothing in it is asked."""
    found = [(one, read_questions(one)) for one in read_manifest(section.manifest, allow_outside=True)]  # type: ignore[arg-type]
    if not any(questions for _, questions in found):
        raise MoshiTTTError(f'{section.manifest}: no recording has "questions" in the .json beside it, so there is nothing to recall.')
    return found


def inputs(section: SpokenRecallSettings, processor: Any, seed: int, progress: Callable[[Any], Any] = iter) -> list[Heard]:
    """The dialogues, read or made, encoded as whole recordings."""
    rate = processor.sampling_rate
    if section.manifest is not None:
        read = recordings(section)
        return [_heard(one.path.stem, processor, read_audio(one.path, rate), one.words, questions) for one, questions in progress(read)]
    from ..data.espeak import Espeak

    espeak, heard = Espeak(), []
    for name, script, voice in progress(list(_scripts(section, seed))):
        spoken = speak(script, espeak, voice)
        heard.append(_heard(name, processor, spoken.samples, spoken.words, spoken.questions))
    return heard


def _scripts(section: SpokenRecallSettings, seed: int) -> Iterator[tuple[str, Script, str]]:
    """Name, script and voice of every dialogue that is made."""
    voices = VOICES if section.voices == "trained" else HELD_OUT_VOICES
    for seconds in section.seconds:
        for after in section.told_after:
            for corrections in (0.0, 1.0)[: 1 + section.corrected]:
                distance, lead = round(seconds * FRAME_RATE), round(after * FRAME_RATE)
                settings = ScriptSettings(section.kinds, section.facts, section.digits, echo=0.0, corrections=corrections)
                settings = replace(settings, distance=[distance, distance], lead=[lead, lead])
                for number in range(section.dialogues):
                    name = f"{'corrected' if corrections else 'told'} {seconds:g} s after {after:g} s, {number}"
                    rng = random.Random(f"{seed} {name}")
                    yield name, Script(settings, rng, held_out=True, new_ways=section.ways == "held_out"), rng.choice(voices)


def _heard(name: str, processor: Any, samples: np.ndarray, words: Any, questions: Sequence[Question]) -> Heard:
    if len(samples) != 2:
        raise MoshiTTTError(f"{name}: has {len(samples)} channel(s); a dialogue is stereo, Moshi left and the user right.")
    frames = processor(torch.from_numpy(samples), sampling_rate=processor.sampling_rate, words=words)
    return Heard(name, frames["user_audio_codes"][0], frames["moshi_audio_codes"][0], frames["input_ids"][0], questions)


def fingerprint(section: SpokenRecallSettings, content: Callable[[Path], str]) -> str | None:
    """SHA-256 over the sounds and words of a manifest; None where the dialogues are made."""
    if section.manifest is None:
        return None
    lines = [f"{content(one.path)} {one.words} {questions}" for one, questions in recordings(section)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- run


def chance() -> float:
    """Share of right answers of who knows the kind of a fact but not its value, over the four kinds alike, numbers of one digit."""
    return float(np.mean([1 / len(values) for values in (*VALUES.values(), DIGITS)]))


@contextmanager
def under(model: Any, condition: str) -> Iterator[None]:
    """The model with a condition's parameters in place of its own, which come back at the end."""
    own = dict(model.named_parameters())
    changed = condition_parameters(model, condition)
    kept = {name: own[name].data for name in changed}
    try:
        for name, value in changed.items():
            own[name].data = value.data
        yield
    finally:
        for name, value in kept.items():
            own[name].data = value


@torch.no_grad()
def listen_freely(model: Any, heard: Sequence[Heard]) -> list[Tensor]:
    """Text [T] that the model says while it hears the users alone, the likeliest token each time."""
    longest = max(one.user.shape[1] for one in heard)
    user = torch.stack([torch.nn.functional.pad(one.user, (0, longest - one.user.shape[1]), value=ZERO) for one in heard])
    text, _ = model.hear(user.to(model.device), do_sample=False)
    return [row[: one.user.shape[1]].cpu() for row, one in zip(text, heard)]


@torch.no_grad()
def listen_led(model: Any, heard: Sequence[Heard]) -> list[Tensor]:
    """The likeliest text [T] at every frame, each after the true past."""
    longest = max(len(one.text) for one in heard)

    def padded(streams: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(one, (0, longest - one.shape[-1]), value=ZERO) for one in streams]).to(model.device)

    text, moshi, user = padded(one.text for one in heard), padded(one.moshi for one in heard), padded(one.user for one in heard)
    mask = padded(torch.ones_like(one.text) for one in heard).clamp(min=0)
    cache, best = model.new_cache(len(heard)), []
    for at in range(0, longest, CHUNK):
        part = {"input_ids": text, "moshi_audio_codes": moshi, "user_audio_codes": user, "attention_mask": mask}
        output = model(**{name: tensor[..., at : at + CHUNK] for name, tensor in part.items()}, past_key_values=cache)
        best.append(output.logits.argmax(dim=-1).cpu())
    return [row[: len(one.text)] for row, one in zip(torch.cat(best, 1), heard)]


def answer_to(said: Tensor, question: Question, processor: Any) -> tuple[str, ...]:
    """The words with which the model answers a question, as many as the value has."""
    begin = math.ceil(question.asked * FRAME_RATE)
    count = len(question.fact.value)
    words = processor.words(said[begin : begin + ANSWER[0] + ANSWER[1] * count])
    return tuple(word for word, _ in words[:count])


def led_answer_to(best: Tensor, heard: Heard, question: Question, processor: Any) -> tuple[str, ...]:
    """The words that come first in the frames where the true answer stands."""
    begin = math.ceil(question.asked * FRAME_RATE)
    padding = torch.tensor([ZERO, *processor.text_padding_ids])
    count = sum(len(processor.encode_word(word)) for word in question.fact.value)
    at = begin + (~torch.isin(heard.text[begin:], padding)).nonzero()[:count, 0]
    return tuple(word for word, _ in processor.words(best[at]))


LISTENING: Mapping[str, Callable[[Any, Sequence[Heard]], list[Tensor]]] = {"free": listen_freely, "led": listen_led}


def answers(
    model: Any, processor: Any, heard: Sequence[Heard], mode: str, batch_size: int, progress: Callable[[Any], Any] = iter
) -> list[dict[str, Any]]:
    """Every question with what was answered: its dialogue, times, and whether it is right, or the value before a correction."""
    model.eval()
    ordered = sorted(heard, key=lambda one: one.user.shape[1])
    found = []
    for first in progress(range(0, len(ordered), batch_size)):
        batch = ordered[first : first + batch_size]
        for one, text in zip(batch, LISTENING[mode](model, batch)):
            for question in one.questions:
                said = answer_to(text, question, processor) if mode == "free" else led_answer_to(text, one, question, processor)
                since, right = question.asked - question.told, said == question.fact.value
                entry = {"dialogue": one.name, "kind": question.fact.kind, "told": round(question.told, 2), "since": round(since, 2)}
                found.append(entry | {"corrected": len(question.before), "right": right, "old": said in question.before})
    return found


def measure(
    models: Mapping[str, tuple[Any, Sequence[str]]],
    processor: Any,
    heard: Sequence[Heard],
    modes: Sequence[str],
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> dict[str, Any]:
    """Accuracy of every model under its conditions: `models` maps a name to (model, conditions); "" is the model under evaluation."""
    runs = {}
    for name, (model, conditions) in models.items():
        for condition in conditions:
            for mode in modes:
                with under(model, condition):
                    found = answers(model, processor, heard, mode, batch_size, progress)
                label = f"{name or condition}, {mode}" if len(modes) > 1 else name or condition
                runs[label] = {"cells": cells(found, seed), "answers": found}
    return {"kind": "spoken_recall", "dialogues": len(heard), "modes": list(modes), "runs": runs}


def cells(found: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Accuracy for each time since told, of facts told once and of corrected ones; intervals over dialogues."""
    result = []
    for corrected in (False, True):
        for low, high in zip(TIMES, (*TIMES[1:], math.inf)):
            there = [one for one in found if low <= one["since"] < high and bool(one["corrected"]) == corrected]
            if not there:
                continue
            each: dict[str, list[bool]] = {}
            for one in there:
                each.setdefault(one["dialogue"], []).append(one["right"])
            interval = bootstrap_interval([float(np.mean(rights)) for rights in each.values()], seed)
            share = {key: float(np.mean([one[key] for one in there])) for key in ("right", "old", "since")}
            cell = {
                "corrected": corrected,
                "from": low,
                "mean_since": round(share["since"], 1),
                "accuracy": share["right"],
                "old": share["old"],
            }
            result.append(cell | {"interval": list(interval), "questions": len(there), "dialogues": len(each)})
    return result


# ---------------------------------------------------------------- table and figure


def section(part: dict[str, Any]) -> dict[str, Any]:
    """The report's table: a row for each condition and model, a column for each time since told."""
    columns = columns_of(part)
    rows = []
    for label, run in part["runs"].items():
        there = {(cell["corrected"], cell["from"]): cell for cell in run["cells"]}
        rows.append([label, *[_shown(there.get(column)) for column in columns]])
    note = f"Share of questions answered right, percent, with 95% intervals over dialogues; {part['dialogues']} dialogues ({', '.join(part['modes'])})."
    return {
        "head": ["", *[f"{'corrected' if corrected else 'told'}, from {low} s" for corrected, low in columns]],
        "rows": rows,
        "note": note,
    }


def columns_of(part: dict[str, Any]) -> list[tuple[bool, float]]:
    """(corrected, from) of every cell that some run has."""
    return sorted({(cell["corrected"], cell["from"]) for run in part["runs"].values() for cell in run["cells"]})


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def draw(data: dict[str, Any], figure: Any, palette: Sequence[str], marks: Sequence[str]) -> None:
    """Accuracy against time since told, facts told once beside corrected ones, a line for each condition and model."""
    kinds = sorted({corrected for corrected, _ in columns_of(data)})
    grid = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, corrected in zip(grid, kinds):
        for index, (label, run) in enumerate(data["runs"].items()):
            there = [cell for cell in run["cells"] if cell["corrected"] == corrected]
            x, y = [cell["mean_since"] for cell in there], [100 * cell["accuracy"] for cell in there]
            spread = np.abs(np.array([[100 * bound for bound in cell["interval"]] for cell in there]).reshape(-1, 2).T - np.array(y))
            axes.errorbar(
                x, y, spread, color=palette[index % 7], marker=marks[index % 7], markersize=4, linewidth=1.2, capsize=2, label=label
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("seconds since told" + (" anew" if corrected else ""))
        axes.set_title("corrected: the newest value" if corrected else "told once", fontsize=9)
        axes.set_ylim(-3, 103)
    grid[0].set_ylabel("questions answered right, %")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)

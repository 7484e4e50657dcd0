"""A model hears dialogues in which facts are told and asked for, and its answers are judged.

"free": it hears the user alone, and what it said itself. "led": it is given the true past. Shapes: K codebooks, T frames of 80 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.spoken_dialogues import Question
from ..tokens_moshi_ttt import FRAME_RATE, ZERO
from .long_context import FROZEN, GATE_ZERO, condition_parameters

WINDOW, FULL = "window only", "full attention"
Condition = Literal["TTT", "frozen at W0", "gate 0", "window only", "full attention"]
Mode = Literal["free", "led"]
CHUNK = 512  # frames in one led forward pass
FULL_FRAMES = 2**17  # rows times frames whose keys and values full attention keeps at once: of a small model about a gigabyte
ANSWER = (8, 8)  # frames in which an answer counts: these many, and these for each of its words


@dataclass(frozen=True)
class Heard:
    """One dialogue as frames, with its questions: user and moshi [K, T], text [T].

    seed: that it was drawn with. start: the frame of the whole dialogue at which this part of it begins.
    """

    name: str
    user: Tensor
    moshi: Tensor
    text: Tensor
    questions: Sequence[Question]
    seed: int = 0
    start: int = 0

    def asked(self, question: Question) -> int:
        """The frame at which a question has ended."""
        return math.ceil(question.asked * FRAME_RATE) - self.start


def reach(config: Any) -> int:
    """Frames that window attention sees through all layers together, the newest among them: layers × (window − 1) + 1."""
    return int(config.num_hidden_layers * (config.sliding_window - 1) + 1)


def within_reach(one: Heard, frames: int) -> list[Heard]:
    """Each question of a dialogue with no more before it than the last `frames` frames."""
    parts = []
    for question in one.questions:
        start = max(one.asked(question) - frames, 0)
        cut = [stream[..., start:] for stream in (one.user, one.moshi, one.text)]
        end = frames + answer_frames(question)
        parts.append(Heard(one.name, cut[0][:, :end], cut[1][:, :end], cut[2][:end], [question], one.seed, one.start + start))
    return parts


@contextmanager
def under(model: Any, condition: str) -> Iterator[None]:
    """The model under a condition; afterwards it is as it was. Nothing is changed for "TTT" and "window only" (see `within_reach`)."""
    own = dict(model.named_parameters())
    changed = condition_parameters(model, condition) if condition in (FROZEN, GATE_ZERO) else {}
    kept, window = {name: own[name].data for name in changed}, model.config.sliding_window
    try:
        for name, value in changed.items():
            own[name].data = value.data
        model.config.sliding_window = None if condition == FULL else window
        yield
    finally:
        for name, value in kept.items():
            own[name].data = value
        model.config.sliding_window = window


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


def answer_frames(question: Question) -> int:
    """How many frames after a question its answer counts."""
    return ANSWER[0] + ANSWER[1] * len(question.fact.value)


def answer_to(said: Tensor, begin: int, question: Question, processor: Any) -> tuple[str, ...]:
    """The words with which the model answers a question that ended at frame `begin`, as many as the value has."""
    words = processor.words(said[begin : begin + answer_frames(question)])
    return tuple(word for word, _ in words[: len(question.fact.value)])


def led_answer_to(best: Tensor, heard: Heard, question: Question, processor: Any) -> tuple[str, ...]:
    """The words that come first in the frames where the true answer stands."""
    begin = heard.asked(question)
    padding = torch.tensor([ZERO, *processor.text_padding_ids])
    count = sum(len(processor.encode_word(word)) for word in question.fact.value)
    at = begin + (~torch.isin(heard.text[begin:], padding)).nonzero()[:count, 0]
    return tuple(word for word, _ in processor.words(best[at]))


LISTENING: Mapping[str, Callable[[Any, Sequence[Heard]], list[Tensor]]] = {"free": listen_freely, "led": listen_led}


def answers(model: Any, processor: Any, heard: Sequence[Heard], condition: str, mode: str) -> list[dict[str, Any]]:
    """Every question with what was answered under a condition, the dialogues heard side by side: its dialogue and times (seconds), how many facts
    were asked for in it, how often this one was corrected, and whether the answer is right, or a value from before a correction."""
    model.eval()
    facts = {one.name: len({question.fact.kind for question in one.questions}) for one in heard}
    parts = [part for one in heard for part in within_reach(one, reach(model.config))] if condition == WINDOW else list(heard)
    rows = len(heard)
    if condition == FULL:
        rows = max(1, min(rows, FULL_FRAMES // max(one.user.shape[1] for one in heard)))
    found = []
    with under(model, condition):
        for first in range(0, len(parts), rows):
            batch = parts[first : first + rows]
            for one, text in zip(batch, LISTENING[mode](model, batch)):
                found += [_judged(one, question, text, mode, processor) | {"facts": facts[one.name]} for question in one.questions]
    return found


def _judged(one: Heard, question: Question, text: Tensor, mode: str, processor: Any) -> dict[str, Any]:
    if mode == "free":
        said = answer_to(text, one.asked(question), question, processor)
    else:
        said = led_answer_to(text, one, question, processor)
    about = {"dialogue": one.name, "seed": one.seed, "kind": question.fact.kind}
    times = {"told": round(question.told, 2), "since": round(question.asked - question.told, 2), "corrected": len(question.before)}
    return about | times | {"right": said == question.fact.value, "old": said in question.before}

"""What the memory does while a dialogue passes: how far its weights drift, how large its steps are, how open its gate is when a fact is told
and when there is only talk, and how often it is written without cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..common.results import MORE
from ..tokens_moshi_ttt import FRAME_RATE
from . import drawing
from .formatting import number
from .spoken_listening import Heard

TELLING = 2.0  # seconds before the end of a telling that belong to it
WRITE = 0.5  # a step is a write from this share of the median step at which facts are told
POINTS = 120  # of a curve


class Memory(TypedDict):
    """Means over dialogues.

    minutes, drift, step: [N] of mini-batches: when each ended; ‖W − W₀‖ and ‖Wₜ − Wₜ₋₁‖ over all layers and heads.
    gate_facts, gate_talk: inner learning rate, as a share of the highest, in mini-batches in which a fact is told, and in the others.
    step_facts, step_talk: size of the step there, median; false_writes: in an hour of talk.
    """

    __pydantic_config__ = MORE  # type: ignore[misc]
    dialogues: int
    hours: float
    minutes: list[float]
    drift: list[float]
    step: list[float]
    gate_facts: float | None
    gate_talk: float | None
    step_facts: float | None
    step_talk: float | None
    false_writes: float | None


@contextmanager
def rates(model: Any) -> Iterator[list[Tensor]]:
    """The inner learning rates [B, T, H] that every TTT layer gives its op, a tensor for each call, as shares of the highest."""
    found: list[Tensor] = []
    layers = [layer.ttt for layer in model.decoder.model.layers if layer.ttt is not None]
    highest = model.config.ttt_base_lr / model.config.ttt_head_dim

    def listening(op: Any) -> Any:
        def call(*inputs: Any, **options: Any) -> Any:
            found.append(inputs[3] / highest)  # of TTTInputs
            return op(*inputs, **options)

        return call

    for layer in layers:
        layer.op = listening(layer.op)
    try:
        yield found
    finally:
        for layer in layers:
            del layer.op  # the class has its own


@torch.no_grad()
def steps(model: Any, heard: Heard) -> dict[str, np.ndarray]:
    """Of every whole mini-batch of one dialogue, led: "drift", "step" and "gate" [N], and whether a fact is told in it, "fact" [N]."""
    size, frames = model.config.ttt_mini_batch_size, heard.text.shape[0]
    streams = {"input_ids": heard.text, "moshi_audio_codes": heard.moshi, "user_audio_codes": heard.user}
    cache, found = model.new_cache(1), {"drift": [], "step": [], "gate": [], "fact": []}  # type: ignore[var-annotated]
    layers = model.config.ttt_layers
    initial = _flat(model.decoder.model.layers[layer].ttt.initial_state(1) for layer in layers)
    before = initial
    with rates(model) as given:
        for start in range(0, frames - size + 1, size):
            given.clear()
            part = {name: stream[None, ..., start : start + size].to(model.device) for name, stream in streams.items()}
            model(**part, past_key_values=cache)
            now = _flat(cache.ttt_state(layer) for layer in layers)
            seconds = (start / FRAME_RATE, (start + size) / FRAME_RATE)
            told = any(question.told - TELLING < seconds[1] and seconds[0] < question.told for question in heard.questions)
            values = (float((now - initial).norm()), float((now - before).norm()), float(torch.stack([r.mean() for r in given]).mean()))
            for name, value in zip(found, (*values, told)):
                found[name].append(value)
            before = now
    return {name: np.array(values) for name, values in found.items()}


def _flat(states: Iterable[Any]) -> Tensor:
    return torch.cat([weight.double().flatten() for state in states for weight in state.weights])


def probe(model: Any, dialogues: Iterable[Heard]) -> dict[str, Any]:
    """The `Memory` of some dialogues; curves end where the shortest does."""
    model.eval()
    found = [steps(model, one) for one in dialogues]
    every = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    facts, talk = every["fact"], ~every["fact"]
    minutes = model.config.ttt_mini_batch_size / FRAME_RATE / 60
    shortest = min(len(one["step"]) for one in found)
    groups = np.array_split(np.arange(shortest), min(shortest, POINTS))
    curves = {name: np.mean([one[name][:shortest] for one in found], axis=0) for name in ("drift", "step")}
    writes = None
    if facts.any() and talk.any():
        enough = WRITE * np.median(every["step"][facts])
        writes = float((every["step"][talk] >= enough).sum() / (talk.sum() * minutes / 60))
    return {
        "dialogues": len(found),
        "hours": float(len(facts) * minutes / 60),
        "minutes": [float((group[-1] + 1) * minutes) for group in groups],
        **{name: [float(values[group].mean()) for group in groups] for name, values in curves.items()},
        "gate_facts": float(every["gate"][facts].mean()) if facts.any() else None,
        "gate_talk": float(every["gate"][talk].mean()) if talk.any() else None,
        "step_facts": float(np.median(every["step"][facts])) if facts.any() else None,
        "step_talk": float(np.median(every["step"][talk])) if talk.any() else None,
        "false_writes": writes,
    }


def said_of_memory(memory: Memory) -> str:
    """The numbers in a sentence."""
    return (
        f"In {memory['dialogues']} dialogues of {memory['hours']:.2f} hours together the gate stood at {number(memory['gate_facts'])} where a fact "
        f"was told and at {number(memory['gate_talk'])} in talk, the median step was {number(memory['step_facts'])} and "
        f"{number(memory['step_talk'])}; {'–' if memory['false_writes'] is None else round(memory['false_writes'])} mini-batches of an hour's talk were written as strongly as half a "
        "median fact."
    )


def draw_memory(memory: Memory, figure: Any) -> None:
    """Drift and size of the steps against time."""
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "drift", "drift ‖W − W₀‖"), (right, "step", "step ‖Wₜ − Wₜ₋₁‖")):
        axes.plot(memory["minutes"], memory[name], **drawing.line_style(0) | {"marker": None})  # type: ignore[literal-required]
        axes.set_xlabel("minutes of the dialogue")
        axes.set_ylabel(label)

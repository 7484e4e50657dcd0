"""The dialogues of spoken recall, read or made: a few of like length at a time, so that hours of them need no more memory than those few."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ..common.files import read_json
from ..common.results import MORE, checked
from ..common.settings import DISTINCT, Count, CountOrZero, Flag, NotNegative, Seed, Whole, settings_group
from ..data.espeak import Espeak
from ..data.facts import HELD_OUT_VOICES, KINDS, VOICES, Fact, ScriptSettings
from ..data.long_recordings import encode_recording
from ..data.recordings import Recording, read_manifest
from ..data.spoken_dialogues import Question, Script, speak
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from .inputs import check_stereo
from .spoken_listening import Condition, Heard, Mode

PIECE = 125  # frames that are encoded at once
Seconds = Annotated[NotNegative, Field(le=86_400)]


@settings_group
class SpokenRecallSettings:
    """Where the dialogues come from, and under which conditions they are heard."""

    manifest: Path | None = None
    """A data.jsonl of ours, each recording's .json with "questions"; null makes dialogues."""
    dialogues: Count = 24
    """How many are made of each kind below, of facts together, sentences of talk and renderings that are held out from training."""
    seconds: Annotated[list[Seconds], DISTINCT] = field(default_factory=lambda: [8.0, 35.0])
    """Seconds of talk between telling and asking."""
    told_after: Annotated[list[Seconds], DISTINCT] = field(default_factory=lambda: [0.0])
    """Seconds of talk before the facts."""
    corrected: Flag = True
    """Also dialogues in which facts are told anew."""
    voices: Literal["trained", "held_out"] = "trained"
    """Voices that training heard, or others."""
    ways: Literal["trained", "held_out"] = "trained"
    """Ways of telling and asking a fact: those that training heard, or others."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Kinds of facts, as in training."""
    facts: list[Whole] = field(default_factory=lambda: [1, 2])
    """Lowest and highest number of facts in a dialogue."""
    digits: list[Whole] = field(default_factory=lambda: [1, 1])
    """Lowest and highest number of digits of a number."""
    conditions: Annotated[list[Condition], DISTINCT] = field(default_factory=lambda: ["TTT", "gate 0"])  # type: ignore[list-item]
    """Conditions of the model: TTT as it is; its memory frozen at W0; its gate 0; "window only", with no more of the dialogue before a question than
    attention reaches through all layers; "full attention", of all that came before."""
    beside: dict[str, str] = field(default_factory=dict)
    """Other models, by the name they are shown with."""
    modes: Annotated[list[Mode], DISTINCT] = field(default_factory=lambda: ["free"])  # type: ignore[list-item]
    """How it hears dialogues: free (it hears its own answers) or led (it hears the right ones)."""
    seeds: Annotated[list[Seed], DISTINCT] | None = None
    """Seeds of the dialogues that are made; null: the run's seed."""
    memory: CountOrZero = 0
    """Dialogues whose memory is looked into as it goes, the longest without corrections: drift, steps, gate, false writes."""

    def __post_init__(self) -> None:
        twice = [name for name in self.beside if name in self.conditions]
        if twice:
            raise MoshiTTTError(f"`beside.{twice[0]}` must not have the name of a condition; give the model another name.")
        ScriptSettings(kinds=self.kinds, facts=self.facts, digits=self.digits)  # checks them


class _Asked(TypedDict):
    __pydantic_config__ = MORE  # type: ignore[misc]
    kind: str
    value: Annotated[list[str], Field(min_length=1)]
    told: float
    asked: float
    before: NotRequired[list[list[str]]]


class _Beside(TypedDict):
    """The .json beside a recording."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    questions: NotRequired[list[_Asked]]


def read_questions(recording: Recording) -> list[Question]:
    """The "questions" of the .json beside a recording: "kind", "value" (words), "told" and "asked" (seconds, when the telling and the question
    ended), and where a fact was corrected "before", its earlier values.

    Raises:
        MoshiTTTError: malformed questions, or times that cannot be: asked before told, or too late for an answer within the recording.
    """
    path = recording.path.with_suffix(".json")
    cure = 'give "kind", "value" (words), "told" and "asked" (seconds) of each question'
    found = checked(_Beside, read_json(path), path, cure=cure) if path.is_file() else {}
    questions = []
    for index, item in enumerate(found.get("questions", [])):
        latest = recording.duration - len(item["value"]) / FRAME_RATE
        if not 0 <= item["told"] < item["asked"] <= latest:
            raise MoshiTTTError(
                f"{path}: `questions.{index}.told={item['told']:g}` and `questions.{index}.asked={item['asked']:g}` must be seconds of the "
                f"recording, told before asked, and asked by {latest:g} so that an answer of {len(item['value'])} words has its frames."
            )
        before = tuple(tuple(value) for value in item.get("before", []))
        questions.append(Question(Fact(item["kind"], tuple(item["value"])), before, float(item["told"]), float(item["asked"])))
    return questions


def recordings(section: SpokenRecallSettings) -> list[tuple[Recording, list[Question]]]:
    """What a manifest holds, the shortest first.

    Raises:
        MoshiTTTError: nothing in it is asked, or `memory` is asked for and every recording has corrections, of whose tellings not all times
            are known.
    """
    found = [(one, read_questions(one)) for one in read_manifest(section.manifest, allow_outside=True)]  # type: ignore[arg-type]
    if not any(questions for _, questions in found):
        raise MoshiTTTError(f'{section.manifest}: no recording has "questions" in the .json beside it, so there is nothing to recall.')
    if section.memory and not any(told_once(questions) for _, questions in found):
        raise MoshiTTTError(f"`memory={section.memory}` must be 0 for {section.manifest}, as facts are corrected in all of its dialogues.")
    return sorted(found, key=lambda one: one[0].duration)


def told_once(questions: Sequence[Question]) -> bool:
    """Whether nothing in a dialogue was told anew."""
    return not any(question.before for question in questions)


def batches(section: SpokenRecallSettings, processor: Any, seed: int, size: int) -> list[Callable[[], list[Heard]]]:
    """The dialogues as codes, `size` at a time from the shortest on: each entry makes or reads its own when it is called."""
    if section.manifest is not None:
        makers = [partial(_read, section.manifest, one, questions, processor) for one, questions in recordings(section)]
    else:
        espeak = Espeak()
        makers = [partial(_made, *drawn, espeak, processor) for drawn in _scripts(section, section.seeds or [seed])]
    return [partial(_all, makers[first : first + size]) for first in range(0, len(makers), size)]


def _all(makers: Sequence[Callable[[], Heard]]) -> list[Heard]:
    return [make() for make in makers]


def _read(manifest: Path, one: Recording, questions: list[Question], processor: Any) -> Heard:
    codes = encode_recording(processor, one)
    check_stereo(one.path, 1 if codes.user is None else 2)
    user: Tensor = codes.user  # type: ignore[assignment]
    text = codes.text if codes.text is not None else torch.tensor(processor.text_frames((), user.shape[1]))
    return Heard(Path(os.path.relpath(one.path, manifest.parent)).as_posix(), user, codes.moshi, text, questions)


def _scripts(section: SpokenRecallSettings, seeds: Sequence[int]) -> Iterator[tuple[str, int, Script, str]]:
    """Name, seed, script and voice of every dialogue that is made, the shortest first."""
    voices = VOICES if section.voices == "trained" else HELD_OUT_VOICES
    lengths = sorted(itertools.product(section.told_after, section.seconds), key=sum)
    for (after, seconds), corrections, seed, number in itertools.product(
        lengths, (0.0, 1.0)[: 1 + section.corrected], seeds, range(section.dialogues)
    ):
        distance, lead = round(seconds * FRAME_RATE), round(after * FRAME_RATE)
        settings = ScriptSettings(section.kinds, section.facts, section.digits, echo=0.0, corrections=corrections)
        settings = replace(settings, distance=[distance, distance], lead=[lead, lead])
        name = f"{'corrected' if corrections else 'told'} {seconds:g} s after {after:g} s, {number}"
        rng = random.Random(f"{seed} {name}")
        script = Script(settings, rng, held_out=True, new_ways=section.ways == "held_out")
        yield f"seed {seed}, {name}" if len(seeds) > 1 else name, seed, script, rng.choice(voices)


def _made(name: str, seed: int, script: Script, voice: str, espeak: Espeak, processor: Any) -> Heard:
    sound = _Encoded(processor)
    spoken = speak(script, espeak, voice, sound.take)
    codes = sound.codes()
    text = torch.tensor(processor.text_frames(spoken.words, codes.shape[-1]))
    return Heard(name, codes[1], codes[0], text, spoken.questions, seed)


class _Encoded:
    """Sound [2, n] in pieces of any length, as codes [2, K, T]."""

    def __init__(self, processor: Any) -> None:
        self.stream, self.frame = processor.new_audio_stream(2), processor.frame_size
        self.rest = np.zeros((2, 0), np.float32)
        self.found: list[Tensor] = []

    def take(self, samples: np.ndarray) -> None:
        self.rest = np.concatenate([self.rest, samples], axis=1)
        while self.rest.shape[1] >= PIECE * self.frame:
            self._encode(self.rest[:, : PIECE * self.frame])
            self.rest = self.rest[:, PIECE * self.frame :]

    def codes(self) -> Tensor:
        """All of them, after silence up to a whole frame."""
        if self.rest.shape[1]:
            self._encode(np.pad(self.rest, ((0, 0), (0, -self.rest.shape[1] % self.frame))))
        return torch.cat(self.found, dim=-1)

    def _encode(self, samples: np.ndarray) -> None:
        self.found.append(self.stream.encode_frames(torch.from_numpy(samples)).cpu())

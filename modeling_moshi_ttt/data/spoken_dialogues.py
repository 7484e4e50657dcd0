"""Dialogues in which a user tells facts, talks of other things, and asks for them: scripts, their codes for training, their sound for
measuring.

Letters: K codebooks, T frames of 80 ms, n samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from ..common.files import atomic_write
from ..tokens_moshi_ttt import FRAME_RATE, MAIN_SPEAKER, USER_SPEAKER
from . import facts
from .espeak import BLOCK_RATE, SAMPLE_RATE, Espeak, at_codec_rate
from .facts import VOICES, Fact, ScriptSettings

LAYOUT = "phrases-5"  # raise it when the way of rendering or of encoding phrases changes
ACCENT = "en-us"
MOSHI_VOICE = "f4"
PAUSE = (1, 3)  # frames of silence before a user's turn
GAPS = ((1, 3), (4, 20))  # frames between phrases that are encoded in one track, and how long they are where Moshi would speak in between
LONG_GAPS = 0.3  # share of the latter
REPLY = 2  # frames between the end of a user's turn and Moshi's first word: the end of padding stands in the last of them
PIECE = 30  # phrases of a voice that are encoded at once
TRACKS = 4  # voices that are encoded side by side: more take longer, for want of cache
LEAD = 6  # frames of silence before Moshi's words
TAIL = 1  # frames after a phrase that are kept with it: the sound before them can be told from their codes
SILENCE = 30  # frames of silence after the last phrase of a piece; pauses are cut from them


@dataclass(frozen=True)
class Turn:
    """What one of the two says: the user phrases, Moshi words. `fact` is what it is about, `role` tell, correct, ask, answer, echo or talk."""

    role: str
    phrases: tuple[str, ...]
    fact: Fact | None = None

    @property
    def by_moshi(self) -> bool:
        return self.role in ("answer", "echo")


@dataclass(frozen=True)
class Question:
    """A question's fact, the values that the user gave before it (oldest first), and its times in seconds.

    told: when the newest telling ended. asked: when the question ended.
    """

    fact: Fact
    before: tuple[tuple[str, ...], ...]
    told: float
    asked: float


class Script:
    """Draws the turns of one dialogue.

    Args:
        rng: of everything in it.
        level: of the curriculum, 0 to 1.
        held_out: facts together and sentences of talk that training never draws, or those that it does.
        sentences: of talk; all of them where it is None.
        new_ways: ways to tell, correct and ask that training never draws, or those that it does.
    """

    def __init__(
        self,
        settings: ScriptSettings,
        rng: random.Random,
        level: float = 1.0,
        held_out: bool = False,
        new_ways: bool = False,
        sentences: Sequence[str] | None = None,
    ):
        self.settings, self.rng, self.level, self.held_out, self.new_ways = settings, rng, level, held_out, new_ways
        self.sentences = facts.talk(held_out) if sentences is None else sentences

    def turns(self, length: Any) -> Iterator[Turn]:
        """The turns; `length()` says how many frames there are by now, so that talk lasts as long as it should."""
        settings, rng = self.settings, self.rng
        leads = settings.lead[0] > 0 or rng.random() < 0.5
        lead = round(self.level * rng.randint(*settings.lead)) if leads else 0
        told = self._draw(rng.sample(settings.kinds, rng.randint(*settings.facts)))
        echo = rng.random() < 1 - self.level * (1 - settings.echo)
        yield from self._talk(lead, length)
        yield from self._tell("tell", told, echo)
        if rng.random() < self.level * settings.corrections:
            yield from self._talk(round(self.level * rng.randint(*settings.lead)), length)
            if rng.random() < 0.5:
                yield from self._ask(told)
            old, told = told, self._draw(list(told), told)
            yield from self._tell("correct", {kind: fact for kind, fact in told.items() if fact != old[kind]}, echo)
        if not settings.at_once or rng.random() >= settings.at_once:
            yield from self._talk(self._distance(), length)
        yield from self._ask(told)

    def _draw(self, kinds: Sequence[str], old: dict[str, Fact] | None = None) -> dict[str, Fact]:
        """Facts of these kinds, of a combination that belongs to training, or one that does not; with `old`, some or all of them new."""
        low, high = self.settings.digits
        while True:
            again = kinds if old is None else self.rng.sample(kinds, self.rng.randint(1, len(kinds)))
            drawn = (old or {}) | {kind: facts.draw_fact(kind, (low, high), self.rng) for kind in again}
            if facts.is_held_out(drawn) == self.held_out and drawn != old:
                return drawn

    def _distance(self) -> int:
        low, high = (round(start + self.level * (end - start)) for start, end in zip(self.settings.start, self.settings.distance))
        return self.rng.randint(low, high)

    def _talk(self, frames: int, length: Any) -> Iterator[Turn]:
        end = length() + frames
        while length() < end:
            yield Turn("talk", (self.rng.choice(self.sentences),))

    def _tell(self, role: str, told: dict[str, Fact], echo: bool) -> Iterator[Turn]:
        for kind in self.rng.sample(list(told), len(told)):
            openings = facts.ways(facts.CORRECTIONS if role == "correct" else facts.LEAD_INS, self.new_ways)
            opening = self.rng.choice(openings) if role == "correct" or self.rng.random() < 0.5 else None
            yield Turn(role, facts.telling(told[kind], opening, self.new_ways, self.rng), told[kind])
            if echo:
                yield Turn("echo", told[kind].value, told[kind])

    def _ask(self, told: dict[str, Fact]) -> Iterator[Turn]:
        for kind in self.rng.sample(list(told), len(told)):
            yield Turn("ask", (self.rng.choice(facts.ways(facts.ASK[kind], self.new_ways)),), told[kind])
            yield Turn("answer", told[kind].value, told[kind])


# ---------------------------------------------------------------- codes, for training


@dataclass(frozen=True)
class Dialogue:
    """Dialogues in aligned frames. `asked` marks the words that answer a question."""

    user: Tensor  # [K, T]
    moshi: Tensor  # [K, T]
    text: Tensor  # [T]
    asked: Tensor  # [T] bool


class Phrasebook:
    """Phrases encoded once, each by every voice and a few times: dialogues are stitched from their codes, fresh ones without end.

    A phrase is encoded in the midst of others, after short pauses and long ones and at no fixed place within a frame, so that its codes
    carry what a codec remembers of the sound before, as in a recording that is encoded as a whole. (With short pauses alone a model that
    answered 95% of stitched dialogues answered half of the recorded ones.)
    """

    def __init__(self, clips: dict[str, dict[str, list[Tensor]]], silence: Tensor, mark: str, processor: Any):
        self.mark = mark  # what tells these phrases from others
        self.clips, self.silence = clips, silence  # voice -> phrase -> codes [K, T]; [N, K, SILENCE]
        self.mute = clips[MOSHI_VOICE][""][0][:, -1:]  # [K, 1], what silence settles at
        self.voices = [voice for voice in clips if voice != MOSHI_VOICE]
        talk = facts.talk(False)
        self.talk = {voice: [sentence for sentence in talk if sentence in clips[voice]] for voice in self.voices}
        self.words = {word: processor.encode_word(word) for word in facts.answers()}
        self.padding, self.end_of_padding = processor.text_padding_ids

    def quiet(self, frames: int, rng: random.Random) -> Tensor:
        """Codes [K, frames] of silence."""
        pieces = [self.silence[rng.randrange(len(self.silence))] for _ in range(-(-frames // SILENCE))]
        return torch.cat(pieces, 1)[:, :frames]

    def stitch(self, settings: ScriptSettings, rng: random.Random, level: float = 1.0) -> Dialogue:
        """One row of training: dialogues of one voice, one after another until it is full."""
        voice = rng.choice(self.voices)
        script = Script(settings, rng, level, sentences=self.talk[voice])
        low, high = settings.frames
        frames = round(low + level * (high - low))
        user, moshi, text, asked = [], [], [], []

        def silent(frames: int) -> None:
            hear(self.quiet(frames, rng))

        def hear(codes: Tensor) -> None:
            user.append(codes)
            moshi.append(self.mute.expand(-1, codes.shape[1]))
            text.extend([self.padding] * codes.shape[1])
            asked.extend([False] * codes.shape[1])

        def reply(word: str, counts: bool) -> None:
            text[-1] = self.end_of_padding
            codes, tokens = self.clips[MOSHI_VOICE][word][0], self.words[word]
            codes = torch.cat([codes, self.mute.expand(-1, max(len(tokens) - codes.shape[1], 0))], 1)
            frames = codes.shape[1]
            user.append(self.quiet(frames, rng))
            moshi.append(codes)
            text.extend([*tokens, *[self.padding] * (frames - len(tokens))])
            asked.extend([counts and t < len(tokens) for t in range(frames)])

        while len(text) < frames:
            for turn in script.turns(lambda: len(text)):
                if turn.by_moshi:
                    for index, word in enumerate(turn.phrases):
                        silent(REPLY if index == 0 else 1)
                        reply(word, turn.role == "answer")
                else:
                    silent(rng.randint(*PAUSE))
                    for phrase in turn.phrases:
                        hear(rng.choice(self.clips[voice][phrase]))
        whole = torch.cat(user, 1).long(), torch.cat(moshi, 1).long(), torch.tensor(text), torch.tensor(asked)
        return Dialogue(*(stream[..., :frames] for stream in whole))


def phrasebook(settings: ScriptSettings, processor: Any, folder: Path, progress: Any = iter) -> Phrasebook:
    """The phrases of training, from `folder` where they were encoded before with this codec, else rendered and encoded now."""
    about = json.dumps([LAYOUT, settings.voices, settings.renderings, settings.sentences, settings.seed, facts.phrases(), facts.answers()])
    path = folder / f"phrases-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        atomic_write(path, _packed(*_encoded(settings, processor, progress)))
    with safe_open(path, framework="pt") as file:
        index, codes, silence = json.loads(file.metadata()["index"]), file.get_tensor("codes"), file.get_tensor("silence")
    clips: dict[str, dict[str, list[Tensor]]] = {}
    for voice, phrase, start, end in index:
        clips.setdefault(voice, {}).setdefault(phrase, []).append(codes[:, start:end])
    return Phrasebook(clips, silence, path.stem, processor)


Clip = tuple[str, str, Tensor]  # voice, phrase, codes [K, T]


def _packed(clips: list[Clip], silence: Tensor) -> bytes:
    ends = np.cumsum([codes.shape[1] for _, _, codes in clips]).tolist()
    index = [(voice, phrase, end - codes.shape[1], end) for (voice, phrase, codes), end in zip(clips, ends)]
    tensors = {"codes": torch.cat([codes for _, _, codes in clips], 1), "silence": silence}
    return save({name: tensor.numpy().astype(np.int16) for name, tensor in tensors.items()}, {"index": json.dumps(index)})


def _encoded(settings: ScriptSettings, processor: Any, progress: Any) -> tuple[list[Clip], Tensor]:
    """Every phrase and some of the talk by every voice, all voices side by side, each in an order of its own; and the silence after it."""
    espeak, rng = Espeak(), random.Random(settings.seed)
    talk = facts.talk(False)
    said = [phrase for phrase in facts.phrases() if phrase not in talk for _ in range(settings.renderings)]
    orders = {}
    for voice in VOICES[: settings.voices]:
        orders[voice] = said + rng.sample(talk, settings.sentences)
        rng.shuffle(orders[voice])
    clips: list[Clip] = []
    silence: list[Tensor] = []
    for first in progress(range(0, len(said) + settings.sentences, PIECE)):
        found, after = _encode({voice: order[first : first + PIECE] for voice, order in orders.items()}, espeak, processor, rng)
        clips += found
        silence.append(after)
    for word in facts.answers():  # Moshi's words, each after silence, as it says them
        found, _ = _encode({MOSHI_VOICE: [word]}, espeak, processor, random.Random(0))
        clips += found
    clips.append((MOSHI_VOICE, "", processor.encode_audio(torch.zeros(1, 100 * processor.frame_size))[0]))
    return clips, torch.cat(silence)


def _encode(said: dict[str, list[str]], espeak: Espeak, processor: Any, rng: random.Random) -> tuple[list[Clip], Tensor]:
    """The phrases of every voice in one track each; after its last phrase SILENCE frames [V, K, SILENCE]."""
    places, ends = [], []
    rows: list[np.ndarray] = []
    size = BLOCK_RATE / processor.frame_rate  # samples a frame before the change of rate
    for voice, phrases in said.items():
        parts, at = [], 0
        for phrase in phrases:
            # Moshi begins a word with a frame; between the user's lie two frames or more, so that no two phrases share one
            frames = LEAD if voice == MOSHI_VOICE else TAIL + rng.uniform(*GAPS[rng.random() < LONG_GAPS])
            gap = round(frames * size) + 1
            clip = espeak.rendering(phrase, f"{ACCENT}+{voice}", rng)
            places.append((len(rows), voice, phrase, int((at + gap) / size), math.ceil((at + gap + len(clip)) / size) + TAIL))
            parts += [np.zeros(gap, np.float32), clip]
            at += gap + len(clip)
        rows.append(at_codec_rate(np.concatenate(parts)))
        ends.append(places[-1][-1])
    total = (max(ends) + SILENCE) * processor.frame_size
    sound = torch.from_numpy(np.stack([np.pad(row, (0, total - len(row))) for row in rows]))
    codes = torch.cat([processor.encode_audio(part) for part in sound.split(TRACKS)])  # [V, K, T]
    clips = [(voice, phrase, codes[row, :, start:end]) for row, voice, phrase, start, end in places]
    return clips, torch.stack([codes[row, :, end : end + SILENCE] for row, end in enumerate(ends)])


# ---------------------------------------------------------------- sound, for measuring


@dataclass(frozen=True)
class Spoken:
    """One dialogue as sound: samples [2, n] (Moshi left, the user right), Moshi's and the user's words, and the questions."""

    samples: np.ndarray
    words: list[tuple[str, tuple[float, float], str]]
    questions: list[Question]


def speak(script: Script, espeak: Espeak, voice: str, take: Callable[[np.ndarray], None] | None = None) -> Spoken:
    """A script as sound at 24 kHz, every phrase rendered anew.

    Args:
        take: is given the sound piece by piece, float32 [2, n], as it is made; `Spoken.samples` is then empty, and an hour takes no more memory
            than a sentence.
    """
    rng, size = script.rng, round(SAMPLE_RATE / FRAME_RATE)
    sound = [np.zeros((2, 0), np.float32)]
    hand_on = take or sound.append
    words, questions = [], []
    told: dict[str, float] = {}
    values: dict[str, list[tuple[str, ...]]] = {}
    at = 0

    def add(side: int, samples: np.ndarray) -> None:
        nonlocal at
        both = np.zeros((2, len(samples)), np.float32)
        both[side] = samples
        hand_on(both)
        at += len(samples)

    def say(side: int, text: str) -> None:
        begin = at / SAMPLE_RATE
        fixed = random.Random(0) if side == 0 else rng  # Moshi has one way to say a word
        add(side, at_codec_rate(espeak.rendering(text, f"{ACCENT}+{(MOSHI_VOICE, voice)[side]}", fixed)))
        # well within its first frame, whatever the rounding
        words.append((text, (round(begin + 0.02, 4), round(at / SAMPLE_RATE, 4)), (MAIN_SPEAKER, USER_SPEAKER)[side]))

    for turn in script.turns(lambda: at // size):
        if turn.by_moshi:
            for index, word in enumerate(turn.phrases):
                add(1, np.zeros(-at % size + (TAIL + REPLY if index == 0 else 1) * size, np.float32))
                say(0, word)
            continue
        for index, phrase in enumerate(turn.phrases):
            frames = TAIL + (rng.uniform(*PAUSE) if index == 0 else rng.random())
            add(1, np.zeros(int(frames * size), np.float32))
            say(1, phrase)
        now = at / SAMPLE_RATE
        if turn.fact is None:
            continue
        if turn.role in ("tell", "correct"):
            told[turn.fact.kind] = now
            values.setdefault(turn.fact.kind, []).append(turn.fact.value)
        elif turn.role == "ask":
            questions.append(Question(turn.fact, tuple(values[turn.fact.kind][:-1]), told[turn.fact.kind], now))
    add(1, np.zeros(10 * size, np.float32))
    return Spoken(np.concatenate(sound, axis=1), words, questions)

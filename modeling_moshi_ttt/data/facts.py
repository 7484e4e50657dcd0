"""What is said in spoken-recall dialogues: facts of four kinds, ways to tell, to correct and to ask them, and small talk.

Everything is a phrase, a text that a voice renders; a turn is a few phrases one after another. The last entry of every list of ways is held
out, as is a quarter of the talk and a fifth of all combinations of facts: training never draws them.
"""
# ruff: noqa: SIM905 (word lists are easier to read and to mend as text)

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ..common.settings import DISTINCT, Bounds, Count, Seed, Share, settings_group
from ..errors_moshi_ttt import MoshiTTTError

NUMBER = "number"
DIGITS = "zero one two three four five six seven eight nine".split()
VALUES = {
    "name": "Nora Omar Lena Tom Sam Mei Ivan Ruth Ana".split(),
    "place": "Lisbon Paris Rome Oslo Berlin Cairo Madrid London".split(),
    "like": "bread cheese soup apples tea trains music snow".split(),
}
KINDS = ("name", NUMBER, "place", "like")
TELL = {
    "name": ("my name is", "I am called", "people call me"),
    NUMBER: ("my number is", "my code is", "the number I have is"),
    "place": ("I live in", "my home is in", "I come from"),
    "like": ("I like", "I am fond of", "what I enjoy is"),
}
ASK = {
    "name": ("what is my name", "tell me my name", "do you know my name"),
    NUMBER: ("what is my number", "tell me my number", "do you know my number"),
    "place": ("where do I live", "tell me where I live", "do you know where I live"),
    "like": ("what do I like", "tell me what I like", "do you know what I like"),
}
LEAD_INS = ("hello", "by the way", "listen")
CORRECTIONS = ("no", "sorry", "wait")
VOICES = (
    "f1 f2 f3 m1 m2 m3 m4 Alex Alicia Andrea Annie adam antonio belinda benjamin caleb m5 m6 m7 Denis Diogo Gene Henrique Hugo Jacky Lee "
    "Marco Mario Michael Nguyen Reed david"
).split()
HELD_OUT_VOICES = "f5 m8 Andy Mike robert steph2 linda max steph travis".split()
HELD_OUT_SHARE = 5  # one combination of facts in so many is held out

_WHO = "the teacher; my brother; our neighbour; the old man; her sister; a young doctor; the driver; his mother; the children; some people".split(
    "; "
)
_DOES = (
    "walked to the bridge; painted the kitchen; lost the blue jacket; closed the window; waited at the station; opened the small shop; "
    "carried two heavy boxes; read a long letter; fixed the broken lamp; watched the rain; planted a tree; bought a new chair; cleaned the car; "
    "heard a strange noise; sat by the river; wrote a short story; missed the early bus; found a lost dog; drew a large picture; sang all night; "
    "baked a round cake; took the last seat; climbed the hill; sold the old boat; moved the table; forgot the umbrella; packed the green bag; "
    "won the first game; called for help; stayed at home; crossed the busy street; repaired the roof"
).split("; ")


@settings_group
class ScriptSettings:
    """What dialogues are made of. Lengths are frames (12.5 a second), lowest and highest. All of it holds at level 1 of a curriculum; at
    level 0 the distance is `start`, every fact is repeated, there is no talk before the facts and nothing is corrected.
    """

    kinds: Annotated[list[str], DISTINCT] = field(default_factory=lambda: list(KINDS))
    """Kinds of facts that are told: name, number, place and like."""
    facts: Bounds = field(default_factory=lambda: [1, 2])
    """How many are told in a dialogue."""
    digits: Bounds = field(default_factory=lambda: [1, 1])
    """How many a number has."""
    frames: Bounds = field(default_factory=lambda: [112, 192])
    """Of a row of training at level 0 and at level 1; dialogues follow one another until it is full."""
    lead: Bounds = field(default_factory=lambda: [0, 80])
    """Talk before the facts, in half of the dialogues where its lowest is 0."""
    start: Bounds = field(default_factory=lambda: [2, 12])
    """Talk between telling and asking at level 0."""
    distance: Bounds = field(default_factory=lambda: [0, 100])
    """Talk between telling and asking at level 1; it ends with a whole sentence."""
    at_once: Share = 0.0
    """Share of the dialogues in which nothing is said between telling and asking, at every level."""
    echo: Share = 0.5
    """Share of the dialogues in which Moshi repeats what it is told."""
    corrections: Share = 0.3
    """Share of the dialogues in which a fact is told anew and asked again."""
    voices: Annotated[Count, Field(le=len(VOICES))] = 32
    """How many speak."""
    renderings: Count = 2
    """Renderings of a fact's phrases by each voice."""
    sentences: Annotated[Count, Field(le=240)] = 40
    """Sentences of talk that each voice says, each rendered once."""
    seed: Seed = 0
    """Seed of the renderings."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise MoshiTTTError(f"`kinds={self.kinds}` must hold kinds of facts, {', '.join(KINDS)}; {kind!r} is none.")
        for name, most in (("facts", len(self.kinds)), ("digits", 4)):
            bounds = getattr(self, name)
            if not 1 <= bounds[0] <= bounds[1] <= most:
                raise MoshiTTTError(f"`{name}={bounds}` must lie between 1 and {most}.")


@dataclass(frozen=True)
class Fact:
    """A kind and its value, one word, or for a number one word a digit."""

    kind: str
    value: tuple[str, ...]


def talk(held_out: bool) -> list[str]:
    """The sentences of small talk: 240 for training, 80 others held out."""
    sentences = [f"{who} {does}" for who in _WHO for does in _DOES]
    random.Random(0).shuffle(sentences)
    cut = len(sentences) * 3 // 4
    return sentences[cut:] if held_out else sentences[:cut]


def draw_fact(kind: str, digits: tuple[int, int], rng: random.Random) -> Fact:
    """Any fact of a kind; a number has from digits[0] to digits[1] digits."""
    if kind == NUMBER:
        return Fact(kind, tuple(rng.choice(DIGITS) for _ in range(rng.randint(*digits))))
    return Fact(kind, (rng.choice(VALUES[kind]),))


def is_held_out(facts: dict[str, Fact]) -> bool:
    """Whether training never tells these facts together."""
    return sum((place + 1) * _rank(facts[kind]) for place, kind in enumerate(KINDS) if kind in facts) % HELD_OUT_SHARE == 0


def _rank(fact: Fact) -> int:
    words = DIGITS if fact.kind == NUMBER else VALUES[fact.kind]
    rank = 0
    for word in fact.value:
        rank = rank * len(words) + words.index(word)
    return rank


def ways(options: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    """Those of training, or the one that is held out."""
    return options[-1:] if held_out else options[:-1]


def telling(fact: Fact, opening: str | None, held_out: bool, rng: random.Random) -> tuple[str, ...]:
    """The phrases of a turn that tells a fact; numbers are said digit by digit, every other value together with what leads to it."""
    way = rng.choice(ways(TELL[fact.kind], held_out))
    said = (way, *fact.value) if fact.kind == NUMBER else (f"{way} {fact.value[0]}",)
    return said if opening is None else (opening, *said)


def phrases() -> list[str]:
    """Every phrase that the user may say in training."""
    said = [f"{way} {value}" for kind, values in VALUES.items() for way in ways(TELL[kind], False) for value in values]
    said += [*ways(TELL[NUMBER], False), *DIGITS]
    said += [way for options in ASK.values() for way in ways(options, False)]
    return [*said, *ways(LEAD_INS, False), *ways(CORRECTIONS, False), *talk(False)]


def answers() -> list[str]:
    """Every word that Moshi answers with."""
    return [*(value for values in VALUES.values() for value in values), *DIGITS]

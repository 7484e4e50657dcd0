"""Synthesised English speech for the tiny codec: espeak-ng, many voices, rates and pitches, sentences from word lists.

The voices in HELD_OUT are never trained on: the codec is measured with them. Everything follows from one seed.
"""
# ruff: noqa: SIM905 (word lists are easier to read and to mend as text)

import random
from collections.abc import Iterator

import numpy as np

from modeling_moshi_ttt.data.espeak import SAMPLE_RATE, Espeak, at_codec_rate, leveled

ACCENTS = ("en", "en-us", "en-gb-scotland", "en-us-nyc", "en-gb-x-rp")
VOICES = (
    "f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "Alex", "Alicia", "Andrea", "Annie", "Diogo", "Gene", "Henrique",
    "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Nguyen", "adam", "anika", "antonio", "belinda", "benjamin", "boris", "caleb",
    "david", "ed", "edward", "gustave", "ian", "john", "linda", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "quincy",
    "rob", "sandro", "shelby", "steph", "travis", "aunty", "grandma", "grandpa",
)  # fmt: skip
HELD_OUT = ("f5", "m8", "Andy", "Denis", "Mike", "Reed", "Gene2", "edward2", "pedro", "robert", "steph2", "iven")

NAMES = "Nora Omar Lena Tom Ana Sam Zoe Paul Mei Ivan Ruth Ben Clara Hugo Ida Jack Kira Leo Maya Nils Olga Pia Quinn Rosa Theo".split()
ADJECTIVES = (
    "green red blue calm happy sweet long second favourite lovely early late quiet warm cold heavy bright dark narrow wide small huge fresh "
    "old young clever gentle thick thin round square empty full rough smooth sharp strange cheap golden broken clean dusty hungry"
).split()
NOUNS = (
    "bread cheese soup river park train flight meeting chair lamp door floor car cat dog sister brother teacher garden window kitchen bridge "
    "mountain village station ticket bottle jacket button pencil mirror picture orange apple lemon potato chicken horse sheep fish bird "
    "weather thunder snow shadow engine machine paper letter question answer story music guitar violin movie theatre shirt shoe morning "
    "evening Friday Sunday Tuesday January August yellow thing measure treasure judge church beach voyage youth oil boy house cloud ear hair"
).split()
VERBS = (
    "likes finds takes keeps buys sells paints cooks cleans opens closes carries pushes pulls watches hears remembers forgets loves needs "
    "wants gives brings moves drops fixes breaks washes reads writes shows hides leaves meets joins feeds follows chooses measures"
).split()
PLACES = (
    "in Lisbon; by the river; at the station; near the old bridge; on the second floor; behind the house; under the table; at nine; "
    "on Sundays; every evening; before lunch; after the rain; with some friends; without a word; for three hours; until seven"
).split("; ")
TALK = (
    "How are you today; Thank you very much; What is your name; Where do you live; See you soon; I am doing well; That sounds nice; "
    "Could you say that again; Good morning; Good evening; Of course you can; I do not think so; Please tell me more; What was the code; "
    "Which way should we go; It is raining again; Yes, I remember it; No, not yet; You are welcome; Let us start; Why not; Have a good day"
).split("; ")
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen twenty thirty forty fifty hundred".split()


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences from the word lists."""
    while True:
        kind = rng.randrange(5)
        thing, other = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        if kind == 0:
            yield f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {thing} {rng.choice(PLACES)}."
        elif kind == 1:
            yield f"{rng.choice(TALK)}, {rng.choice(NAMES)}. {rng.choice(TALK)}?"
        elif kind == 2:
            yield f"The {thing} {rng.choice(VERBS)} my {other}."
        elif kind == 3:
            yield f"The number is {' '.join(rng.choice(NUMBERS) for _ in range(4))}, {rng.choice(PLACES)}."
        else:
            yield f"Was it the {thing}, or her {rng.choice(NOUNS)} {rng.choice(PLACES)}?"


def words() -> list[str]:
    """Every word the sentences may hold; the tokenizer is trained on them too."""
    text = " ".join([*NAMES, *ADJECTIVES, *NOUNS, *VERBS, *PLACES, *TALK, *NUMBERS, "the my her was it or number is"])
    return text.replace(",", "").split()


def speech(espeak: Espeak, voices: tuple[str, ...], seconds: float, rng: random.Random) -> np.ndarray:
    """About `seconds` of speech by these voices in turn at 24 kHz, float32 [n], equally loud whatever the voice."""
    parts, total, lines = [], 0, sentences(rng)
    while total < seconds * SAMPLE_RATE:
        voice = f"{rng.choice(ACCENTS)}+{voices[len(parts) % len(voices)]}"
        part = at_codec_rate(leveled(espeak.say(next(lines), voice, rng.randint(130, 210), rng.randint(25, 75), rng.randint(30, 70))))
        parts.append(np.pad(part, (0, rng.randint(0, SAMPLE_RATE // 2))))
        total += len(parts[-1])
    return np.concatenate(parts)[: int(seconds * SAMPLE_RATE)]

"""Sounds that a page offers in place of a microphone: a synthetic voice tells a fact, talks of other things, and asks for it."""

from __future__ import annotations

import io
import random
import wave
from dataclasses import dataclass

import numpy as np

from ..data.espeak import SAMPLE_RATE, Espeak, at_codec_rate
from ..data.spoken_dialogues import ACCENT

VOICE = "f2"
PAUSE = 0.16  # seconds before and after a phrase
# name: (label, phrases)
DEMO = {
    "ana": ("Tell it a name", ("my name is Ana",)),
    "talk": (
        "Talk of something else",
        ("the teacher walked to the bridge", "her sister opened the small shop", "the driver missed the early bus"),
    ),
    "tom": ("Tell it another name", ("no", "my name is Tom")),
    "ask": ("Ask for the name", ("what is my name",)),
}


@dataclass(frozen=True)
class Clip:
    """A sound, and what is said in it."""

    name: str
    label: str
    words: str
    wav: bytes


def demo_clips() -> list[Clip]:
    """What the packaged model `remembering` understands, in a voice that it has heard in training."""
    espeak, clips = Espeak(), []
    for name, (label, phrases) in DEMO.items():
        rng, pause = random.Random(name), np.zeros(int(PAUSE * SAMPLE_RATE), np.float32)
        said = [at_codec_rate(espeak.rendering(phrase, f"{ACCENT}+{VOICE}", rng)) for phrase in phrases]
        clips.append(Clip(name, label, ", ".join(phrases), wav_bytes(np.concatenate([x for part in said for x in (pause, part, pause)]))))
    return clips


def wav_bytes(samples: np.ndarray) -> bytes:
    """Samples [n] at 24 kHz as a WAV file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()

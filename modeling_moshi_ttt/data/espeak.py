"""Synthetic speech: espeak-ng through ctypes, as the package espeakng-loader brings it."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import torch

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from ..resampling import resample

SAMPLE_RATE = 24_000
BLOCK_RATE = 22_050  # espeak-ng's own rate
LOUDNESS = 0.08  # root mean square of a phrase, whatever the voice


class Espeak:
    """The espeak-ng library. One instance a process."""

    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        if self.library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0) != BLOCK_RATE:
            raise MoshiTTTOSError("espeak-ng did not start at 22,050 Hz; reinstall espeakng-loader")
        self.blocks: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = callback(self._collect)  # kept, or it is freed while the library still calls it
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self.blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int = 170, pitch: int = 50, spread: int = 50) -> np.ndarray:
        """Speech at 22,050 Hz, int16 [n]."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise MoshiTTTError(f"espeak-ng knows no voice {voice!r}")
        for parameter, value in ((1, rate), (3, pitch), (4, spread)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the breath of some voices is noise
        self.blocks.clear()
        data = text.encode()
        self.library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.blocks)

    def rendering(self, text: str, voice: str, rng: random.Random) -> np.ndarray:
        """A phrase at 22,050 Hz, float32 [n], at a rate and pitch drawn from `rng`."""
        return leveled(self.say(text, voice, rng.randint(180, 215), rng.randint(35, 65), rng.randint(40, 60)))


def trimmed(samples: np.ndarray, rate: int) -> np.ndarray:
    """Without the silence that espeak-ng puts behind a sentence, save a tenth of a second."""
    loud = np.flatnonzero(np.abs(samples) > 0.005 * np.abs(samples).max())
    return samples[: loud[-1] + rate // 10]


def leveled(samples: np.ndarray) -> np.ndarray:
    """What `Espeak.say` gave, trimmed, float32 [n], equally loud whatever the voice."""
    part = trimmed(samples, BLOCK_RATE).astype(np.float32)
    part *= LOUDNESS / max(float(np.sqrt(np.mean(part**2))), 1e-6)
    return np.clip(part, -1, 1)


def at_codec_rate(samples: np.ndarray) -> np.ndarray:
    """Samples [n] at 22,050 Hz as samples at 24 kHz."""
    return resample(torch.from_numpy(samples), BLOCK_RATE, SAMPLE_RATE).numpy()

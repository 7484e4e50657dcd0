"""Sound files in and out: float32 samples [channels, samples] at the rate asked for; every error names the file."""

from __future__ import annotations

import io
import math
import os
import wave
from pathlib import Path

import numpy as np
import sphn
from scipy.signal import resample_poly

from .files import atomic_write


def read_audio(path: str | os.PathLike[str], sample_rate: int = 24000, start: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Read WAV, FLAC, MP3 or OGG from `start` for `duration` seconds (None: to the end), resampled to `sample_rate`.

    Returns float32 [channels, samples], cut to the file's end (never padded).
    Raises FileNotFoundError, or ValueError naming the file when it is empty, unreadable, not finite, or ends before `start`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such sound file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the sound file is empty (0 bytes); replace it or leave it out.")
    if start < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"{path}: start is {start} and duration {duration}; start must be >= 0 and duration > 0 seconds.")
    length = audio_duration(path)
    if start >= length:
        raise ValueError(f"{path}: start is {start} s, but the file ends at {length:.3f} s.")
    try:
        samples, rate = sphn.read(str(path), start_sec=start or None, duration_sec=duration)
    except ValueError as error:
        raise ValueError(f"{path}: the sound file cannot be read ({_reason(error)}).") from None
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: the sound holds NaN or infinite samples.")
    if rate != sample_rate:
        # sphn's own resampler delays the sound by 10 to 30 ms and pads its end: words would lag behind
        common = math.gcd(rate, sample_rate)
        wanted = round(samples.shape[-1] * sample_rate / rate)
        samples = resample_poly(samples, sample_rate // common, rate // common, axis=-1)[:, :wanted]
    return np.ascontiguousarray(samples, dtype=np.float32)


def audio_duration(path: str | os.PathLike[str]) -> float:
    """Length of a sound file in seconds; ValueError naming the file when it is unreadable or holds no sound."""
    length = sphn.durations([str(path)])[0]
    if length is None:
        raise ValueError(f"{path}: the sound file cannot be read (not WAV, FLAC, MP3 or OGG, or broken).")
    if length <= 0:
        raise ValueError(f"{path}: the sound file holds no samples; replace it or leave it out.")
    return float(length)


def write_audio(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> None:
    """Write float samples in [-1, 1], shape [samples] or [channels, samples], as a 16-bit WAV; the file appears whole or not at all."""
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2 or samples.size == 0:
        raise ValueError(f"{path}: samples must be [samples] or [channels, samples] and not empty, their shape is {samples.shape}.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: the samples to write hold NaN or infinite values.")
    pcm = np.rint(np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2").T  # [samples, channels]
    atomic_write(path, _wav_bytes(pcm, sample_rate))


def _wav_bytes(pcm: np.ndarray, sample_rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(pcm.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    return str(error).split(": ", 1)[-1].strip()

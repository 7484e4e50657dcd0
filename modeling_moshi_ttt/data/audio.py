"""Sound files in and out: float32 samples [channels, samples] at the rate asked for; every error names the file."""

from __future__ import annotations

import io
import math
import os
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import sphn
import torch

from ..common.files import atomic_write
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..resampling import Resampler, resample, source_window

# Part of every key of what is kept of sounds, codes, scores and results: raise it when the samples read from a file change.
READING = "sound-2"
BLOCK = 4096  # samples read at once


def read_audio(path: str | os.PathLike[str], sample_rate: int = 24000, start: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Read WAV, FLAC, MP3 or OGG from `start` for `duration` seconds (None: to the end), resampled to `sample_rate`.

    A part holds the samples that stand there when the whole file is read: at other rates it is resampled with what lies around it.
    Returns float32 [channels, samples], cut to the file's end (never padded).
    Raises FileNotFoundError, or ValueError naming the file when it is empty, unreadable, broken off, not finite, or ends before `start`.
    """
    if start < 0 or (duration is not None and duration <= 0):
        raise MoshiTTTError(f"{path}: start is {start} and duration {duration}; start must be >= 0 and duration > 0 seconds.")
    with _opened(path, sample_rate) as file:
        rate = file.samplerate
        length = math.ceil(file.frames * sample_rate / rate)  # in samples out, as first and last
        first = round(start * sample_rate)
        last = length if duration is None else min(round((start + duration) * sample_rate), length)
        if first >= length:
            raise MoshiTTTError(f"{path}: start is {start} s, but the file ends at {file.frames / rate:.3f} s.")
        begin, end, skip = source_window(rate, sample_rate, first, last)
        if file.format == "OGG":  # on its last page libsndfile finds other samples than those asked for
            for _ in _blocks(path, file, begin):
                pass
        else:
            file.seek(begin)
        samples = np.concatenate([np.zeros((file.channels, 0), np.float32), *_blocks(path, file, end - begin)], 1)
    resampled = resample(torch.from_numpy(samples), rate, sample_rate)
    return resampled[:, skip : skip + last - first].contiguous().numpy()


def audio_pieces(path: str | os.PathLike[str], sample_rate: int, seconds: float) -> Iterator[np.ndarray]:
    """A sound file of any length as float32 pieces [channels, samples] of about `seconds`; together they are what `read_audio` reads.

    Raises what `read_audio` raises, a torn end when it is reached.
    """
    with _opened(path, sample_rate) as file:
        resampler = Resampler(file.samplerate, sample_rate, file.channels)
        pieces: list[torch.Tensor] = []
        for block in _blocks(path, file, file.frames):
            pieces.append(resampler.push(torch.from_numpy(block)))
            if sum(piece.shape[1] for piece in pieces) >= seconds * sample_rate:
                yield torch.cat(pieces, 1).numpy()
                pieces = []
        yield torch.cat([*pieces, resampler.flush()], 1).numpy()


@contextmanager
def _opened(path: str | os.PathLike[str], sample_rate: int) -> Iterator[soundfile.SoundFile]:
    """The file, whose rate can be changed, opened by libsndfile, which finds every sample by its number and takes the encoder's delay out
    of MP3.
    """
    path = Path(path)
    if not path.is_file():
        raise MoshiTTTFileNotFoundError(f"{path}: there is no such sound file.")
    if path.stat().st_size == 0:
        raise MoshiTTTError(f"{path}: the sound file is empty (0 bytes); replace it or leave it out.")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise MoshiTTTError(f"{path}: the sound file cannot be read ({error.error_string.strip().rstrip('.')}).") from None
    with file:
        if file.frames <= 0:
            raise MoshiTTTError(f"{path}: the sound file holds no samples; replace it or leave it out.")
        try:
            source_window(file.samplerate, sample_rate, 0, 0)
        except ValueError as error:
            raise MoshiTTTError(f"{path}: {error}") from None
        yield file


def _blocks(path: str | os.PathLike[str], file: soundfile.SoundFile, frames: int) -> Iterator[np.ndarray]:
    """At most `frames` samples from where the file stands, as float32 [channels, samples]."""
    read = file.tell()
    end = read + frames
    while read < end:
        try:
            block = file.read(min(BLOCK, end - read), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            times = f"{read / file.samplerate:.2f} s of {file.frames / file.samplerate:.2f} s"
            raise MoshiTTTError(f"{path}: the sound breaks off at {times}; copy the file again.") from None
        if len(block) == 0:  # the end, or where a file of a format without checks breaks off
            return
        if not np.isfinite(block).all():
            raise MoshiTTTError(f"{path}: the sound holds NaN or infinite samples.")
        read += len(block)
        yield np.ascontiguousarray(block.T)


def audio_duration(path: str | os.PathLike[str]) -> float:
    """Length of a sound file in seconds, as its header states it; ValueError naming the file when it is unreadable or holds no sound."""
    length = sphn.durations([str(path)])[0]
    if length is None:
        raise MoshiTTTError(f"{path}: the sound file cannot be read (not WAV, FLAC, MP3 or OGG, or broken).")
    if length <= 0:
        raise MoshiTTTError(f"{path}: the sound file holds no samples; replace it or leave it out.")
    return float(length)


def write_audio(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> None:
    """Write float samples in [-1, 1], shape [samples] or [channels, samples], as a 16-bit WAV; the file appears whole or not at all."""
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2 or samples.size == 0:
        raise MoshiTTTError(f"{path}: samples must be [samples] or [channels, samples] and not empty, their shape is {samples.shape}.")
    if not np.isfinite(samples).all():
        raise MoshiTTTError(f"{path}: the samples to write hold NaN or infinite values.")
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

"""Sound files in and out: float32 samples [channels, samples] at the rate asked for; every error names the file."""

from __future__ import annotations

import io
import math
import os
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
import soundfile
import sphn
import torch

from ..common.files import atomic_write
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..resampling import Resampler, resample, source_window
from . import limits
from .containers import SUFFIXES as CONTAINERS
from .containers import ContainerFile

# Part of every key of what is kept of sounds, codes, scores and results: raise it when the samples read from a file change.
READING = "sound-3"
BLOCK = 2**14  # samples read at once
# Read from the start on: libsndfile's seek lands up to 25 ms off in an MP3, and on other samples than those asked for at the end of an Ogg.
UNSOUGHT = ("MP3", "MPEG", "OGG")
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", *CONTAINERS)


def read_audio(path: str | os.PathLike[str], sample_rate: int = 24000, start: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Read a sound file from `start` for `duration` seconds (None: to the end), resampled to `sample_rate`.

    WAV, FLAC, MP3, Ogg Vorbis and Opus, AIFF; with PyAV also M4A, MP4, Matroska and WebM. The encoder's delay is taken out where the file
    states it. A part holds the samples that stand there when the whole file is read: at other rates it is resampled with what lies around it.
    Returns float32 [channels, samples], cut to the file's end (never padded).

    Raises:
        FileNotFoundError, ValueError: the file is missing, empty, unreadable, broken off, not finite, beyond the limits of `limits.py`, or ends
            before `start`; the message names it.
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
        if (last - first) / sample_rate > limits.LONGEST_WHOLE:
            hours = (last - first) / sample_rate / 3600
            raise MoshiTTTError(
                f"{path}: {hours:.1f} h are more than the {limits.LONGEST_WHOLE / 3600:g} h read at once; cut the recording."
            )
        begin, end, skip = source_window(rate, sample_rate, first, last)
        samples = np.concatenate([np.zeros((file.channels, 0), np.float32), *_blocks(path, file, begin, end)], 1)
    resampled = resample(torch.from_numpy(samples), rate, sample_rate)
    return resampled[:, skip : skip + last - first].contiguous().numpy()


def audio_pieces(path: str | os.PathLike[str], sample_rate: int, seconds: float) -> Iterator[np.ndarray]:
    """A sound file of any length as float32 pieces [channels, samples] of `seconds`, the last one shorter; together they are what
    `read_audio` reads. Memory does not grow with the file.

    Raises what `read_audio` raises, a torn end when it is reached.
    """
    with _opened(path, sample_rate) as file:
        resampler = Resampler(file.samplerate, sample_rate, file.channels)
        resampled = (resampler.push(torch.from_numpy(block)).numpy() for block in _blocks(path, file, 0, file.frames))
        yield from in_pieces(chain(resampled, (resampler.flush().numpy() for _ in range(1))), round(seconds * sample_rate))


def in_pieces(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Samples [channels, n] of any n, put together and cut into pieces of `size`; the last one is shorter, or as long."""
    waiting: list[np.ndarray] = []
    count = 0
    for array in arrays:
        waiting.append(array)
        count += array.shape[1]
        while count > size:  # what fills a piece may be the last
            joined = np.concatenate(waiting, 1)
            yield joined[:, :size]
            waiting, count = [joined[:, size:]], count - size
    yield np.concatenate(waiting, 1)


class _SoundFile(soundfile.SoundFile):
    """soundfile seeks after every block that it reads, where it stands already; in an MP3 each of these seeks may shift what follows."""

    def seekable(self) -> bool:
        return False


File: TypeAlias = _SoundFile | ContainerFile


@contextmanager
def _opened(path: str | os.PathLike[str], sample_rate: int) -> Iterator[File]:
    """The file, whose rate can be changed, opened by libsndfile, which finds every sample by its number and takes the encoder's delay out
    of MP3; or by PyAV, where it is a container.
    """
    path = Path(path)
    if not path.is_file():  # nor is a pipe or a device, which could keep us waiting for ever
        raise MoshiTTTFileNotFoundError(f"{path}: there is no such sound file.")
    if path.stat().st_size == 0:
        raise MoshiTTTError(f"{path}: the sound file is empty (0 bytes); replace it or leave it out.")
    with _open(path) as file:
        if file.frames <= 0:
            raise MoshiTTTError(f"{path}: the sound file holds no samples; replace it or leave it out.")
        lowest, highest = limits.SAMPLE_RATES
        if not lowest <= file.samplerate <= highest:
            raise MoshiTTTError(f"{path}: its rate is {file.samplerate} Hz; it must be {lowest} to {highest} Hz.")
        if file.channels > limits.CHANNELS:
            raise MoshiTTTError(f"{path}: it states {file.channels} channels; {limits.CHANNELS} are read at most.")
        if file.frames / file.samplerate > limits.LONGEST_RECORDING:
            hours, most = file.frames / file.samplerate / 3600, limits.LONGEST_RECORDING / 3600
            raise MoshiTTTError(f"{path}: it states {hours:.1f} h; cut it into recordings of {most:g} h at most.")
        try:
            source_window(file.samplerate, sample_rate, 0, 0)
        except ValueError as error:
            raise MoshiTTTError(f"{path}: {error}") from None
        yield file


def _open(path: Path) -> File:
    if path.suffix.lower() in CONTAINERS:
        return ContainerFile(path)
    try:
        return _SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise MoshiTTTError(f"{path}: the sound file cannot be read ({error.error_string.strip().rstrip('.')}).") from None


def _blocks(path: str | os.PathLike[str], file: File, begin: int, end: int) -> Iterator[np.ndarray]:
    """Samples [begin, end) as float32 [channels, n]; fewer where the file ends before."""
    for block in file.blocks(begin, end) if isinstance(file, ContainerFile) else _sndfile_blocks(path, file, begin, end):
        if not np.isfinite(block).all():
            raise MoshiTTTError(f"{path}: the sound holds NaN or infinite samples.")
        yield block


def _sndfile_blocks(path: str | os.PathLike[str], file: _SoundFile, begin: int, end: int) -> Iterator[np.ndarray]:
    at = 0
    if begin and file.format not in UNSOUGHT:
        at = file.seek(begin)
    while at < end:
        stop = begin if at < begin else end
        try:
            block = file.read(min(BLOCK, stop - at), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            times = f"{at / file.samplerate:.2f} s of {file.frames / file.samplerate:.2f} s"
            raise MoshiTTTError(f"{path}: the sound breaks off at {times}; copy the file again.") from None
        if len(block) == 0:  # the end, or where a file of a format without checks breaks off
            return
        at += len(block)
        if at > begin:
            yield np.ascontiguousarray(block.T)


def audio_duration(path: str | os.PathLike[str]) -> float:
    """Length of a sound file in seconds, as its header states it; ValueError naming the file when it is unreadable or holds no sound."""
    with _opened(path, 24000) as file:
        length = file.frames / file.samplerate
        if file.format in ("WAV", "WAVEX") and states_length(Path(path)):
            # libsndfile shortens a WAV that breaks off to what is there
            length = max(length, sphn.durations([str(path)])[0] or 0.0)
    return length


def audio_channels(path: str | os.PathLike[str]) -> int:
    """How many channels a sound file has; errors as `audio_duration`."""
    with _opened(path, 24000) as file:
        return int(file.channels)


def states_length(path: Path) -> bool:
    """False for a WAV written into a pipe: its header, made before the end was known, holds the greatest number instead of a length."""
    with path.open("rb") as file:
        start = file.read(8)
    return not (start[:4] == b"RIFF" and start[4:] == b"\xff" * 4)


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

"""Mimi codes on disk: every recording is encoded once, kept under the hash of its sound and of the codec, and read in slices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..common.files import atomic_write, sha256
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER, ZERO, parse_word
from .audio import read_audio
from .codec import codec_fingerprint, encode_stereo
from .recordings import Recording

# A manifest may round its durations, and decoders trim; a sound that is shorter than stated by more seconds than this was cut off.
CUT_TOLERANCE = 0.2


class CodesCache:
    """Codes `[2, K, T]` int16 of recordings (Moshi's channel, then the user's), one safetensors file each.

    Args:
        folder: where the files go; one folder below it for each codec. What sources download or unpack goes to `sources` in it.
        processor: MoshiTTTProcessor, whose codec encodes what is missing.
    """

    def __init__(self, folder: str | Path, processor: Any):
        self.processor = processor
        self.store = Path(folder) / "sources"
        self.folder = Path(folder) / codec_fingerprint(processor)
        self._hashes_path = self.folder / "hashes.json"
        self._hashes = self._read_hashes()

    def _read_hashes(self) -> dict[str, list[Any]]:
        try:
            return dict(json.loads(self._hashes_path.read_text()))
        except (FileNotFoundError, ValueError):
            return {}  # only a shortcut: hashes are worked out anew

    def path(self, recording: Recording) -> Path:
        """The file of a recording's codes, whether it exists or not; the sound is hashed again only when its size or date changed."""
        sound = recording.path.resolve()
        stat = sound.stat()
        known = self._hashes.get(str(sound))
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = self._hashes[str(sound)] = [stat.st_size, stat.st_mtime_ns, sha256(sound)]
        return self.folder / f"{known[2]}.safetensors"

    def has(self, recording: Recording) -> bool:
        """Whether whole codes of this recording are there; a damaged file counts as missing, and so does one of a sound that was cut off."""
        try:
            frames = code_frames(self.path(recording))
            return frames > 0 and not _breaks_off(recording, frames / self.processor.frame_rate)
        except (OSError, SafetensorError, KeyError):
            return False

    def encode(self, recording: Recording) -> Path:
        """Encode one recording and write its codes; ValueError names a file that cannot be read, or that ends before its time."""
        samples = read_audio(recording.path, self.processor.sampling_rate)
        seconds = samples.shape[-1] / self.processor.sampling_rate
        if _breaks_off(recording, seconds):
            raise MoshiTTTError(
                f"{recording.path}: the sound breaks off at {seconds:.2f} s of {recording.duration:.2f} s; copy the file again."
            )
        codes = encode_stereo(self.processor, samples, recording.path)
        atomic_write(self.path(recording), save({"codes": codes}))
        return self.path(recording)

    def prepare(self, recordings: Iterable[Recording], problems: list[str]) -> Iterator[Path | None]:
        """Encode what is missing; yields each recording's file, or None when it went to `problems`."""
        for recording in recordings:
            try:
                yield self.path(recording) if self.has(recording) else self.encode(recording)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
                yield None
        atomic_write(self._hashes_path, json.dumps(self._hashes))


def _breaks_off(recording: Recording, seconds: float) -> bool:
    """Whether less sound is there than the header, which is all that a duration was compared with, promised."""
    return seconds < recording.duration - CUT_TOLERANCE and _states_length(recording.path)


def _states_length(path: Path) -> bool:
    """False for a WAV written into a pipe: its header, made before the end was known, holds the greatest number instead of a length."""
    with path.open("rb") as file:
        start = file.read(8)
    return not (start[:4] == b"RIFF" and start[4:] == b"\xff" * 4)


def recording_text(processor: Any, recording: Recording, frames: int) -> np.ndarray:
    """The text stream [T] int32 of a whole recording, by moshi-finetune's rules; all -1 where nothing was aligned.

    Raises:
        ValueError: a word ends before it starts, begins outside the recording, or cannot be encoded; or no label of a speaker is known.
    """
    if recording.words is None:
        return np.full(frames, ZERO, dtype=np.int32)
    speakers = set()
    for index, word in enumerate(recording.words):
        text, start, end, speaker = parse_word(index, word)
        _check_start(index, text, start, end, frames / processor.frame_rate)
        speakers.add(speaker)
    _check_speakers(speakers)
    return np.array(processor.text_frames(recording.words, frames), dtype=np.int32)


def says_words(text: np.ndarray, padding_ids: Sequence[int]) -> bool:
    """Whether anything but padding stands in a text stream [T]; a recording in which only the user speaks holds padding alone."""
    return bool((~np.isin(text, (ZERO, *padding_ids))).any())


def _check_start(index: int, text: str, start: float, end: float, length: float) -> None:
    # nothing would remain of such a word, and with times in milliseconds the whole text would be padding
    if start < end and not 0 <= start < length:
        raise MoshiTTTError(
            f"words[{index}] {text!r} stands at [{start:g}, {end:g}] s, outside the recording of {length:.2f} s; are the times in seconds?"
        )


def _check_speakers(speakers: set[str]) -> None:
    """Labels beside Moshi's may be any, as for moshi-finetune; but without Moshi's, an unknown one may well be Moshi under another name."""
    unknown = sorted(speakers - {MAIN_SPEAKER, USER_SPEAKER})
    if unknown and MAIN_SPEAKER not in speakers:
        raise MoshiTTTError(
            f"the words' speakers are {', '.join(map(repr, unknown))} and none is {MAIN_SPEAKER!r}, so no text would be learned; "
            f"name Moshi {MAIN_SPEAKER!r} and the user {USER_SPEAKER!r} in the words."
        )


def code_frames(path: Path) -> int:
    """Number of frames in a file of codes, from its header alone."""
    with safe_open(path, framework="numpy") as file:
        return int(file.get_slice("codes").get_shape()[-1])


def read_codes(path: Path, start: int, frames: int) -> np.ndarray:
    """Codes [2, K, frames] from `start` on; only these are read."""
    with safe_open(path, framework="numpy") as file:
        return file.get_slice("codes")[:, :, start : start + frames]

"""The cache of prepared recordings: every sound is encoded once, and kept with its text under the hash of the sound and of its words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..common.files import sha256
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from ..tokens_moshi_ttt import ZERO
from .audio import audio_pieces, states_length
from .codec import PIECE, codec_digest, encode_streams
from .codes import read_about, read_codes, save_codes
from .index import Known, Row
from .recordings import Recording
from .settings import DataSettings
from .sound_worker import pieces_in_worker
from .sources import Placed
from .words import WordReport, recording_text, says_words

T = TypeVar("T")
# A manifest may round its durations, and decoders trim; a sound that is shorter than stated by more seconds than this was cut off.
CUT_TOLERANCE = 0.2
SORTED = 8  # batches of recordings that are put in order of their length, so that those of one batch end together


@dataclass
class _Work:
    """A recording on its way: its sound's hash and its file, and either what stands in that, or the codes to write, or an error."""

    placed: Placed
    known: Known
    path: Path
    frames: int = 0
    about: dict[str, str] = field(default_factory=dict)
    codes: np.ndarray | None = None
    error: MoshiTTTError | None = None


class CodesCache:
    """Codes `[2, K, T]` int16 of recordings (Moshi's channel, then the user's) and their text `[T]`, one safetensors file each.

    Args:
        folder: where the files go; one folder below it for each codec. What sources download or unpack goes to `sources` in it.
        processor: MoshiTTTProcessor, whose codec encodes what is missing.
        batch_size: recordings encoded side by side. With more than one the codes of a recording may differ in a few places from those made
            alone, for the order of sums in a product of matrices depends on the number of its rows.
    """

    def __init__(self, folder: str | Path, processor: Any, batch_size: int = 1):
        self.processor, self.batch_size = processor, batch_size
        self.store = Path(folder) / "sources"
        self.codec = codec_digest(processor)
        self.folder = Path(folder) / self.codec
        self._tokenizer = hashlib.sha256(json.dumps(sorted(processor.tokenizer.get_vocab().items())).encode()).hexdigest()

    def known_before(self) -> dict[str, Known]:
        """The hashes that version 0.2.0 kept, by the path of the sound."""
        try:
            kept = json.loads((self.folder / "hashes.json").read_text())
            return {str(path): Known(int(size), int(date), str(sound), "") for path, (size, date, sound) in kept.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}  # only a shortcut: hashes are worked out anew

    def prepare(
        self, source: int, placed: Iterable[Placed], settings: DataSettings, known: dict[str, Known], problems: list[str]
    ) -> Iterator[Row]:
        """Encode what is missing, and yield a row for each recording that can be used; what is wrong with others goes to `problems`."""
        for group in _groups(placed, self.batch_size * (SORTED if self.batch_size > 1 else 1)):
            works: list[_Work] = []
            for one in group:
                try:
                    works.append(self._work(one, settings, known))
                except (ValueError, OSError) as error:
                    problems.append(str(error))
            missing = [work for work in works if work.codes is None and not work.frames]
            for batch in _groups(sorted(missing, key=lambda work: work.placed.recording.duration), self.batch_size):
                self._encode(batch, settings)
            for work in works:
                try:
                    yield self._finish(work, source, settings)
                except ValueError as error:
                    problems.append(str(error))

    def _work(self, placed: Placed, settings: DataSettings, known: dict[str, Known]) -> _Work:
        recording = placed.recording
        sound = recording.path.resolve()
        stat = sound.stat()
        before = known.get(str(sound))
        if before is None or (before.size, before.date) != (stat.st_size, stat.st_mtime_ns):
            before = Known(stat.st_size, stat.st_mtime_ns, sha256(sound), "")
        # all that text and codes depend on beside the sound and the codec
        what = [recording.words, settings.words, settings.main_speaker, settings.mono_is, self.processor.text_padding_ids, self._tokenizer]
        name = f"{before.sound}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.safetensors"
        work = _Work(placed, before, self.folder / before.sound[:2] / name)
        try:
            frames, work.about = read_about(work.path)
            work.frames = 0 if self._breaks_off(work, frames) else frames
        except MoshiTTTOSError:  # gone or damaged: it is made anew
            work.frames = 0
        if not work.frames:
            work.codes = self._codes_before(work, settings)
        return work

    def _codes_before(self, work: _Work, settings: DataSettings) -> np.ndarray | None:
        """Codes of the same sound that were made before with other words, or by version 0.2.0."""
        before = f"{work.known.sound}.safetensors"
        if work.placed.recording.path.suffix.lower() == ".mp3":  # which version 0.2.0 read with the encoder's delay
            before = ""
        for name in filter(None, (work.known.codes, before)):
            try:
                codes = read_codes(self.folder / name)
            except MoshiTTTOSError:
                continue
            absent = [bool((side == ZERO).all()) for side in codes]
            fits = not any(absent) or absent == [settings.mono_is == "user", settings.mono_is == "moshi"]
            if fits and not self._breaks_off(work, codes.shape[-1]):
                return codes
        return None

    def _encode(self, works: Sequence[_Work], settings: DataSettings) -> None:
        """Codes of every sound, or the error that stopped it."""
        rate, seconds = self.processor.sampling_rate, PIECE / self.processor.frame_rate
        streams = [
            _whole_stereo(pieces_in_worker(audio_pieces, recording.path, rate, seconds), recording, rate, settings.mono_is)
            for recording in (work.placed.recording for work in works)
        ]
        for work, found in zip(works, encode_streams(self.processor, streams)):
            if isinstance(found, MoshiTTTError):
                work.error = found
            else:
                absent = np.full_like(found[:1], ZERO)
                sides = [found] if len(found) == 2 else [found, absent] if settings.mono_is == "moshi" else [absent, found]
                work.codes = np.concatenate(sides).astype(np.int16)

    def _finish(self, work: _Work, source: int, settings: DataSettings) -> Row:
        if work.error is not None:
            raise work.error
        recording = work.placed.recording
        if work.codes is not None:
            work.frames = work.codes.shape[-1]
            try:
                text, report = recording_text(self.processor, recording.words, work.frames, settings.words, settings.main_speaker)
            except MoshiTTTError as error:
                raise MoshiTTTError(f"{recording.path}: {error}") from None
            speaks = says_words(text, self.processor.text_padding_ids)
            work.about = {"sound": work.known.sound, "speaks": str(int(speaks)), "dropped": str(report.dropped)}
            save_codes(work.path, work.codes, text, work.about)
        report = recording.report + WordReport(dropped=int(work.about["dropped"]))
        sound = (str(recording.path.resolve()), work.known.size, work.known.date, work.known.sound)
        spoken = (recording.words is not None, work.about["speaks"] == "1")
        codes = work.path.relative_to(self.folder).as_posix()
        return Row(source, work.placed.place, *sound, codes, work.frames, *spoken, *astuple(report))

    def _breaks_off(self, work: _Work, frames: int) -> bool:
        return _breaks_off(work.placed.recording, frames / self.processor.frame_rate)


def _breaks_off(recording: Recording, seconds: float) -> bool:
    """Whether less sound is there than the header, which is all that a duration was compared with, promised."""
    return seconds < recording.duration - CUT_TOLERANCE and states_length(recording.path)


def _whole_stereo(pieces: Iterator[np.ndarray], recording: Recording, rate: int, mono_is: str | None) -> Iterator[np.ndarray]:
    """The pieces of a sound; ValueError for one with other channels than wanted, and at the end for one that ends too early."""
    samples = 0
    for piece in pieces:
        if len(piece) > 2 or (len(piece) == 1 and mono_is is None):
            cure = "say whose voice it is with data.mono_is" if len(piece) == 1 else "keep Moshi's and the user's"
            raise MoshiTTTError(
                f"{recording.path}: the recording has {len(piece)} channels; it must have two, Moshi left and the user right; {cure}."
            )
        samples += piece.shape[1]
        yield piece
    seconds = samples / rate
    if _breaks_off(recording, seconds):
        raise MoshiTTTError(
            f"{recording.path}: the sound breaks off at {seconds:.2f} s of {recording.duration:.2f} s; copy the file again."
        )


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    several = iter(items)
    while group := list(islice(several, size)):
        yield group

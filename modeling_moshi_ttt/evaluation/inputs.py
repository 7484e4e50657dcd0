"""Long recordings that an evaluation reads: books in Libri-Light's layout, or what a manifest names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.settings import Count, settings_group
from ..data import long_recordings as books
from ..data.recordings import Recording, read_manifest
from ..errors_moshi_ttt import MoshiTTTError
from .kept_numbers import content, recording_line
from .scoring import CodeSequence


@settings_group
class RecordingsSettings:
    """Where long recordings come from."""

    folder: Path | None = None
    """A folder in Libri-Light's layout, or"""
    manifest: Path | None = None
    """a .jsonl, as for training."""
    max_recordings: Count | None = None
    """How many recordings; null: all."""
    max_frames: Count | None = None
    """Frames of each recording, 750 a minute; null: all."""

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.manifest is None):
            raise MoshiTTTError(
                f"`folder={self.folder}` and `manifest={self.manifest}` must be one of the two; give a folder or a manifest."
            )


def long_recordings(section: RecordingsSettings) -> dict[str, list[Path] | Recording]:
    """The recordings of a section by name: the files of a book, or a recording of a manifest."""
    found: dict[str, list[Path] | Recording] = {}
    if section.folder is not None:
        found |= books.find_books(section.folder)
    else:
        for recording in read_manifest(section.manifest, allow_outside=True):  # type: ignore[arg-type]
            if recording.path.name in found:
                raise MoshiTTTError(f"{section.manifest}: two recordings are named {recording.path.name}; give each its own name")
            found[recording.path.name] = recording
    return dict(list(found.items())[: section.max_recordings])


def check_stereo(path: Path, channels: int) -> None:
    """Refuse a recording that is no dialogue, by its path."""
    if channels != 2:
        raise MoshiTTTError(f"{path}: its channels, {channels}, must be 2; a dialogue is stereo, Moshi left and the user right.")


def content_lines(section: RecordingsSettings) -> Iterable[str]:
    """Lines over the contents of a section's recordings, hashed as they are asked for; what cannot be read is named at once."""
    return (f"{name} {_line(one)}" for name, one in long_recordings(section).items())


def _line(one: Sequence[Path] | Recording) -> str:
    return recording_line(one) if isinstance(one, Recording) else repr([content(path) for path in one])


def encoded(processor: Any, section: RecordingsSettings, progress: Callable[[Any], Any]) -> dict[str, CodeSequence]:
    """The recordings of a section as codes."""
    found = {}
    for name, source in progress(long_recordings(section).items()):
        encode = books.encode_recording if isinstance(source, Recording) else books.encode_book
        found[name] = encode(processor, source, section.max_frames)  # type: ignore[arg-type]
    return found

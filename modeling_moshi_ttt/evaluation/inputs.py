"""What a section of an evaluation reads, and a fingerprint of it: kept numbers belong to their data, not to names that may hold others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..data import long_recordings as books
from ..data.audio import READING
from ..data.recordings import Recording, read_manifest
from ..errors_moshi_ttt import MoshiTTTError
from . import spoken_recall, zero_shot
from .contents import content
from .evaluate import RecordingsSettings


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


def dialogues(section: Any) -> list[Recording]:
    """The recordings of the dialogue section."""
    return read_manifest(section.manifest, allow_outside=True)[: section.max_recordings]


def fingerprint(name: str, section: Any) -> str | None:
    """SHA-256 over all that a section reads, sounds, words and pairs; None for one that reads nothing."""
    if name == "zero_shot":
        return _digest(line for task in section.tasks for line in _pairs(task))
    if name in ("long_context", "inner_loss"):
        return _digest(f"{key} {_recording(one)}" for key, one in long_recordings(section).items())
    if name == "dialogue":
        return _digest(map(_recording, dialogues(section)))
    if name == "spoken_recall":
        return spoken_recall.fingerprint(section, content)
    return None


def _pairs(task: Any) -> Iterable[str]:
    for pair in zero_shot.read_task(task.task, task.folder, task.split, task.parts):
        yield repr((task.task, pair.item, pair.voice, pair.group, content(pair.positive), content(pair.negative)))


def _recording(one: Sequence[Path] | Recording) -> str:
    if isinstance(one, Recording):
        return repr((content(one.path), one.words))
    return repr([content(path) for path in one])


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256(READING.encode())
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()

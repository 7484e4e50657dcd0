"""Numbers kept between runs: hashes by which they belong to a sound or to codes, whatever their names, and reading them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..common.files import sha256
from ..data.audio import READING
from ..data.recordings import Recording
from .scoring import CodeSequence

CURE = "remove it, and what it held is measured again"


def content(path: Path) -> str:
    """SHA-256 of a file; within a process a file of the same size and time of change is read once."""
    stat = path.stat()
    return _content(path, stat.st_size, stat.st_mtime_ns)


@cache
def _content(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def recording_line(recording: Recording) -> str:
    """The contents of a recording's sound, and its words."""
    return repr((content(recording.path), recording.words))


def digest(lines: Iterable[str]) -> str | None:
    """SHA-256 over lines, and over the way in which sounds are read; None where there are none."""
    found, hashed = False, hashlib.sha256(READING.encode())
    for line in lines:
        found = True
        hashed.update(f"{line}\n".encode())
    return hashed.hexdigest() if found else None


def codes_digest(sequence: CodeSequence) -> str:
    """SHA-256 over every stream of a sequence; an absent one counts as such."""
    hashed = hashlib.sha256()
    for stream in sequence:
        hashed.update(b"absent\n" if stream is None else f"{stream.dtype} {tuple(stream.shape)}\n".encode())
        if stream is not None:
            hashed.update(stream.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()

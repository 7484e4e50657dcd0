"""Hashes by which kept numbers are told to belong to a sound or to codes, whatever their names."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from ..common.files import sha256
from .scoring import CodeSequence


def content(path: Path) -> str:
    """SHA-256 of a file; within a process a file of the same size and time of change is read once."""
    stat = path.stat()
    return _content(path, stat.st_size, stat.st_mtime_ns)


@cache
def _content(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def codes_fingerprint(sequence: CodeSequence) -> str:
    """SHA-256 over every stream of a sequence; an absent one counts as such."""
    digest = hashlib.sha256()
    for stream in sequence:
        digest.update(b"absent\n" if stream is None else f"{stream.dtype} {tuple(stream.shape)}\n".encode())
        if stream is not None:
            digest.update(stream.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

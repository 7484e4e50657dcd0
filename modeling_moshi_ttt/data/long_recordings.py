"""Long recordings as code sequences, read and encoded piece by piece: Libri-Light folders, and manifests of stereo recordings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors_moshi_ttt import MoshiTTTError
from .audio import audio_pieces, in_pieces
from .code_sequence import CodeSequence
from .codec import PIECE, encode_streams
from .recordings import Recording
from .sound_worker import pieces_in_worker

PIECE_SECONDS = 10.0  # read and encoded at once


def find_books(folder: str | Path) -> dict[str, list[Path]]:
    """Libri-Light: every folder below (or at) `folder` that holds flac files is one speaker reading one book; files in natural order."""
    root = Path(folder)
    if not root.is_dir():
        raise MoshiTTTError(f"{root}: no such folder; give <set>, <set>/<speaker> or <set>/<speaker>/<book> of Libri-Light")
    books: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.flac"), key=natural_key):
        name = path.parent.relative_to(root).as_posix()
        books.setdefault(root.name if name == "." else name, []).append(path)
    if not books:
        raise MoshiTTTError(f"{root}: holds no flac files; Libri-Light's layout is <set>/<speaker>/<book>/*.flac")
    return books


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorts `part_2` before `part_10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.as_posix()) if part]


def encode_book(processor: Any, paths: Sequence[Path], max_frames: int | None = None) -> CodeSequence:
    """Mono files one after the other as one voice, Moshi's; the user and the text are absent. At most `max_frames` frames."""
    pieces = (
        piece.mean(0, keepdims=True)
        for path in paths
        for piece in pieces_in_worker(audio_pieces, path, processor.sampling_rate, PIECE_SECONDS)
    )
    return CodeSequence(_encode(processor, pieces, max_frames)[0])


def encode_recording(processor: Any, recording: Recording, max_frames: int | None = None) -> CodeSequence:
    """A recording of ours: left channel Moshi, right the user (absent when mono), the main speaker's words as text."""
    codes = _encode(processor, pieces_in_worker(audio_pieces, recording.path, processor.sampling_rate, PIECE_SECONDS), max_frames)
    text = None
    if recording.words is not None:
        text = torch.tensor(processor.text_frames(recording.words, codes.shape[-1]))
    return CodeSequence(codes[0], codes[1] if len(codes) == 2 else None, text)


def _encode(processor: Any, pieces: Iterable[np.ndarray], max_frames: int | None) -> Tensor:
    (codes,) = encode_streams(processor, [in_pieces(pieces, PIECE * processor.frame_size)], max_frames)
    if isinstance(codes, MoshiTTTError):
        raise codes
    return torch.from_numpy(codes)

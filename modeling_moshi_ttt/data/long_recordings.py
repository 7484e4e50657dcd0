"""Long recordings as code sequences, read and encoded piece by piece: Libri-Light folders, and manifests of stereo recordings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors_moshi_ttt import MoshiTTTError
from .audio import audio_pieces
from .code_sequence import CodeSequence
from .recordings import Recording

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
    rate = processor.sampling_rate
    pieces = (piece.mean(0, keepdims=True) for path in paths for piece in audio_pieces(path, rate, PIECE_SECONDS))
    codes = _encode(processor, pieces, 1, max_frames)
    return CodeSequence(codes[0])


def encode_recording(processor: Any, recording: Recording, max_frames: int | None = None) -> CodeSequence:
    """A recording of ours: left channel Moshi, right the user (absent when mono), the main speaker's words as text."""
    pieces = audio_pieces(recording.path, processor.sampling_rate, PIECE_SECONDS)
    first = next(pieces)
    codes = _encode(processor, chain([first], pieces), len(first), max_frames)
    text = None
    if recording.words is not None:
        text = torch.tensor(processor.text_frames(recording.words, codes.shape[-1]))
    return CodeSequence(codes[0], codes[1] if len(codes) == 2 else None, text)


def _encode(processor: Any, pieces: Iterable[np.ndarray], channels: int, max_frames: int | None) -> Tensor:
    """Codes [channels, K, T] of all samples as one stream; the last frame is filled up with silence."""
    stream = processor.new_audio_stream(channels)
    size, rest, codes, frames = processor.frame_size, np.zeros((channels, 0), np.float32), [], 0
    for piece in pieces:
        rest = np.concatenate([rest, piece], axis=1)
        whole = rest.shape[1] // size * size
        if whole:
            codes.append(stream.encode_frames(torch.from_numpy(rest[:, :whole])).cpu())
            frames, rest = frames + codes[-1].shape[-1], rest[:, whole:]
        if max_frames is not None and frames >= max_frames:
            return torch.cat(codes, -1)[..., :max_frames]
    if rest.shape[1]:
        rest = np.pad(rest, ((0, 0), (0, size - rest.shape[1])))
        codes.append(stream.encode_frames(torch.from_numpy(rest)).cpu())
    return torch.cat(codes, -1)[..., :max_frames]

"""Codes on disk: a safetensors file a recording, with its text and with checksums, read in slices."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..common.files import atomic_write
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError

FORMAT = "2"  # 1, of version 0.2.0, held the codes alone
BLOCK = 125  # frames under one checksum, ten seconds


def save_codes(path: Path, codes: np.ndarray, text: np.ndarray, about: dict[str, str] | None = None) -> None:
    """Write codes [2, K, T] int16 of Moshi and the user (-1 where one is absent) and the text stream [T] int32; whole or not at all.

    about: what goes into the file's metadata besides, such as the SHA-256 of the sound.
    """
    tensors = {"codes": np.ascontiguousarray(codes), "text": text, "checks": _checksums(codes, text)}
    atomic_write(path, save(tensors, {"moshi_ttt": json.dumps({"format": FORMAT, **(about or {})})}))  # several keys have no order


def read_frames(path: Path, start: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Text [frames] and codes [2, K, frames] from `start` on; only these are read, and their checksums compared.

    Raises:
        OSError: the file is gone, torn or damaged there.
    """
    first, last = start // BLOCK, -(-(start + frames) // BLOCK)
    with _opened(path) as file:
        texts = file.get_slice("text")
        end = min(last * BLOCK, texts.get_shape()[0])
        text = texts[first * BLOCK : end]
        codes = file.get_slice("codes")[:, :, first * BLOCK : end]
        checks = file.get_slice("checks")[first:last]
    if not np.array_equal(_checksums(codes, text), checks):
        raise _damaged(path, "its checksums differ")
    offset = start - first * BLOCK
    return text[offset : offset + frames], codes[:, :, offset : offset + frames]


def read_about(path: Path) -> tuple[int, dict[str, str]]:
    """Frames and metadata, of a file that was read to its end and compared with its checksums."""
    with _opened(path) as file:
        frames = int(file.get_slice("text").get_shape()[0])
        about = json.loads(file.metadata()["moshi_ttt"])
    read_frames(path, 0, frames)
    return frames, about


def read_codes(path: Path) -> np.ndarray:
    """All codes [2, K, T] of a file, compared with its checksums; version 0.2.0 wrote none."""
    with _opened(path) as file:
        codes = file.get_tensor("codes")
        if "checks" not in file.keys():  # noqa: SIM118 - safetensors has no other way to ask
            return codes
    return read_frames(path, 0, codes.shape[-1])[1]


def _checksums(codes: np.ndarray, text: np.ndarray) -> np.ndarray:
    """CRC-32 [blocks] uint32 of every `BLOCK` frames of codes and text."""
    starts = range(0, len(text), BLOCK)
    blocks = (codes[:, :, at : at + BLOCK].tobytes() + text[at : at + BLOCK].tobytes() for at in starts)
    return np.array([zlib.crc32(block) for block in blocks], dtype=np.uint32)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise MoshiTTTOSError(f"{path}: the codes are gone; run `moshi-ttt prepare` again.") from None
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> MoshiTTTError:
    return MoshiTTTOSError(f"{path}: the codes are damaged ({reason}); run `moshi-ttt prepare` again, which makes them anew.")

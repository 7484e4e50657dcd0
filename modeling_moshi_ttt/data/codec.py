"""The processor with its codec: where it is loaded from, what tells one from another, and sound into codes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.hub import check_place
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError

# Part of every key: raise it when the way of encoding changes.
LAYOUT = "codes-1 sound-2"  # as version 0.2.0 spelled it, whose codes are taken over
PIECE = 125  # frames encoded at once


def read_processor(source: str, setting: str) -> Any:
    """The processor with its codec from a folder, the package or the Hub; ValueError naming the setting where there is none."""
    from ..processing_moshi_ttt import MoshiTTTProcessor

    source = resolve("processor", source)
    check_place(source, setting)
    try:
        return MoshiTTTProcessor.from_pretrained(source)
    except Exception as error:  # transformers and tokenizers have one of its own for every kind of damage
        bare = Path(source).is_dir() and not (Path(source) / "processor_config.json").is_file()
        reason = "it holds no processor_config.json" if bare else f"{type(error).__name__}: {error}".splitlines()[0]
        raise MoshiTTTError(f"{setting} is {source}, where no processor can be loaded ({reason})") from error


def to_device(processor: Any, device: str) -> Any:
    """The processor with its codec on a device; ValueError for one that is not there."""
    try:
        processor.codec.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's, for an unknown name and for a CPU build
        raise MoshiTTTError(f"`--device={device}` must be a device of this machine ({str(error).splitlines()[0]}).") from None
    return processor


def codec_digest(processor: Any) -> str:
    """Sixteen hexadecimal digits that change when the codec's weights, its frame layout or the way of reading sounds change."""
    digest = hashlib.sha256(LAYOUT.encode())
    codec = processor.codec
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor.item()).encode()
        )
    digest.update(str(processor.num_codebooks).encode())
    return digest.hexdigest()[:16]


codec_fingerprint = codec_digest  # its name in version 0.2, until 0.4


def encode_streams(
    processor: Any, streams: Sequence[Iterator[np.ndarray]], max_frames: int | None = None
) -> list[np.ndarray | MoshiTTTError]:
    """Codes [channels, K, T] of several sounds side by side, each as one stream; the last frame is filled up with silence.

    Sounds of any lengths and channels give what they give alone, up to the last bits of matrix products. Memory does not grow with them.

    Args:
        streams: float32 samples [channels, n] in pieces of `PIECE` frames, the last one shorter.
        max_frames: where to stop.

    Returns:
        For each sound its codes, or the error that its stream raised.
    """
    size, count = processor.frame_size, len(streams)
    pieces: list[np.ndarray | None] = [None] * count
    codes: list[list[np.ndarray]] = [[] for _ in streams]
    errors: dict[int, MoshiTTTError] = {}
    stream, rows = None, [0] * (count + 1)
    for turn in itertools.count():
        for i in range(count):
            if turn == 0 or pieces[i] is not None:
                try:
                    pieces[i] = next(streams[i], None)
                except MoshiTTTError as error:
                    pieces[i], errors[i] = None, error
        if all(piece is None for piece in pieces) or (max_frames is not None and turn * PIECE >= max_frames):
            break
        if stream is None:
            rows = [0, *np.cumsum([0 if piece is None else len(piece) for piece in pieces]).tolist()]
            stream = processor.new_audio_stream(rows[-1])
        frames = [0 if piece is None else -(-piece.shape[1] // size) for piece in pieces]
        batch = torch.zeros(rows[-1], max(frames) * size)
        for i, piece in enumerate(pieces):
            if piece is not None:
                batch[rows[i] : rows[i + 1], : piece.shape[1]] = torch.from_numpy(piece)
        found = stream.encode_frames(batch).cpu().numpy()  # [rows, K, frames]
        for i in range(count):
            codes[i] += [found[rows[i] : rows[i + 1], :, : frames[i]]] if frames[i] else []
    return [errors[i] if i in errors else np.concatenate(codes[i], -1)[..., :max_frames] for i in range(count)]

"""The processor with its codec: where it is loaded from, what tells one from another, and sound into codes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.hub import check_place
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError
from .audio import READING

# Part of every key: raise it when the way of encoding changes.
LAYOUT = "codes-1"


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


def codec_fingerprint(processor: Any) -> str:
    """Sixteen hexadecimal digits that change when the codec's weights, its frame layout or the way of reading sounds change."""
    digest = hashlib.sha256(f"{LAYOUT} {READING}".encode())
    codec = processor.codec
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor.item()).encode()
        )
    digest.update(str(processor.num_codebooks).encode())
    return digest.hexdigest()[:16]


def encode_stereo(processor: Any, samples: np.ndarray, name: Any) -> np.ndarray:
    """Codes [2, K, T] int16 of stereo samples [2, n]; ValueError for another number of channels."""
    if samples.shape[0] != 2:
        raise MoshiTTTError(f"{name}: the recording has {samples.shape[0]} channels; it must have two, Moshi left and the user right.")
    codes = processor.encode_audio(torch.from_numpy(samples))
    return codes.numpy().astype(np.int16)

"""Speech recognisers that give word times: transformers' pipelines, and faster-whisper where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..common.hub import check_place, hub_errors
from ..errors_moshi_ttt import MoshiTTTError

SAMPLE_RATE = 16000
Kind = Literal["auto", "transformers", "faster-whisper"]
Chunk = dict[str, Any]  # {"text": " word", "timestamp": (start, end) in seconds}, as transformers' pipelines give it


class Recognizer:
    """Hears pieces of one voice, float32 [N] at 16 kHz and 30 s at most, and gives the words of each: one by a call, or several together."""

    def __init__(self, several: Callable[[Sequence[np.ndarray]], list[list[Chunk]]]):
        self.several = several

    def __call__(self, samples: np.ndarray) -> list[Chunk]:
        return self.several([samples])[0]


def load_recognizer(model: str, kind: Kind, language: str | None, device: str | None, batch_size: int) -> Recognizer:
    """The recogniser in a folder or of a Hub name; nothing is fetched for a folder.

    kind: "auto" takes faster-whisper for a folder with model.bin, and for a name in which that stands.

    Raises:
        ValueError, OSError: no recogniser can be loaded, or it takes no language; at once, before any sound is read.
    """
    check_place(model, "--model")
    if kind == "auto":
        kind = "faster-whisper" if (Path(model) / "model.bin").is_file() or "faster-whisper" in model else "transformers"
    make = _faster_whisper if kind == "faster-whisper" else _transformers
    if not Path(model).is_dir():
        with hub_errors(f"fetching the recogniser {model}", "give the folder of one with --model, or run the same command again"):
            return make(model, language, device, batch_size)
    try:
        return make(model, language, device, batch_size)
    except MoshiTTTError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # what the libraries raise for a folder that holds something else
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MoshiTTTError(f"--model is {model}, where no recogniser can be loaded ({reason}).") from error


def _transformers(model: str, language: str | None, device: str | None, batch_size: int) -> Recognizer:
    from transformers import pipeline

    recognizer: Any = pipeline("automatic-speech-recognition", model=model, device=device)
    if language and recognizer.type != "seq2seq_whisper":  # the pipeline would leave it out in silence
        raise MoshiTTTError(f"--language is {language!r}, but the recogniser {model} takes none; leave it out.")
    together = batch_size if recognizer.tokenizer.pad_token_id is not None else 1  # it cannot pad what it hears together
    options = {"generate_kwargs": {"language": language}} if language else {}

    def recognize(pieces: Sequence[np.ndarray]) -> list[list[Chunk]]:
        inputs = [{"raw": piece, "sampling_rate": SAMPLE_RATE} for piece in pieces]
        return [list(heard["chunks"]) for heard in recognizer(inputs, return_timestamps="word", batch_size=together, **options)]

    return Recognizer(recognize)


def _faster_whisper(model: str, language: str | None, device: str | None, batch_size: int) -> Recognizer:
    try:
        from faster_whisper import BatchedInferencePipeline, WhisperModel
    except ModuleNotFoundError:
        raise MoshiTTTError(f"--model {model} needs faster-whisper; install it with: pip install 'moshi-ttt[annotate]'") from None
    kind, _, index = (device or "auto").partition(":")
    recognizer = BatchedInferencePipeline(
        WhisperModel(model, device=kind, device_index=int(index or 0), local_files_only=Path(model).is_dir())
    )

    def recognize(pieces: Sequence[np.ndarray]) -> list[list[Chunk]]:
        ends = np.cumsum([len(piece) for piece in pieces]) / SAMPLE_RATE
        starts = [0.0, *ends[:-1].tolist()]
        clips = [{"start": start, "end": end} for start, end in zip(starts, ends.tolist())]
        segments, _ = recognizer.transcribe(
            np.concatenate(pieces), language=language, word_timestamps=True, vad_filter=False, clip_timestamps=clips, batch_size=batch_size
        )
        heard: list[list[Chunk]] = [[] for _ in pieces]
        for word in (word for segment in segments for word in segment.words or []):
            piece = int(np.searchsorted(ends, (word.start + word.end) / 2, side="right").clip(max=len(pieces) - 1))
            heard[piece].append({"text": word.word, "timestamp": (word.start - starts[piece], word.end - starts[piece])})
        return heard

    return Recognizer(recognize)

"""Lets the model listen to the user's side of recordings and answer, and measures how it behaves beside the recorded answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.audio import read_audio
from ..data.recordings import Recording
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER
from .dialogue import Behaviour, summarise
from .dialogue import measure as measure_behaviour


def answer(model: Any, user_codes: Tensor, **sampling: Any) -> tuple[Tensor, Tensor]:
    """What the model says while it hears `user_codes` [K, T]: text [T] and audio codes [K, T]; `sampling` as in its `hear`."""
    text, codes = model.hear(user_codes[None].to(model.device), **sampling)
    return text[0].cpu(), codes[0].cpu()


def measure(
    model: Any,
    processor: Any,
    recordings: Sequence[Recording],
    max_seconds: float = 120.0,
    seed: int = 0,
    sampling: Mapping[str, float] | None = None,
    progress: Callable[[Sequence[Recording]], Iterable[Recording]] = lambda items: items,
    before: Any = None,
) -> dict[str, Any]:
    """Behaviour of the recordings themselves ("reference"), of the model over the same user ("model"), and of the model `before`."""
    speakers = {name: one for name, one in (("before", before), ("model", model)) if one is not None}
    found: dict[str, list[Behaviour]] = {name: [] for name in ("reference", *speakers)}
    rate = processor.sampling_rate
    for number, recording in enumerate(progress(recordings)):
        samples = read_audio(recording.path, rate, 0.0, max_seconds)
        if len(samples) != 2:
            raise MoshiTTTError(f"{recording.path}: has {len(samples)} channel(s); a dialogue is stereo, Moshi left and the user right")
        words = " ".join(word for word, (start, _), who in recording.words or () if who == MAIN_SPEAKER and start < max_seconds)
        transcript = words if recording.words is not None else None
        found["reference"].append(measure_behaviour(samples, rate, transcript, transcript))
        user_codes = processor.encode_audio(torch.from_numpy(samples[1:]))[0]
        for name, speaker in speakers.items():
            generator = torch.Generator(speaker.device).manual_seed(seed + number)
            text, codes = answer(speaker, user_codes, generator=generator, **(sampling or {}))
            voice = processor.decode_audio(codes[None])[0, : samples.shape[1]].float().numpy()  # the last frame may go on past the sound
            both = np.stack([voice, samples[1]])
            found[name].append(measure_behaviour(both, rate, processor.decode_text(text), transcript))
    return {"kind": "dialogue", "recordings": len(recordings), **{name: summarise(behaviours) for name, behaviours in found.items()}}

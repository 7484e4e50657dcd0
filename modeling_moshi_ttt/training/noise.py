"""Noise on what the model hears while it trains; the labels stay.

Teacher forcing shows the model its own words and codes as they should be; in a live conversation it hears those that it made itself. With a
share of the frames replaced by random codes, the words cannot be read off the model's own sound, and one wrong code does not become the
next one's reason.
"""

from __future__ import annotations

import torch

from .data import Batch
from .run_config import DataSettings

TEXT_PADDING = 3


def add_noise(batch: Batch, settings: DataSettings, entries: int, generator: torch.Generator) -> Batch:
    """The batch with a share of its frames replaced: codes by random ones below `entries`, words by padding.

    Args:
        generator: on the CPU; the same seed gives the same noise, so that a resumed run repeats it.
    """
    changed = dict(vars(batch))
    for name, share in (("moshi_audio_codes", settings.own_noise), ("user_audio_codes", settings.user_noise)):
        if share > 0:
            changed[name] = _replace(getattr(batch, name), share, entries, generator)
    if settings.text_noise > 0:
        chosen = torch.rand(batch.input_ids.shape, generator=generator) < settings.text_noise
        chosen = chosen.to(batch.input_ids.device) & (batch.input_ids >= 0)
        changed["input_ids"] = batch.input_ids.masked_fill(chosen, TEXT_PADDING)
    return Batch(**changed)


def _replace(codes: torch.Tensor, share: float, entries: int, generator: torch.Generator) -> torch.Tensor:
    rows, _, frames = codes.shape
    chosen = (torch.rand(rows, 1, frames, generator=generator) < share).to(codes.device)
    random = torch.randint(entries, codes.shape, generator=generator).to(codes.device)
    return torch.where(chosen & (codes >= 0), random, codes)

"""Noise on what the model hears while it trains; the labels stay.

Teacher forcing shows the model its own words and codes as they should be; in a live conversation it hears those that it made itself. With a
share of the frames replaced by random codes, the words cannot be read off the model's own sound, and one wrong code does not become the
next one's reason.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..data.settings import DataSettings
from ..tokens_moshi_ttt import TEXT_PADDING_IDS
from .windows import Batch


def add_noise(
    batch: Batch, settings: DataSettings, entries: int, seeds: list[tuple[int, ...]], padding: int = TEXT_PADDING_IDS[0]
) -> Batch:
    """The batch with a share of its frames replaced: codes by random ones below `entries`, words by the text id `padding`.

    Args:
        seeds: one for each row, of the run, the step and the row's place in it: a resumed run repeats its noise, and so does one
            with other numbers of processes and micro-batches.
    """
    if max(settings.own_noise, settings.user_noise, settings.text_noise, settings.user_code_noise) == 0:
        return batch
    text, own, user = batch.input_ids.clone(), batch.moshi_audio_codes.clone(), batch.user_audio_codes.clone()
    for row, seed in enumerate(seeds):
        random = np.random.default_rng(seed)
        for codes, share in ((own[row], settings.own_noise), (user[row], settings.user_noise)):  # [K, T]
            _replace(codes, share, torch.from_numpy(random.integers(entries, size=codes.shape)), random)
        if settings.user_code_noise:
            swapped = torch.from_numpy(random.random(user[row].shape) < settings.user_code_noise).to(user.device) & (user[row] >= 0)
            user[row][swapped] = torch.from_numpy(random.integers(entries, size=int(swapped.sum()))).to(user.device)
        _replace(text[row], settings.text_noise, torch.full(text[row].shape, padding), random)
    return replace(batch, input_ids=text, moshi_audio_codes=own, user_audio_codes=user)


def _replace(tokens: torch.Tensor, share: float, others: torch.Tensor, random: np.random.Generator) -> None:
    """Put `others` [..., T] in place of a share of the frames of `tokens`, in place; absent tokens stay absent."""
    chosen = torch.from_numpy(random.random(tokens.shape[-1]) < share).to(tokens.device)
    tokens.copy_(torch.where(chosen & (tokens >= 0), others.to(tokens.device), tokens))

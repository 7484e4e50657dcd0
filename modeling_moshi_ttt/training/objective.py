"""What a run minimizes, logs, and chooses its best checkpoint by: one number of the text and the audio loss."""

from __future__ import annotations

from typing import TypeVar

import torch

Loss = TypeVar("Loss", float, torch.Tensor)


def objective(text: Loss | None, audio: Loss | None, text_weight: float) -> Loss | None:
    """`text_weight * text + audio`, of those that are there; None where neither is.

    Args:
        text, audio: losses in nats; None where no label of the stream is trained.
        text_weight: `data.text_weight`.
    """
    if text is None or audio is None:
        return audio if text is None else text_weight * text
    return text_weight * text + audio


def ratio(total: float, count: float) -> float | None:
    """`total / count`; None over nothing, which is no 0."""
    return total / count if count > 0 else None

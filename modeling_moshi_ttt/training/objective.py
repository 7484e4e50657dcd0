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


def open_gates(gates: dict[int, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """How far the TTT layers open, summed over the frames that are there and averaged over heads and layers.

    Args:
        gates: `[B, T, H]` of each layer, as the model gives with `output_write_gates`. mask: `[B, T]`, 1 for frames that are there.
    """
    return (torch.stack([gate.mean(-1) for gate in gates.values()]).mean(0) * mask).sum()


def ratio(total: float, count: float) -> float | None:
    """`total / count`; None over nothing, which is no 0."""
    return total / count if count > 0 else None

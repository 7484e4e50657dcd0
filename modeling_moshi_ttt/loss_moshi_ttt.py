"""Moshi's training loss: weighted, masked cross-entropy of each stream, as moshi-finetune computes it.

Losses come as (sum, weight), so that sums over micro-batches, ranks and windows can be divided once by the weight of them all.
"""

import torch
import torch.nn.functional as F

IGNORED = -100


def text_weights(labels: torch.Tensor, padding_ids: list[int], padding_weight: float) -> torch.Tensor:
    """Loss weight of each text label: 0 where it is negative (not trained), `padding_weight` on padding ids, else 1.

    Args:
        labels: any shape, text ids; -100 or -1 is not trained.
    """
    padding = torch.isin(labels, torch.tensor(padding_ids, device=labels.device, dtype=labels.dtype))
    return torch.where(padding, float(padding_weight), 1.0) * (labels >= 0)


def audio_weights(labels: torch.Tensor, semantic_weight: float) -> torch.Tensor:
    """Loss weight of each audio label `[B, K, T]`: `semantic_weight` in the first codebook, 1 in the others, 0 where it is negative."""
    per_codebook = torch.ones(labels.shape[1], 1, device=labels.device)
    per_codebook[0] = semantic_weight
    return per_codebook * (labels >= 0)


def weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the weighted cross-entropies in nats, and the sum of the weights, in float32 (float64 for float64 logits).

    Args:
        logits: `[..., card]`.
        labels: `[...]`; where its weight is 0 a label may be any negative number.
        weights: `[...]`.

    Returns:
        `(sum, weight)`, both scalars; their quotient is the stream's loss.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = labels.masked_fill(labels < 0, IGNORED).flatten()
    losses = F.cross_entropy(logits.flatten(0, -2).to(dtype), targets, ignore_index=IGNORED, reduction="none")
    weights = weights.flatten().to(dtype)
    return (losses * weights).sum(), weights.sum()


def mean_loss(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`total / weight`; exactly 0, with zero gradient, where nothing is trained."""
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)

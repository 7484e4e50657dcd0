"""Moshi's training loss: weighted, masked cross-entropy of each stream, as moshi-finetune computes it.

Losses come as (sum, weight), so that sums over micro-batches, ranks and windows can be divided once by the weight of them all.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .errors_moshi_ttt import MoshiTTTError
from .tokens_moshi_ttt import IGNORED

# Logits beyond this number are taken in pieces, each computed again in backward: a whole float32 copy and its log-softmax, which are
# not kept then, are 1.3 GB for the text of 4 x 102.4 s.
CHUNK = 1 << 24


def text_weights(labels: torch.Tensor, padding_ids: list[int], padding_weight: float) -> torch.Tensor:
    """Loss weight of each text label: 0 where it is negative (not trained), `padding_weight` on padding ids, else 1.

    Args:
        labels: any shape, text ids; -100 or -1 is not trained.
    """
    padding = torch.isin(labels, torch.tensor(padding_ids, device=labels.device, dtype=labels.dtype))
    return torch.where(padding, float(padding_weight), 1.0) * (labels >= 0)


def codebook_weights(config: Any) -> list[float]:
    """`[P]`, what each codebook that the depth decoder predicts weighs in the audio loss: `semantic_loss_weight` the first of a speaker, 1 the
    others; the user's times `user_loss_weight`.
    """
    speakers = [(config.num_codebooks, 1.0), (config.num_predicted_codebooks - config.num_codebooks, config.user_loss_weight)]
    return [factor * (1.0 if k else config.semantic_loss_weight) for count, factor in speakers for k in range(count)]


def audio_weights(labels: torch.Tensor, per_codebook: list[float]) -> torch.Tensor:
    """Loss weight of each audio label `[B, P, T]`, given each codebook's; 0 where it is negative."""
    return torch.tensor(per_codebook, dtype=torch.float32, device=labels.device)[:, None] * (labels >= 0)


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
    scores, weights = logits.flatten(0, -2), weights.flatten().to(dtype)
    if torch.compiler.is_compiling() or scores.numel() <= CHUNK:
        return _weighted_sum(scores, targets, weights), weights.sum()
    rows = max(CHUNK // scores.shape[-1], 1)
    chunks = zip(scores.split(rows), targets.split(rows), weights.split(rows))
    return torch.stack([checkpoint(_weighted_sum, *chunk, use_reentrant=False) for chunk in chunks]).sum(), weights.sum()


def _weighted_sum(scores: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum over rows of scores `[N, card]`, in the dtype of the weights `[N]`."""
    losses = F.cross_entropy(scores.to(weights.dtype), targets, ignore_index=IGNORED, reduction="none")
    return (losses * weights).sum()


def mean_loss(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`total / weight`; exactly 0, with zero gradient, where nothing is trained."""
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def stream_losses(
    logits: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor | None],
    whole: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The loss of each stream, divided by its entry of `whole` where given; None where there are no labels."""
    losses: list[torch.Tensor | None] = []
    for i, (scores, targets, each) in enumerate(zip(logits, labels, weights)):
        if targets is None or each is None:
            losses.append(None)
            continue
        total, weight = weighted_cross_entropy(scores, targets, each)
        losses.append(mean_loss(total, weight if whole is None else whole[i].to(weight)))
    return losses


def whole_weights(
    num_items_in_batch: torch.Tensor | int, parts: tuple[torch.Tensor | None, ...], frame_weights: tuple[float, ...]
) -> torch.Tensor:
    """`[2]`, what the (text, audio) loss sums of a part of a batch are divided by: their weights in the whole batch.

    Args:
        num_items_in_batch: these two weights, or the number of frames of the whole.
        parts: loss weights of the part's own labels, None where there are none.
        frame_weights: what one frame weighs in either loss.

    Raises:
        ValueError: neither one number nor two; not finite, below 0, or 0 where the part trains something.
    """
    whole = torch.as_tensor(num_items_in_batch).flatten()
    if whole.numel() not in (1, 2):
        raise MoshiTTTError(f"`num_items_in_batch` holds {whole.numel()} numbers; give the (text, audio) weights or a number of frames.")
    on_meta = any(tensor is not None and tensor.is_meta for tensor in (whole, *parts))
    if not (torch.compiler.is_compiling() or on_meta):  # one read by the host, as for the range of tokens
        trained = [whole.new_zeros(()).bool() if part is None else (part > 0).any().to(whole.device) for part in parts]
        needed = torch.stack(trained) | (whole.numel() == 1)
        if not bool((whole.isfinite() & torch.where(needed, whole > 0, whole >= 0)).all()):
            raise MoshiTTTError(
                f"`num_items_in_batch={whole.tolist()}` must be finite and above 0 where anything is trained; give the sum of "
                "`loss_weights` over the whole batch, or its number of frames."
            )
    return whole if whole.numel() == 2 else torch.cat([whole * weight for weight in frame_weights])

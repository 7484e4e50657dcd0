"""What the models give.

Shapes: B rows, T frames, E width, K Moshi's codebooks, V text vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .cache_moshi_ttt import MoshiTTTCache
from .frames_moshi_ttt import take_frames
from .ttt_layer import TTTInnerLosses


class _OutputWithCache(ModelOutput):
    """An output whose field `cache`, transformers' name from 5.24 on, can be read as `past_key_values` as well."""

    cache: MoshiTTTCache | None

    @property
    def past_key_values(self) -> MoshiTTTCache | None:
        return self.cache


@dataclass
class MoshiTTTModelOutput(_OutputWithCache):
    """What the temporal transformer gives.

    Args:
        last_hidden_state: `[B, T, E]`, normalised.
        cache: the streams' memory after these frames; also `past_key_values`.
        hidden_states: `[B, T, E]` before each layer, and `last_hidden_state`, when asked for.
        attentions: `[B, H, T, S + T]` attention weights of each layer over S remembered frames and the T new ones, when asked for.
        inner_losses: the inner losses of each TTT layer by its number, when asked for.
        write_gates: `[B, T, H]` from 0 to 1, how far each head of a TTT layer opened its memory to each frame, by the layer's number, when
            asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: MoshiTTTCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    inner_losses: dict[int, TTTInnerLosses] | None = None
    write_gates: dict[int, torch.Tensor] | None = None


@dataclass
class MoshiTTTOutput(_OutputWithCache):
    """What Moshi-TTT gives.

    Args:
        loss: `text_loss + audio_loss`, of those whose labels were given.
        text_loss, audio_loss: weighted mean cross-entropies in nats.
        logits: `[B, T, V]`; step t predicts text frame t.
        audio_logits: `[B, P, T, card]` in delayed time: step t predicts frame `t - delay` of each of the P codebooks that the depth decoder
            predicts, Moshi's K first.
        last_hidden_state, cache, hidden_states, attentions, inner_losses, write_gates: as in [`MoshiTTTModelOutput`].
    """

    loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    audio_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    audio_logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    cache: MoshiTTTCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    inner_losses: dict[int, TTTInnerLosses] | None = None
    write_gates: dict[int, torch.Tensor] | None = None


@dataclass
class MoshiTTTGenerateOutput(_OutputWithCache):
    """What `generate` gives.

    Args:
        sequences: `[B, T]` text tokens, one a frame.
        audio_codes: `[B, K, T]` Moshi's codes of the same frames.
        audio: `[B, T · 1920]` their sound, where the batch brought a processor's `decode_audio`.
        cache: the memory after these frames, to go on from; also `past_key_values`. None with `use_cache=False`.
    """

    sequences: torch.Tensor | None = None
    audio_codes: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    cache: MoshiTTTCache | None = None


def put_back(result: MoshiTTTOutput, order: torch.Tensor) -> None:
    """Bring outputs of packed frames back to where the caller's frames stood."""
    for name, dim in (("logits", 1), ("audio_logits", 2), ("last_hidden_state", 1)):
        setattr(result, name, take_frames(getattr(result, name), order, dim))
    if result.hidden_states is not None:
        result.hidden_states = tuple(take_frames(hidden, order, 1) for hidden in result.hidden_states)
    if result.write_gates is not None:
        result.write_gates = {layer: take_frames(gates, order, 1) for layer, gates in result.write_gates.items()}
    if result.attentions is not None:
        frames = order.shape[1]  # the keys of remembered frames, before those of these frames, stay where they are
        by_query = (take_frames(weights, order, 2) for weights in result.attentions)
        result.attentions = tuple(torch.cat([w[..., :-frames], take_frames(w[..., -frames:], order, 3)], dim=3) for w in by_query)

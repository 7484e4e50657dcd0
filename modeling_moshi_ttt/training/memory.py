"""What batch rows remember from one window to the next: one cache a micro-batch, cut from its past after every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..cache_moshi_ttt import MoshiTTTCache
from ..data.settings import Carry
from ..delay_pattern import last_frames
from ..tokens_moshi_ttt import IGNORED
from .windows import Batch


class LaneMemory:
    """The caches of a rank's micro-batches.

    Args:
        model: the bare MoshiTTTForConditionalGeneration (for its configuration and device).
        carry: "none" makes no cache at all; "state" drops the attention window between windows; "state+attention" keeps everything.
        micro_batches, rows: how many caches, and their batch size.
    """

    def __init__(self, model: Any, carry: Carry, micro_batches: int, rows: int):
        self.model, self.carry, self.rows = model, carry, rows
        self.caches: list[MoshiTTTCache] = []
        if carry != "none":
            self.caches = [MoshiTTTCache(model.config, rows, device=model.device) for _ in range(micro_batches)]

    def enter(self, micro: int, reset: torch.Tensor) -> MoshiTTTCache | None:
        """The cache for the next window of a micro-batch, rows of `reset` [B] started anew; None where nothing is carried."""
        if not self.caches:
            return None
        cache = self.caches[micro]
        if bool(reset.any()):
            cache.reset(reset)
        if self.carry == "state":
            cache.reset_attention()
        if cache.state.reset_mask is None:
            # ranks must agree on which parameters get a gradient: where no row begins, that of the initial fast weights is 0
            nobody = torch.zeros(self.rows, dtype=torch.bool, device=cache.frames.device)
            cache.state = replace(cache.state, reset_mask=nobody)
        return cache

    def leave(self, micro: int) -> None:
        """Cut a micro-batch's memory from the graph that made it."""
        if self.caches:
            self.caches[micro].detach()

    def forget(self) -> None:
        """Start every row anew, as after a step that was not finite."""
        for cache in self.caches:
            cache.reset()

    def loss_weights(self, micro: int, batches: list[Batch]) -> torch.Tensor:
        """[turns, 2] (text, audio) loss weights of windows that follow one another, known before any of them runs."""
        shadow = MoshiTTTCache(self.model.config, self.rows, device=self.model.device) if self.caches else None
        labels = self.caches[micro].labels if self.caches else None  # all that the weights need of a cache
        weights = []
        for batch in batches:
            if shadow is not None and labels is not None:
                labels = labels.masked_fill(batch.reset[:, None, None], IGNORED)
                shadow.state = replace(shadow.state, labels=labels)
                labels = last_frames(batch.audio_labels, labels, batch.attention_mask.sum(dim=1))
            inputs = batch.inputs()
            weights.append(self.model.loss_weights(batch.text_labels, batch.audio_labels, inputs["attention_mask"], past_key_values=shadow))
        return torch.stack(weights)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor of every cache, by name."""
        return {f"{i}.{name}": tensor for i, cache in enumerate(self.caches) for name, tensor in cache.state_dict().items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """The way back from `state_dict`, exact to the bit."""
        for i, cache in enumerate(self.caches):
            own = {name.removeprefix(f"{i}."): tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
            cache.load_state_dict({name: tensor.to(self.model.device) for name, tensor in own.items()})

"""Moshi's windowed self-attention, the same in a full pass, in windows with a memory, and frame by frame.

Shapes: B rows, T new frames, C slots of the rings of keys and values, S = C + T (or C, where the new frame is written into its slot), H
heads, D head width, E width.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.moshi.modeling_moshi import MoshiAttention, apply_rotary_pos_emb, eager_attention_forward

from .configuration_moshi_ttt import MoshiTTTConfig
from .rings import KeyValues, write_frame


class Frames(NamedTuple):
    """What every layer needs to know of the frames passing through: positions, visibility, and which rows start anew."""

    implementation: str | None  # of attention
    rotary: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [B or 1, T, D]
    visible: torch.Tensor | None  # [B or 1, 1, T, S], as the attention implementation takes it; None: plainly causal
    positions: torch.Tensor  # [B, T]
    mask: torch.Tensor | None  # [B, T] bool, frames that are there
    reset_mask: torch.Tensor | None  # [B] bool, rows whose TTT memory starts anew
    slot: torch.Tensor | None  # [B] where a single frame without gradients is written into the rings; None: all keys are joined


class MoshiTTTProjection(nn.Module):
    """A linear map under the name that transformers' `MoshiLinear` gives it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def extra_repr(self) -> str:
        """What PEFT shows of a module that it cannot adapt."""
        return r"in LoRA's `target_modules` name its `linear`, as in r'decoder\..*\.self_attn\.(q|v)_proj\.linear'"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.linear(x)
        return projected


class MoshiTTTAttention(MoshiAttention):
    """Moshi's attention; the past goes in and the new keys and values come out by argument, so that it can be recomputed in backward."""

    def __init__(self, config: MoshiTTTConfig, layer_idx: int):
        super().__init__(config, layer_idx, use_rope=False)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, MoshiTTTProjection(getattr(self, name).linear))

    def forward(
        self, hidden_states: torch.Tensor, frames: Frames, past: KeyValues | None
    ) -> tuple[torch.Tensor, KeyValues, torch.Tensor | None]:
        """`[B, T, E]` -> `[B, T, E]`; the new keys and values `[B, H, T, D]`, or the rings with them where `frames.slot` is given; and what
        eager attention gives of its weights, `[B, H, T, S]`."""
        q, k, v = (  # [B, H, T, D]
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *frames.rotary)
        new = k, v
        if past is not None and frames.slot is not None:
            new = k, v = write_frame(past[0], k, frames.slot), write_frame(past[1], v, frames.slot)
        elif past is not None:
            # A loaded memory may be of another dtype than this model.
            k, v = torch.cat([past[0].to(k.dtype), k], dim=2), torch.cat([past[1].to(v.dtype), v], dim=2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(frames.implementation, eager_attention_forward)  # type: ignore[arg-type]
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(self, q, k, v, frames.visible, dropout=dropout, scaling=self.scaling)  # [B, T, H, D]
        return self.o_proj(attended.flatten(2)), new, weights


def rotary_embedding(positions: torch.Tensor, config: MoshiTTTConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary positions `[B, T]` -> `[B, T, D]` twice.

    The frequencies are float32 whatever the model's dtype: in bfloat16 they are off by a tenth beyond a thousand frames.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)  # type: ignore[index,operator]
    angles = positions[..., None].float() * frequencies  # [B, T, D / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def visible_keys(positions: torch.Tensor, key_positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """`[B, 1, T, C + T]` bool: frame t sees keys of the last `window` frames up to itself; keys at position -1 are seen by nobody.
    Without a window it sees all of them up to itself.

    Args:
        positions: `[B, T]` of the new frames.
        key_positions: `[B, C + T]` of the remembered frames and then the new ones.
    """
    distance = positions[:, :, None] - key_positions[:, None]  # [B, T, C + T]
    visible = (distance >= 0) & (key_positions >= 0)[:, None]
    if window is not None:
        visible = visible & (distance < window)
    # A frame of padding sees itself, so that no softmax runs over nothing.
    num_frames, num_keys = positions.shape[1], key_positions.shape[1]
    itself = (
        torch.arange(num_keys, device=positions.device) == torch.arange(num_keys - num_frames, num_keys, device=positions.device)[:, None]
    )
    return (visible | itself)[:, None]


def as_implemented(visible: torch.Tensor, implementation: str | None, dtype: torch.dtype) -> torch.Tensor:
    """The mask as the attention implementation takes it: bool for sdpa, a number added to the scores for eager."""
    if implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)

"""Moshi's delay pattern: which frame of which codebook stands at which step.

Shapes: B batch, S streams, T frames (12.5 a second), M the largest delay. Stream s at step t carries frame `t - delays[s]`.

A stream of windows needs what came just before it: every function takes the last frames as `history`, so that a recording in one
piece and in any number of windows give the same numbers.
"""

import torch

from .errors_moshi_ttt import MoshiTTTError


def delay(codes: torch.Tensor, delays: list[int], history: torch.Tensor) -> torch.Tensor:
    """Shift every stream to the right by its delay.

    Args:
        codes: `[B, S, T]`, aligned in time.
        delays: one delay in frames, 0 or more, for each stream.
        history: `[B, S, H]` with H at least the largest delay, the frames before `codes`; before a recording: the initial token
            (inputs) or -100 (labels).

    Returns:
        `[B, S, T]`: stream s at step t holds frame `t - delays[s]`.

    Raises:
        ValueError: the number of delays or the length of the history does not fit.
    """
    frames, before = codes.shape[-1], history.shape[-1]
    if len(delays) != codes.shape[1]:
        raise MoshiTTTError(f"`delays` holds {len(delays)} entries for {codes.shape[1]} streams; give one for each.")
    if before < max(delays):
        raise MoshiTTTError(f"`history` holds {before} frames, fewer than the largest delay, {max(delays)}.")
    whole = torch.cat([history, codes], dim=-1)  # [B, S, H + T]
    return torch.stack([whole[:, s, before - d : before - d + frames] for s, d in enumerate(delays)], dim=1)


def undelay(values: torch.Tensor, delays: list[int], fill: float | int) -> torch.Tensor:
    """Bring delayed codes `[B, S, T]` or logits `[B, S, T, card]` back to frame time.

    Frame t of stream s is read at step `t + delays[s]`; the last `delays[s]` frames have not been reached and are set to `fill`
    (see [`undelay_mask`]).
    """
    if len(delays) != values.shape[1]:
        raise MoshiTTTError(f"`delays` holds {len(delays)} entries for {values.shape[1]} streams; give one for each.")
    aligned = torch.full_like(values, fill)
    for s, d in enumerate(delays):
        aligned[:, s, : values.shape[2] - d] = values[:, s, d:]
    return aligned


def undelay_mask(num_frames: int, delays: list[int], device: torch.device | str | None = None) -> torch.Tensor:
    """`[S, T]` bool: the frames of each stream that [`undelay`] can read from `num_frames` steps."""
    steps = torch.arange(num_frames, device=device) + torch.tensor(delays, device=device)[:, None]  # [S, T]
    return steps < num_frames


def last_frames(codes: torch.Tensor, history: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The history for the next window: the last H frames of `history` and then `codes`.

    Args:
        codes: `[B, S, T]`.
        history: `[B, S, H]`.
        lengths: `[B]` how many frames of each row of `codes` count (the rest is padding on the right); all of them when None.
    """
    whole, keep = torch.cat([history, codes], dim=-1), history.shape[-1]
    if lengths is None:
        return whole[..., whole.shape[-1] - keep :]
    index = lengths[:, None] + torch.arange(keep, device=codes.device)  # [B, H]
    return whole.gather(-1, index[:, None].expand(-1, codes.shape[1], -1))

"""Keys and values in rings: position p stands in slot p mod C, so that a frame is written in place and nothing moves.

Shapes: B rows, H heads, C slots, S kept frames, T new frames, D head width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

KeyValues = tuple[torch.Tensor, torch.Tensor]
SMALLEST_RING = 16  # slots; a ring doubles until it holds the window


def ring_positions(frames: torch.Tensor, start: torch.Tensor, capacity: int) -> torch.Tensor:
    """`[B, C]`: the last position below `frames` `[B]` that has each slot, or -1 where it lies before `start` `[B]`."""
    last = frames[:, None] - 1
    positions = last - (last - torch.arange(capacity, device=frames.device)) % capacity
    return positions.masked_fill(positions < start[:, None], -1)


def write_frame(ring: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The ring `[B, H, C, D]` with the keys or values of one frame `[B, H, 1, D]` in slot `[B]` of each row; in place where it can be."""
    frozen = not torch.compiler.is_compiling() and ring.is_inference() and not torch.is_inference_mode_enabled()
    if ring.dtype != new.dtype or frozen:
        ring = ring.to(new.dtype, copy=True)
    return ring.scatter_(2, slot[:, None, None, None].expand_as(new), new)


def ring_size(max_frames: int, window: int) -> int:
    """Slots so that the frame after `max_frames` has one."""
    return min(window, 1 << max(SMALLEST_RING - 1, max_frames).bit_length())


def pad_ring(ring: torch.Tensor, capacity: int) -> torch.Tensor:
    """More slots behind those of a ring that has not turned yet."""
    return F.pad(ring, (0, 0, 0, capacity - ring.shape[2]))


def store_frames(past: KeyValues | None, new: KeyValues, positions: torch.Tensor, frames: torch.Tensor) -> KeyValues:
    """Rings of `positions` `[B, C]` with new keys and values `[B, H, T, D]` of the positions from `frames` `[B]` on."""
    index = (positions - frames[:, None])[:, None, :, None]  # [B, 1, C, 1]
    rings = []
    for old, x in zip(past or (None, None), new):
        taken = x.gather(2, index.clamp(0, x.shape[2] - 1).expand(-1, x.shape[1], -1, x.shape[3]))
        rest = 0.0 if old is None else pad_ring(old, positions.shape[1]).to(x.dtype)
        rings.append(torch.where(index >= 0, taken, rest))
    return rings[0], rings[1]


def in_order(ring: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` of these positions `[B, S]`, zeros where they are not seen."""
    slots = (positions % ring.shape[2])[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])
    return ring.gather(2, slots).masked_fill(~seen[:, None, :, None], 0)


def in_ring(kept: torch.Tensor, positions: torch.Tensor, capacity: int) -> torch.Tensor:
    """The way back: `[B, H, S, D]` of positions `[B, S]` (-1: none) into a ring `[B, H, C, D]`."""
    slots = torch.where(positions >= 0, positions % capacity, capacity)[:, None, :, None].expand_as(kept)
    ring = kept.new_zeros(*kept.shape[:2], capacity + 1, kept.shape[3])  # the last slot takes what is not seen
    return ring.scatter_(2, slots, kept)[:, :, :capacity].contiguous()


def put_row(own: KeyValues | None, new: KeyValues | None, index: torch.Tensor, rows: int, capacity: int) -> KeyValues | None:
    """Rings of `rows` rows and `capacity` slots with those of one row at `index` `[1]`."""
    some = own or new
    if some is None:
        return None
    rings = []
    for i, x in enumerate(some):
        into = pad_ring(own[i], capacity) if own else x.new_zeros(rows, x.shape[1], capacity, x.shape[3])
        row = pad_ring(new[i], capacity) if new else into.new_zeros(1, *into.shape[1:])
        rings.append(into.index_copy(0, index, row.to(into.dtype)))
    return rings[0], rings[1]

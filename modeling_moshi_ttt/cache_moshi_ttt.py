"""Everything that a stream of Moshi-TTT remembers between two calls, per batch row.

Three memories side by side: the attention window's keys and values, the TTT layers' fast weights, and the last frames that the delay
pattern still needs. Nothing of a stream lives anywhere else, so that two streams share a model without knowing of each other.

A [`CacheState`] never changes: a forward pass makes the next one and puts it in place with one assignment, when all else has succeeded.
Keys and values stand in rings: position p is in slot p mod C. A single frame is written into its ring in place, which changes no state:
until the frame counts, its slot is one that nobody sees.

Shapes: B rows, H heads, C slots of a ring (at most the window), S kept frames, D head width, K streams, M frames of history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .delay_pattern import last_frames
from .errors_moshi_ttt import MoshiTTTError
from .frames_moshi_ttt import initial_tokens
from .rings import KeyValues, in_order, in_ring, pad_ring, put_row, ring_positions, ring_size, store_frames
from .rows import Entry, check_entries, check_names, row_mask
from .tokens_moshi_ttt import IGNORED
from .ttt_state import TTTState, saved_entries

NO_WINDOW = 2**62  # frames, where attention sees everything
HISTORY = ("frames", "codes", "labels")


@dataclass(frozen=True, eq=False)
class CacheState:
    """What a cache holds at one moment.

    Attributes:
        frames: `[B]` int64, frames each row has heard since its start.
        attention_start: `[B]` int64, the first position that attention may still see.
        codes: `[B, 1 + K + K_user, M + 1]` the last aligned frames, M the largest delay; initial tokens before the start.
        labels: `[B, P, M]` the last audio labels; -100 before the start.
        key_values: per layer keys and values, `[B, H, C, D]` each; None before the first frame.
        ttt_states: per layer; None where a layer has no TTT layer, and before the first frame.
        reset_mask: `[B]` bool, rows to which the model gives its initial fast weights at their next frame; None: no row.
        max_frames: at least the largest of `frames`, or the window; known to the host, which then need not read it from the device.
    """

    frames: torch.Tensor
    attention_start: torch.Tensor
    codes: torch.Tensor
    labels: torch.Tensor
    key_values: tuple[KeyValues | None, ...]
    ttt_states: tuple[TTTState | None, ...]
    reset_mask: torch.Tensor | None = None
    max_frames: int = 0

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CacheState:
        """The state with every tensor changed."""
        return CacheState(
            change(self.frames),
            change(self.attention_start),
            change(self.codes),
            change(self.labels),
            key_values=tuple(None if past is None else (change(past[0]), change(past[1])) for past in self.key_values),
            ttt_states=tuple(None if state is None else state.map(change) for state in self.ttt_states),
            reset_mask=None if self.reset_mask is None else change(self.reset_mask),
            max_frames=self.max_frames,
        )


class MoshiTTTCacheLayer(CacheLayerMixin):
    """One layer's part of a [`MoshiTTTCache`], to be read."""

    is_sliding = True

    def __init__(self, cache: MoshiTTTCache, layer_idx: int):
        self._cache, self._layer_idx = cache, layer_idx

    @property
    def past(self) -> KeyValues | None:
        """The rings of keys and values, `([B, H, C, D], [B, H, C, D])`, or None before the first frame."""
        return self._cache.state.key_values[self._layer_idx]

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self.past is None else self.past[0]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self.past is None else self.past[1]

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.past is not None

    @property
    def ttt_state(self) -> TTTState | None:
        return self._cache.state.ttt_states[self._layer_idx]

    def get_seq_length(self) -> int:
        """Frames that attention still sees, at most the window less one."""
        state = self._cache.state
        return min(int((state.frames - state.attention_start).max()), self._cache.sliding_window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self._cache.sliding_window == NO_WINDOW else self._cache.sliding_window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("A Moshi-TTT cache is written by its model's forward alone.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValues:
        raise NotImplementedError("A Moshi-TTT cache is written by its model's forward alone.")


class MoshiTTTCache(Cache):
    """The memory of a batch of streams.

    Args:
        config: `MoshiTTTConfig`.
        batch_size: rows; each is a stream of its own and may stand at its own frame.
        device: where positions and history live.

    Attributes:
        state: what it holds now, a [`CacheState`].
    """

    layers: list[MoshiTTTCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: Any, batch_size: int, device: torch.device | str | None = None):
        if batch_size < 1:
            raise MoshiTTTError(f"`batch_size={batch_size}` must be at least 1.")
        self.sliding_window, self.ttt_layers = config.sliding_window or NO_WINDOW, list(config.ttt_layers)
        self._heads = (config.num_key_value_heads, config.head_dim)
        self._inner = (config.ttt_num_heads, config.ttt_head_dim, 4 * config.ttt_head_dim if config.ttt_mixer == "mlp" else None)
        self._mini_batch_size = config.ttt_mini_batch_size
        self._label_shape = (config.num_predicted_codebooks, max(config.delays))
        self.initial_tokens = initial_tokens(config, device)  # [1 + K + K_user, M + 1]
        super().__init__(layers=[MoshiTTTCacheLayer(self, i) for i in range(config.num_hidden_layers)])
        self.state = self._empty(batch_size)

    def _empty(self, batch_size: int) -> CacheState:
        device = self.initial_tokens.device
        zeros, none = torch.zeros(batch_size, dtype=torch.long, device=device), (None,) * len(self.layers)
        codes = self.initial_tokens.expand(batch_size, -1, -1)
        return CacheState(zeros, zeros, codes, torch.full((batch_size, *self._label_shape), IGNORED, device=device), none, none)

    @property
    def batch_size(self) -> int:
        return self.state.frames.shape[0]

    @property
    def frames(self) -> torch.Tensor:
        """`[B]` frames heard by each row since its start."""
        return self.state.frames

    @property
    def codes(self) -> torch.Tensor:
        """`[B, 1 + K + K_user, M + 1]` the last aligned frames."""
        return self.state.codes

    @property
    def labels(self) -> torch.Tensor:
        """`[B, P, M]` the last audio labels."""
        return self.state.labels

    @property
    def capacity(self) -> int:
        """Slots of the rings; 0 before the first frame, and after [`reset_attention`]."""
        past = self.state.key_values[0]
        return 0 if past is None else past[0].shape[2]

    def ttt_state(self, layer_idx: int) -> TTTState | None:
        """The state of a layer's TTT memory; None before the first frame."""
        if layer_idx not in self.ttt_layers:
            raise MoshiTTTError(f"Layer {layer_idx} has no TTT memory; layers {self.ttt_layers} do.")
        return self.state.ttt_states[layer_idx]

    def check(self, batch_size: int, num_layers: int, ttt_layers: list[int] | str) -> None:
        """Raise a ValueError where this cache is of another batch or model."""
        if batch_size != self.batch_size:
            raise MoshiTTTError(
                f"`past_key_values` holds {self.batch_size} rows, the input {batch_size}; make a cache for this batch or reset it."
            )
        if (num_layers, ttt_layers) != (len(self.layers), self.ttt_layers):
            raise MoshiTTTError(
                f"`past_key_values` is of a model with {len(self.layers)} layers and TTT in {self.ttt_layers}; "
                f"this one has {num_layers} and TTT in {ttt_layers}."
            )

    def draft(self) -> MoshiTTTCache:
        """A cache that begins with this one's state: what a forward pass does to it becomes real with `cache.state = draft.state`."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [MoshiTTTCacheLayer(other, i) for i in range(len(self.layers))]
        return other

    def make_room(self) -> None:
        """Let the rings grow where the next frame might find no slot; what they hold stays where it is."""
        state = self.state
        capacity = self.capacity
        if not capacity or state.max_frames < capacity or capacity == self.sliding_window:
            return
        wanted = ring_size(state.max_frames, self.sliding_window)
        grown = tuple(None if past is None else (pad_ring(past[0], wanted), pad_ring(past[1], wanted)) for past in state.key_values)
        self.state = replace(state, key_values=grown)

    def fill(self, model: Any) -> None:
        """Give a cache all that it will ever hold: whole rings, and fast weights for every row. Later frames change no shape."""
        heads, dim = self._heads
        empty = torch.zeros(self.batch_size, heads, 0, dim, dtype=model.dtype, device=self.frames.device)
        rings, ttt = [], []
        for layer, past, state in zip(model.decoder.model.layers, self.state.key_values, self.state.ttt_states):
            keys, values = past or (empty, empty)
            rings.append((pad_ring(keys, self.sliding_window), pad_ring(values, self.sliding_window)))
            with torch.no_grad():
                some = state if state is not None or layer.ttt is None else layer.ttt.initial_state(self.batch_size)
            ttt.append(None if some is None else some.filled(self._mini_batch_size))
        self.state = replace(self.state, key_values=tuple(rings), ttt_states=tuple(ttt), max_frames=self.sliding_window)

    def key_positions(self) -> torch.Tensor:
        """`[B, C]` the position in each slot of the rings, -1 where attention sees nothing."""
        return ring_positions(self.state.frames, self.state.attention_start, self.capacity)

    def advance(self, outputs: Sequence[Any], num_frames: int, lengths: torch.Tensor | None, in_place: bool) -> None:
        """Take in what a forward pass over T frames has left.

        Args:
            outputs: of every layer, its `key_values` and its `ttt_state`.
            lengths: `[B]` frames that count in each row; all of them when None.
            in_place: whether `key_values` are the rings with the frame in its slot; else they are of the new frames, `[B, H, T, D]`.
        """
        state = self.state
        frames = state.frames + (num_frames if lengths is None else lengths)
        # No more than the window, beyond which nothing depends on it, so that a compiled frame finds one number forever.
        longest = min(state.max_frames + num_frames, self.sliding_window)
        if in_place or (state.max_frames == 0 and lengths is None and num_frames <= self.sliding_window):
            # in the latter case the new frames are a ring already, of as many slots
            key_values = tuple(output.key_values for output in outputs)
        else:
            capacity = max(self.capacity, longest)
            positions = ring_positions(frames, state.attention_start, capacity)  # [B, C]
            key_values = tuple(
                store_frames(past, output.key_values, positions, state.frames) for past, output in zip(state.key_values, outputs)
            )
        # Where all rows have heard a frame none of them starts anew any more; otherwise only the device knows which.
        reset_mask = None if state.reset_mask is None or lengths is None else state.reset_mask & (frames == 0)
        ttt_states = tuple(output.ttt_state for output in outputs)
        self.state = replace(state, frames=frames, key_values=key_values, ttt_states=ttt_states, reset_mask=reset_mask, max_frames=longest)

    def remember(self, codes: torch.Tensor, labels: torch.Tensor | None, lengths: torch.Tensor | None) -> None:
        """Keep the last aligned frames of `codes` `[B, 1 + K + K_user, T]` and `labels` `[B, P, T]` for the delay pattern."""
        if labels is None:
            labels = torch.full((*self.labels.shape[:2], codes.shape[-1]), IGNORED, device=codes.device)
        self.state = replace(self.state, codes=last_frames(codes, self.codes, lengths), labels=last_frames(labels, self.labels, lengths))

    def reset(self, rows: Sequence[int] | torch.Tensor | None = None) -> None:
        """Start these rows (indices, or a bool tensor `[B]`; all of them when None) anew, and leave the others as they are.

        Nothing of these rows remains: keys, values and fast weights become zeros.

        Raises:
            ValueError: a row that does not exist, or a mask of another length.
        """
        chosen = None if rows is None else row_mask(rows, self.batch_size, self.frames.device)
        if chosen is None or bool(chosen.all()):
            self.state = self._empty(self.batch_size)
            return
        if not bool(chosen.any()):
            return

        def clear(x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(chosen.view(-1, *(1,) * (x.dim() - 1)), 0)

        state = self.state.map(clear)
        self.state = replace(
            state,
            codes=torch.where(chosen[:, None, None], self.initial_tokens, self.codes),
            labels=self.labels.masked_fill(chosen[:, None, None], IGNORED),
            ttt_states=tuple(None if ttt is None else replace(ttt, lockstep_frames=None) for ttt in state.ttt_states),
            reset_mask=chosen if self.state.reset_mask is None else self.state.reset_mask | chosen,
        )

    def begin_next(self, rows: torch.Tensor) -> None:
        """Let these rows (bool `[B]`) begin another recording with the TTT memory that they have: no word or code of the one before goes in.

        The attention window is `reset_attention`'s.
        """
        begins = rows.to(self.frames.device)[:, None, None]
        codes = torch.where(begins, self.initial_tokens, self.codes)
        self.state = replace(self.state, codes=codes, labels=self.labels.masked_fill(begins, IGNORED))

    def reset_attention(self) -> None:
        """Drop the attention window and keep the TTT memory, the positions and the delay history."""
        state = self.state
        self.state = replace(state, attention_start=state.frames, key_values=(None,) * len(self.layers))

    def reset_ttt(self) -> None:
        """Drop the TTT memory and keep the attention window, the positions and the delay history."""
        self.state = replace(self.state, ttt_states=(None,) * len(self.layers))

    def detach(self) -> MoshiTTTCache:
        """Cut the memory from the graph that made it, in place, as truncated backpropagation wants it; returns itself."""
        self.state = self.state.map(torch.Tensor.detach)
        return self

    def to(self, device: torch.device | str) -> MoshiTTTCache:
        """Move the memory to another device, in place; returns itself."""
        self.initial_tokens, self.state = self.initial_tokens.to(device), self.state.map(lambda tensor: tensor.to(device))
        return self

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        self.state = self.state.map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side; each then goes its own way."""
        if repeats < 1:
            raise MoshiTTTError(f"`repeats={repeats}` must be at least 1.")
        self.state = self.state.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Not to be had: the fast weights have learned from the frames that would be removed.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"`crop({tokens_to_remove})`: fast weights cannot be cut back to an earlier frame; keep a `state_dict()` of it and load that."
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The most frames any row has heard since its start (not only those kept)."""
        return int(self.frames.max())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, ready for safetensors; [`load_state_dict`] is the way back, exact to the bit.

        Keys and values are `[B, H, S, D]` in the order of their positions, those of `key_positions` `[B, S]`; S is what the row with the
        longest attention still needs.
        """
        state = self.state
        kept = min(int((state.frames - state.attention_start).max()), self.sliding_window - 1)
        positions = state.frames[:, None] + torch.arange(-kept, 0, device=state.frames.device)  # [B, S]
        seen = positions >= state.attention_start[:, None]
        fresh = torch.zeros_like(state.frames, dtype=torch.bool) if state.reset_mask is None else state.reset_mask
        tensors = {name: getattr(state, name).clone() for name in HISTORY} | {"fresh": fresh.clone()}
        tensors["key_positions"] = positions.masked_fill(~seen, -1)
        for i, (past, ttt) in enumerate(zip(state.key_values, state.ttt_states)):
            for name, ring in zip(("keys", "values"), past or ()):
                tensors[f"layers.{i}.{name}"] = in_order(ring.detach(), positions, seen)
            ttt_tensors = {} if ttt is None else ttt.tensors()
            tensors |= {f"layers.{i}.ttt.{name}": tensor.detach().contiguous().clone() for name, tensor in ttt_tensors.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what [`state_dict`] gave, on this cache's device. What is refused leaves the cache as it was.

        A state of another floating dtype goes on in the model's: keys and values are cast where they are next used.

        Raises:
            ValueError: an entry is missing, unknown, of another batch size, shape or dtype, or holds what no stream can have heard: the
                state is not of this model or not whole.
        """
        if missing := {"frames", "key_positions", "codes", "labels", "fresh"} - set(tensors):
            raise MoshiTTTError(f"the saved cache lacks {', '.join(sorted(missing))}; save it with `state_dict()`.")
        if tensors["frames"].numel() != self.batch_size:
            raise MoshiTTTError(f"the saved cache holds {tensors['frames'].numel()} rows, this one {self.batch_size}; make one of as many.")
        wanted = self._saved_entries(tensors)
        check_names("cache", tensors, wanted)
        check_entries("cache", tensors, wanted)
        self._check_values(tensors)
        # Copies: a frame is written into its ring in place.
        tensors = {name: tensor.to(self.frames.device, copy=True) for name, tensor in tensors.items()}
        frames, positions = tensors["frames"], tensors["key_positions"]
        max_frames = min(int(frames.max()), self.sliding_window)
        capacity = ring_size(max_frames, self.sliding_window)
        key_values: list[KeyValues | None] = []
        ttt_states: list[TTTState | None] = []
        for i in range(len(self.layers)):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            has_keys = "keys" in own
            key_values.append(
                (in_ring(own["keys"], positions, capacity), in_ring(own["values"], positions, capacity)) if has_keys else None
            )
            ttt = {name.removeprefix("ttt."): tensor for name, tensor in own.items() if name.startswith("ttt.")}
            ttt_states.append(TTTState.from_tensors(ttt) if ttt else None)
        reset_mask = tensors["fresh"] if bool(tensors["fresh"].any()) else None
        start = frames - (positions >= 0).sum(1)
        self.state = CacheState(
            frames, start, tensors["codes"], tensors["labels"], tuple(key_values), tuple(ttt_states), reset_mask, max_frames
        )

    def load_row(self, row: int, tensors: dict[str, torch.Tensor]) -> None:
        """Let one row go on where the [`state_dict`] of a cache of one row was taken; the others are left as they are.

        Raises:
            ValueError: as [`load_state_dict`].
        """
        one = self.draft()
        one.state = self._empty(1)
        one.load_state_dict(tensors)
        ours, theirs, index = self.state, one.state, torch.tensor([row], device=self.frames.device)
        capacity = max(self.capacity, one.capacity)
        rings = tuple(put_row(own, new, index, self.batch_size, capacity) for own, new in zip(ours.key_values, theirs.key_values))
        waiting = torch.zeros(self.batch_size, dtype=torch.bool, device=index.device) if ours.reset_mask is None else ours.reset_mask
        if any(own is None and new is not None for own, new in zip(ours.ttt_states, theirs.ttt_states)):
            waiting = torch.ones_like(waiting)  # the other rows have no fast weights yet
        starts = any(own is not None and new is None for own, new in zip(ours.ttt_states, theirs.ttt_states))
        waiting = waiting.index_fill(0, index, starts or theirs.reset_mask is not None)
        self.state = CacheState(
            **{name: getattr(ours, name).index_copy(0, index, getattr(theirs, name)) for name in (*HISTORY, "attention_start")},
            key_values=rings,
            ttt_states=tuple(_put_ttt(own, new, index, self.batch_size) for own, new in zip(ours.ttt_states, theirs.ttt_states)),
            reset_mask=waiting if bool(waiting.any()) else None,
            max_frames=max(ours.max_frames, theirs.max_frames),
        )

    def _check_values(self, tensors: dict[str, torch.Tensor]) -> None:
        """ValueError for numbers that no stream has: positions that do not lead up to its frame, or weights that are not finite."""
        frames, positions = tensors["frames"], tensors["key_positions"]
        slots = positions.shape[1]
        seen = positions >= 0
        expected = frames[:, None] + torch.arange(-slots, 0, device=frames.device)
        if bool((frames < 0).any()) or bool((seen & (positions != expected)).any()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
            raise MoshiTTTError("key_positions of the saved cache do not lead up to its frames; load what `state_dict()` gave, unchanged.")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise MoshiTTTError(f"{name} of the saved cache is not finite; go on from an earlier state.")

    def _saved_entries(self, tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
        """Every entry that a cache of this model saves where its rows stand as in `tensors`."""
        rows, slots = self.batch_size, tensors["key_positions"].numel() // self.batch_size
        if slots >= self.sliding_window:
            raise MoshiTTTError(f"the saved cache keeps {slots} frames for attention; `sliding_window={self.sliding_window}` needs fewer.")
        row, integer = (rows,), torch.int64
        wanted: dict[str, Entry] = {"frames": (row, integer), "fresh": (row, torch.bool), "key_positions": ((rows, slots), integer)}
        wanted |= {name: (tuple(getattr(self, name).shape), integer) for name in ("codes", "labels")}
        # A cache may have dropped its attention, but rows that have heard a frame have learned from it.
        attention = slots > 0 or any(name.endswith((".keys", ".values")) for name in tensors)
        learned = bool(tensors["frames"].any()) or any(".ttt." in name for name in tensors)
        heads, dim = self._heads
        state = saved_entries(rows, *self._inner, self._mini_batch_size)
        for i in range(len(self.layers)):
            if attention:
                wanted |= {f"layers.{i}.{name}": ((rows, heads, slots, dim), torch.float32) for name in ("keys", "values")}
            if learned and i in self.ttt_layers:
                wanted |= {f"layers.{i}.ttt.{name}": entry for name, entry in state.items()}
        return wanted


def check_cache(past_key_values: Any, batch_size: int, num_layers: int, ttt_layers: list[int] | str) -> None:
    """As [`MoshiTTTCache.check`], of whatever a caller gave as `past_key_values`.

    Raises:
        TypeError: it is not a MoshiTTTCache.
        ValueError: it is of another batch or model.
    """
    # By what it has, not by class: code from the Hub and the installed package each have their own MoshiTTTCache.
    if not hasattr(past_key_values, "ttt_state"):
        kind = type(past_key_values).__name__
        raise TypeError(f"`past_key_values` is a {kind}, without TTT memory; make one with `model.new_cache(batch_size={batch_size})`.")
    past_key_values.check(batch_size, num_layers, ttt_layers)


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """The memory that a caller gave by either name: `cache` is transformers' from 5.24 on.

    Raises:
        ValueError: two different ones.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise MoshiTTTError("`cache` and `past_key_values` are two names of one argument and hold different memories; give one of them.")
    return past_key_values if cache is None else cache


def _put_ttt(own: TTTState | None, new: TTTState | None, index: torch.Tensor, rows: int) -> TTTState | None:
    """The state of `rows` rows with that of one row at `index` `[1]`; rows of which nothing is known are zeros."""
    some = own or new
    if some is None:
        return None
    into = some.map(lambda x: x.new_zeros(rows, *x.shape[1:])) if own is None else own
    row = some.map(lambda x: x.new_zeros(1, *x.shape[1:])) if new is None else new
    pairs = {name: into.tensors()[name].index_copy(0, index, tensor.to(into.tensors()[name])) for name, tensor in row.tensors().items()}
    return TTTState.from_tensors(pairs)

"""Everything that a stream of Moshi-TTT remembers between two calls, per batch row.

Three memories side by side: the attention window's keys and values, the TTT layers' fast weights, and the last frames that the delay
pattern still needs. Nothing of a stream lives anywhere else, so that two streams share a model without knowing of each other.

Shapes: B rows, H heads, S kept slots (at most the window less one), D head width, K streams, M frames of history.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .delay_pattern import last_frames
from .frames_moshi_ttt import initial_tokens
from .tokens_moshi_ttt import IGNORED
from .ttt_state import Entry, TTTState, check_entries, check_names, row_mask, saved_entries

KeyValues = tuple[torch.Tensor, torch.Tensor]


class MoshiTTTCacheLayer(CacheLayerMixin):
    """One layer's part: keys and values of the attention window, and the state of its TTT layer if it has one."""

    is_sliding = True

    def __init__(self, sliding_window: int | None):
        super().__init__()
        self.sliding_window = sliding_window
        self.ttt_state: TTTState | None = None

    @property
    def past(self) -> KeyValues | None:
        """`([B, H, S, D], [B, H, S, D])`, or None before the first frame."""
        return (self.keys, self.values) if self.is_initialized else None

    def keep(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor | slice) -> None:
        """Keep these slots of all keys and values `[B, H, S + T, D]`: a slice of them, or a choice `[B, S]` for each row."""
        self.keys, self.values = _take(keys, slots), _take(values, slots)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> KeyValues:
        """Append `[B, H, T, D]`, keep the window, and return what the new frames may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        self.keep(keys, values, window_slots(keys.shape[2], self.sliding_window))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Slots kept, at most the window less one."""
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def forget_attention(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def reset(self) -> None:
        self.forget_attention()
        self.ttt_state = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the layer by name."""
        held = {"keys": self.keys, "values": self.values} if self.is_initialized else {}
        state = self.ttt_state.tensors() if self.ttt_state is not None else {}
        return {**held, **{f"ttt.{name}": tensor for name, tensor in state.items()}}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The way back from [`tensors`].

        Raises:
            ValueError: keys without values, an unknown entry, or a TTT state that is not whole.
        """
        saved = {name.removeprefix("ttt."): tensor for name, tensor in tensors.items() if name.startswith("ttt.")}
        attention = [name for name in tensors if not name.startswith("ttt.")]
        check_names("layer", attention, ("keys", "values") if attention else ())
        state = TTTState.from_tensors(saved) if saved else None
        self.reset()
        if attention:
            self.keep(tensors["keys"], tensors["values"], slice(None))
        self.ttt_state = state


class MoshiTTTCache(Cache):
    """The memory of a batch of streams.

    Args:
        config: `MoshiTTTConfig`.
        batch_size: rows; each is a stream of its own and may stand at its own frame.
        device: where positions and history live.

    Attributes:
        frames: `[B]` frames heard by each row since its start.
        key_positions: `[B, S]` the frame that each kept slot holds; -1 where a slot is empty for that row.
        codes: `[B, 1 + K + K_user, M + 1]` the last aligned frames, M the largest delay; initial tokens before the start.
        labels: `[B, K, M]` the last audio labels; -100 before the start.
    """

    layers: list[MoshiTTTCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: Any, batch_size: int, device: torch.device | str | None = None):
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
        super().__init__(layers=[MoshiTTTCacheLayer(config.sliding_window) for _ in range(config.num_hidden_layers)])
        self.sliding_window, self.ttt_layers = config.sliding_window, list(config.ttt_layers)
        self._heads = (config.num_key_value_heads, config.head_dim)
        self._inner = (config.ttt_num_heads, config.ttt_head_dim, 4 * config.ttt_head_dim if config.ttt_mixer == "mlp" else None)
        self._mini_batch_size = config.ttt_mini_batch_size
        self.initial_tokens = initial_tokens(config, device)  # [1 + K + K_user, M + 1]
        self.frames = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.key_positions = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.codes = self.initial_tokens.expand(batch_size, -1, -1)
        self.labels = torch.full((batch_size, config.num_codebooks, max(config.delays)), IGNORED, device=device)
        # Rows that start anew at their next frame, where the model gives them its initial fast weights.
        self.fresh: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.frames.shape[0]

    def ttt_state(self, layer_idx: int) -> TTTState | None:
        """The state of a layer's TTT memory; None before the first frame."""
        if layer_idx not in self.ttt_layers:
            raise ValueError(f"Layer {layer_idx} has no TTT memory; layers {self.ttt_layers} do.")
        return self.layers[layer_idx].ttt_state

    def check(self, batch_size: int, num_layers: int, ttt_layers: list[int] | str) -> None:
        """Raise a ValueError where this cache is of another batch or model."""
        if batch_size != self.batch_size:
            raise ValueError(f"`past_key_values` holds {self.batch_size} rows, the input {batch_size}; make a cache for this batch or reset it.")
        if (num_layers, ttt_layers) != (len(self.layers), self.ttt_layers):
            raise ValueError(
                f"`past_key_values` is of a model with {len(self.layers)} layers and TTT in {self.ttt_layers}; "
                f"this one has {num_layers} and TTT in {ttt_layers}."
            )

    def window(self, num_frames: int, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the next frames `[B, T]`, and of every key they may see `[B, S + T]` (-1: none)."""
        steps = torch.arange(num_frames, device=self.frames.device)
        positions = self.frames[:, None] + steps  # [B, T]
        keys = positions if lengths is None else torch.where(steps < lengths[:, None], positions, -1)
        return positions, torch.cat([self.key_positions, keys], dim=1)

    def advance(self, outputs: list, key_positions: torch.Tensor, num_frames: int, lengths: torch.Tensor | None) -> None:
        """Take in what a forward pass over T frames has left.

        Args:
            outputs: of every layer, its `key_values`, twice `[B, H, S + T, D]`, and its `ttt_state`.
            key_positions: `[B, S + T]` as [`window`] gave them.
            lengths: `[B]` frames that count in each row; all of them when None.
        """
        slots: torch.Tensor | slice = window_slots(key_positions.shape[1], self.sliding_window)
        if lengths is not None:
            # Empty slots move to the front, so that none of them drives a row's own past out of the window.
            slots = key_positions.argsort(dim=1, stable=True)[:, slots]
        for layer, output in zip(self.layers, outputs, strict=True):
            layer.keep(*output.key_values, slots)
            layer.ttt_state = output.ttt_state
        self.key_positions = key_positions[:, slots] if isinstance(slots, slice) else key_positions.gather(1, slots)
        self.frames = self.frames + (num_frames if lengths is None else lengths)
        if self.fresh is not None:
            self.fresh = self.fresh & (self.frames == 0)
            self.fresh = self.fresh if bool(self.fresh.any()) else None

    def remember(self, codes: torch.Tensor, labels: torch.Tensor | None, lengths: torch.Tensor | None) -> None:
        """Keep the last aligned frames of `codes` `[B, 1 + K + K_user, T]` and `labels` `[B, K, T]` for the delay pattern."""
        self.codes = last_frames(codes, self.codes, lengths)
        if labels is None:
            labels = torch.full((*self.labels.shape[:2], codes.shape[-1]), IGNORED, device=codes.device)
        self.labels = last_frames(labels, self.labels, lengths)

    def reset(self, rows: list[int] | torch.Tensor | None = None) -> None:
        """Start these rows (indices, or a bool tensor `[B]`; all of them when None) anew, and leave the others as they are.

        Raises:
            ValueError: a row that does not exist, or a mask of another length.
        """
        device = self.frames.device
        chosen = torch.ones(self.batch_size, dtype=torch.bool, device=device) if rows is None else row_mask(rows, self.batch_size, device)
        if not bool(chosen.any()):
            return
        if bool(chosen.all()):
            for layer in self.layers:
                layer.reset()
            self.key_positions, self.fresh = self.key_positions[:, :0], None
        else:
            self.key_positions = self.key_positions.masked_fill(chosen[:, None], -1)
            self.fresh = chosen if self.fresh is None else self.fresh | chosen
        self.frames = self.frames.masked_fill(chosen, 0)
        self.codes = torch.where(chosen[:, None, None], self.initial_tokens, self.codes)
        self.labels = self.labels.masked_fill(chosen[:, None, None], IGNORED)

    def forget_attention(self) -> None:
        """Drop the attention window and keep the TTT memory, the positions and the delay history."""
        for layer in self.layers:
            layer.forget_attention()
        self.key_positions = self.key_positions[:, :0]

    def detach(self) -> "MoshiTTTCache":
        """Cut the memory from the graph that made it, in place, as truncated backpropagation wants it; returns itself."""
        return self._map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> "MoshiTTTCache":
        """Move the memory to another device, in place; returns itself."""
        self.initial_tokens = self.initial_tokens.to(device)
        return self._map(lambda tensor: tensor.to(device))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side; each then goes its own way."""
        if repeats < 1:
            raise ValueError(f"`repeats={repeats}` must be at least 1.")
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

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
        """Every tensor by name, ready for safetensors; [`load_state_dict`] is the way back, exact to the bit."""
        tensors = {name: getattr(self, name).contiguous() for name in ("frames", "key_positions", "codes", "labels")}
        tensors["fresh"] = torch.zeros_like(self.frames, dtype=torch.bool) if self.fresh is None else self.fresh
        for i, layer in enumerate(self.layers):
            tensors.update({f"layers.{i}.{name}": tensor.detach().contiguous() for name, tensor in layer.tensors().items()})
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what [`state_dict`] gave, on this cache's device. What is refused leaves the cache as it was.

        A state of another floating dtype goes on in the model's: keys and values are cast where they are next used.

        Raises:
            ValueError: an entry is missing, unknown, or of another batch size, shape or dtype: the state is not of this model or not whole.
        """
        missing = {"frames", "key_positions", "codes", "labels", "fresh"} - set(tensors)
        if missing:
            raise ValueError(f"the saved cache lacks {', '.join(sorted(missing))}; save it with `state_dict()`.")
        if tensors["frames"].numel() != self.batch_size:
            raise ValueError(f"the saved cache holds {tensors['frames'].numel()} rows, this one {self.batch_size}; make one of as many.")
        wanted = self._saved_entries(tensors)
        check_names("cache", tensors, wanted)
        check_entries("cache", tensors, wanted)
        tensors = {name: tensor.to(self.frames.device) for name, tensor in tensors.items()}
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            layer.load_tensors({name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
        for name in ("frames", "key_positions", "codes", "labels"):
            setattr(self, name, tensors[name])
        self.fresh = tensors["fresh"] if bool(tensors["fresh"].any()) else None

    def _saved_entries(self, tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
        """Every entry that a cache of this model saves where its rows stand as in `tensors`."""
        rows, slots = self.batch_size, tensors["key_positions"].numel() // self.batch_size
        if self.sliding_window is not None and slots >= self.sliding_window:
            raise ValueError(f"the saved cache keeps {slots} frames for attention; `sliding_window={self.sliding_window}` needs fewer.")
        row, integer = (rows,), torch.int64
        wanted: dict[str, Entry] = {"frames": (row, integer), "fresh": (row, torch.bool), "key_positions": ((rows, slots), integer)}
        wanted |= {name: (tuple(getattr(self, name).shape), integer) for name in ("codes", "labels")}
        # A cache may have forgotten its attention, but rows that have heard a frame have learned from it.
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

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MoshiTTTCache":
        self.frames, self.key_positions, self.codes, self.labels = (
            change(tensor) for tensor in (self.frames, self.key_positions, self.codes, self.labels)
        )
        self.fresh = None if self.fresh is None else change(self.fresh)
        for layer in self.layers:
            layer.load_tensors({name: change(tensor) for name, tensor in layer.tensors().items()})
        return self


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
        raise ValueError("`cache` and `past_key_values` are two names of one argument and hold different memories; give one of them.")
    return past_key_values if cache is None else cache


def window_slots(length: int, sliding_window: int | None) -> slice:
    """The slots that the next frame can still see: the last `sliding_window - 1` of `length`, all of them without a window."""
    return slice(0 if sliding_window is None else max(length - sliding_window + 1, 0), length)


def _take(tensor: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
    if isinstance(slots, slice):
        return tensor[:, :, slots]
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

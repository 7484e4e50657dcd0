"""A batch of live conversations: a stream hears one frame of the user and answers with one of its own, for as long as they last.

Shapes: B rows, K Moshi's codebooks, K_user the user's, M the largest delay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_moshi_ttt import MoshiTTTCache
from .delay_pattern import delay
from .errors_moshi_ttt import MoshiTTTError
from .frames_moshi_ttt import check_shape, check_tokens
from .rows import Entry, InUse, active_rows, check_entries, check_names, one_at_a_time, row_mask, without_gradients
from .sampling_moshi_ttt import SETTINGS, Sampling, make_seeds
from .tokens_moshi_ttt import UNGENERATED, ZERO

CACHE = "past_key_values."  # before the names of the cache's entries in a saved stream
SAMPLING = "sampling."


class MoshiTTTFrame(NamedTuple):
    """One complete frame of 80 ms, text and audio of the same instant.

    Where `valid` is False (the row's delay still fills, it was not active, or it is sick) tokens are -2.
    """

    text: Tensor  # [B]
    audio_codes: Tensor  # [B, K]
    valid: Tensor  # [B] bool


class LogitsHooks(NamedTuple):
    """What changes logits before tokens are chosen from them, of the rows as they are given. The model's own logits decide about health."""

    text: Callable[[Tensor], Tensor]  # [B, V] -> [B, V]
    audio: Callable[[Tensor, int], Tensor]  # [B, card] of the codebook with this number -> [B, card]


NO_HOOKS = LogitsHooks(lambda logits: logits, lambda logits, codebook: logits)


@dataclass(frozen=True, eq=False)
class StreamState:
    """What a stream holds at one moment beside its cache; a step makes the next one and puts it in place when all has succeeded.

    Attributes:
        calls: `[B]` int64, steps of each row since its start.
        said: `[B, 1 + K, M + 1]` raw tokens of the last calls, newest last.
        heard: `[B, K_user, M + 1]` what was heard in them.
        seeds: `[B]` int64.
        sick: `[B]` bool, rows in which numbers were not finite or codes out of range; they say nothing until they are reset.
        ahead: `[B, 1 + K + K_user, max(M, 1)]` what a prompt's last frames still have to say and to be heard in the next calls, since
            codebooks are late; -2 where the model chooses, and where the call's own codes are heard.
    """

    calls: Tensor
    said: Tensor
    heard: Tensor
    seeds: Tensor
    sick: Tensor
    ahead: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def where(self, rows: Tensor, other: StreamState) -> StreamState:
        """This state in `rows` `[B]` bool, the other one elsewhere."""
        pairs = ((name, own, getattr(other, name)) for name, own in self.tensors().items())
        return StreamState(**{name: torch.where(rows.view(-1, *(1,) * (own.dim() - 1)), own, old) for name, own, old in pairs})


class MoshiTTTStream:
    """A batch of live conversations with one model. All their memory is in `state` and `past_key_values`; the model keeps nothing.

    Time, as in Kyutai's LMGen, calls counted from 0: call 0 runs before anything is heard, so the user's codes it is given are dropped
    (call [`step`] with nothing once, before the first sound); call s hears the user's frame `s - 1` and returns Moshi's frame `s - M`,
    text and audio of the same instant. The first M calls return no complete frame, and M calls more bring the tail after the last one.
    With Moshi's delays M is 1: the call that hears the user's frame t returns Moshi's frame t.
    After a prompt of P frames this goes on at call P: it hears the prompt's last frame of the user, so that the codes it is given are
    dropped too, and returns the prompt's frame P - M.

    A row depends on nothing but its own past and its seed. A step that raises has changed nothing.

    Args:
        model: `MoshiTTTForConditionalGeneration`.
        batch_size: rows.
        sampling: how tokens are chosen.
        seeds: one a row, see [`make_seeds`].
        generator: what seeds are drawn from where none are given, also by [`reset`].
        past_key_values: what the rows have heard and said before, as a forward pass leaves it; the stream takes it for its own.
        hooks: what changes logits before tokens are chosen from them.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int,
        sampling: Sampling,
        seeds: Any = None,
        generator: torch.Generator | None = None,
        past_key_values: MoshiTTTCache | None = None,
        hooks: LogitsHooks = NO_HOOKS,
    ):
        self.model, self.sampling, self.generator, self.hooks = model, sampling, generator, hooks
        self.in_use = InUse()
        self.past_key_values: MoshiTTTCache = model.new_cache(batch_size) if past_key_values is None else past_key_values
        self.compiled = hasattr(model, "compiled_frame") and hooks == NO_HOOKS
        if self.compiled:
            self.past_key_values.fill(model)
        self.seeded = seeds is not None
        device = self.past_key_values.frames.device
        self._delays = torch.tensor(model.config.delays, device=device)
        self._own = 1 + model.config.num_codebooks
        self.state = self._empty(make_seeds(seeds, batch_size, device, generator))
        if past_key_values is not None:
            self.state = self._after(past_key_values)

    def _empty(self, seeds: Tensor) -> StreamState:
        config, rows = self.model.config, seeds.shape[0]
        depth = max(config.delays) + 1
        return StreamState(
            calls=torch.zeros_like(seeds),
            said=seeds.new_full((rows, self._own, depth), UNGENERATED),
            heard=seeds.new_full((rows, config.num_user_codebooks, depth), ZERO),
            seeds=seeds,
            sick=torch.zeros_like(seeds, dtype=torch.bool),
            ahead=seeds.new_full((rows, len(config.delays), max(depth - 1, 1)), UNGENERATED),
        )

    def _after(self, cache: MoshiTTTCache) -> StreamState:
        """The state of rows that have heard the frames of a cache; its `codes` are the last of them."""
        state, codes, delays = self.state, cache.codes, self.model.config.delays
        width, unknown = codes.shape[-1], torch.full_like(cache.codes, UNGENERATED)
        # Frames in delayed time, as calls say them: the last M + 1 calls, and what is late for those to come.
        line = delay(torch.cat([codes, torch.full_like(state.ahead, UNGENERATED)], dim=-1), delays, unknown)
        said, ahead = line[:, : self._own, :width], line[..., width:].clone()
        # Call s hears the user's frame s - 1.
        user = codes[:, self._own :]
        ahead[:, self._own :] = UNGENERATED
        ahead[:, self._own :, 0] = user[..., -1]
        heard = torch.cat([torch.full_like(user[..., :1], ZERO), user[..., :-1]], dim=-1)
        heard = heard.masked_fill(heard == self.model.config.audio_vocab_size, ZERO)  # before the start nothing was
        after = replace(state, calls=cache.frames, said=said, heard=heard, ahead=ahead)
        return after.where(cache.frames > 0, state)

    @property
    def batch_size(self) -> int:
        return self.state.calls.shape[0]

    @property
    def device(self) -> torch.device:
        return self.state.calls.device

    def problems(self) -> dict[int, str]:
        """What is wrong with each sick row, by its number. Such a row says nothing until it is [`reset`]; the others are untouched."""
        sick = self.state.sick.nonzero()[:, 0].tolist()
        return {row: "its logits are not finite, or its codes were out of range; reset the row" for row in sick}

    @one_at_a_time
    @without_gradients
    def step(self, user_codes: Tensor | None = None, active: Any = None, forced: Tensor | None = None) -> MoshiTTTFrame:
        """Hear one frame of the user, and return the newest complete frame, M calls back.

        Args:
            user_codes: `[B, K_user]` codes, or -1 for none; all of them when None. -1 is heard, as a channel that is absent: the frame counts.
                To let a row wait for a packet that is late, pause it by `active`.
            active: `[B]` bool; a row that is not active is paused: it keeps its whole state and says nothing. All rows when None.
            forced: `[B, 1 + K]` the text token and codes that this call says, in delayed time: as they are (-1: none), or chosen by the
                model for -2.

        Raises:
            ValueError: wrong shapes, or tokens out of range.
        """
        state, ahead = self.state, self.state.ahead[..., 0]
        heard, out_of_range = self._check_heard(user_codes)
        heard = torch.where(ahead[:, self._own :] > UNGENERATED, ahead[:, self._own :], heard)
        late = ahead[:, : self._own]
        if forced is not None:
            forced = self._check_forced(forced).to(self.device)
            late = torch.where(forced > UNGENERATED, forced, late)
        if active is None and self.compiled:
            active = [True] * self.batch_size  # one graph for both
        active = None if active is None else active_rows(active, self.batch_size, self.device)
        said, sick, cache = self._run(heard, late, active)
        after = StreamState(
            calls=state.calls + 1,
            said=torch.cat([state.said[..., 1:], said[..., None]], dim=-1),
            heard=torch.cat([state.heard[..., 1:], heard[..., None]], dim=-1),
            seeds=state.seeds,
            sick=state.sick | sick if out_of_range is None else state.sick | sick | out_of_range,
            ahead=torch.cat([state.ahead[..., 1:], torch.full_like(state.ahead[..., :1], UNGENERATED)], dim=-1),
        )
        valid = (state.calls >= after.said.shape[-1] - 1) & ~after.sick
        if active is not None:
            after, valid = after.where(active, state), valid & active
        # A frame's token of delay d was said d calls after its text: index d of the last M + 1 calls.
        complete = after.said.gather(2, self._delays[: self._own].expand(self.batch_size, -1)[..., None])[..., 0]
        complete = complete.masked_fill(~valid[:, None], UNGENERATED)
        # In one statement, so that no interrupt leaves one of them behind.
        self.state, self.past_key_values.state = after, cache.state
        return MoshiTTTFrame(complete[:, 0], complete[:, 1:], valid)

    def _run(self, heard: Tensor, forced: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor, MoshiTTTCache]:
        """The tokens `[B, 1 + K]` of this call, the rows `[B]` whose logits are not finite, and the cache after it."""
        state, cache = self.state, self.past_key_values.draft()
        inputs = (self.model, self._inputs(heard), forced, active, cache, self.sampling, state.seeds, state.calls)
        said, sick = self.model.compiled_frame(*inputs) if self.compiled else frame(*inputs, self.hooks)
        return said, sick, cache

    def _inputs(self, heard: Tensor) -> Tensor:
        """`[B, S]`: what this call's step runs on, initial tokens where a stream's delay has not passed."""
        state = self.state
        history = torch.cat([state.heard[..., 1:], heard[..., None]], dim=-1)
        late = (history.shape[-1] - 1 - self._delays[self._own :]).expand(self.batch_size, -1)
        tokens = torch.cat([state.said[..., -1], history.gather(2, late[..., None])[..., 0]], dim=1)
        begun = state.calls[:, None] > self._delays
        return torch.where(begun, tokens, self.past_key_values.initial_tokens[:, 0])

    @one_at_a_time
    def reset(self, rows: Sequence[int] | Tensor | None = None, seeds: Any = None) -> None:
        """Start these rows (indices, or a bool tensor; all when None) as new conversations; the others go on undisturbed.

        Args:
            seeds: one for each of these rows. When None, a stream that was given seeds keeps them, and another draws new ones.

        Raises:
            ValueError: a row that does not exist, a mask of another length, or a wrong seed.
        """
        chosen = row_mask(range(self.batch_size) if rows is None else rows, self.batch_size, self.device)
        fresh = self.state.seeds
        if seeds is not None or not self.seeded:
            fresh = fresh.masked_scatter(chosen, make_seeds(seeds, int(chosen.sum()), self.device, self.generator))
        cache = self.past_key_values.draft()
        cache.reset(chosen)
        self.model.start_rows(cache)
        if self.compiled and not cache.capacity:
            cache.fill(self.model)
        after = self._empty(fresh).where(chosen, self.state)
        self.state, self.past_key_values.state = after, cache.state

    @one_at_a_time
    def row_state(self, row: int) -> dict[str, Tensor]:
        """One conversation as tensors by name, with its seed and sampling settings; [`load_row`] takes it up, here or elsewhere.

        Raises:
            ValueError: a row that does not exist, or one that is sick.
        """
        index = row_mask([row], self.batch_size, self.device).nonzero()[:, 0]
        if bool(self.state.sick[index]):
            raise MoshiTTTError(f"row {row} is sick: {self.problems()[row]}.")
        cache = self.past_key_values.draft()
        cache.batch_select_indices(index)
        own = {name: tensor[index] for name, tensor in self._own_tensors().items()}
        return own | {CACHE + name: tensor for name, tensor in cache.state_dict().items()}

    @one_at_a_time
    def load_row(self, row: int, state: dict[str, Tensor]) -> None:
        """Let a row go on where [`row_state`] was taken, of this stream or of another one of the same model, whatever its batch size.

        What is refused leaves the stream as it was.

        Raises:
            ValueError: a row that does not exist, or a state that is not whole, not of this model, or one that no stream can have been in.
        """
        index = row_mask([row], self.batch_size, self.device).nonzero()[:, 0]
        self._check(state, 1)
        cache = self.past_key_values.draft()
        cache.load_row(row, {name.removeprefix(CACHE): tensor for name, tensor in state.items() if name.startswith(CACHE)})

        def put(name: str, into: Tensor) -> Tensor:
            return into.index_copy(0, index, state[name].to(into))

        own = StreamState(**{name: put(name, tensor) for name, tensor in self.state.tensors().items()})
        sampling = Sampling.of({name: put(SAMPLING + name, tensor) for name, tensor in self.sampling.tensors().items()})
        self.state, self.sampling, self.past_key_values.state = own, sampling, cache.state

    @one_at_a_time
    def state_dict(self) -> dict[str, Tensor]:
        """The whole stream as tensors by name, ready for safetensors: all rows, their seeds and their settings."""
        return {name: tensor.clone() for name, tensor in self._own_tensors().items()} | {
            CACHE + name: tensor for name, tensor in self.past_key_values.state_dict().items()
        }

    @one_at_a_time
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on exactly where [`state_dict`] was taken, on the model's device. What is refused leaves the stream as it was.

        A stream saved by version 0.1 has no seeds and settings of its own; it goes on with this stream's.

        Raises:
            ValueError: an entry is missing, unknown, of another batch size, shape or dtype, or holds what no stream can have been in.
        """
        if "seeds" not in tensors and "calls" in tensors:
            kept = {name: tensor for name, tensor in self._own_tensors().items() if name not in ("calls", "said", "heard")}
            kept["ahead"] = torch.full_like(self.state.ahead, UNGENERATED)
            tensors = {name: tensor for name, tensor in tensors.items() if name != "generator"} | kept
        self._check(tensors, self.batch_size)
        cache = self.past_key_values.draft()
        cache.load_state_dict({name.removeprefix(CACHE): tensor for name, tensor in tensors.items() if name.startswith(CACHE)})
        own = StreamState(**{name: tensors[name].to(self.device, copy=True) for name in self.state.tensors()})
        sampling = Sampling.of({name: tensors[SAMPLING + name].to(self.device, copy=True) for name in SETTINGS})
        self.state, self.sampling, self.past_key_values.state = own, sampling, cache.state

    def _own_tensors(self) -> dict[str, Tensor]:
        return self.state.tensors() | {SAMPLING + name: tensor for name, tensor in self.sampling.tensors().items()}

    def _check(self, tensors: dict[str, Tensor], rows: int) -> None:
        """ValueError unless these are the entries of a stream of so many rows, beside its cache's, with tokens that the model has."""
        wanted: dict[str, Entry] = {name: ((rows, *own.shape[1:]), own.dtype) for name, own in self._own_tensors().items()}
        check_names("stream", [name for name in tensors if not name.startswith(CACHE)], wanted)
        check_entries("stream", tensors, wanted)
        config, said = self.model.config, tensors["said"]
        # the initial token may have been said before a late codebook's first frame
        check_tokens("said", said[:, :1], tuple(said[:, :1].shape), UNGENERATED, config.vocab_size + 1)
        check_tokens("said", said[:, 1:], tuple(said[:, 1:].shape), UNGENERATED, config.audio_vocab_size + 1)
        check_tokens("heard", tensors["heard"], tuple(tensors["heard"].shape), ZERO, config.audio_vocab_size)
        ahead = tensors["ahead"]
        check_tokens("ahead", ahead[:, :1], tuple(ahead[:, :1].shape), UNGENERATED, config.vocab_size + 1)
        check_tokens("ahead", ahead[:, 1:], tuple(ahead[:, 1:].shape), UNGENERATED, config.audio_vocab_size + 1)
        for name, ok in (
            ("calls", tensors["calls"] >= 0),
            ("seeds", tensors["seeds"] >= 0),
            ("sick", ~tensors["sick"]),
            ("temperature", tensors[SAMPLING + "temperature"] > 0),
            ("text_temperature", tensors[SAMPLING + "text_temperature"] > 0),
            ("top_k", tensors[SAMPLING + "top_k"] >= 0),
            ("text_top_k", tensors[SAMPLING + "text_top_k"] >= 0),
        ):
            if not bool(ok.all()):
                raise MoshiTTTError(f"`{name}` of the saved stream holds what no stream has; load what `state_dict()` gave, unchanged.")
        if not torch.equal(tensors["calls"], tensors.get(CACHE + "frames", tensors["calls"])):
            raise MoshiTTTError("`calls` of the saved stream are not the frames of its cache; load what `state_dict()` gave, unchanged.")

    def _check_heard(self, user_codes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The user's codes `[B, K_user]` on the model's device, and the rows `[B]` where a code is out of range; None where none can be.

        Codes on the host are refused there. To look at those on a device would have the host wait for it: such a row becomes sick instead.
        """
        shape, card = tuple(self.state.heard.shape[:2]), self.model.config.audio_vocab_size
        if user_codes is None:
            return torch.full_like(self.state.heard[..., 0], ZERO), None
        if user_codes.device.type == "cpu":
            check_tokens("user_codes", user_codes, shape, ZERO, card)
            return user_codes.to(self.state.heard), None
        check_shape("user_codes", user_codes, shape)
        bad = ((user_codes < ZERO) | (user_codes >= card)).any(dim=1)
        return user_codes.to(self.state.heard).masked_fill(bad[:, None], ZERO), bad

    def _check_forced(self, forced: Tensor) -> Tensor:
        rows, config = self.batch_size, self.model.config
        if tuple(forced.shape) != (rows, self._own):
            raise MoshiTTTError(
                f"`forced` has shape {tuple(forced.shape)}; it must be {(rows, self._own)}: a text token and codes for each row."
            )
        # the initial token may be said before a late codebook's first frame
        check_tokens("forced", forced[:, 0], (rows,), UNGENERATED, config.vocab_size + 1)
        check_tokens("forced", forced[:, 1:], (rows, self._own - 1), UNGENERATED, config.audio_vocab_size + 1)
        return forced

    def __deepcopy__(self, memo: dict[int, Any]) -> MoshiTTTStream:
        """A stream that goes its own way from here; the model is shared."""
        other = copy.copy(self)
        other.past_key_values = self.past_key_values.draft()
        other.past_key_values.state = self.past_key_values.state.map(Tensor.clone)
        other.state = replace(self.state)
        other.in_use = InUse()
        return other


def frame(
    model: Any,
    inputs: Tensor,
    forced: Tensor,
    active: Tensor | None,
    cache: MoshiTTTCache,
    sampling: Sampling,
    seeds: Tensor,
    calls: Tensor,
    hooks: LogitsHooks = NO_HOOKS,
) -> tuple[Tensor, Tensor]:
    """One frame of every row, without a branch on numbers and without a read by the host: what `compile_stream` makes one graph of.

    Args:
        inputs: `[B, S]` delayed tokens.
        forced: `[B, 1 + K]` tokens that are said as they are; chosen for -2.
        active: `[B]` bool, or None for all rows.
        cache: brought up to date.
        seeds, calls: `[B]`, what the noise hangs on.
        hooks: change logits; a stream that has them is not compiled.

    Returns:
        What is said `[B, 1 + K]`, and the rows `[B]` whose logits are not finite.
    """
    config = model.config
    logits, hidden_states = model.step_frame(inputs, cache, active)
    noise = sampling.noise(seeds, calls, config.vocab_size, config.num_codebooks, config.audio_vocab_size)
    text_noise, audio_noise = noise or (None, None)
    largest = [logits.amax(dim=-1)]  # NaN where one of them is
    text = torch.where(forced[:, 0] > UNGENERATED, forced[:, 0], sampling.text(hooks.text(logits), text_noise))

    def choose(logits: Tensor, codebook: int) -> Tensor:
        largest.append(logits.amax(dim=-1))
        return sampling.audio(hooks.audio(logits, codebook), None if audio_noise is None else audio_noise[:, codebook])

    audio = model.depth_decoder.decode(hidden_states, text, forced[:, 1:], choose)
    return torch.cat([text[:, None], audio], dim=1), ~torch.isfinite(torch.stack(largest)).all(dim=0)

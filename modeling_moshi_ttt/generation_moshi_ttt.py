"""Talking frame by frame: a stream hears one frame of the user and answers with one of its own, for as long as the conversation lasts.

Shapes: B rows, K Moshi's codebooks, K_user the user's, M the largest delay.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

from .cache_moshi_ttt import MoshiTTTCache
from .delay_pattern import delay
from .frames_moshi_ttt import check_tokens, initial_tokens
from .tokens_moshi_ttt import UNGENERATED, ZERO
from .ttt_state import Entry, check_entries, check_names, row_mask

LABELS = ("text_labels", "audio_labels")  # of a processor's batch


class MoshiTTTFrame(NamedTuple):
    """One complete frame of 80 ms, text and audio of the same instant. Where `valid` is False (the row's delay still fills) tokens are -2."""

    text: torch.Tensor  # [B]
    audio_codes: torch.Tensor  # [B, K]
    valid: torch.Tensor  # [B] bool


@dataclass
class MoshiTTTGenerateOutput(ModelOutput):
    """What `generate` gives.

    Args:
        sequences: `[B, T]` text tokens, one a frame.
        audio_codes: `[B, K, T]` Moshi's codes of the same frames.
    """

    sequences: torch.Tensor | None = None
    audio_codes: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits. `top_k` 0 leaves all in; `do_sample` False takes the likeliest."""

    do_sample: bool = True
    temperature: float = 0.8
    text_temperature: float = 0.7
    top_k: int = 250
    text_top_k: int = 25
    generator: torch.Generator | None = None

    def __post_init__(self):
        for name in ("temperature", "text_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}={getattr(self, name)}` must be greater than 0; for the likeliest token set `do_sample=False`.")
        for name in ("top_k", "text_top_k"):
            if getattr(self, name) is None or getattr(self, name) < 0:
                raise ValueError(f"`{name}={getattr(self, name)}` must be 0 (no limit) or more.")

    def text(self, logits: torch.Tensor) -> torch.Tensor:
        """`[B, V]` -> `[B]`."""
        return self._choose(logits, self.text_temperature, self.text_top_k)

    def audio(self, logits: torch.Tensor) -> torch.Tensor:
        """`[B, card]` -> `[B]`."""
        return self._choose(logits, self.temperature, self.top_k)

    def _choose(self, logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
        if not self.do_sample:
            return logits.argmax(dim=-1)
        scores = logits.float() / temperature
        if 0 < top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)[:, 0]


class MoshiTTTStream:
    """A batch of live conversations with one model. All their memory is here and in `past_key_values`; the model keeps nothing.

    Time, as in Kyutai's LMGen, calls counted from 0: call 0 runs before anything is heard, so the user's codes it is given are dropped
    (call [`step`] with nothing once, before the first sound); call s hears the user's frame `s - 1` and returns Moshi's frame `s - M`,
    text and audio of the same instant. The first M calls return no complete frame, and M calls more bring the tail after the last one.
    With Moshi's delays M is 1: the call that hears the user's frame t returns Moshi's frame t. [`hear`] does all this for a recording.

    Args:
        model: `MoshiTTTForConditionalGeneration`.
        batch_size: rows.
        sampling: how tokens are chosen.
    """

    def __init__(self, model: Any, batch_size: int, sampling: Sampling):
        self.model, self.sampling = model, sampling
        self.past_key_values: MoshiTTTCache = model.new_cache(batch_size)
        config, device = model.config, self.past_key_values.frames.device
        self._delays = torch.tensor(config.delays, device=device)
        self._own = 1 + config.num_codebooks
        depth = max(config.delays) + 1
        self._calls = torch.zeros(batch_size, dtype=torch.long, device=device)
        # Raw tokens of the last M + 1 calls, newest last: what was said [B, 1 + K, M + 1] and heard [B, K_user, M + 1].
        self._said = torch.full((batch_size, self._own, depth), UNGENERATED, device=device)
        self._heard = torch.full((batch_size, config.num_user_codebooks, depth), ZERO, device=device)

    @property
    def batch_size(self) -> int:
        return self._calls.shape[0]

    def step(self, user_codes: torch.Tensor | None = None) -> MoshiTTTFrame:
        """Hear one frame of the user, `[B, K_user]` codes or -1 for none (all of them when None), and return the newest complete frame.

        Raises:
            ValueError: wrong shape, or codes out of range.
        """
        if user_codes is None:
            user_codes = torch.full_like(self._heard[..., 0], ZERO)
        return self._step(user_codes, torch.full_like(self._said[..., 0], UNGENERATED))

    @torch.no_grad()
    def _step(self, user_codes: torch.Tensor, forced: torch.Tensor) -> MoshiTTTFrame:
        """As [`step`]; tokens in `forced` `[B, 1 + K]`, in delayed time, are said as they are, those of -1 (none) too; for -2 one is chosen."""
        self._check(user_codes)
        self._heard = torch.cat([self._heard[..., 1:], user_codes.to(self._heard)[..., None]], dim=-1)
        logits, hidden_states = self.model.step_frame(self._inputs(), self.past_key_values)
        text = torch.where(forced[:, 0] > UNGENERATED, forced[:, 0], self.sampling.text(logits))
        audio = self.model.depth_decoder.decode(hidden_states, text, forced[:, 1:], self.sampling.audio)
        said = torch.cat([text[:, None], audio], dim=1)
        self._said = torch.cat([self._said[..., 1:], said[..., None]], dim=-1)
        valid = self._calls >= self._said.shape[-1] - 1
        self._calls = self._calls + 1
        # A frame's token of delay d was said d calls after its text: index d of the last M + 1 calls.
        frame = self._said.gather(2, self._delays[: self._own].expand(self.batch_size, -1)[..., None])[..., 0]
        frame = frame.masked_fill(~valid[:, None], UNGENERATED)
        return MoshiTTTFrame(frame[:, 0], frame[:, 1:], valid)

    def _inputs(self) -> torch.Tensor:
        """`[B, S]`: what this call's step runs on, initial tokens where a stream's delay has not passed."""
        own = self._said[..., -1]
        late = (self._heard.shape[-1] - 1 - self._delays[self._own :]).expand(self.batch_size, -1)
        heard = self._heard.gather(2, late[..., None])[..., 0]
        tokens = torch.cat([own, heard], dim=1)
        begun = self._calls[:, None] > self._delays
        return torch.where(begun, tokens, self.past_key_values.initial_tokens[:, 0])

    def reset(self, rows: list[int] | torch.Tensor | None = None) -> None:
        """Start these rows (indices, or a bool tensor; all when None) as new conversations; the others go on undisturbed.

        Raises:
            ValueError: a row that does not exist, or a mask of another length.
        """
        chosen = slice(None) if rows is None else row_mask(rows, self.batch_size, self._calls.device)
        self.past_key_values.reset(rows)
        self._calls, self._said, self._heard = self._calls.clone(), self._said.clone(), self._heard.clone()
        self._calls[chosen], self._said[chosen], self._heard[chosen] = 0, UNGENERATED, ZERO

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole stream as tensors by name, ready for safetensors, the generator's state with it."""
        tensors = {"calls": self._calls, "said": self._said, "heard": self._heard}
        if self.sampling.generator is not None:
            tensors["generator"] = self.sampling.generator.get_state()
        return tensors | {f"past_key_values.{name}": tensor for name, tensor in self.past_key_values.state_dict().items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on exactly where [`state_dict`] was taken, on the model's device. What is refused leaves the stream as it was.

        Raises:
            ValueError: an entry is missing, unknown, or of another batch size, shape or dtype: the state is not of this model or not whole.
        """
        prefix, generator = "past_key_values.", self.sampling.generator
        wanted: dict[str, Entry] = {
            name: (tuple(own.shape), own.dtype) for name, own in (("calls", self._calls), ("said", self._said), ("heard", self._heard))
        }
        own = [name for name in tensors if not name.startswith(prefix) and name != "generator"]
        check_names("stream", own, wanted)
        if generator is not None and "generator" in tensors:
            wanted["generator"] = (tuple(generator.get_state().shape), torch.uint8)
        check_entries("stream", tensors, wanted)
        self.past_key_values.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self._calls, self._said, self._heard = (tensors[name].to(self._calls.device) for name in ("calls", "said", "heard"))
        if generator is not None and "generator" in tensors:
            generator.set_state(tensors["generator"].cpu())

    def _check(self, user_codes: torch.Tensor) -> None:
        check_tokens("user_codes", user_codes, tuple(self._heard.shape[:2]), ZERO, self.model.config.audio_vocab_size)


class MoshiTTTGenerationMixin:
    """Streaming and generation for a model with `config`, `device`, `embed`, `decoder`, `depth_decoder` and `new_cache`."""

    def new_stream(
        self,
        batch_size: int = 1,
        do_sample: bool = True,
        temperature: float = 0.8,
        text_temperature: float = 0.7,
        top_k: int = 250,
        text_top_k: int = 25,
        generator: torch.Generator | None = None,
    ) -> MoshiTTTStream:
        """Begin `batch_size` conversations.

        Args:
            do_sample: False takes the likeliest token each time.
            temperature, top_k: of the audio codes; `top_k` 0 leaves all in.
            text_temperature, text_top_k: of the text.
            generator: source of randomness, on the model's device.

        Raises:
            ValueError: a temperature not above 0, a negative top_k, an empty batch.
        """
        _gather_for_streams(self)
        return MoshiTTTStream(self, batch_size, Sampling(do_sample, temperature, text_temperature, top_k, text_top_k, generator))

    def step_frame(self: Any, tokens: torch.Tensor, past_key_values: MoshiTTTCache) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the temporal transformer on delayed tokens `[B, S]`: text logits `[B, V]` and hidden states `[B, E]`."""
        logits, outputs = self.decoder(self.embed(tokens[..., None]), past_key_values=past_key_values)
        return logits[:, 0], outputs.last_hidden_state[:, 0]

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> dict[str, Any]:
        """The inputs as they are: [`generate`] steps a stream, and PEFT's generation looks for this method."""
        return {"input_ids": input_ids, **inputs}

    @torch.no_grad()
    def hear(self: Any, user_codes: torch.Tensor, **sampling: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Hear a whole recording of the user and answer every frame of it, each where training puts it.

        Args:
            user_codes: `[B, K_user, T]` codes, or -1 where nothing is heard.
            sampling: as in [`new_stream`].

        Returns:
            Text `[B, T]` and Moshi's codes `[B, K, T]`: frame t was said when the user's frames before t had been heard.

        Raises:
            ValueError: no frames, wrong shapes, codes out of range, or sampling settings as in [`new_stream`].
        """
        rows, frames = user_codes.shape[0], user_codes.shape[-1]
        check_tokens("user_codes", user_codes, (rows, self.config.num_user_codebooks, frames), ZERO, self.config.audio_vocab_size)
        if frames == 0:
            raise ValueError(f"`user_codes` has shape {tuple(user_codes.shape)}; give at least one frame.")
        nothing_given = user_codes.new_empty(rows, 1 + self.config.num_codebooks, 0)
        return _talk(self.new_stream(rows, **sampling), nothing_given, user_codes, frames)

    @torch.no_grad()
    def generate(
        self: Any,
        input_ids: torch.Tensor | None = None,
        moshi_audio_codes: torch.Tensor | None = None,
        user_audio_codes: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        attention_mask: torch.Tensor | None = None,
        **sampling: Any,
    ) -> MoshiTTTGenerateOutput:
        """Say a prompt, then go on while the user is heard; without a prompt, [`hear`].

        Args:
            input_ids: `[B, P]`, text of the first P frames, said as given; -1 for none, -2 where it is to be generated.
            moshi_audio_codes: `[B, K, P]`, Moshi's codes of those frames, likewise.
            user_audio_codes: `[B, K_user, T]` from the first frame on; after its end the user's stream is absent.
            max_new_tokens: frames to generate after the P given; as many as `user_audio_codes` still has when None.
            attention_mask: `[B, P]` as a processor gives it; all ones, for all rows begin and go on together.
            sampling: as in [`new_stream`]; labels in a processor's batch are passed over.

        Returns:
            P + `max_new_tokens` complete frames, those given included.

        Raises:
            ValueError: no input, no number of frames, a mask with padding, tokens out of range, or shapes that do not fit.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("`attention_mask` has padding, but rows generate together; call `generate` for rows of one length at a time.")
        text, moshi, user = _prompt(self.config, input_ids, moshi_audio_codes, user_audio_codes)
        frames = _frames_wanted(text.shape[-1], user.shape[-1], max_new_tokens)
        stream = self.new_stream(text.shape[0], **{name: value for name, value in sampling.items() if name not in LABELS})
        return MoshiTTTGenerateOutput(*_talk(stream, torch.cat([text[:, None], moshi], dim=1), user, frames))


def _talk(stream: MoshiTTTStream, given: torch.Tensor, user: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `frames` frames of a fresh stream, text `[B, T]` and audio codes `[B, K, T]`.

    Args:
        given: `[B, 1 + K, P]` tokens of the first P frames, said as they are; -2 where they are to be generated.
        user: `[B, K_user, T']` what is heard from the first frame on; after its end nothing is.
    """
    config, depth = stream.model.config, max(stream.model.config.delays)
    own, calls = 1 + config.num_codebooks, frames + depth
    ahead = given.new_full((*given.shape[:2], calls), UNGENERATED)
    # Before its first frame a late codebook says the initial token, as in training. (LMGen, and so `step`, choose one there; it is dropped,
    # but a later codebook of a smaller delay would have been chosen after it.)
    before = initial_tokens(config, given.device)[:own].expand(given.shape[0], -1, -1)
    forced = delay(torch.cat([given, ahead], dim=-1), config.delays[:own], before)[..., :calls]
    # The first call hears nothing, so frame s - 1 of the user goes into call s.
    heard = user.new_full((*user.shape[:2], calls), ZERO)
    count = min(user.shape[-1], calls - 1)
    heard[..., 1 : 1 + count] = user[..., :count]
    said = [stream._step(heard[..., s], forced[..., s]) for s in range(calls)][depth:]
    return torch.stack([frame.text for frame in said], dim=-1), torch.stack([frame.audio_codes for frame in said], dim=-1)


def _gather_for_streams(model: Any) -> None:
    """Under FSDP2, let the methods that a stream calls gather their module's weights, as `forward` does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method  # not in every build of torch

    for module in model.modules():
        for method in ("step_frame", "decode", "step"):
            if isinstance(module, FSDPModule) and hasattr(module, method) and method not in vars(module):
                register_fsdp_forward_method(module, method)


def _prompt(
    config: Any, text: torch.Tensor | None, moshi: torch.Tensor | None, user: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text `[B, P]`, Moshi's codes `[B, K, P]` and the user's `[B, K_user, T]`, absent ones filled in."""
    given = next((x for x in (text, moshi, user) if x is not None), None)
    if given is None:
        raise ValueError("nothing to start from: give `user_audio_codes`, or a prompt in `input_ids` and `moshi_audio_codes`.")
    length = next((x.shape[-1] for x in (text, moshi) if x is not None), 0)
    text = given.new_full((given.shape[0], length), UNGENERATED) if text is None else text
    moshi = given.new_full((given.shape[0], config.num_codebooks, length), UNGENERATED) if moshi is None else moshi
    user = given.new_full((given.shape[0], config.num_user_codebooks, 0), ZERO) if user is None else user
    if text.shape[-1] != moshi.shape[-1]:
        raise ValueError(f"`input_ids` has {text.shape[-1]} frames and `moshi_audio_codes` {moshi.shape[-1]}; a prompt has as many of both.")
    rows = given.shape[0]
    check_tokens("input_ids", text, (rows, length), UNGENERATED, config.vocab_size)
    check_tokens("moshi_audio_codes", moshi, (rows, config.num_codebooks, length), UNGENERATED, config.audio_vocab_size)
    check_tokens("user_audio_codes", user, (rows, config.num_user_codebooks, user.shape[-1]), ZERO, config.audio_vocab_size)
    return text, moshi, user


def _frames_wanted(given: int, heard: int, new: int | None) -> int:
    """How many frames `generate` returns for a prompt of `given` frames, a user of `heard`, and `max_new_tokens`."""
    if new is not None and (not isinstance(new, int) or new < 0):
        raise ValueError(f"`max_new_tokens={new}` must be a whole number of frames, 0 or more.")
    frames = heard if new is None else given + new
    if frames == 0 or frames < given:
        raise ValueError(
            f"nothing to generate: the prompt has {given} frames, `user_audio_codes` {heard}; give it longer than the prompt, or `max_new_tokens`."
        )
    return frames

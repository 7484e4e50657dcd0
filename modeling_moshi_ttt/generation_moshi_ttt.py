"""What a model can do beside its forward: begin streams, answer whole recordings, and generate.

Shapes: B rows, K Moshi's codebooks, K_user the user's, M the largest delay.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import ModelOutput

from .cache_moshi_ttt import MoshiTTTCache
from .delay_pattern import delay
from .frames_moshi_ttt import check_tokens, initial_tokens
from .sampling_moshi_ttt import make_sampling
from .stream_moshi_ttt import MoshiTTTStream, frame
from .tokens_moshi_ttt import UNGENERATED, ZERO

LABELS = ("text_labels", "audio_labels")  # of a processor's batch


@dataclass
class MoshiTTTGenerateOutput(ModelOutput):
    """What `generate` gives.

    Args:
        sequences: `[B, T]` text tokens, one a frame.
        audio_codes: `[B, K, T]` Moshi's codes of the same frames.
    """

    sequences: torch.Tensor | None = None
    audio_codes: torch.Tensor | None = None


class MoshiTTTGenerationMixin:
    """Streaming and generation for a model with `config`, `device`, `embed`, `decoder`, `depth_decoder` and `new_cache`."""

    def new_stream(
        self: Any,
        batch_size: int = 1,
        do_sample: Any = True,
        temperature: Any = 0.8,
        text_temperature: Any = 0.7,
        top_k: Any = 250,
        text_top_k: Any = 25,
        seeds: Any = None,
        generator: torch.Generator | None = None,
    ) -> MoshiTTTStream:
        """Begin `batch_size` conversations. Every setting is one value, or one for each row.

        Args:
            do_sample: False takes the likeliest token each time, whatever the temperatures are.
            temperature, top_k: of the audio codes; `top_k` 0 leaves all in.
            text_temperature, text_top_k: of the text.
            seeds: a whole number a row: what a row says depends on nothing but its own past and its seed. Drawn when None.
            generator: what they are drawn from then; torch's own generator when None.

        Raises:
            ValueError: a temperature not above 0, a negative top_k, an empty batch, or settings or seeds of another number of rows.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be a whole number of 1 or more.")
        _gather_for_streams(self)
        settings = {"do_sample": do_sample, "temperature": temperature, "text_temperature": text_temperature}
        sampling = make_sampling(batch_size, self.new_cache(1).frames.device, **settings, top_k=top_k, text_top_k=text_top_k)
        return MoshiTTTStream(self, batch_size, sampling, seeds, generator)

    def compile_stream(self: Any, batch_size: int = 1, backend: str = "inductor", mode: str | None = None, **sampling: Any) -> None:
        """Make one graph of a frame, once, and run it until nothing is left to be made: streams begun afterwards use it and do not stall.

        Such a stream takes all its memory when it begins (see [`MoshiTTTCache.fill`]). Another batch size, or settings of [`new_stream`] that
        change what is computed (`do_sample`, `top_k`), compile anew at their first frames: call this for each.

        Args:
            batch_size, sampling: of the streams to come.
            backend, mode: as in `torch.compile`; `mode="reduce-overhead"` captures CUDA graphs.
        """
        self.compiled_frame = torch.compile(frame, fullgraph=True, dynamic=False, backend=backend, mode=mode)
        stream = self.new_stream(batch_size, **sampling)
        for _ in range(2):  # a row that starts anew is another graph than one that goes on
            for _ in range(self.config.ttt_mini_batch_size + 1):
                stream.step()
            stream.reset([0])

    def step_frame(
        self: Any, tokens: torch.Tensor, past_key_values: MoshiTTTCache, active: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the temporal transformer on delayed tokens `[B, S]`: text logits `[B, V]` and hidden states `[B, E]`.

        `past_key_values` is brought up to date in the rows that are `active` `[B]` bool (all of them when None).
        """
        mask = None if active is None else active[:, None]
        logits, outputs = self.decoder(self.embed(tokens[..., None]), past_key_values=past_key_values, attention_mask=mask)
        return logits[:, 0], outputs.last_hidden_state[:, 0]

    def start_rows(self: Any, past_key_values: MoshiTTTCache) -> None:
        """Give the rows of a cache that were reset their initial fast weights now, and not at their next frame (offloaded weights: then)."""
        state, layers = past_key_values.state, self.decoder.model.layers
        if state.reset_mask is None or any(parameter.is_meta for parameter in self.parameters()):
            return
        with torch.no_grad():
            states = [
                None if ttt is None else ttt.reset(state.reset_mask, layer.ttt.initial_state(1)) for ttt, layer in zip(state.ttt_states, layers)
            ]
        past_key_values.state = replace(state, ttt_states=tuple(states), reset_mask=None)

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
    said = [stream.step(heard[..., s], forced=forced[..., s]) for s in range(calls)][depth:]
    return torch.stack([frame.text for frame in said], dim=-1), torch.stack([frame.audio_codes for frame in said], dim=-1)


def _gather_for_streams(model: Any) -> None:
    """Under FSDP2, let the methods that a stream calls gather their module's weights, as `forward` does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method  # not in every build of torch

    for module in model.modules():
        for method in ("step_frame", "decode", "step"):
            if isinstance(module, FSDPModule) and hasattr(module, method) and method not in vars(module):
                register_fsdp_forward_method(module, method)  # type: ignore[arg-type]


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

"""What a model can do beside its forward: begin streams, answer whole recordings, and generate.

Shapes: B rows, K Moshi's codebooks, K_user the user's, M the largest delay.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.utils import logging

from .cache_moshi_ttt import MoshiTTTCache, given_cache
from .delay_pattern import delay
from .errors_moshi_ttt import MoshiTTTError
from .frames_moshi_ttt import check_tokens, initial_tokens
from .generation_settings_moshi_ttt import Listener, generation_settings
from .outputs_moshi_ttt import MoshiTTTGenerateOutput
from .prompt_moshi_ttt import GivenFrames, cache_after, given_frames, prefill, user_frames
from .rows import without_gradients
from .sampling_moshi_ttt import make_sampling
from .stream_moshi_ttt import NO_HOOKS, LogitsHooks, MoshiTTTStream, frame
from .tokens_moshi_ttt import UNGENERATED, ZERO

logger = logging.get_logger(__name__)


class Talk(NamedTuple):
    """Frames that a stream has said."""

    text: torch.Tensor  # [B, T]
    audio_codes: torch.Tensor  # [B, K, T]
    cache: MoshiTTTCache  # after these frames


class MoshiTTTGenerationMixin(GenerationMixin):
    """Streaming and generation for a model with `config`, `device`, `embed`, `decoder`, `depth_decoder` and `new_cache`.

    Args of generate:
        input_ids: `[B, P]`, text of the first P frames, said as given; -1 for none, -2 where it is to be generated.
        moshi_audio_codes: `[B, K, P]`, Moshi's codes of those frames, likewise.
            A row in which they are absent (-1) throughout is Moshi's to say: it answers, or says the text that is given.
        user_audio_codes: `[B, K_user, T]` from the first frame on.
        max_new_tokens: frames to generate after the P given. When None, `max_length` less P; when that is None too, as many as
            `user_audio_codes` still has.
        attention_mask: `[B, T]` as a processor gives it; rows may end early where no prompt is said.
        generation_config: overrides the model's own (`generation_config.json`), and is overridden by keywords.
        past_key_values, cache: what came before, by either name; it goes on from there, and then holds these frames too.
        logits_processor: transformers' processors of the text: each takes the text `[B, t]` so far and logits `[B, V]`.
        text_logits_hook, audio_logits_hook: as in [`new_stream`].
        stopping_criteria: of the text; a row that has stopped is filled with text padding and codes of -2.
        streamer: gets the text of the prompt, then each frame's.
        tokenizer: what `stop_strings` need.
        user_silence: whether the codec's silence follows the user's end (`config.silence_codes`), or nothing (-1).
        decode_audio: what makes sound of the codes, as a processor's.
        keywords: transformers' generation parameters that apply (`max_length`, `num_return_sequences`, `return_dict_in_generate`,
            `use_cache`, `max_time`, `stop_strings`, `eos_token_id`, `pad_token_id`), and the settings of [`new_stream`], of which
            `temperature` and `top_k` are the audio codes'. Labels in a processor's batch are passed over.

    Raises of generate:
        ValueError: no input, no number of frames, padding beside a prompt, tokens out of range, shapes that do not fit, or a
            parameter that cannot apply, by name.
    """

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
        prompt: Any = None,
        past_key_values: MoshiTTTCache | None = None,
        text_logits_hook: Callable[[torch.Tensor], torch.Tensor] | None = None,
        audio_logits_hook: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        **others: Any,
    ) -> MoshiTTTStream:
        """Begin `batch_size` conversations. Every setting is one value, or one for each row.

        Args:
            do_sample: False takes the likeliest token each time, whatever the temperatures are.
            temperature, top_k: of the audio codes; `top_k` 0 leaves all in.
            text_temperature, text_top_k: of the text.
            seeds: a whole number a row: what a row says depends on nothing but its own past and its seed. Drawn when None.
            generator: what they are drawn from then; torch's own generator when None.
            prompt: frames that were said and heard before, as a processor or its `prompt` makes them and `forward` takes them:
                `input_ids` `[B, P]`, `moshi_audio_codes` `[B, K, P]`, `user_audio_codes` `[B, K_user, P]`, those left out absent, and
                `attention_mask` `[B, P]` where rows differ in length. One row serves all. It may be longer than the attention window.
            past_key_values: a memory to go on from, before the prompt; it is left as it is.
            text_logits_hook: changes logits `[B, V]` before text is chosen.
            audio_logits_hook: changes logits `[B, card]` of the codebook with the number given.
            others: classifier-free guidance (`cfg_coef`, `guidance_scale`) is refused by name.

        Raises:
            ValueError: a temperature not above 0, a negative top_k, an empty batch, settings or seeds of another number of rows, a prompt
                that does not fit, or guidance.
            TypeError: an unknown setting, or a prompt that is no mapping.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise MoshiTTTError(f"`batch_size={batch_size}` must be a whole number of 1 or more.")
        _gather_for_streams(self)
        settings = {"do_sample": do_sample, "temperature": temperature, "text_temperature": text_temperature}
        sampling = make_sampling(batch_size, self.new_cache(1).frames.device, **settings, top_k=top_k, text_top_k=text_top_k, **others)
        begun = prompt is not None or past_key_values is not None
        cache = cache_after(self, batch_size, prompt, past_key_values) if begun else None
        hooks = LogitsHooks(text_logits_hook or NO_HOOKS.text, audio_logits_hook or NO_HOOKS.audio)
        return MoshiTTTStream(self, batch_size, sampling, seeds, generator, cache, hooks)

    def prefill(self: Any, past_key_values: MoshiTTTCache, **frames: torch.Tensor) -> None:
        """Let a memory hear frames, given as to `forward`, without what is predicted of them."""
        prefill(self, past_key_values, **frames)

    def compile_stream(self: Any, batch_size: int = 1, backend: str = "inductor", mode: str | None = None, **sampling: Any) -> None:
        """Make one graph of a frame, once, and run it until nothing is left to be made: streams begun afterwards use it and do not stall.

        Such a stream takes all its memory when it begins (see [`MoshiTTTCache.fill`]). Another batch size, or settings of [`new_stream`]
        that change what is computed (`do_sample`, `top_k`), compile anew at their first frames: call this for each.

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
        """Give rows of a cache that were reset their initial fast weights now, and not at their next frame (offloaded weights: then)."""
        state, layers = past_key_values.state, self.decoder.model.layers
        if state.reset_mask is None or any(parameter.is_meta for parameter in self.parameters()):
            return
        with torch.no_grad():
            states = [
                None if ttt is None else ttt.reset(state.reset_mask, layer.ttt.initial_state(1))
                for ttt, layer in zip(state.ttt_states, layers)
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
            raise MoshiTTTError(f"`user_codes` has shape {tuple(user_codes.shape)}; give at least one frame.")
        nothing_given = user_codes.new_empty(rows, 1 + self.config.num_codebooks, 0)
        talk = _talk(self.new_stream(rows, **sampling), nothing_given, user_codes, frames)
        return talk.text, talk.audio_codes

    @without_gradients
    def generate(
        self: Any,
        input_ids: Any = None,
        moshi_audio_codes: Any = None,
        user_audio_codes: Any = None,
        max_new_tokens: int | None = None,
        attention_mask: Any = None,
        *,
        generation_config: GenerationConfig | None = None,
        past_key_values: MoshiTTTCache | None = None,
        cache: MoshiTTTCache | None = None,
        logits_processor: LogitsProcessorList | None = None,
        text_logits_hook: Any = None,
        audio_logits_hook: Any = None,
        stopping_criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        user_silence: bool = True,
        decode_audio: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **keywords: Any,
    ) -> MoshiTTTGenerateOutput | torch.Tensor:
        """Say a prompt, then go on while the user is heard; without a prompt, [`hear`] (arguments and errors: see the class).

        Returns:
            P complete frames and those generated; with `return_dict_in_generate=False` their text alone.
        """
        if max_new_tokens is not None:
            keywords["max_new_tokens"] = max_new_tokens
        past = given_cache(cache, past_key_values)
        settings = generation_settings(self.generation_config, generation_config, stopping_criteria, tokenizer, self.device, keywords)
        given = given_frames(self.config, self.device, input_ids, moshi_audio_codes, user_audio_codes, attention_mask)
        heard = int(given.heard.max())
        frames = _frames_wanted(given.said.shape[-1], heard, settings.get("max_new_tokens"), settings.get("max_length"))
        if user_silence and self.config.silence_codes is None and frames > int(given.heard.min()):
            logger.warning_once(
                "`config.silence_codes` is not set, so the user is absent after the end; set it to `processor.silence_codes()`."
            )
        copies = settings.get("num_return_sequences", 1)
        given, before = _copied(self, given, past, copies)
        listener = Listener(given.said.shape[0], self.device, streamer, settings.criteria, logits_processor)
        hooks = {"text_logits_hook": listener.text_hook(text_logits_hook), "audio_logits_hook": audio_logits_hook}
        stream = self.new_stream(given.said.shape[0], **settings.sampling, past_key_values=before, **hooks)
        user = user_frames(self.config, given, frames + max(self.config.delays), user_silence)
        talk = _talk(stream, given.said, user, frames, listener)
        output = _output(talk, listener.lengths, settings.get("pad_token_id", self.config.text_padding_ids[0]), decode_audio)
        if past is not None and copies == 1:
            past.state = talk.cache.state  # last, so that an error before it leaves the memory as it was
            output.cache = past
        if not settings.get("use_cache", True):
            output.cache = None
        return output if settings.get("return_dict_in_generate", True) else output.to_tuple()[0]


def _copied(model: Any, given: GivenFrames, past: MoshiTTTCache | None, copies: int) -> tuple[GivenFrames, MoshiTTTCache | None]:
    """What `generate` was given, so many times for each row, and a memory of as many rows to go on from."""
    before = None if past is None else cache_after(model, given.said.shape[0], None, past)
    if copies > 1:
        given = GivenFrames(*(x.repeat_interleave(copies, dim=0) for x in given))
        if before is not None:
            before.batch_repeat_interleave(copies)
    return given, before


def _output(
    talk: Talk, lengths: torch.Tensor, padding: int, decode_audio: Callable[[torch.Tensor], torch.Tensor] | None
) -> MoshiTTTGenerateOutput:
    """What was said, without the frames that a row said after it was to stop."""
    over = torch.arange(talk.text.shape[1], device=lengths.device) >= lengths[:, None]  # [B, T]
    audio = None
    if decode_audio is not None:
        audio = decode_audio(talk.audio_codes)
        audio = audio.masked_fill(over.to(audio.device).repeat_interleave(audio.shape[1] // over.shape[1], dim=1), 0)
    codes = talk.audio_codes.masked_fill(over[:, None], UNGENERATED)
    return MoshiTTTGenerateOutput(sequences=talk.text.masked_fill(over, padding), audio_codes=codes, audio=audio, cache=talk.cache)


def _talk(stream: MoshiTTTStream, given: torch.Tensor, user: torch.Tensor, frames: int, listener: Listener | None = None) -> Talk:
    """The next frames of a stream, `frames` of them or fewer where the listener stops it.

    Args:
        given: `[B, 1 + K, P]` tokens of the first P of them, said as they are; -2 where they are to be generated.
        user: `[B, K_user, frames]` or more, what is heard from the first of them on; then nothing is.
    """
    config, depth = stream.model.config, max(stream.model.config.delays)
    own, prompt = 1 + config.num_codebooks, given.shape[-1]
    ahead = given.new_full((*given.shape[:2], frames + depth), UNGENERATED)
    # Before its first frame a late codebook says the initial token, as in training. (LMGen, and so `step`, choose one there; it is dropped,
    # but a later codebook of a smaller delay would have been chosen after it.)
    initial = initial_tokens(config, given.device)[:own]
    before = torch.where(stream.state.calls[:, None, None] == 0, initial, UNGENERATED)
    forced = delay(torch.cat([given, ahead], dim=-1), config.delays[:own], before)
    cache, said, end, call = stream.past_key_values, [], frames, 0
    if listener is not None:
        text = given[:, 0]
        listener.begin(text.masked_fill(text < 0, config.text_padding_ids[0]))
    while True:
        if call == end:  # a memory for those who go on; what comes after completes the last frames
            cache = stream.past_key_values.draft()
            if depth > 1:  # more than one frame is written into its rings
                cache.state = cache.state.map(torch.Tensor.clone)
        if call == end + depth:
            break
        # The first call hears nothing new, so frame s - 1 of the user goes into call s.
        said.append(stream.step(user[..., call - 1] if 0 < call <= user.shape[-1] else None, forced=forced[..., call]))
        if listener is not None and prompt <= call < end and listener(stream.state.said[:, 0, -1]):
            end = call + 1
        call += 1
    if listener is not None:
        listener.end()
    text = torch.stack([frame.text for frame in said[depth:]], dim=-1)
    codes = torch.stack([frame.audio_codes for frame in said[depth:]], dim=-1)
    tokens = torch.cat([text[:, None], codes, user[..., :end].to(text)], dim=1)
    cache.remember(tokens.clamp(min=ZERO), None, None)
    return Talk(text, codes, cache)


def _gather_for_streams(model: Any) -> None:
    """Under FSDP2, let the methods that a stream calls gather their module's weights, as `forward` does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method  # not in every build of torch

    for module in model.modules():
        for method in ("step_frame", "prefill", "decode", "step"):
            if isinstance(module, FSDPModule) and hasattr(module, method) and method not in vars(module):
                register_fsdp_forward_method(module, method)  # type: ignore[arg-type]


def _frames_wanted(given: int, heard: int, new: int | None, longest: int | None) -> int:
    """How many frames `generate` returns for a prompt of `given` frames, a user of `heard`, `max_new_tokens` and `max_length`."""
    for name, value in (("max_new_tokens", new), ("max_length", longest)):
        if value is not None and (type(value) is not int or value < 0):
            raise MoshiTTTError(f"`{name}={value}` must be a whole number of frames, 0 or more.")
    frames = given + new if new is not None else heard if longest is None else longest
    if frames == 0 or frames < given:
        raise MoshiTTTError(
            f"nothing to generate: the prompt has {given} frames, `user_audio_codes` {heard}; give longer ones, or `max_new_tokens`."
        )
    return frames

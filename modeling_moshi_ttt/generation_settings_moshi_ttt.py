"""What a call of `generate` asks for: transformers' generation parameters, as far as they mean something to a model that speaks while it
listens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .errors_moshi_ttt import MoshiTTTError
from .sampling_moshi_ttt import GUIDANCE, SETTINGS

# Parameters of `GenerationConfig` that count here; the sampling settings do too.
TAKEN = {"max_new_tokens", "max_length", "num_return_sequences", "return_dict_in_generate", "use_cache"} | {
    "max_time", "stop_strings", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Those that change nothing here, whatever they are: other special tokens, and how a memory is kept and code is run.
HARMLESS = {"bos_token_id", "decoder_start_token_id", "transformers_version", "cache_implementation", "cache_config", "max_cache_len"} | {
    "compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "renormalize_logits", "remove_invalid_values",
}  # fmt: skip
# Arguments of transformers' `generate` that are no parameters of its configuration.
UNSUPPORTED = {
    "inputs", "inputs_embeds", "assistant_model", "assistant_tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask",
    "prefix_allowed_tokens_fn", "custom_generate",
}  # fmt: skip
# Those that change nothing, and what a processor's batch holds beside the frames.
PASSED_OVER = {"synced_gpus", "trust_remote_code", "generation_mode", "text_labels", "audio_labels"}


class GenerationSettings(NamedTuple):
    """The parameters of a call, checked."""

    values: dict[str, Any]  # those of `TAKEN` that are set
    sampling: dict[str, Any]  # arguments of `new_stream`
    criteria: StoppingCriteriaList

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)


def generation_settings(
    defaults: GenerationConfig,
    given: GenerationConfig | None,
    stopping_criteria: Sequence[Any] | None,
    tokenizer: Any,
    device: torch.device,
    keywords: dict[str, Any],
) -> GenerationSettings:
    """Keywords before the configuration that is given, and that before the model's own (`defaults`).

    Raises:
        ValueError: a parameter that cannot apply is set, by name; or `stop_strings` without a tokenizer.
    """
    sources = [
        {name: value for name, value in config.to_dict().items() if value is not None} for config in (defaults, given) if config is not None
    ]
    known = {*vars(GenerationConfig()), *SETTINGS, *UNSUPPORTED, *PASSED_OVER}
    values = {name: value for source in [*sources, keywords] for name, value in source.items() if name in known}
    values = {name: value for name, value in values.items() if value is not None and name not in PASSED_OVER}
    neutral = GenerationConfig._get_default_generation_params()
    for name, value in values.items():
        if (
            name not in TAKEN | HARMLESS | set(SETTINGS)
            and not name.startswith("_")
            and (name in UNSUPPORTED or _says(value, neutral.get(name)))
        ):
            raise MoshiTTTError(f"`{name}={value}` {_reason(name)}; leave it out.")
    count = values.get("num_return_sequences", 1)
    if type(count) is not int or count < 1:
        raise MoshiTTTError(f"`num_return_sequences={count}` must be a whole number of 1 or more.")
    if count > 1 and values.get("do_sample") is False:
        raise MoshiTTTError(
            f"`num_return_sequences={count}` gives the same answer so many times with `do_sample=False`; sample, or leave it out."
        )
    sampling = {name: value for name, value in keywords.items() if name not in known}
    sampling |= {name: values[name] for name in SETTINGS if name in values}
    return GenerationSettings(values, sampling, _criteria(values, stopping_criteria, tokenizer, device))


def _says(value: Any, neutral: Any) -> bool:
    """Whether a parameter asks for something: it is neither off nor at transformers' default."""
    return value != neutral and value is not False and value != {}


def _reason(name: str) -> str:
    if name in GUIDANCE:
        return "asks for classifier-free guidance, which no Moshi-TTT model is trained for"
    if name.startswith("output_"):
        return "cannot be: `generate` keeps no scores, logits or attentions; run `forward` over what it gives"
    if name in ("top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"):
        return "is none of Moshi's settings; `logits_processor` takes transformers' processor of the text"
    if name in ("inputs", "inputs_embeds"):
        return "is not how frames are given; they come as `input_ids`, `moshi_audio_codes` and `user_audio_codes`"
    return "cannot apply to a model that says one frame after the other while it listens"


def _criteria(values: dict[str, Any], given: Sequence[Any] | None, tokenizer: Any, device: torch.device) -> StoppingCriteriaList:
    criteria = StoppingCriteriaList(given or [])
    if "max_time" in values:
        criteria.append(MaxTimeCriteria(values["max_time"]))
    if "eos_token_id" in values:
        criteria.append(EosTokenCriteria(torch.tensor(values["eos_token_id"], device=device)))
    if "stop_strings" in values:
        if tokenizer is None:
            raise MoshiTTTError(f"`stop_strings={values['stop_strings']}` needs `tokenizer`; give the processor's.")
        criteria.append(StopStringCriteria(tokenizer, values["stop_strings"]))
    return criteria


class Listener:
    """What follows the text as it is said: the streamer, the stopping criteria and the logits processors of one call.

    Args:
        rows: how many.
        streamer: transformers', or None.
        criteria, processors: transformers' lists; each sees the text `[B, t]` said so far.
    """

    def __init__(
        self, rows: int, device: torch.device, streamer: Any, criteria: StoppingCriteriaList, processors: LogitsProcessorList | None
    ):
        self.streamer, self.criteria, self.processors = streamer, criteria, processors
        self.text = torch.empty(rows, 0, dtype=torch.long, device=device)
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def text_hook(self, own: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The caller's hook, and after it the processors."""
        processors = self.processors
        if not processors:
            return own
        return lambda logits: processors(self.text, logits if own is None else own(logits))  # type: ignore[arg-type]

    def begin(self, text: torch.Tensor) -> None:
        """Hear the text `[B, P]` of the prompt."""
        self.text, self.lengths = text, torch.full_like(self.lengths, text.shape[1])
        if self.streamer is not None:
            self.streamer.put(text.cpu())

    def __call__(self, text: torch.Tensor) -> bool:
        """Hear one frame's text `[B]`; whether every row is to stop after it."""
        if self.streamer is not None:
            self.streamer.put(text.cpu())
        if self.criteria or self.processors:
            self.text = torch.cat([self.text, text[:, None]], dim=1)
        self.lengths = self.lengths + self.running
        if self.criteria:
            self.running = self.running & ~self.criteria(self.text, None)
        return bool(self.criteria) and not bool(self.running.any())

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

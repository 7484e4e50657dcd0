"""What a conversation begins from: frames that were said and heard before, and a memory of others.

Shapes: B rows, P frames of a prompt, T frames of the user, K Moshi's codebooks, K_user the user's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_moshi_ttt import MoshiTTTCache, check_cache
from .errors_moshi_ttt import MoshiTTTError
from .frames_moshi_ttt import align, check_shape, check_tokens, delay_frames
from .rows import without_gradients
from .tokens_moshi_ttt import UNGENERATED, ZERO

STREAMS = ("input_ids", "moshi_audio_codes", "user_audio_codes")
# What else a processor's batch holds, which says nothing about a prompt.
UNREAD = ("text_labels", "audio_labels", "decode_audio")
PIECE = 256  # frames of a prompt heard at once; memory does not grow with the prompt


class GivenFrames(NamedTuple):
    """What `generate` was given, on one device."""

    said: Tensor  # [B, 1 + K, P] text and Moshi's codes, -2 where they are to be generated
    user: Tensor  # [B, K_user, T]
    heard: Tensor  # [B] how many of the user's frames count


def cache_after(model: Any, batch_size: int, prompt: Any, past_key_values: Any) -> MoshiTTTCache:
    """A memory of `batch_size` rows after `past_key_values` (untouched) and then `prompt`; either may be None, and of one row for all.

    Raises:
        ValueError: rows, shapes or tokens that do not fit.
        TypeError: `prompt` is no mapping, or `past_key_values` is not what `new_cache` makes.
    """
    cache: MoshiTTTCache | None = None
    if past_key_values is not None:
        rows = getattr(past_key_values, "batch_size", batch_size)
        check_cache(past_key_values, rows, model.config.num_hidden_layers, model.config.ttt_layers)
        cache = past_key_values.draft()
        cache.state = past_key_values.state.map(Tensor.clone)  # a stream writes into its rings
    if prompt is not None:
        frames = _prompt_frames(prompt, model.device)
        rows = next(iter(frames.values())).shape[0]
        cache = model.new_cache(rows) if cache is None else cache
        if rows == 1:
            frames = {name: x.expand(cache.batch_size, *x.shape[1:]) for name, x in frames.items()}
        _repeat(cache, rows)
        model.prefill(cache, **frames)
    assert cache is not None
    _repeat(cache, batch_size)
    if cache.batch_size != batch_size:
        raise MoshiTTTError(f"the prompt has {cache.batch_size} rows and `batch_size={batch_size}`; give one row for all, or one each.")
    return cache


def _repeat(cache: MoshiTTTCache, rows: int) -> None:
    if cache.batch_size == 1 < rows:
        cache.batch_repeat_interleave(rows)


def _prompt_frames(prompt: Any, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a prompt, as `forward` takes them."""
    if not isinstance(prompt, Mapping):
        raise TypeError(
            f"`prompt` is a {type(prompt).__name__}; give frames as a processor makes them, of text with `processor.prompt(text=...)`."
        )
    if unknown := sorted(set(prompt) - {*STREAMS, *UNREAD, "attention_mask"}):
        raise MoshiTTTError(f"`prompt` holds `{unknown[0]}`; it takes {', '.join(STREAMS)} and attention_mask.")
    frames = {name: as_tensor(prompt[name], device) for name in (*STREAMS, "attention_mask") if prompt.get(name) is not None}
    if not set(frames) & set(STREAMS):
        raise MoshiTTTError(f"`prompt` is empty; give at least one of {', '.join(STREAMS)}.")
    return frames


@without_gradients
def prefill(
    model: Any,
    past_key_values: MoshiTTTCache,
    input_ids: Tensor | None = None,
    moshi_audio_codes: Tensor | None = None,
    user_audio_codes: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> None:
    """As `forward` brings a memory up to date, of frames however many and without what is predicted; changed when all has succeeded."""
    frames = align(model.config, input_ids, moshi_audio_codes, user_audio_codes, attention_mask=attention_mask)
    cache = past_key_values.draft()
    for start in range(0, frames.codes.shape[-1], PIECE):
        codes = frames.codes[..., start : start + PIECE]
        mask = None if frames.mask is None else frames.mask[:, start : start + PIECE]
        steps = delay_frames(model.config, frames._replace(codes=codes, mask=mask), cache.codes, None)
        model.decoder(model.embed(steps.inputs), attention_mask=mask, past_key_values=cache)
        cache.remember(codes, None, None if mask is None else mask.sum(dim=1))
    past_key_values.state = cache.state


def as_tensor(value: Any, device: torch.device) -> Tensor:
    """A tensor from what a caller gives: one, a numpy array or nested lists."""
    return torch.as_tensor(value).to(device)


def given_frames(config: Any, device: torch.device, text: Any, moshi: Any, user: Any, attention_mask: Any = None) -> GivenFrames:
    """What `generate` begins from: absent streams filled in, and those that the model is to say.

    Moshi's side of a row is to be said where all of it is absent (-1), as in a processor's batch of the user's voice alone. Where only its
    codes are, it says the text.

    Raises:
        ValueError: nothing is given, tokens out of range, shapes that do not fit, or padding beside frames that are said as given.
    """
    text, moshi, user = (None if x is None else as_tensor(x, device) for x in (text, moshi, user))
    given = next((x for x in (text, moshi, user) if x is not None), None)
    if given is None:
        raise MoshiTTTError("nothing to start from: give `user_audio_codes`, or a prompt in `input_ids` and `moshi_audio_codes`.")
    rows, length = given.shape[0], next((x.shape[-1] for x in (text, moshi) if x is not None), 0)
    text = given.new_full((rows, length), UNGENERATED) if text is None else text
    moshi = given.new_full((rows, config.num_codebooks, length), UNGENERATED) if moshi is None else moshi
    user = given.new_full((rows, config.num_user_codebooks, 0), ZERO) if user is None else user
    if text.shape[-1] != moshi.shape[-1]:
        raise MoshiTTTError(
            f"`input_ids` has {text.shape[-1]} frames and `moshi_audio_codes` {moshi.shape[-1]}; a prompt has as many of both."
        )
    check_tokens("input_ids", text, (rows, length), UNGENERATED, config.vocab_size)
    check_tokens("moshi_audio_codes", moshi, (rows, config.num_codebooks, length), UNGENERATED, config.audio_vocab_size)
    check_tokens("user_audio_codes", user, (rows, config.num_user_codebooks, user.shape[-1]), ZERO, config.audio_vocab_size)
    silent = (moshi < 0).flatten(1).all(dim=1)
    moshi = torch.where(silent[:, None, None], UNGENERATED, moshi)
    text = torch.where((silent & (text < 0).all(dim=1))[:, None], UNGENERATED, text)
    said = torch.cat([text[:, None], moshi], dim=1)
    if bool((said == UNGENERATED).all()):
        said = said[..., :0]
    return GivenFrames(said, user, _heard(user, attention_mask, said))


def _heard(user: Tensor, attention_mask: Any, said: Tensor) -> Tensor:
    """How many of the user's frames count in each row `[B]`."""
    mask = None if attention_mask is None else as_tensor(attention_mask, user.device).bool()
    if mask is None or bool(mask.all()):
        return user.new_full((user.shape[0],), user.shape[-1])
    if said.shape[-1]:
        raise MoshiTTTError(
            "`attention_mask` has padding beside frames that are said as given; call `generate` for rows of one length at a time, or "
            "begin with `new_stream(prompt=...)`."
        )
    check_shape("attention_mask", mask, (user.shape[0], user.shape[-1]))
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise MoshiTTTError("`attention_mask` has padding before frames; recordings are padded on the right, as a processor pads them.")
    return mask.sum(dim=1)


def user_frames(config: Any, given: GivenFrames, frames: int, silence: bool) -> Tensor:
    """`[B, K_user, frames]` what is heard: the user, then the codec's silence, or nothing where that is not known or wanted."""
    user = torch.nn.functional.pad(given.user, (0, max(frames - given.user.shape[-1], 0)), value=ZERO)[..., :frames]
    if not silence or config.silence_codes is None:
        return user
    codes = torch.tensor(config.silence_codes, device=user.device).T  # [K_user, N]
    after = torch.arange(frames, device=user.device) - given.heard[:, None]  # [B, frames]
    silent = codes[:, after.clamp(0, codes.shape[1] - 1)].transpose(0, 1)  # [B, K_user, frames]
    return torch.where(after[:, None] >= 0, silent, user)

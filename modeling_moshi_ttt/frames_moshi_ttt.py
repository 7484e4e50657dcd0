"""From the aligned frames a caller holds to the delayed steps the model runs on.

Shapes: B rows, T frames, K Moshi's codebooks, P those that the depth decoder predicts (K, or K + K_user), S = 1 + K + K_user streams (text,
Moshi's codebooks, the user's), M the largest delay.
"""

from typing import Any, NamedTuple

import torch

from .delay_pattern import delay
from .errors_moshi_ttt import MoshiTTTError
from .tokens_moshi_ttt import IGNORED, ZERO


class AlignedFrames(NamedTuple):
    """Checked frames and labels, valid frames to the left of padding in every row."""

    codes: torch.Tensor  # [B, S, T]
    text_labels: torch.Tensor | None  # [B, T]
    audio_labels: torch.Tensor | None  # [B, P, T]
    mask: torch.Tensor | None  # [B, T] bool
    order: torch.Tensor | None  # [B, T] where each frame came from, when padding had to move; else None


class DelayedSteps(NamedTuple):
    """What goes into each step, and what comes out of it."""

    inputs: torch.Tensor  # [B, S, T]
    outputs: torch.Tensor  # [B, 1 + P, T] text and codes as the step should give them: labels, the codes where there are none
    text_labels: torch.Tensor | None  # [B, T]
    audio_labels: torch.Tensor | None  # [B, P, T]


def initial_tokens(config: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """`[S, M + 1]`: what stands before the first frame of each stream."""
    ids = torch.tensor([config.vocab_size, *[config.audio_vocab_size] * len(config.audio_delays)], device=device)
    return ids[:, None].expand(-1, max(config.delays) + 1)


def align(
    config: Any,
    input_ids: torch.Tensor | None,
    moshi_audio_codes: torch.Tensor | None,
    user_audio_codes: torch.Tensor | None,
    text_labels: torch.Tensor | None = None,
    audio_labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> AlignedFrames:
    """Check what a caller gives and join it; streams that are None are absent (-1).

    Raises:
        ValueError: nothing given, an empty batch, wrong shapes or codebooks, unequal lengths, codes or labels out of range.
    """
    codes = _join(config, input_ids, moshi_audio_codes, user_audio_codes)
    rows, _, frames = codes.shape
    predicted = config.num_predicted_codebooks
    if audio_labels is not None and audio_labels.dim() == 3 and audio_labels.shape[1] == config.num_codebooks < predicted:
        unlabelled = audio_labels.new_full((audio_labels.shape[0], predicted - config.num_codebooks, audio_labels.shape[2]), IGNORED)
        audio_labels = torch.cat([audio_labels, unlabelled], dim=1)
    for name, labels, shape, card in (
        ("text_labels", text_labels, (rows, frames), config.vocab_size),
        ("audio_labels", audio_labels, (rows, predicted, frames), config.audio_vocab_size),
    ):
        if labels is not None:
            check_tokens(name, labels, shape, IGNORED, card)
    if attention_mask is None:
        return AlignedFrames(codes, text_labels, audio_labels, None, None)
    check_shape("attention_mask", attention_mask, (rows, frames))
    mask = attention_mask.bool()
    if not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return AlignedFrames(codes, text_labels, audio_labels, mask, None)
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    text, audio = (None if x is None else take_frames(x, order, x.dim() - 1) for x in (text_labels, audio_labels))
    return AlignedFrames(take_frames(codes, order, 2), text, audio, take_frames(mask, order, 1), order)


def delay_frames(config: Any, frames: AlignedFrames, code_history: torch.Tensor | None, label_history: torch.Tensor | None) -> DelayedSteps:
    """Apply the delay pattern.

    What a step should give, and the depth decoder is teacher-forced with, are its labels: codes may differ from them, as where training
    puts noise on what the model hears. A token without a label (-100 or -1) is the one heard.

    Args:
        code_history: `[B, S, M + 1]` the frames before these; None at the start of the recordings.
        label_history: `[B, P, M]` the audio labels before these; None likewise.
    """
    predicted = 1 + config.num_predicted_codebooks
    if code_history is None:
        code_history = initial_tokens(config, frames.codes.device).expand(frames.codes.shape[0], -1, -1)
    # Step t predicts the delayed column t from the delayed columns before it.
    inputs = delay(frames.codes, [d + 1 for d in config.delays], code_history)
    outputs = delay(frames.codes[:, :predicted], config.delays[:predicted], code_history[:, :predicted])
    text_labels, audio_labels = frames.text_labels, frames.audio_labels
    if audio_labels is not None:
        if label_history is None:
            label_history = audio_labels.new_full((*audio_labels.shape[:2], max(config.delays)), IGNORED)
        audio_labels = delay(audio_labels, config.delays[1:predicted], label_history)
    outputs = torch.cat([_or_else(text_labels, outputs[:, 0])[:, None], _or_else(audio_labels, outputs[:, 1:])], dim=1)
    if frames.mask is not None:  # a step of padding predicts nothing
        text_labels = None if text_labels is None else text_labels.masked_fill(~frames.mask, IGNORED)
        audio_labels = None if audio_labels is None else audio_labels.masked_fill(~frames.mask[:, None], IGNORED)
    return DelayedSteps(inputs, outputs, text_labels, audio_labels)


def _or_else(labels: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """The labels, and `tokens` of the same shape where there are none."""
    return tokens if labels is None else torch.where(labels >= 0, labels, tokens)


def take_frames(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """Gather frames `order` `[B, T]` along dimension `dim` of `x` `[B, ..., T, ...]`."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand_as(x))


def _join(config: Any, text: torch.Tensor | None, moshi: torch.Tensor | None, user: torch.Tensor | None) -> torch.Tensor:
    given = next((x for x in (text, moshi, user) if x is not None), None)
    if given is None:
        raise MoshiTTTError("nothing to hear: give at least one of `input_ids`, `moshi_audio_codes` and `user_audio_codes`.")
    rows, frames = given.shape[0], given.shape[-1]
    if rows == 0 or frames == 0:
        raise MoshiTTTError(f"the batch is empty (shape {tuple(given.shape)}); give at least one row and one frame.")
    lengths = {
        name: x.shape[-1] for name, x in (("input_ids", text), ("moshi_audio_codes", moshi), ("user_audio_codes", user)) if x is not None
    }
    if any(length != frames for length in lengths.values()):
        raise MoshiTTTError(
            f"the streams are of unequal lengths: {lengths} frames in the last dimension of their shape; cut or pad them alike."
        )
    streams = []
    for name, codes, count, card in (
        ("input_ids", None if text is None else text[:, None] if text.dim() == 2 else text, 1, config.vocab_size),
        ("moshi_audio_codes", moshi, config.num_codebooks, config.audio_vocab_size),
        ("user_audio_codes", user, config.num_user_codebooks, config.audio_vocab_size),
    ):
        if codes is None:
            codes = given.new_full((rows, count, frames), ZERO)
        check_tokens(name, codes, (rows, count, frames), ZERO, card)
        streams.append(codes)
    return torch.cat(streams, dim=1)


def check_tokens(name: str, tokens: torch.Tensor, shape: tuple[int, ...], lowest: int, card: int) -> None:
    """Raises a ValueError that names the tokens where they have not this shape, are no ids, or not from `lowest` to `card - 1`."""
    check_shape(name, tokens, shape)
    _check_range(name, tokens, lowest, card)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError that names the tensor where it has not this shape."""
    if tuple(tensor.shape) != shape:
        raise MoshiTTTError(f"`{name}` has shape {tuple(tensor.shape)}; rows, codebooks and frames must be {shape}.")


def _check_range(name: str, tokens: torch.Tensor, lowest: int, card: int) -> None:
    if tokens.dtype not in (torch.int64, torch.int32):
        raise MoshiTTTError(f"`{name}` has dtype {tokens.dtype}; token ids are int64.")
    if torch.compiler.is_compiling() or tokens.device.type == "meta" or tokens.numel() == 0:
        return
    numbers = tokens.detach().numpy() if tokens.device.type == "cpu" else tokens  # as numpy they are on the host already
    low, high = int(numbers.min()), int(numbers.max())
    if low < lowest or high >= card:
        raise MoshiTTTError(
            f"`{name}` holds {low if low < lowest else high}; it takes ids from 0 to {card - 1}, and {lowest} or above for none."
        )


def refuse_arguments(others: dict[str, Any]) -> None:
    """ValueError that names the first argument of a forward that is given and unknown."""
    for name, value in others.items():
        if value is not None:
            labels, frames = (
                "give `text_labels` and `audio_labels`",
                "frames come as `input_ids`, `moshi_audio_codes` and `user_audio_codes`",
            )
            raise MoshiTTTError(f"`{name}` is no argument of Moshi-TTT's forward; {labels if name == 'labels' else frames}.")

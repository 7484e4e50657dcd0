"""Loss against position over whole books, streamed with the state carried in constant memory, and what TTT gains beyond the window.

Every condition runs over the same frames: TTT as it is; its state reset every window; fast weights frozen at W0 (no inner step); the gate
at 0 (plain Moshi); and the windows shuffled (the same sound, another history).

Shapes: S = 1 + K streams (text, Moshi's codebooks), T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..delay_pattern import delay, undelay
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import ZERO
from .scoring import CodeSequence, check_sequences, collate, gather_log_probs
from .statistics import bootstrap_interval, paired_test

TTT, RESET, FROZEN, GATE_ZERO, SHUFFLED = "TTT", "reset every window", "frozen at W0", "gate 0", "shuffled windows"
CONDITIONS = (TTT, RESET, FROZEN, GATE_ZERO, SHUFFLED)
STREAMS = ("text", "semantic", "acoustic")


def condition_parameters(model: Any, condition: str) -> dict[str, Tensor]:
    """The parameters that stand in for the model's own under a condition; the model itself is not touched."""
    if condition not in CONDITIONS:
        raise MoshiTTTError(f"condition {condition!r} is unknown; choose from {', '.join(CONDITIONS)}")
    changed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if condition == GATE_ZERO and name.endswith("gating_alpha") or condition == FROZEN and name.endswith("learnable_ttt_lr_weight"):
            changed[name] = torch.zeros_like(parameter)
        elif condition == FROZEN and name.endswith("learnable_ttt_lr_bias"):
            changed[name] = torch.full_like(parameter, -1e4)  # its sigmoid is exactly 0: no inner step
    return changed


def shuffled_order(frames: int, window: int, seed: int) -> np.ndarray:
    """A permutation [T] of frames that moves whole windows; what is left of a last one stays at the end."""
    whole = frames // window
    order = np.random.default_rng(seed).permutation(whole)
    moved = (order[:, None] * window + np.arange(window)).ravel()
    return np.concatenate([moved, np.arange(whole * window, frames)]).astype(np.int64)


@torch.no_grad()
def stream_losses(
    model: Any,
    sequence: CodeSequence,
    condition: str = TTT,
    chunk: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda frames: None,
) -> np.ndarray:
    """Loss of every token in nats, float32 [S, T] in frame time, NaN where nothing was predicted.

    The recording streams through in chunks (a window each unless said otherwise), with nothing kept between them but the model's memory
    of fixed size. Under "shuffled windows" column t belongs to frame `shuffled_order(T, window, seed)[t]`.
    """
    check_sequences(model.config, [sequence])
    model.eval()
    window, frames = model.config.sliding_window, sequence.moshi.shape[-1]
    if condition == SHUFFLED:
        order = torch.from_numpy(shuffled_order(frames, window, seed))
        moved = [None if stream is None else stream.cpu()[..., order] for stream in sequence]
        sequence = CodeSequence(sequence.moshi.cpu()[..., order], *moved[1:])
    inputs = collate(model.config, [sequence], "cpu")
    targets = torch.cat([inputs["input_ids"][:, None], inputs["moshi_audio_codes"]], dim=1)  # [1, S, T]
    delays = [0, *model.config.audio_delays[: model.config.num_codebooks]]
    delayed = delay(targets, delays, targets.new_full((*targets.shape[:2], max(max(delays), 1)), ZERO))
    parameters, cache = condition_parameters(model, condition), model.new_cache(1)
    losses = torch.full(targets.shape, torch.nan)
    for start, end in _chunks(frames, chunk or window, window if condition == RESET else frames):
        if condition == RESET and start % window == 0:
            cache.reset_ttt()
        piece = {name: tensor[..., start:end].to(model.device) for name, tensor in inputs.items()}
        output = torch.func.functional_call(model, parameters, (), piece | {"past_key_values": cache})
        losses[..., start:end] = -gather_log_probs(output.logits, output.audio_logits, delayed[..., start:end].to(model.device)).cpu()
        progress(end - start)
    losses = undelay(losses, delays, torch.nan).masked_fill(targets < 0, torch.nan)
    return losses[0].numpy()


def _chunks(frames: int, chunk: int, stop: int) -> list[tuple[int, int]]:
    """Pieces of at most `chunk` frames that also end at every multiple of `stop`."""
    if chunk < 1:
        raise MoshiTTTError(f"chunk is {chunk}; it must be at least 1 frame")
    ends = sorted({*range(chunk, frames, chunk), *range(stop, frames, stop), frames})
    return list(zip([0, *ends[:-1]], ends))


def by_stream(losses: np.ndarray) -> dict[str, np.ndarray]:
    """[S, T] -> mean loss [T] of text, of the semantic codebook, and of the acoustic ones; an absent stream is left out."""
    groups = {"text": losses[:1], "semantic": losses[1:2], "acoustic": losses[2:]}
    means = {}
    for name, rows in groups.items():
        if rows.size and np.isfinite(rows).any():
            count = np.isfinite(rows).sum(0)
            means[name] = np.where(count > 0, np.nansum(rows, 0) / np.maximum(count, 1), np.nan)
    return means


def bucket_edges(window: int, longest: int, per_octave: int = 2) -> list[int]:
    """Edges 0, …, window, … up to `longest`, evenly spaced on a log scale, with the window itself among them; the last is at least half
    one.
    """
    below = [round(window * 2 ** (-j / per_octave)) for j in range(3 * per_octave, 0, -1)]
    edges, j = [0, *below, window], 1
    while edges[-1] < longest:
        edges.append(round(window * 2 ** (j / per_octave)))
        j += 1
    if len(edges) > 2 and longest - edges[-2] < (edges[-1] - edges[-2]) / 2 and edges[-2] > window:
        del edges[-2]  # a sliver of a bucket is noise: the one before it takes its frames
    return sorted({*edges[:-1], longest})


def curve(losses: Sequence[np.ndarray], edges: Sequence[int], seed: int = 0) -> dict[str, list[Any]]:
    """Mean loss in each bucket of positions, with a 95% interval over the recordings that reach it; one alone has none."""
    result: dict[str, list[Any]] = {"position": [], "loss": [], "low": [], "high": [], "frames": []}
    for low, high in zip(edges[:-1], edges[1:]):
        parts = [row[low:high][np.isfinite(row[low:high])] for row in losses]
        parts = [part for part in parts if part.size]
        if not parts:
            continue
        units = [part.mean() for part in parts]
        interval = bootstrap_interval(units, seed) if len(units) > 1 else (None, None)
        values = (
            float(np.sqrt(max(low, 1) * high)),
            float(np.mean([part.mean() for part in parts])),
            *interval,
            sum(p.size for p in parts),
        )
        for key, value in zip(result, values):
            result[key].append(value)
    return result


def gain(
    control: Sequence[np.ndarray], ttt: Sequence[np.ndarray], window: int, beyond: Sequence[np.ndarray] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Paired test of the loss beyond the window: control minus TTT, positive where TTT is better.

    Pairs are recordings, for parts of one are not independent: with one alone there is a mean and no test. `beyond` [T] bool narrows the
    frames that count.
    """
    differences = []
    for number, (a, b) in enumerate(zip(control, ttt, strict=True)):
        difference = (a - b).astype(np.float64)
        if beyond is not None:
            difference[~beyond[number]] = np.nan
        if np.isfinite(difference[window:]).any():
            differences.append(float(np.nanmean(difference[window:])))
    return paired_test(differences, seed)


Losses = Callable[[str, CodeSequence, str], np.ndarray]


def losses_of(model: Any, chunk: int | None = None, seed: int = 0) -> Losses:
    """(name of a recording, its codes, condition) -> losses [S, T], computed anew each time."""
    return lambda name, sequence, condition: stream_losses(model, sequence, condition, chunk, seed)


def measure(
    losses: Losses, books: Mapping[str, CodeSequence], window: int, conditions: Sequence[str] = CONDITIONS, seed: int = 0
) -> dict[str, Any]:
    """The whole protocol over books of codes: curves of every condition and stream, and the gains over each control.

    `losses` gives the losses of one book under one condition, as `losses_of(model)` does.
    """
    check_books(books, window, conditions)
    found = {condition: [by_stream(losses(name, book, condition)) for name, book in books.items()] for condition in conditions}
    lengths = [book.moshi.shape[-1] for book in books.values()]
    streams = [name for name in STREAMS if all(name in rows for rows in found[TTT])]
    edges = bucket_edges(window, max(lengths))
    curves = {
        condition: {stream: curve([row[stream] for row in rows], edges, seed=seed) for stream in streams}
        for condition, rows in found.items()
    }
    gains: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for condition in conditions:
        if condition == TTT:
            continue
        pairs = {stream: _paired(found, condition, stream, lengths, window, seed) for stream in streams}
        gains[condition] = {stream: gain(control, ttt, window, beyond, seed) for stream, (control, ttt, beyond) in pairs.items()}
        if condition != SHUFFLED:  # there a position has another history in each order
            differences[condition] = {
                stream: curve([a - b for a, b in zip(control, ttt)], edges, seed=seed) for stream, (control, ttt, _) in pairs.items()
            }
    return {
        "kind": "long_context",
        "window": window,
        "frames": dict(zip(books, lengths)),
        "unit": "recordings",
        "streams": streams,
        "conditions": curves,
        "differences": differences,
        "gains": gains,
    }


def _paired(
    losses: Mapping[str, list[dict[str, np.ndarray]]], condition: str, stream: str, lengths: list[int], window: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]:
    """(losses [T] under a condition, those with TTT of the same frames, which frames [T] have a window of history under both)."""
    ttt = [found[stream] for found in losses[TTT]]
    control = [found[stream] for found in losses[condition]]
    if condition != SHUFFLED:
        return control, ttt, None
    beyond, back = [], []
    for row, frames in zip(control, lengths):
        order = shuffled_order(frames, window, seed)
        place = np.empty(frames, np.int64)
        place[order] = np.arange(frames)
        back.append(row[place])
        beyond.append(place >= window)
    return back, ttt, beyond


def check_conditions(conditions: Sequence[str]) -> None:
    """Raise a ValueError for a condition that is unknown, or where TTT is missing."""
    if TTT not in conditions:
        raise MoshiTTTError(f"conditions is {list(conditions)}; it must hold {TTT!r}, which the others are compared with")
    for condition in conditions:
        if condition not in CONDITIONS:
            raise MoshiTTTError(f"conditions holds {condition!r}; choose from {', '.join(CONDITIONS)}")


def check_books(books: Mapping[str, CodeSequence], window: int | None, conditions: Sequence[str]) -> None:
    """Raise a ValueError where the protocol could say nothing."""
    if window is None:
        raise MoshiTTTError("long context: the model's attention has no window (`sliding_window` is null), so nothing lies beyond it")
    if not books:
        raise MoshiTTTError("long context: no recordings; check the folder or the manifest")
    check_conditions(conditions)
    for name, book in books.items():
        if book.moshi.shape[-1] <= window:
            raise MoshiTTTError(
                f"{name}: {book.moshi.shape[-1]} frames, no more than the attention window of {window}; leave it out or give a longer one"
            )

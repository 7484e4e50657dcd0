"""Loss against position over whole books, streamed with the state carried in constant memory, and what TTT gains beyond the window.

Every condition runs over the same frames: TTT as it is; its state reset every window; fast weights frozen at W0 (no inner step); the gate
at 0 (plain Moshi); and the windows shuffled (the same sound, another history).

Shapes: S = 1 + K streams (text, Moshi's codebooks), T frames.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, NotRequired, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import TypedDict

from ..common.files import atomic_write, of_shape
from ..common.progress import progress_bar
from ..common.results import MORE, Part
from ..common.settings import DISTINCT, Count, settings_group
from ..delay_pattern import delay, undelay
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE, ZERO
from . import drawing
from .formatting import interval, p_value
from .inputs import RecordingsSettings, content_lines, encoded
from .kept_numbers import CURE, codes_digest
from .scoring import CodeSequence, check_sequences, collate, gather_log_probs
from .statistics import bootstrap_interval, paired_test
from .task import Context, Measure, Table, Task

TTT, RESET, FROZEN, GATE_ZERO, SHUFFLED = "TTT", "reset every window", "frozen at W0", "gate 0", "shuffled windows"
Condition = Literal["TTT", "reset every window", "frozen at W0", "gate 0", "shuffled windows"]
CONDITIONS = get_args(Condition)
STREAMS = ("text", "semantic", "acoustic")


@settings_group
class LongContextSettings(RecordingsSettings):
    """Loss against position under each condition."""

    conditions: Annotated[list[Condition], DISTINCT] = field(default_factory=lambda: list(CONDITIONS))
    """The memory as it is, and what is taken from it."""
    chunk: Count | None = None
    """Frames in one forward pass; null: a window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if TTT not in self.conditions:
            raise MoshiTTTError(f"`conditions={self.conditions}` must hold {TTT!r}, which the others are compared with; add it.")


def condition_parameters(model: Any, condition: str) -> dict[str, Tensor]:
    """The parameters that stand in for the model's own under a condition; the model itself is not touched."""
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
    check_books(books, window)
    found = {condition: [by_stream(losses(name, book, condition)) for name, book in books.items()] for condition in conditions}
    lengths = [book.moshi.shape[-1] for book in books.values()]
    streams = [name for name in STREAMS if all(name in rows for rows in found[TTT])]
    edges = bucket_edges(window, max(lengths))
    curves = {
        condition: {stream: curve([row[stream] for row in rows], edges, seed=seed) for stream in streams}
        for condition, rows in found.items()
    }
    controls = [condition for condition in conditions if condition != TTT]
    pairs = {condition: {stream: _paired(found, condition, stream, lengths, window, seed) for stream in streams} for condition in controls}
    return {
        "kind": "long_context",
        "window": window,
        "frames": dict(zip(books, lengths)),
        "hours": sum(lengths) / FRAME_RATE / 3600,
        "unit": "recordings",
        "streams": streams,
        "conditions": curves,
        "differences": {
            condition: {s: curve([a - b for a, b in zip(*both[:2])], edges, seed=seed) for s, both in streams_of.items()}
            for condition, streams_of in pairs.items()
            if condition != SHUFFLED  # there a position has another history in each order
        },
        "gains": {
            condition: {stream: gain(*both[:2], window, both[2], seed) for stream, both in streams_of.items()}
            for condition, streams_of in pairs.items()
        },
        "each": {
            condition: {stream: {name: beyond(row[stream], window) for name, row in zip(books, rows)} for stream in streams}
            for condition, rows in found.items()
        },
    }


def beyond(losses: np.ndarray, window: int) -> float | None:
    """Mean loss of one recording beyond the window; None where nothing was predicted there."""
    there = losses[window:][np.isfinite(losses[window:])]
    return float(there.mean()) if there.size else None


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


def check_books(books: Mapping[str, CodeSequence], window: int) -> None:
    """Raise a MoshiTTTError that names a recording beyond whose window nothing lies."""
    for name, book in books.items():
        if book.moshi.shape[-1] <= window:
            raise MoshiTTTError(
                f"{name}: {book.moshi.shape[-1]} frames, no more than the attention window of {window}; leave it out or give a longer one"
            )


# ---------------------------------------------------------------- the evaluation


class Curve(TypedDict):
    """Mean loss in each bucket of positions, with its interval where there is one."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    position: list[float]
    loss: list[float]
    low: list[float | None]
    high: list[float | None]


class Gain(TypedDict):
    """A paired test of control minus TTT."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    mean: float
    interval: list[float] | None
    p: float | None
    pairs: int


class LongContextPart(Part):
    """window: of attention, frames. frames: recording -> length. unit: of the pairs. conditions, differences: condition -> stream -> curve.
    gains: condition -> stream -> test. each: condition -> stream -> recording -> mean loss beyond the window."""

    window: int
    unit: str
    streams: list[str]
    conditions: dict[str, dict[str, Curve]]
    differences: dict[str, dict[str, Curve]]
    gains: dict[str, dict[str, Gain]]
    each: NotRequired[dict[str, dict[str, dict[str, float | None]]]]


class LongContext(Task):
    name, settings, shape = "long_context", LongContextSettings, LongContextPart
    question = "Does it use what left the attention window?"
    reading = "The same recording with TTT and with each part of it switched off."

    def inputs(self, section: LongContextSettings) -> Iterable[str]:
        return content_lines(section)

    def check(self, section: LongContextSettings, subject: Any) -> None:
        if subject.config.get("sliding_window", 1) is None:
            raise MoshiTTTError(
                "long_context: the model's `sliding_window=null` must be a number of frames; nothing lies beyond no window."
            )

    def run(self, subject: Any, section: LongContextSettings, context: Context) -> dict[str, Any]:
        model, processor = subject.load()
        found = encoded(processor, section, context.bar("encoding"))
        check_books(found, model.config.sliding_window)
        total = sum(book.moshi.shape[-1] for book in found.values()) * len(section.conditions)
        digests = {name: codes_digest(book) for name, book in found.items()}
        with progress_bar(total=total, desc="long context", unit="frames", disable=not context.show_progress) as bar:

            def losses(name: str, book: CodeSequence, condition: str) -> np.ndarray:
                # of the codes, not of the name: another set of data may use the same names
                key = f"{subject.digest} {digests[name]} {condition} {context.seed}"
                path = context.output / "losses" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
                if path.is_file():
                    bar.update(book.moshi.shape[-1])
                    with of_shape(str(path), CURE):
                        return np.load(path, allow_pickle=False)
                measured = stream_losses(model, book, condition, section.chunk, context.seed, bar.update)
                buffer = io.BytesIO()
                np.save(buffer, measured, allow_pickle=False)
                atomic_write(path, buffer.getvalue())
                return measured

            return measure(losses, found, model.config.sliding_window, section.conditions, context.seed)

    def figure(self, part: LongContextPart) -> Figure:
        """Above: loss against position (log scale) for each stream and condition, with intervals and the attention window marked. Below: how
        much higher the loss of each control in the same order is than TTT's."""
        streams = part["streams"]
        figure = drawing.new_figure(max(3.6 * len(streams), 5.6), 5.2)
        grid = figure.subplots(2, len(streams), squeeze=False, sharex=True)
        for (above, below), stream in zip(grid.T, streams):
            for index, name in enumerate(part["conditions"]):
                for axes, curves in ((above, part["conditions"]), (below, part["differences"])):
                    if name in curves:
                        one = curves[name][stream]
                        drawing.curve(axes, one["position"], one["loss"], index, name, list(zip(one["low"], one["high"])))
            below.axhline(0, color=drawing.GREY, linewidth=0.8)
            for axes in (above, below):
                axes.axvline(part["window"], color=drawing.GREY, linestyle="--", linewidth=1)
            above.text(part["window"], 1.0, " window", color=drawing.GREY, fontsize=7, transform=above.get_xaxis_transform(), va="top")
            below.set_xscale("log")
            below.xaxis.set_major_formatter("{x:,.0f}")
            below.set_xlabel("position, frames (750 a minute)")
            above.set_title(stream, fontsize=9)
        grid[0, 0].set_ylabel("loss, nats a token")
        grid[1, 0].set_ylabel("loss − loss with TTT, nats a token")
        drawing.legend_below(figure, grid[0, 0])
        return figure

    def table(self, part: LongContextPart) -> Table:
        """What TTT gains beyond the window over each control: mean difference of the losses, interval, p value."""
        rows = [
            [f"{condition} − TTT, {stream}", f"{test['mean']:.4f}", interval(test["interval"], digits=4), p_value(test["p"]), test["pairs"]]
            for condition, streams in part["gains"].items()
            for stream, test in streams.items()
        ]
        note = (
            f"Loss beyond the window of {part['window']} frames, in nats a token; positive: TTT is better. "
            f"Paired over {part['unit']}; one alone has no interval."
        )
        return Table(["", "difference", "95% interval", "p", "pairs"], rows, note)

    def finding(self, part: LongContextPart) -> str:
        tests = {f"{control}, {stream}": test for control, streams in part["gains"].items() for stream, test in streams.items()}
        known = {name: test for name, test in tests.items() if test["interval"] is not None}
        better = [name for name, test in known.items() if test["interval"][0] > 0]  # type: ignore[index]
        worse = [name for name, test in known.items() if test["interval"][1] < 0]  # type: ignore[index]
        if not known:
            return "One recording says nothing of others: give more for an interval."
        return f"Beyond the window TTT lowers the loss in {len(better)} of {len(known)} comparisons and raises it in {len(worse)}."

    def measures(self, part: LongContextPart) -> list[Measure]:
        found = []
        for condition, streams in part["conditions"].items():
            for stream, one in streams.items():
                for x, loss in zip(one["position"], one["loss"]):
                    found.append(Measure(f"loss, {stream}", condition, x, loss, "nats a token", {}, False, "position, frames"))
        for condition, values in part.get("each", {}).items():
            for stream, losses in values.items():
                each = {name: loss for name, loss in losses.items() if loss is not None}
                if each:
                    mean = sum(each.values()) / len(each)
                    found.append(Measure("loss beyond the window", f"{condition}, {stream}", None, mean, "nats a token", each, False))
        return found


TASK = LongContext()

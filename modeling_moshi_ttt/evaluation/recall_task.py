"""Recall beyond the attention window: what was heard longer ago than the window must come back as text.

A sequence holds N frames of noise, P key-value pairs as user audio codes (a frame for the key, a frame for its value), C of the pairs again
with other values, D frames of noise, then the keys again in another order. One frame after each key the text stream must give its value. Where D is beyond the reach of all
attention windows together, window attention alone cannot know it.

Shapes: B rows, P pairs, T frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configuration_moshi_ttt import MoshiTTTConfig
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from ..tokens_moshi_ttt import IGNORED, ZERO
from .statistics import bootstrap_interval

KEYS = 50  # that there are, and so the most pairs
LAYERS = 2  # of every model that is trained
VALUES, NOISE = 50, 28
FIRST_TEXT = 4  # text ids 0 to 3 keep Moshi's meanings: padding, end of padding, ...
CHANCE = 1 / VALUES


def reach(window: int) -> int:
    """Frames that window attention sees through all layers together, the newest among them: layers × (window − 1) + 1."""
    return LAYERS * (window - 1) + 1


def share_within_reach(pairs: int, distance: int, window: int) -> float:
    """Share of the answers whose value, `distance` frames of noise before the first question, attention can still reach at the question.

    Every pair is asked at every place alike. The value that is told k-th from last is 2 k − 1 + `distance` + j frames older than question j;
    of a pair that is told anew the newest value counts, so that corrections change nothing.
    """
    ages = [2 * k - 1 + distance + j for k in range(1, pairs + 1) for j in range(pairs)]
    return sum(age < reach(window) for age in ages) / len(ages)


@dataclass(frozen=True)
class Batch:
    """User codes [B, 1, T], and text labels [B, T]: the value's text id one frame after each repeated key, -100 elsewhere."""

    user_audio_codes: Tensor
    text_labels: Tensor


def make_batch(rows: int, pairs: int, distance: int, generator: torch.Generator, told_after: int = 0, corrections: int = 0) -> Batch:
    """`rows` fresh sequences: `told_after` frames of noise before the first key, `distance` between the last value and the first repeated
    key; the first `corrections` of the pairs are told anew, with other values, after all were told.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]  # [B, P], no key twice
    values = torch.randint(VALUES, (rows, pairs), generator=generator)
    told = torch.stack([keys, KEYS + values], dim=-1).flatten(1)  # [B, 2 P]
    if corrections:
        values = values.clone()
        values[:, :corrections] += torch.randint(1, VALUES, (rows, corrections), generator=generator)
        values %= VALUES
        told = torch.cat([told, torch.stack([keys, KEYS + values], dim=-1)[:, :corrections].flatten(1)], dim=1)  # [B, 2 (P + C)]
    noise = KEYS + VALUES + torch.randint(NOISE, (rows, distance + told_after), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(1)
    silence = torch.full((rows, 1), ZERO)  # the frame in which the last answer is given
    codes = torch.cat([noise[:, distance:], told, noise[:, :distance], keys.gather(1, order), silence], dim=1)
    labels = torch.full_like(codes, IGNORED)
    labels[:, -pairs:] = FIRST_TEXT + values.gather(1, order)
    return Batch(codes[:, None], labels)


@dataclass(frozen=True)
class Variant:
    """A model to train: `mixer` None is window attention alone."""

    mixer: str | None = "linear"
    mini_batch_size: int = 16
    base_lr: float | None = None  # None: 16 for linear, the model's default for mlp


def make_model(variant: Variant, window: int = 16, seed: int = 0) -> MoshiTTTForConditionalGeneration:
    """A Moshi-TTT of two layers, width 64 and one codebook a side; without TTT the same model with `ttt_layers=[]`."""
    torch.manual_seed(seed)
    base_lr = variant.base_lr or (16.0 if variant.mixer == "linear" else None)
    config = MoshiTTTConfig(
        vocab_size=FIRST_TEXT + VALUES,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        ffn_dim=256,
        sliding_window=window,
        audio_vocab_size=KEYS + VALUES + NOISE,
        num_codebooks=1,
        num_user_codebooks=1,
        depth_decoder_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "ffn_dim": 32},
        ttt_layers=[] if variant.mixer is None else "all",
        ttt_mixer=variant.mixer or "linear",
        ttt_num_heads=2,
        ttt_mini_batch_size=variant.mini_batch_size,
        ttt_base_lr=base_lr,
        # an open gate: from 0.1 the layer is found too, after three times as many steps
        ttt_gate_init=1.0,
    )
    return MoshiTTTForConditionalGeneration(config)


@dataclass
class TrainSettings:
    """How a variant is trained. Training ends early, after `cool_down` steps, once the running accuracy passes `enough`."""

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    warm_up: int = 50
    cool_down: int = 100
    enough: float = 0.985
    seconds: float = 600.0  # the cool-down starts after this long at the latest
    pairs: tuple[int, ...] = (4, 8)
    distances: tuple[int, int] = (24, 40)  # lowest and highest; longer ones are never trained
    told_after: tuple[int, int] = (0, 0)  # lowest and highest
    corrections: tuple[int, int] = (0, 0)  # lowest and highest
    seed: int = 0


def train(model: Any, settings: TrainSettings, report: Callable[[int, float, float], object] = lambda *_: None) -> dict[str, float]:
    """Train on text answers alone; returns the steps taken, the seconds (by the clock and of CPU time), the last running accuracy, and
    whether time ran out before the task was learned."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    started, cpu, running, step, last = time.monotonic(), time.process_time(), 0.0, 0, settings.steps
    out_of_time = False
    while step < last:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / settings.warm_up, (last - step) / settings.cool_down, 1.0)
        pairs = settings.pairs[int(torch.randint(len(settings.pairs), (), generator=generator))]
        axes = (settings.distances, settings.told_after, settings.corrections)
        distance, told_after, corrections = (_between(bounds, generator) for bounds in axes)
        loss, accuracy = _answers(model, make_batch(settings.batch_size, pairs, distance, generator, told_after, corrections))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = 0.95 * running + 0.05 * float(accuracy.float().mean())
        learned, late = running > settings.enough, time.monotonic() - started > settings.seconds
        if (learned or late) and step + settings.cool_down < last:
            last, out_of_time = step + settings.cool_down, not learned
        report(step, float(loss.detach()), running)
    model.eval()
    seconds = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    return {"steps": step, **seconds, "running_accuracy": running, "out_of_time": out_of_time}


def _between(bounds: tuple[int, int], generator: torch.Generator) -> int:
    """A number from the lowest to the highest; where they are one nothing is drawn, so that runs from before an axis was added stay as they
    were.
    """
    low, high = bounds
    return low if low == high else int(torch.randint(low, high + 1, (), generator=generator))


def _answers(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The text loss, and which answers [B, P] were right."""
    output = model(user_audio_codes=batch.user_audio_codes, text_labels=batch.text_labels, use_cache=False)
    asked = batch.text_labels >= 0
    right = output.logits.argmax(-1)[asked] == batch.text_labels[asked]
    return output.text_loss, right.view(len(asked), -1)


@torch.no_grad()
def measure(
    model: Any, pairs: int, distance: int, rows: int = 512, seed: int = 1234, told_after: int = 0, corrections: int = 0
) -> dict[str, Any]:
    """Accuracy on fresh sequences, the same for every model, with a bootstrap interval over sequences, which are independent."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    rights = []
    for start in range(0, rows, 128):
        batch = make_batch(min(128, rows - start), pairs, distance, generator, told_after, corrections)
        rights.append(_answers(model, batch)[1].sum(1))
    counts = torch.cat(rights)
    accuracy = counts.double() / pairs
    return {
        "pairs": pairs,
        "told_after": told_after,
        "corrections": corrections,
        "distance": distance,
        "within_reach": share_within_reach(pairs, distance, model.config.sliding_window),
        "accuracy": float(accuracy.mean()),
        "interval": list(bootstrap_interval(accuracy.numpy(), seed)),
        "sequences": rows,
        "rights": " ".join(map(str, counts.tolist())),  # on one line of the file
    }


def measure_all(
    model: Any,
    pairs: Sequence[int],
    distances: Sequence[int],
    rows: int = 512,
    told_after: Sequence[int] = (0,),
    corrections: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    return [
        measure(model, p, d, rows, told_after=n, corrections=c) for p in pairs for n in told_after for c in corrections for d in distances
    ]

"""Learning rates and AdamW's beta1 as plain functions of the step: nothing to save, nothing to restore, nothing that runs ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .run_config import OptimSettings

# torch.optim.lr_scheduler.OneCycleLR's defaults, which moshi-finetune uses
START_DIVISOR, END_DIVISOR = 25.0, 1e4
MAX_MOMENTUM, BASE_MOMENTUM = 0.95, 0.85


def set_rates(groups: Sequence[dict[str, Any]], rates: Sequence[float], step: int, settings: OptimSettings) -> float:
    """Give the optimizer's groups what they take in step `step`; returns the factor that their `rates` are multiplied by."""
    factor = rate_factor(step, settings)
    for group, rate in zip(groups, rates):
        group["lr"] = rate * factor
        if "betas" in group:  # Adafactor has none
            group["betas"] = (beta1(step, settings), group["betas"][1])
    return factor


def rate_factor(step: int, settings: OptimSettings) -> float:
    """What the learning rates are multiplied by in step `step` (from 0) of `settings.steps`.

    "onecycle": from 1/25 up over the share `warmup` of the steps and down to 1/250000, both along a cosine (Smith and Topin 2018);
    "cosine": linear warm-up, then a cosine down to 0; "constant": linear warm-up, then 1.
    """
    if settings.schedule == "onecycle":
        return _one_cycle(step, settings, 1 / START_DIVISOR, 1.0, 1 / START_DIVISOR / END_DIVISOR)
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    if settings.schedule == "constant":
        return 1.0
    return _between(1.0, 0.0, (step - warmup) / max(settings.steps - warmup, 1))


def longer(step: int, planned: int, settings: OptimSettings) -> str:
    """What happens to the rates where a run that was planned for fewer steps goes on from `step`, in a sentence."""
    then, now = rate_factor(min(step, planned - 1), replace(settings, steps=planned)), rate_factor(step, settings)
    if settings.schedule == "constant":
        how = "the schedule constant goes on"
    else:
        how = f"the schedule {settings.schedule} is stretched over all {settings.steps}, so from here on it is not a run planned for {planned}"
    return (
        f"optim.steps was {planned} and is {settings.steps}: {how}; the rates' factor was {then:.3g} and is {now:.3g} in step {step + 1}."
    )


def beta1(step: int, settings: OptimSettings) -> float:
    """AdamW's beta1 in step `step`: under "onecycle" from 0.95 down to 0.85 while the rates rise and back up, else the one in the settings."""
    if settings.schedule == "onecycle":
        return _one_cycle(step, settings, MAX_MOMENTUM, BASE_MOMENTUM, MAX_MOMENTUM)
    return settings.betas[0]


def _one_cycle(step: int, settings: OptimSettings, start: float, peak: float, end: float) -> float:
    """OneCycleLR's two phases, between which the peak may fall between two steps."""
    top, last = settings.warmup * settings.steps - 1, settings.steps - 1
    if step <= top:
        return _between(start, peak, step / top if top > 0 else 1.0)  # torch divides by zero where the peak is the first step
    return _between(peak, end, (step - top) / (last - top))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

"""Learning rates as plain functions of the step: nothing to save, nothing to restore, nothing that runs ahead."""

from __future__ import annotations

import math

from .run_config import OptimSettings

# torch.optim.lr_scheduler.OneCycleLR's defaults, which moshi-finetune uses
START_DIVISOR, END_DIVISOR = 25.0, 1e4


def rate_factor(step: int, settings: OptimSettings) -> float:
    """What the learning rates are multiplied by in step `step` (from 0) of `settings.steps`.

    "onecycle": from 1/25 up over the share `warmup` of the steps and down to 1/250000, both along a cosine (Smith and Topin 2018);
    "cosine": linear warm-up, then a cosine down to 0; "constant": linear warm-up, then 1.
    """
    last = settings.steps - 1
    if settings.schedule == "onecycle":
        peak = settings.warmup * settings.steps - 1
        if step <= peak:
            return _between(1 / START_DIVISOR, 1.0, step / peak if peak > 0 else 1.0)
        return _between(1.0, 1 / START_DIVISOR / END_DIVISOR, (step - peak) / max(last - peak, 1))
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return (step + 1) / (math.floor(warmup) + 1)
    if settings.schedule == "constant":
        return 1.0
    return _between(1.0, 0.0, (step - warmup) / max(settings.steps - warmup, 1))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(share, 1.0)))

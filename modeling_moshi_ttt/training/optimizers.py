"""Muon and AdamW as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) for groups with `matrices` true, torch's AdamW for all others, which Muon is not made for.

    Muon's steps are scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4), so that one learning
    rate serves both.

    Args:
        groups: of parameters, each with "matrices" (bool), "lr" and "weight_decay".
        betas: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group["matrices"]]
        others = [group for group in self.param_groups if not group["matrices"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, foreach=False))
        for part in self.parts:  # they share this one's groups, whose rates change in every step, and its state, which is saved
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

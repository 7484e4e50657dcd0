"""What the inner models learn while a recording passes: the three inner losses of the TTT paper's figure 5 (arXiv:2407.04620), and drift.

ℓ(W_0; x_t), ℓ(W_{t-1}; x_t) and ℓ(W_t; x_t) at every token (mini-batch 1), or at each mini-batch's last token, averaged over recordings and
heads and smoothed. Learning shows as first > second > third, with a growing gap to the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors_moshi_ttt import MoshiTTTError
from .scoring import CodeSequence, check_sequences, collate

CURVES = ("initial", "before", "after")
CHUNK = 1024  # frames at once where attention has no window


@torch.no_grad()
def inner_losses(model: Any, sequence: CodeSequence, chunk: int | None = None) -> dict[int, dict[str, np.ndarray]]:
    """layer -> {"position" [N], "initial", "before", "after" [N] (mean over heads), "drift" [N]} of one recording, streamed in chunks."""
    check_sequences(model.config, [sequence])
    model.eval()
    frames, step = sequence.moshi.shape[-1], chunk or model.config.sliding_window or CHUNK
    inputs, cache = collate(model.config, [sequence], "cpu"), model.new_cache(1)
    found: dict[int, dict[str, list[np.ndarray]]] = {layer: {} for layer in model.config.ttt_layers}
    for start in range(0, frames, step):
        piece = {name: tensor[..., start : start + step].to(model.device) for name, tensor in inputs.items()}
        output = model(**piece, past_key_values=cache, output_inner_losses=True, return_dict=True)
        for layer, losses in output.inner_losses.items():
            found[layer].setdefault("position", []).append(losses.position.cpu().numpy())
            found[layer].setdefault("drift", []).append(losses.drift[0].double().cpu().numpy())
            for name in CURVES:
                found[layer].setdefault(name, []).append(getattr(losses, name)[0].double().mean(-1).cpu().numpy())
    return {layer: {name: np.concatenate(parts) for name, parts in curves.items()} for layer, curves in found.items()}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` points [N] -> [N - width + 1]; over all of them where there are fewer."""
    if width < 1:
        raise MoshiTTTError(f"smooth is {width}; it must be at least 1 point")
    width = min(width, len(values))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[width:] - sums[:-width]) / width


def gates(model: Any) -> dict[int, dict[str, float]]:
    """layer -> mean, mean of the absolute values and maximum of tanh(gating_alpha)."""
    table = {}
    for name, parameter in model.named_parameters():
        if name.endswith("gating_alpha"):
            gate = torch.tanh(parameter.detach().float())
            layer = int(name.split(".layers.")[1].split(".")[0])
            table[layer] = {"mean": gate.mean().item(), "mean_abs": gate.abs().mean().item(), "max_abs": gate.abs().max().item()}
    return table


def measure(model: Any, recordings: Mapping[str, CodeSequence], width: int = 10) -> dict[str, Any]:
    """Curves of every TTT layer, averaged over the recordings as far as the shortest reaches."""
    if not model.config.ttt_layers:
        raise MoshiTTTError("inner loss: the model has no TTT layers (ttt_layers is empty)")
    if not recordings:
        raise MoshiTTTError("inner loss: no recordings; check the folder or the manifest")
    size, shortest = model.config.ttt_mini_batch_size, min(recordings, key=lambda name: recordings[name].moshi.shape[-1])
    if recordings[shortest].moshi.shape[-1] < size:
        raise MoshiTTTError(f"{shortest}: shorter than one mini-batch of {size} frames; leave it out")
    found = [inner_losses(model, sequence) for sequence in recordings.values()]
    layers, gate = {}, gates(model)
    for layer in model.config.ttt_layers:
        points = min(len(curves[layer]["position"]) for curves in found)
        mean = {name: np.mean([curves[layer][name][:points] for curves in found], axis=0) for name in (*CURVES, "drift")}
        curves = {name: smooth(values, width).tolist() for name, values in mean.items()}
        position = smooth(found[0][layer]["position"][:points].astype(np.float64), width).tolist()
        layers[str(layer)] = {"position": position, **curves, "gate": gate[layer]}
    return {"kind": "inner_loss", "mini_batch_size": size, "smooth": width, "recordings": len(recordings), "layers": layers}

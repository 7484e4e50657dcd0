"""What the inner models learn while a recording passes: the three inner losses of the TTT paper's figure 5 (arXiv:2407.04620), and drift.

ℓ(W_0; x_t), ℓ(W_{t-1}; x_t) and ℓ(W_t; x_t) at every token (mini-batch 1), or at each mini-batch's last token, averaged over recordings and
heads and smoothed. Learning shows as first > second > third, with a growing gap to the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NotRequired

import numpy as np
import torch
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from ..common.results import MORE, Part
from ..common.settings import Count, settings_group
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from . import drawing
from .inputs import RecordingsSettings, content_lines, encoded
from .scoring import CodeSequence, check_sequences, collate
from .task import Context, Measure, Table, Task

CURVES = ("initial", "before", "after")
CHUNK = 1024  # frames at once where attention has no window


@settings_group
class InnerLossSettings(RecordingsSettings):
    """The inner losses of every TTT layer."""

    smooth: Count = 10
    """Points of the running mean."""


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
    """Running mean over `width` (at least 1) points [N] -> [N - width + 1]; over all of them where there are fewer."""
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
    size, shortest = model.config.ttt_mini_batch_size, min(recordings, key=lambda name: recordings[name].moshi.shape[-1])
    if recordings[shortest].moshi.shape[-1] < size:
        raise MoshiTTTError(f"{shortest}: shorter than one mini-batch of {size} frames; leave it out")
    found = [inner_losses(model, sequence) for sequence in recordings.values()]
    layers, gate, each = {}, gates(model), {}
    for layer in model.config.ttt_layers:
        each[str(layer)] = {name: float(curves[layer]["after"].mean()) for name, curves in zip(recordings, found)}
        points = min(len(curves[layer]["position"]) for curves in found)
        mean = {name: np.mean([curves[layer][name][:points] for curves in found], axis=0) for name in (*CURVES, "drift")}
        curves = {name: smooth(values, width).tolist() for name, values in mean.items()}
        position = smooth(found[0][layer]["position"][:points].astype(np.float64), width).tolist()
        layers[str(layer)] = {"position": position, **curves, "gate": gate[layer]}
    hours = sum(sequence.moshi.shape[-1] for sequence in recordings.values()) / FRAME_RATE / 3600
    about = {"kind": "inner_loss", "mini_batch_size": size, "smooth": width, "recordings": len(recordings), "hours": hours}
    return about | {"layers": layers, "each": each}


# ---------------------------------------------------------------- the evaluation


class Layer(TypedDict):
    """Of one layer: position [N], the three losses [N] and drift [N]; its gate."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    position: list[float]
    initial: list[float]
    before: list[float]
    after: list[float]
    drift: list[float]
    gate: dict[str, float]


class InnerLossPart(Part):
    """layers: number -> curves. each: layer -> recording -> mean of ℓ(Wₜ; xₜ)."""

    mini_batch_size: int
    recordings: int
    layers: dict[str, Layer]
    each: NotRequired[dict[str, dict[str, float]]]


LOSSES = {"initial": "ℓ(W₀; xₜ)", "before": "ℓ(Wₜ₋₁; xₜ)", "after": "ℓ(Wₜ; xₜ)"}


class InnerLoss(Task):
    name, settings, shape = "inner_loss", InnerLossSettings, InnerLossPart
    question = "Do the inner models learn?"
    reading = "They do where the three losses lie one below the other: W₀ never learned, Wₜ₋₁ has heard all before token t."

    def inputs(self, section: InnerLossSettings) -> Iterable[str]:
        return content_lines(section)

    def check(self, section: InnerLossSettings, subject: Any) -> None:
        if not subject.ttt.get("ttt_layers"):
            raise MoshiTTTError("inner_loss: the model's `ttt_layers=[]` must name some layers; leave this section out.")

    def run(self, subject: Any, section: InnerLossSettings, context: Context) -> dict[str, Any]:
        model, processor = subject.load()
        return measure(model, encoded(processor, section, context.bar("encoding")), section.smooth)

    def figure(self, part: InnerLossPart) -> Figure:
        """The three inner losses of each TTT layer against position, smoothed, as in figure 5 of the TTT paper (arXiv:2407.04620)."""
        layers = part["layers"]
        columns = min(4, len(layers))
        rows = -(-len(layers) // columns)
        figure = drawing.new_figure(max(3.0 * columns, 4.0), 2.5 * rows + 0.2)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (layer, one) in zip(grid, layers.items()):
            for index, (key, label) in enumerate(LOSSES.items()):
                look = drawing.line_style(index) | {"marker": None}  # a point a token
                axes.plot(one["position"], one[key], label=label, **look)  # type: ignore[literal-required]
            axes.set_title(f"layer {layer}, drift {one['drift'][-1]:.2g}, gate {one['gate']['mean_abs']:.2g}", fontsize=8)
            axes.set_xlabel("token t (750 a minute)")
        for axes in grid[len(layers) :]:
            axes.remove()
        grid[0].set_ylabel("inner loss, mean square")
        drawing.legend_below(figure, grid[0])
        return figure

    def table(self, part: InnerLossPart) -> Table:
        """Mean of the three inner losses of each layer, drift and gate."""
        rows = [
            [f"layer {layer}", *[f"{mean:.4f}" for mean in means(one)], f"{one['drift'][-1]:.3g}", f"{one['gate']['mean_abs']:.3g}"]
            for layer, one in part["layers"].items()
        ]
        head = ["", *LOSSES.values(), "drift ‖W − W₀‖", "mean |tanh α|"]
        return Table(head, rows, f"{part['recordings']} recordings, mini-batch {part['mini_batch_size']}.")

    def finding(self, part: InnerLossPart) -> str:
        learning = [layer for layer, one in part["layers"].items() if sorted(means(one), reverse=True) == means(one)]
        return f"{len(learning)} of {len(part['layers'])} layers learn as they read: their three losses lie in order."

    def measures(self, part: InnerLossPart) -> list[Measure]:
        found = []
        for layer, one in part["layers"].items():
            each = part.get("each", {}).get(layer, {})
            panel, mean = "mean inner loss " + LOSSES["after"], sum(each.values()) / len(each) if each else means(one)[-1]
            found.append(Measure(panel, f"layer {layer}", None, mean, "mean square", each, False))
            for key, label in LOSSES.items():
                points = zip(one["position"], one[key])  # type: ignore[literal-required]
                found += [Measure(f"layer {layer}", label, x, y, "mean square", {}, False, "token t") for x, y in points]
        return found


def means(layer: Layer) -> list[float]:
    """Of the three losses, in the order in which they fall where a layer learns."""
    return [sum(layer[key]) / len(layer[key]) for key in LOSSES]  # type: ignore[literal-required]


TASK = InnerLoss()

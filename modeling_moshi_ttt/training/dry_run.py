"""What a simulated run says to who would start it: its account, whether a card holds it, and what would fit where it does not."""

from __future__ import annotations

import torch

from .. import ttt_kernels
from .cards import CARDS, GB, Card, needed
from .launch import Launch
from .run_config import RunConfig
from .simulate import Simulation, model_config, simulate

SHARED = ("weights", "gradients", "moments")  # what FSDP2 cuts


def card_here() -> Card | None:
    """This machine's GPU; with the data sheet's speeds where there is one of its name, else those of an A100."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    sheet = next((card for card in CARDS.values() if card.name in found.name), CARDS["A100"])
    return sheet._replace(
        name=found.name,
        memory=float(found.total_memory),
        multiprocessors=found.multi_processor_count,
        shared=ttt_kernels._shared_bytes(torch.device("cuda", 0)),
    )


def dry_run(run: RunConfig, launch: Launch) -> str:
    """The short form: a few lines for the card there is, or for an H100."""
    here = card_here()
    card = here or CARDS["H100"]
    found = simulate(run, launch, card)
    where = f"{card.name}, {card.memory / GB:.0f} GB" + ("" if here else "; there is no GPU here")
    lines = [
        f"{run.mode}, {launch.processes} x {run.data.batch_size} x {run.data.accumulation} windows of {run.data.window_seconds:g} s a step ({where})"
    ]
    lines += account(found)
    if not found.kernels and model_config(run).ttt_layers:
        lines.append(
            f"the TTT layers run in torch: the kernels do not take this card ({card.shared // 1024} KB of shared memory) or these layers"
        )
    return "\n".join([*lines, verdict(run, launch, found, card)])


def account(found: Simulation) -> list[str]:
    """Lines of what it takes: memory by kind, the host's, a checkpoint, a step."""
    kinds = ", ".join(
        f"{kind} {size / GB:.1f}" for kind, size in sorted(found.by_kind.items(), key=lambda item: -item[1]) if size >= 0.05 * GB
    )
    speed = ", ".join(f"{name} {found.tokens / seconds:,.0f}" for name, seconds in found.step_seconds.items())
    return [
        f"memory a GPU, simulated: {found.peak / GB:.1f} GB ({kinds})",
        f"host memory of a node: {found.host_start / GB:.0f} GB to start, {found.host_save / GB:.0f} GB to save; a checkpoint is {found.checkpoint / GB:.1f} GB",
        f"a step on each GPU: {found.flops / 1e12:,.0f} TFLOP, {found.moved / GB:,.0f} GB of its memory, {found.sent / GB:,.0f} GB between GPUs",
        f"tokens a second by the roofline, at most: {speed}",
    ]


def fits(found: Simulation, card: Card) -> bool:
    """Whether the card holds this run, with what the CUDA context and the allocator take besides."""
    return needed(found.peak) <= card.memory


def verdict(run: RunConfig, launch: Launch, found: Simulation, card: Card) -> str:
    """One line: it fits, or what would."""
    need = f"{needed(found.peak) / GB:.1f} GB with the context and the allocator's waste"
    if fits(found, card):
        return f"fits {card.name}: {need}"
    return f"does not fit {card.name}: {need}. {cure(run, launch, found, card)}"


def cure(run: RunConfig, launch: Launch, found: Simulation, card: Card) -> str:
    """What to change so that it fits, scaled from this account: fewer rows at once, an optimizer without moments, or more GPUs."""
    rows, kinds = run.data.batch_size, found.by_kind
    # lanes are as many whatever the rows of a micro-batch
    growing = kinds["activations"] + (kinds["states"] if run.data.carry == "none" else 0)
    fixed = found.peak - growing
    fewer = [n for n in range(rows - 1, 0, -1) if rows % n == 0]

    def smaller(base: float) -> int | None:
        return next((n for n in [rows, *fewer] if needed(base + growing * n / rows) <= card.memory), None)

    light = fixed - kinds.get("moments", 0)
    choices = [("", smaller(fixed))]
    if not launch.sharded and run.optim.optimizer == "adamw":
        choices.append(("optim.optimizer=adafactor ", smaller(light)))
    if not launch.sharded:
        shared = sum(kinds.get(kind, 0) for kind in SHARED)
        layer = found.by_kind.get("weights", 0) / 16  # two gathered layers of some thirty
        for world in (2, 4, 8):
            choices.append((f"--launch fsdp2_8gpu on {world} GPUs, ", smaller(fixed - shared * (1 - 1 / world) + layer)))
    for change, n in choices:
        if n is not None:
            less = "" if n == rows else f"data.batch_size={n} data.accumulation={run.data.accumulation * rows // n}"
            return f"Would fit: {(change + less).rstrip(', ')}."
    larger = [other.name for other in CARDS.values() if other.memory > card.memory and fits(found, other)]
    return (
        f"Would fit: {larger[0]}, or a shorter data.window_seconds." if larger else "Would fit: a shorter data.window_seconds on more GPUs."
    )

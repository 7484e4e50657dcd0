"""What a run tells: metrics.jsonl, a progress bar, trackers, and the loss curve as a picture."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..common.files import atomic_write, read_log
from ..common.run_folder import TRACKING
from ..errors_moshi_ttt import MoshiTTTError

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker that is unknown or not installed; accelerate would leave the latter out in silence."""
    there = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in TRACKERS:
            raise MoshiTTTError(f"trackers holds {name!r}; known are {', '.join(TRACKERS)}.")
        if name not in there:
            raise MoshiTTTError(f"trackers holds {name!r}, but the package {name} is not installed: pip install {name}, or leave it out.")


def start_trackers(accelerator: Accelerator, names: Sequence[str], run_dir: Path, settings: dict[str, Any]) -> None:
    """Start the trackers of a run with its settings.

    Raises:
        ValueError: one of them does not start, as wandb without a login; its own words say why.
    """
    if not names:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    options = {"wandb": {"name": run_dir.name, "dir": str(run_dir)}, "trackio": {"name": run_dir.name}}
    try:
        accelerator.init_trackers(TRACKING, _flat(settings), options)
    except Exception as error:  # each tracker has its own kinds
        raise MoshiTTTError(f"trackers is {list(names)} and does not start: {error} (trackers=[] goes on without)") from None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, as trackers take them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


class MetricsFile:
    """One JSON line a record in metrics.jsonl. After a resume, lines beyond the checkpoint are cut, so each step stands there once."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        if path.exists():
            kept = [record for record in read_log(path) if record["step"] <= resumed_step]
            atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; a line is on its way to the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, in GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if (status := Path("/proc/self/status")).is_file():  # the process' own; what rusage says may be its parent's
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def shown(value: float | None, spec: str) -> str:
    """A number as `format` writes it by `spec`; "-" where there is none."""
    return "-" if value is None else format(value, spec)


def plot_curve(metrics: Path, picture: Path) -> None:
    """Draw text and audio loss over the steps, with the validation's points, into a PNG."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    records = read_log(metrics)
    train = [r for r in records if "loss" in r]
    checks = [r for r in records if "eval_loss" in r]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("text_loss", "audio_loss")):
        axis.plot([r["step"] for r in train], [r[name] for r in train], label="training", linewidth=1)
        if checks:
            axis.plot([r["step"] for r in checks], [r[f"eval_{name}"] for r in checks], "o-", label="held out", markersize=4)
        axis.set(title=name.replace("_", " "), xlabel="step", ylabel="nats")
        axis.grid(alpha=0.3)
        axis.legend()
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, picture)

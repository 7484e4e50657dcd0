"""Checkpoints that are whole or not there: safetensors and JSON under a manifest, written aside and renamed, rotated, best kept."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..common.files import MANIFEST, atomic_write, check_manifest, tensors_written, write_manifest
from ..errors_moshi_ttt import MoshiTTTError

logger = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
PREFIX = "checkpoint-"


@dataclass
class Snapshot:
    """What a run needs to go on: `shared` tensors by file name (one copy for all ranks), `own` tensors of this rank, and plain `state`."""

    state: dict[str, Any]
    shared: dict[str, Tensors] = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint, named by its step.
        keep: how many of the newest stay; the best stays besides.
        rank, barrier: this process, and what waits for all of them.
    """

    def __init__(self, folder: str | Path, keep: int = 3, rank: int = 0, barrier: Callable[[], Any] = lambda: None):
        self.folder, self.keep, self.rank, self.barrier = Path(folder), keep, rank, barrier

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints there are, oldest first, whole or not."""
        names = [p.name.removeprefix(PREFIX) for p in self.folder.glob(f"{PREFIX}*") if p.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, snapshot: Snapshot, best: int | None = None) -> Path:
        """Write a checkpoint, every rank its part; it appears under its name only when all of it is on disk.

        Raises:
            OSError: the disk is full or not writable; the checkpoints there before are untouched.
        """
        temporary = self.folder / f".{PREFIX}{step:08d}.tmp"
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            temporary.mkdir()
        self.barrier()
        try:
            _save_tensors(temporary / f"rank-{self.rank}.safetensors", snapshot.own)
            if self.rank == 0:
                for name, tensors in snapshot.shared.items():
                    _save_tensors(temporary / f"{name}.safetensors", tensors)
                atomic_write(temporary / "state.json", json.dumps(snapshot.state, indent=1))
            self.barrier()
            if self.rank == 0:
                write_manifest(temporary)
                self._publish(temporary, self.path(step))
                self._rotate(best)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.barrier()
        return self.path(step)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, None without any; a torn or altered one is passed over with a warning that says what is wrong.

        Raises:
            ValueError: there are checkpoints, but none of them is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            problems = check_manifest(self.path(step))
            if not problems:
                return self.path(step)
            logger.warning("%s is torn or altered (%s); going back to the one before it.", self.path(step), " ".join(problems))
        if steps:
            raise MoshiTTTError(
                f"None of the {len(steps)} checkpoints in {self.folder} is whole; restore one from a copy, or start with a new run_dir."
            )
        return None

    def load(self, path: Path, shared: tuple[str, ...]) -> Snapshot:
        """Read a whole checkpoint; `own` is empty when it was written by fewer ranks."""
        own = path / f"rank-{self.rank}.safetensors"
        tensors = {name: load_file(path / f"{name}.safetensors") for name in shared if (path / f"{name}.safetensors").exists()}
        state = json.loads((path / "state.json").read_text())
        return Snapshot(state, tensors, load_file(own) if own.exists() else {})

    def _publish(self, temporary: Path, path: Path) -> None:
        if path.exists():  # one that was torn, and has now been reached again
            shutil.rmtree(path)
        os.replace(temporary, path)
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def _rotate(self, best: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best:
                # aside first, so that a kill in between leaves no half checkpoint under a checkpoint's name
                aside = self.folder / f".{PREFIX}{step:08d}.old.tmp"
                os.replace(self.path(step), aside)
                shutil.rmtree(aside)

    def _clean(self) -> None:
        for left in self.folder.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(left)


def _save_tensors(path: Path, tensors: Tensors) -> None:
    """safetensors, on disk for good when this returns; views are made whole first."""
    with tensors_written(path):
        save_file({name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def random_state() -> tuple[Tensors, dict[str, Any]]:
    """State of every random number generator in use: torch's as tensors, Python's and numpy's as plain values."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    keys = np.random.get_state(legacy=False)
    numpy_state = {"key": keys["state"]["key"].tolist(), "pos": int(keys["state"]["pos"])}  # type: ignore[index,call-overload]
    numpy_state |= {"has_gauss": int(keys["has_gauss"]), "gauss": float(keys["gauss"])}  # type: ignore[call-overload]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def set_random_state(tensors: Tensors, state: dict[str, Any]) -> None:
    """The way back from `random_state`."""
    torch.set_rng_state(tensors["random.torch"].cpu())
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    key = np.array(saved["key"], dtype=np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))


__all__ = ["MANIFEST", "CheckpointFolder", "Snapshot", "random_state", "set_random_state"]

"""Turn any checkpoint of a run into what `final` is: a whole model or an adapter, with its processor, that loads by itself.

It goes into exports/ of the run folder. Checkpoints of many processes are put together; what was trained is checked to be finite.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..adapters.bases import name_auto_class, write_base_config
from ..common.files import atomic_folder, atomic_write, read_json, tensors_written, write_manifest
from ..common.run_folder import CHECKPOINTS, EXPORTS, read_settings, write_final_run
from ..errors_moshi_ttt import MoshiTTTError
from .run_config import RunConfig, load_run_config

SHARD_SIZE = "5GB"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help="the run's folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss")
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--adapter", action="store_true", help="what was trained beside its base (default where the run trains an adapter)")
    kind.add_argument("--merged", action="store_true", help="adapter and base as one whole model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as checkpoint.final_dtype)")
    parser.add_argument("--output", type=Path, help="another folder")


def run(args: argparse.Namespace) -> int:
    """Export one checkpoint and say where it is."""
    print(export(args.run_dir, args.step, args.best, args.merged, args.adapter, args.dtype, args.output))
    return 0


def export(
    run_dir: str | Path,
    step: int | None = None,
    best: bool = False,
    merged: bool = False,
    adapter: bool = False,
    dtype: str | None = None,
    output: str | Path | None = None,
) -> Path:
    """Write a checkpoint of a run as a model or adapter of its own; returns its folder.

    Raises:
        ValueError, FileNotFoundError: no run, no such checkpoint, a damaged one, or a kind that the run's mode does not have.
    """
    from . import setup
    from .checkpoint import CheckpointFolder, restore

    root = Path(run_dir)
    config = _settings(root)
    if config.mode == "full" and (adapter or merged):
        raise MoshiTTTError(f"{root} trains every parameter (mode full), so there is no adapter; leave --adapter and --merged out.")
    path = _choose(CheckpointFolder(root / CHECKPOINTS), step, best)
    model = setup.adapt(setup.build_model(config.model, config.seed), config)
    restore(path, model)
    whole = model.merge_and_unload() if merged else model
    found = int(path.name.rpartition("-")[2])
    folder = Path(output) if output else root / EXPORTS / f"step-{found:08d}{'-merged' if merged else ''}"
    processor = setup.load_processor(config.model)
    processor.complete(whole.config)
    write_model(folder, whole, whole.state_dict(), processor, config, found, dtype or config.checkpoint.final_dtype)
    return folder


def _settings(root: Path) -> RunConfig:
    """The settings of a run, from its folder."""
    return load_run_config(None, [f"{key}={json.dumps(value)}" for key, value in read_settings(root)["run"].items()])


def _choose(folder: Any, step: int | None, best: bool) -> Path:
    from .checkpoint import read_state

    steps = folder.steps()
    if not steps:
        raise MoshiTTTError(f"{folder.folder} holds no checkpoint.")
    if best:
        step = read_state(folder.path(steps[-1]))["progress"]["best_step"]
        if step is None:
            raise MoshiTTTError(f"{folder.folder.parent} was never evaluated, so no checkpoint is the best; give --step, one of {steps}.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise MoshiTTTError(f"`--step={step}` must be one of {', '.join(map(str, steps))}, the checkpoints in {folder.folder}.")
    problems = folder.problems(folder.path(step))
    if problems:
        raise MoshiTTTError(f"{folder.path(step)} is torn or altered ({' '.join(problems)}); export another step.")
    path: Path = folder.path(step)
    return path


def write_model(folder: Path, model: Any, state: dict[str, torch.Tensor], processor: Any, config: RunConfig, step: int, dtype: str) -> None:
    """Write a model, or a PeftModel's adapter, with these weights, its processor, the run's settings and a manifest; whole or not at all.

    Raises:
        ValueError: a weight is not finite, so the training diverged.
        OSError: the disk is full.
    """
    _check_finite(state, folder)
    to = getattr(torch, dtype)
    state = {name: tensor.to(to) if tensor.is_floating_point() and dtype != "float32" else tensor for name, tensor in state.items()}
    adapter = hasattr(model, "get_base_model")
    # an embedding that LoRA adapts would be written a second time, whole
    options: dict[str, Any] = {"save_embedding_layers": False} if adapter else {"max_shard_size": SHARD_SIZE}
    with tensors_written(folder), atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, **options)
        if adapter:
            write_base_config(temporary, model.config)
            name_auto_class(temporary, model.config)
        elif dtype != "float32":  # transformers writes the dtype of the model in memory
            content = read_json(temporary / "config.json") | {"dtype": dtype}
            atomic_write(temporary / "config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
        if processor is not None:
            processor.save_pretrained(temporary)
        write_final_run(temporary, step, config.to_dict())
        write_manifest(temporary)


def _check_finite(state: dict[str, torch.Tensor], folder: Path) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise MoshiTTTError(
                f"{name} holds values that are not finite, so {folder} was not written: the training diverged; "
                "start anew with lower rates (optim.lr, optim.ttt_lr), or export an earlier checkpoint of this run."
            )

"""`moshi-ttt train`: a recipe, and what to change of it; one process, or those of an accelerate configuration with --launch."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..adapters.bases import name_auto_class, write_base_config
from ..common.files import atomic_folder, atomic_write, make_folder, read_json, tensors_written, write_manifest
from ..common.packaged import known, names, resolve
from ..common.settings import describe
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from .run_config import RunConfig, load_run_config


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipe", help=f"a YAML file, or a packaged one by its name: {', '.join(names('train'))}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as in optim.lr=1e-4")
    packaged = ", ".join(names("accelerate"))
    parser.add_argument(
        "--launch", metavar="CONFIG", help=f"start an accelerate configuration's processes: a YAML file, or one of {packaged}"
    )
    parser.epilog = describe(RunConfig)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the last step was reached."""
    config = load_run_config(args.recipe, args.overrides)
    if args.launch:
        return launch(args.launch, [args.recipe, *args.overrides])
    try:
        train(config)
    except FloatingPointError as error:
        raise MoshiTTTError(str(error)) from None
    return 0


def launch(launch_file: str, arguments: list[str]) -> int:
    """`moshi-ttt train` with these arguments in every process of an accelerate configuration; the launcher's exit code."""
    path = resolve("accelerate", launch_file)
    if not Path(path).is_file():
        hint = known("accelerate", launch_file)
        raise MoshiTTTFileNotFoundError(
            f"--launch is {launch_file}: there is no such file, and the package holds none of this name; {hint}"
        )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path]
    return subprocess.run([*launcher, "-m", "modeling_moshi_ttt.cli", "train", *arguments], check=False).returncode


def train(config: RunConfig) -> Path:
    """The whole way of one run: data, model, loop, final model, loss curve. The same call goes on where a killed one stopped.

    Returns:
        The folder `final` in the run folder: a whole model (mode full) or a PEFT adapter, and the processor.

    Raises:
        ValueError, OSError: settings, data or the run folder do not allow it; the message says what to change.
        FloatingPointError: too many steps in a row were not finite.
    """
    from . import modes, setup
    from .report import start_trackers

    if config.mode == "frozen":
        raise MoshiTTTError("mode is 'frozen': nothing is trained, so there is nothing to run; choose lora, ttt, lora+ttt or full.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model_config = setup.model_config(config.model)  # before the data, whose preparation may take hours
    run_dir = make_folder(config.run_dir, "run_dir")
    accelerator = setup.make_accelerator(config)
    try:
        train_set, held_out, processor = _load_data(config, model_config, accelerator)
        model = setup.build_model(config.model, config.seed)
        processor.complete(model.config)
        model = setup.adapt(model, config)
        if accelerator.is_main_process:
            print(modes.parameter_table(model), flush=True)
        start_trackers(accelerator, config.trackers, run_dir, config.to_dict())
        from .trainer import Trainer

        trainer = Trainer(config, model, train_set, held_out, accelerator)
        trainer.fit()
        if not _is_finished(run_dir, config.optim.steps):
            _finish(trainer, processor, run_dir)
        if config.trackers:
            accelerator.end_training()
        return run_dir / "final"
    finally:
        accelerator.wait_for_everyone()


def _load_data(config: RunConfig, model_config: Any, accelerator: Any) -> tuple[Any, Any, Any]:
    """Prepared training and held-out sets (encoded by the main process, then read by all), and the processor."""
    from tqdm import tqdm

    from ..data.codes import CodesCache
    from ..data.prepared import prepare_set
    from ..data.spoken_dialogues import phrasebook
    from . import setup

    processor = setup.load_processor(config.model)
    processor.check_model(model_config)
    cache = CodesCache(make_folder(config.data.cache or Path(config.run_dir) / "codes", "data.cache"), processor)

    def progress(items: Any) -> Any:
        return tqdm(items, desc="encoding", disable=not accelerator.is_main_process)

    with accelerator.main_process_first():
        if config.dialogues is not None:
            train_set: Any = phrasebook(config.dialogues, processor, cache.folder, progress)
        else:
            train_set = prepare_set(config.data.train, config.data, cache, progress)
        held_out = None if config.data.evaluation is None else prepare_set(config.data.evaluation, config.data, cache, progress)
    return train_set, held_out, processor


def _is_finished(run_dir: Path, steps: int) -> bool:
    """Whether `final` is there and belongs to the last step."""
    try:
        return bool(read_json(run_dir / "final" / "run.json").get("step") == steps)
    except (FileNotFoundError, ValueError):
        return False


def _check_finite(state: dict[str, Any], run_dir: Path) -> None:
    """ValueError where the training diverged: such a model is no result."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise MoshiTTTError(
                f"{name} holds values that are not finite, so {run_dir / 'final'} was not written: the training diverged; "
                "start anew with lower rates (optim.lr, optim.ttt_lr), or use an earlier checkpoint of this run."
            )


def _finish(trainer: Any, processor: Any, run_dir: Path) -> None:
    """Write the final model or adapter, the processor and the loss curve; every rank must call it."""
    from .report import plot_curve
    from .state import full_state

    accelerator = trainer.accelerator
    state = full_state(trainer.model, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        _check_finite(state, run_dir)
        model = accelerator.unwrap_model(trainer.model)
        with tensors_written(run_dir / "final"), atomic_folder(run_dir / "final") as folder:
            model.save_pretrained(folder, state_dict=state)
            if model is not trainer.bare:
                write_base_config(folder, trainer.config)
                name_auto_class(folder, trainer.config)
            if processor is not None:
                processor.save_pretrained(folder)
            atomic_write(folder / "run.json", json.dumps({"step": trainer.progress.step, "run": trainer.run.to_dict()}, indent=1))
            write_manifest(folder)
        plot_curve(run_dir / "metrics.jsonl", run_dir / "loss.png")
    accelerator.wait_for_everyone()

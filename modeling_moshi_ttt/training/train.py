"""`moshi-ttt train`: a recipe, and what to change of it; one process, or those of an accelerate configuration with --launch."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ..common.files import make_folder
from ..common.lock import locked
from ..common.packaged import names
from ..common.run_folder import CODES, CURVE, FINAL, METRICS, final_of, final_step
from ..common.settings import describe
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from .launch import launch_file
from .moshi_finetune import load_moshi_finetune
from .run_config import RunConfig, load_run_config
from .signals import RunStopped, stop_requests


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipe", nargs="?", help=f"a YAML file, or a packaged one by its name: {', '.join(names('train'))}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as in optim.lr=1e-4")
    packaged = ", ".join(names("accelerate"))
    parser.add_argument(
        "--launch", metavar="CONFIG", help=f"start an accelerate configuration's processes: a YAML file, or one of {packaged}"
    )
    parser.add_argument("--from-moshi-finetune", metavar="FILE", help="a recipe of moshi-finetune in place of ours; what differs is told")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would take, and whether this machine's GPU holds it; nothing is read"
    )
    parser.epilog = describe(RunConfig)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the last step was reached."""
    words = ([args.recipe] if args.recipe else []) + args.overrides
    if args.from_moshi_finetune:
        config, differences = load_moshi_finetune(args.from_moshi_finetune, words)
        words += ["--from-moshi-finetune", args.from_moshi_finetune]
        if int(os.environ.get("RANK", 0)) == 0:
            print("Unlike moshi-finetune:", *differences, sep="\n  ")
    elif args.recipe:
        config = load_run_config(args.recipe, args.overrides)
    else:
        raise MoshiTTTError("no recipe is given; name a YAML file, or a packaged one (moshi-ttt train --help lists them).")
    if args.dry_run:
        from .dry_run import dry_run
        from .launch import Launch

        print(dry_run(config, Launch.read(args.launch) if args.launch else Launch()))
        return 0
    if args.launch:
        return launch(args.launch, words)
    try:
        train(config)
    except FloatingPointError as error:
        raise MoshiTTTError(str(error)) from None
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    return 0


def launch(name: str, arguments: list[str]) -> int:
    """`moshi-ttt train` with these arguments in every process of an accelerate configuration.

    A signal that asks for a stop goes to the processes as SIGUSR1, which their launcher leaves them the time for; of SIGTERM it would kill
    them 30 s later. A second Ctrl-C sends that.

    Returns:
        The launcher's exit code, or 128 + the number of the signal.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file(name))]
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the launcher, which inherits it
    process = psutil.Popen([*launcher, "-m", "modeling_moshi_ttt.cli", "train", *arguments], start_new_session=True)
    signal.signal(signal.SIGUSR1, before)
    with stop_requests() as request:
        while True:
            with contextlib.suppress(psutil.TimeoutExpired, KeyboardInterrupt):
                code = process.wait(timeout=1)
                return 128 + request.signal if code and request.signal else code
            if request.repeated:
                process.terminate()
            elif request.signal:  # again and again, for those that were still starting
                for child in process.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.send_signal(signal.SIGUSR1)


def train(config: RunConfig) -> Path:
    """The whole way of one run: data, model, loop, final model, loss curve. The same call goes on where a killed one stopped.

    Returns:
        The folder `final` in the run folder: a whole model (mode full) or a PEFT adapter, and the processor.

    Raises:
        ValueError, OSError: settings, data or the run folder do not allow it; the message says what to change.
        FloatingPointError: too many steps in a row were not finite.
        RunStopped: a signal asked for it; the checkpoint is saved.
    """
    from . import modes, setup
    from .report import start_trackers

    if config.mode == "frozen":
        raise MoshiTTTError("mode is 'frozen': nothing is trained, so there is nothing to run; choose lora, ttt, lora+ttt or full.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = final_of(Path(config.model.path), tell=os.environ.get("RANK", "0") == "0")
    config = config if start == Path(config.model.path) else replace(config, model=replace(config.model, path=str(start)))
    model_config = setup.model_config(config.model)  # before the data, whose preparation may take hours
    run_dir = make_folder(config.run_dir, "run_dir")
    with contextlib.ExitStack() as held:
        accelerator = setup.make_accelerator(config)
        held.callback(accelerator.wait_for_everyone)
        _lock(run_dir, accelerator, held)
        train_set, held_out, processor = _load_data(config, model_config, accelerator)
        model = setup.build_model(config.model, config.seed, empty=setup.is_sent_weights(accelerator))
        processor.complete(model.config)
        model = setup.adapt(model, config)
        if accelerator.is_main_process:
            print(modes.parameter_table(model), flush=True)
        start_trackers(accelerator, config.trackers, run_dir, config.to_dict())
        from .trainer import Trainer

        trainer = Trainer(config, model, train_set, held_out, accelerator)
        with stop_requests() as request:  # before and after, a signal ends the process at once, and nothing is lost
            trainer.fit(request)
        if final_step(run_dir) != config.optim.steps:
            _finish(trainer, processor, run_dir)
        elif accelerator.is_main_process:
            print(f"This run is finished: {run_dir / FINAL} is of step {config.optim.steps}. Raise optim.steps to train on.", flush=True)
        if config.trackers:
            accelerator.end_training()
        return run_dir / FINAL


def _lock(run_dir: Path, accelerator: Any, held: contextlib.ExitStack) -> None:
    """Have the main process hold the run folder; where another one does, every process says so."""
    from accelerate.utils import broadcast_object_list

    refused: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            held.enter_context(locked(run_dir, "run_dir"))
        except MoshiTTTOSError as error:
            refused = [str(error)]
    broadcast_object_list(refused)
    if refused[0]:
        raise MoshiTTTOSError(refused[0])


def _load_data(config: RunConfig, model_config: Any, accelerator: Any) -> tuple[Any, Any, Any]:
    """Prepared training and held-out sets, and the processor."""
    from ..common.progress import progress_bar
    from ..data.cache import CodesCache
    from ..data.spoken_dialogues import phrasebook
    from . import setup

    processor = setup.load_processor(config.model)
    processor.check_model(model_config)
    cache = CodesCache(make_folder(config.data.cache or Path(config.run_dir) / CODES, "data.cache"), processor)

    def progress(items: Any) -> Any:
        return progress_bar(items, desc="encoding", disable=not accelerator.is_main_process)

    if config.dialogues is not None:
        with accelerator.main_process_first():
            train_set: Any = phrasebook(config.dialogues, processor, cache.folder, progress)
    else:
        train_set = _prepare(config.data.train, config, cache, accelerator, progress)
    held_out = None if config.data.evaluation is None else _prepare(config.data.evaluation, config, cache, accelerator, progress)
    return train_set, held_out, processor


def _prepare(sources: str, config: RunConfig, cache: Any, accelerator: Any, progress: Any) -> Any:
    """A prepared set, of which each process has encoded its share, so that none waits for another's hours of work."""
    from ..data.prepared import prepare, prepare_set
    from ..data.shard import Shard

    if accelerator.num_processes > 1:
        lenient = replace(config.data, on_bad_files="skip")  # what is wrong is told below, by all processes alike
        prepare(sources, lenient, cache, progress, Shard(accelerator.process_index, accelerator.num_processes))
        accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        return prepare_set(sources, config.data, cache, progress)


def _finish(trainer: Any, processor: Any, run_dir: Path) -> None:
    """Write the final model or adapter, the processor and the loss curve; every rank must call it."""
    from .checkpoint import full_state
    from .export import write_model
    from .report import plot_curve

    accelerator, run = trainer.accelerator, trainer.run
    state = full_state(trainer.model)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model)
        write_model(run_dir / FINAL, model, state, processor, run, trainer.progress.step, run.checkpoint.final_dtype)
        plot_curve(run_dir / METRICS, run_dir / CURVE)
    accelerator.wait_for_everyone()

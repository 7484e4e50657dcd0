"""The console script `moshi-ttt`: one command, one module, imported only when it is asked for."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

from .common.progress import quiet_libraries
from .errors_moshi_ttt import MoshiTTTError
from .version import __version__

# name: (module with configure(parser) and run(args) -> exit code, one line of help)
COMMANDS = {
    "init": ("modeling_moshi_ttt.common.init_folder", "write copies of the recipes, the tiny model, the examples and their data, to edit"),
    "prepare": ("modeling_moshi_ttt.data.prepare", "turn stereo recordings with word times into training tokens"),
    "annotate": ("modeling_moshi_ttt.data.annotate", "write word times beside recordings, with a speech recogniser"),
    "train": ("modeling_moshi_ttt.training.train", "train or adapt a model as a run configuration says"),
    "export": ("modeling_moshi_ttt.training.export", "turn a checkpoint of a run into a model or adapter of its own"),
    "respond": ("modeling_moshi_ttt.live.respond", "answer a recording, or a folder of them, with the sound and words of a model"),
    "serve": (
        "modeling_moshi_ttt.live.serve",
        "let people talk to a model: a page in the browser, Kyutai's protocol, many callers at once",
    ),
    "talk": ("modeling_moshi_ttt.live.talk", "talk to a model in a terminal, with this machine's microphone and loudspeaker"),
    "evaluate": ("modeling_moshi_ttt.evaluation.evaluate", "score a model on spoken benchmarks and on long recordings"),
    "recall": ("modeling_moshi_ttt.evaluation.recall", "measure what the model remembers beyond its attention window"),
    "plot": ("modeling_moshi_ttt.evaluation.plots", "draw the curves of a run or of an evaluation"),
    "merge": ("modeling_moshi_ttt.evaluation.merge", "average results of several checkpoints of one training"),
    "compare": ("modeling_moshi_ttt.evaluation.compare", "compare two results: paired differences, a verdict, overlaid curves"),
    "convert": ("modeling_moshi_ttt.conversion.convert", "convert checkpoints from and to Kyutai's and transformers' layouts"),
    "verify": ("modeling_moshi_ttt.hub.verify", "check a checkpoint: files, weights, shapes, numbers, and its loss on the probe"),
    "push": ("modeling_moshi_ttt.hub.push", "put a checkpoint on the Hugging Face Hub, with its card and its code"),
    "pull": ("modeling_moshi_ttt.hub.pull", "fetch a checkpoint from the Hub, check it and say what it holds"),
}
FAILED, INTERRUPTED = 2, 130
SHELLS = ("bash", "zsh", "tcsh")
DEBUG = "MOSHI_TTT_DEBUG"
ISSUES = "https://github.com/moshi-ttt/moshi-ttt/issues"


def _overview() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<10} {help_line}" for name, (_, help_line) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="moshi-ttt",
        description="Moshi with Test-Time-Training layers.",
        epilog=f"commands:\n{lines}\n\n`moshi-ttt COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moshi-ttt {__version__}")
    parser.add_argument("--completion", choices=SHELLS, help="print what this shell completes commands and options with, and exit")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser


def _load(module_name: str) -> ModuleType:
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        raise MoshiTTTError(_missing_package(error)) from error


def _missing_package(error: ModuleNotFoundError) -> str:
    return f"this command needs the package {error.name!r}; install it with: pip install 'moshi-ttt[train,eval,serve]'"


def _run(module_name: str, name: str, arguments: Sequence[str]) -> int:
    """Parse the command's own arguments and run it."""
    module = _load(module_name)
    parser = argparse.ArgumentParser(
        prog=f"moshi-ttt {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.configure(parser)
    quiet_libraries()
    options = parser.parse_intermixed_args(arguments)  # key=value words may stand on both sides of an option
    try:
        return int(module.run(options) or 0)
    except ModuleNotFoundError as error:
        raise MoshiTTTError(_missing_package(error)) from error


def _completion(shell: str) -> str:
    """A script for the shell, from the parsers of all commands."""
    import shtab

    parser = argparse.ArgumentParser(prog="moshi-ttt")
    commands = parser.add_subparsers()
    for name, (module_name, help_line) in COMMANDS.items():
        module = _load(module_name)
        command = commands.add_parser(name, help=help_line)
        module.configure(command)
        for action in command._actions:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # whatever else it may be, a path is right
    return shtab.complete(parser, shell)


def _is_users_mistake(error: Exception) -> bool:
    """Ours that says so, what the system refuses (a full disk, a folder without permission), and a configuration's wrong field."""
    return isinstance(error, MoshiTTTError) or (isinstance(error, OSError) and error.errno is not None) or _is_field_error(error)


def _is_field_error(error: Exception) -> bool:
    """Of a configuration's field that has the wrong type, as transformers raises it."""
    from huggingface_hub.errors import StrictDataclassError  # here, for the overview of commands needs no library

    return isinstance(error, StrictDataclassError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        _overview().print_help(sys.stderr)
        return FAILED
    options = _overview().parse_args(argv[: 2 if argv[0] == "--completion" else 1])
    if options.completion:
        return without_trace(lambda: print(_completion(options.completion)) or 0)
    name = options.command
    module_name, _ = COMMANDS[name]
    return without_trace(lambda: _run(module_name, name, argv[1:]))


def without_trace(action: Callable[[], int]) -> int:
    """The exit code of a command or a script.

    What the user can mend (`MoshiTTTError`) is one line on stderr and exit code 2; MOSHI_TTT_DEBUG=1 shows the whole trace. Anything else is
    a fault of the package: it keeps its trace, and a line asks for a report.
    """
    try:
        return action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        if not _is_users_mistake(error):
            error.add_note(
                f"This is a fault of moshi-ttt {__version__}, not of what it was given; please report it with these lines: {ISSUES}"
            )
            raise
        print(f"error: {' '.join(str(error).split()) if _is_field_error(error) else error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())

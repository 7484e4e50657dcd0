"""The console script: lazy commands, one line for a mistake, the whole trace on request."""

import dataclasses
import errno
import subprocess
import sys
import typing
from importlib import import_module
from types import ModuleType

import pytest

from modeling_moshi_ttt import cli
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from modeling_moshi_ttt.evaluation.evaluate import EvaluateSettings
from modeling_moshi_ttt.evaluation.recall import RecallSettings
from modeling_moshi_ttt.training.run_config import RunConfig

MODULE = "moshi_ttt_test_command"


@pytest.fixture
def command(monkeypatch):
    """A command `try` whose run() is what a test sets."""
    module = ModuleType(MODULE, "Try something.")
    module.configure = lambda parser: parser.add_argument("--times", type=int, default=1)
    module.run = lambda args: args.times
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setitem(cli.COMMANDS, "try", (MODULE, "try something"))
    return module


def raising(error):
    def run(args):
        raise error

    return run


def test_without_a_command_it_says_which_there_are(capsys):
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)


def test_the_command_gets_its_arguments_and_gives_the_exit_code(command):
    assert cli.main(["try", "--times", "3"]) == 3
    command.run = lambda args: None
    assert cli.main(["try"]) == 0


@pytest.mark.parametrize(
    "error",
    [
        MoshiTTTError("`steps=-1` must be at least 1."),
        MoshiTTTOSError("no/such/file: there is none."),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_users_mistake_is_one_line(command, capsys, monkeypatch, error):
    monkeypatch.delenv(cli.DEBUG, raising=False)
    command.run = raising(error)
    assert cli.main(["try"]) == cli.FAILED
    assert capsys.readouterr().err == f"error: {error}\n"
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(type(error)):
        cli.main(["try"])


@pytest.mark.parametrize("error", [KeyError("bug"), TypeError("bug"), ValueError("bug"), OSError("bug")], ids=repr)
def test_a_fault_of_the_program_keeps_its_trace_and_blames_nobody(command, error):
    command.run = raising(error)
    with pytest.raises(type(error), match="bug") as raised:
        cli.main(["try"])
    assert any("please report" in note for note in raised.value.__notes__)


def test_an_absent_package_is_named_with_its_cure(command, capsys):
    command.run = lambda args: import_module("no_such_package_anywhere")
    assert cli.main(["try"]) == cli.FAILED
    assert "'no_such_package_anywhere'" in (message := capsys.readouterr().err)
    assert "pip install 'moshi-ttt[train,eval]'" in message


def test_interruption_is_quiet(command, capsys):
    command.run = raising(KeyboardInterrupt())
    assert cli.main(["try"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and help_line in text for name, (_, help_line) in cli.COMMANDS.items())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pusj"])
    assert stopped.value.code == 2
    assert "invalid choice: 'pusj'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_exists_and_explains_itself(name, capsys):
    module = import_module(cli.COMMANDS[name][0])
    assert callable(module.run)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: moshi-ttt {name}" in capsys.readouterr().out


def keys(settings):
    """The dotted key of every field below a dataclass."""
    for field, hint in typing.get_type_hints(settings).items():
        yield field
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from (f"{field}{'[]' if typing.get_origin(hint) is list else ''}.{key}" for key in keys(part))


@pytest.mark.parametrize(
    ("name", "settings", "some"), [("train", RunConfig, 50), ("evaluate", EvaluateSettings, 50), ("recall", RecallSettings, 12)]
)
def test_help_names_every_setting(name, settings, some, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    assert [key for key in keys(settings) if f"\n  {key}: " not in said] == []
    assert len(list(keys(settings))) >= some


def test_help_imports_no_package_of_the_extras():
    code = "import sys; from modeling_moshi_ttt import cli\ntry: cli.main(['--version'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'peft', 'datasets', 'matplotlib', 'sphn'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_a_shell_completes_commands_and_options(capsys, shell):
    assert cli.main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert "--transcript" in script


def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch, capsys):
    from modeling_moshi_ttt.common import progress

    assert sum(progress.progress_bar(range(5), desc="counting")) == 10
    log = capsys.readouterr().err
    assert log.startswith("counting: 100%")
    assert log.count("\n") == 1
    assert "\r" not in log
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert sum(progress.progress_bar(range(5), desc="counting")) == 10
    assert "\r" in capsys.readouterr().err

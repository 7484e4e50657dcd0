"""Modules under the names of version 0.2 are today's, themselves, with a warning."""

import importlib
import subprocess
import sys

import pytest

from modeling_moshi_ttt.former_names import FORMER, PACKAGE


@pytest.mark.parametrize("former", sorted(FORMER))
def test_a_former_name_gives_todays_module(former):
    name = f"{PACKAGE}.{former}"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=FORMER[former]):
        module = importlib.import_module(name)
    today = importlib.import_module(f"{PACKAGE}.{FORMER[former]}")
    assert module is today
    assert module.__spec__.name == f"{PACKAGE}.{FORMER[former]}"


def test_a_former_name_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "modeling_moshi_ttt.tools.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moshi-ttt ")


def test_other_names_stay_unknown():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("modeling_moshi_ttt.tools.no_such_module")

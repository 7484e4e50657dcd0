"""A new evaluation is one file and its name in TASKS: settings, help, runner, report, plots and compare have it from there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_moshi_ttt
from modeling_moshi_ttt.evaluation.task import TASKS, shapes, tasks

PACKAGE = Path(modeling_moshi_ttt.__file__).parent
NEW = '''
from dataclasses import dataclass

from matplotlib.figure import Figure

from ..common.results import Part
from .task import Measure, Table, Task


@dataclass
class LoudnessSettings:
    """How loud a number is.

    numbers: that are measured.
    """

    numbers: list[float]


class LoudnessPart(Part):
    numbers: list[float]


class Loudness(Task):
    name, settings, shape = "loudness", LoudnessSettings, LoudnessPart
    question, reading = "Is it loud?", "Large is loud."
    needs_model = False

    def run(self, subject, section, context):
        return {"numbers": section.numbers}

    def figure(self, part):
        figure = Figure()
        figure.subplots().plot(part["numbers"])
        return figure

    def table(self, part):
        return Table(["loudness"], [[number] for number in part["numbers"]])

    def finding(self, part):
        return f"The loudest is {max(part['numbers'])}."

    def measures(self, part):
        each = {str(index): number for index, number in enumerate(part["numbers"])}
        return [Measure("loudness", "mean", None, sum(each.values()) / len(each), "dB", each)]


TASK = Loudness()
'''


def test_a_new_evaluation_is_one_file_and_one_word(tmp_path):
    home = shutil.copytree(PACKAGE, tmp_path / "modeling_moshi_ttt", ignore=shutil.ignore_patterns("__pycache__"))
    (home / "evaluation" / "loudness.py").write_text(NEW)
    listed = home / "evaluation" / "task.py"
    listed.write_text(listed.read_text().replace("TASKS = [", 'TASKS = ["loudness", ', 1))
    code = """
import sys
from pathlib import Path
from modeling_moshi_ttt import cli
assert Path(cli.__file__).is_relative_to(Path.cwd()), cli.__file__
def run(*words):
    try: code = cli.main(list(words))
    except SystemExit as stopped: code = stopped.code
    assert code == 0, words
run("evaluate", "--help")
run("evaluate", "output=a", "loudness.numbers=[1.0, 2.0, 5.0]")
run("evaluate", "output=b", "loudness.numbers=[2.0, 4.0, 6.0]")
run("plot", "a/results.json", "--output", "drawn")
run("compare", "a", "b", "--output", "compared")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\n  loudness.numbers: list of float, needed" in done.stdout
    assert "  loudness: group | null = null\n      Is it loud?" in done.stdout
    assert json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]["loudness"]["numbers"] == [1.0, 2.0, 5.0]
    report = (tmp_path / "a" / "report.html").read_text()
    assert "Is it loud?" in report
    assert "The loudest is 5.0." in report
    assert "data:image/png;base64," in report
    assert (tmp_path / "drawn" / "loudness.svg").is_file()
    assert "loudness: " in done.stdout.splitlines()[-3]


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_says_what_it_asks_and_is_known_by_its_name(name):
    one = tasks()[name]
    assert one.name == name
    assert one.question.endswith("?")
    assert one.reading.endswith(".")
    assert one.settings.__doc__
    assert shapes()[name] is one.shape

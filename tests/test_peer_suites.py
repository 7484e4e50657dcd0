"""The list of peers' tests that do not apply is well formed, and `make peer-suites` runs what it says."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = ROOT / "tests" / "peer_suites"


def load(name):
    spec = importlib.util.spec_from_file_location(f"peer_suites_{name}", HOME / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def not_applying():
    return load("not_applying")


def test_every_entry_names_tests_of_a_suite_and_a_reason(not_applying):
    reasons = not_applying.read("tests")
    assert all(re.fullmatch(r"suite_(transformers|peft)\.py::Test\w+::test_[\w*\[\]-]+", pattern) for pattern in reasons)
    assert all(len(reason.split()) > 5 for reason in [*reasons.values(), *not_applying.read("tuners").values()])
    assert all((HOME / pattern.split("::")[0]).is_file() for pattern in reasons)


def test_brackets_in_names_are_plain_characters(not_applying):
    patterns = ["a::test_x[True-*]", "a::test_y*"]
    assert not_applying.matching("a::test_x[True-Lora-16]", patterns) == ["a::test_x[True-*]"]
    assert not_applying.matching("a::test_x[False-Lora-16]", patterns) == []
    assert not_applying.matching("a::test_yT", patterns) == ["a::test_y*"]


@pytest.mark.parametrize(
    "text",
    ["tests: [{reason: ' ', names: [a]}]", "tests: [{reason: b, names: []}]", "tests: [{reason: b, names: [a, a]}]"],
    ids=["no reason", "no tests", "twice"],
)
def test_a_malformed_list_is_refused(not_applying, tmp_path, text):
    not_applying.PATH = tmp_path / "list.yaml"
    not_applying.PATH.write_text(text)
    with pytest.raises(ValueError, match=r"list\.yaml"):
        not_applying.read("tests")


def test_the_target_runs_both_suites():
    shown = subprocess.run(["make", "--dry-run", "peer-suites"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "tests/peer_suites/suite_transformers.py tests/peer_suites/suite_peft.py" in shown

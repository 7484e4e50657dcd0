"""The committed list of peers' tests that do not apply to this model, each with its reason, and the check that it is strict."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

PATH = Path(__file__).with_name("not_applying.toml")


def read() -> dict[str, str]:
    """Reason by pattern of test names (`suite_peft.py::TestCommon::test_generate[*]`, wildcards as in file names).

    Raises:
        ValueError: an entry without a reason or without tests, or a pattern that stands there twice.
    """
    reasons: dict[str, str] = {}
    for entry in tomllib.loads(PATH.read_text())["entry"]:
        if not entry["reason"].strip() or not entry["tests"]:
            raise ValueError(f"{PATH.name}: {entry} must have a reason and tests.")
        for pattern in entry["tests"]:
            if pattern in reasons:
                raise ValueError(f"{PATH.name} lists {pattern!r} twice.")
            reasons[pattern] = entry["reason"]
    return reasons


def tuners() -> dict[str, str]:
    """Reason by the name of a PEFT configuration that is of no use here, and not tried at all."""
    return {name: entry["reason"] for entry in tomllib.loads(PATH.read_text())["tuner"] for name in entry["configs"]}


def matching(name: str, patterns: dict[str, str]) -> list[str]:
    """The patterns that a test's name matches; brackets in names are plain characters."""
    return [pattern for pattern in patterns if fnmatchcase(name, pattern.replace("[", "[[]"))]

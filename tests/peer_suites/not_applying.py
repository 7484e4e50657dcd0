"""The committed list of peers' tests that do not apply to this model, each with its reason."""

from fnmatch import fnmatchcase
from pathlib import Path

import yaml

PATH = Path(__file__).with_name("not_applying.yaml")


def read(part: str) -> dict[str, str]:
    """Reason by name: of "tests", patterns such as `suite_peft.py::TestDecoder::test_generate[*`, or of "tuners", PEFT's configurations.

    Raises:
        ValueError: an entry without a reason or without names, or a name that stands there twice.
    """
    reasons: dict[str, str] = {}
    for entry in yaml.safe_load(PATH.read_text())[part]:
        if not str(entry["reason"]).strip() or not entry["names"]:
            raise ValueError(f"{PATH.name}: {entry} must have a reason and names.")
        for name in entry["names"]:
            if name in reasons:
                raise ValueError(f"{PATH.name} lists {name!r} twice.")
            reasons[name] = entry["reason"]
    return reasons


def matching(test: str, patterns: dict[str, str]) -> list[str]:
    """The patterns that a test's name matches; brackets in names are plain characters."""
    return [pattern for pattern in patterns if fnmatchcase(test, pattern.replace("[", "[[]"))]

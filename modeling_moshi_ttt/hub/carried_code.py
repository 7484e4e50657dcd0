"""The Python that a checkpoint carries for `trust_remote_code`, and which transformers it is for: read as text, never run."""

import re
from collections.abc import Iterable
from pathlib import Path

import transformers

from ..versions_moshi_ttt import release

CODE, STAMP = "modeling_moshi_ttt.py", "versions_moshi_ttt.py"
# Code without a stamp that can be read is taken for version 0.1.0's, whose every forward fails on transformers 5.24.
WITHOUT_STAMP = ("5.23", "5.24")
Range = tuple[str, str]  # from the first to below the second


def code_range(names: Iterable[str], folder: Path) -> Range | None:
    """The transformers that a checkpoint's code is for; None where its files `names` hold no code. The stamp is read from `folder`."""
    names = set(names)
    if CODE not in names:
        return None
    text = (folder / STAMP).read_text() if STAMP in names else ""
    found = re.search(r'^TRANSFORMERS = \("(\d+\.\d+)", "(\d+\.\d+)"\)$', text, flags=re.MULTILINE)
    return (found[1], found[2]) if found else WITHOUT_STAMP


def folder_code(folder: Path) -> Range | None:
    """As [`code_range`], of a folder."""
    return code_range((path.name for path in folder.glob("*.py")), folder)


def runs_here(code: Range, installed: str = transformers.__version__) -> bool:
    """Whether the installed transformers is in the range."""
    return release(code[0]) <= release(installed) < release(code[1])


def describe_code(code: Range, what: str, installed: str = transformers.__version__) -> str:
    """One line: what the code is for, and the cure where the installed transformers is not in that range."""
    lowest, limit = code
    line = f"{what}: for transformers >= {lowest}, < {limit}"
    if runs_here(code, installed):
        return line
    cure = "`moshi-ttt push` writes it anew" if release(installed) >= release(limit) else f"pip install 'transformers>={lowest},<{limit}'"
    return f"{line}, not for {installed}, which is installed: `trust_remote_code=True` fails with it or goes wrong; {cure}"

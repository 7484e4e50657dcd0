"""Pages that run: their Python as it stands, their commands in an empty folder, and what they show beside what is said there."""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from tree import ROOT

from modeling_moshi_ttt.cli import main

REPOSITORY = "https://github.com/moshi-ttt/moshi-ttt/blob/main/"
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "generated" not in path.parts)]
_VARIES = re.compile(r" *[\d.]+%|[\d.]+ MB|loss [\d.]+|https?://[^/]+|commit \w+")


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of every block of code, in order."""
    return iter(re.findall(r"```(\w+)\n(.*?)```", read(page).replace("\n   ", "\n"), flags=re.DOTALL))


def blocks_of(page: str, language: str) -> list[str]:
    return [text for name, text in blocks(page) if name == language]


def languages(page: str) -> list[str]:
    return [language for language, _ in blocks(page)]


def commands(text: str) -> list[str]:
    """The lines of a block of commands, without their comments."""
    lines = (re.split(r"\s+# ", line)[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def without_what_varies(lines: str) -> list[str]:
    """Lines of output, but for shares, losses, sizes, addresses and commits."""
    return [_VARIES.sub("...", line).strip() for line in lines.splitlines()]


def run_python(code: str, names: dict[str, Any], page: str) -> None:
    """Run a block of Python; each `print` that shows its output in a comment must have said that."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, page, "exec"), names)
    shown = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    assert [line for line in shown if line not in said.getvalue().splitlines()] == []


def run_command(line: str) -> str:
    """Run one line in this process and give what it said; only `cp` stands beside `moshi-ttt`."""
    words, said = shlex.split(line), io.StringIO()
    if words[0] == "cp":
        assert os.system(line) == 0, line
        return ""
    assert words[0] == "moshi-ttt", line
    with contextlib.redirect_stdout(said):
        code = main(words[1:])
    assert code == 0, f"{line}\n{said.getvalue()}"
    return said.getvalue()


def run_page(page: str, run: Callable[[str], str] = run_command) -> int:
    """Run a page from top to bottom in the current folder, and hold every line of its `text` blocks against what was said; how many blocks
    ran.
    """
    said: list[str] = []
    names: dict[str, Any] = {}
    ran = 0
    for language, text in blocks(page):
        if language == "sh":
            said += [line for command in commands(text) for line in without_what_varies(run(command))]
        elif language == "python":
            run_python(text, names, page)
        elif language == "text":
            assert [line for line in without_what_varies(text) if line not in said] == [], said
        ran += language in ("sh", "python", "text")
    return ran


def files_named(page: str) -> list[str]:
    """Files of the repository that a page links to or names by their path."""
    text = read(page)
    linked = re.findall(rf"{re.escape(REPOSITORY)}([^)#\s]+)", text)
    return linked + re.findall(r"(?<![\w/])(?:configuration|examples|benchmarks|docs|tests|modeling_moshi_ttt|hub)/[\w./*-]+", text)

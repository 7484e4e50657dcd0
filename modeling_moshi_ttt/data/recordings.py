"""Recordings with word times, as moshi-finetune's users hold them: a jsonl of paths, and beside each sound file its words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ..common.files import inside, parse_json
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from . import limits
from .word_files import find_words, read_words
from .words import Policy, Word, WordReport, seconds_of


@dataclass(frozen=True)
class Recording:
    """One recording: left channel Moshi, right channel the user; or a mono one, whose voice a setting names.

    `words` are (text, (start, end), speaker) sorted by start, times in seconds; None when nothing was aligned. `report` counts the odd
    ones among them.
    """

    path: Path
    duration: float
    words: tuple[Word, ...] | None = None
    report: WordReport = WordReport()


class Unit(Protocol):
    """The smallest part of a source that is read at once, a line, a sound or an archive: what it holds, and what is wrong with it."""

    def __call__(self, problems: list[str]) -> list[Recording]: ...


def read_manifest(
    path: str | os.PathLike[str],
    allow_outside: bool = False,
    problems: list[str] | None = None,
    policy: Policy = "keep",
    words_files: str = "",
) -> list[Recording]:
    """Read a jsonl of {"path", "duration"} lines; paths are relative to the file, words come from a file beside each sound.

    `path` may be the bare name of a packaged manifest.
    `allow_outside` permits absolute paths and '..'. With a list in `problems`, bad lines are described there and left out;
    without it they raise one ValueError that names them all. A missing or empty manifest always raises. `policy`, `words_files`: of words,
    as in the settings of data.
    """
    found: list[str] = []
    recordings = [one for unit in manifest_units(path, allow_outside, policy, words_files) for one in unit(found)]
    if not recordings and not found:
        raise MoshiTTTError(f"{resolve('data', path)}: the manifest is empty.")
    if problems is None and found:
        raise MoshiTTTError("\n".join(found))
    if problems is not None:
        problems += found
    return recordings


def manifest_units(path: str | os.PathLike[str], allow_outside: bool, policy: Policy, words_files: str) -> Iterator[Unit]:
    """The lines of a manifest, each to be read by itself."""
    path = Path(resolve("data", path))
    if not path.is_file():
        raise MoshiTTTFileNotFoundError(f'{path}: there is no such manifest (a .jsonl of {{"path": …, "duration": …}} lines).')
    names: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            entry = _parsed(line)
            twice = isinstance(entry, tuple) and entry[0] in names
            yield partial(_read_line, path, number, entry, twice, allow_outside, policy, words_files)
            if isinstance(entry, tuple):
                names.add(entry[0])


def _parsed(line: str) -> tuple[str, float] | MoshiTTTError:
    """The path and the seconds of a line, or what is wrong with it."""
    try:
        entry = parse_json(line)
    except ValueError as error:
        return MoshiTTTError(f"not JSON ({str(error)[:200]}).")
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return MoshiTTTError('a line must be {"path": "a.wav", "duration": seconds}.')
    duration = entry.get("duration")
    seconds = seconds_of(duration) if isinstance(duration, (int, float)) else None
    if seconds is None or seconds <= 0:
        return MoshiTTTError(f"duration is {str(duration)[:40]}, it must be a number of seconds > 0.")
    return entry["path"], seconds


def _lines(path: Path) -> Iterator[str]:
    """Lines that end at \\n or \\r\\n, however long; other characters that Python would split at belong to a name."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            while line := file.readline(limits.MANIFEST_LINE):
                if len(line) >= limits.MANIFEST_LINE:
                    raise MoshiTTTError(
                        f"{path}: a line has more than {limits.MANIFEST_LINE} characters; a manifest has one recording a line."
                    )
                yield line.rstrip("\r\n")
        except UnicodeDecodeError:
            raise MoshiTTTError(f"{path} is not a text file in UTF-8.") from None


def _read_line(
    manifest: Path,
    number: int,
    entry: tuple[str, float] | MoshiTTTError,
    twice: bool,
    allow_outside: bool,
    policy: Policy,
    words_files: str,
    problems: list[str],
) -> list[Recording]:
    try:
        if isinstance(entry, MoshiTTTError):
            raise entry
        name, seconds = entry
        if twice:
            raise MoshiTTTError(f"{name} is listed twice; name a recording once, and weigh sources with path:weight.")
        sound = manifest.parent / name if allow_outside else inside(manifest.parent, name)
        if not sound.is_file():
            raise MoshiTTTFileNotFoundError(f"there is no sound file {sound}.")
        return [recording(sound, seconds, policy, words_files)]
    except (MoshiTTTError, OSError) as error:
        problems.append(f"{manifest}, line {number}: {error}")
        return []


def recording(sound: Path, seconds: float, policy: Policy, words_files: str) -> Recording:
    """A sound of this length with its words; ValueError as `mend` raises it."""
    words = find_words(sound, words_files)
    return Recording(sound, seconds, *(read_words(words, seconds, policy) if words else ()))

"""Recordings ready to be read: their codes on disk and their text streams, in the order of their sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError
from .codes import CodesCache, code_frames, recording_text
from .recordings import Recording
from .settings import DataSettings
from .sources import read_sources


@dataclass(frozen=True)
class Prepared:
    """One recording ready to be read: its codes on disk, its text stream [T] int32 (all -1 where nothing was aligned)."""

    name: str
    codes: Path
    frames: int
    text: np.ndarray


@dataclass
class PreparedSet:
    """Recordings of all sources, in order, with the sources' sizes and weights."""

    recordings: list[Prepared]
    sizes: list[int]
    weights: list[float]

    @property
    def lengths(self) -> list[int]:
        return [recording.frames for recording in self.recordings]


def prepare_set(sources: str, settings: DataSettings, cache: CodesCache, progress: Any = iter) -> PreparedSet:
    """Read sources, encode what is not in the cache, and make the text streams.

    Args:
        sources: "path:weight,path:weight".
        cache: where the codes are kept.
        progress: wraps the list of recordings, as tqdm does.

    Raises:
        ValueError: bad files, all of them in one message, unless settings.on_bad_files is "skip"; or nothing is left.
    """
    problems: list[str] = []
    found = read_sources(sources, settings, cache.store, problems)
    everything = [recording for source in found for recording in source.recordings]
    codes = list(cache.prepare(progress(everything), problems))
    paths = dict(zip(map(id, everything), codes))
    prepared: list[Prepared] = []
    sizes: list[int] = []
    for source in found:
        before = len(prepared)
        for recording in source.recordings:
            path = paths[id(recording)]
            ready = None if path is None else _prepare_one(recording, path, cache, problems)
            prepared += [] if ready is None else [ready]
        sizes.append(len(prepared) - before)
    report = "\n".join(f"  {problem}" for problem in problems)
    if problems and settings.on_bad_files == "stop":
        raise MoshiTTTError(f"{len(problems)} bad files (data.on_bad_files: skip goes on without them):\n{report}")
    empty = [source.name for source, size in zip(found, sizes) if size == 0]
    if empty:
        raise MoshiTTTError(f"Nothing can be used in {', '.join(empty)}.\n{report}".rstrip())
    if problems:
        print(f"{len(problems)} bad files are left out:\n{report}", flush=True)
    return PreparedSet(prepared, sizes, [source.weight for source in found])


def _prepare_one(recording: Recording, path: Path, cache: CodesCache, problems: list[str]) -> Prepared | None:
    frames = code_frames(path)
    try:
        text = recording_text(cache.processor, recording, frames)
    except ValueError as error:
        problems.append(f"{recording.path}: {error}")
        return None
    return Prepared(recording.path.stem, path, frames, text)

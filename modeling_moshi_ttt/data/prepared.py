"""Recordings ready to be read: their codes on disk with their text, in the order of their sources."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..common.lock import locked
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from .cache import CodesCache
from .codes import read_frames
from .index import SCHEMA, SUFFIX, Index, Row, is_index, known_sounds, read_index, shard_path, write_shard
from .settings import DataSettings
from .shard import WHOLE, Shard
from .sources import left_out, parse_sources, placed_recordings
from .words import WordReport

FIRST_SAVED, GROWTH = 200, 1.25  # a begun index is saved when it has this many rows, and again whenever it has grown so far
SHOWN = 20  # files that a report names
BEGUN = ".begun"


@dataclass(frozen=True)
class Prepared:
    """One recording ready to be read: its codes and its text stream on disk."""

    name: str
    codes: Path
    frames: int

    def read(self, start: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Text [frames] int32 (all -1 where nothing was aligned) and codes [2, K, frames] int16 from `start` on; OSError where damaged."""
        return read_frames(self.codes, start, frames)

    @property
    def sound(self) -> str:
        """SHA-256 of the sound."""
        return self.codes.stem.partition("-")[0]


class IndexedRecordings(Sequence[Prepared]):
    """The recordings of an index, which stays a table: 10^6 of them take some 200 MB."""

    def __init__(self, folder: Path, table: pa.Table):
        self.folder = folder
        self.paths, self.codes, self.frames = (table.column(name).combine_chunks() for name in ("path", "codes", "frames"))

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, item: int) -> Prepared: ...
    @overload
    def __getitem__(self, item: slice) -> list[Prepared]: ...
    def __getitem__(self, item: int | slice) -> Prepared | list[Prepared]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        name = os.path.splitext(os.path.basename(self.paths[item].as_py()))[0]
        return Prepared(name, self.folder / self.codes[item].as_py(), self.frames[item].as_py())


@dataclass
class PreparedSet:
    """Recordings of all sources, in order, with the sources' sizes and weights."""

    recordings: Sequence[Prepared]
    sizes: list[int]
    weights: list[float]

    @property
    def lengths(self) -> list[int]:
        if isinstance(self.recordings, IndexedRecordings):
            return self.recordings.frames.to_pylist()
        return [recording.frames for recording in self.recordings]

    @property
    def mark(self) -> str:
        """What tells one set from another: how many recordings there are, and a hash of their sounds' hashes and frames, in order."""
        sounds: Iterable[str] = (recording.sound for recording in self.recordings)
        if isinstance(self.recordings, IndexedRecordings):
            sounds = (os.path.basename(codes.as_py()).partition("-")[0] for codes in self.recordings.codes)
        digest = hashlib.sha256(f"[{json.dumps(self.sizes)}, [".encode())  # what json.dumps makes of the whole, which would be large
        for number, (sound, frames) in enumerate(zip(sounds, self.lengths)):
            digest.update(f'{", " * (number > 0)}["{sound}.safetensors", {frames}]'.encode())
        digest.update(b"]]")
        return f"{len(self.recordings)} recordings ({digest.hexdigest()[:16]})"


@dataclass
class Preparation:
    """What `prepare` made: a table of `Row`s, its index (None where all was read from others'), the sources with their weights."""

    table: pa.Table
    index: Path | None
    sources: list[str]
    weights: list[float]
    problems: list[str]
    left_out: list[str]


def prepare_set(sources: str, settings: DataSettings, cache: CodesCache, progress: Any = iter) -> PreparedSet:
    """Read sources, encode what is not in the cache, and make the text streams; or read the index that `moshi-ttt prepare` made of them.

    Args:
        sources: "path:weight,path:weight"; a path may be an index.
        cache: where the codes are kept.
        progress: wraps what is gone through, as tqdm does.

    Raises:
        ValueError: bad files, all of them in one message, unless settings.on_bad_files is "skip"; or nothing is left.
    """
    path = _shard_path(sources, settings, cache, WHOLE)
    made = _prepare(sources, settings, cache, progress, WHOLE, path)  # without a lock: all ranks read what is prepared side by side
    counts = {int(one["values"]): int(one["counts"]) for one in pc.value_counts(made.table.column("source")).to_pylist()}
    sizes = [counts.get(number, 0) for number in range(len(made.sources))]
    empty = [name for name, size in zip(made.sources, sizes) if size == 0]
    if empty:
        raise MoshiTTTError("\n".join([f"Nothing can be used in {', '.join(empty)}.", *(f"  {problem}" for problem in made.problems)]))
    say_what_is_odd(made)
    return PreparedSet(IndexedRecordings(cache.folder, made.table), sizes, made.weights)


def prepare(sources: str, settings: DataSettings, cache: CodesCache, progress: Any = iter, shard: Shard = WHOLE) -> Preparation:
    """The same for one shard of the work, without a look at what is empty; its rows go into the shard's file of the index.

    A process that is asked for a shard which another one makes waits for it, and then finds it made.
    """
    path = _shard_path(sources, settings, cache, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent, "data.cache", f".{path.stem}.lock", wait=True):
        return _prepare(sources, settings, cache, progress, shard, path)


def _prepare(sources: str, settings: DataSettings, cache: CodesCache, progress: Any, shard: Shard, path: Path) -> Preparation:
    folder = path.parent
    known = cache.known_before() | known_sounds(folder)
    tables: list[pa.Table] = []
    names: list[str] = []
    weights: list[float] = []
    rows: list[Row] = []
    problems: list[str] = []
    saved_at = FIRST_SAVED
    for name, weight in parse_sources(sources):
        place = Path(resolve("data", name))
        if is_index(place):
            found = read_index(place, cache.codec)
            tables.append(_renumbered(found, len(names)))
            names += found.sources
            weights += [weight * share / sum(found.weights) for share in found.weights]
            continue
        about = {"codec": cache.codec, "sources": [*names, name], "weights": [*weights, weight], "problems": problems}
        placed = placed_recordings(name, settings, cache.store, problems, shard)
        for row in progress(cache.prepare(len(names), placed, settings, known, problems)):
            rows.append(row)
            if len(rows) >= saved_at:  # what was hashed is known after a kill, too
                write_shard(path.with_name(path.name + BEGUN), rows, about)
                saved_at = int(len(rows) * GROWTH)
        names, weights = [*names, name], [*weights, weight]
    if problems and settings.on_bad_files == "stop":
        report = "\n".join(f"  {problem}" for problem in problems)
        raise MoshiTTTError(f"{len(problems)} bad files (data.on_bad_files: skip goes on without them):\n{report}")
    index = None
    if not tables:
        write_shard(path, rows, {"codec": cache.codec, "sources": names, "weights": weights, "problems": problems})
        path.with_name(path.name + BEGUN).unlink(missing_ok=True)
        index = folder
    own = pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)
    table = pa.concat_tables([own, *tables]).sort_by([("source", "ascending"), ("place", "ascending")])
    return Preparation(table, index, names, weights, problems, left_out(sources, cache.store))


def _shard_path(sources: str, settings: DataSettings, cache: CodesCache, shard: Shard) -> Path:
    """A shard's file of the index, which is named by its sources and what was made of them."""
    parts = [settings.columns, settings.words, settings.words_files, settings.main_speaker, settings.mono_is, settings.require_words]
    name = hashlib.sha256(json.dumps([sources, parts]).encode()).hexdigest()[:16]
    return shard_path(cache.folder / f"{name}{SUFFIX}", *shard)


def _renumbered(found: Index, first: int) -> pa.Table:
    """The table of an index, its sources numbered from `first` on."""
    at = SCHEMA.get_field_index("source")
    table = found.table.replace_schema_metadata(None)
    return table.set_column(at, SCHEMA.field(at), pc.add(table.column("source"), first))


def say_what_is_odd(made: Preparation) -> None:
    """Tell of files that were left out, of odd words, and of recordings without any, whose text nothing learns."""
    for line in made.left_out:
        print(line, flush=True)
    if made.problems:
        print("\n".join([f"{len(made.problems)} bad files are left out:", *(f"  {problem}" for problem in made.problems)]), flush=True)
    odd, total = odd_words(made.table)
    if odd:
        shown = [*odd[:SHOWN], *([f"… and {len(odd) - SHOWN} more files"] if len(odd) > SHOWN else [])]
        print("\n".join([f"odd words in {len(odd)} files ({total}):", *(f"  {line}" for line in shown)]), flush=True)
    wordless = pc.sum(pc.invert(made.table.column("aligned"))).as_py() or 0
    if wordless:
        print(
            f"warning: {wordless} of {len(made.table)} recordings have no words, so nothing is learned of their text, and where none has words "
            "the text loss is null; `moshi-ttt annotate` writes words beside them, data.words_files finds those that lie elsewhere.",
            file=sys.stderr,
            flush=True,
        )


def odd_words(table: pa.Table) -> tuple[list[str], WordReport]:
    """A line for each recording with odd words, and all of them together."""
    counts = [name for name in Row._fields if name in WordReport.__dataclass_fields__]
    odd = table.filter(reduce(pc.or_, (pc.greater(table.column(name), 0) for name in counts)))
    lines, total = [], WordReport()
    for row in odd.select(["path", *counts]).to_pylist():
        report = WordReport(**{name: row[name] for name in counts})
        lines.append(f"{row['path']}: {report}")
        total += report
    return lines, total


def hours(table: pa.Table) -> float:
    """Hours of sound in a table of rows."""
    return (pc.sum(table.column("frames")).as_py() or 0) / FRAME_RATE / 3600

"""The index of prepared recordings: one Parquet file a shard, put together when it is read."""

from __future__ import annotations

import io
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..common.files import atomic_write
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError

FORMAT = 1
SUFFIX = ".index"
SHARD_NAME = re.compile(r"(\d{5})-of-(\d{5})\.parquet")


class Row(NamedTuple):
    """A prepared recording, as its index has it."""

    source: int  # which of the sources
    place: int  # in the order of its source
    path: str  # of the sound
    size: int  # of the sound in bytes, and its date in ns: while they stay, it is not hashed again
    date: int
    sound: str  # SHA-256
    codes: str  # file of codes, below the cache's folder of this codec
    frames: int
    aligned: bool  # whether there were words at all
    speaks: bool  # whether Moshi says any
    clamped: int
    dropped: int
    interpolated: int
    split: int
    kept: int


TYPES = {int: pa.int64(), str: pa.string(), bool: pa.bool_()}
SCHEMA = pa.schema([(name, TYPES[kind]) for name, kind in typing.get_type_hints(Row).items()])


class Index(NamedTuple):
    """All shards of an index: the columns of `Row`, sorted by source and place, and what was said of the whole."""

    table: pa.Table
    sources: list[str]
    weights: list[float]
    problems: list[str]


def shard_path(folder: Path, index: int, count: int) -> Path:
    """Where a shard of an index goes."""
    return folder / f"{index:05d}-of-{count:05d}.parquet"


def write_shard(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write one shard of an index; `about` holds codec, sources, weights and problems."""
    columns = list(zip(*rows)) or [()] * len(SCHEMA)
    metadata = {"moshi_ttt": json.dumps({"format": FORMAT, **about}, ensure_ascii=False)}
    table = pa.table([pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types)], schema=SCHEMA.with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write(path, buffer.getvalue())


def is_index(path: Path) -> bool:
    """Whether a folder is an index, by its name."""
    return path.suffix == SUFFIX and path.is_dir()


def read_index(folder: Path, codec: str) -> Index:
    """Read all shards of an index.

    Args:
        codec: fingerprint that the codes must have been made with.

    Raises:
        ValueError, OSError: shards are missing or damaged, or the codes are another codec's.
    """
    found = {(int(name[1]), int(name[2])): path for path in sorted(folder.iterdir()) if (name := SHARD_NAME.fullmatch(path.name))}
    counts = {count for _, count in found}
    if len(counts) != 1:
        shards = f"of {' and of '.join(map(str, sorted(counts)))} shards" if counts else "no shard"
        raise MoshiTTTOSError(f"{folder} holds {shards}; run `moshi-ttt prepare` with one number of shards into a new cache.")
    (count,) = counts
    missing = [str(number) for number in range(count) if (number, count) not in found]
    if missing:
        raise MoshiTTTOSError(
            f"{folder} lacks shards {', '.join(missing)} of {count}; run `moshi-ttt prepare` with --shard {missing[0]}/{count}."
        )
    tables: list[pa.Table] = []
    problems: list[str] = []
    about: dict[str, Any] = {}
    for path in found.values():
        table, about = _read(path)
        if about["codec"] != codec:
            raise MoshiTTTError(
                f"{folder} was made with the codec {about['codec']}, the processor's is {codec}; prepare the recordings with it."
            )
        tables.append(table)
        problems += about["problems"]
    table = pa.concat_tables(tables)
    return Index(table.sort_by([("source", "ascending"), ("place", "ascending")]), about["sources"], about["weights"], problems)


def _read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"moshi_ttt"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise MoshiTTTOSError(
            f"{path}: the index cannot be read ({type(error).__name__}: {error}); run `moshi-ttt prepare` again."
        ) from None
    if about.get("format") != FORMAT or table.schema.names != list(Row._fields):
        raise MoshiTTTError(
            f"{path}: the index has format {about.get('format')}, this version reads {FORMAT}; run `moshi-ttt prepare` again."
        )
    return table, about


class Known(NamedTuple):
    """A sound whose hash was worked out before: it counts while size and date stay. `codes` is "" where version 0.2.0 made them."""

    size: int
    date: int
    sound: str
    codes: str


def known_sounds(folder: Path) -> dict[str, Known]:
    """What an index, or one that was begun, knows of sounds, by their path; one that cannot be read is passed over, being a shortcut here."""
    known: dict[str, Known] = {}
    for path in sorted(folder.glob("*.parquet*")):
        try:
            table = _read(path)[0].select(["path", *Known._fields])
        except MoshiTTTError:
            continue
        paths, *columns = table.to_pydict().values()
        known |= dict(zip(paths, map(Known._make, zip(*columns))))
    return known

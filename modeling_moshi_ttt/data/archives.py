"""Sounds inside tar shards (the WebDataset layout) and parquet files, and words in parquet columns.

A shard or a parquet file is unpacked once, one sound after another, into a folder in moshi-finetune's format; from then on it is read as
one.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.files import atomic_write, inside, parse_json
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER, USER_SPEAKER
from . import limits
from .audio import SOUND_SUFFIXES, audio_duration
from .recordings import Recording, Unit, read_manifest
from .settings import COLUMNS
from .sound_worker import in_worker
from .word_files import parse_words
from .words import Policy

ARCHIVE_SUFFIXES = (".tar", ".parquet")
ROWS_AT_ONCE = 16
UNPACKED, MANIFEST = "unpacked.json", "data.jsonl"


class Damaged(ValueError):
    """A file that is torn or of another kind than its name says."""


@dataclass
class Sample:
    """One sound as it lies in an archive: its name there, its bytes, its words as parsed JSON (None without), and what is wrong with it."""

    name: str
    sounds: list[bytes] = field(default_factory=list)
    words: Any = None
    problem: str = ""


def read_archive(archive: Path, folder: Path, columns: dict[str, str], policy: Policy, problems: list[str]) -> list[Recording]:
    """Recordings of a .tar of `a.flac`, `a.json`, … members, or of a .parquet with a column of sounds, unpacked below `folder`.

    What is wrong with single samples goes to `problems`, one sentence each.

    Raises:
        ValueError: there is no sound at all in the archive, or a parquet file lacks a column.
    """
    place = folder / f"{archive.stem}-{hashlib.sha256(str(archive.resolve()).encode()).hexdigest()[:12]}"
    stamp = [archive.stat().st_size, archive.stat().st_mtime_ns, columns]
    found = _unpacked(place, stamp)
    if found is None:
        found = _unpack(archive, place, columns)
        atomic_write(place / UNPACKED, json.dumps({"stamp": stamp, "problems": found}, ensure_ascii=False))
    problems += found
    if not (place / MANIFEST).read_text().strip():
        if not found:
            raise MoshiTTTError(f"{archive}: there is no sound ({', '.join(SOUND_SUFFIXES)}) in this file.")
        return []
    return read_manifest(place / MANIFEST, problems=problems, policy=policy)


def _unpacked(place: Path, stamp: list[Any]) -> list[str] | None:
    """The problems found when this very archive was unpacked; None when it was not, or not to the end."""
    try:
        known = json.loads((place / UNPACKED).read_text())
        return list(known["problems"]) if known["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unpack(archive: Path, place: Path, columns: dict[str, str]) -> list[str]:
    """Write every sound, its words beside it, and the manifest; returns what is wrong with single samples."""
    problems: list[str] = []
    lines: dict[str, str] = {}
    samples = _tar_samples(archive) if archive.suffix == ".tar" else _parquet_samples(archive, columns)
    try:
        for sample in samples:
            try:
                if sample.name in lines:
                    raise MoshiTTTError(f"{sample.name}: there are two of this name.")
                lines[sample.name] = json.dumps({"path": sample.name, "duration": _write(sample, place)})
            except ValueError as error:
                problems.append(f"{archive}: {str(error).removeprefix(f'{place}/')}")
    except Damaged as error:
        problems.append(str(error))
    atomic_write(place / MANIFEST, "".join(line + "\n" for line in lines.values()))
    return problems


def _write(sample: Sample, place: Path) -> float:
    """A sample's sound and words as files; returns its seconds. ValueError, beginning with the name, for one that is no recording."""
    if sample.problem:
        raise MoshiTTTError(f"{sample.name}: {sample.problem}")
    if len(sample.sounds) != 1:
        raise MoshiTTTError(f"{sample.name}: there are {len(sample.sounds)} sounds beside the words; one stereo sound is wanted.")
    path = inside(place, sample.name)
    words = None if sample.words is None else parse_words(sample.name, sample.words)[0]
    atomic_write(path, sample.sounds[0])
    try:
        seconds = in_worker(audio_duration, path)
    except ValueError:
        path.unlink()
        raise
    if words is not None:
        atomic_write(path.with_suffix(".json"), json.dumps({"alignments": words}, ensure_ascii=False))
    return seconds


# ---- tar


def _tar_samples(archive: Path) -> Iterator[Sample]:
    """Members that share a name up to its first dot and follow one another are a sample. Sounds and JSON are read, nothing else is opened."""
    from datasets import DownloadManager

    sample, key = Sample(""), ""
    try:
        for name, file in DownloadManager().iter_archive(str(archive)):
            pure = PurePosixPath(name)
            suffix = pure.suffix.lower()
            if suffix not in (*SOUND_SUFFIXES, ".json"):
                continue
            own = str(pure.with_name(pure.name.split(".")[0]))
            if own != key:
                yield from [sample] if key else []
                sample, key = Sample(name), own
            most = limits.WORDS_BYTES if suffix == ".json" else limits.MEMBER_BYTES
            data = file.read(most + 1)  # a member may be sparse, or the shard packed: few bytes on disk, any number here
            if len(data) > most:
                sample.problem = f"its {suffix} takes more than the {most} bytes that are read of a member."
            elif suffix == ".json":
                sample.words, sample.problem = _json(data)
            else:
                sample.name = name
                sample.sounds.append(data)
    except (tarfile.TarError, EOFError, OSError) as error:
        sample.problem, key = f"the shard is torn here or no tar file at all ({error}).", key or archive.name
        sample.name = sample.name or archive.name
    yield from [sample] if key else []


def _json(data: bytes) -> tuple[Any, str]:
    try:
        return parse_json(data), ""
    except ValueError as error:
        return None, f"the words are not JSON ({error})."


# ---- parquet


def column(names: Sequence[str], role: str, columns: dict[str, str], where: Path, needed: bool = True) -> str:
    """The name of the column for a role; "" where it is not there and not `needed`.

    Raises:
        ValueError: the column named in data.columns is missing, or none of the usual ones is there.
    """
    wanted = (columns[role],) if role in columns else COLUMNS[role]
    found = [name for name in wanted if name in names]
    if not found and (needed or role in columns):
        raise MoshiTTTError(
            f"{where}: there is no column {' or '.join(map(repr, wanted))} for the {role}; the columns are {', '.join(names)}. "
            f"Name the right one with data.columns: {{{role}: …}}."
        )
    return found[0] if found else ""


def _rows(parquet: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows with the columns of these names, a few at a time in memory."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(parquet).iter_batches(ROWS_AT_ONCE, columns=[name for name in names if name]):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(f"{parquet}: the parquet file cannot be read ({error}).") from None


def _names(parquet: Path) -> list[str]:
    import pyarrow
    from pyarrow.parquet import read_schema

    try:
        return list(read_schema(parquet).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(f"{parquet}: the parquet file cannot be read ({error}).") from None


def _parquet_samples(parquet: Path, columns: dict[str, str]) -> Iterator[Sample]:
    """Rows of a file as `datasets` writes it: a column of sounds {bytes, path}, perhaps words. Names get the row's number before them."""
    names = _names(parquet)
    audio = column(names, "audio", columns, parquet)
    alignments, speakers = (column(names, role, columns, parquet, needed=False) for role in ("alignments", "speakers"))
    for number, row in enumerate(_rows(parquet, (audio, alignments, speakers))):
        sound = row[audio] if isinstance(row[audio], dict) else {}
        name = PurePosixPath(sound.get("path") or "sound.wav").name
        sample = Sample(f"{number:06d}-{name}", [sound["bytes"]] if sound.get("bytes") else [])
        if not sample.sounds:
            sample.problem = f"the column {audio!r} holds no bytes of a sound in this row; a manifest can name sounds that are files."
        try:
            sample.words = _row_words(row, alignments, speakers)
        except ValueError as error:
            sample.problem = f"the words are not JSON ({error})."
        yield sample


def _row_words(row: dict[str, Any], alignments: str, speakers: str) -> Any:
    """The words of a row, a list or its JSON; labels of speakers that have a channel become Moshi's (channel 0) and the user's."""
    items, channels = (parse_json(value) if isinstance(value, str) else value for value in (row.get(alignments), row.get(speakers)))
    if not isinstance(items, list) or not isinstance(channels, dict):
        return items

    def label(item: Any) -> Any:
        if not isinstance(item, list) or len(item) != 3 or channels.get(item[2]) is None:
            return item
        return [*item[:2], MAIN_SPEAKER if channels[item[2]] == 0 else USER_SPEAKER]

    return [label(item) for item in items]


def with_parquet_words(
    units: Iterable[Unit], manifest: Path, columns: dict[str, str], policy: Policy, problems: list[str]
) -> Iterable[Unit]:
    """Units whose recordings without words take them from the parquet of the manifest's name and from those in transcripts/ beside it."""
    own = manifest.with_suffix(".parquet")
    parquets = [*([own] if own.is_file() else []), *sorted((manifest.parent / "transcripts").glob("*.parquet"))]
    if not parquets:
        return units
    said = {manifest.parent / name: (parquet, words) for parquet in parquets for name, words in _parquet_words(parquet, columns, problems)}
    return (partial(_with_words, unit, said, policy) for unit in units)


def _parquet_words(parquet: Path, columns: dict[str, str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    names = _names(parquet)
    path, alignments = (column(names, role, columns, parquet) for role in ("path", "alignments"))
    speakers = column(names, "speakers", columns, parquet, needed=False)
    for row in _rows(parquet, (path, alignments, speakers)):
        try:
            yield str(row[path]), _row_words(row, alignments, speakers)
        except ValueError as error:
            problems.append(f"{parquet}: the words of {row[path]} are not JSON ({error}).")


def _with_words(unit: Unit, said: dict[Path, tuple[Path, Any]], policy: Policy, problems: list[str]) -> list[Recording]:
    found = []
    for one in unit(problems):
        if one.words is None and one.path in said:
            parquet, data = said[one.path]
            try:
                words, report = parse_words(one.path, data, one.duration, policy)
            except ValueError as error:
                problems.append(f"{parquet}: {error}")
                continue
            one = replace(one, words=words, report=report)
        found.append(one)
    return found

"""Where recordings come from: "path:weight,path:weight" with manifests, folders, parquet alignments and Hub data sets."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.audio import audio_duration
from ..common.recordings import Recording, parse_words, read_manifest, read_words

SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# A manifest may round its durations; beyond this many seconds it speaks of another file.
DURATION_TOLERANCE = 0.1


@dataclass(frozen=True)
class Source:
    """One weighted set of recordings."""

    name: str
    weight: float
    recordings: tuple[Recording, ...]


def parse_sources(text: str) -> list[tuple[str, float]]:
    """Split "a.jsonl:2,b.jsonl" into [("a.jsonl", 2.0), ("b.jsonl", 1.0)].

    Raises:
        ValueError: nothing is named, a weight is not above 0, or a name comes twice.
    """
    sources: list[tuple[str, float]] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, number = part.rpartition(":")
        try:
            weight = float(number) if sign else 1.0
        except ValueError:
            name, weight = part, 1.0
        name = name if sign and name else part
        if not 0 < weight < float("inf"):
            raise ValueError(f"The source {part!r} has the weight {weight:g}; a weight must be above 0.")
        if any(os.path.normpath(name) == os.path.normpath(other) for other, _ in sources):
            raise ValueError(f"The source {name!r} is named twice in {text!r}; name it once and give it the sum of the weights.")
        sources.append((name, weight))
    if not sources:
        raise ValueError(f'No source is named in {text!r}; write "data.jsonl" or "one.jsonl:2,two.jsonl:1".')
    return sources


def read_sources(text: str, allow_outside: bool, require_words: bool, problems: list[str]) -> list[Source]:
    """Read every source; what is wrong with single files goes to `problems`, one sentence a file, and the file is left out.

    Raises:
        ValueError, OSError: a source as a whole is missing or empty.
    """
    sources = []
    for name, weight in parse_sources(text):
        recordings = [r for r in _read(name, allow_outside, problems) if _is_sound(r, require_words, problems)]
        sources.append(Source(name, weight, tuple(recordings)))
    return sources


def _is_sound(recording: Recording, require_words: bool, problems: list[str]) -> bool:
    try:
        length = audio_duration(recording.path)
    except ValueError as error:
        problems.append(str(error))
        return False
    if abs(length - recording.duration) > DURATION_TOLERANCE:
        problems.append(f"{recording.path}: the manifest says {recording.duration:.3f} s, the file lasts {length:.3f} s.")
        return False
    if require_words and recording.words is None:
        problems.append(f"{recording.path}: there are no words beside it; run `moshi-ttt annotate`, or set data.require_words: false.")
        return False
    return True


def _read(name: str, allow_outside: bool, problems: list[str]) -> list[Recording]:
    if name.startswith("hub:"):
        return _read_folder(_download(name.removeprefix("hub:")), problems)
    path = Path(name)
    if path.is_dir():
        return _read_folder(path, problems)
    if path.suffix != ".jsonl" and path.exists():
        raise ValueError(f"The source {name!r} is neither a .jsonl manifest, nor a folder, nor hub:owner/name.")
    recordings = read_manifest(path, allow_outside, problems)
    parquet = path.with_suffix(".parquet")
    return _add_parquet_words(recordings, path, parquet) if parquet.is_file() else recordings


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, repo_type="dataset"))


def _read_folder(folder: Path, problems: list[str]) -> list[Recording]:
    """Its manifests if it has any, else every sound file below it."""
    manifests = sorted(folder.rglob("*.jsonl"))
    if manifests:
        return [recording for manifest in manifests for recording in read_manifest(manifest, problems=problems)]
    recordings = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUND_SUFFIXES):
        try:
            recordings.append(Recording(path, audio_duration(path), read_words(path.with_suffix(".json"))))
        except ValueError as error:
            problems.append(str(error))
    if not recordings and not problems:
        raise ValueError(f"{folder}: there is no sound file ({', '.join(SOUND_SUFFIXES)}) and no .jsonl manifest in this folder.")
    return recordings


def _add_parquet_words(recordings: list[Recording], manifest: Path, parquet: Path) -> list[Recording]:
    """Words from a parquet of the manifest's name with the columns `path` and `alignments` (a list, or its JSON)."""
    from datasets import Dataset

    table = Dataset.from_parquet(str(parquet), keep_in_memory=True)
    if not {"path", "alignments"} <= set(table.column_names):
        raise ValueError(f"{parquet}: the columns are {table.column_names}; it needs `path` and `alignments`.")
    rows: dict[Path, Any] = {manifest.parent / row["path"]: row["alignments"] for row in table}
    added = []
    for recording in recordings:
        items = rows.get(recording.path)
        if recording.words is None and items is not None:
            items = json.loads(items) if isinstance(items, str) else items
            recording = replace(recording, words=parse_words(recording.path, items))
        added.append(recording)
    return added

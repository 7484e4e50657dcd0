"""Where recordings come from: "path:weight,path:weight" with manifests, folders, tar shards, parquet files and Hub data sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi

from ..common.files import inside
from ..common.hub import hub_errors
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError
from .archives import ARCHIVE_SUFFIXES, SOUND_SUFFIXES, add_parquet_words, read_archive
from .audio import audio_duration
from .recordings import Recording, read_manifest, read_words
from .settings import DataSettings

HUB = "hub:"
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
            raise MoshiTTTError(f"The source {part!r} has the weight {weight:g}; a weight must be above 0.")
        if any(os.path.normpath(name) == os.path.normpath(other) for other, _ in sources):
            raise MoshiTTTError(f"The source {name!r} is named twice in {text!r}; name it once and give it the sum of the weights.")
        sources.append((name, weight))
    if not sources:
        raise MoshiTTTError(f'No source is named in {text!r}; write "data.jsonl" or "one.jsonl:2,two.jsonl:1".')
    return sources


def read_sources(text: str, settings: DataSettings, store: Path, problems: list[str]) -> list[Source]:
    """Read every source; what is wrong with single files goes to `problems`, one sentence a file, and the file is left out.

    Args:
        text: "path:weight,path:weight".
        store: folder for what is downloaded from the Hub and unpacked from archives, which happens once.

    Raises:
        ValueError, OSError: a source as a whole is missing or empty.
    """
    sources = []
    for name, weight in parse_sources(text):
        recordings = [r for r in _read(name, settings, store, problems) if _is_sound(r, settings.require_words, problems)]
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


def _read(name: str, settings: DataSettings, store: Path, problems: list[str]) -> list[Recording]:
    path = _download(name, store / "hub") if name.startswith(HUB) else Path(resolve("data", name))
    if path.is_dir():
        return _read_folder(path, settings, store, problems)
    if path.suffix in ARCHIVE_SUFFIXES and path.is_file():
        return read_archive(path, store / "unpacked", settings.columns, problems)
    if path.suffix != ".jsonl" and path.exists():
        raise MoshiTTTError(f"The source {name!r} is no .jsonl manifest, no .tar or .parquet, no folder, and not hub:owner/name.")
    return _read_manifest(path, settings, problems)


def _read_manifest(path: Path, settings: DataSettings, problems: list[str]) -> list[Recording]:
    return add_parquet_words(read_manifest(path, settings.allow_outside, problems), path, settings.columns, problems)


def _download(name: str, store: Path) -> Path:
    """Fetch hub:owner/name, or the folder or file named after it in the repository, into `store`; what is there already is not fetched
    again.

    A manifest comes with everything in its folder. Only sounds, words, manifests and archives are fetched.
    """
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, part = rest.partition("/")
    if not owner or not repository:
        raise MoshiTTTError(f"The source {name!r} names no data set: write hub:owner/name, or hub:owner/name/folder for a part of it.")
    target = store / owner / repository
    below = str(PurePosixPath(part).parent) if PurePosixPath(part).suffix == ".jsonl" else part
    if PurePosixPath(below).suffix in ARCHIVE_SUFFIXES:
        wanted = [below]
    else:
        before = f"{below.rstrip('/')}/" if below not in ("", ".") else ""
        wanted = [f"{before}*{suffix}" for suffix in (*SOUND_SUFFIXES, *ARCHIVE_SUFFIXES, ".json", ".jsonl")]
    with hub_errors(f"fetching the source {name!r}", then="what has arrived is kept; run the same command again to go on"):
        # real files in a folder of their own: the client's cache would hold links, which lead out of their folder
        HfApi().snapshot_download(f"{owner}/{repository}", repo_type="dataset", local_dir=target, allow_patterns=wanted)
    path = inside(target, part) if part else target
    if not path.exists():
        raise MoshiTTTError(f"The source {name!r}: the data set {owner}/{repository} holds no sounds, manifest or archive under {part!r}.")
    return path


def _read_folder(folder: Path, settings: DataSettings, store: Path, problems: list[str]) -> list[Recording]:
    """Its manifests if it has any, else its archives, else every sound file below it."""
    files = _files(folder, store)
    manifests = [path for path in files if path.suffix == ".jsonl"]
    if manifests:
        return [recording for manifest in manifests for recording in _read_manifest(manifest, settings, problems)]
    archives = [path for path in files if path.suffix in ARCHIVE_SUFFIXES]
    if archives:
        unpacked = store / "unpacked"
        return [recording for archive in archives for recording in read_archive(archive, unpacked, settings.columns, problems)]
    recordings = []
    for path in (path for path in files if path.suffix.lower() in SOUND_SUFFIXES):
        try:
            recordings.append(Recording(path, audio_duration(path), read_words(path.with_suffix(".json"))))
        except ValueError as error:
            problems.append(str(error))
    if not recordings and not problems:
        raise MoshiTTTError(
            f"{folder}: there is no sound file ({', '.join(SOUND_SUFFIXES)}), no .jsonl manifest and no .tar or .parquet in this folder."
        )
    return recordings


def _files(folder: Path, store: Path) -> list[Path]:
    """What lies below a folder, without hidden files, and without the store where someone keeps that in the folder."""
    own = store.absolute()
    inside_store = folder.absolute().is_relative_to(own)
    paths = (path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(path for path in paths if inside_store or not path.absolute().is_relative_to(own))

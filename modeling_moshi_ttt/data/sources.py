"""Where recordings come from: "path:weight,path:weight" with manifests, folders, tar shards, parquet files and Hub data sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi

from ..common.files import inside
from ..common.hub import hub_errors
from ..common.packaged import resolve
from ..errors_moshi_ttt import MoshiTTTError
from .archives import ARCHIVE_SUFFIXES, read_archive, with_parquet_words
from .audio import SOUND_SUFFIXES, audio_duration
from .index import is_index
from .recordings import Recording, Unit, manifest_units, recording
from .settings import DataSettings
from .shard import WHOLE, Shard
from .sound_worker import in_worker
from .word_files import SUFFIXES as WORD_SUFFIXES

HUB = "hub:"
# A manifest may round its durations; beyond this many seconds it speaks of another file.
DURATION_TOLERANCE = 0.1
LARGEST_UNIT = 2**32  # recordings of one archive


class Placed(NamedTuple):
    """A recording and its place in the order of its source, the same for any number of shards."""

    place: int
    recording: Recording


@dataclass(frozen=True)
class Source:
    """One weighted set of recordings, or a shard's share of it."""

    name: str
    weight: float
    placed: tuple[Placed, ...]

    @property
    def recordings(self) -> tuple[Recording, ...]:
        return tuple(one.recording for one in self.placed)


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


def read_sources(text: str, settings: DataSettings, store: Path, problems: list[str], shard: Shard = WHOLE) -> list[Source]:
    """Read every source; what is wrong with single files goes to `problems`, one sentence a file, and the file is left out.

    Args:
        text: "path:weight,path:weight".
        store: folder for what is downloaded from the Hub and unpacked from archives, which happens once.
        shard: which lines, sounds or archives of each source to read.

    Raises:
        ValueError, OSError: a source as a whole is missing or empty.
    """
    return [Source(name, weight, tuple(placed_recordings(name, settings, store, problems, shard))) for name, weight in parse_sources(text)]


def placed_recordings(name: str, settings: DataSettings, store: Path, problems: list[str], shard: Shard = WHOLE) -> Iterator[Placed]:
    """The recordings of one source, or of a shard of it, one after the other, as `read_sources` reads them."""
    units = enumerate(_units(name, settings, store, problems))
    number = -1
    for number, unit in units:
        if number % shard.total == shard.number:
            for inside_unit, recording in enumerate(unit(problems)):
                if _is_sound(recording, settings.require_words, problems):
                    yield Placed(number * LARGEST_UNIT + inside_unit, recording)
    if number < 0 and not problems:
        raise MoshiTTTError(f"The source {name!r} is empty: its manifest has no line.")


def _is_sound(recording: Recording, require_words: bool, problems: list[str]) -> bool:
    try:
        length = in_worker(audio_duration, recording.path)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return False
    if abs(length - recording.duration) > DURATION_TOLERANCE:
        problems.append(f"{recording.path}: the manifest says {recording.duration:.3f} s, the file lasts {length:.3f} s.")
        return False
    if require_words and recording.words is None:
        problems.append(f"{recording.path}: there are no words beside it; run `moshi-ttt annotate`, or set data.require_words: false.")
        return False
    return True


def _units(name: str, settings: DataSettings, store: Path, problems: list[str]) -> Iterable[Unit]:
    path = _download(name, store / "hub") if name.startswith(HUB) else Path(resolve("data", name))
    if path.is_dir():
        return _folder_units(path, settings, store, problems)
    if path.suffix in ARCHIVE_SUFFIXES and path.is_file():
        return [_archive(path, settings, store)]
    if path.suffix != ".jsonl" and path.exists():
        raise MoshiTTTError(f"The source {name!r} is no .jsonl manifest, no .tar or .parquet, no folder, and not hub:owner/name.")
    return _manifest_units(path, settings, problems)


def _archive(path: Path, settings: DataSettings, store: Path) -> Unit:
    return partial(read_archive, path, store / "unpacked", settings.columns, settings.words)


def _manifest_units(path: Path, settings: DataSettings, problems: list[str]) -> Iterable[Unit]:
    units = manifest_units(path, settings.allow_outside, settings.words, settings.words_files)
    return with_parquet_words(units, path, settings.columns, settings.words, problems)


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
        wanted = [f"{before}*{suffix}" for suffix in (*SOUND_SUFFIXES, *ARCHIVE_SUFFIXES, *WORD_SUFFIXES, ".jsonl")]
    with hub_errors(f"fetching the source {name!r}", then="what has arrived is kept; run the same command again to go on"):
        # real files in a folder of their own: the client's cache would hold links, which lead out of their folder
        HfApi().snapshot_download(f"{owner}/{repository}", repo_type="dataset", local_dir=target, allow_patterns=wanted)
    path = inside(target, part) if part else target
    if not path.exists():
        raise MoshiTTTError(f"The source {name!r}: the data set {owner}/{repository} holds no sounds, manifest or archive under {part!r}.")
    return path


def _folder_units(folder: Path, settings: DataSettings, store: Path, problems: list[str]) -> Iterable[Unit]:
    """Its manifests if it has any, else its archives, else every sound file below it; what is none of these is named in `problems`."""
    files = _files(folder, store)
    manifests = [path for path in files if path.suffix == ".jsonl"]
    if manifests:
        return chain.from_iterable(_manifest_units(manifest, settings, problems) for manifest in manifests)
    archives = [path for path in files if path.suffix in ARCHIVE_SUFFIXES]
    if archives:
        return [_archive(archive, settings, store) for archive in archives]
    sounds = [path for path in files if path.suffix.lower() in SOUND_SUFFIXES]
    if not sounds:
        raise MoshiTTTError(
            f"{folder}: there is no sound file ({', '.join(SOUND_SUFFIXES)}), no .jsonl manifest and no .tar or .parquet in this folder."
        )
    first: dict[Path, Path] = {}
    return [partial(_read_sound, path, first.setdefault(path.with_suffix(""), path), settings) for path in sounds]


def _read_sound(path: Path, first: Path, settings: DataSettings, problems: list[str]) -> list[Recording]:
    try:
        if first != path and not settings.words_files:
            raise MoshiTTTError(f"{path}: {first.name} has the same name, so that both would have the same words; rename one of them.")
        return [recording(path, in_worker(audio_duration, path), settings.words, settings.words_files)]
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return []


def left_out(text: str, store: Path) -> list[str]:
    """What lies in the folders of sources and is neither sound, words, manifest nor archive: for each kind of name a sentence."""
    found: list[str] = []
    for folder in (Path(resolve("data", name)) for name, _ in parse_sources(text) if not name.startswith(HUB)):
        if folder.is_dir() and not is_index(folder):
            kinds = Counter(path.suffix or path.name for path in _files(folder, store) if not _is_known(path))
            found += [f"{folder}: {count} × {kind} are no sounds that can be read" for kind, count in sorted(kinds.items())]
    return found


def _is_known(path: Path) -> bool:
    known = (*SOUND_SUFFIXES, *ARCHIVE_SUFFIXES, ".jsonl", *(suffix.lower() for suffix in WORD_SUFFIXES))
    return path.is_dir() or path.suffix.lower() in known


def _files(folder: Path, store: Path) -> list[Path]:
    """What lies below a folder, without hidden files, and without the store where someone keeps that in the folder."""
    own = store.absolute()
    inside_store = folder.absolute().is_relative_to(own)
    paths = (path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(path for path in paths if inside_store or not path.absolute().is_relative_to(own))

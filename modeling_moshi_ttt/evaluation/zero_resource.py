"""Spoken zero-shot tasks: read the official folders, pair by keys, turn scores into accuracies with intervals.

sWUGGY and sBLIMP (ZeroSpeech 2021, arXiv:2011.11588), spoken StoryCloze (TWIST, arXiv:2305.13009), SALMon (arXiv:2409.07437).
A pair counts 1 when its positive scores higher, 0.5 on a tie, 0 else; voices are averaged inside an item, then items.
Nothing here knows of a model: scores come in as a mapping from file to number.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import field
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ..common.files import atomic_write
from ..common.results import checked
from ..errors_moshi_ttt import MoshiTTTError
from .statistics import bootstrap_interval

CHANCE = 0.5
AUDIO_SUFFIXES = (".wav", ".flac")
SalmonPart = Literal[
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
]
SALMON_PARTS: tuple[str, ...] = get_args(SalmonPart)
FREQUENCY_BANDS = {"oov": 1.0, "1-4": 5.0, "5-19": 20.0, "20-99": 100.0, "100+": math.inf}  # sWUGGY's, each with its upper edge
# accuracies in percent as published (Moshi's report arXiv:2410.00037, TWIST's and SpiRit-LM's papers); the last row was measured by us
PUBLISHED: dict[str, dict[str, float]] = {
    "Moshi, text and audio": {"swuggy": 72.6, "sblimp": 58.8, "tstorycloze": 83.0, "sstorycloze": 60.8},
    "Moshi, audio only": {"swuggy": 74.3, "sblimp": 58.9, "tstorycloze": 81.8, "sstorycloze": 58.7},
    "TWIST-7B": {"swuggy": 73.5, "sblimp": 59.0, "tstorycloze": 74.1, "sstorycloze": 55.3},
    "SpiRit-LM": {"swuggy": 69.0, "sblimp": 58.3, "tstorycloze": 82.9, "sstorycloze": 61.0},
    "Moshiko, frozen (regression target)": {"swuggy": 63.35, "sblimp": 54.5, "tstorycloze": 80.06, "sstorycloze": 60.93},
}


@dataclass(frozen=True)
class Pair:
    """One comparison: `positive` should score higher than `negative`. Pairs of one `item` differ in voice only."""

    item: tuple[str, ...]
    voice: str
    positive: Path
    negative: Path
    group: str = ""


def pair_files(pairs: Iterable[Pair]) -> list[Path]:
    """Every file of the pairs once, in a stable order."""
    return sorted({path for pair in pairs for path in (pair.positive, pair.negative)})


# ---------------------------------------------------------------- readers


def read_swuggy(folder: str | Path, split: str = "dev") -> list[Pair]:
    """sWUGGY: `<folder>/lexical/<split>` (or the split folder itself) with gold.csv; a pair is (id, voice), the group a frequency band.

    Raises:
        MoshiTTTError: as every reader here, naming the file and the row, where a folder is not as its authors published it.
    """
    root = _split_folder(Path(folder), "lexical", split)
    pairs = _of_gold(root, _Word, ("id", "voice"))
    return [Pair(key[:1], key[1], word.audio, nonword.audio, frequency_band(word.frequency)) for key, (word, nonword) in pairs]


def read_sblimp(folder: str | Path, split: str = "dev") -> list[Pair]:
    """sBLIMP: `<folder>/syntactic/<split>` with gold.csv; a pair is (type, subtype, id, voice), the group its type."""
    root = _split_folder(Path(folder), "syntactic", split)
    pairs = _of_gold(root, _Sentence, ("type", "subtype", "id", "voice"))
    return [Pair(key[:3], key[3], good.audio, bad.audio, key[0]) for key, (good, bad) in pairs]


def read_storycloze(folder: str | Path) -> list[Pair]:
    """Spoken StoryCloze (both the spoken and the topic version): a flat folder of `{n}_{uuid}_{correct|incorrect}.wav`, paired by uuid."""
    root = _existing_folder(Path(folder))
    named = _named(root, r"\d+_(?P<key>.+)_(?P<side>correct|incorrect)", "<number>_<uuid>_correct or <number>_<uuid>_incorrect")
    return [Pair((uuid,), "", right, wrong) for uuid, (right, wrong) in _paired(root, named, {"correct", "incorrect"})]


def read_salmon(folder: str | Path, parts: Sequence[str] = SALMON_PARTS) -> list[Pair]:
    """SALMon: `<folder>/<part>/sample_{index}_{i}.wav`, the lower i positive; the group is the part."""
    pairs = []
    for part in parts:
        root = _existing_folder(Path(folder) / part)
        named = [
            (int(key), int(side), path) for key, side, path in _named(root, r"sample_(?P<key>\d+)_(?P<side>\d+)", "sample_<index>_<i>")
        ]
        pairs += [Pair((part, str(index)), "", *both, part) for index, both in _paired(root, named)]
    return pairs


def frequency_band(count: float | None) -> str:
    """The band of a word's count in LibriSpeech, edges [0, 1, 5, 20, 100, inf); no count has none."""
    return "" if count is None else next(name for name, edge in FREQUENCY_BANDS.items() if count < edge or edge == math.inf)


# ---------------------------------------------------------------- accuracies


def pair_score(positive: float, negative: float) -> float:
    """1 when the positive scores higher, 0.5 on a tie, 0 else."""
    return 0.5 if positive == negative else float(positive > negative)


def accuracy(pairs: Sequence[Pair], scores: Mapping[Path, float], seed: int = 0) -> dict[str, Any]:
    """Accuracy over items with a bootstrap interval, the same by group, and of each item.

    Args:
        scores: of every file; one that is not finite is an error of the run, and never decides a pair.

    Raises:
        MoshiTTTError: a score that is not finite, by its file.
    """
    outcomes: dict[tuple[str, ...], list[float]] = defaultdict(list)
    groups: dict[str, dict[tuple[str, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        outcome = pair_score(_finite(scores, pair.positive), _finite(scores, pair.negative))
        outcomes[pair.item].append(outcome)
        if pair.group:
            groups[pair.group][pair.item].append(outcome)
    result = _summary(outcomes, seed) | {"pairs": len(pairs), "chance": CHANCE}
    result["each"] = {" ".join(item): math.fsum(voices) / len(voices) for item, voices in sorted(outcomes.items())}
    result["groups"] = {name: _summary(items, seed) for name, items in sorted(groups.items())}
    return result


def _summary(items: Mapping[tuple[str, ...], list[float]], seed: int) -> dict[str, Any]:
    means = [math.fsum(voices) / len(voices) for _, voices in sorted(items.items())]
    return {"accuracy": math.fsum(means) / len(means), "interval": list(bootstrap_interval(means, seed)), "items": len(means)}


def _finite(scores: Mapping[Path, float], path: Path) -> float:
    value = float(scores[path])
    if not math.isfinite(value):
        raise MoshiTTTError(f"{path}: `score={value}` must be finite; look for what broke the model's numbers.")
    return value


def comparison_table(
    accuracies: Mapping[str, float], name: str = "this model", published: Mapping[str, Mapping[str, float]] = PUBLISHED
) -> list[dict[str, Any]]:
    """Rows {name, task: percent or None} for the tasks given: this model, the published rows, and chance."""
    tasks = list(accuracies)
    rows: list[dict[str, Any]] = [{"name": name} | {task: 100.0 * accuracies[task] for task in tasks}]
    for other, values in published.items():
        if any(task in values for task in tasks):
            rows.append({"name": other} | {task: values.get(task) for task in tasks})
    return rows + [{"name": "chance"} | {task: 100.0 * CHANCE for task in tasks}]


def write_submission(path: str | Path, scores: Mapping[Path, float]) -> Path:
    """ZeroSpeech's file for one split: a line `filename score` for each audio file, names without folder and suffix."""
    lines = sorted(f"{audio.stem} {_finite(scores, audio)!r}" for audio in scores)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, "\n".join(lines) + "\n")
    return target


# ---------------------------------------------------------------- folders and keys


def _existing_folder(root: Path) -> Path:
    if not root.is_dir():
        raise MoshiTTTError(f"`folder={root}`: no such folder; give the unpacked benchmark.")
    return root


def _split_folder(folder: Path, task: str, split: str) -> Path:
    _existing_folder(folder)
    for candidate in (folder / task / split, folder / split, folder):
        if (candidate / "gold.csv").is_file():
            return candidate
    raise MoshiTTTError(
        f"{folder}: found no gold.csv in {task}/{split}, {split} or the folder itself; give the unpacked benchmark, and a split that has one "
        "(dev; test has none until it is published)."
    )


def _count(text: Any) -> Any:
    return None if isinstance(text, str) and text.strip().lower() in ("", "nan") else text


@dataclass
class _Row:
    """Of gold.csv, plain strings: the words 'nan' and 'null' are words. audio: where the file is, which official rows name without suffix."""

    id: str
    filename: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    voice: str
    correct: Literal["0", "1"]
    audio: Path = Path()


@dataclass
class _Word(_Row):
    frequency: Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_count)] = field(kw_only=True)


@dataclass
class _Sentence(_Row):
    type: str = field(kw_only=True)
    subtype: str = field(kw_only=True)


def _of_gold(root: Path, row: type[Any], key: Sequence[str]) -> list[tuple[tuple[str, ...], tuple[Any, Any]]]:
    """The rows of gold.csv by a key, each (right, wrong), with the audio that they name."""
    path = root / "gold.csv"
    with path.open(newline="", encoding="utf-8-sig") as file:
        found = checked(
            Annotated[list[row], Field(min_length=1)],  # type: ignore[valid-type]
            list(csv.DictReader(file, restkey="more")),
            path,
            "rows.",
            "restore the official file",
        )
    for one in found:
        suffixes = ("",) if one.filename.endswith(AUDIO_SUFFIXES) else reversed(AUDIO_SUFFIXES)
        one.audio = next(filter(Path.is_file, (root / f"{one.filename}{suffix}" for suffix in suffixes)), root / one.filename)
    missing = [one.filename for one in found if not one.audio.is_file()]
    if missing:
        raise MoshiTTTError(
            f"{path}: `filename={missing[0]}` and {len(missing) - 1} more must be audio files beside it; unpack the benchmark again."
        )
    return _paired(path, [(tuple(getattr(one, name) for name in key), -int(one.correct), one) for one in found], {-1, 0})


def _named(root: Path, pattern: str, form: str) -> list[tuple[str, str, Path]]:
    """(key, side, path) of every audio file of a folder."""
    found = []
    for path in sorted(path for path in root.iterdir() if path.suffix in AUDIO_SUFFIXES):
        match = re.fullmatch(pattern, path.stem)
        if match is None:
            raise MoshiTTTError(f"{path}: the name must be {form}; restore the folder, or take the file out.")
        found.append((match["key"], match["side"], path))
    return found


def _paired(where: Path, found: Sequence[tuple[Any, Any, Any]], sides: Set[Any] | None = None) -> list[tuple[Any, tuple[Any, Any]]]:
    """(key, (first, second)) of all that was found as (key, side, value), in the order of keys and sides."""
    by_key: dict[Any, list[tuple[Any, Any]]] = defaultdict(list)
    for key, side, value in found:
        by_key[key].append((side, value))
    wrong = [
        key for key, both in by_key.items() if len(both) != 2 or len(there := {side for side, _ in both}) != 2 or there != (sides or there)
    ]
    if wrong or not found:
        what = f"of `{wrong[0]}` there are {len(by_key[wrong[0]])}" if wrong else "there are none"
        raise MoshiTTTError(f"{where}: must hold pairs, two different sides of each key; {what}. Unpack the benchmark again.")
    return [(key, tuple(value for _, value in sorted(both, key=itemgetter(0)))) for key, both in sorted(by_key.items())]  # type: ignore[misc]

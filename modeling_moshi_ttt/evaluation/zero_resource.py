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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import atomic_write
from ..errors_moshi_ttt import MoshiTTTError
from .statistics import bootstrap_interval

CHANCE = 0.5
AUDIO_SUFFIXES = (".wav", ".flac")
SALMON_PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)
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
    """sWUGGY: `<folder>/lexical/<split>` (or the split folder itself) with gold.csv; a pair is (id, voice), the group a frequency band."""
    root = _split_folder(Path(folder), "lexical", split)
    rows = _read_gold(root, ("id", "filename", "voice", "frequency", "correct"))
    pairs = []
    for (item, voice), (word, nonword) in _by_key(root, rows, ("id", "voice")).items():
        band = frequency_band(word["frequency"], f"{root / 'gold.csv'}, file {word['filename']}")
        pairs.append(Pair((item,), voice, _audio(root, word["filename"]), _audio(root, nonword["filename"]), band))
    return _with_files(root, pairs)


def read_sblimp(folder: str | Path, split: str = "dev") -> list[Pair]:
    """sBLIMP: `<folder>/syntactic/<split>` with gold.csv; a pair is (type, subtype, id, voice), the group its type."""
    root = _split_folder(Path(folder), "syntactic", split)
    rows = _read_gold(root, ("id", "filename", "voice", "type", "subtype", "correct"))
    pairs = []
    for key, (good, bad) in _by_key(root, rows, ("type", "subtype", "id", "voice")).items():
        pairs.append(Pair(key[:3], key[3], _audio(root, good["filename"]), _audio(root, bad["filename"]), key[0]))
    return _with_files(root, pairs)


def read_storycloze(folder: str | Path) -> list[Pair]:
    """Spoken StoryCloze (both the spoken and the topic version): a flat folder of `{n}_{uuid}_{correct|incorrect}.wav`, paired by uuid."""
    root = _existing_folder(Path(folder))
    sides: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in _audio_files(root):
        match = re.fullmatch(r"(\d+)_(.+)_(correct|incorrect)", path.stem)
        if match is None:
            raise MoshiTTTError(f"{path}: the name must be <number>_<uuid>_correct or <number>_<uuid>_incorrect")
        _once(sides[match[2]], match[3], path)
    return [
        Pair((uuid,), "", found["correct"], found["incorrect"])
        for uuid, found in sorted(sides.items())
        if _complete(root, uuid, found, ("correct", "incorrect"))
    ]


def read_salmon(folder: str | Path, parts: Sequence[str] = SALMON_PARTS) -> list[Pair]:
    """SALMon: `<folder>/<part>/sample_{index}_{i}.wav`, the lower i positive; the group is the part."""
    root = _existing_folder(Path(folder))
    pairs: list[Pair] = []
    for part in parts:
        if part not in SALMON_PARTS:
            raise MoshiTTTError(f"parts: {part!r} is no part of SALMon; choose from {', '.join(SALMON_PARTS)}")
        pairs += _salmon_part(_existing_folder(root / part), part)
    return pairs


def _salmon_part(root: Path, part: str) -> list[Pair]:
    sides: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in _audio_files(root):
        match = re.fullmatch(r"sample_(\d+)_(\d+)", path.stem)
        if match is None:
            raise MoshiTTTError(f"{path}: the name must be sample_<index>_<i>")
        _once(sides[int(match[1])], int(match[2]), path)
    pairs = []
    for index, found in sorted(sides.items()):
        if len(found) != 2:
            raise MoshiTTTError(f"{root}: sample {index} has {len(found)} files, and a pair is 2; restore the folder or remove the sample")
        positive, negative = (found[i] for i in sorted(found))
        pairs.append(Pair((part, str(index)), "", positive, negative, part))
    return pairs


def frequency_band(frequency: str, where: str) -> str:
    """The band of a word's count in LibriSpeech, edges [0, 1, 5, 20, 100, inf); an empty count has no band."""
    text = frequency.strip()
    if text == "" or text.lower() == "nan":
        return ""
    try:
        count = float(text)
    except ValueError:
        raise MoshiTTTError(f"{where}: frequency {frequency!r} is no number") from None
    if not count >= 0:
        raise MoshiTTTError(f"{where}: frequency {frequency!r} is negative")
    return next((name for name, edge in FREQUENCY_BANDS.items() if count < edge), "100+")


# ---------------------------------------------------------------- accuracies


def pair_score(positive: float, negative: float) -> float:
    """1 when the positive scores higher, 0.5 on a tie, 0 else."""
    return 0.5 if positive == negative else float(positive > negative)


def accuracy(pairs: Sequence[Pair], scores: Mapping[Path, float], seed: int = 0) -> dict[str, Any]:
    """Accuracy over items with a bootstrap interval, the same by group, and of each item.

    A file without a score, or with one that is not finite, is an error of the run: it never decides a pair.
    """
    if not pairs:
        raise MoshiTTTError("accuracy: no pairs; check the folder and the split")
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
    if path not in scores:
        raise MoshiTTTError(f"{path}: has no score; score every file of the task before asking for accuracies")
    value = float(scores[path])
    if not math.isfinite(value):
        raise MoshiTTTError(f"{path}: its score is {value}; a score must be finite, so the run has an error to find")
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
    names = [line.split(" ")[0] for line in lines]
    if len(set(names)) != len(names):
        raise MoshiTTTError(f"{path}: two audio files share a name; a submission holds one split of one task")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, "\n".join(lines) + "\n")
    return target


# ---------------------------------------------------------------- folders and keys


def _existing_folder(root: Path) -> Path:
    if not root.is_dir():
        raise MoshiTTTError(f"{root}: no such folder; give the unpacked benchmark")
    return root


def _split_folder(folder: Path, task: str, split: str) -> Path:
    _existing_folder(folder)
    for candidate in (folder / task / split, folder / split, folder):
        if (candidate / "gold.csv").is_file():
            return candidate
    raise MoshiTTTError(
        f"{folder}: found no gold.csv in {task}/{split}, {split} or the folder itself; give the unpacked benchmark, and a split that has one "
        "(dev; test has none until it is published)"
    )


def _read_gold(root: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows as plain strings: the words 'nan' and 'null' are words."""
    path = root / "gold.csv"
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise MoshiTTTError(
                f"{path}: lacks the column(s) {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}; restore the official file"
            )
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        empty = [name for name in columns if row[name] is None]
        if empty:
            raise MoshiTTTError(f"{path}, line {number}: the value of {empty[0]} is missing")
        if row["correct"] not in ("0", "1"):
            raise MoshiTTTError(f"{path}, line {number}: correct is {row['correct']!r}, and must be 0 or 1")
    if not rows:
        raise MoshiTTTError(f"{path}: holds no rows")
    return rows


def _by_key(
    root: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]
) -> dict[tuple[str, ...], tuple[dict[str, str], dict[str, str]]]:
    """key -> (correct row, incorrect row); a second row for a side, or a missing side, is an error that names the key."""
    sides: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        found = sides[tuple(row[name] for name in columns)]
        if row["correct"] in found:
            key = ", ".join(f"{name} {row[name]}" for name in columns)
            raise MoshiTTTError(
                f"{root / 'gold.csv'}: two rows with correct = {row['correct']} for {key}: "
                f"{found[row['correct']]['filename']}, {row['filename']}"
            )
        found[row["correct"]] = row
    for values, both in sides.items():
        _complete(root / "gold.csv", ", ".join(f"{n} {v}" for n, v in zip(columns, values)), both, ("1", "0"))
    return {key: (found["1"], found["0"]) for key, found in sorted(sides.items())}


def _once(found: dict[Any, Path], side: str | int, path: Path) -> None:
    if side in found:
        raise MoshiTTTError(f"{path}: {found[side].name} has the same key; a pair holds each side once")
    found[side] = path


def _complete(where: Path, key: str, found: Mapping[str, Any], sides: Sequence[str]) -> bool:
    missing = [side for side in sides if side not in found]
    if missing:
        raise MoshiTTTError(f"{where}: the pair {key} lacks its {missing[0]!r} side; restore it, or remove the other side")
    return True


def _audio(root: Path, filename: str) -> Path:
    """The audio of a gold row: official files leave out the suffix."""
    if Path(filename).name != filename:
        raise MoshiTTTError(f"{root / 'gold.csv'}: filename {filename!r} must not contain a folder")
    if filename.endswith(AUDIO_SUFFIXES):
        return root / filename
    flac = root / f"{filename}.flac"
    return flac if flac.is_file() else root / f"{filename}.wav"


def _audio_files(root: Path) -> list[Path]:
    files = sorted(path for path in root.iterdir() if path.suffix in AUDIO_SUFFIXES)
    if not files:
        raise MoshiTTTError(f"{root}: holds no wav or flac files")
    return files


def _with_files(root: Path, pairs: list[Pair]) -> list[Pair]:
    missing = [path for path in pair_files(pairs) if not path.is_file()]
    if missing:
        names = ", ".join(path.name for path in missing[:5])
        raise MoshiTTTError(f"{root}: {len(missing)} audio file(s) named in gold.csv are missing: {names}; unpack the benchmark again")
    return pairs

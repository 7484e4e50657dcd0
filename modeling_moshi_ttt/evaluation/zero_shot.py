"""Runs a model over the zero-shot tasks: score every file once, resumable, then accuracies, the table's data and submission files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import atomic_write
from ..data.audio import read_audio
from ..errors_moshi_ttt import MoshiTTTError
from .contents import content
from .kept import kept_shape, read_kept
from .scoring import UNWEIGHTED, ScoreWeights, SpeechScorer, StreamSums
from .zero_resource import (
    PUBLISHED,
    SALMON_PARTS,
    Pair,
    accuracy,
    pair_files,
    read_salmon,
    read_sblimp,
    read_storycloze,
    read_swuggy,
    write_submission,
)

SUBMISSION_FOLDERS = {"swuggy": "lexical", "sblimp": "syntactic"}
SAVE_EVERY = 20  # batches between two saves of the scores


def read_task(task: str, folder: Path, split: str = "dev", parts: Sequence[str] | None = None) -> list[Pair]:
    """The pairs of a task by its name."""
    if task == "swuggy":
        return read_swuggy(folder, split)
    if task == "sblimp":
        return read_sblimp(folder, split)
    if task in ("sstorycloze", "tstorycloze"):
        return read_storycloze(folder)
    if task == "salmon":
        return read_salmon(folder, parts or SALMON_PARTS)
    raise MoshiTTTError(f"task {task!r} is unknown; choose from swuggy, sblimp, sstorycloze, tstorycloze, salmon")


def score_files(
    scorer: SpeechScorer,
    pairs: Sequence[Pair],
    cache: Path,
    header: dict[str, Any],
    batch_size: int,
    progress: Callable[[Sequence[list[Path]]], Iterable[list[Path]]] = lambda batches: batches,
) -> dict[Path, StreamSums]:
    """Per-stream sums of every file of the pairs; `cache` keeps them between runs with the same `header` (model, streams)."""
    files = pair_files(pairs)
    contents = {path: content(path) for path in files}
    found = _read_cache(cache, header, contents)
    # files of like size together, so that little is padded
    left = sorted((path for path in files if path not in found), key=lambda path: path.stat().st_size)
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    for number, batch in enumerate(progress(batches), start=1):
        found |= dict(zip(batch, scorer.score_waves([read_mono(path) for path in batch]), strict=True))
        if number % SAVE_EVERY == 0 or number == len(batches):
            _write_cache(cache, header, found, contents)
    return found


def read_mono(path: Path) -> np.ndarray:
    """A recording at 24 kHz; of several channels their mean."""
    return read_audio(path, 24000).mean(0)


def _read_cache(cache: Path, header: dict[str, Any], contents: Mapping[Path, str]) -> dict[Path, StreamSums]:
    """The kept scores of the files whose content is still the one that was scored; an entry that names none is of no use."""
    if not cache.is_file():
        return {}
    data = read_kept(cache)
    found = {}
    with kept_shape(cache):
        scored_with = data["header"]
        for path, wanted in contents.items():
            sums, tokens, *scored = data["scores"].get(str(path), ((), ()))
            if scored == [wanted]:
                found[path] = StreamSums(tuple(sums), tuple(tokens))
    if scored_with != header:
        raise MoshiTTTError(f"{cache}: holds scores of another model or of other streams; choose another output folder, or remove the file")
    return found


def _write_cache(cache: Path, header: dict[str, Any], found: dict[Path, StreamSums], contents: Mapping[Path, str]) -> None:
    scores = {str(path): [sums.sums, sums.tokens, contents[path]] for path, sums in found.items()}
    atomic_write(cache, json.dumps({"header": header, "scores": scores}, allow_nan=False))


def result(pairs: Sequence[Pair], sums: dict[Path, StreamSums], weights: ScoreWeights, reduction: str, seed: int) -> dict[str, Any]:
    """Accuracy as asked for, and beside it by the other reduction and without weights, for they differ much."""
    main = accuracy(pairs, {path: found.score(weights, reduction == "mean") for path, found in sums.items()}, seed)
    variants = {}
    for label, chosen in (("weighted", weights), ("unweighted", UNWEIGHTED)):
        for mean in (True, False):
            scores = {path: found.score(chosen, mean) for path, found in sums.items()}
            variants[f"{label} {'mean' if mean else 'sum'}"] = accuracy(pairs, scores, seed)["accuracy"]
    return main | {"variants": variants}


def section(tasks: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The zero-shot part of results.json."""
    names = ("user", "text", "semantic_weight", "acoustic_weight", "reduction")
    published = PUBLISHED if settings.published else {}
    return {"kind": "zero_shot", "tasks": tasks, "published": published, "scoring": {name: getattr(settings, name) for name in names}}


def submission(folder: Path, task: str, split: str, sums: dict[Path, StreamSums], weights: ScoreWeights, reduction: str) -> Path | None:
    """ZeroSpeech's file of a task, `lexical/<split>.txt` or `syntactic/<split>.txt`; None for a task that it does not have."""
    if task not in SUBMISSION_FOLDERS:
        return None
    scores = {path: found.score(weights, reduction == "mean") for path, found in sums.items()}
    return write_submission(folder / SUBMISSION_FOLDERS[task] / f"{split}.txt", scores)

"""Runs a model over the zero-shot tasks: score every file once, resumable, then accuracies, the table's data and submission files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from ..common.files import atomic_write, of_shape, read_json
from ..common.results import MORE, Part
from ..common.settings import DISTINCT, Flag, NotNegative, check_entries, settings_group
from ..data.audio import READING, read_audio
from ..errors_moshi_ttt import MoshiTTTError
from .drawing import GREY, MARKS, PALETTE, SKY, new_figure
from .formatting import interval, percent
from .kept_numbers import CURE, content
from .scoring import UNWEIGHTED, ScoreWeights, SpeechScorer, StreamSums
from .task import Context, Measure, Table, Task
from .zero_resource import (
    CHANCE,
    FREQUENCY_BANDS,
    PUBLISHED,
    SALMON_PARTS,
    Pair,
    SalmonPart,
    accuracy,
    comparison_table,
    pair_files,
    read_salmon,
    read_sblimp,
    read_storycloze,
    read_swuggy,
    write_submission,
)

SPLITS = ("swuggy", "sblimp")  # the tasks that have some
SUBMISSION_FOLDERS = {"swuggy": "lexical", "sblimp": "syntactic"}
SAVE_EVERY = 20  # batches between two saves of the scores


@settings_group
class ZeroShotTask:
    """One benchmark."""

    task: Literal["swuggy", "sblimp", "sstorycloze", "tstorycloze", "salmon"]
    """Name of the benchmark."""
    folder: Path
    """The unpacked download."""
    split: str = "dev"
    """Split of sWUGGY and sBLIMP."""
    parts: Annotated[list[SalmonPart], DISTINCT] | None = None
    """Parts of SALMon; null: all eight."""

    def __post_init__(self) -> None:
        for name, those, default in (("split", SPLITS, "dev"), ("parts", ("salmon",), None)):
            if self.task not in those and (value := getattr(self, name)) != default:
                raise MoshiTTTError(f"`{name}={value}` must be left out of `task={self.task}`; only {' and '.join(those)} have it.")


@settings_group
class ZeroShotSettings:
    """How recordings are scored (the recording is Moshi's voice) and on which tasks."""

    tasks: list[ZeroShotTask]
    """The benchmarks."""
    user: Literal["absent", "silence"] = "absent"
    """The other side of the conversation: absent, or silence (encoded)."""
    text: Literal["absent", "padding"] = "absent"
    """The text stream, which is never scored: absent, or padding in every frame."""
    semantic_weight: NotNegative = 100.0
    """Weight of a token of the first codebook in a recording's score."""
    acoustic_weight: NotNegative = 1.0
    """Weight of a token of the other codebooks."""
    reduction: Literal["mean", "sum"] = "mean"
    """Log-likelihood per token, or its sum; the other one is reported beside it."""
    submission: Flag = False
    """Also write ZeroSpeech's submission files."""
    published: Flag = True
    """Set the published rows beside this model's; false for sets of your own in these layouts."""

    def __post_init__(self) -> None:
        check_entries("tasks", [task.task for task in self.tasks])
        if self.semantic_weight == self.acoustic_weight == 0:
            raise MoshiTTTError(
                "`semantic_weight=0` must not stand with `acoustic_weight=0`: nothing would be scored; give one of them a weight."
            )


def read_task(task: str, folder: Path, split: str = "dev", parts: Sequence[str] | None = None) -> list[Pair]:
    """The pairs of a task by its name."""
    if task == "swuggy":
        return read_swuggy(folder, split)
    if task == "sblimp":
        return read_sblimp(folder, split)
    if task in ("sstorycloze", "tstorycloze"):
        return read_storycloze(folder)
    return read_salmon(folder, parts or SALMON_PARTS)


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
    try:
        data = read_json(cache)
    except ValueError as error:
        raise MoshiTTTError(f"{error}; {CURE}.") from None
    found = {}
    with of_shape(str(cache), CURE):
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


def submission(folder: Path, task: str, split: str, sums: dict[Path, StreamSums], weights: ScoreWeights, reduction: str) -> Path | None:
    """ZeroSpeech's file of a task, `lexical/<split>.txt` or `syntactic/<split>.txt`; None for a task that it does not have."""
    if task not in SUBMISSION_FOLDERS:
        return None
    scores = {path: found.score(weights, reduction == "mean") for path, found in sums.items()}
    return write_submission(folder / SUBMISSION_FOLDERS[task] / f"{split}.txt", scores)


def encode_waves(processor: Any, waves: list[np.ndarray]) -> list[torch.Tensor]:
    """Codes [K, T] of mono waves [N] at the codec's rate, in one batch: the codec is causal, so silence after a wave changes nothing."""
    longest = max(len(wave) for wave in waves)
    batch = torch.from_numpy(np.stack([np.pad(wave, (0, longest - len(wave))) for wave in waves]))
    codes = processor.encode_audio(batch)
    return [row[:, : -(-len(wave) // processor.frame_size)] for row, wave in zip(codes, waves)]


# ---------------------------------------------------------------- the evaluation


class Accuracy(TypedDict):
    """Of one benchmark: share of items right, its interval, the same by group, with other weights and reductions, and of each item."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    accuracy: float
    interval: list[float]
    items: int
    groups: dict[str, dict[str, Any]]
    variants: dict[str, float]
    each: NotRequired[dict[str, float]]


class ZeroShotPart(Part):
    """tasks: benchmark -> accuracy. published: rows of others. scoring: how recordings were scored."""

    tasks: dict[str, Accuracy]
    published: dict[str, dict[str, float]]
    scoring: dict[str, Any]


class ZeroShot(Task):
    name, settings, shape = "zero_shot", ZeroShotSettings, ZeroShotPart
    question = "Does it tell right from wrong speech?"
    reading = "Pairs of recordings: it should find the right one likelier than the wrong one."

    def inputs(self, section: ZeroShotSettings) -> Iterable[str]:
        found = [(one.task, read_task(one.task, one.folder, one.split, one.parts)) for one in section.tasks]
        return (
            repr((name, pair.item, pair.voice, pair.group, content(pair.positive), content(pair.negative)))
            for name, pairs in found
            for pair in pairs
        )

    def run(self, subject: Any, section: ZeroShotSettings, context: Context) -> dict[str, Any]:
        model, processor = subject.load()
        weights = ScoreWeights(section.semantic_weight, section.acoustic_weight)
        text: str | int = model.config.text_padding_ids[0] if section.text == "padding" else "absent"
        scorer = SpeechScorer(model, lambda waves: encode_waves(processor, waves), weights, section.user, text, context.batch_size)
        header = {"fingerprint": subject.digest, "user": section.user, "text": section.text, "reading": READING}
        found = {}
        for one in section.tasks:
            pairs = read_task(one.task, one.folder, one.split, one.parts)
            cache = context.output / "scores" / f"{one.task}-{one.split}.json"
            sums = score_files(scorer, pairs, cache, header, context.batch_size, context.bar(one.task))
            found[one.task] = result(pairs, sums, weights, section.reduction, context.seed)
            if section.submission:
                submission(context.output / "submission", one.task, one.split, sums, weights, section.reduction)
        names = ("user", "text", "semantic_weight", "acoustic_weight", "reduction")
        scoring = {name: getattr(section, name) for name in names}
        return {"kind": self.name, "tasks": found, "published": PUBLISHED if section.published else {}, "scoring": scoring}

    def figure(self, part: ZeroShotPart) -> Figure:
        """Accuracy bars with intervals, the published rows as marks, chance as a line."""
        tasks = part["tasks"]
        figure = new_figure(1.6 + 1.3 * max(len(tasks), 2), 3.2)
        axes = figure.subplots()
        values = np.array([100.0 * task["accuracy"] for task in tasks.values()])
        spread = np.array([[100.0 * bound for bound in task["interval"]] for task in tasks.values()]).T  # [2, tasks]
        axes.bar(range(len(tasks)), values, 0.6, color=SKY, label="this model", zorder=1)
        axes.errorbar(range(len(tasks)), values, np.abs(spread - values), fmt="none", color="black", linewidth=1, capsize=3)
        for index, (name, row) in enumerate(part["published"].items()):
            points = [(i, row[task]) for i, task in enumerate(tasks) if row.get(task) is not None]
            if points:
                at, height = zip(*points)
                color = PALETTE[:5][index % 5]  # the bars are SKY
                axes.scatter(at, height, marker=MARKS[index % 7], s=22, color=color, label=name, zorder=3)
        axes.axhline(100 * CHANCE, color=GREY, linestyle="--", linewidth=1, label="chance")
        axes.set_xticks(range(len(tasks)), [f"{name}\n{task['items']:,} items" for name, task in tasks.items()], fontsize=8)
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 100)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure

    def table(self, part: ZeroShotPart) -> Table:
        """This model beside the published rows, by other weights and reductions, and by group; in the note how it was scored."""
        tasks, scored = part["tasks"], part["scoring"]
        table = comparison_table({name: task["accuracy"] for name, task in tasks.items()}, published=part["published"])
        rows = [[row["name"], *["–" if row[name] is None else f"{row[name]:.1f}" for name in tasks]] for row in table]
        rows.insert(1, ["95% interval", *[interval(task["interval"], 100, 1) for task in tasks.values()]])
        for variant in next(iter(tasks.values()))["variants"]:
            if variant != f"weighted {scored['reduction']}":  # the first row
                rows.append([f"this model, {variant}", *[percent(task["variants"][variant]) for task in tasks.values()]])
        for name, task in tasks.items():
            for group, one in sorted(task["groups"].items(), key=lambda item: (FREQUENCY_BANDS.get(item[0], 0), item[0])):
                cells = [percent(one["accuracy"]) if other == name else "" for other in tasks]
                rows.append([f"{name}: {group} ({one['items']} items)", *cells])
        note = f"Accuracy in percent; {scored['reduction']} of the weighted log-likelihood; " + ", ".join(
            f"{key} {scored[key]}" for key in ("text", "user", "semantic_weight", "acoustic_weight")
        )
        return Table(["", *tasks], rows, note)

    def finding(self, part: ZeroShotPart) -> str:
        above = [name for name, task in part["tasks"].items() if task["interval"][0] > CHANCE]
        scores = ", ".join(f"{name} {percent(task['accuracy'])}%" for name, task in part["tasks"].items())
        return f"It is above chance in {len(above)} of {len(part['tasks'])} benchmarks ({scores})."

    def measures(self, part: ZeroShotPart) -> list[Measure]:
        return [
            Measure(
                "accuracy", name, None, 100 * task["accuracy"], "%", {item: 100 * right for item, right in task.get("each", {}).items()}
            )
            for name, task in part["tasks"].items()
        ]


TASK = ZeroShot()

"""Score a model on spoken benchmarks and long recordings. Takes settings files (paths, or bare names of packaged ones) and key=value pairs
that override them; resumes where it stopped; writes results.json, pictures and a report.html that stands alone into the output folder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..common.settings import ABOVE_ZERO, SEEDS, check_entries, check_numbers, describe, load_settings
from ..data.facts import KINDS, ScriptSettings
from ..errors_moshi_ttt import MoshiTTTError
from .recall import RecallSettings

SECTIONS = ("zero_shot", "long_context", "inner_loss", "dialogue", "spoken_recall", "recall")
SPOKEN_CONDITIONS = ("TTT", "frozen at W0", "gate 0")  # of spoken_recall
MODES = ("free", "led")  # in which it hears dialogues
SPLITS = ("swuggy", "sblimp")  # the tasks that have some


@dataclass
class ZeroShotTask:
    """One benchmark.

    task: its name.
    folder: the unpacked download.
    split: of sWUGGY and sBLIMP.
    parts: of SALMon; null: all eight.
    """

    task: Literal["swuggy", "sblimp", "sstorycloze", "tstorycloze", "salmon"]
    folder: Path
    split: str = "dev"
    parts: list[str] | None = None

    def __post_init__(self) -> None:
        if self.task not in SPLITS and self.split != "dev":
            raise MoshiTTTError(f"split is {self.split!r}, but {self.task} has none (only {' and '.join(SPLITS)} have); leave it out.")
        if self.parts is not None:
            if self.task != "salmon":
                raise MoshiTTTError(f"parts is {self.parts!r}, but {self.task} has none (only salmon has); leave it out.")
            check_entries("parts", self.parts)


@dataclass
class ZeroShotSettings:
    """How recordings are scored (the recording is Moshi's voice) and on which tasks.

    tasks: the benchmarks.
    user: the other side of the conversation: absent, or silence (encoded).
    text: the text stream, which is never scored: absent, or padding in every frame.
    semantic_weight, acoustic_weight: of a token of the first codebook, and of the others, in a recording's score.
    reduction: log-likelihood per token, or its sum; the other one is reported beside it.
    submission: also write ZeroSpeech's submission files.
    published: set the published rows beside this model's; false for sets of your own in these layouts.
    """

    tasks: list[ZeroShotTask]
    user: Literal["absent", "silence"] = "absent"
    text: Literal["absent", "padding"] = "absent"
    semantic_weight: float = 100.0
    acoustic_weight: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    submission: bool = False
    published: bool = True

    def __post_init__(self) -> None:
        check_entries("tasks", [task.task for task in self.tasks])
        check_numbers(self, semantic_weight=0, acoustic_weight=0)
        if self.semantic_weight == self.acoustic_weight == 0:
            raise MoshiTTTError("semantic_weight and acoustic_weight are both 0, so nothing would be scored; give one of them a weight.")


@dataclass
class RecordingsSettings:
    """Where long recordings come from.

    folder: in Libri-Light's layout; or
    manifest: a .jsonl, as for training.
    max_recordings: how many of them; null: all.
    max_frames: of each recording, 750 a minute; null: all.
    """

    folder: Path | None = None
    manifest: Path | None = None
    max_recordings: int | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.manifest is None):
            raise MoshiTTTError(f"folder is {self.folder} and manifest {self.manifest}; recordings come from one of them: give one.")
        check_numbers(self, max_recordings=1, max_frames=1)


@dataclass
class LongContextSettings(RecordingsSettings):
    """Loss against position under each condition.

    conditions: the memory as it is, and what is taken from it.
    chunk: frames in one forward pass; null: a window.
    """

    conditions: list[str] = field(default_factory=lambda: ["TTT", "reset every window", "frozen at W0", "gate 0", "shuffled windows"])
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_entries("conditions", self.conditions)
        check_numbers(self, chunk=1)


@dataclass
class InnerLossSettings(RecordingsSettings):
    """The inner losses of every TTT layer.

    smooth: points of the running mean.
    """

    smooth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, smooth=1)


@dataclass
class DialogueSettings:
    """The model listens to the user's side of each recording and answers.

    manifest: stereo dialogues, a .jsonl.
    before: the model before fine-tuning (a folder or a Hub name), to stand beside this one.
    max_recordings, max_seconds: how many dialogues (null: all), and of each how much.
    temperature, text_temperature: of the codes and of the text.
    """

    manifest: Path
    before: str | None = None
    max_recordings: int | None = None
    max_seconds: float = 120.0
    temperature: float = 0.8
    text_temperature: float = 0.7

    def __post_init__(self) -> None:
        check_numbers(self, max_recordings=1, max_seconds=ABOVE_ZERO, temperature=ABOVE_ZERO, text_temperature=ABOVE_ZERO)


@dataclass
class SpokenRecallSettings:
    """Where the dialogues come from, and under which conditions they are heard.

    manifest: a data.jsonl of ours, each recording's .json with "questions"; null makes dialogues.
    dialogues: how many are made of each kind below, of facts together, sentences of talk and renderings that are held out from training.
    seconds: of talk between telling and asking.
    told_after: seconds of talk before the facts.
    corrected: also dialogues in which facts are told anew.
    voices: those that training heard, or others.
    ways: of telling and asking a fact, those that training heard, or others.
    kinds, facts, digits: as in training.
    conditions: of the model: TTT, frozen at W0, gate 0.
    beside: other models, by the name they are shown with.
    modes: free, led.
    """

    manifest: Path | None = None
    dialogues: int = 24
    seconds: list[float] = field(default_factory=lambda: [8.0, 35.0])
    told_after: list[float] = field(default_factory=lambda: [0.0])
    corrected: bool = True
    voices: Literal["trained", "held_out"] = "trained"
    ways: Literal["trained", "held_out"] = "trained"
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    facts: list[int] = field(default_factory=lambda: [1, 2])
    digits: list[int] = field(default_factory=lambda: [1, 1])
    conditions: list[str] = field(default_factory=lambda: ["TTT", "gate 0"])
    beside: dict[str, str] = field(default_factory=dict)
    modes: list[str] = field(default_factory=lambda: ["free"])

    def __post_init__(self) -> None:
        check_numbers(self, dialogues=1, seconds=0, told_after=0)
        for name in ("seconds", "told_after", "conditions", "modes"):
            check_entries(name, getattr(self, name))
        for name, known in (("conditions", SPOKEN_CONDITIONS), ("modes", MODES)):
            for entry in getattr(self, name):
                if entry not in known:
                    raise MoshiTTTError(f"{name} holds {entry!r}; choose from {', '.join(known)}.")
        twice = [name for name in self.beside if name in self.conditions]
        if twice:
            raise MoshiTTTError(f"beside holds {twice[0]!r}, the name of a condition; give the model another name.")
        ScriptSettings(kinds=self.kinds, facts=self.facts, digits=self.digits)  # checks them


@dataclass
class EvaluateSettings:
    """What `moshi-ttt evaluate` runs: every section that is given.

    output: folder of the report, of results.json and of the pictures.
    model: a folder or a Hub name.
    adapter: a PEFT folder or Hub name, to be put into the model.
    device: auto (a GPU where there is one), cpu, cuda, or one of several by its number, as in cuda:1.
    dtype: of the weights.
    batch_size: recordings that are scored at once.
    seed: of what is drawn: answers, shuffled windows, resamples for the intervals.
    zero_shot, long_context, inner_loss, dialogue, recall, spoken_recall: the sections, each a group of its own.
    """

    output: Path = Path("runs/evaluate")
    model: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    seed: int = 0
    zero_shot: ZeroShotSettings | None = None
    long_context: LongContextSettings | None = None
    inner_loss: InnerLossSettings | None = None
    dialogue: DialogueSettings | None = None
    spoken_recall: SpokenRecallSettings | None = None
    recall: RecallSettings | None = None

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=1, seed=SEEDS)
        if not self.sections:
            raise MoshiTTTError(
                f"no section is given, so nothing would run; give some of {', '.join(SECTIONS)} (recall={{}} needs no more)."
            )
        if self.model is None and (self.adapter is not None or set(self.sections) != {"recall"}):
            raise MoshiTTTError("model is missing; give model=FOLDER (a checkpoint in our layout) or a Hub name")

    @property
    def sections(self) -> dict[str, Any]:
        """The sections that are given, by name."""
        return {name: section for name in SECTIONS if (section := getattr(self, name)) is not None}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="+", help="YAML files or bare names such as recall, and key=value pairs that apply to each of them"
    )
    parser.epilog = describe(EvaluateSettings)


def run(args: argparse.Namespace) -> int:
    files = [word for word in args.settings if "=" not in word]
    overrides = [word for word in args.settings if "=" in word]
    # all files are read before the first run: a typo in the last must not come out after hours
    runs = [load_settings(EvaluateSettings, path, overrides, kind="evaluate") for path in (files or [None])]
    places = [f"{name} is given for the output {settings.output}" for settings in runs for name in settings.sections]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise MoshiTTTError(f"{place} by two files; give each an output folder of its own.")
    from .runner import check, run_evaluation

    for settings in runs[1:]:
        check(settings)
    for settings in runs:
        print(run_evaluation(settings))
    return 0

"""Does it remember what it was told, and what it was told last? Facts are told in speech, then other things, then the model is asked, up to
an hour later. Every condition and every model beside hears the same dialogues."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from ..common.files import read_json
from ..common.results import MORE, Part
from ..common.settings import DISTINCT, Count, CountOrZero, Flag, NotNegative, Seed, Whole, check_entries, settings_group
from ..data.espeak import Espeak
from ..data.facts import DIGITS, HELD_OUT_VOICES, KINDS, VALUES, VOICES, Fact, ScriptSettings
from ..data.long_recordings import encode_recording
from ..data.recordings import Recording, read_manifest
from ..data.spoken_dialogues import Question, Script, speak
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from . import drawing
from .formatting import percent
from .kept_numbers import recording_line
from .long_context import FROZEN, GATE_ZERO, TTT
from .memory_probe import Memory, draw_memory, probe, said_of_memory
from .spoken_listening import CONDITIONS, FULL, LISTENING, WINDOW, Heard, answers
from .statistics import bootstrap_interval
from .task import Context, Measure, Table, Task

TIMES = (0, 8, 35, 120, 480, 1620, 3600)  # seconds at which the columns begin
PIECE = 125  # frames that are encoded at once


@settings_group
class SpokenRecallSettings:
    """Where the dialogues come from, and under which conditions they are heard."""

    manifest: Path | None = None
    """A data.jsonl of ours, each recording's .json with "questions"; null makes dialogues."""
    dialogues: Count = 24
    """How many are made of each kind below, of facts together, sentences of talk and renderings that are held out from training."""
    seconds: Annotated[list[NotNegative], DISTINCT] = field(default_factory=lambda: [8.0, 35.0])
    """Seconds of talk between telling and asking."""
    told_after: Annotated[list[NotNegative], DISTINCT] = field(default_factory=lambda: [0.0])
    """Seconds of talk before the facts."""
    corrected: Flag = True
    """Also dialogues in which facts are told anew."""
    voices: Literal["trained", "held_out"] = "trained"
    """Voices that training heard, or others."""
    ways: Literal["trained", "held_out"] = "trained"
    """Ways of telling and asking a fact: those that training heard, or others."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Kinds of facts, as in training."""
    facts: list[Whole] = field(default_factory=lambda: [1, 2])
    """Lowest and highest number of facts in a dialogue."""
    digits: list[Whole] = field(default_factory=lambda: [1, 1])
    """Lowest and highest number of digits of a number."""
    conditions: Annotated[list[str], DISTINCT] = field(default_factory=lambda: ["TTT", "gate 0"])
    """Conditions of the model: TTT as it is; its memory frozen at W0; its gate 0; "window only", with no more of the dialogue before a question than
    attention reaches through all layers; "full attention", of all that came before."""
    beside: dict[str, str] = field(default_factory=dict)
    """Other models, by the name they are shown with."""
    modes: Annotated[list[str], DISTINCT] = field(default_factory=lambda: ["free"])
    """How it hears dialogues: free (it hears its own answers) or led (it hears the right ones)."""
    seeds: list[Seed] = field(default_factory=list)
    """Seeds of the dialogues that are made; none: the run's seed."""
    memory: CountOrZero = 0
    """Dialogues whose memory is looked into as it goes: drift, steps, gate, false writes."""

    def __post_init__(self) -> None:
        if self.seeds:
            check_entries("seeds", self.seeds)
        for name, known in (("conditions", CONDITIONS), ("modes", tuple(LISTENING))):
            for entry in getattr(self, name):
                if entry not in known:
                    raise MoshiTTTError(f"`{name}={getattr(self, name)}` must be of {', '.join(known)}; {entry!r} is none.")
        twice = [name for name in self.beside if name in self.conditions]
        if twice:
            raise MoshiTTTError(f"`beside.{twice[0]}` must not have the name of a condition; give the model another name.")
        ScriptSettings(kinds=self.kinds, facts=self.facts, digits=self.digits)  # checks them


def read_questions(recording: Recording) -> list[Question]:
    """The "questions" of the .json beside a recording.

    Raises:
        ValueError: malformed questions, or times that cannot be: asked before told, or outside the recording.
    """
    path = recording.path.with_suffix(".json")
    found = read_json(path).get("questions", []) if path.is_file() else []
    questions = []
    for index, item in enumerate(found):
        try:
            before = tuple(tuple(value) for value in item.get("before", []))
            one = Question(Fact(item["kind"], tuple(item["value"])), before, float(item["told"]), float(item["asked"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise MoshiTTTError(
                f'{path}: questions[{index}] is {item!r}; it must hold "kind", "value" (words), "told" and "asked" (seconds).'
            ) from None
        if not 0 <= one.told < one.asked <= recording.duration:
            raise MoshiTTTError(
                f"{path}: questions[{index}] is told at {one.told:g} s and asked at {one.asked:g} s of {recording.duration:g} s; "
                "a fact must be told before it is asked, and both within the recording."
            )
        questions.append(one)
    return questions


def recordings(section: SpokenRecallSettings) -> list[tuple[Recording, list[Question]]]:
    """What a manifest holds; ValueError where nothing in it is asked."""
    found = [(one, read_questions(one)) for one in read_manifest(section.manifest, allow_outside=True)]  # type: ignore[arg-type]
    if not any(questions for _, questions in found):
        raise MoshiTTTError(f'{section.manifest}: no recording has "questions" in the .json beside it, so there is nothing to recall.')
    return found


def encoded(section: SpokenRecallSettings, processor: Any, seed: int, progress: Callable[[Any], Any] = iter) -> list[Heard]:
    """The dialogues, read or made, as codes."""
    if section.manifest is not None:
        heard = []
        for one, questions in progress(recordings(section)):
            codes = encode_recording(processor, one)
            if codes.user is None:
                raise MoshiTTTError(f"{one.path}: has 1 channel; a dialogue is stereo, Moshi left and the user right.")
            text = codes.text if codes.text is not None else torch.tensor(processor.text_frames((), codes.user.shape[1]))
            heard.append(Heard(one.path.stem, codes.user, codes.moshi, text, questions))
        return heard
    espeak = Espeak()
    scripts = progress(list(_scripts(section, section.seeds or [seed])))
    return [_made(name, drawn, script, voice, espeak, processor) for name, drawn, script, voice in scripts]


def _made(name: str, seed: int, script: Script, voice: str, espeak: Espeak, processor: Any) -> Heard:
    spoken = speak(script, espeak, voice)
    stream, size = processor.new_audio_stream(2), PIECE * processor.frame_size
    samples = torch.from_numpy(np.pad(spoken.samples, ((0, 0), (0, -spoken.samples.shape[1] % processor.frame_size))))
    codes = torch.cat([stream.encode_frames(piece).cpu() for piece in samples.split(size, dim=1)], dim=-1)  # [2, K, T]
    text = torch.tensor(processor.text_frames(spoken.words, codes.shape[-1]))
    return Heard(name, codes[1], codes[0], text, spoken.questions, seed)


def _scripts(section: SpokenRecallSettings, seeds: Sequence[int]) -> Iterator[tuple[str, int, Script, str]]:
    """Name, seed, script and voice of every dialogue that is made."""
    voices = VOICES if section.voices == "trained" else HELD_OUT_VOICES
    kinds = itertools.product(seeds, section.seconds, section.told_after, (0.0, 1.0)[: 1 + section.corrected], range(section.dialogues))
    for seed, seconds, after, corrections, number in kinds:
        distance, lead = round(seconds * FRAME_RATE), round(after * FRAME_RATE)
        settings = ScriptSettings(section.kinds, section.facts, section.digits, echo=0.0, corrections=corrections)
        settings = replace(settings, distance=[distance, distance], lead=[lead, lead])
        name = f"{'corrected' if corrections else 'told'} {seconds:g} s after {after:g} s, {number}"
        rng = random.Random(f"{seed} {name}")
        script = Script(settings, rng, held_out=True, new_ways=section.ways == "held_out")
        yield f"seed {seed}, {name}" if len(seeds) > 1 else name, seed, script, rng.choice(voices)


# ---------------------------------------------------------------- numbers


def chance() -> float:
    """Share of right answers of who knows the kind of a fact but not its value, over the four kinds alike, numbers of one digit."""
    return float(np.mean([1 / len(values) for values in (*VALUES.values(), DIGITS)]))


def bucket(seconds: float) -> int:
    """The time in `TIMES` at which the column of these seconds begins."""
    return max(time for time in TIMES if time <= seconds)


def share_right(found: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy of some answers, with an interval over their dialogues, and the share of values from before a correction."""
    each: dict[str, list[bool]] = {}
    for one in found:
        each.setdefault(one["dialogue"], []).append(one["right"])
    interval = bootstrap_interval([float(np.mean(rights)) for rights in each.values()], seed)
    shares = {"accuracy": float(np.mean([one["right"] for one in found])), "old": float(np.mean([one["old"] for one in found]))}
    return shares | {"interval": list(interval), "questions": len(found), "dialogues": len(each)}


def grouped(found: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """The answers by a key, in its order."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return dict(sorted(groups.items()))


def cells(found: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Accuracy for each time since told, of facts told once and of corrected ones."""
    groups = grouped(found, lambda one: (one["corrected"] > 0, bucket(one["since"])))
    return [
        {"corrected": corrected, "from": low, "mean_since": round(float(np.mean([one["since"] for one in there])), 1)}
        | share_right(there, seed)
        for (corrected, low), there in groups.items()
    ]


AXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "facts": lambda one: one["facts"],
    "corrections": lambda one: one["corrected"],
    "told from s": lambda one: bucket(one["told"]),
    "seed": lambda one: one["seed"],
}


def measure(
    models: Mapping[str, tuple[Any, Sequence[str]]],
    processor: Any,
    heard: Sequence[Heard],
    modes: Sequence[str],
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> dict[str, Any]:
    """Accuracy of every model under its conditions: `models` maps a name to (model, conditions); "" is the model under evaluation."""
    runs = {}
    for (name, (model, conditions)), mode in itertools.product(models.items(), modes):
        for condition in conditions:
            found = answers(model, processor, heard, condition, mode, batch_size, progress)
            label = f"{name or condition}, {mode}" if len(modes) > 1 else name or condition
            by = {
                axis: [{"value": value} | share_right(there, seed) for value, there in grouped(found, key).items()]
                for axis, key in AXES.items()
            }
            grid = grouped(found, lambda one: (bucket(one["told"]), bucket(one["told"] + one["since"])))
            told_asked = [{"told": t, "asked": a} | share_right(there, seed) for (t, a), there in grid.items()]
            runs[label] = {"cells": cells(found, seed), "by": by, "grid": told_asked, "answers": found}
    hours = sum(one.user.shape[1] for one in heard) / FRAME_RATE / 3600
    return {"kind": "spoken_recall", "dialogues": len(heard), "hours": hours, "modes": list(modes), "chance": chance(), "runs": runs}


# ---------------------------------------------------------------- the evaluation


class Cell(TypedDict):
    """Share of right answers. Those of `Run.cells` are of a time since told; of `by`, of a `value`; of `grid`, of `told` and `asked`."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    accuracy: float
    interval: list[float]
    questions: int
    corrected: NotRequired[bool]
    mean_since: NotRequired[float]
    value: NotRequired[int]
    told: NotRequired[int]
    asked: NotRequired[int]


class Run(TypedDict):
    """One condition or model. by: number of facts, number of corrections, time of telling, or seed -> cells."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    cells: list[Cell]
    answers: list[dict[str, Any]]
    by: NotRequired[dict[str, list[Cell]]]
    grid: NotRequired[list[Cell]]


class SpokenRecallPart(Part):
    """runs: condition or model -> its numbers, all of the same dialogues. memory: what its TTT layers did."""

    dialogues: int
    modes: list[str]
    runs: dict[str, Run]
    chance: NotRequired[float]
    memory: NotRequired[Memory]


class SpokenRecall(Task):
    name, settings, shape = "spoken_recall", SpokenRecallSettings, SpokenRecallPart
    question = "Does it remember what it was told?"
    reading = "Facts are told in speech, then other things, then it is asked; some facts are corrected."

    def inputs(self, section: SpokenRecallSettings) -> Iterable[str]:
        if section.manifest is None:
            return ()
        found = recordings(section)
        return (f"{recording_line(one)} {questions}" for one, questions in found)

    def models(self, section: SpokenRecallSettings) -> dict[str, str]:
        return {f"beside.{name}": model for name, model in section.beside.items()}

    def check(self, section: SpokenRecallSettings, subject: Any) -> None:
        needs = {FROZEN: "ttt_layers", GATE_ZERO: "ttt_layers", WINDOW: "sliding_window", FULL: "sliding_window"}
        for condition in section.conditions:
            setting = needs.get(condition)
            if setting and not subject.config.get(setting, "ttt" not in setting):
                raise MoshiTTTError(
                    f"spoken_recall.conditions holds {condition!r}, but the model's `{setting}={subject.config.get(setting)}` leaves nothing to "
                    f"compare; give spoken_recall.conditions=[{', '.join(one for one in section.conditions if needs.get(one) != setting)}]."
                )
        if section.memory and not subject.ttt.get("ttt_layers"):
            raise MoshiTTTError(f"spoken_recall.memory={section.memory} must be 0 for a model without TTT layers.")

    def run(self, subject: Any, section: SpokenRecallSettings, context: Context) -> dict[str, Any]:
        model, processor = subject.load()
        heard = encoded(section, processor, context.seed, context.bar("encoding"))
        models = {"": (model, section.conditions)}
        models |= {name.removeprefix("beside."): (one.model, [TTT]) for name, one in context.others.items()}
        part = measure(models, processor, heard, section.modes, context.batch_size, context.seed, context.bar("spoken recall"))
        if section.memory:
            once = [one for one in heard if not any(question.before for question in one.questions)]  # else some tellings have no time
            if not once:
                raise MoshiTTTError(
                    f"spoken_recall.memory={section.memory} must be 0: every dialogue has corrections, whose times are not all known."
                )
            longest = sorted(once, key=lambda one: -one.user.shape[1])[: section.memory]
            part["memory"] = probe(model, context.bar("memory")(longest))
        return part

    def figure(self, part: SpokenRecallPart) -> Figure:
        """Accuracy against time since told, facts told once beside corrected ones, a line for each condition and model; below, where facts
        were told at several times, told-at × asked-at for each; at last what the memory did."""
        kinds = sorted({cell["corrected"] for run in part["runs"].values() for cell in run["cells"]})
        maps = {label: run.get("grid", []) for label, run in part["runs"].items()}
        told = sorted({cell["told"] for grid in maps.values() for cell in grid})
        rows = [3.2] + ([0.9 + 0.35 * len(told)] if len(told) > 1 else []) + ([2.4] if "memory" in part else [])
        figure = drawing.new_figure(max(7.2, 2.2 * len(maps) if len(told) > 1 else 0), sum(rows) + 0.3)
        bands: Any = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
        first = bands[0].subplots(1, len(kinds), squeeze=False, sharey=True)[0]
        for axes, corrected in zip(first, kinds):
            self._against_time(axes, part, corrected)
        first[0].set_ylabel("questions answered right, %")
        bands[0].legend(*first[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
        if len(told) > 1:
            self._maps(bands[1], maps, told)
        if "memory" in part:
            draw_memory(part["memory"], bands[-1])
        return figure

    @staticmethod
    def _against_time(axes: Any, part: SpokenRecallPart, corrected: bool) -> None:
        for index, (label, run) in enumerate(part["runs"].items()):
            there = [cell for cell in run["cells"] if cell["corrected"] == corrected]
            x, y = [cell["mean_since"] for cell in there], [100 * cell["accuracy"] for cell in there]
            drawing.curve(axes, x, y, index, label, [[100 * bound for bound in cell["interval"]] for cell in there])
        if "chance" in part:
            axes.axhline(100 * part["chance"], color=drawing.GREY, linewidth=0.8, linestyle=":", label="chance")
        drawing.seconds_axis(axes, TIMES[1:])
        axes.set_xlabel("time since told" + (" anew" if corrected else ""))
        axes.set_title("corrected: the newest value" if corrected else "told once", fontsize=9)
        axes.set_ylim(-3, 103)

    @staticmethod
    def _maps(band: Any, maps: Mapping[str, Sequence[Cell]], told: Sequence[int]) -> None:
        asked = sorted({cell["asked"] for grid in maps.values() for cell in grid})
        for axes, (label, grid) in zip(band.subplots(1, len(maps), squeeze=False, sharey=True)[0], maps.items()):
            values = np.full((len(told), len(asked)), np.nan)
            for cell in grid:
                values[told.index(cell["told"]), asked.index(cell["asked"])] = 100 * cell["accuracy"]
            drawing.heat_map(axes, values, asked, [f"told from {time} s" for time in told])
            axes.set_title(label, fontsize=8)
            axes.set_xlabel("asked from, s")

    def table(self, part: SpokenRecallPart) -> Table:
        """A row for each condition and model; a column for each time since told, and for each value of what else was varied."""
        columns: dict[tuple[Any, ...], str] = {}
        rows: dict[str, dict[tuple[Any, ...], Cell]] = {label: {} for label in part["runs"]}
        for label, run in part["runs"].items():
            for cell in run["cells"]:
                key = (cell["corrected"], cell["from"])  # type: ignore[typeddict-item]
                columns[key] = f"{'corrected' if cell['corrected'] else 'told'}, from {cell['from']} s"  # type: ignore[typeddict-item]
                rows[label][key] = cell
        for axis in AXES:
            for label, run in part["runs"].items():
                for cell in run.get("by", {}).get(axis, []) if len(run.get("by", {}).get(axis, [])) > 1 else []:
                    columns[2, axis, cell["value"]] = f"{axis}: {cell['value']}"
                    rows[label][2, axis, cell["value"]] = cell
        keys = sorted(columns, key=lambda key: key if key[0] < 2 else (2,))
        note = (
            f"Share of questions answered right, percent, with 95% intervals over dialogues; {part['dialogues']} dialogues "
            f"({', '.join(part['modes'])})."
        )
        memory = " " + said_of_memory(part["memory"]) if "memory" in part else ""
        shown = [[label, *[_shown(there.get(key)) for key in keys]] for label, there in rows.items()]
        return Table(["", *[columns[key] for key in keys]], shown, note + memory)

    def finding(self, part: SpokenRecallPart) -> str:
        said = []
        for corrected, what in ((False, "told once"), (True, "corrected")):
            last = {label: [cell for cell in run["cells"] if cell["corrected"] == corrected][-1:] for label, run in part["runs"].items()}
            shares = [f"{label} {percent(there[0]['accuracy'], 0)}%" for label, there in last.items() if there]
            if shares:
                since = next(there[0]["mean_since"] for there in last.values() if there)
                said.append(f"{what}, {since:.0f} s ago: {', '.join(shares)}")
        return f"Right answers: {'; '.join(said)} (chance {percent(part.get('chance', chance()), 0)}%)."

    def measures(self, part: SpokenRecallPart) -> list[Measure]:
        found = []
        for label, run in part["runs"].items():
            groups = grouped(run["answers"], lambda one: (one["corrected"] > 0, bucket(one["since"])))
            for (corrected, low), there in groups.items():
                each = {name: 100 * float(np.mean([one["right"] for one in rights])) for name, rights in grouped(there, _dialogue).items()}
                mean = 100 * float(np.mean([one["right"] for one in there]))
                found.append(
                    Measure("corrected" if corrected else "told once", label, max(low, 1), mean, "%", each, axis="seconds since told")
                )
        return found


def _dialogue(answer: dict[str, Any]) -> str:
    return str(answer["dialogue"])


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


TASK = SpokenRecall()

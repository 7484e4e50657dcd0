"""Two results beside each other: pairs are the units that both measured, and the verdict says no more than the intervals."""

import json

import numpy as np
import pytest
from test_evaluation_plots import PARTS

from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.evaluation import compare
from modeling_moshi_ttt.evaluation.task import TASKS, task

ABOUT = {"model": {"name": "tiny", "fingerprint": "f", "ttt": {}}, "written": "today", "format": 2}


def answers(rights, since=40.0):
    """Spoken recall of one dialogue an answer."""
    found = [
        {"dialogue": f"d{i}", "told": 1.0, "since": since, "corrected": 0, "right": bool(right), "old": False}
        for i, right in enumerate(rights)
    ]
    cell = {
        "corrected": False,
        "from": 35,
        "mean_since": since,
        "accuracy": float(np.mean(rights)),
        "interval": [0.0, 1.0],
        "questions": len(found),
    }
    return {
        "kind": "spoken_recall",
        "dialogues": len(found),
        "modes": ["free"],
        "runs": {"TTT": {"cells": [cell], "answers": found}},
        "settings": {"seed": 0},
    }


def write(folder, **parts):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(ABOUT | {"tasks": parts}))
    return str(folder / "results.json")


FEW, MANY = [1] * 8 + [0] * 32, [1] * 36 + [0] * 4


def test_a_difference_is_that_of_the_pairs_and_has_a_direction():
    (one,) = compare.differences("spoken_recall", answers(FEW), answers(MANY))
    assert (one.name, one.pairs) == ("told once, TTT, 35", 40)
    assert one.mean == pytest.approx(70.0)
    assert one.interval[0] < 70 < one.interval[1]
    assert one.interval[0] > 50
    assert one.verdict == "better"
    (back,) = compare.differences("spoken_recall", answers(MANY), answers(FEW))
    assert (back.mean, back.verdict) == (pytest.approx(-70.0), "worse")
    (same,) = compare.differences("spoken_recall", answers(FEW), answers(FEW))
    assert (same.mean, same.verdict) == (0.0, "undecided")


def test_a_lower_loss_is_better():
    books = PARTS["books"]

    def part(shift):
        each = {"TTT": {"text": {f"book {i}": 2.0 + 0.1 * i + shift for i in range(12)}}}
        return books | {"each": each}

    (one,) = [found for found in compare.differences("long_context", part(0.0), part(-0.5)) if found.verdict != "not tested"]
    assert (one.mean, one.verdict, one.unit) == (pytest.approx(-0.5), "better", "nats a token")


def test_pairs_are_the_units_of_both():
    (one,) = compare.differences("spoken_recall", answers(FEW), answers(MANY[:10]))
    assert one.pairs == 10


def test_chance_alone_is_called_no_difference():
    """Of 20 comparisons of equals none is called one: p is corrected for their number."""
    rng = np.random.default_rng(0)
    cells = [[rng.integers(0, 2, 40).tolist() for _ in range(20)] for _ in range(2)]

    def recall(side):
        results = [
            {"pairs": 1, "distance": 40 + i, "accuracy": float(np.mean(one)), "rights": " ".join(map(str, one))}
            for i, one in enumerate(cells[side])
        ]
        return {
            "kind": "recall",
            "window": 16,
            "chance": 0.02,
            "runs": [{"name": "linear", "variant": {}, "training": {}, "results": results}],
        }

    found = compare.differences("recall", recall(0), recall(1))
    assert {one.verdict for one in found} == {"undecided"}
    assert "no difference can be told" in compare.verdict("recall", found)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "spoken_recall"])
def test_every_evaluation_has_numbers_to_compare(name):
    part = next(one for one in PARTS.values() if one["kind"] == name)
    if name == "dialogue":
        part = part | {"model": {"overlap, share": 0.2}}
    found = task(name).measures(part)
    assert found
    assert len({one.name for one in found}) == len(found)
    assert all(one.unit for one in found)
    assert "nothing can be tested" in compare.verdict(name, compare.differences(name, part, part))


def test_the_command_writes_what_it_says(tmp_path, capsys):
    a, b = write(tmp_path / "a", spoken_recall=answers(FEW)), write(tmp_path / "b", spoken_recall=answers(MANY))
    assert main(["compare", a, str(tmp_path / "b"), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "B is better" in said
    assert "+70.00" in said
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["tasks"]["spoken_recall"]["verdict"] in said
    assert (tmp_path / "out" / "spoken_recall.svg").is_file()
    assert main(["compare", a, b, "--task", "spoken_recall", "--output", str(tmp_path / "one")]) == 0


def test_curves_lie_over_each_other():
    figure = compare.overlay(*(task("spoken_recall").measures(answers(one)) for one in (FEW, MANY)), labels=("a", "b"))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in figure.axes[0].lines}
    assert lines == {"TTT, A": ([35], [20.0], "-"), "TTT, B": ([35], [90.0], "--")}


@pytest.mark.parametrize(
    ("other", "options", "named"),
    [
        ({"zero_shot": PARTS["zero"]}, [], "zero_shot"),
        ({"spoken_recall": answers(FEW), "zero_shot": PARTS["zero"]}, [], "zero_shot"),
        ({"spoken_recall": answers(FEW)}, ["--task", "recall"], "--task recall"),
        ({"spoken_recall": answers(FEW) | {"settings": {"seed": 1}}}, [], "settings.seed"),
        ({"spoken_recall": answers(FEW) | {"settings": {"seed": 0, "inputs": "x"}}}, [], "settings"),
        ({"spoken_recall": answers(FEW) | {"settings": {"seed": 0, "voices": "held_out"}}}, [], "settings.voices"),
        ({"spoken_recall": {"kind": "spoken_recall"}}, [], "tasks.spoken_recall.dialogues"),
        ({"spoken_recall": answers(FEW) | {"hours": float("nan")}}, [], "tasks.spoken_recall.hours"),
        ({"spoken_recall": answers(FEW) | {"kind": "comparison"}}, [], "tasks.spoken_recall.kind"),
        ({"spoken_recall": answers(FEW) | {"runs": {}}}, [], "spoken_recall"),
    ],
)
def test_results_that_cannot_be_compared_are_named(tmp_path, capsys, other, options, named):
    a, b = write(tmp_path / "a", spoken_recall=answers(FEW)), write(tmp_path / "b", **other)
    assert main(["compare", a, b, *options, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

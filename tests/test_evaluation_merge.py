"""Results of several checkpoints of one training: their mean, the worst of them, intervals over dialogues."""

import json
from pathlib import Path

import pytest
from test_evaluation_compare import answers, write
from test_evaluation_plots import PARTS

from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.common.results import read_results
from modeling_moshi_ttt.evaluation.merge import merge
from modeling_moshi_ttt.evaluation.task import shapes, task

GOOD, FAIR, POOR = ([1] * right + [0] * (20 - right) for right in (20, 16, 6))


def seeds(tmp_path, *each, **more):
    """A results.json of each, all of different models."""
    places = []
    for number, rights in enumerate(each):
        path = write(tmp_path / str(number), spoken_recall=answers(rights) | more)
        change(path, lambda data, number=number: data["model"].update(name=f"seed {number}", fingerprint=f"f{number}"))
        places.append(path)
    return places


def change(path, how):
    data = json.loads(Path(path).read_text())
    how(data)
    Path(path).write_text(json.dumps(data))


def test_the_mean_the_worst_and_intervals_over_dialogues(tmp_path, capsys):
    places = seeds(tmp_path, GOOD, FAIR, POOR)
    assert main(["merge", *places, "--output", str(tmp_path / "out")]) == 0
    assert "TTT 70% (worst 30%)" in capsys.readouterr().out
    results = read_results(tmp_path / "out" / "results.json", shapes())
    part = results["tasks"]["spoken_recall"]
    (cell,) = part["runs"]["TTT"]["cells"]
    assert (cell["accuracy"], cell["worst"], cell["questions"], cell["dialogues"]) == (0.7, 0.3, 60, 20)
    assert 0.5 < cell["interval"][0] < 0.7 < cell["interval"][1] < 0.9  # of 20 dialogues, not of 60 questions
    assert [one["accuracy"] for one in part["runs"]["TTT"]["by"]["checkpoint"]] == [1.0, 0.8, 0.3]
    table = task("spoken_recall").table(part)
    assert "worst 30" in table.rows[0][1]
    assert "mean of 3 checkpoints" in table.note
    assert all(name in results["model"]["name"] for name in ("seed 0", "seed 1", "seed 2"))
    assert (tmp_path / "out" / "report.html").is_file()


def test_merged_results_are_compared_as_those_of_one_model(tmp_path, capsys):
    first, second = (
        seeds(tmp_path / name, *each) for name, each in (("a", (POOR, POOR)), ("b", (GOOD, FAIR))) if not (tmp_path / name).mkdir()
    )
    for name, places in (("a", first), ("b", second)):
        assert main(["merge", *places, "--output", str(tmp_path / name / "out")]) == 0
    assert main(["compare", *(str(tmp_path / name / "out") for name in "ab"), "--output", str(tmp_path / "compared")]) == 0
    assert "B − A +60.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("one", "results="),
        ("same", "results="),
        ("seeds", "settings.seed"),
        ("tasks", "zero_shot"),
        ("none", "spoken_recall"),
    ],
)
def test_results_that_cannot_be_merged_are_named(tmp_path, capsys, how, named):
    places = seeds(tmp_path, GOOD, FAIR)
    if how == "one":
        places = places[:1]
    if how == "same":
        places = [places[0], places[0]]
    if how == "seeds":
        places[1] = write(tmp_path / "other", spoken_recall=answers(FAIR) | {"settings": {"seed": 1}})
    if how == "tasks":
        places[1] = write(tmp_path / "other", zero_shot=PARTS["zero"])
    if how == "none":
        places = [write(tmp_path / name, zero_shot=PARTS["zero"]) for name in "ab"]
        change(places[1], lambda data: data["model"].update(fingerprint="g"))
    assert main(["merge", *places, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_label_that_one_lacks_is_left_out(tmp_path):
    places = seeds(tmp_path, GOOD, FAIR)
    change(places[0], lambda data: data["tasks"]["spoken_recall"]["runs"].update({"gate 0": answers(GOOD)["runs"]["TTT"]}))
    assert list(merge([tmp_path / "0", tmp_path / "1"])["tasks"]["spoken_recall"]["runs"]) == ["TTT"]

"""Pictures from JSON alone, and the report that stands alone."""

import argparse
import json
import re
from pathlib import Path

import pytest

from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.common.results import checked_part, read_results
from modeling_moshi_ttt.evaluation import drawing, plots, report
from modeling_moshi_ttt.evaluation.task import shapes, task, tasks

ROOT = Path(__file__).parents[1]

CURVE = {"position": [16.0, 64.0, 256.0], "loss": [5.0, 4.0, 3.5], "low": [4.8, 3.9, 3.4], "high": [5.2, 4.1, 3.6], "frames": [16, 64, 256]}
TASK = {"accuracy": 0.6, "interval": [0.5, 0.7], "items": 5, "pairs": 10, "chance": 0.5}
PARTS = {
    "remembers": {
        "kind": "recall", "window": 16, "chance": 0.02,
        "runs": [{"name": name, "variant": {}, "training": {}, "results": [{"pairs": p, "distance": d, "accuracy": 0.5} for p in (4, 8) for d in (24, 96)]} for name in ("none", "linear")],
    },
    "books": {
        "kind": "long_context", "window": 64, "streams": ["text", "semantic"], "unit": "recordings",
        "conditions": {"TTT": {"text": CURVE, "semantic": CURVE}, "gate 0": {"text": CURVE, "semantic": CURVE | {"low": [None] * 3, "high": [None] * 3}}},
        "differences": {"gate 0": {"text": CURVE, "semantic": CURVE}},
        "gains": {"gate 0": {"text": {"mean": 0.1, "interval": [0.05, 0.2], "p": 0.01, "pairs": 9}, "semantic": {"mean": 0.1, "interval": None, "p": None, "pairs": 1}}},
    },
    "inside": {
        "kind": "inner_loss", "mini_batch_size": 4, "recordings": 2,
        "layers": {str(i): {"position": [1, 2], "initial": [2.0, 2.0], "before": [1.5, 1.0], "after": [1.2, 0.8], "drift": [0.1, 0.2], "gate": {"mean_abs": 0.1}} for i in range(5)},
    },
    "zero": {
        "kind": "zero_shot", "published": {"TWIST-7B": {"swuggy": 73.5}}, "tasks": {"swuggy": TASK | {"groups": {"oov": TASK}, "variants": {"weighted sum": 0.55}}},
        "scoring": {"reduction": "mean", "text": "absent", "user": "absent", "semantic_weight": 100.0, "acoustic_weight": 1.0},
    },
    "talk": {"kind": "dialogue", "recordings": 1, "reference": {"overlap, share": 0.1, "turns answered, share": 1.0}, "model": {"overlap, share": None, "turns answered, share": 0.5}},
}  # fmt: skip
RESULTS = {"model": {"name": "<b>tiny</b>", "fingerprint": "f" * 64, "ttt": {"ttt_layers": [1]}}, "written": "today", "tasks": PARTS}


@pytest.mark.parametrize("name", [name for name in PARTS if name != "talk"])
def test_every_kind_is_drawn_as_png_and_svg(name, tmp_path):
    png, svg = drawing.save(plots.draw(PARTS[name]), tmp_path / name)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text


def test_the_same_numbers_give_the_same_picture(tmp_path):
    first, second = (drawing.save(plots.draw(PARTS["remembers"]), tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_window_is_marked_and_intervals_are_drawn_where_they_are_known():
    left, right, *_ = panels = plots.draw(PARTS["books"]).axes
    assert all(any(list(line.get_xdata()) == [64, 64] for line in axes.lines) for axes in panels)
    intervals = [len(axes.collections) for axes in (left, right)]  # of two curves, of which the second has none on the right
    assert intervals[0] > intervals[1] > 0


def test_the_heat_map_holds_the_numbers():
    figure = plots.draw(PARTS["remembers"])
    assert figure.axes[0].images[0].get_array().tolist() == [[50.0, 50.0], [50.0, 50.0]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["none", "linear"]


def test_the_heat_map_marks_what_attention_reaches_and_has_a_row_for_each_time_of_telling():
    part = PARTS["remembers"]
    late = [
        {**run, "results": [*run["results"], *[{**cell, "told_after": 9, "accuracy": 0.25} for cell in run["results"]]]}
        for run in part["runs"]
    ]
    figure = plots.draw({**part, "runs": late})
    panels = figure.axes[:4]
    assert [axes.get_title().split() for axes in panels] == [f"{p} pairs told after {n} (frames)".split() for n in (0, 9) for p in (4, 8)]
    assert [axes.images[0].get_array().max() for axes in panels] == [50.0, 50.0, 25.0, 25.0]
    assert [[label.get_text() for label in axes.get_xticklabels()] for axes in panels] == [["24*", "96"]] * 4
    assert "31 frames" in figure.get_supxlabel()


def test_the_report_names_the_reach():
    table = task("recall").table(PARTS["remembers"])
    assert table.head == ["", "pairs", "told after", "corrected", "24*", "96"]
    assert table.rows[0] == ["none", 4, 0, 0, "50.0", "50.0"]
    assert "reach 31 frames" in table.note


def test_the_bars_stand_beside_chance_and_the_published_rows():
    (axes,) = plots.draw(PARTS["zero"]).axes
    assert [bar.get_height() for bar in axes.patches] == [60.0]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_label() == "chance"] == [[50, 50]]
    assert {marks.get_label(): marks.get_offsets().tolist() for marks in axes.collections if marks.get_label() == "TWIST-7B"} == {
        "TWIST-7B": [[0.0, 73.5]]
    }


def test_every_layer_shows_its_three_inner_losses():
    axes = plots.draw(PARTS["inside"]).axes
    assert len(axes) == len(PARTS["inside"]["layers"])
    for panel in axes:
        assert [list(line.get_ydata()) for line in panel.lines] == [[2.0, 2.0], [1.5, 1.0], [1.2, 0.8]]


def test_lines_are_told_apart_without_color_too():
    """Eight colors that color-blind readers tell apart, here without black and yellow; each line has a mark and a dash besides."""
    assert set(drawing.PALETTE) - {drawing.GREY} == {"#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"}
    looks = [drawing.line_style(index) for index in range(40)]
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in looks}) == 40
    drawn = [line for line in plots.draw(PARTS["books"]).axes[0].lines if not line.get_label().startswith("_")]
    for look in ("get_color", "get_marker", "get_linestyle"):
        assert len({getattr(line, look)() for line in drawn}) == len(drawn) == 2


def test_a_picture_says_what_it_was_measured_on():
    about = {
        "settings": {"manifest": "/far/away/talk.jsonl", "seed": 7},
        "hours": 1.5,
        "version": "9.8.7",
        "date": "2026-01-02",
        "seconds": 1800.0,
    }
    part = PARTS["books"] | about | {"model_name": "runs/one"}
    (text,) = plots.draw(part).texts
    *found, measured = text.get_text().split("\n")
    assert " ".join(found) == task("long_context").finding(part)
    assert (
        measured
        == "model: runs/one; data: talk.jsonl; 1.50 hours of recordings; seed 7; moshi-ttt 9.8.7, 2026-01-02; measured in 0.50 hours"
    )
    several = part | {"settings": {"seed": 7, "seeds": [0, 1]}, "data": "2 made dialogues"}
    assert "data: 2 made dialogues; 1.50 hours of recordings; seeds 0, 1;" in plots.draw(several).texts[0].get_text()


@pytest.mark.parametrize("name", list(PARTS))
def test_every_part_says_what_was_found(name):
    said = task(PARTS[name]["kind"]).finding(PARTS[name])
    assert re.search(r"\d", said)
    assert said.endswith(".")


def test_axes_name_their_units():
    wanted = {"remembers": "frames", "books": "nats a token", "inside": "mean square", "zero": "%"}
    for name, unit in wanted.items():
        figure = plots.draw(PARTS[name])
        assert unit in " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("how", ["plot", "report"])
def test_a_fault_of_drawing_keeps_its_trace_and_blames_no_file(tmp_path, monkeypatch, how):
    def broken(self, part):
        return None + 1

    monkeypatch.setattr(type(tasks()["zero_shot"]), "figure", broken)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS | {"tasks": {"zero": PARTS["zero"]}}))
    with pytest.raises(TypeError) as raised:
        main(["plot", str(path)]) if how == "plot" else report.write_report(json.loads(path.read_text()), tmp_path)
    assert "broken" in [entry.name for entry in raised.traceback]
    assert "remove" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", {"kind": "recal"}, "`kind='recal'`"),
        ("a.json", {"kind": "long_context"}, "`window`"),
        ("a.json", {"kind": "recall", "window": 16, "chance": 0.1}, "`runs`"),
        ("a.json", {"kind": "inner_loss", "layers": []}, "`mini_batch_size`"),
        ("a.json", PARTS["remembers"] | {"chance": "x"}, "`chance=x`"),
        ("a.json", PARTS["books"] | {"conditions": {"TTT": {"text": CURVE | {"loss": [None]}}}}, "`conditions.TTT.text.loss.0=None`"),
        ("a.json", RESULTS | {"tasks": {"first": PARTS["zero"] | {"published": []}}}, "`tasks.first.published=[]`"),
        ("a.json", RESULTS | {"tasks": []}, "`tasks=[]`"),
        ("a.json", RESULTS | {"format": 99}, "`format=99`"),
        ("a.json", {"kind": []}, "`kind=[]`"),
        ("a.json", RESULTS | {"tasks": {"../x": PARTS["zero"]}}, "../x"),
        ("a.json", [], "a.json"),
        ("a.json", {}, "`model`"),
        ("a.jsonl", {"loss": 3.0}, "a.jsonl"),
    ],
)
def test_a_file_of_another_shape_is_one_line_that_names_it(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(json.dumps(content))
    assert main(["plot", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_command_draws_results_and_training_logs(tmp_path, capsys):
    few = {name: PARTS[name] for name in ("zero", "remembers", "talk")}
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"tasks": few}))
    (tmp_path / "log.jsonl").write_text(
        "\n".join(json.dumps({"step": i, "train/loss": 3 - i / 10, "train/text_loss": 1.0, "lr": 1e-4}) for i in range(5))
    )
    parser = argparse.ArgumentParser()
    plots.configure(parser)
    assert (
        plots.run(parser.parse_args([str(tmp_path / "results.json"), str(tmp_path / "log.jsonl"), "--output", str(tmp_path / "out")])) == 0
    )
    written = capsys.readouterr().out.split()
    assert {Path(name).name for name in written} == {f"{name}.{kind}" for name in ("zero", "remembers", "log") for kind in ("png", "svg")}
    assert (tmp_path / "out" / "log.svg").is_file()
    for name, message in (("gone.json", "gone.json is missing"), ("out", "results.json is missing")):
        with pytest.raises((ValueError, OSError), match=message):
            plots.run(parser.parse_args([str(tmp_path / name)]))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no JSON"):
        plots.run(parser.parse_args([str(tmp_path / "broken.json")]))


def test_the_report_stands_alone_and_escapes_names(tmp_path, monkeypatch):
    def save(figure, stem):
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".png").write_bytes(b"\x89PNG")
        return [stem.with_suffix(".png")]

    monkeypatch.setattr(report, "save", save)  # pictures themselves are tested above
    path = report.write_report(RESULTS, tmp_path)
    text = path.read_text()
    assert text.count("data:image/png;base64,") == len(PARTS) - 1
    assert "&lt;b&gt;tiny&lt;/b&gt;" in text
    assert "<b>tiny" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "73.5" in text
    assert "60.0" in text
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir())[0] == "books.png"


def test_two_logs_of_one_name_are_not_drawn_over_each_other(tmp_path):
    logs = [tmp_path / name / "metrics.jsonl" for name in "ab"]
    for log in logs:
        log.parent.mkdir()
        log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert main(["plot", str(logs[0]), str(logs[1]), "--output", str(tmp_path / "out")]) == 2
    assert main(["plot", str(logs[0]), str(logs[1])]) == 0
    assert all((log.parent / "metrics.png").is_file() for log in logs)


@pytest.mark.parametrize("name", ["docs/pictures/recall.json", "tests/kept/v0.2.0/spoken_recall.json"])
def test_parts_of_version_0_2_are_read_and_drawn(tmp_path, name):
    path = ROOT / name
    assert main(["plot", str(path), "--output", str(tmp_path)]) == 0
    part = checked_part(json.loads(path.read_text()), shapes(), path)
    one = task(part["kind"])
    assert one.table(part).rows
    assert one.finding(part)
    assert one.measures(part)


def test_results_of_version_0_1_are_reported_and_compared(tmp_path, capsys):
    kept = ROOT / "tests" / "kept" / "v0.1.0" / "evaluation" / "results.json"
    text = report.write_report(read_results(kept, shapes()), tmp_path).read_text()
    assert all(task(name).question in text for name in ("long_context", "inner_loss", "dialogue"))
    assert main(["compare", str(kept), str(kept), "--output", str(tmp_path / "out")]) == 0
    assert "nothing can be tested" in capsys.readouterr().out

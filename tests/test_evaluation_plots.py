"""Pictures from JSON alone, and the report that stands alone."""

import argparse
import json
import re

import pytest

from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.evaluation import plot, plots, report

CURVE = {"position": [16.0, 64.0, 256.0], "loss": [5.0, 4.0, 3.5], "low": [4.8, 3.9, 3.4], "high": [5.2, 4.1, 3.6], "frames": [16, 64, 256]}
TASK = {"accuracy": 0.6, "interval": [0.5, 0.7], "items": 5, "pairs": 10, "chance": 0.5}
PARTS = {
    "remembers": {
        "kind": "recall", "window": 16, "chance": 0.02,
        "runs": [{"name": name, "results": [{"pairs": p, "distance": d, "accuracy": 0.5} for p in (4, 8) for d in (24, 96)]} for name in ("none", "linear")],
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
    "talk": {"kind": "dialogue", "recordings": 1, "reference": {"overlap, share": 0.1}, "model": {"overlap, share": None}},
}  # fmt: skip
RESULTS = {"model": {"name": "<b>tiny</b>", "fingerprint": "f" * 64, "ttt": {"ttt_layers": [1]}}, "written": "today", "tasks": PARTS}


@pytest.mark.parametrize("name", [name for name in PARTS if name != "talk"])
def test_every_kind_is_drawn_as_png_and_svg(name, tmp_path):
    png, svg = plots.save(plots.draw(PARTS[name]), tmp_path / name)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text


def test_the_same_numbers_give_the_same_picture(tmp_path):
    first, second = (plots.save(plots.draw(PARTS["remembers"]), tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_window_is_marked_and_intervals_are_optional():
    figure = plots.draw(PARTS["books"])
    left, right, *below = figure.axes
    assert all(any(list(line.get_xdata()) == [64, 64] for line in axes.lines) for axes in figure.axes)
    assert (len(left.collections), len(right.collections)) == (2, 1)
    assert [len(axes.collections) for axes in below] == [1, 1]  # TTT has no difference to itself


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
    assert [axes.get_title() for axes in panels] == [f"{pairs} pairs told after {told} frames" for told in (0, 9) for pairs in (4, 8)]
    assert [axes.images[0].get_array().max() for axes in panels] == [50.0, 50.0, 25.0, 25.0]
    assert [[label.get_text() for label in axes.get_xticklabels()] for axes in panels] == [["24*", "96"]] * 4
    assert "attention reaches 31 frames: 2 layers of window 16" in figure.texts[0].get_text()


def test_the_report_names_the_reach():
    section = report.recall_section(PARTS["remembers"])
    assert section["head"] == ["", "pairs", "told after", "24*", "96"]
    assert section["rows"][0] == ["none", 4, 0, "50.0", "50.0"]
    assert "reach 31 frames" in section["note"]


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


def test_the_colours_are_those_of_okabe_and_ito_and_never_alone():
    """Eight colours that colour-blind readers tell apart; here without black and yellow, each with a mark of its own."""
    assert set(plots.PALETTE) - {plots.GREY} == {"#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"}
    drawn = [line for line in plots.draw(PARTS["books"]).axes[0].lines if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in drawn}) == len({line.get_marker() for line in drawn}) == 2


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"'recal' cannot be drawn; did you mean 'recall'"):
        plots.draw({"kind": "recal"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", {"kind": "long_context"}, "a.json, a lacks 'streams'; it cannot be drawn"),
        ("a.json", {"kind": "recall", "runs": []}, "a.json, a is not as it should be"),
        ("a.json", {"kind": "inner_loss", "layers": {}}, "a.json, a is not as it should be"),
        ("a.json", {"kind": "training", "panels": {"x": {"x": {"step": [1], "value": [None, "y"]}}}}, "a.json, a is not as it should be"),
        ("a.json", PARTS["remembers"] | {"chance": "x"}, "a.json, a is not as it should be"),
        ("a.json", {"tasks": {"first": PARTS["zero"] | {"published": []}}}, "a.json, first is not as it should be"),
        ("a.json", {"tasks": []}, "a.json is not as it should be"),
        ("a.json", {"kind": []}, "a.json is not as it should be"),
        ("a.json", {"tasks": {"../x": PARTS["zero"]}}, "leaves its folder"),
        ("a.json", [], "a.json holds no JSON object"),
        ("a.json", {}, "a.json: holds nothing that can be drawn"),
        ("a.jsonl", {"loss": 3.0}, "a.jsonl: the log holds no numbers with a step"),
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
    plot.configure(parser)
    assert (
        plot.run(parser.parse_args([str(tmp_path / "results.json"), str(tmp_path / "log.jsonl"), "--output", str(tmp_path / "out")])) == 0
    )
    written = capsys.readouterr().out.split()
    assert len(written) == 2 * 2 + 2  # dialogue has a table and no picture
    assert (tmp_path / "out" / "log.svg").is_file()
    for name, message in (("gone.json", "gone.json is missing"), (".", "is a folder")):
        with pytest.raises((ValueError, OSError), match=message):
            plot.run(parser.parse_args([str(tmp_path / name)]))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no JSON"):
        plot.run(parser.parse_args([str(tmp_path / "broken.json")]))


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

"""Readers and accuracies of the zero-shot tasks, on spoken sets in the official layouts, by hand to the last digit."""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling_moshi_ttt.evaluation import zero_resource as zr
from modeling_moshi_ttt.evaluation.statistics import bootstrap_interval, paired_test

sys.path.insert(0, str(Path(__file__).parent))
import zero_shot_folders as folders


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("zero")
    folders.make_swuggy(root / "sLM21")
    folders.make_sblimp(root / "sLM21")
    folders.make_storycloze(root / "sSC")
    folders.make_salmon(root / "salmon", zr.SALMON_PARTS)
    return root


def _scores(pairs, wins):
    """Scores that give each pair, in order, the outcome asked for: 1, 0.5 or 0."""
    scores = {}
    for pair, win in zip(pairs, wins, strict=True):
        scores[pair.positive], scores[pair.negative] = {1: (-1.0, -2.0), 0.5: (-1.0, -1.0), 0: (-2.0, -1.0)}[win]
    return scores


def test_swuggy_pairs_by_id_and_voice_whatever_the_order(sets):
    pairs = zr.read_swuggy(sets / "sLM21")
    assert [(p.item[0], p.voice, p.group) for p in pairs] == [
        ("0", "en", "oov"), ("0", "en-gb", "oov"), ("0", "en-us", "oov"), ("1", "en", "1-4"), ("1", "en-us", "1-4"),
        ("2", "en", "5-19"), ("2", "en-us", "5-19"), ("3", "en", "20-99"), ("3", "en-us", "20-99"), ("4", "en", "100+"),
    ]  # fmt: skip
    assert all(p.positive.stem == f"{p.voice}{p.item[0]}w" and p.negative.stem == f"{p.voice}{p.item[0]}x" for p in pairs)


def test_swuggy_accuracy_by_hand_with_ties_and_uneven_voices(sets):
    pairs = zr.read_swuggy(sets / "sLM21")
    result = zr.accuracy(pairs, _scores(pairs, [1, 0, 0.5, 1, 1, 0, 0.5, 0, 0, 1]))
    # items: 0: (1 + 0 + .5)/3 = .5; 1: 1; 2: .25; 3: 0; 4: 1 (pairs alone would give .5)
    assert result["accuracy"] == (0.5 + 1 + 0.25 + 0 + 1) / 5 == 0.55
    assert {name: group["accuracy"] for name, group in result["groups"].items()} == {
        "oov": 0.5,
        "1-4": 1.0,
        "5-19": 0.25,
        "20-99": 0.0,
        "100+": 1.0,
    }
    assert (result["pairs"], result["items"]) == (10, 5)
    low, high = result["interval"]
    assert 0 <= low < 0.55 < high <= 1
    assert zr.accuracy(pairs, _scores(pairs, [1, 0, 0.5, 1, 1, 0, 0.5, 0, 0, 1]))["interval"] == result["interval"]


def test_sblimp_by_type(sets):
    pairs = zr.read_sblimp(sets / "sLM21")
    assert [(p.item, p.voice) for p in pairs] == [
        (("agreement", "noun", "0"), "en"), (("agreement", "noun", "0"), "en-us"), (("agreement", "verb", "0"), "en"),
        (("agreement", "verb", "0"), "en-us"), (("binding", "reflexive", "0"), "en"), (("binding", "reflexive", "0"), "en-us"),
    ]  # fmt: skip
    result = zr.accuracy(pairs, _scores(pairs, [1, 0.5, 0, 0, 1, 1]))
    assert result["accuracy"] == (0.75 + 0 + 1) / 3
    assert result["groups"]["agreement"]["accuracy"] == 0.375
    assert result["groups"]["binding"]["accuracy"] == 1.0


def test_storycloze_pairs_by_uuid(sets):
    pairs = zr.read_storycloze(sets / "sSC")
    assert [(p.positive.name, p.negative.name) for p in pairs] == [
        ("10_aa-1_correct.wav", "3_aa-1_incorrect.wav"), ("2_bb-2_correct.wav", "11_bb-2_incorrect.wav")
    ]  # fmt: skip
    assert zr.accuracy(pairs, _scores(pairs, [1, 0.5]))["accuracy"] == 0.75


def test_salmon_parts(sets):
    pairs = zr.read_salmon(sets / "salmon")
    assert len(pairs) == 16
    assert [p.positive.name for p in pairs[:2]] == ["sample_2_0.wav", "sample_10_0.wav"]
    result = zr.accuracy(pairs, _scores(pairs, [1, 0.5] + [0, 1] * 7))
    assert result["groups"]["bg_alignment"]["accuracy"] == 0.75
    assert result["accuracy"] == (1.5 + 7) / 16
    with pytest.raises(ValueError, match="folder=.*gender"):
        zr.read_salmon(sets / "salmon", ["gender"])


@pytest.mark.parametrize("count", [20000])
def test_a_random_scorer_is_at_chance(count):
    generator = np.random.default_rng(3)
    pairs = [zr.Pair((str(i // 2),), str(i % 2), Path(f"p{i}"), Path(f"n{i}")) for i in range(count)]
    scores = {path: float(generator.normal()) for path in zr.pair_files(pairs)}
    result = zr.accuracy(pairs, scores)
    assert abs(result["accuracy"] - 0.5) < 0.03
    assert result["interval"][0] <= 0.5 <= result["interval"][1] or abs(result["accuracy"] - 0.5) < 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_and_never_decides(sets, bad):
    pairs = zr.read_storycloze(sets / "sSC")
    scores = _scores(pairs, [1, 1])
    scores[pairs[0].negative] = bad
    with pytest.raises(ValueError, match=r"3_aa-1_incorrect.wav: `score="):
        zr.accuracy(pairs, scores)
    del scores[pairs[0].negative]
    with pytest.raises(KeyError, match=r"3_aa-1_incorrect\.wav"):
        zr.accuracy(pairs, scores)


@pytest.mark.parametrize(
    ("text", "band"),
    [("0", "oov"), ("0.5", "oov"), ("1", "1-4"), ("4", "1-4"), ("5", "5-19"), ("20", "20-99"), ("100", "100+"), ("", ""), ("nan", "")],
)
def test_frequency_bands_include_their_lower_edge(tmp_path, text, band):
    folders.make_swuggy(tmp_path)
    _edit_gold(tmp_path / "lexical" / "dev", lambda rows: [row.update(frequency=text) for row in rows])
    assert {pair.group for pair in zr.read_swuggy(tmp_path)} == {band}


def _edit_gold(root, edit):
    path = root / "gold.csv"
    rows = list(csv.DictReader(path.open(newline="")))
    edit(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.append(dict(rows[0])), r"gold\.csv: .*of `\('0', "),
        (lambda rows: rows.pop(0), r"gold\.csv: .*there are 1"),
        (lambda rows: [row.pop("voice") for row in rows], r"rows\.0\.voice` is missing"),
        (lambda rows: rows[0].update(correct="yes"), r"rows\.0\.correct=yes"),
        (lambda rows: rows[0].update(filename="gone"), r"gold\.csv: `filename=gone"),
        (lambda rows: rows[0].update(filename="../gone"), r"rows\.0\.filename=\.\./gone"),
        (lambda rows: [row.update(frequency="often") for row in rows], r"rows\.0\.frequency=often"),
        (lambda rows: [row.update(frequency="-1") for row in rows], r"rows\.0\.frequency=-1"),
    ],
)
def test_a_broken_gold_file_is_named(tmp_path, edit, message):
    folders.make_swuggy(tmp_path)
    _edit_gold(tmp_path / "lexical" / "dev", edit)
    with pytest.raises(ValueError, match=message):
        zr.read_swuggy(tmp_path)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"found no gold.csv"):
        zr.read_swuggy(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        zr.read_storycloze(tmp_path / "none")
    story = folders.make_storycloze(tmp_path / "story")
    (story / "2_bb-2_correct.wav").rename(story / "4_cc-3_correct.wav")
    with pytest.raises(ValueError, match="`bb-2` there are 1"):
        zr.read_storycloze(story)
    (story / "4_cc-3_correct.wav").rename(story / "4_aa-1_correct.wav")
    with pytest.raises(ValueError, match="`aa-1` there are 3"):
        zr.read_storycloze(story)
    (story / "4_aa-1_correct.wav").rename(story / "other.wav")
    with pytest.raises(ValueError, match=r"other.wav: the name must be"):
        zr.read_storycloze(story)
    salmon = folders.make_salmon(tmp_path / "salmon", ("bg_alignment",))
    (salmon / "bg_alignment" / "sample_2_1.wav").unlink()
    with pytest.raises(ValueError, match="`2` there are 1"):
        zr.read_salmon(salmon, ["bg_alignment"])


def test_submission_has_a_line_for_every_file(sets, tmp_path):
    pairs = zr.read_swuggy(sets / "sLM21")
    scores = _scores(pairs, [1] * 10)
    path = zr.write_submission(tmp_path / "lexical" / "dev.txt", scores)
    lines = dict(line.split(" ") for line in path.read_text().splitlines())
    assert len(lines) == 20
    assert all(float(lines[audio.stem]) == value for audio, value in scores.items())


def test_the_table_sets_this_model_beside_the_published_rows():
    rows = zr.comparison_table({"swuggy": 0.7, "sstorycloze": 0.6}, "mine")
    assert rows[0] == {"name": "mine", "swuggy": 70.0, "sstorycloze": 60.0}
    assert rows[-1] == {"name": "chance", "swuggy": 50.0, "sstorycloze": 50.0}
    assert {"name": "TWIST-7B", "swuggy": 73.5, "sstorycloze": 55.3} in rows


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(1.0, 2.0, 60), seed=trial, resamples=300)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_paired_test_by_hand():
    # of the 2^3 sign patterns only +++ and --- reach the mean of (1, 2, 3)
    assert paired_test([1.0, 2.0, 3.0])["p"] == 0.25
    assert paired_test([1.0, -1.0, 1.0, -1.0])["p"] == 1.0
    large = paired_test(np.random.default_rng(0).normal(0.5, 1.0, 100))
    assert large["p"] < 0.01
    assert paired_test([0.3]) == {"mean": 0.3, "interval": None, "p": None, "pairs": 1}

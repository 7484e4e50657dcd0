"""Dialogue behavior on signals whose turns are known, and on a real recording."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.data.recordings import read_manifest
from modeling_moshi_ttt.data.voice import voice_activity
from modeling_moshi_ttt.evaluation import behavior

RATE = 16000
DIALOGUES = Path(__file__).parents[1] / "examples" / "data" / "dialogues"


def _tone(segments, seconds):
    time = np.arange(round(seconds * RATE)) / RATE
    voice = 0.3 * np.sin(2 * np.pi * 180 * time)
    gate = np.zeros_like(time)
    for start, end in segments:
        gate[round(start * RATE) : round(end * RATE)] = 1
    return (voice * gate + 1e-5).astype(np.float32)


def test_voice_activity_finds_the_turns_and_bridges_short_pauses():
    samples = _tone([(0.5, 1.0), (1.2, 2.0), (3.0, 3.06), (5.0, 6.0)], 8)
    assert voice_activity(samples, RATE) == [pytest.approx((0.5, 2.0), abs=0.021), pytest.approx((5.0, 6.0), abs=0.021)]
    assert voice_activity(np.zeros(RATE, np.float32), RATE) == []
    assert voice_activity(np.zeros(3, np.float32), RATE) == []
    with pytest.raises(ValueError, match="one channel"):
        voice_activity(np.zeros((2, 5)), RATE)


def test_behavior_by_hand():
    # user 1-3 and 6-7, Moshi 2.5-4 (barges in) and 7.5-9, ten seconds
    stereo = np.stack([_tone([(2.5, 4.0), (7.5, 9.0)], 10), _tone([(1.0, 3.0), (6.0, 7.0)], 10)])
    result = behavior.behavior_of(stereo, RATE, text="hello there you", reference="hello you")
    assert result.reply_delays == [0.0, pytest.approx(0.5, abs=0.03)]
    assert result.unanswered == 0
    assert result.greeting == pytest.approx(2.5, abs=0.021)
    assert result.overlap == pytest.approx(0.05, abs=0.005)
    assert result.silence == pytest.approx(1 - (3 + 3 - 0.5) / 10, abs=0.01)
    assert result.words_per_minute == 18.0
    assert (result.word_errors, result.reference_words) == (1, 2)


def test_a_turn_without_answer_is_counted_not_guessed():
    delays, unanswered = behavior.reply_delays([(0.0, 1.0), (4.0, 5.0), (30.0, 31.0)], [(5.5, 6.0), (50.0, 51.0)])
    assert delays == [0.5]
    assert unanswered == 2
    assert behavior.summarize([behavior.behavior_of(np.zeros((2, RATE), np.float32), RATE)])["reply delay, median s"] is None


def _slow_edit_distance(a, b):
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
@settings(max_examples=150, deadline=None)
def test_word_errors_are_the_edit_distance(reference, hypothesis):
    assert behavior.word_errors(reference, hypothesis) == _slow_edit_distance(reference, hypothesis)


def test_words_of_any_script():
    assert behavior.normalize_words("Hello, it’s  NAÏVE — 10 東京!") == ["hello", "it's", "naïve", "10", "東京"]


def test_summary_weighs_words_and_time():
    make = behavior.Behavior
    row = behavior.summarize([make(10.0, [1.0], 0, 0.5, 0.1, 0.2, 60.0, 1, 10), make(30.0, [2.0, 4.0], 1, 1.5, 0.3, 0.6, 120.0, 9, 10)])
    assert row["reply delay, median s"] == 2.0
    assert row["turns answered, share"] == 0.75
    assert row["overlap, share"] == pytest.approx(0.25)
    assert row["silence, share"] == pytest.approx(0.5)
    assert row["words a minute"] == pytest.approx(105.0)
    assert row["word error rate"] == 0.5


def test_a_real_recording_has_turns_on_both_sides():
    recording = read_manifest(DIALOGUES / "eval.jsonl")[0]
    samples = read_audio(recording.path, 24000)
    result = behavior.behavior_of(samples, 24000)
    assert result.duration == pytest.approx(recording.duration, abs=0.01)
    assert len(result.reply_delays) >= 1
    assert result.overlap < 0.2 < 1 - result.silence

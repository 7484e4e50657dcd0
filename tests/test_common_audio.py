"""Sound files and recordings: what is read is what was written, and every bad file is named."""

import json

import numpy as np
import pytest
import soundfile

from modeling_moshi_ttt.data.audio import read_audio, write_audio
from modeling_moshi_ttt.data.recordings import read_manifest
from modeling_moshi_ttt.data.word_files import parse_words, read_words


def tone(seconds=1.0, rate=24000, channels=2):
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 220 * (c + 1) * t) for c in range(channels)]).astype(np.float32)


def test_write_then_read(tmp_path):
    sound = tone()
    write_audio(tmp_path / "a.wav", sound, 24000)
    assert np.abs(read_audio(tmp_path / "a.wav") - sound).max() < 1e-4
    part = read_audio(tmp_path / "a.wav", start=0.25, duration=0.5)
    assert part.shape == (2, 12000)
    assert np.abs(part - sound[:, 6000:18000]).max() < 1e-4
    assert read_audio(tmp_path / "a.wav", start=0.75, duration=5).shape == (2, 6000)


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 48000])
def test_resampling_keeps_time_and_pitch(tmp_path, rate):
    soundfile.write(tmp_path / "a.flac", tone(rate=rate).T, rate)
    sound = read_audio(tmp_path / "a.flac")
    assert sound.shape == (2, 24000)
    assert np.abs(sound - tone())[:, 500:-500].max() < 0.02


def test_bad_sounds_are_named(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not a sound")
    soundfile.write(tmp_path / "nan.wav", np.full((100, 2), np.nan), 24000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 24000)
    soundfile.write(tmp_path / "short.wav", np.zeros((2400, 2)), 24000)
    for name, message in [("empty", "0 bytes"), ("text", "cannot be read"), ("nan", "NaN"), ("none", "no samples|cannot be read")]:
        with pytest.raises(ValueError, match=rf"{name}\.wav: .*({message})"):
            read_audio(tmp_path / f"{name}.wav")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        read_audio(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match="ends at 0.100 s"):
        read_audio(tmp_path / "short.wav", start=0.2)
    with pytest.raises(ValueError, match="NaN"):
        write_audio(tmp_path / "x.wav", np.full(10, np.nan), 24000)
    with pytest.raises(ValueError, match="not empty"):
        write_audio(tmp_path / "x.wav", np.zeros(0), 24000)


def manifest(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_manifest_with_words(tmp_path):
    write_audio(tmp_path / "a.wav", tone(), 24000)
    words = [["b", [0.5, 0.6], "SPEAKER_USER"], ["a", [0.1, 0.2], "SPEAKER_MAIN"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": words}))
    write_audio(tmp_path / "b.wav", tone(), 24000)
    one, two = read_manifest(manifest(tmp_path, {"path": "a.wav", "duration": 1}, "", {"path": "b.wav", "duration": 1.0}))
    assert one.words == (("a", (0.1, 0.2), "SPEAKER_MAIN"), ("b", (0.5, 0.6), "SPEAKER_USER"))
    assert two.words is None
    assert two.path == tmp_path / "b.wav"


def test_other_word_layout(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps([{"speaker": "A", "word": "hai", "start": 1, "end": 2}]))
    assert read_words(tmp_path / "w.json")[0] == (("hai", (1.0, 2.0), "SPEAKER_MAIN"),)
    many = "[" * 100_000
    huge = f'[["a", [1{"0" * 400}, 2], "x"]]'
    for bad in ("{}", "[[1]]", '[["a", [1], "x"]]', '[["a", [1, NaN], "x"]]', "{", '[["\\ud83d", [1, 2], "x"]]', many, huge):
        (tmp_path / "w.json").write_text(bad)
        with pytest.raises(ValueError, match=r"w\.json"):
            read_words(tmp_path / "w.json")


def test_bad_manifest_lines_are_reported_together(tmp_path):
    write_audio(tmp_path / "a.wav", tone(), 24000)
    lines = ["{", {"path": "gone.wav", "duration": 1}, {"path": "../a.wav", "duration": 1}, {"path": "a.wav", "duration": -1}]
    path = manifest(tmp_path, *lines, {"path": str(tmp_path / "a.wav"), "duration": 1}, {"path": "a.wav", "duration": 1})
    with pytest.raises(ValueError, match="line 1: not JSON(.|\n)*line 2: (.|\n)*line 3: (.|\n)*line 4: (.|\n)*line 5") as error:
        read_manifest(path)
    assert "line 6" not in str(error.value)
    problems = []
    assert len(read_manifest(path, problems=problems)) == 1
    assert len(problems) == 5
    assert len(read_manifest(path, allow_outside=True, problems=[])) == 2


@pytest.mark.parametrize("index", [-1, 2, 1e999, "x", None])
def test_an_utterance_of_no_channel_is_refused(tmp_path, index):
    utterance = {"speaker_idx": index, "tts_text": "a b", "start_time": 0, "end_time": 1}
    with pytest.raises(ValueError, match=r"w.json: utterance 0 .* it must hold speaker_idx \(0 or 1\)"):
        parse_words(tmp_path / "w.json", {"utterances": [utterance]})


def test_unreadable_lines_are_reported_with_the_others(tmp_path):
    path = manifest(tmp_path, '{"path": "\\ud83d.wav", "duration": 1}', "[" * 100_000)
    with pytest.raises(ValueError, match="line 1: not JSON .*half a character(.|\n)*line 2: not JSON .*nested too deep"):
        read_manifest(path)
    path.write_bytes(b'{"path": "\xe9.wav"}')
    with pytest.raises(ValueError, match=r"jsonl is not a text file in UTF-8"):
        read_manifest(path)


def test_missing_and_empty_manifests(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        read_manifest(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="empty"):
        read_manifest(manifest(tmp_path, ""))

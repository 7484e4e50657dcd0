"""A sound can end the process that decodes it, and nothing else."""

import os
import struct

import numpy as np
import pytest

from modeling_moshi_ttt.data import sound_worker
from modeling_moshi_ttt.data.audio import audio_duration, audio_pieces, read_audio, write_audio
from modeling_moshi_ttt.data.sound_worker import in_worker, pieces_in_worker


def wav(rate: int) -> bytes:
    samples = np.zeros(4800, "<i2").tobytes()
    head = struct.pack("<IHHIIHH", 16, 1, 2, rate, (rate * 4) & 0xFFFFFFFF, 4, 16)
    return b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVEfmt " + head + b"data" + struct.pack("<I", len(samples)) + samples


def test_samples_and_errors_are_those_of_this_process(tmp_path, monkeypatch):
    before = max(len(sound_worker._idle), 1)
    write_audio(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, (2, 4800)), 24000)
    for arguments in ((24000,), (16000,), (24000, 0.05, 0.1)):
        np.testing.assert_array_equal(in_worker(read_audio, tmp_path / "a.wav", *arguments), read_audio(tmp_path / "a.wav", *arguments))
    assert in_worker(audio_duration, tmp_path / "a.wav") == audio_duration(tmp_path / "a.wav")
    pieces = list(pieces_in_worker(audio_pieces, tmp_path / "a.wav", 24000, 0.05))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces, 1), read_audio(tmp_path / "a.wav"))
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        in_worker(read_audio, tmp_path / "gone.wav")
    (tmp_path / "zero.wav").write_bytes(wav(0))  # at which a decoder written in Rust panics
    for function in (audio_duration, read_audio):
        with pytest.raises(ValueError, match=r"zero\.wav"):
            in_worker(function, tmp_path / "zero.wav")
    assert len(sound_worker._idle) == before  # one worker has heard it all
    monkeypatch.chdir(tmp_path)  # where the worker does not stand
    assert in_worker(audio_duration, "a.wav") == audio_duration("a.wav")
    next(pieces_in_worker(audio_pieces, tmp_path / "a.wav", 24000, 0.05))  # left before its end: that worker goes
    np.testing.assert_array_equal(in_worker(read_audio, tmp_path / "a.wav"), read_audio(tmp_path / "a.wav"))


def test_a_worker_that_dies_is_named_by_its_file_and_another_takes_its_place(tmp_path, monkeypatch):
    write_audio(tmp_path / "a.wav", np.zeros((2, 4800)), 24000)
    first = in_worker(read_audio, tmp_path / "a.wav")
    os.kill(sound_worker._idle[-1].process.pid, 9)
    with pytest.raises(ValueError, match=r"a\.wav: the sound cannot be read"):
        in_worker(read_audio, tmp_path / "a.wav")
    np.testing.assert_array_equal(in_worker(read_audio, tmp_path / "a.wav"), first)
    os.kill(sound_worker._idle[-1].process.pid, 19)  # stopped, as one that never ends
    monkeypatch.setattr(sound_worker, "SILENT", 0.2)
    with pytest.raises(ValueError, match=r"a\.wav: .*nothing for 0.2 s"):
        in_worker(read_audio, tmp_path / "a.wav")

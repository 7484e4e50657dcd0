"""Sounds of every format and rate are exact where they begin and end; what asks for too much is named, in memory that does not grow."""

import os
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from modeling_moshi_ttt.data import limits
from modeling_moshi_ttt.data.audio import SOUND_SUFFIXES, audio_duration, audio_pieces, in_pieces, read_audio

SNDFILE = [
    *(("wav", "WAV", "PCM_16", rate) for rate in (8_000, 44_100, 192_000)),
    *(("flac", "FLAC", "PCM_16", rate) for rate in (8_000, 22_050, 96_000, 192_000)),
    *(("mp3", "MP3", None, rate) for rate in (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)),
    *(("ogg", "OGG", "VORBIS", rate) for rate in (8_000, 44_100, 192_000)),
    *(("opus", "OGG", "OPUS", rate) for rate in (8_000, 16_000, 24_000, 48_000)),
    ("aiff", "AIFF", "PCM_16", 48_000),
]
CONTAINERS = [("m4a", "aac", 8_000), ("m4a", "aac", 44_100), ("m4a", "aac", 96_000), ("mp4", "aac", 48_000), ("webm", "libopus", 48_000)]
ADTS = [("aac", "aac", rate) for rate in (8_000, 16_000, 44_100, 96_000)]


def tones(rate, seconds=4.03):
    """Tones from 0.5 s to 3.5 s, silence around them: float32 [2, n]."""
    t = np.arange(int(rate * seconds)) / rate
    both = 0.3 * np.sin(2 * np.pi * np.array([[1000], [1330]]) * t) * ((t >= 0.5) & (t < 3.5))
    return both.astype(np.float32)


def check_exact(path, rate, samples, padding=0):
    sound = read_audio(path)
    loud = np.flatnonzero(np.abs(sound[0]) > 0.15) / 24_000
    assert abs(loud[0] - 0.5) < 1e-3
    assert abs(loud[-1] - 3.5) < 1e-3
    assert -max(1, 24_000 / rate) <= sound.shape[1] - samples * 24_000 / rate <= max(1, 24_000 / rate) * (padding + 1)
    assert -1 <= audio_duration(path) * rate - samples <= padding + 1
    assert np.array_equal(np.concatenate(list(audio_pieces(path, 24_000, 0.7)), 1).shape, sound.shape)


@pytest.mark.parametrize(("suffix", "form", "subtype", "rate"), SNDFILE)
def test_tones_stand_where_they_were_put(tmp_path, suffix, form, subtype, rate):
    sound = tones(rate)
    soundfile.write(tmp_path / f"a.{suffix}", sound.T, rate, format=form, subtype=subtype)
    check_exact(tmp_path / f"a.{suffix}", rate, sound.shape[1])


def encode(path, codec, rate, sound, format=None):
    """A container as ffmpeg writes it, by PyAV."""
    import av

    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.start_encoding()
        pieces = av.AudioResampler(format=stream.format.name, layout="stereo", rate=rate, frame_size=stream.codec_context.frame_size)
        for piece in (*pieces.resample(frame), *pieces.resample(None), None):
            container.mux(stream.encode(piece))


@pytest.mark.parametrize(("suffix", "codec", "rate"), CONTAINERS)
def test_containers_stand_where_they_were_put(tmp_path, suffix, codec, rate):
    pytest.importorskip("av", reason="PyAV, of the extra m4a, reads containers")
    sound = tones(rate)
    encode(tmp_path / f"a.{suffix}", codec, rate, sound)
    check_exact(tmp_path / f"a.{suffix}", rate, sound.shape[1])
    part = read_audio(tmp_path / f"a.{suffix}", start=0.4, duration=0.3)
    assert np.abs(part - read_audio(tmp_path / f"a.{suffix}")[:, 9600:16800]).max() < 1e-5


@pytest.mark.parametrize(("suffix", "codec", "rate"), ADTS)
def test_aac_without_a_container_ends_with_its_last_packet(tmp_path, suffix, codec, rate):
    """The format states no length: the last packet's samples are all that is there beyond what was put in."""
    pytest.importorskip("av", reason="PyAV, of the extra m4a, reads AAC")
    sound = tones(rate)
    encode(tmp_path / f"a.{suffix}", codec, rate, sound, format="adts")
    check_exact(tmp_path / f"a.{suffix}", rate, sound.shape[1], padding=1024)


def test_without_pyav_a_container_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.m4a: .*moshi-ttt\[m4a\]"):
        read_audio(tmp_path / "a.m4a")


def header(rate=24_000, channels=2, size=96_000):
    """The header of a 16-bit WAV that states `size` bytes of samples."""
    block = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * block) & 0xFFFFFFFF, block, 16)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(rate=0) + bytes(96_000), "rate is 0|cannot be read"),
        (header(rate=1_000) + bytes(96_000), "rate is 1000 Hz; it must be 4000 to 384000 Hz"),
        (header(rate=15_485_863) + bytes(96_000), "rate is 15485863 Hz"),
        (header(channels=1000) + bytes(96_000), "1000 channels|cannot be read"),
        (b"fLaC" + bytes(100), "cannot be read"),
        (b"", "0 bytes"),
        (b"OggS" * 50, "cannot be read"),
    ],
)
def test_headers_that_ask_for_too_much_are_named(tmp_path, data, message):
    (tmp_path / "a.wav").write_bytes(data)
    for read in (read_audio, audio_duration, lambda path: next(audio_pieces(path, 24_000, 1.0))):
        with pytest.raises(ValueError, match=rf"a\.wav: .*({message})"):
            read(tmp_path / "a.wav")


def test_pipes_and_devices_are_no_sounds(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    for path in (tmp_path / "a.wav", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="no such sound file"):
            audio_duration(path)


def test_a_day_is_the_longest_recording(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros((48_000, 2)), 24_000)
    monkeypatch.setattr(limits, "LONGEST_WHOLE", 1.5)
    with pytest.raises(ValueError, match=r"a\.wav: .* read at once"):
        read_audio(tmp_path / "a.wav")
    assert sum(piece.shape[1] for piece in audio_pieces(tmp_path / "a.wav", 24_000, 0.3)) == 48_000
    monkeypatch.setattr(limits, "LONGEST_RECORDING", 1.5)
    with pytest.raises(ValueError, match=r"a\.wav: it states .* cut it"):
        next(audio_pieces(tmp_path / "a.wav", 24_000, 0.3))


@pytest.mark.parametrize("sizes", [[5], [3, 3, 4], [0, 12, 1], [6, 6], [1] * 13])
def test_pieces_are_of_one_size(sizes):
    whole = np.arange(sum(sizes))[None]
    pieces = list(in_pieces(np.split(whole, np.cumsum(sizes)[:-1], axis=1), 6))
    assert np.array_equal(np.concatenate(pieces, 1), whole)
    assert all(piece.shape[1] == 6 for piece in pieces[:-1])
    assert 0 < pieces[-1].shape[1] <= 6


LONG = """
import resource, sys
import numpy as np, soundfile, torch
from modeling_moshi_ttt.data.audio import audio_pieces
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples = sum(piece.shape[1] for piece in audio_pieces(sys.argv[1], 24000, 10.0))
print(samples, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def peak(path):
    said = subprocess.run([sys.executable, "-c", LONG, str(path)], capture_output=True, text=True, check=True).stdout.split()
    return int(said[0]), int(said[1])


@pytest.mark.parametrize("hours", [0.2, pytest.param(10, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_a_recording(tmp_path, hours):
    """A FLAC of silence, which takes next to nothing on disk: 300 MB more than before at most, for 10 hours too."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 16_000, 2, format="FLAC") as file:
        for _ in range(round(hours * 60)):
            file.write(np.zeros((60 * 16_000, 2), np.int16))
    samples, grown = peak(tmp_path / "a.flac")
    assert samples == round(hours * 60) * 60 * 24_000
    assert grown <= 300


def test_every_suffix_that_is_read_has_a_test():
    tested = {f".{suffix}" for suffix, *_ in (*SNDFILE, *CONTAINERS, *ADTS)}
    assert set(SOUND_SUFFIXES) - tested == {".oga", ".aif", ".mka"}  # other names of formats that are tested

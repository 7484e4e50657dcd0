"""One change of rate for all: pieces of a stream, windows of a file and whole sounds hold the same samples."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_moshi_ttt.data import long_recordings as books
from modeling_moshi_ttt.data.audio import audio_pieces, read_audio
from modeling_moshi_ttt.resampling import Resampler, resample, source_window

RATES = [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000]


def noise(rows, n, seed=0):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 0.1


def decibels(found, expected):
    """How far the largest difference lies below the largest sample."""
    assert found.shape == expected.shape
    return 20 * np.log10(
        max(float(np.abs(np.asarray(found) - np.asarray(expected)).max()), 1e-12) / float(np.abs(np.asarray(expected)).max())
    )


def streamed(resampler, pieces):
    return torch.cat([*[resampler.push(piece) for piece in pieces], resampler.flush()], 1)


@pytest.mark.parametrize("rate", [*RATES, 23_999])
@pytest.mark.parametrize("down", [True, False])
def test_frames_of_80_ms_are_the_whole_at_90_db(rate, down):
    old, new = (rate, 24_000) if down else (24_000, rate)
    audio = noise(3, old // 2 + 17)
    assert decibels(streamed(Resampler(old, new, 3), audio.split(old * 8 // 100, 1)), resample(audio, old, new)) < -90


@given(st.sampled_from([*RATES, 24_000]), st.booleans(), st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(0, 11))
@settings(max_examples=60, deadline=None)
def test_pieces_of_any_sizes_are_the_whole_also_over_a_saved_state(rate, down, sizes, saved):
    old, new = (rate, 24_000) if down else (24_000, rate)
    audio = noise(2, sum(sizes), seed=len(sizes))
    whole = resample(audio, old, new)
    resampler, found = Resampler(old, new, 2), []
    for number, piece in enumerate(audio.split(sizes, 1)):
        if number == saved:
            state, resampler = {name: value.clone() for name, value in resampler.state_dict().items()}, Resampler(old, new, 2)
            resampler.load_state_dict(state)
        found.append(resampler.push(piece))
    found = torch.cat([*found, resampler.flush()], 1)
    assert found.shape == whole.shape == (2, -(-audio.shape[1] * new // old))
    assert torch.allclose(found, whole, atol=1e-6)
    assert torch.allclose(streamed(resampler, [audio]), whole, atol=1e-6)  # after its flush a stream begins anew


def test_an_output_waits_for_no_more_than_the_latency():
    for old, new in ((48_000, 24_000), (8_000, 24_000), (44_100, 24_000)):
        resampler = Resampler(old, new)
        out = resampler.push(noise(1, old))
        assert out.shape[1] == -(-(old - resampler.latency) * new // old)
        assert resampler.latency / old < 0.005


@given(st.sampled_from(RATES), st.integers(0, 40_000), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_a_window_with_its_context_is_part_of_the_whole(rate, start, length):
    audio = noise(1, rate * 2)
    whole = resample(audio, rate, 24_000)
    stop = min(start + length, whole.shape[1])
    begin, end, skip = source_window(rate, 24_000, start, stop)
    part = resample(audio[:, begin:end], rate, 24_000)[:, skip : skip + stop - start]
    assert part.shape == (1, stop - start)
    assert torch.allclose(part, whole[:, start:stop], atol=1e-6)


def test_rates_that_cannot_be_are_refused():
    for old, new in ((0, 24_000), (24_000, 0.5), (-1, 24_000)):
        with pytest.raises(ValueError, match="whole numbers of Hz"):
            Resampler(old, new)
    with pytest.raises(ValueError, match=r"15485863 Hz to 24000 Hz .* taps; bring the sound to a usual rate"):
        Resampler(15_485_863, 24_000)
    with pytest.raises(ValueError, match=r"must be \[B, n\] with B = 2"):
        Resampler(48_000, 24_000, 2).push(noise(1, 10))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("form", ["flac", "ogg", "mp3"])
def test_parts_of_a_file_are_the_whole_file(tmp_path, rate, form):
    path = tmp_path / f"a.{form}"
    soundfile.write(path, noise(2, rate * 5 + 123).numpy().T, rate)
    whole = read_audio(path)
    assert whole.shape[1] == -(-(rate * 5 + 123) * 24_000 // rate)
    windows = [read_audio(path, start=start, duration=0.7) for start in np.arange(0, 5, 0.7)]
    assert decibels(np.concatenate(windows, 1), whole) < -90
    assert decibels(np.concatenate(list(audio_pieces(path, 24_000, 0.5)), 1), whole) < -90


def test_a_file_of_an_absurd_rate_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 15_485_863)
    for read in (read_audio, lambda path: next(audio_pieces(path, 24_000, 1.0))):
        with pytest.raises(ValueError, match=r"a\.wav: its rate is 15485863 Hz; it must be 4000 to 384000 Hz"):
            read(tmp_path / "a.wav")


def test_long_sources_have_no_seam_every_ten_seconds(tmp_path):
    """A tone of full scale: joins used to click with a quarter of it."""
    rate, seconds = 44_100, 31
    tone = 0.5 * np.sin(2 * np.pi * 997 * np.arange(rate * seconds) / rate)
    soundfile.write(tmp_path / "a.flac", tone, rate, subtype="PCM_24")

    class Listener:
        """Stands for the processor and its stream: its codes are the samples."""

        sampling_rate, frame_size, frame_rate = 24_000, 1920, 12.5

        def new_audio_stream(self, _):
            return self

        def encode_frames(self, audio):
            return audio.unflatten(-1, (-1, self.frame_size)).transpose(1, 2)  # [B, 1920, T]

    heard = books.encode_book(Listener(), [tmp_path / "a.flac"]).moshi.T.flatten()[: 24_000 * seconds]
    expected = 0.5 * np.sin(2 * np.pi * 997 * np.arange(24_000 * seconds) / 24_000)
    assert decibels(heard[None], read_audio(tmp_path / "a.flac")) < -90
    assert np.abs(heard.numpy() - expected)[500:-500].max() < 1e-4

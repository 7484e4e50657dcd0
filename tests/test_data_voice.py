"""Voice activity on speech whose turns are known, under noise of every kind; what cannot be known is withheld with a reason."""

from pathlib import Path

import numpy as np
import pytest

from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.data.recordings import read_manifest
from modeling_moshi_ttt.data.voice import IndistinctVoice, voice_activity
from modeling_moshi_ttt.evaluation import behavior

RATE = 24000
DIALOGUES = Path(__file__).parents[1] / "examples" / "data" / "dialogues"
FRAME = 0.08  # seconds
NAMES = ["ana", "mei", "tom", "zoe", "sam"]


@pytest.fixture(scope="module")
def recordings():
    """Stereo dialogues of synthetic voices with digital silence between the turns, so that their own levels give the truth."""
    paths = {recording.path.stem: recording.path for name in ("train", "eval") for recording in read_manifest(DIALOGUES / f"{name}.jsonl")}
    return {name: read_audio(paths[name], RATE) for name in paths}


def noise(kind: str, samples: int, level: float, recordings, seed: int) -> np.ndarray:
    """`[N]` at `level` dBFS."""
    random = np.random.default_rng(seed)
    if kind == "hum":
        time = np.arange(samples) / RATE
        sound = sum(np.sin(2 * np.pi * 50 * k * time + random.uniform(0, 6)) / k for k in range(1, 8))
    elif kind == "babble":  # eight voices at once
        voices = [channel for name, both in recordings.items() if name not in NAMES for channel in both][:8]
        sound = sum(np.resize(np.roll(voice, random.integers(len(voice))), samples) for voice in voices)
    else:
        spectrum = np.fft.rfft(random.normal(size=samples))
        if kind == "pink":
            spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 20))
        sound = np.fft.irfft(spectrum, samples)
    return sound * 10 ** (level / 20) / np.sqrt(np.mean(sound**2))


def noisy(stereo, kind, level, recordings) -> np.ndarray:
    return np.stack([channel + noise(kind, len(channel), level, recordings, seed) for seed, channel in enumerate(stereo)]).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def clean(recordings):
    measured = [behavior.behavior_of(recordings[name], RATE) for name in NAMES]
    assert [one.withheld for one in measured] == [None] * len(NAMES)
    return measured


@pytest.mark.parametrize("kind", ["white", "pink", "hum", "babble"])
@pytest.mark.parametrize("level", [-70, -60, -50, -40, -35])
def test_what_is_reported_holds_at_any_noise_floor(recordings, clean, kind, level):
    """Beside the same dialogues without noise: reply delay within a frame of 80 ms, overlap and silence within 2% (pink noise at -35 dBFS:
    2.5%); babble that comes too near to the voices is named, and its numbers are withheld."""
    found = [behavior.behavior_of(noisy(recordings[name], kind, level, recordings), RATE) for name in NAMES]
    if (kind, level) == ("babble", -35):
        withheld = [one for one in found if one.withheld is not None]
        assert len(withheld) >= 4
        assert all("too little to be told" in one.withheld for one in withheld)
        assert all(one.overlap is one.silence is one.greeting is None and not one.reply_delays for one in withheld)
        return
    assert [one.withheld for one in found] == [None] * len(NAMES)
    ours, truth = behavior.summarize(found), behavior.summarize(clean)
    assert abs(ours["reply delay, median s"] - truth["reply delay, median s"]) <= FRAME
    assert abs(ours["first sound, median s"] - truth["first sound, median s"]) <= FRAME
    assert abs(ours["overlap, share"] - truth["overlap, share"]) <= 0.02
    assert abs(ours["silence, share"] - truth["silence, share"]) <= (0.025 if (kind, level) == ("pink", -35) else 0.02)
    if level <= -60:
        for one, other in zip(found, clean):
            assert np.allclose(one.reply_delays, other.reply_delays, atol=FRAME)
            assert one.silence == pytest.approx(other.silence, abs=0.01)


def test_a_channel_without_voice_has_none_whatever_its_floor():
    for level in (-90, -60, -40):
        assert voice_activity(noise("white", 10 * RATE, level, {}, 0), RATE) == []  # a floor alone
    assert voice_activity(np.zeros(5 * RATE), RATE) == []


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (0.1 * np.random.default_rng(0).normal(size=10 * RATE), "floor of -20 dBFS may hide a voice"),
        (np.sin(np.arange(10 * RATE) / 20) * np.linspace(0.05, 0.5, 10 * RATE), "may hide a voice|pause|too little"),
    ],
    ids=["loud noise", "a tone that swells"],
)
def test_what_cannot_be_told_apart_is_withheld(samples, words):
    with pytest.raises(IndistinctVoice, match=words):
        voice_activity(samples, RATE)


def test_withheld_numbers_are_null_with_a_reason(recordings):
    loud = 0.1 * np.random.default_rng(0).normal(size=recordings["ana"].shape)
    withheld = behavior.behavior_of(recordings["ana"] * [[0], [1]] + loud * [[1], [0]], RATE, text="a b", reference="a b")
    assert withheld.withheld.startswith("Moshi's channel: a floor of -20 dBFS")
    good = behavior.behavior_of(recordings["mei"], RATE, text="a", reference="a b")
    both = behavior.summarize([withheld, good])
    assert both["withheld"].startswith("1 of 2 recordings: Moshi's channel")
    assert both["overlap, share"] == pytest.approx(good.overlap)
    assert both["word error rate"] == 0.25
    alone = behavior.summarize([withheld])
    assert [alone[name] for name in alone if name not in ("words a minute", "word error rate", "withheld")] == [None] * 5

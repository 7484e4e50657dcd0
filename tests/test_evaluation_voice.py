"""Voice activity over noise floors: turns of real speech at known times, in digital silence, under noise of every kind."""

from pathlib import Path

import numpy as np
import pytest

from modeling_moshi_ttt.common.audio import read_audio
from modeling_moshi_ttt.evaluation import dialogue
from modeling_moshi_ttt.evaluation.report import dialogue_section
from modeling_moshi_ttt.evaluation.voice import IndistinctVoice, bridge, voice_activity

RATE = 24000
STEREO = Path(__file__).parents[1] / "examples" / "data" / "dialogues" / "stereo"
NOISES = ("white", "pink", "hum", "babble")
FLOORS = (-70, -60, -50, -40, -35)
FRAME = 0.08  # seconds


def at_level(samples, decibels):
    """`samples` at this level, in dB full scale of their root mean square."""
    return (samples * 10 ** (decibels / 20) / np.sqrt(np.mean(samples**2))).astype(np.float32)


@pytest.fixture(scope="module")
def voices():
    """Turns of 0.8 to 3 s of the sample dialogues at -20 dBFS, cut where their voice begins and ends."""
    found = []
    for path in sorted(STEREO.glob("*.flac")):
        for channel in read_audio(path, RATE):
            for start, end in voice_activity(channel, RATE):
                turn = channel[round(start * RATE) : round(end * RATE)]
                level = np.sqrt(np.mean(turn[: len(turn) // 240 * 240].reshape(-1, 240) ** 2, axis=1))  # of 10 ms each
                loud = np.flatnonzero(level > level.max() / 18)  # a breath further than 25 dB below is not of the turn
                turn = turn[loud[0] * 240 : (loud[-1] + 1) * 240]
                if 0.8 * RATE < len(turn) < 3 * RATE:
                    found.append(at_level(turn, -20))
    return found


@pytest.fixture(scope="module")
def talks(voices):
    """(samples [2, N], the turns of both channels) of four dialogues; replies after 0.2 to 1.5 s, one turn in four barges in."""
    rng = np.random.default_rng(3)
    made = []
    for _ in range(4):
        at, placed = 0.6, []
        for turn in range(6):
            voice = voices[rng.integers(len(voices))]
            placed.append((turn % 2, round(at * RATE), voice))
            at += len(voice) / RATE + (-0.3 if turn % 4 == 2 else rng.uniform(0.2, 1.5))
        samples = np.zeros((2, max(start + len(voice) for _, start, voice in placed) + RATE), np.float32)
        turns = [[], []]
        for channel, start, voice in placed:
            samples[channel, start : start + len(voice)] += voice
            turns[channel].append((start / RATE, (start + len(voice)) / RATE))
        made.append((samples, [bridge(channel, 0.5) for channel in turns]))
    return made


def background(kind, length, decibels, seed):
    rng = np.random.default_rng(seed)
    times = np.arange(length) / RATE
    if kind == "white":
        return at_level(rng.normal(size=length), decibels)
    if kind == "pink":
        shape = 1 / np.sqrt(np.maximum(np.fft.rfftfreq(length, 1 / RATE), 20))
        return at_level(np.fft.irfft(np.fft.rfft(rng.normal(size=length)) * shape, length), decibels)
    if kind == "hum":
        return at_level(sum(np.sin(2 * np.pi * 50 * h * times + rng.uniform(0, 6)) / h for h in range(1, 9)), decibels)
    paths = sorted(STEREO.glob("*.flac"))
    mixed = np.zeros(length)
    for index in rng.permutation(len(paths))[:6]:  # six other dialogues, both sides
        both = at_level(read_audio(paths[index], RATE).sum(0), -20)
        mixed += np.resize(np.roll(both, rng.integers(len(both))), length)
    return at_level(mixed, decibels)


def noisy(samples, kind, decibels, seed=0):
    return np.stack([channel + background(kind, len(channel), decibels, 2 * seed + c) for c, channel in enumerate(samples)])


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("floor", FLOORS)
def test_turns_are_found_at_any_floor(talks, kind, floor):
    errors, found = [], []
    overlaps, silences, durations = [], [], []
    for seed, (samples, (moshi, user)) in enumerate(talks):
        found.append(dialogue.measure(noisy(samples, kind, floor, seed), RATE))
        delays, unanswered = dialogue.reply_delays(user, moshi)
        assert (len(found[-1].reply_delays), found[-1].unanswered) == (len(delays), unanswered)
        errors += [abs(a - b) for a, b in zip(found[-1].reply_delays, delays)]
        overlap, silence = dialogue.shares(moshi, user, found[-1].duration)
        overlaps, silences, durations = [*overlaps, overlap], [*silences, silence], [*durations, found[-1].duration]
    row = dialogue.summarise(found)
    assert row["overlap, share"] == pytest.approx(np.average(overlaps, weights=durations), abs=0.02)
    assert row["silence, share"] == pytest.approx(np.average(silences, weights=durations), abs=0.02)
    assert np.median(errors) < FRAME / 2
    assert max(errors) < FRAME


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("floor", FLOORS)
def test_a_channel_without_voice_has_none(kind, floor):
    assert voice_activity(background(kind, 15 * RATE, floor, 5), RATE) == []


@pytest.mark.parametrize(("kind", "level"), [("white", -15), ("pink", -20), ("babble", -20), ("babble", -25)])
def test_a_voice_as_loud_as_its_noise_is_withheld(talks, kind, level):
    samples = noisy(talks[0][0], kind, level)
    found = dialogue.measure(samples, RATE, text="hello", reference="hello")
    assert found.withheld.startswith("Moshi's channel: ")
    assert (found.reply_delays, found.unanswered, found.overlap, found.silence, found.greeting) == ([], 0, None, None, None)
    assert found.word_errors == 0  # what needs no voice is there
    with pytest.raises(IndistinctVoice, match="dBFS|floor"):
        voice_activity(samples[0], RATE)


@pytest.mark.parametrize("level", [-10, -25])
def test_what_never_pauses_is_not_all_voice(level):
    for sound in (background("white", 8 * RATE, level, 0), background("hum", 8 * RATE, level, 0)):
        with pytest.raises(IndistinctVoice, match=rf"a floor of {level} dBFS may hide a voice"):
            voice_activity(sound, RATE)
    loud_talk = np.tile(at_level(np.random.default_rng(0).normal(size=RATE), level), 10)
    loud_talk[: RATE // 2] = 0
    with pytest.raises(IndistinctVoice, match="without a pause in 9.% of the time"):
        voice_activity(loud_talk, RATE)


def test_withheld_numbers_are_null_with_a_sentence(talks):
    clear = dialogue.measure(talks[0][0], RATE)
    noise = dialogue.measure(noisy(talks[0][0], "white", -15), RATE)
    row = dialogue.summarise([noise])
    assert [row[name] for name in ("reply delay, median s", "turns answered, share", "overlap, share", "silence, share")] == [None] * 4
    assert "leave out 1 of 1 recordings (Moshi's channel: " in row["withheld"]
    mixed, alone = dialogue.summarise([clear, noise]), dialogue.summarise([clear])
    assert alone["withheld"] is None
    assert {**mixed, "withheld": None} == alone
    part = {"kind": "dialogue", "recordings": 1, "reference": alone, "model": row}
    section = dialogue_section(part)
    assert ["overlap, share", f"{alone['overlap, share']:.3g}", "–"] in section["rows"]
    assert "This model: Delays, overlap and silence leave out 1 of 1 recordings" in section["note"]

"""The engine: callers in company equal to themselves alone, late and surplus sound, refusals, shedding, and conversations that are kept."""

import threading
import time

import numpy as np
import pytest
import torch
from live_client import FRAME, noise, without_a_clock
from tiny import speaking_model

from modeling_moshi_ttt import MoshiTTTSession
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.live import engine as home
from modeling_moshi_ttt.live.capacity import full_session, measured_rows, row_bytes
from modeling_moshi_ttt.live.conversations import ConversationStore
from modeling_moshi_ttt.live.engine import Beginning, Caller, Ended, Engine, EngineFull, Said


@pytest.fixture
def started(model, processor, tmp_path, monkeypatch):
    """Make engines that run without a clock, and stop them."""
    without_a_clock(monkeypatch)
    engines = []

    def start(rows: int, folder="kept", patience=10**6) -> Engine:
        engines.append(Engine(model, processor, rows, ConversationStore(tmp_path / folder, 3600, model, processor), patience))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


class Listener(list):
    """Keeps what it is told."""

    def __call__(self, event):
        self.append(event)

    def wait(self, count: int) -> list[Said]:
        deadline = time.monotonic() + 120
        while len(self) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(self) >= count
        return self[:count]


def said(events) -> tuple[np.ndarray, str]:
    return np.concatenate([event.pcm for event in events]), "".join(event.text for event in events)


def recorded(engine) -> list[torch.Tensor]:
    """Grows by the codes `[B, K]` of every step of the engine's stream; -2 in rows that did nothing."""
    steps, step = [], engine.session.stream.step

    def record(*args, **kwargs):
        frame = step(*args, **kwargs)
        steps.append(frame.audio_codes)
        return frame

    engine.session.stream.step = record
    return steps


def test_eight_callers_say_what_each_says_alone_and_the_ninth_is_refused(started, model, processor):
    """They come one after another, stand at different frames, and have settings of their own."""
    engine, sounds = started(8), [noise(6, seed) for seed in range(8)]
    settings = [{"seeds": [seed], "temperature": 0.5 + 0.1 * seed, "top_k": 20 + seed} for seed in range(8)]
    steps, listeners, callers = recorded(engine), [Listener() for _ in range(8)], []
    for sound, sampling, listener in zip(sounds, settings, listeners):
        callers.append(engine.join(listener, Beginning(sampling)))
        for frame in sound:
            callers[-1].hear(frame)
    with pytest.raises(EngineFull, match="all 8 places are taken"):
        engine.join(Listener())
    for caller, sound, sampling, listener in zip(callers, sounds, settings, listeners):
        pcm, text = said(listener.wait(6))
        alone, codes = MoshiTTTSession(model, processor, 1, **sampling), []
        step = alone.stream.step
        alone.stream.step = lambda *args, **kwargs: codes.append(step(*args, **kwargs)) or codes[-1]  # noqa: B023
        frames = [alone.step(torch.from_numpy(frame)[None]) for frame in sound]
        assert text == "".join(frame.text[0] for frame in frames)
        np.testing.assert_allclose(pcm, torch.cat([frame.pcm for frame in frames], 1)[0].numpy(), atol=1e-5)
        own = [step[caller.row] for step in steps if bool((step[caller.row] != -2).any())]
        assert torch.equal(torch.stack(own), torch.cat([frame.audio_codes for frame in codes]))
    assert engine.counts.refused == 1
    assert engine.counts.dropped == engine.counts.silent == 0


def test_a_kept_conversation_goes_on_in_another_engine_as_if_it_had_not_stopped(started):
    sound = noise(9, 1)
    whole, first, second = Listener(), Listener(), Listener()
    one = started(2)
    unbroken = one.join(whole, Beginning({"seeds": [5]}))
    caller = one.join(first, Beginning({"seeds": [5]}))
    for frame in sound:
        unbroken.hear(frame)
    for frame in sound[:4]:
        caller.hear(frame)
    first.wait(4)
    assert one.leave(caller)
    other = started(3)
    resumed = other.join(second, resume=caller.name)
    for frame in sound[4:]:
        resumed.hear(frame)
    pcm, text = said(first[:4] + second.wait(5))
    expected, words = said(whole.wait(9))
    np.testing.assert_allclose(pcm, expected, atol=1e-5)
    assert text == words
    kept, saved = one.session.row_state(unbroken.row), other.session.row_state(resumed.row)
    assert torch.equal(kept["stream.said"], saved["stream.said"])
    other.leave(resumed)


def test_who_resumes_a_conversation_that_goes_on_takes_it_over(started):
    """As when a line has died unnoticed: its caller comes back on another one."""
    engine, whole, first, second = started(2), Listener(), Listener(), Listener()
    sound, caller = noise(4, 1), engine.join(whole, Beginning({"seeds": [5]}))
    for frame in sound:
        caller.hear(frame)
    expected = said(whole.wait(4))[1]
    dead = engine.join(first, Beginning({"seeds": [5]}))
    for frame in sound[:2]:
        dead.hear(frame)
    first.wait(2)
    taken = engine.join(second, resume=dead.name)
    assert "elsewhere" in first.wait(3)[2].reason
    engine.leave(dead)
    for frame in sound[2:]:
        taken.hear(frame)
    assert said(first[:2] + second.wait(2))[1] == expected
    assert {other.name for other in engine.callers()} == {caller.name, taken.name}


@pytest.mark.parametrize("name", ["", "../kept", "A" * 22])
def test_a_conversation_that_is_not_kept_is_refused_in_words_and_frees_its_row(started, name):
    engine = started(1)
    with pytest.raises(MoshiTTTError, match="no conversation is kept"):
        engine.join(Listener(), resume=name)
    engine.leave(engine.join(Listener()))


def test_a_conversation_of_another_model_is_refused(started, model, processor, tmp_path):
    engine, listener = started(1), Listener()
    caller = engine.join(listener)
    caller.hear(noise(1, 0)[0])
    listener.wait(1)
    assert engine.leave(caller)
    other = ConversationStore(tmp_path / "kept", 3600, speaking_model(seed=1), processor)
    with pytest.raises(MoshiTTTError, match="of another model"):
        other.read(caller.name)
    ConversationStore(tmp_path / "kept", -1, model, processor).remove_old()
    with pytest.raises(MoshiTTTError, match="no conversation is kept"):
        other.read(caller.name)


def test_a_late_frame_pauses_its_row_and_after_a_few_silence_is_heard():
    caller, frame = Caller("name", print, False, FRAME), noise(1, 0)[0]
    assert caller.next_frame(3) is None  # not before its first sound
    caller.hear(frame[:700])
    assert caller.next_frame(3) is None
    caller.hear(frame[700:])
    assert np.array_equal(caller.next_frame(3)[1], frame)
    assert [caller.next_frame(3) for _ in range(3)] == [None] * 3
    assert not caller.next_frame(3)[1].any()
    assert (caller.late, caller.silent, caller.dropped) == (3, 1, 0)


def test_of_too_much_sound_the_oldest_is_dropped_and_counted():
    caller, frames = Caller("name", print, False, FRAME), noise(home.BACKLOG + 4, 0)
    caller.hear(np.concatenate(frames))
    assert caller.dropped == 4
    assert np.array_equal(caller.next_frame(0)[1], frames[4])


@pytest.mark.parametrize("sample", [float("nan"), float("inf"), 11.0])
def test_sound_that_is_no_sound_is_refused(sample):
    with pytest.raises(MoshiTTTError, match="not finite or beyond"):
        Caller("name", print, False, FRAME).hear(np.full(10, sample, np.float32))


def test_a_paused_caller_hears_nothing_and_goes_on_where_it_was(started):
    engine, listener, unbroken = started(2), Listener(), Listener()
    caller, other = (engine.join(x, Beginning({"seeds": [2]})) for x in (listener, unbroken))
    sound = noise(4, 3)
    for frame in sound:
        other.hear(frame)
    for frame in sound[:2]:
        caller.hear(frame)
    listener.wait(2)
    caller.paused = True
    caller.hear(noise(1, 9)[0])
    caller.paused = False
    for frame in sound[2:]:
        caller.hear(frame)
    assert said(listener.wait(4))[1] == said(unbroken.wait(4))[1]


def test_where_ticks_overrun_the_newest_caller_goes_and_is_kept(started, monkeypatch):
    monkeypatch.setattr(home, "OVERRUNS", 3)
    monkeypatch.setattr(home, "PERIOD", 1e-4)
    engine, first, last = started(2), Listener(), Listener()
    older, newer = engine.join(first), engine.join(last)
    for frame in noise(8, 0):
        older.hear(frame)
        newer.hear(frame)
    first.wait(8)
    while not isinstance(last[-1], Ended):
        time.sleep(0.01)
    assert "too busy" in last[-1].reason
    assert [caller.name for caller in engine.callers()] == [older.name]
    assert engine.counts.shed == 1
    with pytest.raises(EngineFull, match="too busy"):
        engine.join(Listener())
    assert engine.leave(newer)
    assert engine.store.read(newer.name)


def test_a_row_whose_numbers_are_sick_ends_and_the_others_do_not_notice(started):
    engine, sick, well, alone = started(3), Listener(), Listener(), Listener()
    callers = [engine.join(x, Beginning({"seeds": [1]})) for x in (sick, well, alone)]
    callers[0].hear(noise(1, 0)[0])
    sick.wait(1)
    engine._ask(lambda: engine.session.stream.state.sick.index_fill_(0, torch.tensor([callers[0].row]), True))
    for frame in noise(3, 4):
        for caller in callers:
            caller.hear(frame)
    assert said(well.wait(3))[1] == said(alone.wait(3))[1]
    assert isinstance(sick.wait(2)[1], Ended)
    assert not engine.leave(callers[0])
    assert len(engine.callers()) == 2


def test_a_prompt_is_in_the_past_and_is_not_said(started, model, processor):
    engine, listener = started(1), Listener()
    voice = np.concatenate(noise(5, 8))
    caller = engine.join(listener, Beginning({"seeds": [1]}, voice, "be kind"))
    frames = noise(3, 2)
    for frame in frames:
        caller.hear(frame)
    pcm, _ = said(listener.wait(3))
    prompt = processor.prompt(torch.from_numpy(voice), 24000, text="be kind")
    stream, ears, mouth = model.new_stream(seeds=[1], prompt=prompt), processor.new_audio_stream(), processor.new_audio_stream()
    stream.step()
    expected = [mouth.decode(stream.step(ears.encode(torch.from_numpy(frame)[None])).audio_codes) for frame in frames]
    np.testing.assert_allclose(pcm, torch.cat(expected, 1)[0].numpy(), atol=1e-5)


def test_what_a_memory_learns_is_told_to_those_who_want_it(started, monkeypatch):
    monkeypatch.setattr(home, "MEMORY_EVERY", 1)
    engine, curious, other = started(2), Listener(), Listener()
    callers = engine.join(curious, wants_memory=True), engine.join(other)
    for frame in noise(6, 0):
        for caller in callers:
            caller.hear(frame)
    lines = [event.memory for event in curious.wait(6)]
    assert [line.layer for line in lines[0]] == [0, 1]
    assert lines[1][0].current is not None
    assert lines[-1][0].drift > 0
    assert [event.memory for event in other.wait(6)] == [None] * 6


def test_a_fault_in_the_thread_ends_the_calls_in_words_and_leaves_nobody_waiting(started, monkeypatch):
    engine, listener = started(1), Listener()
    caller = engine.join(listener)
    monkeypatch.setattr(threading, "excepthook", lambda fault: None)

    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(engine.session, "step", fail)
    caller.hear(noise(1, 0)[0])
    assert "has failed" in listener.wait(1)[0].reason
    engine._thread.join(10)
    assert not engine.alive
    assert not engine.ready
    assert not engine.leave(caller)
    with pytest.raises(EngineFull):
        engine.join(Listener())


def test_warm_up_finds_how_many_rows_stay_within_the_budget(model, processor, monkeypatch):
    monkeypatch.setattr("modeling_moshi_ttt.live.capacity.tick_times", lambda model, processor, rows: [0.01 * rows])
    assert measured_rows(model, processor, 0.065) == 6
    assert measured_rows(model, processor, 1e3, most=12) == 12
    with pytest.raises(MoshiTTTError, match="does not fit, or takes longer"):
        measured_rows(model, processor, 0.005)


def test_all_memory_is_taken_at_the_start(model, processor):
    session = full_session(model, processor, 2)
    before = row_bytes(session)
    for piece in noise(20, 0):  # more than the window of 8
        session.step(torch.from_numpy(np.stack([piece, piece])))
    assert row_bytes(session) == before

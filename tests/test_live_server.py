"""The server: Kyutai's protocol byte for byte, refusals in words, faults that leave the others alone, and metrics."""

import json
import re
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from live_client import FRAME, RATE, call, noise, serving, without_a_clock
from starlette.datastructures import QueryParams
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from modeling_moshi_ttt import MoshiTTTSession
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.live import protocol
from modeling_moshi_ttt.live import server as home


@pytest.fixture
def serve(model, processor, tmp_path, monkeypatch):
    """Begin to serve: `with serve(rows=2, **settings) as (engine, port)`."""
    without_a_clock(monkeypatch)
    return lambda **settings: serving(model, processor, tmp_path / "kept", **settings)


def get(port, path) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def free(engine) -> None:
    """Wait until no row is taken."""
    deadline = time.monotonic() + 60
    while engine.callers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.callers()


def test_a_caller_hears_what_the_session_says(serve, model, processor):
    """The same samples and seed as `moshi-ttt respond`, in 16 bits, which is what both write."""
    frames = [np.rint(frame * 32767) / 32768 for frame in noise(8, 1)]
    with serve() as (_, port):
        heard = call(
            port, [np.float32(frame * 32768 / 32767) for frame in frames], "format=pcm&seed=3&audio_temperature=0.7&text_topk=10", expect=8
        )
    session = MoshiTTTSession(model, processor, seeds=[3], temperature=0.7, text_top_k=10)
    said = [session.step(torch.tensor(frame, dtype=torch.float32)[None]) for frame in frames]
    assert heard.text == "".join(frame.text[0] for frame in said) != ""
    expected = torch.cat([frame.pcm for frame in said], 1)[0].clamp(-1, 1).numpy()
    np.testing.assert_allclose(np.concatenate(heard.sound), expected, atol=2e-4)
    assert heard.kinds[:2] == [protocol.HANDSHAKE, protocol.METADATA]
    begin = heard.metadata[0]
    assert begin["type"] == "begin"
    assert begin["sample_rate"] == RATE
    assert begin["ttt_layers"] == [0, 1]


def test_sound_is_ogg_opus_both_ways(serve):
    with serve() as (_, port):
        with connect(f"ws://127.0.0.1:{port}/api/chat") as line:
            assert line.recv(30) == b"\x00"
            assert line.recv(30)[:1] == b"\x04"
            line.send(b"\x01" + protocol.OpusSound(RATE).encode(noise(1, 0)[0]))
            line.send(b"\x06")
            answers = {line.recv(30)[:5] for _ in range(1)} | {line.recv(30)[:5]}
        heard = call(port, noise(8, 0), "seed=1", expect=6)
    assert answers & {b"\x06"}
    assert np.abs(np.concatenate(heard.sound)).max() > 0.01


REFUSED = [
    ("seed=x", "`seed=x` must be a whole number"),
    ("seed=-1", "`seed=-1` must be a whole number from 0"),
    ("audio_temperature=-1", "must be greater than 0"),
    ("loudness=3", "`loudness` is no field of a call"),
    ("format=mp3", "must be opus or pcm"),
    ("pad_mult=2", "`pad_mult=2` is not supported"),
    ("voice_prompt=nobody.wav", "is no voice of this server; it has low.wav"),
    ("text_prompt=" + 1001 * "a", "it may have 1000"),
    ("resume=" + 22 * "a", "no conversation is kept"),
    ("resume=" + 22 * "a" + "&seed=1", "cannot be given with `resume`"),
]


def test_what_is_asked_for_wrongly_is_refused_in_words(serve, tmp_path):
    (tmp_path / "voices").mkdir()
    write_audio(tmp_path / "voices" / "low.wav", np.concatenate(noise(3, 0)), RATE)
    with serve(voices=tmp_path / "voices") as (engine, port):
        for query, words in REFUSED:
            heard = call(port, query=query)
            assert words in heard.error, query
            assert heard.code == 1008
        free(engine)
        kyutai = "text_temperature=0.7&text_topk=25&audio_temperature=0&audio_topk=250&pad_mult=0&text_seed=1&audio_seed=2"
        assert not call(port, noise(1, 0), kyutai + "&repetition_penalty_context=64&repetition_penalty=1.0", expect=0).error
        assert not call(port, noise(1, 0), "voice_prompt=low.wav&text_prompt=be+kind&seed=1&format=pcm", expect=1).error


def test_temperatures_of_zero_take_the_likeliest():
    found = protocol.read_query(QueryParams("audio_temperature=0&seed=4"), None, {"text_temperature": 0.0}).sampling
    assert found == {"temperature": 1.0, "top_k": 1, "text_temperature": 1.0, "text_top_k": 1, "seeds": [4]}


def test_token_and_origin(serve):
    with serve(token="secret", origins=("https://example.org",)) as (_, port):
        assert "`token` is missing or wrong" in call(port).error
        assert "`token` is missing or wrong" in call(port, query="token=secre").error
        assert not call(port, query="token=secret", expect=0).error
        assert not call(port, headers={"Authorization": "Bearer secret"}, expect=0).error
        assert not call(port, query="token=secret", headers={"Origin": "https://example.org"}, expect=0).error
        assert not call(port, query="token=secret", headers={"Origin": f"http://127.0.0.1:{port}"}, expect=0).error
        with pytest.raises(InvalidStatus, match="403"):
            call(port, query="token=secret", headers={"Origin": "https://elsewhere.example"})


FAULTS = {
    "text": "hello",
    "empty": b"",
    "unknown kind": b"\x63abc",
    "no Opus": b"\x01" + bytes(200),
    "half a sample": b"\x01abc",
    "unknown control": b"\x03\x55",
    "oversize": b"\x01" + bytes(protocol.LONGEST_MESSAGE),
}


def test_faults_end_their_own_call_in_words_and_leave_the_others_alone(serve):
    with serve(rows=2) as (engine, port):
        with connect(f"ws://127.0.0.1:{port}/api/chat?format=pcm&seed=7") as other:
            other.recv(30)
            for name, message in FAULTS.items():
                heard = call(port, query="format=pcm" if name == "half a sample" else "", messages=[message])
                assert heard.code in (1003, 1008, 1009), name
                assert heard.error or heard.code == 1009, name
                assert len(engine.callers()) <= 2
            for frame in noise(5, 1):
                other.send(b"\x01" + (frame * 32767).astype("<i2").tobytes())
            sound = 0
            while sound < 5:
                sound += other.recv(30)[0] == protocol.AUDIO
        free(engine)
        assert engine.alive


def test_a_flood_ends_and_its_memory_is_bounded(serve, monkeypatch):
    monkeypatch.setattr(home, "AHEAD", 1.0)
    with serve() as (engine, port):
        heard = call(port, noise(100, 0), "format=pcm")
        assert "faster than it passes" in heard.error
        heard = call(port, messages=[b"\x06"] * 20000)
        assert "messages come in a second" in heard.error
        free(engine)


def test_a_line_that_goes_dead_is_hung_up_and_kept(serve):
    with serve(idle=0.5) as (engine, port):
        heard = call(port, noise(2, 0), "format=pcm")
        assert "nothing was heard for 0.5 seconds" in heard.error
        free(engine)
        assert engine.store.read(heard.conversation)


def test_the_longest_call_ends_and_is_kept(serve):
    with serve(minutes=0.01) as (engine, port):
        heard = call(port, noise(2, 0), "format=pcm")
        assert "minutes of a call are over" in heard.error
        free(engine)


def test_a_slow_reader_loses_the_oldest_sound_and_no_word():
    async def check():
        line = home.LiveCall.__new__(home.LiveCall)
        line._outbox, line._filled, line.dropped = home.deque(), home.asyncio.Event(), 0
        for i in range(home.OUTBOX + 3):
            line._put(home.Said(np.full(1, i), f" {i}", 0.0, None))
        assert (len(line._outbox), line.dropped) == (home.OUTBOX, 3)
        assert line._outbox[0].text == " 0 1 2 3"
        assert line._outbox[0].pcm[0] == 3

    home.asyncio.run(check())


def test_pause_save_and_resume_over_the_line(serve, model, processor):
    frames = noise(6, 4)
    with serve() as (engine, port):
        save = bytes([protocol.CONTROL, protocol.SAVE])
        first = call(port, frames[:3], "format=pcm&seed=2", expect=3)
        free(engine)
        second = call(port, frames[3:], f"format=pcm&resume={first.conversation}", [save], expect=3)
        assert second.conversation == first.conversation
        whole = call(port, frames, "format=pcm&seed=2", expect=6)
        free(engine)
    assert first.text + second.text == whole.text
    np.testing.assert_allclose(np.concatenate(first.sound + second.sound), np.concatenate(whole.sound), atol=2e-4)


def test_a_conversation_that_began_anew_is_another(serve):
    frames, restart = noise(3, 4), bytes([protocol.CONTROL, protocol.RESTART])
    with serve() as (_, port), connect(f"ws://127.0.0.1:{port}/api/chat?format=pcm&seed=5") as line:
        said = []
        for _ in range(2):
            for frame in frames:
                line.send(b"\x01" + (frame * 32767).astype("<i2").tobytes())
            sound = []
            while len(sound) < 3:
                if (message := line.recv(30))[0] == protocol.AUDIO:
                    sound.append(message)
            said.append(sound)
            line.send(restart)
            time.sleep(0.2)
    assert said[0] == said[1]


def test_routes_of_an_operator(serve):
    with serve(rows=3) as (engine, port):
        assert get(port, "/healthz") == (200, "ticking\n")
        assert get(port, "/readyz") == (200, "ready\n")
        assert call(port, noise(3, 0), "format=pcm", expect=3)
        free(engine)
        status, text = get(port, "/metrics")
        assert status == 200
        assert re.search(r"^moshi_ttt_rows_max 3$", text, re.M)
        assert re.search(r"^moshi_ttt_callers_total 1$", text, re.M)
        assert re.search(r'^moshi_ttt_tick_seconds\{quantile="0.99"\} [\d.e-]+$', text, re.M)
        for line in text.splitlines():
            assert re.fullmatch(r"# (HELP|TYPE) moshi_ttt_\w+ .+|moshi_ttt_\w+(\{[^}]*\})? [\d.e+-]+", line), line
        info = json.loads(get(port, "/api/info")[1])
        assert info["rows"] == 3
        assert info["token"] is False
        assert info["reach_seconds"] == (2 * 7 + 1) / 12.5
        assert get(port, "/api/clips/none.wav")[0] == 404
        assert get(port, "/static/../../setup.cfg")[0] == 404
        engine.ready = False
        assert get(port, "/readyz")[0] == 503


def test_many_callers_come_and_go_and_leave_nothing(serve):
    with serve(rows=4) as (engine, port):
        call(port, noise(1, 0), expect=1, query="format=pcm")
        threads = threading.active_count()
        for i in range(60):
            with connect(f"ws://127.0.0.1:{port}/api/chat") as line:
                line.recv(30)
                if i % 3 == 0:
                    line.socket.close()  # without a word
        free(engine)
        assert threading.active_count() <= threads + 6  # asyncio's pool
        assert engine.counts.callers == 61


def test_the_end_of_the_server_keeps_every_conversation(serve):
    with serve() as (engine, port):
        line = connect(f"ws://127.0.0.1:{port}/api/chat?format=pcm")
        line.recv(30)
        name = json.loads(line.recv(30)[1:])["conversation"]
        line.send(b"\x01" + bytes(2 * FRAME))
        while line.recv(30)[0] != protocol.AUDIO:
            pass
    assert engine.store.read(name)
    assert not engine._thread.is_alive()
    line.close()


@pytest.mark.parametrize("broken", [bytes(300), b"abcdef" * 20, protocol.OpusSound(RATE).encode(noise(1, 0)[0])[:-100] + bytes(400)])
def test_what_is_no_opus_is_refused(broken):
    with pytest.raises(MoshiTTTError, match="is no Ogg Opus"):
        protocol.OpusSound(RATE).decode(broken)

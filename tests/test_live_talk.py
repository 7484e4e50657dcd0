"""`moshi-ttt talk` and `moshi-ttt serve` as commands: what a recording is answered, a microphone that is none, and mistakes in one line."""

import os
import signal
import socket
import subprocess
import sys
import types
import urllib.request

import numpy as np
import pytest
from live_client import FRAME, RATE, call, noise
from tiny import speaking_model

from modeling_moshi_ttt import MoshiTTTProcessor, cli, packaged
from modeling_moshi_ttt.data.audio import read_audio, write_audio
from modeling_moshi_ttt.live.talk import level


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    speaking_model().save_pretrained(place)
    MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny")).save_pretrained(place)
    return place


def command(*arguments) -> int:
    return cli.main([*map(str, arguments)])


def test_a_recording_is_answered_as_respond_answers_it_and_goes_on(folder, tmp_path, capsys):
    sound = np.concatenate(noise(6, 1))
    for name, part in (("whole", sound), ("first", sound[: 4 * FRAME]), ("second", sound[4 * FRAME :])):
        write_audio(tmp_path / f"{name}.wav", part, RATE)
    assert command("respond", tmp_path / "whole.wav", tmp_path / "answer.wav", "--model", folder, "--seed", 3, "--stereo") == 0
    first = ("talk", folder, "--wav", tmp_path / "first.wav", "--out", tmp_path / "a.wav", "--seed", 3, "--save", tmp_path / "kept")
    assert command(*first) == 0
    assert command("talk", folder, "--wav", tmp_path / "second.wav", "--out", tmp_path / "b.wav", "--resume", tmp_path / "kept") == 0
    assert "Moshi said: " in capsys.readouterr().out
    both = np.concatenate([read_audio(tmp_path / f"{name}.wav") for name in "ab"], 1)
    np.testing.assert_allclose(both, read_audio(tmp_path / "answer.wav"), atol=1e-4)


def test_a_microphone_is_heard_and_a_loudspeaker_played_until_ctrl_c(folder, tmp_path, monkeypatch):
    played, frames = [], noise(3, 2)

    class InputStream:
        def __init__(self, rate, blocksize, channels, dtype, callback):
            self.callback = callback

        def __enter__(self):
            for frame in frames:
                self.callback(frame[:, None], FRAME, None, None)

        def __exit__(self, *_):
            pass

    class OutputStream(InputStream):
        def __init__(self, rate, blocksize, channels, dtype):
            pass

        def __enter__(self):
            pass

        def write(self, pcm):
            played.append(pcm[:, 0])
            if len(played) == len(frames):
                raise KeyboardInterrupt

    device = types.SimpleNamespace(InputStream=InputStream, OutputStream=OutputStream, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    assert command("talk", folder, "--seed", 1) == 0
    write_audio(tmp_path / "in.wav", np.concatenate(frames), RATE)
    assert command("respond", tmp_path / "in.wav", tmp_path / "out.wav", "--model", folder, "--seed", 1) == 0
    np.testing.assert_allclose(np.concatenate(played).clip(-1, 1), read_audio(tmp_path / "out.wav")[0], atol=1e-3)


def test_levels_are_loudness_over_sixty_decibels():
    assert [level(np.full(10, x)) for x in (0.0, 1e-4, 1.0)] == [0.0, 0.0, 1.0]
    assert level(np.full(10, 0.1)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve",), "give a MODEL to serve, or --demo"),
        (("serve", "tiny", "--demo"), "and not both"),
        (("serve", "tiny", "--rows", "0"), "--rows is 0"),
        (("serve", "tiny", "--budget", "90"), "--budget is 90"),
        (("serve", "tiny", "--tls-key", "key.pem"), "come together"),
        (("serve", "tiny", "--port", "70000"), "--port is 70000"),
        (("serve", "tiny", "--voices", "nowhere"), "--voices is nowhere"),
        (("serve", "nowhere", "--port", "0"), "no such folder"),
        (("talk", "nowhere"), "no such folder"),
        (("talk", "nowhere", "--seed", "1", "--resume", "x"), "--seed cannot be given with --resume"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert command("serve", "nowhere", "--port", taken.getsockname()[1]) == 2
    assert "another program listens there" in capsys.readouterr().err


def test_sigterm_in_the_middle_keeps_the_conversation(folder, tmp_path):
    """The whole command, in a process of its own; it says where it is to be found, and logs lines of JSON without words."""
    line = [sys.executable, "-m", "modeling_moshi_ttt.cli", "serve", folder, "--port", "0", "--rows", "2", "--sessions", tmp_path / "kept"]
    with subprocess.Popen(
        [*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as server:
        greeting = server.stdout.readline()
        port = int(greeting.split("127.0.0.1:")[1].split()[0])
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
                break
            except OSError:
                pass
        heard = call(port, noise(2, 0), "format=pcm", expect=1)
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    assert server.returncode in (0, -signal.SIGTERM)
    assert (tmp_path / "kept" / heard.conversation / "session.json").is_file()
    assert heard.conversation not in log
    assert '"event": "joined"' in log

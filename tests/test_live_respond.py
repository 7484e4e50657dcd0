"""`moshi-ttt respond`: what hear says, at its true time; folders, transcripts, both voices, conversations that go on, and mistakes in one
line.
"""

import json

import numpy as np
import pytest
import torch
from test_live_session import FRAME

from modeling_moshi_ttt import MoshiTTTSession, MoshiTTTStream, cli
from modeling_moshi_ttt.data.audio import read_audio, write_audio

RATE = 24000


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, processor):
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def record(path, samples: int, channels: int = 1, seed: int = 1):
    write_audio(path, 0.2 * np.random.default_rng(seed).standard_normal((channels, samples)), RATE)
    return path


def respond(folder, *arguments) -> int:
    return cli.main(["respond", *map(str, arguments), "--model", str(folder)])


@pytest.mark.parametrize("channels", [1, 2])
def test_the_answer_is_what_hear_says_at_its_true_time(folder, model, processor, tmp_path, monkeypatch, capsys, channels):
    source, out = record(tmp_path / "in.wav", 10 * FRAME + 700, channels), tmp_path / "out.wav"
    frames, step = [], MoshiTTTStream.step
    monkeypatch.setattr(MoshiTTTStream, "step", lambda *args, **kwargs: frames.append(step(*args, **kwargs)) or frames[-1])
    assert respond(folder, source, out, "--seed", 3, "--stereo", "--transcript", tmp_path / "words.jsonl") == 0
    assert "real-time factor" in capsys.readouterr().out
    monkeypatch.undo()
    user = read_audio(source)[-1]
    text, codes = model.hear(processor.encode_audio(torch.from_numpy(user)[None]), seeds=[3])
    assert torch.equal(torch.stack([frame.audio_codes[0] for frame in frames[1:]], -1), codes[0])
    written = read_audio(out)
    assert written.shape == (2, len(user))
    assert np.abs(written[1] - user).max() < 1e-4
    assert np.abs(written[0] - processor.decode_audio(codes)[0, : len(user)].clamp(-1, 1).numpy()).max() < 1e-4
    words = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    assert [(word["word"], word["start"]) for word in words] == [(word, round(at, 3)) for word, at in processor.words(text[0])] != []
    assert all(word["end"] > word["start"] and word["file"] == "in.wav" for word in words)


def test_a_folder_is_answered_in_batches_as_each_alone(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        record(tmp_path / "in" / f"{i}.wav", (3 + i) * FRAME + i, seed=i)
    assert respond(folder, tmp_path / "in", tmp_path / "out", "--seed", 5, "--batch-size", 2) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.wav", "1.wav", "2.wav"]
    for i in range(3):
        assert respond(folder, tmp_path / "in" / f"{i}.wav", tmp_path / "alone.wav", "--seed", 5) == 0
        assert np.abs(read_audio(tmp_path / "out" / f"{i}.wav") - read_audio(tmp_path / "alone.wav")).max() < 1e-4


def test_a_kept_conversation_goes_on(folder, tmp_path):
    whole = 0.2 * np.random.default_rng(0).standard_normal(8 * FRAME)
    for name, part in (("whole", whole), ("first", whole[: 5 * FRAME]), ("second", whole[5 * FRAME :])):
        write_audio(tmp_path / f"{name}.wav", part, RATE)
    assert respond(folder, tmp_path / "whole.wav", tmp_path / "a.wav", "--seed", 1, "--temperature", 0.5) == 0
    assert (
        respond(folder, tmp_path / "first.wav", tmp_path / "b.wav", "--seed", 1, "--temperature", 0.5, "--save-session", tmp_path / "kept")
        == 0
    )
    assert respond(folder, tmp_path / "second.wav", tmp_path / "c.wav", "--resume", tmp_path / "kept") == 0
    assert np.array_equal(read_audio(tmp_path / "a.wav")[0], np.concatenate([read_audio(tmp_path / f"{name}.wav")[0] for name in "bc"]))


def test_an_answer_begins_from_a_persona_and_a_voice(folder, model, processor, tmp_path):
    """Every recording of a folder does."""
    voice, users = record(tmp_path / "voice.wav", 4 * FRAME, seed=9), tmp_path / "in"
    users.mkdir()
    for i in range(2):
        record(users / f"{i}.wav", 5 * FRAME, seed=i)
    prompt = ["--prompt", "you are kind", "--prompt-voice", voice]
    assert respond(folder, users, tmp_path / "out", "--seed", 2, *prompt) == 0
    frames = processor.prompt(read_audio(voice), RATE, "you are kind")
    for i in range(2):
        session = MoshiTTTSession(model, processor, seeds=[2], prompt=frames)
        user = torch.from_numpy(read_audio(users / f"{i}.wav"))
        expected = torch.cat([session.step(piece).pcm for piece in user.split(FRAME, 1)], 1)[0].clamp(-1, 1)
        assert np.abs(read_audio(tmp_path / "out" / f"{i}.wav")[0] - expected.numpy()).max() < 1e-4


def not_finite(path):
    import soundfile

    soundfile.write(path, np.full(FRAME, np.nan, np.float32), RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.wav", "out.wav"], "there is no such sound file"),
        (["empty.wav", "out.wav"], "the sound file is empty"),
        (["nan.wav", "out.wav"], "NaN or infinite"),
        (["three.wav", "out.wav"], "has 3 channels"),
        (["in.wav", "out.mp3"], "must be another file, a .wav"),
        (["in.wav", "in.wav"], "must be another file"),
        (["void", "out"], "holds no sound file"),
        (["twice", "out"], "two recordings"),
        (["twice", "out", "--resume", "two"], "are for one conversation"),
        (["in.wav", "out.wav", "--resume", "two"], "it must have one row"),
        (["in.wav", "out.wav", "--resume", "void"], "holds no session.json"),
        (["in.wav", "out.wav", "--resume", "two", "--seed", "1"], "--seed cannot be given"),
        (["in.wav", "out.wav", "--resume", "two", "--prompt", "you are kind"], "--prompt cannot be given"),
        (["in.wav", "out.wav", "--prompt-voice", "none.wav"], "there is no such sound file"),
        (["in.wav", "out.wav", "--prompt-voice", "three.wav"], "three.wav has 3 channels; give the one"),
        (["in.wav", "out.wav", "--prompt", ""], "nothing to begin with"),
        (["in.wav", "out.wav", "--temperature", "0"], "`temperature=0.0`"),
        (["in.wav", "out.wav", "--seed", "-1"], "`seeds="),
        (["in.wav", "out.wav", "--save-session", "twice"], "holds no session.json"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(folder, model, processor, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "in.wav", FRAME)
    record(tmp_path / "three.wav", FRAME, 3)
    (tmp_path / "empty.wav").touch()
    not_finite(tmp_path / "nan.wav")
    for name in ("void", "twice"):
        (tmp_path / name).mkdir()
    for name in ("a.wav", "a.flac"):
        record(tmp_path / "twice" / name, FRAME)
    MoshiTTTSession(model, processor, 2).save("two")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert respond(folder, *arguments) == cli.FAILED
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

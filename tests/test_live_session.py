"""MoshiTTTSession: one unbroken sound in and out whatever the pieces and rates, rows that depend on nothing else, and a folder that goes
on.
"""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import speaking_model

from modeling_moshi_ttt import MoshiTTTSession
from modeling_moshi_ttt.live import session as home

FRAME = 1920
NAN = float("nan")
DELAYS = pytest.mark.parametrize("delays", [[0, *[1] * 7], [0] * 8, [0, 3, 1, 2, 1, 1, 0, 1]], ids=["moshi", "none", "uneven"])


@pytest.fixture(scope="module")
def new(model, processor):
    """Make a session of this model."""
    return lambda *args, **kwargs: MoshiTTTSession(model, processor, *args, **kwargs)


def sound(rows: int, samples: int, seed: int = 1) -> torch.Tensor:
    return 0.3 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))


def talk(session, pcm: torch.Tensor, size: int = FRAME) -> tuple[torch.Tensor, list[str]]:
    """What comes out `[B, n]`, and the text of each row."""
    frames = [session.step(piece) for piece in pcm.split(size, 1)]
    return torch.cat([frame.pcm for frame in frames], 1), ["".join(pieces) for pieces in zip(*(frame.text for frame in frames))]


def equal_states(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@DELAYS
def test_a_session_says_what_hear_says(processor, delays):
    """Frame for frame as training aligned it: the model's first call is the session's own."""
    model, pcm = speaking_model(audio_delays=delays * 2), sound(2, 6 * FRAME)
    session, late = MoshiTTTSession(model, processor, 2, seeds=[3, 4]), max(max(delays) - 1, 0)
    said, text = talk(session, pcm)
    codes = processor.encode_audio(pcm)
    ids, answer = model.hear(codes, seeds=[3, 4])
    answer, ids = answer[..., : 6 - late], ids[:, : 6 - late]
    assert not said[:, : late * FRAME].any()
    torch.testing.assert_close(said[:, late * FRAME :], processor.decode_audio(answer), atol=1e-5, rtol=0)
    if max(delays):
        assert [piece.strip() for piece in text] == [processor.decode_text(row) for row in ids]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from([8000, 16000, 22050, 24000, 44100, 48000]), st.lists(st.integers(1, 639), min_size=8, max_size=30), st.data())
def test_the_pieces_do_not_matter_and_a_row_moves_at_any_moment(new, rate, sizes, data):
    """Pieces of any size hold the same sound, behind one silence, and a row goes on in other sessions as if it had never moved."""
    pieces = [size * rate // 8000 for size in sizes]
    pcm, frame = sound(1, sum(pieces)), rate * 2 // 25
    frames = new(1, rate, seeds=[5])
    whole, text = talk(frames, pcm[:, : pcm.shape[1] // frame * frame], frame) if pcm.shape[1] >= frame else (pcm[:, :0], [""])
    session, moved, out, words = new(1, rate, seeds=[5]), data.draw(st.integers(0, len(sizes) - 1)), [], ""
    for i, piece in enumerate(pcm.split(pieces, 1)):
        if i == moved:
            other = new(3, rate)
            other.load_row(2, session.row_state(0))
            session = new(1, rate)
            session.load_row(0, other.row_state(2))
        said = session.step(piece)
        assert said.pcm.shape == piece.shape
        out.append(said.pcm)
        words += said.text[0]
    one, other = whole[0, int(frames.sounds[0].lead) :], torch.cat(out, 1)[0, session.longest_delay :]
    count = min(len(one), len(other))
    torch.testing.assert_close(one[:count], other[:count], atol=1e-5, rtol=0)
    assert not torch.cat(out, 1)[0, : session.longest_delay].any()
    assert session.longest_delay < 1.2 * frame
    assert words.startswith(text[0])  # its last frame may be one more


def test_a_row_in_any_company_is_that_row_alone(new):
    """It pauses, its neighbors pause, are reset, and give nothing that could be heard."""
    together, alone, pcm = new(3, seeds=[7, 1, 2]), new(1, seeds=[7]), sound(3, 12 * FRAME)
    for t, piece in enumerate(pcm.split(FRAME, 1)):
        active = [t not in (2, 5), t % 2 == 0, t != 4]
        if t == 6:
            together.reset([2], seeds=[9])
        if not active[1]:
            piece = piece.index_fill(0, torch.tensor([1]), NAN)
        frame = together.step(piece, active)
        assert not frame.pcm[~torch.tensor(active)].any()
        assert frame.valid.tolist() == active
        if active[0]:
            expected = alone.step(piece[:1])
            # the codes are the same; the codec's products over another number of rows round otherwise
            torch.testing.assert_close(frame.pcm[0], expected.pcm[0], atol=1e-6, rtol=0)
            assert frame.text[0] == expected.text[0]
    assert torch.equal(together.row_state(0)["stream.said"], alone.row_state(0)["stream.said"])


def test_a_reset_row_begins_anew(new):
    session, pcm = new(2, 48000, seeds=[3, 4]), sound(2, 5 * 2 * FRAME)
    first = talk(session, pcm, 2 * FRAME)
    session.reset([1])
    again = talk(session, pcm, 2 * FRAME)
    assert torch.equal(first[0][1], again[0][1])
    assert not torch.equal(first[0][0], again[0][0])
    assert first[1][1] == again[1][1] != ""


@pytest.mark.parametrize("part", ["audio.encode", "stream.step", "audio.decode", "_take_text"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_raises_has_changed_nothing(new, monkeypatch, part, error):
    session, unbroken, pcm = new(2, 16000, seeds=[3, 4]), new(2, 16000, seeds=[3, 4]), sound(2, 13 * 1280)
    for t, piece in enumerate(pcm.split(1280, 1)):
        if t == 11:  # the window is full by then
            owner, _, name = part.rpartition(".")
            target = getattr(session, owner) if owner else session
            with monkeypatch.context() as patch:
                patch.setattr(target, name, raising(error, getattr(target, name)))
                with pytest.raises(error):
                    session.step(piece)
        one, other = session.step(piece), unbroken.step(piece)
        assert torch.equal(one.pcm, other.pcm)
        assert one.text == other.text
    assert equal_states(session.row_state(1), unbroken.row_state(1))


def raising(error, after):
    def fail(*args, **kwargs):
        after(*args, **kwargs)
        raise error

    return fail


def test_a_failed_reset_has_changed_nothing(new, monkeypatch):
    session, pcm = new(2, seeds=[3, 4]), sound(2, 3 * FRAME)
    talk(session, pcm)
    before = [session.row_state(row) for row in range(2)]
    monkeypatch.setattr(session, "_before_sound", raising(RuntimeError, session._before_sound))
    with pytest.raises(RuntimeError):
        session.reset()
    assert all(equal_states(session.row_state(row), before[row]) for row in range(2))


IN_ANOTHER_PROCESS = """
import sys, torch
from test_live_session import MoshiTTTSession, sound, talk
from tiny import speaking_model
from modeling_moshi_ttt import MoshiTTTProcessor, packaged
torch.set_num_threads(1)
session = MoshiTTTSession.load(sys.argv[1], speaking_model(), MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny")))
said, text = talk(session, sound(2, 5 * 3528, seed=2), 441)
session.reset()
torch.save((said, text, talk(session, sound(2, 3528), 441)), sys.argv[2])
"""


def test_a_saved_session_goes_on_bit_equal_in_another_process(new, tmp_path):
    session = new(2, 44100, seeds=[3, 4], temperature=[0.5, 1.0])
    talk(session, sound(2, 6 * 3528 + 1000), 441)
    session.save(tmp_path / "saved")
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "saved"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    said, text, anew = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = talk(session, sound(2, 5 * 3528, seed=2), 441)
    assert torch.equal(said, expected[0])
    assert said.any()
    assert text == expected[1]
    session.reset()
    assert torch.equal(anew[0], talk(session, sound(2, 3528), 441)[0])


def test_a_session_of_version_0_2_goes_on(new, model, processor, tmp_path):
    """Its rows had no count of a prompt's frames."""
    session = new(seeds=[3])
    talk(session, sound(1, 4 * FRAME))
    session.save(tmp_path / "saved")
    tensors = home.load_file(tmp_path / "saved" / home.TENSORS)
    del tensors["0.sound.prompted"]
    home.save_file(tensors, tmp_path / "saved" / home.TENSORS)
    of_format(1, tmp_path / "saved")
    resumed = MoshiTTTSession.load(tmp_path / "saved", model, processor)
    assert torch.equal(talk(resumed, sound(1, 4 * FRAME, seed=2))[0], talk(session, sound(1, 4 * FRAME, seed=2))[0])


@DELAYS
@pytest.mark.parametrize("frames", [2, 12])
def test_after_a_prompt_a_session_says_what_the_stream_says(processor, delays, frames):
    """The user's first sound is heard, nothing of the prompt is said again, also where it is shorter than the delays or moves to a file."""
    model, pcm = speaking_model(audio_delays=delays * 2), sound(2, 9 * FRAME)
    voice = sound(1, frames * FRAME, seed=3)
    prompt = processor(voice[0].numpy(), 24000)
    stream, depth = model.new_stream(2, seeds=[3, 4], prompt=prompt), max(delays)
    said = [stream.step(codes) for codes in (None, *processor.encode_audio(pcm).unbind(-1))]
    codes = torch.stack([frame.audio_codes for frame in said[depth:]], -1)
    session, late = MoshiTTTSession(model, processor, 2, seeds=[3, 4], prompt=prompt), max(depth - 1, 0)
    first = session.step(pcm[:, :FRAME])
    other = MoshiTTTSession(model, processor, 2, seeds=[1, 2])
    for row in range(2):
        other.load_row(row, session.row_state(1 - row))
    rest = talk(other, pcm[:, FRAME:].flip(0))[0].flip(0)
    heard = torch.cat([first.pcm, rest], 1)
    assert not heard[:, : late * FRAME].any()
    expected = processor.decode_audio(codes)[:, : heard.shape[1] - late * FRAME]
    torch.testing.assert_close(heard[:, late * FRAME :], expected, atol=1e-5, rtol=0)
    assert first.valid.all() == (depth < 2)
    session.reset([0], seeds=[3])
    alone = MoshiTTTSession(model, processor, 1, seeds=[3])
    torch.testing.assert_close(talk(session, pcm)[0][:1], talk(alone, pcm[:1])[0], atol=1e-5, rtol=0)


def test_saving_replaces_a_session_and_nothing_else(new, tmp_path):
    session = new(seeds=[1])
    session.save(tmp_path / "saved")
    talk(session, sound(1, FRAME))
    session.save(tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no session.json"):
        session.save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "saved"]


def break_off(folder: Path) -> None:
    tensors = folder / home.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])


def without_tensors(folder: Path) -> None:
    (folder / home.TENSORS).unlink()


def of_format(number: int, folder: Path) -> None:
    about = json.loads((folder / home.ABOUT).read_text())
    (folder / home.ABOUT).write_text(json.dumps(about | {"format": number}))
    home.write_manifest(folder)


def without_rate(folder: Path) -> None:
    about = json.loads((folder / home.ABOUT).read_text())
    del about["sample_rate"]
    (folder / home.ABOUT).write_text(json.dumps(about))
    home.write_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_off, "is not whole: session.safetensors has"),
        (without_tensors, "is not whole: session.safetensors is missing"),
        (partial(of_format, 3), "`format=3` must be 1 or 2"),
        (without_rate, "lacks 'sample_rate'"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(new, model, processor, tmp_path, damage, message):
    new(seeds=[1]).save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        MoshiTTTSession.load(tmp_path / "saved", model, processor)


def test_another_model_or_codec_is_refused(new, model, processor, tmp_path):
    new(seeds=[1]).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="of another model"):
        MoshiTTTSession.load(tmp_path / "saved", speaking_model(seed=1), processor)  # the same sizes, another training
    with pytest.raises(ValueError, match="of another model"):
        MoshiTTTSession.load(tmp_path / "saved", speaking_model(sliding_window=9), processor)
    other = copy.deepcopy(processor)
    with torch.no_grad():
        next(other.audio_tokenizer.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="of another codec"):
        MoshiTTTSession.load(tmp_path / "saved", model, other)
    with pytest.raises(ValueError, match="holds no session.json"):
        MoshiTTTSession.load(tmp_path / "nowhere", model, processor)


@pytest.mark.parametrize(
    ("pcm", "active", "message"),
    [
        (torch.zeros(2, 1921), None, r"shape \(2, 1921\); it must be \(2, 1 to 1920\)"),
        (torch.zeros(2, 0), None, r"shape \(2, 0\)"),
        (torch.zeros(3, FRAME), None, r"shape \(3, 1920\)"),
        (torch.zeros(FRAME), None, r"shape \(1920,\)"),
        (torch.zeros(2, FRAME, dtype=torch.int16), None, "divide 16-bit samples by 32768"),
        (torch.full((2, 480), NAN), [False, True], r"row \[1\] is not finite"),
        (torch.full((2, 480), 32768.0), None, r"row \[0, 1\] is not finite or beyond"),
        (torch.zeros(2, FRAME), [True], "`active`"),
    ],
)
def test_wrong_samples_are_refused_and_change_nothing(new, pcm, active, message):
    session = new(2, seeds=[1, 2])
    session.step(sound(2, 1000))
    before = session.row_state(1)
    with pytest.raises(ValueError, match=message):
        session.step(pcm, active)
    assert equal_states(session.row_state(1), before)


def test_wrong_settings_are_refused(new, model, processor):
    for rate, message in ((0, "whole numbers of Hz"), (24000.5, "whole numbers of Hz"), (10, "`sample_rate=10` has no sample")):
        with pytest.raises(ValueError, match=message):
            new(1, rate)
    with pytest.raises(ValueError, match="`seeds="):
        new(2, seeds=[1])
    with pytest.raises(ValueError, match="text_padding_ids"):
        MoshiTTTSession(speaking_model(text_padding_ids=[5, 6]), processor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate": torch.tensor(48000)}, "`sample_rate=48000`, the session 24000"),
        ({"sample_rate": None}, "lacks sample_rate"),
        ({"sound.heard": None}, "lacks heard"),
        ({"stream.calls": None}, "lacks calls"),
        ({"audio.more": torch.zeros(1)}, "unknown entries more"),
        ({"more": torch.zeros(1)}, "unknown entries more"),
        ({"sound.heard": torch.zeros(1920)}, "heard of the saved row has shape"),
        ({"sound.said": torch.full((3,), NAN)}, "what no session has"),
        ({"sound.tokens": torch.tensor([512])}, "what no session has"),
        ({"sound.prompted": torch.tensor(2)}, "what no session has"),
        ({"sound.ears.offset": torch.tensor(1)}, "`offset` 1"),
        ({"sound.mouth.tail": torch.zeros(1, 2)}, "`tail`"),
    ],
)
def test_a_row_state_that_no_session_was_in_is_refused(new, change, message):
    session = new(2, seeds=[1, 2])
    session.step(sound(2, 1000))
    state, before = session.row_state(0) | change, session.row_state(1)
    with pytest.raises(ValueError, match=message):
        session.load_row(1, {name: tensor for name, tensor in state.items() if tensor is not None})
    assert equal_states(session.row_state(1), before)


def test_a_sick_row_is_silent_and_named(new):
    from test_stream_rows import poison

    session, pcm = new(2, seeds=[1, 2]), sound(2, 8 * FRAME)
    talk(session, pcm[:, : 4 * FRAME])
    poison(session.stream, 1)
    talk(session, pcm[:, 4 * FRAME : 6 * FRAME])
    frame = session.step(pcm[:, :FRAME])
    assert frame.valid.tolist() == [True, False]
    assert not frame.pcm[1].any()
    assert frame.text[1] == ""
    assert list(session.problems()) == [1]
    session.reset([1])
    assert session.step(pcm[:, :FRAME]).valid.all()


class Bytes:
    """A tokenizer that writes a character as two tokens."""

    def decode(self, tokens, skip_special_tokens):
        return {(10,): "a", (11,): "\ufffd", (11, 12): "\u00e9"}.get(tuple(tokens), "")

    def convert_ids_to_tokens(self, token):
        return "\u2581a" if token == 10 else "<0xC3>"


def test_text_comes_in_whole_characters_and_words_keep_their_spaces(new, monkeypatch):
    session = new(seeds=[1])
    monkeypatch.setattr(session, "processor", type("P", (), {"tokenizer": Bytes()}))
    row, pieces = session.sounds[0], []
    for token in (10, 11, None, 12, 10):
        row.tokens = row.tokens if token is None else torch.cat([row.tokens, torch.tensor([token])])
        pieces.append(session._take_text(row))
    assert pieces == [" a", "", "", "\u00e9", " a"]

"""Mimi live: streams equal the whole sound, their rows are values, and what cannot stream is refused."""

import copy

import pytest
import torch
from test_processing import FRAME, TINY, mimi, noise

from modeling_moshi_ttt.mimi_stream import MimiStream
from modeling_moshi_ttt.processing_moshi_ttt import MoshiTTTProcessor


@pytest.fixture(scope="module")
def processor() -> MoshiTTTProcessor:
    return MoshiTTTProcessor.from_pretrained(TINY)


@pytest.mark.parametrize("changes", [{}, {"use_conv_shortcut": True, "num_residual_layers": 2, "num_key_value_heads": 4}])
def test_stream_equals_the_whole(changes):
    codec = mimi(**changes)
    audio = torch.from_numpy(noise(2, 33 * FRAME)) * 3
    with torch.no_grad():
        codes = codec.encode(audio[:, None]).audio_codes
        sound = codec.decode(codes).audio_values[:, 0]
    assert codes.unique().numel() > 20
    stream = MimiStream(codec, 2)
    live = torch.stack([stream.encode(frame) for frame in audio.split(FRAME, 1)], -1)
    assert torch.equal(live, codes)
    spoken = torch.cat([stream.decode(codes[..., t]) for t in range(33)], 1)
    assert (spoken - sound).abs().max() <= 1e-5 * max(1.0, float(sound.abs().max()))
    uneven = MimiStream(codec, 2)
    parts = (1, 4, 17, 11)
    assert torch.equal(torch.cat([uneven.encode_frames(piece) for piece in audio.split([n * FRAME for n in parts], 1)], -1), codes)
    spoken = torch.cat([uneven.decode_frames(piece) for piece in codes.split(parts, -1)], -1)
    assert (spoken - sound).abs().max() <= 1e-5 * max(1.0, float(sound.abs().max()))


def test_stream_of_the_embedded_codec(processor):
    audio = torch.from_numpy(noise(1, 40 * FRAME))
    stream = processor.new_audio_stream()
    codes = processor.encode_audio(audio)
    assert torch.equal(torch.stack([stream.encode(frame) for frame in audio.split(FRAME, 1)], -1), codes)
    spoken = torch.cat([stream.decode(codes[..., t]) for t in range(40)], 1)
    with torch.no_grad():
        assert (spoken - processor.codec.decode(codes).audio_values[:, 0]).abs().max() <= 1e-5


def test_reset_starts_one_row_anew_and_leaves_the_others():
    codec = mimi()
    audio = torch.from_numpy(noise(3, 24 * FRAME))
    stream, undisturbed, fresh = MimiStream(codec, 3), MimiStream(codec, 3), MimiStream(codec, 1)
    first, then = audio.split(12 * FRAME, 1)
    codes = stream.encode_frames(first)
    stream.decode_frames(codes), undisturbed.encode_frames(first), undisturbed.decode_frames(codes)
    stream.reset([1])
    again, expected = stream.encode_frames(then), undisturbed.encode_frames(then)
    assert torch.equal(again[1:2], fresh.encode_frames(then[1:2]))
    assert not torch.equal(again[1], expected[1])
    assert torch.equal(again[[0, 2]], expected[[0, 2]])
    sound, expected = stream.decode_frames(codes), undisturbed.decode_frames(codes)
    assert (sound[1:2] - fresh.decode_frames(codes[1:2])).abs().max() <= 1e-5
    assert (sound[[0, 2]] - expected[[0, 2]]).abs().max() <= 1e-5
    stream.reset()
    assert torch.equal(stream.encode_frames(first), codes)
    stream.reset(torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="rows .* out of range"):
        stream.reset([3])
    with pytest.raises(ValueError, match="rows is a mask of shape"):
        stream.reset(torch.tensor([True]))


def test_the_memory_of_a_stream_does_not_grow():
    stream = MimiStream(mimi(), 1)

    def size() -> int:
        return sum(x.numel() for x in stream.state_dict().values())

    sizes = set()
    for seed in range(3):
        codes = stream.encode_frames(torch.from_numpy(noise(1, 15 * FRAME, seed)))
        stream.decode_frames(codes)
        sizes.add(size())
    assert len(sizes) == 1


def test_rows_of_an_audio_stream_are_values():
    """A row that pauses keeps its state; one moves to another stream and row; a sick row can be left out; frames of -2 are silence."""
    codec = mimi()
    sound = torch.from_numpy(noise(2, 12 * FRAME)).split(FRAME, dim=-1)
    alone, two, other = MimiStream(codec, 1), MimiStream(codec, 2), MimiStream(codec, 3)
    codes = [alone.encode(piece[:1]) for piece in sound]
    spoken = [alone.decode(code) for code in codes]
    nobody = torch.full_like(codes[0], -2)
    for t, piece in enumerate(sound[:6]):
        assert torch.equal(two.encode(piece)[0], codes[t][0])
        assert (two.decode(torch.cat([codes[t], nobody]))[0] - spoken[t][0]).abs().max() <= 1e-5
    before = two.row_state(0)
    sick = torch.stack([torch.full((FRAME,), torch.nan), sound[6][1]])
    assert two.encode(sick, [False, True])[0].tolist() == [-1] * codes[0].shape[1]
    assert not two.decode(torch.cat([nobody, codes[6]]))[0].any()
    assert not two.decode(torch.cat([codes[6], codes[6]]), [False, True])[0].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in two.row_state(0).items())
    other.encode(torch.cat([sound[0], sound[0][:1]]))
    other.load_row(2, before)
    for t in range(6, 12):
        assert torch.equal(other.encode(sound[t][:1].expand(3, -1))[2], codes[t][0])
    mixed = torch.stack([nobody, codes[6], codes[7], nobody], dim=-1)
    two.load_row(1, before)
    expected = torch.cat([torch.zeros(1, FRAME), spoken[6], spoken[7], torch.zeros(1, FRAME)], dim=-1)
    assert (two.decode_frames(mixed.expand(2, -1, -1))[0] - expected[0]).abs().max() <= 1e-5


def test_a_saved_audio_stream_goes_on_and_foreign_states_are_refused():
    codec, sound = mimi(), torch.from_numpy(noise(2, 4 * FRAME))
    stream, resumed = MimiStream(codec, 2), MimiStream(codec, 2)
    stream.decode_frames(stream.encode_frames(sound))
    saved = stream.state_dict()
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.encode_frames(sound), stream.encode_frames(sound))
    twin = copy.deepcopy(stream)
    assert torch.equal(twin.encode_frames(sound), stream.encode_frames(sound))
    held = resumed.state_dict()
    name = next(iter(saved))
    for bad in (saved | {name: saved[name][:1]}, saved | {name: saved[name] * torch.nan}, saved | {"tone": saved[name]}, {}):
        with pytest.raises(ValueError, match="audio stream"):
            resumed.load_state_dict(bad)
    assert all(torch.equal(tensor, held[name]) for name, tensor in resumed.state_dict().items())


def test_streaming_does_not_write_to_the_codec():
    codec = mimi()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    stream = MimiStream(codec, 1)
    stream.decode(stream.encode(torch.from_numpy(noise(1, FRAME))))
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())


@pytest.mark.parametrize("changes", [{"use_causal_conv": False}, {"pad_mode": "reflect"}])
def test_a_mimi_that_cannot_stream_is_refused(changes):
    with pytest.raises(ValueError, match="causal Mimi"):
        MimiStream(mimi(**changes), 1)

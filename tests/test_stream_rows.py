"""Rows of a stream: each depends on nothing but its own past and its seed, and a step that fails has changed nothing."""

import copy
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_live_session import sound
from tiny import speaking_model, tiny_model

from modeling_moshi_ttt import MoshiTTTFrame, MoshiTTTSession
from modeling_moshi_ttt.tokens_moshi_ttt import UNGENERATED

NAN = float("nan")


@pytest.fixture(scope="module", params=["linear", "mlp"])
def model(request):
    return tiny_model(ttt_mixer=request.param)


def user_codes(model, rows: int, frames: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.audio_vocab_size, (rows, model.config.num_user_codebooks, frames), generator=generator)


def tokens(frame: MoshiTTTFrame) -> torch.Tensor:
    return torch.cat([frame.text[:, None], frame.audio_codes, frame.valid[:, None]], dim=1)  # [B, 2 + K]


def talk(stream, user, active=None) -> torch.Tensor:
    said = [tokens(stream.step(user[..., t], active)) for t in range(user.shape[-1])]
    return torch.stack(said, -1) if said else torch.empty(0)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


event = st.tuples(st.sampled_from(["pause", "reset", "nan", "nothing", "replace"]), st.integers(1, 4))


@settings(max_examples=15, deadline=None)
@given(st.lists(event, min_size=12, max_size=24), st.integers(0, 2**40))
def test_a_row_in_any_company_is_that_row_alone(model, events, seed):
    """Row 0 pauses at random; the others come, go, are reset, turn NaN and are replaced: it says what it says alone."""
    together, alone = model.new_stream(5, seeds=[seed, 1, 2, 3, 4]), model.new_stream(1, seeds=[seed])
    user = user_codes(model, 5, len(events), seed % 1000)
    for t, (what, row) in enumerate(events):
        active = torch.tensor([(seed >> t) % 3 > 0, *(what != "pause" or row != i for i in range(1, 5))])
        if what == "reset":
            together.reset([row], seeds=[t])
        elif what == "replace":
            together.load_row(row, model.new_stream(1).row_state(0))
        elif what == "nan":
            poison(together, row)
        frame = tokens(together.step(user[..., t], active))[0]
        if active[0]:
            assert torch.equal(frame, tokens(alone.step(user[:1, :, t]))[0])
        else:
            assert not frame[-1]


def poison(stream, row: int) -> None:
    """A row's fast weights become NaN, as after an inner step that diverged."""
    cache = stream.past_key_values
    sick = [None if ttt is None else replace(ttt, b1=ttt.b1.index_fill(0, torch.tensor([row]), NAN)) for ttt in cache.state.ttt_states]
    cache.state = replace(cache.state, ttt_states=tuple(sick))


def test_a_sick_row_is_named_and_healed_by_a_reset(model):
    stream, user = model.new_stream(3, do_sample=False), user_codes(model, 3, 20)
    talk(stream, user[..., :6])
    poison(stream, 1)
    talk(stream, user[..., 6:9])
    assert stream.step(user[..., 9]).valid.tolist() == [True, False, True]
    assert list(stream.problems()) == [1]
    assert "not finite" in stream.problems()[1]
    with pytest.raises(ValueError, match="row 1 is sick"):
        stream.row_state(1)
    stream.reset([1])
    assert not stream.problems()
    assert torch.equal(talk(stream, user[..., 10:])[1], talk(model.new_stream(1, do_sample=False), user[1:2, :, 10:])[0])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stream.state_dict().values())


def test_seeds_repeat_across_batch_sizes_and_places(model):
    user = user_codes(model, 1, 25)
    alone = talk(model.new_stream(1, seeds=[7]), user)[0]
    three = talk(model.new_stream(3, seeds=[9, 8, 7]), user.expand(3, -1, -1))
    assert torch.equal(three[2], alone)
    assert not torch.equal(three[1], alone)
    again = model.new_stream(3, generator=torch.Generator().manual_seed(5))
    twin = model.new_stream(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(talk(again, user.expand(3, -1, -1)), talk(twin, user.expand(3, -1, -1)))
    again.reset()
    twin.reset()
    assert torch.equal(again.state.seeds, twin.state.seeds)


def test_settings_are_a_rows_own(model):
    user = user_codes(model, 2, 20).expand(2, -1, -1)
    mixed = talk(model.new_stream(2, do_sample=[True, False], temperature=[1.3, 0.0], top_k=[5, 0], seeds=[3, 4]), user)
    own = talk(model.new_stream(1, temperature=1.3, top_k=5, seeds=[3]), user[:1])
    greedy = talk(model.new_stream(1, do_sample=False, temperature=0.0, top_k=None), user[1:])
    assert torch.equal(mixed[0], own[0])
    assert torch.equal(mixed[1], greedy[0])


def test_a_paused_row_keeps_its_whole_state(model):
    stream, user = model.new_stream(2, seeds=[1, 2]), user_codes(model, 2, 30)
    talk(stream, user[..., :17])
    before = stream.row_state(1)
    talk(stream, user[..., 17:], torch.tensor([True, False]))
    assert equal(stream.row_state(1), before)
    assert stream.past_key_values.frames.tolist() == [30, 17]


@pytest.mark.parametrize("heard", [0, 3, 7, 30])
def test_a_conversation_moves_to_another_row_and_batch(model, heard):
    """Saved as tensors, it goes on in a stream of another size, in another row, beside rows that have heard more or nothing."""
    user = user_codes(model, 1, 60)
    whole = model.new_stream(1, seeds=[11], temperature=1.1)
    talk(whole, user[..., :heard])
    state = {name: tensor.clone() for name, tensor in whole.row_state(0).items()}
    expected = talk(whole, user[..., heard:])[0]
    for company in (0, 5, 40):
        others = model.new_stream(3, seeds=[1, 2, 3])
        talk(others, user_codes(model, 3, company, 8))
        others.load_row(2, state)
        assert torch.equal(talk(others, user[..., heard:].expand(3, -1, -1))[2], expected)
        # Sums of a matrix product depend on the number of its rows in their last bits, and on nothing else of the others.
        for name, tensor in whole.row_state(0).items():
            assert torch.allclose(others.row_state(2)[name].double(), tensor.double(), atol=1e-11), name


def test_states_that_are_not_of_this_model_change_nothing(model):
    stream = model.new_stream(2)
    talk(stream, user_codes(model, 2, 9))
    before, good = stream.state_dict(), stream.row_state(0)
    for bad in (
        {name: tensor for name, tensor in good.items() if name != "said"},
        good | {"seeds": torch.tensor([-1])},
        good | {"past_key_values.frames": torch.tensor([9, 9])},
        stream.state_dict(),
        {name: tensor * NAN if tensor.is_floating_point() else tensor for name, tensor in good.items()},
    ):
        with pytest.raises(ValueError):
            stream.load_row(1, bad)
        assert equal(stream.state_dict(), before)
    for row in (2, -1):
        with pytest.raises(ValueError, match="out of range"):
            stream.load_row(row, good)
        with pytest.raises(ValueError, match="out of range"):
            stream.row_state(row)


def test_a_copy_goes_its_own_way_with_the_same_model(model):
    stream, user = model.new_stream(2, seeds=[1, 2]), user_codes(model, 2, 20)
    talk(stream, user[..., :9])
    twin = copy.deepcopy(stream)
    assert twin.model is stream.model
    first = talk(twin, user[..., 9:])
    assert torch.equal(talk(stream, user[..., 9:]), first)


def test_what_inference_mode_kept_can_be_changed_outside_of_it(model):
    stream, user = model.new_stream(2, seeds=[1, 2]), user_codes(model, 2, 20)
    with torch.inference_mode():
        talk(stream, user[..., :5])
    stream.reset([0])
    talk(stream, user[..., 5:9])
    cache = model.new_cache(1)
    with torch.inference_mode():
        model(user_audio_codes=user[:1, :, :3], past_key_values=cache)
    with torch.no_grad():
        model(user_audio_codes=user[:1, :, 3:4], past_key_values=cache)
    assert cache.frames.tolist() == [4]


class _Injected(BaseException):
    """What Ctrl-C or an allocator may raise anywhere."""


def raise_at(point: int):
    """A trace function that raises at the given line executed inside the package; `lines` counts them."""
    counter = {"lines": 0}

    def trace(frame, event, arg):
        if "modeling_moshi_ttt" not in frame.f_code.co_filename:
            return None
        if event == "line":
            counter["lines"] += 1
            if counter["lines"] == point:
                raise _Injected
        return trace

    return trace, counter


def traced(trace, call) -> bool:
    """Whether the call came through."""
    sys.settrace(trace)
    try:
        call()
        return True
    except _Injected:
        return False
    finally:
        sys.settrace(None)


def a_step(processor, mixer):
    model = tiny_model(ttt_mixer=mixer)
    user, stream = user_codes(model, 2, 13), model.new_stream(2, seeds=[1, 2])
    talk(stream, user[..., :12])
    return stream.state_dict, lambda: stream.step(user[..., 12], torch.tensor([True, False]))


def a_forward(processor, mixer):
    model = tiny_model(ttt_mixer=mixer)
    user, cache = user_codes(model, 2, 13), model.new_cache(2)
    with torch.no_grad():
        model(user_audio_codes=user[..., :11], past_key_values=cache)
    return cache.state_dict, lambda: torch.no_grad()(model)(user_audio_codes=user[..., 11:], past_key_values=cache)


def an_encode(processor, mixer):
    audio = processor.new_audio_stream(2)
    audio.encode(sound(2, 1920))
    return audio.state_dict, lambda: audio.encode(sound(2, 1920, seed=2), [True, False])


def a_decode(processor, mixer):
    audio, codes = processor.new_audio_stream(2), torch.arange(48).view(2, 8, 3).index_fill(2, torch.tensor([1]), UNGENERATED)
    audio.decode(codes[..., 0])
    return audio.state_dict, lambda: audio.decode_frames(codes)


def a_session(processor, mixer):
    session = MoshiTTTSession(speaking_model(ttt_mixer=mixer), processor, 2, 16000, seeds=[1, 2])
    for piece in sound(2, 5 * 1280).split(1280, 1):
        session.step(piece)

    def state():
        return {f"{row}.{name}": x for row in range(2) for name, x in session.row_state(row).items()}

    return state, lambda: session.step(sound(2, 1280, seed=2), [True, False])


def a_prefill(processor, mixer):
    model = tiny_model(ttt_mixer=mixer)
    user, cache = user_codes(model, 2, 13), model.new_cache(2)
    model.prefill(cache, user_audio_codes=user[..., :11])
    return cache.state_dict, lambda: model.prefill(cache, user_audio_codes=user[..., 11:])


CALLS = [(begin, mixer) for begin in (a_step, a_forward, a_prefill, a_session) for mixer in ("linear", "mlp")]


@pytest.mark.parametrize(("begin", "mixer"), [*CALLS, (an_encode, ""), (a_decode, "")])  # the codec has no mixer
def test_a_call_that_raises_anywhere_has_changed_nothing(processor, begin, mixer):
    """At twenty lines from first to last: the next call gives what the unbroken run gives."""
    state, call = begin(processor, mixer)
    trace, counter = raise_at(-1)
    assert traced(trace, call)
    expected, total = state(), counter["lines"]
    # Without the last five, the `return` after the commit and the way out: they lose what the call gives, and nothing else.
    lines = {1 + round(i * (total - 6) / 19) for i in range(20)}
    assert len(lines) == 20
    for line in lines:
        state, call = begin(processor, mixer)
        before = state()
        assert not traced(raise_at(line)[0], call)
        assert equal(state(), before), f"line {line} of {total}"
        call()
        assert equal(state(), expected), f"line {line} of {total}"


def test_a_stream_is_of_one_thread_at_a_time():
    """Two threads in one stream would mix two orders of frames; the second is refused, and a copy has a lock of its own."""
    model = tiny_model()
    stream = model.new_stream(do_sample=False)
    wanted = copy.deepcopy(stream).step().text
    refused: list[str] = []

    def from_another_thread(*_):
        def call():
            with pytest.raises(ValueError, match="another thread"):
                stream.step()
            refused.append("step")

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    run, stream._run = stream._run, lambda *inputs: (from_another_thread(), run(*inputs))[1]
    assert torch.equal(stream.step().text, wanted)
    assert refused == ["step"]
    assert copy.deepcopy(stream).in_use is not stream.in_use

"""The decoding step: the same numbers as a whole pass, and weights that stay where they are until a mini-batch ends."""

import dataclasses

import pytest
import torch
from ttt_cases import make_inputs, run, start

MIXERS = ["linear", "mlp"]


def frozen(mixer, rows, length, b, dtype=torch.float64):
    return {name: x.detach() for name, x in make_inputs(mixer, rows, length, 2, 4, b, dtype=dtype).items()}


@pytest.mark.parametrize("b", [1, 3, 8])
@pytest.mark.parametrize("mixer", MIXERS)
def test_chunks_and_single_frames_in_turn_give_one_pass(mixer, b):
    values = frozen(mixer, 2, 20, b)
    whole, end = run(mixer, values, start(mixer, values, 2))
    state, outputs, first = start(mixer, values, 2), [], 0
    for size in (1, 1, 4, 1, 5, 1, 1, 1, 2, 1, 1, 1):
        out, state = run(mixer, values, state, slice(first, first + size))
        outputs.append(out)
        first += size
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    for name, value in end.tensors().items():
        torch.testing.assert_close(state.tensors()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_are_rewritten_only_where_a_mini_batch_ends(mixer):
    values = frozen(mixer, 1, 12, 4)
    state = start(mixer, values, 1)
    for t in range(12):
        before = [w.data_ptr() for w in state.weights]
        _, state = run(mixer, values, state, slice(t, t + 1))
        after = [w.data_ptr() for w in state.weights]
        assert (before != after) == (t % 4 == 3), t


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_kept_of_the_open_mini_batch_can_always_be_made_again(mixer):
    values = frozen(mixer, 3, 9, 4)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 2] = mask[2, 0] = False
    state = start(mixer, values, 3)
    for t in range(8):
        _, state = run(mixer, values, state, slice(t, t + 1), mask)
        bare = dataclasses.replace(state, open_factors=None)
        assert state.open_factors is not None
        expected, _ = run(mixer, values, state, slice(8, 9))
        found, _ = run(mixer, values, bare, slice(8, 9))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_masked_frame_parts_rows_that_stood_together(mixer):
    values = frozen(mixer, 2, 11, 4)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 5] = False
    state, outputs = start(mixer, values, 2), []
    for t in range(11):
        out, state = run(mixer, values, state, slice(t, t + 1), mask if t == 5 else None)
        assert state.open_factors.lockstep == (t < 5)
        outputs.append(out)
    expected, end = run(mixer, values, start(mixer, values, 2), slice(0, 11), mask)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-12)
    for name, value in end.tensors().items():
        torch.testing.assert_close(state.tensors()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_garbage_in_a_masked_frame_reaches_nothing(mixer):
    values = frozen(mixer, 2, 6, 4)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3] = False
    dirty = {name: x.clone() for name, x in values.items()}
    for name in ("q", "k", "v", "lr"):
        dirty[name][1, 3] = float("nan")
    state, other = start(mixer, values, 2), start(mixer, values, 2)
    for t in range(6):
        clean, state = run(mixer, values, state, slice(t, t + 1), mask)
        found, other = run(mixer, dirty, other, slice(t, t + 1), mask)
        assert torch.equal(found, clean)
    assert not run(mixer, values, state, slice(3, 4), mask)[0][1].any()
    assert all(torch.equal(x, other.tensors()[name]) for name, x in state.tensors().items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_reset_between_frames_starts_anew_and_the_others_go_on(mixer):
    values = frozen(mixer, 2, 10, 4)
    state = start(mixer, values, 2)
    outputs = []
    for t in range(10):
        if t == 6:
            state = state.reset([0], start(mixer, values, 1))
        out, state = run(mixer, values, state, slice(t, t + 1))
        outputs.append(out)
    late = values | {name: values[name][:1, 6:] for name in ("q", "k", "v", "lr")}
    anew, _ = run(mixer, late, start(mixer, values, 1))
    on, _ = run(mixer, values, start(mixer, values, 2))
    torch.testing.assert_close(torch.cat(outputs[6:], 1)[:1], anew, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(outputs, 1)[1:], on[1:], rtol=0, atol=1e-12)


def test_a_state_from_decoding_can_be_learned_through():
    values = make_inputs("mlp", 1, 8, 2, 4, 4)
    with torch.no_grad():
        _, state = run("mlp", values, start("mlp", values, 1), slice(0, 1))
        for t in range(1, 6):
            _, state = run("mlp", values, state, slice(t, t + 1))
    out, _ = run("mlp", values, state, slice(6, 7))
    gradient = torch.autograd.grad(out.sum(), values["k"])[0]
    assert gradient[:, 6].any()
    assert not gradient[:, :6].any()


def test_float32_frames_stay_near_float64_over_many_mini_batches():
    exact, single = frozen("mlp", 1, 96, 16), frozen("mlp", 1, 96, 16, torch.float32)
    expected, _ = run("mlp", exact, start("mlp", exact, 1))
    state, outputs = start("mlp", single, 1), []
    for t in range(96):
        out, state = run("mlp", single, state, slice(t, t + 1))
        outputs.append(out)
    assert (torch.cat(outputs, 1) - expected).abs().max() <= 1e-4

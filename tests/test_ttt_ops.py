"""What holds of the TTT ops in every implementation: causality, splits, rows, masks, resets, and clear refusals."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ttt_cases import OPS, WEIGHTS, largest_difference, make_inputs, run, run_all, start

from modeling_moshi_ttt import ttt_ops
from modeling_moshi_ttt.ttt_ops import TTTState
from modeling_moshi_ttt.ttt_state import TTTInputs

MIXERS = ["linear", "mlp"]
BACKENDS = ["reference", "scan"]


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def same_state(a: TTTState, b: TTTState, atol: float = 1e-10) -> bool:
    return a.tensors().keys() == b.tensors().keys() and all(close(x, b.tensors()[name], atol) for name, x in a.tensors().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_frame_moves_nothing_before_it(mixer, b, backend):
    length = 19
    values = {name: x.detach() for name, x in make_inputs(mixer, 1, length, 2, 4, b).items()}
    out, _ = run(mixer, values, start(mixer, values, 1), backend=backend)
    for t in (0, 3, 7, 15, 18):
        changed = dict(values)
        for name in ("q", "k", "v", "lr"):
            changed[name] = values[name].clone()
            changed[name][:, t] += 0.5
        moved, _ = run(mixer, changed, start(mixer, values, 1), backend=backend)
        assert torch.equal(moved[:, :t], out[:, :t]) or close(moved[:, :t], out[:, :t], 1e-14)
        assert not close(moved[:, t], out[:, t], 1e-3)
        if t < length - 1:
            assert not close(moved[:, t + 1 :], out[:, t + 1 :], 1e-9), "later frames must remember the change"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_any_split_gives_the_same_outputs_state_and_gradients(mixer, backend):
    length, b = 23, 4
    values = make_inputs(mixer, 2, length, 2, 3, b)
    whole = run_all(mixer, values, backend=backend)
    g = torch.Generator().manual_seed(1)
    for _ in range(10 if backend == "scan" else 2):
        count = int(torch.randint(1, 8, (1,), generator=g))
        cuts = tuple(sorted((torch.randperm(length - 1, generator=g)[:count] + 1).tolist()))
        assert largest_difference(run_all(mixer, values, cuts, backend=backend), whole) <= 1e-10, cuts


@pytest.mark.parametrize("mixer", MIXERS)
def test_frame_by_frame_without_gradients_equals_one_pass(mixer):
    values = {name: x.detach() for name, x in make_inputs(mixer, 3, 21, 2, 4, 8).items()}
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[1, 3:6] = mask[2, 0] = mask[2, 9] = False  # rows end at different positions of their mini-batches
    whole, end = run(mixer, values, start(mixer, values, 3), mask=mask)
    state, outputs = start(mixer, values, 3), []
    for t in range(21):
        out, state = run(mixer, values, state, slice(t, t + 1), mask)
        outputs.append(out)
    assert close(torch.cat(outputs, 1), whole)
    assert same_state(state, end)
    assert state.frames.tolist() == [21, 18, 19]
    assert state.position.tolist() == [5, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_batch_equals_its_rows_alone_also_after_one_row_is_reset(mixer, backend):
    values = {name: x.detach() for name, x in make_inputs(mixer, 3, 17, 2, 3, 4).items()}
    alone = []
    for row in range(3):
        one = values | {name: values[name][row : row + 1] for name in ("q", "k", "v", "lr")}
        first, state = run(mixer, one, start(mixer, one, 1), slice(0, 6), backend=backend)
        state = start(mixer, one, 1) if row == 1 else state
        second, state = run(mixer, one, state, slice(6, 17), backend=backend)
        alone.append((torch.cat([first, second], 1), state))
    first, state = run(mixer, values, start(mixer, values, 3), slice(0, 6), backend=backend)
    state = state.reset([1], start(mixer, values, 1))
    second, state = run(mixer, values, state, slice(6, 17), backend=backend)
    for row, (out, after) in enumerate(alone):
        assert close(torch.cat([first, second], 1)[row : row + 1], out)
        assert same_state(state.select([row]), after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_masked_frames_are_as_if_they_had_not_been(mixer, backend):
    values = make_inputs(mixer, 2, 14, 2, 3, 4)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1]]).bool()
    out, state = run(mixer, values, start(mixer, values, 2), mask=mask, backend=backend)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    for row in range(2):
        kept = {name: x[row : row + 1, mask[row]] if name in ("q", "k", "v", "lr") else x for name, x in values.items()}
        expected, after = run(mixer, kept, start(mixer, values, 1), backend=backend)
        assert close(out[row : row + 1, mask[row]], expected)
        assert same_state(state.select([row]), after)
    gradient = torch.autograd.grad(out.sum(), values["k"])[0]
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    nothing = torch.zeros_like(mask)
    out, after = run(mixer, values, state, mask=nothing, backend=backend)
    assert not out.any()
    assert same_state(after, state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_garbage_in_masked_frames_reaches_nothing(mixer):
    values = make_inputs(mixer, 1, 9, 2, 3, 4)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = False
    clean = run_all(mixer, values, mask=mask)
    dirty = {name: x.detach().clone() for name, x in values.items()}
    for name in ("q", "k", "v", "lr"):
        dirty[name][:, 4] = float("nan")
    found = run_all(mixer, {name: x.requires_grad_() for name, x in dirty.items()}, mask=mask)
    assert largest_difference(found, clean) == 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_row_remembers_and_the_initial_weights_stay(mixer):
    values = {name: x.detach() for name, x in make_inputs(mixer, 3, 8, 2, 4, 4).items()}
    before = {name: values[name].clone() for name in WEIGHTS[mixer]}
    _, state = run(mixer, values, start(mixer, values, 3))
    for row in range(3):
        assert (state.W1[row] - values["W1"]).abs().max() > 1e-4, f"row {row} learned nothing"
    assert not close(state.W1[1], state.W1[0], 1e-4)
    assert all(torch.equal(values[name], x) for name, x in before.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_op_changes_none_of_its_arguments(mixer):
    values = {name: x.detach() for name, x in make_inputs(mixer, 2, 9, 2, 4, 4).items()}
    _, state = run(mixer, values, start(mixer, values, 2), slice(0, 3))
    kept = state.clone()
    for frames in (slice(3, 4), slice(4, 9)):
        run(mixer, values, state, frames)
    assert same_state(state, kept, 0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_flow_through_reset_and_select(mixer):
    values = make_inputs(mixer, 2, 6, 1, 2, 4)
    _, state = run(mixer, values, start(mixer, values, 2), slice(0, 3))
    state = state.reset(torch.tensor([False, True]), start(mixer, values, 2)).select([1, 0])
    out, _ = run(mixer, values, state, slice(3, 6))
    fresh, old = (torch.autograd.grad(out[row].sum(), [values["W1"], values["k"]], retain_graph=True) for row in (0, 1))
    assert fresh[0].abs().max() > 0 and old[0].abs().max() > 0  # noqa: PT018
    assert not fresh[1][:, :3].any(), "a reset row must not look behind its reset"
    assert old[1][0, :3].any()
    detached, _ = run(mixer, values, state.detach(), slice(3, 6))
    assert torch.autograd.grad(detached.sum(), values["W1"], allow_unused=True)[0] is None


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_saved_and_restored_goes_on_alike(mixer):
    values = {name: x.detach() for name, x in make_inputs(mixer, 2, 9, 2, 4, 4).items()}
    _, state = run(mixer, values, start(mixer, values, 2), slice(0, 6))
    restored = TTTState.from_tensors({name: x.clone() for name, x in state.tensors().items()})
    expected, _ = run(mixer, values, state, slice(6, 9))
    assert torch.equal(run(mixer, values, restored, slice(6, 9))[0], expected)
    lacking = state.tensors()
    del lacking["lr"]
    with pytest.raises(ValueError, match="lacks lr"):
        TTTState.from_tensors(lacking)
    with pytest.raises(ValueError, match="unknown entries W9"):
        TTTState.from_tensors(state.tensors() | {"W9": state.W1})
    with pytest.raises(ValueError, match="frames of the saved TTT state has shape"):
        TTTState.from_tensors(state.tensors() | {"frames": state.frames[:1]})
    for name in set(state.tensors()) - {"W1", "k", "frames"}:  # of fewer rows than W1
        with pytest.raises(ValueError, match=rf"{name} of the saved TTT state has shape \(1, "):
            TTTState.from_tensors(state.tensors() | {name: state.tensors()[name][:1]})
    with pytest.raises(ValueError, match="frames of the saved TTT state has dtype torch.float64"):
        TTTState.from_tensors(state.tensors() | {"frames": state.frames.double()})


def test_the_dtype_of_the_inputs_comes_back_and_the_state_stays_float32():
    values = {name: x.detach().to(torch.bfloat16) for name, x in make_inputs("mlp", 2, 6, 2, 4, 4).items()}
    out, state = run("mlp", values, start("mlp", values, 2))
    assert out.dtype == torch.bfloat16
    assert {x.dtype for x in state.tensors().values()} == {torch.float32, torch.int64}
    exact, _ = run("mlp", {name: x.float() for name, x in values.items()}, start("mlp", values, 2))
    assert torch.equal(out, exact.to(torch.bfloat16))


def test_autocast_changes_nothing():
    values = make_inputs("mlp", 1, 9, 2, 4, 4, dtype=torch.float32)
    plain, _ = run("mlp", values, start("mlp", values, 1))
    with torch.autocast("cpu", torch.bfloat16):
        inside, state = run("mlp", values, start("mlp", values, 1))
        gradient = torch.autograd.grad(inside.sum(), values["W1"])[0]
    assert torch.equal(inside, plain)
    assert state.W1.dtype == torch.float32
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), values["W1"])[0])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("mixer", MIXERS)
def test_scan_equals_reference_for_any_shape_split_and_mask(mixer, data):
    rows, length, heads = (data.draw(st.integers(1, top), name) for name, top in (("rows", 3), ("length", 11), ("heads", 2)))
    dim, b, group = (data.draw(st.integers(1, top), name) for name, top in (("extra dim", 4), ("b", 6), ("group", 4)))
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set()), "cuts")))
    cells = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)), "mask")
    mask = None if cells is None else torch.tensor(cells).view(rows, length)
    # Of one or two numbers, LN keeps no more than a sign, and small errors grow without bound.
    values = make_inputs(mixer, rows, length, heads, 3 + dim, b, seed=data.draw(st.integers(0, 99), "seed"))
    theirs = run_all(mixer, values, mask=mask, backend="reference")
    assert largest_difference(run_all(mixer, values, cuts, mask, backend="scan", group_size=group), theirs) <= 1e-10


# --- refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q": torch.zeros(2, 5, 12)}, {}, r"q has shape \(2, 5, 12\)"),
        ({"q": torch.zeros(2, 0, 3, 4)}, {}, "at least one row and one frame"),
        ({"q": torch.zeros(0, 5, 3, 4)}, {}, "at least one row and one frame"),
        ({"k": torch.zeros(2, 6, 3, 4)}, {}, r"k has shape \(2, 6, 3, 4\); with q \(2, 5, 3, 4\) it must be \(2, 5, 3, 4\)"),
        ({"lr": torch.zeros(2, 5, 3, 1)}, {}, r"lr has shape .* must be \(2, 5, 3\)"),
        ({"token_weight": torch.zeros(5)}, {"mini_batch_size": 4}, r"token_weight has shape \(5,\); .* must be \(4,\)"),
        ({"norm_bias": torch.zeros(12)}, {}, r"norm_bias has shape \(12,\)"),
        ({"v": torch.zeros(2, 5, 3, 4, dtype=torch.int64)}, {}, "v has dtype torch.int64; it must be a floating dtype"),
        ({"k": torch.zeros(2, 5, 3, 4, device="meta")}, {}, "k is on meta, q on cpu"),
        ({}, {"mini_batch_size": 0}, "mini_batch_size is 0; it must be at least 1"),
        ({}, {"group_size": 0}, "group_size is 0; it must be at least 1"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it must be one of auto, scan, triton, reference"),
        ({}, {"mask": torch.ones(2, 5)}, r"mask is torch.float32 \(2, 5\) on cpu; it must be bool \(2, 5\)"),
        ({}, {"mask": torch.ones(2, 4, dtype=torch.bool)}, r"must be bool \(2, 5\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, options, message):
    values = {name: x.detach() for name, x in make_inputs("linear", 2, 5, 3, 4, 4).items()}
    inputs = values | change
    arguments = [inputs[name] for name in ("q", "k", "v", "lr", "token_weight", "norm_weight", "norm_bias")]
    with pytest.raises(ValueError, match=message):
        OPS["linear"](*arguments, start("linear", values, 2), **({"mini_batch_size": 4} | options))


def test_a_state_of_something_else_is_refused():
    values = {name: x.detach() for name, x in make_inputs("linear", 2, 5, 3, 4, 4).items()}
    other = {name: x.detach() for name, x in make_inputs("mlp", 2, 5, 3, 4, 4).items()}
    with pytest.raises(ValueError, match="state belongs to mixer 'mlp'; ttt_linear needs one of mixer 'linear'"):
        run("linear", values, start("mlp", other, 2))
    with pytest.raises(ValueError, match="the state has 3 rows, q has 2"):
        run("linear", values, start("linear", values, 3))
    _, used = run("linear", values, start("linear", values, 2))
    with pytest.raises(ValueError, match="made at mini_batch_size 4, this call has 2"):
        run("linear", values | {"token_weight": torch.ones(2)}, used)
    with pytest.raises(ValueError, match="needs 3 heads of 4"):
        run("linear", values, start("linear", make_inputs("linear", 2, 5, 4, 3, 4), 2))
    with pytest.raises(ValueError, match="the state is on meta, q on cpu"):
        run("linear", values, start("linear", values, 2).to("meta"))


def test_state_methods_refuse_what_does_not_fit():
    values = {name: x.detach() for name, x in make_inputs("linear", 2, 5, 3, 4, 4).items()}
    state = start("linear", values, 2)
    _, used = run("linear", values, state)
    with pytest.raises(ValueError, match=r"rows \[2\] are out of range; the state has rows 0 to 1"):
        used.reset([2], state)
    with pytest.raises(ValueError, match=r"rows is a mask of shape \(3,\)"):
        used.reset(torch.ones(3, dtype=torch.bool), state)
    with pytest.raises(ValueError, match="initial has 3 rows; the state has 2"):
        used.reset([0], start("linear", values, 3))
    with pytest.raises(ValueError, match="initial has already consumed frames"):
        used.reset([0], used)
    with pytest.raises(ValueError, match="cannot be reset to one of mixer 'mlp'"):
        used.reset([0], start("mlp", make_inputs("mlp", 2, 5, 3, 4, 4), 2))
    with pytest.raises(ValueError, match="batch_size is 0"):
        start("linear", values, 0)
    with pytest.raises(ValueError, match="W2 and b2 come together"):
        TTTState.initial(values["W1"], values["b1"], values["W1"], batch_size=1)
    with pytest.raises(ValueError, match=r"b1 has shape \(3, 4\); with W1 \(3, 4, 4\) it must be \(3, 1, 4\)"):
        TTTState.initial(values["W1"], values["b1"][:, 0], batch_size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        used.W1 = values["W1"]


def test_triton_is_refused_by_name_and_left_out_by_auto_where_it_cannot_run():
    values = {name: x.detach() for name, x in make_inputs("linear", 1, 5, 3, 4, 4).items()}
    with pytest.raises(ValueError, match="backend 'triton' does not take these inputs: .+; use 'auto' or 'scan'"):
        run("linear", values, start("linear", values, 1), backend="triton")
    automatic, _ = run("linear", values, start("linear", values, 1), backend="auto")
    scanned, _ = run("linear", values, start("linear", values, 1), backend="scan")
    assert torch.equal(automatic, scanned)


def test_the_reason_for_the_torch_body_is_said_once(caplog):
    ttt_ops._say_once.cache_clear()
    for _ in range(3):
        ttt_ops._say_once("head_dim 7 is not a power of two")
    assert [r.message for r in caplog.records] == ["TTT runs in torch instead of Triton: head_dim 7 is not a power of two"]


class OnGPU(SimpleNamespace):
    """Stands in for a tensor that torch without CUDA cannot make."""

    def __getitem__(self, index):
        return torch.zeros(1, 1, 1, 1, 32)


def test_one_frame_on_a_gpu_is_decoded_in_torch(monkeypatch):
    monkeypatch.setattr("modeling_moshi_ttt.ttt_kernels.is_supported", lambda q, weights: None)
    state = start("linear", make_inputs("linear", 1, 1, 1, 32, 4), 1).detach()

    def way(frames, backend="auto", learning=False):
        q = OnGPU(is_cuda=True, shape=(1, frames, 1, 32), requires_grad=learning)
        return ttt_ops._choose_way(backend, TTTInputs(*[q] * 7), state, state.weights, 4)

    assert [way(1), way(2), way(1, "triton"), way(1, learning=True)] == ["decode", "triton", "triton", "triton"]


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_positions_that_the_host_knows_are_not_asked_of_the_device(mixer, monkeypatch):
    values = {name: x.detach() for name, x in make_inputs(mixer, 2, 13, 2, 4, 4).items()}
    whole, _ = run(mixer, values, start(mixer, values, 2))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("read back"))
    state, outputs = start(mixer, values, 2), []
    for first, last in ((0, 4), (4, 8), (8, 9), (9, 10), (10, 13)):
        out, state = run(mixer, values, state, slice(first, last))
        outputs.append(out)
        state = state.select([0, 1]).detach() if last != 9 else state
    assert torch.allclose(torch.cat(outputs, 1), whole)
    assert state.lockstep_frames == 13


def test_rows_are_known_to_be_in_lockstep_until_a_mask_or_a_reset():
    values = {name: x.detach() for name, x in make_inputs("linear", 2, 8, 2, 4, 4).items()}
    _, state = run("linear", values, start("linear", values, 2))
    assert state.lockstep_frames == 8
    _, masked = run("linear", values, state, mask=torch.tensor([[True] * 8, [True] * 7 + [False]]))
    reset = masked.reset([1], start("linear", values, 2))
    loaded = TTTState.from_tensors(state.tensors())
    assert (masked.lockstep_frames, reset.lockstep_frames, loaded.lockstep_frames) == (None, None, 8)
    for one in (masked, reset, loaded):
        expected, _ = run("linear", values, one, backend="reference")
        assert torch.allclose(run("linear", values, one)[0], expected)
    assert not masked.between_mini_batches
    assert reset.between_mini_batches

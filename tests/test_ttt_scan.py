"""The scan's own backward: true derivatives, any group size, memory that falls with the group, no precision lost on the way back, and
nothing kept where nothing is learned.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from ttt_cases import INPUTS, OPS, WEIGHTS, largest_difference, make_inputs, run, run_all, start

from modeling_moshi_ttt.ttt_functions import Gelu
from modeling_moshi_ttt.ttt_ops import TTTState
from modeling_moshi_ttt.ttt_scan import scan_mini_batches
from modeling_moshi_ttt.ttt_state import TTTInputs

MIXERS = ["linear", "mlp"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_backward_gives_true_derivatives(mixer):
    """Of everything at once, where one row's mini-batch is not complete, rates are 0 and a token weight is 0."""
    values = make_inputs(mixer, 2, 8, 1, 3, 2)
    with torch.no_grad():
        values["lr"][0, 3] = 0
        values["token_weight"][0] = 0
    complete = torch.tensor([[True, True, False, True], [True, True, True, False]])

    def body(*tensors):
        given = dict(zip(values, tensors))
        tokens = [given[name].unflatten(1, (4, 2)) for name in ("q", "k", "v", "lr")]
        weights = tuple(given[name].expand(2, *given[name].shape) for name in WEIGHTS[mixer])
        inputs = TTTInputs(*tokens, given["token_weight"], given["norm_weight"], given["norm_bias"])
        out, after = scan_mini_batches(inputs, weights, complete, group_size=3, eps=1e-3)
        return (out, *after)

    assert torch.autograd.gradcheck(body, tuple(values.values()), atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_last_token_weight_of_zero_keeps_its_gradient(mixer):
    values = make_inputs(mixer, 1, 6, 2, 4, 2)
    with torch.no_grad():
        values["token_weight"][-1] = 0
    found, expected = (run_all(mixer, values, backend=backend) for backend in ("scan", "reference"))
    assert expected["grad_token_weight"][-1].abs() > 1e-3
    assert largest_difference(found, expected) <= 1e-11


@pytest.mark.parametrize("mixer", MIXERS)
def test_group_sizes_change_no_number_at_188_mini_batches(mixer):
    values = make_inputs(mixer, 1, 188, 2, 4, 1)
    first = run_all(mixer, values, backend="scan", group_size=1)
    for group in (3, 16, 188, 10**6):
        assert largest_difference(run_all(mixer, values, backend="scan", group_size=group), first) <= 1e-10, group


def kept_bytes(mixer: str, length: int, group: int) -> int:
    """Bytes of the different tensors that one call keeps for its backward."""
    values = make_inputs(mixer, 1, length, 2, 16, 2, dtype=torch.float32)
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out, _ = run(mixer, values, start(mixer, values, 1), backend="scan", group_size=group)
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_memory_kept_for_backward_is_the_tokens_own_and_one_state_a_group(mixer):
    width = 16 if mixer == "linear" else 64
    weights = 2 * 4 * ((16 + 1) * width + (0 if mixer == "linear" else (width + 1) * 16))  # bytes of one state
    own = (3 * 16 + 1) + 2 * 16 + (0 if mixer == "linear" else 2 * width)  # q, k, v, lr; f(k), f(q); the first layer of both
    one_group = kept_bytes(mixer, 128, 64)  # 128 frames are 64 mini-batches
    for group in (1, 2, 4, 16):
        assert kept_bytes(mixer, 128, group) - one_group == (64 // group - 1) * weights
    tokens = one_group - 2 * weights  # less the initial weights and the last
    assert abs(tokens - 128 * 2 * 4 * own) <= 1024, "b, D and N numbers of the shared inputs"
    assert kept_bytes(mixer, 256, 16) <= 2.1 * kept_bytes(mixer, 128, 16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_walking_the_weights_back_loses_no_precision(mixer):
    """In float32, over 1,000 mini-batches with no weights kept in between, gradients are as near to float64's as with them kept at each."""
    values = make_inputs(mixer, 1, 1000, 2, 16, 1, dtype=torch.float32)
    exact = run_all(mixer, {name: x.detach().double().requires_grad_() for name, x in values.items()}, backend="scan")

    def error(group: int) -> float:
        found = run_all(mixer, values, backend="scan", group_size=group)
        return max(float((found[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact if name.startswith("grad_"))

    assert error(1000) <= 2 * error(1)
    assert error(1) <= 1e-5


@pytest.mark.parametrize(("b", "group"), [(1, 1), (1, 16), (8, 1), (8, 16)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_first_steps_far_larger_than_the_weights_lose_no_precision(mixer, b, group):
    """(W - step) + step is not W where the step is a thousand times as large; weights at a group's start are taken, not walked back to."""
    values = make_inputs(mixer, 1, 64, 2, 16, b, dtype=torch.float32)
    with torch.no_grad():
        values["lr"].add_(0.7)
        for name in WEIGHTS[mixer]:
            values[name].mul_(1e-3)
    exact = run_all(mixer, {name: x.detach().double().requires_grad_() for name, x in values.items()}, backend="scan")
    found = run_all(mixer, values, backend="scan", group_size=group)
    for name in exact:
        if name.startswith("grad_"):
            assert (found[name] - exact[name]).abs().max() <= 2e-5 * exact[name].abs().max(), name


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_second_derivatives_are_refused(mixer, squared):
    """They would be wrong. A constant gradient coming in is the case that torch's own guard lets through."""
    values = make_inputs(mixer, 1, 7, 2, 4, 3)
    out, _ = run(mixer, values, start(mixer, values, 1), backend="scan")
    loss = out.square().sum() if squared else out[..., 0].sum()
    with pytest.raises(RuntimeError, match="'scan' has no second derivative .* use backend 'reference'"):
        torch.autograd.grad(loss, values["q"], create_graph=True)


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_is_kept_where_nothing_is_learned(mixer):
    values = make_inputs(mixer, 1, 8, 2, 4, 2)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        out, state = run(mixer, values, start(mixer, values, 1), backend="scan")
    assert not out.requires_grad
    assert not state.W1.requires_grad
    assert not kept


@pytest.mark.parametrize("mixer", MIXERS)
def test_recomputation_around_the_op_changes_no_number(mixer):
    values = make_inputs(mixer, 2, 11, 2, 4, 3)

    def body(*inputs):
        state = TTTState.initial(*inputs[len(INPUTS) :], batch_size=2)
        return OPS[mixer](*inputs[: len(INPUTS)], state, mini_batch_size=3, group_size=2)[0]

    given = [values[name] for name in (*INPUTS, *WEIGHTS[mixer])]
    plain = torch.autograd.grad(body(*given).square().sum(), given)
    again = torch.autograd.grad(checkpoint(body, *given, use_reentrant=False).square().sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_asked_for_twice_are_the_same(mixer):
    values = make_inputs(mixer, 1, 7, 2, 4, 3)
    out, _ = run(mixer, values, start(mixer, values, 1), backend="scan")
    once = torch.autograd.grad(out.sum(), values["W1"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), values["W1"])[0], once)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_inputs_get_bfloat16_gradients_of_a_float32_computation(mixer):
    values = make_inputs(mixer, 1, 9, 2, 4, 3, dtype=torch.bfloat16)
    out, _ = run(mixer, values, start(mixer, values, 1), backend="scan")
    exact = {name: x.detach().float().requires_grad_() for name, x in values.items()}
    expected, _ = run(mixer, exact, start(mixer, exact, 1), backend="scan")
    for name in values:
        found = torch.autograd.grad(out.float().sum(), values[name], retain_graph=True)[0]
        wanted = torch.autograd.grad(expected.sum(), exact[name], retain_graph=True)[0]
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).abs().max() <= 0.01 * wanted.abs().max(), name


def test_the_gelu_is_torchs_tanh_form():
    z = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True)
    exact = torch.nn.functional.gelu(z, approximate="tanh")
    gelu = Gelu.of(z.detach())
    torch.testing.assert_close(z * gelu.gate, exact, rtol=0, atol=1e-14)
    (slope,) = torch.autograd.grad(exact.sum(), z, create_graph=True)
    torch.testing.assert_close(gelu.slope(), slope.detach(), rtol=0, atol=1e-13)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    torch.testing.assert_close(gelu.curvature(), curvature, rtol=0, atol=1e-13)

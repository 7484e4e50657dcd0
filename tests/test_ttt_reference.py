"""The definition of TTT against independent golden numbers and against formulas worked out by hand."""

import pytest
import torch
from ttt_cases import INPUTS, OPS, WEIGHTS, largest_difference, make_inputs, run_all

from modeling_moshi_ttt.ttt_ops import TTTState


def golden_case(golden, mixer, b):
    prefix = f"{mixer}.b{b}."
    return {name[len(prefix) :]: x for name, x in golden.items() if name.startswith(prefix)}


@pytest.mark.parametrize("backend", ["reference", "scan"])
@pytest.mark.parametrize("b", [1, 4, 8])
@pytest.mark.parametrize(("mixer", "tolerance"), [("linear", 1e-9), ("mlp", 1e-7)])
def test_op_equals_golden_outputs_weights_and_gradients(ttt_ops_golden, mixer, tolerance, b, backend):
    case = golden_case(ttt_ops_golden, mixer, b)
    values = {name: case[name].clone().requires_grad_() for name in (*INPUTS, *WEIGHTS[mixer])}
    state = TTTState.initial(*(values[name] for name in WEIGHTS[mixer]), batch_size=2)
    out, state = OPS[mixer](*(values[name] for name in INPUTS), state, mini_batch_size=b, group_size=2, backend=backend)
    ours = {"out": out} | {f"final_{name}": w for name, w in zip(WEIGHTS[mixer], state.weights)}
    gradients = torch.autograd.grad((out * case["cotangent"]).sum(), list(values.values()))
    ours |= {f"grad_{name}": g for name, g in zip(values, gradients)}
    compared = case.keys() - values.keys() - {"cotangent"}
    assert ours.keys() - compared == {"grad_token_weight"}  # its derivative is checked below
    for name in compared:
        assert (ours[name] - case[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("backend", ["reference", "scan"])
def test_one_linear_token_by_hand(backend):
    """One token, one head, two dimensions, everything written out: the step descends, and the output reads the weights after it."""
    k, v, q = (torch.tensor(x, dtype=torch.float64).view(1, 1, 1, 2) for x in ([0.6, 0.8], [1.0, -1.0], [0.0, 1.0]))
    W, b, lr, eps = torch.tensor([[0.5, -0.5], [0.25, 1.0]], dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64), 0.3, 1e-6
    ones, zeros = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    out, state = OPS["linear"](
        q, k, v, torch.full((1, 1, 1), lr, dtype=torch.float64), torch.ones(1, dtype=torch.float64), ones, zeros,
        TTTState.initial(W[None], b[None, None], batch_size=1), mini_batch_size=1, backend=backend, eps=eps,
    )  # fmt: skip
    z = k.view(2) @ W + b
    half = (z[0] - z[1]) / 2  # of two numbers, LN keeps the sign of the difference: (half, -half) / sqrt(half^2 + eps)
    slope = eps / (half**2 + eps) ** 1.5
    unit = half / (half**2 + eps).sqrt()
    target = (v - k).view(2)
    gradient = ((unit - target[0]) - (-unit - target[1])) * slope / 2 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    W_after, b_after = W - lr * torch.outer(k.view(2), gradient), b - lr * gradient
    torch.testing.assert_close(state.W1[0, 0], W_after, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.b1[0, 0, 0], b_after, rtol=0, atol=1e-12)
    answer = q.view(2) @ W_after + b_after
    half = (answer[0] - answer[1]) / 2
    expected = q.view(2) + half / (half**2 + eps).sqrt() * torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(out.view(2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize(("rows", "length", "heads", "dim", "b"), [(1, 1, 1, 4, 1), (2, 7, 3, 5, 3), (3, 13, 2, 6, 5), (2, 9, 1, 3, 16)])
def test_scan_equals_reference(mixer, rows, length, heads, dim, b):
    values = make_inputs(mixer, rows, length, heads, dim, b)
    theirs = run_all(mixer, values, backend="reference")
    assert largest_difference(run_all(mixer, values, backend="scan", group_size=2), theirs) <= 1e-11


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_reference_gradients_are_true_derivatives(mixer):
    values = make_inputs(mixer, 1, 3, 1, 2, 2)

    def outputs(*tensors):
        given = dict(zip(values, tensors))
        state = TTTState.initial(*(given[name] for name in WEIGHTS[mixer]), batch_size=1)
        out, state = OPS[mixer](*(given[name] for name in INPUTS), state, mini_batch_size=2, backend="reference")
        return (out, *state.weights)

    assert torch.autograd.gradcheck(outputs, tuple(values.values()), atol=1e-6)

"""The Triton kernels against the reference, on the CPU in Triton's interpreter. `test_ttt_kernels.py` runs this file in its own process:

    TRITON_INTERPRET=1 pytest tests/interpreted_ttt_kernels.py

Every buffer that a kernel fills is NaN before, and lies between guards that must be untouched after.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from ttt_cases import AT_THE_BOUND, INPUTS, WEIGHTS, layer_config, make_inputs, run, run_all, start

from modeling_moshi_ttt import ttt_kernels, ttt_scan
from modeling_moshi_ttt.configuration_moshi_ttt import INNER_NORMS
from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTLinear
from modeling_moshi_ttt.ttt_state import TTTInputs

GUARD, MARK = 64, 12345.0


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Poisons what kernels fill; afterwards no kernel may have written beside it."""
    buffers = []

    def poisoned(like, shape):
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count + 2 * GUARD,), MARK, dtype=like.dtype))
        buffers[-1][GUARD:-GUARD] = torch.nan
        return buffers[-1][GUARD:-GUARD].view(shape)

    monkeypatch.setattr(ttt_kernels, "_new", poisoned)
    yield buffers
    assert buffers, "no kernel ran"
    mark = torch.tensor(MARK)
    assert all(bool((x[:GUARD] == mark.to(x.dtype)).all() and (x[-GUARD:] == mark.to(x.dtype)).all()) for x in buffers)


def in_float64(values):
    """The same numbers, float64 but for tokens in bfloat16: those stay, so that the reference's output and its gradient are rounded as
    ours.
    """
    return {name: (x.detach() if x.dtype == torch.bfloat16 else x.detach().double()).requires_grad_() for name, x in values.items()}


def errors(ours, theirs):
    """Largest difference of each tensor, relative to its own largest value; what is 0 but for float64's rounding has none."""
    assert ours.keys() == theirs.keys()
    scales = {n: float(x.abs().max()) if x.abs().max() > 1e-12 else 1.0 for n, x in theirs.items() if x.numel()}
    return {n: float((ours[n].double() - theirs[n].double()).abs().max()) / scale for n, scale in scales.items()}


def check(mixer, shape, bound=2e-5, dtype=torch.float32, cuts=(), mask=None, group=2, seed=0, inner_norm="layer_norm"):
    """One case through the public op, kernels against reference: outputs, final state and every gradient."""
    values = make_inputs(mixer, *shape, dtype=torch.float32, seed=seed, write=AT_THE_BOUND[mixer] if inner_norm == "none" else 1.0)
    if dtype != torch.float32:
        values |= {name: values[name].detach().to(dtype).requires_grad_() for name in "qkv"}
    ours = run_all(mixer, values, cuts, mask, backend="triton", group_size=group, inner_norm=inner_norm)
    theirs = run_all(mixer, in_float64(values), cuts, mask, backend="reference", inner_norm=inner_norm)
    found = errors(ours, theirs)
    assert {"out", "final_W1", *(f"grad_{name}" for name in (*INPUTS, *WEIGHTS[mixer]))} <= found.keys()
    assert max(found.values()) <= bound, found


# (rows, frames, heads, head width, mini-batch), frames no multiple of the mini-batch, and the group size
GRID = [
    ((1, 1, 1, 32, 1), 1),
    ((3, 5, 1, 32, 1), 3),
    ((1, 7, 3, 32, 3), 1),
    ((2, 9, 3, 64, 4), 16),
    ((1, 35, 1, 32, 16), 2),
    ((1, 33, 1, 128, 16), 1),
    ((1, 20, 2, 64, 17), 3),
    ((1, 70, 1, 64, 33), 2),
    ((1, 65, 1, 128, 64), 1),
    ((1, 50, 1, 128, 48), 1),
]


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize(("shape", "group"), GRID)
def test_odd_sizes(mixer, shape, group):
    check(mixer, shape, group=group)


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize(("shape", "group"), [GRID[i] for i in (0, 2, 4, 6, 8)])
def test_odd_sizes_without_a_norm_in_the_inner_loss(mixer, shape, group):
    check(mixer, shape, group=group, inner_norm="none")


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize(("shape", "cuts"), [((2, 9, 1, 32, 4), (3,)), ((1, 18, 1, 64, 16), ()), ((1, 6, 1, 128, 3), ())])
def test_bfloat16(mixer, shape, cuts):
    check(mixer, shape, bound=1e-2, dtype=torch.bfloat16, cuts=cuts)


@pytest.mark.parametrize("inner_norm", INNER_NORMS)
@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_resumed_inside_a_mini_batch_with_rows_at_different_positions(mixer, inner_norm):
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1] = False
    check(mixer, (3, 11, 1, 32, 4), cuts=(1, 6, 7), mask=mask, inner_norm=inner_norm)


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_long_mini_batches_resumed_masked_and_in_bfloat16(mixer):
    mask = torch.rand(2, 51, generator=torch.Generator().manual_seed(1)) > 0.2
    check(mixer, (2, 51, 1, 32, 33), cuts=(20,), mask=mask)
    check(mixer, (1, 35, 1, 64, 33), bound=1e-2, dtype=torch.bfloat16)


@settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape_split_and_mask(data):
    mixer = data.draw(st.sampled_from(["linear", "mlp"]))
    rows, length, b = (data.draw(st.integers(1, most)) for most in (2, 9, 5))
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=2)) - {length}))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)))
    options = {
        "group": data.draw(st.integers(1, 4)),
        "seed": data.draw(st.integers(0, 99)),
        "inner_norm": data.draw(st.sampled_from(INNER_NORMS)),
    }
    check(mixer, (rows, length, 1, 32, b), cuts=cuts, mask=mask, **options)


def arguments(mixer, rows=2, number=3, b=4, heads=1, dim=32, dtype=torch.float32):
    """What the body itself takes, with mini-batches that stay open in the middle."""
    values = make_inputs(mixer, rows, number * b, heads, dim, b, dtype=dtype)
    tokens = [values[n].detach().unflatten(1, (number, b)) for n in INPUTS[:4]]
    weights = [values[n].detach().expand(rows, *values[n].shape).clone() for n in WEIGHTS[mixer]]
    complete = torch.arange(rows * number).view(rows, number) % 3 != 1
    return [x.requires_grad_() for x in (*tokens, *(values[n].detach() for n in INPUTS[4:]), *weights)], complete


def outcome(body, inputs, complete, group=2, inner_norm="layer_norm"):
    out, after = body(TTTInputs(*inputs[:7]), tuple(inputs[7:]), complete, group_size=group, eps=1e-6, inner_norm=inner_norm)
    total = sum((x.double() * torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)).sum() for x in (out, *after))
    return {str(i): x.detach() for i, x in enumerate((out, *after, *torch.autograd.grad(total, inputs)))}


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_mini_batches_that_stay_open_leave_the_weights(mixer):
    inputs, complete = arguments(mixer)
    exact, _ = arguments(mixer, dtype=torch.float64)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = errors(outcome(ttt_kernels.scan_mini_batches, inputs, complete), outcome(ttt_scan.scan_mini_batches, exact, complete))
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("inner_norm", INNER_NORMS)
@pytest.mark.parametrize(("mixer", "block"), [("linear", 16), ("mlp", 16), ("mlp", 128)])
def test_every_width_of_tiles_gives_the_same_numbers(monkeypatch, mixer, block, inner_norm):
    inputs, complete = arguments(mixer)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    monkeypatch.setattr(ttt_kernels, "INTERPRETED_BLOCK_F", block)  # 128: the whole hidden width, weights stay in registers
    bodies = ((ttt_kernels.scan_mini_batches, inputs), (ttt_scan.scan_mini_batches, exact))
    found = errors(*(outcome(body, given, complete, inner_norm=inner_norm) for body, given in bodies))
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_two_runs_give_the_same_bits(mixer):
    inputs, complete = arguments(mixer)
    first, second = (outcome(ttt_kernels.scan_mini_batches, inputs, complete) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_rows_in_several_launches_give_the_same_bits(monkeypatch, mixer):
    inputs, complete = arguments(mixer, rows=3)
    together = outcome(ttt_kernels.scan_mini_batches, inputs, complete)
    state = 4 * sum(w[0, 0].numel() for w in inputs[7:])
    monkeypatch.setattr(ttt_kernels, "SCRATCH_BYTES", 2 * 2 * state)  # two of the three rows, groups of two
    apart = outcome(ttt_kernels.scan_mini_batches, inputs, complete)
    assert all(torch.equal(together[n], apart[n]) for n in together)


@pytest.mark.parametrize("group", [1, 3, 100])
def test_group_size_changes_no_number(group):
    inputs, complete = arguments("linear")
    found = errors(
        outcome(ttt_kernels.scan_mini_batches, inputs, complete, group), outcome(ttt_kernels.scan_mini_batches, inputs, complete, 2)
    )
    assert max(found.values()) <= 1e-6, found


def test_strides_do_not_matter():
    inputs, complete = arguments("linear")
    odd = [x.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_() for x in inputs]
    assert not odd[0].is_contiguous()
    first, second = (outcome(ttt_kernels.scan_mini_batches, x, complete) for x in (inputs, odd))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_inference_keeps_no_states(guards):
    inputs, complete = arguments("mlp")
    with torch.no_grad():
        out, after = ttt_kernels.scan_mini_batches(TTTInputs(*inputs[:7]), tuple(inputs[7:]), complete, group_size=1, eps=1e-6)
    assert len(guards) == 1 + len(after)
    assert not out.requires_grad


def test_memory_kept_for_the_backward_is_one_state_a_group(guards):
    inputs, complete = arguments("linear", number=5)
    ttt_kernels.scan_mini_batches(TTTInputs(*inputs[:7]), tuple(inputs[7:]), complete, group_size=2, eps=1e-6)
    states = [x for x in guards if x.numel() == 2 * 3 * 32 * 32 + 2 * GUARD]  # rows x groups x W1
    assert len(states) == 1
    assert len(guards) == 1 + 2 + 2  # the output, the last weights, those kept


def test_inputs_stay_as_they_are():
    inputs, complete = arguments("mlp")
    before = [x.detach().clone() for x in inputs]
    outcome(ttt_kernels.scan_mini_batches, inputs, complete)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_second_derivatives_are_refused():
    inputs, complete = arguments("linear", rows=1, number=1)
    out, _ = ttt_kernels.scan_mini_batches(TTTInputs(*inputs[:7]), tuple(inputs[7:]), complete, group_size=1, eps=1e-6)
    with pytest.raises(RuntimeError, match="'triton' has no second derivative"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_under_torch_compile(mixer):
    inputs, complete = arguments(mixer, rows=1, number=2)
    eager = outcome(ttt_kernels.scan_mini_batches, inputs, complete)
    compiled = torch.compile(ttt_kernels.scan_mini_batches, backend="aot_eager", fullgraph=True)
    traced = outcome(compiled, inputs, complete)
    assert all(torch.equal(eager[n], traced[n]) for n in eager)


def test_under_activation_checkpointing_and_autocast():
    inputs, complete = arguments("mlp", rows=1, number=2)

    def recomputed(*args, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(ttt_kernels.scan_mini_batches, *args, use_reentrant=False, **options)

    plain, again = (outcome(body, inputs, complete) for body in (ttt_kernels.scan_mini_batches, recomputed))
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_what_the_kernels_do_not_take_is_named(guards):
    guards.append(torch.full((2 * GUARD,), MARK))  # no kernel runs here

    def reason(dim=32, b=4, dtype=torch.float32, state=torch.float32, hidden=32):
        return ttt_kernels.is_supported(torch.zeros(1, 1, b, 1, dim, dtype=dtype), (torch.zeros(1, 1, dim, hidden, dtype=state),) * 2)

    assert reason() is None
    assert "head dimension is 48" in reason(dim=48)
    assert "mini-batch size is 65" in reason(b=65)
    assert "torch.float16" in reason(dtype=torch.float16)
    assert "torch.float64" in reason(state=torch.float64)
    assert "hidden width is 96" in reason(hidden=96)
    values = make_inputs("linear", 1, 2, 1, 48, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="head dimension is 48"):
        run("linear", values, start("linear", values, 1), backend="triton")


def layer_outcome(layer, x):
    y = layer(x)[0]
    y.square().sum().backward()
    return {"y": y.detach()} | {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in layer.named_parameters()}


def make_layer(mixer, implementation):
    torch.manual_seed(2)
    config = layer_config(hidden_size=64, ttt_num_heads=2, ttt_head_dim=32, ttt_mixer=mixer, ttt_implementation=implementation)
    layer = {"linear": TTTLinear, "mlp": TTTMLP}[mixer](config)
    torch.nn.init.normal_(layer.wo.weight, std=0.1)
    return layer


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_a_layer_gives_what_it_gives_in_torch(mixer):
    x = torch.randn(1, 6, 64)
    ours, theirs = (layer_outcome(make_layer(mixer, implementation), x) for implementation in ("triton", "scan"))
    found = errors(ours, theirs)
    assert max(found.values()) <= 1e-4, found


def test_a_layer_under_fsdp2(tmp_path):
    x = torch.randn(1, 5, 64)
    plain = layer_outcome(make_layer("linear", "triton"), x)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meeting")
    try:
        sharded = fully_shard(make_layer("linear", "triton"), mesh=init_device_mesh("cpu", (1,)))
        found = errors(layer_outcome(sharded, x), plain)
    finally:
        torch.distributed.destroy_process_group()
    assert max(found.values()) <= 1e-6, found

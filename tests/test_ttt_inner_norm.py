"""The inner loss without LayerNorm: one function in every body, a step that nothing makes diverge, the delta rule at b = 1, and answers
that can be turned.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from ttt_cases import AT_THE_BOUND, INPUTS, WEIGHTS, largest_difference, layer_config, make_inputs, run, run_all, start

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.configuration_moshi_ttt import INNER_NORMS, default_base_lr
from modeling_moshi_ttt.ttt_dual import ttt_dual
from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTLinear
from modeling_moshi_ttt.ttt_scan import scan_mini_batches
from modeling_moshi_ttt.ttt_state import TTTInputs

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from overwrite import Memory, mini_batches_to_turn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MIXERS = ["linear", "mlp"]


def at_the_bound(mixer, rows, length, heads, dim, b, seed=0):
    """Inputs where some shares are bounded and others are not."""
    return make_inputs(mixer, rows, length, heads, dim, b, seed=seed, write=AT_THE_BOUND[mixer])


@pytest.mark.parametrize("inner_norm", INNER_NORMS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("rows", "length", "heads", "dim", "b"), [(1, 3, 1, 4, 1), (2, 7, 3, 5, 3), (3, 13, 2, 6, 5), (2, 20, 1, 3, 16)])
def test_scan_dual_form_and_decoding_equal_the_reference(mixer, rows, length, heads, dim, b, inner_norm):
    values = at_the_bound(mixer, rows, length, heads, dim, b)
    theirs = run_all(mixer, values, backend="reference", inner_norm=inner_norm)
    assert largest_difference(run_all(mixer, values, backend="scan", group_size=2, inner_norm=inner_norm), theirs) <= 1e-11

    names = ("out", *(f"final_{name}" for name in WEIGHTS[mixer]))
    frozen, outputs = {name: x.detach() for name, x in values.items()}, []
    out, after = ttt_dual(TTTInputs(*(frozen[name] for name in INPUTS)), start(mixer, frozen, rows).weights, inner_norm=inner_norm)
    assert largest_difference(dict(zip(names, (out, *after))), {name: theirs[name] for name in names}) <= 1e-11

    state = start(mixer, frozen, rows)
    for t in range(length):
        out, state = run(mixer, frozen, state, slice(t, t + 1), inner_norm=inner_norm)
        outputs.append(out)
    assert largest_difference(dict(zip(names, (torch.cat(outputs, 1), *state.weights))), {name: theirs[name] for name in names}) <= 1e-11


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("mixer", MIXERS)
def test_any_shape_split_group_and_row_offset(mixer, data):
    rows, length, heads = (data.draw(st.integers(1, top), name) for name, top in (("rows", 3), ("length", 11), ("heads", 2)))
    b, group = data.draw(st.integers(1, 6), "b"), data.draw(st.integers(1, 4), "group")
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set()), "cuts")))
    cells = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)), "mask")
    mask = None if cells is None else torch.tensor(cells).view(rows, length)
    values = at_the_bound(mixer, rows, length, heads, 4, b, seed=data.draw(st.integers(0, 99), "seed"))
    theirs = run_all(mixer, values, mask=mask, backend="reference", inner_norm="none")
    assert largest_difference(run_all(mixer, values, cuts, mask, backend="scan", group_size=group, inner_norm="none"), theirs) <= 1e-11


@pytest.mark.parametrize("mixer", MIXERS)
def test_frame_by_frame_with_rows_apart_equals_one_pass(mixer):
    values = {name: x.detach() for name, x in at_the_bound(mixer, 3, 21, 2, 4, 8).items()}
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[1, 3:6] = mask[2, 0] = mask[2, 9] = False
    whole, end = run(mixer, values, start(mixer, values, 3), mask=mask, inner_norm="none")
    state, outputs = start(mixer, values, 3), []
    for t in range(21):
        out, state = run(mixer, values, state, slice(t, t + 1), mask, inner_norm="none")
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-11)
    for name, value in end.tensors().items():
        torch.testing.assert_close(state.tensors()[name], value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["scan", "reference"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_true_derivatives(mixer, backend):
    values = at_the_bound(mixer, 2, 5, 1, 3, 2)
    with torch.no_grad():
        values["lr"][0, 1] = 0

    def outputs(*tensors):
        given = dict(zip(values, tensors))
        out, state = run(mixer, given, start(mixer, given, 2), backend=backend, inner_norm="none", eps=1e-3)
        return (out, *state.weights)

    assert torch.autograd.gradcheck(outputs, tuple(values.values()), atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mini_batches_that_stay_open_have_true_derivatives(mixer):
    values = at_the_bound(mixer, 2, 6, 1, 3, 2)
    complete = torch.tensor([[True, False, True], [True, True, False]])

    def body(*tensors):
        given = dict(zip(values, tensors))
        tokens = [given[name].unflatten(1, (3, 2)) for name in INPUTS[:4]]
        weights = tuple(given[name].expand(2, *given[name].shape) for name in WEIGHTS[mixer])
        inputs = TTTInputs(*tokens, *(given[name] for name in INPUTS[4:]))
        out, after = scan_mini_batches(inputs, weights, complete, group_size=2, eps=1e-3, inner_norm="none")
        return (out, *after)

    assert torch.autograd.gradcheck(body, tuple(values.values()), atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_walking_the_weights_back_loses_no_precision(mixer):
    values = make_inputs(mixer, 1, 200, 2, 16, 1, dtype=torch.float32, write=AT_THE_BOUND[mixer])
    exact = run_all(mixer, {name: x.detach().double().requires_grad_() for name, x in values.items()}, backend="scan", inner_norm="none")
    found = run_all(mixer, values, backend="scan", group_size=200, inner_norm="none")
    for name in exact:
        if name.startswith("grad_"):
            assert (found[name] - exact[name]).abs().max() <= 2e-5 * exact[name].abs().max(), name


# --- the delta rule, and the bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "scan", "auto"])
def test_at_mini_batches_of_one_the_linear_state_is_the_delta_rules(backend):
    """S <- S + beta (target - S key) key^T, key with a 1 behind it for the bias, beta = lr w_0, which stays below 1 / ||key||^2 here."""
    values = {name: x.detach() for name, x in make_inputs("linear", 2, 12, 3, 5, 1).items()}
    state = start("linear", values, 2)
    for t in range(12):  # one frame a call, so that "auto" decodes
        _, state = run("linear", values, state, slice(t, t + 1), backend=backend, inner_norm="none")
    for row in range(2):
        for head in range(3):
            memory = torch.cat([values["W1"][head].T, values["b1"][head].T], 1)  # [D, D + 1]
            for t in range(12):
                key = torch.cat([values["k"][row, t, head], torch.ones(1, dtype=torch.float64)])
                target = (values["v"] - values["k"])[row, t, head]
                beta = values["lr"][row, t, head] * values["token_weight"][0]
                assert beta < 1 / key.dot(key)
                memory = memory + beta * torch.outer(target - memory @ key, key)
            torch.testing.assert_close(state.W1[row, head], memory[:, :-1].T, rtol=0, atol=1e-12)
            torch.testing.assert_close(state.b1[row, head, 0], memory[:, -1], rtol=0, atol=1e-12)


EXTREMES = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e6])


def extreme(mixer, data, length, b):
    """A stream with token weights, rates and keys of any size, and targets of its own."""
    values = {name: x.detach() for name, x in make_inputs(mixer, 2, length, 1, 4, b, seed=data.draw(st.integers(0, 99), "seed")).items()}
    target = values["v"] - values["k"]
    for name in ("k", "lr", "token_weight"):
        values[name] = values[name] * data.draw(EXTREMES, name) * torch.rand(values[name].shape, dtype=torch.float64)
    return values | {"v": target + values["k"]}, target


def squares(weights):
    """Of the layers' weights with their bias: `[B, H]` each."""
    return [W.square().sum((2, 3)) + bias.square().sum((2, 3)) for W, bias in zip(weights[::2], weights[1::2])]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_weight_rate_or_key_makes_it_diverge(mixer, data):
    """The bound that `ttt_reference` states, mini-batch by mini-batch: ||W||^2 of the last layer grows by at most max ||target||^2, and an
    MLP's first layer moves by at most (max ||target|| + ||last layer|| + sqrt(eps)) / 2."""
    b = data.draw(st.sampled_from([1, 3, 4]), "b")
    values, target = extreme(mixer, data, 12 * b, b)
    state = start(mixer, values, 2)
    for first in range(0, 12 * b, b):
        before, state_before = squares(state.weights), state
        _, state = run(mixer, values, state, slice(first, first + b), inner_norm="none")
        after, largest = squares(state.weights), target[:, first : first + b].square().sum(-1).amax(1)  # [B, H]
        assert (after[-1] <= (before[-1] + largest) * (1 + 1e-9)).all()
        if mixer == "mlp":
            moved = squares([x - y for x, y in zip(state.weights[:2], state_before.weights[:2])])[0].sqrt()
            assert (moved <= (largest.sqrt() + before[-1].sqrt() + 1e-3) / 2 * (1 + 1e-9)).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_linear_memory_never_moves_away_from_weights_that_answer_all_targets(data):
    b = data.draw(st.sampled_from([1, 3, 4]), "b")
    values, _ = extreme("linear", data, 12 * b, b)
    teacher = [torch.randn(1, 1, *shape, dtype=torch.float64) for shape in ((4, 4), (1, 4))]
    answers = torch.einsum("bthd,xhde->bthe", values["k"], teacher[0]) + teacher[1].squeeze(2)
    values["v"] = answers + values["k"]
    state = start("linear", values, 2)
    distance = [squares([w - x for w, x in zip(state.weights, teacher)])[0]]
    for first in range(0, 12 * b, b):
        _, state = run("linear", values, state, slice(first, first + b), inner_norm="none")
        distance.append(squares([w - x for w, x in zip(state.weights, teacher)])[0])
        assert (distance[-1] <= distance[-2] * (1 + 1e-9)).all()


def test_without_the_bound_the_same_stream_diverges():
    """What the bound is for: the plain delta rule at rates above 2 / ||key||^2."""
    values = {name: x.detach() for name, x in make_inputs("linear", 1, 200, 1, 4, 1, write=20.0).items()}
    bounded, _ = run("linear", values, start("linear", values, 1), inner_norm="none")
    W, bias = values["W1"][0], values["b1"][0, 0]
    for k, v, lr in zip(values["k"][0, :, 0], values["v"][0, :, 0], values["lr"][0, :, 0]):
        error = k @ W + bias - (v - k)
        W, bias = W - lr * torch.outer(k, error), bias - lr * error
    assert W.norm() > 1e6
    assert bounded.isfinite().all()


# --- answers that can be turned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_frame", [False, True])
@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_answer_is_turned_within_two_mini_batches(mixer, b, one_frame):
    assert mini_batches_to_turn(Memory(mixer, "none", b, default_base_lr(mixer, "none", head_dim=32), one_frame=one_frame)) <= 2


def test_with_layer_norm_it_takes_72():
    assert mini_batches_to_turn(Memory("linear", "layer_norm", 16, default_base_lr("linear", "layer_norm", head_dim=32))) == 72


def test_the_committed_overwrite_table_is_of_these_settings():
    table = json.loads((BENCHMARKS / "overwrite.json").read_text())
    settings = {(row["mixer"], row["inner_norm"], row["mini_batch"], row["told"]) for row in table["settings"]}
    assert len(settings) == 2 * 2 * (4 + 3)
    for row in table["settings"]:
        if row["inner_norm"] == "none" and row["default"]:
            assert max(row["mini_batches"]) <= 2, row


# --- in the layer and the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixer", "make"), [("linear", TTTLinear), ("mlp", TTTMLP)])
def test_the_layer_takes_the_configured_inner_loss(mixer, make):
    torch.manual_seed(0)
    layers = [make(layer_config(ttt_mixer=mixer, ttt_inner_norm=inner_norm)) for inner_norm in INNER_NORMS]
    torch.nn.init.normal_(layers[0].wo.weight, std=0.1)
    layers[1].load_state_dict(layers[0].state_dict())  # the choice adds no weight
    x = torch.randn(1, 9, 24)
    (published, _), (plain, state) = (layer(x) for layer in layers)
    assert (published - plain).abs().max() > 1e-4
    assert layers[0].initial_state(1).tensors().keys() == state.tensors().keys()
    pieces, state = [], None
    with torch.no_grad():
        for t in range(9):
            y, state = layers[1](x[:, t : t + 1], state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), plain, rtol=0, atol=1e-5)


def test_an_inner_loss_that_a_checkpoint_was_not_trained_with_is_refused(tmp_path):
    torch.manual_seed(0)
    MoshiTTTForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "trained")
    for options in ({"ttt_inner_norm": "none"}, {"config": tiny_config(ttt_inner_norm="none")}):
        with pytest.raises(
            ValueError, match=r"`ttt_inner_norm='none'` is not what the TTT layers of .* were trained with \('layer_norm'\); leave"
        ):
            MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "trained", **options)
    assert (
        MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "trained", ttt_inner_norm="layer_norm").config.ttt_inner_norm
        == "layer_norm"
    )

    fields = json.loads((tmp_path / "trained" / "config.json").read_text())
    del fields["ttt_inner_norm"]  # as an older version wrote it
    (tmp_path / "trained" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="`ttt_inner_norm='none'`"):
        MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "trained", ttt_inner_norm="none")
    assert MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "trained").config.ttt_inner_norm == "layer_norm"

    MoshiTTTForConditionalGeneration(tiny_config(ttt_layers=[])).save_pretrained(tmp_path / "plain")
    fresh = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "plain", ttt_layers=[1], ttt_inner_norm="none")
    assert fresh.config.ttt_inner_norm == "none"

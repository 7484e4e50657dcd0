"""The TTT layer: golden numbers, streaming, rows, recomputation, float32 inside, initialisation."""

import hashlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from ttt_cases import layer_config

from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTLinear
from modeling_moshi_ttt.ttt_ops import TTTState

LAYERS = {"linear": TTTLinear, "mlp": TTTMLP}
MIXERS = ["linear", "mlp"]


def make_layer(mixer: str, dtype=torch.float64, **changes):
    """A layer in which everything, `wo` too, has random weights of some size."""
    layer = LAYERS[mixer](layer_config(ttt_mixer=mixer, **changes)).to(dtype)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            start = 1.0 if name.endswith("norm_weight") or name == "post_norm.weight" else 0.0
            parameter.copy_(start + torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.15)
    return layer


def hashes(layer) -> dict[str, str]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: hashlib.sha256(x.detach().contiguous().numpy().tobytes()).hexdigest() for name, x in tensors}


@pytest.mark.parametrize("implementation", ["scan", "reference"])
@pytest.mark.parametrize(("rope", "case", "tolerance"), [("none", "norope", None), ("absolute", "rope", 1e-5)])
@pytest.mark.parametrize(("mixer", "exact"), [("linear", 1e-9), ("mlp", 1e-7)])
def test_layer_equals_golden_outputs_and_gradients(ttt_layer_golden, mixer, exact, rope, case, tolerance, implementation):
    prefix = f"{mixer}.{case}."
    golden = {name[len(prefix) :]: x for name, x in ttt_layer_golden.items() if name.startswith(prefix)}
    config = layer_config(ttt_mini_batch_size=1, ttt_rope=rope, ttt_norm_eps=1e-8, ttt_implementation=implementation)
    layer = LAYERS[mixer](config).double()
    missing = layer.load_state_dict({name[6:]: x for name, x in golden.items() if name.startswith("param.")}, strict=False)
    assert missing.missing_keys == ["learnable_token_weight"]
    assert not missing.unexpected_keys
    x = golden["x"].clone().requires_grad_()
    y, _ = layer(x)
    y.backward(golden["cotangent"])
    ours = {"y": y, "grad_x": x.grad} | {f"grad.{name}": p.grad for name, p in layer.named_parameters()}
    compared = [name for name in golden if name in ours]
    assert len(compared) == len([name for name in golden if name.startswith("grad")]) + 1
    for name in compared:
        assert (ours[name] - golden[name]).abs().max() <= (tolerance or exact), name


@pytest.mark.parametrize("rope", ["mini_batch", "absolute", "none"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_splits_and_masks_give_what_one_pass_gives(mixer, rope):
    layer = make_layer(mixer, ttt_rope=rope)
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[1, [0, 5, 6, 12]] = 0
    whole, end = layer(x, attention_mask=mask)
    with torch.no_grad():
        for cuts in ([], [1, 2, 3], [7, 13], list(range(1, 19))):
            state, pieces = None, []
            for first, last in zip([0, *cuts], [*cuts, 19]):
                y, state = layer(x[:, first:last], state, attention_mask=mask[:, first:last])
                pieces.append(y)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)
            for name, value in end.tensors().items():
                torch.testing.assert_close(state.tensors()[name], value, rtol=0, atol=1e-10)
        alone, after = layer(x[1:, mask[1].bool()])
    torch.testing.assert_close(whole[1:, mask[1].bool()], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(end.select([1]).W1, after.W1, rtol=0, atol=1e-10)
    assert end.frames.tolist() == [19, 15]


@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_future_moves_nothing(mixer, b):
    layer = make_layer(mixer, ttt_mini_batch_size=b)
    x = torch.randn(1, 18, 24, dtype=torch.float64)
    y, _ = layer(x)
    for t in (1, 9, 17):
        changed = x.clone()
        changed[:, t] += 1
        moved, _ = layer(changed)
        torch.testing.assert_close(moved[:, :t], y[:, :t], rtol=0, atol=1e-13)
        assert (moved[:, t] - y[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
def test_group_sizes_and_recomputing_the_layer_change_no_number(mixer):
    x = torch.randn(1, 188, 24, dtype=torch.float64)
    found = {}
    for group in (1, 3, 16, 188, 10**6):
        layer = make_layer(mixer, ttt_mini_batch_size=1, scan_checkpoint_group_size=group)
        before = hashes(layer)
        for around in (False, True):
            given = x.clone().requires_grad_()
            layer.zero_grad()
            y, _ = checkpoint(layer, given, use_reentrant=False) if around else layer(given)
            loss = y.square().sum()
            assert hashes(layer) == before, "forward must write to no parameter and no buffer"
            loss.backward()
            found[group, around] = {"y": y.detach(), "x": given.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}
        assert hashes(layer) == before
    first = found[1, False]
    for key, result in found.items():
        for name, value in result.items():
            assert (value - first[name]).abs().max() <= 1e-10 * max(1.0, float(first[name].abs().max())), (key, name)


def test_backward_through_two_uses_of_the_layer():
    """Twice in one graph, the second time from the first one's state, as truncated training over chunks does."""
    layer = make_layer("mlp")
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    whole, _ = layer(x)
    expected = torch.autograd.grad(whole.sum(), list(layer.parameters()))
    first, state = layer(x[:, :6])
    second, _ = layer(x[:, 6:], state)
    found = torch.autograd.grad(first.sum() + second.sum(), list(layer.parameters()))
    for (name, _), a, b in zip(layer.named_parameters(), found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(1.0, float(b.abs().max())), msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_target_normalises_the_difference_of_value_and_key(mixer):
    """A layer whose wv equals wk has v - k = 0, so only ttt_norm_bias is left to learn; normalising v alone would leave more."""
    layer = make_layer(mixer, ttt_rope="none")
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    projected = tuple(torch.randn(1, 5, 24, dtype=torch.float64) for _ in range(3))
    _, k, v, *_ = layer._op_inputs(x, projected, torch.zeros(1, 5))
    raw = projected[2].unflatten(-1, (3, 8)) - k
    expected = (raw - raw.mean(-1, keepdim=True)) / (raw.std(-1, keepdim=True) + 1e-8) * layer.ttt_norm_weight + layer.ttt_norm_bias
    torch.testing.assert_close(v - k, expected, rtol=0, atol=1e-12)
    wrong = projected[2].unflatten(-1, (3, 8))
    wrong = (wrong - wrong.mean(-1, keepdim=True)) / wrong.std(-1, keepdim=True) * layer.ttt_norm_weight + layer.ttt_norm_bias
    assert (v - k - wrong).abs().max() > 0.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_step_sizes_and_token_weights_follow_their_formulas(mixer):
    layer = make_layer(mixer, ttt_base_lr=0.7)
    with torch.no_grad():
        layer.learnable_token_weight.copy_(torch.tensor([0.0, -0.25, 0.5, -9.0]))
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    _, _, _, lr, token_weight, *_ = layer._op_inputs(x, (layer.wq(x), layer.wk(x), layer.wv(x)), torch.zeros(2, 6))
    for h in range(3):
        logits = x @ layer.learnable_ttt_lr_weight[h, 0] + layer.learnable_ttt_lr_bias[h, 0]
        torch.testing.assert_close(lr[:, :, h], 0.7 * torch.sigmoid(logits) / 8, rtol=0, atol=1e-14)
    torch.testing.assert_close(token_weight, torch.tensor([1.0, 0.25, 1 / 3 + 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_fresh_layer_adds_nothing_and_learns_from_the_first_step_on(mixer):
    layer = LAYERS[mixer](layer_config())
    x = torch.randn(2, 7, 24)
    y, _ = layer(x)
    assert torch.equal(y, torch.zeros_like(y))
    y.backward(torch.randn(2, 7, 24))
    assert layer.wo.weight.grad.abs().max() > 0
    assert layer.wo.bias.grad.abs().max() > 0
    assert not layer.b1.any()
    assert torch.equal(layer.ttt_norm_weight, torch.ones(3, 8))


@pytest.mark.parametrize("b", [1, 16])
@pytest.mark.parametrize(("std", "least", "most"), [(None, 0.75, 1.0), (0.02, 0.0, 0.3)])
def test_a_fresh_mlp_tells_keys_apart(std, least, most, b):
    """8 random keys of 128, with a value of 50 each, heard once: the share of keys that then find their value, nothing being trained.

    With the usual 0.02 for both matrices they hardly do: the MLP learns one bias for all keys."""
    torch.manual_seed(0)
    rows, pairs, dim = 32, 8, 128
    layer = TTTMLP(layer_config(ttt_head_dim=dim, ttt_num_heads=1, ttt_base_lr=0.1))
    if std is not None:
        for weights in (layer.W1, layer.W2):
            torch.nn.init.normal_(weights, std=std)
    values = torch.nn.functional.layer_norm(torch.randn(50, dim), (dim,))
    keys, chosen = torch.nn.functional.normalize(torch.randn(rows, pairs, 1, dim), dim=-1), torch.randint(50, (rows, pairs))
    told, asked = values[chosen].unsqueeze(2), torch.zeros(rows, pairs, 1, dim)
    k, target = torch.cat([keys, keys], 1), torch.cat([told, asked], 1)
    rate = torch.cat([torch.full((rows, pairs, 1), layer.config.ttt_base_lr / 2 / dim), torch.zeros(rows, pairs, 1)], 1)
    shared = 1 / torch.arange(1, b + 1), layer.ttt_norm_weight, layer.ttt_norm_bias
    with torch.no_grad():
        out, _ = layer.op(k, k, target + k, rate, *shared, layer.initial_state(rows), mini_batch_size=b)
    found = ((out - k)[:, pairs:, 0] @ values.T).argmax(-1)
    assert least <= (found == chosen).float().mean() <= most


@pytest.mark.parametrize("mixer", MIXERS)
def test_initialisation_keeps_what_a_checkpoint_has_filled(mixer):
    layer = LAYERS[mixer](layer_config())
    with torch.no_grad():
        layer.W1.fill_(5.0)
        layer.ttt_norm_bias.fill_(7.0)
    layer.W1._is_hf_initialized = True
    layer.reset_ttt_parameters()
    assert (layer.W1 == 5.0).all()
    assert not layer.ttt_norm_bias.any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_in_bfloat16_the_inner_learning_stays_float32(mixer):
    layer = make_layer(mixer, dtype=torch.float32).to(torch.bfloat16)
    x = torch.randn(2, 11, 24, dtype=torch.bfloat16)
    y, state = layer(x)
    assert y.dtype == torch.bfloat16
    assert {w.dtype for w in (*state.weights, state.k, state.lr)} == {torch.float32}
    exact, expected = make_layer(mixer, dtype=torch.float32)(x.float())
    assert (y.float() - exact).abs().max() <= 0.05 * exact.abs().max()
    assert (state.W1 - expected.W1).abs().max() <= 0.02 * expected.W1.abs().max()


def test_autocast_keeps_the_inner_learning_in_float32():
    layer = make_layer("mlp", dtype=torch.float32)
    x = torch.randn(2, 11, 24)
    exact, expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    y.float().sum().backward()
    assert state.W1.dtype == torch.float32
    assert (y - exact).abs().max() <= 0.05 * exact.abs().max()
    assert (state.W1 - expected.W1).abs().max() <= 0.02 * expected.W1.abs().max()


def test_a_compiled_layer_gives_the_same_numbers():
    layer = make_layer("mlp")
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    (y, state), (found, after) = layer(x), compiled(x)
    assert torch.equal(found, y)
    expected = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    gradients = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))
    with torch.no_grad():
        assert torch.equal(compiled(x[:, :1], after)[0], layer(x[:, :1], state)[0])


def test_rope_positions_count_on_from_the_state():
    layer = make_layer("mlp", ttt_rope="absolute")
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    whole, _ = layer(x)
    _, state = layer(x[:, :5])
    counted, _ = layer(x[:, 5:], state)
    given, _ = layer(x[:, 5:], state, position_ids=torch.arange(5, 9)[None])
    torch.testing.assert_close(counted, whole[:, 5:], rtol=0, atol=1e-10)
    assert torch.equal(given, counted)
    shifted, _ = layer(x[:, 5:], state, position_ids=torch.arange(8, 12)[None])
    assert (shifted - counted).abs().max() > 1e-6


def test_heads_of_their_own_size_need_not_fill_the_hidden_size():
    layer = make_layer("linear", ttt_num_heads=2, ttt_head_dim=6)
    y, state = layer(torch.randn(1, 5, 24, dtype=torch.float64))
    assert y.shape == (1, 5, 24)
    assert state.W1.shape == (1, 2, 6, 6)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "wq.weight": (12, 24), "wq.bias": (12,), "wk.weight": (12, 24), "wk.bias": (12,), "wv.weight": (12, 24), "wv.bias": (12,),
        "wo.weight": (24, 12), "wo.bias": (24,), "post_norm.weight": (12,), "post_norm.bias": (12,),
        "learnable_ttt_lr_weight": (2, 1, 24), "learnable_ttt_lr_bias": (2, 1), "learnable_token_weight": (4,),
        "ttt_norm_weight": (2, 6), "ttt_norm_bias": (2, 6), "W1": (2, 6, 6), "b1": (2, 1, 6),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_states": torch.zeros(2, 5, 23)}, r"hidden_states has shape \(2, 5, 23\); it must be \[B, T, 24\]"),
        ({"hidden_states": torch.zeros(2, 0, 24)}, "with B, T at least 1"),
        ({"position_ids": torch.zeros(2, 4)}, r"position_ids has shape \(2, 4\); it must be \[B, T\] = \(2, 5\)"),
        ({"attention_mask": torch.zeros(5)}, r"attention_mask has shape \(5,\)"),
        ({"state": TTTState.initial(torch.zeros(3, 8, 8), torch.zeros(3, 1, 8), batch_size=2)}, "belongs to mixer 'linear'"),
        ({"state": make_layer("mlp", dtype=torch.float32).initial_state(3)}, "the state holds 3 rows, hidden_states 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_layer("mlp", dtype=torch.float32)(**({"hidden_states": torch.zeros(2, 5, 24)} | arguments))


def test_rope_needs_an_even_head():
    with pytest.raises(ValueError, match="ttt_head_dim is 7; ttt_rope 'mini_batch' turns pairs"):
        TTTLinear(layer_config(ttt_head_dim=7))


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize("inner_norm", ["layer_norm", "none"])
def test_a_live_state_shows_the_losses_that_a_measurement_finds(mixer, inner_norm):
    """Frame 3 repeats frame 2, which a measurement passes over and an open mini-batch of two holds; rows may stand apart."""
    layer = make_layer(mixer, ttt_inner_norm=inner_norm, ttt_mini_batch_size=2, ttt_rope="none")
    x = torch.randn(2, 4, layer.config.hidden_size, dtype=torch.float64)
    x[:, 3] = x[:, 2]
    found = layer.inner_losses(x)
    _, state = layer(x[:, :3])
    shown = layer.open_losses(state)
    torch.testing.assert_close(shown.initial, found.initial[:, 1].mean(-1))
    torch.testing.assert_close(shown.current, found.before[:, 1].mean(-1))
    torch.testing.assert_close(shown.drift, found.drift[:, 0])
    _, apart = layer(x[:, 3:], state, attention_mask=torch.tensor([[1], [0]]))
    torch.testing.assert_close(
        layer.open_losses(apart).current.nan_to_num(-1), torch.stack([-torch.ones_like(shown.drift[0]), shown.current[1]])
    )

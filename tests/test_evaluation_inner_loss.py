"""Inner losses are the reference op's own, cost nothing when off, and fall in the published order where there is something to learn."""

import numpy as np
import pytest
import torch
from test_evaluation_long_context import make_model, make_sequence

from modeling_moshi_ttt.evaluation import inner_loss, recall_task
from modeling_moshi_ttt.evaluation.scoring import CodeSequence
from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTInnerLosses, TTTLinear
from modeling_moshi_ttt.ttt_reference import ttt_reference
from modeling_moshi_ttt.ttt_state import TTTInputs


def make_layer(mixer, b, inner_norm="layer_norm"):
    torch.manual_seed(2)
    config = make_model(ttt_mixer=mixer, ttt_mini_batch_size=b, ttt_inner_norm=inner_norm).config
    layer = (TTTLinear if mixer == "linear" else TTTMLP)(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def by_the_reference(layer, x):
    """Token by token through the definition: half the squared distance is D / 2 times the mean."""
    b, dim = layer.config.ttt_mini_batch_size, layer.config.ttt_head_dim
    state = layer.initial_state(len(x))
    first = state.weights
    q, k, v, lr, *shared = layer._op_inputs(x, (layer.wq(x), layer.wk(x), layer.wv(x)), layer._positions(x, state, None, None))

    def loss(weights, t):
        z = torch.einsum("bhd,bhdf->bhf", k[:, t], weights[0]) + weights[1][:, :, 0]
        if len(weights) == 4:
            z = torch.einsum("bhf,bhfd->bhd", torch.nn.functional.gelu(z, approximate="tanh"), weights[2]) + weights[3][:, :, 0]
        if layer.config.ttt_inner_norm == "layer_norm":
            z = z - z.mean(-1, keepdim=True)
            z = z / (z.square().mean(-1, keepdim=True) + layer.config.ttt_norm_eps).sqrt() * shared[1] + shared[2]
        return 0.5 * (z - (v - k)[:, t]).square().sum(-1) * 2 / dim

    curves = []
    for t in range(x.shape[1]):
        if t % b == 0:
            before = state.weights
        one = TTTInputs(*(token[:, t : t + 1] for token in (q, k, v, lr)), *shared)
        _, state = ttt_reference(one, state, mini_batch_size=b, eps=layer.config.ttt_norm_eps, inner_norm=layer.config.ttt_inner_norm)
        if t % b == b - 1:
            drift = sum((a - i).square().sum((1, 2, 3)) for a, i in zip(state.weights, first)).sqrt()
            curves.append((loss(first, t), loss(before, t), loss(state.weights, t), drift))
    return [torch.stack(column, 1) for column in zip(*curves)]


@pytest.mark.parametrize("inner_norm", ["layer_norm", "none"])
@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize("b", [1, 4])
def test_inner_losses_are_the_references(mixer, b, inner_norm):
    layer = make_layer(mixer, b, inner_norm)
    x = torch.randn(2, 14, 32, dtype=torch.float64)
    with torch.no_grad():
        found = layer.inner_losses(x)
        expected = by_the_reference(layer, x)
    assert found.position.tolist() == list(range(b - 1, 14, b))
    for name, values in zip(("initial", "before", "after", "drift"), expected):
        assert (getattr(found, name) - values).abs().max() < 1e-9, name


@pytest.mark.parametrize("b", [1, 4])
def test_a_stream_in_pieces_has_the_same_curves(b):
    layer = make_layer("linear", b)
    x = torch.randn(1, 15, 32, dtype=torch.float64)
    whole, pieces, state = layer.inner_losses(x), [], None
    for start, end in ((0, 3), (3, 4), (4, 9), (9, 15)):
        pieces.append(layer.inner_losses(x[:, start:end], state))
        _, state = layer(x[:, start:end], state)
    for name in TTTInnerLosses._fields:
        dim = 0 if name == "position" else 1
        assert torch.allclose(
            torch.cat([getattr(piece, name) for piece in pieces], dim).double(), getattr(whole, name).double(), atol=1e-12
        )


def test_rows_out_of_step_are_refused():
    layer = make_layer("linear", 4)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="one recording at a time"):
        layer.inner_losses(x, attention_mask=torch.tensor([[1] * 6, [1] * 3 + [0] * 3]))
    _, state = layer(x, attention_mask=torch.tensor([[1] * 6, [1] * 3 + [0] * 3]))
    with pytest.raises(ValueError, match="one recording at a time"):
        layer.inner_losses(x, state)


def test_the_argument_collects_and_changes_nothing():
    model, sequence = make_model(), make_sequence(20)
    inputs = {"input_ids": sequence.text[None], "moshi_audio_codes": sequence.moshi[None], "user_audio_codes": sequence.user[None]}
    with torch.no_grad():
        off, on = model(**inputs), model(**inputs, output_inner_losses=True)
    assert off.inner_losses is None
    assert list(on.inner_losses) == [0, 1]
    assert torch.equal(off.logits, on.logits)


def test_streamed_recordings_have_the_curves_of_one_pass():
    model, sequence = make_model().double(), make_sequence(21)
    whole, pieces = inner_loss.inner_losses(model, sequence, chunk=64), inner_loss.inner_losses(model, sequence, chunk=5)
    assert whole[1]["position"].tolist() == [3, 7, 11, 15, 19]
    for layer, curves in whole.items():
        for name, values in curves.items():
            assert np.allclose(values, pieces[layer][name], atol=1e-9)


def test_smoothing_by_hand():
    assert inner_loss.smooth(np.array([1.0, 2.0, 3.0, 6.0]), 2).tolist() == [1.5, 2.5, 4.5]
    assert inner_loss.smooth(np.array([1.0, 3.0]), 10).tolist() == [2.0]


def test_the_result_holds_every_layer_its_gate_and_its_drift():
    model = make_model(ttt_gate_init=0.5)
    result = inner_loss.measure(model, {"a": make_sequence(40, 1), "b": make_sequence(30, 2)}, width=2)
    assert list(result["layers"]) == ["0", "1"]
    first = result["layers"]["0"]
    assert first["gate"]["mean"] == pytest.approx(np.tanh(0.5))
    assert len(first["initial"]) == len(first["position"]) == 30 // 4 - 1
    assert first["drift"][-1] > 0
    with pytest.raises(ValueError, match="b: shorter than one mini-batch"):
        inner_loss.measure(model, {"a": make_sequence(40, 1), "b": make_sequence(3, 2)})


def _recall_curves(model, frames=200, seed=0):
    codes = recall_task.make_batch(1, 8, frames, torch.Generator().manual_seed(seed)).user_audio_codes[0]
    return inner_loss.inner_losses(model, CodeSequence(torch.full_like(codes, -1), codes))


def test_a_step_of_learning_lowers_the_loss_it_was_taken_on():
    """The order of the last two curves holds for any model whose step is small; the first needs training (the soak test)."""
    curves = _recall_curves(recall_task.make_model(recall_task.Variant("linear", 1, base_lr=4.0)))
    for layer in curves.values():
        assert layer["after"].mean() < layer["before"].mean()
        assert layer["drift"][0] < layer["drift"][-1]


@pytest.mark.slow
def test_a_trained_recall_model_has_the_published_order():
    model = recall_task.make_model(recall_task.Variant("linear", 16))
    recall_task.train(model, recall_task.TrainSettings(steps=1500, seconds=3600, pairs=(4,)))
    assert recall_task.measure(model, 4, 48)["accuracy"] >= 0.97  # the order is claimed of a model that has learned
    found = [_recall_curves(model, seed=seed)[1] for seed in range(8)]  # the layer that holds the pairs; layer 0 has nothing to learn
    initial, before, after = (np.mean([curves[name] for curves in found]) for name in inner_loss.CURVES)
    assert initial > 4 * before
    assert before > 2 * after

"""The gate of a TTT layer: below its threshold a frame writes nothing, whatever computes it; it is handed out, and open gates can cost."""

import pytest
import torch
from tiny import tiny_config
from ttt_cases import layer_config

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training.objective import open_gates
from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTLinear

MIXERS = {"linear": TTTLinear, "mlp": TTTMLP}


def make_layers(mixer, *changes):
    """Layers of equal weights, which answer, and whose gates differ from frame to frame."""
    torch.manual_seed(0)
    first = MIXERS[mixer](layer_config(ttt_mixer=mixer)).double()
    torch.nn.init.normal_(first.wo.weight, std=0.3)
    torch.nn.init.normal_(first.learnable_ttt_lr_weight, std=1.0)
    layers = [MIXERS[mixer](layer_config(ttt_mixer=mixer, **change)).double() for change in changes]
    for layer in layers:
        layer.load_state_dict(first.state_dict())  # a threshold adds no weight
    return layers


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_body_leaves_out_the_same_frames(mixer):
    """Reference, scan and decoding, frame by frame and in any split."""
    how = {"ttt_write_threshold": 0.5, "ttt_inner_norm": "none"}
    scan, reference = make_layers(mixer, how, how | {"ttt_implementation": "reference"})
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    gate = scan.write_gate(x)
    assert (gate == 0).any()
    assert (gate >= 0.5).any()
    assert not ((gate > 0) & (gate < 0.5)).any()
    (whole, state), (exact, other) = scan(x), reference(x)
    pieces, step = [], None
    with torch.no_grad():
        for frame in x.split(1, 1):
            y, step = scan(frame, step)
            pieces.append(y)
    for found, end in ((exact, other), (torch.cat(pieces, 1), step)):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-11)
        for ours, theirs in zip(end.weights, state.weights):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mixer", MIXERS)
def test_frames_below_the_threshold_write_nothing(mixer):
    closed, published, default = make_layers(mixer, {"ttt_write_threshold": 1 - 1e-12}, {}, {"ttt_write_threshold": 0})
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    _, state = closed(x)
    for weights, initial in zip(state.weights, closed.initial_state(2).weights):
        assert torch.equal(weights, initial)
    assert torch.equal(published(x)[0], default(x)[0])
    gate = closed.write_gate(x.requires_grad_())
    gate.sum().backward()
    assert not x.grad.any()


def test_a_gate_is_the_share_of_the_inner_learning_rate():
    (layer,) = make_layers("linear", {})
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    inputs = layer._op_inputs(x, (layer.wq(x), layer.wk(x), layer.wv(x)), torch.arange(5)[None])
    assert torch.equal(inputs.lr, layer.config.ttt_base_lr / layer.config.ttt_head_dim * layer.write_gate(x))


def test_the_model_hands_out_its_gates():
    """Of every TTT layer, with gradients, where padding stands on the left as well, and under recomputation."""
    torch.manual_seed(0)
    model = MoshiTTTForConditionalGeneration(tiny_config(ttt_layers=[1]))
    text = torch.randint(4, 16, (2, 6))
    off, on = (model(input_ids=text, use_cache=False, output_write_gates=asked) for asked in (False, True))
    assert off.write_gates is None
    assert list(on.write_gates) == [1]
    assert on.write_gates[1].shape == (2, 6, model.config.ttt_num_heads)
    model.activation_checkpointing_enable()
    model.train()
    again = model(input_ids=text, use_cache=False, output_write_gates=True)
    torch.testing.assert_close(again.write_gates[1], on.write_gates[1])
    open_gates(again.write_gates, torch.ones(2, 6)).backward()
    assert model.decoder.model.layers[1].ttt.learnable_ttt_lr_weight.grad.any()
    padded = torch.cat([torch.full((2, 2), 3), text], 1)
    mask = torch.tensor([[0, 0] + [1] * 6] * 2)
    model.eval()
    left = model(input_ids=padded, attention_mask=mask, use_cache=False, output_write_gates=True)
    torch.testing.assert_close(left.write_gates[1][:, 2:], on.write_gates[1])


def test_open_gates_count_frames_that_are_there():
    gates = {0: torch.ones(1, 3, 2), 1: torch.tensor([[[1.0, 0.0], [0.5, 0.5], [9.0, 9.0]]])}
    assert open_gates(gates, torch.tensor([[1, 1, 0]])) == pytest.approx(1.5)

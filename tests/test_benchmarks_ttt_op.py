"""The stand-in that the benchmarks measure against computes the same function, or its times would mean nothing."""

import sys
from pathlib import Path

import pytest
import torch
from ttt_cases import INPUTS, WEIGHTS, make_inputs, run_all, start

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from baseline_loop import Decoder, loop
from run import compare

from modeling_moshi_ttt.ttt_ops import ttt_linear, ttt_mlp


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_the_plain_loop_gives_the_ops_outputs_and_gradients(mixer):
    values = make_inputs(mixer, 2, 12, 2, 4, 4)
    ours = run_all(mixer, values)
    out, after = loop(*(values[name] for name in INPUTS), start(mixer, values, 2).weights)
    assert (out - ours["out"]).abs().max() <= 1e-7  # its GELU slope has published, rounded constants
    for name, w in zip(WEIGHTS[mixer], after):
        assert (w - ours[f"final_{name}"]).abs().max() <= 1e-7
    state = start(mixer, values, 2)
    op = ttt_linear if mixer == "linear" else ttt_mlp
    again, _ = op(*(values[name] for name in INPUTS), state, mini_batch_size=4)
    for name in (*INPUTS, *WEIGHTS[mixer]):
        theirs, mine = (torch.autograd.grad(x.square().sum(), values[name], retain_graph=True)[0] for x in (out, again))
        assert (theirs - mine).abs().max() <= 1e-5 * mine.abs().max().clamp(min=1), name


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_its_decoding_step_gives_the_ops_outputs(mixer):
    values = {name: x.detach() for name, x in make_inputs(mixer, 2, 10, 2, 4, 4).items()}
    op = ttt_linear if mixer == "linear" else ttt_mlp
    expected, _ = op(*(values[name] for name in INPUTS), start(mixer, values, 2), mini_batch_size=4)
    decoder = Decoder(*(values[name] for name in INPUTS[4:]), start(mixer, values, 2).weights)
    for t in range(10):
        q, k, v, lr = (values[name][:, t : t + 1].transpose(1, 2) for name in INPUTS[:4])
        found = decoder.step(q, k, v, lr[..., None]).transpose(1, 2)
        assert (found - expected[:, t : t + 1]).abs().max() <= 1e-7


def test_a_ratio_that_got_worse_is_named():
    found = {"op time": (1.0, True), "frame": (1.5, False), "op memory": (2.0, True), "new one": (1.0, True)}
    assert compare(found, {"op time": 2.0, "frame": 1.0, "op memory": 1.9}, tolerance=0.3) == ["op time", "frame"]

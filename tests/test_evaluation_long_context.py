"""Streamed losses are the losses in one pass; controls are what their names say; hours pass in constant memory."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.evaluation import inner_loss
from modeling_moshi_ttt.evaluation import long_context as lc
from modeling_moshi_ttt.evaluation.scoring import CodeSequence, token_log_probs

K, WINDOW = 3, 8


def make_model(**options):
    torch.manual_seed(1)
    depth = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "ffn_dim": 32}
    settings = {"ttt_layers": "all", "ttt_mixer": "linear", "ttt_mini_batch_size": 4, "ttt_gate_init": 0.5, "ttt_base_lr": 4.0} | options
    config = MoshiTTTConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, ffn_dim=64,
        sliding_window=WINDOW, audio_vocab_size=24, num_codebooks=K, depth_decoder_config=depth, **settings,
    )  # fmt: skip
    model = MoshiTTTForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("wo.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_sequence(frames, seed=0, text=True):
    generator = torch.Generator().manual_seed(seed)
    return CodeSequence(
        torch.randint(24, (K, frames), generator=generator),
        torch.randint(24, (K, frames), generator=generator),
        torch.randint(48, (frames,), generator=generator) if text else None,
    )


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize("chunk", [None, 1, 5, 64])
def test_the_streamed_curve_is_the_one_pass_curve(mixer, chunk):
    model, sequence = make_model(ttt_mixer=mixer).double(), make_sequence(37)
    once = token_log_probs(model, [sequence])
    expected = torch.where(once.predicted, -once.values, torch.nan)[0].float().numpy()
    streamed = lc.stream_losses(model, sequence, chunk=chunk)
    assert np.array_equal(np.isnan(streamed), np.isnan(expected))
    assert np.nanmax(np.abs(streamed - expected)) < 1e-5


def test_the_last_frames_of_delayed_codebooks_are_open():
    losses = lc.stream_losses(make_model(), make_sequence(20))
    assert np.isnan(losses).sum(1).tolist() == [0, 0, 1, 1]
    assert np.isnan(losses[:, -1]).tolist() == [False, False, True, True]
    absent = lc.stream_losses(make_model(), make_sequence(20, text=False))
    assert np.isnan(absent[0]).all()
    assert set(lc.by_stream(absent)) == {"semantic", "acoustic"}


def test_gate_zero_is_the_model_without_ttt():
    model, sequence = make_model(), make_sequence(30)
    plain = make_model(ttt_layers=[])
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".ttt" not in name})
    closed, bare = lc.stream_losses(model, sequence, lc.GATE_ZERO), lc.stream_losses(plain, sequence)
    assert np.array_equal(closed, bare, equal_nan=True)
    assert np.nanmax(np.abs(closed - lc.stream_losses(model, sequence))) > 1e-3


def test_frozen_weights_never_learn_and_reset_ones_forget():
    model, sequence = make_model(), make_sequence(40)
    learning, frozen = lc.stream_losses(model, sequence), lc.stream_losses(model, sequence, lc.FROZEN)
    # the first token of a stream reads weights that took one step already
    assert np.abs(learning[1] - frozen[1]).max() > 1e-4
    with torch.no_grad():
        for layer in model.decoder.model.layers:
            layer.ttt.learnable_token_weight.fill_(-2.0)  # 1 / (t + 1) and this are below 0: no token has a weight in any step
    assert np.array_equal(frozen, lc.stream_losses(model, sequence), equal_nan=True)


def test_reset_forgets_at_every_window_and_only_there():
    model, sequence = make_model(), make_sequence(40)
    learning, reset = lc.stream_losses(model, sequence), lc.stream_losses(model, sequence, lc.RESET)
    # delayed codebooks are predicted a step later, so their last frame of the window comes after the reset
    assert np.array_equal(learning[:2, :WINDOW], reset[:2, :WINDOW])
    assert np.array_equal(learning[2:, : WINDOW - 1], reset[2:, : WINDOW - 1])
    assert np.abs(learning[1, WINDOW:] - reset[1, WINDOW:]).max() > 1e-4
    assert np.allclose(reset, lc.stream_losses(model, sequence, lc.RESET, chunk=3), atol=1e-5, equal_nan=True)


def test_conditions_leave_the_model_alone():
    model, sequence = make_model(), make_sequence(30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for condition in lc.CONDITIONS:
        lc.stream_losses(model, sequence, condition)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_shuffling_moves_whole_windows():
    order = lc.shuffled_order(21, 8, seed=3)
    assert sorted(order.tolist()) == list(range(21))
    assert order[16:].tolist() == list(range(16, 21))
    assert all((np.diff(order[i : i + 8]) == 1).all() and order[i] % 8 == 0 for i in (0, 8))


def test_edges_hold_the_window():
    edges = lc.bucket_edges(16, 100)
    assert edges == [0, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 100]  # 91 to 100 would be a sliver
    assert lc.bucket_edges(16, 120)[-3:] == [64, 91, 120]
    assert lc.bucket_edges(16, 17)[-2:] == [16, 17]


def test_curve_and_gain_by_hand():
    rows = [np.array([1.0, 3.0, np.nan, 5.0]), np.array([3.0, 5.0, 7.0, 7.0])]
    found = lc.curve(rows, [0, 2, 4])
    assert (found["loss"], found["frames"]) == ([3.0, 6.0], [4, 3])
    assert found["low"][0] == 2.0
    assert found["high"][0] == 4.0
    test = lc.gain([row + 1 for row in rows], rows, window=2)
    assert (test["mean"], test["pairs"], test["p"]) == (1.0, 2, 0.5)
    alone = lc.gain([np.arange(8.0) + 1], [np.arange(8.0)], window=2)
    assert alone == {"mean": 1.0, "interval": None, "p": None, "pairs": 1}  # its windows are not independent
    assert lc.curve(rows[:1], [0, 2, 4])["low"] == [None, None]


def test_one_run_holds_all_conditions():
    books = {"a": make_sequence(40, 1), "b": make_sequence(30, 2)}
    result = lc.measure(lc.losses_of(make_model()), books, WINDOW)
    assert list(result["conditions"]) == list(lc.CONDITIONS)
    assert result["frames"] == {"a": 40, "b": 30}
    assert result["gains"][lc.GATE_ZERO]["semantic"]["pairs"] == 2
    ttt = [lc.by_stream(lc.stream_losses(make_model(), book))["semantic"] for book in books.values()]
    gate = [lc.by_stream(lc.stream_losses(make_model(), book, lc.GATE_ZERO))["semantic"] for book in books.values()]
    expected = np.mean([np.nanmean((g - t)[WINDOW:].astype(np.float64)) for g, t in zip(gate, ttt)])
    assert result["gains"][lc.GATE_ZERO]["semantic"]["mean"] == pytest.approx(expected)
    apart = result["differences"][lc.GATE_ZERO]["semantic"]
    frames = [np.concatenate([(g - t)[8:11] for g, t in zip(gate, ttt)])]
    assert apart["loss"][apart["frames"].index(6)] == pytest.approx(np.mean(frames), abs=1e-6)
    first = result["conditions"][lc.TTT]["semantic"]
    assert first["loss"][0] == pytest.approx(np.mean([row[0] for row in ttt]), abs=1e-6)


def test_a_recording_within_the_window_is_named():
    with pytest.raises(ValueError, match="short: 8 frames"):
        lc.measure(lc.losses_of(make_model()), {"short": make_sequence(8)}, WINDOW)


@pytest.mark.parametrize("conditions", [[lc.FROZEN], [lc.TTT, "frozen"], [], [lc.TTT, lc.TTT]])
def test_conditions_that_cannot_be_are_named(conditions):
    with pytest.raises(ValueError, match="conditions"):
        lc.LongContextSettings(folder="books", conditions=conditions)


def test_a_model_that_cannot_be_measured_is_named():
    subject = SimpleNamespace(config={"sliding_window": None, "ttt_layers": []}, ttt={"ttt_layers": []})
    with pytest.raises(ValueError, match="sliding_window=null"):
        lc.TASK.check(None, subject)
    with pytest.raises(ValueError, match="ttt_layers"):
        inner_loss.TASK.check(None, subject)


MEMORY = """
import os, sys, torch, psutil
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_evaluation_long_context import make_model, make_sequence
from modeling_moshi_ttt.evaluation.long_context import stream_losses
model, process, seen = make_model(ttt_mini_batch_size=64), psutil.Process(), []
stream_losses(model, make_sequence(int(sys.argv[2])), chunk=512, progress=lambda n: seen.append(process.memory_info().rss))
early = max(seen[: max(2, len(seen) // 10)])
print(max(seen) / early, len(seen))
"""


def _memory_growth(frames):
    folder = __file__.rsplit("/", 1)[0]
    out = subprocess.run([sys.executable, "-c", MEMORY, folder, str(frames)], capture_output=True, text=True, check=True).stdout.split()
    return float(out[0])


def test_minutes_stream_in_constant_memory():
    assert _memory_growth(4500) < 1.05


@pytest.mark.slow
def test_an_hour_streams_in_constant_memory():
    assert _memory_growth(45000) < 1.05

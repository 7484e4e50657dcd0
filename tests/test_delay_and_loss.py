"""The delay pattern and the loss, against loops written from their definitions."""

import math

import pytest
import torch

from modeling_moshi_ttt import loss_moshi_ttt
from modeling_moshi_ttt.delay_pattern import delay, last_frames, undelay, undelay_mask
from modeling_moshi_ttt.loss_moshi_ttt import audio_weights, mean_loss, text_weights, weighted_cross_entropy

DELAYS = [0, 2, 1]


def test_delay_is_a_shift_with_history():
    codes = torch.randint(0, 50, (2, 3, 7))
    history = torch.randint(50, 99, (2, 3, 4))
    delayed = delay(codes, DELAYS, history)
    for s, d in enumerate(DELAYS):
        for t in range(7):
            expected = codes[:, s, t - d] if t >= d else history[:, s, 4 + t - d]
            assert torch.equal(delayed[:, s, t], expected)


def test_undelay_is_the_way_back():
    codes = torch.randint(0, 50, (2, 3, 7))
    back = undelay(delay(codes, DELAYS, torch.full((2, 3, 2), 99)), DELAYS, fill=-1)
    mask = undelay_mask(7, DELAYS)
    assert torch.equal(mask, torch.tensor([[t + d < 7 for t in range(7)] for d in DELAYS]))
    assert torch.equal(back[:, mask], codes[:, mask])
    assert (back[:, ~mask] == -1).all()
    logits = torch.randn(2, 3, 7, 5)
    assert torch.equal(undelay(logits, DELAYS, fill=0.0)[:, 1, :5], logits[:, 1, 2:])


def test_windows_are_delayed_as_the_whole():
    codes, start = torch.randint(0, 50, (2, 3, 20)), torch.full((2, 3, 2), 99)
    whole, parts, history = delay(codes, DELAYS, start), [], start
    for first, last in ((0, 1), (1, 9), (9, 10), (10, 20)):
        parts.append(delay(codes[..., first:last], DELAYS, history))
        history = last_frames(codes[..., first:last], history, None)
    assert torch.equal(torch.cat(parts, -1), whole)


def test_last_frames_of_rows_of_unequal_length():
    codes, history = torch.arange(20).view(2, 1, 10), torch.full((2, 1, 3), 99)
    kept = last_frames(codes, history, torch.tensor([10, 1]))
    assert kept.tolist() == [[[7, 8, 9]], [[99, 99, 10]]]
    assert torch.equal(last_frames(codes, history, torch.tensor([10, 10])), last_frames(codes, history, None))


def test_bad_delays_are_refused():
    codes = torch.zeros(1, 3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="2 entries for 3 streams"):
        delay(codes, [0, 1], codes)
    with pytest.raises(ValueError, match="1 frames.*largest delay, 2"):
        delay(codes, DELAYS, codes[..., :1])
    with pytest.raises(ValueError, match="2 entries for 3 streams"):
        undelay(codes, [0, 1], fill=0)


def test_weights_follow_moshi_finetune():
    text = torch.tensor([[3, 0, 7, -100, -1]])
    assert text_weights(text, [3, 0], 0.5).tolist() == [[0.5, 0.5, 1.0, 0.0, 0.0]]
    audio = torch.tensor([[[1, -1], [2, -100], [3, 4]]])
    assert audio_weights(audio, [100.0, 1.0, 1.0]).tolist() == [[[100.0, 0.0], [1.0, 0.0], [1.0, 1.0]]]


def test_weighted_cross_entropy_is_its_definition():
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, -100, 4], [-1, 2, 2]])
    weights = torch.rand(2, 3, dtype=torch.float64) * (labels >= 0)
    expected = 0.0
    for i in range(2):
        for j in range(3):
            if labels[i, j] >= 0:
                scores = [math.exp(x) for x in logits[i, j].tolist()]
                expected -= weights[i, j].item() * math.log(scores[labels[i, j]] / sum(scores))
    total, weight = weighted_cross_entropy(logits, labels, weights)
    assert abs(total.item() - expected) <= 1e-12
    assert abs(weight.item() - weights.sum().item()) <= 1e-12


def test_nothing_to_train_is_a_loss_of_zero_with_a_gradient_of_zero():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss = mean_loss(*weighted_cross_entropy(logits, torch.full((1, 2), -100), torch.zeros(1, 2)))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_are_taken_in_pieces_that_keep_nothing(monkeypatch, dtype):
    """The same loss and gradient, and beside the logits themselves next to nothing kept for backward."""
    logits, labels = torch.randn(3, 40, 500).to(dtype), torch.randint(-1, 500, (3, 40))
    weights = torch.rand(3, 40) * (labels >= 0)
    found, kept = [], []
    for chunk in (1 << 24, 500 * 7):
        monkeypatch.setattr(loss_moshi_ttt, "CHUNK", chunk)
        own, storages = logits.clone().requires_grad_(), {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total, weight = weighted_cross_entropy(own, labels, weights)
        kept.append(sum(size for place, size in storages.items() if place != own.untyped_storage().data_ptr()))
        total.backward()
        found.append((total.item(), weight.item(), own.grad))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-6)
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-5, atol=1e-7)
    assert kept[0] >= logits.numel() * 4
    assert kept[1] < kept[0] / 20

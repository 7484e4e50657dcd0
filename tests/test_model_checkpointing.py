"""Recomputation in backward changes no number, and gradients reach the initial fast weights."""

import pytest
import torch
from test_model import gradients_of
from tiny import cut, random_frames, tiny_model, with_labels


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_recomputation_changes_no_number(mixer):
    frames, results = None, {}
    for group in (16, 1, 3, 188, 10**6):
        for checkpointing in (False, True):
            model = tiny_model(ttt_mixer=mixer, ttt_mini_batch_size=1, scan_checkpoint_group_size=group, ttt_layers=[1]).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            frames = frames or with_labels(random_frames(model.config, rows=1, frames=188))
            results[group, checkpointing] = gradients_of(model, frames)
    loss, gradients = results.pop((16, False))
    assert len(gradients) == sum(1 for _ in model.named_parameters())
    for other_loss, others in results.values():
        assert abs(other_loss - loss) <= 1e-10
        for name, gradient in gradients.items():
            assert (others[name] - gradient).abs().max() <= 1e-10 * max(1.0, gradient.abs().max()), name


def test_checkpointing_carries_a_memory():
    """Windows trained with carried memory under activation checkpointing: the replay in backward must not touch the memory again."""
    losses, gradients, frames = [], [], None
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        frames = frames or with_labels(random_frames(model.config, rows=2, frames=22))
        memory = model.new_cache(2)
        for start, stop in ((0, 9), (9, 22)):
            model.zero_grad()
            loss = model(**cut(frames, start, stop), past_key_values=memory).loss
            loss.backward()
            memory.detach()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert abs(losses[0] - losses[1]) <= 1e-12
    assert gradients[0].keys() == gradients[1].keys()
    assert all((gradients[0][name] - gradients[1][name]).abs().max() <= 1e-10 for name in gradients[0])


@pytest.mark.parametrize("enable", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_reentrant_checkpointing_is_refused(enable):
    model = tiny_model().train()
    with pytest.raises(ValueError, match="use_reentrant=True.*leave it out or say False"):
        getattr(model, enable)({"use_reentrant": True})
    frames = with_labels(random_frames(model.config, rows=1, frames=9))
    expected = gradients_of(model, frames)[0]
    for options in (None, {}, {"use_reentrant": False}, {"preserve_rng_state": False}):
        getattr(model, enable)(options)
        assert all(layer.gradient_checkpointing for layer in model.decoder.model.layers)
        assert torch.equal(gradients_of(model, frames)[0], expected)


def test_a_reset_row_trains_the_initial_weights():
    model = tiny_model().train()
    frames = with_labels(random_frames(model.config, rows=2, frames=16))
    memory = model.new_cache(2)
    model(**cut(frames, 0, 8), past_key_values=memory)
    memory.detach()
    memory.reset([1])
    model(**cut(frames, 8, 16), past_key_values=memory).loss.backward()
    assert model.decoder.model.layers[0].ttt.W1.grad.abs().max() > 0

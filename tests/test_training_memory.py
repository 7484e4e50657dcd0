"""Fast weights that go on to the next recording: nothing else of the one before does."""

import pytest
import torch
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.cache_moshi_ttt import MoshiTTTCache
from modeling_moshi_ttt.training.memory import LaneMemory

SEEDS = [(0, step, row, 0) for step in range(20) for row in range(2)]


def heard(model, seed, frames=7):
    """Inputs of one window for two rows."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    codes = torch.randint(config.audio_vocab_size, (2, 2 * config.num_codebooks, frames), generator=generator)
    text = torch.randint(4, config.vocab_size, (2, frames), generator=generator)
    return {
        "input_ids": text,
        "moshi_audio_codes": codes[:, : config.num_codebooks],
        "user_audio_codes": codes[:, config.num_codebooks :],
    }


@torch.no_grad()
def second_recording(model, carry, share):
    """Logits of a second recording after a first, and the cache that it began with."""
    memory = LaneMemory(model, carry, 1, 2, share)
    begins = torch.ones(2, dtype=torch.bool)
    model(**heard(model, 1), past_key_values=memory.enter(0, begins, SEEDS[:2]), use_cache=True)
    cache = memory.enter(0, begins, SEEDS[2:4])
    return model(**heard(model, 2), past_key_values=cache, use_cache=True).logits


def test_the_next_recording_finds_fast_weights_and_nothing_else():
    model = make_model().eval()
    carried, alone, never = (second_recording(model, "state+next", share) for share in (1.0, 0.0, 0.0))
    with torch.no_grad():
        fresh = model(**heard(model, 2), use_cache=False).logits
        told = model.new_cache(2)
        model(**heard(model, 1), past_key_values=told, use_cache=True)
        by_hand = MoshiTTTCache(model.config, 2)
        by_hand.state = type(told.state)(**{**vars(by_hand.state), "ttt_states": told.state.ttt_states})
        expected = model(**heard(model, 2), past_key_values=by_hand, use_cache=True).logits
    torch.testing.assert_close(carried, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, fresh, rtol=0, atol=1e-5)
    assert torch.equal(alone, never)
    assert (carried - fresh).abs().max() > 1e-3


def test_the_share_is_drawn_by_row_and_step():
    model = make_model()
    kept = []
    for _ in range(2):
        memory = LaneMemory(model, "state+next", 1, 2, 0.5)
        rows = []
        for step in range(20):
            cache = memory.enter(0, torch.ones(2, dtype=torch.bool), SEEDS[2 * step : 2 * step + 2])
            rows.append(cache.state.reset_mask.tolist())
            cache.state.reset_mask.zero_()
        kept.append(rows)
    assert kept[0] == kept[1]
    assert 8 < sum(map(sum, kept[0])) < 32


@pytest.mark.parametrize("carry", ["state", "state+next"])
def test_training_goes_on_from_recording_to_recording(tmp_path, carry):
    model = make_model()
    recordings = make_recordings(tmp_path / "codes", [9, 9, 9, 9], model.config)
    run = make_run(tmp_path / carry, data={"carry": carry, "batch_size": 2, "window_seconds": 0.8}, optim={"steps": 3})
    trainer = make_trainer(run, recordings, model)
    assert trainer.fit().bad_steps == 0
    (cache,) = trainer.memory.caches
    assert int(cache.frames.max()) > 9 if carry == "state+next" else int(cache.frames.max()) == 9

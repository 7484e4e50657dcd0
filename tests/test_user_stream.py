"""Models whose depth decoder predicts the user's codebooks too: what they say, how they are trained, where they are refused."""

import pytest
import torch
import torch.nn.functional as F
from tiny import cut, random_frames, tiny_config, tiny_model, with_labels
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.delay_pattern import delay
from modeling_moshi_ttt.frames_moshi_ttt import initial_tokens
from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.windows import WindowReader

USER = {"user_depth_slices": True}


def own_part(model):
    """The same model without the user's slices, as conversion drops them."""
    talking = tiny_model()
    own = talking.state_dict()
    talking.load_state_dict({name: tensor[: own[name].shape[0]] for name, tensor in model.state_dict().items() if name in own})
    return talking


def both_labels(frames):
    """Labels of both speakers."""
    return with_labels(frames) | {"audio_labels": torch.cat([frames["moshi_audio_codes"], frames["user_audio_codes"]], dim=1)}


def test_what_moshi_says_does_not_depend_on_the_users_slices():
    model = tiny_model(**USER)
    talking, frames = own_part(model), with_labels(random_frames(model.config, 2, 12))
    both, alone = model(**frames), talking(**frames)
    assert both.audio_logits.shape[1] == 6
    torch.testing.assert_close(both.audio_logits[:, :3], alone.audio_logits)
    torch.testing.assert_close(both.loss, alone.loss)  # labels of Moshi's codebooks alone train these alone
    user = frames["user_audio_codes"]
    assert torch.equal(model.hear(user, do_sample=False)[1], talking.hear(user, do_sample=False)[1])


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_weighs_the_users_codebooks(weight):
    model = tiny_model(**USER, user_loss_weight=weight, semantic_loss_weight=10.0)
    frames = both_labels(random_frames(model.config, 2, 12))
    output = model(**frames)
    history = initial_tokens(model.config)[1:, 1:].expand(2, -1, -1)
    targets = delay(frames["audio_labels"].masked_fill(frames["audio_labels"] < 0, -100), model.config.audio_delays, history)
    targets = targets.masked_fill(targets == model.config.audio_vocab_size, -100)  # before the start of a late codebook
    each = F.cross_entropy(output.audio_logits.flatten(0, 2), targets.flatten(), reduction="none").view(2, 6, 12)
    weights = torch.tensor([10.0, 1, 1, 10 * weight, weight, weight])[:, None] * (targets >= 0)
    torch.testing.assert_close(output.audio_loss, (each * weights).sum() / weights.sum())
    torch.testing.assert_close(model.loss_weights(frames["text_labels"], frames["audio_labels"])[1], weights.sum())
    output.loss.backward()
    reached = model.depth_decoder.lm_heads.weight.grad.flatten(1).abs().amax(dim=1) > 0
    assert reached.tolist() == [True] * 3 + [weight > 0] * 3


def test_windows_give_the_loss_of_the_whole():
    model = tiny_model(**USER, user_loss_weight=0.5)
    frames = both_labels(random_frames(model.config, 2, 12))
    whole, cache = model.loss_weights(frames["text_labels"], frames["audio_labels"]), model.new_cache(2)
    parts = [model(**cut(frames, *ends), past_key_values=cache, num_items_in_batch=whole).loss for ends in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(sum(parts), model(**frames).loss)


def test_it_is_saved_and_loaded(tmp_path):
    model = tiny_model(torch.float32, **USER, user_loss_weight=0.5)
    model.save_pretrained(tmp_path)
    again = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path)
    assert (again.config.num_predicted_codebooks, again.config.user_loss_weight) == (6, 0.5)
    frames = both_labels(random_frames(model.config, 1, 9))
    assert torch.equal(again(**frames).loss, model(**frames).loss)


@pytest.mark.parametrize("carry", ["none", "state"])
def test_training_learns_the_users_stream(tmp_path, carry):
    run = make_run(tmp_path / "run", data={"user_weight": 1.0, "carry": carry}, optim={"steps": 12, "lr": 1e-2, "ttt_lr": 1e-2})
    model = make_model(**USER)
    recordings = make_recordings(tmp_path / "data", [16] * 4, model.config)
    reader = WindowReader(recordings, model.config.audio_delays, 3, user_labels=True)
    trainer = make_trainer(run, recordings, model, held_out=recordings)
    assert model.config.user_loss_weight == 1.0
    batch = reader[trainer.plan.turn()[:2]]
    assert torch.equal(batch.audio_labels[:, 3:, :-1], batch.user_audio_codes[..., :-1])

    @torch.no_grad()
    def user_loss():
        labels = batch.audio_labels.clone()
        labels[:, :3] = -100
        return model.eval()(**batch.inputs() | {"audio_labels": labels}, use_cache=False).audio_loss.item()

    before = user_loss()
    trainer.fit()
    assert user_loss() < before - 0.01  # random codes: little can be learned but their frequencies


def test_a_model_without_the_users_slices_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="`user_loss_weight=0.5` .*user_depth_slices"):
        tiny_config(user_loss_weight=0.5)
    with pytest.raises(ValueError, match="`user_loss_weight=-1` must not be negative"):
        tiny_config(user_loss_weight=-1, **USER)
    with pytest.raises(ValueError, match=r"`data.user_weight=0.5` .*--keep-user-slices"):
        setup.adapt(make_model(), make_run(tmp_path, data={"user_weight": 0.5}))
    model = tiny_model(**USER)
    with pytest.raises(ValueError, match="`audio_labels` has shape"):
        model(**random_frames(model.config, 1, 9), audio_labels=torch.zeros(1, 5, 9, dtype=torch.long))

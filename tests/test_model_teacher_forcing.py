"""Within a frame the depth decoder is given the labels: noise on what the model hears of the past teaches nothing false about the frame."""

import torch
from tiny import cut, random_frames, tiny_config, tiny_model, with_labels

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.training.noise import add_noise
from modeling_moshi_ttt.training.windows import Batch

DELAYS = {"audio_delays": [0, 2, 1, 0, 1, 2]}


def noisy_batch(model, rows=2, frames=15):
    """Labels of their own beside the inputs, a share of them missing."""
    batch = random_frames(model.config, rows, frames)
    taught = with_labels(random_frames(model.config, rows, frames, seed=2))
    return batch | {name: taught[name] for name in ("text_labels", "audio_labels")}


@torch.no_grad()
def taught_by_hand(model, batch):
    """Audio logits `[B, K, T, card]`, every step's tokens picked one by one."""
    config = model.config
    hidden = model(**{name: batch[name] for name in ("input_ids", "moshi_audio_codes", "user_audio_codes")}).last_hidden_state
    rows, frames = batch["input_ids"].shape
    logits = torch.empty(rows, config.num_codebooks, frames, config.audio_vocab_size, dtype=hidden.dtype)
    for row in range(rows):
        for step in range(frames):
            label = batch["text_labels"][row, step]
            tokens = [label if label >= 0 else batch["input_ids"][row, step]]
            for k, late in enumerate(config.audio_delays[: config.num_codebooks]):
                if step < late:
                    tokens.append(torch.tensor(config.audio_vocab_size))
                    continue
                label = batch["audio_labels"][row, k, step - late]
                tokens.append(label if label >= 0 else batch["moshi_audio_codes"][row, k, step - late])
            given = torch.stack(tokens)[None]
            logits[row, :, step] = model.depth_decoder(hidden[row, step][None], given[:, 0], given[:, 1:])[:, 0]
    return logits


def test_labels_teach_within_the_frame_and_inputs_where_there_are_none():
    model = tiny_model(**DELAYS)
    batch = noisy_batch(model)
    with torch.no_grad():
        output = model(**batch)
    assert torch.allclose(output.audio_logits, taught_by_hand(model, batch), atol=1e-12)
    inputs = {name: tensor for name, tensor in batch.items() if "labels" not in name}
    with torch.no_grad():
        plain = model(**inputs)
    assert torch.equal(output.logits, plain.logits)  # labels are never heard
    assert not torch.allclose(output.audio_logits, plain.audio_logits)


def test_labels_that_say_what_is_heard_change_nothing():
    model = tiny_model(**DELAYS)
    frames = random_frames(model.config, rows=2, frames=15)
    with torch.no_grad():
        assert torch.equal(model(**with_labels(frames)).audio_logits, model(**frames).audio_logits)


def test_windows_and_padding_on_either_side_give_the_same():
    """Carried windows know the labels before them; rows of unequal length are packed, labels with them."""
    model = tiny_model(**DELAYS)
    batch, memory, parts = noisy_batch(model), model.new_cache(2), []
    with torch.no_grad():
        whole = model(**batch)
        for first, last in ((0, 1), (1, 7), (7, 15)):
            parts.append(model(**cut(batch, first, last), past_key_values=memory).audio_logits)
        assert torch.allclose(torch.cat(parts, dim=2), whole.audio_logits, atol=1e-12)
        left = {name: torch.cat([tensor[..., 12:], tensor[..., :12]], dim=-1) for name, tensor in batch.items()}
        mask = (torch.arange(15) >= 3).long().expand(2, -1)
        packed = model(**left, attention_mask=mask)
        short = model(**cut(batch, 0, 12))
    assert torch.allclose(packed.audio_logits[:, :, 3:], short.audio_logits, atol=1e-12)
    assert torch.allclose(packed.audio_loss, short.audio_loss, atol=1e-12)


def share_of_frames_that_agree(noise: float) -> float:
    """Of frames said after a short training in which codes 1 and 2 are always equal."""
    torch.manual_seed(0)
    config = tiny_config(ttt_layers=[], semantic_loss_weight=1.0)
    model = MoshiTTTForConditionalGeneration(config)
    optimizer, random = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    settings = DataSettings(train="unused", own_noise=noise, text_noise=noise)
    text, absent = torch.full((16, 12), 4), torch.full((16, 3, 12), -1)
    for step in range(120):
        codes = torch.randint(config.audio_vocab_size, (16, 3, 12), generator=random)
        codes[:, 2] = codes[:, 1]
        batch = Batch(text, codes, absent, text, codes, torch.ones_like(text), torch.zeros(16, dtype=torch.bool), [""] * 16)
        noisy = add_noise(batch, settings, config.audio_vocab_size, [(0, step, row) for row in range(16)])
        optimizer.zero_grad()
        model(**noisy.inputs(), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.manual_seed(2)
    said = model.eval().generate(user_audio_codes=torch.full((8, 3, 40), -1), temperature=1.0, top_k=0).audio_codes
    return (said[:, 1] == said[:, 2]).float().mean().item()


def test_codes_that_always_agree_still_do_after_training_with_noise():
    clean, noisy = share_of_frames_that_agree(0.0), share_of_frames_that_agree(0.3)
    assert clean > 0.95
    assert noisy >= 0.99 * clean

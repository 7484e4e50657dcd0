"""A model that transformers itself shards while loading (`distributed_config`), by the FSDP plans of its parts."""

import torch
from ranks import run_ranks
from tiny import random_frames, tiny_model, with_labels
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_moshi_ttt.modeling_moshi_ttt import MoshiTTTForConditionalGeneration


def gradient_of(model, frames):
    """Loss, and the whole gradient of a layer's weight and of the depth decoder's."""
    loss = model(**frames, use_cache=False).loss
    loss.backward()
    names = ("decoder.model.layers.0.ttt.W1", "depth_decoder.lm_heads.weight", "embed_tokens.0.weight", "decoder.lm_head.weight")
    gradients = [model.get_parameter(name).grad for name in names]
    return [loss.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)]


def said(model, frames, prompt=3):
    """What the model says greedily: a stream's first frames, and a whole `generate` behind a prompt."""
    stream = model.new_stream(batch_size=2, do_sample=False)
    steps = [stream.step(frames["user_audio_codes"][..., t]) for t in range(9)]
    again = model.new_stream(batch_size=2, do_sample=False).step(frames["user_audio_codes"][..., 0])
    start = {name: frames[name][..., :prompt] for name in ("input_ids", "moshi_audio_codes")}
    whole = model.generate(**start, user_audio_codes=frames["user_audio_codes"], do_sample=False)
    return torch.cat([*(step.audio_codes for step in steps), again.audio_codes, whole.audio_codes.flatten(1), whole.sequences], dim=1)


def test_a_sharded_model_trains_and_talks_as_a_whole_one(tmp_path):
    whole = tiny_model(torch.float32)
    frames = random_frames(whole.config, 2, 12)
    whole.save_pretrained(tmp_path)
    wanted_numbers, wanted_words = gradient_of(whole, with_labels(frames)), said(whole, frames)

    def work(rank):
        model = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path, distributed_config=DistributedConfig(fsdp_size=2))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        plan = {name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP") and name}
        assert {"decoder.model.layers.0", "decoder.model.layers.1", "depth_decoder", "embed_tokens.0", "decoder.lm_head"} <= plan
        assert torch.equal(said(model.eval(), frames), wanted_words)
        for found, wanted in zip(gradient_of(model, with_labels(frames)), wanted_numbers, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(said(model, frames), wanted_words)  # after a step backward too

    run_ranks(2, "ddp", work)

"""`generate` and pipelines as users of transformers take them for granted."""

import json

import numpy as np
import pytest
import torch
from tiny import random_frames, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from modeling_moshi_ttt import packaged

SILENCE = [[1, 2, 3], [4, 5, 6]]


@pytest.fixture(scope="module")
def model():
    return tiny_model(silence_codes=SILENCE)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(packaged("processor", "tiny"))


@pytest.fixture(scope="module")
def spoken():
    """A model that fits the tiny processor."""
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.from_pretrained(packaged("model", "tiny"))).eval()


def user_codes(rows: int = 2, frames: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 20, (rows, 3, frames), generator=torch.Generator().manual_seed(seed))


def equal(one, other) -> bool:
    return torch.equal(one.sequences, other.sequences) and torch.equal(one.audio_codes, other.audio_codes)


def test_the_generation_configuration_is_read_saved_and_overridden(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = tmp_path / "generation_config.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "do_sample": False, "max_new_tokens": 4, "text_temperature": 0.3}))
    loaded = AutoModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").double()
    assert again.generation_config.text_temperature == 0.3
    user = user_codes()
    assert equal(again.generate(user_audio_codes=user), again.generate(user_audio_codes=user, max_new_tokens=4, do_sample=False))
    sampled = {"do_sample": True, "temperature": 1.4, "text_temperature": 1.2, "top_k": 7}
    configuration = GenerationConfig(**sampled, max_new_tokens=6)
    expected = again.generate(user_audio_codes=user, max_new_tokens=6, seeds=[1, 2], **sampled)
    assert equal(again.generate(user_audio_codes=user, generation_config=configuration, seeds=[1, 2]), expected)
    short = again.generate(user_audio_codes=user, generation_config=configuration, seeds=[1, 2], max_new_tokens=3)
    assert torch.equal(short.sequences, expected.sequences[:, :3])


def test_lengths(model):
    prompt = {name: tensor.clamp(min=0) for name, tensor in random_frames(model.config, 1, 5).items()}
    assert model.generate(**prompt, max_new_tokens=3).sequences.shape == (1, 8)
    assert model.generate(**prompt, max_length=9).sequences.shape == (1, 9)
    assert model.generate(**prompt, max_length=9, max_new_tokens=2).audio_codes.shape == (1, 3, 7)
    assert model.generate(user_audio_codes=user_codes(), max_length=9).sequences.shape == (2, 9)
    with pytest.raises(ValueError, match="`max_length=2.5` must be a whole number"):
        model.generate(**prompt, max_length=2.5)
    with pytest.raises(ValueError, match="nothing to generate"):
        model.generate(**prompt, max_length=4)


def test_moshis_absent_side_is_answered_row_by_row(model):
    """A processor's batch of the user alone answers; beside it another row may say what it was given."""
    user, absent = user_codes(), torch.full((2, 12), -1)
    batch = {"input_ids": absent, "moshi_audio_codes": absent[:, None].expand(-1, 3, -1), "user_audio_codes": user, "text_labels": absent}
    answered = model.generate(**batch, do_sample=False)
    assert equal(answered, model.generate(user_audio_codes=user, do_sample=False))
    assert model.generate(**batch, max_new_tokens=5).sequences.shape == (2, 5)
    said = random_frames(model.config, 2, 12, 4)
    batch |= {"input_ids": absent.clone(), "moshi_audio_codes": batch["moshi_audio_codes"].clone()}
    batch["input_ids"][0], batch["moshi_audio_codes"][0] = said["input_ids"][0].clamp(min=0), said["moshi_audio_codes"][0].clamp(min=0)
    mixed = model.generate(**batch, do_sample=False)
    assert torch.equal(mixed.sequences[0], batch["input_ids"][0])
    assert torch.equal(mixed.sequences[1], answered.sequences[1])


def test_a_text_alone_is_said(model):
    text = torch.randint(0, 30, (2, 6))
    absent = torch.full((2, 3, 6), -1)
    said = model.generate(text, absent, torch.zeros(2, 3, 6, dtype=torch.long), max_new_tokens=2)
    assert torch.equal(said.sequences[:, :6], text)
    assert (said.audio_codes >= 0).all()


def test_the_user_falls_silent_at_the_end_row_by_row(model):
    user, lengths = user_codes(2, 8), [8, 5]
    silence = torch.tensor([SILENCE[0], *[SILENCE[1]] * 20]).T
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    given = user.masked_fill(~mask[:, None], -1)
    together = model.generate(user_audio_codes=given, attention_mask=mask.long(), max_new_tokens=15, do_sample=False)
    for row, length in enumerate(lengths):
        heard = torch.cat([user[row, :, :length], silence], dim=-1)[None]
        alone = model.generate(user_audio_codes=heard, max_new_tokens=15, do_sample=False)
        assert torch.equal(together.audio_codes[row], alone.audio_codes[0])
    absent = model.generate(user_audio_codes=user, max_new_tokens=15, do_sample=False, user_silence=False)
    heard = torch.cat([user, torch.full((2, 3, 20), -1)], dim=-1)
    assert equal(absent, model.generate(user_audio_codes=heard, max_new_tokens=15, do_sample=False))
    with pytest.raises(ValueError, match="padding before frames"):
        model.generate(user_audio_codes=given, attention_mask=mask.flip(1).long())


def test_silence_codes_fit_the_model():
    with pytest.raises(ValueError, match=r"`silence_codes` holds \[1, 2\]; each frame has 3 codes from 0 to 19"):
        tiny_model(silence_codes=[[1, 2]])


class Collected(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_each_frames_text(model):
    prompt = {name: tensor.clamp(min=0) for name, tensor in random_frames(model.config, 2, 5).items()}
    streamer = Collected()
    output = model.generate(**prompt, max_new_tokens=4, streamer=streamer)
    assert streamer.puts == [prompt["input_ids"].tolist(), *output.sequences[:, 5:].T.tolist()]
    assert streamer.ended


def test_transformers_own_streamer_writes_what_the_processor_reads(spoken, processor):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    user = torch.randint(0, 128, (1, 8, 20))
    output = spoken.generate(user_audio_codes=user, streamer=streamer)
    assert "".join(streamer).strip() == processor.tokenizer.decode(output.sequences[0], skip_special_tokens=True).strip()


def test_stopping_criteria_end_a_row_and_then_the_talk(model):
    user = user_codes(2, 40)
    whole = model.generate(user_audio_codes=user, seeds=[1, 2])
    ends = [5, 9]

    def criteria(input_ids, scores):
        return torch.tensor([input_ids.shape[1] >= end for end in ends])

    output = model.generate(user_audio_codes=user, seeds=[1, 2], stopping_criteria=[criteria], pad_token_id=7)
    assert output.sequences.shape == (2, 9)
    for row, end in enumerate(ends):
        assert torch.equal(output.sequences[row, :end], whole.sequences[row, :end])
        assert torch.equal(output.audio_codes[row, :, :end], whole.audio_codes[row, :, :end])
    assert (output.sequences[0, 5:] == 7).all()
    assert (output.audio_codes[0, :, 5:] == -2).all()
    end = int(whole.sequences[0, 6])
    first = whole.sequences[0].tolist().index(end)
    assert model.generate(user_audio_codes=user[:1], seeds=[1], eos_token_id=end).sequences.shape == (1, first + 1)


class Only(LogitsProcessor):
    """Token t at step t."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) != input_ids.shape[1], float("-inf"))


def test_processors_of_the_text_see_what_was_said(model):
    output = model.generate(user_audio_codes=user_codes(), logits_processor=LogitsProcessorList([Only()]))
    assert output.sequences.tolist() == [list(range(12))] * 2


@pytest.mark.parametrize("delays", [None, [0, 2, 3, 0, 1, 4]], ids=str)
def test_a_memory_goes_on(delays):
    model = tiny_model(audio_delays=delays, silence_codes=SILENCE)
    user = user_codes(2, 30)
    whole = model.generate(user_audio_codes=user, seeds=[1, 2])
    first = model.generate(user_audio_codes=user[..., :11], seeds=[1, 2])
    after = model.generate(user_audio_codes=user[..., 11:], seeds=[1, 2], past_key_values=first.past_key_values)
    if max(model.config.delays) == 1:  # where codebooks are later, the first call's last ones were chosen while the user was silent
        assert torch.equal(torch.cat([first.sequences, after.sequences], -1), whole.sequences)
        assert torch.equal(torch.cat([first.audio_codes, after.audio_codes], -1), whole.audio_codes)
    assert after.past_key_values is first.past_key_values
    assert first.past_key_values.frames.tolist() == [30, 30]
    # What it holds is what a forward pass over those frames leaves.
    cache = model.new_cache(2)
    with torch.no_grad():
        for part, heard in ((first, user[..., :11]), (after, user[..., 11:])):
            model(part.sequences, part.audio_codes, heard, past_key_values=cache)
    ours, theirs = first.past_key_values.state_dict(), cache.state_dict()
    assert all(torch.allclose(ours[name].double(), theirs[name].double(), atol=1e-9) for name in theirs if name != "labels")


def test_several_answers_each_with_its_seed(model):
    user = user_codes()
    output = model.generate(user_audio_codes=user, num_return_sequences=2, seeds=[1, 2, 3, 4])
    assert torch.equal(output.sequences[3], model.generate(user_audio_codes=user[1:], seeds=[4]).sequences[0])
    torch.manual_seed(5)
    one = model.generate(user_audio_codes=user)
    torch.manual_seed(5)
    assert equal(one, model.generate(user_audio_codes=user))
    with pytest.raises(ValueError, match="`num_return_sequences=2` gives the same answer"):
        model.generate(user_audio_codes=user, num_return_sequences=2, do_sample=False)


def test_kinds_of_input_and_output(model):
    user = user_codes()
    expected = model.generate(user_audio_codes=user, do_sample=False)
    assert equal(model.generate(user_audio_codes=user.numpy(), do_sample=False), expected)
    with torch.inference_mode():
        assert equal(model.generate(user_audio_codes=user, do_sample=False), expected)
    assert torch.equal(model.generate(user_audio_codes=user, do_sample=False, return_dict_in_generate=False), expected.sequences)
    assert model.generate(user_audio_codes=user, use_cache=False).cache is None
    harmless = {"num_beams": 1, "pad_token_id": 3, "top_p": 1.0, "repetition_penalty": 1.0, "synced_gpus": False, "guidance_scale": None}
    assert equal(model.generate(user_audio_codes=user, do_sample=False, temperature=0.0, top_k=None, **harmless), expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_beams", 4, "cannot apply"),
        ("assistant_model", "small", "cannot apply"),
        ("prompt_lookup_num_tokens", 3, "cannot apply"),
        ("guidance_scale", 2.0, "classifier-free guidance"),
        ("cfg_coef", 2.0, "classifier-free guidance"),
        ("top_p", 0.9, "logits_processor"),
        ("repetition_penalty", 1.3, "logits_processor"),
        ("output_scores", True, "keeps no scores"),
        ("inputs_embeds", 1, "come as `input_ids`"),
        ("num_return_sequences", 0, "must be a whole number"),
    ],
)
def test_what_cannot_apply_is_refused_by_name(model, name, value, words):
    with pytest.raises(ValueError, match=f"`{name}={value}`.*{words}"):
        model.generate(user_audio_codes=user_codes(), **{name: value})


def test_pipelines_speak(spoken, processor, tmp_path):
    spoken.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    speech = pipeline("text-to-audio", model=str(tmp_path))("hello there", generate_kwargs={"max_new_tokens": 5})
    frames = 5 + int(np.ceil(2 / 3 * 12.5))
    assert speech["audio"].shape == (1920 * frames,)
    assert speech["sampling_rate"] == 24000
    talk = pipeline("any-to-any", model=str(tmp_path))
    assert talk("hello there", max_new_tokens=5)[0]["generated_text"].startswith("hello there")
    sound = np.zeros(1920 * 4, dtype=np.float32)
    heard = {"audio": sound, "sampling_rate": 24000, "mono_is": "user", "max_new_tokens": 5}
    assert isinstance(talk(None, **heard)[0]["generated_text"], str)
    assert talk(None, **heard, generation_mode="audio")[0]["generated_audio"].shape == (1920 * 5,)


def test_a_processor_gives_the_tensors_that_are_asked_for(processor):
    sound = torch.zeros(2400)
    plain, numpy = processor(sound, 24000), processor(sound, 24000, return_tensors="np")
    assert all(torch.equal(plain[name], torch.from_numpy(numpy[name])) for name in plain)
    assert torch.equal(processor(sound, sampling_rate=24000, return_tensors="pt")["input_ids"], plain["input_ids"])
    for asked, words in (
        ({"return_tensors": "tf"}, "`return_tensors='tf'`"),
        ({"images": [1]}, "`images="),
        ({"text": "hello"}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(sound, 24000, **asked)
    with pytest.raises(ValueError, match="holds no words"):
        processor(" ")

"""Conversations that begin from something: prompts of any length, memories, hooks, and what a processor makes of a voice and a persona."""

import numpy as np
import pytest
import torch
from tiny import random_frames, tiny_model
from transformers import AutoProcessor

from modeling_moshi_ttt import packaged
from modeling_moshi_ttt.tokens_moshi_ttt import UNGENERATED

DELAYS = [None, [0, 2, 3, 0, 1, 4], [1, 0, 2, 2, 0, 1], [0] * 6]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(packaged("processor", "tiny"))


def given(model, rows: int, frames: int, seed: int = 1) -> dict[str, torch.Tensor]:
    return random_frames(model.config, rows, frames, seed)


def talk(stream, user: torch.Tensor) -> torch.Tensor:
    """`[B, 2 + K, T]` what the stream says in the calls that hear these frames, and whether it is valid."""
    frames = [stream.step(user[..., t]) for t in range(user.shape[-1])]
    return torch.stack([torch.cat([f.text[:, None], f.audio_codes, f.valid[:, None]], 1) for f in frames], -1)


@pytest.mark.parametrize("delays", DELAYS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 7, 30])
def test_after_a_prompt_a_stream_goes_on_as_if_it_had_said_it_itself(delays, length):
    """Also where codebooks are late by several frames, and where the prompt is longer than the window (8)."""
    model = tiny_model(audio_delays=delays)
    prompt, depth, calls = given(model, 2, length), max(model.config.delays), 20
    user = torch.randint(0, 20, (2, 3, calls))
    begun = model.new_stream(2, do_sample=False, prompt=prompt)
    own = torch.cat([prompt["input_ids"][:, None], prompt["moshi_audio_codes"]], dim=1)
    heard = torch.cat([prompt["user_audio_codes"], user[..., 1:]], dim=-1)
    whole = model.generate(own[:, 0], own[:, 1:], heard, max_new_tokens=calls - depth, do_sample=False)
    said = talk(begun, user)
    expected = torch.cat([whole.sequences[:, None], whole.audio_codes], dim=1)
    valid = said[:, -1].bool()
    assert torch.equal(said[:, :-1, depth:], expected[..., length:])
    # The first calls complete the prompt's last frames.
    first = expected[..., max(length - depth, 0) : length]
    assert torch.equal(said[:, :-1, depth - first.shape[-1] : depth], first)
    assert torch.equal(valid, (torch.arange(calls) + length >= depth).expand(2, -1))


def test_rows_with_prompts_of_different_lengths_each_begin_right(model):
    lengths, user = [0, 2, 9, 17], torch.randint(0, 20, (4, 3, 15))
    prompt = given(model, 4, 17)
    prompt["attention_mask"] = (torch.arange(17) < torch.tensor(lengths)[:, None]).long()
    together = talk(model.new_stream(4, seeds=[1, 2, 3, 4], prompt=prompt), user)
    for row, length in enumerate(lengths):
        own = {name: tensor[row : row + 1, ..., :length] for name, tensor in prompt.items() if name != "attention_mask"} if length else None
        assert torch.equal(together[row], talk(model.new_stream(1, seeds=[row + 1], prompt=own), user[row : row + 1])[0])


def test_one_prompt_serves_all_rows_and_a_memory_goes_before_it(model):
    history, prompt, user = given(model, 1, 11), given(model, 1, 6, seed=2), torch.randint(0, 20, (3, 3, 12))
    whole = {name: torch.cat([history[name], prompt[name]], dim=-1) for name in history}
    expected = talk(model.new_stream(3, seeds=[1, 2, 3], prompt=whole), user)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(**history, past_key_values=cache)
    before = cache.state_dict()
    for _ in range(2):  # the memory is left as it was, so that any number of conversations begin from it
        assert torch.equal(talk(model.new_stream(3, seeds=[1, 2, 3], prompt=prompt, past_key_values=cache), user), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.state_dict().items())
    as_numpy = {name: tensor.numpy() for name, tensor in whole.items()}
    assert torch.equal(talk(model.new_stream(3, seeds=[1, 2, 3], prompt=as_numpy), user), expected)


def test_a_prompted_stream_saves_its_late_tokens(model):
    wide = tiny_model(audio_delays=DELAYS[1])
    user, stream = torch.randint(0, 20, (1, 3, 12)), wide.new_stream(1, seeds=[5], prompt=given(wide, 1, 6))
    resumed = wide.new_stream(2, seeds=[1, 2])
    resumed.load_row(1, stream.row_state(0))
    assert torch.equal(talk(resumed, user.expand(2, -1, -1))[1], talk(stream, user)[0])
    stream.reset()
    assert (stream.state.ahead == UNGENERATED).all()


def test_a_prompted_stream_compiles(model, request):
    """With an open mini-batch (4), shorter than the window (8) and longer."""
    request.addfinalizer(torch._dynamo.reset)  # graphs of one function are counted over all models of a process
    compiled, user = tiny_model(), torch.randint(0, 20, (2, 3, 12))
    compiled.compile_stream(2, backend="eager", seeds=[1, 2])
    for length in (3, 30):
        prompt = given(model, 2, length)
        stream = compiled.new_stream(2, seeds=[1, 2], prompt=prompt)
        assert stream.compiled
        assert torch.equal(talk(stream, user), talk(model.new_stream(2, seeds=[1, 2], prompt=prompt), user))
    assert not compiled.new_stream(2, text_logits_hook=lambda logits: logits).compiled


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("You are kind.", TypeError, "`prompt` is a str; .*processor.prompt"),
        ({}, ValueError, "`prompt` is empty"),
        ({"tokens": torch.zeros(1, 3)}, ValueError, "`prompt` holds `tokens`"),
        ({"input_ids": torch.full((1, 3), 99)}, ValueError, "`input_ids` holds 99"),
        ({"input_ids": torch.full((1, 3), -2)}, ValueError, "`input_ids` holds -2"),
        ({"input_ids": torch.zeros(3, 3, dtype=torch.long)}, ValueError, "the prompt has 3 rows and `batch_size=2`"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, prompt, error, words):
    with pytest.raises(error, match=words):
        model.new_stream(2, prompt=prompt)


def test_guidance_and_unknown_settings_are_refused_by_name(model):
    for name in ("cfg_coef", "guidance_scale"):
        with pytest.raises(ValueError, match=f"`{name}=2.0` asks for classifier-free guidance"):
            model.new_stream(**{name: 2.0})
    with pytest.raises(TypeError, match="`tone`"):
        model.new_stream(tone=1)


def test_hooks_change_logits_before_tokens_are_chosen(model):
    seen = []

    def audio(logits, codebook):
        seen.append(codebook)
        return logits.masked_fill(torch.arange(20) != codebook + 4, float("-inf"))

    stream = model.new_stream(
        2, text_logits_hook=lambda logits: logits.masked_fill(torch.arange(30) != 9, float("-inf")), audio_logits_hook=audio
    )
    said = talk(stream, torch.randint(0, 20, (2, 3, 5)))[..., 1:]
    assert (said[:, 0] == 9).all()
    assert (said[:, 1:4] == torch.tensor([4, 5, 6])[:, None]).all()
    assert seen == [0, 1, 2] * 5
    assert not stream.problems()


def test_a_voice_and_a_persona_become_frames(processor):
    """As PersonaPlex steps them: voice, silence, one token of text a frame over silence, silence."""
    voice = 0.1 * np.random.default_rng(0).standard_normal(1920 * 4).astype(np.float32)
    prompt = processor.prompt(voice, 24000, text="you are kind", user_codes=[*range(8)])
    quiet, tokens = torch.tensor(processor.silence_codes()[-1]), processor.tokenizer("you are kind", add_special_tokens=False)["input_ids"]
    frames = 4 + 6 + len(tokens) + 6
    assert prompt["input_ids"].tolist() == [[3] * 10 + tokens + [3] * 6]
    assert torch.equal(prompt["moshi_audio_codes"][..., :4], processor.encode_audio(torch.from_numpy(voice)[None]))
    assert (prompt["moshi_audio_codes"][0, :, 4:] == quiet[:, None]).all()
    assert torch.equal(prompt["user_audio_codes"], torch.arange(8)[None, :, None].expand(-1, -1, frames))
    alone = processor.prompt(text="you are kind")
    assert (alone["user_audio_codes"][0] == quiet[:, None]).all()
    with pytest.raises(ValueError, match="`prompt` has nothing"):
        processor.prompt()


def test_silence_is_the_codecs_own(processor):
    codes = processor.encode_audio(torch.zeros(1, 1920 * 60))[0, :, 1:]
    silence = torch.tensor(processor.silence_codes()).T
    assert torch.equal(silence, codes[:, : silence.shape[1]])
    assert (codes[:, silence.shape[1] :] == silence[:, -1:]).all()

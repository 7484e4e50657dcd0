"""Live streams: rows of their own, exact resumption, constant memory, prompts, and clear refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_frames, tiny_model

from modeling_moshi_ttt.delay_pattern import undelay
from modeling_moshi_ttt.sampling_moshi_ttt import make_sampling


def talk(stream, user: torch.Tensor) -> torch.Tensor:
    """`[B, 1 + K, T]` of what the stream answers to the user's codes `[B, K, T]`."""
    frames = [stream.step(user[..., t]) for t in range(user.shape[-1])]
    return torch.stack([torch.cat([frame.text[:, None], frame.audio_codes], dim=1) for frame in frames], dim=-1)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def user_codes(model, rows: int, frames: int, seed: int = 1) -> torch.Tensor:
    return random_frames(model.config, rows, frames, seed)["user_audio_codes"]


@pytest.mark.parametrize("delays", [None, [0, 3, 2, 0, 1, 1]])
def test_the_stream_is_the_forward_pass(delays):
    """What the stream says, teacher-forced through the model, is what the model finds likeliest."""
    model = tiny_model(audio_delays=delays)
    user = user_codes(model, rows=2, frames=30)
    said = talk(model.new_stream(2, do_sample=False), user)
    depth = max(model.config.delays)
    said, heard = said[..., depth:], user[..., 1:]  # the first call hears nothing
    output = model(said[:, 0], said[:, 1:], heard[..., : said.shape[-1]], use_cache=False)
    # What is said of frames before the first has no teacher-forced counterpart; text has no delay.
    assert torch.equal(output.logits.argmax(-1)[:, 1:], said[:, 0, 1:])
    for k, d in enumerate(model.config.delays[1:4]):
        assert torch.equal(output.audio_logits[:, k, depth:].argmax(-1), said[:, 1 + k, depth - d : said.shape[-1] - d])


DELAYS = ([0, 1, 1], [0, 0, 0], [0, 1, 3], [1, 3, 0])


def delayed_model(delays):
    return tiny_model(audio_delays=[*delays, *delays])


@pytest.mark.parametrize("delays", DELAYS, ids=str)
def test_hear_is_generate_and_the_training_forward(delays):
    """Of its own output the training forward finds every token likeliest, the first frame's and the last's too."""
    model, late = delayed_model(delays), max(delays)
    user = user_codes(model, rows=2, frames=30)
    text, codes = model.hear(user, do_sample=False)
    generated = model.generate(user_audio_codes=user, do_sample=False)
    assert torch.equal(text, generated.sequences)
    assert torch.equal(codes, generated.audio_codes)
    assert (text.shape, codes.shape) == ((2, 30), (2, 3, 30))  # as many frames out as in
    # The forward predicts the last frames of a late codebook in steps after the end, in which nothing is heard.
    after = torch.cat([user, torch.full((2, 3, late), -1)], dim=-1)
    longer = model.hear(after, do_sample=False)
    assert torch.equal(longer[0][:, :30], text)
    assert torch.equal(longer[1][..., :30], codes)
    output = model(*longer, after, use_cache=False)
    assert torch.equal(output.logits.argmax(-1)[:, :30], text)
    assert torch.equal(undelay(output.audio_logits.argmax(-1), delays, -1)[..., :30], codes)


def test_hear_samples_as_generate_does(model):
    user = user_codes(model, rows=2, frames=12)
    sampling = {"temperature": 1.0, "text_temperature": 1.2, "top_k": 5, "text_top_k": 7}
    text, codes = model.hear(user, generator=torch.Generator().manual_seed(3), **sampling)
    output = model.generate(user_audio_codes=user, generator=torch.Generator().manual_seed(3), **sampling)
    assert torch.equal(text, output.sequences)
    assert torch.equal(codes, output.audio_codes)


def test_every_frame_of_the_user_matters_from_the_next_one_on(model):
    """The first one too; and none before it was heard."""
    user = user_codes(model, rows=1, frames=12).clamp(min=0)
    text, codes = model.hear(user, do_sample=False)
    for t in (0, 5):
        changed = user.clone()
        changed[..., t] = (changed[..., t] + 1) % model.config.audio_vocab_size
        other_text, other_codes = model.hear(changed, do_sample=False)
        assert torch.equal(other_text[:, : t + 1], text[:, : t + 1])
        assert torch.equal(other_codes[:, 0, : t + 1], codes[:, 0, : t + 1])
        assert not (torch.equal(other_text, text) and torch.equal(other_codes, codes))


@pytest.mark.parametrize("delays", DELAYS[:3], ids=str)
def test_a_live_loop_gives_the_frames_that_hear_gives(delays):
    """Call s hears the user's frame s - 1 and returns Moshi's frame s - M: one call before the first sound, M - 1 after the last."""
    model, late = delayed_model(delays), max(delays)
    user = user_codes(model, rows=2, frames=10)
    heard = [None, *user.unbind(-1), *[None] * late][: 10 + late]
    stream = model.new_stream(2, do_sample=False)
    frames = [stream.step(codes) for codes in heard]
    assert [bool(frame.valid.all()) for frame in frames] == [s >= late for s in range(10 + late)]
    text, codes = model.hear(user, do_sample=False)
    assert torch.equal(torch.stack([frame.text for frame in frames[late:]], dim=-1), text)
    assert torch.equal(torch.stack([frame.audio_codes for frame in frames[late:]], dim=-1), codes)


@pytest.mark.parametrize(
    ("user", "sampling", "words"),
    [
        (torch.zeros(3, 4, dtype=torch.long), {}, r"`user_codes` has shape \(3, 4\)"),
        (torch.zeros(1, 2, 4, dtype=torch.long), {}, r"`user_codes` has shape \(1, 2, 4\); .* must be \(1, 3, 4\)"),
        (torch.zeros(1, 3, 0, dtype=torch.long), {}, "`user_codes` has shape .*; give at least one frame"),
        (torch.full((1, 3, 4), 20), {}, "`user_codes` holds 20"),
        (torch.zeros(1, 3, 4), {}, "`user_codes` has dtype torch.float32"),
        (torch.zeros(1, 3, 4, dtype=torch.long), {"temperature": 0.0}, "`temperature=0.0`"),
    ],
)
def test_a_recording_that_cannot_be_heard_is_refused(model, user, sampling, words):
    with pytest.raises(ValueError, match=words):
        model.hear(user, **sampling)


def test_rows_are_conversations_of_their_own(model):
    user = user_codes(model, rows=3, frames=40)
    together = model.new_stream(3, do_sample=False)
    first = talk(together, user[..., :17])
    together.reset([1])
    second = talk(together, user[..., 17:])
    for row in range(3):
        alone = model.new_stream(1, do_sample=False)
        own_first = talk(alone, user[row : row + 1, :, :17])
        if row == 1:
            alone = model.new_stream(1, do_sample=False)
        own_second = talk(alone, user[row : row + 1, :, 17:])
        assert torch.equal(first[row], own_first[0])
        assert torch.equal(second[row], own_second[0])
    assert (second[1, :, : max(model.config.delays)] == -2).all()


def test_a_saved_stream_goes_on_exactly(model, tmp_path):
    user = user_codes(model, rows=2, frames=30)
    sampling = {"temperature": 1.0, "text_temperature": 1.0}
    stream = model.new_stream(2, generator=torch.Generator().manual_seed(7), **sampling)
    talk(stream, user[..., :13])
    save_file(stream.state_dict(), tmp_path / "stream.safetensors")
    expected = talk(stream, user[..., 13:])
    resumed = model.new_stream(2, generator=torch.Generator(), **sampling)
    resumed.load_state_dict(load_file(tmp_path / "stream.safetensors"))
    assert torch.equal(talk(resumed, user[..., 13:]), expected)


def test_a_state_of_another_stream_is_refused_and_changes_nothing(model):
    saved = model.new_stream(2, generator=torch.Generator().manual_seed(1))
    talk(saved, user_codes(model, rows=2, frames=5))
    saved = saved.state_dict()
    stream = model.new_stream(2, generator=torch.Generator())
    before = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
    name = "past_key_values.layers.1.ttt.W1"
    changes = [
        ({name: None}, "saved cache lacks layers.1.ttt.W1"),
        ({"tone": saved["calls"]}, "saved stream has unknown entries tone"),
        ({"calls": saved["calls"][:1]}, r"calls of the saved stream has shape \(1,\)"),
        ({"heard": saved["heard"][:, :2]}, r"heard of the saved stream has shape"),
        ({"said": saved["said"].float()}, "said of the saved stream has dtype torch.float32"),
        ({"seeds": -saved["seeds"]}, "`seeds` of the saved stream"),
        ({"sick": ~saved["sick"]}, "`sick` of the saved stream"),
        ({"calls": saved["calls"] + 1}, "`calls` of the saved stream are not the frames"),
        ({"said": saved["said"] + 1000}, "`said` holds"),
        ({name: saved[name] * float("nan")}, "layers.1.ttt.W1 of the saved cache is not finite"),
        ({"past_key_values.key_positions": saved["past_key_values.key_positions"].flip(1)}, "key_positions of the saved cache"),
    ]
    for change, words in changes:
        with pytest.raises(ValueError, match=words):
            stream.load_state_dict({n: t for n, t in {**saved, **change}.items() if t is not None})
    after = stream.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_saved_stream_goes_on_in_a_model_of_another_dtype(model):
    full, short = tiny_model(torch.float32), tiny_model(torch.bfloat16)
    user = user_codes(model, rows=2, frames=12)
    stream, resumed = full.new_stream(2), short.new_stream(2)
    talk(stream, user[..., :9])
    resumed.load_state_dict(stream.state_dict())
    assert talk(resumed, user[..., 9:]).shape == (2, 4, 3)


def test_only_rows_that_exist_are_reset(model):
    user = user_codes(model, rows=2, frames=12)
    stream, other = model.new_stream(2, do_sample=False), model.new_stream(2, do_sample=False)
    assert torch.equal(talk(stream, user[..., :8]), talk(other, user[..., :8]))
    stream.reset([])
    for rows, words in (([2], "rows 0 to 1"), ([-1], "out of range"), (torch.ones(3, dtype=torch.bool), "mask of shape .3")):
        with pytest.raises(ValueError, match=words):
            stream.reset(rows)
    assert torch.equal(talk(stream, user[..., 8:]), talk(other, user[..., 8:]))


def test_memory_does_not_grow_with_the_conversation(model):
    def size(stream) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in stream.state_dict().values())

    stream = model.new_stream(1)
    sizes = {}
    for t in range(120):
        stream.step(torch.zeros(1, 3, dtype=torch.long))
        sizes[t] = size(stream)
    window = model.config.sliding_window
    assert len({sizes[t] for t in range(window, 120)}) == 1


def test_generate_says_its_prompt_and_goes_on(model):
    frames = random_frames(model.config, rows=2, frames=10)
    text, moshi = frames["input_ids"].clamp(min=0), frames["moshi_audio_codes"].clamp(min=0)
    user = user_codes(model, rows=2, frames=24)
    output = model.generate(text, moshi, user, do_sample=False)
    assert output.sequences.shape == (2, 24)
    assert torch.equal(output.sequences[:, :10], text)
    assert torch.equal(output.audio_codes[..., :10], moshi)
    # The continuation is what the forward pass over prompt and continuation finds likeliest.
    forward = model(output.sequences, output.audio_codes, user, use_cache=False)
    assert torch.equal(forward.logits.argmax(-1)[:, 10:], output.sequences[:, 10:])
    for k, d in enumerate(model.config.delays[1:4]):
        assert torch.equal(forward.audio_logits[:, k, 10 + d :].argmax(-1), output.audio_codes[:, k, 10 : 24 - d])
    more = model.generate(text, moshi, user[..., :10], max_new_tokens=14, do_sample=False)
    assert more.sequences.shape == (2, 24)


def test_what_a_prompt_leaves_out_stays_out_and_what_it_leaves_open_is_generated(model):
    frames = random_frames(model.config, rows=2, frames=10)
    moshi, user = frames["moshi_audio_codes"].clamp(min=0), user_codes(model, rows=2, frames=24)
    text = torch.full((2, 10), -1)
    moshi[:, 1, 3:6] = -1
    output = model.generate(text, moshi, user, do_sample=False)
    assert torch.equal(output.sequences[:, :10], text)
    assert torch.equal(output.audio_codes[..., :10], moshi)
    forward = model(output.sequences, output.audio_codes, user, use_cache=False)
    assert torch.equal(forward.logits.argmax(-1)[:, 10:], output.sequences[:, 10:])
    opened = model.generate(torch.full((2, 10), -2), moshi, user, do_sample=False)
    assert (opened.sequences >= 0).all()
    assert torch.equal(opened.audio_codes[..., :10], moshi)


def test_generate_takes_a_processors_batch(model):
    frames = random_frames(model.config, rows=2, frames=6)
    labels = {"text_labels": frames["input_ids"], "audio_labels": frames["moshi_audio_codes"]}
    mask = torch.ones(2, 6, dtype=torch.long)
    output = model.generate(**frames, **labels, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(output.sequences, model.generate(**frames, max_new_tokens=3, do_sample=False).sequences)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match="attention_mask.*rows of one length"):
        model.generate(**frames, attention_mask=mask, max_new_tokens=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"user_audio_codes": torch.zeros(1, 3, 2, dtype=torch.long)}, "the prompt has 4 frames, `user_audio_codes` 2"),
        ({"max_new_tokens": -3}, "`max_new_tokens=-3` must be a whole number"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens=2.5` must be a whole number"),
        ({"input_ids": torch.full((1, 4), 10**6)}, "`input_ids` holds 1000000"),
        ({"moshi_audio_codes": torch.full((1, 3, 4), 20)}, "`moshi_audio_codes` holds 20"),
        ({"moshi_audio_codes": torch.zeros(2, 3, 4, dtype=torch.long)}, r"`moshi_audio_codes` has shape \(2, 3, 4\).*must be \(1, 3, 4\)"),
        ({"moshi_audio_codes": torch.zeros(1, 2, 4, dtype=torch.long)}, r"`moshi_audio_codes` has shape \(1, 2, 4\)"),
        ({"input_ids": torch.zeros(1, 4)}, "`input_ids` has dtype torch.float32"),
        ({"top_k": 2.5}, "`top_k=2.5` must be a whole number"),
        ({"temperature": [1.0, 2.0, 3.0]}, "`temperature=.*must be a number, or 1 of them"),
    ],
)
def test_bad_prompts_are_refused(model, changes, words):
    given = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "moshi_audio_codes": torch.zeros(1, 3, 4, dtype=torch.long),
        "user_audio_codes": torch.zeros(1, 3, 9, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=words):
        model.generate(**(given | changes))


def test_sampling_stays_in_the_top_k_and_follows_its_generator(model):
    user = user_codes(model, rows=2, frames=25)
    one = talk(model.new_stream(2, generator=torch.Generator().manual_seed(1)), user)
    again = talk(model.new_stream(2, generator=torch.Generator().manual_seed(1)), user)
    other = talk(model.new_stream(2, generator=torch.Generator().manual_seed(2)), user)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    greedy = talk(model.new_stream(2, do_sample=False), user)
    assert torch.equal(talk(model.new_stream(2, top_k=1, text_top_k=1), user), greedy)


@pytest.mark.parametrize(("limit", "reached"), [(0, 8), (3, 3), (8, 8)])
def test_of_the_top_k_all_are_chosen_and_no_other(limit, reached):
    logits = torch.linspace(0.0, 1.0, 8).flip(0).expand(300, -1)  # the likeliest first
    one = {"do_sample": True, "temperature": 1.0, "text_temperature": 1.0}
    sampling = make_sampling(300, torch.device("cpu"), **one, top_k=limit, text_top_k=limit)
    text, audio = sampling.noise(torch.arange(300), torch.zeros(300, dtype=torch.long), 8, 2, 8)
    for chosen in (sampling.text(logits, text), sampling.audio(logits, audio[:, 0]), sampling.audio(logits, audio[:, 1])):
        assert set(chosen.tolist()) == set(range(reached))


def test_tokens_are_drawn_by_their_probabilities():
    """Of 20,000 draws each entry's share is its probability, within four standard errors; no two streams share their noise."""
    rows, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0])
    settings = {"do_sample": True, "temperature": 0.7, "text_temperature": 1.0, "top_k": 0, "text_top_k": 0}
    sampling = make_sampling(rows, torch.device("cpu"), **settings)
    text, audio = sampling.noise(torch.arange(rows), torch.arange(rows) % 7, 4, 2, 4)
    for chosen, temperature in (
        (sampling.text(logits.expand(rows, -1), text), 1.0),
        (sampling.audio(logits.expand(rows, -1), audio[:, 1]), 0.7),
    ):
        shares, expected = torch.bincount(chosen, minlength=4) / rows, (logits / temperature).softmax(0)
        assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / rows).sqrt()).all()
    correlation = torch.corrcoef(torch.stack([text.flatten(), audio[:, 0].flatten(), audio[:, 1].flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.02


def test_the_colder_the_likelier(model):
    user = user_codes(model, rows=2, frames=25)
    greedy = talk(model.new_stream(2, do_sample=False), user)
    for cold in (True, False):
        temperature = 1e-4 if cold else 1e4
        stream = model.new_stream(2, temperature=temperature, text_temperature=temperature, top_k=0, text_top_k=0)
        assert torch.equal(talk(stream, user), greedy) == cold


def test_a_prompt_alone_is_said_and_one_frame_is_a_talk(model):
    prompt = {
        "input_ids": torch.randint(0, model.config.vocab_size, (2, 3)),
        "moshi_audio_codes": torch.randint(0, model.config.audio_vocab_size, (2, model.config.num_codebooks, 3)),
    }
    said = model.generate(**prompt, max_new_tokens=0)
    assert torch.equal(said.sequences, prompt["input_ids"])
    assert torch.equal(said.audio_codes, prompt["moshi_audio_codes"])
    assert model.generate(user_audio_codes=user_codes(model, rows=2, frames=1)).sequences.shape == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0.*do_sample=False"),
        ({"text_temperature": -1.0}, "text_temperature"),
        ({"top_k": -1}, "top_k=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_sampling_is_refused(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.new_stream(**arguments)


def test_bad_frames_and_states_are_refused(model):
    stream = model.new_stream(2)
    with pytest.raises(ValueError, match=r"user_codes.*\(2, 3\)"):
        stream.step(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="`user_codes` holds 20; it takes ids from 0 to 19"):
        stream.step(torch.full((2, 3), 20))
    with pytest.raises(ValueError, match="`user_codes` has dtype torch.float32"):
        stream.step(torch.zeros(2, 3))
    saved = stream.state_dict()
    with pytest.raises(ValueError, match="lacks calls"):
        stream.load_state_dict({name: tensor for name, tensor in saved.items() if name != "calls"})
    with pytest.raises(ValueError, match="make it alike"):
        model.new_stream(3).load_state_dict(saved)
    with pytest.raises(ValueError, match="nothing to generate"):
        model.generate(input_ids=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="as many of both"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 4, dtype=torch.long), max_new_tokens=2)

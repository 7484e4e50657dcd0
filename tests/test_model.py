"""Properties of the model: causal, the same in any split and any batch, its memory its own, nothing written where it should not be."""

import hashlib

import pytest
import torch
from accelerate import cpu_offload
from tiny import cut, random_frames, rows_of, tiny_config, tiny_model, with_labels
from transformers import MoshiConfig
from transformers.models.moshi.modeling_moshi import MoshiForConditionalGeneration

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration

IMPLEMENTATIONS = ("scan", "reference")


def digest(model) -> dict[str, str]:
    """A hash of every parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors}


def cache_tensors(cache) -> dict[str, torch.Tensor]:
    return cache.state_dict()


def assert_same_memory(left, right, tolerance: float) -> None:
    left, right = cache_tensors(left), cache_tensors(right)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].shape == right[name].shape, name
        assert (left[name].double() - right[name].double()).abs().max() <= tolerance if left[name].numel() else True, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mixer", ["linear", "mlp"])
@pytest.mark.parametrize("b", [1, 4, 16])
def test_a_frame_moves_nothing_before_it(mixer, b, implementation):
    model = tiny_model(ttt_mixer=mixer, ttt_mini_batch_size=b, ttt_implementation=implementation)
    frames = random_frames(model.config, rows=1, frames=20)
    before = model(**frames, use_cache=False)
    for t in (0, 7, 13, 18):
        changed = {name: tensor.clone() for name, tensor in frames.items()}
        for tensor in changed.values():
            tensor[..., t] = (tensor[..., t] + 5) % 19
        after = model(**changed, use_cache=False)
        # Step t + 1 is the first that hears frame t; step t predicts it (its depth decoder reads codes of frame t, text first).
        assert torch.equal(before.logits[:, : t + 1], after.logits[:, : t + 1])
        assert torch.equal(before.audio_logits[:, :, :t], after.audio_logits[:, :, :t])
        assert not torch.allclose(before.logits[:, t + 1 :], after.logits[:, t + 1 :])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_any_split_gives_one_pass(mixer, dtype, tolerance):
    model = tiny_model(dtype, ttt_mixer=mixer)
    length = 3 * model.config.sliding_window + 7
    frames = with_labels(random_frames(model.config, rows=2, frames=length))
    whole_memory = model.new_cache(2)
    whole = model(**frames, past_key_values=whole_memory)
    scale = max(1.0, whole.audio_logits.abs().max().item())
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        cuts = sorted(set(torch.randint(1, length, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator).tolist()))
        memory, parts = model.new_cache(2), []
        for start, stop in zip([0, *cuts], [*cuts, length]):
            parts.append(model(**cut(frames, start, stop), past_key_values=memory))
        assert (torch.cat([p.logits for p in parts], 1) - whole.logits).abs().max() <= tolerance * scale
        assert (torch.cat([p.audio_logits for p in parts], 2) - whole.audio_logits).abs().max() <= tolerance * scale
        assert_same_memory(memory, whole_memory, tolerance * scale)


def test_frame_by_frame_equals_one_pass_without_memory():
    model = tiny_model()
    frames = random_frames(model.config, rows=2, frames=27)
    whole = model(**frames, use_cache=False)
    memory = model.new_cache(2)
    with torch.no_grad():
        steps = [model(**cut(frames, t, t + 1), past_key_values=memory) for t in range(27)]
    assert (torch.cat([s.logits for s in steps], 1) - whole.logits).abs().max() <= 1e-10
    assert (torch.cat([s.audio_logits for s in steps], 2) - whole.audio_logits).abs().max() <= 1e-10


def test_windows_carry_the_loss_of_the_whole():
    model = tiny_model()
    frames = with_labels(random_frames(model.config, rows=2, frames=29))
    whole = model(**frames, use_cache=False)
    weights = model.loss_weights(frames["text_labels"], frames["audio_labels"])
    memory, text, audio, seen = model.new_cache(2), 0.0, 0.0, torch.zeros(2)
    for start, stop in ((0, 3), (3, 4), (4, 18), (18, 29)):
        part = cut(frames, start, stop)
        seen += model.loss_weights(part["text_labels"], part["audio_labels"], past_key_values=memory)
        output = model(**part, past_key_values=memory, num_items_in_batch=weights)
        text, audio = text + output.text_loss, audio + output.audio_loss
    assert torch.equal(seen, weights)
    assert abs(text - whole.text_loss) <= 1e-6
    assert abs(audio - whole.audio_loss) <= 1e-6


def test_num_items_in_batch_joins_micro_batches():
    model = tiny_model()
    frames = with_labels(random_frames(model.config, rows=5, frames=12))
    frames["text_labels"][0, 3:] = -100
    whole = model(**frames, use_cache=False)
    weights = model.loss_weights(frames["text_labels"], frames["audio_labels"])
    parts = [model(**rows_of(frames, rows), use_cache=False, num_items_in_batch=weights) for rows in ([0], [1, 2, 3], [4])]
    assert abs(sum(p.loss for p in parts) - whole.loss) <= 1e-6
    by_frames = model(**frames, use_cache=False, num_items_in_batch=60)
    assert abs(by_frames.text_loss - whole.text_loss * weights[0] / 60) <= 1e-6
    assert abs(by_frames.audio_loss - whole.audio_loss * weights[1] / (60 * 102)) <= 1e-6
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(**frames, num_items_in_batch=torch.ones(3))


def test_a_stream_that_is_trained_nowhere_weighs_nothing():
    """Recordings without words: the whole has no text weight, and the text loss is 0."""
    model = tiny_model()
    frames = with_labels(random_frames(model.config, rows=2, frames=6))
    frames["input_ids"][:], frames["text_labels"][:] = -1, -100
    weights = model.loss_weights(frames["text_labels"], frames["audio_labels"])
    output = model(**frames, num_items_in_batch=weights)
    assert (float(weights[0]), output.text_loss.item()) == (0.0, 0.0)
    assert torch.equal(output.audio_loss, model(**frames).audio_loss)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_window_everything_is_seen(implementation):
    """As with a window longer than the recording: in one pass, in pieces, and frame by frame."""
    model, wide = (tiny_model(sliding_window=window, attn_implementation=implementation) for window in (None, 40))
    frames = random_frames(model.config, rows=2, frames=30)
    whole = model(**frames, use_cache=False).logits
    assert torch.equal(whole, wide(**frames, use_cache=False).logits)
    assert not torch.allclose(whole, tiny_model()(**frames, use_cache=False).logits)
    memory = model.new_cache(2)
    parts = [model(**cut(frames, start, stop), past_key_values=memory).logits for start, stop in ((0, 11), (11, 12), (12, 30))]
    assert (torch.cat(parts, 1) - whole).abs().max() <= (1e-10 if implementation == "sdpa" else 1e-5)  # eager takes its softmax in float32
    user = frames["user_audio_codes"]
    assert torch.equal(model.hear(user, do_sample=False)[1], wide.hear(user, do_sample=False)[1])
    resumed = model.new_cache(2)
    resumed.load_state_dict(memory.state_dict())
    assert resumed.layers[0].get_seq_length() == 30


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_a_batch_is_its_rows(mixer):
    model = tiny_model(ttt_mixer=mixer)
    frames = random_frames(model.config, rows=3, frames=25)
    together, memory = [], model.new_cache(3)
    alone = [([], model.new_cache(1)) for _ in range(3)]
    for start, stop in ((0, 6), (6, 13), (13, 25)):
        if start == 13:  # the second row begins anew in mid-stream, inside a mini-batch
            memory.reset([1])
            alone[1] = (alone[1][0], model.new_cache(1))
        together.append(model(**cut(frames, start, stop), past_key_values=memory))
        for row, (outputs, own) in enumerate(alone):
            outputs.append(model(**rows_of(cut(frames, start, stop), [row]), past_key_values=own))
    for row, (outputs, own) in enumerate(alone):
        ours = torch.cat([o.audio_logits[row] for o in together], dim=1)
        assert (ours - torch.cat([o.audio_logits[0] for o in outputs], dim=1)).abs().max() <= 1e-10
        for layer in model.config.ttt_layers:
            mine, its = memory.ttt_state(layer).select([row]), own.ttt_state(layer)
            assert all((a - b).abs().max() <= 1e-10 for a, b in zip(mine.weights, its.weights))
            assert torch.equal(mine.frames, its.frames)
    # Every row has learned something of its own: not only row 0 is remembered.
    learned = memory.ttt_state(0).W1
    assert (learned[0] - learned[1]).abs().max() > 1e-6
    assert (learned[2] - learned[1]).abs().max() > 1e-6


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding_changes_nothing(side):
    model = tiny_model()
    frames = with_labels(random_frames(model.config, rows=2, frames=19))
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, {"right": slice(12, 19), "left": slice(0, 7), "both": [0, 1, 5, 17]}[side]] = 0
    memory = model.new_cache(2)
    padded = model(**frames, attention_mask=mask, past_key_values=memory)
    more = model(**random_frames(model.config, rows=2, frames=9, seed=5), past_key_values=memory)
    for row in range(2):
        kept = mask[row].bool()
        single = {name: tensor[row : row + 1][..., kept] for name, tensor in frames.items()}
        own = model.new_cache(1)
        expected = model(**single, past_key_values=own)
        assert (padded.logits[row, kept] - expected.logits[0]).abs().max() <= 1e-10
        assert (padded.audio_logits[row][:, kept] - expected.audio_logits[0]).abs().max() <= 1e-10
        after = model(**rows_of(random_frames(model.config, rows=2, frames=9, seed=5), [row]), past_key_values=own)
        assert (more.audio_logits[row] - after.audio_logits[0]).abs().max() <= 1e-10
    text = sum(model(**{n: t[r : r + 1][..., mask[r].bool()] for n, t in frames.items()}, num_items_in_batch=1).text_loss for r in range(2))
    assert abs(model(**frames, attention_mask=mask, num_items_in_batch=1).text_loss - text) <= 1e-5


def test_forward_writes_to_no_parameter_and_no_buffer():
    model = tiny_model()
    before = digest(model)
    frames = with_labels(random_frames(model.config, rows=2, frames=21))
    memory = model.new_cache(2)
    model.train()
    model(**frames, past_key_values=memory).loss.backward()
    model.eval()
    stream = model.new_stream(batch_size=2)
    for t in range(9):
        stream.step(frames["user_audio_codes"][..., t])
    assert digest(model) == before
    # and nothing of a stream hangs on the model
    holders = [name for name, module in model.named_modules() if any(isinstance(v, torch.Tensor) for v in vars(module).values())]
    assert holders == []


def gradients_of(model, frames, memory=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**frames, past_key_values=memory, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_moshi(dtype) -> tuple[MoshiForConditionalGeneration, MoshiConfig]:
    """transformers' own tiny Moshi with drawn weights."""
    fields = {name: getattr(tiny_config(), name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    fields |= {name: getattr(tiny_config(), name) for name in ("ffn_dim", "sliding_window", "num_codebooks", "audio_vocab_size")}
    depth = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    mimi = {"hidden_size": 16, "num_filters": 2, "codebook_size": 32, "codebook_dim": 4, "vector_quantization_hidden_dimension": 4}
    mimi |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_quantizers": 4,
        "num_semantic_quantizers": 1,
        "head_dim": 8,
        "upsample_groups": 1,
    }
    config = MoshiConfig(**fields, depth_decoder_config=depth, audio_encoder_config={"model_type": "mimi", **mimi})
    torch.manual_seed(3)
    model = MoshiForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return (model if dtype is None else model.to(dtype)).eval(), config


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gate_zero_is_transformers_moshi_within_the_window(dtype, tolerance, tmp_path):
    plain, config = plain_moshi(dtype)
    plain.save_pretrained(tmp_path)
    ours = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path, ttt_layers="all", ttt_gate_init=0.0, dtype=dtype).eval()
    with torch.no_grad():
        for layer in ours.decoder.model.layers:
            layer.ttt.wo.weight.normal_()  # the gate alone must keep it quiet
    frames = {name: tensor.clamp(min=0) for name, tensor in random_frames(ours.config, rows=2, frames=config.sliding_window).items()}
    output = ours(**frames, use_cache=False)
    # transformers takes delayed inputs that begin with the initial column; ours does that itself.
    start = ours.new_cache(2)
    history = torch.cat(
        [start.codes, torch.cat([frames["input_ids"][:, None], frames["moshi_audio_codes"], frames["user_audio_codes"]], 1)], -1
    )
    delays, skip = ours.config.delays, start.codes.shape[-1]
    delayed = torch.stack([history[:, s, skip - d - 1 : skip - d - 1 + 8] for s, d in enumerate(delays)], 1)
    theirs = plain(delayed[:, 0], moshi_audio_codes=delayed[:, 1:4], user_audio_codes=delayed[:, 4:], use_cache=False)
    assert (output.logits - theirs.logits).abs().max() <= tolerance
    assert (output.last_hidden_state - theirs.last_hidden_state).abs().max() <= tolerance
    targets = torch.stack([history[:, s, skip - d : skip - d + 8] for s, d in enumerate(delays[:4])], 1).transpose(1, 2).flatten(0, 1)
    depth = plain.depth_decoder(
        input_ids=targets[:, :-1], last_hidden_state=theirs.last_hidden_state.flatten(0, 1)[:, None], use_cache=False
    )
    assert (output.audio_logits.permute(0, 2, 1, 3).flatten(0, 1) - depth.logits).abs().max() <= tolerance


def test_a_plain_moshi_checkpoint_loads_with_fresh_quiet_layers(tmp_path):
    plain, _ = plain_moshi(torch.float32)
    plain.save_pretrained(tmp_path)
    ours, info = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path, ttt_layers="1-1", output_loading_info=True)
    missing = info["missing_keys"]
    assert ours.config.model_type == "moshi_ttt"
    assert ours.config.ttt_layers == [1]
    assert missing
    assert all(".layers.1.ttt" in name for name in missing)
    assert not info["unexpected_keys"]
    layer = ours.decoder.model.layers[1]
    assert torch.equal(layer.gating_alpha, torch.full_like(layer.gating_alpha, 0.1))
    assert layer.ttt.wo.weight.abs().max() == 0
    assert 0.4 < layer.ttt.W1.std() < 0.6
    assert torch.equal(layer.ttt.ttt_norm_weight, torch.ones_like(layer.ttt.ttt_norm_weight))
    kept = dict(plain.named_parameters())
    ours_by_name = dict(ours.named_parameters())
    shared = [name for name in kept if name in ours_by_name]
    assert len(shared) == len(ours_by_name) - len(missing)
    assert all(torch.equal(kept[name], ours_by_name[name]) for name in shared)
    # wo starts at zero: whatever the gate, the fresh layer changes nothing
    frames = random_frames(ours.config, rows=1, frames=30)
    without = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path, ttt_layers=[])
    assert torch.equal(ours(**frames).logits, without(**frames).logits)


def test_a_fresh_layer_learns_from_the_first_step():
    model = MoshiTTTForConditionalGeneration(tiny_config())
    model(**with_labels(random_frames(model.config, rows=1, frames=20))).loss.backward()
    assert model.decoder.model.layers[0].ttt.wo.weight.grad.abs().max() > 0


def test_rotary_positions_stay_exact_in_bfloat16():
    model = tiny_model(torch.float32, ttt_layers=[], sliding_window=3000, vocab_size=30)
    from modeling_moshi_ttt.attention_moshi_ttt import rotary_embedding

    positions = torch.arange(1500, 2000)[None]
    exact = rotary_embedding(positions, model.config, torch.float32)
    assert not list(model.to(torch.bfloat16).buffers())
    rounded = rotary_embedding(positions, model.config, torch.bfloat16)
    for a, b in zip(exact, rounded):
        assert (a - b.float()).abs().max() <= 2**-8  # bfloat16's own rounding of the result, nothing of the frequencies


def test_bfloat16_runs_with_float32_memory():
    model = tiny_model(torch.bfloat16)
    memory = model.new_cache(1)
    output = model(**random_frames(model.config, rows=1, frames=20), past_key_values=memory)
    assert output.logits.dtype == torch.bfloat16
    assert memory.ttt_state(0).W1.dtype == torch.float32
    assert torch.isfinite(output.audio_logits).all()


def test_inputs_may_be_absent_and_labels_may_say_nothing():
    model = tiny_model()
    frames = random_frames(model.config, rows=1, frames=6)
    only_user = model(user_audio_codes=frames["user_audio_codes"], use_cache=False)
    spelled = {**frames, "input_ids": torch.full_like(frames["input_ids"], -1)}
    spelled["moshi_audio_codes"] = torch.full_like(frames["moshi_audio_codes"], -1)
    assert torch.equal(only_user.logits, model(**spelled, use_cache=False).logits)
    nothing = model(**frames, text_labels=torch.full((1, 6), -100), audio_labels=torch.full((1, 3, 6), -1))
    assert nothing.loss == 0
    nothing.loss.backward()
    audio_only = model(**frames, audio_labels=frames["moshi_audio_codes"])
    assert audio_only.text_loss is None
    assert torch.equal(audio_only.loss, audio_only.audio_loss)
    assert model(**frames).loss is None
    hidden = model(**frames, output_hidden_states=True, use_cache=False).hidden_states
    assert len(hidden) == 1 + model.config.num_hidden_layers
    as_tuple = model(**frames, use_cache=False, return_dict=False)
    assert torch.equal(as_tuple[0], model(**frames, use_cache=False).logits)


def test_the_configuration_says_what_comes_out():
    model = tiny_model()
    frames = random_frames(model.config, rows=1, frames=6)
    named = model(**frames, use_cache=False, return_dict=None, output_hidden_states=None)
    assert named.hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**frames, use_cache=False).hidden_states) == 1 + model.config.num_hidden_layers
    assert model(**frames, use_cache=False, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert torch.equal(model(**frames, use_cache=False)[0], named.logits)
    assert torch.equal(model(**frames, use_cache=False, return_dict=True).logits, named.logits)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ttt_layers", [7], "ttt_layers.*layer 7"),
        ("ttt_layers", "every", "ttt_layers='every'"),
        ("ttt_mixer", "mpl", "ttt_mixer='mpl'.*'linear', 'mlp'"),
        ("hidden_act", "nope", "hidden_act='nope'"),
        ("ttt_mini_batch_size", 0, "ttt_mini_batch_size=0"),
        ("vocab_size", 40, "depth_decoder_config.vocab_size=30.*vocab_size=40.*sets both"),
        ("num_codebooks", 2, "audio_delays.*num_codebooks=2"),
        ("depth_decoder_config", {"hidden_size": 16}, "depth_decoder_config=.*is no configuration"),
        ("depth_decoder_config", None, "depth_decoder_config=None.*is no configuration"),
    ],
)
def test_a_field_set_later_is_checked_before_the_model_is_built(field, value, words):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=words):
        MoshiTTTForConditionalGeneration(config)


def test_building_a_model_leaves_its_configuration_as_it_is():
    config = tiny_config(ttt_layers=[1], ttt_base_lr=0.3, audio_delays=[0, 2, 1, 0, 0, 3])
    before = config.to_dict()
    assert MoshiTTTForConditionalGeneration(config).config.to_dict() == before
    config.ttt_layers = "last:2"
    model = MoshiTTTForConditionalGeneration(config)
    assert config.ttt_layers == [0, 1]
    assert all(layer.ttt is not None for layer in model.decoder.model.layers)


def test_the_text_tables_are_not_resized():
    model = tiny_model()
    for part in (model, model.decoder, model.decoder.model):
        assert part.resize_token_embeddings() is model.get_input_embeddings()
        for asked in ({"new_num_tokens": 45}, {"pad_to_multiple_of": 8}):
            with pytest.raises(ValueError, match=r"initial token.*set `vocab_size` \(now 30\).*train anew"):
                part.resize_token_embeddings(**asked)
    assert model.get_input_embeddings().num_embeddings == 31


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.zeros(1, 5, dtype=torch.long)}, "input_ids.*shape"),
        ({"input_ids": torch.full((1, 6), 30)}, "input_ids.*30.*0 to 29"),
        ({"moshi_audio_codes": torch.full((1, 3, 6), -2)}, "moshi_audio_codes.*-2"),
        ({"user_audio_codes": torch.zeros(1, 4, 6, dtype=torch.long)}, "user_audio_codes"),
        ({"user_audio_codes": torch.zeros(1, 3, 6)}, "user_audio_codes.*float32.*int64"),
        ({"text_labels": torch.zeros(2, 6, dtype=torch.long)}, "text_labels"),
        ({"audio_labels": torch.full((1, 3, 6), 20)}, "audio_labels.*20"),
        ({"attention_mask": torch.ones(1, 7)}, "attention_mask"),
    ],
)
def test_bad_input_is_named(change, words):
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        model(**{**random_frames(model.config, rows=1, frames=6), **change})


def test_an_empty_batch_and_a_foreign_memory_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="empty"):
        model(input_ids=torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="nothing to hear"):
        model()
    frames = random_frames(model.config, rows=2, frames=4)
    with pytest.raises(ValueError, match="holds 3 rows, the input 2"):
        model(**frames, past_key_values=model.new_cache(3))
    other = tiny_model(ttt_layers=[0])
    with pytest.raises(ValueError, match="TTT in \\[0\\]"):
        model(**frames, past_key_values=other.new_cache(2))


def test_compiled_it_is_the_same_model():
    model = tiny_model(torch.float32)
    frames = with_labels(random_frames(model.config, rows=2, frames=12))
    plain_loss, plain = gradients_of(model, frames)
    compiled_loss, compiled = gradients_of(torch.compile(model, backend="aot_eager"), frames)
    assert abs(compiled_loss - plain_loss) <= 1e-6
    for name, gradient in plain.items():
        assert (compiled[f"_orig_mod.{name}"] - gradient).norm() <= 1e-5 * max(1.0, gradient.norm()), name


def test_autocast_keeps_the_inner_learning_in_float32():
    model = tiny_model(torch.float32)
    memory = model.new_cache(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**random_frames(model.config, rows=1, frames=20), past_key_values=memory)
    assert output.logits.dtype == torch.bfloat16
    assert memory.ttt_state(0).W1.dtype == torch.float32


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_an_offloaded_model_gives_the_same_numbers(mixer):
    """Weights wait elsewhere and come for each use, as device_map="auto" has it where a card is small."""
    model, offloaded = (tiny_model(torch.float32, ttt_mixer=mixer) for _ in range(2))
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    frames = with_labels(random_frames(model.config, rows=2, frames=11))
    with torch.no_grad():
        expected, found = model(**frames), offloaded(**frames)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    user = frames["user_audio_codes"]
    streams = [each.new_stream(2, do_sample=False) for each in (model, offloaded)]
    for t in range(user.shape[-1]):
        if t == 5:
            for stream in streams:
                stream.reset([1])
        ours, theirs = (stream.step(user[..., t]) for stream in streams)
        assert torch.equal(ours.audio_codes, theirs.audio_codes)

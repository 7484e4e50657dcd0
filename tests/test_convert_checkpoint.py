"""`moshi-ttt convert`: whole checkpoints, adapters, codec and tokenizer, there and back, in little memory."""

import json

import pytest
import sentencepiece
import torch
from hub_checkpoints import save_adapter, save_checkpoint, small_model, small_processor
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import random_frames
from transformers import AutoModel, MimiModel, MoshiConfig, MoshiForConditionalGeneration

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor, cli
from modeling_moshi_ttt.common.safetensor_files import TensorFiles
from modeling_moshi_ttt.conversion.convert import Options, convert, parse_ttt
from modeling_moshi_ttt.conversion.kyutai_config import kyutai_from_config
from modeling_moshi_ttt.conversion.mimi import fast_tokenizer, mimi_config, mimi_groups
from modeling_moshi_ttt.conversion.tables import config_from_kyutai, hf_to_kyutai, kyutai_to_hf
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTOSError
from modeling_moshi_ttt.hub.verify import verify

MIMI_SETTINGS = {
    "sample_rate": 24000,
    "seanet": {"channels": 1, "dimension": 16, "n_filters": 2, "n_residual_layers": 1, "ratios": [8, 6, 5, 4], "compress": 2},
    "quantizer": {"dimension": 8, "n_q": 3, "bins": 16},
    "transformer": {"num_heads": 2, "num_layers": 1, "dim_feedforward": 16, "context": 250, "layer_scale": 0.01},
}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece model of 64 pieces, made as Kyutai's is: unk, bos, eos and pad first, bytes as a way out."""
    folder = tmp_path_factory.mktemp("spm")
    text = ["the quick brown fox jumps over the lazy dog", "hello there how are you today", "listen and speak at the same time"] * 20
    (folder / "text").write_text("\n".join(text))
    kinds = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **kinds,
    )
    return folder / "spm.model"


def kyutai_mimi_names():
    """Every key of the small codec in Kyutai's spelling, written out from its modules, independently of the table."""
    convs = [f"encoder.model.{i}.conv.conv" for i in (0, 3, 6, 9, 12, 14)] + [f"decoder.model.{i}.conv.conv" for i in (0, 14)]
    convs += [f"decoder.model.{i}.convtr.convtr" for i in (2, 5, 8, 11)]
    for side, places in (("encoder", (1, 4, 7, 10)), ("decoder", (3, 6, 9, 12))):
        convs += [f"{side}.model.{i}.block.{part}.conv.conv" for i in places for part in (1, 3)]
    names = {f"{conv}.{kind}" for conv in convs for kind in ("weight", "bias")}
    names |= {"downsample.conv.conv.conv.weight", "upsample.convtr.convtr.convtr.weight"}
    for side in ("encoder", "decoder"):
        layer = f"{side}_transformer.transformer.layers.0."
        names |= {layer + f"norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")} | {
            layer + f"layer_scale_{n}.scale" for n in (1, 2)
        }
        names |= {layer + f"self_attn.{side}_projs.0.weight" for side in ("in", "out")} | {layer + f"linear{n}.weight" for n in (1, 2)}
    for first, count in (("first", 1), ("rest", 2)):
        names |= {f"quantizer.rvq_{first}.{side}_proj.weight" for side in ("input", "output")}
        parts = ("_initialized", "cluster_usage", "embedding_sum")
        names |= {f"quantizer.rvq_{first}.vq.layers.{i}._codebook.{part}" for i in range(count) for part in parts}
    return names


@pytest.fixture(scope="module")
def golden(kyutai_golden):
    tensors, facts = kyutai_golden
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}, facts["lm_kwargs"]


@pytest.fixture
def kyutai(golden, spm, tmp_path):
    """A repository as Kyutai's: the golden model, a small codec and a tokenizer."""
    state, lm_kwargs = golden
    folder = tmp_path / "kyutai"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    small_processor().codec.save_pretrained(tmp_path / "codec")
    codec = load_file(tmp_path / "codec" / "model.safetensors")
    groups = mimi_groups(mimi_config(MIMI_SETTINGS))
    named = {name: tensor for g in groups for name, tensor in zip(g.kyutai, g.to_kyutai([codec[name] for name in g.here]))}
    save_file(named, folder / "mimi.safetensors")
    (folder / "mimi.json").write_text(json.dumps(MIMI_SETTINGS))
    (folder / "spm.model").write_bytes(spm.read_bytes())
    names = {"mimi_name": "mimi.safetensors", "mimi_config_name": "mimi.json", "tokenizer_name": "spm.model", "model_type": "moshi"}
    (folder / "config.json").write_text(json.dumps({**lm_kwargs, **names}))
    return folder


@torch.no_grad()
def loss_of(model, codes):
    model.eval()
    frames = {"input_ids": codes[:, 0], "moshi_audio_codes": codes[:, 1:4], "user_audio_codes": codes[:, 4:]}
    return float(model(**frames, text_labels=codes[:, 0], audio_labels=codes[:, 1:4]).loss)


def test_kyutai_repository_there_and_back(kyutai, golden, kyutai_golden, tmp_path, capsys):
    assert cli.main(["convert", str(kyutai), str(tmp_path / "here"), "--ttt", "layers=1-2", "mixer=linear", "mini_batch_size=4"]) == 0
    assert "its codec and its tokenizer" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "here")
    assert (model.config.ttt_layers, model.config.ttt_mixer, model.config.ttt_mini_batch_size) == ([1, 2], "linear", 4)
    assert abs(loss_of(model, kyutai_golden[0]["codes"]) - float(kyutai_golden[0]["codes.loss"])) < 1e-5  # Kyutai's own loss
    processor = MoshiTTTProcessor.from_pretrained(tmp_path / "here")
    assert processor.num_codebooks == 3
    batch = processor(torch.randn(2, 4000), sampling_rate=24000, words=[("hello", 0.0, 0.1, "SPEAKER_MAIN")])
    assert batch["moshi_audio_codes"].shape == (1, 3, 3)
    convert(tmp_path / "here", tmp_path / "back")
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), golden[0])
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in golden[1]} == golden[1]
    assert equal(load_file(tmp_path / "back" / written["mimi_name"]), load_file(kyutai / "mimi.safetensors"))
    settings = json.loads((tmp_path / "back" / written["mimi_config_name"]).read_text())
    assert mimi_config(settings).to_dict() == mimi_config(MIMI_SETTINGS).to_dict()
    assert (tmp_path / "back" / written["tokenizer_name"]).read_bytes() == (kyutai / "spm.model").read_bytes()


def test_fused_layout_and_dtype(kyutai, golden, tmp_path):
    convert(kyutai, tmp_path / "here", Options(max_shard_size="200KB", dtype=torch.bfloat16))
    files = TensorFiles(tmp_path / "here")
    assert len(set(files.file_of.values())) > 2
    assert {tensor.dtype for _, tensor in files} == {torch.bfloat16}
    assert MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "here", dtype="auto").dtype == torch.bfloat16
    convert(tmp_path / "here", tmp_path / "fused", Options(fused=True))
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert "transformer.layers.0.self_attn.in_proj_weight" in fused
    convert(tmp_path / "fused", tmp_path / "again")
    assert equal(dict(TensorFiles(tmp_path / "again")), dict(files))


def test_the_codec_is_complete_and_encodes_as_before(kyutai, tmp_path):
    assert set(TensorFiles(kyutai / "mimi.safetensors").names) == kyutai_mimi_names()
    convert(kyutai, tmp_path / "here")
    audio = torch.randn(1, 1, 5760)
    before, after = (MimiModel.from_pretrained(path).eval() for path in (tmp_path / "codec", tmp_path / "here" / "audio_tokenizer"))
    with torch.no_grad():
        assert torch.equal(before.encode(audio).audio_codes, after.encode(audio).audio_codes)
        assert torch.equal(
            before.decode(before.encode(audio).audio_codes).audio_values, after.decode(before.encode(audio).audio_codes).audio_values
        )


def test_the_published_codec_has_the_default_configuration():
    with torch.device("meta"):
        names = {name for group in mimi_groups(mimi_config(None)) for name in group.here}
        model = MimiModel(mimi_config(None))
    assert len(names) == len(model.state_dict())


def test_the_tokenizer_gives_the_same_ids(spm):
    reference, fast = sentencepiece.SentencePieceProcessor(str(spm)), fast_tokenizer(spm)
    for word in ("hello", "there", "quick", "fox", "time", "zebra", "you", "naïve"):
        assert fast(word, add_special_tokens=False)["input_ids"] == reference.encode(word)
        assert fast.decode(reference.encode(word)) == word
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (0, 1, 2, 3)


def test_transformers_moshi_comes_with_its_codec(tmp_path):
    torch.manual_seed(1)
    config = MoshiConfig(
        **{"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48, "num_codebooks": 3},
        audio_encoder_config=small_processor().codec.config.to_dict(),
        depth_decoder_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
    )
    theirs = MoshiForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path / "moshi")
    small_processor().tokenizer.save_pretrained(tmp_path / "moshi")
    assert "with its processor" in convert(tmp_path / "moshi", tmp_path / "here", Options(ttt={"ttt_layers": "last:1"}))
    ours = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "here")
    assert ours.config.ttt_layers == [1]
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items() if "ttt" not in name)
    codec = MimiModel.from_pretrained(tmp_path / "here" / "audio_tokenizer").state_dict()
    assert equal(codec, theirs.audio_encoder.state_dict())
    assert MoshiTTTProcessor.from_pretrained(tmp_path / "here").num_codebooks == 3


def test_ttt_layers_into_kyutais_layout_are_refused_dropped_or_kept(tmp_path):
    model = save_checkpoint(tmp_path / "here")
    with pytest.raises(ValueError, match=r"the TTT layers \[0, 1\] change what the model says .* --keep-ttt"):
        convert(tmp_path / "here", tmp_path / "kyutai")
    assert not (tmp_path / "kyutai").exists()
    convert(tmp_path / "here", tmp_path / "kept", Options(keep_ttt=True))
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert equal(kept, hf_to_kyutai(model.state_dict(), model.config))
    assert "decoder.model.layers.1.ttt.W1" in kept
    convert(tmp_path / "kept", tmp_path / "home")
    home = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "home")
    assert equal(home.state_dict(), model.state_dict())
    fields = [key for key in model.config.to_dict() if key.startswith("ttt_")]
    assert [getattr(home.config, key) for key in fields] == [getattr(model.config, key) for key in fields]
    with torch.no_grad():
        for layer in model.decoder.model.layers:
            layer.ttt_gate.gating_alpha.zero_()
    model.save_pretrained(tmp_path / "closed")
    assert "without the TTT layers, whose gates are 0" in convert(tmp_path / "closed", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert not any("ttt" in name for name in plain)
    frames = random_frames(model.config, 2, 12)
    convert(tmp_path / "plain", tmp_path / "again")
    again = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**frames).logits, model(**frames).logits)  # a closed gate added exactly nothing


def with_user_slices(folder, state, lm_kwargs, fused):
    """A repository whose depth transformer predicts all six codebooks, as PersonaPlex's and J-Moshi's do."""
    folder.mkdir()
    torch.manual_seed(2)
    whole = config_from_kyutai({**lm_kwargs, "n_q": 7, "dep_q": 6, "delays": [0] * 8})
    drawn = hf_to_kyutai(
        {name: torch.randn(tensor.shape) for name, tensor in MoshiTTTForConditionalGeneration(whole).state_dict().items()}, whole
    )
    users = {name: tensor for name, tensor in drawn.items() if name not in state and name != "emb.6.weight"}
    joined = {**state, **users}
    if fused:
        for name in [name for name in joined if "depformer" in name and "_projs.0" in name]:
            parts = [joined.pop(name.replace("projs.0.", f"projs.{k}.")) for k in range(6)]
            joined[name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight")] = torch.cat(parts)
    save_file(joined, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**lm_kwargs, "dep_q": 6, "model_type": "moshi"}))
    return {**state, **users}


@pytest.mark.parametrize("fused", [False, True])
def test_the_users_depth_slices_are_dropped_for_talking_and_kept_on_request(golden, tmp_path, fused):
    state, lm_kwargs = golden
    whole = with_user_slices(tmp_path / "kyutai", state, lm_kwargs, fused)
    assert "3 codebooks of its own, without the depth slices of the user's" in convert(tmp_path / "kyutai", tmp_path / "here")
    here = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "here")
    assert (here.config.num_codebooks, here.config.num_user_codebooks) == (3, 3)
    assert equal(here.state_dict(), kyutai_to_hf(state, here.config))
    convert(tmp_path / "kyutai", tmp_path / "kept", Options(own_codebooks=3, keep_user_slices=True))
    kept = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "kept")
    assert (kept.config.num_codebooks, kept.config.num_predicted_codebooks) == (3, 6)
    user = torch.randint(0, kept.config.audio_vocab_size, (2, 3, 9))
    assert torch.equal(kept.hear(user, do_sample=False)[1], here.hear(user, do_sample=False)[1])  # talking uses Moshi's own alone
    for back in (False, True):
        convert(tmp_path / "kept", tmp_path / f"again {back}", Options(fused=back))
        assert json.loads((tmp_path / f"again {back}" / "config.json").read_text())["dep_q"] == 6
    assert equal(load_file(tmp_path / "again False" / "model.safetensors"), whole)
    assert equal(kyutai_to_hf(load_file(tmp_path / "again True" / "model.safetensors"), kept.config), kept.state_dict())


def test_there_are_no_user_slices_to_keep_where_moshis_alone_are_predicted(kyutai, tmp_path):
    with pytest.raises(ValueError, match="--keep-user-slices"):
        convert(kyutai, tmp_path / "here", Options(keep_user_slices=True))
    assert not (tmp_path / "here").exists()


def test_a_converted_model_knows_its_codecs_silence(kyutai, tmp_path):
    convert(kyutai, tmp_path / "here")
    processor = MoshiTTTProcessor.from_pretrained(tmp_path / "here")
    assert MoshiTTTConfig.from_pretrained(tmp_path / "here").silence_codes == processor.silence_codes()


def random_lora(state, rank=4):
    """moshi-finetune's LoRA file for a Kyutai model: a pair for every linear layer."""
    generator, pairs = torch.Generator().manual_seed(3), {}
    for name, weight in state.items():
        if weight.dim() == 2 and "emb" not in name:
            stem = name.removesuffix(".weight")
            pairs[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            pairs[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], rank, generator=generator)
    return pairs


def merged(state, lora, scaling):
    """W + scaling · B A, as Kyutai's code merges."""
    result = dict(state)
    for name in state:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in lora:
            result[name] = state[name] + scaling * (lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"])
    return result


def test_moshi_finetune_lora_there_and_back(kyutai, golden, tmp_path):
    state, lm_kwargs = golden
    convert(kyutai, tmp_path / "base")
    lora = random_lora(state)
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "lora.safetensors")
    (tmp_path / "lora" / "config.json").write_text(json.dumps({**lm_kwargs, "lora": True, "lora_rank": 4, "lora_scaling": 1.5}))
    convert(tmp_path / "lora", tmp_path / "adapter", Options(base=str(tmp_path / "base")))
    base = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    wanted = kyutai_to_hf(merged(state, lora, 1.5), config_from_kyutai(lm_kwargs))
    assert adapted.keys() == wanted.keys()
    assert max(float((adapted[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5
    convert(tmp_path / "adapter", tmp_path / "back")
    assert equal(load_file(tmp_path / "back" / "lora.safetensors"), lora)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["lora"], written["lora_rank"], written["lora_scaling"]) == (True, 4, 1.5)
    lora |= {f"transformer.layers.0.surprise.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    save_file(lora, tmp_path / "lora" / "lora.safetensors")
    with pytest.raises(ValueError, match="unknown: transformer.layers.0.surprise.lora_A.weight"):
        convert(tmp_path / "lora", tmp_path / "other")


def test_embeddings_that_moshi_finetune_trained_go_along_both_ways(kyutai, golden, tmp_path):
    """Its lora.ft_embed: every parameter with "emb" in its name stands whole in the file."""
    state, lm_kwargs = golden
    convert(kyutai, tmp_path / "base")
    whole = {name: tensor + 0.25 for name, tensor in state.items() if "emb" in name}
    assert {"text_emb.weight", "emb.0.weight", "depformer_text_emb.weight", "depformer_emb.0.weight"} <= set(whole)
    lora = random_lora(state) | whole
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "lora.safetensors")
    (tmp_path / "lora" / "config.json").write_text(json.dumps({**lm_kwargs, "lora": True, "lora_rank": 4, "lora_scaling": 1.5}))
    convert(tmp_path / "lora", tmp_path / "adapter", Options(base=str(tmp_path / "base")))
    base = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    wanted = kyutai_to_hf(merged(state, lora, 1.5) | whole, config_from_kyutai(lm_kwargs))
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in wanted.items())
    convert(tmp_path / "adapter", tmp_path / "back")
    assert equal(load_file(tmp_path / "back" / "lora.safetensors"), lora)


def test_a_peft_adapter_becomes_a_lora_file(tmp_path):
    """q, k and v of a PEFT adapter have each their own A: the file has three times the rank and the same sum."""
    base = small_model(ttt_layers=[])
    base.save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "adapter", str(tmp_path / "base"), mode="lora")
    convert(tmp_path / "adapter", tmp_path / "lora")
    lora, written = load_file(tmp_path / "lora" / "lora.safetensors"), json.loads((tmp_path / "lora" / "config.json").read_text())
    assert written["lora_rank"] == 12
    state = hf_to_kyutai(base.state_dict(), base.config)
    found = kyutai_to_hf(merged(state, lora, written["lora_scaling"]), base.config)
    wanted = adapted.merge_and_unload().state_dict()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5
    save_checkpoint(tmp_path / "with-ttt")
    save_adapter(tmp_path / "ttt-adapter", str(tmp_path / "with-ttt"))
    with pytest.raises(ValueError, match="the adapter holds TTT weights .*--keep-ttt"):
        convert(tmp_path / "ttt-adapter", tmp_path / "refused")
    convert(tmp_path / "ttt-adapter", tmp_path / "kept", Options(keep_ttt=True))
    assert "decoder.model.layers.0.ttt.W1" in load_file(tmp_path / "kept" / "lora.safetensors")


@pytest.mark.parametrize(("wrapper", "mixer"), [("seq_modeling_block.ssm.", "mlp"), ("ttt_layer.", "linear"), ("", "mlp")])
def test_earlier_ttt_checkpoints(tmp_path, wrapper, mixer):
    model = small_model(ttt_mixer=mixer, ttt_layers=[1])
    config, state = model.config, model.state_dict()
    old = {}
    for name, tensor in hf_to_kyutai(state, config).items():
        tail = name.rpartition("layers.1.")[2]
        if name.startswith("decoder.model.layers.1.ttt."):
            old[f"module.model.transformer.layers.1.{wrapper}{tail.removeprefix('ttt.')}"] = tensor
        elif "ttt_gate" in name:
            old["module.model.transformer.layers.1.gating_alpha"] = tensor
        elif name.startswith("transformer.layers.1."):
            old[f"module.model.transformer.layers.1.original_layer.{tail}"] = tensor
        elif "ttt" not in name:
            old[f"module.model.{name}"] = tensor
    missing = "module.model.transformer.layers.1." + wrapper + "learnable_token_weight"
    del old[missing]
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "consolidated.safetensors")
    (tmp_path / "old" / "config.json").write_text(json.dumps(kyutai_from_config(config)))
    said = convert(tmp_path / "old", tmp_path / "here", Options(ttt={"ttt_mini_batch_size": 4, "ttt_base_lr": 1.0}))
    assert f"layers [1] ({mixer})" in said
    assert "were not there and start neutral" in said
    found = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "here").state_dict()
    neutral = {"decoder.model.layers.1.ttt_layernorm.weight": 1.0, "decoder.model.layers.1.ttt.learnable_token_weight": 0.0}
    assert all(bool((found[name] == value).all()) for name, value in neutral.items())
    assert all(torch.equal(found[name], state[name]) for name in state.keys() - neutral.keys())
    assert verify(tmp_path / "here").ttt_layers == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "nothing that can be converted"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}'), "model_type = 'llama' has no counterpart"),
        (lambda f: save_file({"emb.0.weight": torch.ones(1)}, f / "model.safetensors"), "missing: depformer"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02 a pickle"), "no whole safetensors file"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_half_written(kyutai, tmp_path, change, message):
    change(kyutai)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(kyutai, tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("seanet", {"true_skip": False}, "seanet.true_skip = False"),
        ("seanet", {"pad_mode": "replicate"}, "seanet.pad_mode = 'replicate'"),
        ("quantizer", {"n_q_semantic": 2}, "unknown setting quantizer.n_q_semantic"),
        ("quantizer", {"output_dimension": 24}, "quantizer.output_dimension = 24 .* only 16"),
        ("transformer", {"gating": "silu"}, "transformer.gating = 'silu'"),
        ("transformer", {"max_period": 100}, "transformer.max_period = 100"),
        ("transformer", {"output_dimensions": [16, 16]}, "transformer.output_dimensions"),
    ],
)
def test_a_codec_that_mimi_cannot_express_is_refused(part, change, message):
    with pytest.raises(ValueError, match=message):
        mimi_config(MIMI_SETTINGS | {part: MIMI_SETTINGS[part] | change})
    with pytest.raises(ValueError, match="frame_rate = 25.0"):
        mimi_config(MIMI_SETTINGS | {"frame_rate": 25.0})


@pytest.mark.parametrize(
    ("value", "dtype", "message"), [(float("nan"), None, "not finite"), (1e6, torch.float16, "up to 1e.06, too large")]
)
@pytest.mark.parametrize("there", [True, False])
def test_weights_that_are_not_finite_are_refused_both_ways(tmp_path, there, value, dtype, message):
    small_model(ttt_layers=[]).save_pretrained(tmp_path / "here")
    convert(tmp_path / "here", tmp_path / "kyutai")
    source = tmp_path / ("kyutai" if there else "here")
    weights = load_file(source / "model.safetensors")
    name = "text_linear.weight" if there else "decoder.lm_head.weight"
    weights[name][0, 0] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"(lm_head|text_linear)\.weight holds values .*{message}"):
        convert(source, tmp_path / "out", Options(dtype=dtype))
    assert not (tmp_path / "out").exists()


def test_a_repository_on_the_hub_is_fetched_without_its_pickles(kyutai, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as hub:
        hub.add("kyutai/small", {path.name: path.read_bytes() for path in kyutai.iterdir()} | {"old.pt": b"\x80\x02"})
        api = HfApi(endpoint=hub.url, token=hub.token)
        assert "its codec and its tokenizer" in convert("kyutai/small", tmp_path / "here", api=api)
        with pytest.raises(ValueError, match="fetching kyutai/large"):
            convert("kyutai/large", tmp_path / "there", api=api)
        assert not any("old.pt" in line for line in hub.log if line.startswith("GET"))
    assert verify(tmp_path / "here").ttt_layers == []


def test_bad_requests(kyutai, tmp_path):
    with pytest.raises(MoshiTTTOSError, match="exists already"):
        convert(kyutai, tmp_path / "codec")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        convert(tmp_path / "nothing", tmp_path / "here")
    with pytest.raises(ValueError, match="--ttt 'speed=3' is not understood; write name=value with one of layers"):
        parse_ttt(["speed=3"])
    with pytest.raises(ValueError, match="--ttt 'hidden_size=3' is not understood"):
        parse_ttt(["hidden_size=3"])
    with pytest.raises(ValueError, match="--ttt sets mixer twice, the second time by 'ttt_mixer=mlp'"):
        parse_ttt(["mixer=linear", "ttt_mixer=mlp"])
    assert parse_ttt(["layers=5", "base_lr=0.5", "ttt_mixer=linear", "head_dim=null"]) == {
        "ttt_layers": "5",
        "ttt_base_lr": 0.5,
        "ttt_mixer": "linear",
        "ttt_head_dim": None,
    }


def test_options_that_mean_nothing_for_a_source_are_refused(kyutai, tmp_path, capsys):
    """Both are named: the option, and what the source is and takes."""
    save_checkpoint(tmp_path / "ours")
    save_adapter(tmp_path / "adapter", str(tmp_path / "ours"), "lora")
    for source, what, options in (
        (kyutai, "a model in Kyutai's layout and takes --ttt, --dtype, --max-shard-size", ("--keep-ttt", "--fused", "--base=user/base")),
        (tmp_path / "ours", "a model in this package's layout", ("--base=user/base", "--ttt=layers=1", "--max-shard-size=1MB")),
        (tmp_path / "adapter", "a PEFT adapter and takes --dtype, --keep-ttt", ("--fused", "--ttt=layers=1", "--base=user/base")),
    ):
        for option in options:
            assert cli.main(["convert", str(source), str(tmp_path / "out"), option]) == cli.FAILED
            assert f"{option.split('=')[0]} means nothing for {source}, which is {what}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments = ["--ttt", "layers=1", "--ttt", "mini_batch_size=4", "--max-shard-size", "5GB"]
    assert cli.main(["convert", str(kyutai), str(tmp_path / "out"), *arguments]) == 0
    config = MoshiTTTConfig.from_pretrained(tmp_path / "out")
    assert (config.ttt_layers, config.ttt_mini_batch_size) == ([1], 4)

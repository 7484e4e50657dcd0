"""Kyutai's checkpoints and this package's are the same numbers: every conversion is inverse to its other way, and complete."""

import pytest
import torch
from transformers import MimiConfig, MoshiConfig, MoshiForConditionalGeneration

from modeling_moshi_ttt.conversion.kyutai_config import MOSHI_7B, kyutai_from_config
from modeling_moshi_ttt.conversion.tables import (
    TTT_NAMES,
    config_from_kyutai,
    fuse,
    hf_to_kyutai,
    kyutai_to_hf,
    moshi_groups,
    to_halves,
    to_pairs,
    ttt_names,
)
from modeling_moshi_ttt.hub.verify import expected_shapes

MOSHIKO = {**MOSHI_7B, "depformer_causal": True, "demux_second_stream": False, "model_type": "moshi", "lm_gen_config": {}}


def transformers_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' own Moshi of this size, without its audio encoder."""
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "audio_vocab_size", "num_codebooks")
    depth = config.depth_decoder_config
    depth_fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
    plain = MoshiConfig(
        **{field: getattr(config, field) for field in fields},
        audio_encoder_config=MimiConfig(),
        depth_decoder_config={field: getattr(depth, field) for field in depth_fields},
    )
    with torch.device("meta"):
        model = MoshiForConditionalGeneration(plain)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("audio_encoder.")}


def moshiko_shapes(fused: bool) -> dict[str, tuple[int, ...]]:
    """Every key and shape of kyutai/moshiko's checkpoint, written out from its architecture, independently of the table."""
    dim, depth, text, audio = 4096, 1024, 32000, 2048
    shapes = {f"emb.{q}.weight": (audio + 1, dim) for q in range(16)}
    shapes |= {"text_emb.weight": (text + 1, dim), "text_linear.weight": (text, dim), "out_norm.alpha": (1, 1, dim)}
    shapes |= {f"depformer_in.{q}.weight": (depth, dim) for q in range(8)} | {f"linears.{q}.weight": (audio, depth) for q in range(8)}
    shapes |= {f"depformer_emb.{q}.weight": (audio + 1, depth) for q in range(7)} | {"depformer_text_emb.weight": (text + 1, depth)}
    for i in range(32):
        layer = f"transformer.layers.{i}."
        attention = {"in_proj_weight": (3 * dim, dim), "out_proj.weight": (dim, dim)}
        if not fused:
            attention = {"in_projs.0.weight": (3 * dim, dim), "out_projs.0.weight": (dim, dim)}
        shapes |= {layer + "self_attn." + name: shape for name, shape in attention.items()}
        shapes |= {layer + "gating.linear_in.weight": (22528, dim), layer + "gating.linear_out.weight": (dim, 11264)}
        shapes |= {layer + f"norm{n}.alpha": (1, 1, dim) for n in (1, 2)}
    for i in range(6):
        layer = f"depformer.layers.{i}."
        if fused:
            shapes |= {layer + "self_attn.in_proj_weight": (24 * depth, depth), layer + "self_attn.out_proj.weight": (8 * depth, depth)}
        for q in range(8):
            if not fused:
                shapes |= {
                    layer + f"self_attn.in_projs.{q}.weight": (3 * depth, depth),
                    layer + f"self_attn.out_projs.{q}.weight": (depth, depth),
                }
            shapes |= {layer + f"gating.{q}.linear_in.weight": (5632, depth), layer + f"gating.{q}.linear_out.weight": (depth, 2816)}
        shapes |= {layer + f"norm{n}.alpha": (1, 1, depth) for n in (1, 2)}
    return shapes


@pytest.fixture(scope="module")
def golden(kyutai_golden):
    tensors, facts = kyutai_golden
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}, facts["lm_kwargs"]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fused", [False, True])
def test_golden_there_and_back_is_the_identity(golden, fused):
    state, lm_kwargs = golden
    config = config_from_kyutai(lm_kwargs)
    here = kyutai_to_hf(state, config)
    assert {name: tuple(tensor.shape) for name, tensor in here.items()} == transformers_shapes(config)
    again = hf_to_kyutai(here, config, fused=fused)
    if fused:
        assert {"transformer.layers.0.self_attn.in_proj_weight", "depformer.layers.1.self_attn.out_proj.weight"} < again.keys()
        assert equal(kyutai_to_hf(again, config), here)
    else:
        assert equal(again, state)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("n_q", "dep_q"), [(7, 3), (5, 4), (8, 2)])
def test_models_with_other_numbers_of_codebooks(golden, n_q, dep_q, fused):
    """Also where the user is heard in more or fewer codebooks than Moshi speaks in."""
    delays = [0, 0, *[1] * (dep_q - 1), 0, *[1] * (n_q - dep_q - 1)]
    config = config_from_kyutai({**golden[1], "n_q": n_q, "dep_q": dep_q, "delays": delays})
    assert (config.num_codebooks, config.num_user_codebooks) == (dep_q, n_q - dep_q)
    here = {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}
    there = hf_to_kyutai(here, config, fused=fused)
    assert {name for name in there if name.startswith("emb.")} == {f"emb.{q}.weight" for q in range(n_q)}
    assert {name for name in there if name.startswith("linears.")} == {f"linears.{q}.weight" for q in range(dep_q)}
    assert equal(kyutai_to_hf(there, config), here)


def test_each_spelling_of_the_fused_projection_is_read(golden):
    state, lm_kwargs = golden
    config = config_from_kyutai(lm_kwargs)
    fused = hf_to_kyutai(kyutai_to_hf(state, config), config, fused=True)
    respelled = {name.replace("in_proj_weight", "in_proj.weight"): tensor for name, tensor in fused.items()}
    assert respelled.keys() != fused.keys()
    assert equal(kyutai_to_hf(respelled, config), kyutai_to_hf(state, config))


def test_values_are_where_they_belong(golden):
    state, lm_kwargs = golden
    here = kyutai_to_hf(state, config_from_kyutai(lm_kwargs))
    joint = state["transformer.layers.1.self_attn.in_projs.0.weight"]
    # Head 2 of 4 (16 wide): its pair (2i, 2i+1) becomes rows i and i + 8 of the same head; v keeps its order.
    for i in range(8):
        for offset, name in ((0, "q"), (64, "k")):
            rows = here[f"decoder.model.layers.1.self_attn.{name}_proj.linear.weight"][32:48]
            assert torch.equal(rows[i], joint[offset + 32 + 2 * i])
            assert torch.equal(rows[i + 8], joint[offset + 32 + 2 * i + 1])
    assert torch.equal(here["decoder.model.layers.1.self_attn.v_proj.linear.weight"], joint[128:])
    for codebook in range(3):
        depth = state[f"depformer.layers.0.self_attn.in_projs.{codebook}.weight"]
        assert torch.equal(here["depth_decoder.layers.0.self_attn.k_proj.linear.weight"][codebook], depth[32:64])
        assert torch.equal(here["depth_decoder.lm_heads.weight"][codebook], state[f"linears.{codebook}.weight"])


def test_rotary_orders_are_inverse_and_equal_transformers_rotation():
    """The rotated scores are what has to stay: interleaved rotation of the one order equals half rotation of the other."""
    weight = torch.randn(12 * 4, 48, dtype=torch.float64)
    assert torch.equal(to_pairs(to_halves(weight, 4), 4), weight)
    x, angle = torch.randn(48, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    pairs = (weight @ x).view(4, 6, 2)
    rotated = torch.stack(
        (pairs[..., 0] * angle.cos() - pairs[..., 1] * angle.sin(), pairs[..., 0] * angle.sin() + pairs[..., 1] * angle.cos()), -1
    )
    first, second = (to_halves(weight, 4) @ x).view(4, 2, 6).unbind(1)
    halves = torch.cat((first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()), -1)
    assert torch.allclose(to_halves(rotated.reshape(48, 1), 4).view(4, 12), halves, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_moshiko_is_complete_on_the_meta_device(fused):
    config = config_from_kyutai(MOSHIKO)
    shapes = moshiko_shapes(fused)
    state = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    groups = [fuse(group) if fused else group for group in moshi_groups(config)]
    used = [name for group in groups for name in group.kyutai]
    assert len(used) == len(set(used))
    assert set(used) == set(shapes)
    here = {name: tuple(tensor.shape) for name, tensor in kyutai_to_hf(state, config).items()}
    assert here == transformers_shapes(config)
    back = hf_to_kyutai({name: torch.empty(shape, device="meta") for name, shape in here.items()}, config, fused=fused)
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == shapes
    assert 7.6e9 < sum(tensor.numel() for tensor in state.values()) < 7.8e9


def test_ttt_weights_keep_their_names(golden):
    state, lm_kwargs = golden
    config = config_from_kyutai(lm_kwargs, ttt_layers=[1], ttt_mixer="mlp")
    assert (
        kyutai_to_hf(state, config).keys() == kyutai_to_hf(state, config_from_kyutai(lm_kwargs)).keys()
    )  # fresh layers start when it is loaded
    ttt = {name: torch.randn(4) for name in ttt_names(config)}
    assert len(ttt) == len(TTT_NAMES["mlp"])
    assert "decoder.model.layers.1.ttt.W2" in ttt
    assert "decoder.model.layers.1.ttt_gate.gating_alpha" in ttt
    here = kyutai_to_hf({**state, **ttt}, config)
    assert all(torch.equal(here[name], ttt[name]) for name in ttt)
    assert equal(hf_to_kyutai(here, config), {**state, **ttt})
    del ttt["decoder.model.layers.1.ttt.W2"]
    with pytest.raises(ValueError, match="missing: decoder.model.layers.1.ttt.W2"):
        kyutai_to_hf({**state, **ttt}, config)


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_the_table_names_every_weight_of_the_model(golden, mixer):
    config = config_from_kyutai(golden[1], ttt_layers="0,2", ttt_mixer=mixer)
    named = [name for group in moshi_groups(config) for name in group.here] + ttt_names(config)
    assert sorted(named) == sorted(expected_shapes(config))


@pytest.mark.parametrize("name", ["emb.5.weight", "depformer.layers.1.gating.2.linear_in.weight", "transformer.layers.2.norm2.alpha"])
def test_a_missing_unknown_or_misshapen_key_is_named(golden, name):
    state, lm_kwargs = golden
    config = config_from_kyutai(lm_kwargs)
    with pytest.raises(ValueError, match=f"missing: {name}"):
        kyutai_to_hf({key: value for key, value in state.items() if key != name}, config)
    with pytest.raises(ValueError, match=f"unknown: {name}_scb"):
        kyutai_to_hf({**state, name + "_scb": state[name]}, config)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        kyutai_to_hf({**state, name: state[name][..., :-1]}, config)
    here = kyutai_to_hf(state, config)
    with pytest.raises(ValueError, match="missing: decoder.lm_head.weight; unknown: decoder.head.weight"):
        hf_to_kyutai({"decoder.head.weight" if key == "decoder.lm_head.weight" else key: value for key, value in here.items()}, config)


@pytest.mark.parametrize("source", ["golden", "moshiko"])
def test_configuration_there_and_back(golden, source):
    lm_kwargs = golden[1] if source == "golden" else MOSHI_7B
    config = config_from_kyutai(lm_kwargs, ttt_layers="last:2")
    assert config.delays == lm_kwargs["delays"]
    assert (config.num_codebooks, config.num_user_codebooks) == (lm_kwargs["dep_q"], lm_kwargs["n_q"] - lm_kwargs["dep_q"])
    written = kyutai_from_config(config)
    assert {key: written[key] for key in lm_kwargs} == lm_kwargs
    assert config_from_kyutai(written, ttt_layers="last:2").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "lm_kwargs", [{**MOSHI_7B, "context": None}, {k: v for k, v in MOSHI_7B.items() if k != "context"}], ids=["null", "absent"]
)
def test_a_context_of_null_is_attention_without_a_window(lm_kwargs):
    config = config_from_kyutai(lm_kwargs)
    assert config.sliding_window is None
    assert kyutai_from_config(config)["context"] is None


def test_padding_ids_are_kyutais_both_ways():
    config = config_from_kyutai({**MOSHI_7B, "existing_text_padding_id": 5, "existing_text_end_padding_id": 6})
    assert config.text_padding_ids == [5, 6]
    assert config_from_kyutai(kyutai_from_config(config)).text_padding_ids == [5, 6]


def test_moshiko_has_the_published_sizes():
    config = config_from_kyutai(MOSHIKO)
    depth = config.depth_decoder_config
    assert (config.ffn_dim, config.sliding_window, config.rms_norm_eps, config.vocab_size) == (22528, 3000, 1e-8, 32000)
    assert (depth.ffn_dim, depth.hidden_size, depth.num_hidden_layers, depth.num_codebooks) == (5632, 1024, 6, 8)
    assert config.ttt_layers == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gating": "gelu"}, "gating = 'gelu'"),
        ({"depformer_weights_per_step_schedule": [0, 0, 0]}, "depformer_weights_per_step_schedule"),
        ({"positional_embedding": "sin"}, "positional_embedding"),
        ({"conditioners": {"speaker": {}}}, "conditioners"),
        ({"num_layer": 3}, "did you mean 'num_layers'"),
        ({"delays": [0, 1]}, "delays has 2 entries"),
        ({"delays": [1, 0, 1, 1, 0, 1, 1]}, "text stream"),
        ({"norm": "layer_norm"}, "norm = 'layer_norm'"),
        ({"dep_q": 9}, "dep_q = 9"),
        ({"depformer_dim_feedforward": [1, 2, 3]}, "one integer"),
        ({"model_type": "hibiki"}, "model_type = 'hibiki'"),
        ({"n_q": 3, "dep_q": 3, "delays": [0, 0, 1, 1]}, "dep_q = n_q = 3: .* could not hear; .*--own-codebooks"),
        ({"own_codebooks": 6, "dep_q": 6}, "own_codebooks = 6 must lie between 1 and dep_q = 6, and leave some of n_q = 6"),
        ({"own_codebooks": 4}, "own_codebooks = 4 must lie between 1 and dep_q = 3"),
    ],
)
def test_what_cannot_be_expressed_is_refused(golden, change, message):
    own = change.get("own_codebooks")
    with pytest.raises(ValueError, match=message):
        config_from_kyutai({**golden[1], **{key: value for key, value in change.items() if key != "own_codebooks"}}, own)
    lacking = {key: value for key, value in golden[1].items() if key != "dim"}
    with pytest.raises(ValueError, match="lacks dim"):
        config_from_kyutai(lacking)


@pytest.mark.parametrize("ffn_dim", [2 * hidden for hidden in (7, 8, 42, 84, 86, 176, 11264)])
def test_every_gated_width_survives(golden, ffn_dim):
    config = config_from_kyutai(golden[1])
    config.ffn_dim = config.depth_decoder_config.ffn_dim = ffn_dim
    again = config_from_kyutai(kyutai_from_config(config))
    assert (again.ffn_dim, again.depth_decoder_config.ffn_dim) == (ffn_dim, ffn_dim)


def test_a_width_that_kyutai_cannot_write_is_refused(golden):
    config = config_from_kyutai(golden[1])
    config.depth_decoder_config.ffn_dim = 170  # would need a feed-forward size of 4 x 32, which Kyutai's code reads as another width
    with pytest.raises(ValueError, match="ffn_dim = 170 at width 32"):
        kyutai_from_config(config)


def test_models_that_predict_the_users_codebooks_too_are_split(golden):
    """PersonaPlex names no sizes; J-Moshi has Moshi's delays; other delays do not tell."""
    for lm_kwargs in ({"model_type": "personaplex", "version": "7b-v1"}, {**MOSHIKO, "dep_q": 16}):
        config = config_from_kyutai(lm_kwargs)
        assert (config.num_codebooks, config.num_user_codebooks, config.hidden_size) == (8, 8, 4096)
    flat = {**golden[1], "dep_q": 6, "delays": [0] * 7}
    with pytest.raises(ValueError, match="could not hear"):
        config_from_kyutai(flat)
    assert config_from_kyutai(flat, own_codebooks=2).num_user_codebooks == 4

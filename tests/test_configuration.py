"""The configuration: every way to name layers, derived fields, and refusals that name field, value and cure."""

import pytest
from tiny import tiny_config
from transformers import MoshiConfig

from modeling_moshi_ttt import MoshiTTTConfig


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([3, 1], [1, 3]),
        ("23-31", list(range(23, 32))),
        ("0,4,8-10", [0, 4, 8, 9, 10]),
        ("all", list(range(32))),
        ("middle", list(range(10, 22))),
        ("last:9", list(range(23, 32))),
        ([], []),
        ("", []),
    ],
)
def test_layers_are_stored_as_a_list(layers, expected):
    assert MoshiTTTConfig(ttt_layers=layers).ttt_layers == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ttt_layers": [2]}, "ttt_layers.*layer 2.*0 to 1"),
        ({"ttt_layers": [-1]}, "ttt_layers.*layer -1"),
        ({"ttt_layers": [1, 1]}, "ttt_layers.*more than once"),
        ({"ttt_layers": "1-0"}, "ttt_layers='1-0'.*must be a list"),
        ({"ttt_layers": "every"}, "ttt_layers='every'.*must be a list"),
        ({"ttt_layers": "last:3"}, "ttt_layers='last:3'.*num_hidden_layers=2"),
        ({"ttt_mixer": "gru"}, "ttt_mixer='gru'.*'linear', 'mlp'"),
        ({"ttt_rope": "yarn"}, "ttt_rope='yarn'"),
        ({"ttt_inner_norm": "rms"}, "ttt_inner_norm='rms'.*'layer_norm', 'none'"),
        ({"ttt_write_threshold": 1.0}, "ttt_write_threshold=1.0.*below 1"),
        ({"ttt_write_threshold": -0.1}, "ttt_write_threshold=-0.1.*at least 0"),
        ({"ttt_implementation": "cuda"}, "ttt_implementation='cuda'"),
        ({"ttt_mini_batch_size": 0}, "ttt_mini_batch_size=0.*at least 1"),
        ({"scan_checkpoint_group_size": 0}, "scan_checkpoint_group_size=0"),
        ({"ttt_num_heads": 3}, "ttt_num_heads=3.*hidden_size=32"),
        ({"num_attention_heads": 5}, "num_attention_heads=5.*hidden_size=32"),
        ({"ttt_num_heads": 0}, "ttt_num_heads=0"),
        ({"ttt_head_dim": 7}, "ttt_head_dim=7.*even"),
        ({"ttt_base_lr": 0.0}, "ttt_base_lr=0.0"),
        ({"text_padding_weight": -0.5}, "text_padding_weight=-0.5"),
        ({"audio_delays": [0, 1]}, "audio_delays.*6 delays"),
        ({"audio_delays": [0, 1, -1, 0, 1, 1]}, "audio_delays"),
        ({"text_padding_ids": [3, 30]}, "text_padding_ids.*30"),
        ({"ttt_head_dim": 1, "ttt_rope": "none"}, "ttt_head_dim=1.*at least 2"),
        ({"num_attention_heads": 0}, "num_attention_heads=0.*at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*num_attention_heads=2"),
        ({"head_dim": 7}, "head_dim=7.*even"),
        ({"sliding_window": 0}, "sliding_window=0.*at least 1"),
        ({"sliding_window": -1}, "sliding_window=-1.*at least 1"),
        ({"audio_vocab_size": -3}, "audio_vocab_size=-3.*at least 1"),
        ({"dtype": "half32"}, "dtype='half32'.*'bfloat16'"),
        ({"hidden_act": "nope"}, "hidden_act='nope'.*'silu'"),
        ({"depth_decoder_config": {"hidden_act": "nope"}}, "depth_decoder_config.hidden_act='nope'.*'silu'"),
        ({"ttt_gate_init": float("nan")}, "ttt_gate_init=nan.*finite"),
        ({"text_padding_weight": float("nan")}, "text_padding_weight=nan.*finite"),
        ({"semantic_loss_weight": float("inf")}, "semantic_loss_weight=inf.*finite"),
        ({"ttt_base_lr": float("inf")}, "ttt_base_lr=inf.*finite"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0.*greater than 0"),
        ({"initializer_range": -0.1}, "initializer_range=-0.1.*negative"),
        ({"depth_decoder_config": {"num_attention_heads": 0}}, "depth_decoder_config.num_attention_heads=0.*at least 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_parameters.rope_theta=nan"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type.*'linear'"),
    ],
)
def test_nonsense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**fields)


def test_a_wrong_type_is_refused():
    with pytest.raises(Exception, match="ttt_mini_batch_size.*expected int"):
        tiny_config(ttt_mini_batch_size="16")


def test_derived_fields():
    config = MoshiTTTConfig()
    assert (config.ttt_num_heads, config.ttt_head_dim, config.ttt_base_lr) == (32, 128, 0.1)
    assert MoshiTTTConfig(ttt_mixer="linear").ttt_base_lr == 1.0
    assert config.delays == [0] + 2 * [0, 1, 1, 1, 1, 1, 1, 1]
    assert config.depth_decoder_config.input_size == 4096
    assert config.depth_decoder_config.num_codebooks == 8


def test_round_trip_and_overrides(tmp_path):
    tiny_config(ttt_layers="last:1").save_pretrained(tmp_path)
    assert MoshiTTTConfig.from_pretrained(tmp_path).to_dict() == tiny_config(ttt_layers=[1]).to_dict()
    changed = MoshiTTTConfig.from_pretrained(tmp_path, ttt_layers="all", ttt_mixer="linear", ttt_num_heads=4)
    assert changed.ttt_layers == [0, 1]
    assert changed.ttt_head_dim == 8
    with pytest.raises(ValueError, match="layer 9"):
        MoshiTTTConfig.from_pretrained(tmp_path, ttt_layers=[9])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1}, "ttt_layers.*layer 1.*num_hidden_layers=1"),
        ({"semantic_loss_weight": -1.0}, "semantic_loss_weight=-1.0"),
        ({"text_padding_ids": [99, 0]}, "text_padding_ids.*99"),
        ({"text_padding_ids": [3]}, r"`text_padding_ids=\[3\]` must hold two token ids"),
        ({"text_padding_ids": [3, -1]}, r"`text_padding_ids=\[3, -1\]` must hold two token ids"),
        ({"semantic_loss_weight": 0, "num_codebooks": 1}, "`semantic_loss_weight=0` must be above 0 .*`num_codebooks=1`"),
        ({"scan_checkpoint_group_size": 0}, "scan_checkpoint_group_size=0"),
        ({"audio_delays": [0, 1]}, "audio_delays=\\[0, 1\\].*6 delays"),
        ({"num_codebooks": 5}, "audio_delays.*8 delays.*num_codebooks=5.*num_user_codebooks=3.*or None"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"depth_decoder_config": {"ffn_dim": 0}}, "depth_decoder_config.ffn_dim=0"),
    ],
)
def test_overrides_are_checked_as_in_the_constructor(changes, words, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        MoshiTTTConfig.from_pretrained(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_codebooks": 5, "audio_delays": None}, {"audio_delays": [0, 1, 1, 1, 1, 0, 1, 1]}),
        ({"num_hidden_layers": 3, "ttt_layers": "last:1"}, {"ttt_layers": [2]}),
        ({"num_attention_heads": 4}, {"head_dim": 8, "num_key_value_heads": 4, "ttt_num_heads": 2}),
        ({"hidden_size": 64}, {"head_dim": 32, "ttt_head_dim": 32}),
        ({"ttt_mixer": "linear"}, {"ttt_base_lr": 1.0}),
        ({"ttt_inner_norm": "none"}, {"ttt_base_lr": 2.0}),
        ({"ttt_inner_norm": "none", "ttt_mixer": "linear", "ttt_head_dim": 12}, {"ttt_base_lr": 6.0}),
        ({"ttt_inner_norm": "none", "ttt_base_lr": 0.3}, {"ttt_base_lr": 0.3}),
        ({"ttt_mixer": "mlp"}, {"ttt_base_lr": 0.5}),  # as it was: nothing follows from it anew
        ({"output_hidden_states": True, "return_dict": False}, {"output_hidden_states": True, "return_dict": False}),
        ({"dtype": "float16"}, {}),
    ],
)
def test_overrides_load_as_if_constructed(changes, expected, tmp_path):
    tiny_config(ttt_base_lr=0.5).save_pretrained(tmp_path / "before")
    config, unused = MoshiTTTConfig.from_pretrained(tmp_path / "before", return_unused_kwargs=True, nothing_of_ours=1, **changes)
    assert unused == {"nothing_of_ours": 1}
    assert {name: getattr(config, name) for name in expected} == expected
    config.save_pretrained(tmp_path / "after")
    assert MoshiTTTConfig.from_pretrained(tmp_path / "after").to_dict() == config.to_dict()


def test_an_override_of_the_depth_decoder_joins_what_was_saved(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    depth = MoshiTTTConfig.from_pretrained(tmp_path, depth_decoder_config={"ffn_dim": 40}, vocab_size=50).depth_decoder_config
    assert (depth.ffn_dim, depth.hidden_size, depth.vocab_size) == (40, 16, 50)


def test_fields_set_later_are_checked_before_saving(tmp_path):
    config = tiny_config()
    config.text_padding_weight = float("nan")
    with pytest.raises(Exception, match="text_padding_weight=nan"):
        config.save_pretrained(tmp_path)


def test_odd_heads_need_no_rope():
    assert tiny_config(ttt_head_dim=7, ttt_rope="none").ttt_head_dim == 7


def test_a_plain_moshi_configuration_becomes_ours(tmp_path):
    MoshiConfig().save_pretrained(tmp_path)
    config = MoshiTTTConfig.from_pretrained(tmp_path, ttt_layers="23-31")
    assert config.model_type == "moshi_ttt"
    assert config.ttt_layers == list(range(23, 32))
    assert config.hidden_size == 4096


def test_another_model_is_refused_before_its_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama'.*'moshi_ttt' and 'moshi'"):
        MoshiTTTConfig.from_pretrained(tmp_path)


def test_attention_without_a_window_is_saved(tmp_path):
    tiny_config(sliding_window=None).save_pretrained(tmp_path)
    assert MoshiTTTConfig.from_pretrained(tmp_path).sliding_window is None

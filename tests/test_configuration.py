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
        ({"ttt_layers": "1-0"}, "ttt_layers='1-0'.*not understood"),
        ({"ttt_layers": "every"}, "ttt_layers='every'.*not understood"),
        ({"ttt_layers": "last:3"}, "ttt_layers='last:3'.*num_hidden_layers=2"),
        ({"ttt_mixer": "gru"}, "ttt_mixer='gru'.*'linear', 'mlp'"),
        ({"ttt_rope": "yarn"}, "ttt_rope='yarn'"),
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

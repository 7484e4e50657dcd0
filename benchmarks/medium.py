"""The medium model that several benchmarks share: 131M parameters, width 512, 8 layers; depth decoder 256 wide, 6 layers."""

import torch

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration


def medium(ttt_layers: list[int], sliding_window: int = 256) -> MoshiTTTForConditionalGeneration:
    """The medium model with random weights from a fixed seed and TTT-MLP in these layers."""
    torch.manual_seed(0)
    config = MoshiTTTConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        ffn_dim=2816,
        sliding_window=sliding_window,
        ttt_layers=ttt_layers,
        depth_decoder_config={"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "ffn_dim": 1408},
    )
    return MoshiTTTForConditionalGeneration(config)

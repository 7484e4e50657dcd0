"""Tiny models and random frames for tests."""

import torch

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration


def tiny_config(**changes) -> MoshiTTTConfig:
    """Two layers of width 32, window 8, three codebooks of 20 entries for Moshi and as many for the user, TTT in both layers."""
    fields = {
        "vocab_size": 30,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "sliding_window": 8,
        "num_codebooks": 3,
        "audio_vocab_size": 20,
        "ttt_layers": "all",
        "ttt_mini_batch_size": 4,
        "ttt_base_lr": 1.0,
        "depth_decoder_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
    }
    return MoshiTTTConfig(**(fields | changes))


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> MoshiTTTForConditionalGeneration:
    """A tiny model whose TTT layers matter: every parameter is drawn, so that `wo` and the gates are not at their quiet start."""
    torch.manual_seed(seed)
    model = MoshiTTTForConditionalGeneration(tiny_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("norm.weight", "ttt_norm_weight")) else 0.0
            scale = 0.02 if name.endswith("token_weight") else 0.25  # a token weight of 0 would forget every mini-batch
            parameter.copy_(centre + scale * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return model


def speaking_model(seed: int = 0, **changes):
    """A tiny model that speaks the tiny codec."""
    return tiny_model(torch.float32, seed, vocab_size=512, num_codebooks=8, audio_vocab_size=128, **changes)


def random_frames(config: MoshiTTTConfig, rows: int, frames: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Aligned random frames of every stream, some of them absent (-1), as keyword arguments of the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(card: int, *shape: int) -> torch.Tensor:
        codes = torch.randint(0, card, shape, generator=generator)
        return codes.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1)

    return {
        "input_ids": draw(config.vocab_size, rows, frames),
        "moshi_audio_codes": draw(config.audio_vocab_size, rows, config.num_codebooks, frames),
        "user_audio_codes": draw(config.audio_vocab_size, rows, config.num_user_codebooks, frames),
    }


def with_labels(frames: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, with its own text and codes as labels."""
    return {**frames, "text_labels": frames["input_ids"].clone(), "audio_labels": frames["moshi_audio_codes"].clone()}


def cut(frames: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """Frames `start` to `stop` of every stream."""
    return {name: tensor[..., start:stop] for name, tensor in frames.items()}


def rows_of(frames: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in frames.items()}

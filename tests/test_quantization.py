"""Weight-only int8: near the model's own numbers, saved and loaded, for talking alone; what learns while it listens is left as it is."""

import pytest
import torch
from tiny import random_frames, tiny_model, with_labels

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTInt8Config
from modeling_moshi_ttt.depth_decoder import DepthLinear
from modeling_moshi_ttt.quantization_moshi_ttt import Int8DepthLinear, Int8Linear, int8_product, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("float")
    tiny_model(torch.float32).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def int8(folder):
    return MoshiTTTForConditionalGeneration.from_pretrained(folder, quantization_config=MoshiTTTInt8Config())


def test_a_product_is_within_half_a_step_of_each_weight():
    weight, x = torch.randn(24, 40), torch.randn(5, 40)
    rounded, scale = quantized(weight)
    assert ((rounded.float() * scale[:, None] - weight).abs() <= 0.5 * scale[:, None] + 1e-7).all()
    expected = x @ (rounded.float() * scale[:, None]).T
    assert torch.allclose(int8_product(x, rounded, scale), expected, atol=1e-4)
    assert torch.allclose(int8_product(x.double(), rounded, scale).float(), expected, atol=1e-4)
    assert quantized(torch.zeros(2, 3))[0].abs().sum() == 0


def test_the_loss_is_near_and_what_learns_is_left_alone(folder, int8):
    model = MoshiTTTForConditionalGeneration.from_pretrained(folder)
    frames = with_labels(random_frames(model.config, 2, 30))
    assert int8(**frames).loss.item() == pytest.approx(model(**frames).loss.item(), rel=0.01)
    for name, module in int8.named_modules():
        left_out = {"ttt", "lm_head", "lm_heads"} & set(name.split("."))
        assert not (left_out and isinstance(module, (Int8Linear, Int8DepthLinear))), name
        assert left_out or type(module) not in (torch.nn.Linear, DepthLinear), name


def test_it_is_saved_loaded_and_talks(folder, int8, tmp_path):
    int8.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.75 * (folder / "model.safetensors").stat().st_size
    loaded = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path)
    user = random_frames(int8.config, 2, 12)["user_audio_codes"]
    for ours, theirs in zip(loaded.hear(user, seeds=[1, 2]), int8.hear(user, seeds=[1, 2])):
        assert torch.equal(ours, theirs)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}

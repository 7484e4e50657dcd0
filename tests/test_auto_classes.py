"""transformers' Auto classes find the model once the package is imported, without importing it before it is used."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_frames, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForTextToWaveform, TorchAoConfig

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForTextToWaveform, AutoModelForMultimodalLM])
def test_auto_classes_give_the_model_that_was_saved(auto, folder):
    model = auto.from_pretrained(folder)
    assert type(model) is MoshiTTTForConditionalGeneration
    frames = random_frames(model.config, rows=1, frames=20)
    expected = tiny_model(torch.float32)(**frames, use_cache=False)
    output = model(**frames, use_cache=False)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.audio_logits, expected.audio_logits)
    assert type(auto.from_config(tiny_config())) is MoshiTTTForConditionalGeneration


def test_auto_config_reads_it(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MoshiTTTConfig
    assert config.ttt_layers == [0, 1]


def test_loading_in_bfloat16_sharded_and_with_a_device_map(folder, tmp_path):
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("far", ["decoder.model.layers.1", "depth_decoder"])
def test_parts_that_lie_elsewhere_are_fetched_when_they_are_used(folder, tmp_path, far):
    """As `device_map="auto"` spreads a model over devices and the disk: the same numbers, in one pass and frame by frame."""
    parts = ["embed_tokens", "decoder.lm_head", "depth_decoder"]
    parts += [f"decoder.model.{part}" for part in ("embed_tokens", "layers.0", "layers.1", "norm")]
    places = dict.fromkeys(parts, "cpu") | {far: "disk"}
    whole, spread = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert {name.startswith(far) for name, weight in spread.named_parameters() if weight.device.type == "meta"} == {True}
    frames = random_frames(whole.config, rows=1, frames=6)
    with torch.no_grad():
        one, other = whole(**frames), spread(**frames)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.audio_logits, other.audio_logits)
    streams = [model.new_stream(do_sample=False) for model in (whole, spread)]
    for codes in frames["user_audio_codes"].unbind(-1):
        first, second = (stream.step(codes) for stream in streams)
        assert torch.equal(first.text, second.text)
        assert torch.equal(first.audio_codes, second.audio_codes)


def test_loading_quantized(folder):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not in [dev]: installed, it slows every import down")
    model = AutoModel.from_pretrained(folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))
    layer = model.decoder.model.layers[0]
    assert type(layer.self_attn.q_proj.linear.weight.data).__name__ == "Int8Tensor"
    assert type(layer.ttt.wq.weight.data).__name__ == "Int8Tensor"
    assert type(layer.ttt.W1.data) is torch.Tensor  # fast weights stay as they are
    frames = random_frames(model.config, rows=1, frames=20)
    expected, output = AutoModel.from_pretrained(folder)(**frames).logits, model(**frames).logits
    assert torch.nn.functional.cosine_similarity(output.flatten(), expected.flatten(), dim=0) > 0.95
    model.new_stream(1).step(frames["user_audio_codes"][..., 0])


def test_overrides_are_checked_before_weights_are_read(folder, tmp_path):
    for changes, words in (({"sliding_window": 0}, "sliding_window=0"), ({"num_codebooks": 5}, "audio_delays.*num_codebooks=5")):
        with pytest.raises(ValueError, match=words):
            AutoModel.from_pretrained(folder, **changes)
    model = AutoModel.from_pretrained(folder, num_hidden_layers=1, ttt_layers="all", sliding_window=5, dtype="auto")
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert (again.config.num_hidden_layers, again.config.ttt_layers, again.config.sliding_window) == (1, [0], 5)


def test_weights_that_are_not_finite_are_refused(folder, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["decoder.model.layers.1.ttt.W1"][0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.model\.layers\.1\.ttt\.W1.*not finite"):
        AutoModel.from_pretrained(tmp_path)


def test_importing_the_package_imports_no_model():
    code = (
        "import sys, torch, transformers, modeling_moshi_ttt\n"
        "heavy = ['modeling_moshi_ttt.modeling_moshi_ttt', 'modeling_moshi_ttt.processing_moshi_ttt', 'transformers.modeling_utils']\n"
        "assert not [name for name in heavy + ['triton', 'peft', 'accelerate', 'datasets'] if name in sys.modules]\n"
        "assert modeling_moshi_ttt.MoshiTTTForConditionalGeneration.__module__ == 'modeling_moshi_ttt.modeling_moshi_ttt'\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\n"
        "assert PROCESSOR_MAPPING[modeling_moshi_ttt.MoshiTTTConfig].__name__ == 'MoshiTTTProcessor'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors():
    import modeling_moshi_ttt

    with pytest.raises(AttributeError, match="Nonsense"):
        _ = modeling_moshi_ttt.Nonsense
    assert set(modeling_moshi_ttt.__all__) <= set(dir(modeling_moshi_ttt))
    assert all(getattr(modeling_moshi_ttt, name) is not None for name in modeling_moshi_ttt.__all__)

"""`moshi-ttt verify`: a whole checkpoint is described, and every way of not being whole is named."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hub_checkpoints import save_adapter, small_model
from huggingface_hub import load_torch_model
from safetensors.torch import load_file, save_file
from tiny import random_frames
from transformers import AutoModel, TorchAoConfig

from modeling_moshi_ttt import cli
from modeling_moshi_ttt.common.files import write_manifest
from modeling_moshi_ttt.hub.probe import OLD_PROBE, PROBE, make_probe, probe_loss, write_probe
from modeling_moshi_ttt.hub.verify import human_size, verify
from modeling_moshi_ttt.training import modes
from modeling_moshi_ttt.training.run_config import ModelSettings
from modeling_moshi_ttt.training.setup import build_model

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    model = small_model(ttt_layers=[1], ttt_mixer="linear")
    model.save_pretrained(tmp_path / "model")
    probe = make_probe(model.config)
    write_probe(tmp_path / "model", probe, probe_loss(model, probe))
    return tmp_path / "model"


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_a_whole_checkpoint_is_described(checkpoint, capsys):
    write_manifest(checkpoint)
    assert cli.main(["verify", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    facts = verify(checkpoint)
    model = small_model(ttt_layers=[1], ttt_mixer="linear")
    assert facts.total == sum(parameter.numel() for parameter in model.parameters())
    assert facts.parameters["gates"] == 32
    assert facts.parameters["ttt"] == sum(p.numel() for n, p in model.named_parameters() if ".ttt." in n or ".ttt_layernorm." in n)
    assert "TTT layers: 1 (linear)" in said
    assert "dtype: float32 100%" in said
    assert "as stored" in said
    assert f"full checkpoint, {human_size(sum(path.stat().st_size for path in checkpoint.rglob('*') if path.is_file()))}\n" in said
    assert said.endswith("all is well\n")


def test_the_probe_stands_apart_from_the_weights_and_is_found_where_it_used_to_be(checkpoint):
    model = small_model(ttt_layers=[1], ttt_mixer="linear")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_torch_model(model, checkpoint)  # which takes every `*.safetensors` in the folder for weights
    saved = load_file(checkpoint / WEIGHTS)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    loss = verify(checkpoint).probe
    (checkpoint / PROBE).rename(checkpoint / OLD_PROBE)
    assert loss is not None
    assert verify(checkpoint).probe == loss


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("decoder.model.layers.1.ttt.W1"), "layers.1.ttt.W1 is missing: the configuration calls for it"),
        (lambda t: t.pop("decoder.model.layers.1.ttt_gate.gating_alpha"), "ttt_gate.gating_alpha is missing"),
        (lambda t: t.update({"decoder.model.layers.0.ttt.W1": torch.ones(1)}), "layers.0.ttt.W1 is unknown to this configuration"),
        (lambda t: t.update({"decoder.lm_head.weight": torch.ones(3, 32)}), r"lm_head.weight has shape \[3, 32\]; .* \[30, 32\]"),
        (lambda t: t["embed_tokens.2.weight"].fill_(float("inf")), "embed_tokens.2.weight holds 672 values that are NaN or infinite"),
        (lambda t: t["decoder.model.norm.weight"].mul_(2), "this is not the same model"),
    ],
)
def test_what_is_wrong_with_the_weights_is_named(checkpoint, edit, message):
    change(checkpoint, edit)
    with pytest.raises(ValueError, match=message):
        verify(checkpoint)


def test_what_is_wrong_with_the_files_is_named(checkpoint, capsys):
    write_manifest(checkpoint)
    (checkpoint / "notes.txt").write_text("new")
    with pytest.raises(ValueError, match="notes.txt is not in the manifest"):
        verify(checkpoint)
    (checkpoint / "notes.txt").unlink()
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(data[:-8])
    with pytest.raises(ValueError, match=f"{WEIGHTS} has {len(data) - 8} bytes, the manifest says {len(data)}"):
        verify(checkpoint)
    (checkpoint / "manifest.json").unlink()
    assert cli.main(["verify", str(checkpoint)]) == cli.FAILED
    assert f"error: {checkpoint / WEIGHTS} is no whole safetensors file" in capsys.readouterr().err
    (checkpoint / WEIGHTS).write_bytes(data)
    (checkpoint / "optimizer.pt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="optimizer.pt is a pickle: it will not be read"):
        verify(checkpoint)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        verify(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no config.json that says its model_type"):
        verify(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moshi"}))
    with pytest.raises(ValueError, match="holds a model of type 'moshi', not 'moshi_ttt'; turn it into one with: moshi-ttt convert"):
        verify(tmp_path)


def test_adapters_are_checked_with_their_base(checkpoint, tmp_path):
    adapted = save_adapter(tmp_path / "adapter", str(checkpoint))
    probe = make_probe(adapted.config)
    write_probe(tmp_path / "adapter", probe, probe_loss(adapted, probe))
    facts = verify(tmp_path / "adapter")
    assert (facts.kind, facts.base, facts.ttt_layers) == ("adapter", str(checkpoint), [1])
    assert set(facts.parameters) == {"ttt", "gates", "lora"}
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    for lost in ("decoder.model.layers.1.ttt.wq.bias", "decoder.model.layers.0.mlp.fc1.lora_B.weight"):
        save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(lost)}, weights)
        with pytest.raises(ValueError, match=f"{lost} is missing"):
            verify(tmp_path / "adapter")
    save_file({name.replace("layers.1.ttt", "layers.0.ttt"): tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(ValueError, match=r"the adapter is for TTT layers \[0\], its base .* has \[1\]"):
        verify(tmp_path / "adapter")
    save_file(tensors, weights)
    change(checkpoint, lambda tensors: tensors["decoder.model.norm.weight"].mul_(2))
    with pytest.raises(ValueError, match=f"not the same model; either the adapter or its base {checkpoint} has changed"):
        verify(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for wrong, message in (
        ({}, "adapter_config.json lacks peft_type, r, lora_alpha, target_modules"),
        ({**settings, "lora_alpha": None}, "adapter_config.json lacks lora_alpha"),
        ({**settings, "r": 5}, r"fc1.lora_A.weight has shape \[4, 32\]; the configuration asks for \[5, 32\]"),
        ({**settings, "peft_type": "CHARM"}, "adapter_config.json gives no adapter for its base: 'CHARM'"),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            verify(tmp_path / "adapter", run_probe=False)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="the adapter's base .*gone.* is missing"):
        verify(tmp_path / "adapter")


@pytest.mark.parametrize("start", ["fresh", "plain"])
def test_an_adapter_of_a_run_finds_its_base_by_the_runs_settings(tmp_path, start):
    """A run may start from a config.json, or put TTT layers on a base that has none: run.json beside the adapter tells."""
    ttt = {"ttt_layers": [1], "ttt_mixer": "linear"}
    base = small_model(ttt_layers=[])
    base.save_pretrained(tmp_path / "plain")
    base.config.save_pretrained(tmp_path / "config")
    path = tmp_path / "plain" if start == "plain" else tmp_path / "config" / "config.json"
    settings = ModelSettings(str(path), ttt=ttt, activation_checkpointing=False)
    model = build_model(settings, seed=3)
    adapted = modes.apply(model, "ttt")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.eval().save_pretrained(tmp_path / "final")
    probe = make_probe(model.config)
    write_probe(tmp_path / "final", probe, probe_loss(adapted, probe))
    with pytest.raises(ValueError, match=r"names no base model|the adapter is for TTT layers \[1\]"):
        verify(tmp_path / "final")
    (tmp_path / "final" / "run.json").write_text(json.dumps({"run": {"model": dataclasses.asdict(settings), "seed": 3}}))
    facts = verify(tmp_path / "final")
    assert (facts.kind, facts.ttt_layers) == ("adapter", [1])
    assert facts.probe is not None


@pytest.mark.parametrize("name", ["push", "pull", "convert"])
def test_the_scripts_are_the_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"hub/{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "hub" / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0
    assert f"usage: moshi-ttt {name}" in capsys.readouterr().out


def test_eight_bits_by_a_quantization_config(checkpoint):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao, an optional backend of quantization_config, is not installed")
    whole = AutoModel.from_pretrained(checkpoint).eval()
    small = AutoModel.from_pretrained(checkpoint, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())).eval()
    frames = random_frames(whole.config, 2, 12)
    with torch.no_grad():
        wanted, found = whole(**frames).logits, small(**frames).logits
    assert 0 < float((found - wanted).std() / wanted.std()) < 0.1
    assert small.new_stream().step(torch.zeros(1, 3, dtype=torch.long)).text.shape == (1,)


def test_the_card_template_is_shown_beside_them():
    assert (ROOT / "hub" / "model_card.md.jinja").read_text() == (Path(cli.__file__).parent / "hub" / "model_card.md.jinja").read_text()

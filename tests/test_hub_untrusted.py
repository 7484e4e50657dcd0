"""Checkpoints of strangers: bounded, compared with their files before anything is made, and without a say in what code runs."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from hub_checkpoints import save_checkpoint
from safetensors.torch import load_file, save_file

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor
from modeling_moshi_ttt.adapters.models import load_model
from modeling_moshi_ttt.common.files import write_manifest
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.hub.private import without_paths
from modeling_moshi_ttt.hub.verify import verify
from modeling_moshi_ttt.training.run_config import ModelSettings
from modeling_moshi_ttt.training.setup import build_model

ROOT = Path(__file__).parents[1]

HOME = "/" + "home"  # not as one word: the project holds no path of a machine


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_table_of_promises_names_tests_that_exist():
    named = re.findall(r"\| (tests/\w+\.py)::(\w+) \|", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**6), ("hidden_size", 10**400), ("ttt_layers", [0] * 200_000), ("ttt_layers", "0-999999999999"),
        ("ttt_layers", "0-" + "9" * 4000), ("audio_delays", [10**12] * 6), ("sliding_window", 10**12), ("ttt_mini_batch_size", 10**9),
        ("ttt_head_dim", 4096), ("num_labels", 10**9), ("silence_codes", [[0, 0, 0]] * 10**5), ("id2label", {str(i): "x" for i in range(10**5)}),
        ("_attn_implementation", "evil/kernel"), ("attn_implementation", "evil/kernel"), ("quantization_config", {"quant_method": "gptq"}),
        ("depth_decoder_config", {"num_hidden_layers": 10**6}), ("depth_decoder_config", {"_attn_implementation": "evil/kernel"}),
        ("num_codebooks", "3"), ("hidden_size", None), ("audio_encoder_config", {"model_type": "evil"}),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_configuration_is_bounded_and_chooses_no_code(checkpoint, field, value):
    edit(checkpoint / "config.json", **{field: value})
    start = time.process_time()
    with pytest.raises(MoshiTTTError, match="evil" if field == "audio_encoder_config" else field.strip("_")):
        MoshiTTTConfig.from_pretrained(checkpoint)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 1000),
        ("ffn_dim", 1 << 18),
        ("vocab_size", 1 << 20),
        ("ttt_mini_batch_size", 1 << 16),
        ("num_user_codebooks", 5),
    ],
)
def test_sizes_are_compared_with_headers_before_a_module_is_made(checkpoint, field, value, monkeypatch):
    delays = {"audio_delays": None, "silence_codes": None} if field == "num_user_codebooks" else {}
    edit(checkpoint / "config.json", **{field: value}, **({"depth_decoder_config": None} if field == "vocab_size" else {}), **delays)
    monkeypatch.setattr(MoshiTTTForConditionalGeneration, "__init__", lambda *_: pytest.fail("a module was made"))
    for read in (load_model, verify, lambda folder: build_model(ModelSettings(str(folder)), 0)):
        with pytest.raises(MoshiTTTError, match="the configuration"):
            read(checkpoint)


def test_a_checkpoint_that_contradicts_its_manifest_is_not_loaded(checkpoint):
    write_manifest(checkpoint)
    (checkpoint / "loss.png").write_bytes(b"of the user's")  # what the manifest does not name is no matter
    load_model(checkpoint)
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-6] ^= 32
    (checkpoint / "model.safetensors").write_bytes(weights)
    for read in (load_model, lambda folder: build_model(ModelSettings(str(folder)), 0)):
        with pytest.raises(MoshiTTTError, match=r"model\.safetensors has other contents than the manifest says"):
            read(checkpoint)


def test_weights_of_model_and_codec_are_real_numbers(checkpoint):
    for folder, name in (
        (checkpoint, "decoder.lm_head.weight"),
        (checkpoint / "audio_tokenizer", next(iter(load_file(checkpoint / "audio_tokenizer" / "model.safetensors")))),
    ):
        whole = load_file(folder / "model.safetensors")
        for wrong, message in (
            (whole[name] > 0, "holds BOOL"),
            (whole[name] * float("nan"), "NaN"),
            (whole[name][:1], "the configuration asks for"),
        ):
            save_file(whole | {name: wrong.contiguous()}, folder / "model.safetensors", {"format": "pt"})
            with pytest.raises(MoshiTTTError, match=message):
                verify(checkpoint)
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
    verify(checkpoint)
    edit(checkpoint / "audio_tokenizer" / "config.json", num_hidden_layers=10**6)
    with pytest.raises(MoshiTTTError, match="num_hidden_layers"):
        verify(checkpoint)
    with pytest.raises(MoshiTTTError, match="num_hidden_layers"):
        MoshiTTTProcessor.from_pretrained(checkpoint)


def test_weights_are_read_from_safetensors_alone(checkpoint):
    for folder, read in ((checkpoint, MoshiTTTForConditionalGeneration), (checkpoint / "audio_tokenizer", MoshiTTTProcessor)):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").rename(folder / "kept")
        with pytest.raises(MoshiTTTError, match="safetensors"):
            read.from_pretrained(checkpoint)
        (folder / "kept").rename(folder / "model.safetensors")


@pytest.mark.parametrize(
    "path",
    [HOME + "/alice/x/b.jsonl", "~/x/b.jsonl", "~alice/b.jsonl", "$HOME/x/b.jsonl", "${HOME}/b.jsonl", "C:\\Users\\alice\\b.jsonl", "C:/alice/b.jsonl"]
    + ["\\\\alice\\x\\b.jsonl", "file://" + HOME + "/alice/b.jsonl", "../../alice/b.jsonl", HOME + "/alice smith/my x/b.jsonl", "//alice/x/b.jsonl", "x/../../alice/b.jsonl"],
)  # fmt: skip
def test_no_path_of_a_machine_is_published(path):
    for text in (path, f"a.jsonl:1,{path}:2", f"train={path}", f"['{path}', 3]"):
        said = json.dumps(without_paths({text: [{"train": text}]}))
        assert "b.jsonl" in said
        assert not re.search(r"alice|home|HOME|Users", said), said
    for kept in ("kyutai/moshiko", "https://huggingface.co/a/b/c", "s3://bucket/x/y", "</s>", "km/h", "runs/x/y", "cuda:0", "1/2", "/"):
        assert without_paths(kept) == kept

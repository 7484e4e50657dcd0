"""What version 0.1.0 left on disk is read, gone on with and drawn by today's code: checkpoint, adapter, run folder, recipe, results, commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_moshi_ttt import cli

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "kept" / "v0.1.0"
# The losses that version 0.1.0 gave for `frames()`, in float32 on a CPU.
LOSS, TEXT_LOSS, ADAPTER_LOSS = 11.090940475463867, 6.238356113433838, 11.0908203125


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder as of 0.1.0: configuration and examples, and what it had written."""
    for name in ("configuration", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    shutil.move(tmp_path / "full", tmp_path / "final")
    (tmp_path / "full").mkdir()
    shutil.move(tmp_path / "final", tmp_path / "full" / "final")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def frames():
    time = torch.arange(70)
    text = (time * 7 % 512)[None]  # [1, 70]
    own, user = (torch.stack([(time * (start + k) + step * k) % 128 for k in range(8)])[None] for start, step in ((3, 1), (5, 2)))
    return {"input_ids": text, "moshi_audio_codes": own, "user_audio_codes": user, "text_labels": text, "audio_labels": own}


@torch.no_grad()
def test_checkpoint_and_adapter_give_the_losses_they_gave():
    model = AutoModel.from_pretrained(KEPT / "full").eval()
    output = model(**frames())
    assert output.loss.item() == pytest.approx(LOSS, rel=1e-6)
    assert output.text_loss.item() == pytest.approx(TEXT_LOSS, rel=1e-6)
    adapted = PeftModel.from_pretrained(model, KEPT / "adapter" / "final").eval()
    assert adapted(**frames()).loss.item() == pytest.approx(ADAPTER_LOSS, rel=1e-6)


def test_a_run_goes_on_to_its_end(work):
    before = (work / "adapter" / "metrics.jsonl").read_text()
    overrides = ["run_dir=adapter", "mode=lora+ttt", "model.path=full/final"]
    shutil.rmtree(work / "adapter" / "final")
    assert cli.main(["train", "recipe.yaml", *overrides]) == 0
    lines = (work / "adapter" / "metrics.jsonl").read_text()
    assert lines.startswith(before)
    assert [json.loads(line)["step"] for line in lines.splitlines() if "lr" in line] == [1, 2, 3, 4]
    final, kept = (load_file(run / "adapter" / "final" / "adapter_model.safetensors") for run in (work, KEPT))
    assert final.keys() == kept.keys()
    for name, weight in kept.items():  # near to where 0.1.0 ended: the weights of the objective's parts were mended in 0.2.0
        torch.testing.assert_close(final[name], weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize("file", ["adapter/metrics.jsonl", "evaluation/results.json", "recall/recall.json"])
def test_curves_and_results_are_drawn(work, file):
    assert cli.main(["plot", file]) == 0
    assert list((work / file).parent.rglob("*.png"))

"""`moshi-ttt export`: any checkpoint of a run as a model or adapter that loads, with the loss that the run logged for it."""

import contextlib
import json

import pytest
import torch
from accelerate import Accelerator
from hub_checkpoints import small_processor
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.common.files import check_manifest, read_log
from modeling_moshi_ttt.common.run_folder import CHECKPOINTS, METRICS
from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.checkpoint import CheckpointFolder

STEPS = 3


def train(folder, mode, **lora):
    """A short run of a base on disk; returns its trainer, by which others are evaluated."""
    base, held = folder / "base", folder / "held"
    run = make_run(
        folder / "run", mode, data={"evaluation": "unused"}, optim={"steps": STEPS, "lr": 0.01, "schedule": "constant"}, evaluate_every=1
    )
    run.checkpoint.every = 1
    run.checkpoint.keep = STEPS
    run.model.path = str(base)
    for name, value in lora.items():
        setattr(run.lora, name, value)
    recordings = make_recordings(folder / "codes", [24, 17, 24, 20], make_model().config)
    trainer = make_trainer(
        run, recordings, MoshiTTTForConditionalGeneration.from_pretrained(base), make_recordings(held, [12, 9], make_model().config)
    )
    trainer.fit()
    return trainer


@pytest.fixture
def base(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    small_processor().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loss_of(trainer, model):
    trainer.model = trainer.bare = model
    trainer.memory.model = model
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(("mode", "kind"), [("full", []), ("lora+ttt", []), ("lora+ttt", ["--merged"])])
def test_every_checkpoint_gives_the_loss_that_was_logged(tmp_path, base, mode, kind, capsys):
    trainer = train(tmp_path, mode)
    logged = {r["step"]: r["eval_loss"] for r in read_log(tmp_path / "run" / METRICS) if "eval_loss" in r}
    assert len({round(loss, 5) for loss in logged.values()}) == STEPS
    for step, loss in logged.items():
        assert main(["export", str(tmp_path / "run"), "--step", str(step), *kind]) == 0
        folder = tmp_path / "run" / "exports" / f"step-{step:08d}{'-merged' if kind else ''}"
        assert capsys.readouterr().out.splitlines()[-1] == str(folder)
        assert check_manifest(folder) == []
        assert json.loads((folder / "run.json").read_text())["step"] == step
        if mode == "full" or kind:
            model = MoshiTTTForConditionalGeneration.from_pretrained(folder)
        else:
            model = PeftModel.from_pretrained(MoshiTTTForConditionalGeneration.from_pretrained(base), folder)
        assert loss_of(trainer, model) == pytest.approx(loss, abs=1e-5 if kind else 1e-7)
        setup.read_processor(str(folder), "model.processor")


def test_the_best_checkpoint_and_bfloat16(tmp_path, base):
    trainer = train(tmp_path, "full")
    assert main(["export", str(tmp_path / "run"), "--best", "--dtype", "bfloat16", "--output", str(tmp_path / "best")]) == 0
    assert json.loads((tmp_path / "best" / "run.json").read_text())["step"] == trainer.progress.best_step
    assert {tensor.dtype for tensor in load_file(tmp_path / "best" / "model.safetensors").values()} == {torch.bfloat16}
    assert MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "best", dtype="auto").dtype == torch.bfloat16


def test_what_two_ranks_wrote_becomes_one_model(tmp_path, base):
    def work(rank):
        run = make_run(tmp_path / "run", "full", data={"batch_size": 1}, optim={"steps": 2}, checkpoint={"every": 1})
        run.model.path = str(base)
        recordings = make_recordings(tmp_path / f"codes{rank}", [24, 17, 24, 20], make_model().config)
        make_trainer(run, recordings, make_model(), accelerator=Accelerator()).fit()

    run_ranks(2, "fsdp", work)
    assert len(list(CheckpointFolder(tmp_path / "run" / CHECKPOINTS).path(2).glob("shard-*"))) == 2
    assert main(["export", str(tmp_path / "run")]) == 0
    model = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path / "run" / "exports" / "step-00000002")
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_adapter_of_embeddings_holds_no_second_copy_of_them(tmp_path, base):
    train(tmp_path, "lora", embeddings=True)
    assert main(["export", str(tmp_path / "run"), "--adapter", "--output", str(tmp_path / "adapter")]) == 0
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("embed_tokens.lora_embedding_A" in name for name in names)
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "7"], "`--step=7` must be one of 1, 2, 3"),
        (["--best", "--step", "1"], "not allowed with"),
        (["--adapter"], "trains every parameter (mode full), so there is no adapter"),
        (["--step", "2"], "checkpoint-00000002 is torn or altered"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, base, arguments, message, capsys):
    train(tmp_path, "full")
    (tmp_path / "run" / CHECKPOINTS / "checkpoint-00000002" / "state.json").write_text("{}")
    with pytest.raises(SystemExit) if "not allowed" in message else contextlib.nullcontext():
        assert main(["export", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "exports").exists()

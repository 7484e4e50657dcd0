"""One number is minimized, logged, and chooses the best checkpoint; numbers over nothing are null."""

import json
import logging

import pytest
import torch
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.common.files import read_log, write_manifest
from modeling_moshi_ttt.hub.card import summarize
from modeling_moshi_ttt.training.objective import objective
from modeling_moshi_ttt.training.report import plot_curve, shown

LENGTHS = [21, 13, 30, 9]
WEIGHT = 4.0


def trainer_for(folder, speechless=(), held_speechless=(), **changes):
    """A run whose text counts four times, on made-up recordings."""
    model = make_model()
    changes = {"evaluate_every": 2, "optim": {"steps": 4}, **changes}
    run = make_run(folder / "run", data={"text_weight": WEIGHT, "evaluation": "unused"}, **changes)
    train = make_recordings(folder / "codes", LENGTHS, model.config, speechless=speechless)
    return make_trainer(run, train, model, make_recordings(folder / "held", [10, 12], model.config, seed=9, speechless=held_speechless))


def records(folder):
    return read_log(folder / "run" / "metrics.jsonl")


def test_what_is_logged_is_what_is_minimized(tmp_path):
    """The losses that went backward, and the records of the same steps."""
    trainer, minimized = trainer_for(tmp_path), []
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss: (minimized.append(loss.item()), backward(loss))
    trainer.fit()
    trained = [r for r in records(tmp_path) if "loss" in r]
    assert [r["loss"] for r in trained] == pytest.approx(minimized)
    assert [r["loss"] for r in trained] == pytest.approx([WEIGHT * r["text_loss"] + r["audio_loss"] for r in trained])
    held = [r for r in records(tmp_path) if "eval_loss" in r]
    assert [r["eval_loss"] for r in held] == pytest.approx([WEIGHT * r["eval_text_loss"] + r["eval_audio_loss"] for r in held])


def test_the_best_checkpoint_is_the_best_by_the_objective(tmp_path):
    """Text improves by 1 where audio worsens by 2: worse as a plain sum, better by what is minimized."""
    trainer = trainer_for(tmp_path, evaluate_every=1, optim={"steps": 2})

    def made_up(model, inputs, output):
        if not model.training:
            text, audio = {1: (5.0, 5.0), 2: (4.0, 7.0)}[trainer.progress.step]
            output.text_loss, output.audio_loss = torch.tensor(text), torch.tensor(audio)

    trainer.model.register_forward_hook(made_up)
    trainer.fit()
    assert trainer.progress.best_step == 2
    assert trainer.progress.best_loss == pytest.approx(WEIGHT * 4.0 + 7.0)


def test_losses_over_no_words_are_null_everywhere(tmp_path):
    trainer, tracked = trainer_for(tmp_path, speechless=range(4), held_speechless=range(2)), []
    trainer.run.trackers, trainer.accelerator.log = ["made up"], lambda numbers, step: tracked.append(numbers)
    trainer.fit()
    assert len(tracked) == 6
    assert not any("text" in name for numbers in tracked for name in numbers)  # trackers take numbers alone
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"text_loss": null' in lines
    for record in records(tmp_path):
        if "loss" in record:
            assert record["text_loss"] is None
            assert record["loss"] == record["audio_loss"] > 0
        else:
            assert record["eval_text_loss"] is None
            assert record["eval_text_accuracy"] is None
            assert record["eval_loss"] == record["eval_audio_loss"] > 0
    assert trainer.progress.best_step in (2, 4)
    plot_curve(tmp_path / "run" / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "last_text_loss" not in summarize(tmp_path / "run" / "metrics.jsonl")


def test_a_run_over_nothing_at_all_is_null_and_has_no_best(tmp_path):
    """No label in any window: what a step of empty windows gives."""
    trainer = trainer_for(tmp_path)

    class Silent(type(trainer.reader)):
        def __getitem__(self, windows):
            batch = super().__getitem__(windows)
            batch.text_labels, batch.audio_labels = (torch.full_like(x, -100) for x in (batch.text_labels, batch.audio_labels))
            batch.attention_mask = torch.zeros_like(batch.attention_mask)
            return batch

    trainer.reader = Silent(trainer.reader.recordings, trainer.config.audio_delays, trainer.config.num_codebooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_moshi_ttt.training.trainer.WindowReader", Silent)
        trainer.fit()
    for record in records(tmp_path):
        names = ("loss", "text_loss", "audio_loss", "tokens_per_second") if "loss" in record else tuple(set(record) - {"step"})
        assert {record[name] for name in names} == {None}
    assert trainer.progress.best_step is None
    assert trainer.progress.bad_steps == 0


def test_objective_and_shown():
    assert objective(2.0, 3.0, 4.0) == 11.0
    assert objective(None, 3.0, 4.0) == 3.0
    assert objective(2.0, None, 4.0) == 8.0
    assert objective(None, None, 4.0) is None
    assert (shown(None, ".3f"), shown(0.0, ".1f")) == ("-", "0.0")


def test_a_run_of_version_0_1_0_goes_on_and_says_what_changed(tmp_path, caplog):
    """Its checkpoints name no version, its best was chosen by text + audio, and its settings lack what came later."""

    class Killed(BaseException):
        pass

    def stop(*_):
        raise Killed

    settings = {"optim": {"steps": 4, "warmup": 0.5}, "checkpoint": {"every": 1, "keep": 9}}
    unbroken = trainer_for(tmp_path / "a", **settings)
    unbroken.fit()
    old = trainer_for(tmp_path / "b", **settings)
    after = type(old)._after_step
    old._after_step = lambda metrics: (after(old, metrics), stop() if old.progress.step == 3 else None)
    with pytest.raises(Killed):
        old.fit()
    newest = old.folder.newest()
    state = json.loads((newest / "state.json").read_text())
    assert state.pop("version")
    state["progress"] |= {"best_step": 2, "best_loss": 1.0}
    (newest / "state.json").write_text(json.dumps(state))
    write_manifest(newest)
    config = json.loads((tmp_path / "b" / "run" / "run_config.json").read_text())
    del config["fixed"]["optim.max_bad_steps"]
    (tmp_path / "b" / "run" / "run_config.json").write_text(json.dumps(config))
    again = trainer_for(tmp_path / "b", **settings)
    with caplog.at_level(logging.WARNING):
        again.fit()
    assert "written by version 0.1.0" in caplog.text
    assert "beta1" in caplog.text
    assert again.progress.best_step == 4
    assert again.progress.best_loss == pytest.approx([r["eval_loss"] for r in records(tmp_path / "b") if "eval_loss" in r][-1])
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, dict(unbroken.model.named_parameters())[name]), name

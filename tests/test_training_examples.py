"""The example scripts run as they stand."""

import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from hub_checkpoints import small_model as any_small_model
from hub_checkpoints import small_processor
from test_training_data import make_source
from transformers import AutoModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def small_model():
    """One that says nothing which the small processor does not know."""
    return any_small_model(vocab_size=28, audio_vocab_size=16)


def load(name):
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """A model, its processor and three short noises with words."""
    small_model().save_pretrained(tmp_path / "base")
    small_processor().save_pretrained(tmp_path / "base")
    make_source(tmp_path / "sound", ["a", "b"])
    return tmp_path


def test_transformers_trainer_trains_the_model(folder, monkeypatch, capsys):
    arguments = ["--config", "base/config.json", "--processor", "base", "--manifest", "sound/data.jsonl", "--output", "out", "--steps", "3"]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["trainer.py", *arguments, "--batch", "1", "--accumulation", "2"])
    load("trainer").main()
    first, last = capsys.readouterr().out.split("loss ")[-1].split(";")[0].split(" -> ")
    assert float(last) < float(first)
    AutoModel.from_pretrained(folder / "out")


def test_talk_says_what_it_knows_and_fails_below_the_marks(folder, monkeypatch, capsys):
    talk = load("talk")
    reply = folder / "reply.wav"
    monkeypatch.setattr(sys, "argv", ["talk.py", str(folder / "base"), str(folder / "sound" / "data.jsonl"), "--reply", str(reply)])
    assert talk.main() == 0
    out = capsys.readouterr().out
    assert "led by the true past" in out
    assert "real-time factor" in out
    assert reply.stat().st_size > 20000
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--led", "0.95"])
    assert talk.main() == 1
    assert "error: it should know 95%" in capsys.readouterr().err


def test_live_and_batched_answers_are_the_same(folder):
    """Listening sample by sample gives the words of listening to stored codes."""
    talk = load("talk")
    model, processor = small_model().eval(), small_processor()
    recording = talk.read_manifest(folder / "sound" / "data.jsonl")[0]
    text, sound, _ = talk.converse(model, processor, recording)
    batched = talk.answer_freely(model, [talk.frames_of(processor, recording)])[0]
    assert torch.equal(text, batched[: len(text)])
    assert len(sound) == len(text) * processor.frame_size


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trainer.py --processor base --config base/config.json --manifest gone.jsonl", "gone.jsonl: there is no such manifest"),
        ("trainer.py --processor gone", "--processor is gone: there is no such folder"),
        ("trainer.py --processor base --config gone.json", "gone.json"),
        ("talk.py base gone.jsonl", "gone.jsonl: there is no such manifest"),
        ("talk.py gone sound/data.jsonl", "the model is gone: there is no such folder"),
        ("talk.py base sound/data.jsonl --dialogue 2", "--dialogue is 2; sound/data.jsonl holds 0 to 1"),
        ("finetune.py gone.yaml", "gone.yaml: there is no such settings file"),
        ("demo.py seed=1", "configuration/train/demo.yaml: there is no such settings file"),
        ("evaluate_demo.py output=base", "base is there and holds no .evaluate-demo"),
        ("train_tiny_codec.py --work base/config.json", "--work is base/config.json, where no folder can be made"),
        ("train_tiny_codec.py --steps 0", "--steps 0; both must be above 0"),
    ],
)
def test_a_users_mistake_is_one_line(folder, monkeypatch, capsys, command, message):
    script, *arguments = command.split()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MOSHI_TTT_DEBUG", raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_share_in_order():
    talk = load("talk")
    assert talk.share_in_order(list("abcd"), list("xacbd")) == 0.75
    assert talk.share_in_order(["a"], []) == 0.0

"""Bare names: what comes with the package is found from any folder, and what exists on the disk goes before it."""

import json
import shutil
from pathlib import Path

import pytest
from tree import ROOT

from modeling_moshi_ttt import cli, packaged
from modeling_moshi_ttt.common.packaged import names, resolve
from modeling_moshi_ttt.data.recordings import read_manifest
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.data.sources import read_sources
from modeling_moshi_ttt.evaluation.evaluate import EvaluateSettings
from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.run_config import load_run_config

KINDS = ("train", "evaluate", "accelerate", "model", "processor", "data")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_a_path_from_anywhere(kind):
    assert names(kind)
    for name in names(kind):
        assert Path(packaged(kind, name)).exists()
        assert resolve(kind, name) == packaged(kind, name)


def test_the_names_are_of_the_files_in_the_repository():
    for kind in ("train", "evaluate", "accelerate"):
        assert names(kind) == sorted(path.stem for path in (ROOT / "configuration" / kind).glob("*.yaml"))
    assert names("model") == ["remembering", "spoken_recall", "tiny"]
    assert names("processor") == ["remembering", "tiny"]
    assert sorted(names("data")) == ["dialogues", "dialogues/eval", "dialogues/train"]


def test_what_is_not_packaged_is_refused_with_what_is():
    with pytest.raises(ValueError, match=r"`name=lora7b` .* did you mean 'lora_7b'\? The package holds demo, full_8gpu,"):
        packaged("train", "lora7b")
    with pytest.raises(ValueError, match=r"`name=\.\./train/demo` is no packaged evaluate file"):
        packaged("evaluate", "../train/demo")
    with pytest.raises(ValueError, match="`kind=recipe` must be one of train, evaluate"):
        packaged("recipe", "demo")


@pytest.mark.parametrize("kind", ["model", "processor", "data"])
def test_a_folder_that_exists_goes_before_a_bare_name(kind, elsewhere):
    name = names(kind)[0]
    (elsewhere / name).mkdir()
    assert resolve(kind, name) == name
    assert resolve(kind, "owner/name") == "owner/name"


def test_a_folder_is_not_in_the_way_of_a_recipe_but_a_file_is(elsewhere):
    (elsewhere / "demo").mkdir()
    assert load_run_config("demo").run_dir == "runs/demo"
    (elsewhere / "demo").rmdir()
    shutil.copyfile(packaged("train", "lora_7b"), elsewhere / "demo")
    assert load_run_config("demo").run_dir == "runs/lora_7b"


@pytest.mark.parametrize("recipe", names("train"))
def test_recipes_are_read_by_name(recipe):
    assert load_run_config(recipe).to_dict() == load_run_config(str(ROOT / "configuration" / "train" / f"{recipe}.yaml")).to_dict()


def test_what_the_demonstration_names_is_there():
    run = load_run_config("demo")
    assert setup.build_model(run.model, 0).config.ttt_layers == [1, 2]
    assert setup.load_processor(run.model).sampling_rate == 24000
    problems: list[str] = []
    counts = [
        len(read_sources(text, DataSettings(train=text), Path("store"), problems)[0].recordings) for text in (run.data.train, "dialogues:2")
    ]
    assert (counts, problems) == ([8, 10], [])
    assert len(read_manifest(run.data.evaluation)) == 2


def test_a_fresh_start_needs_a_processor_by_either_name():
    for path in ("tiny", packaged("model", "tiny")):
        with pytest.raises(ValueError, match=r"model\.processor is missing"):
            setup.load_processor(setup.ModelSettings(path=path))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "train dmeo",
            "dmeo: there is no such settings file; . holds no .yaml file, and the package none of this name; did you mean 'demo'?",
        ),
        (
            "train lora7.yaml",
            "did you mean 'lora_7b'? The package holds demo, full_8gpu, long_context_lanes, lora_7b, lora_ttt_7b, spoken_recall, ttt_7b.",
        ),
        ("train some/where/full-8gpu.yaml", "did you mean 'full_8gpu'?"),
        ("train recall", "recall: there is no such settings file"),
        ("evaluate recal", "did you mean 'recall'? The package holds dialogue, long_context, recall, spoken_recall, zero_shot."),
        ("evaluate recall dialog model=x", "did you mean 'dialogue'?"),
        (
            "train demo --launch onegpu",
            "--launch is onegpu: there is no such file, and the package holds none of this name; did you mean 'one_gpu'?",
        ),
        ("train demo --launch cpu optim.ler=1", "demo: unknown key 'optim.ler'; did you mean 'optim.lr'?"),
    ],
)
def test_a_name_that_is_none_is_one_line_with_the_nearest(command, message, capsys, elsewhere):
    assert cli.main(command.split()) == cli.FAILED
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert message in said
    assert list(elsewhere.iterdir()) == []


def test_launch_starts_the_processes_of_an_accelerate_configuration(monkeypatch, capfd):
    """Two of them, by its bare name, with key=value on both sides of the option; each says what it is told wrong."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = json.dumps(["tensorbord"])
    assert cli.main(["train", "demo", f"trackers={settings}", "--launch", "cpu_2", "optim.steps=1"]) != 0
    assert capfd.readouterr().err.count("error: trackers holds 'tensorbord'") == 2


def test_init_writes_copies_and_says_what_is_next(elsewhere, capsys):
    assert cli.main(["init", "a folder"]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = elsewhere / "a folder"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(int(line.split(": ")[1].split()[0]) for line in said[:-1]) == len(written)
    assert all(path.read_bytes() == (ROOT / path.relative_to(folder)).read_bytes() for path in written)
    assert {path.parent.name for path in written} >= {
        "train",
        "evaluate",
        "accelerate",
        "model",
        "tiny",
        "audio_tokenizer",
        "examples",
        "stereo",
    }
    assert said[-1].startswith("next: cd 'a folder', then python examples/demo.py")
    assert load_run_config(str(folder / "configuration" / "train" / "demo.yaml")).run_dir == "runs/demo"


def test_init_leaves_folders_that_hold_something_alone(elsewhere, capsys):
    (elsewhere / "mine").touch()
    assert cli.main(["init", "."]) == cli.FAILED
    assert capsys.readouterr().err == "error: FOLDER is ., which is not empty; name a new or an empty folder.\n"
    assert cli.main(["init", "mine"]) == cli.FAILED
    assert "FOLDER is mine, where no folder can be made" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_evaluation_reads_its_manifest_by_name():
    from modeling_moshi_ttt.common.settings import load_settings
    from modeling_moshi_ttt.evaluation import inputs

    section = load_settings(EvaluateSettings, "dialogue", ["dialogue.max_recordings=1"], kind="evaluate").dialogue
    assert [recording.path.stem for recording in inputs.dialogues(section)] == [read_manifest("dialogues/eval")[0].path.stem]

"""Every command that asks for a model takes a run's folder for its `final`, and says so."""

import shutil
from pathlib import Path

import pytest

from modeling_moshi_ttt import packaged
from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.common.run_folder import FINAL, RUN_CONFIG, final_of
from modeling_moshi_ttt.conversion import convert
from modeling_moshi_ttt.evaluation.subject import ModelSettings, Subject
from modeling_moshi_ttt.hub.stage import locate
from modeling_moshi_ttt.live.loading import load_model
from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.run_config import load_run_config
from modeling_moshi_ttt.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a model."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    shutil.copytree(packaged("model", "remembering"), folder / FINAL)
    shutil.copytree(
        Path(packaged("processor", "tiny"), "audio_tokenizer"), folder / "tiny" / "audio_tokenizer"
    )  # where its processor looks for the codec
    (folder / RUN_CONFIG).write_text("{}")
    return folder


def told(capsys, run):
    """Whether it was said, once."""
    return capsys.readouterr().err.count(f"{run} is the folder of a run: its 'final' is taken") == 1


def test_talk_serve_and_respond(run, capsys):
    assert load_model(str(run), None)[0].config.model_type == "moshi_ttt"
    assert told(capsys, run)


def test_evaluate_and_recall(run, capsys):
    assert Subject(ModelSettings(model=str(run))).folder == run / FINAL
    assert told(capsys, run)


def test_verify(run, capsys):
    assert main(["verify", str(run), "--no-probe"]) == 0
    assert told(capsys, run)


def test_convert(run, capsys):
    assert convert._local(str(run), None) == run / FINAL
    assert told(capsys, run)


def test_push(run):
    assert locate(run) == (run / FINAL, run)


def test_train(run, capsys, monkeypatch):
    class Seen(Exception):
        pass

    def stop(settings):
        raise Seen(settings.path)

    monkeypatch.setattr(setup, "model_config", stop)
    with pytest.raises(Seen, match=str(run / FINAL)):
        train(load_run_config("demo", [f"model.path={run}"]))
    assert told(capsys, run)


def test_a_run_without_final_is_named_with_the_way_on(run, tmp_path):
    shutil.copy(run / RUN_CONFIG, tmp_path / RUN_CONFIG)
    with pytest.raises(FileNotFoundError, match="has no 'final' yet; let it end, or take a checkpoint of it with `moshi-ttt export"):
        final_of(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_checkpoint_is_itself_whatever_lies_beside_it(run, tmp_path, name):
    shutil.copy(run / RUN_CONFIG, tmp_path / RUN_CONFIG)
    (tmp_path / name).write_text("{}")
    assert final_of(tmp_path) == tmp_path
    assert final_of(Path("nowhere")) == Path("nowhere")

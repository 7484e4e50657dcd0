"""Trackers by name: each is started with the run's settings and gets the logged numbers; one that is missing is named before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.common.files import read_log
from modeling_moshi_ttt.training import report, setup

# What accelerate calls of wandb and of trackio, under their names: all of it is written down.
STAND_IN = """
import json, pathlib
heard = {"init": None, "config": {}, "log": [], "finished": False}
class Settings:
    def update(self, values, allow_val_change):
        heard["config"].update(values)
class Run:
    def log(self, values, step=None):
        heard["log"].append({"step": step, **values})
    def finish(self):
        heard["finished"] = True
        pathlib.Path(f"{__name__}.heard.json").write_text(json.dumps(heard))
config = Settings()
def init(**options):
    heard["init"] = options
    return Run()
"""
TRAIN = """
import sys
sys.path.insert(0, TESTS)
from pathlib import Path
from training_runs import make_model, make_recordings, make_run, make_trainer
from modeling_moshi_ttt.training import report, setup
run = make_run(Path("run"), trackers=["wandb", "trackio"], optim={"steps": 3}, evaluate_every=3, data={"evaluation": "unused"})
accelerator = setup.make_accelerator(run)
report.start_trackers(accelerator, run.trackers, Path(run.run_dir), run.to_dict())
recordings = make_recordings(Path("codes"), [20, 9], make_model().config)
make_trainer(run, recordings, held_out=recordings, accelerator=accelerator).fit()
accelerator.end_training()
"""


def told(folder):
    """What the run itself wrote down, as trackers get it."""
    return [{name: float(value) for name, value in record.items()} for record in read_log(folder / "metrics.jsonl")]


def test_wandb_and_trackio_get_settings_and_numbers(tmp_path):
    """In a process of its own, with packages of these names in which accelerate's own trackers write."""
    for name in ("wandb", "trackio"):
        (tmp_path / "site" / f"{name}-9.9.dist-info").mkdir(parents=True)
        (tmp_path / "site" / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
        (tmp_path / "site" / f"{name}.py").write_text(STAND_IN)
    script = TRAIN.replace("TESTS", repr(str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = told(tmp_path / "run")
    assert len(records) == 4
    for name, options in (("wandb", {"dir": "run"}), ("trackio", {})):
        heard = json.loads((tmp_path / f"{name}.heard.json").read_text())
        assert heard["init"] == {"project": "tracking", "name": "run", **options}
        assert heard["config"]["optim.lr"] == 1e-3
        assert heard["config"]["data.window_seconds"] == 8 / 12.5
        assert heard["log"] == records
        assert heard["finished"]


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is no part of the dev extra: it brings twenty packages along")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = make_run(tmp_path / "run", trackers=["wandb"], optim={"steps": 2})
    report.check_trackers(run.trackers)
    accelerator = Accelerator(cpu=True, log_with=run.trackers)
    report.start_trackers(accelerator, run.trackers, tmp_path / "run", run.to_dict())
    recordings = make_recordings(tmp_path / "codes", [20, 9], make_model().config)
    make_trainer(run, recordings, accelerator=accelerator).fit()
    tracker = accelerator.get_tracker("wandb", unwrap=True)
    assert tracker.name == "run"
    assert tracker.config["optim.lr"] == 1e-3
    first = told(tmp_path / "run")[0]  # wandb takes a step's numbers in when the next step comes, or at the end
    assert {name: tracker.summary[name] for name in first if name != "step"} == {name: first[name] for name in first if name != "step"}
    assert tracker.step == 2
    accelerator.end_training()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(report, "get_available_trackers", list)
    with pytest.raises(ValueError, match=f"trackers holds '{name}', but the package {name} is not installed: pip install {name}"):
        setup.make_accelerator(make_run(tmp_path / "run", trackers=[name]))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_says_why(tmp_path):
    class Unwilling:
        def init_trackers(self, *_):
            raise RuntimeError("api_key not configured (no-tty), call wandb.login()")

    with pytest.raises(ValueError, match=r"trackers is \['wandb'\] and does not start: api_key not configured.*trackers=\[\]"):
        report.start_trackers(Unwilling(), ["wandb"], tmp_path, {})

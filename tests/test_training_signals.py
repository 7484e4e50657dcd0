"""SIGTERM, SIGUSR1 and Ctrl-C end a run after its step, saved; a folder belongs to one process at a time."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_training_loop import equal, long_run, told, weights
from test_training_ranks import assert_same, result, train

from modeling_moshi_ttt.common.lock import LOCK, locked
from modeling_moshi_ttt.training.signals import RunStopped, stop_requests
from modeling_moshi_ttt.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
NEVER = {"every": 0}  # no checkpoint but those that a signal asks for


def signalled_run(folder, number, seconds):
    """Run in a forked process and send it a signal `seconds` after it began to train; its exit code."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            trainer = long_run(folder, checkpoint=NEVER)
            with stop_requests() as request:
                os.write(writing, b"1")
                trainer.fit(request)
            code = 0
        except RunStopped as stopped:
            code = stopped.exit_code
        finally:
            os._exit(code)
    os.read(reading, 1)
    time.sleep(seconds)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_sigterm_at_random_moments_loses_no_step(tmp_path, moments):
    unbroken = long_run(tmp_path / "a", checkpoint=NEVER)
    begin = time.monotonic()
    unbroken.fit()
    took = time.monotonic() - begin
    random = torch.Generator().manual_seed(0)
    runs, stopped = 1, 0
    while stopped < moments:
        folder = tmp_path / f"{runs}"
        number = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[stopped % 3]
        code = signalled_run(folder, number, float(torch.rand(1, generator=random)) * 0.5 * took)
        if code == 0:  # it came to its end: the signals go on with another run
            runs += 1
            continue
        assert code == 128 + number
        stopped += 1
        trained = [record["step"] for record in told(folder / "run") if "loss" in record]
        assert trained == list(range(1, trained[-1] + 1))
        assert long_run(folder).folder.steps()[-1] == trained[-1]  # the step that was being made is saved
    for folder in (tmp_path / f"{run + 1}" for run in range(runs)):
        last = long_run(folder, checkpoint=NEVER)
        last.fit()
        assert equal(weights(last), weights(unbroken))
        assert told(folder / "run") == told(tmp_path / "a" / "run")


def test_one_rank_that_is_told_stops_them_all(tmp_path, monkeypatch):
    """A launcher tells every process at its own moment; they must agree on the step."""
    clip = Trainer._clip

    def told_in_step_2(self):
        if self.accelerator.process_index == 1 and self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(self)

    def work(rank):
        monkeypatch.setattr(Trainer, "_clip", told_in_step_2)
        fit = Trainer.fit

        def fit_under_signals(self):
            with stop_requests() as request:
                return fit(self, request)

        monkeypatch.setattr(Trainer, "fit", fit_under_signals)
        with pytest.raises(RunStopped, match="SIGTERM: stopped after step 3 of 5") as stopped:
            train(tmp_path / "b", rank, 2, "ddp")
        assert stopped.value.exit_code == 128 + signal.SIGTERM

    train(tmp_path / "a", 0, 1, "one")
    run_ranks(2, "ddp", work)
    run_ranks(2, "ddp", lambda rank: train(tmp_path / "b", rank, 2, "ddp"))
    assert_same(result(tmp_path / "b"), result(tmp_path / "a"))


def test_the_second_ctrl_c_does_not_wait():
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_folder_in_use_names_its_holder(tmp_path):
    code = (
        "import sys, pathlib\nfrom modeling_moshi_ttt.common.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'run_dir'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(OSError, match=rf"`run_dir={tmp_path}` is in use by process {other.pid} on .*; wait for it"),
            locked(tmp_path, "run_dir"),
        ):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path, "run_dir"):  # a kill lets go of it
            pass


def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path):
    reading, writing = os.pipe()
    with locked(tmp_path, "run_dir"):
        worker = os.fork()
        if worker == 0:
            os.write(writing, b"1")
            time.sleep(20)
            os._exit(0)
        os.read(reading, 1)
    try:
        handle = os.open(tmp_path / LOCK, os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)

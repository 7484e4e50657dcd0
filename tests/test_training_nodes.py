"""Two machines of two processes each, as examples/slurm.sh starts them, here on one: one machine dies, both start again."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import node
import psutil
import pytest
import torch
from accelerate import Accelerator
from ranks import run_ranks
from safetensors.torch import load_file

from modeling_moshi_ttt.training.checkpoint import CheckpointFolder

ROOT = Path(__file__).parents[1]


def launch(folder, machine, port):
    """One machine's launcher with the multi-node file."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--num_machines", "2", "--num_processes", "4"]
    command += ["--config_file", str(ROOT / "configuration" / "accelerate" / "fsdp2_multi_node.yaml"), "--machine_rank", str(machine)]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), str(Path(node.__file__)), str(folder)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = (folder / f"node{machine}.log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def kill(machine):
    """The launcher and its processes, which have sessions of their own, all at once as a power cut does."""
    for process in [*psutil.Process(machine.pid).children(recursive=True), machine]:
        process.kill()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition, processes, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "a launcher has ended"
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_machine_that_dies_costs_no_step_but_the_one_it_was_in(tmp_path):
    (tmp_path / "b").mkdir()
    checkpoints = CheckpointFolder(tmp_path / "b" / "run" / "checkpoints")
    port = free_port()
    nodes = [launch(tmp_path / "b", machine, port) for machine in range(2)]
    try:
        wait_for(lambda: checkpoints.steps() and checkpoints.steps()[-1] >= 2, nodes)
        kill(nodes[1])
        assert nodes[0].wait(120) != 0  # its processes lost their peers
        reached = checkpoints.steps()[-1]
        assert not (tmp_path / "b" / "weights.safetensors").exists()
        port = free_port()
        nodes = [launch(tmp_path / "b", machine, port) for machine in range(2)]
        assert [process.wait(240) for process in nodes] == [0, 0], (tmp_path / "b" / "node0.log").read_text()[-3000:]
    finally:
        for process in nodes:
            if process.poll() is None:
                kill(process)
    assert 2 <= reached < node.STEPS
    (tmp_path / "a").mkdir()
    run_ranks(4, "fsdp", lambda rank: node.train(tmp_path / "a", Accelerator()))
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

"""One seed, one model: what is fresh is the same tensor in every process and on every rank."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from ranks import FSDP, run_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from training_runs import make_recordings, make_run, make_trainer

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training import modes, setup
from modeling_moshi_ttt.training.run_config import LoraSettings, ModelSettings

TTT = {"ttt_layers": "all", "ttt_mixer": "mlp"}


def plain_moshi(folder: Path) -> str:
    """A checkpoint without TTT layers."""
    torch.manual_seed(3)
    MoshiTTTForConditionalGeneration(tiny_config(ttt_layers=[])).save_pretrained(folder / "plain")
    return str(folder / "plain")


def build(plain: str, seed: int):
    """As a run builds it: fresh TTT layers on a plain checkpoint, LoRA everywhere."""
    model = setup.build_model(ModelSettings(path=plain, ttt=TTT, activation_checkpointing=False), seed)
    run = make_run("unused", "lora+ttt", seed=seed)
    run.lora = LoraSettings(rank=2, depth_decoder=True, embeddings=True)
    return setup.adapt(model, run), run


def hashes(model) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in model.state_dict().items()}


def every_fresh_model(plain: str) -> dict[str, dict[str, str]]:
    """Hashes of every tensor of what can be made anew."""
    made = {"run": hashes(build(plain, 7)[0]), "other seed": hashes(build(plain, 8)[0])}
    torch.manual_seed(7)
    made["from_pretrained"] = hashes(MoshiTTTForConditionalGeneration.from_pretrained(plain, **TTT))
    torch.manual_seed(7)
    made["configuration"] = hashes(MoshiTTTForConditionalGeneration(MoshiTTTConfig.from_pretrained(plain, **TTT)))
    return made


def test_two_processes_make_the_same_model(tmp_path):
    """Each with an order of sets of its own, and after another number of draws."""
    plain = plain_moshi(tmp_path)
    script = "import json, sys, torch, test_training_seed as t; torch.rand(int(sys.argv[2])); json.dump(t.every_fresh_model(sys.argv[1]), open(sys.argv[3], 'w'))"
    here = str(Path(__file__).parent)
    children = []
    for number in (1, 2):
        environment = os.environ | {"PYTHONHASHSEED": str(number), "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-c", script, plain, str(number), str(tmp_path / f"{number}.json")]
        children.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=Path(here).parent))
    for child in children:
        _, words = child.communicate()
        assert child.returncode == 0, words
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert one == two
    # the comparison would see another seed: in every fresh matrix, and in no tensor of the checkpoint
    differ = {name for name, value in one["run"].items() if value != one["other seed"][name]}
    assert any(name.endswith("ttt.modules_to_save.default.W1") for name in differ)
    assert any(".lora_A." in name for name in differ)
    assert all(modes.is_ttt_parameter(name) or ".lora_" in name for name in differ)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_make_the_same_model(tmp_path, kind):
    """What each of them made, and what the whole tensors are that they hold in shards."""
    plain = plain_moshi(tmp_path)

    def work(rank):
        torch.rand(rank + 1)  # ranks come here after unequal numbers of draws
        model = setup.build_model(ModelSettings(path=plain, ttt=TTT, activation_checkpointing=False), 7)
        run = make_run(tmp_path / "run", "lora+ttt", seed=7)
        recordings = make_recordings(tmp_path / f"codes{rank}", [9, 9, 9, 9], model.config)
        trainer = make_trainer(run, recordings, model, accelerator=Accelerator(cpu=kind != "fsdp"))
        whole = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
        save_file(whole, tmp_path / f"{rank}.safetensors")

    run_ranks(2, kind, work)
    model = setup.build_model(ModelSettings(path=plain, ttt=TTT, activation_checkpointing=False), 7)
    expected = setup.adapt(model, make_run(tmp_path, "lora+ttt", seed=7)).state_dict()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("mode", ["full", "lora+ttt"])
def test_one_rank_reads_the_weights_and_sends_them(tmp_path, monkeypatch, mode):
    """As the FSDP launch files say: the other rank holds nothing until it gets its shards, of fresh TTT layers and LoRA too."""
    plain = plain_moshi(tmp_path)
    monkeypatch.setitem(FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING", "true")

    def work(rank):
        accelerator = Accelerator()
        empty = setup.is_sent_weights(accelerator)
        assert empty == (rank == 1)
        model = setup.build_model(ModelSettings(path=plain, ttt=TTT, activation_checkpointing=False), 7, empty)
        run = make_run(tmp_path / "run", mode, optim={"steps": 2}, seed=7)
        recordings = make_recordings(tmp_path / f"codes{rank}", [9, 9, 9, 9], model.config)
        assert all(p.is_meta == empty for p in setup.adapt(model, run).parameters())
        model = setup.build_model(ModelSettings(path=plain, ttt=TTT, activation_checkpointing=False), 7, empty)
        trainer = make_trainer(run, recordings, model, accelerator=accelerator)
        options = StateDictOptions(full_state_dict=True)
        save_file(get_model_state_dict(trainer.model, options=options), tmp_path / f"{rank}.safetensors")
        trainer.fit()
        assert trainer.progress.bad_steps == 0

    run_ranks(2, "fsdp", work)
    model = setup.build_model(ModelSettings(path=plain, ttt=TTT, activation_checkpointing=False), 7)
    expected = setup.adapt(model, make_run(tmp_path, mode, seed=7)).state_dict()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())

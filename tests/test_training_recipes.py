"""Every recipe and launch file loads, and the tiny model is built by it; settings that make no sense are refused by name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from modeling_moshi_ttt.tokens_moshi_ttt import FRAME_RATE
from modeling_moshi_ttt.training import modes, setup
from modeling_moshi_ttt.training.run_config import load_run_config
from modeling_moshi_ttt.training.train import train

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configuration" / "train").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "configuration" / "accelerate").glob("*.yaml"))
TINY = str(ROOT / "configuration" / "model" / "tiny.json")


def test_all_recipes_are_there():
    names = {path.stem for path in RECIPES}
    assert {"demo", "lora_7b", "ttt_7b", "lora_ttt_7b", "full_8gpu", "long_context_lanes"} <= names
    assert {"cpu", "one_gpu", "ddp", "fsdp2_8gpu", "fsdp2_multi_node"} <= {path.stem for path in LAUNCHES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_the_tiny_model(path):
    run = load_run_config(str(path), [f"model.path={TINY}"])
    if run.model.ttt.get("ttt_layers"):
        run.model.ttt["ttt_layers"] = "last:2"
    model = setup.build_model(run.model, run.seed)
    adapted = setup.adapt(model, run)
    groups = modes.parameter_groups(adapted.named_parameters(), run.optim)
    assert sum(p.numel() for group in groups for p in group["params"]) > 0
    assert model.config.ttt_layers == ([] if run.mode == "lora" else model.config.ttt_layers)
    if run.model.ttt.get("ttt_layers") and not run.curriculum:  # no mini-batch is torn by the end of a window
        assert (
            round(run.data.window_seconds * FRAME_RATE) % model.config.ttt_mini_batch_size == 0 or "each is one window" in path.read_text()
        )
    (recipe, launch) = re.search(r"#   moshi-ttt train (\w+) --launch (\w+)\n", path.read_text()).groups()
    assert recipe == path.stem
    assert launch in {other.stem for other in LAUNCHES}


def test_a_recipe_sets_the_weights_of_the_losses():
    """0 for padding leaves the words, 100 times less for the first codebook is its part of the loss alone."""
    demo = str(ROOT / "configuration" / "train" / "demo.yaml")
    kept, changed = (
        setup.build_model(load_run_config(demo, [f"model.path={TINY}", *weights]).model, 0)
        for weights in ([], ["model.text_padding_weight=0", "model.semantic_loss_weight=1"])
    )
    assert (kept.config.text_padding_weight, kept.config.semantic_loss_weight) == (0.5, 100.0)
    assert (changed.config.text_padding_weight, changed.config.semantic_loss_weight) == (0.0, 1.0)
    text, audio = torch.tensor([[3, 0, 7, 3]]), torch.zeros(1, 8, 4, dtype=torch.long)
    # the first codebook has 4 frames, the seven that are late by one predict 3 of them
    assert kept.loss_weights(text, audio).tolist() == [2.5, 400 + 21]
    assert changed.loss_weights(text, audio).tolist() == [1.0, 4 + 21]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.text_padding_weight=-1", r"`model\.text_padding_weight=-1`"),
        ("model.semantic_loss_weight=.nan", r"`model\.semantic_loss_weight=nan`"),
        ("data.text_weight=-0.5", r"`data\.text_weight=-0.5`"),
    ],
)
def test_weights_of_losses_that_cannot_be_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        load_run_config(str(ROOT / "configuration" / "train" / "demo.yaml"), [setting])


def test_a_processor_with_other_padding_ids_than_the_model_is_refused_before_any_data(tmp_path):
    config = json.loads(Path(TINY).read_text()) | {"text_padding_ids": [5, 6]}
    (tmp_path / "other.json").write_text(json.dumps(config))
    settings = [f"run_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'other.json'}", f"model.processor={TINY.removesuffix('.json')}"]
    run = load_run_config(str(ROOT / "configuration" / "train" / "demo.yaml"), [*settings, "trackers=[]", "data.train=nowhere.jsonl"])
    with pytest.raises(ValueError, match=r"model's `text_padding_ids=\[5, 6\]` differ from the processor's `text_padding_ids=\[3, 0\]`"):
        train(run)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_file_is_accelerates(path):
    settings = load_config_from_file(str(path))
    assert settings.num_processes >= 1
    if settings.distributed_type == "FSDP":
        assert settings.fsdp_config["fsdp_version"] == 2
        wrapped = settings.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        from modeling_moshi_ttt.depth_decoder import DepthDecoderLayer
        from modeling_moshi_ttt.modeling_moshi_ttt import MoshiTTTDecoderLayer

        assert wrapped == [MoshiTTTDecoderLayer.__name__, DepthDecoderLayer.__name__]


def test_two_cpu_processes_are_launched_and_train_together(tmp_path):
    (tmp_path / "hello.py").write_text(
        "import os\n"
        "from modeling_moshi_ttt.training import setup\n"
        "from modeling_moshi_ttt.training.run_config import load_run_config\n"
        f"accelerator = setup.make_accelerator(load_run_config({str(RECIPES[0])!r}, ['trackers=[]']))\n"
        "os.write(1, f'rank {accelerator.process_index} of {accelerator.num_processes}\\n'.encode())\n"
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configuration" / "accelerate" / "cpu_2.yaml"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, "--main_process_port", "0", str(tmp_path / "hello.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == ["rank 0 of 2", "rank 1 of 2"]


def test_slurm_script_launches_one_launcher_a_node(tmp_path):
    for name, body in (("scontrol", "echo first; echo second"), ("srun", 'shift; exec "$@"'), ("accelerate", 'printf "%s\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples" / "slurm.sh"), "recipe.yaml", "lora={rank: 8}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | job)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    options = dict(zip(words[1::2], words[2::2]))
    assert (ROOT / options["--config_file"]).exists()
    assert (options["--num_processes"], options["--machine_rank"], options["--main_process_ip"]) == ("16", "1", "first")
    assert words[-3:] == ["examples/finetune.py", "recipe.yaml", "lora={rank: 8}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moed=lora", "unknown key 'moed'; did you mean 'mode'"),
        ("optim.ler=1", "unknown key 'optim.ler'; did you mean 'optim.lr'"),
        ("mode=lora", "`lora=null` must be given"),
        ("lora={rank: 4}", "`lora` must not be given with `mode=full`"),
        ("mode=half", r"`mode='half'`"),
        ("data.batch_size=0", r"`data\.batch_size=0`"),
        ("data.own_noise=1.5", r"`data\.own_noise=1.5`"),
        ("optim.lr=0", r"`optim\.lr=0`"),
        ("optim.lr=.inf", r"`optim\.lr=inf`"),
        ("optim.ttt_lr=-0.01", r"`optim\.ttt_lr=-0.01`"),
        ("optim.gate_lr=.nan", r"`optim\.gate_lr=nan`"),
        ("data.window_seconds=.inf", r"`data\.window_seconds=inf`"),
        ("seed=-1", r"`seed=-1`"),
        ("data.tbptt_windows=2", r"`data\.tbptt_windows=2` must be 1 with `data\.carry=none`"),
        ("optim.betas=[0.9]", r"`optim\.betas=\[0.9\]`"),
        ("optim.betas=[0.8, 0.95]", r"`optim\.betas=\[0\.8, 0\.95\]` must begin with 0\.9 under `optim\.schedule=onecycle`"),
        ("data.evaluation=null", r"`evaluate_every=\d+` must be 0"),
        ("optim.steps=fast", r"`optim\.steps='fast'`"),
        ("trackers=[tensorbord]", "trackers holds 'tensorbord'"),
        ("model.ttt={ttt_layres: all}", "model.ttt holds 'ttt_layres'"),
        ("model.path=none.json", "no file none.json"),
    ],
)
def test_wrong_settings(override, message):
    recipe = str(ROOT / "configuration" / "train" / "demo.yaml")
    where = [] if override.startswith("model.path") else [f"model.path={TINY}"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start(recipe, [*where, override])


def start(recipe, overrides):
    run = load_run_config(recipe, overrides)
    setup.check_trackers(run.trackers)
    setup.build_model(run.model, 0)


def test_run_config_round_trips_through_json():
    run = load_run_config(str(RECIPES[0]))
    assert json.loads(json.dumps(run.to_dict()))["run_dir"] == run.run_dir

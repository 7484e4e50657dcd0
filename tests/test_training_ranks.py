"""One, two and four processes, DDP and FSDP2: the same losses, the same weights, the same adapter, and an exact resume."""

import json
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.common.files import read_log, write_manifest
from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.checkpoint import CheckpointFolder, full_state
from modeling_moshi_ttt.training.trainer import Trainer

LENGTHS = [21, 13, 30, 9, 17, 26, 11, 24]
ROWS = 4


def train(folder, rank, world, kind, mode="full", until=None, steps=5, double=True, **changes):
    """Train with the same rows in every step whatever the number of processes; writes the gathered weights to `folder`."""
    model = make_model()
    model = model.double() if double else model
    data = {"batch_size": 1, "accumulation": ROWS // world, "evaluation": "unused", "own_noise": 0.2, **changes.pop("data", {})}
    run = make_run(folder, mode, data=data, optim={"steps": steps}, evaluate_every=steps, **changes)
    recordings = make_recordings(folder / f"codes{rank}", LENGTHS, model.config, speechless=(1, 4))
    held_out = make_recordings(folder / f"held{rank}", [8, 19, 5], model.config, seed=5)
    trainer = make_trainer(run, recordings, model, held_out, accelerator=Accelerator(cpu=kind != "fsdp"))
    if until is not None:
        stop_after(trainer, until)
    trainer.fit()
    state = full_state(trainer.model)
    if rank == 0:
        save_file(state, folder / "weights.safetensors")
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / "saved", state_dict=state)
    trainer.accelerator.wait_for_everyone()


def stop_after(trainer, step):
    """End the run as a kill between two steps would."""
    original = trainer._after_step

    def after(metrics):
        original(metrics)
        if trainer.progress.step == step:
            trainer.run.optim.steps = step

    trainer._after_step = after


def result(folder):
    records = read_log(folder / "metrics.jsonl")
    losses = [record[name] for record in records for name in ("loss", "eval_loss", "eval_text_accuracy") if name in record]
    return load_file(folder / "weights.safetensors"), losses


def assert_same(one, other, weight_tolerance=1e-5):
    assert one[0].keys() == other[0].keys()
    assert len(one[1]) == len(other[1]) > 0
    assert max(abs(a - b) for a, b in zip(one[1], other[1])) <= 1e-6
    assert max((one[0][name] - other[0][name]).abs().max().item() for name in one[0]) <= weight_tolerance


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives: with shuffled windows, and with lanes that carry."""
    folders = {carry: tmp_path_factory.mktemp("alone") for carry in ("none", "state")}
    for carry, folder in folders.items():
        train(folder, 0, 1, "one", data={"carry": carry})
    return {carry: result(folder) for carry, folder in folders.items()}


@pytest.mark.parametrize(
    ("kind", "world", "carry"),
    [("ddp", 2, "none"), ("ddp", 4, "none"), ("fsdp", 2, "none"), ("fsdp", 4, "none"), ("ddp", 2, "state"), ("fsdp", 2, "state")],
)
def test_processes_together_equal_one(tmp_path, alone, kind, world, carry):
    run_ranks(world, kind, lambda rank: train(tmp_path, rank, world, kind, data={"carry": carry}))
    assert_same(result(tmp_path), alone[carry])


def test_adapter_gathered_from_shards_equals_the_single_one(tmp_path):
    train(tmp_path / "one", 0, 1, "one", "lora+ttt", double=False)
    run_ranks(2, "fsdp", lambda rank: train(tmp_path / "two", rank, 2, "fsdp", "lora+ttt", double=False))
    one, two = (load_file(tmp_path / name / "saved" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any("gating_alpha" in name for name in one)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    PeftModel.from_pretrained(make_model(), tmp_path / "two" / "saved")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_resume_exactly(tmp_path, kind):
    """Carried lanes, noise and all: stopped after step 3 and started again, two ranks end as two ranks in one go."""
    changes = {
        "steps": 5,
        "double": False,
        "data": {"carry": "state+attention", "batch_size": 2, "accumulation": 1},
        "checkpoint": {"every": 1, "keep": 2},
    }
    run_ranks(2, kind, lambda rank: train(tmp_path / "a", rank, 2, kind, **changes))
    for until in (3, None):
        run_ranks(2, kind, lambda rank, until=until: train(tmp_path / "b", rank, 2, kind, until=until, **changes))
    (one, losses), (two, others) = result(tmp_path / "a"), result(tmp_path / "b")
    assert losses == others
    assert all(torch.equal(one[name], two[name]) for name in one)
    parts = sorted(p.name for p in (tmp_path / "a" / "checkpoints" / "checkpoint-00000005").iterdir())
    shards = {f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)}  # no rank writes all, nor twice what both have
    assert {"rank-0.safetensors", "rank-1.safetensors", *shards} <= set(parts)


@pytest.mark.parametrize(("kind", "where"), [("ddp", (Trainer, "_clip")), ("fsdp", (CheckpointFolder, "_publish"))])
def test_two_ranks_of_which_one_is_killed_end_as_unbroken_ones(tmp_path, kind, where):
    """kill -9 in the middle of a step, and of a save: the other rank cannot go on; the same command then does."""
    data = {"carry": "state+attention", "batch_size": 2, "accumulation": 1}
    changes = {"double": False, "data": data, "checkpoint": {"every": 1, "keep": 2}}
    original, calls = getattr(*where), []

    def dies(self, *args):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    def killed(rank):
        if rank == 0:
            setattr(*where, dies)
        train(tmp_path / "b", rank, 2, kind, **changes)

    run_ranks(2, kind, lambda rank: train(tmp_path / "a", rank, 2, kind, **changes))
    with pytest.raises(AssertionError, match=str(-signal.SIGKILL)):
        run_ranks(2, kind, killed)
    assert not (tmp_path / "b" / "weights.safetensors").exists()
    run_ranks(2, kind, lambda rank: train(tmp_path / "b", rank, 2, kind, **changes))
    (one, losses), (two, others) = result(tmp_path / "a"), result(tmp_path / "b")
    assert losses == others
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_where_that_is_exact(tmp_path, alone, before, after):
    for world, until in ((before, 3), (after, None)):
        run_ranks(
            world, "ddp", lambda rank, world=world, until=until: train(tmp_path, rank, world, "ddp", until=until, checkpoint={"every": 1})
        )
    assert_same(result(tmp_path), alone["none"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_two_and_four_ranks_in_turn_end_as_one(tmp_path, alone, kind):
    """Each number of ranks reads the shards that another wrote; losses are equal to 1e-6."""
    for world, until in ((4, 2), (2, 4), (4, None)):
        run_ranks(
            world, kind, lambda rank, world=world, until=until: train(tmp_path, rank, world, kind, until=until, checkpoint={"every": 1})
        )
    assert_same(result(tmp_path), alone["none"])


def as_format_1(path, world):
    """The same checkpoint as versions 0.1.0 and 0.2.0 wrote it: whole tensors, or for several ranks one part each."""
    state = json.loads((path / "state.json").read_text())
    del state["format"]
    (path / "state.json").write_text(json.dumps(state))
    shards = sorted(path.glob("shard-*"))
    steps = {name: tensor for shard in shards for name, tensor in load_file(shard).items() if tensor.dim() == 0}
    for rank, shard in enumerate(shards):
        kinds = {"model": {}, "optimizer": {}}
        for name, tensor in (load_file(shard) | steps).items():  # AdamW's steps are the same on every rank, and now written by one
            kinds["optimizer" if "|" in name else "model"][name] = tensor
        if world == 1:
            for kind, tensors in kinds.items():
                save_file(tensors, path / f"{kind}.safetensors")
        else:
            whole = {f"{kind}.{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}
            save_file(load_file(path / f"rank-{rank}.safetensors") | whole, path / f"rank-{rank}.safetensors")
        shard.unlink()
    write_manifest(path)


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_version_0_2_0_goes_on(tmp_path, world):
    def run(until=None):
        if world == 1:
            train(tmp_path, 0, 1, "one", until=until, double=False, checkpoint={"every": 1})
        else:
            run_ranks(2, "fsdp", lambda rank: train(tmp_path, rank, 2, "fsdp", until=until, double=False, checkpoint={"every": 1}))

    run()
    unbroken = result(tmp_path)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in folder.steps():
        if step > 3:
            shutil.rmtree(folder.path(step))
    as_format_1(folder.path(3), world)
    run()
    (one, losses), (two, others) = unbroken, result(tmp_path)
    assert losses == others
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("mode", "dtype"), [("full", "float32"), ("lora+ttt", "bfloat16")])
def test_bf16_shards_keep_memory_losses_and_what_is_trained_in_float32(tmp_path, monkeypatch, mode, dtype):
    """As full_8gpu.yaml and lora_ttt_7b.yaml under fsdp2_8gpu.yaml, lanes and recomputation besides: the launcher's file asks for bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    def work(rank):
        data = {"carry": "state+attention", "tbptt_windows": 2, "accumulation": 2, "batch_size": 1}
        run = make_run(tmp_path, mode, data=data, optim={"steps": 3})
        run.model.dtype = dtype
        model = make_model().to(getattr(torch, dtype))
        model.activation_checkpointing_enable()
        recordings = make_recordings(tmp_path / f"codes{rank}", LENGTHS, model.config)
        trainer = make_trainer(run, recordings, model, accelerator=setup.make_accelerator(run))
        seen = set()
        mlp = trainer.bare.decoder.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
        trainer.fit()
        assert seen == {torch.bfloat16}
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        for cache in trainer.memory.caches:
            state = cache.ttt_state(0)
            assert {x.dtype for x in (*state.weights, state.k, state.v, state.lr)} == {torch.float32}
        losses = [record["audio_loss"] for record in read_log(tmp_path / "metrics.jsonl")]
        assert trainer.progress.bad_steps == 0
        assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses)

    run_ranks(2, "fsdp", work)

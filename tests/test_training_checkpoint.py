"""Checkpoints are whole or not there, and damage never loads in silence."""

import json
import random
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.common.files import write_manifest
from modeling_moshi_ttt.training.checkpoint import CheckpointFolder, Snapshot, random_state, set_random_state


def snapshot(value):
    tensors = {"a": torch.full((300,), float(value)), "b": torch.arange(6).reshape(2, 3).T}
    return Snapshot(
        {"step": value, "lanes": [1, 2]}, {"model": tensors, "optimizer": {"m": torch.ones(2, 2)}}, {"lane": torch.ones(4) * value}
    )


def folder_with(path, steps, **kwargs):
    folder = CheckpointFolder(path, **kwargs)
    for step in steps:
        folder.save(step, snapshot(step))
    return folder


def test_round_trip(tmp_path):
    folder = folder_with(tmp_path, [5])
    back = folder.load(folder.newest(), ("model", "optimizer"))
    assert back.state == {"step": 5, "lanes": [1, 2]}
    assert torch.equal(back.shared["model"]["b"], torch.arange(6).reshape(2, 3).T)
    assert torch.equal(back.own["lane"], torch.ones(4) * 5)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 7):
        folder.save(step, snapshot(step), best=2 if step >= 2 else None)
    assert folder.steps() == [2, 5, 6]
    assert all(not p.name.startswith(".") for p in tmp_path.iterdir())


def damages(path):
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    yield "truncated", whole[: len(whole) // 2]
    yield "emptied", b""
    yield "bit-flipped", bytes(flipped)
    yield "removed", None


def test_every_damage_to_every_file_is_seen(tmp_path, caplog):
    folder = folder_with(tmp_path / "run", [1, 2])
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    names = sorted(p.name for p in folder.path(2).iterdir())
    assert names == ["manifest.json", "model.safetensors", "optimizer.safetensors", "rank-0.safetensors", "state.json"]
    for name in names:
        for kind, data in damages(folder.path(2) / name):
            target = folder.path(2) / name
            target.unlink() if data is None else target.write_bytes(data)
            caplog.clear()
            assert folder.newest() == folder.path(1), (name, kind)
            assert "torn or altered" in caplog.text, (name, kind)
            shutil.copyfile(tmp_path / "whole" / "checkpoint-00000002" / name, target)
            assert folder.newest() == folder.path(2)


def test_all_torn_is_an_error_and_none_is_none(tmp_path):
    folder = folder_with(tmp_path, [1])
    (folder.path(1) / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="None of the 1 checkpoints"):
        folder.newest()
    assert CheckpointFolder(tmp_path / "none").newest() is None


def test_a_full_disk_leaves_the_old_ones(tmp_path, small_disk):
    """Really full: a small file system, or where none may be mounted, a limit on the size of a file, at which writing fails as well."""
    place = tmp_path / "run" if small_disk is None else small_disk
    folder = folder_with(place, [1])
    big = Snapshot({"step": 2}, {"model": {"a": torch.zeros(2_000_000)}}, {"lane": torch.ones(4)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if small_disk is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written .*(No space|too large).*make room"):
            folder.save(2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in place.iterdir()] == ["checkpoint-00000001"]
    assert folder.newest() == folder.path(1)
    # and what a kill in the middle of a save leaves behind does no harm
    (place / ".checkpoint-00000003.tmp").mkdir()
    (place / ".checkpoint-00000003.tmp" / "model.safetensors").write_bytes(b"half")
    assert folder.newest() == folder.path(1)
    folder.save(3, snapshot(3))
    assert folder.newest() == folder.path(3)


def test_random_state_round_trip():
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(), np.random.randn()

    draw()
    tensors, state = random_state()
    expected = draw()
    set_random_state(tensors, json.loads(json.dumps(state)))
    assert draw() == expected


# ---- the recordings that a checkpoint was trained on


def trained_on(tmp_path, recordings, carry):
    """How many steps a run of two on these recordings has left to do: 2, or none where its checkpoint stands."""
    run = make_run(tmp_path / "run", data={"carry": carry}, optim={"steps": 2})
    trainer, metrics = make_trainer(run, recordings, make_model()), tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_text() if metrics.is_file() else ""
    trainer.fit()
    return len(metrics.read_text().removeprefix(before).splitlines())


@pytest.mark.parametrize("carry", ["none", "state"])
def test_other_recordings_are_refused_by_name(tmp_path, carry):
    config = make_model().config
    recordings = make_recordings(tmp_path / "codes", [24, 17, 24, 20], config)
    assert trained_on(tmp_path, recordings, carry) == 2
    assert trained_on(tmp_path, recordings, carry) == 0  # the same ones go on
    longer = [*recordings[:3], replace(recordings[3], frames=19)]
    for other in (recordings[:3], recordings[::-1], longer):
        message = rf"checkpoint-00000002 was .*data\.train=unused gave 4 recordings .* now gives {len(other)} recordings .*new run_dir"
        with pytest.raises(ValueError, match=message):
            trained_on(tmp_path, other, carry)


def test_a_checkpoint_that_does_not_say_its_recordings_goes_on(tmp_path):
    recordings = make_recordings(tmp_path / "codes", [24, 17, 24, 20], make_model().config)
    assert trained_on(tmp_path, recordings, "state") == 2
    path = tmp_path / "run" / "checkpoints" / "checkpoint-00000002"
    state = json.loads((path / "state.json").read_text())
    del state["data"]
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path)
    assert trained_on(tmp_path, recordings, "state") == 0

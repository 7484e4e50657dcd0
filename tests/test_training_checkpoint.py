"""Checkpoints are whole or not there, and damage never loads in silence."""

import errno
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
from modeling_moshi_ttt.common.run_folder import FORMAT
from modeling_moshi_ttt.training.checkpoint import CheckpointFolder, Snapshot, random_state, restore, set_random_state


def snapshot(value):
    tensors = {"weight": torch.full((30, 10), float(value)), "weight|step": torch.tensor(7.0)}
    return Snapshot({"step": value, "lanes": [1, 2]}, tensors, {"memory.lane": torch.ones(4) * value})


def folder_with(path, steps, **kwargs):
    with CheckpointFolder(path, **kwargs) as folder:
        for step in steps:
            folder.save(step, snapshot(step))
    return folder


def test_round_trip(tmp_path):
    folder = folder_with(tmp_path, [5])
    back = folder.read(folder.newest())
    assert back.state == {"format": FORMAT, "step": 5, "lanes": [1, 2]}
    assert torch.equal(back.own["memory.lane"], torch.ones(4) * 5)
    layer = torch.nn.Linear(10, 30, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    restore(folder.newest(), layer, optimizer)
    assert torch.equal(layer.weight.detach(), torch.full((30, 10), 5.0))
    assert optimizer.state[layer.weight] == {"step": torch.tensor(7.0)}
    for other, message in ((torch.nn.Linear(10, 30), "not this model's .*bias"), (torch.nn.Linear(9, 30, bias=False), r"shape \(30, 10\)")):
        with pytest.raises(ValueError, match=message):
            restore(folder.newest(), other)


def test_what_is_saved_is_what_was_there_when_it_was_saved(tmp_path):
    """Writing goes on while training does."""
    weight = torch.zeros(200, 200)
    with CheckpointFolder(tmp_path) as folder:
        folder.save(1, Snapshot({}, {"weight": weight}, {"memory.lane": weight}))
        weight += 1
    layer = torch.nn.Linear(200, 200, bias=False)
    restore(folder.path(1), layer)
    assert not layer.weight.any()
    assert not folder.read(folder.path(1)).own["memory.lane"].any()


def test_a_checkpoint_of_a_later_version_is_named(tmp_path):
    folder = folder_with(tmp_path, [5])
    content = json.loads((folder.path(5) / "state.json").read_text()) | {"format": FORMAT + 1}
    (folder.path(5) / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`format=\d`, this version reads 1 to \d"):
        folder.read(folder.path(5))


def test_an_old_checkpoint_that_cannot_be_deleted_warns_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def refused(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with CheckpointFolder(tmp_path, keep=1) as folder:
        folder.save(1, snapshot(1))
        folder.wait()
        monkeypatch.setattr(shutil, "rmtree", refused)
        folder.save(2, snapshot(2))
    assert folder.steps() == [2]
    assert "checkpoint-00000001 cannot be deleted" in caplog.text


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    with CheckpointFolder(tmp_path, keep=2) as folder:
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
    assert names == ["manifest.json", "rank-0.safetensors", "shard-00001-model-00001-of-00001.safetensors", "state.json"]
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
    big = Snapshot({"step": 2}, {"weight": torch.zeros(2_000_000)}, {"memory.lane": torch.ones(4)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if small_disk is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))
    try:
        folder.save(2, big)
        with pytest.raises(OSError, match=r"checkpoint-00000002.* cannot be written .*(No space|too large).*make room"):
            folder.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in place.iterdir()] == ["checkpoint-00000001"]
    assert folder.newest() == folder.path(1)
    # and what a kill in the middle of a save leaves behind does no harm
    (place / ".checkpoint-00000003.tmp").mkdir()
    (place / ".checkpoint-00000003.tmp" / "model.safetensors").write_bytes(b"half")
    assert folder.newest() == folder.path(1)
    folder.save(3, snapshot(3))
    folder.wait()
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

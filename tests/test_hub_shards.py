"""Safetensors one tensor at a time: what is written is what is read, by this reader and by safetensors' own."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hub_checkpoints import PEAK, has_peak
from safetensors.torch import load_file, save_file

from modeling_moshi_ttt.common.safetensor_files import INDEX, SINGLE, ShardWriter, TensorFiles, largest, parse_size

TENSORS = {
    "a": torch.randn(3, 5),
    "odd": torch.randn(7).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "codes": torch.arange(6).view(2, 3),
    "b": torch.randn(33, 2),
    "turned": torch.randn(4, 6).T,
}


def write(folder, size):
    with ShardWriter(folder, size) as writer:
        writer.add_all(TENSORS.items())
    return folder


@pytest.mark.parametrize(("size", "files"), [("5GB", 4), ("300", 6)])
def test_what_is_written_is_read_back(tmp_path, size, files):
    folder = write(tmp_path / "out", size)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) == files  # one for each dtype, and more where one is full
    found = {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    source = TensorFiles(folder)
    assert found.keys() == TENSORS.keys() == set(source.names)
    for name, tensor in TENSORS.items():
        for other in (found[name], source.fetch(name)):
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert not list(folder.glob("*.part"))


def test_one_dtype_and_room_enough_is_one_file(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add("x", torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert torch.equal(TensorFiles(tmp_path).fetch("x"), torch.ones(3))


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="x was written already"), ShardWriter(tmp_path) as writer:
        writer.add_all([("x", torch.ones(3)), ("x", torch.ones(3))])
    assert list(tmp_path.iterdir()) == []


def test_many_tensors_take_more_files_than_one_header_holds(tmp_path):
    tensors = {f"a.rather.long.name.for.a.tensor.{i:05}": torch.full((1,), float(i)) for i in range(2000)}
    with ShardWriter(tmp_path) as writer:
        writer.add_all(tensors.items())
    found = {name: value for path in tmp_path.glob("*.safetensors") for name, value in load_file(path).items()}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, which is never read"):
        TensorFiles(tmp_path)
    folder = write(tmp_path / "out", 300)
    shard = sorted(folder.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"{shard.name} is no whole safetensors file"):
        TensorFiles(folder)
    save_file({"stranger": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match="disagree on"):
        TensorFiles(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        TensorFiles(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="leaves its folder"):
        TensorFiles(tmp_path)


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(size) for size in ("5GB", "1.5 MB", "64kb", "12", 7)] == [5 * 10**9, 1_500_000, 64_000, 12, 7]
    for wrong in ("much", "0", "-1GB"):
        with pytest.raises(ValueError, match="is not understood"):
            parse_size(wrong)


@has_peak
def test_memory_stays_small_however_large_the_checkpoint(tmp_path):
    """200 MB pass through; the peak of a process that copies them rises by less than a sixth of that."""
    save_file({f"t{i}": torch.full((2_500_000,), float(i)) for i in range(20)}, tmp_path / "large.safetensors")
    code = f"""{PEAK}
import torch
from modeling_moshi_ttt.common.safetensor_files import ShardWriter, TensorFiles
with ShardWriter({str(tmp_path / "copy")!r}, "90MB") as writer:
    writer.add("first", torch.ones(2_500_000))
    before = peak()
    writer.add_all(TensorFiles({str(tmp_path / "large.safetensors")!r}))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 32_000_000
    copy = TensorFiles(tmp_path / "copy")
    assert len(set(copy.file_of.values())) == 3
    assert all(float(copy.fetch(f"t{i}")[-1]) == i for i in range(20))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_value_of_any_floats(dtype):
    assert largest(torch.tensor([[1.0, -3.0], [0.0, 2.0]]).to(dtype)) == 3.0
    assert math.isnan(largest(torch.tensor([1.0, float("nan"), 2.0]).to(dtype)))
    assert largest(torch.empty(0, 4, dtype=dtype)) == 0.0
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        assert largest(torch.tensor([1.0, float("-inf")]).to(dtype)) == float("inf")

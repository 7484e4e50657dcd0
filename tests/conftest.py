"""Shared fixtures: one thread, fixed seeds, golden numbers."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ttt_ops_golden():
    return load_file(GOLDEN / "ttt_ops_seed0.safetensors")


@pytest.fixture(scope="session")
def ttt_layer_golden():
    return load_file(GOLDEN / "ttt_layer_seed0.safetensors")


@pytest.fixture(scope="session")
def kyutai_golden():
    """The golden tensors and their JSON: (dict of tensors, dict with lm_kwargs, loss, scalars)."""
    return load_file(GOLDEN / "kyutai_seed0.safetensors"), json.loads((GOLDEN / "kyutai_seed0.json").read_text())


@pytest.fixture(scope="module")
def processor():
    """The packaged processor with its tiny codec; modules that need another have their own."""
    from modeling_moshi_ttt import MoshiTTTProcessor, packaged

    return MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny"))


@pytest.fixture(scope="module")
def model():
    """A tiny model that speaks the codec of `processor`; modules that need another have their own."""
    from tiny import speaking_model

    return speaking_model()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB that is really full when it is full; None where mounting is not permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)

"""What converting a whole checkpoint takes."""

import json
import subprocess
import sys

import torch
from hub_checkpoints import PEAK, has_peak
from safetensors.torch import save_file

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.common.safetensor_files import TensorFiles
from modeling_moshi_ttt.conversion.tables import config_from_kyutai, hf_to_kyutai


@has_peak
def test_converting_takes_little_memory(kyutai_golden, tmp_path):
    """Each way, the peak rises by a few times the largest weight, not by the checkpoint: 15 GB pass in less than 2 GB."""
    lm_kwargs = {
        **kyutai_golden[1]["lm_kwargs"],
        "dim": 768,
        "num_layers": 8,
        "num_heads": 8,
        "depformer_dim": 64,
        "depformer_dim_feedforward": 264,
    }
    config = config_from_kyutai(lm_kwargs)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MoshiTTTForConditionalGeneration(config).state_dict().items()}
    (tmp_path / "large").mkdir()
    save_file(
        hf_to_kyutai({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, config), tmp_path / "large" / "model.safetensors"
    )
    (tmp_path / "large" / "config.json").write_text(json.dumps(lm_kwargs))
    code = f"""{PEAK}
import modeling_moshi_ttt.modeling_moshi_ttt, modeling_moshi_ttt.processing_moshi_ttt  # what is imported is not what converting takes
from modeling_moshi_ttt.conversion.convert import convert, Options
before = peak()
convert("large", "here", Options(max_shard_size="100MB"))
convert("here", "back")
convert("here", "fused", Options(fused=True))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    size, largest = (tmp_path / "large" / "model.safetensors").stat().st_size, 4 * 4224 * 768
    assert size > 14 * largest
    assert 0 < int(done.stdout) < 8 * largest
    assert TensorFiles(tmp_path / "here").shapes() == {name: tuple(shape) for name, shape in shapes.items()}
    assert isinstance(MoshiTTTConfig.from_pretrained(tmp_path / "here"), MoshiTTTConfig)

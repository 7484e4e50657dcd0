"""A small input and the loss it must give: what tells a checkpoint that loads rightly from one that merely loads."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..common.bounds import PROBE_FRAMES, check_header
from ..common.files import atomic_write
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError

# In a folder of its own: beside the weights, tools that look for `*.safetensors` take it for one of them.
PROBE = "probe/probe.safetensors"
OLD_PROBE = "probe.safetensors"  # where version 0.1.0 put it
FRAMES = 32
# Relative difference that another machine or another kernel may make. On the same machine there is none.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
INPUTS = ("input_ids", "moshi_audio_codes", "user_audio_codes")

Probe = dict[str, Tensor]


def make_probe(config: MoshiTTTConfig) -> Probe:
    """Random codes from a fixed seed: `input_ids [1, T]`, `moshi_audio_codes [1, K, T]`, `user_audio_codes [1, K_user, T]`."""
    fields: Any = config
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(fields.vocab_size, (1, FRAMES), generator=generator),
        "moshi_audio_codes": torch.randint(fields.audio_vocab_size, (1, fields.num_codebooks, FRAMES), generator=generator),
        "user_audio_codes": torch.randint(fields.audio_vocab_size, (1, fields.num_user_codebooks, FRAMES), generator=generator),
    }


@torch.no_grad()
def probe_loss(model: Any, probe: Probe) -> float:
    """The loss of a model (or of a PEFT model around one) on the probe, every frame a label."""
    training, device = model.training, model.device
    model.eval()
    inputs = {name: probe[name].to(device) for name in INPUTS}
    loss = model(
        **inputs, text_labels=inputs["input_ids"], audio_labels=inputs["moshi_audio_codes"], use_cache=False, return_dict=True
    ).loss
    model.train(training)
    return float(loss)


def write_probe(folder: str | os.PathLike[str], probe: Probe, loss: float) -> None:
    """Store the probe and the loss it gave."""
    path = Path(folder) / PROBE
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, save({**probe, "loss": torch.tensor(loss, dtype=torch.float64)}))


def read_probe(folder: str | os.PathLike[str]) -> tuple[Probe, float] | None:
    """The stored probe and its loss; None where there is none. Raises ValueError for a broken file."""
    path = next((path for name in (PROBE, OLD_PROBE) if (path := Path(folder) / name).is_file()), None)
    if path is None:
        return None
    check_header(path)
    try:
        tensors = load_file(path)
        probe, loss = {name: tensors[name] for name in INPUTS}, float(tensors["loss"])
    except (SafetensorError, LookupError, RuntimeError) as error:
        raise MoshiTTTError(f"{path} is no probe ({error})") from None
    for name, tensor in probe.items():
        if tensor.dtype != torch.int64 or tensor.dim() not in (2, 3) or tensor.shape[0] != 1 or not 0 < tensor.shape[-1] <= PROBE_FRAMES:
            raise MoshiTTTError(
                f"{path} is no probe: {name} has shape {list(tensor.shape)}; a probe is one row of up to {PROBE_FRAMES} frames"
            )
    return probe, loss


def compare(stored: float, found: float, dtype: torch.dtype) -> None:
    """Raise ValueError where the losses differ by more than another machine explains."""
    tolerance = TOLERANCE.get(dtype, 2e-2)
    if not abs(found - stored) <= tolerance * max(abs(stored), 1e-6):
        raise MoshiTTTError(
            f"the probe's loss is {found:.6f}; it was {stored:.6f} when the checkpoint was made: this is not the same model"
        )


def stage_probe(model: Any, folder: Path, target: Path) -> float:
    """Run the source's own probe, or a new one, and store it with its loss."""
    stored = read_probe(folder)
    probe = stored[0] if stored else make_probe(MoshiTTTConfig.from_dict(model.config.to_dict()))
    loss = probe_loss(model, probe)
    if stored:
        compare(stored[1], loss, model.dtype)
    write_probe(target, probe, loss)
    return loss

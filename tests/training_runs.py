"""Small models and made-up recordings for the tests of training; no codec is needed."""

import contextlib
import gc
import os
import signal
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from tiny import tiny_config

from modeling_moshi_ttt.data.codes import save_codes
from modeling_moshi_ttt.data.prepared import Prepared, PreparedSet
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.run_config import CheckpointSettings, LoraSettings, ModelSettings, OptimSettings, RunConfig
from modeling_moshi_ttt.training.trainer import Trainer
from modeling_moshi_ttt.training.windows import WindowReader


class DyingReader(WindowReader):
    """Reads as its like do, until the worker that it is in is killed."""

    def __init__(self, reader, lives):
        super().__init__(reader.recordings, reader.delays, reader.num_codebooks)
        self.lives = lives

    def __getitem__(self, windows):
        self.lives -= 1
        if self.lives < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(windows)


@contextlib.contextmanager
def uncollected():
    """Without the garbage collector, to whose callback hypothesis listens: what torch's signal handler raises in there is lost."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def make_model(seed=0, **changes):
    """A model of a few thousand weights whose TTT layers say something (`wo` is not zero)."""
    torch.manual_seed(seed)
    model = MoshiTTTForConditionalGeneration(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ttt.wo.weight"):
                parameter.normal_(std=0.2)
    return model


def make_recordings(folder, lengths, config, seed=0, speechless=()):
    """Recordings of random codes and sparse words; those in `speechless` have no text."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    recordings = []
    for i, frames in enumerate(lengths):
        path = folder / f"{i}.safetensors"
        codes = random.integers(config.audio_vocab_size, size=(2, config.num_codebooks, frames)).astype(np.int16)
        text = np.where(random.random(frames) < 0.5, 3, random.integers(4, config.vocab_size, size=frames)).astype(np.int32)
        save_codes(path, codes, np.full_like(text, -1) if i in speechless else text)
        recordings.append(Prepared(f"r{i}", path, frames))
    return recordings


def make_run(folder, mode="full", data=None, optim=None, checkpoint=None, **changes):
    """Settings for a short run."""
    lora = LoraSettings(rank=2, scaling=2.0) if "lora" in mode else None
    return RunConfig(
        run_dir=str(folder),
        model=ModelSettings(path="unused", activation_checkpointing=False),
        data=replace(DataSettings(train="unused", window_seconds=8 / 12.5, batch_size=2), **(data or {})),
        mode=mode,
        lora=lora,
        optim=replace(OptimSettings(steps=4, lr=1e-3, ttt_lr=2e-3, gate_lr=3e-3, warmup=0.25), **(optim or {})),
        checkpoint=replace(CheckpointSettings(every=0), **(checkpoint or {})),
        **changes,
    )


def make_trainer(run, recordings, model=None, held_out=None, accelerator=None):
    """A trainer on made-up recordings, its model in the run's mode."""
    model = setup.adapt(model if model is not None else make_model(), run)
    one = PreparedSet(recordings, [len(recordings)], [1.0])
    other = None if held_out is None else PreparedSet(held_out, [len(held_out)], [1.0])
    return Trainer(run, model, one, other, accelerator or Accelerator(cpu=True))

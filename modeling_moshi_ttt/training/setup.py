"""From settings to the things themselves: processor, model, accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed

from ..configuration_moshi_ttt import MoshiTTTConfig
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from . import modes
from .report import check_trackers
from .run_config import ModelSettings, RunConfig


def load_processor(settings: ModelSettings) -> Any:
    """The processor with its codec, from `settings.processor`, or from where the weights are."""
    from ..processing_moshi_ttt import MoshiTTTProcessor

    return MoshiTTTProcessor.from_pretrained(settings.processor or settings.path)


def build_model(settings: ModelSettings, seed: int) -> MoshiTTTForConditionalGeneration:
    """The model with its weights, or with fresh ones (the same for the same seed) where the path is a config.json.

    Raises:
        ValueError: an unknown field in model.ttt, or one that the configuration refuses.
    """
    unknown = [name for name in settings.ttt if name not in MoshiTTTConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"model.ttt holds {unknown[0]!r}, which is no field of MoshiTTTConfig; they begin with 'ttt_'.")
    dtype = getattr(torch, settings.dtype)
    if settings.path.endswith(".json"):
        if not Path(settings.path).is_file():
            raise FileNotFoundError(f"model.path: there is no file {settings.path}.")
        set_seed(seed)
        config = MoshiTTTConfig.from_json_file(settings.path)
        if settings.ttt:
            config = MoshiTTTConfig.from_dict(config.to_dict(), **settings.ttt)
        model = MoshiTTTForConditionalGeneration(config).to(dtype)
    else:
        model = MoshiTTTForConditionalGeneration.from_pretrained(settings.path, dtype=dtype, **settings.ttt)
    if settings.activation_checkpointing:
        # transformers 5.2x renames it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def adapt(model: MoshiTTTForConditionalGeneration, run: RunConfig) -> Any:
    """The model in the run's mode; ValueError when it cannot be."""
    lora = modes.lora_config(run.lora, model) if run.lora is not None else None
    set_seed(run.seed)  # LoRA's own start values
    return modes.drop_copies(modes.apply(model, run.mode, lora))


def make_accelerator(run: RunConfig) -> Accelerator:
    """Accelerate as the launcher set it up; bf16 where the model is bf16, and float32 products as precise as the settings say."""
    check_trackers(run.trackers)
    torch.set_float32_matmul_precision(run.model.matmul_precision or ("high" if run.model.dtype == "bfloat16" else "highest"))
    accelerator = Accelerator(
        mixed_precision="bf16" if run.model.dtype == "bfloat16" else "no",
        log_with=run.trackers or None,
        project_dir=run.run_dir,
        step_scheduler_with_optimizer=False,
        # several windows may pass before one backward: buffers must not be rewritten in between
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    return accelerator

"""From settings to the things themselves: processor, model, accelerator."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, init_empty_weights
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..adapters.bases import check_loadable, fresh_model, is_adapter, named_base, raw_config
from ..adapters.models import load_model
from ..common.files import read_json
from ..common.hub import check_place
from ..common.packaged import resolve
from ..common.run_folder import FINAL
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..data.codec import read_processor
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from . import modes
from .report import check_trackers
from .run_config import ModelSettings, RunConfig

# How long one process waits for the others: longer than unpacking an archive or writing a final model takes, which one does for all.
TIMEOUT = timedelta(hours=2)


def load_processor(settings: ModelSettings) -> Any:
    """The processor with its codec, from `settings.processor`, or from where the weights are."""
    if settings.processor:
        return read_processor(settings.processor, "model.processor")
    if resolve("model", settings.path).endswith(".json"):
        raise MoshiTTTError(
            "model.processor is missing: with a config.json as model.path, name a folder or Hub name that holds a processor."
        )
    return read_processor(settings.path, "model.processor is not given, model.path")


def check_start(path: str) -> None:
    """ValueError or FileNotFoundError for a model.path that is no model, with the way on; of adapters, transformers would load the base."""
    path = resolve("model", path)
    place = Path(path)
    if path.endswith(".json"):
        if not place.is_file():
            raise MoshiTTTFileNotFoundError(f"model.path: there is no file {path}.")
        check_loadable(read_json(place), f"model.path: {path}")
        return
    if is_adapter(place):
        base = named_base(place)[0]
        raise MoshiTTTError(
            f"model.path is {path}, an adapter: start from its base{base and f' ({base})'}, or make the two one model with "
            f"`moshi-ttt push {path} USER/NAME --merged` and start from that."
        )
    if (place / FINAL).is_dir() and not (place / "config.json").is_file():
        raise MoshiTTTError(f"model.path: {path} is a run folder; did you mean {place / FINAL}?")
    check_place(path, "model.path")
    raw_config(path, "model.path")


def model_config(settings: ModelSettings) -> MoshiTTTConfig:
    """The configuration that the model will have; no weights are read.

    Raises:
        ValueError, FileNotFoundError: an unknown field in model.ttt, or one that the configuration refuses; no whole model at model.path.
    """
    unknown = [name for name in settings.ttt if not str(name).startswith("ttt_") or name not in MoshiTTTConfig.__dataclass_fields__]
    if unknown:
        raise MoshiTTTError(f"model.ttt holds {unknown[0]!r}, which is no TTT setting of MoshiTTTConfig; they begin with 'ttt_'.")
    check_start(settings.path)
    path = resolve("model", settings.path)
    if path.endswith(".json"):
        config = MoshiTTTConfig.from_json_file(path)
        return MoshiTTTConfig.from_dict(config.to_dict(), **settings.config_changes) if settings.config_changes else config
    return MoshiTTTConfig.from_pretrained(path, **settings.config_changes)


def build_model(settings: ModelSettings, seed: int, empty: bool = False) -> MoshiTTTForConditionalGeneration:
    """The model with its weights. Fresh ones are the same for the same seed in every process: all of them where the path is a
    config.json, and the TTT layers that a checkpoint lacks.

    Args:
        empty: leave the weights on the meta device, for a process that is sent its part of them (see `is_sent_weights`).

    Raises:
        ValueError, FileNotFoundError: as in `model_config`; weights that cannot be loaded.
    """
    config, dtype, path = model_config(settings), getattr(torch, settings.dtype), resolve("model", settings.path)
    set_seed(seed)
    if empty:
        with init_empty_weights(include_buffers=False):
            model = MoshiTTTForConditionalGeneration(config).to(dtype)
    elif path.endswith(".json"):
        model = fresh_model(config, settings.dtype, seed)
    else:
        try:
            model = load_model(path, dtype, **settings.config_changes)
        except (MoshiTTTError, SafetensorError, RuntimeError) as error:
            reason = f"{str(error).splitlines()[0]}); `moshi-ttt verify {settings.path}` says more."
            raise MoshiTTTError(f"model.path is {settings.path}, whose weights cannot be loaded ({reason}") from error
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def is_sent_weights(accelerator: Accelerator) -> bool:
    """Whether rank 0 sends this process its shards: under FSDP with fsdp_cpu_ram_efficient_loading, where one process a node reads."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading) and not accelerator.is_local_main_process


def adapt(model: MoshiTTTForConditionalGeneration, run: RunConfig) -> Any:
    """The model in the run's mode, its loss weighing the user's codebooks as the run says; ValueError when it cannot be."""
    if run.data.user_weight and not model.config.user_depth_slices:
        raise MoshiTTTError(
            f"`data.user_weight={run.data.user_weight}` must be 0 for a model whose depth decoder does not predict the user's codebooks "
            f"(`model.path={run.model.path}`); convert one that does with `--keep-user-slices`."
        )
    model.config.user_loss_weight = run.data.user_weight
    lora = modes.lora_config(run.lora, model) if run.lora is not None else None
    set_seed(run.seed)  # LoRA's own start values
    return modes.drop_copies(modes.apply(model, run.mode, lora))


def make_accelerator(run: RunConfig) -> Accelerator:
    """Accelerate as the launcher set it up; bf16 where the model or the launcher says so, float32 products as precise as the settings say."""
    check_trackers(run.trackers)
    precision = "bf16" if run.model.dtype == "bfloat16" else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise MoshiTTTError(
            f"the launcher's mixed_precision is {precision!r}; it must be no or bf16 (accelerate launch --mixed_precision bf16)."
        )
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=run.trackers or None,
        project_dir=run.run_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            # several windows may pass before one backward: buffers must not be rewritten in between; gradients lie in DDP's buckets alone
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise MoshiTTTError(
            f"{launched} processes were launched and accelerate sees {accelerator.num_processes}, so each would train alone into {run.run_dir}; "
            "without GPUs set ACCELERATE_USE_CPU=true before `accelerate launch`."
        )
    torch.set_float32_matmul_precision(run.model.matmul_precision or ("high" if precision == "bf16" else "highest"))
    if precision == "bf16" and accelerator.is_fsdp2:
        # accelerate's own policy rounds all that goes into a layer and comes out of it: what TTT layers remember, too
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator

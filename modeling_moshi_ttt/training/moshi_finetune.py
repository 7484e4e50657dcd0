"""moshi-finetune's recipes as ours: the same run from its YAML file, and in words what differs.

Its settings and their defaults are those of finetune/args.py (kyutai-labs/moshi-finetune, 5c0ddd6).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..common.files import read_text
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from .run_config import RunConfig, load_run_config

# Kyutai's repositories, and the same weights in transformers' layout.
OURS = {"kyutai/moshiko-pytorch-bf16": "kmhf/hf-moshiko", "kyutai/moshika-pytorch-bf16": "kmhf/hf-moshika"}
# Every key of theirs with its default, by dotted name.
DEFAULTS: dict[str, Any] = {
    "data.train_data": "",
    "data.eval_data": "",
    "data.shuffle": False,
    "run_dir": "",
    "moshi_paths.hf_repo_id": "kyutai/moshiko-pytorch-bf16",
    "moshi_paths.mimi_path": None,
    "moshi_paths.moshi_path": None,
    "moshi_paths.tokenizer_path": None,
    "moshi_paths.config_path": None,
    "first_codebook_weight_multiplier": 1.0,
    "text_padding_weight": 0.5,
    "optim.lr": 1e-4,
    "optim.weight_decay": 0.1,
    "optim.pct_start": 0.05,
    "seed": 0,
    "num_microbatches": 1,
    "duration_sec": 10.0,
    "batch_size": 1,
    "max_norm": 1.0,
    "max_steps": 100,
    "log_freq": 1,
    "ckpt_freq": 0,
    "save_adapters": True,
    "do_ckpt": True,
    "num_ckpt_keep": 3,
    "eval_freq": 0,
    "do_eval": False,
    "gradient_checkpointing": True,
    "wandb.project": None,
    "wandb.offline": False,
    "wandb.key": None,
    "wandb.run_name": None,
    "lora.enable": False,
    "lora.rank": 64,
    "lora.scaling": 2.0,
    "lora.ft_embed": False,
    "full_finetuning": False,
    "param_dtype": "bfloat16",
    "overwrite_run_dir": False,
}
EVERY_CHECKPOINT = 1_000_000


def load_moshi_finetune(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """The settings of a run, and sentences that say where it is not what moshi-finetune does.

    Args:
        path: their YAML file.
        overrides: settings of ours to change, as "optim.lr=1e-4".

    Raises:
        ValueError, FileNotFoundError: no such file, no YAML, or a key that moshi-finetune does not have.
    """
    theirs = DEFAULTS | _read(Path(path))
    settings = _settings(theirs)
    config = load_run_config(None, [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *overrides])
    return config, _differences(theirs, config)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MoshiTTTFileNotFoundError(f"--from-moshi-finetune is {path}: there is no such file.")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise MoshiTTTError(f"{path} is no YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict):
        raise MoshiTTTError(f"{path} holds no settings; give a recipe of moshi-finetune.")
    groups = {name.partition(".")[0] for name in DEFAULTS if "." in name}
    found: dict[str, Any] = {}
    for key, value in content.items():
        members = value.items() if key in groups and isinstance(value, dict) else [("", value)]
        for member, entry in members:
            name = f"{key}.{member}" if member else str(key)
            if name in groups and entry is None:
                continue  # an empty group keeps its defaults
            if name not in DEFAULTS:
                near = difflib.get_close_matches(name, DEFAULTS, 1)
                hint = f"; did you mean {near[0]!r}" if near else ""
                raise MoshiTTTError(f"{path}: unknown key {name!r}{hint}")
            found[name] = _number(entry, name, path)
    return found


def _number(value: Any, name: str, path: Path) -> Any:
    """YAML takes 2e-6 for a text; a number where theirs is one."""
    if type(DEFAULTS[name]) not in (int, float) or isinstance(value, (bool, int, float)) or value is None:
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MoshiTTTError(f"{path}: `{name}={value!r}` must be a number.") from None


def _settings(theirs: dict[str, Any]) -> dict[str, Any]:
    """Ours by dotted name."""
    repository = theirs["moshi_paths.hf_repo_id"]
    adapter = theirs["lora.enable"] and not theirs["full_finetuning"]
    base = theirs["moshi_paths.moshi_path"] or OURS.get(repository, repository)
    lora = {"rank": theirs["lora.rank"], "scaling": theirs["lora.scaling"], "embeddings": theirs["lora.ft_embed"]}
    return {
        "run_dir": theirs["run_dir"],
        "seed": theirs["seed"],
        "mode": "lora" if adapter else "full",
        "lora": lora if adapter else None,
        "model": {
            "path": base,
            "ttt": {"ttt_layers": []},
            "semantic_loss_weight": theirs["first_codebook_weight_multiplier"],
            "text_padding_weight": theirs["text_padding_weight"],
            "dtype": theirs["param_dtype"],
            "activation_checkpointing": theirs["gradient_checkpointing"],
        },
        "data": {
            "train": theirs["data.train_data"],
            "evaluation": (theirs["data.eval_data"] or None) if theirs["do_eval"] else None,
            "window_seconds": theirs["duration_sec"],
            "batch_size": theirs["batch_size"],
            "accumulation": theirs["num_microbatches"],
        },
        "optim": {
            "steps": theirs["max_steps"],
            "lr": theirs["optim.lr"],
            "weight_decay": theirs["optim.weight_decay"],
            "warmup": theirs["optim.pct_start"],
            "clip": theirs["max_norm"],
            "schedule": "onecycle",
        },
        "checkpoint": {
            "every": max(theirs["ckpt_freq"], 0) if theirs["do_ckpt"] else 0,
            "keep": EVERY_CHECKPOINT if theirs["num_ckpt_keep"] is None else theirs["num_ckpt_keep"],
        },
        "evaluate_every": theirs["eval_freq"] if theirs["do_eval"] else 0,
        "trackers": ["wandb"] if theirs["wandb.project"] else [],
    }


def _differences(theirs: dict[str, Any], config: RunConfig) -> list[str]:
    told: dict[str, tuple[Any, str]] = {
        "loss": (True, "a step's losses are divided by the weight of all its windows on all processes, not each process's by its own"),
        "data.shuffle": (not theirs["data.shuffle"], "windows are drawn in a new order every epoch, by the seed"),
        "moshi_paths": (
            theirs["moshi_paths.moshi_path"] or theirs["moshi_paths.hf_repo_id"] not in OURS,
            f"weights in Kyutai's layout are turned into ours once: moshi-ttt convert SRC DST, then model.path=DST (now {config.model.path})",
        ),
        "moshi_paths.mimi_path": (
            theirs["moshi_paths.mimi_path"] or theirs["moshi_paths.tokenizer_path"],
            "codec and tokenizer are the processor's; name its folder as model.processor",
        ),
        "lora.ft_embed": (
            theirs["lora.ft_embed"] and config.lora is not None,
            "embeddings are adapted by LoRA too (lora.embeddings), not trained whole",
        ),
        "save_adapters": (
            not theirs["save_adapters"],
            "checkpoints are never merged; `moshi-ttt export RUN --merged` makes one whole model",
        ),
        "do_ckpt": (not theirs["do_ckpt"], "the last step is saved all the same"),
        "overwrite_run_dir": (theirs["overwrite_run_dir"], "a run folder that is there is gone on with, never overwritten"),
        "log_freq": (theirs["log_freq"] != 1, "every step is logged, to metrics.jsonl"),
        "wandb": (theirs["wandb.project"], "offline, key and name are wandb's own variables: WANDB_MODE, WANDB_API_KEY, WANDB_NAME"),
    }
    return [f"{key}: {sentence}." for key, (differs, sentence) in told.items() if differs]

"""Adapters: a PEFT folder with LoRA and TTT weights, its base, and the two as one."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from ..common.files import atomic_write, read_json
from ..common.packaged import resolve
from ..common.safetensor_files import ShardWriter, TensorFiles
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError
from ..hub.probe import compare, probe_loss, read_probe, stage_probe
from ..hub.verify import Facts, Shapes, count, finite_problems, refuse, shape_problems
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from . import bases as adapters
from .bases import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AUTO_MAPPING, write_base_config

NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")


def _is_local(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~"))


def hub_base(adapter_config: dict[str, Any], base: str | None) -> tuple[str, str | None]:
    """(repository, revision) of the base that others can load; ValueError where the adapter only knows a folder of this machine."""
    own = adapter_config.get("base_model_name_or_path")
    if base:
        return base, None
    if not own:
        raise MoshiTTTError(f"{ADAPTER_CONFIG} names no base model; name it with --base user/name, or push the two as one with --merged")
    if _is_local(own):
        raise MoshiTTTError(
            f"the adapter's base is {own!r}, a folder of this machine, which nobody else could load; push the base first and name it with "
            "--base user/name, or push the two as one with --merged"
        )
    return own, adapter_config.get("revision")


def base_config(folder: Path) -> MoshiTTTConfig:
    """The configuration that the base an adapter names must have, or that of the fresh weights its run started from.

    Raises ValueError for a base that is missing, of another type, or with other TTT layers than the adapter.
    """
    base, revision = adapters.named_base(folder)
    if base or (folder / adapters.BASE_CONFIG).is_file():
        return adapters.base_config(folder, base, revision)
    config = _fresh_base(folder).config
    adapters.check_weights(folder, config, base)
    return config


def _fresh_base(folder: Path) -> MoshiTTTForConditionalGeneration:
    """The base of a run that started from fresh weights: made again from the run's configuration and seed."""
    from ..training.run_config import ModelSettings
    from ..training.setup import build_model

    run = adapters.adapter_run(folder)
    if not resolve("model", str(run.get("model", {}).get("path", ""))).endswith(".json"):
        raise MoshiTTTError(f"the adapter names no base model: name it in {folder / ADAPTER_CONFIG}, as base_model_name_or_path")
    return build_model(ModelSettings(**run["model"]), int(run["seed"]))


def load_base(folder: Path) -> MoshiTTTForConditionalGeneration:
    """The base of an adapter in its own dtype. Its configuration is compared before any weights are read."""
    base, revision = adapters.named_base(folder)
    if base:
        return adapters.load_base(folder, base, revision)
    base_config(folder)
    return _fresh_base(folder)


def load_adapter(folder: Path) -> PeftModel:
    """The adapter on its base."""
    return PeftModel.from_pretrained(load_base(folder), folder)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; ValueError where it lacks what PEFT would fill in by a guess."""
    content = read_json(folder / ADAPTER_CONFIG)
    missing = [key for key in NEEDED if content.get(key) is None]
    if missing:
        raise MoshiTTTError(f"{folder / ADAPTER_CONFIG} lacks {', '.join(missing)}: PEFT could only guess what the adapter's weights are")
    return content


def expected_weights(folder: Path, config: MoshiTTTConfig) -> Shapes:
    """Name -> shape of every weight that an adapter of these settings has, without making any."""
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.init_lora_weights = False  # some ways to begin need a base with weights
        with torch.device("meta"):
            adapted = PeftModel(MoshiTTTForConditionalGeneration(config), settings)
    except (KeyError, TypeError, ValueError) as error:
        raise MoshiTTTError(f"{folder / ADAPTER_CONFIG} gives no adapter for its base: {error}") from None
    return {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}


def weight_problems(folder: Path, config: MoshiTTTConfig) -> list[str]:
    """Weights that are missing, unknown, misshapen or not finite."""
    files = TensorFiles(folder / ADAPTER_WEIGHTS)
    return shape_problems(files.shapes(), expected_weights(folder, config)) + finite_problems(files)


def verify_adapter(folder: Path, run_probe: bool) -> Facts:
    """As `verify`, for an adapter: its own weights, its base's configuration, and the two together on the probe."""
    adapter_config, config = read_adapter_config(folder), base_config(folder)
    refuse(weight_problems(folder, config), folder)
    layers = [int(layer) for layer in config.ttt_layers]
    base = str(adapter_config.get("base_model_name_or_path") or "")
    facts = Facts("adapter", ttt_layers=layers, ttt_mixer=config.ttt_mixer, base=base)
    count(facts, TensorFiles(folder / ADAPTER_WEIGHTS))
    stored = read_probe(folder) if run_probe else None
    if stored is not None:
        model: Any = load_adapter(folder)
        facts.probe = probe_loss(model, stored[0])
        try:
            compare(stored[1], facts.probe, model.base_model.dtype)
        except ValueError as error:
            raise MoshiTTTError(f"{error}; either the adapter or its base {base or '(of its run)'} has changed since then") from None
    return facts


def stage_adapter(folder: Path, target: Path, base: str | None, pin: str | None = None) -> float:
    """The adapter, naming a base that others can load, at revision `pin`; returns the loss of adapter and base on the probe."""
    verify_adapter(folder, run_probe=False)
    adapter_config = read_json(folder / ADAPTER_CONFIG)
    name, revision = hub_base(adapter_config, base)
    model = load_adapter(folder)
    loss = stage_probe(model, folder, target)
    write_base_config(target, model.config)
    adapter_config |= {"base_model_name_or_path": name, "revision": pin or revision, "auto_mapping": AUTO_MAPPING, "task_type": None}
    atomic_write(target / ADAPTER_CONFIG, json.dumps(adapter_config, indent=2, sort_keys=True))
    shutil.copyfile(folder / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)
    return loss


def stage_merged(folder: Path, target: Path, max_shard_size: int | str) -> float:
    """Adapter and base as one whole model; returns its loss on the probe."""
    verify_adapter(folder, run_probe=False)
    adapted = load_adapter(folder)
    dtype = adapted.base_model.dtype
    model = adapted.merge_and_unload().to(dtype)
    loss = stage_probe(model, folder, target)
    with ShardWriter(target, max_shard_size) as writer:
        writer.add_all(model.state_dict().items())
    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    return loss

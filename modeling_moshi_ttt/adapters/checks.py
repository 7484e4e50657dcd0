"""PEFT's own reading of an adapter's folder: its settings, the weights that these call for, and the adapter on its base."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from ..common.bounds import check_adapter
from ..common.files import read_json
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from .bases import ADAPTER_CONFIG, load_base

NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")


def load_adapter(folder: Path) -> PeftModel:
    """The adapter on its base, in the base's dtype."""
    return PeftModel.from_pretrained(load_base(folder), folder)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; ValueError where it lacks what PEFT would fill in by a guess."""
    content = read_json(folder / ADAPTER_CONFIG)
    missing = [key for key in NEEDED if content.get(key) is None]
    if missing:
        raise MoshiTTTError(f"{folder / ADAPTER_CONFIG} lacks {', '.join(missing)}: PEFT could only guess what the adapter's weights are")
    check_adapter(content, str(folder / ADAPTER_CONFIG))
    return content


def expected_weights(folder: Path, config: MoshiTTTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that an adapter of these settings has, without making any."""
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.init_lora_weights = False  # some ways to begin need a base with weights
        with torch.device("meta"):
            adapted = PeftModel(MoshiTTTForConditionalGeneration(config), settings)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # PEFT has none of its own for settings that it cannot use
        raise MoshiTTTError(f"{folder / ADAPTER_CONFIG} gives no adapter for its base: {error}") from None
    return {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}

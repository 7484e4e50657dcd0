"""What lies beside an adapter's weights: the configuration of the base that it was made for, so that nobody has to guess it."""

import json
from pathlib import Path

from ..configuration_moshi_ttt import MoshiTTTConfig
from .files import atomic_write

BASE_CONFIG = "base_config.json"


def write_base_config(folder: Path, config: MoshiTTTConfig) -> None:
    """Every field of the base's configuration, those at their defaults too, which a later version may change."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)  # a folder of the machine it was loaded on
    atomic_write(folder / BASE_CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")

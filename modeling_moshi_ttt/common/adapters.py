"""What lies beside an adapter's weights: the configuration of the base that it was made for, so that nobody has to guess it."""

from pathlib import Path

from ..configuration_moshi_ttt import MoshiTTTConfig
from .files import atomic_write

BASE_CONFIG = "base_config.json"


def write_base_config(folder: Path, config: MoshiTTTConfig) -> None:
    """Every field of the base's configuration, those at their defaults too, which a later version may change."""
    atomic_write(folder / BASE_CONFIG, config.to_json_string(use_diff=False))

"""The most that a stranger's file may ask for, held against it before anything is allocated, compiled or run.

Sizes of a model and of its codec have theirs in `stored_config_moshi_ttt.LIMITS`, which travels with the model.
"""

import re
from pathlib import Path
from typing import Any

from ..errors_moshi_ttt import MoshiTTTError

HEADER_BYTES = 1 << 25  # of a safetensors file; a 7B model's has 200 KB
PROBE_FRAMES = 1 << 9
RANK = 1 << 12  # of LoRA
PATTERN_CHARACTERS = 500
PATTERN_REPEATS = 8  # parts of a pattern that repeat without end; each multiplies the time that matching a name may take
_REPEAT = re.compile(r"(?<!\\)[*+]|\{\d*,\}")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{\d*,?\d*\})")


def check_header(path: Path) -> None:
    """MoshiTTTError for a safetensors file whose first eight bytes promise a header beyond the limit."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > HEADER_BYTES:
        raise MoshiTTTError(f"{path} is no whole safetensors file (its header would have {size} bytes, more than {HEADER_BYTES})")


def check_adapter(settings: dict[str, Any], where: str) -> None:
    """MoshiTTTError for ranks and patterns of an adapter's settings that are beyond the limits or not to be compiled."""
    pattern_maps = [settings.get(name) for name in ("rank_pattern", "alpha_pattern")]
    ranks = [settings.get("r"), *(rank for ranks in pattern_maps[:1] if isinstance(ranks, dict) for rank in ranks.values())]
    for rank in ranks:
        if not isinstance(rank, int) or not 1 <= rank <= RANK:
            raise MoshiTTTError(f"{where}: the rank `r={rank!r}` must be a whole number from 1 to {RANK}")
    patterns = [settings.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns += [key for patterns in pattern_maps if isinstance(patterns, dict) for key in patterns]
    for pattern in patterns:
        if isinstance(pattern, str):
            _check_pattern(pattern, where)


def _check_pattern(pattern: str, where: str) -> None:
    """A regular expression that is short, right, and cannot take for ever."""
    repeats = len(_REPEAT.findall(pattern))
    if len(pattern) > PATTERN_CHARACTERS or repeats > PATTERN_REPEATS or (repeats and _REPEATED_GROUP.search(pattern)):
        raise MoshiTTTError(
            f"{where}: the pattern {pattern[:80]!r} must have at most {PATTERN_CHARACTERS} characters and {PATTERN_REPEATS} repeats, and repeat "
            "no group; name the modules in a list"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise MoshiTTTError(f"{where}: the pattern {pattern[:80]!r} is no regular expression ({error})") from None

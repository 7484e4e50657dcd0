"""Reading what an earlier run left: where it is damaged, or of another shape by now, the message names the file and what helps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..common.files import of_shape, read_json
from ..errors_moshi_ttt import MoshiTTTError

MEASURED_AGAIN = "remove it, and what it held is measured again"


def read_kept(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError where it is damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        raise MoshiTTTError(f"{error}; {MEASURED_AGAIN}") from None


def kept_shape(path: Path, part: str = "") -> AbstractContextManager[None]:
    """Around the use of such a file, or of a part of it: ValueError where something is missing or of another kind."""
    return of_shape(f"{path}, {part}" if part else str(path), MEASURED_AGAIN)

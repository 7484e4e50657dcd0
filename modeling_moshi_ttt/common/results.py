"""What results.json holds. It is read and checked here; whoever draws, tabulates or compares it trusts it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from ..errors_moshi_ttt import MoshiTTTError
from ..version import __version__
from .files import read_json

RESULTS = "results.json"
FORMAT = 2  # 1, of versions 0.1 and 0.2, had no number, and its parts no "version", "date" and "command"
MORE = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Model(TypedDict):
    """The model under evaluation; name "no model" and an empty fingerprint where there is none."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    name: str
    fingerprint: str
    ttt: dict[str, Any]


class Part(TypedDict):
    """What every evaluation's part holds beside its own numbers.

    kind: the evaluation's name.
    settings: those it ran with, with the seed and with hashes of what it read.
    seconds: that it took.
    version, date, command: of the package, when, and how.
    hours: of recordings.
    model_name: of the model. data: what was measured on, where that is no file.
    """

    __pydantic_config__ = MORE  # type: ignore[misc]
    kind: str
    settings: NotRequired[dict[str, Any]]
    seconds: NotRequired[float]
    version: NotRequired[str]
    date: NotRequired[str]
    command: NotRequired[str]
    hours: NotRequired[float | None]
    model_name: NotRequired[str]
    data: NotRequired[str]


class Results(TypedDict):
    """The whole file."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    format: NotRequired[int]
    model: Model
    written: str
    tasks: dict[str, Part]


def stamp(now: datetime) -> dict[str, str]:
    """What a part says of its making."""
    return {"version": __version__, "date": now.strftime("%Y-%m-%d"), "command": command()}


def command() -> str:
    """How this process was called."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def written(now: datetime) -> str:
    """When a file of results was written, as it says so."""
    return now.strftime("%Y-%m-%d %H:%M UTC")


def read_results(path: Path, shapes: Mapping[str, type[Any]]) -> dict[str, Any]:
    """A results.json, its parts of the shapes that their kinds have in `shapes`.

    Raises:
        MoshiTTTError: there is no such file, it is no JSON, of a later format, or a field is missing or of another type, by its name.
    """
    data = read_json(path)
    number = data.get("format", 1)
    if type(number) is int and number > FORMAT:
        raise MoshiTTTError(f"{path}: `format={number}` must be {FORMAT} or less; install the version of moshi-ttt that wrote it.")
    results: dict[str, Any] = checked(Results, data, path)
    results["tasks"] = {name: checked_part(part, shapes, path, f"tasks.{name}.") for name, part in results["tasks"].items()}
    return results


def checked_part(part: Any, shapes: Mapping[str, type[Any]], path: Path, prefix: str = "") -> dict[str, Any]:
    """A part of the shape that its kind has; MoshiTTTError as in `read_results`."""
    kind: str = checked(Part, part, path, prefix)["kind"]
    if kind not in shapes:
        raise MoshiTTTError(f"{path}: `{prefix}kind={kind!r}` must be one of {', '.join(shapes)}; install the version that wrote it.")
    found: dict[str, Any] = checked(shapes[kind], part, path, prefix)
    return found


def checked(shape: Any, data: Any, path: Path, prefix: str = "", cure: str = "give a file as `moshi-ttt` wrote it") -> Any:
    """`data` of a shape, with the defaults that it says; MoshiTTTError names the first field that is not, and says what to do."""
    try:
        found = TypeAdapter(shape).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = prefix + ".".join(map(str, first["loc"]))
        wrong = (
            f"{field}` is missing" if first["type"] == "missing" else f"{field}={str(first['input'])[:40]}` does not fit ({first['msg']})"
        )
        raise MoshiTTTError(f"{path}: `{wrong}; {cure}.") from None
    return found

"""Strict settings: a dataclass filled from YAML and key=value overrides; what is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from . import packaged
from .files import read_text

T = TypeVar("T")
ABOVE_ZERO = 1e-30  # as a lowest value: more than 0
SEEDS = (0, 2**32 - 1)  # that numpy and torch both take
NEEDED = "needed"  # in place of a default


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: 1e-4 is a number here too, where YAML 1.1 reads a string."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def load_settings(cls: type[T], path: str | os.PathLike[str] | None, overrides: Sequence[str] = (), kind: packaged.Kind | None = None) -> T:
    """Fill the dataclass `cls` from the YAML file `path` (None: defaults alone) and overrides such as "optim.lr=1e-4".

    `path` may be the bare name of a packaged file of this `kind`.

    Raises ValueError naming the key (with the nearest known one) or the wrong type; FileNotFoundError when the file is missing.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _read(Path(path), kind)
    for override in overrides:
        _override(data, override)
    where = str(path) if path is not None else cls.__name__
    return _fill(cls, data, where, "")


class Group(NamedTuple):
    """A dataclass of settings, as help and documentation show it."""

    name: str  # as in "zero_shot.tasks[]"; "" is the whole
    said: str  # the docstrings of the class and of those that it extends
    rows: list[tuple[str, str, str]]  # key, type, default as JSON ("" where its own group says it, "needed" where there is none)


def groups(cls: type[Any], prefix: str = "") -> list[Group]:
    """Every setting of a dataclass and of the groups in it."""
    hints = typing.get_type_hints(cls)
    said = "\n\n".join(inspect.cleandoc(part.__doc__ or "") for part in cls.__mro__ if dataclasses.is_dataclass(part))
    rows: list[tuple[str, str, str]] = []
    below: list[Group] = []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        rows.append((key, _type_name(hint), _default(field)))
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                below += groups(part, f"{key}[]." if get_origin(hint) is list else f"{key}.")
    return [Group(prefix.rstrip("."), said, rows), *below]


def describe(cls: type[Any]) -> str:
    """Every setting for a command's help: what a group says of itself, then key, type and default."""
    return "\n\n".join(
        "\n".join([f"{group.name or 'settings'}: {group.said}", *(_line(*row) for row in group.rows)]) for group in groups(cls)
    )


def _line(key: str, kind: str, default: str) -> str:
    return f"  {key}: {kind}" + (", needed" if default == NEEDED else f" = {default}" if default else "")


def _type_name(hint: Any) -> str:
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(str, args))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_type_name, args))
    if get_origin(hint) is list:
        return f"list of {_type_name(args[0])}"
    if dataclasses.is_dataclass(hint):
        return "group"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint)).lower()  # Any has a name from Python 3.11 on


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return NEEDED
    if dataclasses.is_dataclass(value):
        return ""  # its own group says it
    return json.dumps(value, default=lambda part: to_dict(part) if dataclasses.is_dataclass(part) else str(part))


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(settings)


def check_numbers(settings: Any, group: str = "", **limits: float | tuple[float, float]) -> None:
    """Raise a ValueError for a field, or an entry of its list, that is below its lowest value, above a highest one or not finite.

    None may stand. `group` goes before the names in the message, for a caller that checks a group of its settings.
    """
    for name, limit in limits.items():
        value = getattr(settings, name)
        low, high = limit if isinstance(limit, tuple) else (limit, math.inf)
        entries = [(f"{name}[{i}]", entry) for i, entry in enumerate(value)] if isinstance(value, list) else [(name, value)]
        for label, entry in [(label, entry) for label, entry in entries if entry is not None]:
            finite = abs(entry) < math.inf  # of whole numbers of any length, too
            if not (finite and low <= entry <= high):
                least = ("more than 0" if low == ABOVE_ZERO else f"at least {low:g}") + ("" if finite else " and finite")
                bound = least if high == math.inf else f"between {low:g} and {high:.10g}"
                raise MoshiTTTError(f"{group}{label} is {entry!r}, it must be {bound}.")


def check_entries(name: str, entries: Sequence[Any]) -> None:
    """Raise a ValueError for a list that is empty or names something twice."""
    if not entries:
        raise MoshiTTTError(f"{name} is empty; name at least one.")
    for number, entry in enumerate(entries):
        if entry in entries[:number]:
            raise MoshiTTTError(f"{name} holds {entry!r} twice; name it once.")


def _read(path: Path, kind: packaged.Kind | None) -> dict[str, Any]:
    try:
        data = _parse(read_text(packaged.resolve(kind, path) if kind else path))
    except FileNotFoundError:
        there = ", ".join(sorted(other.name for other in path.parent.glob("*.yaml")))
        hint = f", and the package none of this name; {packaged.known(kind, path)}" if kind else "."
        raise MoshiTTTFileNotFoundError(
            f"{path}: there is no such settings file; {path.parent} holds {there or 'no .yaml file'}{hint}"
        ) from None
    except IsADirectoryError:
        raise MoshiTTTError(f"{path} is a folder; name the settings file in it.") from None
    except yaml.YAMLError as error:
        raise MoshiTTTError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise MoshiTTTError(f"{path} must hold `key: value` lines, it holds a {type(data).__name__}.")
    return data


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise MoshiTTTError(f"The override {override!r} must have the form key=value, as in optim.lr=1e-4.")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        value = text
    for part in parts[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise MoshiTTTError(f"The override {override!r} goes below {part!r}, which holds a plain value.")
    data[parts[-1]] = value


def _fill(cls: type[T], data: dict[Any, Any], where: str, prefix: str) -> T:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            hint = f"did you mean {prefix + near[0]!r}?" if near else "there are no settings here."
            raise MoshiTTTError(f"{where}: unknown key {prefix + str(key)!r}; {hint}")
    missing = [
        prefix + name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise MoshiTTTError(f"{where}: missing {', '.join(map(repr, missing))}; add it to the file or give {missing[0]}=value.")
    values = {key: _convert(hints[key], value, where, prefix + key) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:  # of the class's own checks, which begin with a field's name
        raise MoshiTTTError(f"{where}: {prefix}{error}") from None


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """`value` as type `hint`, or ValueError; numbers never become strings or the other way round in silence."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where, name)
    if origin is Literal:
        if value in args and any(type(value) is type(a) for a in args if a == value):
            return value
        raise MoshiTTTError(f"{where}: {name} is {value!r}, it must be one of {', '.join(map(repr, args))}.")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if value is None:
            value = {}
        if isinstance(value, dict):
            return _fill(hint, value, where, name + ".")
        raise _wrong(where, name, value, "a group of settings")
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, name, value, "a list")
        return origin(_convert(args[0] if args else Any, item, where, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _wrong(where, name, value, "a mapping")
        return {key: _convert(args[1] if args else Any, item, where, f"{name}.{key}") for key, item in value.items()}
    return _convert_plain(hint, value, where, name)


def _convert_union(args: tuple[Any, ...], value: Any, where: str, name: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors = []
    for arg in args:
        if arg is not type(None):
            try:
                return _convert(arg, value, where, name)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _convert_plain(hint: Any, value: Any, where: str, name: str) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if hint in names and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    raise _wrong(where, name, value, names.get(hint, str(hint)))


def _wrong(where: str, name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{where}: {name} is {value!r} ({type(value).__name__}), it must be {wanted}.")

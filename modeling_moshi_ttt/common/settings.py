"""Strict settings: pydantic dataclasses filled from YAML and key=value overrides; what is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from . import packaged
from .files import read_text
from .strict_yaml import StrictLoader

T = TypeVar("T")
_FIELDS = "__pydantic_fields__"  # where pydantic keeps what stands below a field
NEEDED = "needed"  # in place of a default


def _whole(value: Any) -> Any:
    """YAML writes a whole number as 1e4 too."""
    return int(value) if type(value) is float and value.is_integer() else value


def _wrong_entries(entries: Sequence[Any]) -> str | None:
    if not entries:
        return "must hold an entry; name at least one."
    twice = next((entry for number, entry in enumerate(entries) if entry in entries[:number]), None)
    return None if twice is None else f"must not hold {twice!r} twice; name it once."


def check_entries(name: str, entries: Sequence[Any]) -> None:
    """MoshiTTTError for a list that is empty or names something twice."""
    if wrong := _wrong_entries(entries):
        raise MoshiTTTError(f"`{name}={entries!r}` {wrong}")


def _distinct(entries: list[Any]) -> list[Any]:
    if wrong := _wrong_entries(entries):
        raise MoshiTTTError(wrong)
    return entries


def _ascending(bounds: list[Any]) -> list[Any]:
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise MoshiTTTError("must be a lowest and a highest, as in [2, 12].")
    return bounds


# Types of fields, with their limits; none takes another type in silence. Text is `str`, a choice `Literal`, a file or folder `Path`.
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Count = Annotated[Whole, Field(ge=1)]
CountOrZero = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, le=2**32 - 1)]  # that numpy and torch both take
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Bounds = Annotated[list[CountOrZero], AfterValidator(_ascending)]  # lowest and highest
DISTINCT = AfterValidator(_distinct)  # of a list: an entry at least, and none twice


@typing.dataclass_transform(field_specifiers=(dataclasses.field, Field))
def settings_group(cls: type[T]) -> type[T]:
    """Decorator of a group of settings: a field's type says what it takes, the docstring below it what it means."""
    made = dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True))(cls)
    fill = made.__init__

    @functools.wraps(fill)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            fill(self, *args, **kwargs)
        except ValidationError as errors:
            raise MoshiTTTError(_problems(made, errors)) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return cast("type[T]", made)


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


class _Loader(StrictLoader):
    """YAML 1.2 numbers: 1e-4 is a number here too, where YAML 1.1 reads a string."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def load_settings(cls: type[T], path: str | os.PathLike[str] | None, overrides: Sequence[str] = (), kind: packaged.Kind | None = None) -> T:
    """Fill `cls` from the YAML file `path` (None: defaults alone) and overrides such as "optim.lr=1e-4".

    `path` may be the bare name of a packaged file of this `kind`.

    Raises MoshiTTTError naming the key (with the nearest known one), the value and what it must be, and FileNotFoundError when the file is
    missing.
    """
    data: dict[str, Any] = _read(Path(path), kind) if path is not None else {}
    for override in overrides:
        _override(data, override)
    try:
        return TypeAdapter(cls).validate_python(_with_groups(cls, data))
    except ValidationError as errors:
        raise MoshiTTTError(f"{path or cls.__name__}: {_problems(cls, errors)}") from None


def _problems(cls: type[Any], errors: ValidationError) -> str:
    """The first thing that pydantic found, and how many more there are."""
    others = errors.error_count() - 1
    more = f" (and {others} more {'is' if others == 1 else 'are'} wrong)" if others else ""
    return _problem(cls, errors.errors()[0]) + more


def _with_groups(cls: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """The data with an empty group, which YAML gives as null, as a group of all its defaults."""
    hints = typing.get_type_hints(cls)
    filled = {key: {} if value is None and _is_group(hints.get(key)) else value for key, value in data.items()}
    return {
        key: _with_groups(hints[key], value) if isinstance(value, dict) and _is_group(hints.get(key)) else value
        for key, value in filled.items()
    }


# What a value must be, by pydantic's name of the error.
_MUST_BE = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "finite",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "dataclass_type": "a group of settings",
    "path_type": "a text",
    "string_type": "a text",
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
    "literal_error": "{expected}",
}


def _problem(cls: type[Any], error: ErrorDetails) -> str:
    """One thing that pydantic found, in our words."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"unknown key {name!r}; {_nearest(cls, error['loc'])}"
    if kind == "missing":
        return f"missing {name!r}; add it to the file or give {name}=value."
    if kind == "value_error":  # of a check of ours, on a field or on a group
        own = str(context["error"])
        if own.startswith("must"):  # of a field's validator, which does not know its name
            return f"`{name}={error['input']!r}` {own}"
        return f"`{_above(error['loc'])}{own[1:]}" if own.startswith("`") else own
    wanted = _MUST_BE[kind].format(**context) if kind in _MUST_BE else error["msg"]
    of = f", it is of type {type(error['input']).__name__}" if kind.endswith("_type") else ""
    return f"`{name}={error['input']!r}` must be {wanted}{of}."


def _above(where: tuple[int | str, ...]) -> str:
    """The names of the groups above the field of an error, with a dot behind each: an error of a group ends with the group itself."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in where]
    return "".join(parts).removeprefix(".") + "." if parts else ""


def _nearest(cls: type[Any], where: tuple[int | str, ...]) -> str:
    """The known key nearest to an unknown one."""
    names = [row.key for group in groups(cls) for row in group.rows]
    prefix, key = _above(where[:-1]), str(where[-1])
    inside = re.sub(r"\[\d+\]", "[]", prefix)
    beside = [name.removeprefix(inside) for name in names if name.startswith(inside) and "." not in name.removeprefix(inside)]
    near = difflib.get_close_matches(key, beside, n=1, cutoff=0.0)
    return f"did you mean {prefix + near[0]!r}?" if near else "there are no settings here."


class Row(NamedTuple):
    """One setting, as help and documentation show it."""

    key: str
    type: str
    default: str  # as JSON; "" where its own group says it, "needed" where there is none
    meaning: str


class Group(NamedTuple):
    """A group of settings, as help and documentation show it."""

    name: str  # as in "zero_shot.tasks[]"; "" is the whole
    said: str  # the docstring of the class
    rows: list[Row]


def groups(cls: type[Any], prefix: str = "") -> list[Group]:
    """Every setting of a class and of the groups in it."""
    hints = typing.get_type_hints(cls)
    meanings = {
        name: field.description for part in reversed(cls.__mro__) for name, field in getattr(part, _FIELDS, {}).items() if field.description
    }
    rows: list[Row] = []
    below: list[Group] = []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        rows.append(Row(key, _type_name(hint), _default(field), " ".join(meanings.get(field.name, "").split())))
        for part in (hint, *get_args(hint)):
            if _is_group(part):
                below += groups(part, f"{key}[]." if get_origin(hint) is list else f"{key}.")
    return [Group(prefix.rstrip("."), " ".join((cls.__doc__ or "").split()), rows), *below]


def describe(cls: type[Any]) -> str:
    """Every setting for a command's help: what a group says of itself, then key, type, default and meaning."""
    return "\n\n".join("\n".join([f"{group.name or 'settings'}: {group.said}", *map(_line, group.rows)]) for group in groups(cls))


def _line(row: Row) -> str:
    default = ", needed" if row.default == NEEDED else f" = {row.default}" if row.default else ""
    return f"  {row.key}: {row.type}{default}" + (f"\n      {row.meaning}" if row.meaning else "")


def _type_name(hint: Any) -> str:
    args = get_args(hint)
    if get_origin(hint) is Annotated:
        return _type_name(args[0])
    if get_origin(hint) is Literal:
        return " | ".join(map(str, args))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_type_name, args))
    if get_origin(hint) is list:
        return f"list of {_type_name(args[0])}"
    if _is_group(hint):
        return "group"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint)).lower()  # Any has a name from Python 3.11 on


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default.default if isinstance(field.default, FieldInfo) else field.default
    if value is dataclasses.MISSING:
        return NEEDED
    if dataclasses.is_dataclass(value):
        return ""  # its own group says it
    return json.dumps(value, default=lambda part: to_dict(part) if dataclasses.is_dataclass(part) else str(part))


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(settings)


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

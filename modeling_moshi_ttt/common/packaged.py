"""Files that come with the package, by bare name: recipes, the tiny model and its processor, the sample dialogues.

Everywhere a path is expected a bare name may stand. A path that exists wins, as a local folder wins over a Hub name in transformers; for
settings files only a file does, so that a folder `demo` is not in the way of the recipe.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal, get_args

from ..errors_moshi_ttt import MoshiTTTError

PACKAGE = Path(__file__).parents[1]
# An installed wheel holds these folders inside the package (setup.cfg's package_dir), a checkout beside it.
ROOT = PACKAGE if (PACKAGE / "configuration").is_dir() else PACKAGE.parent
FOLDERS = ("configuration", "examples")

Kind = Literal["train", "evaluate", "accelerate", "model", "processor", "data"]
_SETTINGS = ("train", "evaluate", "accelerate")
# kind: (its folder, patterns of what can be named); a name is the path below the folder without the file's suffix.
_PLACES: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "train": ("configuration/train", ("*.yaml",)),
    "evaluate": ("configuration/evaluate", ("*.yaml",)),
    "accelerate": ("configuration/accelerate", ("*.yaml",)),
    "model": ("configuration/model", ("*/", "*.json")),  # of one name, the config.json of a fresh model
    "processor": ("configuration/model", ("*/",)),
    "data": ("examples/data", ("*/", "*/*.jsonl")),
}


def packaged(kind: Kind, name: str) -> str:
    """The path of a file or folder that comes with the package.

    Args:
        kind: "train", "evaluate" or "accelerate" (settings files), "model" (a config.json, or a checkpoint), "processor" (a folder) or
            "data" (a folder of dialogues, or a manifest in it).
        name: as commands take it, such as "demo" of "train", "tiny" of "model" and "processor", "remembering" of both, "dialogues/train" of
            "data".

    Raises:
        ValueError: there is no such kind or name; the message says which there are, and the nearest.
    """
    if kind not in _PLACES:
        raise MoshiTTTError(f"`kind={kind}` must be one of {', '.join(get_args(Kind))}.")
    found = _found(kind)
    if name not in found:
        raise MoshiTTTError(f"`name={name}` is no packaged {kind} file; {known(kind, name)}")
    return str(found[name])


def resolve(kind: Kind, name: str | os.PathLike[str]) -> str:
    """`name` itself where it is a path that exists, the path of the packaged file of this name where there is one, else `name` unchanged."""
    path = Path(name)
    taken = path.is_file() if kind in _SETTINGS else path.exists()
    return str(name) if taken else str(_found(kind).get(str(name), name))


def names(kind: Kind) -> list[str]:
    """The bare names that there are."""
    return list(_found(kind))


def known(kind: Kind, name: str | os.PathLike[str]) -> str:
    """The nearest packaged name and all of them, for the message about a name that is none."""
    there = names(kind)
    near = difflib.get_close_matches(Path(name).stem, there, n=1, cutoff=0.0)[0]
    return f"did you mean {near!r}? The package holds {', '.join(there)}."


def files() -> list[Path]:
    """All of them, relative to ROOT."""
    found = (path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _found(kind: Kind) -> dict[str, Path]:
    """Path by name."""
    folder, patterns = ROOT / _PLACES[kind][0], _PLACES[kind][1]
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.name != "__pycache__")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}

"""Files that are either whole or absent: atomic writes, hashes, manifests, names that stay inside their folder."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError, MoshiTTTOSError
from .temporary import temporary_folder, temporary_path

MANIFEST = "manifest.json"


def _sync(path: Path) -> None:
    """Make what was written to a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a kill at any moment, sees the old file or the new one and nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def make_folder(path: str | os.PathLike[str], setting: str) -> Path:
    """The folder that a setting names, made where it is not there; OSError or ValueError names the setting where that cannot be."""
    if not str(path).strip():
        raise MoshiTTTError(f"{setting} is empty; name a folder.")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoshiTTTOSError(f"{setting} is {path}, where no folder can be made ({error.strerror}); name another one.") from None
    return Path(path)


def read_text(path: str | os.PathLike[str]) -> str:
    """What a text file holds; ValueError names it where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise MoshiTTTError(f"{path} is not a text file in UTF-8.") from None


def parse_json(text: str | bytes) -> Any:
    """What JSON from outside says; ValueError also for what Python's parser lets through or dies of: half characters, endless nesting."""
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise MoshiTTTError("it is nested too deep") from None
    except UnicodeEncodeError as error:
        raise MoshiTTTError(f"it holds half a character, {error.object[error.start : error.end]!r}") from None
    return content


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; ValueError or FileNotFoundError names it."""
    file = Path(path)
    if not file.is_file():
        raise MoshiTTTFileNotFoundError(f"{file} is missing")
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise MoshiTTTError(f"{file} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise MoshiTTTError(f"{file} holds no JSON object")
    return content


@contextmanager
def of_shape(what: str, then: str) -> Iterator[None]:
    """Around reading what we once wrote: where it has another shape, one ValueError, with what the reader stumbled over behind it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, EOFError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is not as it should be ({type(error).__name__}: {error})"
        raise MoshiTTTError(f"{what} {reason}; {then}") from error


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a log of one JSON object a line; a last line that a kill has torn is passed over.

    Raises:
        ValueError: another line is no JSON object, or the file is no text; the message names it.
    """
    lines = [line for line in read_text(path).split("\n") if line.strip()]  # splitlines would also split inside JSON texts
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise MoshiTTTError(f"{path}, record {number}: not JSON ({error}).") from None
        if not isinstance(record, dict):
            raise MoshiTTTError(f"{path}, record {number}: holds a {type(record).__name__}; a log has one JSON object a line.")
        records.append(record)
    return records


def check_folder(path: str | os.PathLike[str], mark: str) -> None:
    """ValueError where `path` is a file, or a folder that holds something but no file of the name with which its writer marks it."""
    path = Path(path)
    recover_folder(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / mark).is_file())):
        raise MoshiTTTError(f"{path} is there and holds no {mark}, so no earlier run made it; name another folder, or remove it yourself.")


def clear_folder(path: str | os.PathLike[str], mark: str) -> None:
    """Remove what an earlier run left in `path`, which it marked with a file of this name; other people's folders are refused.

    Raises:
        ValueError: as `check_folder`.
    """
    check_folder(path, mark)
    if Path(path).exists():
        shutil.rmtree(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on success it becomes `path` (an older one is replaced), on an error it vanishes.

    At no moment is `path` absent where there was one, on systems that can exchange two folders; elsewhere `recover_folder` brings it back.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    with temporary_folder(path) as temporary:
        yield temporary
        for item in sorted(temporary.rglob("*")):
            _sync(item)
        _sync(temporary)
        os.chmod(temporary, 0o755)
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            shutil.rmtree(_aside(path), ignore_errors=True)
            os.replace(path, _aside(path))
            os.replace(temporary, path)
            shutil.rmtree(_aside(path), ignore_errors=True)
    _sync(path.parent)


def _aside(path: Path) -> Path:
    """Where an old folder stands for the moment in which the new one takes its place."""
    return path.parent / f".{path.name}.old.tmp"


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Bring back a folder whose replacement was killed while it stood aside."""
    path = Path(path)
    if not path.exists() and _aside(path).is_dir() and not _aside(path).is_symlink():
        os.replace(_aside(path), path)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot (it takes Linux's renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    anywhere, exchange = 0, 2  # no folder is needed for whole paths; RENAME_EXCHANGE
    if rename(anywhere, os.fsencode(first.absolute()), anywhere, os.fsencode(second.absolute()), exchange) == 0:
        return True
    reason = ctypes.get_errno()
    if reason in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(reason, os.strerror(reason), str(second))


@contextmanager
def tensors_written(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around the writing of tensors, for which safetensors has an error of its own: OSError with the place, the reason and the cure."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MoshiTTTOSError(f"{path} cannot be written ({reason}); make room there and run the same command again.") from None


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: str | os.PathLike[str], known: dict[str, Any] | None = None) -> Path:
    """Write manifest.json: relative name -> size in bytes and sha256, for every other file below `folder`; `known` is this table where
    the files were digested as they were written.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST)
    table = known or {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    atomic_write(folder / MANIFEST, json.dumps({"files": table}, indent=1))
    return folder / MANIFEST


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (size, sha256). Raises FileNotFoundError, or one of many for a file that is no manifest."""
    table = parse_json((folder / MANIFEST).read_bytes())["files"]
    return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in table.items()}


def contradictions(folder: str | os.PathLike[str], digests: bool = True, rank: int = 0, world: int = 1) -> list[str]:
    """Files that a folder's manifest names and that are missing or others, as sentences; with `digests` every byte is read.

    What the manifest does not name is passed over. Of `world` processes that share the work, each reads the contents of every world-th
    file, from its `rank` on.
    """
    folder = Path(folder)
    try:
        wanted = _read_manifest(folder)
    except FileNotFoundError:
        return [f"{folder} has no {MANIFEST}."]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return [f"{folder / MANIFEST} cannot be read ({error})."]
    problems = []
    for number, (name, (size, digest)) in enumerate(sorted(wanted.items())):
        try:
            path = inside(folder, name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if not path.is_file():
            problems.append(f"{name} is missing.")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {size}.")
        elif digests and number % world == rank and sha256(path) != digest:
            problems.append(f"{name} has other contents than the manifest says.")
    return problems


def check_manifest(folder: str | os.PathLike[str], rank: int = 0, world: int = 1) -> list[str]:
    """Compare a folder with its manifest, either way; returns problems as sentences, an empty list when all is well.

    `rank` and `world` share the reading, as in [`contradictions`].
    """
    folder = Path(folder)
    problems = contradictions(folder, rank=rank, world=world)
    try:
        named = set(_read_manifest(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return problems  # which say so
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    return problems + [f"{name} is not in the manifest." for name in sorted(found - named)]


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """The path of `name` below `root`; ValueError when it is absolute or leaves the folder (`..`, a link out of it)."""
    root = Path(root)
    pure = PurePosixPath(name.replace("\\", "/"))
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or (len(name) > 1 and name[1] == ":"):
        raise MoshiTTTError(f"The file name {name!r} leaves its folder {root}: use a relative name without '..'.")
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise MoshiTTTError(f"The file name {name!r} leaves its folder {root} through a link: put the file itself there.")
    return path

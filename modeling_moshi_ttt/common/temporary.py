"""Temporary files and folders, named after the process that writes them: what a killed one has left is known by its name, and removed."""

import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# .<name>.<machine>-<process>-<number>.tmp
LEFT = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
_swept: set[Path] = set()


@cache
def _machine() -> str:
    """Eight hexadecimal digits of this machine and of what it counts processes in, a container being another."""
    space = Path("/proc/self/ns/pid")
    counted = space.stat().st_ino if space.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {counted}".encode()).hexdigest()[:8]


def temporary_path(path: Path) -> Path:
    """A new name beside `path`, for what is to replace it. The folder is cleared of what killed processes have left, once a process."""
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent)
    return path.parent / f".{path.name[:80]}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def sweep(folder: Path) -> None:
    """Remove temporary files and folders of this user whose process on this machine is no more; links among them are not followed."""
    for path in folder.glob(".*.tmp"):
        found = LEFT.fullmatch(path.name)
        if found is None or found[1] != _machine() or _alive(int(found[2])) or path.lstat().st_uid != os.getuid():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which this user alone can read, gone when the block ends."""
    folder = temporary_path(path)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

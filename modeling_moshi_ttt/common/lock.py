"""A folder that one process at a time may write to."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors_moshi_ttt import MoshiTTTOSError

LOCK = ".lock"
_held: set[int] = set()


def _close_in_child() -> None:
    """A worker that outlives its parent for a moment must not keep the parent's locks."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path, setting: str, name: str = LOCK, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, which is there, until the block ends or the process does, however it ends.

    Args:
        setting: which named the folder, for messages.
        name: of the lock file in it, where parts of the folder are held one by one.
        wait: for another process that holds it, after a line that names its host and process id, instead of an error.

    Raises:
        OSError: another process holds it; the message names its host and process id, and the setting to change.
    """
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 300).decode(errors="replace").strip() or "another process"
            if not wait:
                raise MoshiTTTOSError(f"`{setting}={folder}` is in use by {holder}; wait for it, or name another folder.") from None
            print(f"waiting for {holder}, which is at the same work in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(handle)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)

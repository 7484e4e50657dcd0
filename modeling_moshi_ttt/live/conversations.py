"""Conversations that are put aside: a folder for each, under a name that cannot be guessed, for some time."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..common.files import make_folder
from ..errors_moshi_ttt import MoshiTTTError
from .object_store import ObjectStore
from .session import ABOUT, belongs_to, read_session, write_session

NAME = re.compile(r"[A-Za-z0-9_-]{22}")  # as `new_name` makes them: who knows one may go on with its conversation


class ConversationStore:
    """Sessions of one row in a folder or an object store, which several machines may share.

    Args:
        folder: made where it is not there; or a URL, as `s3://bucket/sessions`, that fsspec can open.
        keep: seconds after which a conversation is removed.
    """

    def __init__(self, folder: str | Path, keep: float, model: Any, processor: Any) -> None:
        self.keep, self._owner = keep, belongs_to(model, processor)
        self._objects = ObjectStore(str(folder), "--sessions") if "://" in str(folder) else None
        self._spool = tempfile.TemporaryDirectory(prefix="moshi-ttt-") if self._objects else None  # on the way there and back
        self.folder = make_folder(self._spool.name if self._spool else folder, "--sessions")
        self._held: dict[str, dict[str, torch.Tensor]] = {}  # until they are written

    @staticmethod
    def new_name() -> str:
        return secrets.token_urlsafe(16)

    def hold(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Take a row's state, for [`write`] to keep: the model's thread does not wait for a disk."""
        self._held[name] = state

    def write(self, name: str) -> bool:
        """Keep what is held under this name, in the place of what was kept; False where nothing is.

        Raises:
            OSError: it cannot be written.
        """
        state = self._held.get(name)
        if state is None:
            return False
        try:
            write_session(self.folder / name, [state], None, self._owner)
            if self._objects:
                self._objects.put(self.folder / name, name)
                shutil.rmtree(self.folder / name)
        finally:
            if self._held.get(name) is state:
                del self._held[name]
        return True

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A row's state.

        Raises:
            ValueError: none of this name is kept, or it is of another model.
        """
        if (held := self._held.get(name)) is not None:
            return held
        age = self._age(name)
        if age is None or age > self.keep:
            raise MoshiTTTError(f"no conversation is kept under this name (each is, for {self.keep / 60:.0f} minutes); begin a new one.")
        with self._fetched(name) as place:
            try:
                return read_session(place, self._owner).rows[0]
            except MoshiTTTError as error:  # whose words name a folder of this machine
                raise MoshiTTTError("the conversation of this name is of another model, or not whole; begin a new one.") from error

    def remove_old(self) -> None:
        """Remove what was kept long enough."""
        for name in self._objects.names() if self._objects else [path.name for path in self.folder.iterdir()]:
            age = self._age(name)
            if age is None or age <= self.keep:
                continue
            if self._objects:
                self._objects.remove(name)
            else:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _age(self, name: str) -> float | None:
        """Seconds for which a conversation has been kept; None where there is none, or what is there is nothing of ours."""
        if not NAME.fullmatch(name):
            return None
        if self._objects:
            return self._objects.age(f"{name}/{ABOUT}")
        about = self.folder / name / ABOUT
        return time.time() - about.stat().st_mtime if about.is_file() else None

    @contextmanager
    def _fetched(self, name: str) -> Iterator[Path]:
        """The folder of what is kept under this name, on this machine."""
        if self._objects is None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as spool:
            self._objects.get(name, Path(spool) / name)
            yield Path(spool) / name

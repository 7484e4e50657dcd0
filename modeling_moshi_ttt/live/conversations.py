"""Conversations that are put aside: a folder for each, under a name that cannot be guessed, for some time."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ..common.files import make_folder
from ..errors_moshi_ttt import MoshiTTTError
from .session import ABOUT, belongs_to, read_session, write_session

NAME = re.compile(r"[A-Za-z0-9_-]{22}")  # as `new_name` makes them: who knows one may go on with its conversation


class ConversationStore:
    """Sessions of one row in a folder, which several machines may share.

    Args:
        folder: made where it is not there.
        keep: seconds after which a conversation is removed.
    """

    def __init__(self, folder: str | Path, keep: float, model: Any, processor: Any) -> None:
        self.folder, self.keep, self._owner = make_folder(folder, "--sessions"), keep, belongs_to(model, processor)
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
        self.remove_old()
        if not NAME.fullmatch(name) or not (self.folder / name / ABOUT).is_file():
            raise MoshiTTTError(f"no conversation is kept under this name (each is, for {self.keep / 60:.0f} minutes); begin a new one.")
        try:
            return read_session(self.folder / name, self._owner).rows[0]
        except MoshiTTTError as error:  # whose words name a folder of this machine
            raise MoshiTTTError("the conversation of this name is of another model, or not whole; begin a new one.") from error

    def remove_old(self) -> None:
        """Remove what was kept long enough."""
        for about in self.folder.glob(f"*/{ABOUT}"):
            if NAME.fullmatch(about.parent.name) and time.time() - about.stat().st_mtime > self.keep:
                shutil.rmtree(about.parent, ignore_errors=True)

"""Folders in an object store, of any kind that fsspec knows by its URL: s3://, gs://, abfs://, memory:// …"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import fsspec

from ..errors_moshi_ttt import MoshiTTTError


class ObjectStore:
    """Folders of files under one URL.

    Args:
        url: as fsspec reads it; keys and regions come from where the store's own library finds them.
        setting: what the URL is called in messages.

    Raises:
        ValueError: no such kind of store, or its library is not installed.
    """

    def __init__(self, url: str, setting: str) -> None:
        try:
            self._files, self._place = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise MoshiTTTError(f"`{setting}={url}` must be a folder, or a URL that fsspec can open ({error}).") from None

    def put(self, folder: Path, name: str) -> None:
        """Put a folder's files there under `name`, in the place of those that are there."""
        for file in sorted(folder.iterdir()):
            self._files.put_file(str(file), f"{self._place}/{name}/{file.name}")

    def get(self, name: str, folder: Path) -> None:
        """Fetch the files under `name`, of which there may be none, into a new folder."""
        folder.mkdir()
        for path in self._files.glob(f"{self._place}/{name}/*"):
            self._files.get_file(path, str(folder / PurePosixPath(path).name))

    def remove_older(self, file: str, seconds: float) -> None:
        """Remove the folders whose `file` was written longer ago than this."""
        for path in self._files.glob(f"{self._place}/*/{file}"):
            written = self._files.modified(path)
            if (datetime.now(UTC) - written.replace(tzinfo=written.tzinfo or UTC)).total_seconds() > seconds:
                self._files.rm(str(PurePosixPath(path).parent), recursive=True)

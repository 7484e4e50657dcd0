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
            # other servers write there, too: what was listed before is not what there is
            self._files, self._place = fsspec.core.url_to_fs(url, use_listings_cache=False)
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

    def age(self, path: str) -> float | None:
        """Seconds since a file was written; None where there is none."""
        try:
            written = self._files.modified(f"{self._place}/{path}")
        except FileNotFoundError:
            return None
        return (datetime.now(UTC) - written.replace(tzinfo=written.tzinfo or UTC)).total_seconds()

    def names(self) -> list[str]:
        """Of the folders that there are."""
        return [PurePosixPath(path).name for path in self._files.glob(f"{self._place}/*")]

    def remove(self, name: str) -> None:
        """Remove a folder with all that it holds."""
        self._files.rm(f"{self._place}/{name}", recursive=True)

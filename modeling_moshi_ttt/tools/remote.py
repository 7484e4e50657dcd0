"""Talking to the Hub: what is there already, refusals before anything large moves, and errors that say what to do and hold no token."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..common.files import MANIFEST, inside
from .shards import PICKLES
from .verify import ADAPTER_CONFIG, BASE_CONFIG, check_model_type, read_json

TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}")


def redact(text: str) -> str:
    """The text without anything that looks like a Hub token."""
    secret = os.environ.get("HF_TOKEN")
    if secret:
        text = text.replace(secret, "hf_***")
    return TOKEN.sub("hf_***", text)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return redact(f"HTTP {status}: {text}" if status is not None and str(status) not in text else text)


@contextmanager
def hub_errors(doing: str, then: str = "nothing has changed there; run the same command again to go on") -> Iterator[None]:
    """Turn the client's errors into one OSError or ValueError that says what was being done, why it failed, and what holds now."""
    try:
        yield
    except (RevisionNotFoundError, GatedRepoError, RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{doing}: {_reason(error)}") from None
    except LocalTokenNotFoundError:
        raise ValueError(f"{doing}: you are not logged in; run `hf auth login` or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise ValueError(f"{doing}: the Hub refuses this login ({_reason(error)}); run `hf auth login`; {then}") from None
        if status == 412:
            raise ValueError(
                f"{doing}: somebody else has changed the repository in between; look at it, then run the same command again"
            ) from None
        raise OSError(f"{doing} failed: {_reason(error)}; {then}") from None
    except (OSError, RuntimeError) as error:
        raise OSError(f"{doing} failed: {_reason(error)}; {then}") from None
    except Exception as error:
        if type(error).__module__.startswith("httpx"):
            raise OSError(f"{doing} failed: {_reason(error)}; {then}") from None
        raise


@dataclass
class Remote:
    """A revision of a repository: its commit, its file names, and its small JSON files as read."""

    repo_id: str
    sha: str
    files: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    manifest: list[str] = field(default_factory=list)

    @property
    def ttt_layers(self) -> list[int]:
        """Those of the model, or those that an adapter's base must have."""
        return [int(layer) for layer in self.config.get("ttt_layers") or []]

    @property
    def empty(self) -> bool:
        return not set(self.files) - {".gitattributes", "README.md"}


def look(api: HfApi, repo_id: str, revision: str | None = None) -> Remote:
    """What is there, by its small files alone: no weights are read.

    Raises RepositoryNotFoundError or RevisionNotFoundError where there is none, ValueError for a file name that leaves its folder.
    """
    info = api.model_info(repo_id, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    remote = Remote(repo_id, str(info.sha), names)
    with TemporaryDirectory() as folder:
        for name in names:
            inside(folder, name)
        for name in (MANIFEST, "config.json", ADAPTER_CONFIG, BASE_CONFIG):
            if name in names:
                api.hf_hub_download(repo_id, name, revision=remote.sha, local_dir=folder)
        root = Path(folder)
        remote.adapter = read_json(root / ADAPTER_CONFIG) if ADAPTER_CONFIG in names else {}
        config = BASE_CONFIG if remote.adapter else "config.json"
        remote.config = read_json(root / config) if config in names else {}
        listed = read_json(root / MANIFEST).get("files", {}) if MANIFEST in names else {}
        remote.manifest = sorted(str(name) for name in listed)
    return remote


def check_ours(remote: Remote) -> None:
    """Refuse, by its configuration, a repository that holds another kind of model."""
    if remote.adapter:
        return
    if not remote.config:
        raise ValueError(f"{remote.repo_id} holds no config.json and no {ADAPTER_CONFIG}: it is no model that can be loaded")
    check_model_type(remote.config, remote.repo_id)


def look_for_push(api: HfApi, repo_id: str) -> Remote | None:
    """The repository as it stands, None where there is none. A name that another kind of model has taken is refused."""
    try:
        remote = look(api, repo_id)
    except RepositoryNotFoundError:
        return None
    if not remote.empty:
        try:
            check_ours(remote)
        except ValueError as error:
            raise ValueError(f"the name {repo_id} is taken: {error}; choose another name") from None
    return remote


def check_base(api: HfApi, base: str, revision: str | None, ttt_layers: list[int]) -> Remote:
    """The base of an adapter, by its configuration alone: it must be there, of this kind, with the adapter's TTT layers."""
    try:
        remote = look(api, base, revision)
    except RevisionNotFoundError:
        raise ValueError(f"the adapter's base {base} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the adapter's base {base} is not on the Hub, or not for you; push it first, or name another with --base"
        ) from None
    try:
        check_model_type(remote.config, base)
    except ValueError as error:
        raise ValueError(f"the adapter's base: {error}; push the converted base and name it with --base") from None
    check_layers(ttt_layers, remote.ttt_layers, base)
    return remote


def check_layers(adapter_layers: list[int], base_layers: Any, base: str) -> None:
    if adapter_layers and list(base_layers) != adapter_layers:
        raise ValueError(
            f"the adapter is for TTT layers {adapter_layers}, its base {base} has {list(base_layers)}: they do not belong together"
        )


def unwanted(names: list[str]) -> list[str]:
    """Files that are never downloaded: pickles."""
    return [name for name in names if Path(name).suffix in PICKLES]

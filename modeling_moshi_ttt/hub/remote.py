"""Talking to the Hub: what is there already, and refusals before anything large moves."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..adapters.bases import ADAPTER_CONFIG, BASE_CONFIG, check_layers, check_model_type
from ..common.files import MANIFEST, inside, read_json
from ..common.hub import is_hub_name
from ..common.safetensor_files import PICKLES
from ..errors_moshi_ttt import MoshiTTTError
from .carried_code import STAMP, Range, code_range


@dataclass
class Remote:
    """A revision of a repository: its commit, its file names, and what its small files say."""

    repo_id: str
    sha: str
    files: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    manifest: list[str] = field(default_factory=list)
    private: bool = False
    code: Range | None = None  # the transformers that its code, if any, is for

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
    if not is_hub_name(repo_id):
        raise MoshiTTTError(f"{repo_id!r} is no repository's name; write USER/NAME")
    info = api.model_info(repo_id, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    remote = Remote(repo_id, str(info.sha), names, private=bool(info.private))
    with TemporaryDirectory() as folder:
        for name in names:
            inside(folder, name)
        for name in (MANIFEST, "config.json", ADAPTER_CONFIG, BASE_CONFIG, STAMP):
            if name in names:
                api.hf_hub_download(repo_id, name, revision=remote.sha, local_dir=folder)
        root = Path(folder)
        remote.adapter = read_json(root / ADAPTER_CONFIG) if ADAPTER_CONFIG in names else {}
        config = BASE_CONFIG if remote.adapter else "config.json"
        remote.config = read_json(root / config) if config in names else {}
        listed = read_json(root / MANIFEST).get("files", {}) if MANIFEST in names else {}
        remote.manifest = sorted(str(name) for name in listed)
        remote.code = code_range(names, root)
    return remote


def check_ours(remote: Remote) -> None:
    """Refuse, by its configuration, a repository that holds another kind of model."""
    if remote.adapter:
        return
    if not remote.config:
        raise MoshiTTTError(f"{remote.repo_id} holds no config.json and no {ADAPTER_CONFIG}: it is no model that can be loaded")
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
            raise MoshiTTTError(f"the name {repo_id} is taken: {error}; choose another name") from None
    return remote


def check_base(api: HfApi, base: str, revision: str | None, ttt_layers: list[int]) -> Remote:
    """The base of an adapter, by its configuration alone: it must be there, of this kind, with the adapter's TTT layers."""
    try:
        remote = look(api, base, revision)
    except RevisionNotFoundError:
        raise MoshiTTTError(f"the adapter's base {base} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise MoshiTTTError(
            f"the adapter's base {base} is not on the Hub, or not for you; push it first, or name another with --base"
        ) from None
    try:
        check_model_type(remote.config, base)
    except ValueError as error:
        raise MoshiTTTError(f"the adapter's base: {error}; push the converted base and name it with --base") from None
    check_layers(ttt_layers, remote.ttt_layers, base)
    return remote


def unwanted(names: list[str]) -> list[str]:
    """Files that are never downloaded: pickles."""
    return [name for name in names if Path(name).suffix in PICKLES]

"""Put a checkpoint on the Hugging Face Hub: weights, code, processor, card, results and manifest, in one commit.

The folder is made, loaded and its loss compared on the stored probe before anything is uploaded. Until the one commit at the end the
repository stays as it was; an interrupted push goes on where it stopped when it is repeated.

A file card.json in the run folder tells the card what only you know: base_model, datasets, description, hardware, languages, license, time.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..adapters.bases import ADAPTER_CONFIG, adapter_layers, is_adapter
from ..common.files import read_json
from ..common.hub import hub_errors
from ..common.safetensor_files import DEFAULT_SHARD_SIZE
from ..errors_moshi_ttt import MoshiTTTError
from .facts import Facts
from .remote import Remote, check_base, look_for_push
from .stage import choose_kind, hub_base, locate, stage


@dataclass
class Pushed:
    """Where it went, and what it is."""

    url: str
    oid: str
    facts: Facts


def push(
    source: str | os.PathLike[str],
    repo_id: str,
    kind: str | None = None,
    private: bool = False,
    tag: str | None = None,
    base: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    results: str | os.PathLike[str] | None = None,
    api: HfApi | None = None,
) -> Pushed:
    """Push a run folder or a checkpoint folder to `repo_id`.

    Args:
        kind: "full", "adapter" or "merged" (an adapter put into its base); by default what the folder holds.
        tag: also name the commit.
        base: the adapter's base on the Hub, where its own configuration names a local folder.
        results: the folder of an evaluation, whose results and pictures go up too.

    Raises:
        ValueError: what is wrong with the source, the name or the login. OSError: a transfer that failed; the old revision stands.
    """
    api = api or HfApi()
    folder, _ = locate(source)
    kind = choose_kind(folder, kind)
    if base and kind != "adapter":
        raise MoshiTTTError(f"--base is the base that a pushed adapter names; {folder} goes up as --{kind}, which has none: leave it out")
    with hub_errors(f"looking at {repo_id}"):
        remote = look_for_push(api, repo_id)
        _check_tag(api, repo_id, tag, remote)
        pin = _check_adapter(api, folder, base) if kind == "adapter" else None
    with TemporaryDirectory(prefix=".push-", dir=_room(folder)) as temporary:
        staged = Path(temporary) / "staged"
        staged.mkdir()
        facts = stage(source, staged, repo_id, kind, base, max_shard_size, results, pin)
        with hub_errors(f"pushing to {repo_id}"):
            oid = _upload(api, staged, repo_id, private, remote)
    if tag:
        with hub_errors(f"tagging {repo_id} as {tag}", then=f"the commit {oid[:8]} is there; run the same command again to tag it"):
            if tag not in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
                api.create_tag(repo_id, tag=tag, revision=oid)
    return Pushed(f"{api.endpoint}/{repo_id}", oid, facts)


def _room(folder: Path) -> Path | None:
    """Beside the source, where there is room for a second copy if anywhere; else the system's place for temporary files."""
    return folder.parent if os.access(folder.parent, os.W_OK) else None


def _check_tag(api: HfApi, repo_id: str, tag: str | None, remote: Remote | None) -> None:
    """A tag that names another commit than the newest is taken. On the newest it may be from this push, broken off before."""
    if tag and remote is not None:
        taken = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tag in taken and taken[tag] != remote.sha:
            raise MoshiTTTError(f"{repo_id} already has a tag {tag!r} on another commit; choose another tag")


def _check_adapter(api: HfApi, folder: Path, base: str | None) -> str:
    """The revision of the base that the adapter will name: its own, else the newest commit, for a base that moves on is another base."""
    name, revision = hub_base(read_json(folder / ADAPTER_CONFIG), base)
    there = check_base(api, name, revision, adapter_layers(folder))
    return revision or there.sha


def _upload(api: HfApi, staged: Path, repo_id: str, private: bool, remote: Remote | None) -> str:
    """All files in one commit on top of `remote`; files of an older push that are no longer there go away in it."""
    if remote is None:
        api.create_repo(repo_id, private=private)
        remote = Remote(repo_id, str(api.model_info(repo_id).sha), [])
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    operations: list[Any] = [CommitOperationAdd(name, staged / name) for name in names]
    stale = set(remote.manifest) & set(remote.files) - set(names)
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    # upload_folder would make several commits of it
    commit = api.create_commit(repo_id, operations, commit_message=f"Upload {staged_kind(staged)}", parent_commit=remote.sha)
    return commit.oid


def staged_kind(staged: Path) -> str:
    return "adapter" if is_adapter(staged) else "model"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="a training run's folder or a checkpoint folder")
    parser.add_argument("repo_id", metavar="USER/NAME", help="where to put it")
    kinds = parser.add_mutually_exclusive_group()
    for kind, meaning in (("adapter", "LoRA and TTT weights only"), ("merged", "the adapter put into its base"), ("full", "a whole model")):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=meaning)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--tag", help="also name this commit, such as v1")
    parser.add_argument("--base", help="the adapter's base on the Hub, when it was trained on a local copy")
    parser.add_argument("--results", metavar="FOLDER", help="an evaluation's output folder, to be shown in the card")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE, help="largest weight file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    done = push(args.source, args.repo_id, args.kind, args.private, args.tag, args.base, args.max_shard_size, args.results)
    print(done.facts.describe())
    print(f"pushed to {done.url}" + (f" as {args.tag}" if args.tag else "") + f" (commit {done.oid[:8]})")
    return 0

"""Put a checkpoint on the Hugging Face Hub: weights, code, processor, card, results and manifest, in one commit.

The folder is made, loaded and its loss compared on the stored probe before anything is uploaded. Until the one commit at the end the
repository stays as it was; an interrupted push goes on where it stopped when it is repeated.

A file card.json in the run folder tells the card what only you know: base_model, datasets, description, hardware, languages, license, time.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..adapters.bases import ADAPTER_CONFIG, adapter_layers, is_adapter
from ..common.checkpoint_files import left_out
from ..common.files import MANIFEST, read_json
from ..common.hub import hub_errors
from ..common.safetensor_files import DEFAULT_SHARD_SIZE
from ..common.temporary import temporary_folder
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
    left_out: list[str]  # files of the checkpoint's folder that are not the checkpoint's


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
        private: make a new repository private; one that exists must be so already.
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
    with hub_errors(f"looking at {repo_id}", token=api.token):
        remote = look_for_push(api, repo_id)
        if private and remote is not None and not remote.private:
            raise MoshiTTTError(
                f"{repo_id} exists and is public, so --private would hide nothing; make it private in its settings on the Hub, choose another name, "
                "or leave --private out"
            )
        _check_tag(api, repo_id, tag, remote)
        pin = _check_adapter(api, folder, base) if kind == "adapter" else None
    with temporary_folder(_room(folder) / "push") as temporary:
        staged = temporary / "staged"
        staged.mkdir()
        facts = stage(source, staged, repo_id, kind, base, max_shard_size, results, pin)
        if remote is None:
            with hub_errors(f"making {repo_id}", token=api.token):
                remote = _make(api, repo_id, private)
        oid = _upload(api, staged, remote)
    if tag:
        then = f"the commit {oid[:8]} is there; run the same command again to tag it"
        with hub_errors(f"tagging {repo_id} as {tag}", then, api.token):
            if tag not in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
                api.create_tag(repo_id, tag=tag, revision=oid)
    return Pushed(f"{api.endpoint}/{repo_id}", oid, facts, left_out(folder))


def _room(folder: Path) -> Path:
    """Beside the source, where there is room for a second copy if anywhere; else the system's place for temporary files."""
    return folder.parent if os.access(folder.parent, os.W_OK) else Path(gettempdir())


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


def _make(api: HfApi, repo_id: str, private: bool) -> Remote:
    """A new repository; without --private, visible as its owner's settings say."""
    api.create_repo(repo_id, private=private or None)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise MoshiTTTError(f"{repo_id} was made, but the Hub did not make it private; nothing was sent, look at its settings there")
    return Remote(repo_id, str(info.sha), [], private=bool(info.private))


def _upload(api: HfApi, staged: Path, remote: Remote) -> str:
    """All files in one commit on top of `remote`; files of an older push that are no longer there go away in it. Returns the commit.

    Where no answer comes, the newest commit tells which of three things holds: this one is there, nothing has changed, or somebody else's is.
    """
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    operations: list[Any] = [CommitOperationAdd(name, staged / name) for name in names]
    stale = set(remote.manifest) & set(remote.files) - set(names)
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    repo_id, message, doing = remote.repo_id, f"Upload {staged_kind(staged)}", f"pushing to {remote.repo_id}"
    try:
        # upload_folder would make several commits of it
        return str(api.create_commit(repo_id, operations, commit_message=message, parent_commit=remote.sha).oid)
    except Exception as error:  # the client has many; hub_errors says below which of them are the Hub's
        head = _head(api, repo_id)
        if head not in (None, remote.sha) and _holds(api, repo_id, str(head), staged):
            return str(head)
        if head is None:
            then = "whether the commit is there could not be seen; look at the repository, then run the same command again"
        elif head == remote.sha:
            then = "nothing has changed there; run the same command again to go on"
        else:
            then = f"somebody else has changed the repository in between (commit {head[:8]}); look at it, then run the same command again"
        with hub_errors(doing, then, api.token):
            raise error


def _head(api: HfApi, repo_id: str) -> str | None:
    """The newest commit; None where the Hub does not answer."""
    try:
        with hub_errors("looking"):
            return str(api.model_info(repo_id).sha)
    except MoshiTTTError:
        return None


def _holds(api: HfApi, repo_id: str, revision: str, staged: Path) -> bool:
    """Whether a revision is what was staged, by its manifest."""
    with TemporaryDirectory() as folder:
        try:
            with hub_errors("looking"):
                there = api.hf_hub_download(repo_id, MANIFEST, revision=revision, local_dir=folder)
        except MoshiTTTError:
            return False
        return Path(there).read_bytes() == (staged / MANIFEST).read_bytes()


def staged_kind(staged: Path) -> str:
    return "adapter" if is_adapter(staged) else "model"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="a training run's folder or a checkpoint folder")
    parser.add_argument("repo_id", metavar="USER/NAME", help="where to put it")
    kinds = parser.add_mutually_exclusive_group()
    for kind, meaning in (("adapter", "LoRA and TTT weights only"), ("merged", "the adapter put into its base"), ("full", "a whole model")):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=meaning)
    parser.add_argument("--private", action="store_true", help="make a new repository private; one that exists must be so already")
    parser.add_argument("--tag", help="also name this commit, such as v1")
    parser.add_argument("--base", help="the adapter's base on the Hub, when it was trained on a local copy")
    parser.add_argument("--results", metavar="FOLDER", help="an evaluation's output folder, to be shown in the card")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE, help="largest weight file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    done = push(args.source, args.repo_id, args.kind, args.private, args.tag, args.base, args.max_shard_size, args.results)
    print(done.facts.describe())
    if done.left_out:
        print(f"left out, for they belong to no checkpoint: {', '.join(done.left_out)}")
    print(f"pushed to {done.url}" + (f" as {args.tag}" if args.tag else "") + f" (commit {done.oid[:8]})")
    return 0

"""Fetch a checkpoint from the Hugging Face Hub, check it against its manifest, load it, run its probe, and say what it holds.

DEST appears only when all of that is well. A pull that was broken off goes on where it stopped when it is repeated.
"""

import argparse
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants

from ..common.files import MANIFEST, check_manifest
from ..common.hub import hub_errors
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from .facts import Facts
from .remote import check_base, check_ours, look, unwanted
from .verify import verify

CLIENT_FOLDER = ".cache"


def pull(repo_id: str, dest: str | os.PathLike[str], revision: str | None = None, api: HfApi | None = None) -> Facts:
    """Download `repo_id` at a branch, tag or commit into the new folder `dest`.

    Raises:
        ValueError: another kind of model (seen before any weights are read), no such revision, files that differ from the manifest.
        OSError: a transfer that failed. FileExistsError: `dest` holds something already.
    """
    api, dest = api or HfApi(), Path(dest).absolute()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise MoshiTTTOSError(f"{dest} holds something already; choose a new folder")
    part = dest.parent / f".{dest.name}.part"
    with hub_errors(f"pulling {repo_id}", then=f"what has arrived is kept in {part}; run the same command again to go on"):
        remote = look(api, repo_id, revision)
        check_ours(remote)
        base = None
        if remote.adapter:
            base = check_base(api, str(remote.adapter.get("base_model_name_or_path")), remote.adapter.get("revision"), remote.ttt_layers)
        api.snapshot_download(repo_id, revision=remote.sha, local_dir=part, ignore_patterns=unwanted(remote.files) or None)
    _check(part, repo_id, set(remote.files))
    facts = verify(part)
    facts.base_code = base.code if base else None
    if dest.exists():
        dest.rmdir()
    part.rename(dest)
    return facts


def _check(part: Path, repo_id: str, wanted: set[str]) -> None:
    """The downloaded files against the repository's list and the manifest. A wrong file is removed, so that it alone is fetched anew."""
    (part / ".gitattributes").unlink(missing_ok=True)
    for path in part.rglob("*"):
        own = path.relative_to(part)
        if path.is_file() and own.parts[0] != CLIENT_FOLDER and own.as_posix() not in wanted:
            path.unlink()  # left by a pull of another revision
    if (part / MANIFEST).is_file():
        problems = [problem for problem in check_manifest(part) if not problem.startswith(CLIENT_FOLDER)]
        for name in (path.relative_to(part).as_posix() for path in list(part.rglob("*"))):
            if any(problem.startswith((f"{name} ", f"{part / name} ")) for problem in problems):
                (part / name).unlink()
        if problems:
            lines = [f"what arrived from {repo_id} is not what was pushed; run the same command again:", *problems[:10]]
            raise MoshiTTTError("\n  ".join(lines))
    shutil.rmtree(part / CLIENT_FOLDER, ignore_errors=True)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo_id", metavar="USER/NAME", help="what to fetch")
    parser.add_argument("dest", metavar="DEST", help="a new folder")
    parser.add_argument("--revision", help=f"branch, tag or commit (default: {constants.DEFAULT_REVISION})")


def run(args: argparse.Namespace) -> int:
    facts = pull(args.repo_id, args.dest, args.revision)
    print(facts.describe())
    print(f"pulled into {args.dest}")
    return 0

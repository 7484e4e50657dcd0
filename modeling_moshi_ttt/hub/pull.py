"""Fetch a checkpoint from the Hugging Face Hub, check it against its manifest, load it, run its probe, and say what it holds.

A repository without a manifest, as `push_to_hub` of a model makes it, has nothing to be checked against, and needs --unchecked. DEST
appears only when all of that is well. A pull that was broken off goes on where it stopped when it is repeated.
"""

import argparse
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants

from ..common.files import MANIFEST, check_folder, check_manifest
from ..common.hub import hub_errors
from ..common.lock import locked
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from .facts import Facts
from .remote import check_base, check_ours, look, unwanted
from .verify import verify

CLIENT_FOLDER = ".cache"
MARK = "moshi-ttt-pull"  # in a folder of what has arrived so far: only such a one is gone on with, cleared and removed


def pull(
    repo_id: str, dest: str | os.PathLike[str], revision: str | None = None, api: HfApi | None = None, unchecked: bool = False
) -> Facts:
    """Download `repo_id` at a branch, tag or commit into the new folder `dest`.

    Args:
        unchecked: take a repository without a manifest too.

    Raises:
        ValueError: another kind of model (seen before any weights are read), no such revision, files that differ from the manifest, or no
            manifest.
        OSError: a transfer that failed, `dest` holds something already, or another process pulls into it.
    """
    api, dest = api or HfApi(), Path(dest).absolute()
    _check_free(dest)
    place = dest.parent / f".{dest.name}.part"
    part = place / "files"
    then = f"what has arrived is kept in {place}; run the same command again to go on"
    with hub_errors(f"pulling {repo_id}", then, api.token):
        remote = look(api, repo_id, revision)
        check_ours(remote)
        base = None
        if remote.adapter:
            base = check_base(api, str(remote.adapter.get("base_model_name_or_path")), remote.adapter.get("revision"), remote.ttt_layers)
        if MANIFEST not in remote.files and not unchecked:
            raise MoshiTTTError(
                f"{repo_id} holds no {MANIFEST}, so nothing tells whether what arrives is what was put there; take it with --unchecked, or ask "
                "its owner to `moshi-ttt push` it"
            )
    _claim(place)
    with locked(place, "DEST"):
        _check_free(dest)  # another pull may have ended since
        with hub_errors(f"pulling {repo_id}", then, api.token):
            api.snapshot_download(repo_id, revision=remote.sha, local_dir=part, ignore_patterns=unwanted(remote.files) or None)
        _check(part, repo_id, set(remote.files))
        facts = verify(part)
        facts.base_code = base.code if base else None
        if dest.exists():
            dest.rmdir()
        part.rename(dest)
        shutil.rmtree(place)
    return facts


def _check_free(dest: Path) -> None:
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise MoshiTTTOSError(f"{dest} holds something already; choose a new folder")


def _claim(place: Path) -> None:
    """Make the folder of what arrives, or go on with the one of a pull before; a link or another's folder in its place is refused."""
    if place.is_symlink():
        raise MoshiTTTError(f"{place} is a link; remove it, or choose another DEST")
    check_folder(place, MARK)
    place.mkdir(parents=True, exist_ok=True)
    (place / MARK).touch()


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
    parser.add_argument("--unchecked", action="store_true", help="also where no manifest tells what should arrive")
    parser.add_argument("--revision", help=f"branch, tag or commit (default: {constants.DEFAULT_REVISION})")


def run(args: argparse.Namespace) -> int:
    facts = pull(args.repo_id, args.dest, args.revision, unchecked=args.unchecked)
    print(facts.describe())
    print(f"pulled into {args.dest}")
    return 0

"""Write copies of what comes with the package into a folder, to edit: configuration/ and examples/, as they stand in the project's
repository.

Every command and path of the README holds in that folder.
"""

import argparse
import shlex
import shutil
from collections import Counter

from ..errors_moshi_ttt import MoshiTTTError
from . import packaged
from .files import make_folder


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder")


def run(args: argparse.Namespace) -> int:
    """Copy everything and say what was written and what to do next."""
    folder = make_folder(args.folder, "FOLDER")
    if any(folder.iterdir()):
        raise MoshiTTTError(f"FOLDER is {folder}, which is not empty; name a new or an empty folder.")
    files = packaged.files()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packaged.ROOT / name, folder / name)
    for part, number in Counter("/".join(name.parent.parts[:2]) for name in files).items():
        print(f"{folder / part}: {number} files")
    print(
        f"next: cd {shlex.quote(str(folder))}, then python examples/demo.py, or change configuration/train/demo.yaml and moshi-ttt train it"
    )
    return 0

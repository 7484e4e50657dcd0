"""The tests that transformers and PEFT run over their own models, of exactly the installed versions, from their source distributions on
PyPI.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".peer-suites"

# Modules that the tests import and that the source distributions leave out, each with nothing in it that would test anything.
STAND_INS = {
    "transformers": {
        "exporters/__init__.py": "",
        "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
        "generation/__init__.py": "",
        "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
        "utils/__init__.py": "",
        "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
        "../utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
    },
    "peft": {},
}


def module_name(package: str) -> str:
    """What the tests of `package` are imported as, beside the project's own `tests`."""
    return f"{package}_suite"


def suite(package: str) -> Path:
    """The folder, for `sys.path`, that holds the tests of the installed `package` as `module_name(package)`; downloaded once.

    Raises:
        subprocess.CalledProcessError: the source distribution cannot be had.
    """
    folder = CACHE / f"{package}-{importlib.metadata.version(package)}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            unpacked = _download(package, Path(temporary))
            tests = Path(temporary) / "suite" / module_name(package)
            shutil.copytree(unpacked / "tests", tests)
            for name, text in {"__init__.py": "", **STAND_INS[package]}.items():
                path = tests / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    path.write_text(text)
            tests.parent.rename(folder)
    return folder


def _download(package: str, target: Path) -> Path:
    requirement = f"{package}=={importlib.metadata.version(package)}"
    options = ["--quiet", "--no-deps", "--no-binary", package, "--dest", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    with tarfile.open(next(target.glob("*.tar.gz"))) as archive:
        archive.extractall(target, filter="data")
    return next(path for path in target.iterdir() if path.is_dir())


if __name__ == "__main__":
    for name in STAND_INS:
        print(suite(name))

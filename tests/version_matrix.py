"""`make test-versions`: the quick core of the suite with the lowest and with the newest libraries that setup.cfg allows.

Each environment is made anew, as a user would make it: the package as a wheel, the libraries at setup.cfg's lower bounds or as new as pip
finds them. Its tests run in a copy of the checkout without the package, so that the wheel is what they import. Needs no more than Python
and pip; an environment takes about 6 GB while it is there, most of it the GPU libraries that come with torch.

    python tests/version_matrix.py                                    # lowest and newest, with this Python
    python tests/version_matrix.py newest:python3.13                  # one environment, with another Python
"""

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The quick core: the ops, the model, its cache, stream and graphs, loading by Auto classes, the processor, training, the Hub, the README's
# first Python.
CORE = (
    "test_ttt_ops.py",
    "test_model.py",
    "test_model_checkpointing.py",
    "test_model_golden.py",
    "test_cache.py",
    "test_generation.py",
    "test_export.py",
    "test_auto_classes.py",
    "test_processing.py",
    "test_mimi_stream.py",
    "test_training_modes.py",
    "test_training_command.py",
    "test_training_sources.py",
    "test_training_trackers.py",
    "test_hub_round_trip.py",
    "test_versions.py",
    "test_readme.py::test_python_runs_as_it_stands",
)
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "numpy")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")


def requirements() -> dict[str, str]:
    """Every library of setup.cfg, extras included, with the range it is allowed: {"transformers": ">=5.23,<5.25", ...}.

    Raises:
        ValueError: a library has two ranges.
    """
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = [settings["options"]["install_requires"], *settings["options.extras_require"].values()]
    found = set(re.findall(r"^([\w-]+)([<>=!~][^;\s]*)", "\n".join(lines), flags=re.MULTILINE))
    names = sorted(name for name, _ in found)
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"setup.cfg gives {', '.join(twice)} two ranges; write the same in every extra")
    return dict(found)


def lower_bounds() -> dict[str, str]:
    """The lowest release of each library that setup.cfg allows: {"transformers": "5.23", ...}."""
    return {name: bound[1] for name, allowed in requirements().items() if (bound := re.search(r">=([\d.]+)", allowed))}


def check(kind: str, python: str, place: Path) -> tuple[list[str], bool]:
    """Make one environment in the empty folder `place` and run the core in it: the cells of its row, and whether all is well."""
    copy, inside = place / "checkout", place / "venv" / "bin" / "python"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    (place / "lowest.txt").write_text("".join(f"{name}=={bound}\n" for name, bound in lower_bounds().items()))
    bounds = ["--constraint", str(place / "lowest.txt")] if kind == "lowest" else []
    subprocess.run([python, "-m", "venv", str(place / "venv")], check=True)
    pip = [str(inside), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *bounds, f"{copy}[dev]"], check=True)
    shutil.rmtree(copy / "modeling_moshi_ttt")
    wanted = f"import sys; from importlib.metadata import version; print(sys.version.split()[0], *map(version, {SHOWN}))"
    versions = subprocess.run([str(inside), "-c", wanted], check=True, capture_output=True, text=True).stdout.split()
    tests = [f"tests/{name}" for name in CORE]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(inside), "-m", "pytest", "-m", "not slow", *tests], cwd=copy, env=environment, capture_output=True, text=True
    )
    summary = re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1]).strip("= ")
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    return [kind, *versions, summary], done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="lowest|newest[:PYTHON]", default=["lowest", "newest"])
    rows, well = [], True
    for environment in parser.parse_args().environments:
        kind, _, python = environment.partition(":")
        if kind not in ("lowest", "newest"):
            parser.error(f"{kind!r} is no environment; choose lowest or newest")
        with tempfile.TemporaryDirectory(prefix=".versions-", dir=ROOT) as place:  # not in /tmp, which may be small
            try:
                row, passed = check(kind, python or sys.executable, Path(place))
            except subprocess.CalledProcessError as error:  # pip has said why
                print(error, file=sys.stderr)
                row, passed = [kind, *[""] * (len(SHOWN) + 1), "does not install"], False
        print(" | ".join(row), flush=True)
        rows, well = [*rows, row], well and passed
    print("\n| libraries | Python | " + " | ".join(SHOWN) + " | quick core |")
    print("| --- " * (len(SHOWN) + 3) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

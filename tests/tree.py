"""What belongs to the project, and what lies around it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AROUND = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "dist", "runs"}


def project_files() -> list[Path]:
    """Every file of the project, relative to its root: what git tracks or would; in an unpacked source distribution, all but leftovers."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    paths = [Path(name) for name in listed if (ROOT / name).is_file()] or [
        path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()
    ]
    return sorted(path for path in paths if not any(part in AROUND or part.endswith(".egg-info") for part in path.parts))

"""Wheel and source distribution: built as PyPI would have them, whole, and enough for the README in an environment that has no checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from tree import ROOT, project_files

PACKAGE = "modeling_moshi_ttt"
BARE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOSHI_TTT_DEBUG")} | {"OMP_NUM_THREADS": "1"}


def run(*command, cwd, code=0, **environment):
    """What a command says, after it ended as expected."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=BARE | environment, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of a source distribution and of the wheel that is made from it, built from a copy of the project without a network."""
    place = tmp_path_factory.mktemp("build")
    for name in project_files():
        (place / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "project" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", cwd=place / "project")
    return place / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source(dist, tmp_path_factory):
    """The unpacked source distribution."""
    (path,) = dist.glob("*.tar.gz")
    place = tmp_path_factory.mktemp("source")
    with tarfile.open(path) as archive:
        archive.extractall(place, filter="data")
    (folder,) = place.iterdir()
    return folder


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """The commands of an environment that holds the wheel, and this one's other packages."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files, an editable install's, are not read
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    assert run(python, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", cwd=place).strip() == str(packages / PACKAGE / "__init__.py")
    return place / "bin"


def test_both_pass_twine(dist):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), cwd=dist, NO_COLOR="1")
    assert said.count("PASSED") == 2


def test_the_wheel_holds_the_package_and_what_the_readme_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name.as_posix() for name in project_files() if name.parts[0] == PACKAGE}
    wanted |= {f"{PACKAGE}/{name.as_posix()}" for name in project_files() if name.parts[0] in ("configuration", "examples")}
    assert held == wanted


def test_metadata_is_fit_for_pypi(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Author"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Home-page"].startswith("https://")
    assert {entry.split(", ")[0] for entry in metadata.get_all("Project-URL")} == {"Documentation", "Changelog", "Issues"}
    lowest = re.fullmatch(r">=3\.(\d+).*", metadata["Requires-Python"])[1]
    versions = re.findall(r"Python :: 3\.(\d+)", "\n".join(metadata.get_all("Classifier")))
    assert min(map(int, versions)) >= max(int(lowest), 11)


def test_readme_links_work_away_from_the_repository():
    """On PyPI the README stands alone: its links are absolute, and those into the repository name files that are there."""
    home = re.search(r"^url = (\S+)$", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)[1]
    raw = home.replace("github.com", "raw.githubusercontent.com")
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    inside = [link.split("/main/")[1] for link in links if link.startswith((home, raw))]
    assert {"docs/pictures/spoken_recall.png", "CONTRIBUTING.md"} <= set(inside)
    assert [name for name in inside if not (ROOT / name).is_file()] == []


def test_citation_and_security_say_what_they_must():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"authors", "cff-version", "message", "title"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    assert f"url = {citation['repository-code']}\n" in (ROOT / "setup.cfg").read_text()
    security = (ROOT / "SECURITY.md").read_text()
    assert "## Reporting" in security
    assert "trusted" in security


def test_the_source_distribution_is_the_whole_project(source):
    left_out = {".gitignore"}
    assert [name.as_posix() for name in project_files() if not (source / name).is_file() and name.as_posix() not in left_out] == []


QUICK = ("tests/test_layering.py", "tests/test_delay_and_loss.py")


def test_tests_of_the_source_distribution_run_in_it(source):
    said = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *QUICK, cwd=source, PYTHONPATH=str(source))
    assert re.search(r"\d+ passed", said)


def test_tests_of_the_source_distribution_run_on_the_installed_wheel(source, bin_folder):
    hidden = source / PACKAGE
    hidden.rename(source / "aside")
    try:
        command = ("-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))", "-p", "no:cacheprovider")
        said = run(bin_folder / "python", *command, *QUICK, "tests/test_model_golden.py", cwd=source)
    finally:
        (source / "aside").rename(hidden)
    assert re.search(r"\d+ passed", said)


def test_the_wheel_is_enough_for_the_readme(bin_folder, tmp_path):
    """From an empty folder: help, the first block of Python, data, training, evaluation, copies to edit."""
    moshi_ttt, python, here = bin_folder / "moshi-ttt", bin_folder / "python", tmp_path
    assert "init" in run(moshi_ttt, "--help", cwd=here)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    assert "0.08 s of answer a step" in run(python, "-c", code, cwd=here)
    said = run(moshi_ttt, "prepare", "dialogues/eval", "--processor", "tiny", "--cache", "runs/codes", cwd=here)
    assert "2 recordings" in said
    data = ("data.train=dialogues/eval", "data.cache=runs/codes", "data.batch_size=1", "data.window_seconds=4")
    run(moshi_ttt, "train", "demo", *data, "optim.steps=1", "evaluate_start=false", "trackers=[]", cwd=here)
    few = ("dialogue.max_seconds=1", "dialogue.max_recordings=1", "dtype=float32")
    run(moshi_ttt, "evaluate", "dialogue", "model=runs/demo/final", *few, cwd=here)
    assert (here / "runs" / "evaluate" / "report.html").is_file()
    run(moshi_ttt, "init", "work", cwd=here)
    wanted = [name for name in project_files() if name.parts[0] in ("configuration", "examples")]
    assert sorted(path.relative_to(here / "work") for path in (here / "work").rglob("*") if path.is_file()) == wanted


def test_an_editable_install_finds_the_checkouts_files(tmp_path):
    """What setup.cfg maps into the package's name is read where it stands."""
    venv.create(tmp_path / "env", with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    project = tmp_path / "project"
    for name in project_files():
        if name.suffix in (".py", ".cfg", ".toml", ".md", ".in", ".yaml", ".json") or name.name == "LICENSE":
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / "env" / "bin" / "python"
    flags = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, "--editable", project, cwd=tmp_path)
    said = run(python, "-c", f"from {PACKAGE} import packaged; print(packaged('train', 'demo'))", cwd=tmp_path)
    assert said.strip() == str(project / "configuration" / "train" / "demo.yaml")

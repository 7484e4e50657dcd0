"""The documentation builds without a warning, its tutorials run and say what they show, and its reference pages hold all there is."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hub_server import HubServer
from pages import PAGES, commands, files_named, languages, read, run_command, run_page
from tree import ROOT

import modeling_moshi_ttt
from modeling_moshi_ttt.cli import COMMANDS, main
from modeling_moshi_ttt.common import packaged
from modeling_moshi_ttt.common.settings import groups
from modeling_moshi_ttt.evaluation.settings import EvaluateSettings
from modeling_moshi_ttt.training.run_config import OptimSettings, RunConfig

RECORDINGS = "docs/tutorials/recordings.md"
# Pages whose commands need a GPU, the network or hours show them in blocks of another kind (bash, py), which are not run.
IN_PROCESS = [page for page in PAGES if page != RECORDINGS and page.startswith("docs/") and {*languages(page)} & {"sh", "python"}]
IN_SHORT = {"train": ["optim.steps=2", "evaluate_start=false", "evaluate_every=0"], "recall": ["steps=2", "sequences=8"]}


def in_short(line: str) -> str:
    """A command of minutes with fewer steps, which leave its output's form as it is."""
    return " ".join([line, *(f"'{word}'" for word in IN_SHORT.get(line.split()[1], []))])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the recipe demo has run, in short."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_command(in_short("moshi-ttt train demo"))
    return folder


@pytest.mark.parametrize("page", IN_PROCESS)
def test_a_page_runs_and_says_what_it_shows(page, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert run_page(page, lambda line: run_command(in_short(line))) >= 1


def test_recordings_become_an_adapter_on_the_hub_and_come_back(tmp_path, monkeypatch):
    """What speaks with the Hub in processes of their own: its address is read when its library is imported."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

        def run(line: str) -> str:
            if line.startswith("hf auth login"):
                return ""
            if line.split()[1] not in ("push", "pull"):
                return run_command(in_short(line))
            done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            return done.stdout

        assert run_page(RECORDINGS, run) >= 8
    assert Path("my-moshi").is_dir()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text, makefile = read(page), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in re.findall(r"moshi-ttt ([a-z]+)", text):
        assert command in COMMANDS, command
    for path in files_named(page):
        assert [*ROOT.glob(path.rstrip("./"))], path


def test_options_that_pages_name_exist(capsys):
    for page in PAGES:
        for line in re.findall(r"moshi-ttt [a-z]+ [^`\n]*", read(page)):
            name, options = line.split()[1], re.findall(r"(?<=\s)--[a-z-]+", re.split(r"\s+# ", line)[0])
            with pytest.raises(SystemExit):
                main([name, "--help"])
            said = capsys.readouterr().out
            assert [option for option in options if option not in said] == [], line


def test_the_pages_build_without_a_warning_and_need_no_network(tmp_path):
    """As `make docs` builds them, from a copy; every public name of the package has its place in them."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("generated"))
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", "html", "docs", "html"]
    environment = {**os.environ, "PYTHONPATH": str(Path(modeling_moshi_ttt.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    pages = {path.relative_to(tmp_path / "html").as_posix(): path.read_text() for path in (tmp_path / "html").rglob("*.html")}
    assert {page.removeprefix("docs/").replace(".md", ".html") for page in PAGES if page.startswith("docs/")} <= pages.keys()
    loaded = re.compile(r'<(?:script|img|link)[^>]*(?:src|href)="https?://')
    assert [page for page, text in pages.items() if loaded.search(text)] == []
    assert "<math" in pages["mathematics.html"]
    named = set(re.findall(r'id="modeling_moshi_ttt[\w.]*\.(\w+)"', " ".join(pages.values())))
    assert {name for name in modeling_moshi_ttt.__all__ if not name.startswith("_")} <= named


@pytest.fixture
def generate(monkeypatch):
    """What writes the reference pages at each build."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return import_module("generate")


def test_every_setting_has_a_meaning_and_every_recipe_and_command_its_place(generate, tmp_path):
    generate.write_pages(tmp_path / "pages")
    settings, recipes, said = ((tmp_path / "pages" / f"{name}.md").read_text() for name in ("settings", "recipes", "commands"))
    for key in (row.key for cls in (RunConfig, EvaluateSettings) for group in groups(cls) for row in group.rows):
        assert re.search(rf"^\| `{re.escape(key)}` \|.*\| [^|]{{4,}} \|$", settings, flags=re.MULTILINE), key
    assert f"| `optim.lr` | float | `{OptimSettings().lr}` |" in settings
    for kind in ("train", "evaluate", "accelerate"):
        assert [name for name in packaged.names(kind) if f"### {name}\n" not in recipes] == []
    assert [name for name in COMMANDS if f"usage: moshi-ttt {name} " not in said] == []


def test_commands_are_split_from_their_comments():
    assert commands("moshi-ttt train demo     # minutes\n\nmoshi-ttt verify a#b\n") == ["moshi-ttt train demo", "moshi-ttt verify a#b"]

"""Everything in the README runs: its Python as it stands, its commands against a local Hub, its files are there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from tree import ROOT, project_files
from version_matrix import SHOWN, lower_bounds

import modeling_moshi_ttt
from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.evaluation import recall
from modeling_moshi_ttt.tools.cli import COMMANDS
from modeling_moshi_ttt.versions_moshi_ttt import TRANSFORMERS, release

PACKAGE = Path(modeling_moshi_ttt.__file__).parent
README = (ROOT / "README.md").read_text()
PICTURE_OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home|farm)/")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.replace("\n   ", "\n"), flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_it_stands(code, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print.*  # (.*)$", code, flags=re.MULTILINE) != []
    if "session" in names:
        assert (tmp_path / "conversation").is_dir()
        assert isinstance(names["frame"].text[0], str)
    else:
        assert names["sound"].shape[1] % 1920 == 0
        assert isinstance(names["text"], str)


def test_any_moshi_becomes_a_moshi_ttt(tmp_path, monkeypatch):
    """The block that names Kyutai's 7B checkpoint, with a small one of the same kind in its place."""
    from test_model import plain_moshi

    (code,) = blocks("py")
    assert "kmhf/hf-moshiko" in code
    plain, _ = plain_moshi(dtype=None)
    plain.save_pretrained(tmp_path / "moshi")
    small = code.replace("kmhf/hf-moshiko", str(tmp_path / "moshi")).replace("23-31", "0-1")
    names: dict = {}
    exec(compile(small, "README.md", "exec"), names)
    assert isinstance(names["model"], MoshiTTTForConditionalGeneration)
    assert names["model"].config.ttt_layers == [0, 1]


def shell_lines() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def without_what_varies(lines: str) -> list[str]:
    """Lines of output, but for losses, sizes, addresses and commits."""
    return [re.sub(r"[\d.]+ MB|loss [\d.]+|https?://[^/]+|commit \w+", "...", line).strip() for line in lines.splitlines()]


def test_every_command_of_the_road_runs_and_says_what_is_shown(tmp_path):
    """From recordings to an adapter on the Hub and back, as the README says it, in an empty folder, against a local Hub."""
    place = tmp_path / "anywhere"
    place.mkdir()
    start = next(i for i, line in enumerate(shell_lines()) if line.startswith("moshi-ttt prepare"))
    stop = next(i for i, line in enumerate(shell_lines()) if line.startswith("moshi-ttt convert runs"))
    road = [line for line in shell_lines()[start : stop + 1] if not line.startswith("hf auth login")]
    assert [line.split()[:2] for line in road[:2]] == [["moshi-ttt", "prepare"], ["moshi-ttt", "train"]]
    assert {line.split()[0] for line in road} == {"moshi-ttt"}
    assert len(road) == 7
    # `make demo` has trained the base by then: three steps stand in for its training here.
    demo = road[1].split(" run_dir=")[0] + " optim.steps=3 evaluate_start=false"
    road = [demo, *(line.replace("optim.steps=20", "optim.steps=2 evaluate_start=false") for line in road)]
    with HubServer() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        said = []
        for line in road:
            done = subprocess.run(line, shell=True, cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            said += without_what_varies(done.stdout)
    assert [line for block in blocks("text") for line in without_what_varies(block) if line not in said] == []
    assert (place / "my-moshi").is_dir()


def test_the_table_of_recall_is_of_the_pictures_numbers():
    """At every distance beyond the reach of attention: chance without TTT, 97% of four pairs and 90% of eight with it, in ten minutes."""
    measured = json.loads((ROOT / "docs" / "pictures" / "recall.json").read_text())
    assert (measured["window"], measured["settings"]["distances"]) == (16, [24, 32, 48, 64, 96])
    assert {run["name"] for run in measured["runs"][1:]} == {f"TTT-{mixer}, b = {b}" for mixer in ("linear", "mlp") for b in (1, 4, 16)}
    for run in measured["runs"]:
        beyond = [cell for cell in run["results"] if not recall.share_within_reach(cell["pairs"], cell["distance"], measured["window"])]
        assert {cell["distance"] for cell in beyond} == {32, 48, 64, 96}
        found = {pairs: [cell["accuracy"] for cell in beyond if cell["pairs"] == pairs] for pairs in (4, 8)}
        assert run["training"]["seconds"] <= 600
        if run["name"] == "window attention alone":
            assert max(found[4] + found[8]) <= 0.04
            continue
        assert min(found[4]) >= 0.97
        assert min(found[8]) >= 0.9
        name = run["name"].replace("mlp", "MLP").replace("b =", "mini-batch")
        means = " | ".join(f"{sum(values) / len(values):.0%}" for values in found.values())
        assert f"| {name} | {means} | {run['training']['steps']:,} steps, {run['training']['cpu_seconds']:.0f} s |" in README


def version_rows() -> list[dict[str, str]]:
    header = next(line for line in README.splitlines() if line.startswith("| libraries | Python |"))
    table = README[README.index(header) :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table_of_versions_shows_both_ends_of_the_range():
    rows = version_rows()
    assert {row["libraries"] for row in rows} == {"lowest", "newest"}
    for row in rows:
        assert re.fullmatch(r"\d+ passed(, \d+ (skipped|deselected|warnings?))*", row["quick core"]), row
        if row["libraries"] == "lowest":
            assert {name: release(row[name]) for name in SHOWN} == {name: release(lower_bounds()[name]) for name in SHOWN}
    newest = max(release(row["transformers"]) for row in rows)
    assert newest[1] + 1 == release(TRANSFORMERS[1])[1]


def test_named_commands_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README.replace("and make,", "")):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in re.findall(r"moshi-ttt ([a-z]+)", README):
        assert command in COMMANDS, command
    paths = re.findall(r"(?:configuration|examples|benchmarks|docs|tests|modeling_moshi_ttt|hub)/[\w./*-]+", README)
    for path in paths:
        assert [found for root in (ROOT, PACKAGE.parent) for found in root.glob(path.rstrip("./"))], path


def test_the_project_speaks_of_itself_alone():
    kinds = {".md", ".py", ".yaml", ".cfg", ".cff", ".in", ".sh", ".toml", ".txt", ".jinja", ".html", ".json"}
    texts = [name for name in project_files() if name.suffix in kinds and name.name != "test_readme.py"]
    assert len(texts) > 100
    assert [name for name in texts if PICTURE_OF_A_MACHINE.search((ROOT / name).read_text(errors="replace"))] == []

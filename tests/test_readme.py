"""What the README shows runs, and the tables of measurements and versions are of what was measured; `test_docs` has the pages that it links
to.
"""

import json
import re

import pytest
from pages import blocks_of, read, run_python
from tree import ROOT, project_files
from version_matrix import SHOWN, lower_bounds

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.evaluation import recall
from modeling_moshi_ttt.versions_moshi_ttt import TRANSFORMERS, release

PICTURE_OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home|farm)/")


@pytest.mark.parametrize("code", blocks_of("README.md", "python"))
def test_python_runs_as_it_stands(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    run_python(code, names, "README.md")
    assert isinstance(names["frame"].text[0], str)
    assert (tmp_path / "conversation").is_dir()


def test_any_moshi_becomes_a_moshi_ttt(tmp_path, monkeypatch):
    """The block that names Kyutai's 7B checkpoint, with a small one of the same kind in its place."""
    from test_model import plain_moshi

    (code,) = blocks_of("README.md", "py")
    assert "kmhf/hf-moshiko" in code
    plain, _ = plain_moshi(dtype=None)
    plain.save_pretrained(tmp_path / "moshi")
    small = code.replace("kmhf/hf-moshiko", str(tmp_path / "moshi")).replace("23-31", "0-1")
    names: dict = {}
    exec(compile(small, "README.md", "exec"), names)
    assert isinstance(names["model"], MoshiTTTForConditionalGeneration)
    assert names["model"].config.ttt_layers == [0, 1]


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


def version_rows() -> list[dict[str, str]]:
    page = read("docs/versions.md")
    header = next(line for line in page.splitlines() if line.startswith("| libraries | Python |"))
    table = page[page.index(header) :].split("\n\n")[0].splitlines()
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


def test_the_project_speaks_of_itself_alone():
    kinds = {".md", ".py", ".yaml", ".cfg", ".cff", ".in", ".sh", ".toml", ".txt", ".jinja", ".html", ".json"}
    texts = [name for name in project_files() if name.suffix in kinds and name.name != "test_readme.py"]
    assert len(texts) > 100
    assert [name for name in texts if PICTURE_OF_A_MACHINE.search((ROOT / name).read_text(errors="replace"))] == []

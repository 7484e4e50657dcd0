"""The Python beside a checkpoint's weights: named where it is not for the installed transformers, and written anew by the next push."""

import json

import pytest
import transformers
from hub_checkpoints import save_adapter, small_model
from hub_server import HubServer
from huggingface_hub import HfApi, constants

from modeling_moshi_ttt import cli
from modeling_moshi_ttt.hub.carried_code import STAMP, describe_code, folder_code, runs_here
from modeling_moshi_ttt.hub.facts import Facts
from modeling_moshi_ttt.hub.pull import pull
from modeling_moshi_ttt.hub.push import push
from modeling_moshi_ttt.hub.stage import model_files
from modeling_moshi_ttt.hub.verify import verify
from modeling_moshi_ttt.versions_moshi_ttt import TRANSFORMERS

REPO = "user/name"
FLAT = {path.name: path.read_bytes() for path in model_files()}
# As version 0.1.0 pushed it: no stamp, and a file that is no more.
OLD = {name: data for name, data in FLAT.items() if name != STAMP} | {
    "modeling_moshi_ttt.py": b"# of 0.1.0\n",
    "ttt_gone.py": b"# of 0.1.0\n",
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def checkpoint(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def python_of(hub, repo):
    return {name: data for name, data in hub.repos[repo].files().items() if name.endswith(".py")}


def make_old(hub, repo):
    """A repository of today becomes one that version 0.1.0 has pushed, its manifest included."""
    files = hub.repos[repo].files()
    manifest = json.loads(files["manifest.json"])
    manifest["files"] |= dict.fromkeys(OLD, manifest["files"]["config.json"])
    manifest["files"].pop(STAMP)
    old = hub.add(repo, OLD | {"manifest.json": json.dumps(manifest).encode()})
    hub.repos[repo].commits[old].pop(STAMP)


def test_push_onto_an_old_repository_writes_its_code_anew(hub, api, checkpoint):
    push(checkpoint, REPO, api=api)
    make_old(hub, REPO)
    assert python_of(hub, REPO) == OLD
    push(checkpoint, REPO, api=api)
    assert python_of(hub, REPO) == FLAT


def test_verify_names_code_that_is_not_for_the_installed_transformers(checkpoint, capsys):
    assert folder_code(checkpoint) == TRANSFORMERS  # save_pretrained has put it there
    assert cli.main(["verify", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "code: for transformers >= 5.23, < 5.25\n" in said
    assert said.endswith("all is well\n")
    (checkpoint / STAMP).write_text('TRANSFORMERS = ("5.99", "6.1")\n')
    assert cli.main(["verify", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert f"code: for transformers >= 5.99, < 6.1, not for {transformers.__version__}, which is installed" in said
    assert "pip install 'transformers>=5.99,<6.1'" in said
    assert said.endswith("all is well but the code it carries\n")
    (checkpoint / STAMP).unlink()
    assert folder_code(checkpoint) == ("5.23", "5.24")
    for path in checkpoint.glob("*.py"):
        path.unlink()
    assert verify(checkpoint).code is None


def test_code_of_version_0_1_0_is_not_for_a_transformers_that_renames_the_cache():
    assert runs_here(("5.23", "5.24"), "5.23.2")
    assert not runs_here(("5.23", "5.24"), "5.24.0")
    assert describe_code(("5.23", "5.24"), "code", "5.23.2") == "code: for transformers >= 5.23, < 5.24"
    assert "`trust_remote_code=True` fails with it or goes wrong; `moshi-ttt push` writes it anew" in describe_code(
        ("5.23", "5.24"), "code", "5.24.0"
    )


def test_pull_names_old_code(hub, api, checkpoint, tmp_path):
    hub.add(REPO, {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != STAMP})
    assert "code: for transformers >= 5.23, < 5.24" in pull(REPO, tmp_path / "pulled", api=api, unchecked=True).describe()


def test_old_code_of_an_adapters_base_is_named(hub, api, checkpoint, tmp_path, monkeypatch):
    save_adapter(tmp_path / "adapter", str(checkpoint))
    assert verify(tmp_path / "adapter").base_code == TRANSFORMERS
    (checkpoint / STAMP).unlink()
    assert "its base's code: for transformers >= 5.23, < 5.24" in verify(tmp_path / "adapter").describe()
    hub.add(REPO, {path.name: path.read_bytes() for path in checkpoint.iterdir()})
    hub.add("user/adapter", {"adapter_config.json": json.dumps({"base_model_name_or_path": REPO}).encode()})
    monkeypatch.setattr("modeling_moshi_ttt.hub.pull.verify", lambda folder: Facts("adapter", base=REPO))
    assert pull("user/adapter", tmp_path / "pulled", api=api, unchecked=True).base_code == ("5.23", "5.24")

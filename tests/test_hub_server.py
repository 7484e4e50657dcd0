"""The tests' own Hub behaves as huggingface_hub's real client expects, in good and in bad weather."""

import pytest
from hub_server import Fault, HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


def add(api, repo="user/name", parent=None, **files):
    operations = [CommitOperationAdd(name.replace("_", "."), data) for name, data in files.items()]
    return api.create_commit(repo, operations, commit_message="add", parent_commit=parent)


def test_a_commit_is_read_back_by_name_tag_branch_and_hash(hub, api, tmp_path):
    assert api.create_repo("user/name").repo_id == "user/name"
    first = add(api, README_md=b"one", model_safetensors=WEIGHTS).oid
    api.create_tag("user/name", tag="v1")
    api.create_branch("user/name", branch="old")
    add(api, README_md=b"two")
    for revision, text in ((None, "two"), ("v1", "one"), ("old", "one"), (first, "one")):
        api.hf_hub_download("user/name", "README.md", revision=revision, local_dir=tmp_path / str(revision))
        assert (tmp_path / str(revision) / "README.md").read_text() == text
    folder = api.snapshot_download("user/name", revision="v1", local_dir=tmp_path / "all")
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == WEIGHTS
    assert folder == str(tmp_path / "all")
    assert [tag.name for tag in api.list_repo_refs("user/name").tags] == ["v1"]


def test_refusals_are_those_of_the_hub(hub, api):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/nothing")
    api.create_repo("user/name", private=True)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/name", revision="v9")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("user/name")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).model_info("user/name")
    old = api.model_info("user/name").sha
    add(api, a_txt=b"a")
    with pytest.raises(HfHubHTTPError, match="412"):
        add(api, parent=old, b_txt=b"b")
    assert set(hub.repos["user/name"].files()) == {".gitattributes", "a.txt"}


@pytest.mark.parametrize(
    "fault",
    [Fault("drop", "/lfs/", "PUT", times=99), Fault("status", "/lfs/", "PUT", 500, 99), Fault("status", "/commit/", "POST", 401, 99)],
    ids=["drop", "500", "401"],
)
def test_a_failed_upload_leaves_the_old_revision(hub, api, fault):
    api.create_repo("user/name")
    old = add(api, model_safetensors=b"old").oid
    hub.faults.append(fault)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        add(api, model_safetensors=WEIGHTS)
    assert hub.repos["user/name"].branches["main"] == old
    assert fault.times < 99
    fault.times = 0
    add(api, model_safetensors=WEIGHTS)
    assert hub.repos["user/name"].files()["model.safetensors"] == WEIGHTS


def test_a_429_is_waited_out_and_a_cut_file_is_noticed(hub, api, tmp_path):
    api.create_repo("user/name")
    add(api, model_safetensors=WEIGHTS)
    hub.faults += [Fault("status", "/tree/", "GET", 429), Fault("cut", "/resolve/", "GET", times=99)]
    with pytest.raises(OSError, match="file should be of size 102400"):
        api.snapshot_download("user/name", local_dir=tmp_path)
    hub.faults[1].times = 0
    api.snapshot_download("user/name", local_dir=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS

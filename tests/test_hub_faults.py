"""Push and pull in bad weather: the remote revision is the old one or the new one, whole, and repeating ends well."""

import json
import os
import shutil

import pytest
import torch
from hub_checkpoints import save_adapter, small_model
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from modeling_moshi_ttt.common.files import check_manifest
from modeling_moshi_ttt.common.hub import redact
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTOSError
from modeling_moshi_ttt.hub.pull import pull
from modeling_moshi_ttt.hub.push import push
from modeling_moshi_ttt.hub.remote import look

REPO = "user/name"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The client's own retries, without their waiting."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("old", "new")):
        small_model(seed=seed).save_pretrained(folder / name)
    return folder


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def pushed(hub, api, checkpoints):
    """A Hub where the old checkpoint is; its commit."""
    return push(checkpoints / "old", REPO, api=api, max_shard_size="80KB").oid


def whole(hub, tmp_path):
    """The newest revision's files, written out and held against their manifest."""
    files = hub.repos[REPO].files()
    for name, data in files.items():
        if name != ".gitattributes":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    return check_manifest(tmp_path) == []


PUSH_FAULTS = {
    "drop in an LFS upload": Fault("drop", "/lfs/", "PUT", times=99),
    "drop in the second LFS upload": Fault("drop", "/lfs/", "PUT", times=99),
    "500 in an LFS upload": Fault("status", "/lfs/", "PUT", 500, 99),
    "500 at the LFS batch": Fault("status", "/objects/batch", "POST", 500, 99),
    "429 without end": Fault("status", "/preupload/", "POST", 429, 99),
    "401 at the commit": Fault("status", "/commit/", "POST", 401, 99),
    "500 at the commit": Fault("status", "/commit/", "POST", 500, 99),
    "drop at the commit": Fault("drop", "/commit/", "POST", times=99),
    "500 at the tag": Fault("status", "/tag/", "POST", 500, 99),
}


@pytest.mark.parametrize("name", list(PUSH_FAULTS))
def test_a_broken_push_leaves_a_whole_revision_and_ends_well_when_repeated(hub, api, pushed, checkpoints, tmp_path, name):
    fault = Fault(**{**vars(PUSH_FAULTS[name])})
    hub.faults.append(fault)
    if "second" in name:
        hub.faults.insert(0, Fault("call", "/lfs/", "PUT", times=1))
    with pytest.raises((OSError, ValueError)) as failed:
        push(checkpoints / "new", REPO, api=api, max_shard_size="80KB", tag="v2")
    assert fault.times < 99
    message = str(failed.value)
    assert REPO in message
    assert "run the same command again" in message or "hf auth login" in message
    assert hub.token not in message
    head = hub.repos[REPO].branches["main"]
    assert (head == pushed) != ("tag" in name)  # only the tag comes after the commit
    assert whole(hub, tmp_path / "left")
    uploaded = len(hub.objects)
    hub.faults.clear()
    hub.log.clear()
    done = push(checkpoints / "new", REPO, api=api, max_shard_size="80KB", tag="v2")
    assert hub.repos[REPO].branches["main"] == done.oid == hub.repos[REPO].tags["v2"] != pushed
    assert whole(hub, tmp_path / "now")
    assert sum(line.startswith("PUT /lfs/") for line in hub.log) == len(hub.objects) - uploaded  # what had arrived is not sent again


@pytest.mark.parametrize(("path", "method"), [("/api/models/user/name$", "GET"), ("/lfs/", "PUT"), ("/commit/", "POST")])
def test_a_first_push_that_breaks_leaves_an_empty_repository_and_ends_well_when_repeated(hub, api, checkpoints, tmp_path, path, method):
    fault = Fault("status", path, method, 500, 99)
    hub.faults.append(fault)
    if method == "GET":  # the one after the repository is made: before, there is none to look at
        hub.faults.insert(0, Fault("call", path, method, times=1))
    with pytest.raises(OSError, match="run the same command again"):
        push(checkpoints / "new", REPO, private=True, api=api)
    assert fault.times < 99
    assert set(hub.repos[REPO].files()) <= {".gitattributes"}
    hub.faults.clear()
    done = push(checkpoints / "new", REPO, private=True, api=api)
    assert hub.repos[REPO].branches["main"] == done.oid
    assert hub.repos[REPO].private
    assert whole(hub, tmp_path)


def test_a_revision_that_changes_in_between_is_not_overwritten(hub, api, pushed, checkpoints):
    hub.faults.append(Fault("call", "/objects/batch", "POST", call=lambda: hub.add(REPO, {"notes.txt": b"mine"})))
    with pytest.raises(ValueError, match="somebody else has changed the repository in between"):
        push(checkpoints / "new", REPO, api=api, max_shard_size="80KB")
    assert hub.repos[REPO].files()["notes.txt"] == b"mine"
    push(checkpoints / "new", REPO, api=api, max_shard_size="80KB")
    assert hub.repos[REPO].files()["notes.txt"] == b"mine"  # a file that no push has made is left alone


def test_a_push_with_fewer_shards_takes_the_old_ones_away(hub, api, pushed, checkpoints, tmp_path):
    assert "model-00001-of-00003.safetensors" in hub.repos[REPO].files()
    push(checkpoints / "new", REPO, api=api)
    assert [name for name in hub.repos[REPO].files() if name.startswith("model") and name.endswith("tensors")] == ["model.safetensors"]
    assert "model.safetensors.index.json" not in hub.repos[REPO].files()
    assert whole(hub, tmp_path)


def test_the_same_push_twice_is_one_commit(hub, api, pushed, checkpoints):
    assert push(checkpoints / "old", REPO, api=api, max_shard_size="80KB").oid == pushed


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", r"/resolve/.*00002-of-00003\.safetensors", "GET", times=99),
        Fault("cut", r"/resolve/.*00002-of-00003\.safetensors", "GET", times=99),
        Fault("shrink", r"/resolve/.*00002-of-00003\.safetensors", "GET|HEAD", times=99),
        Fault("shrink", r"/resolve/.*modeling_moshi_ttt\.py", "GET|HEAD", times=99),
        Fault("shrink", r"/resolve/.*manifest\.json", "GET|HEAD", times=99),
        Fault("status", r"/resolve/.*00002-of-00003\.safetensors", "GET", 500, times=99),
        Fault("status", r"/tree/", "GET", 429, times=99),
        Fault("status", r"/api/models/", "GET", 401, times=99),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status if fault.kind == 'status' else fault.path[-20:]}",
)
def test_a_broken_pull_is_recognized_and_ends_well_when_repeated(hub, api, pushed, tmp_path, fault):
    hub.faults.append(Fault(**vars(fault)))
    with pytest.raises((OSError, ValueError)) as failed:
        pull(REPO, tmp_path / "here", api=api)
    assert hub.faults[0].times < 99
    assert not (tmp_path / "here").exists()
    assert hub.token not in str(failed.value)
    hub.faults.clear()
    facts = pull(REPO, tmp_path / "here", api=api)
    assert facts.probe is not None
    assert check_manifest(tmp_path / "here") == []
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    wanted = {name: data for name, data in hub.repos[REPO].files().items() if name != ".gitattributes"}
    assert {p.relative_to(tmp_path / "here").as_posix(): p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()} == wanted


def test_a_pull_takes_one_revision_even_when_the_branch_moves(hub, api, pushed, checkpoints, tmp_path):
    hub.faults.append(Fault("call", "/tree/", "GET", call=lambda: push(checkpoints / "new", REPO, api=api, max_shard_size="80KB")))
    old = dict(hub.repos[REPO].files())
    pull(REPO, tmp_path / "here", api=api)
    assert hub.repos[REPO].branches["main"] != pushed
    assert (tmp_path / "here" / "model-00001-of-00003.safetensors").read_bytes() == old["model-00001-of-00003.safetensors"]


def weights_were_read(hub):
    return [line for line in hub.log if line.startswith("GET") and ".safetensors" in line and "/resolve/" in line]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "holds a model of type 'llama', not 'moshi_ttt'"),
        ({"config.json": b'{"model_type": "moshi"}'}, "moshi-ttt convert"),
        ({"README.md": b"hello"}, "holds no config.json"),
        ({"config.json": b"{"}, "no JSON"),
        ({"config.json": b'{"model_type": "moshi_ttt"}', "../outside.py": b"x"}, "leaves its folder"),
        ({"adapter_config.json": b'{"base_model_name_or_path": "user/gone"}'}, "base user/gone is not on the Hub"),
        ({"adapter_config.json": b'{"base_model_name_or_path": "user/base", "revision": "v9"}'}, "base user/base has no revision 'v9'"),
        ({"adapter_config.json": b'{"base_model_name_or_path": "user/llama"}'}, "adapter's base: user/llama holds a model of type 'llama'"),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "user/base"}', "base_config.json": b'{"ttt_layers": [5, 6]}'},
            r"for TTT layers \[5, 6\], its base user/base has \[0, 1\]",
        ),
    ],
)
def test_what_does_not_belong_here_is_refused_before_any_weights(hub, api, tmp_path, files, message):
    hub.add("user/base", {"config.json": b'{"model_type": "moshi_ttt", "ttt_layers": [0, 1]}'})
    hub.add("user/llama", {"config.json": b'{"model_type": "llama"}'})
    hub.add("user/other", {**files, "model.safetensors": b"never read", "adapter_model.safetensors": b"never read"})
    with pytest.raises(ValueError, match=message):
        pull("user/other", tmp_path / "here", api=api)
    assert weights_were_read(hub) == []
    assert not (tmp_path / "here").exists()


def test_a_repository_with_a_name_that_leaves_its_folder_is_refused_when_it_is_looked_at(hub, api):
    """Also before a push, which downloads nothing but the small files it asks for by name."""
    hub.add("user/other", {"config.json": b'{"model_type": "moshi_ttt"}', "../outside.py": b"x"})
    with pytest.raises(ValueError, match=r"'\.\./outside\.py' leaves its folder"):
        look(api, "user/other")


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        ("user/gone", None, "base user/gone is not on the Hub"),
        ("user/other", {"model_type": "llama"}, "adapter's base: user/other holds a model of type 'llama'"),
        ("user/other", {"model_type": "moshi_ttt", "ttt_layers": [1]}, r"for TTT layers \[0, 1\], its base user/other has \[1\]"),
        (None, None, "a folder of this machine, which nobody else could load"),
    ],
)
def test_an_adapter_of_another_base_is_not_pushed(hub, api, checkpoints, tmp_path, base, config, message):
    save_adapter(tmp_path / "adapter", str(checkpoints / "old"))
    if config:
        hub.add("user/other", {"config.json": json.dumps(config).encode(), "model.safetensors": b"never read"})
    with pytest.raises(ValueError, match=message):
        push(tmp_path / "adapter", REPO, base=base, api=api)
    assert weights_were_read(hub) == []
    assert REPO not in hub.repos


def test_names_and_places_that_are_taken(hub, api, pushed, checkpoints, tmp_path):
    hub.add("user/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    before = len(hub.objects)
    for name in ("nobody", f"{api.endpoint}/user/name"):
        with pytest.raises(ValueError, match="is no repository's name; write USER/NAME"):
            push(checkpoints / "new", name, api=api)
    with pytest.raises(ValueError, match="--base is the base that a pushed adapter names; .* goes up as --full"):
        push(checkpoints / "new", REPO, base="user/base", api=api)
    with pytest.raises(ValueError, match="the name user/llama is taken: .*'llama'.*; choose another name"):
        push(checkpoints / "new", "user/llama", api=api)
    assert len(hub.objects) == before
    hub.repos[REPO].tags["v1"] = "0" * 40
    with pytest.raises(ValueError, match="already has a tag 'v1' on another commit"):
        push(checkpoints / "new", REPO, api=api, tag="v1")
    with pytest.raises(ValueError, match="pulling user/nothing"):
        pull("user/nothing", tmp_path / "here", api=api)
    with pytest.raises(ValueError, match="v7"):
        pull(REPO, tmp_path / "here", revision="v7", api=api)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(MoshiTTTOSError, match="holds something already"):
        pull(REPO, tmp_path / "full", api=api)
    with pytest.raises(ValueError, match="login"):
        push(checkpoints / "new", "user/another", api=HfApi(endpoint=hub.url, token="hf_wrongTokenAltogether"))


def test_a_repository_without_a_manifest_is_checked_all_the_same(hub, api, checkpoints, tmp_path):
    """As `model.push_to_hub` makes them."""
    files = {path.name: path.read_bytes() for path in (checkpoints / "old").iterdir() if path.is_file()}
    hub.add("user/plain", files)
    with pytest.raises(ValueError, match="holds no manifest.json.*--unchecked"):
        pull("user/plain", tmp_path / "here", api=api)
    assert not [line for line in hub.log if "safetensors" in line]
    assert pull("user/plain", tmp_path / "here", api=api, unchecked=True).probe is None
    hub.add("user/plain", {"model.safetensors": files["model.safetensors"][:-4]})
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        pull("user/plain", tmp_path / "there", api=api, unchecked=True)
    assert not (tmp_path / "there").exists()


def test_a_manifest_cannot_name_files_outside(hub, api, pushed, tmp_path):
    manifest = json.loads(hub.repos[REPO].files()["manifest.json"])
    manifest["files"]["../outside"] = {"size": 1, "sha256": "0" * 64}
    hub.add(REPO, {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(ValueError, match="leaves its folder"):
        pull(REPO, tmp_path / "here", api=api)
    assert not (tmp_path / "outside").exists()


def test_pickles_are_never_fetched(hub, api, pushed, tmp_path):
    hub.add(REPO, {"pytorch_model.bin": b"\x80\x02", "optimizer.pt": b"\x80\x02"})
    pull(REPO, tmp_path / "here", api=api)
    assert not [line for line in hub.log if line.startswith("GET") and line.endswith((".bin", ".pt"))]
    assert not list((tmp_path / "here").glob("*.bin"))


def test_a_checkpoint_that_is_not_whole_is_not_pushed(hub, api, checkpoints, tmp_path):
    folder = tmp_path / "broken"
    small_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.model.layers.1.ttt.W1"][0, 0, 0] = float("nan")
    del tensors["decoder.model.layers.0.ttt.wq.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.0.ttt.wq.weight is missing(.|\n)*layers.1.ttt.W1 holds 1 values that are NaN"):
        push(folder, REPO, api=api)
    assert REPO not in hub.repos
    assert sorted(os.listdir(tmp_path)) == ["broken"]  # nothing half made is left behind


def test_another_model_under_the_same_probe_is_noticed(hub, api, pushed, tmp_path):
    pull(REPO, tmp_path / "here", api=api)
    (tmp_path / "here" / "manifest.json").unlink()
    shard = tmp_path / "here" / "model-00001-of-00003.safetensors"
    tensors = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match="this is not the same model"):
        push(tmp_path / "here", "user/changed", api=api)
    assert "user/changed" not in hub.repos


def test_tokens_do_not_survive_in_messages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-another-form")
    assert redact("Bearer hf_abcDEF123456 and a-secret-of-another-form") == "Bearer hf_*** and hf_***"
    monkeypatch.delenv("HF_TOKEN")
    for token in ("hf_oauth_eyJhbGciOi.eyJz-dWI", "hf_jwt_eyJhbGciOi", "api_org_SECRETSECRET", "hf_abcdefgh", "eyJhbGciOiJ.eyJzdWIi.sig"):
        assert redact(f"'{token}' was refused") == "'hf_***' was refused"
    assert redact("https://user:word@host/x", "the-clients-own") == "https://hf_***@host/x"
    assert redact("key=the-clients%2Fown, the-clients/own", "the-clients/own") == "key=hf_***, hf_***"
    assert redact("hf_hub_download failed") == "hf_hub_download failed"


def test_private_is_held_against_what_exists_before_a_byte_is_sent(hub, api, checkpoints):
    api.create_repo(REPO)
    hub.log.clear()
    with pytest.raises(ValueError, match=f"{REPO} exists and is public"):
        push(checkpoints / "new", REPO, private=True, api=api)
    assert not [line for line in hub.log if not line.startswith(("GET", "HEAD"))]
    hub.repos[REPO].private = True
    assert push(checkpoints / "new", REPO, private=True, api=api).oid == hub.repos[REPO].branches["main"]


def test_an_answer_that_is_lost_after_the_commit_is_told_by_the_newest_commit(hub, api, pushed, checkpoints, tmp_path, monkeypatch):
    real = api.create_commit

    def lost(*args, **options):
        real(*args, **options)
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(api, "create_commit", lost)
    done = push(checkpoints / "new", REPO, api=api, tag="v2")
    assert done.oid == hub.repos[REPO].branches["main"] == hub.repos[REPO].tags["v2"] != pushed
    assert whole(hub, tmp_path)
    monkeypatch.setattr(api, "create_commit", lambda *_, **__: (hub.add(REPO, {"notes.txt": b"mine"}), 1 / 0)[1])
    with pytest.raises(ZeroDivisionError):  # no error of the Hub's, whatever the newest commit is
        push(checkpoints / "old", REPO, api=api)

    def overtaken(*_, **__):
        hub.add(REPO, {"notes.txt": b"again"})
        raise ConnectionError("reset")

    monkeypatch.setattr(api, "create_commit", overtaken)
    with pytest.raises(OSError, match="somebody else has changed the repository in between"):
        push(checkpoints / "old", REPO, api=api)


def test_twenty_private_files_stay_at_home(hub, api, checkpoints, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoints / "old", folder)
    private = [
        "id_rsa",
        "secrets.json",
        ".env",
        ".netrc",
        "notes.txt",
        "passwords.csv",
        "audio_tokenizer/key.pem",
        "token",
        "b.key",
        "c.py",
    ]
    private += [
        "diary.md",
        "voice.wav",
        "people.jsonl",
        "d/e/f.txt",
        "pictures/me.png",
        "x.safetensors",
        "config.yaml",
        "LICENSE",
        "core",
        "z.zip",
    ]
    for name in private:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    done = push(folder, REPO, api=api)
    assert set(private) - {"pictures/me.png", "c.py"} <= set(done.left_out)
    assert not set(private) & set(hub.repos[REPO].files())
    assert b"private" not in hub.objects.values()
    assert not [name for name in os.listdir(tmp_path) if name != "run"]


def test_a_folder_that_no_pull_has_made_is_not_gone_on_with(hub, api, pushed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".here.part").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a link"):
        pull(REPO, tmp_path / "here", api=api)
    (tmp_path / ".here.part").unlink()
    (tmp_path / "mine").rename(tmp_path / ".here.part")
    with pytest.raises(ValueError, match="no earlier run made it"):
        pull(REPO, tmp_path / "here", api=api)
    assert (tmp_path / ".here.part" / "file").read_text() == "mine"


def test_two_pulls_into_one_folder_are_told_of_each_other(hub, api, pushed, tmp_path):
    """The second names the process of the first, takes nothing, and leaves the first to end well."""
    refused = []

    def second():
        with pytest.raises(OSError, match=rf"`DEST=.*here\.part` is in use by process {os.getpid()} on") as told:
            pull(REPO, tmp_path / "here", api=api)
        refused.append(told)

    hub.faults.append(Fault("call", "model-00001-of-00003.safetensors", "GET", call=second))
    pull(REPO, tmp_path / "here", api=api)
    assert refused
    assert check_manifest(tmp_path / "here") == []


def test_a_pull_that_another_has_overtaken_is_told_so_and_fetches_nothing(hub, api, pushed, tmp_path):
    hub.faults.append(Fault("call", "/resolve/.*/config.json", "GET", call=lambda: pull(REPO, tmp_path / "here", api=api)))
    with pytest.raises(OSError, match="holds something already; choose a new folder"):
        pull(REPO, tmp_path / "here", api=api)
    assert len([line for line in weights_were_read(hub) if "model-00001-of" in line]) == 1
    assert check_manifest(tmp_path / "here") == []

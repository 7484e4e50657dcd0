"""Conversations in an object store: kept, gone on with elsewhere, removed, and refused as in a folder."""

import fsspec
import pytest
import torch
from live_client import FRAME
from tiny import speaking_model

from modeling_moshi_ttt import MoshiTTTSession
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.live.conversations import ConversationStore

URL = "memory://bucket/sessions"


@pytest.fixture
def objects():
    """The store, empty."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def kept(store, model, processor) -> tuple[str, dict]:
    """The name of a conversation that the store holds, and the state it was put aside with."""
    session = MoshiTTTSession(model, processor, seeds=[3])
    session.step(torch.zeros(1, FRAME))
    name, state = store.new_name(), session.row_state(0)
    store.hold(name, state)
    assert store.write(name)
    return name, state


def test_another_server_reads_what_one_has_kept(model, processor, objects):
    first, second = (ConversationStore(URL, 3600, model, processor) for _ in range(2))
    name, state = kept(first, model, processor)
    assert not any(first.folder.iterdir())  # nothing stays on the way
    found = second.read(name)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert not any(second.folder.iterdir())


@pytest.mark.parametrize("name", ["", "../sessions", "A" * 22])
def test_what_is_not_kept_is_refused_in_words(model, processor, objects, name):
    store = ConversationStore(URL, 3600, model, processor)
    kept(store, model, processor)
    with pytest.raises(MoshiTTTError, match="no conversation is kept under this name"):
        store.read(name)


def test_what_is_not_whole_or_of_another_model_is_refused(model, processor, objects):
    store = ConversationStore(URL, 3600, model, processor)
    name, _ = kept(store, model, processor)
    with pytest.raises(MoshiTTTError, match="of another model, or not whole"):
        ConversationStore(URL, 3600, speaking_model(seed=1), processor).read(name)
    objects.rm(f"/bucket/sessions/{name}/session.safetensors")
    with pytest.raises(MoshiTTTError, match="of another model, or not whole"):
        store.read(name)


def test_what_was_kept_long_enough_is_removed_and_nothing_else(model, processor, objects):
    store = ConversationStore(URL, 3600, model, processor)
    name, _ = kept(store, model, processor)
    objects.pipe("/bucket/sessions/other/file", b"mine")
    objects.pipe("/bucket/sessions/other/session.json", b"mine, too")
    store.remove_old()
    assert store.read(name)
    ConversationStore(URL, -1, model, processor).remove_old()
    assert objects.ls("/bucket/sessions", detail=False) == ["/bucket/sessions/other"]


def test_a_store_that_cannot_be_opened_is_named(model, processor):
    with pytest.raises(MoshiTTTError, match="`--sessions=nothing://bucket` must be a folder, or a URL"):
        ConversationStore("nothing://bucket", 3600, model, processor)

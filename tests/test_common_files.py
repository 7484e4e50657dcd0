"""Atomic files, manifests and names that stay inside their folder."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from modeling_moshi_ttt.common import files
from modeling_moshi_ttt.common.files import (
    atomic_folder,
    atomic_write,
    check_manifest,
    clear_folder,
    inside,
    make_folder,
    read_json,
    sha256,
    write_manifest,
)


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    atomic_write(tmp_path / "a" / "x.txt", "one")
    atomic_write(tmp_path / "a" / "x.txt", b"two")
    assert (tmp_path / "a" / "x.txt").read_text() == "two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "x", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_survives_a_power_cut(tmp_path, monkeypatch, kind):
    """The contents reach the disk before the name does, and the name before the call returns."""
    order, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).relative_to(tmp_path).suffix or 'parent'}")
        fsync(handle)

    def renamed(old, new):
        order.append("rename")
        replace(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    if kind == "file":
        atomic_write(tmp_path / "x", "1")
        assert order == ["sync .tmp", "rename", "sync parent"]
    else:
        with atomic_folder(tmp_path / "x") as folder:
            (folder / "a.txt").write_text("1")
        assert order == ["sync .txt", "sync .tmp", "rename", "sync parent"]


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    with pytest.raises(IsADirectoryError), atomic_folder(tmp_path / "run") as folder:
        (folder / ".").write_text("fails")
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "a"]
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "c").write_text("3")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "run"]


def test_manifest_finds_every_kind_of_damage(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_bytes(b"0123456789")
    write_manifest(tmp_path)
    assert check_manifest(tmp_path) == []
    (tmp_path / "a").write_bytes(b"0123456780")
    assert check_manifest(tmp_path) == ["a has other contents than the manifest says."]
    (tmp_path / "a").write_bytes(b"")
    assert "0 bytes" in check_manifest(tmp_path)[0]
    (tmp_path / "a").unlink()
    assert check_manifest(tmp_path) == ["a is missing."]
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "new").write_bytes(b"")
    assert check_manifest(tmp_path) == ["new is not in the manifest."]
    (tmp_path / "manifest.json").write_text("{")
    assert "cannot be read" in check_manifest(tmp_path)[0]
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"../x": {"size": 1, "sha256": "0"}}}))
    assert any("leaves its folder" in problem for problem in check_manifest(tmp_path))


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\\..\\..\\x", "C:/x", "x\0y"])
def test_inside_refuses_names_that_leave(tmp_path, name):
    with pytest.raises(ValueError, match="leaves its folder"):
        inside(tmp_path, name)


def test_inside_refuses_links_out_of_the_folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="through a link"):
        inside(tmp_path / "root", "link/x")
    assert inside(tmp_path / "root", "a/b.wav") == tmp_path / "root" / "a" / "b.wav"


def test_only_folders_of_an_earlier_run_are_cleared(tmp_path):
    ours, theirs = tmp_path / "run", tmp_path / "precious"
    for folder, name in ((ours, "run_config.json"), (theirs, "thesis.txt")):
        folder.mkdir()
        (folder / name).touch()
    clear_folder(ours, "run_config.json")
    assert not ours.exists()
    clear_folder(ours, "run_config.json")
    for given in (theirs, theirs / "thesis.txt"):
        with pytest.raises(ValueError, match="no earlier run made it"):
            clear_folder(given, "run_config.json")
    assert (theirs / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "\\ud83d"}', "x.json is no JSON .*half a character"),
        (b"[" * 100_000, "x.json is no JSON .*nested too deep"),
        (b'{"a": ' * 100_000, "x.json is no JSON .*nested too deep"),
        (b'{"a": "\xe9"}', "x.json is no JSON"),
        (b'{"a": 1,\n"b', "x.json is no JSON .*line 2"),
        (b"[]", "x.json holds no JSON object"),
    ],
)
def test_what_no_parser_can_read_is_refused_by_its_name(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json")
    (tmp_path / "manifest.json").write_bytes(content)
    assert "manifest.json cannot be read" in check_manifest(tmp_path)[0]


def test_whole_characters_pass(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\ude00 \u00e9"}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"a": "\U0001f600 \u00e9"}


def test_a_file_in_the_way_of_a_folder_is_named_with_its_setting(tmp_path):
    assert make_folder(tmp_path / "a" / "b", "run_dir").is_dir()
    with pytest.raises(ValueError, match="run_dir is empty"):
        make_folder("", "run_dir")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"run_dir is {path}, where no folder can be made"):
            make_folder(path, "run_dir")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_never_absent_while_it_is_replaced(tmp_path, monkeypatch, can_exchange):
    """Killed at any change of names: where folders can be exchanged one stands there always; elsewhere the old one comes back at the next use."""
    path = tmp_path / "final"
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with atomic_folder(path) as folder:
        (folder / "x").write_text("old")
    rename = os.replace
    for killed_at in range(3):
        done: list[str] = []

        def counted(source, target, done=done, killed_at=killed_at):
            if len(done) == killed_at:
                raise KeyboardInterrupt
            done.append(str(target))
            rename(source, target)

        monkeypatch.setattr(files.os, "replace", counted)
        with suppress(KeyboardInterrupt), atomic_folder(path) as folder:
            (folder / "x").write_text("new")
        monkeypatch.setattr(files.os, "replace", rename)
        assert path.exists() or not can_exchange
        files.recover_folder(path)
        assert (path / "x").read_text() in ("old", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from modeling_moshi_ttt.common.temporary import temporary_path
temporary_path(Path({str(tmp_path / "a.json")!r})).write_text("half")
temporary_path(Path({str(tmp_path / "final")!r})).mkdir()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    link = tmp_path / f"{left[1].name[:-12]}00000000.tmp"  # as if it were another of that process
    link.symlink_to(tmp_path / "mine")
    (tmp_path / ".notes.tmp").write_text("mine")
    atomic_write(tmp_path / "a.json", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes.tmp", "a.json", "mine"]
    assert (tmp_path / "mine" / "x").read_text() == "mine"

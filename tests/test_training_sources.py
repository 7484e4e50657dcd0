"""Tar shards, parquet files and data sets on the Hub: read as what they are, nothing leaves its folder, every bad sample has its name."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Features, Value, load_dataset
from hub_checkpoints import small_processor
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants

from modeling_moshi_ttt.data import limits, sources
from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.data.cache import CodesCache
from modeling_moshi_ttt.data.prepared import prepare_set
from modeling_moshi_ttt.data.recordings import Recording
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.data.sources import Placed, read_sources


def sound(seed=0, seconds=1.0, rate=22050, channels=2, form="FLAC"):
    """A noise as the bytes of a sound file."""
    buffer = io.BytesIO()
    samples = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    soundfile.write(buffer, samples, rate, format=form)
    return buffer.getvalue()


def utterances(seed=0):
    """Behavior-SD's JSON: two utterances, the first with a backchannel by the other speaker; no times of words."""
    backchannel = {"tts_text": "mhm", "start_time": 0.2, "end_time": 0.3}
    first = {"uttr_idx": 0, "uttr_type": None, "speaker_idx": 1, "tts_text": "so be it", "start_time": 0.1, "end_time": 0.7}
    second = {"uttr_idx": 1, "uttr_type": "interrupt", "speaker_idx": 0, "tts_text": "yes", "start_time": 0.7, "end_time": 0.9}
    return {"soda_index": seed, "narrative": "…", "utterances": [first | {"backchannels": [backchannel]}, second]}


WORDS = (
    ("so", (0.1, 0.3), "SPEAKER_USER"),
    ("mhm", (0.2, 0.3), "SPEAKER_MAIN"),
    ("be", (0.3, 0.5), "SPEAKER_USER"),
    ("it", (0.5, 0.7), "SPEAKER_USER"),
    ("yes", (0.7, 0.9), "SPEAKER_MAIN"),
)


def rounded(words):
    return tuple((text, tuple(round(t, 6) for t in times), speaker) for text, times, speaker in words)


def shard(members):
    """The bytes of a tar of (name, bytes) members; a member without bytes is a link to /etc/passwd."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def sample(name, seed=0, **how):
    return [(f"{name}.flac", sound(seed, **how)), (f"{name}.json", json.dumps(utterances(seed)).encode())]


def read(text, store, problems=None, **settings):
    """Recordings of all sources together; problems must not occur where nobody asked for them."""
    found = [] if problems is None else problems
    recordings = [r for source in read_sources(str(text), DataSettings("", **settings), store, found) for r in source.recordings]
    assert problems is not None or found == []
    return recordings


# ---- tar shards


def test_a_shard_is_read_as_datasets_reads_it(tmp_path):
    """Behavior-SD's layout: <split>/0001.tar of <id>.flac and <id>.json, 22.05 kHz, speaker i on channel i."""
    (tmp_path / "test").mkdir()
    path = tmp_path / "test" / "0001.tar"
    path.write_bytes(shard(sample("0000000004", 4) + sample("0000000009", 9)))
    one, two = read(path, tmp_path / "store")
    assert [r.path.name for r in (one, two)] == ["0000000004.flac", "0000000009.flac"]
    assert one.duration == pytest.approx(1.0)
    assert rounded(one.words) == WORDS
    theirs = load_dataset(
        "webdataset",
        data_files=str(path),
        split="train",
        streaming=True,
        features=Features({"__key__": Value("string"), "flac": Value("binary"), "json": {"soda_index": Value("int64")}}),
    )
    for recording, row in zip((one, two), theirs, strict=True):
        assert recording.path.read_bytes() == row["flac"]
        assert recording.path.stem == row["__key__"]
    assert read_audio(one.path).shape == (2, 24000)


def test_a_member_that_swells_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    """A packed shard of zeros: few bytes on disk, as many as it likes in memory."""
    monkeypatch.setattr(limits, "MEMBER_BYTES", 200_000)
    path = tmp_path / "0.tar"
    path.write_bytes(gzip.compress(shard([("big.wav", bytes(10**6)), *sample("a")])))
    problems = []
    assert [one.path.name for one in read(path, tmp_path / "store", problems)] == ["a.flac"]
    assert len(problems) == 1
    assert "big.wav" in problems[0]


def test_a_folder_of_shards_is_unpacked_once(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(shard(sample("a", number)))
    first = read(tmp_path, tmp_path / "store")
    assert len({r.path for r in first}) == 2  # two shards may use one name
    with monkeypatch.context() as patch:
        patch.setattr("modeling_moshi_ttt.data.archives._unpack", None)
        assert read(tmp_path, tmp_path / "store") == first
    (tmp_path / "0.tar").write_bytes(shard(sample("b", 7)))
    assert [r.path.name for r in read(tmp_path, tmp_path / "store")] == ["b.flac", "a.flac"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_bad_members_have_their_names_and_nothing_leaves_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = [
        *sample("good"),
        ("torn.flac", sound()[:9]),
        ("empty.wav", b""),
        ("notjson.flac", sound(1)), ("notjson.json", b"{"),
        ("odd.flac", sound(2)), ("odd.json", b'{"utterances": [{"speaker_idx": 5}]}'),
        ("two.flac", sound(3)), ("two.wav", sound(3, form="WAV")),
        ("silent.json", b"[]"),
        ("../../outside.flac", sound(4)),
        ("/outside.flac", sound(5)),
        ("link.flac", None),
        ("bomb.pkl", pickle.dumps(Bomb())), ("bomb.pth", pickle.dumps(Bomb())),
        ("good.flac", sound(6)),
        ("mono.flac", sound(7, channels=1)),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").write_bytes(shard(members))
    problems = []
    kept = read(tmp_path / "in", tmp_path / "store", problems)
    assert [r.path.name for r in kept] == ["good.flac", "mono.flac"]
    wanted = {
        "torn.flac": "cannot be read",
        "empty.wav": "is empty",
        "notjson.flac": "not JSON",
        "odd.flac": "utterance 0",
        "two.wav": "2 sounds",
        "silent.json": "0 sounds",
        "../../outside.flac": "leaves its folder",
        "/outside.flac": "leaves its folder",
        "good.flac": "two of this name",
    }
    for name, reason in wanted.items():
        assert any(name in problem and reason in problem and "s.tar" in problem for problem in problems), (name, problems)
    assert len(problems) == len(wanted)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "store"}
    assert not [p for p in tmp_path.rglob("*") if p.name in ("outside.flac", "exploded", "bomb.pkl", "link.flac")]
    again = []
    assert read(tmp_path / "in", tmp_path / "store", again) == kept
    assert again == problems  # what was wrong is said again, though nothing is unpacked again
    cache = CodesCache(tmp_path / "cache", small_processor())
    with pytest.raises(ValueError, match=r"10 bad files(.|\n)*torn\.flac(.|\n)*mono\.flac: the recording has 1 channels"):
        prepare_set("in", DataSettings("in"), cache)
    ready = prepare_set("in", DataSettings("in", on_bad_files="skip"), cache)
    assert [r.name for r in ready.recordings] == ["good"]
    assert (ready.recordings[0].read(0, 13)[0] >= 0).any()


@pytest.mark.parametrize("cut", [0.3, 0.55, 0.8])
def test_a_torn_shard_gives_what_is_whole(tmp_path, cut):
    data = shard(sample("a", 1) + sample("b", 2) + sample("c", 3))
    (tmp_path / "s.tar").write_bytes(data[: int(cut * len(data))])
    problems = []
    kept = [r.path.stem for r in read(tmp_path / "s.tar", tmp_path / "store", problems)]
    assert kept == ["a", "b", "c"][: len(kept)]
    assert len(kept) == {0.3: 0, 0.55: 1, 0.8: 2}[cut]
    assert len(problems) == 1
    assert "torn" in problems[0]


def test_what_is_no_shard_and_an_empty_one(tmp_path):
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 100)
    problems = []
    assert read(tmp_path / "no.tar", tmp_path / "store", problems) == []
    assert "no tar file" in problems[0]
    (tmp_path / "empty.tar").write_bytes(shard([("README.md", b"hello")]))
    with pytest.raises(ValueError, match=r"empty\.tar: there is no sound"):
        read(tmp_path / "empty.tar", tmp_path / "store")
    (tmp_path / "x.zip").touch()
    with pytest.raises(ValueError, match=r"no \.jsonl manifest, no \.tar or \.parquet"):
        read(tmp_path / "x.zip", tmp_path / "store")


# ---- parquet


def multi_talk(folder, label="Alice"):
    """MultiTalkFT's layout: data_en.jsonl beside audio/ and transcripts/*.parquet, whose words are JSON with speakers' own labels."""
    (folder / "audio").mkdir(parents=True)
    (folder / "transcripts").mkdir()
    lines, rows = [], []
    for i in range(2):
        name = f"audio/{i}_stereo.flac"
        (folder / name).write_bytes(sound(i))
        lines.append(json.dumps({"path": name, "voice": f"voice/{i}.wav", "duration": 1.0, "system": "You are …"}))
        spoken = [["Bob", [0.5, 0.7], "Bob"], ["hello", [0.1, 0.4], label]]
        rows.append(
            {
                "audio_path": name, "id": str(i), "duration": 1.0, "num_channels": 2, "voice": "{}", "training": "{}",
                "speaker_to_channel": json.dumps({"Alice": 0, "Bob": 1}), "alignments": json.dumps(spoken),
            }
        )  # fmt: skip
    (folder / "data_en.jsonl").write_text("\n".join(lines))
    for i, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), folder / "transcripts" / f"en-{i:05d}.parquet")
    return folder / "data_en.jsonl"


@pytest.mark.parametrize("label", ["Alice", "SPEAKER_MAIN"])
def test_multi_talks_words(tmp_path, label):
    manifest = multi_talk(tmp_path / "set", label)
    for name in (manifest, manifest.parent):
        recordings = read(name, tmp_path / "store", require_words=True)
        assert [r.path.name for r in recordings] == ["0_stereo.flac", "1_stereo.flac"]
        assert recordings[0].words == (("hello", (0.1, 0.4), "SPEAKER_MAIN"), ("Bob", (0.5, 0.7), "SPEAKER_USER"))


def test_other_columns_are_named(tmp_path):
    manifest = multi_talk(tmp_path / "set")
    for path in (tmp_path / "set" / "transcripts").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.rename_columns(["file" if name == "audio_path" else name for name in table.column_names]), path)
    message = r"no column 'audio_path' or 'path' for the path; the columns are file, id, .*data\.columns: \{path: …\}"
    with pytest.raises(ValueError, match=message):
        read(manifest, tmp_path / "store")
    assert read(manifest, tmp_path / "store", columns={"path": "file"})[0].words is not None
    with pytest.raises(ValueError, match=r"no column 'said' for the alignments; the columns are"):
        read(manifest, tmp_path / "store", columns={"path": "file", "alignments": "said"})


def parquet_of_sounds(path, columns=("audio", "alignments"), rows=3):
    spoken = json.dumps([["hi", [0.1, 0.4], "SPEAKER_MAIN"]])
    table = [{columns[0]: {"bytes": sound(i, form="WAV"), "path": "../a.wav"}, columns[1]: spoken} for i in range(rows)]
    table[1][columns[0]]["bytes"] = b"torn"
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def test_a_parquet_of_sounds(tmp_path):
    path = parquet_of_sounds(tmp_path / "train-00000.parquet")
    problems = []
    recordings = read(path, tmp_path / "store", problems)
    assert [r.path.name for r in recordings] == ["000000-a.wav", "000002-a.wav"]
    assert recordings[0].words == (("hi", (0.1, 0.4), "SPEAKER_MAIN"),)
    assert len(problems) == 1
    assert "000001-a.wav: the sound file cannot be read" in problems[0]
    other = parquet_of_sounds(tmp_path / "other.parquet", ("clip", "said"))
    with pytest.raises(ValueError, match=r"no column 'audio' for the audio; the columns are clip, said"):
        read(other, tmp_path / "store")
    assert read(other, tmp_path / "store", [], columns={"audio": "clip", "alignments": "said"})[0].words == recordings[0].words
    (tmp_path / "torn.parquet").write_bytes(path.read_bytes()[:-100])
    problems = []
    assert read(tmp_path / "torn.parquet", tmp_path / "store", problems) == []
    assert "torn.parquet: the parquet file cannot be read" in problems[0]


# ---- sounds that break off


@pytest.mark.parametrize(("form", "rate"), [("WAV", 24000), ("FLAC", 22050), ("MP3", 44100)])
def test_a_sound_that_breaks_off_is_refused(tmp_path, form, rate):
    whole = sound(seconds=4.0, rate=rate, form=form)
    path = tmp_path / "set" / f"a.{form.lower()}"
    path.parent.mkdir()
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "set" / "data.jsonl").write_text(json.dumps({"path": path.name, "duration": 4.0}))
    cache = CodesCache(tmp_path / "cache", small_processor())
    source = str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"a\.\w+: the sound breaks off at [12]\.\d+ s of 4\.00 s; copy the file again"):
        prepare_set(source, DataSettings(source), cache)
    path.write_bytes(whole)
    assert prepare_set(source, DataSettings(source), cache).lengths[0] in (50, 51)  # MP3 adds a moment of its own


def test_codes_of_a_sound_that_broke_off_count_as_missing(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(sound(seconds=4.0, rate=24000, form="WAV")[:200_000])
    cache, settings = CodesCache(tmp_path / "cache", small_processor()), DataSettings("")

    def rows(seconds):
        problems = []
        return list(cache.prepare(0, [Placed(0, Recording(path, seconds))], settings, {}, problems)), problems

    ((half,), _), (none, (problem,)) = rows(2.08), rows(4.0)  # codes made before sounds were compared with their headers
    assert half.frames == 27
    assert none == []
    assert "breaks off at 2.08 s of 4.00 s" in problem


def test_a_wav_from_a_pipe_states_no_length(tmp_path):
    whole = sound(seconds=1.0, rate=24000, form="WAV")
    length = whole.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:length] + b"\xff" * 4 + whole[length + 4 :])
    found = prepare_set(str(tmp_path), DataSettings(str(tmp_path)), CodesCache(tmp_path / "cache", small_processor()))
    assert found.lengths == [13]


# ---- the Hub


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with HubServer() as server:
        monkeypatch.setattr(sources, "HfApi", partial(HfApi, endpoint=server.url, token=server.token))
        yield server


def test_data_sets_on_the_hub(hub, tmp_path):
    manifest = json.dumps({"path": "stereo/a.wav", "duration": 1.0}).encode()
    words = json.dumps({"alignments": [["hi", [0.1, 0.4], "SPEAKER_MAIN"]]}).encode()
    hub.add("datasets/user/listed", {"data.jsonl": manifest, "stereo/a.wav": sound(form="WAV"), "stereo/a.json": words, "w.pkl": b"x"})
    hub.add("datasets/user/sounds", {"README.md": b"#", "train/b.flac": sound(), "train/b.json": words, "test/c.flac": sound(1)})
    hub.add("datasets/user/shards", {"train/0000.tar": shard(sample("d", 1)), "test/0000.tar": shard(sample("e", 2))})
    parquet = parquet_of_sounds(tmp_path / "p.parquet").read_bytes()
    hub.add("datasets/user/rows", {"data/train-00000-of-00001.parquet": parquet})
    multi_talk(tmp_path / "multi")
    files = {p.relative_to(tmp_path / "multi").as_posix(): p.read_bytes() for p in (tmp_path / "multi").rglob("*") if p.is_file()}
    hub.add("datasets/user/multi", {**files, "data_zh.jsonl": b"broken", "other/x.flac": b"x"})
    store = tmp_path / "store"

    def names(source, problems=None):
        return [r.path.name for r in read(source, store, problems)]

    assert names("hub:user/listed:2") == ["a.wav"]
    assert not list((store / "hub").rglob("*.pkl"))
    assert read("hub:user/listed", store)[0].words[0][0] == "hi"
    assert names("hub:user/sounds") == ["c.flac", "b.flac"]
    assert names("hub:user/shards/test") == ["e.flac"]
    assert not (store / "hub" / "user" / "shards" / "train").exists()  # only what was named is fetched
    assert names("hub:user/shards/train/0000.tar") == ["d.flac"]
    assert names("hub:user/rows", []) == ["000000-a.wav", "000002-a.wav"]
    assert names("hub:user/multi/data_en.jsonl") == ["0_stereo.flac", "1_stereo.flac"]
    before = len([line for line in hub.log if line.startswith("GET") and "/resolve/" in line])
    assert names("hub:user/shards/test,hub:user/multi/data_en.jsonl:3") == ["e.flac", "0_stereo.flac", "1_stereo.flac"]
    assert len([line for line in hub.log if line.startswith("GET") and "/resolve/" in line]) == before


def test_trouble_with_the_hub_is_told_in_words(hub, tmp_path):
    hub.add("datasets/user/bare", {"README.md": b"#"})
    with pytest.raises(ValueError, match=r"fetching the source 'hub:user/none'.*not found"):
        read("hub:user/none", tmp_path)
    with pytest.raises(ValueError, match=r"hub/user/bare: there is no sound file"):
        read("hub:user/bare", tmp_path)
    with pytest.raises(ValueError, match=r"'hub:justaname'.*hub:owner/name"):
        read("hub:justaname", tmp_path)
    hub.add("datasets/user/set", {"a.flac": sound(), "b.flac": sound(1)})
    hub.faults.append(Fault("drop", r"/resolve/.*b\.flac", "GET", times=99))
    with pytest.raises(OSError, match=r"fetching the source 'hub:user/set' failed.*run the same command again"):
        read("hub:user/set", tmp_path)
    hub.faults.clear()
    assert len(read("hub:user/set", tmp_path)) == 2


def test_prepare_takes_a_data_set_from_the_hub(hub, tmp_path):
    """The whole command in a process of its own, with the client as users have it."""
    hub.add("datasets/user/shards", {"0000.tar": shard(sample("d", 1))})
    small_processor().save_pretrained(tmp_path / "processor")
    command = [sys.executable, "-m", "modeling_moshi_ttt.cli", "prepare", "hub:user/shards", "--require-words"]
    command += ["--processor", "processor", "--cache", "cache"]
    environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 recordings, 0.00 hours, 1 of them with words" in done.stdout

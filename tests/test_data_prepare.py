"""`moshi-ttt prepare` in shards: any number of processes gives the index of one; what was prepared needs nothing else; damage is seen."""

import argparse
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hub_checkpoints import small_processor
from safetensors.numpy import save_file

from modeling_moshi_ttt.data import prepare as command
from modeling_moshi_ttt.data.cache import CodesCache
from modeling_moshi_ttt.data.codes import save_codes
from modeling_moshi_ttt.data.index import SCHEMA, read_index, shard_path
from modeling_moshi_ttt.data.prepared import prepare, prepare_set
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.data.shard import Shard, read_shard
from modeling_moshi_ttt.training.lanes import Window
from modeling_moshi_ttt.training.windows import WindowReader

MAIN = "SPEAKER_MAIN"


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def make_folder(folder, count=6, channels=2):
    """Recordings of one to two seconds; every other one has words."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        seconds = 1 + i / count
        soundfile.write(folder / f"{i}.flac", 0.1 * random.standard_normal((round(seconds * 24_000), channels)), 24_000)
        if i % 2 == 0:
            (folder / f"{i}.json").write_text(json.dumps({"alignments": [["he", [0.2, 0.5], MAIN], ["you", [0.6, 9.0], MAIN]]}))
    return str(folder)


def columns(table):
    return {name: column for name, column in table.to_pydict().items() if name != "date"}


@pytest.mark.parametrize("total", [2, 3, 8])
def test_shards_together_are_the_whole(tmp_path, processor, total):
    source = make_folder(tmp_path / "in")
    settings = DataSettings(source)
    whole = prepare(source, settings, CodesCache(tmp_path / "one", processor))
    parts = [prepare(source, settings, CodesCache(tmp_path / "many", processor), shard=Shard(i, total)) for i in range(total)]
    together = read_index(parts[0].index, CodesCache(tmp_path / "many", processor).codec)
    assert columns(together.table) == columns(whole.table)
    assert together.sources == [source]
    for one in whole.table.column("codes").to_pylist():
        assert next((tmp_path / "one").rglob(one)).read_bytes() == next((tmp_path / "many").rglob(one)).read_bytes()


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_at_the_same_time_give_the_index_of_one(tmp_path, processor, count):
    processor.save_pretrained(tmp_path / "processor")
    source = make_folder(tmp_path / "in")
    one = prepare(source, DataSettings(source), CodesCache(tmp_path / "one", processor))
    arguments = [sys.executable, "-m", "modeling_moshi_ttt.cli", "prepare", source, "--processor", str(tmp_path / "processor")]
    running = [
        subprocess.Popen([*arguments, "--cache", str(tmp_path / "many"), "--shard", f"{i % 2}/2"], stdout=subprocess.PIPE)
        for i in range(count)
    ]
    assert [process.wait() for process in running] == [0] * count
    (index,) = (tmp_path / "many").rglob("*.index")
    assert columns(read_index(index, index.parent.name).table) == columns(one.table)


def test_a_shard_that_another_process_makes_is_waited_for_by_name(tmp_path, processor, capsys):
    source = make_folder(tmp_path / "in", 2)
    cache = CodesCache(tmp_path / "cache", processor)
    one = prepare(source, DataSettings(source), cache)
    script = (
        "import sys, time; from pathlib import Path; from modeling_moshi_ttt.common.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'data.cache', '.00000-of-00001.lock'):\n"
        "    print('held', flush=True); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(one.index)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        again = prepare(source, DataSettings(source), cache)
    assert f"waiting for process {other.pid} on {socket.gethostname()}" in capsys.readouterr().err
    assert columns(again.table) == columns(one.table)


def test_an_index_needs_neither_sounds_nor_words(tmp_path, processor, capsys):
    source = make_folder(tmp_path / "in")
    made = prepare_set(source, DataSettings(source), CodesCache(tmp_path / "cache", processor))
    said = capsys.readouterr()
    assert "3 of 6 recordings have no words" in said.err
    assert "moshi-ttt annotate" in said.err
    assert "odd words in 3 files (3 clamped)" in said.out
    (index,) = (tmp_path / "cache").rglob("*.index")
    shutil.rmtree(tmp_path / "in")
    text = f"{index}:3"
    again = prepare_set(text, DataSettings(text), CodesCache(tmp_path / "cache", processor))
    assert (again.sizes, again.weights, again.lengths, again.mark) == (made.sizes, [3.0], made.lengths, made.mark)
    for one, other in zip(made.recordings, again.recordings, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.read(0, 12), other.read(0, 12), strict=True))


def test_missing_shards_and_other_codecs_are_named(tmp_path, processor):
    source = make_folder(tmp_path / "in")
    cache = CodesCache(tmp_path / "cache", processor)
    index = prepare(source, DataSettings(source), cache, shard=Shard(0, 3)).index
    with pytest.raises(OSError, match=r"lacks shards 1, 2 of 3"):
        prepare_set(str(index), DataSettings(str(index)), cache)
    with pytest.raises(ValueError, match="the codec"):
        read_index(prepare(source, DataSettings(source, words="keep"), cache).index, "0123")
    path = shard_path(index, 0, 3)
    path.write_bytes(path.read_bytes()[:-20])
    shard_path(index, 1, 3).touch()
    shard_path(index, 2, 3).touch()
    with pytest.raises(OSError, match="the index cannot be read"):
        read_index(index, cache.codec)


def test_a_damaged_window_is_seen_when_it_is_read(tmp_path, processor):
    source = make_folder(tmp_path / "in", 1)
    (one,) = prepare_set(source, DataSettings(source), CodesCache(tmp_path / "cache", processor)).recordings
    data = bytearray(one.codes.read_bytes())
    data[-10] ^= 1
    one.codes.write_bytes(data)
    with pytest.raises(OSError, match=r"safetensors: the codes are damaged .*moshi-ttt prepare"):
        WindowReader([one], [0, 1, 1], 3)[[Window(0, 0, 8, True, False)]]


def test_codes_of_version_0_2_are_taken_over(tmp_path, processor, monkeypatch):
    source = make_folder(tmp_path / "in", 2)
    cache = CodesCache(tmp_path / "cache", processor)
    fresh = prepare_set(source, DataSettings(source), CodesCache(tmp_path / "other", processor))
    cache.folder.mkdir(parents=True)
    for one in fresh.recordings:
        save_file({"codes": one.read(0, one.frames)[1]}, cache.folder / f"{one.sound}.safetensors")
    (cache.folder / "hashes.json").write_text("{torn")
    monkeypatch.setattr("modeling_moshi_ttt.data.cache.encode_streams", None)
    taken = prepare_set(source, DataSettings(source), cache)
    assert [one.codes.read_bytes() for one in taken.recordings] == [one.codes.read_bytes() for one in fresh.recordings]


def test_new_words_are_no_reason_to_encode_again(tmp_path, processor, monkeypatch):
    source = make_folder(tmp_path / "in", 2)
    before = prepare_set(source, DataSettings(source), CodesCache(tmp_path / "cache", processor)).recordings
    (tmp_path / "in" / "1.json").write_text(json.dumps([["me", [0.2, 0.5], MAIN]]))
    monkeypatch.setattr("modeling_moshi_ttt.data.cache.encode_streams", None)
    after = prepare_set(source, DataSettings(source), CodesCache(tmp_path / "cache", processor)).recordings
    assert before[0].codes == after[0].codes
    assert (after[1].read(0, 12)[0] >= 0).all()
    assert (before[1].read(0, 12)[0] == -1).all()


@pytest.mark.parametrize(("voice", "side"), [("moshi", 0), ("user", 1)])
def test_a_mono_recording_is_one_of_the_two(tmp_path, processor, voice, side):
    source = make_folder(tmp_path / "in", 1, channels=1)
    cache = CodesCache(tmp_path / "cache", processor)
    with pytest.raises(ValueError, match=r"1 channels.*data\.mono_is"):
        prepare_set(source, DataSettings(source), cache)
    (one,) = prepare_set(source, DataSettings(source, mono_is=voice), cache).recordings
    _, codes = one.read(0, one.frames)
    assert (codes[side] >= 0).all()
    assert (codes[1 - side] == -1).all()
    batch = WindowReader([one], [0, 1, 1], 3)[[Window(0, 0, 8, True, False)]]
    assert bool((batch.audio_labels >= 0).any()) == (voice == "moshi")


def test_recordings_side_by_side_are_what_they_are_alone(tmp_path, processor):
    source = make_folder(tmp_path / "in", 5)
    alone, together = (prepare_set(source, DataSettings(source), CodesCache(tmp_path / str(n), processor, n)) for n in (1, 3))
    for one, other in zip(alone.recordings, together.recordings, strict=True):
        assert (one.read(0, one.frames)[1] == other.read(0, one.frames)[1]).mean() > 0.99
        assert one.frames == other.frames


def test_a_mixed_folder_says_what_it_leaves_out(tmp_path, processor, capsys):
    source = make_folder(tmp_path / "in", 2)
    for name in ("notes.txt", "b.txt", "cover.jpg"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "torn.mp3").write_bytes(b"ID3")
    shutil.copy(tmp_path / "in" / "0.flac", tmp_path / "in" / "0.wav")
    settings = DataSettings(source, on_bad_files="skip")
    assert len(prepare_set(source, settings, CodesCache(tmp_path / "cache", processor)).recordings) == 2
    out = capsys.readouterr().out
    assert "2 × .txt" in out
    assert "1 × .jpg" in out
    assert "torn.mp3: the sound file cannot be read" in out
    assert "0.wav: 0.flac has the same name" in out


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_manifests_as_they_come(tmp_path, processor, line_end):
    make_folder(tmp_path / "in", 2)
    names = ["0.flac", "a\u2028b.flac"]
    (tmp_path / "in" / "1.flac").rename(tmp_path / "in" / names[1])
    lines = [json.dumps({"path": name, "duration": 1 + i / 2}, ensure_ascii=False) for i, name in enumerate(names)]
    lines += ['{"path": "0.flac", "duration": 1' + "0" * 400 + "}", lines[0]]
    manifest = tmp_path / "in" / "data.jsonl"
    manifest.write_text("\ufeff" + line_end.join(lines), newline="")
    with pytest.raises(ValueError, match=r"2 bad files.*\n.*line 3: duration is 10000.*\n.*line 4: 0\.flac is listed twice"):
        prepare_set(str(manifest), DataSettings(str(manifest)), CodesCache(tmp_path / "cache", processor))
    settings = DataSettings(str(manifest), on_bad_files="skip")
    assert len(prepare_set(str(manifest), settings, CodesCache(tmp_path / "cache", processor)).recordings) == 2


TRAINS = """
import sys, time
from pathlib import Path
from modeling_moshi_ttt.data.index import read_index
from modeling_moshi_ttt.data.prepared import IndexedRecordings, PreparedSet
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.training.windows import Loader, WindowReader, make_plan
folder, count = Path(sys.argv[1]), int(sys.argv[2])
start = time.process_time()
data = PreparedSet(IndexedRecordings(folder.parent, read_index(folder, "c").table), [count], [1.0])
assert sum(data.lengths) == count // 1000 * 500500 and data.recordings[7].frames == 8
opened = time.process_time() - start
mark = data.mark
for carry in ("none", "state+attention"):
    settings = DataSettings("", carry=carry, window_seconds=8.0, batch_size=16)
    steps = iter(Loader(make_plan(data, settings, 16, 100, seed=0), WindowReader(data.recordings, [0, 1], 2), 16, 1, 1, 0))
    assert sum(next(steps).micro_batches[0][0].frames for _ in range(20)) > 10_000
print(opened, time.process_time() - start, int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024)
"""


@pytest.mark.parametrize("count", [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_a_rank_trains_from_a_million_recordings_in_little_memory(tmp_path, count):
    """1 GiB at most for 10^6 and the libraries, with the plans and batches of both ways to cut. Printed with -s: seconds to open, in all, and MB."""
    folder = tmp_path / "0123456789abcdef.index"
    folder.mkdir()
    save_codes(tmp_path / "all.safetensors", np.zeros((2, 2, 1000), np.int16), np.zeros(1000, np.int32))
    about = {"format": 1, "codec": "c", "sources": ["s"], "weights": [1.0], "problems": []}
    numbers = np.arange(count)
    sounds = pa.array([f"{number:064x}" for number in range(count)])
    values = {"place": numbers, "frames": numbers % 1000 + 1, "path": sounds, "sound": sounds}
    values["codes"] = pa.array([f"{'./' * 16}all.safetensors"] * count)  # as long as a digest
    values |= {name: np.ones(count, bool) for name in ("aligned", "speaks")}
    table = pa.table([values.get(name, np.zeros(count, int)) for name in SCHEMA.names], schema=SCHEMA)
    for shard in range(4):
        part = table.slice(shard * count // 4, count // 4).replace_schema_metadata({"moshi_ttt": json.dumps(about)})
        pq.write_table(part, shard_path(folder, shard, 4))
    del table, values, sounds
    done = subprocess.run([sys.executable, "-c", TRAINS, str(folder), str(count)], capture_output=True, text=True, check=True)
    print(done.stdout)
    assert float(done.stdout.split()[-1]) < 1000


# ---- shares


def test_a_share_comes_from_the_option_or_where_a_launcher_says():
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}
    assert read_shard(None, {}) == Shard(0, 1)
    assert read_shard(None, slurm | {"RANK": "1", "WORLD_SIZE": "2"}) == Shard(3, 8)
    assert read_shard(None, {"RANK": "1", "WORLD_SIZE": "2"}) == Shard(1, 2)
    assert read_shard("2/4", slurm) == Shard(2, 4)
    for wrong in ("4/4", "x", "-1/2", "1", "1/0"):
        with pytest.raises(ValueError, match="--shard"):
            read_shard(wrong, {})
    with pytest.raises(ValueError, match="begins at 1"):
        read_shard(None, slurm | {"SLURM_ARRAY_TASK_MIN": "1"})


def test_a_device_that_is_not_there_is_named(tmp_path, processor):
    processor.save_pretrained(tmp_path / "processor")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    options = ["x", "--processor", str(tmp_path / "processor"), "--cache", str(tmp_path / "cache"), "--device", "nowhere"]
    with pytest.raises(ValueError, match="--device=nowhere"):
        command.run(parser.parse_args(options))

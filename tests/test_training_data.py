"""From sound files to batches: sources, codes encoded once, text streams, labels, and every bad file by name."""

import argparse
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_checkpoints import small_processor
from training_runs import make_recordings

from modeling_moshi_ttt.data import annotate, prepare
from modeling_moshi_ttt.data.audio import read_audio, write_audio
from modeling_moshi_ttt.data.cache import CodesCache
from modeling_moshi_ttt.data.codec import codec_digest
from modeling_moshi_ttt.data.prepared import PreparedSet, prepare_set
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.data.sources import parse_sources, read_sources
from modeling_moshi_ttt.data.words import recording_text, says_words
from modeling_moshi_ttt.training.lanes import EMPTY, Window
from modeling_moshi_ttt.training.noise import add_noise
from modeling_moshi_ttt.training.windows import Loader, WindowReader, make_plan


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def words(*spoken, speaker="SPEAKER_MAIN"):
    return {"alignments": [[text, [start, start + 0.3], speaker] for text, start in spoken]}


def make_source(folder, names=("a", "b"), seconds=1.0, channels=2):
    """A manifest of noises with words beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, name in enumerate(names):
        random = np.random.default_rng(i)
        write_audio(folder / f"{name}.wav", 0.1 * random.standard_normal((channels, round(seconds * 24000))), 24000)
        (folder / f"{name}.json").write_text(json.dumps(words(("he", 0.1), ("you", 0.6))))
        lines.append(json.dumps({"path": f"{name}.wav", "duration": seconds}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


# ---- sources


def test_sources_and_weights():
    assert parse_sources("a.jsonl:2,b.jsonl, hub:kyutai/DailyTalkContiguous:0.5") == [
        ("a.jsonl", 2.0),
        ("b.jsonl", 1.0),
        ("hub:kyutai/DailyTalkContiguous", 0.5),
    ]
    assert parse_sources("hub:owner/name") == [("hub:owner/name", 1.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "No source"), ("a:0", "weight 0"), ("a:-1", "weight -1"), ("a:2,b,./a", "'./a' is named twice")],
)
def test_wrong_sources(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(text)


def test_folders_and_manifests_and_parquet_words(tmp_path):
    manifest = make_source(tmp_path / "one")
    make_source(tmp_path / "two", ["c"])
    (tmp_path / "two" / "data.jsonl").unlink()
    (tmp_path / "one" / "b.json").unlink()
    alignments = json.dumps(words(("me", 0.2))["alignments"])
    Dataset.from_dict({"path": ["b.wav"], "alignments": [alignments]}).to_parquet(str(manifest.with_suffix(".parquet")))
    problems = []
    one, two = read_sources(f"{manifest}:3,{tmp_path / 'two'}", DataSettings("", require_words=True), tmp_path / "store", problems)
    assert problems == []
    assert [r.path.name for r in one.recordings + two.recordings] == ["a.wav", "b.wav", "c.wav"]
    assert one.recordings[1].words == (("me", (0.2, 0.5), "SPEAKER_MAIN"),)
    assert (one.weight, two.weight) == (3.0, 1.0)


def test_bad_files_are_reported_together_and_skipped_when_asked(tmp_path, processor, capsys):
    manifest = make_source(tmp_path, ["a", "long", "torn", "mono", "mute", "odd"])
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    write_audio(tmp_path / "mono.wav", np.zeros(24000), 24000)
    (tmp_path / "mute.json").unlink()
    (tmp_path / "odd.json").write_text(json.dumps(words(("hé!", 0.1))))
    lines = manifest.read_text().replace('"long.wav", "duration": 1.0', '"long.wav", "duration": 9.0')
    manifest.write_text(lines)
    cache = CodesCache(tmp_path / "cache", processor)
    settings = DataSettings(train=str(manifest), require_words=True, words="refuse")
    with pytest.raises(ValueError, match="5 bad files") as error:
        prepare_set(str(manifest), settings, cache)
    for name, reason in [
        ("long", "says 9.000 s"),
        ("torn", "cannot be read"),
        ("mono", "1 channels"),
        ("mute", "no words"),
        ("odd", "cannot encode"),
    ]:
        assert any(f"{name}.wav" in line and reason in line for line in str(error.value).splitlines()), name
    settings.on_bad_files = "skip"
    assert [r.name for r in prepare_set(str(manifest), settings, cache).recordings] == ["a"]
    assert "5 bad files are left out" in capsys.readouterr().out
    (tmp_path / "none.jsonl").write_text('{"path": "torn.wav", "duration": 1}')
    with pytest.raises(ValueError, match="Nothing can be used in .*none"):
        prepare_set(str(tmp_path / "none.jsonl"), settings, cache)


# ---- codes


def test_codes_are_encoded_once_and_found_by_their_content(tmp_path, processor, monkeypatch):
    manifest = make_source(tmp_path / "one")
    settings = DataSettings(train=str(manifest))
    first = prepare_set(str(manifest), settings, CodesCache(tmp_path / "cache", processor))
    _, codes = first.recordings[0].read(0, first.lengths[0])
    sound = torch.from_numpy(read_audio(tmp_path / "one" / "a.wav"))
    assert np.array_equal(codes, processor.encode_audio(sound).numpy())
    assert np.array_equal(first.recordings[0].read(3, 4)[1], codes[:, :, 3:7])

    def refuse(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr("modeling_moshi_ttt.data.cache.encode_streams", refuse)
    copied = make_source(tmp_path / "two")  # the same sound under another path
    again = prepare_set(str(copied), settings, CodesCache(tmp_path / "cache", processor))
    assert [r.codes for r in again.recordings] == [r.codes for r in first.recordings]


def test_a_damaged_cache_file_is_made_again(tmp_path, processor):
    manifest = make_source(tmp_path)
    settings = DataSettings(train=str(manifest))
    found = prepare_set(str(manifest), settings, CodesCache(tmp_path / "cache", processor))
    whole = found.recordings[0].codes.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"junk" * 10, whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:]):
        found.recordings[0].codes.write_bytes(damage)
        prepare_set(str(manifest), settings, CodesCache(tmp_path / "cache", processor))
        assert found.recordings[0].codes.read_bytes() == whole


def test_another_codec_has_other_codes(processor):
    other = small_processor()
    assert codec_digest(other) == codec_digest(processor)
    with torch.no_grad():
        next(other.codec.parameters()).add_(1e-3)
    assert codec_digest(other) != codec_digest(processor)


def test_text_is_the_processors(tmp_path, processor):
    manifest = make_source(tmp_path, ["a"])
    (recording,) = read_sources(str(manifest), DataSettings(""), tmp_path / "store", [])[0].recordings
    sound = torch.from_numpy(read_audio(recording.path))
    expected = processor(sound, sampling_rate=24000, words=recording.words)["input_ids"][0]
    assert recording_text(processor, recording.words, len(expected))[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("spoken", "message"),
    [
        ([["he", [100, 400], "SPEAKER_MAIN"]], r"1 of 1 words, such as 'he' at 100 s, stand outside .*1\.00 s; are the times in seconds"),
        ([["he", [0.1, 0.4], "SPEAKER_MAIN"], ["you", [1.04, 1.2], "SPEAKER_USER"]], r"word 1 .*'you'.* stands outside"),
        ([["he", [-0.1, 0.4], "SPEAKER_MAIN"]], r"word 0 .*'he'.* outside .* or reaches out of it"),
        (
            [["he", [0.1, 0.4], "SPEAKER_00"], ["you", [0.5, 0.7], "moshi"]],
            r"speakers are 'SPEAKER_00', 'moshi' and none is 'SPEAKER_MAIN'",
        ),
        ([["he", [0.1, 0.4], "SPEAKER_USER"], ["you", [0.5, 0.7], "Moshi"]], r"speakers are 'Moshi' and none is"),
    ],
)
def test_words_of_which_nothing_would_remain_are_refused(tmp_path, processor, spoken, message):
    manifest = make_source(tmp_path, ["a"])
    (tmp_path / "a.json").write_text(json.dumps(spoken))
    with pytest.raises(ValueError, match=rf"a\.(wav|json): .*{message}"):
        prepare_set(str(manifest), DataSettings(train=str(manifest), words="refuse"), CodesCache(tmp_path / "cache", processor))


@pytest.mark.parametrize(
    ("spoken", "says"),
    [
        ([["he", [0.1, 0.4], "SPEAKER_MAIN"], ["you", [0.5, 0.7], "SPEAKER_01"]], True),  # moshi-finetune takes any label beside Moshi's
        ([["he", [0.1, 0.4], "SPEAKER_USER"]], False),  # Moshi only listens
        ([["he", [0.1, 0.4], "SPEAKER_MAIN"], ["you", [1.04, 1.04], "SPEAKER_MAIN"]], True),  # a word without duration is left out
        ([], False),
    ],
)
def test_words_that_are_legal(tmp_path, processor, spoken, says):
    manifest = make_source(tmp_path, ["a"])
    (tmp_path / "a.json").write_text(json.dumps(spoken))
    (one,) = prepare_set(str(manifest), DataSettings(train=str(manifest)), CodesCache(tmp_path / "cache", processor)).recordings
    text, _ = one.read(0, one.frames)
    assert says_words(text, [3, 0]) == says


# ---- batches


def test_labels_mask_what_nothing_predicts(tmp_path):
    class Config:
        audio_vocab_size, num_codebooks, vocab_size = 20, 3, 30

    recordings = make_recordings(tmp_path, [10, 6], Config, speechless=(1,))
    reader = WindowReader(recordings, [0, 1, 2, 0, 1, 2], 3)
    windows = [Window(0, 0, 8, True, False), Window(0, 8, 2, False, True), Window(1, 0, 6, True, True), EMPTY]
    batch = reader[windows]
    assert batch.input_ids.shape == (4, 8)
    assert batch.attention_mask.sum(1).tolist() == [8, 2, 6, 0]
    assert batch.reset.tolist() == [True, False, True, True]
    # a delayed codebook's last frames are predicted in the next window, if there is one
    assert (batch.audio_labels >= 0).sum(2).tolist() == [[8, 8, 8], [2, 1, 0], [6, 5, 4], [0, 0, 0]]
    assert torch.equal(batch.moshi_audio_codes[1, :, :2], torch.from_numpy(recordings[0].read(8, 2)[1][0].astype(np.int64)))
    assert (batch.input_ids[2] == -1).all()
    assert (batch.text_labels[2] == -100).all()
    assert (batch.text_labels[1, 2:] == -100).all()
    assert (batch.user_audio_codes[1, :, 2:] == -1).all()


def test_ranks_share_the_rows_without_overlap_or_loss(tmp_path):
    class Config:
        audio_vocab_size, num_codebooks, vocab_size = 20, 3, 30

    recordings = make_recordings(tmp_path, [8] * 12, Config)
    settings = DataSettings(train="x", carry="state")
    reader = WindowReader(recordings, [0, 1, 1], 3)

    data = PreparedSet(recordings, [12], [1.0])
    names = []
    for rank in range(3):
        loader = iter(Loader(make_plan(data, settings, 6, 8, 0), reader, 1, 2, 1, rank))
        names += [name for _ in range(2) for micro in next(loader).micro_batches for batch in micro for name in batch.names]
    assert sorted(names) == sorted(r.name for r in recordings)


def test_noise_replaces_its_share_and_repeats(tmp_path):
    class Config:
        audio_vocab_size, num_codebooks, vocab_size = 2000, 3, 30

    reader = WindowReader(make_recordings(tmp_path, [1000], Config), [0, 1, 1], 3)
    batch = reader[[Window(0, 0, 990, True, True), Window(0, 0, 500, True, True)]]
    settings = DataSettings(train="x", own_noise=0.5, user_noise=0.1, text_noise=0.2)
    noisy = add_noise(batch, settings, 2000, [(0, 1), (0, 2)])
    changed = (noisy.moshi_audio_codes != batch.moshi_audio_codes).any(1)
    assert 0.42 < changed[0, :990].float().mean() < 0.58
    assert 0.05 < (noisy.user_audio_codes != batch.user_audio_codes).any(1)[0, :990].float().mean() < 0.15
    assert set(noisy.input_ids[noisy.input_ids != batch.input_ids].tolist()) == {3}
    padded = add_noise(batch, settings, 2000, [(0, 1), (0, 2)], 9).input_ids
    assert set(padded[padded != batch.input_ids].tolist()) == {9}
    assert torch.equal(noisy.moshi_audio_codes[1, :, 500:], batch.moshi_audio_codes[1, :, 500:])  # what is absent stays absent
    assert torch.equal(noisy.audio_labels, batch.audio_labels)
    again, other = (add_noise(batch, settings, 2000, [seed, (0, 2)]) for seed in ((0, 1), (0, 3)))
    assert torch.equal(again.moshi_audio_codes, noisy.moshi_audio_codes)
    assert not torch.equal(other.moshi_audio_codes[0], noisy.moshi_audio_codes[0])
    assert torch.equal(other.moshi_audio_codes[1], noisy.moshi_audio_codes[1])  # each row has its own


# ---- commands


def options(command, *arguments):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(list(arguments))


def test_prepare_says_what_there_is(tmp_path, processor, capsys):
    processor.save_pretrained(tmp_path / "processor")
    manifest = make_source(tmp_path / "one")
    arguments = (str(manifest), "--processor", str(tmp_path / "processor"), "--cache", str(tmp_path / "cache"))
    assert prepare.run(options(prepare, *arguments)) == 0
    assert "2 recordings, 0.00 hours, 2 of them with words" in capsys.readouterr().out
    (tmp_path / "one" / "b.json").write_text(json.dumps(words(("he", 0.1), speaker="SPEAKER_USER")))
    assert prepare.run(options(prepare, *arguments)) == 0
    assert "2 recordings, 0.00 hours, 1 of them with words" in capsys.readouterr().out  # padding is no word
    (tmp_path / "one" / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 bad files(.|\n)*a\.wav"):
        prepare.run(options(prepare, *arguments))
    assert prepare.run(options(prepare, *arguments, "--skip-bad")) == 0
    for other, message in (("nothere", "there is no such folder"), (str(tmp_path / "one"), "holds no processor_config.json")):
        with pytest.raises(ValueError, match=f"--processor is {other}.*{message}"):
            prepare.run(options(prepare, str(manifest), "--processor", other, "--cache", str(tmp_path / "cache")))
    with pytest.raises(OSError, match="--cache is .*jsonl, where no folder can be made"):
        prepare.run(options(prepare, *arguments[:-1], str(manifest)))


def test_annotate_hears_each_channel_by_itself(tmp_path, monkeypatch, capsys):
    make_source(tmp_path, ["a", "b"])
    for name in "ab":
        (tmp_path / f"{name}.json").unlink()
    write_audio(tmp_path / "mono.wav", 0.1 * np.random.default_rng(5).standard_normal(24000), 24000)
    heard = []

    def recognizer(samples):
        heard.append(samples)
        start = 0.5 if len(heard) % 2 else 0.1
        return [{"text": " hi", "timestamp": (start, None)}, {"text": " ", "timestamp": (0.2, 0.3)}]

    monkeypatch.setattr(annotate, "load_recognizer", lambda *_: recognizer)
    (tmp_path / "b.wav").write_bytes(b"")
    assert annotate.run(options(annotate, str(tmp_path), "--mono-is", "user")) == 1
    out = capsys.readouterr().out
    assert "2 files annotated, 0 had words already" in out
    assert "b.wav" in out
    assert all(samples.shape == (16000,) for samples in heard)
    stereo = json.loads((tmp_path / "a.json").read_text())["alignments"]
    assert stereo == [["hi", [0.1, 1.0], "SPEAKER_USER"], ["hi", [0.5, 1.0], "SPEAKER_MAIN"]]
    assert json.loads((tmp_path / "mono.json").read_text())["alignments"][0][2] == "SPEAKER_USER"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no sound file"):
        annotate.run(options(annotate, str(tmp_path / "empty")))

"""Long recordings, read and encoded in pieces, are what they are in one piece; conversations answer frame for frame."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_checkpoints import small_model, small_processor

from modeling_moshi_ttt.data import long_recordings as books
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.data.recordings import Recording
from modeling_moshi_ttt.data.words import recording_text
from modeling_moshi_ttt.evaluation import dialogue

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def noise(seconds, channels=1, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (channels, round(24000 * seconds))).astype(np.float32)


def test_books_are_folders_in_natural_order(tmp_path):
    for name in ("a/emma/emma_10.flac", "a/emma/emma_9.flac", "a/emma/emma_100.flac", "b/dracula/x.flac"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = books.find_books(tmp_path)
    assert {name: [path.stem for path in paths] for name, paths in found.items()} == {
        "a/emma": ["emma_9", "emma_10", "emma_100"],
        "b/dracula": ["x"],
    }
    assert list(books.find_books(tmp_path / "a" / "emma")) == ["emma"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no flac"):
        books.find_books(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"):
        books.find_books(tmp_path / "none")


def test_files_of_a_book_join_without_a_seam(tmp_path, processor):
    first, second = noise(10.5), noise(3.33, seed=1)
    for name, samples in (("p_2.wav", first), ("p_10.wav", second)):
        write_audio(tmp_path / name, samples, 24000)
    sequence = books.encode_book(processor, [tmp_path / "p_2.wav", tmp_path / "p_10.wav"])
    whole = torch.from_numpy(np.concatenate([_sixteen_bit(first), _sixteen_bit(second)], 1))
    expected = processor.encode_audio(whole)[0]
    assert sequence.user is None
    assert sequence.text is None
    assert sequence.moshi.shape == expected.shape == (3, -(-whole.shape[1] // 1920))
    assert (sequence.moshi == expected).float().mean() > 0.99
    assert torch.equal(books.encode_book(processor, [tmp_path / "p_2.wav"], max_frames=7).moshi, sequence.moshi[:, :7])


def _sixteen_bit(samples):
    return (np.rint(np.clip(samples, -1, 1) * 32767) / 32768).astype(np.float32)


def test_a_recording_has_both_sides_and_its_words(tmp_path, processor):
    write_audio(tmp_path / "talk.wav", noise(12.3, channels=2), 24000)
    words = (("hello", (0.2, 0.6), "SPEAKER_MAIN"), ("no", (1.0, 1.2), "SPEAKER_USER"), ("again", (10.4, 11.0), "SPEAKER_MAIN"))
    sequence = books.encode_recording(processor, Recording(tmp_path / "talk.wav", 12.3, words))
    samples = _sixteen_bit(noise(12.3, channels=2))
    expected = processor(samples, sampling_rate=24000, words=[[word, list(times), who] for word, times, who in words])
    assert torch.equal(sequence.text, expected["input_ids"][0])
    assert (sequence.moshi == expected["moshi_audio_codes"][0]).float().mean() > 0.99
    assert (sequence.user == expected["user_audio_codes"][0]).float().mean() > 0.99
    silent = books.encode_recording(processor, Recording(tmp_path / "talk.wav", 12.3, None), max_frames=20)
    assert silent.text is None
    assert silent.moshi.shape == (3, 20)


def test_words_of_one_time_keep_their_order_in_every_path(tmp_path, processor):
    """In training, in the processor and in evaluation: sorted by start alone, so the later of two replaces what is left of the first."""
    write_audio(tmp_path / "talk.wav", noise(2.0, channels=2), 24000)
    words = (("he", (0.9, 1.2), "SPEAKER_MAIN"), ("you", (0.2, 0.6), "SPEAKER_MAIN"), ("are", (0.2, 0.5), "SPEAKER_MAIN"))
    recording = Recording(tmp_path / "talk.wav", 2.0, words)
    expected = processor.text_frames(words, 25)
    spoken = [
        (word.replace(" ", "").lstrip("\u2581"), start) for word, start in processor.words(torch.tensor(expected))
    ]  # its tokenizer spells letters
    assert spoken == [("are", 2 / 12.5), ("he", 11 / 12.5)]
    samples = _sixteen_bit(noise(2.0, channels=2))
    assert processor(samples, sampling_rate=24000, words=words)["input_ids"][0].tolist() == expected
    assert recording_text(processor, recording.words, 25)[0].tolist() == expected
    assert books.encode_recording(processor, recording).text.tolist() == expected


def test_the_model_answers_every_frame_at_its_time():
    model = small_model(audio_vocab_size=16)
    user = torch.randint(16, (3, 15), generator=torch.Generator().manual_seed(0))
    text, codes = dialogue.answer(model, user, generator=torch.Generator().manual_seed(1))
    expected = model.hear(user[None], generator=torch.Generator().manual_seed(1))
    assert torch.equal(text, expected[0][0])
    assert torch.equal(codes, expected[1][0])
    assert (text.shape, codes.shape) == ((15,), (3, 15))
    assert dialogue.answer(model, user[:, :1])[0].shape == (1,)


@pytest.mark.parametrize("delays", [[0, 1, 1], [0, 0, 0], [0, 2, 3]], ids=str)
def test_talk_answers_live_as_hear_does(tmp_path, processor, delays, capsys):
    spec = importlib.util.spec_from_file_location("talk", ROOT / "examples" / "talk.py")
    talk = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(talk)
    write_audio(tmp_path / "talk.wav", noise(1.0, channels=2), 24000)
    model = small_model(audio_vocab_size=16, vocab_size=28, audio_delays=[*delays, *delays])
    text, sound, _ = talk.converse(model, processor, Recording(tmp_path / "talk.wav", 1.0, None))
    user = processor.encode_audio(torch.from_numpy(_sixteen_bit(noise(1.0, channels=2))[1:]))
    expected, codes = model.hear(user, do_sample=False)
    assert torch.equal(text, expected[0])
    assert sound.shape == (13 * 1920,)
    assert " ".join(word for word, _ in processor.words(text)).split() == capsys.readouterr().out.split()
    assert np.allclose(sound, processor.decode_audio(codes)[0].numpy(), atol=1e-5)


def test_the_model_before_fine_tuning_hears_the_same_user(tmp_path, processor):
    write_audio(tmp_path / "talk.wav", noise(2.0, channels=2), 24000)
    recordings = [Recording(tmp_path / "talk.wav", 2.0, (("hello", (0.2, 0.6), "SPEAKER_MAIN"),))]
    model, other = (small_model(audio_vocab_size=16, vocab_size=28, seed=seed) for seed in (0, 1))
    both = dialogue.measure(model, processor, recordings, before=other)
    assert {"reference", "before", "model"} <= set(both)
    assert both["before"] == dialogue.measure(other, processor, recordings)["model"]
    assert both["model"] == dialogue.measure(model, processor, recordings)["model"]


def test_a_mono_recording_is_no_dialogue(tmp_path, processor):
    write_audio(tmp_path / "mono.wav", noise(1.0), 24000)
    with pytest.raises(ValueError, match=r"mono.wav"):
        dialogue.measure(None, processor, [Recording(Path(tmp_path / "mono.wav"), 1.0, None)])

"""The processor: words to the text stream, sound to codes and back, whole and live, and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, EncodecFeatureExtractor, MimiConfig, MimiModel

from modeling_moshi_ttt import MoshiTTTConfig
from modeling_moshi_ttt.processing_moshi_ttt import MoshiTTTProcessor, resample
from modeling_moshi_ttt.tokens_moshi_ttt import parse_word, text_stream

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configuration" / "model" / "tiny"
RATE, FRAME = 24_000, 1920


def mimi(**changes) -> MimiModel:
    """An untrained Mimi with codebooks drawn at random, so that codes differ."""
    sizes = dict(
        num_filters=4, upsampling_ratios=[4, 4, 5, 12], hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=10, layer_scale_initial_scale=0.5, upsample_groups=32, num_quantizers=8,
        codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16,
    )  # fmt: skip
    torch.manual_seed(0)
    codec = MimiModel(MimiConfig(**{**sizes, **changes})).eval()
    for group in (codec.quantizer.semantic_residual_vector_quantizer, codec.quantizer.acoustic_residual_vector_quantizer):
        for layer in group.layers:
            layer.codebook.embed_sum.normal_()
            layer.codebook._embed = None
    with torch.no_grad():  # bring the output to the size of sound, for the comparisons are absolute
        codec.decoder.decoder_seanet.layers[-1].conv.weight.mul_(0.01)
    return codec


@pytest.fixture(scope="module")
def processor() -> MoshiTTTProcessor:
    return MoshiTTTProcessor.from_pretrained(TINY)


def noise(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((channels, samples)) * 0.1).astype(np.float32)


# The text stream


def test_text_stream_by_hand():
    # frames of 80 ms: the word at 0.30 s starts in frame 3, after an end-of-padding in frame 2
    assert text_stream([([7, 8], 0.30), ([9], 0.70)], 12) == [3, 3, 0, 7, 8, 3, 3, 0, 9, 3, 3, 3]


def test_text_stream_replaces_what_is_pending_or_keeps_and_shifts():
    words = [([7, 8, 9, 10], 0.0), ([11], 0.16)]
    assert text_stream(words, 6) == [7, 8, 11, 3, 3, 3]
    assert text_stream(words, 6, keep_and_shift=True) == [7, 8, 9, 10, 11, 3]


def test_text_stream_edges():
    assert text_stream([], 3) == [3, 3, 3]
    assert text_stream([([5], 0.0)], 1) == [5]  # no frame before it for the end of padding
    assert text_stream([([5], 9.0)], 3) == [3, 3, 3]  # past the end
    assert text_stream([([5, 6, 7], 0.16)], 3) == [3, 0, 5]  # cut at the end
    assert text_stream([([5], 0.0), ([6], 0.01)], 2) == [6, 3]  # two words in one frame: the later one


def kyutai_stream(words, n_frames, keep_and_shift):
    """moshi-finetune's loop, in its own words, with padding inside words."""
    stream, i, stack = [3] * n_frames, 0, []
    for t in range(n_frames):
        while i < len(words) and words[i][1] * 12.5 < t + 1:
            stack = (stack if keep_and_shift else []) + list(words[i][0])
            i += 1
        if stack:
            if t > 0 and stream[t - 1] == 3:
                stream[t - 1] = 0
            stream[t], stack = stack[0], stack[1:]
    return stream


@given(
    st.lists(st.tuples(st.lists(st.integers(4, 99), min_size=1, max_size=5), st.floats(0, 5)), max_size=12),
    st.integers(1, 70),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_text_stream_properties(words, n_frames, keep):
    words = sorted(words, key=lambda word: word[1])
    stream = text_stream(words, n_frames, keep_and_shift=keep)
    assert stream == kyutai_stream(words, n_frames, keep)
    assert len(stream) == n_frames
    for t in range(n_frames - 1):
        if stream[t] == 0:
            assert stream[t + 1] > 3  # an end of padding always announces a word
        if stream[t] == 3:
            assert stream[t + 1] in (0, 3)
    if keep and n_frames == 70 and sum(len(tokens) for tokens, _ in words) < 5:
        assert [token for token in stream if token > 3] == [token for tokens, _ in words for token in tokens]


def with_padding(ids) -> MoshiTTTProcessor:
    """The tiny processor for a model with other ids of text padding."""
    whole = MoshiTTTProcessor.from_pretrained(TINY)
    return MoshiTTTProcessor(whole.feature_extractor, whole.tokenizer, whole.audio_tokenizer, text_padding_ids=ids)


def test_padding_ids_are_the_models_everywhere(processor, tmp_path):
    other = with_padding([5, 6])
    words, usual = [("hello", 0.3, 0.9, "SPEAKER_MAIN"), ("there", 1.0, 1.4, "SPEAKER_MAIN")], {3: 5, 0: 6}
    stream = processor.text_frames(words, 25)
    expected = [usual.get(token, token) for token in stream]
    assert other.text_frames(words, 25) == expected != stream
    batch = other(noise(1, 2 * RATE), sampling_rate=RATE, words=words)
    assert batch["input_ids"][0].tolist() == expected
    assert other.words(torch.tensor(expected)) == processor.words(torch.tensor(stream)) != []
    assert other.decode_text(torch.tensor(expected)) == processor.decode_text(torch.tensor(stream)) == "hello there"
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["text_padding_ids"] == [5, 6]
    assert AutoProcessor.from_pretrained(tmp_path).text_padding_ids == [5, 6]


def test_a_processor_saved_without_padding_ids_has_moshis(processor):
    assert "text_padding_ids" not in json.loads((TINY / "processor_config.json").read_text())
    assert processor.text_padding_ids == MoshiTTTConfig(hidden_size=32, num_attention_heads=2).text_padding_ids == [3, 0]


def test_a_model_with_other_padding_ids_is_refused(processor):
    config = MoshiTTTConfig(hidden_size=32, num_attention_heads=2, text_padding_ids=[5, 6])
    with_padding([5, 6]).check_model(config)
    with pytest.raises(ValueError, match=r"model's `text_padding_ids=\[5, 6\]` differ from the processor's `text_padding_ids=\[3, 0\]`"):
        processor.check_model(config)


def test_a_word_that_reads_as_padding_is_refused(processor):
    (token,) = processor.encode_word("\u2581a".strip("\u2581"))[:1]
    with pytest.raises(ValueError, match="'a', which reads as a special token"):
        with_padding([token, 0]).encode_word("a")


@pytest.mark.parametrize("ids", [[3], [3, 0, 1], [-1, 0], [3.0, 0], [True, 0], "30"])
def test_padding_ids_that_cannot_be_are_refused(ids):
    with pytest.raises(ValueError, match="`text_padding_ids=.*` must hold two token ids"):
        with_padding(ids)


# Sound


@pytest.mark.parametrize(("rate", "new"), [(44_100, 24_000), (16_000, 24_000), (22_050, 24_000), (48_000, 24_000), (24_000, 8_000)])
def test_resample_equals_scipy(rate, new):
    from scipy.signal import resample_poly

    rng = np.random.default_rng(0)
    times = np.arange(rate // 2) / rate
    low = min(rate, new) / 2
    tones = sum(np.sin(2 * np.pi * f * low * times + p) for f, p in zip(rng.uniform(0.02, 0.8, 12), rng.uniform(0, 6, 12)))
    ours = resample(torch.from_numpy(tones)[None], rate, new)[0].numpy()
    common = np.gcd(rate, new)
    theirs = resample_poly(tones, new // common, rate // common, window=("kaiser", 9.0))
    assert len(ours) == len(theirs)
    edge = new // 50
    difference = (ours - theirs)[edge:-edge]
    assert np.abs(difference).max() < 5e-3 * np.abs(theirs).max()


def test_resample_keeps_tones_in_place_and_removes_what_cannot_be_held():
    times = torch.arange(44_100, dtype=torch.float64) / 44_100
    kept = resample(torch.sin(2 * torch.pi * 1000 * times), 44_100, 24_000)
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(24_000, dtype=torch.float64) / 24_000)
    assert (kept - expected)[200:-200].abs().max() < 1e-3
    assert resample(torch.sin(2 * torch.pi * 15_000 * times), 44_100, 24_000)[200:-200].abs().max() < 1e-3
    assert resample(kept, 24_000, 24_000) is kept


def test_frames_of_a_stereo_recording(processor):
    audio = noise(2, 10 * FRAME)
    words = [("Hello", 0.16, 0.4, "SPEAKER_MAIN"), ["Tuesday", [0.41, 0.7], "SPEAKER_USER"], ["Tuesday", [0.5, 0.7], "SPEAKER_MAIN"]]
    features = processor(audio, RATE, words)
    assert features["input_ids"].shape == (1, 10)
    assert features["moshi_audio_codes"].shape == features["user_audio_codes"].shape == (1, 8, 10)
    with torch.no_grad():
        codes = processor.codec.encode(torch.from_numpy(audio)[:, None]).audio_codes[:, :8]
    assert torch.equal(features["moshi_audio_codes"][0], codes[0])
    assert torch.equal(features["user_audio_codes"][0], codes[1])
    assert torch.equal(features["text_labels"], features["input_ids"])
    assert torch.equal(features["audio_labels"], features["moshi_audio_codes"])
    assert "attention_mask" not in features
    assert processor.decode_text(features["input_ids"][0]) == "Hello Tuesday"
    assert processor.words(features["input_ids"][0]) == [("Hello", pytest.approx(0.16)), ("Tuesday", pytest.approx(0.48))]


def test_without_words_the_text_is_absent_and_with_none_spoken_it_is_padding(processor):
    audio = noise(2, 4 * FRAME)
    assert (processor(audio, RATE)["input_ids"] == -1).all()
    assert (processor(audio, RATE)["text_labels"] == -100).all()
    assert (processor(audio, RATE, [])["input_ids"] == 3).all()
    assert (processor(audio, RATE, [("Hi", 0.0, 0.1, "SPEAKER_USER"), ("  ", 0.1, 0.2, "SPEAKER_MAIN")])["input_ids"] == 3).all()
    assert (processor(audio, RATE, [("Hi", 0.1, 0.1, "SPEAKER_MAIN")])["input_ids"] == 3).all()  # no duration


def test_a_mono_recording_is_one_side_and_the_other_is_absent(processor):
    audio = noise(1, 5 * FRAME)
    moshi = processor(audio[0], RATE)
    user = processor(audio, RATE, mono_is="user")
    assert (moshi["user_audio_codes"] == -1).all()
    assert (user["moshi_audio_codes"] == -1).all()
    assert (user["audio_labels"] == -100).all()
    assert torch.equal(moshi["moshi_audio_codes"], user["user_audio_codes"])


def test_windows_of_a_recording(processor):
    audio = noise(2, 30 * FRAME)
    words = [("Hello", 0.1, 0.3, "SPEAKER_MAIN"), ("Tuesday", 1.0, 1.3, "SPEAKER_MAIN"), ("Tom", 2.2, 2.4, "SPEAKER_MAIN")]
    window = processor(audio, RATE, words, chunk_start=0.8, chunk_end=1.6)
    assert window["input_ids"].shape == (1, 10)
    assert processor.words(window["input_ids"][0]) == [("Tuesday", pytest.approx(0.16))]
    alone = processor(audio[:, 10 * FRAME : 20 * FRAME], RATE)
    assert torch.equal(window["moshi_audio_codes"], alone["moshi_audio_codes"])


def test_after_the_end_of_a_short_last_window_nothing_is_trained(processor):
    audio = noise(2, 25 * FRAME + 100)  # 26 frames, the last one begun
    words = [("Tom", 2.0, 2.1, "SPEAKER_MAIN")]
    window = processor(audio, RATE, words, chunk_start=1.6, chunk_end=2.4)
    assert window["input_ids"].shape == (1, 10)
    assert (window["input_ids"][0, :6] >= 0).all()
    for key in ("input_ids", "moshi_audio_codes", "user_audio_codes"):
        assert (window[key][..., 6:] == -1).all(), key
    for key in ("text_labels", "audio_labels"):
        assert (window[key][..., 6:] == -100).all(), key
    assert window["attention_mask"].tolist() == [[1] * 6 + [0] * 4]


def test_a_batch_equals_its_recordings_one_by_one(processor):
    recordings = [noise(2, 7 * FRAME, 1), noise(1, 4 * FRAME, 2), noise(2, 5 * FRAME + 7, 3)]
    spoken = [[("Hello", 0.1, 0.2, "SPEAKER_MAIN")], None, []]
    batch = processor(recordings, RATE, spoken)
    assert batch["attention_mask"].sum(1).tolist() == [7, 4, 6]
    for row, (audio, words) in enumerate(zip(recordings, spoken)):
        alone = processor(audio, RATE, words)
        T = alone["input_ids"].shape[1]
        for key in ("input_ids", "moshi_audio_codes", "user_audio_codes", "text_labels", "audio_labels"):
            assert torch.equal(batch[key][row, ..., :T], alone[key][0]), key
        assert (batch["input_ids"][row, T:] == -1).all()


def test_other_rates_give_nearly_the_codes_of_24_khz(processor):
    from scipy.signal import resample_poly

    smooth = resample_poly(noise(2, 8_000), 3, 1, axis=1).astype(np.float32)  # nothing above 4 kHz, 24 kHz
    there = resample_poly(smooth, 147, 80, axis=1).astype(np.float32)  # 44.1 kHz
    a, b = processor(smooth, RATE), processor(there, 44_100)
    assert a["input_ids"].shape == b["input_ids"].shape
    same = (a["moshi_audio_codes"] == b["moshi_audio_codes"]).float().mean((0, 2))
    assert same[0] > 0.7  # the first codebook; the last ones follow the smallest differences


def test_long_recordings_are_encoded_in_pieces_with_the_same_result(processor, monkeypatch):
    audio = torch.from_numpy(noise(2, 23 * FRAME))
    whole = processor.encode_audio(audio)
    monkeypatch.setattr(MoshiTTTProcessor, "LONGEST_PIECE", 4)
    assert torch.equal(processor.encode_audio(audio), whole)
    pieces = processor.decode_audio(whole)
    with torch.no_grad():
        expected = processor.codec.decode(whole).audio_values[:, 0]
    assert pieces.shape == (2, 23 * FRAME)
    assert (pieces - expected).abs().max() < 1e-5


# Saving and loading


def test_one_folder_holds_everything(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = MoshiTTTProcessor.from_pretrained(tmp_path)
    audio = noise(2, 6 * FRAME)
    words = [("Tuesday", 0.1, 0.3, "SPEAKER_MAIN")]
    ours, theirs = processor(audio, RATE, words), loaded(audio, RATE, words)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((tmp_path / "processor_config.json").read_text())["audio_tokenizer_folder"] == "audio_tokenizer"
    described = [{key: value for key, value in one.to_dict().items() if key != "auto_map"} for one in (processor, loaded)]
    assert described[0] == described[1]
    assert processor.audio_tokenizer is not None  # to_dict left it in place


def test_another_codec_can_be_given_at_loading(tmp_path):
    mimi().save_pretrained(tmp_path / "codec")
    by_object = MoshiTTTProcessor.from_pretrained(TINY, audio_tokenizer=mimi())
    by_name = MoshiTTTProcessor.from_pretrained(TINY, audio_tokenizer=str(tmp_path / "codec"))
    audio = noise(2, 3 * FRAME)
    assert torch.equal(by_object(audio, RATE)["moshi_audio_codes"], by_name(audio, RATE)["moshi_audio_codes"])


def test_a_processor_without_codec_still_reads_text(processor, tmp_path):
    bare = MoshiTTTProcessor(EncodecFeatureExtractor(), processor.tokenizer)
    bare.save_pretrained(tmp_path)
    loaded = MoshiTTTProcessor.from_pretrained(tmp_path)
    assert loaded.encode_word("Tuesday") == processor.encode_word("Tuesday")
    with pytest.raises(ValueError, match="no audio_tokenizer"):
        loaded.decode_audio(torch.zeros(1, 8, 2, dtype=torch.long))


def test_auto_processor_with_remote_code(processor, tmp_path):
    """The saved folder carries its code and loads without the package, in a fresh process."""
    import subprocess
    import sys

    processor.save_pretrained(tmp_path)
    assert (tmp_path / "mimi_stream.py").is_file()
    script = (
        "import sys; from transformers import AutoProcessor; import torch\n"
        f"p = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "assert 'modeling_moshi_ttt' not in sys.modules, 'the package was imported'\n"
        "print(type(p).__name__, tuple(p.decode_audio(torch.zeros(1, 8, 2, dtype=torch.long)).shape))"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "MoshiTTTProcessor (1, 3840)"


def test_auto_processor_with_the_package():
    import modeling_moshi_ttt  # noqa: F401  (registers with the Auto classes)

    assert type(AutoProcessor.from_pretrained(TINY)).__name__ == "MoshiTTTProcessor"


# Errors


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (None, "audio is missing"),
        (np.zeros((2, 0), np.float32), "audio is empty"),
        (np.array([[0.0, np.nan]], np.float32), "NaN or infinite"),
        (np.array([[0.0, np.inf]], np.float32), "NaN or infinite"),
        (np.zeros((3, 4000), np.float32), "3 channels"),
        (np.zeros((4000, 2), np.float32), "4000 channels"),
        (np.zeros((1, 2, 4000), np.float32), r"shape \(1, 2, 4000\)"),
        (np.zeros(4000, np.int16), "int16.*divide"),
        ("sound.wav", "audio is a str"),
        ([], "0 recordings"),
    ],
)
def test_bad_audio_is_named(processor, audio, message):
    with pytest.raises(ValueError, match=message):
        processor(audio, RATE)


@pytest.mark.parametrize("rate", [None, 0, -5, 22_050.5])
def test_bad_sampling_rates_are_named(processor, rate):
    with pytest.raises(ValueError, match="sampling_rate is"):
        processor(noise(1, FRAME), rate)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (("late", 2.0, 1.0, "SPEAKER_MAIN"), r"words\[0\].*ends at 1.0 s, before its start"),
        (("never", float("nan"), 1.0, "SPEAKER_MAIN"), r"words\[0\].*finite"),
        (("half", 1.0), r"words\[0\].*it must be"),
        ((5, 0.0, 1.0, "SPEAKER_MAIN"), "must be a string"),
        (("Stra\u00dfe", 0.0, 0.1, "SPEAKER_MAIN"), "'Stra\u00dfe'.*cannot encode"),
        (("<padding>", 0.0, 0.1, "SPEAKER_MAIN"), "special token"),
        (("a\ud83d", 0.0, 0.1, "SPEAKER_MAIN"), "half of a character"),
    ],
)
def test_bad_words_are_named(processor, word, message):
    with pytest.raises(ValueError, match=message):
        processor(noise(2, 5 * FRAME), RATE, [word])


def test_both_layouts_of_words_are_read():
    assert parse_word(0, ["a", [1, 2], "S"]) == parse_word(0, ("a", 1, 2, "S")) == ("a", 1.0, 2.0, "S")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mono_is": "left"}, "mono_is is 'left'"),
        ({"chunk_start": 9.0}, "chunk_start is 9.0"),
        ({"chunk_start": -1.0}, "chunk_start is -1.0"),
        ({"chunk_end": 0.0}, "chunk_end is 0.0"),
    ],
)
def test_bad_arguments_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(noise(2, 5 * FRAME), RATE, **arguments)


def test_unequal_lists_are_named(processor):
    with pytest.raises(ValueError, match="2 recordings and words 1 lists"):
        processor([noise(2, FRAME), noise(2, FRAME)], RATE, [[]])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 8, 2), -1), "codes hold -1"),
        (torch.full((1, 8, 2), 5000), "codes hold 5000"),
        (torch.zeros(1, 9, 2, dtype=torch.long), "up to 8 codebooks"),
        (torch.zeros(8, 2, dtype=torch.long), "they must be integers"),
        (torch.zeros(1, 8, 2), "they must be integers"),
        (torch.zeros(1, 8, 0, dtype=torch.long), "they must be integers"),
    ],
)
def test_bad_codes_are_named(processor, codes, message):
    with pytest.raises(ValueError, match=message):
        processor.decode_audio(codes)


def test_bad_frames_and_ids_are_named(processor):
    stream = processor.new_audio_stream(2)
    for frame, message in [
        (torch.zeros(2, 1919), r"shape \(2, 1919\)"),
        (torch.zeros(1, FRAME), r"must be \[2, 1920\]"),
        (torch.zeros(2, FRAME, dtype=torch.int16), "divide"),
        (torch.full((2, FRAME), torch.nan), "not finite"),
        (torch.tensor([[0.0], [300.0]]).expand(2, FRAME), r"row \[1\] is not finite or beyond ±10"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.encode(frame)
    with pytest.raises(ValueError, match="1 rows; the stream has 2"):
        stream.decode(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="one frame is"):
        stream.decode(torch.zeros(2, 8, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="`batch_size=0`"):
        processor.new_audio_stream(0)
    with pytest.raises(ValueError, match="ids hold 512"):
        processor.decode_text([512])
    with pytest.raises(ValueError, match="one row of token ids"):
        processor.words([[1, 2]])


def test_codec_and_processor_must_agree(processor):
    with pytest.raises(ValueError, match="num_codebooks is 9"):
        MoshiTTTProcessor(EncodecFeatureExtractor(), processor.tokenizer, processor.audio_tokenizer, num_codebooks=9)
    with pytest.raises(ValueError, match="24000 Hz, feature_extractor at 16000"):
        MoshiTTTProcessor(EncodecFeatureExtractor(sampling_rate=16_000), processor.tokenizer, processor.audio_tokenizer)


def test_every_word_of_the_dialogues_can_be_written_and_read(processor):
    for file in sorted((ROOT / "examples" / "data" / "dialogues" / "stereo").glob("*.json")):
        for text, _, _ in json.loads(file.read_text())["alignments"]:
            ids = processor.encode_word(text)
            assert ids
            assert processor.decode_text(ids) == text

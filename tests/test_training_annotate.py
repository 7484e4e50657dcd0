"""`moshi-ttt annotate` with transformers' own pipelines over tiny recognisers: Whisper's and CTC's ways to give the times of words."""

import json

import numpy as np
import pytest
import torch
from test_training_data import options
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from modeling_moshi_ttt.data import annotate
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.data.word_files import read_words

TASKS = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
SPECIAL = ["<|startoftranscript|>", "<|en|>", "<|fr|>", *TASKS]


def save_whisper(folder):
    """Whisper with one layer of random weights, which can say nothing but a, b, spaces and times."""
    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=letters | {"<|endoftext|>": len(letters)}, merges=[], additional_special_tokens=SPECIAL)
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", special=False) for i in range(1501)])
    number = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", *SPECIAL, "a", "b", "Ġ")}
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 64}
    ends = {name: number["<|endoftext|>"] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = WhisperConfig(
        vocab_size=len(tokenizer), decoder_start_token_id=number["<|startoftranscript|>"], begin_suppress_tokens=None,
        **sizes, **heads, **ends
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    said = {number["a"], number["b"], number["Ġ"], number["<|endoftext|>"], *range(number["<|notimestamps|>"] + 1, len(tokenizer))}
    generation = {
        "alignment_heads": [[0, 0], [0, 1]],
        "no_timestamps_token_id": number["<|notimestamps|>"],
        "prev_sot_token_id": number["<|startofprev|>"],
        "lang_to_id": {name: number[name] for name in ("<|en|>", "<|fr|>")},
        "task_to_id": {"transcribe": number["<|transcribe|>"], "translate": number["<|translate|>"]},
        "is_multilingual": True,
        "max_initial_timestamp_index": 50,
        "max_new_tokens": 12,
        "suppress_tokens": [i for i in range(len(tokenizer)) if i not in said],
        "_from_model_config": False,
    }
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    for part in (model, tokenizer, WhisperFeatureExtractor(feature_size=80)):
        part.save_pretrained(folder)


def save_ctc(folder):
    """Wav2Vec2 with random weights, which hears "a" wherever there is sound."""
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "a": 2, "<unk>": 3}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=4, pad_token_id=0, **sizes, **convolutions))
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.tensor([0.0, 0.0, 100.0, 0.0]))
    for part in (model, tokenizer, Wav2Vec2FeatureExtractor()):
        part.save_pretrained(folder)


def noise(path, seconds, channels=2):
    write_audio(path, 0.1 * np.random.default_rng(0).standard_normal((channels, round(24000 * seconds))), 24000)


@pytest.mark.parametrize("language", [None, "fr"])
def test_whisper_hears_words_with_times(tmp_path, capsys, language):
    save_whisper(tmp_path / "whisper")
    noise(tmp_path / "a.wav", 2.0)
    noise(tmp_path / "long.wav", 33.0, channels=1)  # longer than the recogniser's 30 s
    arguments = [str(tmp_path), "--model", str(tmp_path / "whisper"), *(["--language", language] if language else [])]
    assert annotate.run(options(annotate, *arguments)) == 0
    assert "2 files annotated" in capsys.readouterr().out
    for name, length, speakers in (("a", 2.0, {"SPEAKER_MAIN", "SPEAKER_USER"}), ("long", 33.0, {"SPEAKER_MAIN"})):
        words, _ = read_words(tmp_path / f"{name}.json")
        assert words
        assert {speaker for _, _, speaker in words} <= speakers
        assert all(0 <= start < end <= length and set(text) <= {"a", "b"} for text, (start, end), _ in words)
        assert list(words) == sorted(words, key=lambda word: word[1][0])


def test_ctc_hears_words_with_times(tmp_path):
    save_ctc(tmp_path / "ctc")
    noise(tmp_path / "a.wav", 1.0)
    assert annotate.run(options(annotate, str(tmp_path), "--model", str(tmp_path / "ctc"))) == 0
    words, _ = read_words(tmp_path / "a.json")
    assert [(text, speaker) for text, _, speaker in words] == [("a", "SPEAKER_MAIN"), ("a", "SPEAKER_USER")]
    for _, (start, end), _ in words:
        assert start < 0.05
        assert 0.9 < end <= 1.0
    prepared = json.loads((tmp_path / "a.json").read_text())
    assert set(prepared) == {"alignments"}


def test_a_language_for_a_recognizer_that_takes_none(tmp_path):
    save_ctc(tmp_path / "ctc")
    noise(tmp_path / "a.wav", 1.0)
    with pytest.raises(ValueError, match=r"--language"):
        annotate.run(options(annotate, str(tmp_path), "--model", str(tmp_path / "ctc"), "--language", "fr"))

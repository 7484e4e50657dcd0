"""The embedded codec: what its quality file claims, measured again on voices it never heard, and the script that trains it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_moshi_ttt.processing_moshi_ttt import MoshiTTTProcessor

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configuration" / "model" / "tiny"
STOI_FLOOR = 0.75


@pytest.fixture(scope="module")
def examples():
    """The modules beside the training script."""
    sys.path.insert(0, str(ROOT / "examples"))
    import codec_losses
    import synthetic_speech
    import train_tiny_codec

    yield codec_losses, synthetic_speech, train_tiny_codec
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def processor() -> MoshiTTTProcessor:
    return MoshiTTTProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def held_out(examples) -> list[torch.Tensor]:
    _, speech, _ = examples
    samples = speech.speech(speech.Espeak(), speech.HELD_OUT, 47, random.Random(7))  # other sentences than in the quality file
    return list(torch.from_numpy(samples[: len(samples) // 92_160 * 92_160]).split(92_160))


def test_codec_is_small_and_has_moshis_shape(processor):
    config = processor.codec.config
    assert (config.sampling_rate, config.frame_rate, config.num_quantizers) == (24_000, 12.5, 8)
    assert 64 <= config.codebook_size <= 256
    assert sum(parameter.numel() for parameter in processor.codec.parameters()) <= 3_000_000
    assert (TINY / "audio_tokenizer" / "model.safetensors").stat().st_size <= 8_000_000


def test_quality_on_held_out_voices(processor, examples, held_out):
    _, _, script = examples
    found = script.measure(processor.codec, held_out)
    assert min(found["codebook_usage"]) >= 0.5, found
    assert found["stoi"] >= STOI_FLOOR, found
    claimed = json.loads((TINY / "codec_quality.json").read_text())
    assert found["stoi"] == pytest.approx(claimed["held_out_voices"]["stoi"], abs=0.05)
    assert found["mel_distance"] == pytest.approx(claimed["held_out_voices"]["mel_distance"], abs=0.1)


def test_quality_on_held_out_dialogues(processor, examples):
    _, _, script = examples
    found = script.measure(processor.codec, [torch.from_numpy(channel) for channel in script.dialogue_channels("eval")])
    claimed = json.loads((TINY / "codec_quality.json").read_text())["held_out_dialogues"]
    assert found["stoi"] >= STOI_FLOOR
    assert found["stoi"] == pytest.approx(claimed["stoi"], abs=0.01)  # the same sound: the same numbers
    assert found["codebook_usage"] == pytest.approx(claimed["codebook_usage"], abs=0.03)


def test_codes_carry_the_speech(processor, examples, held_out):
    """Decoding a recording's own codes is far nearer to it than decoding another's."""
    losses, _, _ = examples
    own, other = held_out[0], held_out[1]
    codes = processor.encode_audio(torch.stack([own, other]))
    sound, elsewhere = processor.decode_audio(codes)
    assert losses.stoi(own, sound) > losses.stoi(own, elsewhere) + 0.3
    assert losses.mel_distance(own, sound) < 0.8 * losses.mel_distance(own, elsewhere)


def test_silence_stays_nearly_silent(processor):
    sound = processor.decode_audio(processor.encode_audio(torch.zeros(1, 24_000)))
    assert float(sound.pow(2).mean().sqrt()) < 0.01


def test_measures(examples):
    losses, _, _ = examples
    tone = torch.sin(torch.arange(48_000) * 0.1) * torch.rand(48_000).cumsum(0).sin().abs()
    assert losses.stoi(tone, tone) == pytest.approx(1.0, abs=1e-3)
    assert losses.mel_distance(tone, tone) == 0
    assert losses.mel_distance(tone, 0.5 * tone) == pytest.approx(np.log(2), abs=0.1)
    parts = losses.SpectralLoss()(tone[None], tone[None])
    assert all(float(part) < 1e-3 for part in parts.values())
    worse = losses.SpectralLoss()(0.1 * torch.randn(1, 48_000), tone[None])
    assert all(float(worse[name]) > float(parts[name]) + 0.01 for name in parts)


def test_codebooks_learn(examples):
    """k-means and moving averages bring the commitment loss down and every entry into use; the pass is straight-through."""
    _, _, script = examples
    torch.manual_seed(0)
    codec = script.MimiModel(script.codec_config())
    books = script.Codebooks(codec, torch.Generator().manual_seed(0))
    latents = torch.randn(16, 128, 100)
    books.fit(latents.transpose(1, 2).flatten(0, 1), rounds=5)
    first = books.through(latents, learn=False, dropout=0.0)[1].item()
    for _ in range(30):
        books.through(latents, learn=True, dropout=0.0)
    free = latents.clone().requires_grad_()
    output, commit = books.through(free, learn=False, dropout=0.0)
    assert commit.item() < first
    assert all(len(row.unique()) > 64 for row in codec.quantizer.encode(latents).flatten(1))
    assert (output - codec.quantizer.decode(codec.quantizer.encode(latents).transpose(0, 1))).abs().max() < 1e-3
    output.sum().backward()
    projections = sum(group.output_proj.weight[..., 0] @ group.input_proj.weight[..., 0] for group in books.groups)
    assert torch.allclose(free.grad[0, :, 0], projections.sum(0), atol=1e-4)


def test_the_script_trains_saves_goes_on_and_writes_a_processor(tmp_path):
    def run(steps: int) -> str:
        command = [sys.executable, "examples/train_tiny_codec.py", "--steps", str(steps), "--speech-seconds", "8"]
        command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out" / "tiny")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "stage 2 from step 2" in run(3)
    run(4)  # goes on at step 3
    quality = json.loads((tmp_path / "out" / "tiny" / "codec_quality.json").read_text())
    assert quality["steps"] == 4
    assert len(quality["held_out_voices"]["codebook_usage"]) == 8
    assert not list((tmp_path / "out" / "tiny").glob("*.py"))
    loaded = MoshiTTTProcessor.from_pretrained(tmp_path / "out" / "tiny")
    assert loaded.encode_audio(torch.zeros(1, 1920)).shape == (1, 8, 1)
    assert loaded.encode_word("Tuesday") == MoshiTTTProcessor.from_pretrained(TINY).encode_word("Tuesday")


def test_voices_and_dialogues_are_kept_apart(examples):
    _, speech, script = examples
    assert not set(speech.VOICES) & set(speech.HELD_OUT)
    train, held_out = script.dialogue_channels("train"), script.dialogue_channels("eval")
    assert len(train) == 16
    assert len(held_out) == 4


def test_one_seed_gives_one_sound():
    """In a fresh process each time, for espeak-ng keeps some state of a voice as long as the process lives."""
    script = (
        "import random, hashlib, synthetic_speech as s\n"
        "print(hashlib.sha256(s.speech(s.Espeak(), s.VOICES, 3, random.Random(0)).tobytes()).hexdigest())"
    )
    folder = ROOT / "examples"
    sounds = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=True) for _ in range(2)]
    assert sounds[0].stdout == sounds[1].stdout
    assert len(sounds[0].stdout.strip()) == 64

"""Kyutai's own client, `moshi.client` 0.2.13, headless: a wav in place of its microphone; its transcript and sound are `moshi-ttt respond`'s."""

import json
import subprocess

import numpy as np
import pytest
import soundfile
import sphn
import torch
from live_client import FRAME, RATE, noise, serving, without_a_clock
from tiny import speaking_model
from tree import ROOT

from modeling_moshi_ttt import MoshiTTTProcessor, MoshiTTTSession, cli, packaged
from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.live import server
from modeling_moshi_ttt.live.loading import load_model

PEER = ROOT / ".venv-peer" / "bin" / "python"
# The frames go out as fast as the client sends them; what comes in is written down. Its own code is untouched.
CLIENT = """
import asyncio, json, sys, threading, time, types
import numpy as np

class Stream:
    def __init__(self, samplerate, channels, blocksize, callback): self.callback, self.block = callback, blocksize
    def __enter__(self): self.thread = threading.Thread(target=self.run, daemon=True); self.thread.start()
    def __exit__(self, *_): pass

class InputStream(Stream):
    def run(self):
        sound = np.load(sys.argv[2])
        for start in range(0, len(sound), self.block):
            self.callback(sound[start : start + self.block, None], self.block, None, None)
            time.sleep(0.005)

class OutputStream(Stream):
    def run(self): pass

sys.modules["sounddevice"] = types.SimpleNamespace(InputStream=InputStream, OutputStream=OutputStream)
from moshi import client

heard, said, expected = [], [], int(sys.argv[4])
take = client.Connection._decode

async def decode(self, pcm):
    heard.append(pcm)
    await take(self, pcm)
    if sum(map(len, heard)) >= expected: raise EOFError("all of it is here")

client.Connection._decode = decode
printer = types.SimpleNamespace(log=lambda *_: None, print_header=lambda: None, print_pending=lambda: None, print_lag=lambda: None, print_token=said.append)
asyncio.run(client.run(printer, types.SimpleNamespace(url=sys.argv[1], https=False)))
np.save(sys.argv[3], np.concatenate(heard))
print(json.dumps("".join(said)))
"""
SECONDS = 60


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="benchmarks/install_peer.sh installs Kyutai's client into .venv-peer")
def test_kyutais_client_hears_what_respond_says(tmp_path, monkeypatch):
    without_a_clock(monkeypatch)
    for limit in ("AHEAD", "MESSAGES"):
        monkeypatch.setattr(server, limit, 1e9)  # it sends faster than sound passes
    speaking_model().save_pretrained(tmp_path / "model")
    MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny")).save_pretrained(tmp_path / "model")
    model, processor = load_model(str(tmp_path / "model"), None)  # weights elsewhere in memory round otherwise, and words part in the end
    frames = SECONDS * 25 // 2
    sound = np.concatenate(noise(frames + 2, 1))  # two more, since Opus keeps a part of a frame back at each end
    np.save(tmp_path / "in.npy", sound)
    soundfile.write(tmp_path / "in.wav", opus(sound)[: frames * FRAME], RATE, "FLOAT")  # what the server hears, to the bit
    with serving(model, processor, tmp_path / "kept", rows=1, sampling={"seeds": [7]}) as (_, port):
        done = subprocess.run(
            [PEER, "-c", CLIENT, f"ws://127.0.0.1:{port}", tmp_path / "in.npy", tmp_path / "out.npy", str((frames - 1) * FRAME)],
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr
    arguments = [tmp_path / "in.wav", tmp_path / "answer.wav", "--model", tmp_path / "model", "--seed", 7]
    assert cli.main(["respond", *map(str, arguments), "--transcript", str(tmp_path / "words.jsonl")]) == 0
    words = "".join(json.loads(line)["word"] for line in (tmp_path / "words.jsonl").read_text().splitlines())
    transcript = json.loads(done.stdout.splitlines()[-1]).replace(" ", "")
    assert len(words) > 100
    assert words.startswith(transcript)
    assert len(words) - len(transcript) < 20  # of the frames that Opus keeps back
    # Opus turns the rounding to 16 bits into other decisions: what respond writes is compared before it, what the client hears behind it.
    session, pieces = MoshiTTTSession(model, processor, seeds=[7]), torch.from_numpy(read_audio(tmp_path / "in.wav")).split(FRAME, 1)
    said = torch.cat([session.step(piece).pcm for piece in pieces], 1)[0].clamp(-1, 1).numpy()
    assert np.abs(read_audio(tmp_path / "answer.wav")[0] - said).max() < 1e-4
    heard = np.load(tmp_path / "out.npy")[: (frames - 2) * FRAME]
    assert len(heard) == (frames - 2) * FRAME
    assert np.abs(opus(said)[: len(heard)] - heard).max() < 1e-4


def opus(sound: np.ndarray) -> np.ndarray:
    """What is heard of a sound that went through Ogg Opus."""
    writer, reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    pages = (writer.append_pcm(sound[start : start + FRAME].astype(np.float32)) for start in range(0, len(sound), FRAME))
    return np.concatenate([reader.append_bytes(page) for page in pages if page])

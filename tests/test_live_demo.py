"""What `moshi-ttt serve --demo` offers: the packaged model hears the page's sounds over the line, remembers, and takes a correction."""

import io

import numpy as np
import pytest
import soundfile
from live_client import FRAME, call, serving, without_a_clock

from modeling_moshi_ttt.live.clips import demo_clips
from modeling_moshi_ttt.live.loading import load_model
from modeling_moshi_ttt.live.serve import DEMO, DEMO_SAMPLING


@pytest.fixture(scope="module")
def clips():
    """Samples [n] by name."""
    return {clip.name: soundfile.read(io.BytesIO(clip.wav), dtype="float32")[0] for clip in demo_clips()}


def test_it_says_the_name_it_was_told_and_after_a_correction_the_new_one(clips, tmp_path, monkeypatch):
    """Each asked for beyond the reach of attention."""
    without_a_clock(monkeypatch)
    monkeypatch.setattr("modeling_moshi_ttt.live.server.AHEAD", 1e9)  # sound may come as fast as it is heard
    monkeypatch.setattr("modeling_moshi_ttt.live.server.MESSAGES", 1e9)
    monkeypatch.setattr("modeling_moshi_ttt.live.server.OUTBOX", 10**6)
    model, processor = load_model(DEMO, None)
    pause = np.zeros(12 * FRAME, np.float32)
    said = np.concatenate([part for name in ["ana", "talk", "talk", "ask", "tom", "talk", "talk", "ask"] for part in (clips[name], pause)])
    reach = (model.config.num_hidden_layers * (model.config.sliding_window - 1) + 1) * FRAME
    assert 2 * len(clips["talk"]) > reach
    frames = list(said[: len(said) // FRAME * FRAME].reshape(-1, FRAME))
    with serving(model, processor, tmp_path / "kept", rows=1, name=DEMO, sampling=DEMO_SAMPLING) as (_, port):
        heard = call(port, frames, "format=pcm", expect=len(frames))
    assert heard.text.split() == ["Ana", "Tom"]

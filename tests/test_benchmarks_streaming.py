"""What the streaming benchmarks say of a frame whatever the machine: no read by the host, memory that does not grow, a saved hour that goes
on.
"""

import json
import sys
from pathlib import Path

import pytest
from test_live_session import FRAME, sound, talk
from tiny import speaking_model

from modeling_moshi_ttt import MoshiTTTProcessor, MoshiTTTSession, packaged

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import frame_cost
import one_hour


@pytest.mark.parametrize("ttt_layers", [[], frame_cost.TTT_LAYERS], ids=["without TTT", "TTT"])
def test_the_host_reads_nothing_in_a_frame(ttt_layers):
    for rows, counts in frame_cost.frame_operations(frame_cost.deep(ttt_layers)).items():
        assert counts["host_reads"] == 0, rows
        assert 1000 < counts["operations"] < 4500, rows


def test_a_caller_holds_keys_and_values_of_the_window_and_fast_weights():
    """At 7B: two halves of 4096 numbers of 2 bytes in 32 layers a frame, and nine TTT-MLP layers of float32 weights; so say the numbers
    that are committed.
    """
    committed = json.loads(Path(frame_cost.__file__).with_name("streaming.json").read_text())["bytes_a_caller"]
    plain, ttt = (frame_cost.bytes_a_caller(250, layers) for layers in ([], frame_cost.TTT_LAYERS))
    assert committed["without TTT"]["250"] == plain
    assert committed["TTT"]["250"] == ttt
    weights = 9 * 4 * (4096 * 4 * 128 * 2 + 4096 * 4 + 4096)
    assert weights <= ttt - plain <= 1.3 * weights  # and what the open mini-batch holds
    for window in frame_cost.WINDOWS:
        attention = 2 * 32 * 4096 * 2 * window
        assert attention <= committed["without TTT"][str(window)] <= attention + 10_000
        assert committed["TTT"][str(window)] - committed["without TTT"][str(window)] == ttt - plain


def test_a_session_holds_as_much_after_a_hundred_frames_as_after_twenty():
    session = MoshiTTTSession(speaking_model(), MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny")), seeds=[1])

    def held() -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in session.row_state(0).items() if name != "sound.tokens"}

    talk(session, sound(1, 20 * FRAME))
    before = held()
    talk(session, sound(1, 80 * FRAME, seed=2))
    assert held() == before


@pytest.mark.parametrize(
    ("frames", "saved_at"), [(24, 10), pytest.param(one_hour.HOUR, one_hour.SAVED_AT, marks=pytest.mark.slow, id="an hour")]
)
def test_a_saved_conversation_goes_on_equal_in_another_process_and_memory_is_flat(frames, saved_at):
    found = one_hour.measure(one_hour.tiny_session(), frames, saved_at)
    assert found["resumed_equal"]
    assert abs(found["memory_growth"]) < 0.02

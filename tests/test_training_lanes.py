"""Lanes: every frame exactly once, resets exactly where recordings change, the same on every rank, resumable anywhere."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_moshi_ttt.training.lanes import EMPTY, Lanes, ShuffledWindows, WeightedOrder

lengths_st = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def finite_lanes(lengths, rows, window, seed=0):
    return Lanes(lengths, WeightedOrder([len(lengths)], [1.0], seed, epochs=1), rows, window)


def turns(plan):
    while (windows := plan.turn()) is not None:
        yield windows


@settings(max_examples=60, deadline=None)
@given(lengths_st, st.integers(1, 5), st.integers(1, 15))
def test_every_frame_once_and_resets_where_recordings_change(lengths, rows, window):
    seen = set()
    before = [EMPTY] * rows
    for windows in turns(finite_lanes(lengths, rows, window)):
        for row, now in enumerate(windows):
            assert now.frames <= window
            follows = (
                not before[row].last and now.recording == before[row].recording and now.start == before[row].start + before[row].frames
            )
            assert now.reset == (not follows)
            assert now.last == (now is EMPTY or now.start + now.frames == lengths[now.recording])
            frames = {(now.recording, t) for t in range(now.start, now.start + now.frames)}
            assert not frames & seen
            seen |= frames
            before[row] = now
    assert seen == {(r, t) for r, length in enumerate(lengths) for t in range(length)}


@settings(max_examples=40, deadline=None)
@given(lengths_st, st.integers(1, 5), st.integers(1, 15), st.integers(0, 20), st.booleans())
def test_resumes_anywhere(lengths, rows, window, skip, lanes):
    def make():
        if lanes:
            return Lanes(lengths * 5, WeightedOrder([len(lengths), 4 * len(lengths)], [3.0, 1.0], 7), rows, window)
        return ShuffledWindows(lengths, [len(lengths)], [1.0], 7, rows, window)

    plan, other = make(), make()
    for _ in range(skip):
        plan.turn()
    other.load_state_dict(json.loads(json.dumps(plan.state_dict())))
    assert [plan.turn() for _ in range(12)] == [other.turn() for _ in range(12)]


def test_shuffled_windows_cover_an_epoch_and_change_order():
    plan = ShuffledWindows([10, 7, 3], [3], [1.0], 0, 1, 4)
    epochs = [[plan.turn()[0] for _ in range(6)] for _ in range(2)]
    for epoch in epochs:
        assert sum(window.frames for window in epoch) == 20
        assert len(set(epoch)) == 6
        assert all(window.reset and window.last for window in epoch)
    assert epochs[0] != epochs[1]


def test_weights_are_kept_exactly():
    order = WeightedOrder([3, 5], [3.0, 1.0], 0)
    drawn = [order.draw() for _ in range(40)]
    assert sum(item < 3 for item in drawn) == 30
    # within a source every item comes once before any comes again
    first = [item for item in drawn if item < 3]
    assert all(set(first[i : i + 3]) == {0, 1, 2} for i in range(0, 30, 3))


def test_fewer_recordings_than_lanes_is_refused():
    with pytest.raises(ValueError, match="2 recordings for 3 lanes.*carry: none"):
        Lanes([5, 5], WeightedOrder([2], [1.0], 0), 3, 4)


def test_wrong_settings_and_states_are_refused():
    with pytest.raises(ValueError, match="at least one recording"):
        WeightedOrder([0], [1.0], 0)
    with pytest.raises(ValueError, match="weight > 0"):
        WeightedOrder([1], [0.0], 0)
    plan = Lanes([5, 5, 5], WeightedOrder([3], [1.0], 0), 2, 4)
    state = plan.state_dict()
    with pytest.raises(ValueError, match="2 rows, 1 sources.*1 rows"):
        Lanes([5, 5, 5], WeightedOrder([3], [1.0], 0), 1, 4).load_state_dict(state)


@pytest.mark.parametrize(("lengths", "place"), [([9, 9], "frame 4 of recording 2"), ([9, 4, 9], "frame 4 of recording 1")])
def test_a_place_that_the_data_no_longer_have_is_refused(lengths, place):
    plan = Lanes([9, 9, 9], WeightedOrder([3], [1.0], None), 2, 4)
    state = plan.state_dict() | {"current": [1, 2], "start": [4, 4]}
    with pytest.raises(ValueError, match=rf"{place}, which these {len(lengths)} recordings .*data\.train .*new run_dir"):
        Lanes(lengths, WeightedOrder([len(lengths)], [1.0], None), 2, 4).load_state_dict(state)

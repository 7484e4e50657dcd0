"""From aligned frames to delayed steps: what is checked, what moves, and what is trained."""

import pytest
import torch
from tiny import cut, random_frames, tiny_config, with_labels

from modeling_moshi_ttt.frames_moshi_ttt import IGNORED, ZERO, align, check_tokens, delay_frames, initial_tokens, take_frames

CONFIG = tiny_config(audio_delays=[0, 2, 1, 1, 0, 3], num_user_codebooks=3)


def aligned(frames, **more):
    return align(CONFIG, *frames.values(), **more)


def test_before_the_first_frame_stand_the_initial_tokens():
    tokens = initial_tokens(CONFIG)
    assert tokens.shape == (7, 4)
    assert (tokens[0] == CONFIG.vocab_size).all()
    assert (tokens[1:] == CONFIG.audio_vocab_size).all()


def test_a_step_runs_on_what_came_before_it_and_gives_its_own_column():
    """Stream s of step t gives frame t - d and runs on frame t - 1 - d; before the first frame stands the initial token."""
    codes = torch.arange(20).expand(2, 7, 20)
    steps = delay_frames(CONFIG, aligned({"text": codes[:, 0], "own": codes[:, 1:4], "user": codes[:, 4:]}), None, None)
    for s, delay in enumerate(CONFIG.delays):
        initial = CONFIG.vocab_size if s == 0 else CONFIG.audio_vocab_size
        heard, given = ([t - d if t >= d else initial for t in range(20)] for d in (delay + 1, delay))
        assert steps.inputs[1, s].tolist() == heard
        if s < 4:
            assert steps.outputs[1, s].tolist() == given
    assert steps.outputs.shape[1] == 4
    assert steps.text_labels is None
    assert steps.audio_labels is None


def test_labels_are_delayed_and_those_of_padding_are_not_trained():
    frames = random_frames(CONFIG, rows=2, frames=9)
    labels = {"text_labels": torch.randint(0, 20, (2, 9)), "audio_labels": torch.randint(0, 20, (2, 3, 9))}
    mask = (torch.arange(9) < torch.tensor([[9], [5]])).long()
    steps = delay_frames(CONFIG, aligned(frames, **labels, attention_mask=mask), None, None)
    for row, length in enumerate((9, 5)):
        text, audio = labels["text_labels"][row].tolist(), labels["audio_labels"][row].tolist()
        assert steps.text_labels[row].tolist() == [*text[:length], *[IGNORED] * (9 - length)]
        for k, delay in enumerate(CONFIG.delays[1:4]):
            wanted = ([IGNORED] * delay + audio[k])[:length] + [IGNORED] * (9 - length)
            assert steps.audio_labels[row, k].tolist() == wanted
    unmasked = delay_frames(CONFIG, aligned(frames, **labels), None, None)
    assert torch.equal(unmasked.text_labels, labels["text_labels"])
    for name in labels:  # each may be there without the other
        alone = delay_frames(CONFIG, aligned(frames, **{name: labels[name]}, attention_mask=mask), None, None)
        assert torch.equal(getattr(alone, name), getattr(steps, name))
        assert [getattr(alone, other) for other in labels if other != name] == [None]


@pytest.mark.parametrize("split", [1, 2, 7])
def test_windows_with_their_history_are_the_whole(split):
    frames = with_labels(random_frames(CONFIG, rows=2, frames=11))
    whole = delay_frames(CONFIG, align(CONFIG, **frames), None, None)
    first, second = (align(CONFIG, **cut(frames, *ends)) for ends in ((0, split), (split, 11)))
    start = initial_tokens(CONFIG).expand(2, -1, -1)
    history = torch.cat([start, first.codes], dim=-1)[..., -start.shape[-1] :]
    labels = torch.cat([torch.full((2, 3, 3), IGNORED), first.audio_labels], dim=-1)[..., -3:]
    parts = delay_frames(CONFIG, first, None, None), delay_frames(CONFIG, second, history, labels)
    for name, tensor in whole._asdict().items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=-1), tensor), name


def test_frames_move_to_the_left_of_padding_with_all_that_belongs_to_them():
    frames = with_labels(random_frames(CONFIG, rows=3, frames=6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]])
    found = align(CONFIG, **frames, attention_mask=mask)
    assert found.mask.tolist() == [[t < n for t in range(6)] for n in (4, 3, 4)]
    places = [[2, 3, 4, 5], [0, 2, 5], [0, 1, 2, 3]]
    for row, kept in enumerate(places):
        assert found.order[row, : len(kept)].tolist() == kept
        assert torch.equal(found.codes[row, 0, : len(kept)], frames["input_ids"][row, kept])
        assert torch.equal(found.text_labels[row, : len(kept)], frames["text_labels"][row, kept])
        assert torch.equal(found.audio_labels[row, :, : len(kept)], frames["audio_labels"][row][:, kept])
    in_order = align(CONFIG, **frames, attention_mask=mask.sort(dim=1, descending=True).values)
    assert in_order.order is None
    assert torch.equal(in_order.codes, align(CONFIG, **frames).codes)
    back = take_frames(found.codes, found.order.argsort(dim=1), 2)
    assert torch.equal(back, align(CONFIG, **frames).codes)
    assert torch.equal(take_frames(found.codes[:, 0], found.order.argsort(dim=1), 1), frames["input_ids"])


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 1, 1], [1, 1, 0, 1] * 50])
def test_gaps_anywhere_close_and_the_order_stays(mask):
    mask = torch.tensor([mask])
    frames = random_frames(CONFIG, rows=1, frames=mask.shape[1])
    found = align(CONFIG, **frames, attention_mask=mask)
    assert torch.equal(found.codes[0, 0, : int(mask.sum())], frames["input_ids"][mask.bool()])
    assert torch.equal(found.order.argsort(dim=1).argsort(dim=1), found.order)
    assert (found.text_labels, found.audio_labels) == (None, None)


def test_absent_streams_are_zero_tokens():
    user = torch.randint(0, 20, (2, 3, 5))
    codes = align(CONFIG, None, None, user).codes
    assert (codes[:, :4] == ZERO).all()
    assert torch.equal(codes[:, 4:], user)
    text = torch.randint(0, 20, (2, 5))
    assert torch.equal(align(CONFIG, text, None, None).codes, align(CONFIG, text[:, None], None, None).codes)


def test_tokens_at_the_ends_of_their_range_pass_and_those_beyond_are_named():
    right = torch.tensor([[-1, 0, 19]])
    for dtype in (torch.int64, torch.int32):
        check_tokens("codes", right.to(dtype), (1, 3), ZERO, 20)
    check_tokens("codes", right[:, :0], (1, 0), ZERO, 20)
    for wrong, words in (
        (right - 1, "`codes` holds -2; it takes ids from 0 to 19, and -1 or above for none"),
        (right + 1, "`codes` holds 20; "),
        (right[0], r"`codes` has shape \(3,\); .* must be \(1, 3\)"),
        (right.double(), "`codes` has dtype torch.float64; token ids are int64"),
    ):
        with pytest.raises(ValueError, match=words):
            check_tokens("codes", wrong, (1, 3), ZERO, 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": None, "moshi_audio_codes": None, "user_audio_codes": None}, "nothing to hear: give at least one of `input_ids`"),
        (
            {name: torch.zeros(*shape, 0).long() for name, shape in (("input_ids", (2,)), ("moshi_audio_codes", (2, 3)))},
            "the batch is empty",
        ),
        ({"input_ids": torch.zeros(0, 6).long()}, r"the batch is empty \(shape \(0, 6\)\)"),
        ({"input_ids": torch.zeros(2, 5).long()}, "unequal lengths: {'input_ids': 5, 'moshi_audio_codes': 6, 'user_audio_codes': 6}"),
        ({"input_ids": torch.full((2, 6), 30)}, "`input_ids` holds 30; it takes ids from 0 to 29"),
        ({"moshi_audio_codes": torch.zeros(2, 2, 6).long()}, r"`moshi_audio_codes` has shape \(2, 2, 6\)"),
        ({"user_audio_codes": torch.full((2, 3, 6), -2)}, "`user_audio_codes` holds -2"),
        ({"text_labels": torch.full((2, 6), -101)}, "`text_labels` holds -101; .* and -100 or above for none"),
        ({"text_labels": torch.full((2, 6), 30)}, "`text_labels` holds 30"),
        ({"audio_labels": torch.full((2, 3, 6), 20)}, "`audio_labels` holds 20"),
        ({"audio_labels": torch.zeros(2, 6, 6).long()}, r"`audio_labels` has shape .* must be \(2, 3, 6\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` has shape \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        align(CONFIG, **(random_frames(CONFIG, rows=2, frames=6) | change))

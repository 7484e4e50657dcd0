"""The streams' memory: reordering, saving, moving, forgetting, and its refusals."""

import pytest
import torch
from tiny import cut, random_frames, rows_of, tiny_model, with_labels
from transformers import DynamicCache

from modeling_moshi_ttt import MoshiTTTCache


@pytest.fixture(scope="module")
def heard():
    """A model, a memory of three rows that have heard eleven frames, and the frames to come."""
    model = tiny_model()
    frames = random_frames(model.config, rows=3, frames=20)
    memory = model.new_cache(3)
    with torch.no_grad():
        model(**cut(frames, 0, 11), past_key_values=memory)
    return model, memory, cut(frames, 11, 20)


def copy_of(model, memory) -> MoshiTTTCache:
    copy = model.new_cache(memory.batch_size)
    copy.load_state_dict({name: tensor.clone() for name, tensor in memory.state_dict().items()})
    return copy


@torch.no_grad()
def go_on(model, memory, frames) -> torch.Tensor:
    return model(**frames, past_key_values=memory).audio_logits


def test_saved_and_loaded_it_goes_on_exactly(heard):
    model, memory, frames = heard
    assert torch.equal(go_on(model, copy_of(model, memory), frames), go_on(model, copy_of(model, memory), frames))
    other = go_on(model, model.new_cache(3), frames)
    assert not torch.allclose(go_on(model, copy_of(model, memory), frames), other)


@torch.no_grad()
def test_it_goes_in_by_either_name_and_by_one_at_a_time(heard):
    model, memory, frames = heard
    expected = go_on(model, copy_of(model, memory), frames)
    assert torch.equal(model(**frames, cache=copy_of(model, memory)).audio_logits, expected)
    both = copy_of(model, memory)
    assert torch.equal(model(**frames, cache=both, past_key_values=both).audio_logits, expected)
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        model(**frames, cache=copy_of(model, memory), past_key_values=copy_of(model, memory))


def test_rows_are_reordered_with_all_they_remember(heard):
    model, memory, frames = heard
    order = torch.tensor([2, 0, 0])
    expected = go_on(model, copy_of(model, memory), {n: t[[2, 0, 0]] for n, t in frames.items()})
    moved = copy_of(model, memory)
    moved.reorder_cache(order)
    rows = {n: t[order] for n, t in frames.items()}
    by_row = go_on(model, moved, rows)
    straight = go_on(model, copy_of(model, memory), frames)
    assert torch.allclose(by_row[1], straight[0], atol=1e-12)
    assert torch.allclose(by_row[0], straight[2], atol=1e-12)
    assert not torch.allclose(by_row, expected)
    two = copy_of(model, memory)
    two.batch_select_indices(torch.tensor([1, 2]))
    assert two.batch_size == 2
    assert torch.allclose(go_on(model, two, {n: t[1:] for n, t in frames.items()}), straight[1:], atol=1e-12)


def test_forgetting_attention_keeps_the_rest(heard):
    model, memory, frames = heard
    forgetful = copy_of(model, memory)
    forgetful.reset_attention()
    assert forgetful.layers[0].get_seq_length() == 0
    assert torch.equal(forgetful.ttt_state(0).W1, memory.ttt_state(0).W1)
    assert torch.equal(forgetful.frames, memory.frames)
    without = go_on(model, forgetful, frames)
    assert not torch.allclose(without, go_on(model, copy_of(model, memory), frames))
    assert not torch.allclose(without, go_on(model, model.new_cache(3), frames))


def labelled_losses(model, windows, memory) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**window, past_key_values=memory).audio_loss for window in windows]


def test_labels_of_delayed_codebooks_wait_for_their_step():
    """A window without labels trains nothing, however short it is, and takes nothing from those before it: their delayed codebooks come
    after.
    """
    model = tiny_model(audio_delays=[0, 3, 2, 0, 1, 1])
    frames = with_labels(random_frames(model.config, rows=2, frames=9))
    windows = [cut(frames, *ends) for ends in ((0, 5), (5, 6), (6, 9))]
    del windows[1]["audio_labels"]
    found = labelled_losses(model, [windows[0]], memory := model.new_cache(2))
    model(**windows[1], past_key_values=memory)
    found += labelled_losses(model, [windows[2]], memory)
    windows[1]["audio_labels"] = torch.full((2, 3, 1), -100)
    wanted = labelled_losses(model, windows, model.new_cache(2))
    assert torch.equal(torch.stack(found), torch.stack([wanted[0], wanted[2]]))


def test_after_padding_only_the_frames_that_count_are_history():
    model = tiny_model(audio_delays=[0, 3, 2, 0, 1, 1])
    frames = with_labels(random_frames(model.config, rows=2, frames=9))
    padded, rest = cut(frames, 0, 6), cut(frames, 4, 9)
    memory, plain = model.new_cache(2), model.new_cache(2)
    labelled_losses(model, [padded | {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)}], memory)
    found = labelled_losses(model, [rest], memory)
    wanted = labelled_losses(model, [cut(frames, 0, 4), rest], plain)
    assert torch.allclose(found[0], wanted[1], atol=1e-6, rtol=0)
    assert torch.equal(memory.codes, plain.codes)
    assert torch.equal(memory.labels, plain.labels)


def test_a_reset_row_has_no_labels_left_to_train():
    model = tiny_model(audio_delays=[0, 3, 2, 0, 1, 1])
    frames = with_labels(random_frames(model.config, rows=2, frames=5))
    memory = model.new_cache(2)
    labelled_losses(model, [frames], memory)
    memory.reset([1])
    anew, fresh = rows_of(frames, [1]), model.new_cache(1)
    both = {name: torch.cat([torch.full_like(tensor, -1), tensor]) for name, tensor in anew.items()}
    memory.labels[0] = -100  # the other row goes on, and is not to be trained here
    assert torch.allclose(*labelled_losses(model, [both], memory), *labelled_losses(model, [anew], fresh), atol=1e-6, rtol=0)


def test_resetting_every_row_is_a_new_memory(heard):
    model, memory, frames = heard
    fresh = go_on(model, model.new_cache(3), frames)
    for rows in (None, [0, 1, 2], torch.tensor([True, True, True])):
        emptied = copy_of(model, memory)
        emptied.reset(rows)
        assert torch.equal(go_on(model, emptied, frames), fresh)


def test_resets_before_the_next_frame_add_up(heard):
    """Two rows reset one after another start anew as two reset at once, the third goes on."""
    model, memory, frames = heard
    together, in_turn = copy_of(model, memory), copy_of(model, memory)
    together.reset([0, 2])
    for row in (0, 2):
        in_turn.reset([row])
    expected, found = go_on(model, together, frames), go_on(model, in_turn, frames)
    assert torch.equal(found, expected)
    fresh = go_on(model, model.new_cache(3), frames)
    assert torch.allclose(found[[0, 2]], fresh[[0, 2]], atol=1e-12)
    assert torch.allclose(found[1], go_on(model, copy_of(model, memory), frames)[1], atol=1e-12)


def test_it_keeps_a_window_and_no_more(heard):
    model, memory, frames = heard
    window = model.config.sliding_window
    assert [layer.get_seq_length() for layer in memory.layers] == [window - 1] * 2
    assert memory.get_seq_length() == 11
    cache = model.new_cache(1)
    for _ in range(30):
        with torch.no_grad():
            model(**random_frames(model.config, rows=1, frames=1), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == window
    with pytest.raises(NotImplementedError, match="forward"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)


def test_detach_and_to_keep_the_numbers(heard):
    model, memory, frames = heard
    attached = model.new_cache(3)
    model(**frames, past_key_values=attached)
    assert attached.ttt_state(0).W1.requires_grad
    before = {name: tensor.clone() for name, tensor in attached.state_dict().items()}
    assert attached.detach() is attached
    attached.to("cpu")
    assert not attached.ttt_state(0).W1.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in attached.state_dict().items())


def saved_by(model, rows: int = 2, frames: int = 11) -> dict[str, torch.Tensor]:
    memory = model.new_cache(rows)
    with torch.no_grad():
        model(**random_frames(model.config, rows, frames), past_key_values=memory)
    return memory.state_dict()


def refused(model, state: dict[str, torch.Tensor], words: str, rows: int = 2) -> None:
    """The state is refused with these words, and a memory that has heard something stays as it was."""
    memory = model.new_cache(rows)
    memory.load_state_dict(saved_by(model, rows, 3))
    before = memory.state_dict()
    with pytest.raises(ValueError, match=words):
        memory.load_state_dict(state)
    after = memory.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_of_other_ttt_layers_is_refused():
    """It would be taken with some of its memory gone."""
    some, all_three = (tiny_model(num_hidden_layers=3, ttt_layers=layers) for layers in ([0, 2], "all"))
    refused(all_three, saved_by(some), r"lacks layers\.1\.ttt\.W1, .*same model")
    refused(some, saved_by(all_three), r"unknown entries layers\.1\.ttt\.W1")
    refused(tiny_model(), saved_by(all_three), r"unknown entries layers\.2\.keys")
    refused(all_three, saved_by(tiny_model()), r"lacks layers\.2\.keys")
    refused(tiny_model(num_hidden_layers=3, ttt_layers=[]), saved_by(all_three), r"unknown entries layers\.0\.ttt")


def test_a_state_of_other_sizes_is_refused(heard):
    model, own = heard[0], saved_by(heard[0])
    refused(model, saved_by(tiny_model(ttt_mixer="linear")), r"lacks layers\.0\.ttt\.W2")
    refused(model, saved_by(tiny_model(ttt_num_heads=4)), r"layers\.0\.ttt\.W1 of the saved cache has shape \(2, 4, 8, 32\)")
    refused(model, saved_by(tiny_model(ttt_mini_batch_size=8)), r"layers\.0\.ttt\.k .*\(2, 8, 2, 16\) where \(2, 4, 2, 16\)")
    refused(model, saved_by(tiny_model(num_attention_heads=4)), r"layers\.0\.keys of the saved cache has shape \(2, 4, 7, 8\)")
    refused(model, saved_by(tiny_model(sliding_window=10)), "keeps 9 frames.*sliding_window=8")
    refused(model, saved_by(tiny_model(audio_delays=[0, 2, 2, 0, 1, 1])), "codes of the saved cache has shape")
    for name in ("layers.1.values", "layers.1.ttt.b1", "layers.1.ttt.frames", "fresh", "key_positions"):
        refused(model, own | {name: own[name][:1]}, rf"{name} of the saved cache has shape")
    refused(model, own | {"frames": own["frames"].double()}, "frames of the saved cache has dtype torch.float64 where torch.int64")


def test_a_state_that_is_not_whole_is_refused(heard):
    model, own = heard[0], saved_by(heard[0])
    for part in ("layers.1.values", "layers.1.keys", "layers.0.ttt.lr", "fresh"):
        refused(model, {name: tensor for name, tensor in own.items() if name != part}, f"lacks {part}")
    refused(model, {name: tensor for name, tensor in own.items() if ".ttt." not in name}, "lacks layers.0.ttt.W1, .* and 10 more")
    refused(model, {name: tensor for name, tensor in own.items() if "layers.1" not in name}, "lacks layers.1.keys")
    refused(model, own | {"layers.0.ttt.W9": own["frames"]}, "unknown entries layers.0.ttt.W9")


def test_memories_that_hold_less_are_loaded(heard):
    """Before the first frame, after every row was reset, and with the attention forgotten."""
    model, memory, frames = heard
    assert torch.equal(go_on(model, copy_of(model, model.new_cache(3)), frames), go_on(model, model.new_cache(3), frames))

    def row_by_row(cache):
        for row in range(3):
            cache.reset([row])

    for change in (MoshiTTTCache.reset_attention, MoshiTTTCache.reset, row_by_row):
        changed = copy_of(model, memory)
        change(changed)
        assert torch.equal(go_on(model, copy_of(model, changed), frames), go_on(model, changed, frames))


@pytest.mark.parametrize(
    ("saved", "into"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
def test_a_state_of_another_dtype_goes_on_in_the_models(saved, into):
    source, model = tiny_model(saved), tiny_model(into)
    memory = model.new_cache(2)
    memory.load_state_dict(saved_by(source))
    for step in range(2):
        frames = random_frames(model.config, 2, 1, seed=step)
        assert go_on(model, memory, frames).dtype == into
    assert {tensor.dtype for layer in memory.layers for tensor in layer.past} == {into}


@pytest.mark.parametrize(
    ("rows", "words"),
    [([3], "rows 0 to 2"), ([-1], r"\[-1\] are out of range"), ([True, False], "mask of shape .2"), ([0.5], "must be integers")],
)
def test_rows_that_do_not_exist_are_refused(heard, rows, words):
    model, memory, _ = heard
    with pytest.raises(ValueError, match=words):
        copy_of(model, memory).reset(rows)


def test_resetting_no_row_changes_nothing(heard):
    model, memory, _ = heard
    for rows in ([], torch.zeros(3, dtype=torch.bool), torch.zeros(0, dtype=torch.long)):
        same = copy_of(model, memory)
        same.reset(rows)
        assert same.state.reset_mask is None
        assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in memory.state_dict().items())


def test_rows_are_repeated_side_by_side(heard):
    model, memory, frames = heard
    straight = go_on(model, copy_of(model, memory), frames)
    twice = copy_of(model, memory)
    twice.batch_repeat_interleave(2)
    assert twice.batch_size == 6
    repeated = go_on(model, twice, {name: tensor.repeat_interleave(2, dim=0) for name, tensor in frames.items()})
    assert torch.allclose(repeated, straight.repeat_interleave(2, dim=0), atol=1e-12)
    with pytest.raises(ValueError, match="repeats=0"):
        twice.batch_repeat_interleave(0)
    with pytest.raises(NotImplementedError, match=r"crop\(2\).*fast weights cannot be cut back"):
        twice.crop(2)


def test_caches_of_other_kinds_are_refused_by_name(heard):
    model, _, frames = heard
    labelled = with_labels(frames)
    for wrong in (DynamicCache(), (), "memory"):
        with pytest.raises(TypeError, match=rf"`past_key_values` is a {type(wrong).__name__}.*model\.new_cache\(batch_size=3\)"):
            model(**frames, past_key_values=wrong)
        with pytest.raises(TypeError, match=type(wrong).__name__):
            model.loss_weights(labelled["text_labels"], labelled["audio_labels"], past_key_values=wrong)
    with pytest.raises(TypeError, match="DynamicCache"):
        model.decoder.model(torch.zeros(1, 1, 32, dtype=torch.float64), past_key_values=DynamicCache())


def test_a_wrong_num_items_in_batch_moves_no_memory(heard):
    model, memory, frames = heard
    kept = copy_of(model, memory)
    value = "`num_items_in_batch=.* must be finite and above 0 where anything is trained"
    wrongs = [(torch.ones(n), f"`num_items_in_batch` holds {n} numbers") for n in (0, 3)]
    wrongs += [
        (wrong, value)
        for wrong in (0, -2, float("nan"), float("inf"), torch.tensor(0), torch.tensor([0.0, 5.0]), torch.tensor([5.0, -1.0]))
    ]
    for wrong, words in wrongs:
        with pytest.raises(ValueError, match=words):
            model(**with_labels(frames), past_key_values=kept, num_items_in_batch=wrong)
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in memory.state_dict().items())


def test_refusals(heard):
    model, memory, _ = heard
    with pytest.raises(ValueError, match="batch_size=0"):
        model.new_cache(0)
    with pytest.raises(ValueError, match="Layer 7 has no TTT memory"):
        memory.ttt_state(7)
    with pytest.raises(ValueError, match="lacks codes, frames"):
        model.new_cache(3).load_state_dict({})
    with pytest.raises(ValueError, match="3 rows, this one 2"):
        model.new_cache(2).load_state_dict(memory.state_dict())

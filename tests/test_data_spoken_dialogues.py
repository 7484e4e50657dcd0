"""Dialogues that are made: what is held out stays out, codes and sound say the same, every question can be answered from what was told."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_phrases import make_phrasebook, tiny_processor

from modeling_moshi_ttt.data import facts
from modeling_moshi_ttt.data.espeak import Espeak
from modeling_moshi_ttt.data.facts import Fact, ScriptSettings
from modeling_moshi_ttt.data.spoken_dialogues import REPLY, TAIL, Script, phrasebook, speak
from modeling_moshi_ttt.training.run_config import load_run_config


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def book(processor):
    return make_phrasebook(processor)


def turns(seed, level=1.0, **changes):
    """The turns of a script, as if a turn took ten frames."""
    held = {name: changes.pop(name, False) for name in ("held_out", "new_ways")}
    found = []
    for turn in Script(ScriptSettings(**changes), random.Random(seed), level, **held).turns(lambda: 10 * len(found)):
        found.append(turn)
    return found


def test_what_is_held_out_is_never_trained():
    """Facts told together, sentences of talk, ways to say them, and voices: the two sides share nothing, and neither is empty."""
    seen = {side: (set(), set(), set()) for side in (False, True)}
    for side, (together, talk, openings) in seen.items():
        for seed in range(300):
            told = {}
            for turn in turns(seed, held_out=side, new_ways=side, corrections=0.5):
                if turn.role == "talk":
                    talk.add(turn.phrases)
                if turn.role == "ask":
                    openings.add(turn.phrases)
                    told[turn.fact.kind] = turn.fact
            together.add(frozenset(told.values()))
            assert facts.is_held_out(told) == side
    for trained, held_out in zip(*seen.values()):
        assert len(held_out) > 3
        assert not trained & held_out
    assert not set(facts.VOICES) & set(facts.HELD_OUT_VOICES)
    assert len(facts.talk(False)) >= 200


def test_a_question_asks_for_the_newest_value():
    for seed in range(200):
        newest, corrected = {}, 0
        for turn in turns(seed, corrections=1.0, facts=[1, 3], digits=[1, 4]):
            if turn.role in ("tell", "correct"):
                assert newest.get(turn.fact.kind) != turn.fact
                newest[turn.fact.kind] = turn.fact
                corrected += turn.role == "correct"
                assert turn.phrases[-1].endswith(turn.fact.value[-1])
            elif turn.by_moshi or turn.role == "ask":
                assert newest[turn.fact.kind] == turn.fact
        assert corrected
        assert 1 <= len(newest) <= 3


def test_the_level_sets_the_distance():
    """At 0 facts are asked at once and always repeated; at 1 after `distance`, corrected in some dialogues, repeated in some."""
    lengths = {level: np.mean([len(turns(seed, level, distance=[60, 90])) for seed in range(50)]) for level in (0.0, 0.5, 1.0)}
    assert lengths[0.0] + 1 < lengths[0.5] < lengths[1.0] - 1
    roles = {level: [Counter(turn.role for turn in turns(seed, level)) for seed in range(60)] for level in (0.0, 1.0)}
    assert all(count["echo"] == count["tell"] == count["ask"] for count in roles[0.0])
    assert not any(count["correct"] for count in roles[0.0])
    assert 10 < sum(bool(count["correct"]) for count in roles[1.0]) < 35
    assert 10 < sum(bool(count["echo"]) for count in roles[1.0]) < 50


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_some_questions_follow_at_once(level):
    """Talk is whole sentences: without a share of their own, dialogues hardly ever ask right after telling, and that is not learned."""

    def asked_at_once(settings):
        found = []
        for seed in range(200):
            script, said = Script(settings, random.Random(seed), level), [None]
            for turn in script.turns(lambda said=said: 25 * len(said)):
                if turn.role == "ask" and said[-1] != "answer":
                    found.append(said[-1] != "talk")
                said.append(turn.role)
        return np.mean(found)

    recipe = load_run_config("spoken_recall").dialogues
    assert asked_at_once(recipe) > 0.15
    assert asked_at_once(replace(recipe, at_once=0.0, start=[1, 8], distance=[1, 100], corrections=0.0)) == 0


@pytest.mark.parametrize(("level", "frames"), [(0.0, 100), (0.5, 130), (1.0, 160)])
def test_rows_are_full_of_dialogues(book, processor, level, frames):
    """Every stream as long as the level says; what is asked is marked, and its words are the answers."""
    for seed in range(30):
        settings = ScriptSettings(frames=[100, 160], facts=[1, 2], digits=[1, 2], lead=[0, 4], distance=[0, 12])
        one = book.stitch(settings, random.Random(seed), level)
        assert len(one.text) == frames
        assert one.user.shape == one.moshi.shape == (8, frames)
        assert one.asked.shape == one.text.shape
        words = [word for word, _ in processor.words(torch.where(one.asked, one.text, book.padding))]
        assert words
        assert all(word in facts.answers() for word in words[:-1])
        assert any(answer.startswith(words[-1]) for answer in facts.answers())  # the row may end in the midst of it
        begins = (one.asked & ~one.asked.roll(1)).nonzero()[:, 0]
        assert all(one.text[begin - 1] == book.end_of_padding for begin in begins)


def test_the_same_seed_is_the_same_dialogue(book):
    first, again, other = (book.stitch(ScriptSettings(), random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.user, again.user)
    assert torch.equal(first.text, again.text)
    assert not torch.equal(first.text[:50], other.text[:50]) or not torch.equal(first.user[:, :50], other.user[:, :50])


def test_spoken_dialogues_tell_before_they_ask(processor):
    espeak = Espeak()
    for seed in range(4):
        settings = ScriptSettings(lead=[0, 10], distance=[20, 30], corrections=float(seed % 2))
        spoken = speak(Script(settings, random.Random(seed), held_out=True), espeak, facts.HELD_OUT_VOICES[seed])
        assert spoken.samples.shape[0] == 2
        assert np.abs(spoken.samples).max() <= 1.0
        frames = processor.text_frames(spoken.words, math.ceil(spoken.samples.shape[1] / 1920))
        words = {round(start * 12.5): word for word, start in processor.words(torch.tensor(frames))}
        for question in spoken.questions:
            assert 0 < question.told < question.asked
            assert bool(question.before) <= bool(seed % 2)
            # as in stitched codes: the frames that the question takes, one after it, and the pause before a reply
            assert words[math.ceil(question.asked * 12.5 - 1e-6) + TAIL + REPLY] == question.fact.value[0]
            loud = spoken.samples[0, round(question.asked * 24000) + 3 * 1920 :][:4800]
            assert np.abs(loud).max() > 0.01


def test_a_phrasebook_is_encoded_once(tmp_path, processor, monkeypatch):
    """Phrases by two voices: kept on disk, read back the same, of frames that follow the length of the sound."""
    monkeypatch.setattr(facts, "talk", lambda held_out: ["the old man sang all night"])
    monkeypatch.setattr(facts, "phrases", lambda: ["my name is Nora", "hello", *facts.talk(False)])
    monkeypatch.setattr(facts, "answers", lambda: ["Nora"])
    settings = ScriptSettings(voices=2, renderings=2, sentences=1)
    made = phrasebook(settings, processor, tmp_path)
    read = phrasebook(settings, processor, tmp_path, progress=lambda pieces: pytest.fail("encoded again"))
    assert made.voices == read.voices == facts.VOICES[:2]
    for voice in made.voices:
        assert {phrase: len(clips) for phrase, clips in made.clips[voice].items()} == {
            "my name is Nora": 2,
            "hello": 2,
            facts.talk(False)[0]: 1,
        }
        assert made.clips[voice]["hello"][0].shape[1] < made.clips[voice]["my name is Nora"][0].shape[1]
        assert all(torch.equal(a, b) for phrase in made.clips[voice] for a, b in zip(made.clips[voice][phrase], read.clips[voice][phrase]))
    assert made.mark != phrasebook(ScriptSettings(voices=1, renderings=2, sentences=1), processor, tmp_path).mark


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["name", "color"]}, "kinds.*'color'"),
        ({"kinds": ["name"], "facts": [1, 2]}, "facts"),
        ({"distance": [9, 3]}, r"`distance=\[9, 3\]`"),
        ({"digits": [1, 5]}, "digits"),
        ({"voices": 99}, "voices"),
        ({"sentences": 999}, "sentences"),
        ({"frames": [90, 10]}, r"`frames=\[90, 10\]`"),
        ({"echo": 1.5}, "echo"),
    ],
)
def test_settings_that_make_no_dialogue_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ScriptSettings(**settings)


def test_numbers_have_their_digits():
    rng = random.Random(0)
    found = {len(facts.draw_fact("number", (1, 4), rng).value) for _ in range(100)}
    assert found == {1, 2, 3, 4}
    assert facts.telling(Fact("number", ("four", "two")), "no", False, rng)[-2:] == ("four", "two")

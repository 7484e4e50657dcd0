"""Made dialogues in the trainer: the level follows the accuracy, and an interrupted run goes on to the bit."""

import pytest
import torch
from accelerate import Accelerator
from made_phrases import make_phrasebook, tiny_processor
from training_runs import make_model, make_run

from modeling_moshi_ttt.data.facts import ScriptSettings
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.training.curriculum import Curriculum
from modeling_moshi_ttt.training.dialogues import DialoguePlan, DialogueReader
from modeling_moshi_ttt.training.noise import add_noise
from modeling_moshi_ttt.training.run_config import CurriculumSettings, load_run_config
from modeling_moshi_ttt.training.trainer import Trainer

SCRIPT = ScriptSettings(facts=[1, 1], lead=[0, 4], start=[0, 0], distance=[4, 8])


@pytest.fixture(scope="module")
def book():
    return make_phrasebook(tiny_processor())


class Killed(Exception):
    """In place of a process's end."""


def make_trainer(folder, book, curriculum=True, dies_at=None):
    settings = CurriculumSettings(threshold=0.0, steps=4) if curriculum else None
    rest = {"optim": {"steps": 3}, "checkpoint": {"every": 1}, "dialogues": SCRIPT, "curriculum": settings}
    run = make_run(folder, data={"train": "made"}, **rest)
    model = make_model(vocab_size=512, audio_vocab_size=128, num_codebooks=8)
    trainer = Trainer(run, model, book, None, Accelerator(cpu=True))
    step = trainer._step

    def dying(*args):
        if trainer.progress.step == dies_at:
            raise Killed
        return step(*args)

    trainer._step = dying
    return trainer


def test_the_level_rises_above_the_threshold_alone():
    curriculum = Curriculum(CurriculumSettings(threshold=0.8, steps=10))
    for _ in range(20):
        curriculum.update(0.8)
    assert curriculum.level == 0
    before = 0
    while curriculum.accuracy <= 0.8:
        curriculum.update(1.0)
        before += 1
    assert curriculum.level == pytest.approx(0.1)
    for _ in range(20):
        curriculum.update(1.0)
    assert curriculum.level == 1
    again = Curriculum(curriculum.settings)
    again.load_state_dict(curriculum.state_dict())
    assert (again.level, again.accuracy) == (curriculum.level, curriculum.accuracy)
    for _ in range(60):
        curriculum.update(0.0)
    assert curriculum.level == 1  # what was once learned is asked for on


def test_dialogues_follow_from_seed_number_and_level(book):
    reader = DialogueReader(book, SCRIPT, 0, [0] * 8)
    plan = DialoguePlan(3, None)
    first, second = plan.turn(), plan.turn()
    assert [draw.number for draw in first + second] == list(range(6))
    together = reader[first]
    for row, draw in enumerate(first):
        alone = reader[[draw]]
        length = alone.frames
        assert torch.equal(together.input_ids[row, :length], alone.input_ids[0])
        assert torch.equal(together.user_audio_codes[row, :, :length], alone.user_audio_codes[0])
        assert torch.equal(together.asked[row, :length], alone.asked[0])
        assert not together.asked[row, length:].any()
        assert bool(alone.asked.any())
    assert not torch.equal(reader[first[:1]].input_ids, DialogueReader(book, SCRIPT, 1, [0] * 8)[first[:1]].input_ids)


update = Curriculum.update


def test_a_run_with_a_curriculum_goes_on_to_the_bit(tmp_path, book, monkeypatch):
    # an untrained model answers nothing right: the accuracy of its answers is what the test says
    monkeypatch.setattr(Curriculum, "update", lambda self, accuracy: update(self, accuracy + 0.5))
    whole = make_trainer(tmp_path / "whole", book)
    whole.fit()
    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts", book, dies_at=2).fit()
    parts = make_trainer(tmp_path / "parts", book)
    parts.fit()
    assert parts.progress.curriculum == whole.progress.curriculum
    assert parts.curriculum.level == 0.75
    assert parts.plan.drawn == whole.plan.drawn == 6
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters()):
        assert torch.equal(one, other), name


def test_the_log_tells_accuracy_and_level(tmp_path, book):
    make_trainer(tmp_path / "a", book).fit()
    make_trainer(tmp_path / "b", book, curriculum=False).fit()
    with_level, without = ((tmp_path / name / "metrics.jsonl").read_text() for name in "ab")
    assert '"level"' in with_level
    assert '"answer_accuracy"' in with_level
    assert '"level"' not in without
    assert '"answer_accuracy"' in without


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train=other"], "data.train is 'other' and there are some dialogues settings; set data.train: made, or remove them"),
        (["dialogues=null", "curriculum=null"], "data.train is 'made' and there are no dialogues settings"),
        (["data.workers=2"], "data.workers=2 0"),
        (["data.carry=state"], "data.carry='state' must be none"),
        (["curriculum.steps=0"], "curriculum.steps"),
        (["dialogues.kinds=[name, hobby]", "dialogues.facts=[1, 2]"], "kinds holds 'hobby'"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        load_run_config("spoken_recall", settings)


def test_a_curriculum_needs_made_dialogues():
    with pytest.raises(ValueError, match="only made dialogues can grow"):
        load_run_config("demo", ["curriculum={steps: 3}"])


def test_noise_of_single_codes_leaves_most_of_a_frame(book):
    batch = DialogueReader(book, SCRIPT, 0, [0] * 8)[DialoguePlan(3, None).turn()]
    seeds = [(0, 1, row, 0) for row in range(3)]
    noisy, again = (add_noise(batch, DataSettings(train="made", user_code_noise=0.25), 128, seeds) for _ in range(2))
    there = batch.user_audio_codes >= 0
    changed = noisy.user_audio_codes != batch.user_audio_codes
    assert torch.equal(noisy.user_audio_codes, again.user_audio_codes)
    assert not changed[~there].any()
    assert 0.2 < changed[there].float().mean() < 0.3
    assert not changed.all(dim=1).any()
    assert torch.equal(noisy.moshi_audio_codes, batch.moshi_audio_codes)
    assert torch.equal(noisy.input_ids, batch.input_ids)
    assert torch.equal(noisy.asked, batch.asked)

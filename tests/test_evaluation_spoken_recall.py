"""Spoken recall: what is asked is judged as it was said, times and corrections are kept apart, and inputs that cannot be are named."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_phrases import tiny_processor
from matplotlib.figure import Figure
from tiny import tiny_model

from modeling_moshi_ttt.common.results import checked_part
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.data.espeak import Espeak
from modeling_moshi_ttt.data.facts import Fact
from modeling_moshi_ttt.data.spoken_dialogues import Question, speak
from modeling_moshi_ttt.evaluation import spoken_inputs, spoken_listening
from modeling_moshi_ttt.evaluation.memory_probe import probe, rates, steps
from modeling_moshi_ttt.evaluation.plots import draw
from modeling_moshi_ttt.evaluation.settings import EvaluateSettings
from modeling_moshi_ttt.evaluation.spoken_inputs import SpokenRecallSettings, batches, recordings
from modeling_moshi_ttt.evaluation.spoken_listening import Heard, answer_to, answers, under, within_reach
from modeling_moshi_ttt.evaluation.spoken_recall import TASK, cells, chance, measure, share_right
from modeling_moshi_ttt.evaluation.task import shapes


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def heard(name, processor, value, asked=4.0, before=(), frames=80):
    """A dialogue in which one fact is asked, its answer three frames after the question."""
    text = torch.full((frames,), 3)
    ids = [token for word in value for token in processor.encode_word(word)]
    text[round(asked * 12.5) + 3 :][: len(ids)] = torch.tensor(ids)
    codes = torch.zeros(8, frames, dtype=torch.long)
    return Heard(name, codes, codes, text, [Question(Fact("name", value), before, 1.0, asked)])


class Parrot(torch.nn.Module):
    """Says a given text stream whatever it hears."""

    def __init__(self, text):
        super().__init__()
        self.text, self.device = text, "cpu"
        self.config = SimpleNamespace(sliding_window=8, num_hidden_layers=2)

    def hear(self, user, do_sample):
        return self.text[None].expand(len(user), -1), None


def test_answers_are_right_old_or_wrong(processor):
    truth = heard("a", processor, ("Nora",), before=(("Omar",),))
    for said, right, old in ((("Nora",), True, False), (("Omar",), False, True), (("Lena",), False, False)):
        found = answers(Parrot(heard("b", processor, said).text), processor, [truth], "TTT", "free")
        assert [(one["right"], one["old"], one["corrected"], one["since"]) for one in found] == [(right, old, 1, 3.0)]


def test_an_answer_has_its_time_and_all_its_words(processor):
    value = ("four", "seven", "two")
    one = heard("a", processor, value)
    question = one.questions[0]
    assert answer_to(one.text, one.asked(question), question, processor) == value
    late = one.text.roll(30)  # out of the frames in which an answer counts
    assert answer_to(late, one.asked(question), question, processor) == ()
    early = one.text.roll(-10)  # before it was asked
    assert answer_to(early, one.asked(question), question, processor) == ()


def test_cells_keep_times_and_corrections_apart():
    found = [
        {"dialogue": f"d{i % 4}", "since": since, "corrected": corrected, "right": right, "old": not right}
        for i, (since, corrected, right) in enumerate(
            [(1, 0, True), (9, 0, True), (10, 0, False), (40, 0, False), (40, 1, True), (36, 2, True)]
        )
    ]
    assert [(cell["corrected"], cell["from"], cell["accuracy"], cell["questions"]) for cell in cells(found)] == [
        (False, 0, 1.0, 1),
        (False, 8, 0.5, 2),
        (False, 35, 0.0, 1),
        (True, 35, 1.0, 2),
    ]


def test_conditions_leave_the_model_as_it_was():
    model = tiny_model(torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with under(model, "gate 0"):
        assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("gating_alpha"))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_measure_tables_and_draws(processor):
    dialogues = [heard(str(i), processor, ("Nora",)) for i in range(3)] + [heard("c", processor, ("Lena",), before=(("Nora",),))]
    parrot = Parrot(dialogues[0].text)
    parrot.named_parameters = lambda: iter(())
    part = measure({"": (parrot, ["TTT", "gate 0"]), "beside": (parrot, ["TTT"])}, processor, [dialogues], ["free"])
    assert list(part["runs"]) == ["TTT", "gate 0", "beside"]
    part = checked_part(json.loads(json.dumps(part)), shapes(), Path("results.json"))
    table = TASK.table(part)
    assert table.rows[0][:3] == ["TTT", "100 (100 to 100)", "0 (0 to 0)"]
    assert table.head[:3] == ["", "told, from 0 s", "corrected, from 0 s"]
    assert isinstance(draw(part), Figure)
    assert "TTT 100%" in TASK.finding(part)
    numbers = {one.name: (one.mean, one.values) for one in TASK.measures(part)}
    assert numbers["told once, TTT, 1"] == (100.0, dict.fromkeys("012", 100.0))


def asked(name, processor, told, since, facts=1, corrected=0, right=True):
    question = Question(Fact("name", ("Nora",)), (("Omar",),) * corrected, told, told + since)
    one = heard(name, processor, ("Nora",) if right else ("Lena",), asked=told + since, frames=round((told + since + 4) * 12.5))
    more = [Question(Fact(kind, ("Nora",)), (), told, told + since) for kind in ("place", "like")[: facts - 1]]
    return Heard(name, one.user, one.moshi, one.text, [question, *more])


class Knowing(Parrot):
    """Says the text of whichever dialogue it hears, told by its length."""

    def __init__(self, dialogues):
        super().__init__(dialogues[0].text)
        self.texts = {len(one.text): one.text for one in dialogues}

    def hear(self, user, do_sample):
        return self.texts[user.shape[-1]][None].expand(len(user), -1), None


def test_every_axis_of_the_hour_has_its_cells(processor):
    """Time since told, age of the conversation when told, number of facts, corrections, seeds; told-at × asked-at."""
    dialogues = [
        asked("a", processor, 1, 9), asked("b", processor, 40, 10), asked("c", processor, 130, 40, right=False),
        asked("d", processor, 1, 60, facts=2), asked("e", processor, 2, 130, corrected=1),
    ]  # fmt: skip
    part = measure({"": (Knowing(dialogues), ["TTT"])}, processor, [[one] for one in dialogues], ["free"])
    run = part["runs"]["TTT"]
    assert [(c["corrected"], c["from"], c["accuracy"]) for c in run["cells"]] == [(False, 8, 1.0), (False, 35, 2 / 3), (True, 120, 1.0)]
    by = {axis: [(cell["value"], cell["questions"]) for cell in rows] for axis, rows in run["by"].items()}
    assert by == {"facts": [(1, 4), (2, 2)], "corrections": [(0, 5), (1, 1)], "told from s": [(0, 4), (35, 1), (120, 1)], "seed": [(0, 6)]}
    grid = {(cell["told"], cell["asked"]): cell["accuracy"] for cell in run["grid"]}
    assert grid == {(0, 8): 1.0, (0, 35): 1.0, (0, 120): 1.0, (35, 35): 1.0, (120, 120): 0.0}
    assert part["hours"] == pytest.approx(sum(len(one.text) for one in dialogues) / 12.5 / 3600)
    figure = draw(part)
    assert {f"told from {time}" for time in ("0 s", "35 s", "2 min")} <= {
        text.get_text() for axes in figure.axes for text in axes.get_yticklabels()
    }


def test_the_window_alone_hears_no_more_than_its_reach(processor):
    one = asked("a", processor, 4, 20)
    (part,) = within_reach(one, 31)
    assert part.start + 31 == one.asked(one.questions[0])
    assert part.asked(one.questions[0]) == 31
    assert part.text.shape[-1] == part.user.shape[-1] == 31 + 8 + 8
    assert torch.equal(part.text, one.text[part.start :][: len(part.text)])
    (short,) = within_reach(one, 10_000)
    assert (short.start, len(short.text)) == (0, len(one.text))


def test_full_attention_is_of_all_that_came_before():
    model = tiny_model(torch.float32)
    frames = torch.randint(4, 20, (1, model.config.num_user_codebooks, 4 * model.config.sliding_window))
    other = frames.clone()
    other[..., 0] = 3
    with under(model, "gate 0"):
        heard_of = [model(user_audio_codes=one).logits[0, -1] for one in (frames, other)]
        with under(model, "full attention"):
            heard_full = [model(user_audio_codes=one).logits[0, -1] for one in (frames, other)]
    assert not torch.equal(*heard_full)
    reach = model.config.num_hidden_layers * (model.config.sliding_window - 1) + 1
    assert torch.equal(*heard_of) == (reach < 4 * model.config.sliding_window)
    assert model.config.sliding_window is not None


@pytest.mark.parametrize(
    ("config", "conditions", "named"),
    [
        ({"ttt_layers": []}, ["TTT", "frozen at W0"], "frozen at W0"),
        ({"ttt_layers": []}, ["TTT", "gate 0"], "gate 0"),
        ({"ttt_layers": [0], "sliding_window": None}, ["TTT", "window only"], "window only"),
        ({"ttt_layers": [0], "sliding_window": None}, ["TTT", "full attention"], "full attention"),
    ],
)
def test_conditions_that_a_model_cannot_have_are_named(config, conditions, named):
    subject = SimpleNamespace(config=config, ttt=config)
    with pytest.raises(ValueError, match=rf"spoken_recall\.conditions=.*'{named}'.*conditions=\[TTT\]"):
        TASK.check(SpokenRecallSettings(conditions=conditions), subject)
    TASK.check(SpokenRecallSettings(conditions=["TTT"]), subject)


def test_the_memory_is_seen_at_work():
    """Drift and steps are those of the states, the gate that of the op; frozen weights neither drift nor write."""
    model = tiny_model(torch.float64)
    config, size = model.config, model.config.ttt_mini_batch_size
    frames = 6 * size + 1
    draw_codes = lambda count: torch.randint(0, config.audio_vocab_size, (count, frames), generator=torch.Generator().manual_seed(0))  # noqa: E731
    question = Question(Fact("name", ("Nora",)), (), 2 * size / 12.5 - 0.01, (frames - 1) / 12.5)
    one = Heard("a", draw_codes(config.num_user_codebooks), draw_codes(config.num_codebooks), torch.full((frames,), 3), [question])
    found = steps(model, one)
    assert len(found["drift"]) == 6
    assert found["drift"][0] == pytest.approx(found["step"][0])
    assert (found["drift"] <= found["step"].cumsum() + 1e-12).all()
    assert (found["step"] > 0).all()
    assert found["fact"].any()
    assert not found["fact"][2:].any()
    part = probe(model, [one])
    assert part["minutes"][-1] == pytest.approx(6 * size / 12.5 / 60)
    assert 0 < part["gate_facts"] < 1
    assert part["false_writes"] >= 0
    with under(model, "frozen at W0"):
        frozen = probe(model, [one])
    assert max(frozen["drift"]) == max(frozen["step"]) == frozen["gate_talk"] == 0
    with rates(model) as given:
        model(user_audio_codes=one.user[None])
    assert given[0].shape == (1, frames, config.ttt_num_heads)


def write_manifest(folder, questions, seconds=6.0):
    write_audio(folder / "a.wav", np.zeros((2, round(24000 * seconds)), np.float32), 24000)
    (folder / "a.json").write_text(json.dumps({"alignments": [], **({} if questions is None else {"questions": questions})}))
    (folder / "data.jsonl").write_text(json.dumps({"path": "a.wav", "duration": seconds}) + "\n")
    return SpokenRecallSettings(manifest=folder / "data.jsonl")


GOOD = {"kind": "name", "value": ["Nora"], "told": 1.0, "asked": 4.0}


def test_a_manifest_with_questions_is_read(tmp_path):
    ((_, questions),) = recordings(write_manifest(tmp_path, [GOOD, {**GOOD, "before": [["Omar"]], "asked": 5}]))
    assert [question.before for question in questions] == [(), (("Omar",),)]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (None, 'no recording has "questions"'),
        ([], 'no recording has "questions"'),
        ([{**GOOD, "asked": 0.5}], r"questions\.0\.told=1`.*questions\.0\.asked=0\.5"),
        ([{**GOOD, "asked": 60.0}], r"questions\.0\.asked=60"),
        ([{**GOOD, "asked": 6.0}], r"questions\.0\.asked=6`"),
        ([GOOD, {**GOOD, "told": -1.0}], r"questions\.1\.told=-1"),
        ([{**GOOD, "told": math.nan}], r"questions\.0\.told=nan"),
        ([GOOD, {"kind": "name"}], r"questions\.1\.value` is missing"),
        ([GOOD, {**GOOD, "value": []}], r"questions\.1\.value"),
        ([GOOD, {**GOOD, "value": "Nora"}], r"questions\.1\.value=Nora"),
        ([GOOD, "Nora"], r"questions\.1=Nora"),
        ("Nora", r"questions=Nora"),
    ],
)
def test_manifests_that_ask_nothing_or_the_impossible_are_named(tmp_path, questions, message):
    with pytest.raises(ValueError, match=message):
        recordings(write_manifest(tmp_path, questions))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditions": ["attention"]}, "`conditions.*'attention'"),
        ({"modes": ["live"]}, "`modes.*'live'"),
        ({"seeds": [1, 1]}, "`seeds.* 1 twice"),
        ({"memory": -1}, "memory"),
        ({"kinds": ["hobby"], "facts": [1, 1]}, "kinds.*'hobby'"),
        ({"beside": {"TTT": "folder"}}, "`beside.TTT`"),
        ({"seconds": [-1.0]}, "seconds"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluateSettings(model="tiny", spoken_recall=SpokenRecallSettings(**settings))


def made(settings, processor, seed):
    return [one for make in batches(settings, processor, seed, 2) for one in make()]


def test_made_dialogues_are_those_of_the_seed(processor):
    settings = SpokenRecallSettings(dialogues=1, seconds=[1.0], corrected=True, kinds=["name"], facts=[1, 1])
    first, again, other = (made(settings, processor, seed) for seed in (0, 0, 1))
    assert [bool(question.before) for one in first for question in one.questions if question is one.questions[-1]] == [False, True]
    # of the voices a second instance of espeak-ng may give other samples, of the same number
    assert all(torch.equal(a.text, b.text) and a.questions == b.questions for a, b in zip(first, again))
    assert [one.questions for one in first] != [one.questions for one in other]
    settings.seeds = [0, 1]
    both = made(settings, processor, 5)
    assert [one.seed for one in both] == [0, 1, 0, 1]
    assert len({one.name for one in both}) == 4


def test_sound_that_is_encoded_as_it_is_made_has_the_codes_of_the_whole(processor):
    """An hour is never there as sound: pieces of any length give what the whole gives."""
    settings = SpokenRecallSettings(dialogues=1, seconds=[12.0], corrected=False, kinds=["name"], facts=[1, 1])
    ((name, _, script, voice),) = spoken_inputs._scripts(settings, [0])
    sound, lengths = spoken_inputs._Encoded(processor), []

    def take(samples):
        lengths.append(samples.shape[1])
        pieces.append(samples)
        sound.take(samples)

    pieces = []
    assert speak(script, Espeak(), voice, take).samples.shape == (2, 0)
    whole = np.concatenate(pieces, axis=1)
    assert max(lengths) < 4 * 24000 < whole.shape[1]
    again = spoken_inputs._Encoded(processor)
    again.take(whole)
    assert torch.equal(sound.codes(), again.codes())


def test_dialogues_are_made_a_few_at_a_time_from_the_shortest_on(processor):
    settings = SpokenRecallSettings(dialogues=2, seconds=[6.0, 1.0], told_after=[3.0, 0.0], corrected=False, kinds=["name"], facts=[1, 1])
    makers = batches(settings, processor, 0, 2)
    lengths = [[one.user.shape[1] for one in make()] for make in makers]
    assert [len(one) for one in lengths] == [2, 2, 2, 2]
    assert [min(one) for one in lengths] == sorted(min(one) for one in lengths)


def test_chance_is_that_of_the_kinds_and_digits():
    assert chance(SpokenRecallSettings(kinds=["name"], facts=[1, 1])) == pytest.approx(1 / 9)
    assert chance(SpokenRecallSettings(kinds=["number"], facts=[1, 1], digits=[1, 2])) == pytest.approx((0.1 + 0.01) / 2)


def test_the_memory_of_dialogues_with_corrections_alone_is_refused_before_anything_runs(tmp_path):
    section = write_manifest(tmp_path, [{**GOOD, "before": [["Omar"]]}])
    section.memory = 1
    with pytest.raises(ValueError, match="memory=1"):
        TASK.inputs(section)


def test_full_attention_takes_as_many_dialogues_at_once_as_fit(processor, monkeypatch):
    dialogues = [heard(name, processor, ("Nora",)) for name in "abc"]
    rows = []

    class Counting(Parrot):
        def hear(self, user, do_sample):
            rows.append(len(user))
            return super().hear(user, do_sample)

    monkeypatch.setattr(spoken_listening, "FULL_FRAMES", 2 * 80 + 1)
    model = Counting(dialogues[0].text)
    for condition in ("TTT", "full attention"):
        assert [one["dialogue"] for one in answers(model, processor, dialogues, condition, "free")] == ["a", "b", "c"]
    assert rows == [3, 2, 1]


def test_the_interval_is_of_the_share_that_is_shown():
    """Dialogues with many questions weigh as much in the interval as in the share."""
    many = [{"dialogue": f"many {i}", "right": True, "old": False} for i in range(12) for _ in range(9)]
    one = [{"dialogue": f"one {i}", "right": False, "old": False} for i in range(12)]
    shown = share_right(many + one, 0)
    assert shown["accuracy"] == pytest.approx(0.9)
    assert shown["interval"][0] < 0.9 < shown["interval"][1]

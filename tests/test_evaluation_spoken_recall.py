"""Spoken recall: what is asked is judged as it was said, times and corrections are kept apart, and inputs that cannot be are named."""

import json

import numpy as np
import pytest
import torch
from made_phrases import tiny_processor
from matplotlib.figure import Figure
from tiny import tiny_model

from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.data.facts import Fact
from modeling_moshi_ttt.data.spoken_dialogues import Question
from modeling_moshi_ttt.evaluation import spoken_recall
from modeling_moshi_ttt.evaluation.evaluate import EvaluateSettings, SpokenRecallSettings
from modeling_moshi_ttt.evaluation.plots import draw
from modeling_moshi_ttt.evaluation.spoken_recall import Heard, answer_to, answers, cells, measure, recordings, section, under


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

    def hear(self, user, do_sample):
        return self.text[None].expand(len(user), -1), None


def test_answers_are_right_old_or_wrong(processor):
    truth = heard("a", processor, ("Nora",), before=(("Omar",),))
    for said, right, old in ((("Nora",), True, False), (("Omar",), False, True), (("Lena",), False, False)):
        found = answers(Parrot(heard("b", processor, said).text), processor, [truth], "free", 4)
        assert [(one["right"], one["old"], one["corrected"], one["since"]) for one in found] == [(right, old, 1, 3.0)]


def test_an_answer_has_its_time_and_all_its_words(processor):
    value = ("four", "seven", "two")
    one = heard("a", processor, value)
    assert answer_to(one.text, one.questions[0], processor) == value
    late = one.text.roll(30)  # out of the frames in which an answer counts
    assert answer_to(late, one.questions[0], processor) == ()
    early = one.text.roll(-10)  # before it was asked
    assert answer_to(early, one.questions[0], processor) == ()


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
    part = measure({"": (parrot, ["TTT", "gate 0"]), "beside": (parrot, ["TTT"])}, processor, dialogues, ["free"])
    assert list(part["runs"]) == ["TTT", "gate 0", "beside"]
    table = section(json.loads(json.dumps(part)))
    assert table["rows"][0] == ["TTT", "100 (100 to 100)", "0 (0 to 0)"]
    assert table["head"] == ["", "told, from 0 s", "corrected, from 0 s"]
    assert isinstance(draw(part), Figure)


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
        ([{**GOOD, "asked": 0.5}], r"questions\[0\] is told at 1 s and asked at 0.5 s of 6 s; a fact must be told before it is asked"),
        ([{**GOOD, "asked": 60.0}], "both within the recording"),
        ([{**GOOD, "told": -1.0}], "both within the recording"),
        ([GOOD, {"kind": "name"}], r"questions\[1\] is .* it must hold"),
        ([GOOD, "Nora"], r"questions\[1\] is 'Nora'"),
    ],
)
def test_manifests_that_ask_nothing_or_the_impossible_are_named(tmp_path, questions, message):
    with pytest.raises(ValueError, match=message):
        recordings(write_manifest(tmp_path, questions))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditions": ["full attention"]}, "conditions holds 'full attention'; choose from TTT, frozen at W0, gate 0"),
        ({"modes": ["live"]}, "modes holds 'live'; choose from free, led"),
        ({"kinds": ["hobby"], "facts": [1, 1]}, "kinds holds 'hobby'"),
        ({"beside": {"TTT": "folder"}}, "beside holds 'TTT', the name of a condition"),
        ({"seconds": [-1.0]}, "seconds"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluateSettings(model="tiny", spoken_recall=SpokenRecallSettings(**settings))


def test_made_dialogues_are_those_of_the_seed(processor):
    settings = SpokenRecallSettings(dialogues=1, seconds=[1.0], corrected=True, kinds=["name"], facts=[1, 1])
    first, again, other = (spoken_recall.inputs(settings, processor, seed) for seed in (0, 0, 1))
    assert [bool(question.before) for one in first for question in one.questions if question is one.questions[-1]] == [False, True]
    # of the voices a second instance of espeak-ng may give other samples, of the same number
    assert all(torch.equal(a.text, b.text) and a.questions == b.questions for a, b in zip(first, again))
    assert [one.questions for one in first] != [one.questions for one in other]

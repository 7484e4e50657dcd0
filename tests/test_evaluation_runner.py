"""The evaluate command end to end on a tiny model: every section, resuming, and what it refuses."""

import json
import shutil
from pathlib import Path

import hub_checkpoints
import numpy as np
import pytest
import soundfile
import torch
import yaml
import zero_shot_folders as folders
from tiny import random_frames

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor, cli
from modeling_moshi_ttt.adapters.bases import write_base_config
from modeling_moshi_ttt.common.results import Part
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.evaluation import long_context, runner, scoring, zero_shot
from modeling_moshi_ttt.evaluation.recall import RecallSettings
from modeling_moshi_ttt.evaluation.settings import EvaluateSettings
from modeling_moshi_ttt.evaluation.task import tasks

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configuration" / "model"
STORY = {"task": "sstorycloze", "folder": "sSC"}
DIALOGUES = ROOT / "examples" / "data" / "dialogues"


def save_model(folder, seed=0):
    torch.manual_seed(seed)
    config = MoshiTTTConfig.from_pretrained(TINY / "tiny.json")
    MoshiTTTForConditionalGeneration(config).save_pretrained(folder)
    MoshiTTTProcessor.from_pretrained(TINY / "tiny").save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    save_model(root / "model")
    folders.make_swuggy(root / "sLM21")
    folders.make_sblimp(root / "sLM21")
    folders.make_storycloze(root / "sSC")
    folders.make_salmon(root / "salmon", ("gender_consistency",))
    book = root / "books" / "small" / "100" / "emma"
    book.mkdir(parents=True)
    for name, file in (("adapter", "adapter_config.json"), ("foreign", "config.json")):
        (root / name).mkdir()
        (root / name / file).write_text('{"model_type": "llama"}')
    shutil.copy(DIALOGUES / "stereo" / "zoe.flac", book / "emma_10.flac")
    shutil.copy(DIALOGUES / "stereo" / "paul.flac", book / "emma_2.flac")
    return root


def settings(root, output, **sections):
    return {"model": str(root / "model"), "output": str(output), **sections}


def everything(root):
    tasks = [
        {"task": "swuggy", "folder": str(root / "sLM21")},
        {"task": "sblimp", "folder": str(root / "sLM21")},
        {"task": "sstorycloze", "folder": str(root / "sSC")},
        {"task": "salmon", "folder": str(root / "salmon"), "parts": ["gender_consistency"]},
    ]
    return {
        "zero_shot": {"tasks": tasks, "submission": True},
        "long_context": {"folder": str(root / "books"), "max_frames": 150},
        "inner_loss": {"manifest": str(DIALOGUES / "eval.jsonl"), "max_recordings": 1, "max_frames": 100, "smooth": 2},
        "dialogue": {"manifest": str(DIALOGUES / "eval.jsonl"), "max_recordings": 1, "max_seconds": 4.0},
        "recall": {
            "output": str(root / "recall"), "pairs": [2], "distances": [24], "steps": 2, "batch_size": 4, "sequences": 8,
            "variants": [{"mixer": "none"}, {"mixer": "linear"}],
        },
    }  # fmt: skip


def nothing_runs(monkeypatch):
    """No evaluation can run, and no weights can be loaded."""
    monkeypatch.setattr(runner.Subject, "load", None)
    for one in tasks().values():
        monkeypatch.setattr(type(one), "run", None)


def write(path, data):
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_processor_with_other_padding_ids_than_the_model_is_refused(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_padding_ids": [5, 6]}))
    subject = runner.Subject(EvaluateSettings(model=str(tmp_path / "model"), recall=RecallSettings()))
    with pytest.raises(ValueError, match=r"model's `text_padding_ids=\[5, 6\]` differ from the processor's `text_padding_ids=\[3, 0\]`"):
        subject.load()


@pytest.fixture(scope="module")
def finished(place):
    output = place / "out"
    first = write(place / "all.yaml", settings(place, output, **everything(place)))
    assert cli.main(["evaluate", first]) == 0
    return output, first


def test_one_command_runs_every_section_and_leaves_the_report(finished):
    output, _ = finished
    results = json.loads((output / "results.json").read_text())
    assert list(results["tasks"]) == ["zero_shot", "long_context", "inner_loss", "dialogue", "recall"]
    zero = results["tasks"]["zero_shot"]["tasks"]
    assert {name: task["items"] for name, task in zero.items()} == {"swuggy": 5, "sblimp": 3, "sstorycloze": 2, "salmon": 2}
    assert set(zero["swuggy"]["variants"]) == {"weighted mean", "weighted sum", "unweighted mean", "unweighted sum"}
    books = results["tasks"]["long_context"]
    assert books["frames"] == {"small/100/emma": 150}
    assert set(books["streams"]) == {"semantic", "acoustic"}
    assert results["tasks"]["dialogue"]["model"]["words a minute"] is not None
    assert list(results["tasks"]["inner_loss"]["layers"]) == ["1", "2"]
    text = (output / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "TWIST-7B" in text
    assert len((output / "submission" / "lexical" / "dev.txt").read_text().splitlines()) == 20


def test_a_fresh_ttt_layer_gains_nothing(finished):
    output, _ = finished
    gains = json.loads((output / "results.json").read_text())["tasks"]["long_context"]["gains"]
    assert gains["gate 0"]["semantic"]["mean"] == 0.0  # wo starts at zero
    assert abs(gains["reset every window"]["semantic"]["mean"]) == 0.0


def test_a_second_run_computes_nothing(finished, monkeypatch):
    output, first = finished
    before = (output / "results.json").read_bytes()
    nothing_runs(monkeypatch)
    assert cli.main(["evaluate", first]) == 0
    assert (output / "results.json").read_bytes() == before


def test_another_model_in_the_same_folder_is_refused(finished, place, capsys):
    output, first = finished
    save_model(place / "other", seed=1)
    assert cli.main(["evaluate", first, f"model={place / 'other'}"]) == 2
    assert "holds results of another model" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(place, tmp_path, monkeypatch):
    task = {"zero_shot": {"tasks": [{"task": "swuggy", "folder": str(place / "sLM21")}]}}
    path = write(tmp_path / "zero.yaml", settings(place, tmp_path / "out", batch_size=4, **task))
    scored, real = [], scoring.SpeechScorer.score_waves

    def count(self, waves, stop):
        if stop and len(scored) >= 8:
            raise KeyboardInterrupt
        scored.extend(waves)
        return real(self, waves)

    monkeypatch.setattr(zero_shot, "SAVE_EVERY", 1)
    monkeypatch.setattr(scoring.SpeechScorer, "score_waves", lambda self, waves: count(self, waves, True))
    assert cli.main(["evaluate", path]) == 130
    assert not (tmp_path / "out" / "results.json").exists()
    scored.clear()
    monkeypatch.setattr(scoring.SpeechScorer, "score_waves", lambda self, waves: count(self, waves, False))
    assert cli.main(["evaluate", path]) == 0
    assert len(scored) == 12
    whole = tmp_path / "whole"
    assert cli.main(["evaluate", path, f"output={whole}"]) == 0
    both = [json.loads((folder / "results.json").read_text())["tasks"]["zero_shot"]["tasks"] for folder in (tmp_path / "out", whole)]
    assert both[0] == both[1]


def test_an_interrupted_long_context_measures_no_condition_twice(place, tmp_path, monkeypatch):
    part = {"long_context": {"manifest": manifest_of(tmp_path / "talk", 110), "max_frames": 150}}
    path = write(tmp_path / "a.yaml", settings(place, tmp_path / "out", **part))
    measured, real = [], long_context.stream_losses

    def stop_at_fourth(model, book, condition, *rest):
        measured.append(condition)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return real(model, book, condition, *rest)

    monkeypatch.setattr(long_context, "stream_losses", stop_at_fourth)
    assert cli.main(["evaluate", path]) == 130
    assert cli.main(["evaluate", path]) == 0
    conditions = list(long_context.CONDITIONS)
    assert measured == conditions[:4] + conditions[3:]
    assert list(section_of(tmp_path / "out", "long_context")["conditions"]) == conditions


def test_scores_of_other_streams_are_not_mixed_in(place, tmp_path, capsys):
    task = {"zero_shot": {"tasks": [{"task": "sstorycloze", "folder": str(place / "sSC")}]}}
    path = write(tmp_path / "zero.yaml", settings(place, tmp_path / "out", **task))
    assert cli.main(["evaluate", path]) == 0
    assert cli.main(["evaluate", path, "zero_shot.user=silence"]) == 2
    assert "of other streams" in capsys.readouterr().err


def section_of(output, name):
    return json.loads((output / "results.json").read_text())["tasks"][name]


def test_other_sounds_under_the_same_names_are_scored_anew(place, tmp_path, monkeypatch):
    """Swapping the sides of both stories turns the accuracy round; a new folder of the same content changes nothing."""
    story = shutil.copytree(place / "sSC", tmp_path / "story")
    task = {"zero_shot": {"tasks": [{"task": "sstorycloze", "folder": str(story)}]}}
    path, output = write(tmp_path / "zero.yaml", settings(place, tmp_path / "out", **task)), tmp_path / "out"
    assert cli.main(["evaluate", path]) == 0
    first = section_of(output, "zero_shot")
    scored, real = [], scoring.SpeechScorer.score_waves
    monkeypatch.setattr(scoring.SpeechScorer, "score_waves", lambda self, waves: scored.extend(waves) or real(self, waves))
    for sound in sorted(story.iterdir()):
        sound.touch()
    assert cli.main(["evaluate", path]) == 0
    assert (scored, section_of(output, "zero_shot")) == ([], first)
    for good, bad in (("10_aa-1_correct", "3_aa-1_incorrect"), ("2_bb-2_correct", "11_bb-2_incorrect")):
        kept = (story / f"{good}.wav").read_bytes()
        (story / f"{good}.wav").write_bytes((story / f"{bad}.wav").read_bytes())
        (story / f"{bad}.wav").write_bytes(kept)
    assert cli.main(["evaluate", path]) == 0
    assert len(scored) == 4
    accuracies = [part["tasks"]["sstorycloze"]["accuracy"] for part in (first, section_of(output, "zero_shot"))]
    assert sum(accuracies) == 1.0


def test_kept_scores_that_name_no_content_are_scored_anew(place, tmp_path, monkeypatch):
    task = {"zero_shot": {"tasks": [{"task": "sstorycloze", "folder": str(place / "sSC")}]}}
    path, cache = write(tmp_path / "zero.yaml", settings(place, tmp_path / "out", **task)), tmp_path / "out/scores/sstorycloze-dev.json"
    assert cli.main(["evaluate", path]) == 0
    whole = json.loads(cache.read_text())
    old = {name: [[0.0] * len(sums), tokens] for name, (sums, tokens, _) in whole["scores"].items()}
    cache.write_text(json.dumps(whole | {"scores": old}))
    (tmp_path / "out" / "results.json").unlink()
    assert cli.main(["evaluate", path]) == 0
    assert json.loads(cache.read_text()) == whole


def manifest_of(folder, sound):
    """A manifest of one recording, talk.wav, 12 s of `sound` Hz."""
    folder.mkdir(exist_ok=True)
    wave = 0.3 * np.sin(2 * np.pi * sound * np.arange(24000 * 12) / 24000)
    write_audio(folder / "talk.wav", np.stack([wave, wave]).astype(np.float32), 24000)
    (folder / "data.jsonl").write_text('{"path": "talk.wav", "duration": 12.0}\n')
    return str(folder / "data.jsonl")


def test_another_manifest_of_the_same_names_and_lengths_is_measured_itself(place, tmp_path):
    found = {}
    for name, sound, output in (("low", 110, "shared"), ("high", 1500, "shared"), ("high", 1500, "fresh")):
        part = {"long_context": {"manifest": manifest_of(tmp_path / name, sound), "max_frames": 150, "conditions": ["TTT", "gate 0"]}}
        assert cli.main(["evaluate", write(tmp_path / "a.yaml", settings(place, tmp_path / output, **part))]) == 0
        found[name, output] = section_of(tmp_path / output, "long_context")["conditions"]
    assert found["high", "shared"] == found["high", "fresh"]
    assert found["high", "shared"] != found["low", "shared"]


def stub(monkeypatch, name, ran):
    """In place of an evaluation, one that notes in `ran` that it ran."""
    kind = type(tasks()[name])
    monkeypatch.setattr(kind, "run", lambda *_: ran.append(name) or {"kind": name})
    monkeypatch.setattr(kind, "shape", Part)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)


@pytest.mark.parametrize("name", ["long_context", "inner_loss", "dialogue"])
def test_a_section_runs_anew_when_its_sounds_or_words_changed(place, tmp_path, monkeypatch, name):
    ran = []
    stub(monkeypatch, name, ran)
    folder = tmp_path / "data"
    path = write(tmp_path / "a.yaml", settings(place, tmp_path / "out", **{name: {"manifest": manifest_of(folder, 110)}}))
    for change, runs in (
        (lambda: None, 1),
        (lambda: None, 1),
        (lambda: manifest_of(folder, 220), 2),
        (lambda: (folder / "talk.json").write_text('{"alignments": [["hello", [0.5, 1.0], "SPEAKER_MAIN"]]}'), 3),
    ):
        change()
        assert cli.main(["evaluate", path]) == 0
        assert len(ran) == runs


def test_recall_runs_anew_with_another_seed(tmp_path, monkeypatch):
    ran = []
    stub(monkeypatch, "recall", ran)
    for seed in (0, 0, 1):
        assert cli.main(["evaluate", f"output={tmp_path / 'out'}", f"recall.output={tmp_path / 'recall'}", f"recall.seed={seed}"]) == 0
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_shot": {"tasks": [{"task": "swugy", "folder": "x"}]}}, "`zero_shot.tasks[0].task='swugy'` must be"),
        ({"zero_shots": {}}, "did you mean 'zero_shot'"),
        ({}, "no section is given"),
        ({"device": "foo", "recall": {}}, "device is 'foo', which cannot be used here"),
        ({"long_context": {"folder": "a", "manifest": "b"}}, "`long_context.folder=a` and `manifest=b`"),
        ({"long_context": {}}, "`long_context.folder=None`"),
        ({"long_context": {"folder": "a", "chunk": 0}}, "`long_context.chunk=0`"),
        ({"inner_loss": {"folder": "a", "max_frames": -1}}, "`inner_loss.max_frames=-1`"),
        ({"inner_loss": {"folder": "a", "smooth": 0}}, "`inner_loss.smooth=0`"),
        ({"dialogue": {"manifest": "a", "max_seconds": float("inf")}}, "`dialogue.max_seconds=inf`"),
        ({"dialogue": {"manifest": "a", "temperature": -1}}, "`dialogue.temperature=-1`"),
        ({"dialogue": {"manifest": str(DIALOGUES / "eval.jsonl"), "before": "adapter"}}, "dialogue.before: adapter is an adapter"),
        ({"recall": {}, "model": "adapter"}, "adapter is an adapter, no whole model; give model=BASE adapter=adapter"),
        ({"recall": {}, "model": "foreign"}, "foreign holds a model of type 'llama'"),
        ({"zero_shot": {"tasks": []}}, "`zero_shot.tasks=[]`"),
        ({"zero_shot": {"tasks": [STORY, STORY]}}, "`zero_shot.tasks=['sstorycloze', 'sstorycloze']`"),
        ({"zero_shot": {"tasks": [STORY | {"parts": ["x"]}]}}, "`zero_shot.tasks[0].parts[0]='x'`"),
        ({"zero_shot": {"tasks": [STORY | {"split": "test"}]}}, "`zero_shot.tasks[0].split=test`"),
        ({"zero_shot": {"tasks": [STORY], "semantic_weight": float("nan")}}, "`zero_shot.semantic_weight=nan`"),
        ({"zero_shot": {"tasks": [STORY], "semantic_weight": 0, "acoustic_weight": 0}}, "`zero_shot.semantic_weight=0` must not stand"),
        ({"long_context": {"folder": "books", "max_frames": 20}}, "no more than the attention window"),
        ({"long_context": {"folder": "books", "conditions": ["TTT", "gate"]}}, "`long_context.conditions[1]='gate'`"),
        ({"zero_shot": {"tasks": [{"task": "swuggy", "folder": "sSC"}]}}, "found no gold.csv"),
        ({"recall": {}, "model": "nobody"}, "no such folder"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(place, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(place)
    if "max_frames" not in change.get("long_context", {}):  # only its codes say how long a recording is
        nothing_runs(monkeypatch)
    path = write(tmp_path / "bad.yaml", settings(place, tmp_path / "out") | change)
    assert cli.main(["evaluate", path]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not any("Traceback" in line for line in error)


def test_a_mistake_in_the_last_part_comes_out_before_the_first_runs(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner.Subject, "load", None)
    tasks = [{"task": "sstorycloze", "folder": str(place / "sSC")}, {"task": "swuggy", "folder": str(tmp_path)}]
    for change, message in (
        ({"zero_shot": {"tasks": tasks}}, "found no gold.csv"),
        (
            {"zero_shot": {"tasks": tasks[:1]}, "long_context": {"folder": str(place / "books"), "conditions": ["TTT", "gate"]}},
            "`long_context.conditions[1]='gate'`",
        ),
        ({"zero_shot": {"tasks": tasks[:1]}, "inner_loss": {"folder": str(tmp_path / "none")}}, "no such folder"),
        ({"zero_shot": {"tasks": tasks[:1]}, "dialogue": {"manifest": str(tmp_path / "none.jsonl")}}, "none.jsonl"),
    ):
        assert cli.main(["evaluate", write(tmp_path / "a.yaml", settings(place, tmp_path / "out", **change))]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["results.json", "scores/sstorycloze-dev.json"])
def test_a_damaged_file_of_an_earlier_run_is_named(place, tmp_path, capsys, file):
    task = {"zero_shot": {"tasks": [{"task": "sstorycloze", "folder": str(place / "sSC")}]}}
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    for content in ('{"model', "[]", "{}", '{"model": [], "scores": []}'):
        path.write_text(content)
        assert cli.main(["evaluate", write(tmp_path / "a.yaml", settings(place, tmp_path / "out", **task))]) == 2
        assert str(path) in (error := capsys.readouterr().err)
        assert error.count("\n") == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "no samples"])
def test_broken_audio_stops_the_run_and_is_named(place, tmp_path, capsys, damage):
    story = folders.make_storycloze(tmp_path / "story")
    (story / "10_aa-1_correct.wav").write_bytes(b"" if damage == "empty" else b"RIFF0000")
    if damage == "no samples":
        soundfile.write(story / "10_aa-1_correct.wav", np.zeros((0, 1)), 24000)
    task = {"zero_shot": {"tasks": [{"task": "sstorycloze", "folder": str(story)}]}}
    assert cli.main(["evaluate", write(tmp_path / "a.yaml", settings(place, tmp_path / "out", **task))]) == 2
    assert "10_aa-1_correct.wav" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("section", ["long_context", "inner_loss", "dialogue"])
def test_recordings_without_samples_are_named(place, tmp_path, capsys, section):
    soundfile.write(tmp_path / "talk.wav", np.zeros((0, 2)), 24000)
    (tmp_path / "data.jsonl").write_text('{"path": "talk.wav", "duration": 12.0}\n')
    part = {section: {"manifest": str(tmp_path / "data.jsonl")}}
    assert cli.main(["evaluate", write(tmp_path / "a.yaml", settings(place, tmp_path / "out", **part))]) == 2
    assert "talk.wav: the sound file holds no samples" in capsys.readouterr().err


def test_two_files_of_one_section_need_outputs_of_their_own(place, tmp_path, capsys):
    paths = [write(tmp_path / f"{name}.yaml", settings(place, tmp_path / "out", recall={"seed": seed})) for seed, name in enumerate("ab")]
    assert cli.main(["evaluate", *paths]) == 2
    assert f"recall is given for the output {tmp_path / 'out'} by two files" in capsys.readouterr().err


def test_a_mistake_in_the_last_file_comes_out_before_the_first_runs(place, tmp_path, capsys, monkeypatch):
    nothing_runs(monkeypatch)
    first = write(tmp_path / "a.yaml", settings(place, tmp_path / "out", zero_shot={"tasks": [STORY | {"folder": str(place / "sSC")}]}))
    last = write(tmp_path / "b.yaml", settings(place, tmp_path / "out", inner_loss={"folder": str(tmp_path / "none")}))
    assert cli.main(["evaluate", first, last]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_model_is_missing(tmp_path, capsys):
    path = write(tmp_path / "a.yaml", {"inner_loss": {"manifest": "x.jsonl"}})
    assert cli.main(["evaluate", path]) == 2
    assert "`model=null`" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configuration" / "evaluate").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_settings_are_understood(path):
    from modeling_moshi_ttt.common.settings import load_settings

    assert load_settings(EvaluateSettings, path).sections


def test_an_adapter_is_merged_into_the_model(tmp_path):
    adapted = hub_checkpoints.save_adapter(tmp_path / "adapter", str(hub_base(tmp_path)))
    subject = subject_of(tmp_path)
    plain = runner.Subject(EvaluateSettings(model=str(tmp_path / "base"), device="cpu", recall=RecallSettings()))
    model, _ = subject.load()
    frames = random_frames(model.config, 2, 12)
    with torch.no_grad():
        merged, expected, base = (one(**frames).logits for one in (model, adapted, plain.load()[0]))
    assert (merged - expected).abs().max() < 1e-4
    assert (base - expected).abs().max() > 1e-2
    assert subject.digest != plain.digest
    assert "adapter" in subject.about()["name"]


def plain_base_and_adapter(folder, **ttt):
    """A base without TTT layers unless `ttt` gives some, and an adapter that a run with model.ttt made for it; returns the PEFT model."""
    chosen = {"ttt_layers": [1], "ttt_mixer": "linear", "ttt_mini_batch_size": 4}
    hub_checkpoints.small_model(**(ttt or {"ttt_layers": []})).save_pretrained(folder / "base")
    hub_checkpoints.small_processor().save_pretrained(folder / "base")
    base = MoshiTTTForConditionalGeneration.from_pretrained(folder / "base", **(chosen if not ttt else {}))
    base.save_pretrained(folder / "wide")
    adapted = hub_checkpoints.save_adapter(folder / "adapter", str(folder / "wide"))
    write_base_config(folder / "adapter", base.config)
    return adapted


def subject_of(folder, base="base"):
    chosen = EvaluateSettings(model=str(folder / base), adapter=str(folder / "adapter"), device="cpu", recall=RecallSettings())
    return runner.Subject(chosen)


def test_an_adapter_brings_the_ttt_layers_that_its_base_lacks(tmp_path):
    adapted = plain_base_and_adapter(tmp_path)
    subject = subject_of(tmp_path)
    ttt = subject.about()["ttt"]
    assert (ttt["ttt_layers"], ttt["ttt_mixer"], ttt["ttt_mini_batch_size"]) == ([1], "linear", 4)
    model, _ = subject.load()
    assert model.config.ttt_layers == [1]
    frames = random_frames(model.config, 2, 12)
    with torch.no_grad():
        assert (model(**frames).logits - adapted(**frames).logits).abs().max() < 1e-4


def test_an_adapter_of_transformers_moshi_whose_processor_lies_beside_it(tmp_path):
    """The base as it is on the Hub: another model type, no processor of ours."""
    plain_base_and_adapter(tmp_path)
    path = tmp_path / "base" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("ttt_")}
    path.write_text(json.dumps(config | {"model_type": "moshi"}))
    (tmp_path / "base" / "processor_config.json").unlink()
    hub_checkpoints.small_processor().save_pretrained(tmp_path / "adapter")
    model, processor = subject_of(tmp_path).load()
    assert model.config.ttt_layers == [1]
    assert processor.num_codebooks == 3


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"ttt_layers": [0]}, r"the adapter is for TTT layers \[1\], its base .*other has \[0\]"),
        ({"ttt_layers": [0, 1]}, r"the adapter is for TTT layers \[1\], its base .*other has \[0, 1\]"),
        ({"ttt_mixer": "mlp"}, "the adapter is for TTT mixer linear, its base .*other has mlp"),
        ({"ttt_mini_batch_size": 8}, "the adapter is for TTT mini-batch size 4, its base .*other has 8"),
    ],
)
def test_an_adapter_of_another_base_is_refused_before_weights_are_read(tmp_path, other, message, told):
    """Also without base_config.json beside it, by the adapter's own weights."""
    ttt = {"ttt_layers": [1], "ttt_mixer": "linear", "ttt_mini_batch_size": 4}
    plain_base_and_adapter(tmp_path, **ttt)
    hub_checkpoints.small_model(**{**ttt, **other}).config.save_pretrained(tmp_path / "other")
    if not told:
        (tmp_path / "adapter" / "base_config.json").unlink()
    with pytest.raises(ValueError, match=message):
        subject_of(tmp_path, "other").about()


def test_an_adapter_of_a_base_of_another_depth_is_refused(tmp_path):
    plain_base_and_adapter(tmp_path)
    hub_checkpoints.small_model(ttt_layers=[], num_hidden_layers=3).config.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the adapter is for num_hidden_layers 2, its base .*other has 3"):
        subject_of(tmp_path, "other").about()


def hub_base(folder):
    hub_checkpoints.save_checkpoint(folder / "base")
    return folder / "base"

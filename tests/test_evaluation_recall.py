"""The recall task is what it says, window attention cannot do it, and a TTT layer can."""

import json
import re

import pytest
import torch

from modeling_moshi_ttt import cli
from modeling_moshi_ttt.common.settings import load_settings
from modeling_moshi_ttt.evaluation import inner_loss, recall, recall_task
from modeling_moshi_ttt.evaluation.recall_task import (
    FIRST_TEXT,
    KEYS,
    VALUES,
    TrainSettings,
    Variant,
    make_batch,
    make_model,
    measure,
    train,
)
from modeling_moshi_ttt.evaluation.scoring import CodeSequence


def test_answers_are_the_values_of_the_repeated_keys():
    batch = make_batch(20, 4, 24, torch.Generator().manual_seed(0))
    codes, labels = batch.user_audio_codes[:, 0], batch.text_labels
    assert codes.shape == labels.shape == (20, 2 * 4 + 24 + 4 + 1)
    for row, label in zip(codes.tolist(), labels.tolist()):
        told = {row[2 * i]: row[2 * i + 1] for i in range(4)}
        assert len(told) == 4
        assert all(code >= KEYS + VALUES for code in row[8:32])
        assert sorted(row[32:36]) == sorted(told)
        assert label[:33] == [-100] * 33
        assert [FIRST_TEXT + told[key] - KEYS for key in row[32:36]] == label[33:]
        assert row[36] == -1
    order = {tuple(sorted(range(4), key=lambda i: row[32 + i])) for row in codes.tolist()}
    assert len(order) > 5


def test_pairs_are_told_after_as_many_frames_as_asked():
    early, late = (make_batch(6, 3, 10, torch.Generator().manual_seed(0), told_after) for told_after in (0, 7))
    assert late.user_audio_codes.shape == late.text_labels.shape[:1] + (1, 7 + 2 * 3 + 10 + 3 + 1)
    assert (late.user_audio_codes[:, 0, :7] >= KEYS + VALUES).all()
    for batch, start in ((early, 0), (late, 7)):
        told = batch.user_audio_codes[:, 0, start : start + 6].reshape(6, 3, 2)
        assert (told[..., 0] < KEYS).all()
        assert ((told[..., 1] >= KEYS) & (told[..., 1] < KEYS + VALUES)).all()
        assert (batch.user_audio_codes[:, 0, start + 6 : start + 16] >= KEYS + VALUES).all()
        assert torch.equal(batch.text_labels[:, -3:].sort(1).values, (FIRST_TEXT + told[..., 1] - KEYS).sort(1).values)


def test_the_newest_value_of_a_corrected_pair_is_right():
    once, anew = (make_batch(6, 3, 10, torch.Generator().manual_seed(0), 0, corrections) for corrections in (0, 2))
    told = anew.user_audio_codes[:, 0, :10].reshape(6, 5, 2)
    assert torch.equal(told[:, :3], once.user_audio_codes[:, 0, :6].reshape(6, 3, 2))
    assert torch.equal(told[:, 3:, 0], told[:, :2, 0])
    assert (told[:, 3:, 1] != told[:, :2, 1]).all()
    newest = torch.cat([told[:, 3:], told[:, 2:3]], dim=1)
    assert torch.equal(anew.text_labels[:, -3:].sort(1).values, (FIRST_TEXT + newest[..., 1] - KEYS).sort(1).values)


def test_the_reach_is_that_of_all_layers_together():
    """A change of the oldest frame within the reach moves the newest output, one frame older does not."""
    model = make_model(Variant(None), window=5).double()
    frames = recall_task.reach(5)
    assert frames == 2 * (5 - 1) + 1 == 9
    codes = torch.zeros(1, 1, 20, dtype=torch.long)
    base = model(user_audio_codes=codes, use_cache=False).logits[0, -1]
    moved = []
    for back in range(1, 20):  # the newest input is the frame before the last
        changed = codes.clone()
        changed[..., 19 - back] = 7
        moved.append(not torch.equal(model(user_audio_codes=changed, use_cache=False).logits[0, -1], base))
    assert moved == [back <= frames for back in range(1, 20)]


def test_distances_within_reach_are_counted_by_hand():
    # two layers of window 16 reach 31 frames: 30 back from the question. One pair at 29 frames of noise is 30 frames older, at 30 it is 31.
    assert [recall_task.share_within_reach(1, distance, 16) for distance in (24, 29, 30, 32)] == [1.0, 1.0, 0.0, 0.0]
    # four pairs at 24: 2 (4 - i) - 1 + 24 + j <= 30 for j <= 2 i - 1, so 0, 2, 4 and 4 questions
    assert recall_task.share_within_reach(4, 24, 16) == 10 / 16
    assert all(recall_task.share_within_reach(pairs, distance, 16) == 0 for pairs in (4, 8) for distance in (32, 48, 64, 96))


def test_the_answer_is_not_in_what_the_model_is_given():
    """The frame of the answer holds nothing, and text is absent: the answer can come from the memory alone."""
    model = make_model(Variant())
    seen = {}
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    batch = make_batch(2, 4, 24, torch.Generator().manual_seed(0))
    recall_task._answers(model, batch)
    assert set(seen) == {"user_audio_codes", "text_labels", "use_cache"}


def test_without_ttt_the_model_has_no_ttt_weights():
    names = [name for name, _ in make_model(Variant(None)).named_parameters()]
    assert not any("ttt" in name for name in names)
    with_ttt = {name for name, _ in make_model(Variant()).named_parameters()}
    assert set(names) < with_ttt


def test_one_pair_beyond_the_reach_of_two_windows():
    """The short form of the claim: two layers of window 8 reach 14 frames back; after 16 and after 40 only TTT still knows."""
    settings = TrainSettings(steps=220, batch_size=32, pairs=(1,), distances=(16, 16), learning_rate=5e-3, warm_up=20, cool_down=50)
    remembering, forgetting = make_model(Variant("linear", 8), window=8), make_model(Variant(None), window=8)
    steps = int(train(remembering, settings)["steps"])
    train(forgetting, TrainSettings(**{**vars(settings), "steps": steps}))
    for distance in (16, 40):
        assert measure(remembering, 1, distance, 256)["accuracy"] >= 0.97
        assert measure(forgetting, 1, distance, 256)["accuracy"] <= 0.06  # chance is 0.02
    assert_published_order(remembering)


def assert_published_order(model):
    """Inner losses in the order of the TTT paper's figure 5, in the layer that holds the pairs: W_0 > W_{t-1} > W_t."""
    means = []
    for seed in range(8):
        codes = make_batch(1, 8, 100, torch.Generator().manual_seed(seed)).user_audio_codes[0]
        last = inner_loss.inner_losses(model, CodeSequence(torch.full_like(codes, -1), codes))[1]
        means.append([last[name].mean() for name in ("initial", "before", "after")])
    initial, before, after = torch.tensor(means).mean(0).tolist()
    assert initial > 2 * before
    assert before > after


def test_four_pairs_beyond_the_window():
    """Window 16, four pairs, up to 96 frames of noise where 40 were the most in training."""
    settings = TrainSettings(steps=600, batch_size=32, pairs=(4,), cool_down=40, enough=0.96)
    remembering, forgetting = make_model(Variant("mlp", 16)), make_model(Variant(None))
    steps = int(train(remembering, settings)["steps"])
    train(forgetting, TrainSettings(**{**vars(settings), "steps": steps}))
    for distance in (24, 96):
        assert measure(remembering, 4, distance, 256)["accuracy"] >= 0.97
        assert measure(forgetting, 4, distance, 256)["accuracy"] <= 0.04  # chance is 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "b"), [(None, 16), *[(mixer, b) for mixer in ("mlp", "linear") for b in (16, 4, 1)]])
def test_four_and_eight_pairs_beyond_the_window(mixer, b):
    """The claim in full; the picture in the README is of the same runs."""
    four, eight = ((0.0, 0.04), (0.0, 0.04)) if mixer is None else ((0.97, 1.0), (0.9, 1.0))
    model = make_model(Variant(mixer, b))
    train(model, TrainSettings(seconds=3600))
    for distance in (24, 48, 96):
        assert four[0] <= measure(model, 4, distance)["accuracy"] <= four[1]
        assert eight[0] <= measure(model, 8, distance)["accuracy"] <= eight[1]


def test_training_stops_early_and_cools_down():
    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, user_audio_codes, text_labels, use_cache):
            logits = torch.nn.functional.one_hot(text_labels.clamp(min=0), FIRST_TEXT + VALUES).float() + self.weight
            return type("Output", (), {"logits": logits, "text_loss": logits.mean()})

    steps = train(Oracle(), TrainSettings(steps=500, batch_size=2, cool_down=30, enough=0.9))["steps"]
    assert steps == 45 + 30  # 1 - 0.95 ** 45 is the first above 0.9


def small(tmp_path, **changes):
    fields = {
        "pairs": "[2]",
        "distances": "[20]",
        "steps": 2,
        "batch_size": 4,
        "sequences": 8,
        "variants": "[{mixer: none}, {mixer: linear}]",
    }
    return ["recall", f"output={tmp_path / 'out'}", *[f"{key}={value}" for key, value in (fields | changes).items()]]


def test_the_command_writes_numbers_and_the_picture(tmp_path, capsys):
    assert cli.main(small(tmp_path, distances="[20, 40]", told_after="[0, 30]", train_told_after="[0, 3]")) == 0
    results = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["window attention alone", "TTT-linear, b = 16"]
    assert (results["window"], results["reach"], results["chance"]) == (16, 31, 0.02)
    cells = [(cell["told_after"], cell["distance"], cell["within_reach"]) for cell in results["runs"][0]["results"]]
    assert cells == [(0, 20, 1.0), (0, 40, 0.0), (30, 20, 1.0), (30, 40, 0.0)]
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "recall.svg").is_file()
    said = capsys.readouterr().out
    assert re.search(r"TTT-linear, b = 16 +2 pairs told after  30 +20\*: +[\d.]+% +40: +[\d.]+%", said)
    assert "2 layers of window 16 reach 31 frames: 2 × (16 − 1) + 1" in said


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    real, trained = recall._run_variant, []

    def stop_at_second(variant, *rest):
        trained.append(variant.mixer)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(variant, *rest)

    monkeypatch.setattr(recall, "_run_variant", stop_at_second)
    assert cli.main(small(tmp_path)) == 130
    assert cli.main(small(tmp_path)) == 0
    assert trained == ["none", "linear", "linear"]


def test_what_ran_out_of_time_is_trained_again_when_given_more(tmp_path, capsys):
    short = small(tmp_path, variants="[{mixer: none}]", steps=110)
    runs = []
    for seconds in (1e-3, 1e-3, 600, 1e-3):
        assert cli.main([*short, f"seconds={seconds}"]) == 0
        runs.append(json.loads((tmp_path / "out" / "recall.json").read_text())["runs"])
        assert ("ran out of time" in capsys.readouterr().out) == (len(runs) < 3)
    assert [[run["training"]["steps"] for run in done] for done in runs] == [[101], [101], [110], [110]]
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "`steps=0`"),
        ({"pairs": "[2, 51]"}, r"`pairs\[1\]=51`"),
        ({"pairs": "[]"}, r"`pairs=\[\]`"),
        ({"distances": "[-1]"}, r"`distances\[0\]=-1`"),
        ({"train_distances": "[40, 24]"}, r"`train_distances=\[40, 24\]`"),
        ({"told_after": "[-1]"}, r"`told_after\[0\]=-1`"),
        ({"told_after": "[]"}, r"`told_after=\[\]`"),
        ({"pairs": "[2]", "corrections": "[3]"}, "corrections"),
        ({"train_corrections": "[1, 0]"}, "train_corrections"),
        ({"train_told_after": "[5]"}, r"`train_told_after=\[5\]`"),
        ({"sequences": 0}, "`sequences=0`"),
        ({"learning_rate": ".nan"}, "`learning_rate=nan`"),
        ({"seconds": ".inf"}, "`seconds=inf`"),
        ({"threads": -1}, "`threads=-1`"),
        ({"variants": "[{base_lr: 0}]"}, r"`variants\[0\].base_lr=0`"),
        ({"variants": "[{mixer: none}, {mixer: none, mini_batch_size: 4}]"}, "`variants=.*'window attention alone' twice"),
        ({"stepps": 3}, "did you mean 'steps'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_settings(recall.RecallSettings, None, small(tmp_path, **change)[1:])


def test_variants_of_two_rates_have_two_names():
    names = [recall.VariantSettings("linear", 16, rate).name for rate in (None, 4.0, 8.0)]
    assert names == ["TTT-linear, b = 16", "TTT-linear, b = 16, lr 4", "TTT-linear, b = 16, lr 8"]


@pytest.mark.parametrize("damage", ["text", "list", "runs", "run"])
def test_a_damaged_file_of_an_earlier_run_is_named(tmp_path, capsys, damage):
    assert cli.main(small(tmp_path, variants="[{mixer: none}]")) == 0
    path = tmp_path / "out" / "recall.json"
    whole = json.loads(path.read_text())
    path.write_text({"text": "{", "list": "[]"}.get(damage) or json.dumps(whole | {"runs": None if damage == "runs" else [{}]}))
    capsys.readouterr()
    assert cli.main(small(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert error.count("\n") == 1
    assert {"runs": "`runs=None`", "run": "`runs.0.name`"}.get(damage, "JSON") in error


def test_results_from_before_the_time_of_telling_go_on(tmp_path, capsys):
    assert cli.main(small(tmp_path, variants="[{mixer: none}]")) == 0
    path = tmp_path / "out" / "recall.json"
    older = json.loads(path.read_text())
    for name in ("told_after", "train_told_after"):
        del older["settings"][name]
    for cell in older["runs"][0]["results"]:
        del cell["told_after"], cell["within_reach"]
    del older["reach"]
    path.write_text(json.dumps(older))
    assert cli.main(small(tmp_path, variants="[{mixer: none}]")) == 0
    assert "2 pairs told after   0   20*:" in capsys.readouterr().out
    assert json.loads(path.read_text()) == older
    assert cli.main(small(tmp_path, told_after="[0, 5]")) == 2
    assert "other settings" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(tmp_path, capsys):
    assert cli.main(small(tmp_path, variants="[{mixer: none}]")) == 0
    assert cli.main(small(tmp_path, steps=3)) == 2
    assert "other settings" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_numbers():
    runs = [train(make_model(Variant()), TrainSettings(steps=3, batch_size=4)) for _ in range(2)]
    assert runs[0]["running_accuracy"] == runs[1]["running_accuracy"]
    models = [make_model(Variant()) for _ in range(2)]
    assert measure(models[0], 4, 24, 16) == measure(models[1], 4, 24, 16)

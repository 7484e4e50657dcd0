"""`moshi-ttt train` from sound files to a folder that loads elsewhere, a second time, and after wrong requests."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_checkpoints import small_model, small_processor
from peft import AutoPeftModel, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_training_data import make_source
from training_runs import make_model
from transformers import AutoModel

from modeling_moshi_ttt import MoshiTTTConfig
from modeling_moshi_ttt.adapters import bases as adapter
from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.common.files import atomic_write, check_manifest, read_log
from modeling_moshi_ttt.hub.verify import expected_shapes, verify


@pytest.fixture
def recipe(tmp_path):
    """A recipe over a small model, a small codec and three short noises."""
    small_model().save_pretrained(tmp_path / "base")
    small_processor().save_pretrained(tmp_path / "base")
    manifest = make_source(tmp_path / "sound", ["a", "b", "c"])
    settings = {
        "run_dir": str(tmp_path / "run"),
        "mode": "lora+ttt",
        "model": {"path": str(tmp_path / "base")},
        "lora": {"rank": 2},
        "data": {"train": str(manifest), "evaluation": str(manifest), "window_seconds": 0.5, "batch_size": 2},
        "optim": {"steps": 3, "lr": 1e-3},
        "checkpoint": {"every": 2},
        "evaluate_every": 3,
        "trackers": ["tensorboard"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_from_sound_to_an_adapter_and_again(tmp_path, recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "trainable" in out
    run = tmp_path / "run"
    assert check_manifest(run / "final") == []
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("tracking/*")) != []
    records = read_log(run / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    assert {"tokens_per_second", "data_wait", "peak_memory_gb", "gradient_norm"} <= set(records[0])
    PeftModel.from_pretrained(small_model(), run / "final")
    alone = AutoPeftModel.from_pretrained(run / "final")  # on the base that the run named
    assert type(alone.base_model.model).__name__ == "MoshiTTTForConditionalGeneration"
    saved = load_file(run / "final" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in get_peft_model_state_dict(alone).items())
    told = (run / "final" / "base_config.json").read_text()
    base = MoshiTTTConfig.from_pretrained(tmp_path / "base")
    assert expected_shapes(MoshiTTTConfig.from_dict(json.loads(told))) == expected_shapes(base)
    assert str(tmp_path) not in told
    # the same command again finds everything done and changes nothing
    before = (run / "final" / "adapter_model.safetensors").read_bytes(), read_log(run / "metrics.jsonl")
    assert main(["train", str(recipe)]) == 0
    assert ((run / "final" / "adapter_model.safetensors").read_bytes(), read_log(run / "metrics.jsonl")) == before


@pytest.mark.parametrize("start", ["fresh", "plain", "transformers", "base"])
def test_an_adapter_says_what_base_it_needs(tmp_path, recipe, start):
    """With base_config.json in `final` the run's settings are not needed to verify and load it, but for the fresh weights themselves."""
    settings = {"ttt_layers": [1], "ttt_mixer": "linear"}
    base = small_model(**settings if start == "base" else {"ttt_layers": []})
    base.save_pretrained(tmp_path / "start")
    if start == "transformers":  # their own Moshi, which says nothing of TTT
        fields = json.loads((tmp_path / "start" / "config.json").read_text()) | {"model_type": "moshi"}
        (tmp_path / "start" / "config.json").write_text(json.dumps({key: fields[key] for key in fields if not key.startswith("ttt_")}))
    path = tmp_path / "start" / "config.json" if start == "fresh" else tmp_path / "start"
    overrides = [
        f"model={json.dumps({'path': str(path), 'processor': str(tmp_path / 'base'), 'ttt': {} if start == 'base' else settings})}"
    ]
    assert main(["train", str(recipe), *overrides, "mode=ttt", "lora=null", "trackers=[]", "optim.steps=1", "evaluate_every=0"]) == 0
    final = tmp_path / "run" / "final"
    assert adapter.base_config(final).ttt_layers == [1]
    # `AutoPeftModel` takes a base as it stands, so it is sent only to one that has the TTT layers by itself
    named = json.loads((final / "adapter_config.json").read_text())["auto_mapping"]["parent_library"]
    assert (named == "transformers") == (start == "base")
    if start != "fresh":
        (final / "run.json").unlink()
        (final / "manifest.json").unlink()
    facts = verify(final)
    assert (facts.kind, facts.ttt_layers, facts.ttt_mixer) == ("adapter", [1], "linear")
    assert adapter.load_base(final).config.ttt_layers == [1]
    changed = json.loads((final / "base_config.json").read_text()) | {"ttt_layers": [0]}
    (final / "base_config.json").write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match=r"the adapter is for TTT layers \[1\], its base .* has \[0\]|base_config\.json has .* the manifest says"
    ):
        verify(final)


def test_full_mode_gives_a_model_for_automodel(tmp_path, recipe):
    assert main(["train", str(recipe), "mode=full", "lora=null", "trackers=[]"]) == 0
    model = AutoModel.from_pretrained(tmp_path / "run" / "final")
    assert type(model).__name__ == "MoshiTTTForConditionalGeneration"
    assert json.loads((tmp_path / "run" / "final" / "run.json").read_text())["step"] == 3
    assert not (tmp_path / "run" / "final" / "base_config.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=frozen", "lora=null"], "mode is 'frozen': nothing is trained"),
        (["mode=ttt"], "`lora` must not be given with `mode=ttt`"),
        (["optim.stps=3"], "unknown key 'optim.stps'; did you mean 'optim.steps'"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: there is no such manifest"),
        (["data.carry=state", "data.batch_size=4"], "3 recordings for 4 lanes"),
        (["trackers=[tensorbord]"], "trackers holds 'tensorbord'"),
        (["optim.lr=1e30", "optim.max_bad_steps=1", "optim.steps=9"], "not finite"),
        (["model.ttt={hidden_size: 8}"], "model.ttt holds 'hidden_size', which is no TTT setting"),
        (["run_dir=recipe.yaml"], "run_dir is recipe.yaml, where no folder can be made (File exists)"),
        (["data.cache=recipe.yaml/x"], "data.cache is recipe.yaml/x, where no folder can be made (Not a directory)"),
        (["model.path=adapter"], "model.path is adapter, an adapter: start from its base (base), or make the two one model with"),
        (["model.path=old"], "model.path: old is a run folder; did you mean old/final?"),
        (["model.path=kyutai"], "kyutai holds a model of type 'moshi', not 'moshi_ttt'; turn it into one with: moshi-ttt convert"),
        (["model.path=kyutai/config.json"], "kyutai/config.json holds a model of type 'moshi', not 'moshi_ttt'"),
        (["model.path=sound"], "sound holds no config.json that says its model_type"),
        (["model.path=gone"], "model.path is gone: there is no such folder, and it is no Hub name"),
        (["model.path=gone.json"], "model.path: there is no file gone.json"),
        (["model.path=base/config.json", "model.processor=null"], "model.processor is missing: with a config.json as model.path"),
        (["model.path=torn"], "model.path is torn, whose weights cannot be loaded"),
        (["model.processor=sound"], "model.processor is sound, where no processor can be loaded (it holds no processor_config.json)"),
        (["model.processor=gone"], "model.processor is gone: there is no such folder, and it is no Hub name"),
        (["model.processor=unspoken"], "model.processor is unspoken, where no processor can be loaded (KeyError"),
        (["run_dir=pulled"], "pulled/run_config.json was not written by a training run here; use another run_dir"),
    ],
)
def test_wrong_requests_end_in_one_line(recipe, overrides, message, capsys, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    for name, content in (
        ("adapter/adapter_config.json", '{"base_model_name_or_path": "base"}'),
        ("old/final/config.json", "{}"),
        ("kyutai/config.json", '{"model_type": "moshi", "dim": 32, "dep_q": 3, "delays": [0]}'),
        ("torn/config.json", Path("base/config.json").read_text()),
        ("torn/model.safetensors", "torn"),
        ("unspoken/tokenizer.json", "{}"),
        ("pulled/run_config.json", '{"run_dir": "elsewhere"}'),
    ):
        if name.split("/")[0] == "unspoken":
            shutil.copytree("base", "unspoken")
        atomic_write(name, content)
    assert main(["train", str(recipe), "trackers=[]", "model.processor=base", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_recipe(capsys):
    assert main(["train", "none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_fresh_weights_depend_on_the_seed_alone():
    assert all((a == b).all() for a, b in zip(make_model(1).parameters(), make_model(1).parameters()))


def test_a_diverged_model_is_no_result(tmp_path):
    from modeling_moshi_ttt.training.export import _check_finite

    _check_finite({"weight": torch.ones(2), "count": torch.ones(2, dtype=torch.int64)}, tmp_path)
    with pytest.raises(ValueError, match="b holds values that are not finite.*was not written.*lower rates"):
        _check_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, tmp_path)

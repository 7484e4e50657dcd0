"""The model card says what the checkpoint holds, its metadata are the Hub's own, and its code runs as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hub_checkpoints import save_adapter, save_checkpoint, small_model
from hub_server import HubServer
from huggingface_hub import ModelCard

from modeling_moshi_ttt.common.checkpoint_files import copy_companions
from modeling_moshi_ttt.hub.card import check_facts, summarize, write_card
from modeling_moshi_ttt.hub.stage import stage
from modeling_moshi_ttt.hub.verify import verify

RUN = {
    "run_dir": "/users/somebody/runs/one",
    "mode": "full",
    "model": {"path": "kyutai/moshiko", "ttt": {"ttt_layers": "all"}, "dtype": "float32"},
    "data": {"train": "/users/somebody/data/talk:1", "window_seconds": 20.0, "batch_size": 4},
    "optim": {"steps": 300, "lr": 1e-3, "ttt_lr": 5e-3},
    "lora": None,
    "seed": 7,
}
RESULTS = {
    "tasks": {
        "zero_shot": {
            "kind": "zero_shot",
            "scoring": {"reduction": "mean", "user": "absent", "text": "not scored"},
            "tasks": {
                "sWUGGY": {"accuracy": 0.6335, "interval": [0.61, 0.655], "groups": {}},
                "sBLIMP": {"accuracy": 0.545, "interval": None, "groups": {}},
            },
        },
        "long_context": {"kind": "long_context"},
    }
}


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Staged folders of a trained model with results, and of an adapter for it; the run they come from."""
    root = tmp_path_factory.mktemp("card")
    run = root / "run"
    save_checkpoint(run / "final")
    (run / "run_config.json").write_text(json.dumps({"run": RUN, "fixed": {}}))
    (run / "final" / "run.json").write_text(json.dumps({"step": 300, "run": RUN}))
    (run / "loss.png").write_bytes(b"a picture")
    (run / "card.json").write_text(
        json.dumps({"datasets": ["user/talk"], "hardware": "one H100", "time": "3 h", "description": "It likes tea."})
    )
    metrics = [
        {"step": 0, "eval_text_loss": 6.2},
        *({"step": i, "text_loss": 1 / i, "tokens_per_second": 100.0 * i, "peak_memory_gb": 3.5} for i in (1, 2, 4)),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (root / "evaluation" / "pictures").mkdir(parents=True)
    (root / "evaluation" / "results.json").write_text(json.dumps(RESULTS))
    (root / "evaluation" / "pictures" / "long_context.png").write_bytes(b"a picture")
    for name in ("whole", "plain"):
        (root / name).mkdir()
    stage(run, root / "whole", "user/whole", results=root / "evaluation")
    stage(run / "final", root / "plain", "user/plain")
    return root


def test_metadata_are_what_the_hub_reads(cards):
    card = ModelCard.load(cards / "whole" / "README.md")
    data = card.data
    assert (data.license, data.pipeline_tag, data.library_name) == ("cc-by-4.0", "audio-to-audio", "transformers")
    assert (data.base_model, data.base_model_relation, data.language) == ("kyutai/moshiko", "finetune", ["en"])
    assert {"moshi", "test-time-training"} <= set(data.tags)
    assert data.datasets == ["user/talk"]
    results = {result.dataset_name: result for result in data.eval_results}
    assert results["sWUGGY"].metric_value == 63.35
    assert results["sWUGGY"].metric_args == {"chance": 50.0, "protocol": "reduction mean, user absent, text not scored"}
    assert "chance 50" in results["sBLIMP"].metric_name


def test_tables_show_the_run_and_its_results(cards):
    text = (cards / "whole" / "README.md").read_text()
    for line in (
        "| steps | 300 |",
        "| learning rate of TTT weights | 0.005 |",
        "| started from | kyutai/moshiko |",
        "| sWUGGY | 63.35 | 61.0–65.5 | 50.0 | reduction mean, user absent, text not scored |",
        "| sBLIMP | 54.5 | – | 50.0 | reduction mean, user absent, text not scored |",
        "| TTT layers | 0–1: mlp, mini-batch 4 |",
        "| last text loss | 0.25 |",
        "| tokens per second | 200 |",
        "| peak memory gb | 3.5 |",
        "| hardware | one H100 |",
        "| time | 3 h |",
        "| … ttt | 17,420 |",
        "| … gates | 64 |",
        "It likes tea.",
    ):
        assert line in text
    assert "![Loss against position in the recording](pictures/long_context.png)" in text
    assert "![Loss against step](loss.png)" in text
    assert "Limits and risks" in text
    assert "{{" not in text
    assert "{%" not in text
    plain = (cards / "plain" / "README.md").read_text()
    assert "No evaluation results were stored" in plain
    assert ModelCard(plain).data.eval_results is None


def test_paths_of_the_machine_stay_at_home(cards):
    for path in (cards / "whole").rglob("*"):
        if path.is_file():
            assert b"/users/somebody" not in path.read_bytes(), path.name
    assert json.loads((cards / "whole" / "run_config.json").read_text())["run_dir"] == "one"


def test_a_card_json_with_a_key_that_has_no_place_is_refused(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text('{"licence": "mit"}')
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match="card.json holds 'licence'; the card has places for base_model"):
        stage(tmp_path / "model", tmp_path / "staged", "user/name")


def test_a_staged_folder_staged_again_says_the_same(cards, tmp_path):
    """Who pulls, looks and pushes on loses nothing of what the card said."""
    stage(cards / "whole", tmp_path, "user/whole")
    assert (tmp_path / "README.md").read_text() == (cards / "whole" / "README.md").read_text()


def test_staging_twice_gives_the_same_bytes(cards, tmp_path):
    stage(cards / "run", tmp_path, "user/whole", results=cards / "evaluation")
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {path.relative_to(cards / "whole").as_posix() for path in (cards / "whole").rglob("*") if path.is_file()}
    assert all((tmp_path / name).read_bytes() == (cards / "whole" / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_cards_code_runs_as_it_stands(cards, tmp_path, kind):
    """Every python block, one after the other, in a Python without this package."""
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home")), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        whole = {path.relative_to(cards / "whole").as_posix(): path.read_bytes() for path in (cards / "whole").rglob("*") if path.is_file()}
        hub.add("user/whole", whole)
        if kind == "adapter":
            save_adapter(tmp_path / "adapter", str(cards / "whole"))
            push = ["push", str(tmp_path / "adapter"), "user/adapter", "--base", "user/whole"]
            code = f"from modeling_moshi_ttt.cli import main\nassert main({push!r}) == 0"
            subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        text = hub.repos[f"user/{kind}"].files()["README.md"].decode()
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == (4 if kind == "whole" else 3)
        absent = "import sys\nsys.modules['modeling_moshi_ttt'] = None\n"  # an import of it fails
        done = subprocess.run(
            [sys.executable, "-c", absent + "\n".join(blocks)], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert "step 1: loss" in done.stdout
    assert ("'input_ids': (1, 25)" in done.stdout) == (kind == "whole")
    if kind == "adapter":
        data = ModelCard(text).data
        assert (data.base_model, data.base_model_relation, data.library_name) == ("user/whole", "adapter", "peft")


@pytest.mark.parametrize("facts", [{"license": 3}, {"languages": "en"}, {"datasets": [1]}])
def test_a_card_json_of_other_types_is_refused(tmp_path, facts):
    with pytest.raises(ValueError, match=f"card.json: {next(iter(facts))} is .*it must be"):
        check_facts(facts)


def test_a_log_that_a_kill_has_torn_is_still_a_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "text_loss": 2.0}\n{"step": 2, "text_l')
    assert summarize(tmp_path / "metrics.jsonl") == {"last_text_loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, record 2: not JSON"):
        summarize(tmp_path / "metrics.jsonl")


def test_links_of_the_hubs_cache_are_followed_and_links_elsewhere_are_refused(cards, tmp_path):
    """A snapshot in the Hub's cache is links to blobs throughout; a link to a file that belongs to somebody else must not be published."""
    plain, snapshot = tmp_path / "plain", tmp_path / "models--user--plain" / "snapshots" / "abc"
    plain.mkdir()
    for name in ("vocab.txt", "audio_tokenizer/config.json"):
        blob, link = tmp_path / "models--user--plain" / "blobs" / name.replace("/", "-"), snapshot / name
        for path in (plain / name, blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        (plain / name).write_text(name)
        blob.write_text(name)
        link.symlink_to(blob)
    (plain / "merges.txt").symlink_to("vocab.txt")
    for number, folder in enumerate((plain, snapshot)):
        copy_companions(folder, tmp_path / str(number))
        assert (tmp_path / str(number) / "audio_tokenizer" / "config.json").read_text() == "audio_tokenizer/config.json"
        assert not any(path.is_symlink() for path in (tmp_path / str(number)).rglob("*"))
    assert (tmp_path / "0" / "merges.txt").read_text() == "vocab.txt"
    (tmp_path / "secret.txt").write_text("secret")
    for folder in (plain, snapshot):
        (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
        with pytest.raises(ValueError, match=r"notes.txt is a link to .*secret.txt, outside its folder"):
            copy_companions(folder, tmp_path / "refused")
    assert not (tmp_path / "refused" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("start", "license"),
    [
        ("tiny", "apache-2.0"),
        ("configuration/model/tiny.json", "apache-2.0"),
        ("kmhf/hf-moshiko", "cc-by-4.0"),
        ("runs/moshiko", "cc-by-4.0"),
    ],
)
def test_weights_that_began_fresh_are_ours_to_license(cards, tmp_path, start, license):
    """By the bare name of a packaged configuration as by a path; what began from Kyutai's weights keeps their license."""
    shutil.copytree(cards / "whole", tmp_path / "whole")
    run = json.loads((tmp_path / "whole" / "run_config.json").read_text())
    run["model"]["path"] = start
    (tmp_path / "whole" / "run_config.json").write_text(json.dumps(run))
    (tmp_path / "whole" / "manifest.json").unlink()
    write_card(tmp_path / "whole", "user/name", "full", verify(tmp_path / "whole", run_probe=False))
    assert ModelCard.load(tmp_path / "whole" / "README.md").data.license == license

"""moshi-finetune's recipe is ours: the same numbers under our names, and what differs in words."""

import pytest

from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.training.moshi_finetune import load_moshi_finetune

# Their example/moshi_7B.yaml, filled in.
EXAMPLE = """
data:
  eval_data: 'eval.jsonl'
  shuffle: true
  train_data: 'a.jsonl:2,b.jsonl:1'
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
full_finetuning: false
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: true
do_ckpt: true
ckpt_freq: 100
save_adapters: true
run_dir: "runs/theirs"
"""


def load(tmp_path, text=EXAMPLE, *overrides):
    (tmp_path / "theirs.yaml").write_text(text)
    return load_moshi_finetune(tmp_path / "theirs.yaml", overrides)


def test_their_example_is_our_run(tmp_path):
    run, told = load(tmp_path)
    assert (run.mode, run.lora.rank, run.lora.scaling, run.lora.embeddings) == ("lora", 128, 2.0, False)
    assert (run.model.path, run.model.dtype, run.model.ttt) == ("kmhf/hf-moshiko", "bfloat16", {"ttt_layers": []})
    assert (run.model.semantic_loss_weight, run.model.text_padding_weight) == (100.0, 0.5)
    assert (run.data.train, run.data.evaluation) == ("a.jsonl:2,b.jsonl:1", "eval.jsonl")
    assert (run.data.window_seconds, run.data.batch_size, run.data.accumulation) == (100, 16, 1)
    assert (run.optim.steps, run.optim.lr, run.optim.warmup, run.optim.clip, run.optim.schedule) == (2000, 2e-6, 0.05, 1.0, "onecycle")
    assert (run.checkpoint.every, run.checkpoint.keep, run.evaluate_every, run.trackers) == (100, 3, 100, [])
    assert [line.partition(":")[0] for line in told] == ["loss"]


def test_what_differs_is_told_and_ours_go_over_theirs(tmp_path):
    text = EXAMPLE.replace("ft_embed: false", "ft_embed: true").replace("shuffle: true", "shuffle: false") + (
        "num_ckpt_keep: null\nsave_adapters: false\noverwrite_run_dir: true\nwandb: {project: mine}\nnum_microbatches: 4\n"
    ).replace("save_adapters: false\n", "")
    run, told = load(tmp_path, text, "optim.lr=1e-5", "data.batch_size=4")
    assert (run.optim.lr, run.data.batch_size, run.data.accumulation, run.lora.embeddings, run.trackers) == (1e-5, 4, 4, True, ["wandb"])
    assert [line.partition(":")[0] for line in told] == ["loss", "data.shuffle", "lora.ft_embed", "overwrite_run_dir", "wandb"]


def test_their_defaults_are_theirs(tmp_path):
    run, _ = load(tmp_path, "data: {train_data: a.jsonl}\nrun_dir: r\nfull_finetuning: true\nlora:\n")
    assert (run.mode, run.lora, run.data.window_seconds, run.optim.steps, run.optim.lr) == ("full", None, 10.0, 100, 1e-4)
    assert (run.model.semantic_loss_weight, run.checkpoint.every) == (1.0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rnk: 3}", "unknown key 'lora.rnk'; did you mean 'lora.rank'"),
        ("data: {}\nmax_stpes: 3", "unknown key 'max_stpes'; did you mean 'max_steps'"),
        ("optim: {lr: much}", "`optim.lr='much'` must be a number"),
        ("- 1", "holds no settings"),
        ("a: [", "is no YAML"),
    ],
)
def test_what_is_no_recipe_of_theirs_is_named(tmp_path, text, message, capsys):
    (tmp_path / "theirs.yaml").write_text(text)
    assert main(["train", "--from-moshi-finetune", str(tmp_path / "theirs.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_the_command_takes_it_with_overrides_of_ours(tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text(EXAMPLE)
    assert main(["train", "--from-moshi-finetune", str(tmp_path / "theirs.yaml"), f"run_dir={tmp_path / 'run'}", "model.path=gone"]) == 2
    out, err = capsys.readouterr()
    assert "Unlike moshi-finetune:\n  loss: " in out
    assert "model.path is gone" in err
    assert main(["train"]) == 2
    assert "no recipe is given" in capsys.readouterr().err

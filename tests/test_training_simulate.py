"""The simulation of a run against real ones: torch's MemTracker, its CPU allocator, two real ranks; and what it says to who would start it."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from ranks import FSDP, run_ranks
from tiny import tiny_config, tiny_model
from torch.distributed._tools.mem_tracker import MemTracker
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.cli import main
from modeling_moshi_ttt.common.packaged import names, packaged
from modeling_moshi_ttt.training.cards import CARDS, needed, seconds
from modeling_moshi_ttt.training.dry_run import fits, verdict
from modeling_moshi_ttt.training.launch import Launch
from modeling_moshi_ttt.training.ledger import Cost, Ledger
from modeling_moshi_ttt.training.run_config import load_run_config
from modeling_moshi_ttt.training.simulate import kernels_take, model_config, simulate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import measure  # noqa: E402

# large enough that tensors, and not numbers, are what is held
SHAPES = {"ttt_implementation": "scan", "hidden_size": 64, "ffn_dim": 96, "vocab_size": 200, "audio_vocab_size": 60}
WINDOW = 24


def small_run(folder, mode="full", **data):
    data = {"window_seconds": WINDOW / 12.5, "batch_size": 2, **data}
    return make_run(folder, mode, data=data, optim={"steps": 2})


def trainer_of(run, folder, accelerator=None):
    recordings = make_recordings(folder / "codes", [WINDOW * 3] * 8, tiny_config(**SHAPES))
    return make_trainer(run, recordings, make_model(**SHAPES), accelerator=accelerator)


def step_of(trainer):
    from modeling_moshi_ttt.training.windows import Loader

    data = trainer.run.data
    return next(iter(Loader(trainer.plan, trainer.reader, data.batch_size, data.accumulation, data.tbptt_windows, 0, 0)))


def test_the_ledger_holds_what_torchs_tracker_holds():
    model = tiny_model(torch.float32, **SHAPES)
    frames = torch.randint(4, 20, (2, WINDOW))
    codes = torch.randint(20, (2, 3, WINDOW))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step():
        model(input_ids=frames, moshi_audio_codes=codes, text_labels=frames, audio_labels=codes).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    ledger, tracker = Ledger(), MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    with ledger:
        ledger.mark([*model.parameters(), *model.buffers()], "weights")
        ledger.mark([x for state in optimizer.state.values() for x in state.values()], "moments")
        step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ledger.peak == pytest.approx(theirs, rel=0.01)
    assert sum(ledger.at_peak.values()) == ledger.peak


@pytest.mark.parametrize(("mode", "data"), [("full", {}), ("lora+ttt", {"accumulation": 2})])
def test_the_peak_is_that_of_a_real_step(tmp_path, mode, data):
    """Over what is held between steps, torch's CPU allocator gives a real step what the simulation says, within 10%."""
    run = small_run(tmp_path, mode, **data)
    found = simulate(run, config=tiny_config(**SHAPES))
    trainer = trainer_of(run, tmp_path)
    step = step_of(trainer)
    kept = sum(found.by_kind[kind] for kind in ("weights", "moments", "buffers"))
    assert found.peak - kept == pytest.approx(measure.peak_bytes(lambda: trainer._step(step, 0.0, 0.0)), rel=0.1)
    assert found.by_kind["weights"] == sum(p.nbytes for p in trainer.model.parameters())
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert found.by_kind["gradients"] <= sum(p.nbytes for p in trained)
    assert found.checkpoint == pytest.approx(3 * sum(p.nbytes for p in trained), rel=0.02)


def test_lanes_are_simulated_with_a_full_window(tmp_path):
    run = small_run(tmp_path, carry="state+attention", tbptt_windows=2)
    config = tiny_config(**SHAPES, sliding_window=60)
    found = simulate(run, config=config)
    keys_and_values = 2 * config.num_hidden_layers * run.data.batch_size * 60 * config.hidden_size * 4
    assert found.by_kind["states"] >= keys_and_values


def test_two_real_ranks_hold_what_one_simulated_rank_does(tmp_path):
    run = small_run(tmp_path, accumulation=2)
    launch = Launch(processes=2, kind="FSDP", fsdp={key.lower(): value for key, value in FSDP.items() if key.startswith("FSDP")})
    found = simulate(run, launch, config=tiny_config(**SHAPES))

    def work(rank):
        trainer = trainer_of(run, tmp_path / str(rank), Accelerator())
        step = step_of(trainer)
        trainer._step(step, 0.0, 0.0)
        weights = sum(p.to_local().nbytes for p in trainer.model.parameters())
        if rank == 0:  # the others may hold less
            assert weights == found.by_kind["weights"], (weights, found.by_kind)
        with Ledger() as ledger:
            ledger.mark(trainer.model.parameters(), "weights")
            ledger.mark([x for state in trainer.optimizer.state.values() for x in state.values()], "moments")
            trainer._step(step, 0.0, 0.0)
        if rank == 0:
            assert abs(ledger.peak / found.peak - 1) < 0.1, (ledger.peak, found.peak)

    run_ranks(2, "fsdp", work)


def test_operations_are_counted_by_their_shapes():
    with Ledger() as ledger:
        torch.ones(8, 16) @ torch.ones(16, 4)
    product = next(cost for cost in ledger.costs if cost.flops)
    assert product == Cost(2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4), "float32")
    card = CARDS["H100"]
    assert seconds(ledger.costs, card, tf32=True) == pytest.approx(sum(cost.bytes for cost in ledger.costs.elements()) / card.bandwidth)


def test_the_kernels_are_counted_where_a_card_takes_them():
    config = tiny_config(hidden_size=256, num_attention_heads=2, ttt_num_heads=2)
    assert config.ttt_head_dim == 128
    assert [card.name for card in CARDS.values() if kernels_take(config, card)] == ["H100", "H200"]
    run = replace(small_run(Path("unused")), mode="full")
    fused, scanned = (simulate(run, card=CARDS[name], config=config) for name in ("H100", "RTX 4090"))
    assert (fused.kernels, scanned.kernels) == (True, False)
    assert fused.moved < scanned.moved


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (Launch(8), "`num_processes=8` needs a launch file for several"),
        (
            Launch(
                12, 2, "FSDP", parallelism={"parallelism_config_dp_shard_size": 8, "parallelism_config_dp_replicate_size": 2}
            ),
            "`num_processes=12` must be .* 8 x 2",
        ),
    ],
)  # fmt: skip
def test_processes_that_cannot_share_the_work_are_refused(tmp_path, launch, words):
    with pytest.raises(ValueError, match=words):
        simulate(small_run(tmp_path), launch, config=tiny_config())


def test_a_run_that_does_not_fit_is_told_what_would(tmp_path):
    run, launch = small_run(tmp_path, batch_size=4), Launch()
    found = simulate(run, launch, config=tiny_config(**SHAPES))
    roomy = CARDS["H100"]._replace(name="roomy", memory=needed(found.peak))
    assert fits(found, roomy)
    assert verdict(run, launch, found, roomy).startswith("fits roomy")
    tight = roomy._replace(name="tight", memory=needed(found.peak - found.by_kind["activations"] / 4))
    words = verdict(run, launch, found, tight)
    less = re.search(r"Would fit: data\.batch_size=(\d) data\.accumulation=(\d)", words)
    assert int(less[1]) * int(less[2]) == 4
    smaller = replace(run, data=replace(run.data, batch_size=int(less[1])))
    assert fits(simulate(smaller, launch, config=tiny_config(**SHAPES)), tight)


def test_dry_run_says_what_a_recipe_takes(capsys):
    assert main(["train", "demo", "--dry-run", "data.batch_size=2", "run_dir=nowhere"]) == 0
    said = capsys.readouterr().out
    assert "memory a GPU, simulated" in said
    assert "host memory of a node" in said
    assert re.search(r"^(fits|does not fit) ", said, re.MULTILINE)
    assert not Path("nowhere").exists()


def test_dry_run_of_a_launch_file_that_is_not_there(capsys):
    assert main(["train", "demo", "--dry-run", "--launch", "fsdp3"]) == 2
    assert "--launch is fsdp3: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", names("train"))
def test_windows_are_whole_mini_batches(name):
    run = load_run_config(name)
    config = model_config(run)
    if config.ttt_layers and run.data.train != "made" and name != "demo":
        assert round(run.data.window_seconds * 12.5) % config.ttt_mini_batch_size == 0


def test_headers_and_table_say_what_was_simulated():
    import simulate as benchmark

    numbers = json.loads(benchmark.NUMBERS.read_text())
    assert set(numbers) == set(names("train"))
    for recipe, found in numbers.items():
        assert benchmark.header(found) in Path(packaged("train", recipe)).read_text().split("\n"), recipe
        assert found["launch"] == benchmark.launch_of(recipe)
    for page in benchmark.PAGES:
        assert f"\n\n{benchmark.table(numbers)}\n\n" in page.read_text()

"""The loop: right averages, lanes that carry, finite steps only, and a resume that is exact to the bit."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from training_runs import DyingReader, make_model, make_recordings, make_run, make_trainer, uncollected

from modeling_moshi_ttt.common.files import read_log
from modeling_moshi_ttt.training.lanes import Window
from modeling_moshi_ttt.training.memory import LaneMemory
from modeling_moshi_ttt.training.trainer import word_hits
from modeling_moshi_ttt.training.windows import Loader, WindowReader

LENGTHS = [21, 13, 30, 9, 17, 26, 11, 24]
SAME = ("step", "loss", "text_loss", "audio_loss", "gradient_norm", "lr", "skipped", "eval_loss")


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def told(folder):
    """The records of a run, without what the clock says."""
    return [{k: v for k, v in r.items() if k in SAME} for r in read_log(folder / "metrics.jsonl")]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- averages


def test_accumulation_is_one_batch_in_pieces(tmp_path):
    """1 x 4 = 2 x 2 = 4 x 1, with unequal numbers of valid tokens in the micro-batches."""
    results = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = make_model().double()
        recordings = make_recordings(tmp_path / "codes", LENGTHS, model.config, speechless=(1, 4))
        run = make_run(tmp_path / f"{batch}", data={"batch_size": batch, "accumulation": accumulation}, optim={"steps": 5})
        trainer = make_trainer(run, recordings, model)
        trainer.fit()
        results.append((weights(trainer), told(tmp_path / f"{batch}")))
    for other, records in results[1:]:
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(records, results[0][1])) < 1e-6
        assert max((other[name] - results[0][0][name]).abs().max().item() for name in other) < 1e-5


def test_the_normalizer_is_the_weight_of_the_whole_step(tmp_path):
    """The step's loss equals the model's own loss on all rows at once."""
    model = make_model()
    recordings = make_recordings(tmp_path / "codes", LENGTHS, model.config, speechless=(1,))
    run = make_run(tmp_path / "run", data={"batch_size": 1, "accumulation": 4}, optim={"steps": 1})
    trainer = make_trainer(run, recordings, model)
    twin = make_trainer(make_run(tmp_path / "twin", data={"batch_size": 4}, optim={"steps": 1}), recordings, make_model())
    batch = next(iter(Loader(twin.plan, twin.reader, 4, 1, 1, 0))).micro_batches[0][0]
    with torch.no_grad():
        whole = make_model().train()(**batch.inputs())
    trainer.fit()
    (record,) = told(tmp_path / "run")
    assert record["text_loss"] == pytest.approx(float(whole.text_loss), abs=1e-6)
    assert record["audio_loss"] == pytest.approx(float(whole.audio_loss), abs=1e-6)


def test_validation_covers_the_whole_set_with_right_averages(tmp_path):
    model = make_model()
    held_out = make_recordings(tmp_path / "held", [8, 13, 5], model.config, seed=5)
    trainer = make_trainer(make_run(tmp_path / "run", data={"window_seconds": 2.0}), held_out, model, held_out)
    scores = trainer.evaluate()
    reader = WindowReader(held_out, model.config.audio_delays, model.config.num_codebooks)
    sums, counts, hits = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for i, recording in enumerate(held_out):
        first, end = trainer.plan.firsts[i : i + 2].tolist()
        batch = reader[[trainer.plan.window_of(item) for item in range(first, end)]]
        assert batch.frames == recording.frames
        with torch.no_grad():
            output = model.eval()(**batch.inputs())
        weight = model.loss_weights(batch.text_labels, batch.audio_labels)
        sums += torch.stack([output.text_loss, output.audio_loss]) * weight
        counts += weight
        hits += torch.stack(word_hits(output.logits, batch.text_labels, model.config.text_padding_ids))
    assert scores["eval_text_loss"] == pytest.approx(float(sums[0] / counts[0]), abs=1e-5)
    assert scores["eval_audio_loss"] == pytest.approx(float(sums[1] / counts[1]), abs=1e-5)
    assert scores["eval_text_accuracy"] == pytest.approx(float(hits[0] / hits[1]))


# ---- lanes


def lane_loss(model, recordings, rows, window, carry):
    """Sum of (text, audio) losses of all recordings, cut into windows and carried."""
    from modeling_moshi_ttt.training.lanes import Lanes, WeightedOrder

    plan = Lanes([r.frames for r in recordings], WeightedOrder([len(recordings)], [1.0], None, epochs=1), rows, window)
    reader = WindowReader(recordings, model.config.audio_delays, model.config.num_codebooks)
    memory = LaneMemory(model, carry, 1, rows)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for step in Loader(plan, reader, rows, 1, 1, 0):
            batch = step.micro_batches[0][0]
            weight = memory.loss_weights(0, [batch])[0]
            cache = memory.enter(0, batch.reset)
            output = model.eval()(**batch.inputs(), past_key_values=cache, use_cache=cache is not None)
            memory.leave(0)
            sums += torch.stack([output.text_loss, output.audio_loss]).double() * weight.double()
            counts += weight.double()
    return sums, counts


@pytest.mark.parametrize("window", [3, 8, 11])
def test_windows_that_carry_sum_up_to_one_pass(tmp_path, window):
    model = make_model()
    for length in (21, 30):
        recordings = make_recordings(tmp_path / f"{length}", [length], model.config)
        whole = lane_loss(model, recordings, 1, 1000, "none")
        carried = lane_loss(model, recordings, 1, window, "state+attention")
        assert torch.equal(carried[1], whole[1])
        assert torch.allclose(carried[0], whole[0], rtol=1e-5)


def test_recordings_in_one_row_are_as_each_alone_and_rows_do_not_meet(tmp_path):
    model = make_model()
    recordings = make_recordings(tmp_path, LENGTHS, model.config)
    alone = [lane_loss(model, [recording], 1, 7, "state+attention") for recording in recordings]
    expected = sum(a[0] for a in alone), sum(a[1] for a in alone)
    for rows in (1, 3):
        found = lane_loss(model, recordings, rows, 7, "state+attention")
        assert torch.equal(found[1], expected[1])
        assert torch.allclose(found[0], expected[0], rtol=1e-5)


def test_carry_state_keeps_the_memory_and_drops_the_window(tmp_path):
    model = make_model()
    recordings = make_recordings(tmp_path, [30], model.config)
    values = [lane_loss(model, recordings, 1, 7, carry)[0] for carry in ("none", "state", "state+attention")]
    assert len({round(float(value[1]), 3) for value in values}) == 3


def test_carry_none_gives_the_plain_numbers(tmp_path):
    """Those of the model on each window of a recording alone."""
    model = make_model()
    recordings = make_recordings(tmp_path / "codes", LENGTHS, model.config)
    reader = WindowReader(recordings, model.config.audio_delays, model.config.num_codebooks)
    windows = [Window(i, t, min(7, n - t), True, t + 7 >= n) for i, n in enumerate(LENGTHS) for t in range(0, n, 7)]
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for window in windows:
        batch = reader[[window]]
        weight = model.loss_weights(batch.text_labels, batch.audio_labels).double()
        with torch.no_grad():
            output = model.eval()(**batch.inputs(), use_cache=False)
        expected += torch.stack([torch.stack([output.text_loss, output.audio_loss]).double() * weight, weight])
    found = lane_loss(model, recordings, 2, 7, "none")
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0], rtol=1e-5)


def test_gradients_reach_through_tbptt_windows(tmp_path):
    """Two windows under one backward give the gradient of one pass over both."""
    grads = []
    for window, turns in ((20, 1), (10, 2)):
        model = make_model(seed=3)
        recordings = make_recordings(tmp_path / "codes", [20, 20], model.config)
        data = {"window_seconds": window / 12.5, "carry": "state+attention", "tbptt_windows": turns}
        trainer = make_trainer(make_run(tmp_path / f"{turns}", data=data), recordings, model)
        step = next(iter(Loader(trainer.plan, trainer.reader, 2, 1, turns, 0)))
        model.train()
        whole = trainer.memory.loss_weights(0, step.micro_batches[0]).sum(0)
        trainer._micro_batch(0, step.micro_batches[0], whole)
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, one in grads[0].items():
        assert torch.allclose(one, grads[1][name], atol=1e-5 + 1e-4 * float(one.abs().max())), name
    assert any(name.endswith("ttt.W1") for name in grads[0])


# ---- bad steps


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_bad_steps_are_skipped_and_counted_and_stop_the_run(tmp_path, bad):
    model = make_model()
    recordings = make_recordings(tmp_path / "codes", LENGTHS, model.config)
    trainer = make_trainer(make_run(tmp_path / "run", optim={"steps": 9, "max_bad_steps": 3}), recordings, model)
    forward, calls = model.forward, []

    def sometimes(*args, **kwargs):
        calls.append(0)
        output = forward(*args, **kwargs)
        if len(calls) == 2 or len(calls) >= 5:
            if bad == "loss":
                output.text_loss = output.text_loss * float("nan")
            else:
                output.audio_loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    model.forward = sometimes
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*bad_batch-rank0\.safetensors"):
        trainer.fit()
    skipped = [r["skipped"] for r in told(tmp_path / "run")]
    assert skipped == [False, True, False, False, True, True]
    assert trainer.progress.bad_steps == 4
    assert all(torch.isfinite(p).all() for p in weights(trainer).values())
    assert not equal(before, weights(trainer))
    assert load_file(tmp_path / "run" / "bad_batch-rank0.safetensors")["0.0.input_ids"].shape[0] == 2


@pytest.mark.parametrize("carry", ["state", "state+attention"])
def test_nothing_of_a_bad_step_is_carried_on(tmp_path, carry):
    model, calls = make_model(), []

    def once(module, inputs, output):
        calls.append(0)
        return output * float("nan") if len(calls) == 2 else output

    model.decoder.model.layers[0].mlp.register_forward_hook(once)
    recordings = make_recordings(tmp_path / "codes", [40, 50, 60], model.config)
    make_trainer(make_run(tmp_path / "run", data={"carry": carry}), recordings, model).fit()
    assert [r["skipped"] for r in told(tmp_path / "run")] == [False, True, False, False]


# ---- resume

LONG = {
    "data": {"carry": "state+attention", "own_noise": 0.2, "text_noise": 0.1, "accumulation": 2},
    "optim": {"steps": 8},
    "checkpoint": {"every": 2, "keep": 2},
    "evaluate_every": 3,
}


def long_run(folder, **changes):
    settings = {**LONG, **changes}
    settings["data"] = {**LONG["data"], "evaluation": "unused", **changes.get("data", {})}
    run = make_run(folder / "run", "lora+ttt", **settings)
    run.lora.dropout = 0.1
    model = make_model()
    recordings = make_recordings(folder / "codes", LENGTHS, model.config)
    return make_trainer(run, recordings, model, make_recordings(folder / "held", [10, 12], model.config, seed=9))


class Killed(BaseException):
    """What stands for a kill inside one process."""


@pytest.mark.parametrize("stop", ["step", "save", "validation"])
def test_a_stopped_run_ends_as_an_unbroken_one(tmp_path, monkeypatch, stop):
    unbroken = long_run(tmp_path / "a")
    unbroken.fit()
    broken = long_run(tmp_path / "b")
    place = {"step": (type(broken), "_clip"), "save": (type(broken.folder), "_publish"), "validation": (type(broken), "evaluate")}[stop]
    original, calls = getattr(*place), []

    def dies(*args, **kwargs):
        calls.append(0)
        if len(calls) == {"step": 6, "save": 2, "validation": 2}[stop]:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*place, dies)
        with pytest.raises(Killed):
            broken.fit()
    again = long_run(tmp_path / "b")
    again.fit()
    assert equal(weights(again), weights(unbroken))
    assert told(tmp_path / "b" / "run") == told(tmp_path / "a" / "run")
    assert again.folder.steps() == unbroken.folder.steps()


@pytest.mark.parametrize(
    ("optimizer", "rate", "entries"),
    [("adafactor", 0.1, "step row_var col_var variance"), ("muon", 0.01, "step exp_avg exp_avg_sq momentum_buffer")],
)
def test_other_optimizers_learn_and_resume_exactly(tmp_path, monkeypatch, optimizer, rate, entries):
    rates = {"steps": 8, "optimizer": optimizer, "lr": rate, "ttt_lr": rate, "gate_lr": rate}
    (unbroken := long_run(tmp_path / "a", optim=rates)).fit()
    losses = [r["loss"] for r in told(tmp_path / "a" / "run") if "loss" in r]
    assert losses[-1] < losses[0]
    broken = long_run(tmp_path / "b", optim=rates)
    clip, calls = type(broken)._clip, []

    def dies(self):
        if calls.append(0) or len(calls) == 6:
            raise Killed
        return clip(self)

    with monkeypatch.context() as patch:
        patch.setattr(type(broken), "_clip", dies)
        with pytest.raises(Killed):
            broken.fit()
    again = long_run(tmp_path / "b", optim=rates)
    again.fit()
    assert equal(weights(again), weights(unbroken))
    assert told(tmp_path / "b" / "run") == told(tmp_path / "a" / "run")
    (shard,) = unbroken.folder.newest().glob("shard-*")
    assert {name.split("|")[1] for name in load_file(shard) if "|" in name} == set(entries.split())


def killed_run(folder, seconds):
    """Run in a forked process and kill -9 it after `seconds`; whether it was killed (and had not ended)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            long_run(folder, optim={"steps": 8}).fit()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_minus_nine_at_random_moments(tmp_path, kills):
    begin = time.monotonic()
    unbroken = long_run(tmp_path / "a")
    unbroken.fit()
    took = time.monotonic() - begin
    random = torch.Generator().manual_seed(0)
    runs, killed = 1, 0
    while killed < kills:
        if killed_run(tmp_path / f"{runs}", float(torch.rand(1, generator=random)) * 0.7 * took):
            killed += 1
        else:  # it came to its end: the kills go on with another run
            runs += 1
    for folder in (tmp_path / f"{run + 1}" for run in range(runs)):
        last = long_run(folder)
        last.fit()
        assert equal(weights(last), weights(unbroken))
        assert told(folder / "run") == told(tmp_path / "a" / "run")


def test_a_torn_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path, caplog):
    unbroken = long_run(tmp_path / "a")
    unbroken.fit()
    newest = unbroken.folder.newest()
    (shard,) = newest.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-7])
    again = long_run(tmp_path / "a")
    again.fit()
    assert "torn or altered" in caplog.text
    assert equal(weights(again), weights(unbroken))


def test_the_best_checkpoint_is_kept(tmp_path):
    trainer = long_run(tmp_path, checkpoint={"every": 1, "keep": 1})
    trainer.fit()
    scores = {r["step"]: r["eval_loss"] for r in told(tmp_path / "run") if "eval_loss" in r}
    assert trainer.progress.best_step == min(scores, key=scores.get)
    assert set(trainer.folder.steps()) == {trainer.progress.best_step, 8}


def test_another_configuration_is_refused_by_name(tmp_path):
    long_run(tmp_path, optim={"steps": 2}).fit()
    with pytest.raises(ValueError, match=r"another configuration: optim\.lr was .*; optim\.steps was 2 and is 1"):
        long_run(tmp_path, optim={"steps": 1, "lr": 1e-4}).fit()
    long_run(tmp_path, optim={"steps": 2}, checkpoint={"every": 7, "keep": 1}).fit()  # this touches no number


@pytest.mark.parametrize(
    ("schedule", "told_rates"),
    [("cosine", r"cosine is stretched over all 6.*factor was 0\.\d+ and is 0\.\d+"), ("constant", "constant goes on")],
)
def test_a_run_may_become_longer(tmp_path, caplog, schedule, told_rates):
    """With constant rates it is then the longer run to the bit; else it is told what happens to them."""
    rates = {"schedule": schedule, "warmup": 0}
    long_run(tmp_path / "b", optim={"steps": 3, **rates}).fit()
    longer = long_run(tmp_path / "b", optim={"steps": 6, **rates})
    longer.fit()
    assert re.search(rf"optim\.steps was 3 and is 6: the schedule {told_rates}.* in step 4", caplog.text)
    assert [r["step"] for r in told(tmp_path / "b" / "run") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    whole = long_run(tmp_path / "a", optim={"steps": 6, **rates})
    whole.fit()
    assert equal(weights(whole), weights(longer)) == (schedule == "constant")


def test_micro_batches_may_be_exchanged_only_where_that_is_exact(tmp_path):
    def run(name, steps, **data):
        trainer = make_trainer(
            make_run(tmp_path / name, data={"own_noise": 0.2, **data}, optim={"steps": steps}, checkpoint={"every": 1}),
            make_recordings(tmp_path / "codes", LENGTHS, make_model().config),
            make_model(),
        )
        trainer.fit()
        return trainer

    whole = run("a", 3, batch_size=2, accumulation=2)
    original = type(whole)._after_step

    def after(self, metrics):
        original(self, metrics)
        if self.progress.step == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(whole), "_after_step", after)
        with pytest.raises(Killed):
            run("b", 3, batch_size=2, accumulation=2)
    again = run("b", 3, batch_size=4, accumulation=1)
    for name, weight in weights(again).items():
        assert torch.allclose(weight, weights(whole)[name], atol=1e-5), name
    run("c", 1, batch_size=2, accumulation=2, carry="state")
    with pytest.raises(ValueError, match=r"data\.accumulation was 2 and is 1; data\.batch_size was 2 and is 4"):
        run("c", 1, batch_size=4, accumulation=1, carry="state")


def test_a_run_stopped_before_its_first_checkpoint_tells_nothing_twice(tmp_path, monkeypatch):
    def dies(*_):
        raise Killed

    first = long_run(tmp_path, optim={"steps": 2}, evaluate_start=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(first), "_clip", dies)
        with pytest.raises(Killed):
            first.fit()
    long_run(tmp_path, optim={"steps": 2}, evaluate_start=True).fit()
    assert [r["step"] for r in told(tmp_path / "run")] == [0, 1, 2, 2]


def test_another_number_of_processes_is_refused_with_the_reason(tmp_path):
    trainer = long_run(tmp_path)
    for reason in (r"data\.carry", r"lora\.dropout"):  # the second where the first does not hold
        with pytest.raises(ValueError, match=rf"written by 2 processes and there are 1: .*{reason}.* Resume with 2"):
            trainer._check_world({"world": 2})
        trainer.run.data.carry = "none"


def test_workers_give_the_same_batches(tmp_path):
    model = make_model()
    recordings = make_recordings(tmp_path / "codes", LENGTHS, model.config)
    found = []
    for workers in (0, 1):
        trainer = make_trainer(make_run(tmp_path / f"{workers}"), recordings, make_model())
        steps = iter(Loader(trainer.plan, trainer.reader, 2, 1, 1, 0, workers))
        found.append([next(steps) for _ in range(3)])
    for one, other in zip(*found):
        assert one.state == other.state
        assert torch.equal(one.micro_batches[0][0].input_ids, other.micro_batches[0][0].input_ids)


def test_a_dead_worker_is_told_in_words_and_the_run_goes_on(tmp_path):
    """A real process that is really killed."""
    unbroken = long_run(tmp_path / "a", optim={"steps": 4})
    unbroken.fit()
    broken = long_run(tmp_path / "b", optim={"steps": 4}, data={"workers": 1})
    broken.reader = DyingReader(broken.reader, lives=7)  # two micro-batches a step: killed in the fourth step's second
    with uncollected(), pytest.raises(OSError, match=r"data worker died.*goes on from the last checkpoint.*data\.workers=0"):
        broken.fit()
    again = long_run(tmp_path / "b", optim={"steps": 4})
    again.fit()
    assert equal(weights(again), weights(unbroken))
    assert told(tmp_path / "b" / "run") == told(tmp_path / "a" / "run")


# ---- a full disk


def test_a_run_on_a_full_disk_stops_in_words_and_goes_on_when_there_is_room(tmp_path, small_disk):
    if small_disk is None:
        pytest.skip("no file system may be mounted here; test_training_checkpoint.py fills a file up to a limit instead")
    unbroken = long_run(tmp_path)
    unbroken.fit()
    full = long_run(small_disk)
    save = full.save

    def save_and_fill():
        save()
        if full.progress.step == 4:
            full.folder.wait()
            (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))

    full.save = save_and_fill
    with pytest.raises(OSError, match=r"(No space left|make room)"):
        full.fit()
    assert full.folder.newest() == full.folder.path(4)
    assert not list((small_disk / "run" / "checkpoints").glob(".*"))
    (small_disk / "ballast").unlink()
    again = long_run(small_disk)
    again.fit()
    assert equal(weights(again), weights(unbroken))
    assert told(small_disk / "run") == told(tmp_path / "run")


def test_metrics_lose_their_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + '{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 1.0}]

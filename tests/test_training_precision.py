"""bf16 training with float32 TTT, and recomputed layers that change nothing, also with memory carried through them."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.training import setup
from modeling_moshi_ttt.training.windows import Loader

LENGTHS = [21, 13, 30, 9]


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision for the whole process; other tests use another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("mode", ["lora+ttt", "ttt", "full"])
def test_bf16_base_trains_with_float32_ttt(tmp_path, mode):
    model = make_model().to(torch.bfloat16)
    recordings = make_recordings(tmp_path / "codes", LENGTHS, model.config)
    run = make_run(tmp_path / "run", mode, data={"carry": "state+attention"}, optim={"steps": 3})
    trainer = make_trainer(run, recordings, model, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.fit()
    assert trainer.progress.bad_steps == 0
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    (cache,) = trainer.memory.caches
    state = cache.ttt_state(model.config.ttt_layers[0])
    assert state.W1.dtype == state.b1.dtype == torch.float32


@pytest.mark.parametrize("carry", ["none", "state", "state+attention"])
def test_recomputing_layers_changes_no_gradient(tmp_path, carry):
    turns = 1 if carry == "none" else 2
    grads = []
    for checkpointing in (False, True):
        model = make_model(seed=3).double()
        if checkpointing:
            model.activation_checkpointing_enable()
        recordings = make_recordings(tmp_path / "codes", [30, 26], model.config)
        run = make_run(tmp_path / f"{checkpointing}", data={"carry": carry, "tbptt_windows": turns})
        trainer = make_trainer(run, recordings, model)
        steps = iter(Loader(trainer.plan, trainer.reader, 2, 1, turns, 0))
        model.train()
        for _ in range(2):  # the second step begins with memory from the first
            batches = next(steps).micro_batches[0]
            trainer._micro_batch(0, batches, trainer.memory.loss_weights(0, batches).sum(0))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=0, atol=1e-10) for name in grads[0])


@pytest.fixture
def matmul_precision():
    """The process-wide setting, put back afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("dtype", "launcher", "asked", "expected"),
    [
        ("bfloat16", "no", None, "high"),
        ("float32", "no", None, "highest"),
        ("float32", "bf16", None, "high"),
        ("bfloat16", "no", "highest", "highest"),
        ("float32", "no", "medium", "medium"),
    ],
)
def test_float32_products_are_as_precise_as_asked(tmp_path, monkeypatch, matmul_precision, dtype, launcher, asked, expected):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    run = make_run(tmp_path)
    run.model.dtype, run.model.matmul_precision = dtype, asked
    accelerator = setup.make_accelerator(run)
    assert accelerator.mixed_precision == ("bf16" if "bf" in dtype + launcher else "no")
    assert matmul_precision() == expected


def test_half_precision_that_would_need_scaled_losses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="the launcher's mixed_precision is 'fp16'; it must be no or bf16"):
        setup.make_accelerator(make_run(tmp_path))


@pytest.mark.usefixtures("fresh_accelerate")
def test_processes_that_do_not_know_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched and accelerate sees 1.*ACCELERATE_USE_CPU=true"):
        setup.make_accelerator(make_run(tmp_path))

"""Learning rates and beta1: moshi-finetune's one cycle, and the plain ones."""

import pytest
import torch
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.training.run_config import OptimSettings
from modeling_moshi_ttt.training.schedule import beta1, rate_factor, set_rates


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.05), (37, 0.3), (37, 0.0), (12, 1.0), (3, 0.5), (1, 0.05)])
def test_one_cycle_is_torchs(steps, warmup):
    """Rates and AdamW's beta1, as moshi-finetune's scheduler gives them."""
    settings = OptimSettings(steps=steps, warmup=warmup, lr=1.0, weight_decay=0.0)
    ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.95)) for _ in range(2))
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=1.0, total_steps=steps, pct_start=warmup)
    for step in range(steps):
        set_rates(ours.param_groups, [1.0], step, settings)
        (group,), (wanted,) = ours.param_groups, theirs.param_groups
        assert group["lr"] == pytest.approx(wanted["lr"], abs=1e-12)
        assert group["betas"] == pytest.approx(wanted["betas"], abs=1e-12)
        theirs.step()
        if step < steps - 1:
            schedule.step()


def test_a_peak_in_the_first_step_is_no_division_by_zero():
    """Torch's own fails there: 10 steps with a warm-up of 0.1."""
    settings = OptimSettings(steps=10, warmup=0.1)
    assert (rate_factor(0, settings), beta1(0, settings)) == (1.0, 0.85)


def test_other_schedules_keep_beta1_and_adafactor_has_none():
    cosine = [rate_factor(step, OptimSettings(steps=20, warmup=0.1, schedule="cosine")) for step in range(20)]
    assert cosine[2] == 1.0
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert cosine[-1] < 0.02
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    adam, adafactor = torch.optim.AdamW([parameter]), torch.optim.Adafactor([parameter])
    for schedule in ("cosine", "constant"):
        set_rates(adam.param_groups, [1.0], 5, OptimSettings(steps=20, schedule=schedule, betas=[0.7, 0.95]))
        assert adam.param_groups[0]["betas"][0] == 0.7
    set_rates(adafactor.param_groups, [2.0], 5, OptimSettings(steps=20, warmup=0.5))
    assert adafactor.param_groups[0]["lr"] == 2.0 * rate_factor(5, OptimSettings(steps=20, warmup=0.5))
    assert "betas" not in adafactor.param_groups[0]


def test_the_optimizer_steps_with_the_rates_and_beta1_of_each_step(tmp_path):
    model = make_model()
    trainer = make_trainer(
        make_run(tmp_path, optim={"steps": 6, "warmup": 0.5}), make_recordings(tmp_path / "codes", [20] * 4, model.config), model
    )
    taken, step = [], trainer.optimizer.step

    def recorded(*args, **kwargs):
        taken.append([(group["lr"], group["betas"]) for group in trainer.optimizer.param_groups])
        return step(*args, **kwargs)

    trainer.optimizer.step = recorded
    trainer.fit()
    settings = trainer.run.optim
    assert taken == [[(rate * rate_factor(s, settings), (beta1(s, settings), 0.95)) for rate in trainer.rates] for s in range(6)]
    assert len({group[0][1] for group in taken}) > 3

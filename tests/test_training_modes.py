"""Modes change exactly what they name, and adapters come back to the bit."""

import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.training import modes
from modeling_moshi_ttt.training.run_config import LoraSettings, OptimSettings

TEMPORAL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2")


def expected(mode, name):
    """Whether the parameter `name`, without PEFT's wrappers, is named by the mode."""
    ttt = modes.is_ttt_parameter(name)
    lora = ".lora_" in name
    return {"full": True, "lora": lora, "ttt": ttt, "lora+ttt": lora or ttt}[mode]


def plain(name):
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@pytest.mark.parametrize("mode", ["lora", "ttt", "lora+ttt", "full"])
def test_exactly_the_named_parameters_change(tmp_path, mode):
    model = make_model()
    trainer = make_trainer(
        make_run(tmp_path, mode, optim={"steps": 3, "weight_decay": 0.1}),
        make_recordings(tmp_path / "codes", [20] * 4, model.config),
        model,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        # LoRA's A moves only when its B has left zero; after three steps both have
        named = expected(mode, plain(name)) and "original_module" not in name
        assert changed == named, name
    trained = {plain(name) for name, p in trainer.model.named_parameters() if p.requires_grad}
    if "ttt" in mode or mode == "full":
        assert any(name.endswith("ttt_gate.gating_alpha") for name in trained)
        assert any(name.endswith("ttt.W1") for name in trained)
        assert any(name.endswith("ttt_layernorm.weight") for name in trained)
    if "lora" in mode:
        adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
        layers = range(model.config.num_hidden_layers)
        assert {a.removesuffix(".linear") for a in adapted} == {f"decoder.model.layers.{i}.{part}" for i in layers for part in TEMPORAL}


def test_frozen_changes_nothing_and_refuses_an_optimizer():
    model = modes.apply(make_model(), "frozen")
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="Nothing is trainable.*frozen"):
        modes.parameter_groups(model.named_parameters(), OptimSettings(lr=1e-3))


def inputs(config, rows=2, frames=11):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(4, config.vocab_size, (rows, frames), generator=generator)
    codes = torch.randint(config.audio_vocab_size, (rows, 2 * config.num_codebooks, frames), generator=generator)
    return {"input_ids": text, "moshi_audio_codes": codes[:, : config.num_codebooks], "user_audio_codes": codes[:, config.num_codebooks :]}


@torch.no_grad()
def answers(model, config):
    output = model.eval()(**inputs(config), use_cache=False)
    return output.logits, output.audio_logits


@pytest.mark.parametrize("mode", ["lora", "ttt", "lora+ttt", "lora+depth+embeddings"])
def test_adapter_round_trip(tmp_path, mode):
    run = make_run(tmp_path / "run", mode.replace("+depth+embeddings", ""))
    if "depth" in mode:
        run.lora = LoraSettings(rank=2, scaling=2.0, depth_decoder=True, embeddings=True)
    model = make_model()
    config = model.config
    trainer = make_trainer(run, make_recordings(tmp_path / "codes", [20] * 4, config), model)
    trainer.fit()
    with torch.no_grad():  # four steps move little; what is merged must show
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = answers(trainer.model, config)
    assert not torch.allclose(trained[0], answers(make_model(), config)[0], atol=1e-2)
    assert not torch.equal(trained[0], answers(make_model(), config)[0])
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(answers(loaded, config), trained))
    merged = loaded.merge_and_unload()
    assert not any(".lora_" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
    once = answers(merged, config)
    # LoRA's product is added to the weights, in another order of sums; TTT layers only change places
    assert all(torch.allclose(a, b, rtol=0, atol=0.0 if mode == "ttt" else 1e-5) for a, b in zip(once, trained))
    merged.save_pretrained(tmp_path / "merged")
    again = answers(type(merged).from_pretrained(tmp_path / "merged"), config)
    assert all(torch.equal(a, b) for a, b in zip(again, once))


def test_groups_have_their_rates_and_decay_spares_norms_biases_gates():
    model = modes.apply(make_model(), "full")
    groups = modes.parameter_groups(model.named_parameters(), OptimSettings(lr=1e-3, ttt_lr=2e-3, gate_lr=3e-3))
    table = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(table) == len(list(model.parameters()))
    by_name = {name: table[id(p)] for name, p in model.named_parameters()}
    layer = f"decoder.model.layers.{model.config.ttt_layers[0]}."
    assert by_name[layer + "ttt_gate.gating_alpha"] == (3e-3, 0.0)
    assert by_name[layer + "ttt.W1"] == (2e-3, 0.1)
    for spared in (
        "ttt.b1",
        "ttt.ttt_norm_weight",
        "ttt.learnable_token_weight",
        "ttt.learnable_ttt_lr_weight",
        "ttt_layernorm.weight",
        "ttt.wq.bias",
    ):
        assert by_name[layer + spared] == (2e-3, 0.0)
    assert by_name["decoder.model.layers.0.input_layernorm.weight"] == (1e-3, 0.0)
    assert by_name["decoder.model.layers.0.mlp.fc1.weight"] == (1e-3, 0.1)


def test_gates_are_spared_by_their_name_whatever_their_shape():
    shapes = {"ttt_gate.gating_alpha": (2, 3), "ttt.W1": (2, 3, 3)}
    named = [(f"decoder.model.layers.0.{name}", torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    groups = modes.parameter_groups(named, OptimSettings(lr=1e-3, ttt_lr=2e-3, gate_lr=3e-3))
    assert {group["name"]: group["weight_decay"] for group in groups} == {"gate, no decay": 0.0, "ttt": 0.1}


def test_frozen_copies_are_dropped_in_training(tmp_path):
    trainer = make_trainer(make_run(tmp_path / "run", "lora+ttt"), make_recordings(tmp_path / "codes", [20] * 4, make_model().config))
    assert not any("original_module" in name for name, _ in trainer.model.named_parameters())
    with trainer.model.disable_adapter(), pytest.raises(RuntimeError, match="load the adapter anew"):
        answers(trainer.model, trainer.config)
    assert answers(trainer.model, trainer.config)[0].isfinite().all()


def test_adafactor_keeps_rows_and_columns(tmp_path):
    """What benchmarks/train_memory.py counts is what the optimizers hold."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from train_memory import moment_bytes

    held = {}
    for optimizer in ("adamw", "adafactor"):
        run = make_run(tmp_path / optimizer, "lora+ttt", optim={"steps": 1, "optimizer": optimizer})
        trainer = make_trainer(run, make_recordings(tmp_path / "codes", [20] * 4, make_model().config))
        trainer.fit()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        tensors = [t for p in trained for name, t in trainer.optimizer.state[p].items() if name != "step"]
        held[optimizer] = sum(t.numel() * t.element_size() for t in tensors)
        assert held[optimizer] == sum(moment_bytes(optimizer, p) for p in trained)
    assert held["adafactor"] < held["adamw"] / 3


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_under_fsdp_only_adamw_is_taken(optimizer):
    with pytest.raises(ValueError, match=f"`optim.optimizer={optimizer}` must be adamw"):
        modes.make_optimizer(make_model().named_parameters(), OptimSettings(optimizer=optimizer), sharded=True)


def test_muon_moves_the_matrices_of_linear_layers_and_adamw_all_else():
    """Each exactly as torch's own optimizer would, with one changing learning rate."""
    settings = OptimSettings(optimizer="muon", lr=1e-2, ttt_lr=3e-3, betas=[0.8, 0.9], weight_decay=0.1)
    models = [modes.apply(make_model(), "full") for _ in range(2)]
    both = modes.make_optimizer(models[0].named_parameters(), settings, sharded=False)
    matrix = re.compile(r"(proj\.linear|fc[12]|ttt\.w[qkvo])\.weight$")
    named = list(models[1].named_parameters())
    alone = []
    for name, parameter in named:
        lr = 3e-3 if modes.is_ttt_parameter(name) and modes.GATE not in name else 1e-2
        if parameter.dim() == 2 and matrix.search(name):
            alone.append(torch.optim.Muon([parameter], lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        else:
            decay = next(g["weight_decay"] for g in both.param_groups for p in g["params"] if p is dict(models[0].named_parameters())[name])
            alone.append(torch.optim.AdamW([parameter], lr=lr, betas=(0.8, 0.9), weight_decay=decay))
    assert sum(isinstance(each, torch.optim.Muon) for each in alone) > 5
    for factor in (1.0, 0.5):
        for group, rate in zip(both.param_groups, [3e-3 if g["name"].startswith("ttt") else 1e-2 for g in both.param_groups]):
            group["lr"] = rate * factor
        for first, second in zip(*(model.parameters() for model in models)):
            first.grad = torch.randn_like(first)
            second.grad = first.grad.clone()
        both.step()
        for each in alone:
            each.param_groups[0]["lr"] *= 1.0 if factor == 1.0 else 0.5
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_table_counts_every_parameter_once():
    model = make_model()
    total = sum(p.numel() for p in model.parameters())
    adapted = modes.apply(model, "lora+ttt", LoraConfig(r=2, target_modules=modes.TEMPORAL))
    lines = {
        line.split()[0]: [int(x.replace(",", "")) for x in line.split()[1:]] for line in modes.parameter_table(adapted).splitlines()[1:]
    }
    lora = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
    assert lines["lora"] == [lora, 0]
    assert lines["base"][0] == lines["ttt"][1] == lines["gate"][1] == 0
    assert sum(lines["all"]) == total + lora


@pytest.mark.parametrize(
    ("mode", "lora", "message"),
    [
        ("lroa", None, "mode is 'lroa'"),
        ("lora", None, "give a LoraConfig"),
        ("full", LoraConfig(), "leave the LoraConfig out"),
    ],
)
def test_wrong_modes(mode, lora, message):
    with pytest.raises(ValueError, match=message):
        modes.apply(make_model(), mode, lora)


def test_ttt_mode_needs_ttt_layers_and_depth_lora_no_dropout():
    with pytest.raises(ValueError, match="no TTT layers"):
        modes.apply(make_model(ttt_layers=[]), "ttt")
    with pytest.raises(ValueError, match="lora.dropout"):
        modes.lora_config(LoraSettings(rank=2, dropout=0.1, depth_decoder=True), make_model())


def test_half_precision_base_keeps_what_is_trained_in_float32():
    adapted = modes.apply(make_model().to(torch.bfloat16), "lora+ttt", LoraConfig(r=2, target_modules=modes.TEMPORAL))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}

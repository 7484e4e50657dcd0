"""What is trained: frozen, lora, ttt, lora+ttt or full, by PEFT's own means, so that one adapter folder holds LoRA and TTT weights.

LoRA (Hu et al. 2021) adapts the temporal transformer, and by choice the depth decoder and the embeddings; TTT layers, their norms and
gates are trained whole, through PEFT's `modules_to_save`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors_moshi_ttt import MoshiTTTError
from .optimizers import MuonWithAdamW
from .run_config import LoraSettings, OptimSettings

MODES = ("frozen", "lora", "ttt", "lora+ttt", "full")
TTT_MODULES = ["ttt", "ttt_layernorm", "ttt_gate"]
TEMPORAL = r"decoder\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj\.linear|mlp\.fc[12])"
EMBEDDINGS = r"(decoder\.model\.embed_tokens|embed_tokens\.\d+)"
GATE = "gating_alpha"
Kind = Literal["base", "lora", "ttt", "gate"]
_TTT_NAME = re.compile(r"(^|\.)(ttt|ttt_layernorm|ttt_gate)\.")
_INNER_LR = ("learnable_ttt_lr_weight", "learnable_ttt_lr_bias", "learnable_token_weight")
_INNER_NORM_OR_BIAS = ("ttt_norm_weight", "ttt_norm_bias", "b1", "b2")


def is_ttt_parameter(name: str) -> bool:
    """Whether a parameter belongs to a TTT layer, its norm or its gate, whatever wrappers have put into its name."""
    return bool(_TTT_NAME.search(name)) or GATE in name.split(".")


def kind_of(name: str) -> Kind:
    """Which table row and learning rate a parameter belongs to."""
    if GATE in name.split("."):
        return "gate"
    if is_ttt_parameter(name):
        return "ttt"
    return "lora" if ".lora_" in name else "base"


def lora_config(settings: LoraSettings, model: nn.Module) -> LoraConfig:
    """PEFT's configuration for these settings.

    Raises:
        ValueError: dropout together with the depth decoder, whose 3-D weights PEFT adapts without it.
    """
    if settings.depth_decoder and settings.dropout:
        raise MoshiTTTError(
            f"lora.dropout is {settings.dropout} with lora.depth_decoder; the depth decoder's weights need lora.dropout: 0."
        )
    target = f"({TEMPORAL}|{EMBEDDINGS})" if settings.embeddings else TEMPORAL
    depth = [name for name, p in model.named_parameters() if name.startswith("depth_decoder.layers.") and p.dim() == 3]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank * settings.scaling,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=target,
        target_parameters=depth if settings.depth_decoder else None,
    )


def apply(model: nn.Module, mode: str, lora: LoraConfig | None = None) -> Any:
    """Mark what is trained; modes other than frozen and full return a PeftModel around `model`.

    Args:
        mode: "frozen", "lora", "ttt", "lora+ttt" or "full".
        lora: needed by the modes with LoRA, refused by the others.

    Raises:
        ValueError: an unknown mode, one without its settings, or a TTT mode on a model without TTT layers.
    """
    if mode not in MODES:
        raise MoshiTTTError(f"mode is {mode!r}, it must be one of {', '.join(MODES)}.")
    if ("lora" in mode) != (lora is not None):
        cure = "give a LoraConfig" if lora is None else "leave the LoraConfig out"
        raise MoshiTTTError(f"mode is {mode!r}: {cure}.")
    if "ttt" in mode and not any(is_ttt_parameter(name) for name, _ in model.named_parameters()):
        raise MoshiTTTError(f"mode is {mode!r} but the model has no TTT layers; set model.ttt: {{ttt_layers: …}}.")
    adapted: Any = model
    if mode in ("frozen", "full"):
        model.requires_grad_(mode == "full")
    else:
        config = lora if lora is not None else LoraConfig(target_modules=DUMMY_TARGET_MODULES)
        if "ttt" in mode:
            config.modules_to_save = list(TTT_MODULES)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small steps vanish in 8 bits of mantissa
    return adapted


class _Gone(nn.Module):
    """In the place of a frozen copy that was dropped."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("The base's own TTT layers were dropped to spare memory; load the adapter anew to switch it off.")


def drop_copies(adapted: nn.Module) -> Any:
    """Let go of the frozen copies that PEFT keeps of modules it trains whole (1.3 GB of the 7B), for switching the adapter off.

    What is saved, loaded and merged does not need them.
    """
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = _Gone()
    return adapted


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings, sharded: bool) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over groups with their rates.

    Args:
        sharded: whether parameters are split over ranks (FSDP).

    Raises:
        ValueError: nothing is trainable, or an optimizer that FSDP cannot shard with sharded parameters.
    """
    if sharded and settings.optimizer != "adamw":
        raise MoshiTTTError(
            f"`optim.optimizer={settings.optimizer}` must be adamw under FSDP, where rows and columns of a weight are cut; choose adamw."
        )
    groups = parameter_groups(named_parameters, settings)
    # one weight after another where memory is short: torch's way for many at once holds another copy of all weights during the step
    many = None if sharded else False
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), foreach=many)  # type: ignore[arg-type]
    if settings.optimizer == "muon":
        return MuonWithAdamW(groups, (settings.betas[0], settings.betas[1]))
    return torch.optim.Adafactor(groups, lr=settings.lr, foreach=False)


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups for the optimizer: base and LoRA, TTT weights, gates, each with its rate; no decay on norms, biases, gates and inner rates.
    For Muon the matrices of linear layers apart, marked as `matrices`.

    Raises:
        ValueError: nothing is trainable.
    """
    lr, muon = settings.lr, settings.optimizer == "muon"
    ttt_lr, gate_lr = (lr if own is None else own for own in (settings.ttt_lr, settings.gate_lr))
    rates = {"base": lr, "lora": lr, "ttt": ttt_lr, "gate": gate_lr}
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decays = _decays(name, parameter)
            groups.setdefault((kind_of(name), decays, muon and decays and _is_matrix(name, parameter)), []).append(parameter)
    if not groups:
        raise MoshiTTTError(
            "Nothing is trainable (mode 'frozen'): there is nothing for an optimizer to do; choose lora, ttt, lora+ttt or full."
        )
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": settings.weight_decay if decays else 0.0,
            "name": f"{kind}{', matrices' if matrices else '' if decays else ', no decay'}",
            "matrices": matrices,
        }
        for (kind, decays, matrices), parameters in groups.items()
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    own = name.split(".")
    exempt = parameter.dim() < 2 or GATE in own or any(part in _INNER_LR + _INNER_NORM_OR_BIAS for part in own)
    return not exempt


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it maps features to features: embeddings and the text head, which map from or to tokens, do not."""
    return parameter.dim() == 2 and not any(part.startswith(("embed_tokens", "lm_head", "text_embed")) for part in name.split("."))


def parameter_table(model: nn.Module) -> str:
    """Trainable and frozen parameters by kind, as lines of text. PEFT's frozen copies of TTT modules are not counted twice."""
    counts = {kind: [0, 0] for kind in ("base", "lora", "ttt", "gate")}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            counts[kind_of(name)][0 if parameter.requires_grad else 1] += parameter.numel()
    counts["all"] = [sum(pair[i] for pair in counts.values()) for i in range(2)]
    lines = [f"{'parameters':<12}{'trainable':>16}{'frozen':>16}"]
    lines += [f"{kind:<12}{trainable:>16,}{frozen:>16,}" for kind, (trainable, frozen) in counts.items()]
    return "\n".join(lines)

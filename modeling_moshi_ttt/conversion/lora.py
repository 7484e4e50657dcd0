"""moshi-finetune's LoRA files and PEFT adapters, both ways, by the same table as whole checkpoints.

A LoRA pair adds `scaling · B A` to a weight. Splitting, stacking and rotary order act on the rows of a weight, hence on B alone; A is
shared by the parts that a joint projection is split into. On the way back q, k and v of a PEFT adapter may each have their own A: then
the three stand side by side in a pair of three times the rank, and every other pair is filled up with zeros, so that the sum is the same.
Embeddings that were trained whole (moshi-finetune's `lora.ft_embed`) are PEFT's `modules_to_save`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters.bases import AUTO_MAPPING
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError
from .tables import Group, as_spelled, check_names, moshi_groups, ttt_names

PEFT_PREFIX = "base_model.model."
Pair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]; with the codebooks in front where the weight is stacked


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _pairs(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Pair]:
    """Weight name -> its pair. Raises ValueError for an A without its B."""
    pairs = {}
    for name in state:
        if name.endswith(".lora_A.weight"):
            other = name.replace(".lora_A.", ".lora_B.")
            if other not in state:
                raise MoshiTTTError(f"missing: {other}")
            pairs[name.removeprefix(prefix).replace(".lora_A.weight", ".weight")] = (state[name], state[other])
    return pairs


def _adaptable(config: MoshiTTTConfig) -> list[Group]:
    """Groups of projections: what LoRA adapts. Norms and embeddings are left out."""
    return [group for group in moshi_groups(config) if len(group.kyutai_shape) == 2 and "emb" not in group.kyutai[0]]


def _embeddings(config: MoshiTTTConfig) -> list[Group]:
    """What moshi-finetune's `lora.ft_embed` trains whole beside LoRA: its parameters with "emb" in their names."""
    return [group for group in moshi_groups(config) if "emb" in group.kyutai[0]]


def lora_to_peft(state: Mapping[str, Tensor], config: MoshiTTTConfig) -> dict[str, Tensor]:
    """A moshi-finetune LoRA state dict under PEFT's names. Raises ValueError naming keys that are no LoRA weights of this model."""
    pairs = _pairs(state)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for split in _adaptable(config):
        group = as_spelled(split, pairs.keys())
        present = [name for name in group.kyutai if name in pairs]
        if not present:
            continue
        check_names(present, group.kyutai, "LoRA weights of one projection")
        used |= set(present)
        ups = group.to_here([pairs[name][1] for name in group.kyutai])
        for name, up in zip(group.here, ups):
            downs = [pairs[kyutai][0] for kyutai in group.kyutai]
            if group.kyutai != split.kyutai:  # fused: all codebooks' A stand in one tensor
                downs = list(downs[0].chunk(len(split.kyutai)))
            found |= _to_peft(name, torch.stack(downs) if up.dim() == 3 else downs[0], up)
    known = {f"{_module(name)}.lora_{side}.weight" for name in used for side in "AB"}
    whole = [group for group in _embeddings(config) if group.kyutai[0] in state]
    check_names(state.keys(), known | {group.kyutai[0] for group in whole}, "moshi-finetune's LoRA file")
    return found | {PEFT_PREFIX + group.here[0]: group.to_here([state[group.kyutai[0]]])[0] for group in whole}


def _to_peft(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if up.dim() == 3:  # PEFT holds stacked weights as A [K·r, in], codebook first, and B [out, r·K], codebook last
        down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
    stem = PEFT_PREFIX + _module(name)
    # q, k and v get a copy of their common A each: a file holds no tensor twice
    return {f"{stem}.lora_A.weight": down.clone(memory_format=torch.contiguous_format), f"{stem}.lora_B.weight": up.contiguous()}


def peft_to_lora(state: Mapping[str, Tensor], config: MoshiTTTConfig, rank: int, keep_ttt: bool = False) -> dict[str, Tensor]:
    """A PEFT adapter's weights under moshi-finetune's names; the rank may come out three times as large, see above.

    Raises ValueError for TTT weights, which moshi-finetune has no place for, unless `keep_ttt` keeps them under their own names.
    """
    pairs = _pairs(state, PEFT_PREFIX)
    saved = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in _saved(state).items()}
    whole = [group for group in _embeddings(config) if group.here[0] in saved]
    ttt = {name: tensor for name, tensor in saved.items() if name not in {group.here[0] for group in whole}}
    if ttt and not keep_ttt:
        raise MoshiTTTError(
            f"the adapter holds TTT weights ({sorted(ttt)[0]} and {len(ttt) - 1} more), which Kyutai's code has no place for; "
            "keep them under their own names with --keep-ttt"
        )
    check_names(ttt, [name for name in ttt_names(config) if name in ttt], "TTT weights")
    groups = [group for group in _adaptable(config) if any(name in pairs for name in group.here)]
    known = {f"{PEFT_PREFIX}{_module(name)}.lora_{side}.weight" for group in groups for name in group.here for side in "AB"}
    check_names([name for name in state if ".lora_" in name], [name for name in state if name in known], "the PEFT adapter")
    split = {group: _from_peft(group, pairs, rank) for group in groups}
    shared = all(_one_a(parts) for parts in split.values())
    found = ttt | {group.kyutai[0]: group.to_kyutai([saved[group.here[0]]])[0] for group in whole}
    for group, parts in split.items():
        found |= _to_lora(group, parts, rank if shared else 3 * rank, shared)
    return found


def _saved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that PEFT saved whole: all that are no LoRA pair."""
    return {name: tensor for name, tensor in state.items() if ".lora_" not in name}


def _from_peft(group: Group, pairs: Mapping[str, Pair], rank: int) -> list[Pair]:
    """The pair of each part of a group, codebooks in front; a part that is not adapted is zero."""
    parts = []
    for name in group.here:
        *stack, rows, columns = group.here_shape
        if name not in pairs:
            down, up = torch.zeros(*stack, rank, columns), torch.zeros(*stack, rows, rank)
        else:
            down, up = pairs[name]
            if stack:
                down, up = down.unflatten(0, (stack[0], rank)), up.unflatten(1, (rank, stack[0])).permute(2, 0, 1)
        if tuple(down.shape) != (*stack, rank, columns) or tuple(up.shape) != (*stack, rows, rank):
            raise MoshiTTTError(
                f"the LoRA pair of {name} has shapes {list(down.shape)} and {list(up.shape)}: they fit neither rank {rank} nor the weight"
            )
        parts.append((down, up))
    return parts


def _one_a(parts: list[Pair]) -> bool:
    """Whether all adapted parts of a joint projection share their A."""
    adapted = [down for down, up in parts if up.any()]
    return all(torch.equal(down, adapted[0]) for down in adapted)


def _to_lora(group: Group, parts: list[Pair], rank: int, shared: bool) -> dict[str, Tensor]:
    """One group's pairs under Kyutai's names, at `rank`."""
    if shared:
        down = next((down for down, up in parts if up.any()), parts[0][0])
        ups = [up for _, up in parts]
    else:
        own = parts[0][0].shape[-2]
        down = torch.cat([down for down, _ in parts], dim=-2)
        ups = [torch.nn.functional.pad(up, (i * own, rank - (i + 1) * own)) for i, (_, up) in enumerate(parts)]
        down = torch.nn.functional.pad(down, (0, 0, 0, rank - down.shape[-2]))
    downs = list(down) if down.dim() == 3 else [down]
    joint = group.to_kyutai(ups)
    stems = [_module(name) for name in group.kyutai]
    return {f"{stem}.lora_A.weight": one.contiguous() for stem, one in zip(stems, downs)} | {
        f"{stem}.lora_B.weight": one.contiguous() for stem, one in zip(stems, joint)
    }


def peft_config(weights: Mapping[str, Tensor], config: MoshiTTTConfig, rank: int, scaling: float, base: str | None) -> dict[str, Any]:
    """adapter_config.json for converted weights."""
    stacked = {name for group in _adaptable(config) if len(group.here_shape) == 3 for name in group.here}
    adapted = sorted(name.removeprefix(PEFT_PREFIX).replace(".lora_A.weight", ".weight") for name in weights if ".lora_A." in name)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": AUTO_MAPPING,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank * scaling,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [_module(name) for name in adapted if name not in stacked],
        "target_parameters": [name for name in adapted if name in stacked] or None,
        "modules_to_save": sorted(_module(name.removeprefix(PEFT_PREFIX)) for name in _saved(weights)) or None,
        "inference_mode": True,
    }

"""Checkpoints of earlier TTT experiments on Kyutai's own code: the same numbers under wrapped names.

There a wrapper around a transformer layer holds Kyutai's layer and a TTT block somewhere inside, under names that differ from one
experiment to the next. The end of a name says what it is; the layer's number says where; what stands between is dropped.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError
from .tables import TTT_LAYER, TTT_NAMES, Fetch

LEAVES = {name.removeprefix("ttt.").removeprefix("ttt_gate."): name for name in TTT_NAMES["mlp"] if not name.startswith("ttt_layernorm")}
LEAF = "|".join(re.escape(leaf) for leaf in sorted(LEAVES, key=len, reverse=True))
IN_LAYER = re.compile(rf"(?:^|\.)layers\.(\d+)\.(?:.*\.)?({LEAF})$")
KYUTAI_LAYER = r"(?:.*\.)?((?:self_attn|gating|norm[12])\..+)$"
WRAPPED_LAYER = re.compile(r"(?:^|.*\.)(transformer|depformer)\.layers\.(\d+)\." + KYUTAI_LAYER)
NUMBERED, SINGLE = r"(?:emb|depformer_emb|depformer_in|linears)\.\d+\.weight", r"(?:text_emb|text_linear|depformer_text_emb)\.weight"
WHOLE = re.compile(rf"(?:^|.*\.)({NUMBERED}|{SINGLE}|out_norm\.alpha)$")
NORM = "ttt_layernorm.weight"
TOKEN_WEIGHT = "ttt.learnable_token_weight"


@dataclass
class Unwrapped:
    """New name -> name in the file; what the file lacks, by new name; and what was said about it."""

    names: dict[str, str] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    mixer: str = "linear"
    absent: dict[str, tuple[str, int]] = field(default_factory=dict)  # (which start value, of which layer)


def is_old_ttt(names: Iterable[str]) -> bool:
    """Whether these keys are a Kyutai model's with TTT weights inside its layers, under other names than this package's."""
    names = list(names)
    wrapped = [name for name in names if name.endswith(".W1") and not name.startswith(TTT_LAYER.partition("{")[0])]
    return bool(wrapped) and any(WRAPPED_LAYER.match(name) for name in names)


def new_name(name: str) -> str | None:
    """A key without its wrappers: TTT weights under this package's names, the rest under Kyutai's. None for a key that is neither."""
    if found := IN_LAYER.search(name):
        return TTT_LAYER.format(found[1]) + LEAVES[found[2]]
    if found := WRAPPED_LAYER.match(name):
        return f"{found[1]}.layers.{found[2]}.{found[3]}"
    if found := WHOLE.match(name):
        return found[1]
    return None


def unwrap(names: Iterable[str]) -> Unwrapped:
    """Sort out the keys of such a checkpoint.

    A layer without the weights that those experiments did not have (the norm before the TTT layer, the learned offset of the token
    weights) gets their neutral values. Raises ValueError naming a key that is not understood, or two that mean the same.
    """
    result = Unwrapped()
    for name in names:
        new = new_name(name)
        if new is None:
            raise MoshiTTTError(f"unknown: {name}: neither a weight of Moshi nor of a TTT layer")
        if new in result.names:
            raise MoshiTTTError(f"{name} and {result.names[new]} would both become {new}")
        result.names[new] = name
    result.layers = sorted(
        {int(found[1]) for name in result.names if (found := re.match(r"decoder\.model\.layers\.(\d+)\.ttt\.W1$", name))}
    )
    result.mixer = "mlp" if any(name.endswith("ttt.W2") for name in result.names) else "linear"
    for layer in result.layers:
        for leaf in (NORM, TOKEN_WEIGHT):
            if TTT_LAYER.format(layer) + leaf not in result.names:
                result.absent[TTT_LAYER.format(layer) + leaf] = (leaf, layer)
    return result


def ttt_fields(unwrapped: Unwrapped, fetch: Fetch) -> dict[str, object]:
    """The TTT settings that the weights themselves tell: layers, mixer, heads, head width, and the mini-batch where it is written."""
    first = TTT_LAYER.format(unwrapped.layers[0])
    heads, width = fetch(unwrapped.names[first + "ttt.W1"]).shape[:2]
    fields: dict[str, object] = {
        "ttt_layers": unwrapped.layers,
        "ttt_mixer": unwrapped.mixer,
        "ttt_num_heads": heads,
        "ttt_head_dim": width,
    }
    if first + TOKEN_WEIGHT in unwrapped.names:
        fields["ttt_mini_batch_size"] = fetch(unwrapped.names[first + TOKEN_WEIGHT]).numel()
    return fields


def reader(unwrapped: Unwrapped, fetch: Fetch, config: MoshiTTTConfig) -> Fetch:
    """Reads one tensor by its new name; neutral values where the file has none, shapes put right where only singleton axes differ."""

    def read(name: str) -> Tensor:
        if name in unwrapped.absent:
            leaf, _ = unwrapped.absent[name]
            return torch.ones(config.hidden_size) if leaf == NORM else torch.zeros(config.ttt_mini_batch_size)
        tensor = fetch(unwrapped.names[name])
        if name.endswith("learnable_ttt_lr_bias"):
            return tensor.reshape(-1, 1)  # [H, 1]
        return tensor.reshape(-1) if name.endswith("gating_alpha") else tensor

    return read

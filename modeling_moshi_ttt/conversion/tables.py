"""Kyutai's Moshi checkpoints and this package's, both ways, by one table.

Kyutai's `LMModel` and transformers' Moshi hold the same numbers under other names. Three things change besides the name: the joint
q, k, v projection is split, the temporal transformer's q and k go from interleaved rotary pairs (2i, 2i+1) to transformers' halves
(i, i + D/2), and the depth transformer's weights, one matrix a codebook there, are stacked here. TTT weights keep their names.

Every row of the table becomes a `Group`: the tensors on one side that together hold what the tensors on the other side hold. A group is
converted by itself, so a checkpoint streams through one group at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError
from .kyutai_config import config_from_kyutai as config_from_kyutai

Tensors = list[Tensor]

# (kind, Kyutai's name, name here); `{}` is the layer, `{k}` the codebook. Kinds: see `group_of`.
TEMPORAL_LAYER = (
    ("rotary_qkv", "transformer.layers.{}.self_attn.in_projs.{k}.weight", "decoder.model.layers.{}.self_attn.{p}_proj.linear.weight"),
    ("same", "transformer.layers.{}.self_attn.out_projs.0.weight", "decoder.model.layers.{}.self_attn.o_proj.linear.weight"),
    ("same", "transformer.layers.{}.gating.linear_in.weight", "decoder.model.layers.{}.mlp.fc1.weight"),
    ("same", "transformer.layers.{}.gating.linear_out.weight", "decoder.model.layers.{}.mlp.fc2.weight"),
    ("norm", "transformer.layers.{}.norm1.alpha", "decoder.model.layers.{}.input_layernorm.weight"),
    ("norm", "transformer.layers.{}.norm2.alpha", "decoder.model.layers.{}.post_attention_layernorm.weight"),
)
DEPTH_LAYER = (
    ("stacked_qkv", "depformer.layers.{}.self_attn.in_projs.{k}.weight", "depth_decoder.layers.{}.self_attn.{p}_proj.linear.weight"),
    ("stacked", "depformer.layers.{}.self_attn.out_projs.{k}.weight", "depth_decoder.layers.{}.self_attn.o_proj.linear.weight"),
    ("stacked", "depformer.layers.{}.gating.{k}.linear_in.weight", "depth_decoder.layers.{}.mlp.fc1.weight"),
    ("stacked", "depformer.layers.{}.gating.{k}.linear_out.weight", "depth_decoder.layers.{}.mlp.fc2.weight"),
    ("norm", "depformer.layers.{}.norm1.alpha", "depth_decoder.layers.{}.input_layernorm.weight"),
    ("norm", "depformer.layers.{}.norm2.alpha", "depth_decoder.layers.{}.post_attention_layernorm.weight"),
)
WHOLE_MODEL = (
    ("same", "text_emb.weight", "decoder.model.embed_tokens.weight"),
    ("norm", "out_norm.alpha", "decoder.model.norm.weight"),
    ("same", "text_linear.weight", "decoder.lm_head.weight"),
    ("same", "depformer_text_emb.weight", "depth_decoder.text_embed_tokens.weight"),
    ("stacked", "depformer_in.{k}.weight", "depth_decoder.input_projections.weight"),
    ("stacked", "linears.{k}.weight", "depth_decoder.lm_heads.weight"),
)
AUDIO_EMBEDDING = ("same", "emb.{}.weight", "embed_tokens.{}.weight")
DEPTH_EMBEDDING = ("same", "depformer_emb.{}.weight", "depth_decoder.embed_tokens.{}.weight")

# Older files hold all codebooks of one projection in one tensor. The split spelling is the table's.
FUSED = (
    (".self_attn.in_projs.{k}.weight", (".self_attn.in_proj_weight", ".self_attn.in_proj.weight")),
    (".self_attn.out_projs.{k}.weight", (".self_attn.out_proj.weight",)),
)

TTT_LAYER = "decoder.model.layers.{}."
TTT_SHARED = (
    *(f"ttt.w{name}.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    *("ttt.learnable_ttt_lr_weight", "ttt.learnable_ttt_lr_bias", "ttt.learnable_token_weight"),
    *("ttt.ttt_norm_weight", "ttt.ttt_norm_bias", "ttt.post_norm.weight", "ttt.post_norm.bias"),
    *("ttt.W1", "ttt.b1", "ttt_gate.gating_alpha", "ttt_layernorm.weight"),
)
TTT_NAMES = {"linear": TTT_SHARED, "mlp": (*TTT_SHARED, "ttt.W2", "ttt.b2")}


@dataclass(frozen=True)
class Group:
    """Tensors that are converted together. All names of one side have one shape; the functions take and give tensors in name order."""

    kyutai: tuple[str, ...]
    here: tuple[str, ...]
    kyutai_shape: tuple[int, ...]
    here_shape: tuple[int, ...]
    to_here: Callable[[Tensors], Tensors]
    to_kyutai: Callable[[Tensors], Tensors]


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a q or k projection `[H·D, ...]` from interleaved rotary pairs to halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _rotary_qkv_to_here(tensors: Tensors, heads: int) -> Tensors:
    query, key, value = tensors[0].chunk(3)  # [E, E] each
    return [to_halves(query, heads), to_halves(key, heads), value]


def _rotary_qkv_to_kyutai(tensors: Tensors, heads: int) -> Tensors:
    query, key, value = tensors
    return [torch.cat([to_pairs(query, heads), to_pairs(key, heads), value])]


def group_of(kind: str, kyutai: str, here: str, shape: tuple[int, ...], codebooks: int, heads: int) -> Group:
    """One group from one row of a table; `shape` is that of one of Kyutai's tensors, () where shapes are not checked.

    Kinds: "same"; "norm" (`[1, 1, E]` there); "stacked" (one tensor a codebook there); "stacked_qkv" (also q, k, v in one there);
    "rotary_qkv" (q, k, v in one there, with interleaved rotary pairs).
    """
    each = tuple(kyutai.replace("{k}", str(k)) for k in range(codebooks))
    qkv = tuple(here.replace("{p}", p) for p in "qkv")
    if kind == "same":
        return Group((kyutai,), (here,), shape, shape, list, list)
    if kind == "norm":
        return Group((kyutai,), (here,), (1, 1, *shape), shape, lambda t: [t[0].reshape(-1)], lambda t: [t[0].reshape(1, 1, -1)])
    if kind == "stacked":
        return Group(each, (here,), shape, (codebooks, *shape), lambda t: [torch.stack(t)], lambda t: list(t[0]))
    third = (shape[0] // 3, *shape[1:]) if shape else ()
    if kind == "stacked_qkv":
        return Group(
            each, qkv, shape, (codebooks, *third), lambda t: list(torch.stack(t).chunk(3, dim=1)), lambda t: list(torch.cat(t, dim=1))
        )
    if kind == "rotary_qkv":
        return Group((each[0],), qkv, shape, third, lambda t: _rotary_qkv_to_here(t, heads), lambda t: _rotary_qkv_to_kyutai(t, heads))
    raise MoshiTTTError(f"unknown kind {kind!r} in the conversion table")


def _layer_shapes(dim: int, ffn: int) -> tuple[tuple[int, ...], ...]:
    """Kyutai's shapes of one layer's six rows."""
    return ((3 * dim, dim), (dim, dim), (ffn, dim), (dim, ffn // 2), (dim,), (dim,))


def moshi_groups(config: MoshiTTTConfig) -> list[Group]:
    """Every group of a Moshi of this configuration, TTT weights apart. Each weight of the model is in exactly one."""
    fields: Any = config  # typed Optional, filled by the configuration itself
    depth = fields.depth_decoder_config
    dim, codebooks = fields.hidden_size, fields.num_predicted_codebooks
    text, audio = fields.vocab_size, fields.audio_vocab_size
    whole = ((text + 1, dim), (dim,), (text, dim), (text + 1, depth.hidden_size), (depth.hidden_size, dim), (audio, depth.hidden_size))
    groups = [group_of(*row, shape, codebooks, 1) for row, shape in zip(WHOLE_MODEL, whole)]

    def repeat(row: tuple[str, str, str], count: int, shape: tuple[int, ...], heads: int = 1) -> None:
        kind, kyutai, here = row
        for i in range(count):
            groups.append(group_of(kind, kyutai.replace("{}", str(i)), here.replace("{}", str(i)), shape, codebooks, heads))

    repeat(AUDIO_EMBEDDING, len(fields.audio_delays), (audio + 1, dim))
    repeat(DEPTH_EMBEDDING, codebooks - 1, (audio + 1, depth.hidden_size))
    for row, shape in zip(TEMPORAL_LAYER, _layer_shapes(dim, fields.ffn_dim)):
        repeat(row, fields.num_hidden_layers, shape, fields.num_attention_heads)
    for row, shape in zip(DEPTH_LAYER, _layer_shapes(depth.hidden_size, depth.ffn_dim)):
        repeat(row, depth.num_hidden_layers, shape)
    return groups


def ttt_names(config: MoshiTTTConfig) -> list[str]:
    """The names of every TTT weight that the configuration calls for: the same on both sides."""
    return [TTT_LAYER.format(layer) + name for layer in config.ttt_layers for name in TTT_NAMES[config.ttt_mixer]]


def _ttt_travelling(names: Iterable[str], config: MoshiTTTConfig) -> list[str]:
    """All TTT weights or none: a plain Moshi stays plain, and its TTT layers start fresh when it is loaded."""
    wanted = ttt_names(config)
    return wanted if set(wanted) & set(names) else []


def fuse(group: Group) -> Group:
    """The same group with Kyutai's side in the fused spelling, where the table has one; else the group itself."""
    for split, (spelling, *_) in FUSED:
        head, mark, _ = group.kyutai[0].partition(split.replace("{k}", "0"))
        if mark:
            return _fused(group, head + spelling)
    return group


def _fused(group: Group, name: str) -> Group:
    count, shape = len(group.kyutai), group.kyutai_shape
    return Group(
        (name,),
        group.here,
        (count * shape[0], *shape[1:]) if shape else (),
        group.here_shape,
        lambda t: group.to_here(list(t[0].unflatten(0, (count, -1)))),
        lambda t: [torch.cat(group.to_kyutai(t))],
    )


def as_spelled(group: Group, names: Iterable[str]) -> Group:
    """The group as the file spells it: split, fused or the other fused spelling, whichever of them `names` holds."""
    for split, spellings in FUSED:
        head, mark, _ = group.kyutai[0].partition(split.replace("{k}", "0"))
        for spelling in spellings if mark else ():
            if head + spelling in names:
                return _fused(group, head + spelling)
    return group


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def check_names(found: Iterable[str], wanted: Iterable[str], layout: str) -> None:
    """Raise a ValueError that names every key which is missing or unknown."""
    found, wanted = set(found), set(wanted)
    problems = []
    if wanted - found:
        problems.append(f"missing: {_some(wanted - found)}")
    if found - wanted:
        problems.append(f"unknown: {_some(found - wanted)}")
    if problems:
        raise MoshiTTTError(f"the checkpoint does not fit its configuration ({layout}): {'; '.join(problems)}")


def _check_shape(name: str, shape: Iterable[int], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != wanted:
        raise MoshiTTTError(f"{name} has shape {list(shape)}; the configuration asks for {list(wanted)}")


Fetch = Callable[[str], Tensor]


def stream_to_here(names: Iterable[str], fetch: Fetch, config: MoshiTTTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (name here, tensor) for a Kyutai checkpoint, reading one group at a time.

    `names` are all keys of the checkpoint and `fetch` reads one. Raises ValueError, before reading anything, where a key is missing or
    unknown, and where a tensor has another shape than the configuration asks for.
    """
    names = set(names)
    groups = [as_spelled(group, names) for group in moshi_groups(config)]
    ttt = _ttt_travelling(names, config)
    check_names(names, [name for group in groups for name in group.kyutai] + ttt, "Kyutai's layout")
    for group in groups:
        tensors = [fetch(name) for name in group.kyutai]
        for name, tensor in zip(group.kyutai, tensors):
            _check_shape(name, tensor.shape, group.kyutai_shape)
        yield from zip(group.here, group.to_here(tensors))
    for name in ttt:
        yield name, fetch(name)


def stream_to_kyutai(names: Iterable[str], fetch: Fetch, config: MoshiTTTConfig, fused: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (Kyutai's name, tensor) for a checkpoint of this package; the inverse of `stream_to_here`."""
    names = set(names)
    groups = [fuse(group) if fused else group for group in moshi_groups(config)]
    ttt = _ttt_travelling(names, config)
    check_names(names, [name for group in groups for name in group.here] + ttt, "transformers' layout")
    for group in groups:
        tensors = [fetch(name) for name in group.here]
        for name, tensor in zip(group.here, tensors):
            _check_shape(name, tensor.shape, group.here_shape)
        yield from zip(group.kyutai, group.to_kyutai(tensors))
    for name in ttt:
        yield name, fetch(name)


# Where a name of Kyutai's tells its depth slice, and tensors that hold all slices.
_SLICE = re.compile(r"^(?:depformer\.layers\.\d+\.(?:self_attn\.(?:in|out)_projs|gating)|depformer_in|depformer_emb|linears)\.(\d+)\.")
_ALL_SLICES = re.compile(r"^depformer\.layers\.\d+\.self_attn\.(?:in|out)_proj(?:_|\.)weight$")


class OwnSlices:
    """A Kyutai checkpoint whose depth transformer has `dep_q` slices, read as one of the first `own` of them, which are Moshi's.

    Within a frame a slice sees those before it, so what Moshi says is the same without the user's.

    names: of the checkpoint without the user's slices. fetch: reads one of them.
    """

    def __init__(self, names: Iterable[str], fetch: Fetch, own: int, dep_q: int):
        self._fetch, self.own, self.dep_q = fetch, own, dep_q
        self.names = [name for name in names if not self._is_users(name)]

    def _is_users(self, name: str) -> bool:
        found = _SLICE.match(name)
        # The first slice embeds text; the next one, number 1, has the first table of codes, number 0.
        return found is not None and int(found[1]) >= self.own - name.startswith("depformer_emb.")

    def fetch(self, name: str) -> Tensor:
        tensor = self._fetch(name)
        return tensor[: self.own * (tensor.shape[0] // self.dep_q)] if self.own < self.dep_q and _ALL_SLICES.match(name) else tensor


def kyutai_to_hf(state_dict: Mapping[str, Tensor], config: MoshiTTTConfig) -> dict[str, Tensor]:
    """Kyutai's state dict under this package's names, in either of Kyutai's layouts, split or fused.

    Raises ValueError, naming the key, where one is missing, unknown or of another shape. Tensors may be views of the given ones.
    """
    return {name: tensor.contiguous() for name, tensor in stream_to_here(state_dict, state_dict.__getitem__, config)}


def hf_to_kyutai(state_dict: Mapping[str, Tensor], config: MoshiTTTConfig, fused: bool = False) -> dict[str, Tensor]:
    """This package's state dict under Kyutai's names: the inverse of `kyutai_to_hf`. `fused` writes the older layout."""
    return {name: tensor.contiguous() for name, tensor in stream_to_kyutai(state_dict, state_dict.__getitem__, config, fused)}

"""Kyutai's Mimi codec and sentencepiece tokenizer, in transformers' layout, and the codec back.

The codec's table follows Kyutai's modules (SEANet, projected transformers, split residual quantizer) and the names under which Mimi
checkpoints lie on the Hub. Its transformers rotate interleaved pairs there and halves here, as the model's.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import MimiConfig, PreTrainedTokenizerFast

from ..errors_moshi_ttt import MoshiTTTError
from .tables import Fetch, Group, as_spelled, check_names, group_of

# (Kyutai's setting, MimiConfig's field)
FIELDS = {
    "seanet": {
        "channels": "audio_channels",
        "dimension": "hidden_size",
        "n_filters": "num_filters",
        "n_residual_layers": "num_residual_layers",
        "kernel_size": "kernel_size",
        "last_kernel_size": "last_kernel_size",
        "residual_kernel_size": "residual_kernel_size",
        "dilation_base": "dilation_growth_rate",
        "compress": "compress",
        "ratios": "upsampling_ratios",
    },
    "quantizer": {"dimension": "vector_quantization_hidden_dimension", "n_q": "num_quantizers", "bins": "codebook_size"},
    "transformer": {
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "context": "sliding_window",
        "dim_feedforward": "intermediate_size",
        "layer_scale": "layer_scale_initial_scale",
    },
}
# Settings that this codec has only one value for: written so, and another one is refused, by name.
ONLY: dict[str, dict[str, Any]] = {
    "seanet": {
        "causal": True,
        "activation": "ELU",
        "norm": "none",
        "pad_mode": "constant",
        "true_skip": True,
        "disable_norm_outer_blocks": 0,
    },
    "quantizer": {},
    "transformer": {
        **{"causal": True, "conv_layout": True, "gating": "none", "norm": "layer_norm", "positional_embedding": "rope"},
        "max_period": 10000,
    },
}
WIDTHS = ("d_model", "input_dimension", "output_dimension", "output_dimensions")  # all of them the encoder's `dimension`
LAYER = (
    ("rotary_qkv", "self_attn.in_projs.{k}.weight", "self_attn.{p}_proj.weight"),
    ("same", "self_attn.out_projs.0.weight", "self_attn.o_proj.weight"),
    ("same", "linear1.weight", "mlp.fc1.weight"),
    ("same", "linear2.weight", "mlp.fc2.weight"),
    ("same", "layer_scale_1.scale", "self_attn_layer_scale.scale"),
    ("same", "layer_scale_2.scale", "mlp_layer_scale.scale"),
    *(("same", f"norm1.{w}", f"input_layernorm.{w}") for w in ("weight", "bias")),
    *(("same", f"norm2.{w}", f"post_attention_layernorm.{w}") for w in ("weight", "bias")),
)
CODEBOOK = (("_initialized", "initialized"), ("cluster_usage", "cluster_usage"), ("embedding_sum", "embed_sum"))
SPECIAL_TOKENS = {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": 3}


def _check(kyutai: dict[str, Any]) -> None:
    width = kyutai["seanet"]["dimension"]
    for part, names in FIELDS.items():
        only = ONLY[part] | {name: [width] if name == "output_dimensions" else width for name in WIDTHS}
        for name, value in kyutai[part].items():
            if name not in names and name not in only:
                raise MoshiTTTError(f"unknown setting {part}.{name} = {value!r} of Kyutai's Mimi: this codec has no counterpart of it")
            if name in only and value != only[name]:
                raise MoshiTTTError(
                    f"{part}.{name} = {value!r} of Kyutai's Mimi has no counterpart here: only {only[name]!r} can be converted"
                )
    # Between the encoder and the quantizer there is one convolution of stride 2.
    frame_rate = kyutai["sample_rate"] / math.prod(kyutai["seanet"]["ratios"]) / 2
    if kyutai.get("frame_rate", frame_rate) != frame_rate:
        raise MoshiTTTError(f"frame_rate = {kyutai['frame_rate']} of Kyutai's Mimi: its sample_rate and ratios give {frame_rate} here")


def mimi_config(kyutai: dict[str, Any] | None) -> MimiConfig:
    """MimiConfig for Kyutai's codec settings; None is the published Mimi.

    Raises ValueError naming a setting that is unknown or that transformers' Mimi cannot express.
    """
    if kyutai is None:
        return MimiConfig()
    _check(kyutai)
    fields = {ours: kyutai[part][theirs] for part, names in FIELDS.items() for theirs, ours in names.items() if theirs in kyutai[part]}
    hidden = fields["hidden_size"]
    return MimiConfig(
        sampling_rate=int(kyutai["sample_rate"]),
        codebook_dim=fields["vector_quantization_hidden_dimension"],
        head_dim=hidden // fields["num_attention_heads"],
        num_key_value_heads=fields["num_attention_heads"],
        upsample_groups=hidden,
        **fields,
    )


def kyutai_mimi(config: MimiConfig) -> dict[str, Any]:
    """The codec's settings as Kyutai's loader takes them; `mimi_config` reads them back to the same codec."""
    parts = {part: ONLY[part] | {theirs: getattr(config, ours) for theirs, ours in names.items()} for part, names in FIELDS.items()}
    width = {"input_dimension": config.hidden_size}
    parts["quantizer"] |= {**width, "output_dimension": config.hidden_size}
    parts["transformer"] |= {"d_model": config.hidden_size, **width, "output_dimensions": [config.hidden_size]}
    return {"sample_rate": config.sampling_rate, "channels": config.audio_channels, "frame_rate": config.frame_rate, **parts}


def _seanet(config: MimiConfig) -> Iterator[tuple[str, str]]:
    """(Kyutai's name, name here) of every convolution, without `.weight` and `.bias`."""
    ratios, blocks = list(config.upsampling_ratios or []), config.num_residual_layers

    def block(side: str, index: int) -> Iterator[tuple[str, str]]:
        for part in (1, 3):
            yield f"{side}.model.{index}.block.{part}.conv.conv", f"{side}.layers.{index}.block.{part}.conv"

    place = 0  # activations take a place too
    yield "encoder.model.0.conv.conv", "encoder.layers.0.conv"
    for _ in ratios:
        for _ in range(blocks):
            place += 1
            yield from block("encoder", place)
        place += 2
        yield f"encoder.model.{place}.conv.conv", f"encoder.layers.{place}.conv"
    yield f"encoder.model.{place + 2}.conv.conv", f"encoder.layers.{place + 2}.conv"

    place = 0
    yield "decoder.model.0.conv.conv", "decoder.layers.0.conv"
    for _ in ratios:
        place += 2
        yield f"decoder.model.{place}.convtr.convtr", f"decoder.layers.{place}.conv"
        for _ in range(blocks):
            place += 1
            yield from block("decoder", place)
    yield f"decoder.model.{place + 2}.conv.conv", f"decoder.layers.{place + 2}.conv"


def mimi_groups(config: MimiConfig) -> list[Group]:
    """Every group of a Mimi of this configuration; see `convert.Group`. Shapes are left to the model that loads them."""
    rows = [("same", f"{theirs}.{w}", f"{ours}.{w}") for theirs, ours in _seanet(config) for w in ("weight", "bias")]
    rows += [("same", "downsample.conv.conv.conv.weight", "downsample.conv.weight")]
    rows += [("same", "upsample.convtr.convtr.convtr.weight", "upsample.conv.weight")]
    for side in ("encoder_transformer", "decoder_transformer"):
        for i in range(config.num_hidden_layers):
            rows += [(kind, f"{side}.transformer.layers.{i}.{theirs}", f"{side}.layers.{i}.{ours}") for kind, theirs, ours in LAYER]
    semantic = config.num_semantic_quantizers
    for theirs, ours, count in (("first", "semantic", semantic), ("rest", "acoustic", config.num_quantizers - semantic)):
        there, here = f"quantizer.rvq_{theirs}", f"quantizer.{ours}_residual_vector_quantizer"
        rows += [("same", f"{there}.{side}_proj.weight", f"{here}.{side}_proj.weight") for side in ("input", "output")]
        for i in range(count):
            rows += [("same", f"{there}.vq.layers.{i}._codebook.{a}", f"{here}.layers.{i}.codebook.{b}") for a, b in CODEBOOK]
    return [group_of(kind, theirs, ours, (), 1, config.num_attention_heads) for kind, theirs, ours in rows]


def stream_mimi_to_here(names: Iterable[str], fetch: Fetch, config: MimiConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (name here, tensor) for Kyutai's codec. Raises ValueError naming every key that is missing or unknown."""
    names = set(names)
    groups = [as_spelled(group, names) for group in mimi_groups(config)]
    check_names(names, [name for group in groups for name in group.kyutai], "Kyutai's Mimi")
    for group in groups:
        yield from zip(group.here, group.to_here([fetch(name) for name in group.kyutai]))


def stream_mimi_to_kyutai(names: Iterable[str], fetch: Fetch, config: MimiConfig) -> Iterator[tuple[str, Tensor]]:
    """The inverse, in Kyutai's split spelling."""
    groups = mimi_groups(config)
    check_names(names, [name for group in groups for name in group.here], "transformers' Mimi")
    for group in groups:
        yield from zip(group.kyutai, group.to_kyutai([fetch(name) for name in group.here]))


def fast_tokenizer(sentencepiece_model: str | Path) -> PreTrainedTokenizerFast:
    """Kyutai's sentencepiece model as a fast tokenizer: the same pieces with the same ids. Needs the package `protobuf`."""
    from transformers.convert_slow_tokenizer import MoshiConverter

    converter = MoshiConverter(str(sentencepiece_model))
    pieces = [piece.piece for piece in converter.proto.pieces]
    special = {
        name: pieces[index] for name, index in SPECIAL_TOKENS.items() if index < len(pieces) and converter.proto.pieces[index].type != 1
    }
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **special)

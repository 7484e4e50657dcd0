"""What a configuration from a file may hold: it comes from a stranger, and what it says is made."""

import math
import re
from typing import Any

from .errors_moshi_ttt import MoshiTTTError

# The greatest values that are believed, far above any model that there is.
LIMITS = {
    "vocab_size": 1 << 20, "audio_vocab_size": 1 << 16, "hidden_size": 1 << 16, "ffn_dim": 1 << 18, "num_hidden_layers": 1 << 10,
    "num_codebooks": 1 << 8, "num_user_codebooks": 1 << 8, "sliding_window": 1 << 20, "max_position_embeddings": 1 << 24,
    "num_attention_heads": 1 << 10, "num_key_value_heads": 1 << 10, "head_dim": 1 << 12, "ttt_num_heads": 1 << 10, "ttt_head_dim": 1 << 12,
    "ttt_mini_batch_size": 1 << 16, "num_labels": 1 << 12,
    # of a codec
    "num_filters": 1 << 10, "num_residual_layers": 1 << 5, "num_quantizers": 1 << 8, "codebook_size": 1 << 16, "codebook_dim": 1 << 12,
    "vector_quantization_hidden_dimension": 1 << 12, "intermediate_size": 1 << 18, "kernel_size": 1 << 8, "last_kernel_size": 1 << 8,
    "residual_kernel_size": 1 << 8, "dilation_growth_rate": 1 << 4, "compress": 1 << 4, "sampling_rate": 1 << 18, "audio_channels": 1 << 6,
}  # fmt: skip
QUANT_METHOD = "moshi_ttt_int8"  # the one that a checkpoint may be saved in, which quantization_moshi_ttt registers
MAX_DELAY = 1 << 10  # frames
MAX_CODEC_LAYERS, MAX_RATIO = 1 << 7, 1 << 6
MAX_ENTRIES = 1 << 12  # of a list, a mapping or a text
# What a saved configuration may not choose: which code runs is the caller's to say.
_CODE_CHOICES = re.compile(r"_?(?!ttt_)\w*_implementation(_internal)?|use_kernels|kernel_config|custom_pipelines|custom_generate")


def short(value: int) -> str:
    """A whole number of any length, to be read."""
    return str(value) if abs(value) < 1 << 64 else f"a number of {value.bit_length()} bits"


def check_stored(content: dict[str, Any], where: str, prefix: str = "") -> None:
    """MoshiTTTError for a configuration from a file, or a part of it, that chooses code or is so large that reading it would take long."""
    for name, value in content.items():
        method = value.get("quant_method") if name == "quantization_config" and isinstance(value, dict) else None
        if (value is not None and _CODE_CHOICES.fullmatch(str(name))) or method not in (None, QUANT_METHOD):
            raise MoshiTTTError(
                f"{where} holds `{prefix}{name}={value!r}`, which chooses code to run; remove it, and give it to `from_pretrained` if you want it."
            )
        if isinstance(value, (list, dict, str)) and len(value) > MAX_ENTRIES:
            raise MoshiTTTError(f"{where}: `{prefix}{name}` must hold at most {MAX_ENTRIES} entries; it holds {len(value)}.")
        if isinstance(value, int) and value > LIMITS.get(name, math.inf):
            raise MoshiTTTError(f"{where}: `{prefix}{name}` must be at most {LIMITS[name]}; it is {short(value)}.")
        if isinstance(value, dict):
            check_stored(value, where, f"{prefix}{name}.")


def check_codec(content: dict[str, Any], where: str) -> None:
    """MoshiTTTError for a codec's configuration from a file, as for the model's."""
    check_stored(content, where)
    layers, ratios = content.get("num_hidden_layers", 0), content.get("upsampling_ratios", [])
    if layers > MAX_CODEC_LAYERS or not all(isinstance(ratio, int) and 0 < ratio <= MAX_RATIO for ratio in ratios):
        raise MoshiTTTError(
            f"{where}: `num_hidden_layers={layers}` must be at most {MAX_CODEC_LAYERS}, and each of `upsampling_ratios={ratios}` at most {MAX_RATIO}."
        )

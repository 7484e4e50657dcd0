"""A whole model, loaded after its folder was held against its manifest and its configuration against its weights' headers.

A configuration is a stranger's word. Before a module is made after it, every size in it is compared with what the files really hold.
"""

import os
import re
from pathlib import Path
from typing import Any

from ..common.files import MANIFEST, contradictions
from ..common.safetensor_files import REAL_DTYPES, TensorFiles
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration

Shapes = dict[str, tuple[int, ...]]
_LAYER = re.compile(r"(decoder\.model\.layers|depth_decoder\.layers|embed_tokens)\.(\d+)\.")
SHOWN = 5  # of a folder's problems


def load_model(source: str | os.PathLike[str], dtype: Any = "auto", **options: Any) -> MoshiTTTForConditionalGeneration:
    """`from_pretrained` of a folder or Hub name, a folder checked first.

    Raises:
        MoshiTTTError: as `check_whole`.
    """
    config = options.get("config")
    fields = {name: value for name, value in options.items() if name in MoshiTTTConfig.__dataclass_fields__}
    if Path(source).is_dir():
        check_whole(Path(source), config or MoshiTTTConfig.from_pretrained(source, **fields))
    return MoshiTTTForConditionalGeneration.from_pretrained(source, dtype=dtype, **options)


def check_whole(folder: Path, config: MoshiTTTConfig) -> None:
    """What can be seen without a module: files against the manifest where there is one, headers against the configuration.

    Digests are worked out by one process of a machine alone.

    Raises:
        MoshiTTTError: a file is missing or another than the manifest says; a weight has another size, or a dtype that is not real floating.
    """
    problems = contradictions(folder, digests=os.environ.get("LOCAL_RANK", "0") == "0") if (folder / MANIFEST).is_file() else []
    if not problems and getattr(config, "quantization_config", None) is None:
        files = TensorFiles(folder)
        problems = header_problems(config, files.shapes()) + dtype_problems(files)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise MoshiTTTError(f"{folder} is not a whole checkpoint: {'; '.join(problems[:SHOWN])}{more}; fetch or save it again")


def header_problems(config: MoshiTTTConfig, found: Shapes) -> list[str]:
    """Where a configuration asks for other sizes than the weights have. Fresh TTT layers, which have no weights yet, are no problem."""
    fields: Any = config
    depth, hidden, streams = fields.depth_decoder_config, fields.hidden_size, fields.num_codebooks + fields.num_user_codebooks
    queries, keys = fields.num_attention_heads * fields.head_dim, fields.num_key_value_heads * fields.head_dim
    last, last_depth = fields.num_hidden_layers - 1, depth.num_hidden_layers - 1
    wanted = {
        "decoder.model.embed_tokens.weight": (fields.vocab_size + 1, hidden),
        "decoder.lm_head.weight": (fields.vocab_size, hidden),
        f"embed_tokens.{streams - 1}.weight": (fields.audio_vocab_size + 1, hidden),
        f"decoder.model.layers.{last}.self_attn.q_proj.linear.weight": (queries, hidden),
        f"decoder.model.layers.{last}.self_attn.k_proj.linear.weight": (keys, hidden),
        f"decoder.model.layers.{last}.mlp.fc1.weight": (fields.ffn_dim, hidden),
        "depth_decoder.text_embed_tokens.weight": (fields.vocab_size + 1, depth.hidden_size),
        "depth_decoder.lm_heads.weight": (fields.num_predicted_codebooks, fields.audio_vocab_size, depth.hidden_size),
        f"depth_decoder.layers.{last_depth}.mlp.fc1.weight": (fields.num_predicted_codebooks, depth.ffn_dim, depth.hidden_size),
    }
    for layer in fields.ttt_layers:
        stem = f"decoder.model.layers.{layer}.ttt."
        ttt = {"learnable_token_weight": (fields.ttt_mini_batch_size,), "ttt_norm_weight": (fields.ttt_num_heads, fields.ttt_head_dim)}
        wanted |= {stem + name: shape for name, shape in ttt.items() if stem + name in found}
    problems = [f"{name} is missing: the configuration calls for it" for name in wanted.keys() - found.keys()]
    problems += [
        f"{name} has shape {list(found[name])}; the configuration asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    counts = {"decoder.model.layers": last + 1, "depth_decoder.layers": last_depth + 1, "embed_tokens": streams}
    beyond = {name for name in found if (part := _LAYER.match(name)) and int(part[2]) >= counts[part[1]]}
    return sorted(problems) + [f"{name} is unknown to this configuration" for name in sorted(beyond)]


def dtype_problems(files: TensorFiles) -> list[str]:
    """Weights that are no real floating numbers."""
    return [
        f"{name} holds {dtype}; weights are {', '.join(REAL_DTYPES)}" for name, dtype in files.dtypes().items() if dtype not in REAL_DTYPES
    ]

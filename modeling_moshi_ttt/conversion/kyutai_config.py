"""Kyutai's `lm_kwargs` (the config.json of its repositories) and MoshiTTTConfig, both ways."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError

NORM_EPS = {"rms_norm_f32": 1e-8, "rms_norm": 1e-5}

# Kyutai's settings that this architecture has only one value for: another one is refused, by name.
ONLY: dict[str, Any] = {
    "model_type": "moshi",
    "causal": True,
    "layer_scale": None,
    "gating": "silu",
    "positional_embedding": "rope",
    "kv_repeat": 1,
    "norm_emb": False,
    "bias_proj": False,
    "text_card_out": None,
    "demux_second_stream": False,
    "demux_second_text_stream": False,
    "cross_attention": False,
    "conditioners": None,
    "fuser": None,
    "quantize": False,
    "extra_heads_num_heads": 0,
    "depformer_causal": True,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_norm": None,
    "depformer_weights_per_step": True,
    "depformer_weights_per_step_schedule": None,
    "depformer_low_rank_embeddings": None,
}
# Kyutai's own defaults differ from these, so they are always written.
WRITTEN = (
    *("causal", "layer_scale", "gating", "positional_embedding", "depformer_layer_scale", "depformer_multi_linear"),
    *("depformer_gating", "depformer_pos_emb", "depformer_weights_per_step"),
)
NEEDED = ("dim", "n_q", "dep_q", "card", "text_card", "num_heads", "num_layers", "delays", "depformer_dim", "depformer_num_heads")
OPTIONAL = (
    *("hidden_scale", "context", "max_period", "norm", "depformer_num_layers", "depformer_dim_feedforward"),
    *("existing_text_padding_id", "existing_text_end_padding_id"),
)
# These change nothing: the depth transformer has no positions and always sees the whole frame; extra heads are refused above.
UNUSED = ("depformer_max_period", "depformer_context", "extra_heads_dim", "gradient_checkpointing")

# What a repository without a config.json holds: Moshi 7B (moshiko, moshika).
MOSHI_7B: dict[str, Any] = {
    "dim": 4096,
    "text_card": 32000,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 3000,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}

# Whose config.json says nothing but the model's name: PersonaPlex is Moshi 7B with a depth slice for each of the user's codebooks too.
PUBLISHED = {"personaplex": {**MOSHI_7B, "dep_q": 16}}

# What a repository's config.json says about its files, not about the model.
REPOSITORY_KEYS = (
    *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "lm_gen_config", "tts_config"),
    *("stt_config", "model_id", "lora", "lora_rank", "lora_scaling"),
)


def _gated_width(feedforward: int, dim: int) -> int:
    """Rows of Kyutai's `gating.linear_in`: twice its hidden width, which it derives from the feed-forward size."""
    return 2 * (21 * dim // 8 if feedforward == 4 * dim else 2 * feedforward // 3)


def _feedforward(ffn_dim: int, dim: int) -> int:
    """The inverse of `_gated_width`: a feed-forward size that gives this width."""
    smallest = -(-3 * (ffn_dim // 2) // 2)
    for size in (smallest, smallest + 1):
        if _gated_width(size, dim) == ffn_dim:
            return size
    raise MoshiTTTError(f"ffn_dim = {ffn_dim} at width {dim} cannot be written in Kyutai's configuration: choose a multiple of 4")


def _check(lm_kwargs: Mapping[str, Any]) -> None:
    known = (*ONLY, *NEEDED, *OPTIONAL, *UNUSED, *REPOSITORY_KEYS)
    for key, value in lm_kwargs.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise MoshiTTTError(f"unknown setting {key!r} in Kyutai's configuration" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key in ONLY and value != ONLY[key] and (value or ONLY[key]):  # None, 0, {} and False all say "no"
            raise MoshiTTTError(f"{key} = {value!r} has no counterpart here: only {ONLY[key]!r} can be converted")
    missing = [key for key in NEEDED if key not in lm_kwargs]
    if missing:
        raise MoshiTTTError(f"Kyutai's configuration lacks {', '.join(missing)}")
    for key in (*NEEDED, "hidden_scale", "max_period"):
        if not isinstance(lm_kwargs.get(key, 0), list if key == "delays" else (int, float)):
            raise MoshiTTTError(f"{key} = {lm_kwargs[key]!r} in Kyutai's configuration must be a {'list' if key == 'delays' else 'number'}")
    if lm_kwargs.get("norm", "layer_norm") not in tuple(NORM_EPS):
        raise MoshiTTTError(f"norm = {lm_kwargs.get('norm', 'layer_norm')!r} has no counterpart here: use {' or '.join(NORM_EPS)}")
    if len(lm_kwargs["delays"]) != lm_kwargs["n_q"] + 1:
        raise MoshiTTTError(f"delays has {len(lm_kwargs['delays'])} entries; n_q = {lm_kwargs['n_q']} asks for {lm_kwargs['n_q'] + 1}")
    if lm_kwargs["delays"][0] != 0:
        raise MoshiTTTError(f"delays[0] = {lm_kwargs['delays'][0]}: the text stream must not be delayed")
    if not 1 <= lm_kwargs["dep_q"] <= lm_kwargs["n_q"]:
        raise MoshiTTTError(f"dep_q = {lm_kwargs['dep_q']} must lie between 1 and n_q = {lm_kwargs['n_q']}")


def split_codebooks(lm_kwargs: Mapping[str, Any], given: int | None = None) -> int:
    """How many of the n_q audio codebooks are Moshi's own; the others are the user's.

    As many as the depth transformer predicts, unless that predicts the user's too (PersonaPlex, J-Moshi: dep_q = n_q): then half of them
    where the delays begin anew there, or those `given`. Raises ValueError where nobody would be left to hear.
    """
    n_q, dep_q, delays = lm_kwargs["n_q"], lm_kwargs["dep_q"], lm_kwargs["delays"][1:]
    half, odd = divmod(n_q, 2)
    if given is not None:
        if not 1 <= given <= dep_q or given == n_q:
            raise MoshiTTTError(
                f"own_codebooks = {given} must lie between 1 and dep_q = {dep_q}, and leave some of n_q = {n_q} for the user"
            )
        return given
    if dep_q < n_q:
        return dep_q
    if not odd and delays[:half] == delays[half:] and len(set(delays)) > 1:
        return half
    raise MoshiTTTError(
        f"dep_q = n_q = {n_q}: with every codebook Moshi's own the model could not hear; say how many are with own_codebooks (--own-codebooks)"
    )


def published(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A repository's config.json, or what it stands for where it names a model and none of its sizes."""
    sizes = PUBLISHED.get(str(config.get("model_type")))
    return config if sizes is None or "dim" in config else {**sizes, **{key: config[key] for key in REPOSITORY_KEYS if key in config}}


def config_from_kyutai(
    lm_kwargs: Mapping[str, Any], own_codebooks: int | None = None, keep_user_slices: bool = False, **ttt: Any
) -> MoshiTTTConfig:
    """The configuration of a Kyutai model, with TTT settings such as `ttt_layers="23-31"` on top; without them it is plain Moshi.

    `lm_kwargs` is what `LMModel` takes, or a repository's whole config.json. `own_codebooks` says how many of the audio codebooks are
    Moshi's where the depth transformer predicts the user's too and the delays do not tell; `keep_user_slices` has the model predict them as
    well. Raises ValueError naming the setting that is unknown, missing or that this architecture cannot express.
    """
    lm_kwargs = published(lm_kwargs)
    _check(lm_kwargs)
    dim, depth_dim = lm_kwargs["dim"], lm_kwargs["depformer_dim"]
    scale, norm_eps = lm_kwargs.get("hidden_scale", 4), NORM_EPS[lm_kwargs["norm"]]
    depth_feedforward = lm_kwargs.get("depformer_dim_feedforward")
    if depth_feedforward is None:
        depth_feedforward = int(scale * depth_dim)
    if not isinstance(depth_feedforward, int):
        raise MoshiTTTError(f"depformer_dim_feedforward = {depth_feedforward!r}: one integer for all codebooks is needed")
    own = split_codebooks(lm_kwargs, own_codebooks)
    if keep_user_slices and not own < lm_kwargs["dep_q"] == lm_kwargs["n_q"]:
        raise MoshiTTTError(
            f"keep_user_slices (--keep-user-slices) needs a depth transformer that predicts all of the user's codebooks; this one predicts dep_q = "
            f"{lm_kwargs['dep_q']} of n_q = {lm_kwargs['n_q']}, of which {own} are Moshi's: leave it out"
        )
    predicted = lm_kwargs["n_q"] if keep_user_slices else own
    context = lm_kwargs.get("context")  # null, and Kyutai's default: attention without a window
    padding = [lm_kwargs.get("existing_text_padding_id", 3), lm_kwargs.get("existing_text_end_padding_id", 0)]
    depth = {
        "hidden_size": depth_dim,
        "num_hidden_layers": lm_kwargs.get("depformer_num_layers", lm_kwargs["num_layers"]),
        "num_attention_heads": lm_kwargs["depformer_num_heads"],
        "ffn_dim": _gated_width(depth_feedforward, depth_dim),
        "sliding_window": predicted,
        "max_position_embeddings": predicted + 1,
        "rms_norm_eps": norm_eps,
    }
    return MoshiTTTConfig(
        vocab_size=lm_kwargs["text_card"],
        hidden_size=dim,
        num_hidden_layers=lm_kwargs["num_layers"],
        num_attention_heads=lm_kwargs["num_heads"],
        ffn_dim=_gated_width(int(scale * dim), dim),
        audio_vocab_size=lm_kwargs["card"],
        max_position_embeddings=context or 3000,
        sliding_window=context,
        rms_norm_eps=norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(lm_kwargs.get("max_period", 10000))},
        num_codebooks=own,
        num_user_codebooks=lm_kwargs["n_q"] - own,
        user_depth_slices=keep_user_slices,
        audio_delays=list(lm_kwargs["delays"][1:]),
        depth_decoder_config=depth,
        text_padding_ids=padding,
        **{"ttt_layers": [], **ttt},
    )


def kyutai_from_config(config: MoshiTTTConfig) -> dict[str, Any]:
    """Kyutai's `lm_kwargs` for a configuration, which `config_from_kyutai` reads back. TTT settings have no place there."""
    fields: Any = config  # typed Optional, filled by the configuration itself
    depth = fields.depth_decoder_config
    norms = {eps: name for name, eps in NORM_EPS.items()}
    if fields.rms_norm_eps not in norms:
        raise MoshiTTTError(f"rms_norm_eps = {fields.rms_norm_eps} has no name in Kyutai's configuration: it knows {sorted(norms)}")
    if fields.num_key_value_heads != fields.num_attention_heads:
        raise MoshiTTTError(f"num_key_value_heads = {fields.num_key_value_heads}: Kyutai's layout needs num_attention_heads of them")
    dim, depth_dim = fields.hidden_size, depth.hidden_size
    chosen = {
        "dim": dim,
        "text_card": fields.vocab_size,
        "existing_text_padding_id": fields.text_padding_ids[0],
        "existing_text_end_padding_id": fields.text_padding_ids[1],
        "n_q": fields.num_codebooks + fields.num_user_codebooks,
        "dep_q": fields.num_predicted_codebooks,
        "card": fields.audio_vocab_size,
        "num_heads": fields.num_attention_heads,
        "num_layers": fields.num_hidden_layers,
        "hidden_scale": _exact_scale(_feedforward(fields.ffn_dim, dim), dim),
        "context": fields.sliding_window,
        "max_period": int(fields.rope_parameters["rope_theta"]),
        "norm": norms[fields.rms_norm_eps],
        "depformer_dim": depth_dim,
        "depformer_dim_feedforward": _feedforward(depth.ffn_dim, depth_dim),
        "depformer_num_heads": depth.num_attention_heads,
        "depformer_num_layers": depth.num_hidden_layers,
        "depformer_context": depth.sliding_window,
        "delays": [0, *fields.audio_delays],
    }
    return chosen | {key: ONLY[key] for key in WRITTEN} | {"depformer_max_period": 10000}


def _exact_scale(feedforward: int, dim: int) -> float:
    """A `hidden_scale` with `int(scale * dim) == feedforward` despite rounding."""
    scale = feedforward / dim
    return scale if int(scale * dim) == feedforward else (feedforward + 0.5) / dim

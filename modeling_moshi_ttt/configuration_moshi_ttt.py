"""Configuration of Moshi with Test-Time-Training layers."""

import math
import re
from typing import TYPE_CHECKING, Any

from .versions_moshi_ttt import check_transformers

check_transformers()  # before anything is imported that another transformers may lack

from huggingface_hub.dataclasses import strict  # noqa: E402
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers import MoshiConfig, PreTrainedConfig  # noqa: E402

from .errors_moshi_ttt import MoshiTTTError, os_errors_as_ours  # noqa: E402
from .stored_config_moshi_ttt import LIMITS, MAX_DELAY, MAX_ENTRIES, check_stored, short  # noqa: E402
from .tokens_moshi_ttt import TEXT_PADDING_IDS, check_padding_ids  # noqa: E402

MIXERS = ("linear", "mlp")
INNER_NORMS = ("layer_norm", "none")
ROPES = ("mini_batch", "absolute", "none")
IMPLEMENTATIONS = ("auto", "scan", "triton", "reference")
# Published inner learning rates, TTT paper section 2.7 (linear) and appendix (MLP).
PUBLISHED_BASE_LR = {"linear": 1.0, "mlp": 0.1}

# Fields that count something, of the model's and the depth decoder's configuration.
_COUNTS = {"vocab_size", "audio_vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_codebooks", "sliding_window"} | {
    "num_attention_heads", "num_key_value_heads", "head_dim", "ttt_num_heads", "ttt_mini_batch_size", "scan_checkpoint_group_size",
}  # fmt: skip
# What the depth decoder shares with the model, by its name there.
_SHARED = {
    "vocab_size": "vocab_size",
    "audio_vocab_size": "audio_vocab_size",
    "num_codebooks": "num_predicted_codebooks",
    "input_size": "hidden_size",
}
# What a saved configuration holds that follows from a field, and is worked out anew where an override changes that field.
_FOLLOWS = {
    "hidden_size": ("head_dim", "ttt_head_dim"),
    "num_attention_heads": ("head_dim", "num_key_value_heads"),
    "ttt_num_heads": ("ttt_head_dim",),
    "ttt_mixer": ("ttt_base_lr",),
    "ttt_inner_norm": ("ttt_base_lr",),
}

# Which file of a saved checkpoint holds what transformers' Auto classes ask for.
_MODEL = "modeling_moshi_ttt.MoshiTTTForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_moshi_ttt.MoshiTTTConfig",
    "AutoModel": _MODEL,
    "AutoModelForTextToWaveform": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
}


def default_base_lr(mixer: str, inner_norm: str, head_dim: int) -> float:
    """Without LayerNorm in the inner loss, the rate at which a frame of gate 1 writes as much as the bound on the step allows at b = 1.

    Exactly so for linear, where keys of norm 1 give 1 / (|k|^2 + 1) = 1/2; about so for a fresh MLP, whose hidden units have a norm of 0.6
    sqrt(D).
    """
    if inner_norm == "layer_norm":
        return PUBLISHED_BASE_LR[mixer]
    return head_dim / 2 if mixer == "linear" else 2.0


def parse_layers(layers: list[int] | str, num_hidden_layers: int) -> list[int]:
    """Turn a choice of layers into a sorted list of layer numbers.

    Args:
        layers: a list of numbers; or "all", "middle" (the middle third), "last:9", or ranges such as "23-31" and "0,4,8-11".
        num_hidden_layers: how many layers the temporal transformer has.

    Raises:
        ValueError: the text is not understood, a layer is repeated, or it lies outside `[0, num_hidden_layers)`.
    """
    last = num_hidden_layers - 1
    if len(layers) > MAX_ENTRIES:
        raise MoshiTTTError(f"`ttt_layers` must hold at most {MAX_ENTRIES} entries; it holds {len(layers)}.")
    if isinstance(layers, str):
        numbers = _parse_layer_text(layers.strip(), num_hidden_layers)
    else:
        numbers = list(layers)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise MoshiTTTError(f"`ttt_layers` holds {number!r}; it takes whole layer numbers from 0 to {last}.")
        if not 0 <= number <= last:
            raise MoshiTTTError(
                f"`ttt_layers` names layer {number}, but the model has layers 0 to {last} (`num_hidden_layers={num_hidden_layers}`); "
                "choose among these."
            )
    repeated = sorted({number for number in numbers if numbers.count(number) > 1})
    if repeated:
        raise MoshiTTTError(f"`ttt_layers` names layer {repeated[0]} more than once; name each layer once.")
    return sorted(numbers)


def _parse_layer_text(text: str, num_hidden_layers: int) -> list[int]:
    if text == "all":
        return list(range(num_hidden_layers))
    if text == "middle":
        third = num_hidden_layers // 3
        return list(range(third, num_hidden_layers - third))
    if match := re.fullmatch(r"last:(\d{1,9})", text):
        if int(match[1]) > num_hidden_layers:
            raise MoshiTTTError(f"`ttt_layers={text!r}` asks for more layers than the model has (`num_hidden_layers={num_hidden_layers}`).")
        return list(range(num_hidden_layers - int(match[1]), num_hidden_layers))
    numbers: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise MoshiTTTError(
                f'`ttt_layers={text!r}` must be a list, "all", "middle", "last:9", or ranges such as "23-31" or "0,4,8-11".'
            )
        numbers.extend(
            range(int(match[1]), min(int(match[2] or match[1]), num_hidden_layers) + 1)
        )  # of those beyond, one is enough to refuse
    return numbers


def _check_dtype(name: str) -> None:
    import torch  # here, as in the parent: a configuration can be read without it

    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise MoshiTTTError(f"`dtype={name!r}` is no dtype of torch's; write it as 'float32' or 'bfloat16'.")


@strict
class MoshiTTTConfig(MoshiConfig):
    r"""Configuration of [`MoshiTTTForConditionalGeneration`]: every field of `MoshiConfig`, and these.

    Args:
        ttt_layers (`list[int]` or `str`, defaults to `"middle"`):
            Layers of the temporal transformer with a TTT layer after attention: a list, `"23-31"`, `"0,4,8-11"`, `"all"`, `"middle"` (the
            middle third), `"last:9"`; stored as a list. An empty list is plain Moshi.
        ttt_mixer (`str`, defaults to `"mlp"`): the inner model, `"linear"` or `"mlp"`.
        ttt_inner_norm (`str`, defaults to `"layer_norm"`):
            The inner loss, `½‖LN(f(k)) − target‖²` as published, or with `"none"` `½‖f(k) − target‖²` and a bounded step: a memory that can
            be written over (`ttt_reference` has both). The answer is normalised either way.
        ttt_num_heads (`int`, *optional*): TTT heads; `num_attention_heads` unless given.
        ttt_head_dim (`int`, *optional*): width of a TTT head; `hidden_size / ttt_num_heads` unless given.
        ttt_mini_batch_size (`int`, defaults to 16): frames per inner mini-batch; 1 is online gradient descent.
        ttt_base_lr (`float`, *optional*): inner learning rate; 1.0 for `"linear"`, 0.1 for `"mlp"` unless given; with
            `ttt_inner_norm="none"` `ttt_head_dim / 2` for `"linear"`, 2.0 for `"mlp"`.
        ttt_write_threshold (`float`, defaults to 0.0):
            A frame whose gate, `sigmoid(x·w_h + b_h)` from 0 to 1, is below it writes nothing; 0 lets every frame write, as published.
        ttt_rope (`str`, defaults to `"mini_batch"`): rotary positions inside the TTT layer: `"mini_batch"` (t mod b), `"absolute"` or
            `"none"`.
        ttt_gate_init (`float`, defaults to 0.1): start of `gating_alpha`; the layer's output is scaled by its tanh.
        ttt_norm_eps (`float`, defaults to 1e-6): epsilon of the layer norm of the inner model.
        scan_checkpoint_group_size (`int`, defaults to 16):
            Mini-batches for which backward keeps one state of the fast weights; changes memory and time, never a number.
        ttt_implementation (`str`, defaults to `"auto"`): `"auto"` (Triton on a GPU where it can, else scan), `"scan"`, `"triton"`,
            `"reference"`.
        num_user_codebooks (`int`, *optional*): codebooks of the user's stream; `num_codebooks` (Moshi's own) unless given.
        user_depth_slices (`bool`, defaults to False):
            Whether the depth decoder predicts the user's codebooks after Moshi's own, as PersonaPlex's and J-Moshi's do. Talking uses
            Moshi's alone; training can use both.
        user_loss_weight (`float`, defaults to 0.0):
            What the user's codebooks weigh in the audio loss, as a factor of what Moshi's weigh; above 0 only with `user_depth_slices`.
        sliding_window (`int`, *optional*, defaults to 3000):
            Frames that attention sees, the newest among them. None: all of them, so that the memory of a stream grows with every frame.
        audio_delays (`list[int]`, *optional*):
            Delay in frames of each audio codebook, Moshi's first, then the user's; `[0, 1, 1, ...]` for either unless given. Text has none.
        silence_codes (`list[list[int]]`, *optional*):
            The user's codes of a silent channel, frame by frame until they repeat; `generate` lets the user fall silent with them at the
            end of a recording. A processor tells those of its codec (`processor.silence_codes()`).
        text_padding_ids (`list[int]`, defaults to `[3, 0]`): the two text ids that say "no word here": padding, and end of padding.
        text_padding_weight (`float`, defaults to 0.5): weight of those ids in the text loss.
        semantic_loss_weight (`float`, defaults to 100): weight of the first (semantic) codebook in the audio loss; the others weigh 1.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and what would be right.
    """

    model_type = "moshi_ttt"
    _auto_class = "AutoConfig"  # saved checkpoints carry this file
    # Of the temporal transformer; the models around it add their own parts.
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight", "norm": "keep_full_weight"}
    # What `Trainer` does not gather in evaluation: predictions are (logits, audio_logits).
    keys_to_ignore_at_inference = [
        "text_loss", "audio_loss", "last_hidden_state", "cache", "hidden_states", "attentions", "inner_losses", "write_gates",
    ]  # fmt: skip

    # Every frame has 1 + K labels. It makes `Trainer` say that it leaves out `label_smoothing_factor`, which the losses here do not take.
    problem_type: str | None = "multi_label_classification"  # type: ignore[assignment]
    if TYPE_CHECKING:  # once `check` has worked them out
        ttt_layers: list[int]
        ttt_num_heads: int
        ttt_head_dim: int
        ttt_base_lr: float | int
        num_user_codebooks: int
        audio_delays: list[int]
        text_padding_ids: list[int]
        audio_vocab_size: int
        head_dim: int
        num_key_value_heads: int

        def __init__(self, **fields: Any) -> None: ...  # of which these may still be None or text
    else:
        ttt_layers: list[int] | str = "middle"
        ttt_num_heads: int | None = None
        ttt_head_dim: int | None = None
        ttt_base_lr: float | int | None = None
        num_user_codebooks: int | None = None
        audio_delays: list[int] | None = None
        text_padding_ids: list[int] | None = None
    ttt_mixer: str = "mlp"
    ttt_inner_norm: str = "layer_norm"
    ttt_mini_batch_size: int = 16
    ttt_write_threshold: float | int = 0.0
    ttt_rope: str = "mini_batch"
    ttt_gate_init: float | int = 0.1
    ttt_norm_eps: float = 1e-6
    scan_checkpoint_group_size: int = 16
    ttt_implementation: str = "auto"
    sliding_window: int | None = 3000  # type: ignore[assignment]
    silence_codes: list[list[int]] | None = None
    user_depth_slices: bool = False
    user_loss_weight: float | int = 0.0
    text_padding_weight: float | int = 0.5
    semantic_loss_weight: float | int = 100.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.audio_vocab_size is None and self.audio_encoder_config is None:
            self.audio_vocab_size = 2048
        # As a dict, the parent fills in what the depth decoder shares with the model: vocabularies, widths, codebooks.
        depth = self.depth_decoder_config
        self.depth_decoder_config = depth.to_dict() if isinstance(depth, PreTrainedConfig) else dict(depth or {})
        self._check_numbers()  # before the parent divides by them
        if isinstance(self.dtype, str):  # which the parent looks up in torch
            _check_dtype(self.dtype)
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})  # type: ignore[no-untyped-call]
        if self.num_user_codebooks is None:
            self.num_user_codebooks = self.num_codebooks
        if isinstance(self.depth_decoder_config, PreTrainedConfig):
            self.depth_decoder_config.num_codebooks = self.num_predicted_codebooks
        self.check()

    def check(self) -> None:
        """Work out the fields that are None or text, and refuse what does not fit together.

        Models call it again, since fields can be set after construction; it leaves a configuration that is right as it is.

        Raises:
            ValueError: a field is out of range; the message names the field, its value and what would be right.
        """
        self._check_numbers()
        self._check_choices()
        self.ttt_layers = parse_layers(self.ttt_layers, self.num_hidden_layers)
        self._fill_heads()
        if self.ttt_base_lr is None:
            self.ttt_base_lr = default_base_lr(self.ttt_mixer, self.ttt_inner_norm, self.ttt_head_dim)
        if self.text_padding_ids is None:
            self.text_padding_ids = [*TEXT_PADDING_IDS]
        if self.audio_delays is None:
            self.audio_delays = [min(k, 1) for count in (self.num_codebooks, self.num_user_codebooks) for k in range(count)]
        self._check_codebooks()
        self._check_depth()

    def validate_moshi_ttt(self) -> None:
        """Saving runs it: what cannot be loaded again is not written."""
        self.check()

    def _check_numbers(self) -> None:
        depth = self.depth_decoder_config
        parts = {
            "": {name: getattr(self, name) for name in self.__dataclass_fields__},
            "depth_decoder_config.": depth.to_dict() if isinstance(depth, PreTrainedConfig) else (depth or {}),
            "rope_parameters.": self.rope_parameters or {},
        }
        for prefix, fields in parts.items():
            for field, value in fields.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise MoshiTTTError(f"`{prefix}{field}={value}` must be a finite number.")
                if field in _COUNTS and isinstance(value, int) and value < 1:
                    raise MoshiTTTError(f"`{prefix}{field}={value}` must be at least 1.")
                if isinstance(value, int) and value > LIMITS.get(field, math.inf):
                    raise MoshiTTTError(f"`{prefix}{field}` must be at most {LIMITS[field]}; it is {short(value)}.")
        weights = ("text_padding_weight", "semantic_loss_weight", "user_loss_weight", "initializer_range", "attention_dropout")
        self._require(
            *((field, (getattr(self, field) or 0) >= 0, "not be negative") for field in (*weights, "num_user_codebooks")),
            *(
                (field, getattr(self, field) is None or getattr(self, field) > 0, "be greater than 0")
                for field in ("ttt_norm_eps", "ttt_base_lr", "rms_norm_eps")
            ),
            (
                "semantic_loss_weight",
                self.semantic_loss_weight > 0 or self.num_codebooks > 1,
                "be above 0 for a model of one codebook (`num_codebooks=1`), or no audio would be trained",
            ),
            (
                "ttt_write_threshold",
                0 <= self.ttt_write_threshold < 1,
                "be at least 0 and below 1, as the gates are; choose 0 to let every frame write",
            ),
            (
                "user_loss_weight",
                not self.user_loss_weight or self.user_depth_slices,
                "be 0 where the depth decoder does not predict the user's codebooks (`user_depth_slices=False`); convert a model that does, "
                "with `--keep-user-slices`",
            ),
        )

    def _check_choices(self) -> None:
        for prefix, config in (("", self), ("depth_decoder_config.", self.depth_decoder_config)):
            if getattr(config, "tie_word_embeddings", False):
                raise MoshiTTTError(
                    f"`{prefix}tie_word_embeddings=True` must be False: the embeddings have a row, the initial token, that no logit has; "
                    "set it to False."
                )
        from transformers.activations import ACT2FN  # brings triton, which importing this file must not

        depth = self.depth_decoder_config
        if not isinstance(depth, PreTrainedConfig):
            raise MoshiTTTError(
                f"`depth_decoder_config={depth}` is no configuration; give it when the model's is made, which completes it."
            )
        choices = (
            ("ttt_mixer", self.ttt_mixer, MIXERS),
            ("ttt_inner_norm", self.ttt_inner_norm, INNER_NORMS),
            ("ttt_rope", self.ttt_rope, ROPES),
            ("ttt_implementation", self.ttt_implementation, IMPLEMENTATIONS),
            ("rope_parameters['rope_type']", (self.rope_parameters or {}).get("rope_type", "default"), ("default",)),
            ("hidden_act", self.hidden_act, tuple(ACT2FN)),
            ("depth_decoder_config.hidden_act", depth.hidden_act, tuple(ACT2FN)),
        )
        for field, chosen, allowed in choices:
            if chosen not in allowed:
                raise MoshiTTTError(f"`{field}={chosen!r}` must be one of {', '.join(map(repr, allowed))}.")

    def _fill_heads(self) -> None:
        self._require(
            ("num_attention_heads", self.hidden_size % self.num_attention_heads == 0, f"divide `hidden_size={self.hidden_size}`"),
            (
                "num_key_value_heads",
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"divide `num_attention_heads={self.num_attention_heads}`",
            ),
            ("head_dim", self.head_dim % 2 == 0, "be an even number (RoPE turns pairs); choose other `num_attention_heads`"),
        )
        if self.ttt_num_heads is None:
            self.ttt_num_heads = self.num_attention_heads
        divides = self.hidden_size % self.ttt_num_heads == 0
        self._require(
            ("ttt_num_heads", divides or self.ttt_head_dim is not None, f"divide `hidden_size={self.hidden_size}`; or set `ttt_head_dim`")
        )
        if self.ttt_head_dim is None:
            self.ttt_head_dim = self.hidden_size // self.ttt_num_heads
        most = 16 * self.hidden_size // self.ttt_num_heads
        self._require(
            ("ttt_head_dim", self.ttt_head_dim >= 2, "be at least 2: targets are standardized over it; choose fewer `ttt_num_heads`"),
            (
                "ttt_head_dim",
                self.ttt_head_dim <= most,
                f"be at most {most}, 16 times `hidden_size={self.hidden_size}` over `ttt_num_heads={self.ttt_num_heads}`; choose smaller heads",
            ),
            (
                "ttt_head_dim",
                self.ttt_head_dim % 2 == 0 or self.ttt_rope == "none",
                "be an even number (RoPE turns pairs); choose other heads or `ttt_rope='none'`",
            ),
        )

    def _require(self, *rules: tuple[str, bool, str]) -> None:
        """MoshiTTTError for the first of (field, whether its rule holds, the rule and its cure) that does not hold."""
        for field, holds, rule in rules:
            if not holds:
                raise MoshiTTTError(f"`{field}={getattr(self, field)}` must {rule}.")

    def _check_codebooks(self) -> None:
        streams = self.num_codebooks + self.num_user_codebooks
        if len(self.audio_delays) != streams or not all(0 <= delay <= MAX_DELAY for delay in self.audio_delays):
            raise MoshiTTTError(
                f"`audio_delays={self.audio_delays}` must hold {streams} delays of 0 to {MAX_DELAY} frames: "
                f"`num_codebooks={self.num_codebooks}` of Moshi's, then `num_user_codebooks={self.num_user_codebooks}` of the user's; "
                "give as many, or None for `[0, 1, 1, ...]` of each."
            )
        for frame in self.silence_codes or []:
            if len(frame) != self.num_user_codebooks or not all(0 <= code < self.audio_vocab_size for code in frame):
                raise MoshiTTTError(
                    f"`silence_codes` holds {frame}; each frame has {self.num_user_codebooks} codes from 0 to "
                    f"{self.audio_vocab_size - 1}, one a codebook of the user's; take them from the codec with `processor.silence_codes()`."
                )
        check_padding_ids(self.text_padding_ids)
        vocabulary = f"lie in the text vocabulary, below `vocab_size={self.vocab_size}`"
        self._require(("text_padding_ids", max(self.text_padding_ids) < self.vocab_size, vocabulary))

    def _check_depth(self) -> None:
        for name, field in _SHARED.items():
            found, ours = getattr(self.depth_decoder_config, name), getattr(self, field)
            if found != ours:
                raise MoshiTTTError(
                    f"`depth_decoder_config.{name}={found}` differs from `{field}={ours}`; "
                    f"give `{field}` when the configuration is made, which sets both."
                )

    @property
    def num_predicted_codebooks(self) -> int:
        """Codebooks that the depth decoder has slices for: Moshi's, and with `user_depth_slices` the user's."""
        return self.num_codebooks + (self.num_user_codebooks if self.user_depth_slices else 0)

    @property
    def delays(self) -> list[int]:
        """Delay in frames of every stream: text, Moshi's codebooks, the user's codebooks."""
        return [0, *self.audio_delays]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the parent's; a plain Moshi checkpoint's configuration is read as one of this class, TTT fields at their defaults."""
        with os_errors_as_ours():
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, MoshiConfig.model_type):
            raise MoshiTTTError(
                f"{pretrained_model_name_or_path!r} holds a model of type {model_type!r}; MoshiTTTConfig reads 'moshi_ttt' and 'moshi'."
            )
        if model_type == MoshiConfig.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type, "architectures": ["MoshiTTTForConditionalGeneration"]}
        return config_dict, kwargs

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As the parent's; what chooses code or is too large is refused, as in `from_dict`."""
        check_stored(cls._dict_from_json_file(json_file), str(json_file))
        return super().from_json_file(json_file)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the parent's, but overrides (`ttt_layers="23-31"`) join the fields before they are checked, so they are parsed and refused
        alike.
        """
        check_stored(config_dict, "The configuration")
        # The parent knows more ways to write `dtype` than its field takes.
        given = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.__dataclass_fields__ and key != "dtype"}
        for key in given.keys() & cls.sub_configs.keys():
            if isinstance(given[key], dict) and isinstance(config_dict.get(key), dict):
                given[key] = {**config_dict[key], **given[key]}
        changed = [key for key in _FOLLOWS if key in given and given[key] != config_dict.get(key, cls.__dataclass_fields__[key].default)]
        followers = {follower: None for key in changed for follower in _FOLLOWS[key]}
        try:
            return super().from_dict({**config_dict, **followers, **given}, **kwargs)
        except MoshiTTTError:
            raise
        except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
            # transformers has no error of its own for a field of another type or a part that it does not know
            raise MoshiTTTError(f"The configuration cannot be read: {' '.join(str(error).split())[:300]}") from error

    @classmethod
    def refuse_other_inner_norm(cls, name_or_path: str, inner_norm: str, **where: Any) -> None:
        """ValueError where a checkpoint's TTT layers were trained with another inner loss; `where` finds it on the Hub, as in
        `from_pretrained`.
        """
        try:
            stored, _ = cls.get_config_dict(name_or_path, **where)
        except OSError:
            return  # loading says what is missing
        trained = stored.get("ttt_inner_norm", "layer_norm")  # before 0.2 there was no other
        if stored.get("ttt_layers") and trained != inner_norm:
            raise MoshiTTTError(
                f"`ttt_inner_norm={inner_norm!r}` is not what the TTT layers of {str(name_or_path)!r} were trained with ({trained!r}); "
                "leave the field out, or, to train them on with another inner loss, change it in the checkpoint's config.json."
            )


__all__ = ["MoshiTTTConfig"]

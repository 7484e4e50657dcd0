"""Moshi's depth decoder: the eight codes of one frame, one after the other, given the temporal transformer's hidden state.

Every codebook has its own weights, stacked as `[K, out, in]` under transformers' names. They are used in place: one batched product
over K in training, one slice per codebook in decoding; no copy per frame.

Shapes: N frames (batch times time), K codebooks, E depth width, H heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MoshiDepthConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear, MoshiRMSNorm

Sampler = Callable[[torch.Tensor, int], torch.Tensor]
KeyValues = tuple[torch.Tensor, torch.Tensor]


def embed_or_zero(table: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Embed `tokens` `[...]` to `[..., E]`; a negative token (Moshi's zero token, -1) embeds to exactly 0."""
    embedded: torch.Tensor = table(tokens.clamp(min=0)) * (tokens >= 0).unsqueeze(-1)
    return embedded


# What PEFT shows of a module that it cannot adapt.
LORA_HINT = (
    "a weight [codebooks, out, in]: name it in LoRA's `target_parameters`, with `lora_dropout=0`; for the temporal transformer alone "
    r"write `target_modules=r'decoder\..*\.self_attn\.(q|v)_proj\.linear'`"
)


class DepthLinear(MoshiFlexibleLinear):
    """One bias-free linear map per codebook, with the parameter of transformers' `MoshiFlexibleLinear`."""

    def extra_repr(self) -> str:
        return LORA_HINT

    def forward(self, x: torch.Tensor, codebook: int | None = None) -> torch.Tensor:
        """`[K, N, in]` -> `[K, N, out]` with all K maps, or `[N, in]` -> `[N, out]` with the map of one codebook."""
        if codebook is None:
            return torch.bmm(x, self.weight.transpose(1, 2))
        return F.linear(x, self.weight[codebook])


class DepthProjection(nn.Module):
    """A `DepthLinear` under the name that transformers' `MoshiLinear` gives it."""

    def __init__(self, input_size: int, output_size: int, num_codebooks: int):
        super().__init__()
        self.linear = DepthLinear(input_size, output_size, num_codebooks)

    def forward(self, x: torch.Tensor, codebook: int | None = None) -> torch.Tensor:
        projected: torch.Tensor = self.linear(x, codebook)
        return projected


class DepthAttention(nn.Module):
    """Causal attention over the codebooks of one frame; no positions, since every codebook has weights of its own."""

    def __init__(self, config: MoshiDepthConfig):
        super().__init__()
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        width, num_codebooks = config.num_attention_heads * self.head_dim, config.num_codebooks
        self.q_proj = DepthProjection(config.hidden_size, width, num_codebooks)
        self.k_proj = DepthProjection(config.hidden_size, width, num_codebooks)
        self.v_proj = DepthProjection(config.hidden_size, width, num_codebooks)
        self.o_proj = DepthProjection(width, config.hidden_size, num_codebooks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[K, N, E]` -> `[K, N, E]`."""
        q, k, v = (  # [N, H, K, D]
            project(x).unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: torch.Tensor = self.o_proj(attended.permute(2, 0, 1, 3).flatten(-2))
        return output

    def step(self, x: torch.Tensor, codebook: int, past: KeyValues | None) -> tuple[torch.Tensor, KeyValues]:
        """One codebook, `[N, E]` -> `[N, E]`, attending to the codebooks before it in `past`."""
        q, k, v = (  # [N, H, 1, D]
            project(x, codebook).unflatten(-1, (-1, self.head_dim)).unsqueeze(2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(attended.flatten(1), codebook), (k, v)


class DepthMLP(nn.Module):
    """Gated MLP, one per codebook."""

    def __init__(self, config: MoshiDepthConfig):
        super().__init__()
        self.fc1 = DepthLinear(config.hidden_size, config.ffn_dim, config.num_codebooks)
        self.fc2 = DepthLinear(config.ffn_dim // 2, config.hidden_size, config.num_codebooks)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, codebook: int | None = None) -> torch.Tensor:
        gate, value = self.fc1(x, codebook).chunk(2, dim=-1)
        output: torch.Tensor = self.fc2(self.activation(gate) * value, codebook)
        return output


class DepthDecoderLayer(GradientCheckpointingLayer):
    """Attention over codebooks and MLP, each behind an RMS norm and added to its input."""

    def __init__(self, config: MoshiDepthConfig):
        super().__init__()
        self.self_attn = DepthAttention(config)
        self.mlp = DepthMLP(config)
        self.input_layernorm = MoshiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MoshiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[K, N, E]` -> `[K, N, E]`."""
        x = x + self.self_attn(self.input_layernorm(x))
        output: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output

    def step(self, x: torch.Tensor, codebook: int, past: KeyValues | None) -> tuple[torch.Tensor, KeyValues]:
        """One codebook, `[N, E]` -> `[N, E]`."""
        attended, present = self.self_attn.step(self.input_layernorm(x), codebook, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), codebook), present


class MoshiTTTDepthDecoder(PreTrainedModel):
    """Predicts Moshi's K codes of a frame from the hidden state of that frame, its text token and the codes already chosen.

    Args:
        config: `MoshiDepthConfig`; parameter names are transformers' `MoshiDepthDecoder`'s.
        part: of a model that draws the start values of all its parts, in the order of its modules.
    """

    config: MoshiDepthConfig
    config_class = MoshiDepthConfig
    base_model_prefix = "depth_decoder"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DepthDecoderLayer"]

    def __init__(self, config: MoshiDepthConfig, part: bool = False):
        super().__init__(config)
        self._part = part
        self.text_embed_tokens = nn.Embedding(config.vocab_size + 1, config.hidden_size)
        # The last codebook is never an input.
        self.embed_tokens = nn.ModuleList(
            nn.Embedding(config.audio_vocab_size + 1, config.hidden_size) for _ in range(config.num_codebooks - 1)
        )
        self.input_projections = DepthLinear(config.input_size, config.hidden_size, config.num_codebooks)
        self.layers = nn.ModuleList(DepthDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_heads = DepthLinear(config.hidden_size, config.audio_vocab_size, config.num_codebooks)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, from a checkpoint of its own or of the whole model, whose `embed_tokens` are other tables than these."""
        hub = {name: kwargs[name] for name in ("revision", "subfolder", "cache_dir", "token", "local_files_only") if name in kwargs}
        saved, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        if saved.get("model_type") != MoshiDepthConfig.model_type:
            kwargs.setdefault("key_mapping", {r"^embed_tokens\.": "whole.embed_tokens.", r"^depth_decoder\.": ""})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **{"use_safetensors": True, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = []  # saved under its own names
        return loaded

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # any, since attention over the codebooks is SDPA's whatever the temporal transformer runs

    def init_parallel_plans(self) -> None:
        """As the parent's, without the plans of `MoshiDepthConfig`, which name modules of transformers' own depth decoder."""
        super().init_parallel_plans()
        self._fsdp_plan = {}

    def init_weights(self) -> None:
        """As the parent's, unless another model does it."""
        if not self._part:
            super().init_weights()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MoshiFlexibleLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    def _embed(self, tokens: torch.Tensor, codebook: int) -> torch.Tensor:
        """The token before `codebook`: the text token before the first, else the code before it. `[N]` -> `[N, E]`."""
        return embed_or_zero(self.text_embed_tokens if codebook == 0 else self.embed_tokens[codebook - 1], tokens)

    def forward(self, hidden_states: torch.Tensor, text_tokens: torch.Tensor, audio_codes: torch.Tensor) -> torch.Tensor:
        """Logits of all codes of N frames, teacher-forced.

        Args:
            hidden_states: `[N, input_size]`, of the temporal transformer.
            text_tokens: `[N]` ids, the initial id, or -1.
            audio_codes: `[N, K]` codes, the initial code, or -1; the last column is not read.

        Returns:
            `[K, N, card]`: entry k is the prediction of `audio_codes[:, k]`.
        """
        inputs = [text_tokens, *audio_codes.unbind(dim=1)[:-1]]
        embedded = torch.stack([self._embed(tokens, codebook) for codebook, tokens in enumerate(inputs)])  # [K, N, E]
        x = embedded + self.input_projections(hidden_states.expand(len(inputs), -1, -1))
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.lm_heads(x)
        return logits

    def decode(self, hidden_states: torch.Tensor, text_tokens: torch.Tensor, forced: torch.Tensor, sample: Sampler) -> torch.Tensor:
        """Choose the codes of one frame one after the other, those of as many codebooks as `forced` has.

        Args:
            hidden_states: `[B, input_size]`.
            text_tokens: `[B]`, the frame's text.
            forced: `[B, K]`; a code, or -1 for none, is taken as it is; below that it is sampled.
            sample: `[B, card]` logits and the codebook's number -> `[B]` codes.

        Returns:
            `[B, K]` codes.
        """
        past: list[KeyValues | None] = [None] * len(self.layers)
        token, chosen = text_tokens, []
        for codebook in range(forced.shape[1]):
            x = self._embed(token, codebook) + self.input_projections(hidden_states, codebook)
            for i, layer in enumerate(self.layers):
                x, past[i] = layer.step(x, codebook, past[i])  # type: ignore[operator]
            sampled = sample(self.lm_heads(x, codebook), codebook)
            token = torch.where(forced[:, codebook] >= -1, forced[:, codebook], sampled)
            chosen.append(token)
        return torch.stack(chosen, dim=1)

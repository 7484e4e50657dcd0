"""Moshi with Test-Time-Training layers.

The temporal transformer takes one step of 80 ms at a time: the sum of the embeddings of a text token, Moshi's K codes and the user's
codes, each late by its codebook's delay. Chosen layers carry a TTT layer between attention and MLP. The depth decoder then predicts
the K codes of the step one by one.

Shapes: B rows, T frames, E width, S = 1 + K + K_user streams (text, Moshi's codebooks, the user's), V text vocabulary, P codebooks that
the depth decoder predicts (K, or K + K_user).
Leaf modules and parameter names are transformers' Moshi's (models/moshi), so its checkpoints load as they are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear, MoshiGatingMLP, MoshiRMSNorm

from .attention_moshi_ttt import Frames, MoshiTTTAttention, as_implemented, rotary_embedding, visible_keys
from .cache_moshi_ttt import MoshiTTTCache, check_cache, given_cache
from .configuration_moshi_ttt import MoshiTTTConfig
from .depth_decoder import MoshiTTTDepthDecoder, embed_or_zero
from .errors_moshi_ttt import MoshiTTTError, os_errors_as_ours
from .frames_moshi_ttt import AlignedFrames, DelayedSteps, align, delay_frames, refuse_arguments
from .generation_moshi_ttt import MoshiTTTGenerationMixin
from .loss_moshi_ttt import audio_weights, codebook_weights, stream_losses, text_weights, whole_weights
from .outputs_moshi_ttt import MoshiTTTModelOutput, MoshiTTTOutput, put_back
from .quantization_moshi_ttt import MoshiTTTInt8Config as _INT8  # noqa: F401  # registers the way to load int8 checkpoints
from .rings import KeyValues, ring_positions
from .ttt_layer import TTTMLP, TTTInnerLosses, TTTLayer, TTTLinear
from .ttt_state import TTTState

TTT_MIXERS = {"linear": TTTLinear, "mlp": TTTMLP}


class LayerOutput(NamedTuple):
    """A layer's output `[B, T, E]`, its new keys and values (see [`MoshiTTTAttention`]), what became of its TTT memory, its attention
    weights where they are at hand, and its write gates where they were asked for."""

    hidden_states: torch.Tensor
    key_values: KeyValues | None
    ttt_state: TTTState | None
    inner_losses: TTTInnerLosses | None
    attentions: torch.Tensor | None
    write_gates: torch.Tensor | None


class TTTGate(nn.Module):
    """`tanh(gating_alpha) * x`, a module of its own so that an adapter can hold its parameter as it holds the TTT layer's."""

    def __init__(self, hidden_size: int, start: float):
        super().__init__()
        self.gating_alpha = nn.Parameter(torch.full((hidden_size,), float(start)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, E]` -> `[B, T, E]`, in the dtype of x."""
        return torch.tanh(self.gating_alpha).to(x.dtype) * x


class MoshiTTTDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a gated TTT layer where the configuration asks for one, then the MLP; each behind a norm, each added to its input."""

    def __init__(self, config: MoshiTTTConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MoshiTTTAttention(config, layer_idx)
        self.mlp = MoshiGatingMLP(config)
        self.input_layernorm = MoshiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MoshiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ttt: TTTLayer | None = None
        if layer_idx in config.ttt_layers:
            self.ttt_layernorm = MoshiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.ttt = TTT_MIXERS[config.ttt_mixer](config, layer_idx)
            self.ttt_gate = TTTGate(config.hidden_size, config.ttt_gate_init)

    @property
    def gating_alpha(self) -> torch.Tensor:
        """`[E]`, the gate of this layer's TTT layer before its tanh."""
        return self.ttt_gate.gating_alpha

    def forward(
        self,
        hidden_states: torch.Tensor,
        frames: Frames,
        past: KeyValues | None = None,
        ttt_state: TTTState | None = None,
        output_inner_losses: bool = False,
        output_write_gates: bool = False,
    ) -> LayerOutput:
        """`[B, T, E]` -> `[B, T, E]`, with the layer's memory in and out by argument."""
        attended, key_values, attentions = self.self_attn(self.input_layernorm(hidden_states), frames, past)
        hidden_states = hidden_states + attended
        inner_losses, write_gates = None, None
        if self.ttt is not None:
            inputs = (self.ttt_layernorm(hidden_states), ttt_state, frames.positions, frames.mask, frames.reset_mask)
            inner_losses = self.ttt.inner_losses(*inputs) if output_inner_losses else None
            if output_write_gates:
                with torch.autocast(hidden_states.device.type, enabled=False):  # as the layer itself takes them
                    write_gates = self.ttt.write_gate(inputs[0])
            remembered, ttt_state = self.ttt(*inputs)
            hidden_states = hidden_states + self.ttt_gate(remembered)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return LayerOutput(hidden_states, key_values, ttt_state, inner_losses, attentions, write_gates)


class MoshiTTTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and what transformers needs to know of the family."""

    config: MoshiTTTConfig
    config_class = MoshiTTTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["audio", "text"]
    output_modalities = ["audio", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The window and the per-row memory need an explicit mask, which flash attention does not take.
    _supports_flash_attn = False
    _no_split_modules = ["MoshiTTTDecoderLayer", "DepthDecoderLayer"]
    # A plain Moshi checkpoint carries Mimi, which here belongs to the processor.
    _keys_to_ignore_on_load_unexpected = [r"^audio_encoder\."]
    # Names in a checkpoint of a larger model that holds this one -> names here, as regular expressions.
    _names_in_whole: dict[str, str] = {}

    def __init__(self, config: MoshiTTTConfig):
        super().__init__(config)
        config.check()  # fields can be set after the configuration was made

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, from a checkpoint of this model or of a whole that holds it; weights are read from safetensors alone.

        Raises:
            ValueError: a weight is NaN or infinite, or `ttt_inner_norm` is not the one that the TTT layers were trained with.
        """
        inner_norm = kwargs.get("ttt_inner_norm", getattr(kwargs.get("config"), "ttt_inner_norm", None))
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if inner_norm is not None and source is not None:
            where = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token", "local_files_only") if name in kwargs}
            MoshiTTTConfig.refuse_other_inner_norm(source, inner_norm, **where)
        if cls._names_in_whole:
            kwargs.setdefault("key_mapping", cls._names_in_whole)
        with os_errors_as_ours():
            loaded = super().from_pretrained(*args, **{"use_safetensors": True, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if cls._names_in_whole:
            model._weight_conversions = []  # saved under its own names
        for name, parameter in model.named_parameters():
            plain = type(parameter.data) is torch.Tensor and parameter.device.type != "meta"  # quantized weights are integers inside
            if plain and not bool(torch.isfinite(parameter).all()):
                raise MoshiTTTError(f"`{name}` holds weights that are not finite; the checkpoint is damaged or its training diverged.")
        return loaded

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As the parent's, to which every way to switch recomputation on leads, and never reentrant.

        Raises:
            ValueError: `use_reentrant=True`, under which what a layer returns beside its output (keys, TTT states) loses its gradients.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise MoshiTTTError("`use_reentrant=True` loses the gradients of TTT states; leave it out or say False.")
        not_reentrant = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, not_reentrant, every_n_layers)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """The text embeddings where nothing is asked for, as the parent's.

        Raises:
            ValueError: another size is asked for.
        """
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            asked = f"new_num_tokens={new_num_tokens}, pad_to_multiple_of={pad_to_multiple_of}"
            raise MoshiTTTError(
                f"`resize_token_embeddings({asked})`: the last row of both text tables (the model's and the depth decoder's) is the "
                f"initial token and would move; set `vocab_size` (now {self.config.vocab_size}) in a new configuration and train anew."
            )
        return self.get_input_embeddings()  # type: ignore[return-value]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TTTLayer):
            module.reset_ttt_parameters(self.config.initializer_range)
        elif isinstance(module, TTTGate):
            init.constant_(module.gating_alpha, float(self.config.ttt_gate_init))
        elif isinstance(module, MoshiFlexibleLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class MoshiTTTModel(MoshiTTTPreTrainedModel):
    """The temporal transformer: embedded steps in, hidden states out."""

    _names_in_whole = {r"^(decoder\.)?model\.": ""}

    def __init__(self, config: MoshiTTTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size + 1, config.hidden_size)
        self.layers = nn.ModuleList(MoshiTTTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MoshiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: MoshiTTTCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_inner_losses: bool = False,
        cache: MoshiTTTCache | None = None,
        output_write_gates: bool = False,
    ) -> MoshiTTTModelOutput:
        """Run frames through all layers.

        Args:
            inputs_embeds: `[B, T, E]`.
            attention_mask: `[B, T]`, ones then zeros in each row: padding stands on the right.
            past_key_values, cache: the memory that goes in, by either name; it is brought up to date.
            output_hidden_states: also return the input of every layer; `config.output_hidden_states` when None.
            output_attentions: also return the attention weights of every layer, by eager attention; `config.output_attentions` when None.
            output_inner_losses: also return the inner losses of every TTT layer.
            output_write_gates: also return the gates of every TTT layer.
        """
        past_key_values = given_cache(cache, past_key_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        # Only eager attention has weights to give.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        mask = None if attention_mask is None else attention_mask.bool()
        past = past_key_values
        frames = self._frames(inputs_embeds, mask, past, implementation)
        hidden_states, seen, outputs, attentions = inputs_embeds, [], [], []
        for i, layer in enumerate(self.layers):
            key_values, state = (past.state.key_values[i], past.state.ttt_states[i]) if past is not None else (None, None)
            asked = {"output_inner_losses": output_inner_losses, "output_write_gates": output_write_gates}
            output = layer(hidden_states, frames=frames, past=key_values, ttt_state=state, **asked)
            seen.append(hidden_states)
            hidden_states = output.hidden_states
            if output_attentions:
                attentions.append(output.attentions)
            # Nobody reads attention weights again, nor, without a memory, keys, values and states.
            unread = {"attentions": None} if past is not None else {"attentions": None, "key_values": None, "ttt_state": None}
            outputs.append(output._replace(**unread))
        hidden_states = self.norm(hidden_states)
        if past is not None:
            lengths = None if mask is None else mask.sum(dim=1)
            past.advance(outputs, inputs_embeds.shape[1], lengths, in_place=frames.slot is not None)
        return MoshiTTTModelOutput(
            last_hidden_state=hidden_states,
            cache=past_key_values,
            hidden_states=(*seen, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            inner_losses={i: output.inner_losses for i, output in enumerate(outputs) if output.inner_losses is not None}
            if output_inner_losses
            else None,
            write_gates={i: output.write_gates for i, output in enumerate(outputs) if output.write_gates is not None}
            if output_write_gates
            else None,
        )

    def _frames(
        self, inputs_embeds: torch.Tensor, mask: torch.Tensor | None, past: MoshiTTTCache | None, implementation: str | None
    ) -> Frames:
        """What the layers need to know of these frames."""
        rows, num_frames, _ = inputs_embeds.shape
        window, dtype = self.config.sliding_window, inputs_embeds.dtype
        positions = torch.arange(num_frames, device=inputs_embeds.device).expand(1 if mask is None and past is None else rows, -1)
        slot, reset_mask = None, None
        if past is not None:
            check_cache(past, rows, len(self.layers), self.config.ttt_layers)
            past.make_room()
            positions, reset_mask = past.frames[:, None] + positions, past.state.reset_mask
        key_positions = positions if mask is None else positions.masked_fill(~mask, -1)
        if past is not None and past.capacity and num_frames == 1 and not torch.is_grad_enabled():
            slot = past.frames % past.capacity
            visible = ring_positions(past.frames + 1, past.state.attention_start, past.capacity)[:, None, None] >= 0
        else:
            if past is not None:
                key_positions = torch.cat([past.key_positions(), key_positions], dim=1)
            visible = visible_keys(positions, key_positions, window)
        # (which is a branch on the length, and so not for a graph)
        branch = not torch.compiler.is_compiling()
        plainly_causal = branch and past is None and mask is None and (window is None or num_frames <= window) and implementation == "sdpa"
        shown = None if plainly_causal else as_implemented(visible, implementation, dtype)
        return Frames(
            implementation, rotary_embedding(positions, self.config, dtype), shown, positions.expand(rows, -1), mask, reset_mask, slot
        )


class MoshiTTTForCausalLM(MoshiTTTPreTrainedModel):
    """The temporal transformer with its text head, as transformers nests them."""

    _names_in_whole = {r"^decoder\.": ""}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoshiTTTConfig):
        super().__init__(config)
        self.model = MoshiTTTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, MoshiTTTModelOutput]:
        """Text logits `[B, T, V]`, and the output of [`MoshiTTTModel`], which the other arguments go to."""
        outputs = self.model(inputs_embeds, **kwargs)
        return self.lm_head(outputs.last_hidden_state), outputs


class MoshiTTTForConditionalGeneration(MoshiTTTPreTrainedModel, MoshiTTTGenerationMixin):  # type: ignore[misc]  # `output_modalities`
    """Moshi with TTT layers: trains on aligned frames, talks frame by frame through [`new_stream`].

    Frames go in aligned in time, as the processor makes them; the model delays and shifts them itself. With `past_key_values` they
    continue the streams it holds, so that a recording in windows gives what it gives in one piece.

    Args of forward:
        input_ids: `[B, T]` text tokens; -1 is the zero token. All -1 when None.
        moshi_audio_codes: `[B, K, T]` Moshi's codes, or -1. All -1 when None.
        user_audio_codes: `[B, K_user, T]` the user's codes, or -1. All -1 when None.
        text_labels: `[B, T]`; -100 or -1 is not trained. Usually `input_ids` itself.
        audio_labels: `[B, K, T]`; -100 or -1 is not trained. Usually `moshi_audio_codes` itself. With `config.user_depth_slices` also
            `[B, K + K_user, T]`, the user's after Moshi's, which weigh `config.user_loss_weight`.
            Within a frame the depth decoder is teacher-forced with the labels, and with the inputs where there are none: what differs
            between the two (noise on the inputs) changes only what the model hears of the past.
        attention_mask: `[B, T]`, 1 for frames that are there. The others change no memory and are not trained.
        past_key_values, cache: the memory of the streams, by either name; it is brought up to date in place.
        use_cache: return the memory after these frames; outside training `config.use_cache` when None.
        num_items_in_batch:
            What the losses are divided by, when the batch is a part of a larger one: the (text, audio) loss weights of the whole in a
            tensor of two (the sum of [`loss_weights`] of its parts; 0 for a stream that is trained nowhere), or as one number the frames
            of the whole.
        output_hidden_states: also return the hidden states before each layer, and the last; `config.output_hidden_states` when None.
        output_attentions: also return the attention weights of every layer, by eager attention; `config.output_attentions` when None.
        output_inner_losses: also return the TTT layers' inner losses.
        output_write_gates: also return how far the TTT layers opened their memory to each frame.
        return_dict: False gives a plain tuple of what is not None; `config.return_dict` when None.
        others: what PEFT's task types pass beside these (`labels`, `inputs_embeds`, ...); None, or it is refused.

    Raises:
        ValueError: shapes, codebooks or lengths that do not fit, codes out of range, a memory of another batch or model, or two memories, a
            `num_items_in_batch` of 0, below 0 or not finite, an unknown argument.
        TypeError: `past_key_values` is not what [`new_cache`] makes.
    """

    _auto_class = "AutoModel"  # saved checkpoints carry the code
    base_model_prefix = "decoder"
    _fsdp_plan = {"embed_tokens.*": "free_full_weight", "depth_decoder": "free_full_weight"}
    # The loss is a mean already; `Trainer` then divides by the accumulation steps as it should.
    accepts_loss_kwargs = False

    def __init__(self, config: MoshiTTTConfig):
        super().__init__(config)
        self.embed_tokens = nn.ModuleList(nn.Embedding(config.audio_vocab_size + 1, config.hidden_size) for _ in config.audio_delays)
        self.decoder = MoshiTTTForCausalLM(config)
        self.depth_decoder = MoshiTTTDepthDecoder(config.depth_decoder_config, part=True)  # type: ignore[arg-type]
        self.generation_config._from_model_config = False  # else settings of our own, such as text_temperature, would be dropped on loading
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.decoder.model.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.decoder.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.lm_head = new_embeddings

    def new_cache(self, batch_size: int = 1) -> MoshiTTTCache:
        """An empty memory for `batch_size` streams, on the device that embeds their tokens."""
        table = self.decoder.model.embed_tokens
        hook = getattr(table, "_hf_hook", None)  # of accelerate, where weights wait elsewhere until they are used
        device = getattr(hook, "execution_device", None)
        return MoshiTTTCache(self.config, batch_size, device=table.weight.device if device is None else device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The input of the temporal transformer: delayed tokens `[B, S, T]` -> summed embeddings `[B, T, E]`; -1 adds exactly 0."""
        summed: torch.Tensor = sum(embed_or_zero(table, tokens[:, 1 + k]) for k, table in enumerate(self.embed_tokens))  # type: ignore[assignment]
        return summed + embed_or_zero(self.decoder.model.embed_tokens, tokens[:, 0])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        moshi_audio_codes: torch.LongTensor | None = None,
        user_audio_codes: torch.LongTensor | None = None,
        text_labels: torch.LongTensor | None = None,
        audio_labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: MoshiTTTCache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_inner_losses: bool = False,
        return_dict: bool | None = None,
        cache: MoshiTTTCache | None = None,
        output_write_gates: bool = False,
        **others: Any,
    ) -> MoshiTTTOutput | tuple[Any, ...]:
        """Predict every frame from the frames before it (arguments and errors: see the class)."""
        refuse_arguments(others)
        frames = align(self.config, input_ids, moshi_audio_codes, user_audio_codes, text_labels, audio_labels, attention_mask)
        past = given_cache(cache, past_key_values)
        if past is None and (use_cache if use_cache is not None else self.config.use_cache and not self.training):
            past = self.new_cache(frames.codes.shape[0])
        steps = self._delay(frames, past)
        weights = self._weights(steps)
        # Here, before any memory moves.
        whole = None if num_items_in_batch is None else whole_weights(num_items_in_batch, weights, self._frame_weights)
        draft = None if past is None else past.draft()
        logits, outputs = self.decoder(
            self.embed(steps.inputs),
            attention_mask=frames.mask,
            past_key_values=draft,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_inner_losses=output_inner_losses,
            output_write_gates=output_write_gates,
        )
        audio_logits = self._audio_logits(outputs.last_hidden_state, steps.outputs)
        text_loss, audio_loss = stream_losses((logits, audio_logits), (steps.text_labels, steps.audio_labels), weights, whole)
        losses = [loss for loss in (text_loss, audio_loss) if loss is not None]
        # All at once, in the order of the fields: a plain tuple then begins with the loss.
        result = MoshiTTTOutput(
            loss=torch.stack(losses).sum() if losses else None,
            text_loss=text_loss,
            audio_loss=audio_loss,
            logits=logits,
            audio_logits=audio_logits,
            **{**outputs, "cache": past},
        )
        if frames.order is not None:
            put_back(result, frames.order.argsort(dim=1))
        if past is not None and draft is not None:
            draft.remember(frames.codes, frames.audio_labels, None if frames.mask is None else frames.mask.sum(dim=1))
            past.state = draft.state  # last, so that an error before it leaves the memory as it was
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def loss_weights(
        self,
        text_labels: torch.LongTensor,
        audio_labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: MoshiTTTCache | None = None,
    ) -> torch.Tensor:
        """The (text, audio) weights that [`forward`] divides its losses by, `[2]` float32, known before it runs.

        Summed over micro-batches and ranks they are the `num_items_in_batch` of each part.
        """
        text, codes = text_labels.clamp(min=-1), audio_labels[:, : self.config.num_codebooks].clamp(min=-1)
        frames = align(self.config, text, codes, None, text_labels, audio_labels, attention_mask)
        steps = self._delay(frames, past_key_values)
        return torch.stack([weights.sum() for weights in self._weights(steps) if weights is not None])

    def _delay(self, frames: AlignedFrames, past: MoshiTTTCache | None) -> DelayedSteps:
        if past is None:
            return delay_frames(self.config, frames, None, None)
        check_cache(past, frames.codes.shape[0], self.config.num_hidden_layers, self.config.ttt_layers)
        return delay_frames(self.config, frames, past.codes, past.labels)

    def _audio_logits(self, hidden_states: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits `[B, P, T, card]` of the steps' codes in `outputs` `[B, 1 + P, T]`."""
        tokens = outputs.transpose(1, 2).flatten(0, 1)  # [B T, 1 + P]
        logits = self.depth_decoder(hidden_states.flatten(0, 1), tokens[:, 0], tokens[:, 1:])  # [P, B T, card]
        by_row: torch.Tensor = logits.unflatten(1, hidden_states.shape[:2]).transpose(0, 1)
        return by_row

    def _weights(self, steps: DelayedSteps) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Loss weights of the text labels `[B, T]` and of the audio labels `[B, P, T]`."""
        config, text, audio = self.config, steps.text_labels, steps.audio_labels
        return (
            None if text is None else text_weights(text, config.text_padding_ids, config.text_padding_weight),
            None if audio is None else audio_weights(audio, codebook_weights(config)),
        )

    @property
    def _frame_weights(self) -> tuple[float, float]:
        """What a frame weighs in the text loss, unless it is padding, and in the audio loss."""
        return 1.0, sum(codebook_weights(self.config))

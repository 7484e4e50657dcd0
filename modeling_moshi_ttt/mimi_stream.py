"""Mimi frame by frame, in both directions, with the state in an object of its own.

transformers' Mimi can encode in pieces but decodes only whole recordings. Every layer of Mimi is causal, so each direction needs of its
past only: the tail of every convolution's input, the overlap of every transposed convolution's output, and the keys and values inside the
transformer's window. All of that has a fixed size, and every row of the batch can start anew by itself.

Letters: B rows, T frames of 80 ms, n samples, K codebooks, C channels, L steps inside Mimi, W the transformer's window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MimiModel
from transformers.models.mimi.modeling_mimi import (
    MimiConv1d,
    MimiConvTranspose1d,
    MimiResnetBlock,
    MimiTransformerModel,
    apply_rotary_pos_emb,
)

from .errors_moshi_ttt import MoshiTTTError
from .rows import active_rows, check_entries, check_names, row_mask, without_gradients
from .tokens_moshi_ttt import UNGENERATED, ZERO

DIRECTIONS = ("encoder", "decoder")
MAX_SAMPLE = 10.0  # a sample is in [-1, 1]; beyond this it is a mistake, as 16-bit numbers are


@dataclass(frozen=True, eq=False)
class CausalState:
    """What one direction of Mimi remembers of B streams; all tensors keep their size.

    Attributes:
        tails: by layer name, the end of a convolution's input or the overlap of a transposed one's output, `[B, C, L]`.
        keys, values: `[B, H, W - 1, D]` of each layer of the transformer.
        key_positions: `[B, W - 1]` the step in each slot, -1 where a slot is empty.
        position: `[B]` steps since the row's start.
    """

    tails: dict[str, Tensor]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_positions: Tensor
    position: Tensor

    def map(self, change: Callable[..., Tensor], *others: CausalState) -> CausalState:
        """Every tensor changed, together with the same ones of other states."""
        theirs = [other.tensors() for other in others]
        return self.of({name: change(tensor, *(other[name] for other in theirs)) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        layers = {f"{name}.{i}": x for name, xs in (("keys", self.keys), ("values", self.values)) for i, x in enumerate(xs)}
        return (
            {f"tails.{name}": tail for name, tail in self.tails.items()}
            | layers
            | {
                "key_positions": self.key_positions,
                "position": self.position,
            }
        )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> CausalState:
        """The way back from [`tensors`]."""
        tails = {name.removeprefix("tails."): x for name, x in tensors.items() if name.startswith("tails.")}
        keys, values = (tuple(x for name, x in tensors.items() if name.startswith(kind)) for kind in ("keys.", "values."))
        return cls(tails, keys, values, tensors["key_positions"], tensors["position"])


class CausalPart:
    """One direction of a Mimi, which takes its past by argument: its convolutions by name, its transformer and what it starts from."""

    def __init__(self, convolutions: nn.ModuleDict | dict[str, nn.Module], transformer: MimiTransformerModel) -> None:
        self.names = {layer: name for name, layer in convolutions.items()}
        self.transformer = transformer

    def empty(self, batch_size: int) -> CausalState:
        """The state of rows that have heard and said nothing."""
        weight, config = next(self.transformer.parameters()), cast(Any, self.transformer.config)
        tails = {name: weight.new_zeros(batch_size, *_tail_shape(layer)) for layer, name in self.names.items()}
        window = (batch_size, config.num_key_value_heads, config.sliding_window - 1, config.head_dim)
        keys, values = (tuple(weight.new_zeros(window) for _ in self.transformer.layers) for _ in range(2))
        position = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return CausalState(tails, keys, values, position.new_full((batch_size, window[2]), -1), position)


class CausalPass:
    """One call of a direction: reads the state before it, and gathers the one after it in `after`, which is whole at the end."""

    def __init__(self, part: CausalPart, before: CausalState) -> None:
        self.part, self.before = part, before
        self.after = before.tensors()

    def convolve(self, layer: MimiConv1d, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C', L / stride], the same numbers as in the middle of a long input."""
        name = self.part.names[layer]
        tail = self.before.tails[name]
        if layer.pad_mode == "replicate":
            tail = torch.where((self.before.position == 0)[:, None, None], x[..., :1], tail)
        x = torch.cat([tail, x], -1)
        self.after[f"tails.{name}"] = x[..., x.shape[-1] - tail.shape[-1] :].clone()
        convolved: Tensor = layer.conv(x)
        return convolved

    def convolve_transposed(self, layer: MimiConvTranspose1d, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C', L · stride]; what reaches beyond waits for the next piece."""
        conv, name = layer.conv, self.part.names[layer]
        y = F.conv_transpose1d(x, conv.weight, None, conv.stride, groups=conv.groups)
        tail, ready = self.before.tails[name], x.shape[-1] * conv.stride[0]
        y = torch.cat([y[..., : tail.shape[-1]] + tail, y[..., tail.shape[-1] :]], -1)
        self.after[f"tails.{name}"] = y[..., ready:].clone()
        return y[..., :ready] if conv.bias is None else y[..., :ready] + conv.bias[:, None]

    def seanet(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        """The convolutional part of the encoder or the decoder."""
        for layer in layers:
            if isinstance(layer, MimiConv1d):
                x = self.convolve(layer, x)
            elif isinstance(layer, MimiConvTranspose1d):
                x = self.convolve_transposed(layer, x)
            elif isinstance(layer, MimiResnetBlock):
                shortcut = self.convolve(layer.shortcut, x) if isinstance(layer.shortcut, MimiConv1d) else x
                x = shortcut + self.seanet(layer.block, x)
            else:
                x = layer(x)
        return x

    def transform(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C, L]: every step attends to itself and the W − 1 before it."""
        transformer, before = self.part.transformer, self.before
        x = x.transpose(1, 2)
        positions = before.position[:, None] + torch.arange(x.shape[1], device=x.device)  # [B, L]
        slots = torch.cat([before.key_positions, positions], 1)  # [B, W − 1 + L]
        distance = positions[:, :, None] - slots[:, None]
        visible = (slots[:, None] >= 0) & (distance >= 0) & (distance < transformer.config.sliding_window)
        rotation = transformer.rotary_emb(x, positions)
        layer: Any
        for i, layer in enumerate(transformer.layers):
            attended = self._attend(layer.self_attn, i, layer.input_layernorm(x), rotation, visible[:, None])
            x = x + layer.self_attn_layer_scale(attended)
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
        self.after["key_positions"] = slots[:, slots.shape[1] - before.key_positions.shape[1] :]
        self.after["position"] = before.position + x.shape[1]
        return x.transpose(1, 2)

    def _attend(self, attention: Any, i: int, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        split = (*x.shape[:2], -1, attention.head_dim)
        q, k, v = (project(x).view(split).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        keys, values = torch.cat([self.before.keys[i], k], 2), torch.cat([self.before.values[i], v], 2)
        self.after[f"keys.{i}"], self.after[f"values.{i}"] = keys[:, :, k.shape[2] :], values[:, :, v.shape[2] :]
        grouped = attention.num_key_value_groups > 1
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=attention.scaling, enable_gqa=grouped)
        attended: Tensor = attention.o_proj(y.transpose(1, 2).flatten(2))
        return attended


class MimiStream:
    """B live audio streams through one Mimi: sound to codes and codes to sound, one frame or several at a time.

    The pieces put together equal `MimiModel.encode` and `MimiModel.decode` of the whole; time and memory of a frame do not grow. The
    codec itself is only read, so any number of streams may share it. Encoding and decoding do not touch each other. A call that raises has
    changed nothing.

    Raises ValueError for a Mimi that cannot stream: not causal, or padded otherwise than with zeros or the first value.
    """

    def __init__(self, codec: MimiModel, batch_size: int = 1, num_codebooks: int | None = None) -> None:
        if batch_size < 1:
            raise MoshiTTTError(f"`batch_size={batch_size}` must be at least 1.")
        config = codec.config
        if not config.use_causal_conv or config.trim_right_ratio != 1.0 or config.pad_mode not in ("constant", "replicate"):
            raise MoshiTTTError(
                f"use_causal_conv={config.use_causal_conv}, trim_right_ratio={config.trim_right_ratio}, pad_mode={config.pad_mode!r}: "
                "streaming needs a causal Mimi with trim_right_ratio 1.0 and pad_mode 'constant' or 'replicate'."
            )
        self.codec, self.batch_size = codec, batch_size
        self.num_codebooks = num_codebooks or config.num_quantizers
        self.frame_size = config.frame_size
        encoder, decoder = cast(Any, codec.encoder), cast(Any, codec.decoder)
        if encoder is None or decoder is None:
            raise MoshiTTTError("the codec lacks its encoder or its decoder; load a whole Mimi.")
        self._encoder = CausalPart(_convolutions(encoder.encoder_seanet) | {"downsample": encoder.downsample}, encoder.encoder_transformer)
        self._decoder = CausalPart(_convolutions(decoder.decoder_seanet) | {"upsample": decoder.upsample}, decoder.decoder_transformer)
        self.states = (self._encoder.empty(batch_size), self._decoder.empty(batch_size))  # of encoding and of decoding

    def encode(self, frame: Tensor, active: Any = None) -> Tensor:
        """One frame of sound, float [B, frame_size] in [−1, 1] -> its codes, long [B, K]. `active`: as in [`encode_frames`]."""
        return self.encode_frames(self._check(frame, "frame", self.frame_size, active), active)[..., 0]

    def decode(self, codes: Tensor, active: Any = None) -> Tensor:
        """The codes of one frame, long [B, K] -> its sound, float [B, frame_size]. `active`: as in [`decode_frames`]."""
        if codes.dim() != 2:
            raise MoshiTTTError(f"codes have shape {tuple(codes.shape)}; one frame is [{self.batch_size}, codebooks].")
        return self.decode_frames(codes[..., None], active)

    @without_gradients
    def encode_frames(self, audio: Tensor, active: Any = None) -> Tensor:
        """Whole frames of sound, float [B, T · frame_size] -> codes, long [B, K, T].

        `active` [B] bool: a row that is not active keeps its state, and its codes are −1; its sound is not looked at.
        """
        self._check(audio, "audio", None, active)
        before, encoder = self.states[0], cast(Any, self.codec.encoder)
        rows = self._rows(active)
        audio = audio.to(before.position.device, encoder.dtype)
        if rows is not None:
            audio = audio.masked_fill(~rows[:, None], 0)
        run = CausalPass(self._encoder, before)
        x = run.transform(run.seanet(encoder.encoder_seanet.layers, audio[:, None]))
        codes = self.codec.quantizer.encode(run.convolve(encoder.downsample, x), self.num_codebooks).transpose(0, 1)
        after = CausalState.of(run.after)
        if rows is not None:
            after, codes = _where(rows, after, before), codes.masked_fill(~rows[:, None, None], ZERO)
        self.states = (after, self.states[1])  # last: a call that raises before has changed nothing
        return codes

    @without_gradients
    def decode_frames(self, codes: Tensor, active: Any = None) -> Tensor:
        """Codes of T frames, long [B, K, T] -> sound, float [B, T · frame_size].

        A frame of −2 (not complete yet) is silence and leaves its row's state alone, and so is every frame of a row that is not `active`
        [B] bool.
        """
        check_codes(
            codes, self.codec.config.codebook_size, self.codec.config.num_quantizers, self.batch_size, UNGENERATED, self._rows(active)
        )
        rows, state, sound = self._rows(active), self.states[1], []
        codes = codes.to(state.position.device)
        for piece in codes.split(1, dim=-1) if codes.shape[-1] > 1 and bool((codes == UNGENERATED).any()) else (codes,):
            there = (piece != UNGENERATED).flatten(1).all(1)  # [B]
            there = there if rows is None else there & rows
            wave, after = self._decode(piece.clamp(min=0), state)
            state = _where(there, after, state)
            sound.append(wave.masked_fill(~there[:, None], 0))
        whole = torch.cat(sound, dim=-1)
        self.states = (self.states[0], state)  # last: a call that raises before has changed nothing
        return whole

    def _decode(self, codes: Tensor, before: CausalState) -> tuple[Tensor, CausalState]:
        decoder: Any = self.codec.decoder
        run = CausalPass(self._decoder, before)
        x = run.convolve_transposed(decoder.upsample, self.codec.quantizer.decode(codes))
        return run.seanet(decoder.decoder_seanet.layers, run.transform(x))[:, 0], CausalState.of(run.after)

    @without_gradients
    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Starts these rows anew (indices or bool [B]; None: all), as if nothing had been heard or said. Nothing of them remains.

        Raises:
            ValueError: a row that does not exist, or a mask of another length.
        """
        chosen = row_mask(range(self.batch_size) if rows is None else rows, self.batch_size, self.states[0].position.device)
        fresh = (self._encoder.empty(self.batch_size), self._decoder.empty(self.batch_size))
        self.states = (_where(chosen, fresh[0], self.states[0]), _where(chosen, fresh[1], self.states[1]))

    def row_state(self, row: int) -> dict[str, Tensor]:
        """One row's both directions as tensors by name; [`load_row`] takes them up, here or elsewhere.

        Raises:
            ValueError: a row that does not exist.
        """
        index = row_mask([row], self.batch_size, self.states[0].position.device).nonzero()[:, 0]
        return {name: tensor.index_select(0, index) for name, tensor in self._tensors().items()}

    @without_gradients
    def load_row(self, row: int, state: Mapping[str, Tensor]) -> None:
        """Let a row go on where [`row_state`] was taken. What is refused leaves the stream as it was.

        Raises:
            ValueError: a row that does not exist, or a state that is not whole, not of this codec, or not finite.
        """
        index = row_mask([row], self.batch_size, self.states[0].position.device).nonzero()[:, 0]
        self._check_saved(state, 1)
        self._load({name: own.index_copy(0, index, state[name].to(own)) for name, own in self._tensors().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """All rows and both directions as tensors by name, ready for safetensors."""
        return {name: tensor.contiguous().clone() for name, tensor in self._tensors().items()}

    @without_gradients
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on exactly where [`state_dict`] was taken. What is refused leaves the stream as it was.

        Raises:
            ValueError: an entry is missing, unknown, of another batch size, shape or dtype, or not finite.
        """
        self._check_saved(tensors, self.batch_size)
        self._load({name: tensors[name].to(own, copy=True) for name, own in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": x for name, state in zip(DIRECTIONS, self.states) for key, x in state.tensors().items()}

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        encoder, decoder = (
            CausalState.of({name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")})
            for part in DIRECTIONS
        )
        self.states = (encoder, decoder)

    def _check_saved(self, tensors: Mapping[str, Tensor], rows: int) -> None:
        wanted = {name: ((rows, *own.shape[1:]), own.dtype) for name, own in self._tensors().items()}
        check_names("audio stream", tensors, wanted)
        check_entries("audio stream", tensors, wanted)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise MoshiTTTError(f"{name} of the saved audio stream is not finite; go on from an earlier state.")
            if not tensor.is_floating_point() and bool((tensor < -1).any()):
                raise MoshiTTTError(f"{name} of the saved audio stream holds what no stream has; load what `state_dict()` gave, unchanged.")

    def _rows(self, active: Any) -> Tensor | None:
        return None if active is None else active_rows(active, self.batch_size, self.states[0].position.device)

    def _check(self, audio: Tensor, name: str, samples: int | None, active: Any) -> Tensor:
        wanted = f"[{self.batch_size}, {samples or f'a multiple of {self.frame_size}'}]"
        right = audio.dim() == 2 and audio.shape[0] == self.batch_size and audio.shape[1] > 0 and audio.shape[1] % self.frame_size == 0
        if not right or (samples is not None and audio.shape[1] != samples):
            raise MoshiTTTError(f"{name} has shape {tuple(audio.shape)}; it must be {wanted}.")
        check_samples(name, audio, self._rows(active))
        return audio

    def __deepcopy__(self, memo: dict[int, Any]) -> MimiStream:
        """A stream that goes its own way from here; the codec is shared."""
        return copy.copy(self)  # states never change in place


def _where(rows: Tensor, state: CausalState, other: CausalState) -> CausalState:
    """`state` in `rows` [B] bool, `other` elsewhere."""
    return state.map(lambda x, y: torch.where(rows.view(-1, *(1,) * (x.dim() - 1)), x, y), other)


def _convolutions(seanet: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in seanet.named_modules() if isinstance(layer, (MimiConv1d, MimiConvTranspose1d))}


def _tail_shape(layer: nn.Module) -> tuple[int, int]:
    """Channels and steps that a convolution keeps of its past."""
    conv: Any = layer.conv
    if isinstance(layer, MimiConvTranspose1d):
        return conv.out_channels, conv.kernel_size[0] - conv.stride[0]
    return conv.in_channels, (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]


def check_samples(name: str, audio: Tensor, rows: Tensor | None = None) -> None:
    """ValueError unless sound [B, n] is floating point, finite and within ±10; in `rows` [B] bool alone."""
    if not audio.is_floating_point():
        raise MoshiTTTError(f"{name} is {audio.dtype}; it must be floating point in [-1, 1] (divide 16-bit samples by 32768).")
    sane = audio.detach().abs().amax(1) <= MAX_SAMPLE  # False for NaN, too
    bad = ~sane if rows is None else ~sane & rows.to(sane.device)
    # as numpy, which is no read of a device where the sound is on the host
    if bool(bad.cpu().numpy().any()):
        raise MoshiTTTError(
            f"{name} of row {bad.nonzero()[:, 0].tolist()} is not finite or beyond ±{MAX_SAMPLE:g}; samples are in [-1, 1] "
            "(leave such a row out with `active`)."
        )


def check_codes(
    codes: Tensor, codebook_size: int, num_codebooks: int, batch_size: int | None = None, lowest: int = 0, rows: Tensor | None = None
) -> None:
    """ValueError unless codes are integers [B, K, T] from `lowest` on within the codebook, K at most num_codebooks; in `rows` [B] bool
    alone.
    """
    if codes.dim() != 3 or codes.is_floating_point() or not 1 <= codes.shape[1] <= num_codebooks or codes.shape[2] == 0:
        raise MoshiTTTError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; they must be integers [rows, up to {num_codebooks} codebooks, frames]."
        )
    if batch_size is not None and codes.shape[0] != batch_size:
        raise MoshiTTTError(f"codes have {codes.shape[0]} rows; the stream has {batch_size}.")
    numbers = codes.cpu().numpy()  # which is no read of a device where the codes are on the host
    if rows is not None:
        numbers = numbers[rows.cpu().numpy()]
    wrong = numbers[((numbers < 0) & (numbers != lowest)) | (numbers >= codebook_size)]
    if wrong.size:
        raise MoshiTTTError(
            f"codes hold {wrong[0]}; a code is 0 to {codebook_size - 1} (cut frames that are absent (-1) or not yet complete (-2))."
        )

"""Mimi frame by frame, in both directions, with the state in an object of its own.

transformers' Mimi can encode in pieces but decodes only whole recordings. Every layer of Mimi is causal, so each direction needs of its
past only: the tail of every convolution's input, the overlap of every transposed convolution's output, and the keys and values inside the
transformer's window. All of that has a fixed size, and every row of the batch can start anew by itself.

Letters: B rows, T frames of 80 ms, n samples, K codebooks, C channels, L steps inside Mimi, W the transformer's window.
"""

from collections.abc import Sequence
from typing import Any

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

from .rows import row_mask


class CausalState:
    """What one direction of Mimi remembers of B streams. All tensors keep their size; `fresh` rows have seen nothing yet."""

    def __init__(self, batch_size: int, transformer: MimiTransformerModel) -> None:
        weight = next(transformer.parameters())
        config: Any = transformer.config
        layers = len(transformer.layers)
        window = (batch_size, config.num_key_value_heads, config.sliding_window - 1, config.head_dim)
        self.tails: dict[nn.Module, Tensor] = {}
        self.keys = [weight.new_zeros(window) for _ in range(layers)]
        self.values = [weight.new_zeros(window) for _ in range(layers)]
        self.key_positions = torch.full((batch_size, window[2]), -1, device=weight.device)  # −1: an empty place
        self.position = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.fresh = torch.ones(batch_size, dtype=torch.bool, device=weight.device)

    def reset(self, rows: Tensor) -> None:
        """Forgets everything of these rows; rows is bool [B]."""
        for tail in self.tails.values():
            tail[rows] = 0
        self.key_positions[rows] = -1
        self.position[rows] = 0
        self.fresh[rows] = True

    def convolve(self, layer: MimiConv1d, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C', L / stride], the same numbers as in the middle of a long input."""
        conv = layer.conv
        size = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]
        tail = self.tails.get(layer, x.new_zeros(x.shape[0], x.shape[1], size))
        if layer.pad_mode == "replicate":
            tail = torch.where(self.fresh[:, None, None], x[..., :1], tail)
        x = torch.cat([tail, x], -1)
        self.tails[layer] = x[..., x.shape[-1] - size :].clone()
        return conv(x)

    def convolve_transposed(self, layer: MimiConvTranspose1d, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C', L · stride]; what reaches beyond waits for the next piece."""
        conv = layer.conv
        y = F.conv_transpose1d(x, conv.weight, None, conv.stride, groups=conv.groups)
        overlap = conv.kernel_size[0] - conv.stride[0]
        if layer in self.tails:
            y = torch.cat([y[..., :overlap] + self.tails[layer], y[..., overlap:]], -1)
        ready = x.shape[-1] * conv.stride[0]
        self.tails[layer] = y[..., ready:].clone()
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

    def transform(self, transformer: MimiTransformerModel, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C, L]: every step attends to itself and the W − 1 before it."""
        x = x.transpose(1, 2)
        positions = self.position[:, None] + torch.arange(x.shape[1], device=x.device)  # [B, L]
        places = torch.cat([self.key_positions, positions], 1)  # [B, W − 1 + L]
        distance = positions[:, :, None] - places[:, None]
        visible = (places[:, None] >= 0) & (distance >= 0) & (distance < transformer.config.sliding_window)
        rotation = transformer.rotary_emb(x, positions)
        layer: Any
        for i, layer in enumerate(transformer.layers):
            attended = self._attend(layer.self_attn, i, layer.input_layernorm(x), rotation, visible[:, None])
            x = x + layer.self_attn_layer_scale(attended)
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
        kept = self.key_positions.shape[1]
        self.key_positions = places[:, places.shape[1] - kept :]
        self.position = self.position + x.shape[1]
        return x.transpose(1, 2)

    def _attend(self, attention: Any, i: int, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        split = (*x.shape[:2], -1, attention.head_dim)
        q, k, v = (project(x).view(split).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        keys, values = torch.cat([self.keys[i], k], 2), torch.cat([self.values[i], v], 2)
        kept = keys.shape[2] - self.keys[i].shape[2]
        self.keys[i], self.values[i] = keys[:, :, kept:], values[:, :, kept:]
        grouped = attention.num_key_value_groups > 1
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=attention.scaling, enable_gqa=grouped)
        return attention.o_proj(y.transpose(1, 2).flatten(2))


class MimiStream:
    """B live audio streams through one Mimi: sound to codes and codes to sound, one frame or several at a time.

    The pieces put together equal `MimiModel.encode` and `MimiModel.decode` of the whole; time and memory of a frame do not grow. The
    codec itself is only read, so any number of streams may share it. Encoding and decoding do not touch each other.

    Raises ValueError for a Mimi that cannot stream: not causal, or padded otherwise than with zeros or the first value.
    """

    def __init__(self, codec: MimiModel, batch_size: int = 1, num_codebooks: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a stream needs at least 1 row.")
        config = codec.config
        if not config.use_causal_conv or config.trim_right_ratio != 1.0 or config.pad_mode not in ("constant", "replicate"):
            raise ValueError(
                f"use_causal_conv={config.use_causal_conv}, trim_right_ratio={config.trim_right_ratio}, pad_mode={config.pad_mode!r}: "
                "streaming needs a causal Mimi with trim_right_ratio 1.0 and pad_mode 'constant' or 'replicate'."
            )
        self.codec, self.batch_size = codec, batch_size
        self.num_codebooks = num_codebooks or config.num_quantizers
        self.frame_size = config.frame_size
        self._encode_part: Any = codec.encoder
        self._decode_part: Any = codec.decoder
        if self._encode_part is None or self._decode_part is None:
            raise ValueError("the codec lacks its encoder or its decoder; load a whole Mimi.")
        self._encoder = CausalState(batch_size, self._encode_part.encoder_transformer)
        self._decoder = CausalState(batch_size, self._decode_part.decoder_transformer)

    def encode(self, frame: Tensor) -> Tensor:
        """One frame of sound, float [B, frame_size] in [−1, 1] -> its codes, long [B, K]."""
        return self.encode_frames(self._check(frame, "frame", self.frame_size))[..., 0]

    def decode(self, codes: Tensor) -> Tensor:
        """The codes of one frame, long [B, K] -> its sound, float [B, frame_size]."""
        if codes.dim() != 2:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; one frame is [{self.batch_size}, codebooks].")
        return self.decode_frames(codes[..., None])

    @torch.no_grad()
    def encode_frames(self, audio: Tensor) -> Tensor:
        """Whole frames of sound, float [B, T · frame_size] -> codes, long [B, K, T]."""
        self._check(audio, "audio", None)
        encoder, state = self._encode_part, self._encoder
        x = state.seanet(encoder.encoder_seanet.layers, audio.to(encoder.device, encoder.dtype)[:, None])
        x = state.convolve(encoder.downsample, state.transform(encoder.encoder_transformer, x))
        state.fresh = torch.zeros_like(state.fresh)
        return self.codec.quantizer.encode(x, self.num_codebooks).transpose(0, 1)

    @torch.no_grad()
    def decode_frames(self, codes: Tensor) -> Tensor:
        """Codes of T frames, long [B, K, T] -> sound, float [B, T · frame_size]."""
        check_codes(codes, self.codec.config.codebook_size, self.codec.config.num_quantizers, self.batch_size)
        decoder, state = self._decode_part, self._decoder
        x = state.convolve_transposed(decoder.upsample, self.codec.quantizer.decode(codes.to(state.position.device)))
        x = state.seanet(decoder.decoder_seanet.layers, state.transform(decoder.decoder_transformer, x))
        return x[:, 0]

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Starts these rows anew (indices or bool [B]; None: all), as if nothing had been heard or said.

        Raises:
            ValueError: a row that does not exist, or a mask of another length.
        """
        for state in (self._encoder, self._decoder):
            device = state.fresh.device
            state.reset(torch.ones_like(state.fresh) if rows is None else row_mask(rows, self.batch_size, device))

    def _check(self, audio: Tensor, name: str, samples: int | None) -> Tensor:
        wanted = f"[{self.batch_size}, {samples or f'a multiple of {self.frame_size}'}]"
        right = audio.dim() == 2 and audio.shape[0] == self.batch_size and audio.shape[1] > 0 and audio.shape[1] % self.frame_size == 0
        if not right or (samples is not None and audio.shape[1] != samples):
            raise ValueError(f"{name} has shape {tuple(audio.shape)}; it must be {wanted}.")
        if not audio.is_floating_point():
            raise ValueError(f"{name} is {audio.dtype}; it must be floating point in [-1, 1] (divide 16-bit samples by 32768).")
        if not torch.isfinite(audio).all():
            raise ValueError(f"{name} holds NaN or infinite samples; replace them before encoding.")
        return audio


def check_codes(codes: Tensor, codebook_size: int, num_codebooks: int, batch_size: int | None = None) -> None:
    """ValueError unless codes are integers [B, K, T] within the codebook, K at most num_codebooks."""
    if codes.dim() != 3 or codes.is_floating_point() or not 1 <= codes.shape[1] <= num_codebooks or codes.shape[2] == 0:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; they must be integers [rows, up to {num_codebooks} codebooks, frames].")
    if batch_size is not None and codes.shape[0] != batch_size:
        raise ValueError(f"codes have {codes.shape[0]} rows; the stream has {batch_size}.")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        wrong = low if low < 0 else high
        raise ValueError(f"codes hold {wrong}; a code is 0 to {codebook_size - 1} (cut frames that are absent (-1) or not yet complete (-2)).")

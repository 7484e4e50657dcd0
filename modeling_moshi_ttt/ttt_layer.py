"""The TTT layer: a sequence mixer whose hidden state is a small model that keeps learning while the stream passes.

Projections, step sizes, rotary positions and target of Sun et al. 2024 ("Learning to (Learn at Test Time)", sections 2.3 to 2.7), with the
normalised reconstruction target of Dalal et al. 2025 ("One-Minute Video Generation with Test-Time Training", section 3), causal at any
mini-batch size.

Shape letters: B rows, T frames, E hidden size, H heads, D head dimension, F hidden width of the MLP, b mini-batch size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .errors_moshi_ttt import MoshiTTTError
from .ttt_ops import ttt_linear, ttt_mlp
from .ttt_state import TTTInputs, TTTState

ROPE_THETA = 10000.0


class TTTInnerLosses(NamedTuple):
    """Inner losses at the last token of each of the N mini-batches that a call completed (every token at b = 1): the TTT paper's figure 5.

    A loss is the mean over D of (LN(f_W(k)) - target)^2, without the LN where ttt_inner_norm is "none".
    """

    position: Tensor  # [N] frame of that token, counted from the stream's start
    initial: Tensor  # [B, N, H] at the learned initial weights W_0
    before: Tensor  # [B, N, H] at the weights that the mini-batch started from
    after: Tensor  # [B, N, H] at the weights that it led to
    drift: Tensor  # [B, N] norm of (weights after it - W_0), over all heads


class TTTOpenLosses(NamedTuple):
    """What a state alone tells: losses as in [`TTTInnerLosses`], the mean over heads and over the tokens of the open mini-batch.

    They are NaN in a row whose mini-batch has just ended, and so always at b = 1.
    """

    initial: Tensor  # [B] at W_0
    current: Tensor  # [B] at the weights that the mini-batch started from
    drift: Tensor  # [B] norm of (these weights - W_0), over all heads


class TTTLayer(nn.Module):
    """What both mixers share; use `TTTLinear` or `TTTMLP`.

    `config` gives hidden_size, ttt_num_heads, ttt_head_dim, ttt_mini_batch_size, ttt_base_lr, ttt_inner_norm ("layer_norm" or "none"),
    ttt_write_threshold, ttt_rope ("mini_batch", "absolute" or "none"), ttt_norm_eps, scan_checkpoint_group_size and ttt_implementation.
    The layer holds nothing of a stream: its state goes in and comes out of `forward`.
    """

    op: Any = None
    start_std: dict[str, float] = {}  # of the initial fast weights; biases start at 0

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, heads, dim = config.hidden_size, config.ttt_num_heads, config.ttt_head_dim
        if config.ttt_rope != "none" and dim % 2:
            raise MoshiTTTError(f"ttt_head_dim is {dim}; ttt_rope '{config.ttt_rope}' turns pairs and needs an even one")
        self.wq = nn.Linear(hidden, heads * dim)
        self.wk = nn.Linear(hidden, heads * dim)
        self.wv = nn.Linear(hidden, heads * dim)
        self.wo = nn.Linear(heads * dim, hidden)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(heads, 1, hidden))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.empty(heads, 1))
        self.learnable_token_weight = nn.Parameter(torch.empty(config.ttt_mini_batch_size))
        self.ttt_norm_weight = nn.Parameter(torch.empty(heads, dim))
        self.ttt_norm_bias = nn.Parameter(torch.empty(heads, dim))
        for name, shape in self.fast_weight_shapes(heads, dim).items():
            self.register_parameter(name, nn.Parameter(torch.empty(heads, *shape)))
        self.post_norm = _ExactLayerNorm(heads * dim, eps=1e-6)
        self.reset_ttt_parameters()

    @staticmethod
    def fast_weight_shapes(heads: int, dim: int) -> dict[str, tuple[int, int]]:
        raise NotImplementedError

    @torch.no_grad()
    def reset_ttt_parameters(self, std: float = 0.02) -> None:
        """Start values. `wo` starts at zero, as LoRA's B does, so that a fresh layer changes nothing of a pretrained model.

        It keeps weights that a checkpoint has already filled, by transformers' own marks on them.
        """
        for projection in (self.wq, self.wk, self.wv):
            init.normal_(projection.weight, std=std)
            init.zeros_(projection.bias)
        init.zeros_(self.wo.weight)
        init.zeros_(self.wo.bias)
        init.normal_(self.learnable_ttt_lr_weight, std=std)
        init.zeros_(self.learnable_ttt_lr_bias)
        init.zeros_(self.learnable_token_weight)
        init.ones_(self.ttt_norm_weight)
        init.zeros_(self.ttt_norm_bias)
        init.ones_(self.post_norm.weight)
        init.zeros_(self.post_norm.bias)
        for name in self.fast_weight_shapes(1, 1):
            init.normal_(getattr(self, name), std=self.start_std.get(name, 0.0))

    def initial_state(self, batch_size: int) -> TTTState:
        """The state of streams that have heard nothing yet: the learned initial weights, in float32 at least, gradients flowing to them."""
        names = self.fast_weight_shapes(1, 1)
        return TTTState.initial(*(_at_least_float32(getattr(self, name)) for name in names), batch_size=batch_size)

    def forward(
        self,
        hidden_states: Tensor,
        state: TTTState | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> tuple[Tensor, TTTState]:
        """Hear these frames and answer them.

        Args:
            hidden_states: `[B, T, E]`.
            state: what the previous call gave; None starts new streams.
            position_ids: `[B, T]`, used with ttt_rope "absolute" only; by default each row counts on from its state.
            attention_mask: `[B, T]`, 1 for frames that are there. The others answer `wo(post_norm(0))` and leave the state alone.
            fresh: `[B]` bool, rows of the state that start anew before these frames.

        Returns:
            `[B, T, E]` in the dtype of hidden_states, and the state after these frames.

        Raises:
            ValueError: shapes that do not fit, or a state that is not of this layer and batch.
        """
        state, mask = self._check(hidden_states, state, position_ids, attention_mask, fresh)
        x = hidden_states.to(self.ttt_norm_weight.dtype)  # never quantized, unlike the projections
        projected = self.wq(x), self.wk(x), self.wv(x)
        with torch.autocast(x.device.type, enabled=False):  # the inner learning is float32 whatever is around it
            inputs = self._op_inputs(x, projected, self._positions(x, state, position_ids, mask))
            out, state = self.op(*inputs, state, mask=mask, **self._op_options())  # [B, T, H, D]
            out = self.post_norm(out.flatten(2))
        return self.wo(out.to(self.ttt_norm_weight.dtype)).to(hidden_states.dtype), state

    def write_gate(self, hidden_states: Tensor) -> Tensor:
        """How far each head opens its memory to each frame, `[B, T, H]` from 0 to 1; a frame's inner learning rate is ttt_base_lr / D
        times it. 0 where it is below ttt_write_threshold: such a frame writes nothing, and no gradient flows to its gate.
        """
        x, weight = _at_least_float32(hidden_states), _at_least_float32(self.learnable_ttt_lr_weight).squeeze(1)
        gate = torch.sigmoid(F.linear(x, weight) + _at_least_float32(self.learnable_ttt_lr_bias).squeeze(1))
        threshold = self.config.ttt_write_threshold
        return gate.masked_fill(gate < threshold, 0.0) if threshold else gate

    @torch.no_grad()
    def inner_losses(
        self,
        hidden_states: Tensor,
        state: TTTState | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> TTTInnerLosses:
        """What the inner model learns while these frames pass; arguments as in `forward`, which it does not change.

        Raises:
            ValueError: rows that stand at different frames, or masked ones: their mini-batches do not end together.
        """
        state, mask = self._check(hidden_states, state, position_ids, attention_mask, fresh)
        if (mask is not None and not bool(mask.all())) or bool((state.frames != state.frames[0]).any()):
            raise MoshiTTTError("inner losses need rows of one length that stand at the same frame; measure one recording at a time")
        x, b, frames = hidden_states.to(self.ttt_norm_weight.dtype), self.config.ttt_mini_batch_size, int(state.frames[0])
        projected = self.wq(x), self.wk(x), self.wv(x)
        with torch.autocast(x.device.type, enabled=False):
            inputs = self._op_inputs(x, projected, self._positions(x, state, position_ids, None))
            tokens, shared = inputs[:4], inputs[4:]
            initial = self.initial_state(len(x)).weights
            found: list[list[Tensor]] = [[], [], [], []]
            start, ends = 0, range(b - frames % b, x.shape[1] + 1, b)
            for end in ends:
                before = state.weights
                _, state = self.op(*(token[:, start:end] for token in tokens), *shared, state, **self._op_options())
                k, v = inputs.k[:, end - 1 : end], inputs.v[:, end - 1 : end]
                for losses, weights in zip(found, (initial, before, state.weights)):
                    losses.append(self._inner_loss(weights, k, v)[:, 0])
                found[3].append(_distance(state.weights, initial))
                start = end
        position = torch.tensor([*ends], device=x.device, dtype=torch.int64) + frames - 1
        empty = x.new_zeros(len(x), 0, self.config.ttt_num_heads)
        at_first, before_it, after_it, drift = (torch.stack(values, 1) if values else empty for values in found)
        return TTTInnerLosses(position, at_first, before_it, after_it, drift if found[3] else empty[..., 0])

    @torch.no_grad()
    def open_losses(self, state: TTTState) -> TTTOpenLosses:
        """What a live state shows of its learning without another frame: from the tokens of its open mini-batch, which it keeps."""
        initial = self.initial_state(1).weights
        there = torch.arange(state.mini_batch_size, device=state.frames.device) < state.position[:, None]  # [B, b]

        def mean(weights: tuple[Tensor, ...]) -> Tensor:
            losses = self._inner_loss(weights, state.k, state.v).mean(-1)  # [B, b]
            return losses.masked_fill(~there, 0).sum(1) / there.sum(1)  # NaN where there is no token

        first = mean(tuple(w.expand(state.batch_size, *w.shape[1:]) for w in initial))
        return TTTOpenLosses(first, mean(state.weights), _distance(state.weights, initial))

    def _inner_loss(self, weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        """`[B, T, H]` of tokens `[B, T, H, D]`; the target is v - k."""
        z = torch.einsum("bthd,bhdf->bthf", k.to(weights[0].dtype), weights[0]) + weights[1].transpose(1, 2)
        if len(weights) == 4:
            z = torch.einsum("bthf,bhfd->bthd", F.gelu(z, approximate="tanh"), weights[2]) + weights[3].transpose(1, 2)
        if self.config.ttt_inner_norm == "layer_norm":
            norm_weight, norm_bias = _at_least_float32(self.ttt_norm_weight), _at_least_float32(self.ttt_norm_bias)
            z = F.layer_norm(z, z.shape[-1:], eps=self.config.ttt_norm_eps) * norm_weight + norm_bias
        return (z - (v - k)).square().mean(-1)

    def _op_options(self) -> dict[str, Any]:
        c = self.config
        how = {"group_size": c.scan_checkpoint_group_size, "backend": c.ttt_implementation}
        return how | {"mini_batch_size": c.ttt_mini_batch_size, "eps": c.ttt_norm_eps, "inner_norm": c.ttt_inner_norm}

    def _op_inputs(self, x: Tensor, projected: tuple[Tensor, Tensor, Tensor], positions: Tensor) -> TTTInputs:
        """What the ops take, in float32 at least."""
        heads, dim = self.config.ttt_num_heads, self.config.ttt_head_dim
        q, k, v = (_at_least_float32(p).unflatten(-1, (heads, dim)) for p in projected)  # [B, T, H, D]
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.config.ttt_rope != "none":
            cos, sin = _rotation(positions, dim, q.dtype)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        norm_weight, norm_bias = _at_least_float32(self.ttt_norm_weight), _at_least_float32(self.ttt_norm_bias)
        target = _standardise(v - k) * norm_weight + norm_bias
        lr = self.config.ttt_base_lr / dim * self.write_gate(x)  # [B, T, H]
        learned = _at_least_float32(self.learnable_token_weight)
        count = torch.arange(1, len(learned) + 1, device=learned.device, dtype=learned.dtype)
        return TTTInputs(q, k, target + k, lr, (1 / count + learned).clamp(min=0), norm_weight, norm_bias)

    def _positions(self, x: Tensor, state: TTTState, position_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """`[B, T]` positions by which RoPE turns."""
        if self.config.ttt_rope == "absolute" and position_ids is not None:
            return position_ids
        if mask is None:
            rank = torch.arange(x.shape[1], device=x.device)
        else:
            rank = (mask.cumsum(1) - 1).clamp(min=0)
        positions = state.frames[:, None] + rank
        return positions if self.config.ttt_rope == "absolute" else positions % self.config.ttt_mini_batch_size

    def _check(
        self, x: Tensor, state: TTTState | None, position_ids: Tensor | None, attention_mask: Tensor | None, fresh: Tensor | None
    ) -> tuple[TTTState, Tensor | None]:
        if x.dim() != 3 or x.shape[2] != self.config.hidden_size or 0 in x.shape:
            raise MoshiTTTError(
                f"hidden_states has shape {tuple(x.shape)}; it must be [B, T, {self.config.hidden_size}] with B, T at least 1"
            )
        for name, tensor in (("position_ids", position_ids), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != x.shape[:2]:
                raise MoshiTTTError(f"{name} has shape {tuple(tensor.shape)}; it must be [B, T] = {tuple(x.shape[:2])}")
        if state is not None and state.batch_size != x.shape[0]:
            raise MoshiTTTError(
                f"the state holds {state.batch_size} rows, hidden_states {x.shape[0]}; give the state of these rows, or None"
            )
        if state is None:
            state = self.initial_state(x.shape[0])
        elif fresh is not None:
            state = state.reset(fresh, self.initial_state(1))
        return state, (None if attention_mask is None else attention_mask.bool())


class TTTLinear(TTTLayer):
    """TTT with one matrix and bias a head as the inner model."""

    op = staticmethod(ttt_linear)
    start_std = {"W1": 0.02}

    @staticmethod
    def fast_weight_shapes(heads: int, dim: int) -> dict[str, tuple[int, int]]:
        return {"W1": (dim, dim), "b1": (1, dim)}


class TTTMLP(TTTLayer):
    """TTT with a two-layer MLP a head, four times as wide inside, as the inner model.

    What it learns for a key reaches another by the product of their hidden units, beside 1 for the bias. Keys have norm 1, so at the 0.02
    that is usual for both matrices that product is below 0.01, and the memory is one bias for all keys; a W1 that moves them apart, and a
    W2 small beside the first steps, let it tell keys apart from the first frame on (tests/test_ttt_layer.py shows both).
    """

    op = staticmethod(ttt_mlp)
    start_std = {"W1": 0.5, "W2": 0.005}

    @staticmethod
    def fast_weight_shapes(heads: int, dim: int) -> dict[str, tuple[int, int]]:
        return {"W1": (dim, 4 * dim), "b1": (1, 4 * dim), "W2": (4 * dim, dim), "b2": (1, dim)}


class _ExactLayerNorm(nn.LayerNorm):
    """In the dtype of what it is given, whatever its own weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _distance(weights: tuple[Tensor, ...], initial: tuple[Tensor, ...]) -> Tensor:
    """`[B]`, the norm of what fast weights have moved."""
    moved = [(after - first).square().sum((1, 2, 3)) for after, first in zip(weights, initial)]
    return torch.stack(moved).sum(0).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _standardise(x: Tensor) -> Tensor:
    """Mean 0 and unbiased standard deviation 1 over D, as in the video layer's target."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (x.std(-1, keepdim=True) + 1e-8)


def _rotation(positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, T, 1, D / 2]`. The angles are taken in float64: float32 loses 1e-3 of a turn after an hour of frames."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions[..., None, None].double() * ROPE_THETA**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i + 1) of `[B, T, H, D]`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

"""One frame without gradients: the decoding step. It rewrites the weights at a mini-batch's end only, and not at every token.

The dual form needs of the open mini-batch no more than its keys, the inputs of the second layer, and the steps lr_s g_s; these few rows are
kept with the state (`TTTState.open_factors`). A frame then reads W1 once, for its key and query together, and W2 for the key, for the
gradient and for the query, and writes neither.

Shape letters: B rows, H heads, M = B H, b mini-batch size, D head dimension, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ttt_scan import gelu_gate, gelu_slope, normalise, normalise_backward
from .ttt_state import TTTState

Weights = tuple[Tensor, ...]


class OpenFactors(NamedTuple):
    """Of the open mini-batch's tokens, with zeros in the empty slots: one layer's part of every weight gradient is inputs^T steps."""

    inputs: tuple[Tensor, ...]  # [M, b, D] the keys, and for the MLP [M, b, F] what they give the second layer
    steps: tuple[Tensor, ...]  # [M, b, F], [M, b, D] (linear: [M, b, D]): lr times the gradient at each layer's outputs

    def map_with(self, change: Callable[..., Tensor], *others: OpenFactors) -> OpenFactors:
        return OpenFactors(*(tuple(change(*xs) for xs in zip(*parts)) for parts in zip(self, *others)))


class _Norm(NamedTuple):
    weight: Tensor  # [M, 1, D]
    bias: Tensor  # [M, 1, D]
    eps: float


@torch.compiler.disable  # whether weights are rewritten depends on the positions, which a graph cannot hold
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: TTTState,
    *,
    valid: Tensor | None,
    eps: float,
) -> tuple[Tensor, TTTState]:
    """The op for one frame of every row: q, k, v `[B, 1, H, D]`, lr `[B, 1, H]`, all in the dtype of the state's weights; valid `[B]` or None."""
    rows, _, heads, dim = q.shape
    weights = tuple(w.flatten(0, 1) for w in state.weights)
    norm_weight, norm_bias = (x.expand(rows, heads, dim).reshape(-1, 1, dim) for x in (norm_weight, norm_bias))
    norm = _Norm(norm_weight, norm_bias, eps)
    state = state if state.mini_batch_size else _with_room(state, len(token_weight))
    kept = _gather(state, weights, norm) if state.open_factors is None else state.open_factors

    position = state.frames % len(token_weight)
    here = _slots(position, len(token_weight))  # [B, b]
    if valid is not None:  # a masked token becomes zeros in no slot, whatever it holds
        here = here & valid[:, None]
        q, k, v, lr = (torch.where(valid.view(-1, *(1,) * (x.dim() - 1)), x, 0.0) for x in (q, k, v, lr))
    taken = here.to(q.dtype)
    slot = _per_head(taken, heads)[..., None]  # [M, b, 1]
    share = _per_head(token_weight.index_select(0, position), heads)[:, None, None]  # [M, 1, 1]
    key, query, value = (x.reshape(-1, 1, dim) for x in (k, q, v))  # [M, 1, D]
    z1 = torch.baddbmm(weights[1], torch.cat([key, query], 1), weights[0])  # [M, 2, F]
    new = _factors(key, z1[:, :1], value - key, lr.reshape(-1, 1, 1), weights, norm)
    factors = kept.map_with(lambda old, x: torch.addcmul(old, slot, x), new)  # empty slots hold zeros; `where` is five times as slow
    unit = normalise(_read(query, z1[:, 1:], share, factors, weights), eps)[0]
    out = torch.addcmul(query + norm.bias, unit, norm.weight).view(q.shape)
    if valid is not None:
        out = torch.where(valid[:, None, None, None], out, 0.0)

    slot = taken[..., None, None]  # [B, b, 1, 1]
    tokens = [torch.addcmul(state.k, slot, k), torch.addcmul(state.v, slot, v), torch.addcmul(state.lr, slot[..., 0], lr)]
    full = here[:, -1]  # [B]
    if bool(full.any()):
        ends = _per_head(full, heads)[:, None, None]  # [M, 1, 1]
        weights = _move(weights, factors, share * ends)
        factors = factors.map_with(lambda x: x.masked_fill(ends, 0))
        tokens = [x.masked_fill(full.view(-1, *(1,) * (x.dim() - 1)), 0) for x in tokens]
    weights = tuple(w.view(x.shape) for w, x in zip(weights, state.weights))
    frames = state.frames + (1 if valid is None else valid)
    return out, TTTState.of(weights, tokens[0], tokens[1], tokens[2], frames, factors)


def _slots(position: Tensor, b: int) -> Tensor:
    """`[B, b]` bool: the slot that each row's token takes."""
    return torch.arange(b, device=position.device) == position[:, None]


def _per_head(x: Tensor, heads: int) -> Tensor:
    """`[B, ...]` as `[M, ...]`."""
    return x.unsqueeze(1).expand(-1, heads, *x.shape[1:]).flatten(0, 1)


def _with_room(state: TTTState, b: int) -> TTTState:
    rows, _, heads, dim = state.k.shape
    empty = state.W1.new_zeros(rows, b, heads, dim)
    return TTTState.of(state.weights, empty, empty, empty[..., 0], state.frames)


def _gather(state: TTTState, weights: Weights, norm: _Norm) -> OpenFactors:
    """The factors of all open tokens at once, from the tokens that the state keeps."""
    k, v, rate = (x.transpose(1, 2).flatten(0, 1) for x in (state.k, state.v, state.lr[..., None]))  # [M, b, ·]
    filled = torch.arange(k.shape[1], device=k.device) < state.position[:, None]  # [B, b]
    filled = _per_head(filled, state.W1.shape[1])[..., None].to(k.dtype)
    return _factors(k, torch.baddbmm(weights[1], k, weights[0]), v - k, rate, weights, norm).map_with(lambda x: x * filled)


def _factors(k: Tensor, z1: Tensor, target: Tensor, rate: Tensor, weights: Weights, norm: _Norm) -> OpenFactors:
    """k `[M, t, D]` of t tokens, z1 = k W1 + b1 `[M, t, F]`, target `[M, t, D]`, rate `[M, t, 1]`."""
    if len(weights) == 2:
        return OpenFactors((k,), (_step(z1, target, rate, norm),))
    gate = gelu_gate(z1)
    hidden = z1 * gate
    step2 = _step(torch.baddbmm(weights[3], hidden, weights[2]), target, rate, norm)
    return OpenFactors((k, hidden), (torch.bmm(step2, weights[2].mT).mul_(gelu_slope(z1, gate)), step2))


def _step(z: Tensor, target: Tensor, rate: Tensor, norm: _Norm) -> Tensor:
    """lr times the gradient of 1/2 ||LN(z) - target||^2 with respect to z."""
    unit, mean, rstd = normalise(z, norm.eps)
    pull = torch.addcmul(norm.bias - target, unit, norm.weight).mul_(norm.weight)
    return normalise_backward(pull, z, mean, rstd).mul_(rate)


def _read(q: Tensor, z1: Tensor, share: Tensor, factors: OpenFactors, weights: Weights) -> Tensor:
    """f(q) `[M, 1, D]` at the weights that hold w_t of all tokens so far; z1 is q W1 + b1 at the mini-batch's first weights."""
    z = torch.baddbmm(z1, _dots(q, share, factors.inputs[0]), factors.steps[0], alpha=-1)
    if len(weights) == 2:
        return z
    x = z * gelu_gate(z)
    return torch.baddbmm(weights[3], x, weights[2]).baddbmm_(_dots(x, share, factors.inputs[1]), factors.steps[1], alpha=-1)


def _dots(q: Tensor, share: Tensor, inputs: Tensor) -> Tensor:
    """w_t (q_t . k_s + 1) `[M, 1, b]`."""
    return torch.bmm(q, inputs.mT).add_(1).mul_(share)


def _move(weights: Weights, factors: OpenFactors, share: Tensor) -> Weights:
    """The weights after the mini-batch, in the rows where share is not 0."""
    after: list[Tensor] = []
    for inputs, steps, W, bias in zip(*factors, weights[::2], weights[1::2]):
        moved = steps * share
        after += [torch.baddbmm(W, inputs.mT, moved, alpha=-1), bias - moved.sum(1, keepdim=True)]
    return tuple(after)

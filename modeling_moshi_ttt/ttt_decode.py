"""One frame without gradients: the decoding step.

The dual form needs of the open mini-batch no more than its keys, the inputs of the second layer, and the steps lr_s g_s; these few rows are
kept with the state (`TTTState.open_factors`), and where the inner loss has no LayerNorm lr_s c_s, which bound the step (`ttt_reference`). A
frame then reads W1 once, for its key and query together, and W2 for the key, for the gradient and for the query.

Rows that the host knows to stand at the same frame (lockstep), as those of one live stream, fill the same slot, and their weights are
rewritten at a mini-batch's end only. Others are ragged: every row has its own slot, and the weights are written in every frame, unchanged
in the rows whose mini-batch goes on. Neither reads anything back from the device, and the latter has no branch, so that one graph holds it.

Shape letters: B rows, H heads, M = B H, b mini-batch size, D head dimension, F hidden width, n tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ttt_functions import normalize, normalize_backward, square
from .ttt_state import TTTInputs, TTTState

Weights = tuple[Tensor, ...]


class OpenFactors(NamedTuple):
    """Of the open mini-batch's tokens: one layer's part of every weight gradient is inputs^T steps."""

    inputs: tuple[Tensor, ...]  # [M, n, D] the keys, and for the MLP [M, n, F] what they give the second layer
    steps: tuple[Tensor, ...]  # [M, n, F], [M, n, D] (linear: [M, n, D]): lr times the gradient at each layer's outputs
    load: tuple[Tensor, ...] = ()  # [M, n, 1]: lr_s c_s, where the inner loss has no LayerNorm
    lockstep: bool = True  # every row has n tokens; or else n is b, with zeros in the slots that a row has not filled

    def map_with(self, change: Callable[..., Tensor], *others: OpenFactors) -> OpenFactors:
        inputs = tuple(change(*xs) for xs in zip(self.inputs, *(other.inputs for other in others)))
        steps = tuple(change(*xs) for xs in zip(self.steps, *(other.steps for other in others)))
        load = tuple(change(*xs) for xs in zip(self.load, *(other.load for other in others)))
        return OpenFactors(inputs, steps, load, self.lockstep)

    def ragged(self, b: int) -> OpenFactors:
        """The same with a slot for each of b tokens."""
        if not self.lockstep:
            return self
        return self.map_with(lambda x: F.pad(x, (0, 0, 0, b - x.shape[1])))._replace(lockstep=False)


class _Norm(NamedTuple):
    weight: Tensor  # [M, 1, D]
    bias: Tensor  # [M, 1, D]
    eps: float
    inner: bool  # the inner loss has it too; else its step is bounded


def decode_step(
    inputs: TTTInputs, state: TTTState, *, valid: Tensor | None, eps: float, inner_norm: str = "layer_norm"
) -> tuple[Tensor, TTTState]:
    """The op for one frame of every row, T = 1, all inputs in the dtype of the state's weights; valid `[B]` or None."""
    q, k, v, lr, token_weight, norm_weight, norm_bias = inputs
    rows, _, heads, dim = q.shape
    weights = tuple(w.flatten(0, 1) for w in state.weights)
    norm_weight, norm_bias = (x.expand(rows, heads, dim).reshape(-1, 1, dim) for x in (norm_weight, norm_bias))
    norm = _Norm(norm_weight, norm_bias, eps, inner_norm == "layer_norm")
    state = state if state.mini_batch_size else state.with_slots(len(token_weight))
    kept = _gather(state, weights, norm) if state.open_factors is None else state.open_factors
    if valid is None and kept.lockstep and not torch.compiler.is_compiling():
        place: _Lockstep | _Ragged = _Lockstep(kept.inputs[0].shape[1], token_weight)
    else:
        place, kept = _Ragged(state, valid, token_weight), kept.ragged(len(token_weight))
        q, k, v, lr = (place.clean(x) for x in (q, k, v, lr))

    key, query, value = (x.reshape(-1, 1, dim) for x in (k, q, v))  # [M, 1, D]
    z1 = torch.baddbmm(weights[1], torch.cat([key, query], 1), weights[0])  # [M, 2, F]
    new = _factors(key, z1[:, :1], value - key, lr.reshape(-1, 1, 1), weights, norm)
    factors = kept.map_with(place.append, new)
    share = place.share if norm.inner else place.share / (place.share * factors.load[0].sum(1, keepdim=True)).clamp(min=1)
    unit = normalize(_read(query, z1[:, 1:], share, factors, weights), eps)[0]
    out = place.clean(torch.addcmul(query + norm.bias, unit, norm.weight).view(q.shape))

    k, v, lr = (place.store(old, x) for old, x in zip((state.k, state.v, state.lr), (k, v, lr)))
    after = state.weights
    if place.some_end:
        after = tuple(w.view(x.shape) for w, x in zip(_move(weights, factors, share * place.ends), after))
        factors, k, v, lr = factors.map_with(place.forget), *map(place.clear, (k, v, lr))
    return out, TTTState.of(after, k, v, lr, state.frames + place.arrived, factors)


class _Lockstep:
    """Every row's token takes the same slot, and the kept tokens are those before it: nothing is asked of the device."""

    ends, arrived = 1, 1

    def __init__(self, slot: int, token_weight: Tensor) -> None:
        self.slot, self.share = slot, token_weight[slot]
        self.some_end = slot + 1 == len(token_weight)

    def append(self, kept: Tensor, new: Tensor) -> Tensor:
        return torch.cat([kept, new], 1)

    def forget(self, kept: Tensor) -> Tensor:
        return kept[:, :0]

    def store(self, tokens: Tensor, token: Tensor) -> Tensor:
        return torch.slice_scatter(tokens, token, 1, self.slot, self.slot + 1)

    def clear(self, tokens: Tensor) -> Tensor:
        return torch.zeros_like(tokens)

    def clean(self, x: Tensor) -> Tensor:
        return x


class _Ragged:
    """Rows stand at different slots, or some have no token in this frame. Empty slots hold zeros, so a sum fills them."""

    some_end = True  # which rows, only the device knows

    def __init__(self, state: TTTState, valid: Tensor | None, token_weight: Tensor) -> None:
        heads, size = state.W1.shape[1], len(token_weight)
        position = state.frames % size
        here = torch.arange(size, device=position.device) == position[:, None]  # [B, b]
        self.valid = valid
        if valid is not None:  # a masked token becomes zeros in no slot, whatever it holds
            here = here & valid[:, None]
        self.arrived = 1 if valid is None else valid
        self.taken = here.to(token_weight.dtype)
        self.slot = _per_head(self.taken, heads)[..., None]  # [M, b, 1]
        self.share = _per_head(token_weight.index_select(0, position), heads)[:, None, None]  # [M, 1, 1]
        self.full = here[:, -1]  # [B]
        self.ends = _per_head(self.full, heads)[:, None, None]  # [M, 1, 1]

    def append(self, kept: Tensor, new: Tensor) -> Tensor:
        return torch.addcmul(kept, self.slot, new)  # `where` is five times as slow

    def forget(self, kept: Tensor) -> Tensor:
        return kept.masked_fill(self.ends, 0)

    def store(self, tokens: Tensor, token: Tensor) -> Tensor:
        return torch.addcmul(tokens, _like(self.taken, tokens), token)

    def clear(self, tokens: Tensor) -> Tensor:
        return tokens.masked_fill(_like(self.full, tokens), 0)

    def clean(self, x: Tensor) -> Tensor:
        return x if self.valid is None else torch.where(_like(self.valid, x), x, 0.0)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x with dimensions of size 1 behind, as many as `other` has."""
    return x.view(*x.shape, *(1,) * (other.dim() - x.dim()))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """`[B, ...]` as `[M, ...]`."""
    return x.unsqueeze(1).expand(-1, heads, *x.shape[1:]).flatten(0, 1)


def _gather(state: TTTState, weights: Weights, norm: _Norm) -> OpenFactors:
    """The factors of all open tokens at once, from the tokens that the state keeps."""
    b = state.mini_batch_size
    open_tokens = b if state.lockstep_frames is None else state.lockstep_frames % b
    k, v, rate = (x.transpose(1, 2).flatten(0, 1)[:, :open_tokens] for x in (state.k, state.v, state.lr[..., None]))  # [M, n, ·]
    factors = _factors(k, torch.baddbmm(weights[1], k, weights[0]), v - k, rate, weights, norm)
    if state.lockstep_frames is not None:
        return factors
    filled = torch.arange(b, device=k.device) < state.position[:, None]  # [B, b]
    filled = _per_head(filled, state.W1.shape[1])[..., None].to(k.dtype)
    return factors.map_with(lambda x: x * filled)._replace(lockstep=False)


def _factors(k: Tensor, z1: Tensor, target: Tensor, rate: Tensor, weights: Weights, norm: _Norm) -> OpenFactors:
    """k `[M, n, D]` of n tokens, z1 = k W1 + b1 `[M, n, F]`, target `[M, n, D]`, rate `[M, n, 1]`."""
    if len(weights) == 2:
        if norm.inner:
            return OpenFactors((k,), (_step(z1, target, rate, norm),))
        return OpenFactors((k,), ((z1 - target) * rate,), ((square(k) + 1) * rate,))
    hidden = F.gelu(z1, approximate="tanh")
    z2 = torch.baddbmm(weights[3], hidden, weights[2])
    if norm.inner:
        step2 = _step(z2, target, rate, norm)
        step1 = torch.ops.aten.gelu_backward(torch.bmm(step2, weights[2].mT), z1, approximate="tanh")
        return OpenFactors((k, hidden), (step1, step2))
    error = z2 - target
    gradient1 = torch.ops.aten.gelu_backward(torch.bmm(error, weights[2].mT), z1, approximate="tanh")
    c = (square(k) + 1) * square(gradient1) / (square(error) + norm.eps) + square(hidden) + 1
    return OpenFactors((k, hidden), (gradient1 * rate, error * rate), (c * rate,))


def _step(z: Tensor, target: Tensor, rate: Tensor, norm: _Norm) -> Tensor:
    """lr times the gradient of 1/2 ||LN(z) - target||^2 with respect to z."""
    unit, mean, rstd = normalize(z, norm.eps)
    pull = torch.addcmul(norm.bias - target, unit, norm.weight).mul_(norm.weight)
    return normalize_backward(pull, z, mean, rstd).mul_(rate)


def _read(q: Tensor, z1: Tensor, share: Tensor, factors: OpenFactors, weights: Weights) -> Tensor:
    """f(q) `[M, 1, D]` at the weights that hold w_t of all tokens so far; z1 is q W1 + b1 at the mini-batch's first weights."""
    z = torch.baddbmm(z1, _dots(q, share, factors.inputs[0]), factors.steps[0], alpha=-1)
    if len(weights) == 2:
        return z
    x = F.gelu(z, approximate="tanh")
    return torch.baddbmm(weights[3], x, weights[2]).baddbmm_(_dots(x, share, factors.inputs[1]), factors.steps[1], alpha=-1)


def _dots(q: Tensor, share: Tensor, inputs: Tensor) -> Tensor:
    """w_t (q_t . k_s + 1) `[M, 1, n]`."""
    return torch.bmm(q, inputs.mT).add_(1).mul_(share)


def _move(weights: Weights, factors: OpenFactors, share: Tensor) -> Weights:
    """The weights after the mini-batch, in the rows where share is not 0."""
    after: list[Tensor] = []
    for inputs, steps, W, bias in zip(factors.inputs, factors.steps, weights[::2], weights[1::2]):
        moved = steps * share
        after += [torch.baddbmm(W, inputs.mT, moved, alpha=-1), bias - moved.sum(1, keepdim=True)]
    return tuple(after)

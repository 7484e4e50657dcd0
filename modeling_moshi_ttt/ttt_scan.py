"""TTT in torch: one dual form per mini-batch, a few batched matrix products over all rows and heads, recomputed per group in backward.

With weights W at a mini-batch's start and g_s = grad_z l_s the gradients at the inner model's outputs there, the weights that token t reads
need never be made (Sun et al. 2024, section 2.5, the dual form): q_t W_t = q_t W - w_t sum_{s <= t} (q_t . k_s) lr_s g_s, and the biases add
1 to the dot product. Only the weights at the mini-batch's end are formed, by one product over its tokens.

Shape letters: B rows, H heads, M = B H, N mini-batches, b mini-batch size, D head dimension, F hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Weights = tuple[Tensor, ...]


def scan_mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Weights,
    complete: Tensor,
    *,
    group_size: int,
    eps: float,
) -> tuple[Tensor, Weights]:
    """Run whole mini-batches, one after the other.

    Args:
        q, k, v: `[B, N, b, H, D]`, any floating dtype; the target of a token is v - k.
        lr: `[B, N, b, H]`; 0 in empty slots, which then change nothing but their own output.
        token_weight: `[b]`. norm_weight, norm_bias: `[H, D]`.
        weights: (W1, b1[, W2, b2]), each `[B, H, ...]`; their dtype is the one computed in.
        complete: `[B, N]` bool; a mini-batch that is not complete leaves the weights as they are.
        group_size: mini-batches recomputed together in backward.

    Returns:
        `q + LN(f(q))` `[B, N, b, H, D]` in the weights' dtype, and the weights after the last complete mini-batch.
    """
    rows, number, _, heads, dim = q.shape
    dtype = weights[0].dtype
    tokens = _Tokens(*(x.to(dtype).permute(1, 0, 3, 2, 4).reshape(number, rows * heads, -1, dim) for x in (q, k, v)))
    # Each token's step, and 0 for all of them at the end of a mini-batch that stays open.
    lr = lr.to(dtype).permute(1, 0, 3, 2).reshape(number, rows * heads, 1, -1)  # [N, M, 1, b]
    ends = complete.to(dtype).t().repeat_interleave(heads, 1)[..., None, None]  # [N, M, 1, 1]
    shared = _Shared(
        token_weight.to(dtype)[:, None], norm_weight.to(dtype).repeat(rows, 1)[:, None], norm_bias.to(dtype).repeat(rows, 1)[:, None], eps
    )
    shapes = [w.shape for w in weights]
    weights = tuple(w.reshape(rows * heads, *w.shape[2:]) for w in weights)

    outputs = []
    for start in range(0, number, group_size):
        group = slice(start, start + group_size)
        inputs = (_Tokens(*(x[group] for x in tokens)), lr[group], ends[group], shared, weights)
        if torch.is_grad_enabled():
            out, weights = checkpoint(_run_group, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out, weights = _run_group(*inputs)
        outputs.append(out)
    out = torch.cat(outputs).view(number, rows, heads, -1, dim).permute(1, 0, 3, 2, 4)  # [B, N, b, H, D]
    return out, tuple(w.view(shape) for w, shape in zip(weights, shapes))


class _Tokens(NamedTuple):
    q: Tensor  # [N, M, b, D], as k and v
    k: Tensor
    v: Tensor


class _Shared(NamedTuple):
    token_weight: Tensor  # [b, 1]
    norm_weight: Tensor  # [M, 1, D]
    norm_bias: Tensor  # [M, 1, D]
    eps: float


def _run_group(tokens: _Tokens, lr: Tensor, ends: Tensor, shared: _Shared, weights: Weights) -> tuple[Tensor, Weights]:
    step = _linear if len(weights) == 2 else _mlp
    outputs = []
    for q, k, v, rate, end in zip(*tokens, lr, ends):
        read = torch.tril(shared.token_weight * rate)  # [M, b, b]: what token t takes of token s
        z, weights = step(q, k, v - k, read, rate * (end * shared.token_weight[-1]), shared, weights)
        outputs.append(q + _normalise(z, shared.eps)[0] * shared.norm_weight + shared.norm_bias)
    return torch.stack(outputs), weights


def _linear(q: Tensor, k: Tensor, target: Tensor, read: Tensor, last: Tensor, shared: _Shared, weights: Weights) -> tuple[Tensor, Weights]:
    W1, b1 = weights
    g = _loss_gradient(torch.baddbmm(b1, k, W1), target, shared)  # [M, b, D]
    z = torch.baddbmm(b1, q, W1) - (read * (q @ k.mT + 1)) @ g
    return z, (torch.baddbmm(W1, k.mT * last, g, alpha=-1), torch.baddbmm(b1, last, g, alpha=-1))


def _mlp(q: Tensor, k: Tensor, target: Tensor, read: Tensor, last: Tensor, shared: _Shared, weights: Weights) -> tuple[Tensor, Weights]:
    W1, b1, W2, b2 = weights
    z1 = torch.baddbmm(b1, k, W1)  # [M, b, F]
    x2 = F.gelu(z1, approximate="tanh")
    g2 = _loss_gradient(torch.baddbmm(b2, x2, W2), target, shared)  # [M, b, D]
    g1 = (g2 @ W2.mT) * _gelu_slope(z1)  # [M, b, F]
    y2 = F.gelu(torch.baddbmm(b1, q, W1) - (read * (q @ k.mT + 1)) @ g1, approximate="tanh")
    z = torch.baddbmm(b2, y2, W2) - (read * (y2 @ x2.mT + 1)) @ g2
    W1, b1 = torch.baddbmm(W1, k.mT * last, g1, alpha=-1), torch.baddbmm(b1, last, g1, alpha=-1)
    return z, (W1, b1, torch.baddbmm(W2, x2.mT * last, g2, alpha=-1), torch.baddbmm(b2, last, g2, alpha=-1))


def _normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z `[..., D]` at mean 0 and variance 1, and its inverse standard deviation."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _loss_gradient(z: Tensor, target: Tensor, shared: _Shared) -> Tensor:
    """Gradient of 1/2 ||LN(z) - target||^2 with respect to z `[M, b, D]`."""
    unit, rstd = _normalise(z, shared.eps)
    g = (unit * shared.norm_weight + shared.norm_bias - target) * shared.norm_weight
    return (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)) * rstd


def _gelu_slope(z: Tensor) -> Tensor:
    """Derivative of the tanh form of GELU."""
    inner = 0.7978845608028654 * z * (1 + 0.044715 * z * z)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)

"""The TTT op in the paper's dual form (Sun et al. 2024, section 2.5), to be read: plain torch, autograd, no stream. The tests' second
oracle.

All gradients of a mini-batch are taken at its first weights W, so what token t reads is linear in them, and the weights that each token
reads need never be made. A layer z W + b whose outputs' gradients are g_s gives, for query input q_t and key inputs k_s,

    q_t W_t + b_t = q_t W + b - share_t sum_{s <= t} (q_t . k_s + 1) lr_s g_s,

and only the weights at the mini-batch's end are formed. `ttt_reference` has the definition, the two inner losses and the bound on share_t;
`ttt_scan` computes the same, quicker and with a backward of its own.

Shape letters: B rows, T frames, H heads, D head dimension, F hidden width of the MLP, b mini-batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ttt_state import TTTInputs

Weights = tuple[Tensor, ...]


def ttt_dual(inputs: TTTInputs, weights: Weights, *, inner_norm: str = "layer_norm", eps: float = 1e-6) -> tuple[Tensor, Weights]:
    """The op on whole streams: `[B, T, H, D]` answers, and the weights `[B, H, ...]` after the last complete mini-batch."""
    b = len(inputs.token_weight)
    tokens = [x.transpose(1, 2) for x in (*inputs[:3], inputs.lr[..., None])]  # [B, H, T, D], lr [B, H, T, 1]
    shared = inputs.token_weight[:, None], inputs.norm_weight[:, None], inputs.norm_bias[:, None]  # [b, 1], [H, 1, D]
    outputs = []
    for q, k, v, lr in zip(*(x.split(b, 2) for x in tokens)):
        out, after = mini_batch(q, k, v - k, lr, *shared, weights, inner_norm, eps)
        outputs.append(out)
        weights = after if q.shape[2] == b else weights
    return torch.cat(outputs, 2).transpose(1, 2), weights


def mini_batch(
    q: Tensor, k: Tensor, u: Tensor, lr: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, weights: Weights, inner_norm: str, eps: float
) -> tuple[Tensor, Weights]:
    """One mini-batch of up to b tokens: q, k and target u `[B, H, b, D]`, lr `[B, H, b, 1]`; its answers, and the weights after it."""
    layers = list(zip(weights[::2], weights[1::2]))
    # Forward for the keys, keeping what goes into each layer; then the gradient g of l_s at each layer's outputs.
    x, z = [k], [k @ layers[0][0] + layers[0][1]]
    if len(layers) == 2:
        x.append(F.gelu(z[0], approximate="tanh"))
        z.append(x[1] @ layers[1][0] + layers[1][1])
    g = [loss_gradient(z[-1], u, gamma, beta, eps) if inner_norm == "layer_norm" else z[-1] - u]
    c = x[-1].square().sum(-1, keepdim=True) + 1  # [B, H, b, 1]
    if len(layers) == 2:
        g.insert(0, gelu_slope(z[0]) * (g[0] @ layers[1][0].mT))
        c = c + (k.square().sum(-1, keepdim=True) + 1) * g[0].square().sum(-1, keepdim=True) / (g[1].square().sum(-1, keepdim=True) + eps)
    share = w[: k.shape[2]].expand_as(lr)
    if inner_norm == "none":
        share = share / (share * (lr * c).cumsum(2)).clamp(min=1)
    # Forward for the queries, each reading its own weights; then the weights at the end.
    y = q
    after: list[Tensor] = []
    for (W, bias), x_k, gradient in zip(layers, x, g):
        y = F.gelu(y, approximate="tanh") if after else y
        attention = (share * (y @ x_k.mT + 1)).tril()  # [B, H, b, b]
        y = y @ W + bias - attention @ (lr * gradient)
        step = share[:, :, -1:] * lr * gradient
        after += [W - x_k.mT @ step, bias - step.sum(2, keepdim=True)]
    return q + F.layer_norm(y, y.shape[-1:], eps=eps) * gamma + beta, tuple(after)


def loss_gradient(z: Tensor, u: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Of 1/2 ||LN(z) - u||^2 with respect to z."""
    std = (z.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    unit = (z - z.mean(-1, keepdim=True)) / std
    d_unit = (unit * gamma + beta - u) * gamma
    return (d_unit - d_unit.mean(-1, keepdim=True) - unit * (d_unit * unit).mean(-1, keepdim=True)) / std


def gelu_slope(z: Tensor) -> Tensor:
    """Derivative of the tanh form of GELU."""
    root = (2 / torch.pi) ** 0.5
    tanh = (root * (z + 0.044715 * z**3)).tanh()
    slope: Tensor = 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * root * (1 + 3 * 0.044715 * z**2)
    return slope

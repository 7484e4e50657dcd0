"""A plain torch loop over mini-batches in the published dual form: the stand-in for the public TTT-LM layer, to measure against.

It follows Sun et al. 2024 (section 2.5 and Appendix A) formula by formula: autograd through everything, biases through their own products,
and a decoding step in the primal form that adds each token's gradient to the gathered ones and makes all weights anew. Tensors are
`[B, H, b, ...]` as there. It is correct, and the tests hold it to the same numbers as the op; nothing else uses it.

Shape letters: B rows, T frames, H heads, D head dimension, F hidden width, b mini-batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Weights,
    eps: float = 1e-6,
) -> tuple[Tensor, Weights]:
    """q, k, v `[B, T, H, D]`, lr `[B, T, H]`, weights `[B, H, ...]`, T a multiple of b -> out `[B, T, H, D]` and the weights after."""
    rows, length, heads, dim = q.shape
    b = len(token_weight)
    q, k, v = (x.reshape(rows, length // b, b, heads, dim).permute(1, 0, 3, 2, 4) for x in (q, k, v))  # [N, B, H, b, D]
    lr = lr.reshape(rows, length // b, b, heads).permute(1, 0, 3, 2).unsqueeze(-2)  # [N, B, H, 1, b]
    gamma, beta = norm_weight[:, None], norm_bias[:, None]  # [H, 1, D]
    outputs = []
    for i in range(length // b):
        eta = token_weight[:, None] * lr[i]  # [B, H, b, b]
        step = _dual_linear if len(weights) == 2 else _dual_mlp
        z, weights = step(q[i], k[i], v[i] - k[i], eta, gamma, beta, weights, eps)
        outputs.append(q[i] + _layer_norm(z, gamma, beta, eps))
    return torch.stack(outputs).permute(1, 0, 3, 2, 4).reshape(rows, length, heads, dim), weights


def _dual_linear(q: Tensor, k: Tensor, target: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor, weights: Weights, eps: float):
    W1, b1 = weights
    g = _loss_gradient(k @ W1 + b1, target, gamma, beta, eps)
    z, W1, b1 = _dual(q, k, eta, g, W1, b1)
    return z, (W1, b1)


def _dual_mlp(q: Tensor, k: Tensor, target: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor, weights: Weights, eps: float):
    W1, b1, W2, b2 = weights
    z1 = k @ W1 + b1
    x2 = F.gelu(z1, approximate="tanh")
    g2 = _loss_gradient(x2 @ W2 + b2, target, gamma, beta, eps)
    g1 = g2 @ W2.transpose(-2, -1) * _gelu_slope(z1)
    z, W1, b1 = _dual(q, k, eta, g1, W1, b1)
    z, W2, b2 = _dual(F.gelu(z, approximate="tanh"), x2, eta, g2, W2, b2)
    return z, (W1, b1, W2, b2)


def _dual(q: Tensor, k: Tensor, eta: Tensor, g: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of the inner model: what its weights after each token give for q, and the weights after the last."""
    attention = torch.tril(q @ k.transpose(-2, -1))
    bias_bar = bias - torch.tril(eta) @ g
    z = q @ W - (eta * attention) @ g + bias_bar
    last = eta[..., -1, :, None]  # [B, H, b, 1]
    return z, W - (last * k).transpose(-2, -1) @ g, bias - (last * g).sum(-2, keepdim=True)


class Decoder:
    """The published decoding step: one token at a time, weights and gathered gradients `[B, H, ...]` kept side by side."""

    def __init__(self, token_weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, weights: Weights, eps: float = 1e-6) -> None:
        self.token_weight, self.gamma, self.beta, self.eps = token_weight, norm_weight[:, None], norm_bias[:, None], eps
        self.weights, self.gathered, self.position = weights, tuple(torch.zeros_like(w) for w in weights), 0

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, lr: Tensor) -> Tensor:
        """q, k, v `[B, H, 1, D]`, lr `[B, H, 1, 1]` -> `[B, H, 1, D]`."""
        inputs, gradients = [k], []
        W1, b1, *second = self.weights
        z = k @ W1 + b1
        if second:
            inputs.append(F.gelu(z, approximate="tanh"))
            g2 = _loss_gradient(inputs[1] @ second[0] + second[1], v - k, self.gamma, self.beta, self.eps)
            gradients = [g2 @ second[0].transpose(-2, -1) * _gelu_slope(z), g2]
        else:
            gradients = [_loss_gradient(z, v - k, self.gamma, self.beta, self.eps)]
        self.gathered = tuple(old + part for old, part in zip(self.gathered, _gradients(inputs, gradients, torch.tril(lr))))
        bar = [w - g * self.token_weight[self.position] for w, g in zip(self.weights, self.gathered)]
        z = q @ bar[0] + bar[1]
        if second:
            z = F.gelu(z, approximate="tanh") @ bar[2] + bar[3]
        self.position += 1
        if self.position == len(self.token_weight):
            self.weights, self.gathered, self.position = tuple(bar), tuple(torch.zeros_like(w) for w in bar), 0
        return q + _layer_norm(z, self.gamma, self.beta, self.eps)


def _gradients(inputs: list[Tensor], gradients: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Of every layer's weights and biases after one token, in the published primal form; lr `[B, H, 1, 1]`."""
    parts: list[Tensor] = []
    for x, g in zip(inputs, gradients):
        outer = torch.einsum("bhki,bhkj->bhkij", x, g)
        parts.append(torch.einsum("bhnk,bhkij->bhnij", lr, outer).squeeze(2))
        parts.append(torch.einsum("bhnk,bhki->bhni", lr, g))
    return parts


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    return gamma * (x - mean) / std + beta


def _loss_gradient(x: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    unit = (x - mean) / std
    g = (gamma * unit + beta - target) * gamma
    dim = x.shape[-1]
    return (dim * g - g.sum(-1, keepdim=True) - unit * (g * unit).sum(-1, keepdim=True)) / (dim * std)


def _gelu_slope(x: Tensor) -> Tensor:
    tanh = torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - tanh * tanh) * (0.7978845608 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)

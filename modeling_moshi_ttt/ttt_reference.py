"""The TTT op from its definition: one token after the other, the inner gradient by automatic differentiation. Slow, and the judge of all others.

Inner model f_W(z) = z W1 + b1 (linear) or gelu_tanh(z W1 + b1) W2 + b2 (MLP); inner loss of token s

    l_s(W) = 1/2 || LN(f_W(k_s)) - (v_s - k_s) ||^2.

In a mini-batch with weights W at its start, token t (0-based inside it) reads W_t = W - w_t sum_{s <= t} lr_s grad l_s(W), answers
q_t + LN(f_{W_t}(q_t)), and the next mini-batch starts from W_{b-1} (Sun et al. 2024, "Learning to (Learn at Test Time)", section 2, eq. 5-8;
Appendix A of the same for LN and the residual). It shares no code with the other implementations.

Shape letters: B rows, T frames, H heads, D head dimension, F hidden width, b mini-batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ttt_state import TTTState

Weights = tuple[Tensor, ...]


def ttt_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: TTTState,
    *,
    mini_batch_size: int,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, TTTState]:
    """The op for both mixers, `ttt_ops.ttt_linear` and `ttt_ops.ttt_mlp` describe it; all tensors in one floating dtype."""
    rows, length, heads, dim = q.shape
    valid = torch.ones(rows, length, dtype=torch.bool, device=q.device) if mask is None else mask
    inner = _Inner(norm_weight, norm_bias, eps)
    weights, position = state.weights, state.frames % mini_batch_size
    fresh = state.mini_batch_size == 0
    open_k, open_v, open_lr = ([x.new_zeros(rows, *x.shape[2:])] * mini_batch_size if fresh else list(x.unbind(1)) for x in (state.k, state.v, state.lr))

    gathered: Weights = tuple(torch.zeros_like(w) for w in weights)
    for slot in range(mini_batch_size):  # the open mini-batch is gathered again
        gathered = _add(gathered, inner.gradient(weights, open_k[slot], open_v[slot]), open_lr[slot], slot < position)

    outputs = []
    for t in range(length):
        gathered = _add(gathered, inner.gradient(weights, k[:, t], v[:, t]), lr[:, t], valid[:, t])
        read = tuple(w - token_weight[position].view(rows, 1, 1, 1) * g for w, g in zip(weights, gathered))
        outputs.append(torch.where(_wide(valid[:, t], 3), q[:, t] + inner.normed(read, q[:, t]), 0.0))
        for slot in range(mini_batch_size):
            here = valid[:, t] & (position == slot)
            open_k[slot] = torch.where(_wide(here, 3), k[:, t], open_k[slot])
            open_v[slot] = torch.where(_wide(here, 3), v[:, t], open_v[slot])
            open_lr[slot] = torch.where(_wide(here, 2), lr[:, t], open_lr[slot])
        full = valid[:, t] & (position == mini_batch_size - 1)
        weights = tuple(torch.where(_wide(full, 4), new, old) for new, old in zip(read, weights))
        gathered = tuple(torch.where(_wide(full, 4), 0.0, g) for g in gathered)
        open_k, open_v = ([torch.where(_wide(full, 3), 0.0, x) for x in kept] for kept in (open_k, open_v))
        open_lr = [torch.where(_wide(full, 2), 0.0, x) for x in open_lr]
        position = (position + valid[:, t]) % mini_batch_size

    k_left, v_left, lr_left = (torch.stack(kept, 1) for kept in (open_k, open_v, open_lr))
    return torch.stack(outputs, 1), TTTState.of(weights, k_left, v_left, lr_left, state.frames + valid.sum(1))


class _Inner:
    """The inner model with its LayerNorm and loss. Rows and heads are independent, so one summed loss has all their gradients."""

    def __init__(self, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> None:
        self.norm_weight, self.norm_bias, self.eps = norm_weight, norm_bias, eps

    def normed(self, weights: Weights, z: Tensor) -> Tensor:
        """LN(f_W(z)) for one token of every row: z `[B, H, D]` -> `[B, H, D]`."""
        y = torch.einsum("bhd,bhdf->bhf", z, weights[0]) + weights[1].squeeze(2)
        if len(weights) == 4:
            y = torch.einsum("bhf,bhfd->bhd", F.gelu(y, approximate="tanh"), weights[2]) + weights[3].squeeze(2)
        y = y - y.mean(-1, keepdim=True)
        return y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.norm_weight + self.norm_bias

    def gradient(self, weights: Weights, k: Tensor, v: Tensor) -> Weights:
        """Gradient of every row's and head's loss with respect to its own weights, differentiable when gradients are on."""
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            point = tuple(w if outer and w.requires_grad else w.detach().requires_grad_() for w in weights)
            loss = 0.5 * (self.normed(point, k) - (v - k)).square().sum()
            return torch.autograd.grad(loss, point, create_graph=outer)


def _add(gathered: Weights, gradient: Weights, lr: Tensor, where: Tensor) -> Weights:
    step = lr[:, :, None, None]  # [B, H, 1, 1]
    return tuple(torch.where(_wide(where, 4), g + step * d, g) for g, d in zip(gathered, gradient))


def _wide(rows: Tensor, dims: int) -> Tensor:
    """`[B]` as `[B, 1, ...]` of that many dimensions."""
    return rows.view(-1, *(1,) * (dims - 1))

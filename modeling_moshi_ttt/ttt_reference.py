"""The TTT op from its definition: one token after the other, the inner gradient by automatic differentiation. Slow, and the judge of all
others.

Inner model f_W(z) = z W1 + b1 (linear) or gelu_tanh(z W1 + b1) W2 + b2 (MLP); target u_s = v_s - k_s; inner loss of token s

    inner_norm "layer_norm":  l_s(W) = 1/2 || LN(f_W(k_s)) - u_s ||^2    as published
    inner_norm "none":        l_s(W) = 1/2 || f_W(k_s) - u_s ||^2        a memory that can be written over

In a mini-batch with weights W at its start, token t (0-based inside it) reads W_t = W - share_t sum_{s <= t} lr_s grad l_s(W), answers
q_t + LN(f_{W_t}(q_t)), and the next mini-batch starts from W_{b-1} (Sun et al. 2024, "Learning to (Learn at Test Time)", section 2, eq.
5-8; Appendix A of the same for LN and the residual). share_t is the token weight w_t as published; without LN in the inner loss it is
bounded:

    share_t = min(w_t, 1 / sum_{s <= t} lr_s c_s),    c_s = || grad l_s(W) ||^2 / || e_s ||^2,    e_s = f_W(k_s) - u_s

1 / c_s is Polyak's step, at which e_s vanishes to first order. For linear c_s = ||k_s||^2 + 1, and W_t is an average of W and of the
weights at which one token's error is 0, whatever the token weights, rates and keys are. So for any weights V that answer all the targets
||W_t - V|| <= ||W - V||, and for any targets ||W_t||^2 <= ||W||^2 + max_s ||u_s||^2 (Frobenius, with the bias). At b = 1 it is the delta
rule. For the MLP, with x_s what its second layer gets, c_s = ||x_s||^2 + 1 + (||k_s||^2 + 1) || gelu'(z_s) * (W2 e_s) ||^2 / (||e_s||^2 +
eps): the second layer (W2, b2) keeps the same bound as linear, and the first one moves by at most (max_s ||u_s|| + ||(W2, b2)|| +
sqrt(eps)) / 2 a mini-batch. Norms grow as powers of time at most, never exponentially.

It shares no code with the other implementations.

Shape letters: B rows, T frames, H heads, D head dimension, F hidden width, b mini-batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ttt_state import TTTInputs, TTTState

Weights = tuple[Tensor, ...]


def ttt_reference(
    inputs: TTTInputs,
    state: TTTState,
    *,
    mini_batch_size: int,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    inner_norm: str = "layer_norm",
) -> tuple[Tensor, TTTState]:
    """The op for both mixers, `ttt_ops.ttt_linear` and `ttt_ops.ttt_mlp` describe it; all tensors in one floating dtype."""
    q, k, v, lr, token_weight, norm_weight, norm_bias = inputs
    rows, length = q.shape[:2]
    valid = torch.ones(rows, length, dtype=torch.bool, device=q.device) if mask is None else mask
    inner = _Inner(norm_weight, norm_bias, eps, inner_norm)
    weights, position = state.weights, state.frames % mini_batch_size
    fresh = state.mini_batch_size == 0
    open_k, open_v, open_lr = (
        [x.new_zeros(rows, *x.shape[2:])] * mini_batch_size if fresh else list(x.unbind(1)) for x in (state.k, state.v, state.lr)
    )

    # Sums over the open mini-batch of lr_s grad l_s, as the weights, and of lr_s c_s, [B, H, 1, 1]
    gathered: Weights = tuple(torch.zeros_like(w) for w in (*weights, weights[0][:, :, :1, :1]))
    for slot in range(mini_batch_size):  # the open mini-batch is gathered again
        gathered = _add(gathered, inner.gradient(weights, open_k[slot], open_v[slot]), open_lr[slot], slot < position)

    outputs = []
    for t in range(length):
        gathered = _add(gathered, inner.gradient(weights, k[:, t], v[:, t]), lr[:, t], valid[:, t])
        share = token_weight[position].view(rows, 1, 1, 1)
        if inner_norm == "none":
            share = share / (share * gathered[-1]).clamp(min=1)
        read = tuple(w - share * g for w, g in zip(weights, gathered))
        outputs.append(torch.where(_wide(valid[:, t], 3), q[:, t] + inner.normed(inner.f(read, q[:, t])), 0.0))
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

    def __init__(self, norm_weight: Tensor, norm_bias: Tensor, eps: float, inner_norm: str) -> None:
        self.norm_weight, self.norm_bias, self.eps, self.inner_norm = norm_weight, norm_bias, eps, inner_norm

    def f(self, weights: Weights, z: Tensor) -> Tensor:
        """f_W(z) for one token of every row: z `[B, H, D]` -> `[B, H, D]`."""
        return _affine(self.last_input(weights, z), *weights[-2:])

    def last_input(self, weights: Weights, z: Tensor) -> Tensor:
        """What the last layer gets: the token itself, or the hidden units `[B, H, F]`."""
        return z if len(weights) == 2 else F.gelu(_affine(z, *weights[:2]), approximate="tanh")

    def normed(self, y: Tensor) -> Tensor:
        """LN(y), `[B, H, D]`."""
        y = y - y.mean(-1, keepdim=True)
        return y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.norm_weight + self.norm_bias

    def gradient(self, weights: Weights, k: Tensor, v: Tensor) -> Weights:
        """Gradient of every row's and head's loss with respect to its own weights, and c `[B, H, 1, 1]`; differentiable when gradients are
        on.
        """
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            point = tuple(w if outer and w.requires_grad else w.detach().requires_grad_() for w in weights)
            answer = self.f(point, k)
            error = (self.normed(answer) if self.inner_norm == "layer_norm" else answer) - (v - k)
            gradient = torch.autograd.grad(0.5 * error.square().sum(), point, create_graph=outer)
        squares = [
            _square(g.flatten(2)) for g in gradient[:-2]
        ]  # of the first of two layers; the last layer's over ||e||^2 are ||x||^2 + 1
        c = sum(squares, torch.zeros_like(error[..., :1])) / (_square(error) + self.eps) + _square(self.last_input(weights, k)) + 1
        return (*gradient, c[..., None])


def _affine(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("bhd,bhdf->bhf", z, W) + b.squeeze(2)


def _square(x: Tensor) -> Tensor:
    """`[B, H, ...]` -> `[B, H, 1]`."""
    return x.square().sum(-1, keepdim=True)


def _add(gathered: Weights, gradient: Weights, lr: Tensor, where: Tensor) -> Weights:
    step = lr[:, :, None, None]  # [B, H, 1, 1]
    return tuple(torch.where(_wide(where, 4), g + step * d, g) for g, d in zip(gathered, gradient))


def _wide(rows: Tensor, dims: int) -> Tensor:
    """`[B]` as `[B, 1, ...]` of that many dimensions."""
    return rows.view(-1, *(1,) * (dims - 1))

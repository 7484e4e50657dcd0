"""TTT in torch: one dual form per mini-batch, a few batched matrix products over all rows and heads, and a backward worked out by hand.

With weights W at a mini-batch's start and g_s the gradients of l_s there with respect to the inner model's outputs, the weights that token t
reads need never be made (the dual form, Sun et al. 2024, section 2.5): q_t W_t = q_t W - w_t sum_{s <= t} (q_t . k_s) lr_s g_s, and the
bias adds 1 to the dot product. Only the weights at the mini-batch's end are formed, by one product over its tokens.

Backward keeps the weights at the start of every group of mini-batches and runs the group again. Below, dX is the gradient of the outer loss
with respect to X; `step` stands for lr_s g_s, which both the reading and the update of the weights use.

Shape letters: B rows, H heads, M = B H, N mini-batches, n mini-batches of a group, b mini-batch size, D head dimension, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
    inputs = (q, k, v, lr, token_weight, norm_weight, norm_bias, *weights)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    out, *after = _Scan.apply(complete, group_size, eps, keep, *inputs)
    return out, tuple(after)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, complete: Tensor, group_size: int, eps: float, keep: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        weights = tuple(w.flatten(0, 1).clone() for w in inputs[7:])  # [M, ...], ours to change in place
        inner = _linear if len(weights) == 2 else _mlp
        starts: list[Tensor] = []
        outputs = []
        for first in range(0, complete.shape[1], group_size):
            if keep and first:
                starts += [w.clone() for w in weights]
            group, shared = _load(inputs, complete, slice(first, first + group_size), eps)
            answers = [inner(step, shared, weights, weights)[0] for step in group.steps()]
            outputs.append(_to_frames(_normed(torch.stack(answers), shared)[0], inputs[0].shape) + inputs[0][:, first : first + group_size])
        if keep:
            ctx.save_for_backward(complete, *inputs, *starts)
            ctx.group_size, ctx.eps, ctx.count = group_size, eps, len(inputs)
        return (torch.cat(outputs, 1), *(w.view(x.shape) for w, x in zip(weights, inputs[7:])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        complete, *saved = ctx.saved_tensors
        inputs, starts = tuple(saved[: ctx.count]), saved[ctx.count :]
        with torch.autocast(complete.device.type, enabled=False):
            return (None, None, None, None, *_backward(inputs, starts, complete, d_outputs, ctx.group_size, ctx.eps))


def _backward(
    inputs: tuple[Tensor, ...], starts: list[Tensor], complete: Tensor, d_outputs: tuple[Tensor, ...], group_size: int, eps: float
) -> list[Tensor]:
    """Gradients of all inputs, the groups of mini-batches taken from the last to the first."""
    shape, dtype, kinds = inputs[0].shape, inputs[7].dtype, len(inputs) - 7
    inner, inner_backward = (_linear, _linear_backward) if kinds == 2 else (_mlp, _mlp_backward)
    d_weights = tuple(d.reshape(w.flatten(0, 1).shape).clone() for d, w in zip(d_outputs[1:], inputs[7:]))
    d_tokens: list[tuple[Tensor, ...]] = []
    d_shared = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs[4:7]]
    for first in reversed(range(0, complete.shape[1], group_size)):
        place = slice(first, first + group_size)
        group, shared = _load(inputs, complete, place, eps)
        number = first // group_size * kinds
        weights = tuple(starts[number - kinds : number]) if first else tuple(w.flatten(0, 1) for w in inputs[7:])
        steps, before, kept, answers = list(group.steps()), [], [], []
        for step in steps:
            before.append(weights)
            answer, weights, memory = inner(step, shared, weights, None)
            answers.append(answer)
            kept.append(memory)
        grads = _Gradients.like(group, shared)
        d_out = _from_frames(d_outputs[0][:, place].to(dtype))
        d_answers = _normed_backward(torch.stack(answers), d_out, shared, grads)
        grads.kq[:, :, group.size :] += d_out  # the residual
        for i in reversed(range(len(steps))):
            inner_backward(steps[i], shared, before[i], kept[i], d_answers[i], d_weights, grads.step(i))
        _read_backward(group, shared, grads, d_shared[0])
        d_tokens.append(_token_gradients(grads, shape))
        for total, d in zip(d_shared[1:], (grads.norm_weight, grads.norm_bias)):
            total += d.view(shape[0], *total.shape).sum(0)
    tokens = [torch.cat(pieces[::-1], 1) for pieces in zip(*d_tokens)]
    found = [*tokens, *d_shared, *(d.view(w.shape) for d, w in zip(d_weights, inputs[7:]))]
    return [d.to(x.dtype) for d, x in zip(found, inputs)]


# --- the tokens of a group -------------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    token_weight: Tensor  # [b, b]: row t holds w_t up to column t, then zeros
    norm_weight: Tensor  # [M, 1, D]
    norm_bias: Tensor  # [M, 1, D]
    eps: float


class _Step(NamedTuple):
    """One mini-batch, or n of them with one dimension more in front."""

    kq: Tensor  # [M, 2 b, D], keys above queries
    target: Tensor  # [M, b, D]
    rate: Tensor  # [M, b, 1]
    dots: Tensor  # [M, b, b]: q_t . k_s + 1
    end: Tensor  # [M, 1, 1]: w_{b-1}, or 0 where the mini-batch is not complete

    @property
    def size(self) -> int:
        return self.rate.shape[-2]

    @property
    def k(self) -> Tensor:
        return self.kq[..., : self.size, :]

    @property
    def q(self) -> Tensor:
        return self.kq[..., self.size :, :]

    def steps(self) -> Iterator[_Step]:
        return (_Step(*parts) for parts in zip(*self))


class _Gradients(NamedTuple):
    """Gradients of a group's tokens, filled in place mini-batch by mini-batch, and the sums for the norm's weight and bias."""

    kq: Tensor  # shapes as in _Step
    target: Tensor
    rate: Tensor
    dots: Tensor
    end: Tensor
    read: Tensor  # [n, M, b, b], of w_t dots_ts
    norm_weight: Tensor  # [M, D]
    norm_bias: Tensor  # [M, D]

    @classmethod
    def like(cls, group: _Step, shared: _Shared) -> _Gradients:
        norms = (torch.zeros_like(x.squeeze(1)) for x in (shared.norm_weight, shared.norm_bias))
        return cls(*(torch.zeros_like(x) for x in group), torch.zeros_like(group.dots), *norms)

    def step(self, i: int) -> _Gradients:
        return _Gradients(*(x[i] for x in self[:6]), *self[6:])


def _load(inputs: tuple[Tensor, ...], complete: Tensor, place: slice, eps: float) -> tuple[_Step, _Shared]:
    q, k, v, lr, token_weight, norm_weight, norm_bias, W1 = inputs[:8]
    rows, heads, dtype = W1.shape[0], W1.shape[1], W1.dtype
    q, k, v = (_from_frames(x[:, place].to(dtype)) for x in (q, k, v))
    rate = _from_frames(lr[:, place, ..., None].to(dtype))
    weight = token_weight.to(dtype)
    end = (complete[:, place].t().repeat_interleave(heads, 1) * weight[-1])[..., None, None]  # [n, M, 1, 1]
    norm_weight, norm_bias = (x.to(dtype).repeat(rows, 1)[:, None] for x in (norm_weight, norm_bias))
    table = weight[:, None].expand(-1, len(weight)).tril()
    return _Step(torch.cat([k, q], 2), v - k, rate, q @ k.mT + 1, end), _Shared(table, norm_weight, norm_bias, eps)


def _from_frames(x: Tensor) -> Tensor:
    """`[B, n, b, H, ·]` as `[n, M, b, ·]`."""
    return x.permute(1, 0, 3, 2, 4).reshape(x.shape[1], -1, x.shape[2], x.shape[4])


def _to_frames(x: Tensor, shape: torch.Size) -> Tensor:
    """`[n, M, b, ·]` as `[B, n, b, H, ·]`; `shape` gives B and H."""
    return x.view(x.shape[0], shape[0], shape[3], *x.shape[2:]).permute(1, 0, 3, 2, 4)


def _read_backward(group: _Step, shared: _Shared, grads: _Gradients, d_token_weight: Tensor) -> None:
    """From dread and dend to the dot products, the queries, the keys and the token weights, for the whole group at once."""
    d_token_weight += (grads.read * group.dots).tril().sum((0, 1, 3))
    # `end` is w_{b-1} times 0 or 1; the ratio is taken from the sign, so that w_{b-1} = 0 keeps its gradient
    d_token_weight[-1] += (grads.end * group.end).sum()
    d_dots = grads.read * shared.token_weight
    grads.kq[:, :, group.size :] += d_dots @ group.k
    grads.kq[:, :, : group.size] += d_dots.mT @ group.q


def _token_gradients(grads: _Gradients, shape: torch.Size) -> tuple[Tensor, ...]:
    """dq, dk, dv `[B, n, b, H, D]` and dlr `[B, n, b, H]`."""
    b = grads.rate.shape[2]
    d_k = grads.kq[:, :, :b] - grads.target
    d_q, d_k, d_v, d_lr = (_to_frames(x, shape) for x in (grads.kq[:, :, b:].contiguous(), d_k, grads.target, grads.rate))
    return d_q, d_k, d_v, d_lr.squeeze(-1)

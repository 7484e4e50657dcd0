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
        groups = -(-complete.shape[1] // group_size)
        starts = [w.new_empty(groups - 1 if keep else 0, *w.shape) for w in weights]
        out = torch.empty_like(inputs[0], dtype=weights[0].dtype)
        for number in range(groups):
            if keep and number:
                for kept, w in zip(starts, weights):
                    kept[number - 1] = w
            place = slice(number * group_size, (number + 1) * group_size)
            group, shared = _load(inputs, complete, place, eps)
            answers = torch.stack([inner(step, shared, weights, weights)[0] for step in group.steps()])
            unit, _ = normalise(answers, eps)
            out[:, place] = _to_frames(group.q + unit * shared.norm_weight + shared.norm_bias, out.shape)
        if keep:
            ctx.save_for_backward(complete, *inputs, *starts)
            ctx.group_size, ctx.eps = group_size, eps
        return (out, *(w.view(x.shape) for w, x in zip(weights, inputs[7:])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        complete, *saved = ctx.saved_tensors
        kinds = len(d_outputs) - 1
        with torch.autocast(complete.device.type, enabled=False):
            return (None, None, None, None, *_backward(tuple(saved[:-kinds]), saved[-kinds:], complete, d_outputs, ctx.group_size, ctx.eps))


def _backward(
    inputs: tuple[Tensor, ...], starts: list[Tensor], complete: Tensor, d_outputs: tuple[Tensor, ...], group_size: int, eps: float
) -> list[Tensor]:
    """Gradients of all inputs, the groups of mini-batches taken from the last to the first."""
    shape, number = inputs[0].shape, complete.shape[1]
    d_weights = tuple(d.flatten(0, 1).clone() for d in d_outputs[1:])
    d_inputs = [torch.empty_like(x) for x in inputs[:4]]
    d_shared = [torch.zeros_like(x, dtype=d_weights[0].dtype) for x in inputs[4:7]]
    room = tuple(w.new_empty(min(group_size, number), *w.shape) for w in d_weights)  # weights before each mini-batch of a group
    for first in reversed(range(0, number, group_size)):
        place = slice(first, first + group_size)
        group, shared = _load(inputs, complete, place, eps)
        for into, kept, w in zip(room, starts, inputs[7:]):
            into[0] = kept[first // group_size - 1] if first else w.flatten(0, 1)
        grads = _Gradients.empty(group, shared)
        _group_backward(group, shared, room, _from_frames(d_outputs[0][:, place]), d_weights, grads)
        for d, part in zip(d_inputs, grads.of_tokens(shape)):
            d[:, place] = part
        for total, d in zip(d_shared, (grads.token_weight[None], grads.norm_weight, grads.norm_bias)):
            total += d.view(-1, *total.shape).sum(0)
    found = [*d_shared, *(d.view(w.shape) for d, w in zip(d_weights, inputs[7:]))]
    return d_inputs + [d.to(x.dtype) for d, x in zip(found, inputs[4:])]


def _group_backward(group: _Step, shared: _Shared, room: Weights, d_out: Tensor, d_weights: Weights, grads: _Gradients) -> None:
    """Run a group again and then backwards.

    `room` has the weights at the group's start in its first place, and is filled with those before each mini-batch; d_weights is the gradient
    of the weights at the group's end, and becomes that of the weights at its start.
    """
    inner, inner_backward = (_linear, _linear_backward) if len(room) == 2 else (_mlp, _mlp_backward)
    steps, kept, answers = list(group.steps()), [], []
    before = [tuple(w[i] for w in room) for i in range(len(steps))]
    for i, step in enumerate(steps):
        answer, memory = inner(step, shared, before[i], before[i + 1] if i + 1 < len(steps) else None)
        answers.append(answer)
        kept.append(memory)
    unit, rstd = normalise(torch.stack(answers), shared.eps)
    grads.norm_weight.add_((d_out * unit).sum((0, 2)))
    grads.norm_bias.add_(d_out.sum((0, 2)))
    d_answers = project(d_out * shared.norm_weight, unit) * rstd
    for i in reversed(range(len(steps))):
        inner_backward(steps[i], shared, before[i], kept.pop(), d_answers[i], d_weights, grads.step(i))
    grads.token_weight.add_((grads.read * group.dots).tril().sum((0, 1, 3)))
    d_dots = grads.read * shared.table
    grads.kq[:, :, : group.size] += d_dots.mT @ group.q
    grads.kq[:, :, group.size :] += d_out  # the residual
    grads.kq[:, :, group.size :] += d_dots @ group.k


# --- the tokens of a group -------------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    table: Tensor  # [b, b]: row t holds w_t up to column t, then zeros
    norm_weight: Tensor  # [M, 1, D]
    norm_bias: Tensor  # [M, 1, D]
    eps: float


class _Step(NamedTuple):
    """One mini-batch, or n of them with one dimension more in front."""

    kq: Tensor  # [M, 2 b, D], keys above queries
    target: Tensor  # [M, b, D]
    rate: Tensor  # [M, b, 1]
    dots: Tensor  # [M, b, b]: q_t . k_s + 1
    closes: Tensor  # [M, 1, 1]: 1, or 0 where the mini-batch is not complete

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
    """Gradients of a group: what belongs to tokens is written once, the last three are sums."""

    kq: Tensor  # [n, M, 2 b, D]
    target: Tensor  # [n, M, b, D]
    rate: Tensor  # [n, M, b, 1]
    read: Tensor  # [n, M, b, b], of w_t dots_ts
    token_weight: Tensor  # [b]
    norm_weight: Tensor  # [M, D]
    norm_bias: Tensor  # [M, D]

    @classmethod
    def empty(cls, group: _Step, shared: _Shared) -> _Gradients:
        kq, target, rate, read = (torch.empty_like(x) for x in (group.kq, group.target, group.rate, group.dots))
        sums = (torch.zeros_like(x) for x in (shared.table[0], shared.norm_weight[:, 0], shared.norm_bias[:, 0]))
        return cls(kq, target, rate, read, *sums)

    def step(self, i: int) -> _Gradients:
        return self._replace(kq=self.kq[i], target=self.target[i], rate=self.rate[i], read=self.read[i])

    def of_tokens(self, shape: torch.Size) -> tuple[Tensor, ...]:
        """dq, dk, dv `[B, n, b, H, D]` and dlr `[B, n, b, H]`."""
        d_k, d_q = self.kq.chunk(2, 2)
        d_q, d_k, d_v, d_lr = (_to_frames(x, shape) for x in (d_q, d_k - self.target, self.target, self.rate))
        return d_q, d_k, d_v, d_lr.squeeze(-1)


def _load(inputs: tuple[Tensor, ...], complete: Tensor, place: slice, eps: float) -> tuple[_Step, _Shared]:
    q, k, v, lr, token_weight, norm_weight, norm_bias, W1 = inputs[:8]
    rows, heads, dtype = W1.shape[0], W1.shape[1], W1.dtype
    q, k, v, rate = (_from_frames(x[:, place].to(dtype)) for x in (q, k, v, lr[..., None]))
    closes = complete[:, place].t().repeat_interleave(heads, 1)[..., None, None].to(dtype)
    norm_weight, norm_bias = (x.to(dtype).repeat(rows, 1)[:, None] for x in (norm_weight, norm_bias))
    table = token_weight.to(dtype)[:, None].expand(-1, len(token_weight)).tril()
    return _Step(torch.cat([k, q], 2), v - k, rate, q @ k.mT + 1, closes), _Shared(table, norm_weight, norm_bias, eps)


def _from_frames(x: Tensor) -> Tensor:
    """`[B, n, b, H, D]` as `[n, M, b, D]`."""
    return x.permute(1, 0, 3, 2, 4).reshape(x.shape[1], -1, x.shape[2], x.shape[4])


def _to_frames(x: Tensor, shape: torch.Size) -> Tensor:
    """`[n, M, b, D]` as `[B, n, b, H, D]`; `shape` gives B and H."""
    return x.unflatten(1, (shape[0], shape[3])).permute(1, 0, 3, 2, 4)


# --- one mini-batch --------------------------------------------------------------------------------------------------------------------
# Each gives the answers f(q) of its tokens and what its backward needs, and writes the weights after it to `after` (which may be the weights
# themselves; None where nobody asks for them).
# Each backward writes or adds to `grads`, and turns d_weights from the gradient of the weights after into that of the weights before.


class _Learned(NamedTuple):
    """The inner gradient of the tokens and its parts, all `[M, b, D]` but rstd."""

    unit: Tensor
    rstd: Tensor  # [M, b, 1]
    error: Tensor  # LN(z) - target
    gradient: Tensor
    step: Tensor  # lr times gradient


def _linear(step: _Step, shared: _Shared, weights: Weights, after: Weights | None) -> tuple[Tensor, Any]:
    W1, b1 = weights
    z = torch.baddbmm(b1, step.kq, W1)  # [M, 2 b, D]
    learned = _learn(z[:, : step.size], step, shared)
    answer = torch.baddbmm(z[:, step.size :], step.dots * shared.table, learned.step, alpha=-1)
    moved = learned.step * (step.closes * shared.table[-1, -1])
    if after is not None:
        _move(W1, b1, step.k, moved, *after)
    return answer, (learned, moved)


def _linear_backward(
    step: _Step, shared: _Shared, weights: Weights, memory: Any, d_answer: Tensor, d_weights: Weights, grads: _Gradients
) -> None:
    (W1, _), (d_W1, d_b1), (learned, moved) = weights, d_weights, memory
    torch.bmm(-d_answer, learned.step.mT, out=grads.read)
    d_step, d_k = _move_backward(step, shared, step.k, learned.step, moved, d_W1, d_b1, grads)
    d_step.baddbmm_((step.dots * shared.table).mT, d_answer, alpha=-1)
    d_z = torch.cat([_learn_backward(learned, d_step, step, shared, grads), d_answer], 1)  # [M, 2 b, D]
    torch.bmm(d_z, W1.mT, out=grads.kq)
    grads.kq[:, : step.size] += d_k
    d_W1.baddbmm_(step.kq.mT, d_z)
    d_b1 += d_z.sum(1, keepdim=True)


def _mlp(step: _Step, shared: _Shared, weights: Weights, after: Weights | None) -> tuple[Tensor, Any]:
    W1, b1, W2, b2 = weights
    z1 = torch.baddbmm(b1, step.kq, W1)  # [M, 2 b, F]
    zk = z1[:, : step.size]
    gate = gelu_gate(zk)
    xk = zk * gate
    slope = gelu_slope(zk, gate)
    learned = _learn(torch.baddbmm(b2, xk, W2), step, shared)
    pulled = learned.step @ W2.mT  # [M, b, F]
    step1 = pulled * slope
    zq = torch.baddbmm(z1[:, step.size :], step.dots * shared.table, step1, alpha=-1)
    xq = zq * gelu_gate(zq)
    dots = (xq @ xk.mT).add_(1)  # [M, b, b]
    answer = torch.baddbmm(b2, xq, W2).baddbmm_(dots * shared.table, learned.step, alpha=-1)
    end = step.closes * shared.table[-1, -1]
    moved1, moved2 = step1 * end, learned.step * end
    if after is not None:
        _move(W1, b1, step.k, moved1, *after[:2])
        _move(W2, b2, xk, moved2, *after[2:])
    return answer, (learned, zk, xk, slope, pulled, step1, zq, xq, dots, moved1, moved2)


def _mlp_backward(
    step: _Step, shared: _Shared, weights: Weights, memory: Any, d_answer: Tensor, d_weights: Weights, grads: _Gradients
) -> None:
    (W1, _, W2, _), (d_W1, d_b1, d_W2, d_b2) = weights, d_weights
    learned, zk, xk, slope, pulled, step1, zq, xq, dots, moved1, moved2 = memory
    # the reading of the second layer
    d_read = -d_answer @ learned.step.mT  # [M, b, b]
    grads.token_weight.add_((d_read * dots).tril_().sum((0, 2)))
    d_dots = d_read.mul_(shared.table)
    d_xq = (d_answer @ W2.mT).baddbmm_(d_dots, xk)  # [M, b, F]
    # the weights at the end
    d_step2, d_xk = _move_backward(step, shared, xk, learned.step, moved2, d_W2, d_b2, grads)
    d_step1, d_k = _move_backward(step, shared, step.k, step1, moved1, d_W1, d_b1, grads)
    d_step2.baddbmm_((dots * shared.table).mT, d_answer, alpha=-1)
    d_xk.baddbmm_(d_dots.mT, xq)
    # the reading of the first layer
    d_zq = d_xq.mul_(gelu_slope(zq, gelu_gate(zq)))
    torch.bmm(-d_zq, step1.mT, out=grads.read)
    d_step1.baddbmm_((step.dots * shared.table).mT, d_zq, alpha=-1)
    # the inner gradient: through its own backward pass, then through its forward pass
    d_pulled = d_step1 * slope
    d_step2.baddbmm_(d_pulled, W2)
    d_z2 = _learn_backward(learned, d_step2, step, shared, grads)
    d_xk.baddbmm_(d_z2, W2.mT)
    d_zk = d_xk.mul_(slope).add_(d_step1.mul_(pulled).mul_(_gelu_curvature(zk)))
    d_W2.baddbmm_(torch.cat([xk, xq, d_pulled], 1).mT, torch.cat([d_z2, d_answer, learned.step], 1))
    d_b2 += (d_z2 + d_answer).sum(1, keepdim=True)
    d_z1 = torch.cat([d_zk, d_zq], 1)
    torch.bmm(d_z1, W1.mT, out=grads.kq)
    grads.kq[:, : step.size] += d_k
    d_W1.baddbmm_(step.kq.mT, d_z1)
    d_b1 += d_z1.sum(1, keepdim=True)


def _learn(z: Tensor, step: _Step, shared: _Shared) -> _Learned:
    """Gradient of 1/2 ||LN(z) - target||^2 with respect to z `[M, b, D]`, and the step along it."""
    unit, rstd = normalise(z, shared.eps)
    error = unit * shared.norm_weight + shared.norm_bias - step.target
    gradient = project(error * shared.norm_weight, unit) * rstd
    return _Learned(unit, rstd, error, gradient, step.rate * gradient)


def _learn_backward(learned: _Learned, d_step: Tensor, step: _Step, shared: _Shared, grads: _Gradients) -> Tensor:
    """dz; the gradients of the rate, the target, and the norm's weight and bias go to `grads`."""
    unit, rstd, error, gradient, _ = learned
    torch.sum(d_step * gradient, -1, keepdim=True, out=grads.rate)
    d_gradient = step.rate * d_step
    scaled = d_gradient * rstd
    along = (scaled * unit).mean(-1, keepdim=True)
    d_pull = scaled - scaled.mean(-1, keepdim=True) - unit * along  # of error times norm_weight, which is `pull`
    d_error = d_pull * shared.norm_weight
    pull = error * shared.norm_weight
    d_unit = d_error * shared.norm_weight - scaled * (pull * unit).mean(-1, keepdim=True) - pull * along
    torch.neg(d_error, out=grads.target)
    grads.norm_weight.add_((d_pull * error + d_error * unit).sum(1))
    grads.norm_bias.add_(d_error.sum(1))
    return (project(d_unit, unit) - unit * (d_gradient * gradient).mean(-1, keepdim=True)) * rstd


def _move(W: Tensor, bias: Tensor, x: Tensor, moved: Tensor, W_after: Tensor, bias_after: Tensor) -> None:
    """The weights of one layer after the mini-batch: x holds the layer's inputs for the keys `[M, b, D or F]`."""
    torch.baddbmm(W, x.mT, moved, alpha=-1, out=W_after)
    torch.sub(bias, moved.sum(1, keepdim=True), out=bias_after)


def _move_backward(
    step: _Step, shared: _Shared, x: Tensor, steps: Tensor, moved: Tensor, d_W: Tensor, d_bias: Tensor, grads: _Gradients
) -> tuple[Tensor, Tensor]:
    """Gradients of `_move` for the steps and the layer's inputs."""
    d_moved = torch.baddbmm(d_bias, x, d_W).neg_().mul_(step.closes)
    grads.token_weight[-1] += (d_moved * steps).sum()
    return d_moved.mul_(shared.table[-1, -1]), (moved @ d_W.mT).neg_()


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z `[..., D]` at mean 0 and variance 1, and its inverse standard deviation."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def project(d: Tensor, unit: Tensor) -> Tensor:
    """d without its mean and its part along unit: times rstd, the backward of `normalise`."""
    return d - d.mean(-1, keepdim=True) - unit * (d * unit).mean(-1, keepdim=True)


# The tanh form of GELU is z gate with gate = (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3); sigmoid is many times
# quicker than tanh.
_SCALE, _CUBE = 1.5957691216057308, 3 * 0.044715  # 2 sqrt(2 / pi); d(2 u)/dz = _SCALE (1 + _CUBE z^2)


def gelu_gate(z: Tensor) -> Tensor:
    return (z * z).mul_(_SCALE * _CUBE / 3).add_(_SCALE).mul_(z).sigmoid_()


def gelu_slope(z: Tensor, gate: Tensor) -> Tensor:
    """First derivative."""
    inner = (z * z).mul_(_SCALE * _CUBE).add_(_SCALE)
    return torch.addcmul(gate, inner.mul_(z), gate - gate * gate)


def _gelu_curvature(z: Tensor) -> Tensor:
    """Second derivative: with i = d(2 u)/dz, gate (1 - gate) (2 i + z di/dz + z i^2 (1 - 2 gate))."""
    gate = gelu_gate(z)
    square = z * z
    inner = (square * (_SCALE * _CUBE)).add_(_SCALE)
    bend = (inner * inner).mul_(z).mul_(1 - 2 * gate)
    return bend.add_(inner, alpha=2).add_(square, alpha=2 * _SCALE * _CUBE).mul_(gate - gate * gate)

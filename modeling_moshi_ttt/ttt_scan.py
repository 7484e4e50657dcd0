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


@torch.compiler.disable  # unrolled over its mini-batches it would take a compiler minutes, and win nothing
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
            unit = normalise(answers, eps)[0]
            out[:, place] = _to_frames(torch.addcmul(group.q + shared.norm_bias, unit, shared.norm_weight), out.shape)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(complete, *inputs, *starts)
            ctx.group_size, ctx.eps = group_size, eps
        return (out, *(w.view(x.shape) for w, x in zip(weights, inputs[7:])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        complete, *saved = ctx.saved_tensors
        kinds = len(d_outputs) - 1
        with torch.autocast(complete.device.type, enabled=False):
            return (None, None, None, None, *_backward(tuple(saved[:-kinds]), saved[-kinds:], complete, d_outputs, ctx.group_size, ctx.eps))


def _backward(
    inputs: tuple[Tensor, ...], starts: list[Tensor], complete: Tensor, d_outputs: tuple[Tensor | None, ...], group_size: int, eps: float
) -> list[Tensor]:
    """Gradients of all inputs, the groups of mini-batches taken from the last to the first."""
    shape, number, initial = inputs[0].shape, complete.shape[1], tuple(w.flatten(0, 1) for w in inputs[7:])
    d_out = inputs[7].new_zeros(()).expand(shape) if d_outputs[0] is None else d_outputs[0]
    d_weights = tuple(torch.zeros_like(w) if d is None else d.reshape(w.shape).clone() for d, w in zip(d_outputs[1:], initial))
    d_tokens = [torch.empty_like(x) for x in inputs[:4]]
    d_shared = [torch.zeros_like(x, dtype=initial[0].dtype) for x in inputs[4:7]]
    room = tuple(w.new_empty(min(group_size, number) - 1, *w.shape) for w in initial)
    for first in reversed(range(0, number, group_size)):
        place = slice(first, first + group_size)
        group, shared = _load(inputs, complete, place, eps)
        before = [tuple(w[first // group_size - 1] for w in starts) if first else initial, *zip(*room)]  # each mini-batch's first weights
        *of_tokens, d_token_weight, d_norm_weight, d_norm_bias = _group_backward(group, shared, before, _from_frames(d_out[:, place]), d_weights)
        for d, part in zip(d_tokens, of_tokens):
            d[:, place] = _to_frames(part, shape).view(d[:, place].shape)
        for total, d in zip(d_shared, (d_token_weight[None], d_norm_weight, d_norm_bias)):
            total += d.view(-1, *total.shape).sum(0)
    found = [*d_shared, *(d.view(w.shape) for d, w in zip(d_weights, inputs[7:]))]
    return d_tokens + [d.to(x.dtype) for d, x in zip(found, inputs[4:])]


def _group_backward(
    group: _Step, shared: _Shared, before: list[Weights], d_out: Tensor, d_weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a group again and then backwards: dq, dk, dv `[n, M, b, D]`, dlr `[n, M, b, 1]`, dtoken_weight `[b]`, dnorm_weight and dnorm_bias `[M, D]`.

    `before` has the weights at the group's start in its first place, and room for those before each later mini-batch; d_weights is the
    gradient of the weights at the group's end, and becomes that of the weights at its start.
    """
    inner, inner_backward = (_linear, _linear_backward) if len(d_weights) == 2 else (_mlp, _mlp_backward)
    steps = list(group.steps())
    runs = [inner(step, shared, before[i], before[i + 1] if i + 1 < len(steps) else None) for i, step in enumerate(steps)]
    kept = [(learned.unit, learned.error) for _, learned, *_ in runs]
    d_answers, d_norm_weight = _answers_backward(torch.stack([run[0] for run in runs]), d_out, shared)
    grads = _Gradients.empty(group)
    for i in reversed(range(len(steps))):
        inner_backward(steps[i], shared, before[i], runs.pop()[1:], d_answers[i], d_weights, grads.step(i))

    d_token_weight = grads.token_weight + (grads.read * group.dots).tril().sum((0, 1, 3))
    d_token_weight[-1] += (grads.end * group.closes).sum()
    d_error = grads.pull * shared.norm_weight
    d_norm_bias = (d_error + d_out).sum((0, 2))
    units, errors = map(torch.stack, zip(*kept))
    d_norm_weight += grads.pull.mul_(errors).addcmul_(d_error, units).sum((0, 2))
    d_dots = grads.read * shared.table
    d_k, d_q = grads.kq.chunk(2, 2)
    d_q += (d_dots @ group.k).add_(d_out)  # the answer has q added to it
    d_k += (d_dots.mT @ group.q).add_(d_error)  # the target v - k enters the error with a minus
    return d_q, d_k, d_error.neg_(), grads.rate, d_token_weight, d_norm_weight, d_norm_bias


def _answers_backward(answers: Tensor, d_out: Tensor, shared: _Shared) -> tuple[Tensor, Tensor]:
    """Through the LayerNorm after the inner model, for the answers `[n, M, b, D]`: their gradient and that of norm_weight `[M, D]`."""
    unit, mean, rstd = normalise(answers, shared.eps)
    return normalise_backward(d_out * shared.norm_weight, answers, mean, rstd), unit.mul_(d_out).sum((0, 2))


# --- the tokens of a group -------------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    table: Tensor  # [b, b]: row t holds w_t up to column t, then zeros
    norm_weight: Tensor  # [M, 1, D]
    norm_bias: Tensor  # [M, 1, D]
    eps: float


class _Step(NamedTuple):
    """One mini-batch, or n of them with one dimension more in front."""

    kq: Tensor  # [M, 2 b, D], keys above queries
    offset: Tensor  # [M, b, D]: norm_bias - target
    rate: Tensor  # [M, b, 1]
    dots: Tensor  # [M, b, b]: q_t . k_s + 1
    read: Tensor  # [M, b, b]: w_t times that where s <= t, else 0
    closes: Tensor  # [M, 1, 1]: 1, or 0 where the mini-batch is not complete
    end: Tensor  # [M, 1, 1]: w_{b-1} times that

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
    """What the mini-batches of a group write on the way back."""

    kq: Tensor  # [n, M, 2 b, D], without what `read` brings
    pull: Tensor  # [n, M, b, D], of norm_weight times error, on which the inner gradient pulls
    rate: Tensor  # [n, M, b, 1]
    read: Tensor  # [n, M, b, b]
    end: Tensor  # [n, M, 1, 1]
    token_weight: Tensor  # [b], a sum, without what `read` and `end` bring

    @classmethod
    def empty(cls, group: _Step) -> _Gradients:
        kq, pull, rate, read = (torch.empty_like(x) for x in (group.kq, group.offset, group.rate, group.read))
        return cls(kq, pull, rate, read, torch.zeros_like(group.end), group.rate.new_zeros(group.size))

    def step(self, i: int) -> _Gradients:
        return _Gradients(self.kq[i], self.pull[i], self.rate[i], self.read[i], self.end[i], self.token_weight)


def _load(inputs: tuple[Tensor, ...], complete: Tensor, place: slice, eps: float) -> tuple[_Step, _Shared]:
    q, k, v, lr, token_weight, norm_weight, norm_bias, W1 = inputs[:8]
    rows, heads, dtype = W1.shape[0], W1.shape[1], W1.dtype
    q, k, v, rate = (_from_frames(x[:, place].to(dtype)) for x in (q, k, v, lr[..., None]))
    norm_weight, norm_bias = (x.to(dtype).repeat(rows, 1)[:, None] for x in (norm_weight, norm_bias))
    table = token_weight.to(dtype)[:, None].expand(-1, len(token_weight)).tril()
    dots = (q @ k.mT).add_(1)
    closes = complete[:, place].t().repeat_interleave(heads, 1)[..., None, None].to(dtype)
    group = _Step(torch.cat([k, q], 2), norm_bias - (v - k), rate, dots, dots * table, closes, closes * table[-1, -1])
    return group, _Shared(table, norm_weight, norm_bias, eps)


def _from_frames(x: Tensor) -> Tensor:
    """`[B, n, b, H, D]` as `[n, M, b, D]`, contiguous: a view in the frames' own order would slow down all that follows."""
    return x.permute(1, 0, 3, 2, 4).contiguous().view(x.shape[1], -1, x.shape[2], x.shape[4])


def _to_frames(x: Tensor, shape: torch.Size) -> Tensor:
    """`[n, M, b, D]` as `[B, n, b, H, D]`; `shape` gives B and H."""
    return x.unflatten(1, (shape[0], shape[3])).permute(1, 0, 3, 2, 4)


# --- one mini-batch --------------------------------------------------------------------------------------------------------------------
# Each gives the answers f(q) of its tokens, what was learned from its keys, and whatever else its backward needs, and writes the weights
# after it to `after` (which may be the weights themselves; None where nobody asks for them).
# Each backward writes to `grads`, and turns d_weights from the gradient of the weights after into that of the weights before.


class _Learned(NamedTuple):
    """The inner gradient of the tokens and its parts, `[M, b, D]` where nothing else is said."""

    z: Tensor  # f(k)
    unit: Tensor  # it, normalised
    mean: Tensor  # [M, b, 1]
    rstd: Tensor  # [M, b, 1]
    error: Tensor  # LN(z) - target
    gradient: Tensor  # of 1/2 ||error||^2 with respect to z
    step: Tensor  # lr times gradient


def _linear(step: _Step, shared: _Shared, weights: Weights, after: Weights | None) -> tuple[Tensor, _Learned]:
    W1, b1 = weights
    z = torch.baddbmm(b1, step.kq, W1)  # [M, 2 b, D]
    learned = _learn(z[:, : step.size], step, shared)
    if after is not None:
        _move(W1, b1, step.k, learned.step * step.end, *after)
    return torch.baddbmm(z[:, step.size :], step.read, learned.step, alpha=-1), learned


def _linear_backward(
    step: _Step, shared: _Shared, weights: Weights, memory: Any, d_answer: Tensor, d_weights: Weights, grads: _Gradients
) -> None:
    (W1, _), (d_W1, d_b1), (learned,) = weights, d_weights, memory
    torch.baddbmm(grads.read, d_answer, learned.step.mT, beta=0, alpha=-1, out=grads.read)
    d_step = _moved_steps_backward(step, step.k, learned.step, d_W1, d_b1, grads)
    d_step.baddbmm_(step.read.mT, d_answer, alpha=-1)
    d_z = torch.cat([_learn_backward(learned, d_step, step, shared, grads), d_answer], 1)  # [M, 2 b, D]
    _first_layer_backward(step, W1, learned.step, d_z, d_W1, d_b1, grads)


def _mlp(step: _Step, shared: _Shared, weights: Weights, after: Weights | None) -> tuple[Tensor, _Learned, Any]:
    W1, b1, W2, b2 = weights
    z1 = torch.baddbmm(b1, step.kq, W1)  # [M, 2 b, F]
    zk = z1[:, : step.size]
    gate = gelu_gate(zk)
    xk = zk * gate
    learned = _learn(torch.baddbmm(b2, xk, W2), step, shared)
    slope = gelu_slope(zk, gate)
    pulled = torch.bmm(learned.step, W2.mT)  # [M, b, F]
    step1 = pulled * slope
    zq = torch.baddbmm(z1[:, step.size :], step.read, step1, alpha=-1)
    gate_q = gelu_gate(zq)
    xq = zq * gate_q
    dots = torch.bmm(xq, xk.mT).add_(1)  # [M, b, b]
    read = dots * shared.table
    answer = torch.baddbmm(b2, xq, W2).baddbmm_(read, learned.step, alpha=-1)
    if after is not None:
        _move(W1, b1, step.k, step1 * step.end, *after[:2])
        _move(W2, b2, xk, learned.step * step.end, *after[2:])
    return answer, learned, (zk, gate, xk, slope, pulled, step1, zq, gate_q, xq, dots, read)


def _mlp_backward(
    step: _Step, shared: _Shared, weights: Weights, memory: Any, d_answer: Tensor, d_weights: Weights, grads: _Gradients
) -> None:
    (W1, _, W2, _), (d_W1, d_b1, d_W2, d_b2) = weights, d_weights
    learned, (zk, gate, xk, slope, pulled, step1, zq, gate_q, xq, dots, read) = memory
    # the reading of the second layer
    d_read = torch.bmm(d_answer, learned.step.mT).neg_()  # [M, b, b]
    grads.token_weight.add_((d_read * dots).tril_().sum((0, 2)))
    d_dots = d_read.mul_(shared.table)
    d_zq = torch.bmm(d_answer, W2.mT).baddbmm_(d_dots, xk).mul_(gelu_slope(zq, gate_q))  # [M, b, F]
    # the reading of the first layer, and the weights at the end
    torch.baddbmm(grads.read, d_zq, step1.mT, beta=0, alpha=-1, out=grads.read)
    d_step1 = _moved_steps_backward(step, step.k, step1, d_W1, d_b1, grads).baddbmm_(step.read.mT, d_zq, alpha=-1)
    d_step2 = _moved_steps_backward(step, xk, learned.step, d_W2, d_b2, grads).baddbmm_(read.mT, d_answer, alpha=-1)
    # the inner gradient: through its own backward pass, then through its forward pass
    d_pulled = d_step1 * slope
    d_step2.baddbmm_(d_pulled, W2)
    d_z2 = _learn_backward(learned, d_step2, step, shared, grads)
    d_xk = torch.bmm(d_z2, W2.mT).baddbmm_(learned.step * step.end, d_W2.mT, alpha=-1).baddbmm_(d_dots.mT, xq)
    d_zk = d_xk.mul_(slope).addcmul_(d_step1.mul_(pulled), _gelu_curvature(zk, gate))
    d_W2.baddbmm_(torch.cat([xk, xq, d_pulled], 1).mT, torch.cat([d_z2, d_answer, learned.step], 1))
    d_b2 += (d_z2 + d_answer).sum(1, keepdim=True)
    _first_layer_backward(step, W1, step1, torch.cat([d_zk, d_zq], 1), d_W1, d_b1, grads)


def _first_layer_backward(
    step: _Step, W1: Tensor, steps: Tensor, d_z: Tensor, d_W1: Tensor, d_b1: Tensor, grads: _Gradients
) -> None:
    """From d_z `[M, 2 b, F]` of keys and queries to these, and through the first layer's weights."""
    torch.bmm(d_z, W1.mT, out=grads.kq)
    grads.kq[:, : step.size].baddbmm_(steps * step.end, d_W1.mT, alpha=-1)
    d_W1.baddbmm_(step.kq.mT, d_z)
    d_b1 += d_z.sum(1, keepdim=True)


def _learn(z: Tensor, step: _Step, shared: _Shared) -> _Learned:
    """Gradient of 1/2 ||LN(z) - target||^2 with respect to z `[M, b, D]`, and the step along it."""
    unit, mean, rstd = normalise(z, shared.eps)
    error = torch.addcmul(step.offset, unit, shared.norm_weight)
    gradient = normalise_backward(error * shared.norm_weight, z, mean, rstd)
    return _Learned(z, unit, mean, rstd, error, gradient, step.rate * gradient)


def _learn_backward(learned: _Learned, d_step: Tensor, step: _Step, shared: _Shared, grads: _Gradients) -> Tensor:
    """dz; the gradients of the rate and of the pull go to `grads`."""
    z, unit, mean, rstd, error, gradient, _ = learned
    pull = error * shared.norm_weight
    torch.sum(d_step * gradient, -1, keepdim=True, out=grads.rate)
    d_gradient = step.rate * d_step
    grads.pull.copy_(normalise_backward(d_gradient, z, mean, rstd))  # the gradient is a linear map of the pull, and its own transpose
    scaled = d_gradient * rstd
    d_unit = grads.pull * shared.norm_weight.square()
    d_unit.addcmul_(scaled, (pull * unit).mean(-1, keepdim=True), value=-1)
    d_unit.addcmul_(pull, (scaled * unit).mean(-1, keepdim=True), value=-1)
    d_z = normalise_backward(d_unit, z, mean, rstd)
    return d_z.addcmul_(unit, grads.rate * step.rate * rstd, value=-1 / z.shape[-1])


def _move(W: Tensor, bias: Tensor, x: Tensor, moved: Tensor, W_after: Tensor, bias_after: Tensor) -> None:
    """The weights of one layer after the mini-batch: x holds the layer's inputs for the keys `[M, b, D or F]`."""
    torch.baddbmm(W, x.mT, moved, alpha=-1, out=W_after)
    torch.sub(bias, moved.sum(1, keepdim=True), out=bias_after)


def _moved_steps_backward(step: _Step, x: Tensor, steps: Tensor, d_W: Tensor, d_bias: Tensor, grads: _Gradients) -> Tensor:
    """Gradient of `_move` for the steps `[M, b, D or F]`, of which it moves the weights by `end` times."""
    d_moved = torch.baddbmm(d_bias, x, d_W).neg_()
    grads.end.add_((d_moved * steps).sum((1, 2), keepdim=True))
    return d_moved.mul_(step.end)


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """z `[..., D]` at mean 0 and variance 1, and its mean and inverse standard deviation `[..., 1]`."""
    return torch.native_layer_norm(z, z.shape[-1:], None, None, eps)


def normalise_backward(d: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """dz: d without its mean and its part along the normalised z, times rstd."""
    return torch.ops.aten.native_layer_norm_backward.default(d, z, z.shape[-1:], mean, rstd, None, None, [True, False, False])[0]


# The tanh form of GELU is z gate with gate = (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3). Everything is taken from
# the sigmoid, which costs a tenth of tanh, in as few passes as there can be.
_SCALE, _CUBE = 1.5957691216057308, 0.044715  # 2 u = _SCALE (z + _CUBE z^3)


def gelu_gate(z: Tensor) -> Tensor:
    return torch.addcmul(z, z, z * z, value=_CUBE).mul_(_SCALE).sigmoid_()


def gelu_slope(z: Tensor, gate: Tensor) -> Tensor:
    """First derivative: gate + z (2 u)' gate (1 - gate)."""
    rise = torch.addcmul(z, z, z * z, value=3 * _CUBE)
    return torch.addcmul(gate, rise, torch.addcmul(gate, gate, gate, value=-1), value=_SCALE)


def _gelu_curvature(z: Tensor, gate: Tensor) -> Tensor:
    """Second derivative: gate (1 - gate) (2 (2 u)' + z (2 u)'' + z (2 u)'^2 (1 - 2 gate))."""
    square = z * z
    rise = torch.rsub(square, _SCALE, alpha=-3 * _SCALE * _CUBE)  # (2 u)'
    bend = torch.rsub(square, 2 * _SCALE, alpha=-12 * _SCALE * _CUBE).addcmul_(rise.square_().mul_(z), torch.rsub(gate, 1, alpha=2))
    return bend.mul_(torch.addcmul(gate, gate, gate, value=-1))

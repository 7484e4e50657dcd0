"""TTT in torch: one dual form per mini-batch, a few batched matrix products over all rows and heads, and a backward worked out by hand.

With weights W at a mini-batch's start and g_s the gradients of l_s there with respect to the inner model's outputs, the weights that token t
reads need never be made (the dual form, Sun et al. 2024, section 2.5): q_t W_t = q_t W - w_t sum_{s <= t} (q_t . k_s) lr_s g_s, and the
bias adds 1 to the dot product. Only the weights at the mini-batch's end are formed, by one product over its tokens.

Backward runs no mini-batch again. It keeps what each layer of the inner model gave for every key and query, from which all else follows without
the weights; and it walks the weights back with the mini-batches, each time adding the product that forward took from them. That is exact but
for rounding, which the weights kept at every bound between two groups of mini-batches take back. Below, dX is the gradient of the outer loss with respect
to X; `step` stands for lr_s g_s, which both the reading and the update of the weights use.

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
        group_size: mini-batches over which backward walks the weights back from those it keeps.

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
        after = tuple(w.clone(memory_format=torch.contiguous_format) for w in inputs[7:])
        weights = tuple(w.flatten(0, 1) for w in after)  # [M, ...], ours to change in place
        inner = _linear if len(weights) == 2 else _mlp
        number, b = inputs[0].shape[1:3]
        bounds = [w.new_empty((number - 1) // group_size if keep else 0, *w.shape) for w in weights]
        kept = [w.new_empty(2, number if keep else group_size, len(w), b, w.shape[-1]) for w in weights[::2]]
        out = torch.empty_like(inputs[0], dtype=after[0].dtype)
        for first in range(0, number, group_size):
            place = slice(first, first + group_size)
            if keep and first:
                for bound, w in zip(bounds, weights):
                    bound[first // group_size - 1] = w
            group, shared = _load(inputs, complete, place, eps)
            zs = [z[:, place] if keep else z[:, : len(group.k)] for z in kept]
            for i, step in enumerate(group.steps()):
                inner(step, shared, weights, [z[:, i] for z in zs])
            unit = normalise(zs[-1][1], eps)[0]
            out[:, place] = _to_frames(torch.addcmul(group.q + shared.norm_bias, unit, shared.norm_weight), out.shape)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(complete, *inputs, *kept, *bounds, *after)
            ctx.group_size, ctx.eps = group_size, eps
        return (out, *after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        complete, *saved = ctx.saved_tensors
        kinds = len(d_outputs) - 1
        inputs, rest = tuple(saved[: 7 + kinds]), saved[7 + kinds :]
        kept, bounds, after = rest[: kinds // 2], rest[-2 * kinds : -kinds], [w.flatten(0, 1) for w in rest[-kinds:]]
        ends = [*zip(*bounds), after]  # the weights at the end of every group
        with torch.autocast(complete.device.type, enabled=False):
            return (None, None, None, None, *_backward(inputs, kept, ends, complete, d_outputs, ctx.group_size, ctx.eps))


def _backward(
    inputs: tuple[Tensor, ...],
    kept: list[Tensor],
    ends: list[Weights],
    complete: Tensor,
    d_outputs: tuple[Tensor | None, ...],
    group_size: int,
    eps: float,
) -> list[Tensor]:
    """Gradients of all inputs, the groups of mini-batches taken from the last to the first."""
    shape = inputs[0].shape
    d_out = inputs[7].new_zeros(()).expand(shape) if d_outputs[0] is None else d_outputs[0]
    d_weights = tuple(torch.zeros_like(w) if d is None else d.reshape(w.shape).clone() for d, w in zip(d_outputs[1:], ends[-1]))
    d_tokens = [torch.empty_like(x) for x in inputs[:4]]
    d_shared = [torch.zeros_like(x, dtype=d_weights[0].dtype) for x in inputs[4:7]]
    weights = tuple(map(torch.empty_like, d_weights))
    for number, end in reversed(list(enumerate(ends))):
        place = slice(number * group_size, (number + 1) * group_size)
        for w, x in zip(weights, end):
            w.copy_(x)
        group, shared = _load(inputs, complete, place, eps)
        zs = [z[:, place] for z in kept]
        *of_tokens, d_token_weight, d_norm_weight, d_norm_bias = _group_backward(
            group, shared, zs, weights, _from_frames(d_out[:, place]), d_weights
        )
        for d, part in zip(d_tokens, of_tokens):
            d[:, place] = _to_frames(part, shape).view(d[:, place].shape)
        for total, d in zip(d_shared, (d_token_weight[None], d_norm_weight, d_norm_bias)):
            total += d.view(-1, *total.shape).sum(0)
    found = [*d_shared, *(d.view(w.shape) for d, w in zip(d_weights, inputs[7:]))]
    return d_tokens + [d.to(x.dtype) for d, x in zip(found, inputs[4:])]


def _group_backward(
    group: _Step, shared: _Shared, zs: list[Tensor], weights: Weights, d_out: Tensor, d_weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A group backwards: dq, dk, dv `[n, M, b, D]`, dlr `[n, M, b, 1]`, dtoken_weight `[b]`, dnorm_weight and dnorm_bias `[M, D]`.

    The weights, and their gradient d_weights, are those at the group's end, and become those at its start.
    """
    inner_backward = _linear_backward if len(d_weights) == 2 else _mlp_backward
    learned, grads = _learn(zs[-1][0], group, shared), _Gradients.empty(group)
    d_answers, d_norm_weight = _answers_backward(zs[-1][1], d_out, shared)
    steps, lessons = list(group.steps()), [_Learned(*parts) for parts in zip(*learned)]
    for i in reversed(range(len(steps))):
        inner_backward(steps[i], shared, [z[:, i] for z in zs], lessons[i], weights, d_answers[i], d_weights, grads.step(i))

    d_token_weight = grads.token_weight + (grads.read * group.dots).tril().sum((0, 1, 3))
    d_token_weight[-1] += (grads.end * group.closes).sum()
    d_error = grads.pull * shared.norm_weight
    d_norm_bias = (d_error + d_out).sum((0, 2))
    d_norm_weight += grads.pull.mul_(learned.error).addcmul_(d_error, learned.unit).sum((0, 2))
    d_dots = grads.read.mul_(shared.table)
    d_q = grads.q.add_(d_dots @ group.k).add_(d_out)  # the answer has q added to it
    d_k = grads.k.add_(d_dots.mT @ group.q).add_(d_error)  # the target v - k enters the error with a minus
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

    k: Tensor  # [M, b, D]
    q: Tensor  # [M, b, D]
    offset: Tensor  # [M, b, D]: norm_bias - target
    rate: Tensor  # [M, b, 1]
    dots: Tensor  # [M, b, b]: q_t . k_s + 1
    read: Tensor  # [M, b, b]: w_t times that where s <= t, else 0
    closes: Tensor  # [M, 1, 1]: 1, or 0 where the mini-batch is not complete
    end: Tensor  # [M, 1, 1]: w_{b-1} times that

    def steps(self) -> Iterator[_Step]:
        return (_Step(*parts) for parts in zip(*self))


class _Gradients(NamedTuple):
    """What the mini-batches of a group write on the way back."""

    k: Tensor  # [n, M, b, D], without what `read` and `pull` bring
    q: Tensor  # [n, M, b, D], without what `read` brings
    pull: Tensor  # [n, M, b, D], of norm_weight times error, on which the inner gradient pulls
    rate: Tensor  # [n, M, b, 1]
    read: Tensor  # [n, M, b, b]
    end: Tensor  # [n, M, 1, 1]
    token_weight: Tensor  # [b], a sum, without what `read` and `end` bring

    @classmethod
    def empty(cls, group: _Step) -> _Gradients:
        tokens = (torch.empty_like(x) for x in (group.k, group.q, group.offset, group.rate, group.read))
        return cls(*tokens, torch.zeros_like(group.end), group.rate.new_zeros(group.rate.shape[-2]))

    def step(self, i: int) -> _Gradients:
        return _Gradients(*(x[i] for x in self[:-1]), self.token_weight)


def _load(inputs: tuple[Tensor, ...], complete: Tensor, place: slice, eps: float) -> tuple[_Step, _Shared]:
    q, k, v, lr, token_weight, norm_weight, norm_bias, W1 = inputs[:8]
    rows, heads, dtype = W1.shape[0], W1.shape[1], W1.dtype
    q, k, v, rate = (_from_frames(x[:, place].to(dtype)) for x in (q, k, v, lr[..., None]))
    norm_weight, norm_bias = (x.to(dtype).repeat(rows, 1)[:, None] for x in (norm_weight, norm_bias))
    table = token_weight.to(dtype)[:, None].expand(-1, len(token_weight)).tril()
    dots = (q @ k.mT).add_(1)
    closes = complete[:, place].t().repeat_interleave(heads, 1)[..., None, None].to(dtype)
    group = _Step(k, q, norm_bias - (v - k), rate, dots, dots * table, closes, closes * table[-1, -1])
    return group, _Shared(table, norm_weight, norm_bias, eps)


def _from_frames(x: Tensor) -> Tensor:
    """`[B, n, b, H, D]` as `[n, M, b, D]`, contiguous: a view in the frames' own order would slow down all that follows."""
    return x.permute(1, 0, 3, 2, 4).contiguous().view(x.shape[1], -1, x.shape[2], x.shape[4])


def _to_frames(x: Tensor, shape: torch.Size) -> Tensor:
    """`[n, M, b, D]` as `[B, n, b, H, D]`; `shape` gives B and H."""
    return x.unflatten(1, (shape[0], shape[3])).permute(1, 0, 3, 2, 4)


# --- one mini-batch --------------------------------------------------------------------------------------------------------------------
# Each writes what the layers give for its keys and queries to `zs`, one `[2, M, b, F or D]` a layer, the last one's queries being the
# answers f(q); and moves the weights, in place, from those before it to those after it.
# Each backward writes to `grads`, and turns the weights and their gradient d_weights from those after the mini-batch into those before it.
# A product is written to a tensor of its own: into a part of a larger one it would go head by head.


class _Learned(NamedTuple):
    """The inner gradient of the tokens and its parts, `[M, b, D]` where nothing else is said."""

    z: Tensor  # f(k)
    unit: Tensor  # it, normalised
    mean: Tensor  # [M, b, 1]
    rstd: Tensor  # [M, b, 1]
    error: Tensor  # LN(z) - target
    pull: Tensor  # norm_weight times that
    gradient: Tensor  # of 1/2 ||error||^2 with respect to z
    step: Tensor  # lr times gradient


def _linear(step: _Step, shared: _Shared, weights: Weights, zs: list[Tensor]) -> None:
    (W1, b1), ((z, answers),) = weights, zs
    torch.baddbmm(b1, step.k, W1, out=z)
    learned = _learn(z, step, shared)
    torch.baddbmm(b1, step.q, W1, out=answers).baddbmm_(step.read, learned.step, alpha=-1)
    _move(W1, b1, step.k, learned.step * step.end, -1)


def _linear_backward(
    step: _Step, shared: _Shared, zs: list[Tensor], learned: _Learned, weights: Weights, d_answer: Tensor, d_weights: Weights, grads: _Gradients
) -> None:
    (W1, b1), (d_W1, d_b1), moved = weights, d_weights, learned.step * step.end
    _move(W1, b1, step.k, moved, 1)
    torch.bmm(d_answer, learned.step.mT, out=grads.read).neg_()
    d_step = _moved_steps_backward(step, step.k, learned.step, d_W1, d_b1, grads).baddbmm_(step.read.mT, d_answer, alpha=-1)
    _first_layer_backward(step, W1, moved, _learn_backward(learned, d_step, step, shared, grads), d_answer, d_W1, d_b1, grads)


def _mlp(step: _Step, shared: _Shared, weights: Weights, zs: list[Tensor]) -> None:
    (W1, b1, W2, b2), ((zk, zq), (z2, answers)) = weights, zs
    torch.baddbmm(b1, step.k, W1, out=zk)
    gate = gelu_gate(zk)
    xk = zk * gate
    torch.baddbmm(b2, xk, W2, out=z2)
    step2 = _learn(z2, step, shared).step
    step1 = torch.bmm(step2, W2.mT).mul_(gelu_slope(zk, gate))  # [M, b, F]
    torch.baddbmm(b1, step.q, W1, out=zq).baddbmm_(step.read, step1, alpha=-1)
    xq = zq * gelu_gate(zq)
    read = torch.bmm(xq, xk.mT).add_(1).mul_(shared.table)  # [M, b, b]
    torch.baddbmm(b2, xq, W2, out=answers).baddbmm_(read, step2, alpha=-1)
    _move(W1, b1, step.k, step1.mul_(step.end), -1)
    _move(W2, b2, xk, step2.mul_(step.end), -1)


def _mlp_backward(
    step: _Step, shared: _Shared, zs: list[Tensor], learned: _Learned, weights: Weights, d_answer: Tensor, d_weights: Weights, grads: _Gradients
) -> None:
    (W1, b1, W2, b2), (d_W1, d_b1, d_W2, d_b2) = weights, d_weights
    z1 = zs[0]
    gate = gelu_gate(z1)
    (xk, xq), (slope, slope_q) = z1 * gate, gelu_slope(z1, gate)
    moved2 = learned.step * step.end
    _move(W2, b2, xk, moved2, 1)
    pulled = torch.bmm(learned.step, W2.mT)
    step1 = pulled * slope
    moved1 = step1 * step.end
    _move(W1, b1, step.k, moved1, 1)
    # the reading of the second layer
    dots = torch.bmm(xq, xk.mT).add_(1)  # [M, b, b]
    d_read = torch.bmm(d_answer, learned.step.mT).neg_()
    grads.token_weight.add_((d_read * dots).tril_().sum((0, 2)))
    d_dots = d_read.mul_(shared.table)
    d_zq = torch.bmm(d_answer, W2.mT).baddbmm_(d_dots, xk).mul_(slope_q)  # [M, b, F]
    # the reading of the first layer, and the weights at the end
    torch.bmm(d_zq, step1.mT, out=grads.read).neg_()
    d_step1 = _moved_steps_backward(step, step.k, step1, d_W1, d_b1, grads).baddbmm_(step.read.mT, d_zq, alpha=-1)
    d_step2 = _moved_steps_backward(step, xk, learned.step, d_W2, d_b2, grads).baddbmm_(dots.mul_(shared.table).mT, d_answer, alpha=-1)
    # the inner gradient: through its own backward pass, then through its forward pass
    d_pulled = d_step1 * slope
    d_step2.baddbmm_(d_pulled, W2)
    d_z2 = _learn_backward(learned, d_step2, step, shared, grads)
    d_xk = torch.bmm(d_z2, W2.mT).baddbmm_(moved2, d_W2.mT, alpha=-1).baddbmm_(d_dots.mT, xq)
    d_zk = d_xk.mul_(slope).addcmul_(d_step1.mul_(pulled), _gelu_curvature(z1[0], gate[0]))
    d_W2.baddbmm_(xk.mT, d_z2).baddbmm_(xq.mT, d_answer).baddbmm_(d_pulled.mT, learned.step)
    d_b2 += (d_z2 + d_answer).sum(1, keepdim=True)
    _first_layer_backward(step, W1, moved1, d_zk, d_zq, d_W1, d_b1, grads)


def _first_layer_backward(
    step: _Step, W1: Tensor, moved: Tensor, d_zk: Tensor, d_zq: Tensor, d_W1: Tensor, d_b1: Tensor, grads: _Gradients
) -> None:
    """From the gradients `[M, b, F]` of what the layer gave for keys and queries to these, and to the layer's weights."""
    torch.bmm(d_zk, W1.mT, out=grads.k).baddbmm_(moved, d_W1.mT, alpha=-1)
    torch.bmm(d_zq, W1.mT, out=grads.q)
    d_W1.baddbmm_(step.k.mT, d_zk).baddbmm_(step.q.mT, d_zq)
    d_b1 += (d_zk + d_zq).sum(1, keepdim=True)


def _learn(z: Tensor, step: _Step, shared: _Shared) -> _Learned:
    """Gradient of 1/2 ||LN(z) - target||^2 with respect to z `[M, b, D]`, and the step along it."""
    unit, mean, rstd = normalise(z, shared.eps)
    error = torch.addcmul(step.offset, unit, shared.norm_weight)
    pull = error * shared.norm_weight
    gradient = normalise_backward(pull, z, mean, rstd)
    return _Learned(z, unit, mean, rstd, error, pull, gradient, step.rate * gradient)


def _learn_backward(learned: _Learned, d_step: Tensor, step: _Step, shared: _Shared, grads: _Gradients) -> Tensor:
    """dz; the gradients of the rate and of the pull go to `grads`."""
    z, unit, mean, rstd, _, pull, gradient, _ = learned
    torch.sum(d_step * gradient, -1, keepdim=True, out=grads.rate)
    d_gradient = step.rate * d_step
    grads.pull.copy_(normalise_backward(d_gradient, z, mean, rstd))  # the gradient is a linear map of the pull, and its own transpose
    scaled = d_gradient.mul_(rstd)
    d_unit = grads.pull * shared.norm_weight.square()
    d_unit.addcmul_(scaled, (pull * unit).mean(-1, keepdim=True), value=-1)
    d_unit.addcmul_(pull, (scaled * unit).mean(-1, keepdim=True), value=-1)
    d_z = normalise_backward(d_unit, z, mean, rstd)
    return d_z.addcmul_(unit, grads.rate * step.rate * rstd, value=-1 / z.shape[-1])


def _move(W: Tensor, bias: Tensor, x: Tensor, moved: Tensor, sign: int) -> None:
    """The weights of one layer over a mini-batch: -1 moves them forward, 1 back. x holds the layer's inputs for the keys `[M, b, D or F]`."""
    W.baddbmm_(x.mT, moved, alpha=sign)
    bias.add_(moved.sum(1, keepdim=True), alpha=sign)


def _moved_steps_backward(step: _Step, x: Tensor, steps: Tensor, d_W: Tensor, d_bias: Tensor, grads: _Gradients) -> Tensor:
    """Gradient of `_move` for the steps `[M, b, D or F]`, of which it moves the weights by `end` times."""
    d_moved = torch.baddbmm(d_bias, x, d_W, beta=-1, alpha=-1)
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

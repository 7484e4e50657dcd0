"""TTT in torch: one dual form per mini-batch, a few batched matrix products over all rows and heads, and a backward worked out by hand.

`ttt_dual` has the same function in plain lines. With weights W at a mini-batch's start and g_s the gradients of l_s there with respect to
the inner model's outputs, the weights that token t reads need never be made (the dual form, Sun et al. 2024, section 2.5): q_t W_t = q_t W
- share_t sum_{s <= t} (q_t . k_s) lr_s g_s, and the bias adds 1 to the dot product. Only the weights at the mini-batch's end are formed, by
one product over its tokens. share_t is the token weight w_t; where the inner loss has no LayerNorm, w_t / max(1, w_t sum_{s <= t} lr_s
c_s), one of its own in every row and head.

Backward runs no mini-batch again. It keeps what each layer of the inner model gave for every key and query, from which all else follows
without the weights, and walks the weights back with the mini-batches, each time adding the product that forward took from them. Rounding
aside that is exact; the weights kept between groups of mini-batches undo the rounding, and so do the first ones, which may be small beside
the first steps. Below, d_x is the gradient of the outer loss with respect to x; a `_Step` is one mini-batch's tokens, and its `steps` are
lr_s g_s, which the reading and the update of the weights use.

Shape letters: B rows, H heads, M = B H, N mini-batches, n mini-batches of a piece, b mini-batch size, D head dimension, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ttt_functions import Gelu, normalise, normalise_backward
from .ttt_state import TTTInputs

PIECE = 32  # frames that are loaded together in learning, elsewhere twice as many; more would cost memory and save little time

Weights = tuple[Tensor, ...]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # unrolled over its mini-batches it would take a compiler minutes, and win nothing
def scan_mini_batches(
    inputs: TTTInputs, weights: Weights, complete: Tensor, *, group_size: int, eps: float, inner_norm: str = "layer_norm"
) -> tuple[Tensor, Weights]:
    """Run whole mini-batches, one after the other.

    Args:
        inputs: tokens as `[B, N, b, ...]`, any floating dtype; lr is 0 in empty slots, which then change nothing but their own output.
        weights: (W1, b1[, W2, b2]), each `[B, H, ...]`; their dtype is the one computed in.
        complete: `[B, N]` bool; a mini-batch that is not complete leaves the weights as they are.
        group_size: mini-batches over which backward walks the weights back from those it keeps.
        inner_norm: "layer_norm" or "none", whether the inner loss has a LayerNorm.

    Returns:
        `q + LN(f(q))` `[B, N, b, H, D]` in the weights' dtype, and the weights after the last complete mini-batch.
    """
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *weights))
    out, *after = _Scan.apply(complete, _Options(group_size, eps, inner_norm == "layer_norm"), keep, *inputs, *weights)
    return out, tuple(after)


class _Options(NamedTuple):
    group_size: int
    eps: float
    normed: bool  # the inner loss has a LayerNorm; else its step is bounded


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, complete: Tensor, options: _Options, keep: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = TTTInputs(*tensors[:7])
        after = tuple(w.clone(memory_format=torch.contiguous_format) for w in tensors[7:])
        weights = tuple(w.flatten(0, 1) for w in after)  # [M, ...], ours to change in place
        inner = _linear if len(weights) == 2 else _mlp
        out = torch.empty_like(inputs.q, dtype=after[0].dtype)
        kept: list[Tensor] = []
        shared = _Shared.of(inputs, after[0], options)
        number, b = out.shape[1:3]
        pieces = _pieces(number, b, options.group_size, PIECE) if keep else _pieces(number, b, number, 2 * PIECE)
        for place, ends_group in pieces:
            piece = _load(inputs, shared, complete, place)
            given = _room(piece, weights, shared)
            for i, step in enumerate(piece.steps()):
                inner(step, shared, weights, [z[i] for z in given])
            unit = normalise(given[1], options.eps)[0]
            out[:, place] = _to_frames(torch.addcmul(piece.q + shared.norm_bias, unit, shared.norm_weight), out.shape)
            if keep:
                kept += (*given, *(w.clone() for w in after if ends_group))
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(complete, *tensors, *kept, *after)
            ctx.options = options
        return (out, *after)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("scan")
        complete, *saved = ctx.saved_tensors
        inputs, first, kept = TTTInputs(*saved[:7]), saved[7 : 6 + len(d_outputs)], saved[6 + len(d_outputs) :]
        with torch.autocast(complete.device.type, enabled=False):
            found = _backward(inputs, first, kept, complete, d_outputs, ctx.options)
        return (None, None, None, *found)


def refuse_second_derivative(backend: str) -> None:
    """For the backward of an autograd function. torch's `once_differentiable` lets some through, with wrong numbers."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"backend '{backend}' has no second derivative (create_graph=True); use backend 'reference'")


def _backward(
    inputs: TTTInputs, first: list[Tensor], kept: list[Tensor], complete: Tensor, d_outputs: tuple[Tensor | None, ...], options: _Options
) -> list[Tensor]:
    """Gradients of the inputs and the first weights, the mini-batches taken from the last to the first, and so what was kept of them."""
    shape, kinds, group_size = inputs.q.shape, len(first), options.group_size
    d_out = first[0].new_zeros(()).expand(shape) if d_outputs[0] is None else d_outputs[0]
    d_last = [
        torch.zeros_like(w) if d is None else d.clone(memory_format=torch.contiguous_format) for d, w in zip(d_outputs[1:], kept[-kinds:])
    ]
    d_weights = tuple(d.flatten(0, 1) for d in d_last)  # [M, ...], ours to change in place
    d_tokens = [torch.empty_like(x) for x in inputs[:4]]
    d_shared = [torch.zeros_like(x, dtype=d_weights[0].dtype) for x in inputs[4:7]]
    shared = _Shared.of(inputs, first[0], options)
    weights: Weights = ()
    for place, ends_group in reversed(list(_pieces(shape[1], shape[2], group_size, PIECE))):
        if ends_group or not weights:
            weights = tuple(w.flatten(0, 1).clone() for w in _take(kept, kinds))
        given = _take(kept, _kept_a_piece(kinds, shared))
        start = (kept or first)[-kinds:] if place.start % group_size == 0 else []
        piece = _load(inputs, shared, complete, place)
        d_piece, known = _from_frames(d_out[:, place]), tuple(w.flatten(0, 1) for w in start)
        *of_tokens, d_token_weight, d_norm_weight, d_norm_bias = _piece_backward(piece, shared, given, weights, known, d_piece, d_weights)
        for d, part in zip(d_tokens, of_tokens):
            d[:, place] = _to_frames(part, shape).view(d[:, place].shape)
        for total, d in zip(d_shared, (d_token_weight[None], d_norm_weight, d_norm_bias)):
            total += d.view(-1, *total.shape).sum(0)
    found = [*d_shared, *(d.view(w.shape) for d, w in zip(d_weights, first))]
    return d_tokens + [d.to(x.dtype) for d, x in zip(found, (*inputs[4:], *first))]


def _pieces(number: int, b: int, group_size: int, frames: int) -> Iterator[tuple[slice, bool]]:
    """The mini-batches in runs of so many frames that are loaded together; and whether a group ends with each, the last one's end aside."""
    size = max(1, frames // b)
    for first in range(0, number, group_size):
        end = min(first + group_size, number)
        for start in range(first, end, size):
            stop = min(start + size, end)
            yield slice(start, stop), stop == end < number


def _take(kept: list[Tensor], count: int) -> list[Tensor]:
    """The last so many, which the list loses."""
    taken = kept[-count:]
    del kept[-count:]
    return taken


def _piece_backward(
    piece: _Step, shared: _Shared, given: list[Tensor], weights: Weights, start: Weights, d_out: Tensor, d_weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A piece backwards: dq, dk, dv `[n, M, b, D]`, dlr `[n, M, b, 1]`, dtoken_weight `[b]`, dnorm_weight and dnorm_bias `[M, D]`.

    The weights, and their gradient d_weights, are those at the piece's end, and become those at its start; but the weights stay those after
    its first mini-batch where the ones at the start are given.
    """
    inner_backward: Callable[..., None] = _linear_backward if len(d_weights) == 2 else _mlp_backward
    d_answers, d_norm_weight = _answers_backward(given[1], d_out, shared)
    piece = piece if shared.normed else _bounded(piece, given[-1], shared)
    learned, grads = _learn(given[0], piece, shared), _Gradients.empty(piece)
    steps, lessons = list(piece.steps()), [type(learned)(*parts) for parts in zip(*learned)]
    for i in reversed(range(len(steps))):
        hidden, known = [z[i] for z in given[2:]], i == 0 and len(start) > 0
        inner_backward(steps[i], shared, lessons[i], start if known else weights, known, d_answers[i], d_weights, grads.step(i), *hidden)

    d_token_weight, d_read, d_closing = grads.token_weight, grads.read.neg_(), grads.closing.neg_()
    if isinstance(learned, _Normed):
        d_token_weight = d_token_weight + (d_read * piece.dots).tril().sum((0, 1, 3))
        d_end = (d_closing * piece.k).sum((2, 3), keepdim=True).sub_(grads.end)
        d_token_weight[-1] += (d_end * piece.closes).sum()
        d_norm_weight += (grads.pull * learned.error).sum((0, 2))
        d_error = grads.pull.mul_(shared.norm_weight)
        d_norm_weight += (d_error * learned.unit).sum((0, 2))
        d_norm_bias = (d_error + d_out).sum((0, 2))
    else:
        d_error, d_norm_bias = grads.pull, d_out.sum((0, 2))
    d_dots = d_read.mul_(piece.table)
    d_k, d_q = grads.kq.chunk(2, 2)
    d_q += (d_dots @ piece.k).add_(d_out)  # the answer has q added to it
    d_k += (d_dots.mT @ piece.q).addcmul_(d_closing, piece.end).add_(d_error)  # the target v - k enters the error with a minus
    if not shared.normed:  # c has ||k||^2
        d_k.addcmul_(piece.k, grads.key_square, value=2)
    return d_q, d_k, d_error.neg_(), grads.rate, d_token_weight, d_norm_weight, d_norm_bias


def _answers_backward(answers: Tensor, d_out: Tensor, shared: _Shared) -> tuple[Tensor, Tensor]:
    """Through the LayerNorm after the inner model, for the answers `[n, M, b, D]`: their gradient and that of norm_weight `[M, D]`."""
    unit, mean, rstd = normalise(answers, shared.eps)
    d_norm_weight = (unit * d_out).sum((0, 2))
    return normalise_backward(torch.mul(d_out, shared.norm_weight, out=unit), answers, mean, rstd), d_norm_weight


# --- the tokens of a piece -------------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    token_weight: Tensor  # [b, 1]
    norm_weight: Tensor  # [M, 1, D]
    norm_bias: Tensor  # [M, 1, D]
    eps: float
    normed: bool  # as in _Options

    @classmethod
    def of(cls, inputs: TTTInputs, W1: Tensor, options: _Options) -> _Shared:
        norm_weight, norm_bias = (x.to(W1.dtype).repeat(W1.shape[0], 1)[:, None] for x in (inputs.norm_weight, inputs.norm_bias))
        return cls(inputs.token_weight.to(W1.dtype)[:, None], norm_weight, norm_bias, options.eps, options.normed)


class _Step(NamedTuple):
    """One mini-batch, or n of them with one dimension more in front."""

    kq: Tensor  # [M, 2 b, D], keys above queries: both go through the first layer together
    offset: Tensor  # [M, b, D]: what f(k) needs to become the error: norm_bias - target where f(k) is normed first, else -target
    rate: Tensor  # [M, b, 1]
    dots: Tensor  # [M, b, b]: q_t . k_s + 1
    table: Tensor  # [1 or M, b, b]: row t holds share_t up to column t, then zeros
    read: Tensor  # [M, b, b]: dots times table
    closes: Tensor  # [M, 1, 1]: 1, or 0 where the mini-batch is not complete
    end: Tensor  # [M, 1, 1]: share_{b-1} times that, the share of every key in the weights at the mini-batch's end

    @property
    def k(self) -> Tensor:
        return self.kq[..., : self.rate.shape[-2], :]

    @property
    def q(self) -> Tensor:
        return self.kq[..., self.rate.shape[-2] :, :]

    def steps(self) -> Iterator[_Step]:
        return (_Step(*parts) for parts in zip(*self))


class _Gradients(NamedTuple):
    """What the mini-batches of a piece write on the way back."""

    kq: Tensor  # [n, M, 2 b, D], of keys and queries through the first layer
    closing: Tensor  # [n, M, b, D], of keys times `end`; with the sign turned, as are `read` and `end`
    pull: Tensor  # [n, M, b, D], with LayerNorm of norm_weight times error, on which the inner gradient pulls; without it of the error
    rate: Tensor  # [n, M, b, 1]
    key_square: Tensor  # [n, M, b, 1], of ||k||^2 in c; without LayerNorm only
    read: Tensor  # [n, M, b, b]
    end: Tensor  # [n, M, 1, 1], a sum, without what `closing` brings
    token_weight: Tensor  # [b], a sum; with LayerNorm without what `read` and `end` bring

    @classmethod
    def empty(cls, piece: _Step) -> _Gradients:
        tokens = (torch.empty_like(x) for x in (piece.kq, piece.offset, piece.offset, piece.rate, piece.rate, piece.read))
        return cls._make((*tokens, torch.zeros_like(piece.end), piece.rate.new_zeros(piece.rate.shape[-2])))

    def step(self, i: int) -> _Gradients:
        return _Gradients._make((*(x[i] for x in self[:-1]), self.token_weight))


def _load(inputs: TTTInputs, shared: _Shared, complete: Tensor, place: slice) -> _Step:
    """Mini-batches with the token weights as shares, which `_bounded` replaces where the inner loss has no LayerNorm."""
    dtype, b = shared.norm_bias.dtype, inputs.lr.shape[2]
    q, k, v, rate = (_from_frames(x[:, place].to(dtype)) for x in (*inputs[:3], inputs.lr[..., None]))
    dots = (q @ k.mT).add_(1)
    closes = complete[:, place].t().repeat_interleave(inputs.lr.shape[-1], 1)[..., None, None].to(dtype)
    table = shared.token_weight.expand(len(q), 1, b, b).tril()
    offset = shared.norm_bias - (v - k) if shared.normed else k - v
    return _Step(torch.cat([k, q], 2), offset, rate, dots, table, dots * table, closes, closes * shared.token_weight[-1])


def _bounded(step: _Step, c: Tensor, shared: _Shared) -> _Step:
    """The same with share_t = w_t / max(1, w_t sum_{s <= t} lr_s c_s); c `[M, b, 1]`."""
    share = shared.token_weight / (shared.token_weight * (step.rate * c).cumsum(-2)).clamp(min=1)
    table = share.expand_as(step.dots).tril()
    return step._replace(table=table, read=step.dots * table, end=step.closes * share[..., -1:, :])


def _room(piece: _Step, weights: Weights, shared: _Shared) -> list[Tensor]:
    """For what a piece gives: f(k) and the answers f(q) `[n, M, b, D]`; for the MLP also what the first layer gives for both `[n, M, 2 b,
    F]`; without LayerNorm in the inner loss also c `[n, M, b, 1]`."""
    hidden = [piece.kq.new_empty(*piece.kq.shape[:-1], weights[0].shape[-1])] if len(weights) == 4 else []
    c = [] if shared.normed else [torch.empty_like(piece.rate)]
    return [torch.empty_like(piece.offset), torch.empty_like(piece.offset), *hidden, *c]


def _kept_a_piece(kinds: int, shared: _Shared) -> int:
    """How many tensors `_room` makes; `kinds` is the number of fast weights."""
    return 1 + kinds // 2 + (not shared.normed)


def _from_frames(x: Tensor) -> Tensor:
    """`[B, n, b, H, D]` as `[n, M, b, D]`, contiguous: a view in the frames' own order would slow down all that follows."""
    return x.permute(1, 0, 3, 2, 4).contiguous().view(x.shape[1], -1, x.shape[2], x.shape[4])


def _to_frames(x: Tensor, shape: torch.Size) -> Tensor:
    """`[n, M, b, D]` as `[B, n, b, H, D]`; `shape` gives B and H."""
    frames: Tensor = x.unflatten(1, (shape[0], shape[3])).permute(1, 0, 3, 2, 4)
    return frames


# --- one mini-batch --------------------------------------------------------------------------------------------------------------------
# Each writes what the layers give to `room`, and moves the weights, in place, from those before the mini-batch to those after it.
# Each backward writes to `grads`, and turns the weights and their gradient d_weights from those after the mini-batch into those before it;
# weights that are `known` are those before it already.
# A large product gets a tensor of its own, for into a part of one it would go head by head; other operations write where it is wanted.


class _Normed(NamedTuple):
    """The inner gradient of the tokens and its parts where the loss is 1/2 ||LN(z) - target||^2, `[M, b, D]` where nothing else is said."""

    z: Tensor  # f(k)
    unit: Tensor  # it, normalised
    mean: Tensor  # [M, b, 1]
    rstd: Tensor  # [M, b, 1]
    error: Tensor  # LN(z) - target
    gradient: Tensor  # of the loss with respect to z


class _Plain(NamedTuple):
    """The same of 1/2 ||z - target||^2."""

    gradient: Tensor  # [M, b, D]: z - target, the error


def _linear(step: _Step, shared: _Shared, weights: Weights, room: list[Tensor]) -> None:
    (W1, b1), (z, answers, *c) = weights, room
    torch.baddbmm(b1, step.k, W1, out=z)
    gradient = _learn(z, step, shared).gradient
    if not shared.normed:
        step = _bounded(step, torch.add(_square(step.k), 1, out=c[0]), shared)
    steps = gradient.mul_(step.rate)
    torch.baddbmm(b1, step.q, W1, out=answers).baddbmm_(step.read, steps, alpha=-1)
    _move(W1, b1, step.k, steps.mul_(step.end), -1)


def _linear_backward(
    step: _Step, shared: _Shared, learned: _Normed | _Plain, weights: Weights, known: bool, d_answer: Tensor, d_weights: Weights, grads: _Gradients,
    *c: Tensor,
) -> None:  # fmt: skip
    (W1, b1), (d_W1, d_b1), steps = weights, d_weights, step.rate * learned.gradient
    if not known:
        _move(W1, b1, step.k, steps * step.end, 1)
    d_steps = _first_steps_backward(step, d_answer, steps, d_W1, d_b1, grads)
    if isinstance(learned, _Normed):
        d_z = _learn_backward(learned, d_steps, step, shared, grads)
    else:
        torch.sum(d_steps * learned.gradient, -1, keepdim=True, out=grads.rate)
        d_z = torch.mul(d_steps, step.rate, out=grads.pull)
        grads.key_square.copy_(_share_backward(step, shared, c[0], 0.0, grads))
    d_z = torch.cat([d_z, d_answer], 1)  # [M, 2 b, D]
    _first_layer_backward(step, W1, d_z, d_W1, d_b1, grads)


def _mlp(step: _Step, shared: _Shared, weights: Weights, room: list[Tensor]) -> None:
    (W1, b1, W2, b2), (z2, answers, z1, *c) = weights, room
    zk, zq = torch.baddbmm(b1, step.kq, W1, out=z1).chunk(2, 1)  # [M, b, F]
    gelu = Gelu.of(zk)
    xk = zk * gelu.gate
    gradient2 = _learn(torch.baddbmm(b2, xk, W2, out=z2), step, shared).gradient
    if shared.normed:
        steps2 = gradient2.mul_(step.rate)
        steps1 = torch.bmm(steps2, W2.mT).mul_(gelu.slope())
    else:
        gradient1 = torch.bmm(gradient2, W2.mT).mul_(gelu.slope())
        first = (_square(step.k) + 1) * _square(gradient1) / (_square(gradient2) + shared.eps)
        step = _bounded(step, torch.add(first, _square(xk) + 1, out=c[0]), shared)
        steps1, steps2 = gradient1.mul_(step.rate), gradient2.mul_(step.rate)
    zq -= torch.bmm(step.read, steps1)
    xq = zq * Gelu.of(zq).gate
    read = torch.bmm(xq, xk.mT).add_(1).mul_(step.table)  # [M, b, b]
    torch.baddbmm(b2, xq, W2, out=answers).baddbmm_(read, steps2, alpha=-1)
    _move(W1, b1, step.k, steps1.mul_(step.end), -1)
    _move(W2, b2, xk, steps2.mul_(step.end), -1)


def _mlp_backward(
    step: _Step, shared: _Shared, learned: _Normed | _Plain, weights: Weights, known: bool, d_answer: Tensor, d_weights: Weights, grads: _Gradients,
    z1: Tensor, *c: Tensor,
) -> None:  # fmt: skip
    (W1, b1, W2, b2), (d_W1, d_b1, d_W2, d_b2), b = weights, d_weights, d_answer.shape[1]
    gelu = Gelu.of(z1)
    x = z1.new_empty(len(z1), 3 * b, z1.shape[2])  # what W2 is multiplied with, in three products
    xk, xq, d_pulled = x.split(b, 1)  # [M, b, F]
    torch.mul(z1, gelu.gate, out=x[:, : 2 * b])
    d_z1 = gelu.slope()  # the rest of it is multiplied in
    slope, d_zq = d_z1.chunk(2, 1)
    # to the weights before
    steps2 = step.rate * learned.gradient
    moved2 = steps2 * step.end
    if not known:
        _move(W2, b2, xk, moved2, 1)
    source = steps2 if shared.normed else learned.gradient  # what W2 hands back to the first layer; c needs it without the rate
    pulled = torch.bmm(source, W2.mT)
    gradient1 = pulled * slope
    steps1 = gradient1 if shared.normed else step.rate * gradient1
    if not known:
        _move(W1, b1, step.k, steps1 * step.end, 1)
    # the reading of the second layer, and its weights at the end
    dots = torch.bmm(xq, xk.mT).add_(1)  # [M, b, b]
    d_read = torch.bmm(d_answer, steps2.mT).neg_()
    d_table = (d_read * dots).tril_()
    d_dots = d_read.mul_(step.table)
    d_zq *= torch.bmm(d_answer, W2.mT).baddbmm_(d_dots, xk)
    d_moved = torch.baddbmm(d_b2, xk, d_W2, beta=-1, alpha=-1)
    grads.end.sub_((d_moved * steps2).sum((1, 2), keepdim=True))
    d_steps2 = d_moved.mul_(step.end).baddbmm_(dots.mul_(step.table).mT, d_answer, alpha=-1)
    # the inner gradient: through its own backward pass, then through its forward pass
    d_steps1 = _first_steps_backward(step, d_zq, steps1, d_W1, d_b1, grads)
    if isinstance(learned, _Normed):
        grads.token_weight.add_(d_table.sum((0, 2)))
        d_gradient1, d_gradient2 = d_steps1, d_steps2  # both gradients have the rate in them already
    else:
        d_gradient1, d_gradient2, d_c = _bounded_backward(
            step, shared, gradient1, learned.gradient, c[0], d_steps1, d_steps2, d_table, grads
        )
    torch.mul(d_gradient1, slope, out=d_pulled)
    d_gradient2.baddbmm_(d_pulled, W2)
    d_z2 = _learn_backward(learned, d_gradient2, step, shared, grads) if isinstance(learned, _Normed) else grads.pull.copy_(d_gradient2)
    d_xk = torch.bmm(d_z2, W2.mT).baddbmm_(moved2, d_W2.mT, alpha=-1).baddbmm_(d_dots.mT, xq)
    if not shared.normed:
        d_xk.addcmul_(xk, d_c, value=2)
    slope.mul_(d_xk).addcmul_(d_gradient1.mul_(pulled), gelu.rows(b).curvature())
    d_W2.baddbmm_(x.mT, torch.cat([d_z2, d_answer, source], 1))
    d_b2 += (d_z2 + d_answer).sum(1, keepdim=True)
    _first_layer_backward(step, W1, d_z1, d_W1, d_b1, grads)


def _first_steps_backward(step: _Step, d_zq: Tensor, steps: Tensor, d_W1: Tensor, d_b1: Tensor, grads: _Gradients) -> Tensor:
    """Gradient of the first layer's steps, from its reading and from its weights at the end."""
    torch.bmm(d_zq, steps.mT, out=grads.read)
    torch.bmm(steps, d_W1.mT, out=grads.closing)
    grads.end.add_(torch.bmm(steps, d_b1.mT).sum(1, keepdim=True))
    return torch.baddbmm(d_b1 * step.end, step.k * step.end, d_W1, beta=-1, alpha=-1).baddbmm_(step.read.mT, d_zq, alpha=-1)


def _first_layer_backward(step: _Step, W1: Tensor, d_z: Tensor, d_W1: Tensor, d_b1: Tensor, grads: _Gradients) -> None:
    """From the gradients `[M, 2 b, F]` of what the layer gives for keys and queries to these, and to the layer's weights."""
    torch.bmm(d_z, W1.mT, out=grads.kq)
    d_W1.baddbmm_(step.kq.mT, d_z)
    d_b1 += d_z.sum(1, keepdim=True)


def _bounded_backward(
    step: _Step,
    shared: _Shared,
    gradient1: Tensor,
    gradient2: Tensor,
    c: Tensor,
    d_steps1: Tensor,
    d_steps2: Tensor,
    d_table: Tensor,
    grads: _Gradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """From both layers' steps, and from c, to both gradients, as far as neither goes through the other, and to c, which ||x||^2 still
    enters.
    """
    torch.sum(d_steps2 * gradient2, -1, keepdim=True, out=grads.rate)
    grads.rate.add_((d_steps1 * gradient1).sum(-1, keepdim=True))
    d_c = _share_backward(step, shared, c, d_table.sum(-1, keepdim=True), grads)
    # c = ||x||^2 + 1 + key ||gradient1||^2 / size
    key, size = _square(step.k) + 1, _square(gradient2) + shared.eps
    ratio = _square(gradient1) / size
    torch.mul(d_c, ratio, out=grads.key_square)
    pull = 2 * d_c * key / size
    d_gradient1 = torch.addcmul(step.rate * d_steps1, pull, gradient1)
    return d_gradient1, torch.addcmul(step.rate * d_steps2, pull * ratio, gradient2, value=-1), d_c


def _share_backward(step: _Step, shared: _Shared, c: Tensor, d_share: Tensor | float, grads: _Gradients) -> Tensor:
    """From the shares to c `[M, b, 1]`, and to the token weights and the rate in `grads`; d_share is what a second layer brings, `[M, b,
    1]`.
    """
    d_share = d_share - (grads.read * step.dots).tril_().sum(-1, keepdim=True)
    d_share[:, -1:] -= ((grads.closing * step.k).sum((1, 2), keepdim=True) + grads.end) * step.closes
    share = step.table[..., :1]
    free = shared.token_weight * (step.rate * c).cumsum(1) < 1  # there share is the token weight, elsewhere 1 / sum_{s <= t} lr_s c_s
    grads.token_weight.add_((d_share * free).sum((0, 2)))
    d_sum = (d_share * share.square()).neg_().masked_fill_(free, 0)
    d_load = d_sum.flip(1).cumsum(1).flip(1)  # of lr_s c_s
    grads.rate.addcmul_(d_load, c)
    return d_load * step.rate


def _learn(z: Tensor, step: _Step, shared: _Shared) -> _Normed | _Plain:
    """Gradient of the inner loss with respect to z `[M, b, D]`."""
    if not shared.normed:
        return _Plain(z + step.offset)
    unit, mean, rstd = normalise(z, shared.eps)
    error = torch.addcmul(step.offset, unit, shared.norm_weight)
    return _Normed(z, unit, mean, rstd, error, normalise_backward(error * shared.norm_weight, z, mean, rstd))


def _learn_backward(learned: _Normed, d_steps: Tensor, step: _Step, shared: _Shared, grads: _Gradients) -> Tensor:
    """dz; the gradients of the rate and of the pull go to `grads`."""
    z, unit, mean, rstd, error, gradient = learned
    torch.sum(d_steps * gradient, -1, keepdim=True, out=grads.rate)
    d_gradient = step.rate * d_steps
    grads.pull.copy_(normalise_backward(d_gradient, z, mean, rstd))  # the gradient is a linear map of the pull, and its own transpose
    scaled, pull = d_gradient.mul_(rstd), error * shared.norm_weight
    d_unit = grads.pull * shared.norm_weight.square()
    d_unit.addcmul_(scaled, (pull * unit).mean(-1, keepdim=True), value=-1)
    d_unit.addcmul_(pull, (scaled * unit).mean(-1, keepdim=True), value=-1)
    d_z = normalise_backward(d_unit, z, mean, rstd)
    return d_z.addcmul_(unit, grads.rate * step.rate * rstd, value=-1 / z.shape[-1])


def _square(x: Tensor) -> Tensor:
    """||x||^2 of every token, `[..., 1]`."""
    return x.square().sum(-1, keepdim=True)


def _move(W: Tensor, bias: Tensor, x: Tensor, moved: Tensor, sign: int) -> None:
    """One layer's weights over a mini-batch, forward (-1) or back (1): x `[M, b, D or F]` has the layer's inputs for the keys."""
    W.baddbmm_(x.mT, moved, alpha=sign)
    bias.add_(moved.sum(1, keepdim=True), alpha=sign)

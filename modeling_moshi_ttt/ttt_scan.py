"""TTT in torch: one dual form per mini-batch, a few batched matrix products over all rows and heads, and a backward worked out by hand.

`ttt_dual` has the same function in plain lines. With weights W at a mini-batch's start and g_s the gradients of l_s there with respect to
the inner model's outputs, the weights that token t reads need never be made (the dual form, Sun et al. 2024, section 2.5): q_t W_t = q_t W
- share_t sum_{s <= t} (q_t . k_s) lr_s g_s, and the bias adds 1 to the dot product. Only the weights at the mini-batch's end are formed, by
one product over its tokens. share_t is the token weight w_t; where the inner loss has no LayerNorm, w_t / max(1, w_t sum_{s <= t} lr_s
c_s), one of its own in every row and head.

Backward runs no mini-batch again. It keeps what each layer of the inner model gave for every key and query, from which all else follows
without the weights, and walks the weights back with the mini-batches, each time adding the product that forward took from them. Rounding
aside that is exact; the weights kept between groups of mini-batches undo the rounding, and so do the first ones, which may be small beside
the first steps. Below, d_x is the gradient of the outer loss with respect to x, and `steps` are lr_s g_s, which both the answers and the
update of the weights use.

Shape letters: B rows, H heads, M = B H, N mini-batches, n mini-batches of a piece, b mini-batch size, D head dimension, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ttt_functions import Gelu, normalize, normalize_backward, refuse_second_derivative, square
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
        run_mini_batch = _linear if len(weights) == 2 else _mlp
        out = torch.empty_like(inputs.q, dtype=after[0].dtype)
        kept: list[Tensor] = []
        shared = _Shared.of(inputs, after[0], options)
        number, b = out.shape[1:3]
        pieces = _pieces(number, b, options.group_size, PIECE) if keep else _pieces(number, b, number, 2 * PIECE)
        for span, ends_group in pieces:
            piece = _load(inputs, shared, complete, span)
            outputs = _empty_outputs(piece, weights, shared)
            for i, batch in enumerate(piece.split()):
                run_mini_batch(batch, shared, weights, [z[i] for z in outputs])
            unit = normalize(outputs[1], options.eps)[0]
            out[:, span] = _to_frames(torch.addcmul(piece.q + shared.norm_bias, unit, shared.norm_weight), out.shape)
            if keep:
                kept += (*outputs, *(w.clone() for w in after if ends_group))
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


def _backward(
    inputs: TTTInputs, first: list[Tensor], kept: list[Tensor], complete: Tensor, d_outputs: tuple[Tensor | None, ...], options: _Options
) -> list[Tensor]:
    """Gradients of the inputs and the first weights, the mini-batches taken from the last to the first, and so what was kept of them."""
    shape, num_weights, group_size = inputs.q.shape, len(first), options.group_size
    d_out = first[0].new_zeros(()).expand(shape) if d_outputs[0] is None else d_outputs[0]
    d_last = [
        torch.zeros_like(w) if d is None else d.clone(memory_format=torch.contiguous_format)
        for d, w in zip(d_outputs[1:], kept[-num_weights:])
    ]
    d_weights = tuple(d.flatten(0, 1) for d in d_last)  # [M, ...], ours to change in place
    d_tokens = [torch.empty_like(x) for x in inputs[:4]]
    d_shared = [torch.zeros_like(x, dtype=d_weights[0].dtype) for x in inputs[4:7]]
    shared = _Shared.of(inputs, first[0], options)
    weights: Weights = ()
    for span, ends_group in reversed(list(_pieces(shape[1], shape[2], group_size, PIECE))):
        if ends_group or not weights:
            weights = tuple(w.flatten(0, 1).clone() for w in _take(kept, num_weights))
        outputs = _take(kept, _num_outputs(num_weights, shared))
        start = (kept or first)[-num_weights:] if span.start % group_size == 0 else []
        piece = _load(inputs, shared, complete, span)
        d_piece, at_start = _from_frames(d_out[:, span]), tuple(w.flatten(0, 1) for w in start)
        *of_tokens, d_token_weight, d_norm_weight, d_norm_bias = _piece_backward(
            piece, shared, outputs, weights, at_start, d_piece, d_weights
        )
        for d, part in zip(d_tokens, of_tokens):
            d[:, span] = _to_frames(part, shape).view(d[:, span].shape)
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
    piece: _MiniBatch, shared: _Shared, outputs: list[Tensor], weights: Weights, start: Weights, d_out: Tensor, d_weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A piece backwards: dq, dk, dv `[n, M, b, D]`, dlr `[n, M, b, 1]`, dtoken_weight `[b]`, dnorm_weight and dnorm_bias `[M, D]`.

    The weights, and their gradient d_weights, are those at the piece's end, and become those at its start; but the weights stay those after
    its first mini-batch where the ones at the start are given.
    """
    run_backward: Callable[..., None] = _linear_backward if len(d_weights) == 2 else _mlp_backward
    d_y, d_norm_weight = _output_norm_backward(outputs[1], d_out, shared)
    piece = piece if shared.normed else _bounded(piece, outputs[-1], shared)
    inner, grads = _inner_gradient(outputs[0], piece, shared), _Gradients.empty(piece)
    batches, inners = list(piece.split()), [type(inner)(*parts) for parts in zip(*inner)]
    for i in reversed(range(len(batches))):
        hidden, at_start = [z[i] for z in outputs[2:]], i == 0 and len(start) > 0
        run_backward(batches[i], shared, inners[i], start if at_start else weights, at_start, d_y[i], d_weights, grads.at(i), *hidden)

    d_token_weight, d_attention, d_last_keys = grads.token_weight, grads.attention.neg_(), grads.last_keys.neg_()
    if isinstance(inner, _Normed):
        d_token_weight = d_token_weight + (d_attention * piece.scores).tril().sum((0, 1, 3))
        d_last_share = (d_last_keys * piece.k).sum((2, 3), keepdim=True).sub_(grads.last_share)
        d_token_weight[-1] += (d_last_share * piece.complete).sum()
        d_norm_weight += (grads.unit_gradient * inner.error).sum((0, 2))
        d_error = grads.unit_gradient.mul_(shared.norm_weight)
        d_norm_weight += (d_error * inner.unit).sum((0, 2))
        d_norm_bias = (d_error + d_out).sum((0, 2))
    else:
        d_error, d_norm_bias = grads.unit_gradient, d_out.sum((0, 2))
    d_scores = d_attention.mul_(piece.shares)  # in place, as the token weights have been served
    d_k, d_q = grads.kq.chunk(2, 2)
    d_q += (d_scores @ piece.k).add_(d_out)  # the answer has q added to it
    d_k += (d_scores.mT @ piece.q).addcmul_(d_last_keys, piece.last_share).add_(d_error)  # the target v - k enters the error with a minus
    if not shared.normed:  # c has ||k||^2
        d_k.addcmul_(piece.k, grads.key_square, value=2)
    return d_q, d_k, d_error.neg_(), grads.lr, d_token_weight, d_norm_weight, d_norm_bias


def _output_norm_backward(y: Tensor, d_out: Tensor, shared: _Shared) -> tuple[Tensor, Tensor]:
    """Through the LayerNorm after the inner model, for y `[n, M, b, D]`: its gradient and that of norm_weight `[M, D]`."""
    unit, mean, rstd = normalize(y, shared.eps)
    d_norm_weight = (unit * d_out).sum((0, 2))
    return normalize_backward(torch.mul(d_out, shared.norm_weight, out=unit), y, mean, rstd), d_norm_weight


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


class _MiniBatch(NamedTuple):
    """One mini-batch, or n of them with one dimension more in front."""

    kq: Tensor  # [M, 2 b, D], keys above queries: both go through the first layer together
    offset: Tensor  # [M, b, D]: what f(k) needs to become the error: norm_bias - target where f(k) is normed first, else -target
    lr: Tensor  # [M, b, 1]
    scores: Tensor  # [M, b, b]: q_t . k_s + 1
    shares: Tensor  # [1 or M, b, b]: row t holds share_t up to column t, then zeros
    attention: Tensor  # [M, b, b]: scores times shares
    complete: Tensor  # [M, 1, 1]: 1, or 0 where the mini-batch is not complete
    last_share: Tensor  # [M, 1, 1]: share_{b-1} times that, the share of every key in the weights at the mini-batch's end

    @property
    def k(self) -> Tensor:
        return self.kq[..., : self.lr.shape[-2], :]

    @property
    def q(self) -> Tensor:
        return self.kq[..., self.lr.shape[-2] :, :]

    def split(self) -> Iterator[_MiniBatch]:
        return (_MiniBatch(*parts) for parts in zip(*self))


class _Gradients(NamedTuple):
    """What the mini-batches of a piece write on the way back."""

    kq: Tensor  # [n, M, 2 b, D], of keys and queries through the first layer
    last_keys: Tensor  # [n, M, b, D], of keys times `last_share`; with the sign turned, as are `attention` and `last_share`
    unit_gradient: Tensor  # [n, M, b, D], of norm_weight * error, the inner gradient of `unit`; without LayerNorm of the error itself
    lr: Tensor  # [n, M, b, 1]
    key_square: Tensor  # [n, M, b, 1], of ||k||^2 in c; without LayerNorm only
    attention: Tensor  # [n, M, b, b]
    last_share: Tensor  # [n, M, 1, 1], a sum, without what `last_keys` brings
    token_weight: Tensor  # [b], a sum; with LayerNorm without what `attention` and `last_share` bring

    @classmethod
    def empty(cls, piece: _MiniBatch) -> _Gradients:
        tokens = (torch.empty_like(x) for x in (piece.kq, piece.offset, piece.offset, piece.lr, piece.lr, piece.attention))
        return cls._make((*tokens, torch.zeros_like(piece.last_share), piece.lr.new_zeros(piece.lr.shape[-2])))

    def at(self, i: int) -> _Gradients:
        return _Gradients._make((*(x[i] for x in self[:-1]), self.token_weight))


def _load(inputs: TTTInputs, shared: _Shared, complete: Tensor, span: slice) -> _MiniBatch:
    """Mini-batches with the token weights as shares, which `_bounded` replaces where the inner loss has no LayerNorm."""
    dtype, b = shared.norm_bias.dtype, inputs.lr.shape[2]
    q, k, v, lr = (_from_frames(x[:, span].to(dtype)) for x in (*inputs[:3], inputs.lr[..., None]))
    scores = (q @ k.mT).add_(1)
    complete = complete[:, span].t().repeat_interleave(inputs.lr.shape[-1], 1)[..., None, None].to(dtype)
    shares = shared.token_weight.expand(len(q), 1, b, b).tril()
    offset = shared.norm_bias - (v - k) if shared.normed else k - v
    return _MiniBatch(torch.cat([k, q], 2), offset, lr, scores, shares, scores * shares, complete, complete * shared.token_weight[-1])


def _bounded(batch: _MiniBatch, c: Tensor, shared: _Shared) -> _MiniBatch:
    """The same with share_t = w_t / max(1, w_t sum_{s <= t} lr_s c_s); c `[M, b, 1]`."""
    share = shared.token_weight / (shared.token_weight * (batch.lr * c).cumsum(-2)).clamp(min=1)
    shares = share.expand_as(batch.scores).tril()
    return batch._replace(shares=shares, attention=batch.scores * shares, last_share=batch.complete * share[..., -1:, :])


def _empty_outputs(piece: _MiniBatch, weights: Weights, shared: _Shared) -> list[Tensor]:
    """For what a piece gives: z = f(k) and y = f(q) `[n, M, b, D]`; for the MLP also what the first layer gives for both `[n, M, 2 b,
    F]`; without LayerNorm in the inner loss also c `[n, M, b, 1]`."""
    hidden = [piece.kq.new_empty(*piece.kq.shape[:-1], weights[0].shape[-1])] if len(weights) == 4 else []
    c = [] if shared.normed else [torch.empty_like(piece.lr)]
    return [torch.empty_like(piece.offset), torch.empty_like(piece.offset), *hidden, *c]


def _num_outputs(num_weights: int, shared: _Shared) -> int:
    """How many tensors `_empty_outputs` makes; `num_weights` is the number of fast weights."""
    return 1 + num_weights // 2 + (not shared.normed)


def _from_frames(x: Tensor) -> Tensor:
    """`[B, n, b, H, D]` as `[n, M, b, D]`, contiguous: a view in the frames' own order would slow down all that follows."""
    return x.permute(1, 0, 3, 2, 4).contiguous().view(x.shape[1], -1, x.shape[2], x.shape[4])


def _to_frames(x: Tensor, shape: torch.Size) -> Tensor:
    """`[n, M, b, D]` as `[B, n, b, H, D]`; `shape` gives B and H."""
    frames: Tensor = x.unflatten(1, (shape[0], shape[3])).permute(1, 0, 3, 2, 4)
    return frames


# --- one mini-batch --------------------------------------------------------------------------------------------------------------------
# Each writes what the layers give to `outputs`, and moves the weights, in place, from those before the mini-batch to those after it.
# Each backward writes to `grads`, and turns the weights and their gradient d_weights from those after the mini-batch into those before it;
# weights that are `at_start` are those before it already.
# A large product gets a tensor of its own, for into a part of one it would go head by head; other operations write where it is wanted.


class _Normed(NamedTuple):
    """The inner gradient of the tokens and its parts where the loss is 1/2 ||LN(z) - target||^2, `[M, b, D]` where nothing else is said."""

    z: Tensor  # f(k)
    unit: Tensor  # it, normalized
    mean: Tensor  # [M, b, 1]
    rstd: Tensor  # [M, b, 1]
    error: Tensor  # LN(z) - target
    gradient: Tensor  # of the loss with respect to z


class _Plain(NamedTuple):
    """The same of 1/2 ||z - target||^2."""

    gradient: Tensor  # [M, b, D]: z - target, the error


def _linear(batch: _MiniBatch, shared: _Shared, weights: Weights, outputs: list[Tensor]) -> None:
    (W1, b1), (z, y, *c) = weights, outputs
    torch.baddbmm(b1, batch.k, W1, out=z)
    gradient = _inner_gradient(z, batch, shared).gradient
    if not shared.normed:
        batch = _bounded(batch, torch.add(square(batch.k), 1, out=c[0]), shared)
    steps = gradient.mul_(batch.lr)  # in place: nothing reads the gradient any more
    torch.baddbmm(b1, batch.q, W1, out=y).baddbmm_(batch.attention, steps, alpha=-1)
    _update(W1, b1, batch.k, steps.mul_(batch.last_share), -1)


def _linear_backward(
    batch: _MiniBatch, shared: _Shared, inner: _Normed | _Plain, weights: Weights, at_start: bool, d_y: Tensor, d_weights: Weights,
    grads: _Gradients, *c: Tensor,
) -> None:  # fmt: skip
    (W1, b1), (d_W1, d_b1), steps = weights, d_weights, batch.lr * inner.gradient
    if not at_start:
        _update(W1, b1, batch.k, steps * batch.last_share, 1)
    d_steps = _first_steps_backward(batch, d_y, steps, d_W1, d_b1, grads)
    if isinstance(inner, _Normed):
        d_z = _inner_gradient_backward(inner, d_steps, batch, shared, grads)
    else:
        torch.sum(d_steps * inner.gradient, -1, keepdim=True, out=grads.lr)
        d_z = torch.mul(d_steps, batch.lr, out=grads.unit_gradient)
        grads.key_square.copy_(_share_backward(batch, shared, c[0], 0.0, grads))
    d_z = torch.cat([d_z, d_y], 1)  # [M, 2 b, D]
    _first_layer_backward(batch, W1, d_z, d_W1, d_b1, grads)


def _mlp(batch: _MiniBatch, shared: _Shared, weights: Weights, outputs: list[Tensor]) -> None:
    (W1, b1, W2, b2), (z2, y, z1, *c) = weights, outputs
    zk, zq = torch.baddbmm(b1, batch.kq, W1, out=z1).chunk(2, 1)  # [M, b, F]
    gelu = Gelu.of(zk)
    xk = zk * gelu.gate
    gradient2 = _inner_gradient(torch.baddbmm(b2, xk, W2, out=z2), batch, shared).gradient
    if shared.normed:
        steps2 = gradient2.mul_(batch.lr)
        steps1 = torch.bmm(steps2, W2.mT).mul_(gelu.slope())
    else:
        gradient1 = torch.bmm(gradient2, W2.mT).mul_(gelu.slope())
        first = (square(batch.k) + 1) * square(gradient1) / (square(gradient2) + shared.eps)
        batch = _bounded(batch, torch.add(first, square(xk) + 1, out=c[0]), shared)
        steps1, steps2 = gradient1.mul_(batch.lr), gradient2.mul_(batch.lr)
    zq -= torch.bmm(batch.attention, steps1)  # from here on z1 has for queries what they read, for keys what W1 gives them
    xq = zq * Gelu.of(zq).gate
    attention = torch.bmm(xq, xk.mT).add_(1).mul_(batch.shares)  # [M, b, b]
    torch.baddbmm(b2, xq, W2, out=y).baddbmm_(attention, steps2, alpha=-1)
    _update(W1, b1, batch.k, steps1.mul_(batch.last_share), -1)
    _update(W2, b2, xk, steps2.mul_(batch.last_share), -1)


def _mlp_backward(
    batch: _MiniBatch, shared: _Shared, inner: _Normed | _Plain, weights: Weights, at_start: bool, d_y: Tensor, d_weights: Weights,
    grads: _Gradients, z1: Tensor, *c: Tensor,
) -> None:  # fmt: skip
    (W1, b1, W2, b2), (d_W1, d_b1, d_W2, d_b2), b = weights, d_weights, d_y.shape[1]
    gelu = Gelu.of(z1)
    x = z1.new_empty(len(z1), 3 * b, z1.shape[2])  # what W2 is multiplied with, in three products
    xk, xq, d_x_gradient = x.split(b, 1)  # [M, b, F]
    torch.mul(z1, gelu.gate, out=x[:, : 2 * b])
    d_z1 = gelu.slope()  # becomes the gradient of z1 as the rest of it is multiplied in, zq first
    slope, d_zq = d_z1.chunk(2, 1)
    # to the weights before
    steps2 = batch.lr * inner.gradient
    last_steps2 = steps2 * batch.last_share
    if not at_start:
        _update(W2, b2, xk, last_steps2, 1)
    source = steps2 if shared.normed else inner.gradient  # what W2 hands back to the first layer; c needs it without lr
    x_gradient = torch.bmm(source, W2.mT)
    gradient1 = x_gradient * slope
    steps1 = gradient1 if shared.normed else batch.lr * gradient1
    if not at_start:
        _update(W1, b1, batch.k, steps1 * batch.last_share, 1)
    # the reading of the second layer, and its weights at the end
    scores = torch.bmm(xq, xk.mT).add_(1)  # [M, b, b]
    d_attention = torch.bmm(d_y, steps2.mT).neg_()
    d_shares = (d_attention * scores).tril_()
    d_scores = d_attention.mul_(batch.shares)  # in place, as d_shares has been taken
    d_zq *= torch.bmm(d_y, W2.mT).baddbmm_(d_scores, xk)
    d_last_steps2 = torch.baddbmm(d_b2, xk, d_W2, beta=-1, alpha=-1)
    grads.last_share.sub_((d_last_steps2 * steps2).sum((1, 2), keepdim=True))
    d_steps2 = d_last_steps2.mul_(batch.last_share).baddbmm_(scores.mul_(batch.shares).mT, d_y, alpha=-1)
    # the inner gradient: through its own backward pass, then through its forward pass
    d_steps1 = _first_steps_backward(batch, d_zq, steps1, d_W1, d_b1, grads)
    if isinstance(inner, _Normed):
        grads.token_weight.add_(d_shares.sum((0, 2)))
        d_gradient1, d_gradient2 = d_steps1, d_steps2  # both gradients have lr in them already
    else:
        d_gradient1, d_gradient2, d_c = _bounded_backward(
            batch, shared, gradient1, inner.gradient, c[0], d_steps1, d_steps2, d_shares, grads
        )
    torch.mul(d_gradient1, slope, out=d_x_gradient)
    d_gradient2.baddbmm_(d_x_gradient, W2)
    d_z2 = (
        _inner_gradient_backward(inner, d_gradient2, batch, shared, grads)
        if isinstance(inner, _Normed)
        else grads.unit_gradient.copy_(d_gradient2)
    )
    d_xk = torch.bmm(d_z2, W2.mT).baddbmm_(last_steps2, d_W2.mT, alpha=-1).baddbmm_(d_scores.mT, xq)
    if not shared.normed:
        d_xk.addcmul_(xk, d_c, value=2)
    slope.mul_(d_xk).addcmul_(d_gradient1.mul_(x_gradient), gelu.rows(b).curvature())
    d_W2.baddbmm_(x.mT, torch.cat([d_z2, d_y, source], 1))
    d_b2 += (d_z2 + d_y).sum(1, keepdim=True)
    _first_layer_backward(batch, W1, d_z1, d_W1, d_b1, grads)


def _first_steps_backward(batch: _MiniBatch, d_zq: Tensor, steps: Tensor, d_W1: Tensor, d_b1: Tensor, grads: _Gradients) -> Tensor:
    """Gradient of the first layer's steps, from its reading and from its weights at the end."""
    torch.bmm(d_zq, steps.mT, out=grads.attention)
    torch.bmm(steps, d_W1.mT, out=grads.last_keys)
    grads.last_share.add_(torch.bmm(steps, d_b1.mT).sum(1, keepdim=True))
    return torch.baddbmm(d_b1 * batch.last_share, batch.k * batch.last_share, d_W1, beta=-1, alpha=-1).baddbmm_(
        batch.attention.mT, d_zq, alpha=-1
    )


def _first_layer_backward(batch: _MiniBatch, W1: Tensor, d_z: Tensor, d_W1: Tensor, d_b1: Tensor, grads: _Gradients) -> None:
    """From the gradients `[M, 2 b, F]` of what the layer gives for keys and queries to these, and to the layer's weights."""
    torch.bmm(d_z, W1.mT, out=grads.kq)
    d_W1.baddbmm_(batch.kq.mT, d_z)
    d_b1 += d_z.sum(1, keepdim=True)


def _bounded_backward(
    batch: _MiniBatch, shared: _Shared, gradient1: Tensor, gradient2: Tensor, c: Tensor, d_steps1: Tensor, d_steps2: Tensor,
    d_shares: Tensor, grads: _Gradients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From both layers' steps and c to both gradients, as far as neither goes through the other, and to c, which ||x||^2 still enters."""
    torch.sum(d_steps2 * gradient2, -1, keepdim=True, out=grads.lr)
    grads.lr.add_((d_steps1 * gradient1).sum(-1, keepdim=True))
    d_c = _share_backward(batch, shared, c, d_shares.sum(-1, keepdim=True), grads)
    # c = ||x||^2 + 1 + key ||gradient1||^2 / size
    key, size = square(batch.k) + 1, square(gradient2) + shared.eps
    ratio = square(gradient1) / size
    torch.mul(d_c, ratio, out=grads.key_square)
    factor = 2 * d_c * key / size
    d_gradient1 = torch.addcmul(batch.lr * d_steps1, factor, gradient1)
    return d_gradient1, torch.addcmul(batch.lr * d_steps2, factor * ratio, gradient2, value=-1), d_c


def _share_backward(batch: _MiniBatch, shared: _Shared, c: Tensor, d_share: Tensor | float, grads: _Gradients) -> Tensor:
    """From the shares to c `[M, b, 1]`, and to token weights and lr in `grads`; d_share `[M, b, 1]` is what a second layer brings."""
    d_share = d_share - (grads.attention * batch.scores).tril_().sum(-1, keepdim=True)
    d_share[:, -1:] -= ((grads.last_keys * batch.k).sum((1, 2), keepdim=True) + grads.last_share) * batch.complete
    share = batch.shares[..., :1]
    free = shared.token_weight * (batch.lr * c).cumsum(1) < 1  # there share is the token weight, elsewhere 1 / sum_{s <= t} lr_s c_s
    grads.token_weight.add_((d_share * free).sum((0, 2)))
    d_sum = (d_share * share.square()).neg_().masked_fill_(free, 0)
    d_load = d_sum.flip(1).cumsum(1).flip(1)  # of lr_s c_s
    grads.lr.addcmul_(d_load, c)
    return d_load * batch.lr


def _inner_gradient(z: Tensor, batch: _MiniBatch, shared: _Shared) -> _Normed | _Plain:
    """Gradient of the inner loss with respect to z `[M, b, D]`."""
    if not shared.normed:
        return _Plain(z + batch.offset)
    unit, mean, rstd = normalize(z, shared.eps)
    error = torch.addcmul(batch.offset, unit, shared.norm_weight)
    return _Normed(z, unit, mean, rstd, error, normalize_backward(error * shared.norm_weight, z, mean, rstd))


def _inner_gradient_backward(inner: _Normed, d_steps: Tensor, batch: _MiniBatch, shared: _Shared, grads: _Gradients) -> Tensor:
    """dz; those of lr and of the gradient of `unit` go to `grads`."""
    z, unit, mean, rstd, error, gradient = inner
    torch.sum(d_steps * gradient, -1, keepdim=True, out=grads.lr)
    d_gradient = batch.lr * d_steps
    grads.unit_gradient.copy_(normalize_backward(d_gradient, z, mean, rstd))  # linear, and its own transpose
    scaled, unit_gradient = d_gradient.mul_(rstd), error * shared.norm_weight
    d_unit = grads.unit_gradient * shared.norm_weight.square()
    d_unit.addcmul_(scaled, (unit_gradient * unit).mean(-1, keepdim=True), value=-1)
    d_unit.addcmul_(unit_gradient, (scaled * unit).mean(-1, keepdim=True), value=-1)
    d_z = normalize_backward(d_unit, z, mean, rstd)
    return d_z.addcmul_(unit, grads.lr * batch.lr * rstd, value=-1 / z.shape[-1])


def _update(W: Tensor, bias: Tensor, x: Tensor, steps: Tensor, sign: int) -> None:
    """One layer's weights over a mini-batch, forward (-1) or back (1): x `[M, b, D or F]` has the layer's inputs for the keys."""
    W.baddbmm_(x.mT, steps, alpha=sign)
    bias.add_(steps.sum(1, keepdim=True), alpha=sign)

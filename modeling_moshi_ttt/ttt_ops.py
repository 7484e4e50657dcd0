"""The public TTT ops: one signature, three bodies (reference, scan, Triton), and the bookkeeping of streams that all of them share.

Shape letters: B rows (streams), T frames, H heads, D head dimension, b mini-batch size, N mini-batches.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_moshi_ttt import INNER_NORMS
from .errors_moshi_ttt import MoshiTTTError
from .ttt_decode import decode_step
from .ttt_reference import ttt_reference
from .ttt_scan import scan_mini_batches
from .ttt_scan_op import scan_as_one
from .ttt_state import TTTInputs, TTTState

__all__ = ["BACKENDS", "TTTState", "ttt_linear", "ttt_mlp"]

BACKENDS = ("auto", "scan", "triton", "reference")

logger = logging.getLogger(__name__)


def ttt_linear(
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
    group_size: int = 16,
    backend: str = "auto",
    eps: float = 1e-6,
    mask: Tensor | None = None,
    inner_norm: str = "layer_norm",
) -> tuple[Tensor, TTTState]:
    """Test-time training of a linear inner model over a stream, resumed from `state` (the function itself is defined in `ttt_reference`).

    Strictly causal; any split of T gives the same output and final state. Computes in float64 where an input is float64, else in float32.

    Args:
        q, k, v: `[B, T, H, D]`; a token's target is v - k.
        lr: `[B, T, H]`, step size of each token. token_weight: `[b]`. norm_weight, norm_bias: `[H, D]`.
        state: what `TTTState.initial(...)` or the previous call gave.
        mini_batch_size: tokens b that share the weights at which gradients are taken; 1 is online gradient descent.
        group_size: mini-batches for which backward keeps one state of the weights: a matter of memory and time, never of numbers.
        backend: "auto" (Triton on CUDA where it takes the inputs, else scan; scan for one frame without gradients), "scan", "triton" or
            "reference".
        mask: `[B, T]` bool; a False frame changes nothing of the state, and its output is 0.
        inner_norm: "layer_norm", the inner loss 1/2 ||LN(f(k)) - (v - k)||^2 as published; "none", 1/2 ||f(k) - (v - k)||^2 with a bounded
            step, a memory that can be written over. No token weight, rate or key makes it diverge: `ttt_reference` states the bound.

    Returns:
        `q + LN(f(q))` `[B, T, H, D]` in q's dtype, and the state after these frames.

    Raises:
        ValueError: inputs whose shapes, dtypes or devices do not fit together, a state of another mixer, batch size, mini-batch size or
            device, mini_batch_size or group_size below 1, an unknown backend or inner_norm, no frames or rows, or `backend="triton"` where
            the kernels do not take the inputs.
    """
    inputs = TTTInputs(q, k, v, lr, token_weight, norm_weight, norm_bias)
    return _run("linear", inputs, state, mask, _Options(mini_batch_size, group_size, backend, eps, inner_norm))


def ttt_mlp(
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
    group_size: int = 16,
    backend: str = "auto",
    eps: float = 1e-6,
    mask: Tensor | None = None,
    inner_norm: str = "layer_norm",
) -> tuple[Tensor, TTTState]:
    """Test-time training of a two-layer inner model with GELU; arguments, result and errors as in `ttt_linear`."""
    inputs = TTTInputs(q, k, v, lr, token_weight, norm_weight, norm_bias)
    return _run("mlp", inputs, state, mask, _Options(mini_batch_size, group_size, backend, eps, inner_norm))


class _Options(NamedTuple):
    mini_batch_size: int
    group_size: int
    backend: str
    eps: float
    inner_norm: str


class _Aligned(NamedTuple):
    """The tokens of a call in the mini-batches to which they belong, behind those of the open one."""

    q: Tensor  # [B, N, b, H, D], as k and v; zeros in empty slots
    k: Tensor
    v: Tensor
    lr: Tensor  # [B, N, b, H]
    slots: Tensor | None  # [B, T]: where each frame went, N b for a masked one; None: frame t is in slot t
    frames: Tensor  # [B]: tokens consumed since each row's start, after this call
    filled: Tensor  # [B]: tokens in these mini-batches


def _run(mixer: str, inputs: TTTInputs, state: TTTState, mask: Tensor | None, options: _Options) -> tuple[Tensor, TTTState]:
    _check_options(options)
    _check_shapes(inputs, mask, options.mini_batch_size)
    _check_state(mixer, inputs.q, state, options.mini_batch_size)
    if not torch.is_autocast_enabled(inputs.q.device.type):  # asked first: entering it is felt in a decoding step
        return _compute(inputs, state, mask, options)
    with torch.autocast(inputs.q.device.type, enabled=False):
        return _compute(inputs, state, mask, options)


def _compute(inputs: TTTInputs, state: TTTState, mask: Tensor | None, options: _Options) -> tuple[Tensor, TTTState]:
    b, group_size, backend, eps, inner_norm = options
    even = None if mask is not None or state.lockstep_frames is None else state.lockstep_frames + inputs.q.shape[1]
    dtype = torch.float64 if torch.float64 in [x.dtype for x in (*inputs, state.W1)] else torch.float32
    weights = tuple(w if w.dtype == dtype else w.to(dtype) for w in state.weights)
    way = _choose_way(backend, inputs, state, weights, b)
    if way in ("reference", "decode"):
        exact = TTTInputs(*(x if x.dtype == dtype else x.to(dtype) for x in inputs))
        if way == "reference":
            out, after = ttt_reference(exact, _cast(state, dtype), mini_batch_size=b, mask=mask, eps=eps, inner_norm=inner_norm)
        else:
            out, after = decode_step(exact, _cast(state, dtype), valid=None if mask is None else mask[:, 0], eps=eps, inner_norm=inner_norm)
        return out.to(inputs.q.dtype), dataclasses.replace(after, lockstep_frames=even)
    aligned = _align(inputs, state, mask, b)
    number = aligned.q.shape[1]
    complete = torch.arange(1, number + 1, device=inputs.q.device) * b <= aligned.filled[:, None]  # [B, N]
    whole = TTTInputs(*aligned[:4], *inputs[4:])  # not `_replace`: torch 2.11 empties what that gives where a graph breaks
    out, weights = _body(way)(whole, weights, complete, group_size=group_size, eps=eps, inner_norm=inner_norm)
    return _unalign(out, aligned, inputs.q), dataclasses.replace(_state_after(weights, aligned), lockstep_frames=even)


def _align(inputs: TTTInputs, state: TTTState, mask: Tensor | None, b: int) -> _Aligned:
    rows, length = inputs.q.shape[:2]
    tokens = inputs[:4]
    if mask is None and (state.mini_batch_size == 0 or (length > 1 and state.between_mini_batches)):
        frames = state.frames + length
        # A graph has no branch on the length: there is always a slot to fill up.
        whole = not torch.compiler.is_compiling() and length % b == 0
        number = length // b if whole else length // b + 1
        q, k, v, lr = (x if whole else F.pad(x, (0, 0) * (x.dim() - 2) + (0, number * b - length)) for x in tokens)
        q, k, v, lr = (x.unflatten(1, (-1, b)) for x in (q, k, v, lr))
        return _Aligned(q, k, v, lr, None, frames, torch.full_like(frames, length))

    started = state.mini_batch_size > 0
    position = state.frames % b  # [B]
    valid = torch.ones(rows, length, dtype=torch.bool, device=inputs.q.device) if mask is None else mask
    number = -(-(length + (b - 1 if started else 0)) // b)  # enough for any position, so that none has to be read back
    slots = torch.where(valid, position[:, None] + valid.cumsum(1) - 1, number * b)  # [B, T]
    row = torch.arange(rows, device=slots.device)[:, None]
    placed = []
    for x, kept in zip(tokens, (None, state.k, state.v, state.lr)):
        if kept is not None:
            x = x.to(torch.promote_types(x.dtype, kept.dtype)) if started else x
        room = x.new_zeros(rows, number * b + 1, *x.shape[2:]).index_put((row, slots), x)[:, :-1]  # the last slot takes masked frames
        if started and kept is not None:
            old = torch.arange(b, device=slots.device) < position[:, None]  # [B, b]
            first = torch.where(old.view(rows, b, *(1,) * (x.dim() - 2)), kept.to(x.dtype), room[:, :b])
            room = torch.cat([first, room[:, b:]], 1)
        placed.append(room.unflatten(1, (number, b)))
    arrived = valid.sum(1)
    q, k, v, lr = placed
    return _Aligned(q, k, v, lr, slots, state.frames + arrived, position + arrived)


def _unalign(out: Tensor, aligned: _Aligned, q: Tensor) -> Tensor:
    """`[B, N, b, H, D]` back to the frames' own order, in q's dtype, 0 for masked frames."""
    flat = out.flatten(1, 2)
    if aligned.slots is None:
        return flat[:, : q.shape[1]].to(q.dtype)
    index = aligned.slots.clamp(max=flat.shape[1] - 1)
    frames = flat.gather(1, index[..., None, None].expand(*q.shape))
    return torch.where((aligned.slots < flat.shape[1])[..., None, None], frames, 0.0).to(q.dtype)


def _state_after(weights: tuple[Tensor, ...], aligned: _Aligned) -> TTTState:
    """The weights with the tokens of the mini-batch that is still open, which may be another one in every row."""
    number, b = aligned.q.shape[1:3]
    dtype = weights[0].dtype
    left = torch.arange(b, device=aligned.q.device) < (aligned.filled % b)[:, None]  # [B, b]
    row = torch.arange(aligned.q.shape[0], device=aligned.q.device)
    index = (aligned.filled // b).clamp(max=number - 1)

    def open_tokens(x: Tensor) -> Tensor:
        last = x[:, -1] if aligned.slots is None else x[row, index]
        return torch.where(left.view(*left.shape, *(1,) * (x.dim() - 3)), last, 0.0).to(dtype)

    return TTTState.of(weights, open_tokens(aligned.k), open_tokens(aligned.v), open_tokens(aligned.lr), aligned.frames)


def _cast(state: TTTState, dtype: torch.dtype) -> TTTState:
    if state.W1.dtype == state.k.dtype == dtype:
        return state
    return state.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


# --- choice of body -------------------------------------------------------------------------------------------------------------------


def _choose_way(backend: str, inputs: TTTInputs, state: TTTState, weights: tuple[Tensor, ...], b: int) -> str:
    """ "reference", "triton", "scan", or "decode", one frame without gradients unless Triton was asked for by name (why:
    benchmarks/GPU.md).
    """
    if backend == "reference":
        return backend
    q = inputs.q
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *state.tensors().values()))
    if backend != "triton" and q.shape[1] == 1 and not learning:
        return "decode"
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        from .ttt_kernels import is_supported  # here, so that machines without a GPU never import Triton

        reason = is_supported(q[:, :1, None].expand(-1, -1, b, -1, -1), weights)
        if reason is None:
            return "triton"
        if backend == "triton":
            raise MoshiTTTError(f"backend 'triton' does not take these inputs: {reason}; use 'auto' or 'scan'")
        _say_once(reason)
    return "scan"


def _body(way: str) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    if way != "scan":
        return _triton_body()
    return scan_as_one if torch.compiler.is_compiling() and not torch.is_grad_enabled() else scan_mini_batches


def _triton_body() -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    from .ttt_kernels import scan_mini_batches as body

    return body


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("TTT runs in torch instead of Triton: %s", reason)


# --- checks ---------------------------------------------------------------------------------------------------------------------------


def _check_options(options: _Options) -> None:
    if options.mini_batch_size < 1:
        raise MoshiTTTError(f"mini_batch_size is {options.mini_batch_size}; it must be at least 1")
    if options.group_size < 1:
        raise MoshiTTTError(f"group_size is {options.group_size}; it must be at least 1")
    for name, value, known in (("backend", options.backend, BACKENDS), ("inner_norm", options.inner_norm, INNER_NORMS)):
        if value not in known:
            raise MoshiTTTError(f"{name} is '{value}'; it must be one of {', '.join(known)}")


def _check_shapes(inputs: TTTInputs, mask: Tensor | None, mini_batch_size: int) -> None:
    q = inputs.q
    if q.dim() != 4 or 0 in q.shape:
        raise MoshiTTTError(f"q has shape {tuple(q.shape)}; it must be [B, T, H, D] with at least one row and one frame")
    rows, length, heads, dim = q.shape
    wanted = {
        "k": q.shape, "v": q.shape, "lr": (rows, length, heads), "token_weight": (mini_batch_size,),
        "norm_weight": (heads, dim), "norm_bias": (heads, dim),
    }  # fmt: skip
    for name, tensor in zip(TTTInputs._fields, inputs):
        shape = wanted.get(name, q.shape)
        if tensor.shape != torch.Size(shape):
            raise MoshiTTTError(f"{name} has shape {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be {tuple(shape)}")
        if not tensor.is_floating_point():
            raise MoshiTTTError(f"{name} has dtype {tensor.dtype}; it must be a floating dtype")
        if tensor.device != q.device:
            raise MoshiTTTError(f"{name} is on {tensor.device}, q on {q.device}; they must be on one device")
    if mask is not None and (mask.shape != (rows, length) or mask.dtype != torch.bool or mask.device != q.device):
        raise MoshiTTTError(f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; it must be bool {(rows, length)} on {q.device}")


def _check_state(mixer: str, q: Tensor, state: TTTState, mini_batch_size: int) -> None:
    rows, _, heads, dim = q.shape
    if state.mixer != mixer:
        raise MoshiTTTError(f"the state belongs to mixer '{state.mixer}'; ttt_{mixer} needs one of mixer '{mixer}'")
    if state.batch_size != rows:
        raise MoshiTTTError(f"the state has {state.batch_size} rows, q has {rows}; they must be equal")
    if state.W1.shape[1:3] != (heads, dim):
        raise MoshiTTTError(f"the state's W1 has shape {tuple(state.W1.shape)}; q {tuple(q.shape)} needs {heads} heads of {dim}")
    if state.mini_batch_size not in (0, mini_batch_size):
        raise MoshiTTTError(
            f"the state was made at mini_batch_size {state.mini_batch_size}, this call has {mini_batch_size}; start a new state"
        )
    if state.W1.device != q.device:
        raise MoshiTTTError(f"the state is on {state.W1.device}, q on {q.device}; move it with state.to(...)")

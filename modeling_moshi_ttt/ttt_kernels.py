"""TTT-Linear and TTT-MLP over whole mini-batches as fused Triton kernels, forward and backward: `scan_mini_batches`.

It computes what `ttt_scan.scan_mini_batches` computes, with the same arguments, so `ttt_ops` may take either. One program walks over the
mini-batches of one (batch row, head). The forward keeps the weights before every `group_size`-th mini-batch; the backward recomputes, group
by group from the last, the weights before each of its mini-batches, and walks back over them. Nothing is added atomically: two runs give
the same bits. Under torch.compile the two halves are opaque custom ops; activation checkpointing, FSDP2 and autocast see an ordinary
autograd function. With TRITON_INTERPRET=1 (set before Triton is imported) the kernels run on CPU tensors, slowly: that is how they are
tested.

Letters: B rows, H heads, N mini-batches of b tokens (BT: padded to a power of two >= 16), D head width, F hidden width of the inner model.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ttt_functions import refuse_second_derivative
from .ttt_kernels_device import triton
from .ttt_kernels_linear import linear_backward, linear_forward
from .ttt_kernels_mlp import mlp_backward, mlp_forward
from .ttt_state import TTTInputs

HEAD_DIMS = (32, 64, 128)
MAX_MINI_BATCH = 64

TOKEN_DTYPES = (torch.float32, torch.bfloat16)

# What is tried, once per kernel, head width and mini-batch size: (width BLOCK_F of a tile, warps, stages of prefetched loads). Triton keeps
# the winner in its cache directory. Each fits in the 227 KB of shared memory of one H100 multiprocessor (the tests compile them). BLOCK_F =
# 4 D in the MLP's forward means: fast weights in registers from one mini-batch to the next. Prefetching stays inside a loop over tiles, and
# no loop reads what it has written, so it never overtakes the barriers between the passes.
CONFIGURATIONS = {
    "linear_forward": {32: [(0, 1, 1), (0, 4, 2)], 64: [(0, 4, 2), (0, 8, 2)], 128: [(0, 8, 1), (0, 8, 2), (0, 16, 1)]},
    "linear_backward": {32: [(32, 1, 1), (32, 4, 2)], 64: [(64, 4, 1), (32, 4, 2)], 128: [(32, 8, 1), (32, 8, 2), (32, 4, 1)]},
    "mlp_forward": {32: [(64, 4, 2), (128, 8, 1)], 64: [(64, 8, 2), (32, 4, 2), (256, 16, 1)], 128: [(64, 8, 1), (32, 8, 2), (32, 4, 2)]},
    "mlp_backward": {32: [(64, 4, 2), (32, 4, 1)], 64: [(32, 8, 1), (32, 4, 1)], 128: [(32, 8, 1), (32, 8, 2), (32, 4, 2)]},
}
# For mini-batches padded to 64 tokens: narrow tiles, as the tokens need the registers.
LONG_MINI_BATCH = {"linear_forward": (0, 8, 1), "linear_backward": (16, 8, 1), "mlp_forward": (16, 8, 1), "mlp_backward": (16, 8, 1)}
HOPPER_SHARED_BYTES = 227 * 1024
KERNELS = {
    "linear_forward": linear_forward,
    "linear_backward": linear_backward,
    "mlp_forward": mlp_forward,
    "mlp_backward": mlp_backward,
}
ADDED_TO = ["d_token_weight_ptr", "d_norm_weight_ptr", "d_norm_bias_ptr"]  # what a backward kernel changes in place, as d_w1_ptr and so on
INTERPRETED_BLOCK_F = 64
SCRATCH_BYTES = 2**30  # the backward takes as many rows at once as have their recomputed weights in this, but fills the GPU at least once


def interpreted() -> bool:
    """Whether Triton runs these kernels in its interpreter, on CPU tensors."""
    return triton is not None and not isinstance(linear_forward, triton.runtime.JITFunction)


def is_supported(q: Tensor, weights: tuple[Tensor, ...]) -> str | None:
    """Why the kernels do not take these inputs, as a phrase that names the value; None when they do.

    Args:
        q: `[B, N, b, H, D]`. weights: as `scan_mini_batches` takes them.
    """
    b, dim, width = q.shape[2], q.shape[4], weights[0].shape[-1]
    if triton is None:
        return "Triton is not installed"
    if q.device.type != ("cpu" if interpreted() else "cuda"):
        return f"the tensors are on {q.device}; the kernels run on CUDA (or, with TRITON_INTERPRET=1, on the CPU)"
    if torch.version.hip is not None:
        return "the GPU is AMD's; the kernels use NVIDIA's tf32 products"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"the GPU's compute capability is {torch.cuda.get_device_capability(q.device)}; the kernels need (8, 0) or newer"
    if q.dtype not in TOKEN_DTYPES:
        return f"the dtype is {q.dtype}; the kernels take float32 and bfloat16"
    if weights[0].dtype != torch.float32:
        return f"the fast weights are {weights[0].dtype}; the kernels keep them in float32"
    if dim not in HEAD_DIMS:
        return f"the head dimension is {dim}; the kernels take 32, 64 and 128"
    if width != (dim if len(weights) == 2 else 4 * dim):
        return f"the hidden width is {width}; the kernels take 4 times the head dimension {dim}"
    if b > MAX_MINI_BATCH:
        return f"the mini-batch size is {b}; the kernels take up to {MAX_MINI_BATCH}"
    return None if interpreted() else _too_large(b, dim, _shared_bytes(q.device))


def _too_large(b: int, dim: int, available: int) -> str | None:
    """Why the kernels would not fit in a multiprocessor's shared memory; all fit in Hopper's, some in smaller ones."""
    if available < HOPPER_SHARED_BYTES and (dim > 64 or b > 16):
        need = f"head dimension {dim} and mini-batch size {b} need Hopper's {HOPPER_SHARED_BYTES}"
        return f"the GPU has {available} bytes of shared memory; {need}"
    return None


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def scan_mini_batches(
    inputs: TTTInputs, weights: tuple[Tensor, ...], complete: Tensor, *, group_size: int, eps: float, inner_norm: str = "layer_norm"
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run whole mini-batches, one after the other; call `is_supported` first.

    Args:
        inputs: tokens as `[B, N, b, ...]`; q, k, v float32 or bfloat16, any strides (copied where not contiguous); lr is 0 in empty slots,
            which then change nothing but their own output.
        weights: (W1, b1[, W2, b2]) = `[B, H, D, F]`, `[B, H, 1, F]`, `[B, H, F, D]`, `[B, H, 1, D]`, float32; F = D for the linear mixer.
        complete: `[B, N]` bool; a mini-batch that is not complete leaves the weights as they are.
        group_size: mini-batches recomputed together in backward; any number from 1.
        inner_norm: "layer_norm" or "none", whether the inner loss has a LayerNorm.

    Returns:
        `q + LN(f(q))` `[B, N, b, H, D]` in q's dtype, and the weights after the last complete mini-batch.
    """
    floats = [x.float().contiguous() for x in inputs[3:]]
    tensors = [*(x.contiguous() for x in inputs[:3]), *floats, *(w.contiguous() for w in weights)]
    group, normed = min(group_size, inputs.q.shape[1]), inner_norm == "layer_norm"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out, *after = _Scan.apply(complete.to(torch.int8), group, eps, normed, *tensors)
    else:
        out, *after = _call("forward", tensors, complete.to(torch.int8), 0, eps, normed)
    return out, tuple(after)


class _Scan(torch.autograd.Function):
    """Gradients to q, k, v, lr, token_weight, norm_weight, norm_bias and the first fast weights; not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, complete: Tensor, group: int, eps: float, normed: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        fast = len(inputs) - 7
        results = _call("forward", list(inputs), complete, group, eps, normed)
        ctx.save_for_backward(complete, *inputs[:7], *results[1 + fast :])
        ctx.group, ctx.eps, ctx.normed = group, eps, normed
        return tuple(results[: 1 + fast])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *d_after: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("triton")
        complete, *kept = ctx.saved_tensors
        gradients = _call("backward", [d_out, *d_after, *kept], complete, ctx.group, ctx.eps, ctx.normed)
        return (None, None, None, None, *gradients)


# --- the two halves: lists of tensors in, lists of new tensors out
# -------------------------------------------------------------------------


def _forward(inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    """inputs: the seven of `_Scan` and the weights. Gives out, the last weights and, with group > 0, those before every group of
    mini-batches.
    """
    (q, weights), mixer = (inputs[0], inputs[7:]), _mixer(inputs[7:])
    number = q.shape[1]
    out = _new(q, q.shape)
    last = [_new(w, w.shape) for w in weights]
    saved = [_new(w, (*w.shape[:2], -(-number // group), *w.shape[2:])) for w in weights] if group else []
    arguments = [*inputs[:4], complete, *inputs[4:], out, *last, *(saved or last)]
    ranges = _ranges(0, 0, number, number, 1, 0, saved[0].shape[2] if group else 1, max(group, 1))
    _launch(f"{mixer}_forward", q, q.shape[0] * q.shape[3], arguments, ranges, eps, QUERY=True, SAVE=group > 0, NORMED=normed)
    return [out, *last, *saved]


def _backward(inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    """inputs: the gradients to out and to the last weights, the seven of `_Scan`, the weights before every group. Gives all gradients."""
    fast = (len(inputs) - 8) // 2
    d_out, d_weights = inputs[0].contiguous(), [x.clone(memory_format=torch.contiguous_format) for x in inputs[1 : 1 + fast]]
    tokens, saved = inputs[1 + fast : 8 + fast], inputs[8 + fast :]
    q, mixer = tokens[0], _mixer(saved)
    rows, number, b, heads, dim = q.shape
    d_tokens = [_new(x, x.shape) for x in tokens[:4]]
    partial = [x.new_zeros(rows * heads, x.shape[-1]) for x in tokens[4:]]
    shared = [*tokens[:4], complete, *tokens[4:]]
    at_once = _rows_at_once(q, saved, group)
    states = [_new(w, (at_once, group, *w.shape[3:])) for w in saved]  # the weights before each mini-batch of a group
    working = [_new(w, (at_once, *w.shape[3:])) for w in saved]
    scratch = _new(saved[0], (at_once, _padded(b), 5 * saved[0].shape[-1] + 3 * dim if mixer == "mlp" else 4 * dim))
    for row in range(0, rows * heads, at_once):
        programs = min(at_once, rows * heads - row)
        for index in reversed(range(saved[0].shape[2])):
            first = index * group
            count = min(group, number - first)
            ranges = _ranges(row, first, count, number, saved[0].shape[2], index, group, 1)
            _launch(
                f"{mixer}_forward", q, programs, [*shared, *saved, q, *working, *states], ranges, eps, QUERY=False, SAVE=True, NORMED=normed
            )
            arguments = [*shared, *states, scratch, d_out, *d_tokens, *partial, *d_weights]
            _launch(f"{mixer}_backward", q, programs, arguments, [row, first, count, number, group], eps, NORMED=normed)
    d_shared = [partial[0].sum(0), *(x.view(rows, heads, dim).sum(0) for x in partial[1:])]
    return [*d_tokens, *d_shared, *d_weights]


def _ranges(row: int, first: int, count: int, total: int, starts: int, start_index: int, saved: int, saved_every: int) -> list[int]:
    """The whole numbers that a forward kernel takes, by name, in its order."""
    return [row, first, count, total, starts, start_index, saved, saved_every]


def _rows_at_once(q: Tensor, saved: list[Tensor], group: int) -> int:
    """How many (row, head) pairs one launch of the backward takes, so that their recomputed weights stay in bounds."""
    each = 4 * group * sum(w[0, 0, 0].numel() for w in saved)
    return min(max(2 * _multiprocessors(q.device), SCRATCH_BYTES // each), q.shape[0] * q.shape[3])


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _mixer(weights: list[Tensor] | tuple[Tensor, ...]) -> str:
    return "linear" if len(weights) == 2 else "mlp"


def _padded(b: int) -> int:
    """BT: Triton's matrix products want powers of two, and 16 at least."""
    return max(16, 1 << (b - 1).bit_length())


def _precision(q: Tensor) -> str:
    """How the kernels make products of float32 numbers on tensor cores; sums, states and everything else are float32 always.

    Three tf32 products give float32's accuracy and leave the slow scalar units alone. One is enough for bf16 tokens, whose 8 bits fit in
    tf32's 11, and for float32 tokens where the user allows it, as for any product in torch: `torch.set_float32_matmul_precision("high")`.
    """
    return "tf32x3" if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"


def _new(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory that a kernel fills (tests poison it)."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


# --- launching
# -----------------------------------------------------------------------------------------------------------------------------


def _launch(name: str, q: Tensor, programs: int, arguments: list[Tensor], ranges: list[int], eps: float, **constants: Any) -> None:
    b, heads, dim = q.shape[2:]
    constants |= {"D": dim, "TOKENS": b, "BT": _padded(b), "PRECISION": _precision(q)}
    kernel = KERNELS[name]
    if name.startswith("mlp"):
        constants["F"] = 4 * dim
    if interpreted():
        if name != "linear_forward":
            constants["BLOCK_F"] = min(INTERPRETED_BLOCK_F, 4 * dim if "F" in constants else dim)
    else:
        kernel = _tuned(name, dim, b > 32)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, *ranges, heads, eps, **constants)


@functools.cache
def _tuned(name: str, dim: int, long: bool) -> Any:
    """The kernel with the choice of its configuration, which the first call with a new shape makes by measurement."""
    configs = [
        triton.Config({"BLOCK_F": block} if block else {}, num_warps=warps, num_stages=stages)
        for block, warps, stages in ([LONG_MINI_BATCH[name]] if long else CONFIGURATIONS[name][dim])
    ]
    changed = [*ADDED_TO, *(n for n in KERNELS[name].arg_names if n in ("d_w1_ptr", "d_b1_ptr", "d_w2_ptr", "d_b2_ptr"))]
    key = [n for n in KERNELS[name].arg_names if n in ("TOKENS", "QUERY", "SAVE", "NORMED", "PRECISION")]
    options = {"restore_value": changed} if name.endswith("backward") else {}
    return triton.autotune(configs, key, cache_results=True, **options)(KERNELS[name])


# --- torch.compile
# -------------------------------------------------------------------------------------------------------------------------

# A copy of this file loaded from the Hub beside the installed package must not take over the other's operators.
_NAMESPACE = "moshi_ttt" if __name__ == "modeling_moshi_ttt.ttt_kernels" else f"moshi_ttt_{zlib.crc32(__name__.encode()):08x}"


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward_op(inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    return _forward(inputs, complete, group, eps, normed)


@_forward_op.register_fake
def _(inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    groups = -(-inputs[0].shape[1] // group) if group else 0
    saved = [w.new_empty(*w.shape[:2], groups, *w.shape[2:]) for w in inputs[7:]] if group else []
    return [torch.empty_like(inputs[0]), *(torch.empty_like(w) for w in inputs[7:]), *saved]


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward_op(inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    return _backward(inputs, complete, group, eps, normed)


@_backward_op.register_fake
def _(inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    fast = (len(inputs) - 8) // 2
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*inputs[1 + fast : 8 + fast], *inputs[1 : 1 + fast])]


def _call(half: str, inputs: list[Tensor], complete: Tensor, group: int, eps: float, normed: bool) -> list[Tensor]:
    """Straight to the kernels in eager mode, where an operator's dispatch would cost more than a decoding step's launch."""
    if torch.compiler.is_compiling():
        operator: Callable[..., list[Tensor]] = _forward_op if half == "forward" else _backward_op
        return operator(inputs, complete, group, eps, normed)
    return (_forward if half == "forward" else _backward)(inputs, complete, group, eps, normed)

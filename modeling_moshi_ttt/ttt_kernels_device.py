"""What the Triton kernels of both TTT mixers share: norms, GELU and their derivatives, and how a program finds its data.

The file imports without Triton; `triton` is then None and the functions below are never called.
Letters: b tokens of a mini-batch (BT: padded to a power of two >= 16), D head width, F hidden width, N mini-batches, H heads, B rows.
"""

try:
    import triton
    import triton.language as tl

    # Whole numbers that change from launch to launch: a kernel compiled anew for those that are 1 or divisible by 16 would gain nothing.
    COUNTS = ["row_start", "first", "count", "total", "starts", "start_index", "saved", "saved_every"]
    jit = triton.jit
    kernel = triton.jit(do_not_specialize=COUNTS)
except ImportError:  # the torch scan serves machines without Triton
    triton = None

    class tl:  # type: ignore[no-redef]
        """Stands in for the annotations below."""

        constexpr = int

    def jit(function):
        return function

    kernel = jit


@jit
def normalize(z, eps, D: tl.constexpr):
    """(z - mean) / sqrt(biased variance + eps) over the last axis of z [BT, D]; also the reciprocal root [BT]."""
    centered = z - (tl.sum(z, 1) / D)[:, None]
    scale = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 1) / D + eps)
    return centered * scale[:, None], scale


@jit
def normalize_backward(d_normal, normal, scale, D: tl.constexpr):
    """Gradient to z of `normalize`, given the gradient to its result."""
    mean = tl.sum(d_normal, 1) / D
    slope = tl.sum(d_normal * normal, 1) / D
    return scale[:, None] * (d_normal - mean[:, None] - normal * slope[:, None])


@jit
def inner_gradient(z, target, gamma, beta, eps, D: tl.constexpr, NORMED: tl.constexpr):
    """Gradient of 1/2 |norm(z) gamma + beta - target|^2 to z [BT, D]; also norm(z), its scale and the residual, for the backward.

    Not NORMED, of 1/2 |z - target|^2, where the backward needs none of these; the residual, which is that gradient, stands in for them.
    """
    if not NORMED:
        residual = z - target
        return residual, residual, tl.sum(residual, 1), residual
    normal, scale = normalize(z, eps, D)
    residual = normal * gamma[None, :] + beta[None, :] - target
    return normalize_backward(residual * gamma[None, :], normal, scale, D), normal, scale, residual


@jit
def inner_gradient_backward(d_grad, grad, normal, scale, residual, gamma, D: tl.constexpr, NORMED: tl.constexpr):
    """From the gradient to `inner_gradient`'s result: gradients to z, to the residual (minus the target's), to gamma and beta [D]."""
    if not NORMED:
        return d_grad, d_grad, tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    outer = residual * gamma[None, :]
    d_inner = scale[:, None] * d_grad
    mean = tl.sum(d_inner, 1) / D
    slope = tl.sum(d_inner * normal, 1) / D
    d_outer = d_inner - mean[:, None] - normal * slope[:, None]
    d_residual = d_outer * gamma[None, :]
    correlation = tl.sum(outer * normal, 1) / D
    d_normal = d_residual * gamma[None, :] - d_inner * correlation[:, None] - outer * slope[:, None]
    d_scale = tl.sum(d_grad * grad, 1) / D
    d_z = normalize_backward(d_normal, normal, scale, D) - (scale * d_scale)[:, None] * normal
    return d_z, d_residual, tl.sum(d_outer * residual + d_residual * normal, 0), tl.sum(d_residual, 0)


@jit
def bounded_share(token_weight, lr, c, causal):
    """min(w_t, 1 / sum of lr_s c_s over s <= t) [BT], the bound on a step without inner LayerNorm (`ttt_reference` derives it)."""
    load = tl.sum(tl.where(causal, (lr * c)[None, :], 0.0), 1)
    return token_weight / tl.maximum(token_weight * load, 1.0)


@jit
def bounded_share_backward(d_share, token_weight, lr, c, causal):
    """Gradients to token_weight, lr and c [BT]."""
    load = tl.sum(tl.where(causal, (lr * c)[None, :], 0.0), 1)
    free = token_weight * load < 1.0
    d_sum = tl.where(free, 0.0, -d_share / tl.where(free, 1.0, load * load))
    d_load = tl.sum(tl.where(causal, d_sum[:, None], 0.0), 0)
    return tl.where(free, d_share, 0.0), d_load * c, d_load * lr


@jit
def gelu(x):
    """tanh-GELU, written x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def gelu_slopes(x):
    """tanh-GELU with its first and second derivative."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    p = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    t = s * (1.0 - s)
    return x * s, s + x * t * p, t * (2.0 * p + x * ((1.0 - 2.0 * s) * p * p + 0.4281288976356015 * x))


@jit
def product(a, b, PRECISION: tl.constexpr):
    """a b, of a's 64 tokens (or rows) in two halves where b is not small.

    With 64 rows Hopper's tensor cores take b from shared memory, and a kernel's many b together need more than there is (352 KB were
    counted); with 32 rows they take it from registers. A small b may stay in shared memory, which spares those registers.
    """
    if a.shape[0] == 64 and b.shape[0] * b.shape[1] >= 2048:
        upper, lower = tl.split(tl.permute(tl.reshape(a, [2, 32, a.shape[1]]), [1, 2, 0]))
        both = tl.join(tl.dot(upper, b, input_precision=PRECISION), tl.dot(lower, b, input_precision=PRECISION))
        return tl.reshape(tl.permute(both, [2, 0, 1]), [64, b.shape[1]])
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@jit
def tile_offsets(stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [ROWS, COLUMNS] of a tile whose rows lie `stride` elements apart."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@jit
def load_tokens(pointer, start, H, TOKENS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr):
    """One mini-batch of one head as float32 [BT, WIDTH], zeros behind its TOKENS tokens; `start` is its first (token, head) pair.

    The pointer stands at the first of the WIDTH features wanted. Kernels load again what they read again in another loop: the token side
    of a product, which every warp holds whole, would fill the registers from loop to loop (it more than doubled what was spilled).
    """
    inside = tl.arange(0, BT)[:, None] < TOKENS
    return tl.load(pointer + start * D + tile_offsets(H * D, BT, WIDTH), mask=inside, other=0.0).to(tl.float32)


@jit
def store_tokens(pointer, value, start, H, TOKENS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_tokens`, in the dtype behind the pointer."""
    inside = tl.arange(0, BT)[:, None] < TOKENS
    tl.store(pointer + start * D + tile_offsets(H * D, BT, WIDTH), value.to(pointer.dtype.element_ty), mask=inside)


@jit
def add_to(pointer, value, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Add `value` [SIZE] to the WIDTH numbers of this program's own: no other program touches them, so no atomics."""
    at = tl.arange(0, SIZE)
    old = tl.load(pointer + at, mask=at < WIDTH, other=0.0)
    tl.store(pointer + at, old + value, mask=at < WIDTH)

"""Triton kernels of TTT-Linear, f(z) = z W + c: one program per (batch row, head) walks over the mini-batches.

The forward keeps W in registers. The backward reads W and d_W in tiles of BLOCK_F rows, twice a mini-batch: both whole would leave no
registers for the tokens. d_W lives in its own buffer, which stays in L2; barriers separate what threads of a program write there from
what others read.

With L[t, s] = share_t lr_s for s <= t, share_t the token weight w_t or, not NORMED, `bounded_share` with c = |k|^2 + 1, and all gradients
of a mini-batch taken at its first weights, the dual form reads
    G = d loss / d (k W + c),   out = q + norm(q W + c - (L * (q k^T + 1)) G) gamma + beta,   W <- W - share_last k^T (lr G).
The backward derives these equations line by line; d_<name> is the gradient to <name>.
"""

from .ttt_kernels_device import (
    add_to,
    bounded_share,
    bounded_share_backward,
    inner_gradient,
    inner_gradient_backward,
    kernel,
    load_tokens,
    normalize,
    normalize_backward,
    product,
    store_tokens,
    tile_offsets,
    tl,
)


@kernel
def linear_forward(
    q_ptr,  # [B, N, b, H, D], as k, v and out
    k_ptr,
    v_ptr,
    lr_ptr,  # [B, N, b, H]
    complete_ptr,  # [B, N], 0 or 1
    token_weight_ptr,  # [b]
    norm_weight_ptr,  # [H, D]
    norm_bias_ptr,
    w1_ptr,  # [B H, starts, D, D]: program's start is number start_index of its row
    b1_ptr,
    out_ptr,
    w1_last_ptr,  # [programs, D, D]
    b1_last_ptr,
    w1_saved_ptr,  # [programs, saved, D, D]: the weights before every saved_every-th mini-batch
    b1_saved_ptr,
    row_start,
    first,
    count,
    total,
    starts,
    start_index,
    saved,
    saved_every,
    H,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BT: tl.constexpr,
    QUERY: tl.constexpr,
    SAVE: tl.constexpr,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program + row_start
    batch, head = row // H, row % H
    features = tl.arange(0, D)
    tokens = tl.arange(0, BT)
    square = tile_offsets(D, D, D)
    gamma = tl.load(norm_weight_ptr + head * D + features)
    beta = tl.load(norm_bias_ptr + head * D + features)
    token_weight = tl.load(token_weight_ptr + tokens, mask=tokens < TOKENS, other=0.0)
    share = token_weight
    last_share = tl.load(token_weight_ptr + TOKENS - 1)
    causal = tokens[:, None] >= tokens[None, :]
    start = row * starts + start_index
    w = tl.load(w1_ptr + start * D * D + square)
    bias = tl.load(b1_ptr + start * D + features)
    for i in range(count):
        if SAVE:  # noqa: SIM102 (known when the kernel is compiled; the inner condition is not)
            if i % saved_every == 0:
                slot = program * saved + i // saved_every
                tl.store(w1_saved_ptr + slot * D * D + square, w)
                tl.store(b1_saved_ptr + slot * D + features, bias)
        mini_batch = batch * total + first + i
        at = mini_batch * TOKENS * H + head
        lr = tl.load(lr_ptr + at + tokens * H, mask=tokens < TOKENS, other=0.0)
        k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
        v = load_tokens(v_ptr, at, H, TOKENS, D, BT, D)
        z = product(k, w, PRECISION) + bias[None, :]
        grad, _, _, _ = inner_gradient(z, v - k, gamma, beta, eps, D, NORMED)
        if not NORMED:
            share = bounded_share(token_weight, lr, tl.sum(k * k, 1) + 1.0, causal)
            last_share = tl.sum(tl.where(tokens == TOKENS - 1, share, 0.0), 0)
        if QUERY:
            q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
            score = product(q, tl.trans(k), PRECISION) + 1.0
            mixing = tl.where(causal, share[:, None] * lr[None, :] * score, 0.0)
            z_q = product(q, w, PRECISION) + bias[None, :] - product(mixing, grad, PRECISION)
            normal, _ = normalize(z_q, eps, D)
            store_tokens(out_ptr, q + normal * gamma[None, :] + beta[None, :], at, H, TOKENS, D, BT, D)
        step = lr * (last_share * tl.load(complete_ptr + mini_batch).to(tl.float32))
        stepped = step[:, None] * grad
        w -= product(tl.trans(k), stepped, PRECISION)
        bias -= tl.sum(stepped, 0)
    if QUERY:
        tl.store(w1_last_ptr + program * D * D + square, w)
        tl.store(b1_last_ptr + program * D + features, bias)


@kernel
def linear_backward(
    q_ptr,
    k_ptr,
    v_ptr,
    lr_ptr,
    complete_ptr,
    token_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_saved_ptr,  # [programs, saved, D, D]: the weights before each mini-batch of the group
    b1_saved_ptr,
    scratch_ptr,  # [programs, BT, 4 D]: what the first pass over the tiles hands to the second
    d_out_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_lr_ptr,
    d_token_weight_ptr,  # [B H, b], added to, as the next two
    d_norm_weight_ptr,  # [B H, D]
    d_norm_bias_ptr,
    d_w1_ptr,  # [B H, D, D]: in, the gradient to the weights after the group; out, to those before it
    d_b1_ptr,
    row_start,
    first,
    count,
    total,
    saved,
    H,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BT: tl.constexpr,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program + row_start
    batch, head = row // H, row % H
    features = tl.arange(0, D)
    tokens = tl.arange(0, BT)
    wide = tile_offsets(D, BLOCK_F, D)
    whole = tile_offsets(D, BT, D)
    part = tile_offsets(D, BT, BLOCK_F)
    gamma = tl.load(norm_weight_ptr + head * D + features)
    beta = tl.load(norm_bias_ptr + head * D + features)
    token_weight = tl.load(token_weight_ptr + tokens, mask=tokens < TOKENS, other=0.0)
    share = token_weight
    last_share = tl.load(token_weight_ptr + TOKENS - 1)
    causal = tokens[:, None] >= tokens[None, :]
    grad_ptr = scratch_ptr + program * (4 * BT * D)
    d_z_q_ptr = grad_ptr + BT * D
    d_z_ptr = grad_ptr + 2 * BT * D
    d_residual_ptr = grad_ptr + 3 * BT * D
    d_w1_ptr += row * D * D
    d_bias = tl.load(d_b1_ptr + row * D + features)
    d_token_weight = tl.zeros([BT], tl.float32)
    d_gamma = tl.zeros([D], tl.float32)
    d_beta = tl.zeros([D], tl.float32)
    for back in range(count):
        i = count - 1 - back
        mini_batch = batch * total + first + i
        at = mini_batch * TOKENS * H + head
        slot = program * saved + i
        complete = tl.load(complete_ptr + mini_batch).to(tl.float32)
        lr = tl.load(lr_ptr + at + tokens * H, mask=tokens < TOKENS, other=0.0)
        w_ptr = w1_saved_ptr + slot * D * D
        bias = tl.load(b1_saved_ptr + slot * D + features)

        # Pass 1: what the keys and the queries read, and S = K d_W + d_c, how the later loss pulls at G.
        z = tl.zeros([BT, D], tl.float32) + bias[None, :]
        z_q = tl.zeros([BT, D], tl.float32) + bias[None, :]
        carried = tl.zeros([BT, D], tl.float32) + d_bias[None, :]
        score = tl.zeros([BT, BT], tl.float32) + 1.0
        for f in range(0, D, BLOCK_F):
            k = load_tokens(k_ptr + f, at, H, TOKENS, D, BT, BLOCK_F)
            q = load_tokens(q_ptr + f, at, H, TOKENS, D, BT, BLOCK_F)
            w = tl.load(w_ptr + f * D + wide)
            score += product(q, tl.trans(k), PRECISION)
            z += product(k, w, PRECISION)
            z_q += product(q, w, PRECISION)
            carried += product(k, tl.load(d_w1_ptr + f * D + wide), PRECISION)
        key = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
        target = load_tokens(v_ptr, at, H, TOKENS, D, BT, D) - key
        grad, normal, scale, residual = inner_gradient(z, target, gamma, beta, eps, D, NORMED)
        if not NORMED:
            c = tl.sum(key * key, 1) + 1.0
            share = bounded_share(token_weight, lr, c, causal)
            last_share = tl.sum(tl.where(tokens == TOKENS - 1, share, 0.0), 0)
        reach = tl.where(causal, share[:, None] * lr[None, :], 0.0)
        mixing = reach * score
        z_q -= product(mixing, grad, PRECISION)
        d_out = load_tokens(d_out_ptr, at, H, TOKENS, D, BT, D)
        normal_q, scale_q = normalize(z_q, eps, D)

        d_gamma += tl.sum(d_out * normal_q, 0)
        d_beta += tl.sum(d_out, 0)
        d_z_q = normalize_backward(d_out * gamma[None, :], normal_q, scale_q, D)
        d_mixing = -product(d_z_q, tl.trans(grad), PRECISION)
        d_score = d_mixing * reach
        d_reach = tl.where(causal, d_mixing * score, 0.0)
        gain = complete * tl.sum(carried * grad, 1)
        step = lr * (last_share * complete)
        d_grad = -product(tl.trans(mixing), d_z_q, PRECISION) - step[:, None] * carried
        d_lr = tl.sum(d_reach * share[:, None], 0) - last_share * gain
        d_share = tl.sum(d_reach * lr[None, :], 1) - tl.where(tokens == TOKENS - 1, tl.sum(lr * gain, 0), 0.0)
        if not NORMED:
            d_share, g_lr, d_c = bounded_share_backward(d_share, token_weight, lr, c, causal)
            d_lr += g_lr
        d_token_weight += d_share

        d_z, d_residual, g_gamma, g_beta = inner_gradient_backward(d_grad, grad, normal, scale, residual, gamma, D, NORMED)
        d_gamma += g_gamma
        d_beta += g_beta
        tl.store(grad_ptr + whole, grad)
        tl.store(d_z_q_ptr + whole, d_z_q)
        tl.store(d_z_ptr + whole, d_z)
        tl.store(d_residual_ptr + whole, d_residual)
        store_tokens(d_v_ptr, -d_residual, at, H, TOKENS, D, BT, D)
        tl.store(d_lr_ptr + at + tokens * H, d_lr, mask=tokens < TOKENS)
        tl.debug_barrier()

        # Pass 2: the gradients to q, k and W.
        for f in range(0, D, BLOCK_F):
            k = load_tokens(k_ptr + f, at, H, TOKENS, D, BT, BLOCK_F)
            q = load_tokens(q_ptr + f, at, H, TOKENS, D, BT, BLOCK_F)
            w = tl.load(w_ptr + f * D + wide)
            d_w = tl.load(d_w1_ptr + f * D + wide)
            d_q = load_tokens(d_out_ptr + f, at, H, TOKENS, D, BT, BLOCK_F) + product(d_score, k, PRECISION)
            d_k = tl.load(d_residual_ptr + f + part) + product(tl.trans(d_score), q, PRECISION)
            d_k -= step[:, None] * product(tl.load(grad_ptr + whole), tl.trans(d_w), PRECISION)
            if not NORMED:
                d_k += 2.0 * d_c[:, None] * k
            d_z_q = tl.load(d_z_q_ptr + whole)
            d_q += product(d_z_q, tl.trans(w), PRECISION)
            d_w += product(tl.trans(q), d_z_q, PRECISION)
            d_z = tl.load(d_z_ptr + whole)
            d_k += product(d_z, tl.trans(w), PRECISION)
            d_w += product(tl.trans(k), d_z, PRECISION)
            store_tokens(d_q_ptr + f, d_q, at, H, TOKENS, D, BT, BLOCK_F)
            store_tokens(d_k_ptr + f, d_k, at, H, TOKENS, D, BT, BLOCK_F)
            tl.debug_barrier()
            tl.store(d_w1_ptr + f * D + wide, d_w)
        d_bias += tl.sum(tl.load(d_z_q_ptr + whole) + tl.load(d_z_ptr + whole), 0)
        tl.debug_barrier()
    tl.store(d_b1_ptr + row * D + features, d_bias)
    add_to(d_token_weight_ptr + row * TOKENS, d_token_weight, TOKENS, BT)
    add_to(d_norm_weight_ptr + row * D, d_gamma, D, D)
    add_to(d_norm_bias_ptr + row * D, d_beta, D, D)

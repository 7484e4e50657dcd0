"""Triton kernels of TTT-Linear, f(z) = z W + c: one program per (batch row, head) walks over the mini-batches with W in registers.

With L[t, s] = w_t lr_s for s <= t, all gradients of a mini-batch taken at its first weights, the dual form reads
    G = d loss / d (k W + c),   out = q + norm(q W + c - (L * (q k^T + 1)) G) gamma + beta,   W <- W - w_last k^T (lr G).
The backward derives these equations line by line; d_<name> is the gradient to <name>.
"""

from .ttt_kernels_device import (
    add_to,
    inner_gradient,
    inner_gradient_backward,
    kernel,
    load_tokens,
    normalize,
    normalize_backward,
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
    last_weight = tl.load(token_weight_ptr + TOKENS - 1)
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
        k = load_tokens(k_ptr, at, H, TOKENS, D, BT)
        v = load_tokens(v_ptr, at, H, TOKENS, D, BT)
        z = tl.dot(k, w, input_precision=PRECISION) + bias[None, :]
        grad, _, _, _ = inner_gradient(z, v - k, gamma, beta, eps, D)
        if QUERY:
            q = load_tokens(q_ptr, at, H, TOKENS, D, BT)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) + 1.0
            mixing = tl.where(causal, token_weight[:, None] * lr[None, :] * score, 0.0)
            z_q = tl.dot(q, w, input_precision=PRECISION) + bias[None, :] - tl.dot(mixing, grad, input_precision=PRECISION)
            normal, _ = normalize(z_q, eps, D)
            store_tokens(out_ptr, q + normal * gamma[None, :] + beta[None, :], at, H, TOKENS, D, BT)
        step = lr * (last_weight * tl.load(complete_ptr + mini_batch).to(tl.float32))
        stepped = step[:, None] * grad
        w -= tl.dot(tl.trans(k), stepped, input_precision=PRECISION)
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
    last_weight = tl.load(token_weight_ptr + TOKENS - 1)
    causal = tokens[:, None] >= tokens[None, :]
    d_w = tl.load(d_w1_ptr + row * D * D + square)
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
        k = load_tokens(k_ptr, at, H, TOKENS, D, BT)
        v = load_tokens(v_ptr, at, H, TOKENS, D, BT)
        q = load_tokens(q_ptr, at, H, TOKENS, D, BT)
        d_out = load_tokens(d_out_ptr, at, H, TOKENS, D, BT)
        w = tl.load(w1_saved_ptr + slot * D * D + square)
        bias = tl.load(b1_saved_ptr + slot * D + features)

        z = tl.dot(k, w, input_precision=PRECISION) + bias[None, :]
        grad, normal, scale, residual = inner_gradient(z, v - k, gamma, beta, eps, D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) + 1.0
        reach = tl.where(causal, token_weight[:, None] * lr[None, :], 0.0)
        mixing = reach * score
        z_q = tl.dot(q, w, input_precision=PRECISION) + bias[None, :] - tl.dot(mixing, grad, input_precision=PRECISION)
        normal_q, scale_q = normalize(z_q, eps, D)

        d_gamma += tl.sum(d_out * normal_q, 0)
        d_beta += tl.sum(d_out, 0)
        d_z_q = normalize_backward(d_out * gamma[None, :], normal_q, scale_q, D)
        d_mixing = -tl.dot(d_z_q, tl.trans(grad), input_precision=PRECISION)
        d_score = d_mixing * reach
        d_reach = tl.where(causal, d_mixing * score, 0.0)
        carried = tl.dot(k, d_w, input_precision=PRECISION) + d_bias[None, :]
        gain = complete * tl.sum(carried * grad, 1)
        step = lr * (last_weight * complete)
        d_grad = -tl.dot(tl.trans(mixing), d_z_q, input_precision=PRECISION) - step[:, None] * carried
        d_lr = tl.sum(d_reach * token_weight[:, None], 0) - last_weight * gain
        d_token_weight += tl.sum(d_reach * lr[None, :], 1) - tl.where(tokens == TOKENS - 1, tl.sum(lr * gain, 0), 0.0)

        d_z, d_residual, g_gamma, g_beta = inner_gradient_backward(d_grad, grad, normal, scale, residual, gamma, D)
        d_gamma += g_gamma
        d_beta += g_beta
        d_q = d_out + tl.dot(d_z_q, tl.trans(w), input_precision=PRECISION) + tl.dot(d_score, k, input_precision=PRECISION)
        d_k = d_residual + tl.dot(tl.trans(d_score), q, input_precision=PRECISION)
        d_k += tl.dot(d_z, tl.trans(w), input_precision=PRECISION)
        d_k -= step[:, None] * tl.dot(grad, tl.trans(d_w), input_precision=PRECISION)
        store_tokens(d_q_ptr, d_q, at, H, TOKENS, D, BT)
        store_tokens(d_k_ptr, d_k, at, H, TOKENS, D, BT)
        store_tokens(d_v_ptr, -d_residual, at, H, TOKENS, D, BT)
        tl.store(d_lr_ptr + at + tokens * H, d_lr, mask=tokens < TOKENS)
        d_w += tl.dot(tl.trans(q), d_z_q, input_precision=PRECISION) + tl.dot(tl.trans(k), d_z, input_precision=PRECISION)
        d_bias += tl.sum(d_z_q + d_z, 0)
    tl.store(d_w1_ptr + row * D * D + square, d_w)
    tl.store(d_b1_ptr + row * D + features, d_bias)
    add_to(d_token_weight_ptr + row * TOKENS, d_token_weight, TOKENS, BT)
    add_to(d_norm_weight_ptr + row * D, d_gamma, D, D)
    add_to(d_norm_bias_ptr + row * D, d_beta, D, D)

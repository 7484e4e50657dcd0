"""Triton kernels of TTT-MLP, f(z) = gelu(z W1 + c1) W2 + c2: one program per (batch row, head) walks over the mini-batches.

The hidden width F is cut into tiles of BLOCK_F columns of W1 (rows of W2). With BLOCK_F = F the forward keeps the fast weights in
registers from one mini-batch to the next; with narrower tiles they live in the program's own part of the last weights, a buffer
that stays in L2, and stream through. Barriers separate what threads of a program write there from what others read.

With L[t, s] = share_t lr_s for s <= t, share_t the token weight w_t or, not NORMED, `bounded_share`, and all gradients of a mini-batch
taken at its first weights, the dual form reads
    X2 = gelu(k W1 + c1),  G2 = d loss / d (X2 W2 + c2),  G1 = (G2 W2^T) * gelu'(k W1 + c1)
    Xq = gelu(q W1 + c1 - (L * (q k^T + 1)) G1),  out = q + norm(Xq W2 + c2 - (L * (Xq X2^T + 1)) G2) gamma + beta
    W1 <- W1 - share_last k^T (lr G1),  W2 <- W2 - share_last X2^T (lr G2).
The bound takes c = |X2|^2 + 1 + (|k|^2 + 1) |G1|^2 / (|G2|^2 + eps), token by token; without the norm G2 is the error.
The backward derives these equations line by line; d_<name> is the gradient to <name>.
"""

from .ttt_kernels_device import (
    add_to,
    bounded_share,
    bounded_share_backward,
    gelu,
    gelu_slopes,
    inner_gradient,
    inner_gradient_backward,
    jit,
    kernel,
    load_tokens,
    normalize,
    normalize_backward,
    product,
    store_tokens,
    tile_offsets,
    tl,
)


@jit
def learn(k, w1, b1, w2, grad2, PRECISION: tl.constexpr):
    """A tile's hidden values of the keys and the gradient to what goes into the GELU: X2, G1 [BT, BLOCK_F]."""
    hidden, slope, _ = gelu_slopes(product(k, w1, PRECISION) + b1[None, :])
    return hidden, product(grad2, tl.trans(w2), PRECISION) * slope


@jit
def read(q, mixing, hidden, grad1, w1, b1, w2, z_q, overlap, PRECISION: tl.constexpr):
    """Add a tile's share to what the queries read: z_q [BT, D] before the second layer's own update, overlap = Xq X2^T [BT, BT]."""
    z = product(q, w1, PRECISION) + b1[None, :] - product(mixing, grad1, PRECISION)
    hidden_q = gelu(z)
    # In this order: the last product lends all those it depends on its layout of warps, and [BT, BT] would have every warp do all of them.
    overlap += product(hidden_q, tl.trans(hidden), PRECISION)
    z_q += product(hidden_q, w2, PRECISION)
    return z_q, overlap


@jit
def update(k, hidden, grad1, grad2, step, w1, b1, w2, PRECISION: tl.constexpr):
    """A tile's weights after the mini-batch."""
    stepped = step[:, None] * grad1
    w1 -= product(tl.trans(k), stepped, PRECISION)
    w2 -= product(tl.trans(hidden), step[:, None] * grad2, PRECISION)
    return w1, b1 - tl.sum(stepped, 0), w2


@kernel
def mlp_forward(
    q_ptr,  # [B, N, b, H, D], as k, v and out
    k_ptr,
    v_ptr,
    lr_ptr,  # [B, N, b, H]
    complete_ptr,  # [B, N], 0 or 1
    token_weight_ptr,  # [b]
    norm_weight_ptr,  # [H, D]
    norm_bias_ptr,
    w1_ptr,  # [B H, starts, D, F]: a program's start is number start_index of its row
    b1_ptr,  # [B H, starts, F]
    w2_ptr,  # [B H, starts, F, D]
    b2_ptr,  # [B H, starts, D]
    out_ptr,
    w1_last_ptr,  # [programs, D, F] and so on: the last weights, and the working copy of narrow tiles
    b1_last_ptr,
    w2_last_ptr,
    b2_last_ptr,
    w1_saved_ptr,  # [programs, saved, D, F] and so on: the weights before every saved_every-th mini-batch
    b1_saved_ptr,
    w2_saved_ptr,
    b2_saved_ptr,
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
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    BT: tl.constexpr,
    QUERY: tl.constexpr,
    SAVE: tl.constexpr,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    RESIDENT: tl.constexpr = BLOCK_F == F
    program = tl.program_id(0).to(tl.int64)
    row = program + row_start
    batch, head = row // H, row % H
    features = tl.arange(0, D)
    tokens = tl.arange(0, BT)
    tile = tl.arange(0, BLOCK_F)
    tall = tile_offsets(F, D, BLOCK_F)
    wide = tile_offsets(D, BLOCK_F, D)
    gamma = tl.load(norm_weight_ptr + head * D + features)
    beta = tl.load(norm_bias_ptr + head * D + features)
    token_weight = tl.load(token_weight_ptr + tokens, mask=tokens < TOKENS, other=0.0)
    share = token_weight
    last_share = tl.load(token_weight_ptr + TOKENS - 1)
    causal = tokens[:, None] >= tokens[None, :]
    start = row * starts + start_index
    work1 = w1_last_ptr + program * D * F
    work2 = w2_last_ptr + program * D * F
    workb = b1_last_ptr + program * F
    b2 = tl.load(b2_ptr + start * D + features)
    if RESIDENT:
        w1 = tl.load(w1_ptr + start * D * F + tall)
        b1 = tl.load(b1_ptr + start * F + tile)
        w2 = tl.load(w2_ptr + start * D * F + wide)
    else:
        for f in range(0, F, BLOCK_F):
            tl.store(work1 + f + tall, tl.load(w1_ptr + start * D * F + f + tall))
            tl.store(workb + f + tile, tl.load(b1_ptr + start * F + f + tile))
            tl.store(work2 + f * D + wide, tl.load(w2_ptr + start * D * F + f * D + wide))
        tl.debug_barrier()
    for i in range(count):
        slot = program * saved + i // saved_every
        keep = i % saved_every == 0
        if SAVE:  # noqa: SIM102 (known when the kernel is compiled; the inner condition is not)
            if keep:
                tl.store(b2_saved_ptr + slot * D + features, b2)
                if RESIDENT:
                    tl.store(w1_saved_ptr + slot * D * F + tall, w1)
                    tl.store(b1_saved_ptr + slot * F + tile, b1)
                    tl.store(w2_saved_ptr + slot * D * F + wide, w2)
        mini_batch = batch * total + first + i
        at = mini_batch * TOKENS * H + head
        lr = tl.load(lr_ptr + at + tokens * H, mask=tokens < TOKENS, other=0.0)
        k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
        target = load_tokens(v_ptr, at, H, TOKENS, D, BT, D) - k
        z = tl.zeros([BT, D], tl.float32) + b2[None, :]
        hidden_square = tl.zeros([BT], tl.float32)
        if RESIDENT:
            hidden = gelu(product(k, w1, PRECISION) + b1[None, :])
            z += product(hidden, w2, PRECISION)
            if not NORMED:
                hidden_square += tl.sum(hidden * hidden, 1)
        else:
            for f in range(0, F, BLOCK_F):
                k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
                w1 = tl.load(work1 + f + tall)
                b1 = tl.load(workb + f + tile)
                w2 = tl.load(work2 + f * D + wide)
                if SAVE:  # noqa: SIM102 (known when the kernel is compiled; the inner condition is not)
                    if keep:
                        tl.store(w1_saved_ptr + slot * D * F + f + tall, w1)
                        tl.store(b1_saved_ptr + slot * F + f + tile, b1)
                        tl.store(w2_saved_ptr + slot * D * F + f * D + wide, w2)
                hidden = gelu(product(k, w1, PRECISION) + b1[None, :])
                z += product(hidden, w2, PRECISION)
                if not NORMED:
                    hidden_square += tl.sum(hidden * hidden, 1)
        grad2, _, _, _ = inner_gradient(z, target, gamma, beta, eps, D, NORMED)
        if not NORMED:
            grad1_square = tl.zeros([BT], tl.float32)
            if RESIDENT:
                hidden, grad1 = learn(k, w1, b1, w2, grad2, PRECISION)
                grad1_square += tl.sum(grad1 * grad1, 1)
            else:
                for f in range(0, F, BLOCK_F):
                    k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
                    w2 = tl.load(work2 + f * D + wide)
                    hidden, grad1 = learn(k, tl.load(work1 + f + tall), tl.load(workb + f + tile), w2, grad2, PRECISION)
                    grad1_square += tl.sum(grad1 * grad1, 1)
            k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
            c = hidden_square + 1.0 + (tl.sum(k * k, 1) + 1.0) * grad1_square / (tl.sum(grad2 * grad2, 1) + eps)
            share = bounded_share(token_weight, lr, c, causal)
            last_share = tl.sum(tl.where(tokens == TOKENS - 1, share, 0.0), 0)
        step = lr * (last_share * tl.load(complete_ptr + mini_batch).to(tl.float32))
        if QUERY:
            q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
            score = product(q, tl.trans(k), PRECISION) + 1.0
            reach = tl.where(causal, share[:, None] * lr[None, :], 0.0)
            mixing = reach * score
            z_q = tl.zeros([BT, D], tl.float32) + b2[None, :]
            overlap = tl.zeros([BT, BT], tl.float32) + 1.0
        if RESIDENT:
            hidden, grad1 = learn(k, w1, b1, w2, grad2, PRECISION)
            if QUERY:
                z_q, overlap = read(q, mixing, hidden, grad1, w1, b1, w2, z_q, overlap, PRECISION)
            w1, b1, w2 = update(k, hidden, grad1, grad2, step, w1, b1, w2, PRECISION)
        else:
            for f in range(0, F, BLOCK_F):
                w1 = tl.load(work1 + f + tall)
                b1 = tl.load(workb + f + tile)
                w2 = tl.load(work2 + f * D + wide)
                k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
                hidden, grad1 = learn(k, w1, b1, w2, grad2, PRECISION)
                if QUERY:
                    q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
                    z_q, overlap = read(q, mixing, hidden, grad1, w1, b1, w2, z_q, overlap, PRECISION)
                w1, b1, w2 = update(k, hidden, grad1, grad2, step, w1, b1, w2, PRECISION)
                tl.debug_barrier()
                tl.store(work1 + f + tall, w1)
                tl.store(workb + f + tile, b1)
                tl.store(work2 + f * D + wide, w2)
            tl.debug_barrier()
        if QUERY:
            z_q -= product(reach * overlap, grad2, PRECISION)
            q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
            normal, _ = normalize(z_q, eps, D)
            store_tokens(out_ptr, q + normal * gamma[None, :] + beta[None, :], at, H, TOKENS, D, BT, D)
        b2 -= tl.sum(step[:, None] * grad2, 0)
    if QUERY:
        tl.store(b2_last_ptr + program * D + features, b2)
        if RESIDENT:
            tl.store(work1 + tall, w1)
            tl.store(workb + tile, b1)
            tl.store(work2 + wide, w2)


@kernel
def mlp_backward(
    q_ptr,
    k_ptr,
    v_ptr,
    lr_ptr,
    complete_ptr,
    token_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_saved_ptr,  # [programs, saved, D, F] and so on: the weights before each mini-batch of the group
    b1_saved_ptr,
    w2_saved_ptr,
    b2_saved_ptr,
    scratch_ptr,  # [programs, BT, 5 F + 3 D]: what one pass over the tiles hands to the next
    d_out_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_lr_ptr,
    d_token_weight_ptr,  # [B H, b], added to, as the next two
    d_norm_weight_ptr,  # [B H, D]
    d_norm_bias_ptr,
    d_w1_ptr,  # [B H, D, F] and so on: in, the gradient to the weights after the group; out, to those before it
    d_b1_ptr,
    d_w2_ptr,
    d_b2_ptr,
    row_start,
    first,
    count,
    total,
    saved,
    H,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
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
    tile = tl.arange(0, BLOCK_F)
    tall = tile_offsets(F, D, BLOCK_F)
    wide = tile_offsets(D, BLOCK_F, D)
    whole = tile_offsets(D, BT, D)
    flat = tile_offsets(F, BT, BLOCK_F)
    gamma = tl.load(norm_weight_ptr + head * D + features)
    beta = tl.load(norm_bias_ptr + head * D + features)
    token_weight = tl.load(token_weight_ptr + tokens, mask=tokens < TOKENS, other=0.0)
    share = token_weight
    last_share = tl.load(token_weight_ptr + TOKENS - 1)
    causal = tokens[:, None] >= tokens[None, :]
    z1_ptr = scratch_ptr + program * (5 * BT * F + 3 * BT * D)  # k W1 + c1
    back1_ptr = z1_ptr + BT * F  # G2 W2^T
    z1_q_ptr = z1_ptr + 2 * BT * F  # what goes into the GELU of the queries
    d_z1_q_ptr = z1_ptr + 3 * BT * F
    d_grad1_ptr = z1_ptr + 4 * BT * F
    grad2_ptr = z1_ptr + 5 * BT * F
    d_z2_q_ptr = grad2_ptr + BT * D
    d_z2_ptr = grad2_ptr + 2 * BT * D
    d_w1_ptr += row * D * F
    d_b1_ptr += row * F
    d_w2_ptr += row * D * F
    d_b2 = tl.load(d_b2_ptr + row * D + features)
    d_token_weight = tl.zeros([BT], tl.float32)
    d_gamma = tl.zeros([D], tl.float32)
    d_beta = tl.zeros([D], tl.float32)
    for back in range(count):
        i = count - 1 - back
        mini_batch = batch * total + first + i
        at = mini_batch * TOKENS * H + head
        slot = program * saved + i
        w1_ptr = w1_saved_ptr + slot * D * F
        b1_ptr = b1_saved_ptr + slot * F
        w2_ptr = w2_saved_ptr + slot * D * F
        b2 = tl.load(b2_saved_ptr + slot * D + features)
        complete = tl.load(complete_ptr + mini_batch).to(tl.float32)
        lr = tl.load(lr_ptr + at + tokens * H, mask=tokens < TOKENS, other=0.0)

        # Pass 1: what the keys read, z2, and S2 = X2 d_W2 + d_c2, how the later loss pulls at G2.
        z2 = tl.zeros([BT, D], tl.float32) + b2[None, :]
        carried2 = tl.zeros([BT, D], tl.float32) + d_b2[None, :]
        hidden_square = tl.zeros([BT], tl.float32)
        for f in range(0, F, BLOCK_F):
            k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
            z1 = product(k, tl.load(w1_ptr + f + tall), PRECISION) + tl.load(b1_ptr + f + tile)[None, :]
            tl.store(z1_ptr + f + flat, z1)
            hidden = gelu(z1)
            z2 += product(hidden, tl.load(w2_ptr + f * D + wide), PRECISION)
            carried2 += product(hidden, tl.load(d_w2_ptr + f * D + wide), PRECISION)
            if not NORMED:
                hidden_square += tl.sum(hidden * hidden, 1)
        k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
        q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
        target = load_tokens(v_ptr, at, H, TOKENS, D, BT, D) - k
        grad2, normal, scale, residual = inner_gradient(z2, target, gamma, beta, eps, D, NORMED)
        tl.store(grad2_ptr + whole, grad2)
        score = product(q, tl.trans(k), PRECISION) + 1.0
        tl.debug_barrier()

        # Pass 1b, for the bound: |G1|, before the first query reads G1.
        if not NORMED:
            grad1_square = tl.zeros([BT], tl.float32)
            for f in range(0, F, BLOCK_F):
                _, slope, _ = gelu_slopes(tl.load(z1_ptr + f + flat))
                grad1 = product(tl.load(grad2_ptr + whole), tl.trans(tl.load(w2_ptr + f * D + wide)), PRECISION) * slope
                grad1_square += tl.sum(grad1 * grad1, 1)
            key_square = tl.sum(k * k, 1) + 1.0
            error_square = tl.sum(grad2 * grad2, 1) + eps
            c = hidden_square + 1.0 + key_square * grad1_square / error_square
            share = bounded_share(token_weight, lr, c, causal)
            last_share = tl.sum(tl.where(tokens == TOKENS - 1, share, 0.0), 0)
        step = lr * (last_share * complete)
        reach = tl.where(causal, share[:, None] * lr[None, :], 0.0)
        mixing = reach * score

        # Pass 2: what the queries read.
        z2_q = tl.zeros([BT, D], tl.float32) + b2[None, :]
        overlap = tl.zeros([BT, BT], tl.float32) + 1.0
        for f in range(0, F, BLOCK_F):
            q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
            grad2 = tl.load(grad2_ptr + whole)
            w2 = tl.load(w2_ptr + f * D + wide)
            hidden, slope, _ = gelu_slopes(tl.load(z1_ptr + f + flat))
            back1 = product(grad2, tl.trans(w2), PRECISION)
            tl.store(back1_ptr + f + flat, back1)
            z1_q = product(q, tl.load(w1_ptr + f + tall), PRECISION) + tl.load(b1_ptr + f + tile)[None, :]
            z1_q -= product(mixing, back1 * slope, PRECISION)
            tl.store(z1_q_ptr + f + flat, z1_q)
            hidden_q = gelu(z1_q)
            overlap += product(hidden_q, tl.trans(hidden), PRECISION)
            z2_q += product(hidden_q, w2, PRECISION)
        grad2 = tl.load(grad2_ptr + whole)
        mixing2 = reach * overlap
        z2_q -= product(mixing2, grad2, PRECISION)
        normal_q, scale_q = normalize(z2_q, eps, D)
        d_out = load_tokens(d_out_ptr, at, H, TOKENS, D, BT, D)
        d_gamma += tl.sum(d_out * normal_q, 0)
        d_beta += tl.sum(d_out, 0)
        d_z2_q = normalize_backward(d_out * gamma[None, :], normal_q, scale_q, D)
        tl.store(d_z2_q_ptr + whole, d_z2_q)
        d_mixing2 = -product(d_z2_q, tl.trans(grad2), PRECISION)
        d_overlap = d_mixing2 * reach
        d_reach = d_mixing2 * overlap
        d_grad2 = -product(tl.trans(mixing2), d_z2_q, PRECISION) - step[:, None] * carried2
        gain = tl.sum(carried2 * grad2, 1)
        tl.debug_barrier()

        # Pass 3: back through the queries' first layer and through G1 = (G2 W2^T) * gelu'.
        d_q = d_out
        d_mixing = tl.zeros([BT, BT], tl.float32)
        pulled = tl.zeros([BT, D], tl.float32)
        returned = tl.zeros([BT, D], tl.float32)  # for the bound, half the gradient of |G1|^2 to G2
        for f in range(0, F, BLOCK_F):
            k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
            d_z2_q = tl.load(d_z2_q_ptr + whole)
            w2 = tl.load(w2_ptr + f * D + wide)
            d_w1 = tl.load(d_w1_ptr + f + tall)
            hidden, slope, _ = gelu_slopes(tl.load(z1_ptr + f + flat))
            _, slope_q, _ = gelu_slopes(tl.load(z1_q_ptr + f + flat))
            grad1 = tl.load(back1_ptr + f + flat) * slope
            d_hidden_q = product(d_z2_q, tl.trans(w2), PRECISION) + product(d_overlap, hidden, PRECISION)
            d_z1_q = d_hidden_q * slope_q
            tl.store(d_z1_q_ptr + f + flat, d_z1_q)
            d_q += product(d_z1_q, tl.trans(tl.load(w1_ptr + f + tall)), PRECISION)
            d_mixing -= product(d_z1_q, tl.trans(grad1), PRECISION)
            carried1 = product(k, d_w1, PRECISION) + tl.load(d_b1_ptr + f + tile)[None, :]
            d_grad1 = -product(tl.trans(mixing), d_z1_q, PRECISION) - step[:, None] * carried1
            tl.store(d_grad1_ptr + f + flat, d_grad1)
            gain += tl.sum(carried1 * grad1, 1)
            pulled += product(grad1, tl.trans(d_w1), PRECISION)
            d_grad2 += product(d_grad1 * slope, w2, PRECISION)
            if not NORMED:
                returned += product(grad1 * slope, w2, PRECISION)
        k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
        q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
        grad2 = tl.load(grad2_ptr + whole)
        d_score = d_mixing * reach
        d_reach = tl.where(causal, d_reach + d_mixing * score, 0.0)
        gain = complete * gain
        d_lr = tl.sum(d_reach * share[:, None], 0) - last_share * gain
        d_share = tl.sum(d_reach * lr[None, :], 1) - tl.where(tokens == TOKENS - 1, tl.sum(lr * gain, 0), 0.0)
        if not NORMED:
            d_share, g_lr, d_c = bounded_share_backward(d_share, token_weight, lr, c, causal)
            d_lr += g_lr
            ratio = grad1_square / error_square
            pull = 2.0 * d_c * key_square / error_square  # c = |X2|^2 + 1 + key_square ratio
            d_grad2 += pull[:, None] * (returned - ratio[:, None] * grad2)
        d_token_weight += d_share
        d_q += product(d_score, k, PRECISION)
        d_z2, d_residual, g_gamma, g_beta = inner_gradient_backward(d_grad2, grad2, normal, scale, residual, gamma, D, NORMED)
        tl.store(d_z2_ptr + whole, d_z2)
        d_gamma += g_gamma
        d_beta += g_beta
        d_k = d_residual + product(tl.trans(d_score), q, PRECISION) - step[:, None] * pulled
        if not NORMED:
            d_k += (2.0 * d_c * ratio)[:, None] * k
        store_tokens(d_q_ptr, d_q, at, H, TOKENS, D, BT, D)
        store_tokens(d_v_ptr, -d_residual, at, H, TOKENS, D, BT, D)
        tl.store(d_lr_ptr + at + tokens * H, d_lr, mask=tokens < TOKENS)
        tl.debug_barrier()

        # Pass 4: back through the keys' first layer, and the gradients to the weights.
        for f in range(0, F, BLOCK_F):
            k = load_tokens(k_ptr, at, H, TOKENS, D, BT, D)
            q = load_tokens(q_ptr, at, H, TOKENS, D, BT, D)
            d_z2_q = tl.load(d_z2_q_ptr + whole)
            d_z2 = tl.load(d_z2_ptr + whole)
            grad2 = tl.load(grad2_ptr + whole)
            w2 = tl.load(w2_ptr + f * D + wide)
            d_w2 = tl.load(d_w2_ptr + f * D + wide)
            hidden, slope, curve = gelu_slopes(tl.load(z1_ptr + f + flat))
            hidden_q = gelu(tl.load(z1_q_ptr + f + flat))
            d_z1_q = tl.load(d_z1_q_ptr + f + flat)
            d_grad1 = tl.load(d_grad1_ptr + f + flat)
            d_hidden = product(tl.trans(d_overlap), hidden_q, PRECISION)
            if not NORMED:
                d_grad1 += pull[:, None] * tl.load(back1_ptr + f + flat) * slope
                d_hidden += 2.0 * d_c[:, None] * hidden
            d_hidden += product(d_z2, tl.trans(w2), PRECISION)
            d_hidden -= step[:, None] * product(grad2, tl.trans(d_w2), PRECISION)
            d_z1 = d_grad1 * tl.load(back1_ptr + f + flat) * curve + d_hidden * slope
            d_k += product(d_z1, tl.trans(tl.load(w1_ptr + f + tall)), PRECISION)
            d_w1 = tl.load(d_w1_ptr + f + tall)
            d_w1 += product(tl.trans(q), d_z1_q, PRECISION) + product(tl.trans(k), d_z1, PRECISION)
            d_b1 = tl.load(d_b1_ptr + f + tile) + tl.sum(d_z1_q + d_z1, 0)
            d_w2 += product(tl.trans(hidden_q), d_z2_q, PRECISION)
            d_w2 += product(tl.trans(d_grad1 * slope), grad2, PRECISION)
            d_w2 += product(tl.trans(hidden), d_z2, PRECISION)
            tl.debug_barrier()
            tl.store(d_w1_ptr + f + tall, d_w1)
            tl.store(d_b1_ptr + f + tile, d_b1)
            tl.store(d_w2_ptr + f * D + wide, d_w2)
        store_tokens(d_k_ptr, d_k, at, H, TOKENS, D, BT, D)
        d_b2 += tl.sum(tl.load(d_z2_q_ptr + whole) + tl.load(d_z2_ptr + whole), 0)
        tl.debug_barrier()
    tl.store(d_b2_ptr + row * D + features, d_b2)
    add_to(d_token_weight_ptr + row * TOKENS, d_token_weight, TOKENS, BT)
    add_to(d_norm_weight_ptr + row * D, d_gamma, D, D)
    add_to(d_norm_bias_ptr + row * D, d_beta, D, D)

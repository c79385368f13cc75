"""Triton programs of local attention: forward, gradients of queries and position terms, gradients of keys and values.

A program works on rows, each one query (or key) of one head: a tile of BY x BX positions by BH heads, heads fastest.
Tensors are read through their strides, (batch, row, column, head, channel), so that maps need no copy. All sums run in
ACC, float32 or float64. Nothing is added atomically: results do not depend on the order in which programs run.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
REFLECT = tl.constexpr(0)
ZERO = tl.constexpr(1)
MASK = tl.constexpr(2)


@triton.jit
def _tile(count_y, count_x, heads, BY: tl.constexpr, BX: tl.constexpr, BH: tl.constexpr):
    """(batch, row, column, head, whether it is there, number of the tile) of each row of this program."""
    tiles_x = (count_x + BX - 1) // BX
    tiles = tiles_x * ((count_y + BY - 1) // BY)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tl.arange(0, BY * BX * BH)
    head = row % BH + tl.program_id(1) * BH
    y = (tile // tiles_x) * BY + row // (BH * BX)
    x = (tile % tiles_x) * BX + (row // BH) % BX
    return batch, y, x, head, (y < count_y) & (x < count_x) & (head < heads)


@triton.jit
def _reflected(at, size):
    """A position on an endless axis folded into 0..size-1 by mirrors at both ends."""
    period = tl.maximum(2 * (size - 1), 1)
    folded = ((at % period) + period) % period
    return tl.minimum(tl.minimum(folded, period - folded), size - 1)


@triton.jit
def _key(at_y, at_x, there, height, width, BORDER: tl.constexpr):
    """(row, column, whether to load it, whether it takes part) of the key at a position that may be off the map."""
    real = there
    counted = there
    if BORDER == REFLECT:
        at_y = _reflected(at_y, height)
        at_x = _reflected(at_x, width)
    else:
        real = there & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        if BORDER == MASK:
            counted = real
    return at_y, at_x, real, counted


@triton.jit
def _load(
    pointer, batch, y, x, head, there, sb, sy, sx, sh, sd, WIDTH: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr
):
    """Rows (rows, PAD) of a tensor, zero where not there."""
    channel = tl.arange(0, PAD)
    place = y * sy + x * sx + head * sh
    mask = there[:, None] & (channel < WIDTH)[None, :]
    return tl.load(pointer + batch * sb + place[:, None] + channel[None, :] * sd, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store(pointer, value, batch, y, x, head, there, sb, sy, sx, sh, sd, WIDTH: tl.constexpr, PAD: tl.constexpr):
    channel = tl.arange(0, PAD)
    place = y * sy + x * sx + head * sh
    mask = there[:, None] & (channel < WIDTH)[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + batch * sb + place[:, None] + channel[None, :] * sd, value, mask=mask)


@triton.jit
def _relative(
    rows,
    columns,
    head,
    there,
    a,
    b,
    sr,
    sc,
    KH: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """rows[head, :, a] + columns[head, :, b] for each program row: (rows, DP). Tables are contiguous."""
    channel = tl.arange(0, DP)
    mask = there[:, None] & (channel < D)[None, :]
    total = tl.zeros((head.shape[0], DP), ACC)
    if ROWS:
        total += tl.load(rows + head[:, None] * sr + channel[None, :] * KH + a, mask=mask, other=0.0).to(ACC)
    if COLUMNS:
        total += tl.load(columns + head[:, None] * sc + channel[None, :] * KW + b, mask=mask, other=0.0).to(ACC)
    return total


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    rows,
    columns,
    bias,
    out,
    lse,
    qb,
    qy,
    qx,
    qh,
    qd,
    kb,
    ky,
    kx,
    kh,
    kd,
    vb,
    vy,
    vx,
    vh,
    vd,
    ob,
    oy,
    ox,
    oh,
    od,
    sr,
    sc,
    si,
    heads,
    count_y,
    count_x,
    height,
    width,
    first_y,
    first_x,
    scale,
    stride_y: tl.constexpr,
    stride_x: tl.constexpr,
    dilation_y: tl.constexpr,
    dilation_x: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    VP: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BH: tl.constexpr,
    BORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """out and lse (natural logarithm of the softmax's denominator, (B, Ho, Wo, N)), by an online softmax over taps."""
    batch, y, x, head, there = _tile(count_y, count_x, heads, BY, BX, BH)
    query = _load(q, batch, y, x, head, there, qb, qy, qx, qh, qd, D, DP, ACC) * (scale * LOG2E)
    highest = tl.full((BY * BX * BH,), float("-inf"), ACC)
    total = tl.zeros((BY * BX * BH,), ACC)
    summed = tl.zeros((BY * BX * BH, VP), ACC)
    for a in range(KH):
        for b in range(KW):
            at_y = first_y + y * stride_y + a * dilation_y
            at_x = first_x + x * stride_x + b * dilation_x
            key_y, key_x, real, counted = _key(at_y, at_x, there, height, width, BORDER)
            key = _load(k, batch, key_y, key_x, head, real, kb, ky, kx, kh, kd, D, DP, ACC)
            if ROWS or COLUMNS:
                key += _relative(rows, columns, head, there, a, b, sr, sc, KH, KW, D, DP, ROWS, COLUMNS, ACC)
            logit = tl.sum(query * key, 1)
            if BIAS:
                logit += tl.load(bias + head * si + (a * KW + b), mask=there, other=0.0).to(ACC) * LOG2E
            logit = tl.where(counted, logit, float("-inf"))
            new = tl.maximum(highest, logit)
            steady = tl.where(new == float("-inf"), 0.0, new)  # no key yet: not -inf - -inf
            fade = tl.exp2(highest - steady)
            weight = tl.exp2(logit - steady)
            value = _load(v, batch, key_y, key_x, head, real, vb, vy, vx, vh, vd, DV, VP, ACC)
            summed = summed * fade[:, None] + weight[:, None] * value
            total = total * fade + weight
            highest = new
    safe = tl.where(total == 0.0, 1.0, total)
    _store(out, summed / safe[:, None], batch, y, x, head, there, ob, oy, ox, oh, od, DV, VP)
    at = ((batch * count_y + y) * count_x + x) * heads + head
    tl.store(lse + at, tl.where(total == 0.0, 0.0, highest + tl.log2(safe)) / LOG2E, mask=there)


@triton.jit
def query_kernel(
    grad,
    q,
    k,
    v,
    rows,
    columns,
    bias,
    out,
    lse,
    delta,
    dq,
    partial,
    gb,
    gy,
    gx,
    gh,
    gd,
    qb,
    qy,
    qx,
    qh,
    qd,
    kb,
    ky,
    kx,
    kh,
    kd,
    vb,
    vy,
    vx,
    vh,
    vd,
    ob,
    oy,
    ox,
    oh,
    od,
    dqb,
    dqy,
    dqx,
    dqh,
    dqd,
    sr,
    sc,
    si,
    heads,
    count_y,
    count_x,
    height,
    width,
    first_y,
    first_x,
    scale,
    stride_y: tl.constexpr,
    stride_x: tl.constexpr,
    dilation_y: tl.constexpr,
    dilation_x: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    VP: tl.constexpr,
    WP: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BH: tl.constexpr,
    BORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq, delta = sum of grad * out, and this tile's share of the gradients of rows, columns and bias.

    partial is (tiles, N, (KH + KW) D + KH KW): for each head drows (KH, D), dcolumns (KW, D), dbias (KH KW).
    """
    batch, y, x, head, there = _tile(count_y, count_x, heads, BY, BX, BH)
    query = _load(q, batch, y, x, head, there, qb, qy, qx, qh, qd, D, DP, ACC)
    wanted = _load(grad, batch, y, x, head, there, gb, gy, gx, gh, gd, DV, VP, ACC)
    shift = tl.sum(wanted * _load(out, batch, y, x, head, there, ob, oy, ox, oh, od, DV, VP, ACC), 1)
    at = ((batch * count_y + y) * count_x + x) * heads + head
    tl.store(delta + at, shift, mask=there)
    level = tl.load(lse + at, mask=there, other=0.0) * LOG2E
    to_query = tl.zeros((BY * BX * BH, DP), ACC)
    by_column = tl.zeros((BY * BX * BH, WP), ACC)
    share = (KH + KW) * D + KH * KW
    one_head = tl.program_id(1) * BH + tl.arange(0, BH)
    mine = partial + (tl.program_id(0).to(tl.int64) * heads + one_head) * share
    channel = tl.arange(0, DP)
    for a in range(KH):
        by_row = tl.zeros((BY * BX * BH,), ACC)
        for b in range(KW):
            at_y = first_y + y * stride_y + a * dilation_y
            at_x = first_x + x * stride_x + b * dilation_x
            key_y, key_x, real, counted = _key(at_y, at_x, there, height, width, BORDER)
            key = _load(k, batch, key_y, key_x, head, real, kb, ky, kx, kh, kd, D, DP, ACC)
            if ROWS or COLUMNS:
                key += _relative(rows, columns, head, there, a, b, sr, sc, KH, KW, D, DP, ROWS, COLUMNS, ACC)
            logit = tl.sum(query * key, 1) * (scale * LOG2E)
            if BIAS:
                logit += tl.load(bias + head * si + (a * KW + b), mask=there, other=0.0).to(ACC) * LOG2E
            weight = tl.where(counted, tl.exp2(logit - level), 0.0)
            value = _load(v, batch, key_y, key_x, head, real, vb, vy, vx, vh, vd, DV, VP, ACC)
            to_logit = weight * (tl.sum(wanted * value, 1) - shift)
            to_query += to_logit[:, None] * key
            if BIAS:
                one = tl.sum(tl.reshape(to_logit, (BY * BX, BH)), 0)
                tl.store(mine + ((KH + KW) * D + a * KW + b), one, mask=one_head < heads)
            if ROWS:
                by_row += to_logit
            if COLUMNS:
                by_column += tl.where((tl.arange(0, WP) == b)[None, :], to_logit[:, None], 0.0)
        if ROWS:
            one = tl.sum(tl.reshape(by_row[:, None] * query, (BY * BX, BH, DP)), 0) * scale
            mask = (one_head < heads)[:, None] & (channel < D)[None, :]
            tl.store(mine[:, None] + (a * D + channel)[None, :], one, mask=mask)
    if COLUMNS:
        for b in range(KW):
            chosen = tl.sum(tl.where((tl.arange(0, WP) == b)[None, :], by_column, 0.0), 1)
            one = tl.sum(tl.reshape(chosen[:, None] * query, (BY * BX, BH, DP)), 0) * scale
            mask = (one_head < heads)[:, None] & (channel < D)[None, :]
            tl.store(mine[:, None] + ((KH + b) * D + channel)[None, :], one, mask=mask)
    _store(dq, to_query * scale, batch, y, x, head, there, dqb, dqy, dqx, dqh, dqd, D, DP)


@triton.jit
def _image(at, copy, low, size, BORDER: tl.constexpr):
    """(position of a mirror image of a key on the endless axis, whether it is not another image's).

    Images 2 m and 2 m + 1 are those in the m-th period from `low` on: shifted, and mirrored.
    """
    own = at >= 0
    if BORDER == REFLECT:
        turn = (low + copy // 2) * tl.maximum(2 * (size - 1), 1)
        shifted = copy % 2 == 0
        own = shifted | ((at > 0) & (at < size - 1))  # the outermost keys lie on the mirrors: each is its own image
        at = tl.where(shifted, turn + at, turn - at)
    return at, own


@triton.jit
def key_kernel(
    grad,
    q,
    k,
    v,
    rows,
    columns,
    bias,
    lse,
    delta,
    dk,
    dv,
    gb,
    gy,
    gx,
    gh,
    gd,
    qb,
    qy,
    qx,
    qh,
    qd,
    kb,
    ky,
    kx,
    kh,
    kd,
    vb,
    vy,
    vx,
    vh,
    vd,
    dkb,
    dky,
    dkx,
    dkh,
    dkd,
    dvb,
    dvy,
    dvx,
    dvh,
    dvd,
    sr,
    sc,
    si,
    heads,
    count_y,
    count_x,
    height,
    width,
    first_y,
    first_x,
    scale,
    low_y,
    images_y,
    low_x,
    images_x,
    stride_y: tl.constexpr,
    stride_x: tl.constexpr,
    dilation_y: tl.constexpr,
    dilation_x: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    VP: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BH: tl.constexpr,
    BORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk and dv: each key gathers from the queries whose windows meet it, or (border reflect) one of its images.

    images_y, images_x: how many images can be met along each axis, in the periods from low_y and low_x on.
    """
    batch, y, x, head, there = _tile(height, width, heads, BY, BX, BH)
    key = _load(k, batch, y, x, head, there, kb, ky, kx, kh, kd, D, DP, ACC)
    value = _load(v, batch, y, x, head, there, vb, vy, vx, vh, vd, DV, VP, ACC)
    to_key = tl.zeros((BY * BX * BH, DP), ACC)
    to_value = tl.zeros((BY * BX * BH, VP), ACC)
    last_y = first_y + (count_y - 1) * stride_y + (KH - 1) * dilation_y
    last_x = first_x + (count_x - 1) * stride_x + (KW - 1) * dilation_x
    for copy_y in range(images_y):
        image_y, own_y = _image(y, copy_y, low_y, height, BORDER)
        for copy_x in range(images_x):
            image_x, own_x = _image(x, copy_x, low_x, width, BORDER)
            met = there & own_y & own_x & (image_y >= first_y) & (image_y <= last_y)
            met = met & (image_x >= first_x) & (image_x <= last_x)
            if tl.max(met.to(tl.int32), 0) > 0:  # most tiles meet only the keys themselves, and no mirror image
                for a in range(KH):
                    for b in range(KW):
                        up = image_y - first_y - a * dilation_y
                        left = image_x - first_x - b * dilation_x
                        sees = met & (up >= 0) & (left >= 0) & (up % stride_y == 0) & (left % stride_x == 0)
                        up, left = up // stride_y, left // stride_x
                        sees = sees & (up < count_y) & (left < count_x)
                        query = _load(q, batch, up, left, head, sees, qb, qy, qx, qh, qd, D, DP, ACC)
                        wanted = _load(grad, batch, up, left, head, sees, gb, gy, gx, gh, gd, DV, VP, ACC)
                        at = ((batch * count_y + up) * count_x + left) * heads + head
                        level = tl.load(lse + at, mask=sees, other=0.0) * LOG2E
                        shift = tl.load(delta + at, mask=sees, other=0.0)
                        moved = key
                        if ROWS or COLUMNS:
                            moved += _relative(
                                rows, columns, head, there, a, b, sr, sc, KH, KW, D, DP, ROWS, COLUMNS, ACC
                            )
                        logit = tl.sum(query * moved, 1) * (scale * LOG2E)
                        if BIAS:
                            logit += tl.load(bias + head * si + (a * KW + b), mask=there, other=0.0).to(ACC) * LOG2E
                        weight = tl.where(sees, tl.exp2(logit - level), 0.0)
                        to_value += weight[:, None] * wanted
                        to_logit = weight * (tl.sum(wanted * value, 1) - shift)
                        to_key += to_logit[:, None] * query
    _store(dk, to_key * scale, batch, y, x, head, there, dkb, dky, dkx, dkh, dkd, D, DP)
    _store(dv, to_value, batch, y, x, head, there, dvb, dvy, dvx, dvh, dvd, DV, VP)

"""Local attention as fused Triton kernels, forward and backward: no score ever reaches the GPU's memory.

The idea: one program computes one tile of queries. It walks over the keys that any of them can see (the tile's "halo"),
a block at a time, and keeps a running softmax ("online softmax": Milakov & Gimelshein, arXiv 1805.02867;
FlashAttention, arXiv 2205.14135). For the backward pass it stores a single number per query, the logarithm of its sum
of exponentials. The backward pass computes the scores again, twice: by tiles of queries for dq, and by tiles of keys
for dk and dv. So every sum is formed by one program, in one order: there are no atomics, and results repeat to the bit.

All kinds of keys are treated alike. The query's own grid is a coarse grid at ratio 1. A text is a grid of a single row:
every query is centred on its first key, and its window is as long as the row.

Mirrors: the CUDA operator ``localAttention`` that the official code installs separately; that operator writes the
scores to memory, and handles one kind of keys at a time.

Shapes: ``B`` batch, ``T`` query tokens, ``N`` heads, ``H`` head size; in a kernel, ``Q`` queries and ``K`` keys of a
block. Tokens come before heads, as the projections give them, and nothing is permuted.

``minicogview.local_attention`` is the function to call: it checks the arguments. Without a GPU the kernels run, slowly,
in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # e ** x = 2 ** (x * LOG2E): on a GPU, exp2 is one instruction

# The geometry of one kind of keys is a tuple of constants. These are the positions in it.
HEIGHT, WIDTH = tl.constexpr(0), tl.constexpr(1)  # of the keys' grid
RATIO_Y, RATIO_X = tl.constexpr(2), tl.constexpr(3)  # query cells per key cell
UP, LEFT, DOWN, RIGHT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)  # the window's reach
CAUSAL, BIAS, GROUP = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)  # GROUP: batch rows that share keys


# --- geometry: which tokens a program computes, and which keys a query sees


@triton.jit
def place_of(
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Tile, batch row and head of this program. The tiles of one head run one after another, and share the cache."""
    tiles: tl.constexpr = ((ROWS + TILE_Y - 1) // TILE_Y) * ((COLUMNS + TILE_X - 1) // TILE_X)
    program = tl.program_id(0)
    row = (program // tiles // HEADS).to(tl.int64)  # a large batch has more than 2 ** 31 numbers
    return program % tiles, row, program // tiles % HEADS


@triton.jit
def tile_cells(tile, width, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Corner of a tile in a grid of this width, then rows and columns of its cells, (TILE_Y * TILE_X,) each."""
    across = tl.cdiv(width, TILE_X)
    y0, x0 = tile // across * TILE_Y, tile % across * TILE_X
    i = tl.arange(0, TILE_Y * TILE_X)
    return y0, x0, y0 + i // TILE_X, x0 + i % TILE_X


@triton.jit
def sees(y, x, key_y, key_x, GEO: tl.constexpr):
    """Whether queries at (y, x) see keys at (key_y, key_x); shapes are broadcast."""
    dy, dx = key_y - y // GEO[RATIO_Y], key_x - x // GEO[RATIO_X]
    seen = (dy >= -GEO[UP]) & (dy <= GEO[DOWN]) & (dx >= -GEO[LEFT]) & (dx <= GEO[RIGHT])
    if GEO[CAUSAL]:
        seen = seen & ((dy < 0) | ((dy == 0) & (dx <= 0)))
    return seen


@triton.constexpr_function
def halo(tile: int, ratio: int, reach: int, size: int) -> int:
    """How many key cells the windows of a tile of queries cover along one axis; at most the grid's ``size``."""
    return min((tile + ratio - 2) // ratio + reach + 1, size)


@triton.jit
def rows_of(pointer, tokens, stride, HEAD_BLOCK: tl.constexpr):
    """Addresses (tokens, HEAD_BLOCK) of the tokens' numbers in one head."""
    return pointer + tokens[:, None] * stride + tl.arange(0, HEAD_BLOCK)[None, :]


@triton.jit
def inside(real, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr):
    """Which of those numbers exist, (tokens, HEAD_BLOCK): head sizes are padded to a power of two."""
    return real[:, None] & (tl.arange(0, HEAD_BLOCK) < HEAD)[None, :]


# --- forward


@triton.jit
def block_of_keys(
    start, q, y, x, y0, x0, k_at, v_at, bias_at, k_stride, v_stride, scale,
    GEO: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, KEYS: tl.constexpr,
    HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The halo's keys and values (K, H) from ``start`` on, and scores (Q, K): -inf for keys that a query cannot see."""
    halo_y: tl.constexpr = halo(TILE_Y, GEO[RATIO_Y], GEO[UP] + GEO[DOWN], GEO[HEIGHT])
    halo_x: tl.constexpr = halo(TILE_X, GEO[RATIO_X], GEO[LEFT] + GEO[RIGHT], GEO[WIDTH])
    first_y = tl.minimum(tl.maximum(y0 // GEO[RATIO_Y] - GEO[UP], 0), GEO[HEIGHT] - halo_y)  # moved in at a border
    first_x = tl.minimum(tl.maximum(x0 // GEO[RATIO_X] - GEO[LEFT], 0), GEO[WIDTH] - halo_x)
    j = start + tl.arange(0, KEYS)
    key_y, key_x, real = first_y + j // halo_x, first_x + j % halo_x, j < halo_y * halo_x
    tokens = key_y * GEO[WIDTH] + key_x
    there = inside(real, HEAD, HEAD_BLOCK)
    k = tl.load(rows_of(k_at, tokens, k_stride, HEAD_BLOCK), mask=there, other=0.0)
    v = tl.load(rows_of(v_at, tokens, v_stride, HEAD_BLOCK), mask=there, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if GEO[BIAS]:
        scores += tl.load(bias_at + tokens, mask=real, other=0.0)[None, :] * LOG2E
    seen = sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], GEO) & real[None, :]
    return k, v, tl.where(seen, scores, float("-inf"))


@triton.jit
def add_keys(
    q, y, x, y0, x0, peak, total, result, k_at, v_at, bias_at, k_stride, v_stride, scale,
    GEOS: tl.constexpr, KIND: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, KEYS: tl.constexpr,
    HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one kind of keys to the running softmax of a tile, ``KEYS`` at a time."""
    GEO: tl.constexpr = GEOS[KIND]  # looked up here: the caller's unrolled loop cannot assign a constant twice
    halo_y: tl.constexpr = halo(TILE_Y, GEO[RATIO_Y], GEO[UP] + GEO[DOWN], GEO[HEIGHT])
    halo_x: tl.constexpr = halo(TILE_X, GEO[RATIO_X], GEO[LEFT] + GEO[RIGHT], GEO[WIDTH])
    for start in range(0, halo_y * halo_x, KEYS):
        _, v, scores = block_of_keys(
            start, q, y, x, y0, x0, k_at, v_at, bias_at, k_stride, v_stride, scale,
            GEO, TILE_Y, TILE_X, KEYS, HEAD, HEAD_BLOCK, PRECISION,
        )  # fmt: skip
        # Update the peak, and rescale the sums so far to it. A query that has seen no key yet has a peak of -inf.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights, shrink = tl.exp2(scores - finite[:, None]), tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = new_peak
    return peak, total, result


@triton.jit
def forward(
    q_at, out_at, log_sum_at, q_row, q_stride, scale,
    k_at, v_at, bias_at, k_row, k_stride, v_row, v_stride,  # tuples, an entry for each kind of keys
    GRID_Y: tl.constexpr, GRID_X: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    GEOS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of queries, in one head of one picture, to all kinds of keys.

    Writes ``out`` (B, T, N, H) and ``log_sum`` (B, N, T): log2 of each query's sum of exponentials. It is +inf for a
    query that sees nothing, which makes its weights 0 in the backward pass.
    """
    tile, row, head = place_of(GRID_Y, GRID_X, TILE_Y, TILE_X, HEADS)
    n_tokens: tl.constexpr = GRID_Y * GRID_X
    y0, x0, y, x = tile_cells(tile, GRID_X, TILE_Y, TILE_X)
    real, tokens = (y < GRID_Y) & (x < GRID_X), y * GRID_X + x
    there = inside(real, HEAD, HEAD_BLOCK)
    q = tl.load(rows_of(q_at + row * q_row + head * HEAD, tokens, q_stride, HEAD_BLOCK), mask=there, other=0.0)
    peak = tl.full([TILE_Y * TILE_X], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Y * TILE_X], tl.float32)
    result = tl.zeros([TILE_Y * TILE_X, HEAD_BLOCK], tl.float32)
    for i in tl.static_range(len(GEOS)):
        group = row // GEOS[i][GROUP]
        peak, total, result = add_keys(
            q, y, x, y0, x0, peak, total, result, k_at[i] + group * k_row[i] + head * HEAD,
            v_at[i] + group * v_row[i] + head * HEAD, bias_at[i] + group * GEOS[i][HEIGHT] * GEOS[i][WIDTH],
            k_stride[i], v_stride[i], scale, GEOS, i, TILE_Y, TILE_X, KEYS, HEAD, HEAD_BLOCK, PRECISION,
        )  # fmt: skip
    some = tl.where(total == 0, 1.0, total)
    out = result / some[:, None]
    start = out_at + row * (n_tokens * HEADS * HEAD) + head * HEAD
    tl.store(rows_of(start, tokens, HEADS * HEAD, HEAD_BLOCK), out.to(out_at.dtype.element_ty), mask=there)
    log_sum = tl.where(total == 0, float("inf"), peak + tl.log2(some))
    tl.store(log_sum_at + (row * HEADS + head) * n_tokens + tokens, log_sum, mask=real)


# --- backward


@triton.jit
def add_query_gradient(
    q, d_out, log_sum, delta, y, x, y0, x0, d_q, k_at, v_at, bias_at, k_stride, v_stride, scale,
    GEOS: tl.constexpr, KIND: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, KEYS: tl.constexpr,
    HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one kind of keys contributes to dq of a tile, in the same loop as ``add_keys``."""
    GEO: tl.constexpr = GEOS[KIND]
    halo_y: tl.constexpr = halo(TILE_Y, GEO[RATIO_Y], GEO[UP] + GEO[DOWN], GEO[HEIGHT])
    halo_x: tl.constexpr = halo(TILE_X, GEO[RATIO_X], GEO[LEFT] + GEO[RIGHT], GEO[WIDTH])
    for start in range(0, halo_y * halo_x, KEYS):
        k, v, scores = block_of_keys(
            start, q, y, x, y0, x0, k_at, v_at, bias_at, k_stride, v_stride, scale,
            GEO, TILE_Y, TILE_X, KEYS, HEAD, HEAD_BLOCK, PRECISION,
        )  # fmt: skip
        weights = tl.exp2(scores - log_sum[:, None])
        d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    return d_q


@triton.jit
def backward_queries(
    q_at, out_at, log_sum_at, d_out_at, d_q_at, delta_at, q_row, q_stride, scale,
    k_at, v_at, bias_at, k_row, k_stride, v_row, v_stride,  # tuples, an entry for each kind of keys
    GRID_Y: tl.constexpr, GRID_X: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    GEOS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq (B, T, N, H) of one tile, and for ``backward_keys`` ``delta`` (B, N, T), the sum of ``out * d_out``.

    With weights p = softmax(s) and out = p v, ds = p * (d_out v' - delta): delta is the mean of d_out v' under p, which
    the gradient of softmax subtracts.
    """
    tile, row, head = place_of(GRID_Y, GRID_X, TILE_Y, TILE_X, HEADS)
    n_tokens: tl.constexpr = GRID_Y * GRID_X
    y0, x0, y, x = tile_cells(tile, GRID_X, TILE_Y, TILE_X)
    real, tokens = (y < GRID_Y) & (x < GRID_X), y * GRID_X + x
    there, per_query = inside(real, HEAD, HEAD_BLOCK), (row * HEADS + head) * n_tokens + tokens
    q = tl.load(rows_of(q_at + row * q_row + head * HEAD, tokens, q_stride, HEAD_BLOCK), mask=there, other=0.0)
    start = row * (n_tokens * HEADS * HEAD) + head * HEAD
    d_out = tl.load(rows_of(d_out_at + start, tokens, HEADS * HEAD, HEAD_BLOCK), mask=there, other=0.0)
    out = tl.load(rows_of(out_at + start, tokens, HEADS * HEAD, HEAD_BLOCK), mask=there, other=0.0)
    log_sum = tl.load(log_sum_at + per_query, mask=real, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_at + per_query, delta, mask=real)
    d_q = tl.zeros([TILE_Y * TILE_X, HEAD_BLOCK], tl.float32)
    for i in tl.static_range(len(GEOS)):
        group = row // GEOS[i][GROUP]
        d_q = add_query_gradient(
            q, d_out, log_sum, delta, y, x, y0, x0, d_q, k_at[i] + group * k_row[i] + head * HEAD,
            v_at[i] + group * v_row[i] + head * HEAD, bias_at[i] + group * GEOS[i][HEIGHT] * GEOS[i][WIDTH],
            k_stride[i], v_stride[i], scale, GEOS, i, TILE_Y, TILE_X, KEYS, HEAD, HEAD_BLOCK, PRECISION,
        )  # fmt: skip
    d_q = (d_q * scale).to(d_q_at.dtype.element_ty)
    tl.store(rows_of(d_q_at + start, tokens, HEADS * HEAD, HEAD_BLOCK), d_q, mask=there)


@triton.jit
def backward_keys(
    q_at, log_sum_at, d_out_at, delta_at, q_row, q_stride, scale,
    k_at, v_at, bias_at, k_row, k_stride, v_row, v_stride, d_k_at, d_v_at,
    GRID_Y: tl.constexpr, GRID_X: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    GEO: tl.constexpr, PRECISION: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """dk and dv (b, n, N, H) of one tile of keys of one kind, in a loop over the queries that see any of them."""
    tile, group, head = place_of(GEO[HEIGHT], GEO[WIDTH], TILE_Y, TILE_X, HEADS)
    n_tokens: tl.constexpr = GRID_Y * GRID_X
    n_keys: tl.constexpr = GEO[HEIGHT] * GEO[WIDTH]
    y0, x0, key_y, key_x = tile_cells(tile, GEO[WIDTH], TILE_Y, TILE_X)
    real_key, keys = (key_y < GEO[HEIGHT]) & (key_x < GEO[WIDTH]), key_y * GEO[WIDTH] + key_x
    key_there = inside(real_key, HEAD, HEAD_BLOCK)
    k_from, v_from = k_at + group * k_row + head * HEAD, v_at + group * v_row + head * HEAD
    k = tl.load(rows_of(k_from, keys, k_stride, HEAD_BLOCK), mask=key_there, other=0.0)
    v = tl.load(rows_of(v_from, keys, v_stride, HEAD_BLOCK), mask=key_there, other=0.0)
    if GEO[BIAS]:
        bias = tl.load(bias_at + group * n_keys + keys, mask=real_key, other=0.0)[:, None] * LOG2E
    # A key is seen by the queries whose centres lie in the mirrored window. Find the centres, then their query cells.
    centres_y: tl.constexpr = halo(TILE_Y, 1, GEO[UP] + GEO[DOWN], GRID_Y // GEO[RATIO_Y])
    centres_x: tl.constexpr = halo(TILE_X, 1, GEO[LEFT] + GEO[RIGHT], GRID_X // GEO[RATIO_X])
    first_y = tl.minimum(tl.maximum(y0 - GEO[DOWN], 0), GRID_Y // GEO[RATIO_Y] - centres_y) * GEO[RATIO_Y]
    first_x = tl.minimum(tl.maximum(x0 - GEO[RIGHT], 0), GRID_X // GEO[RATIO_X] - centres_x) * GEO[RATIO_X]
    width: tl.constexpr = centres_x * GEO[RATIO_X]
    n_queries: tl.constexpr = centres_y * GEO[RATIO_Y] * width
    d_k = tl.zeros([TILE_Y * TILE_X, HEAD_BLOCK], tl.float32)
    d_v = tl.zeros([TILE_Y * TILE_X, HEAD_BLOCK], tl.float32)
    for member in range(GEO[GROUP]):  # batch rows that share these keys
        row = group * GEO[GROUP] + member
        q_from = q_at + row * q_row + head * HEAD
        d_out_from = d_out_at + row * (n_tokens * HEADS * HEAD) + head * HEAD
        per_query = (row * HEADS + head) * n_tokens
        for start in range(0, n_queries, QUERIES):
            j = start + tl.arange(0, QUERIES)
            y, x, real = first_y + j // width, first_x + j % width, j < n_queries
            tokens = y * GRID_X + x
            there = inside(real, HEAD, HEAD_BLOCK)
            q = tl.load(rows_of(q_from, tokens, q_stride, HEAD_BLOCK), mask=there, other=0.0)
            d_out = tl.load(rows_of(d_out_from, tokens, HEADS * HEAD, HEAD_BLOCK), mask=there, other=0.0)
            log_sum = tl.load(log_sum_at + per_query + tokens, mask=real, other=float("inf"))
            delta = tl.load(delta_at + per_query + tokens, mask=real, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # (K, Q)
            if GEO[BIAS]:
                scores += bias
            seen = sees(y[None, :], x[None, :], key_y[:, None], key_x[:, None], GEO) & real[None, :]
            weights = tl.exp2(tl.where(seen, scores, float("-inf")) - log_sum[None, :])
            d_v += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
            d_scores = weights * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
            d_k += tl.dot(d_scores.to(q.dtype), q, input_precision=PRECISION)
    to = group * (n_keys * HEADS * HEAD) + head * HEAD
    d_k, d_v = (d_k * scale).to(d_k_at.dtype.element_ty), d_v.to(d_v_at.dtype.element_ty)
    tl.store(rows_of(d_k_at + to, keys, HEADS * HEAD, HEAD_BLOCK), d_k, mask=key_there)
    tl.store(rows_of(d_v_at + to, keys, HEADS * HEAD, HEAD_BLOCK), d_v, mask=key_there)

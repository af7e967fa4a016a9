"""What the kernels are made of: which keys a tile holds, who sees them, scores, online softmax.

A tile of rows holds rows of one row block (rows that share their lists), for `PACK` heads that
share everything: slot ``s`` is row ``s // PACK`` of head ``s % PACK``. Rows and keys are int32;
addresses are int64. A window without limit is `NO_LIMIT`, more than any distance.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_LIMIT = tl.constexpr(2**30)
HIGHEST = tl.constexpr(3.4028234663852886e38)  # of float32
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Arguments that change from call to call: kernels are not compiled anew for their divisors.
SIZES = (
    "num_kv_blocks", "block_rows", "block_width", "column_rows", "column_width", "active_width",
    "list_tiles", "num_rows", "num_pages", "pages_per_sequence", "seqlen_q", "seqlen_kv", "total_q",
    "total_kv", "num_row_blocks", "rows_per_block", "parts", "num_owners", "num_splits",
    "num_states", "num_split_tiles",
)  # fmt: skip


@triton.jit
def load_rows(ptr, offsets, live, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of `SIZE` elements at the int64 `offsets`, padded to `BLOCK`; 0 where not `live`."""
    columns = tl.arange(0, BLOCK)
    mask = live[:, None]
    if SIZE < BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    return tl.load(ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_part(ptr, offsets, live, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`BLOCK` columns of such rows, from number `first` on."""
    columns = first + tl.arange(0, BLOCK)
    mask = live[:, None] & (columns < SIZE)[None, :]
    return tl.load(ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_part(ptr, x, offsets, live, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_part`, in the dtype of `ptr`."""
    columns = first + tl.arange(0, BLOCK)
    mask = live[:, None] & (columns < SIZE)[None, :]
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets[:, None] + columns[None, :], x, mask=mask)


@triton.jit
def store_rows(ptr, x, offsets, live, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_rows`, in the dtype of `ptr`."""
    columns = tl.arange(0, BLOCK)
    mask = live[:, None]
    if SIZE < BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets[:, None] + columns[None, :], x, mask=mask)


@triton.jit
def key_offsets(j, live, stride, pages_ptr, stride_page, num_pages, PAGE_SIZE: tl.constexpr):
    """Where keys lie, in elements from the first row of their KV head; and which of them exist."""
    if pages_ptr is None:
        offsets = j.to(tl.int64) * stride
    else:
        page = tl.load(pages_ptr + j // PAGE_SIZE, mask=live, other=-1)
        live = live & (page >= 0) & (page < num_pages)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        offsets = page.to(tl.int64) * stride_page
        offsets += (j % PAGE_SIZE).to(tl.int64) * stride
    return offsets, live


@triton.jit
def load_keys(
    j, live, cache, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Rows `j` of k and v; `cache` says where they lie."""
    k_ptr, v_ptr, stride_kn, stride_vn, pages_ptr, stride_kp, stride_vp, num_pages = cache
    offsets, live_k = key_offsets(j, live, stride_kn, pages_ptr, stride_kp, num_pages, PAGE_SIZE)
    k = load_rows(k_ptr, offsets, live_k, HEAD_DIM, BLOCK_D)
    offsets, live_v = key_offsets(j, live, stride_vn, pages_ptr, stride_vp, num_pages, PAGE_SIZE)
    return k, load_rows(v_ptr, offsets, live_v, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def sequence(ends_ptr, batch, total):
    """Where a packed sequence begins and how long it is, within `total` whatever the ends say."""
    begin = tl.minimum(tl.maximum(tl.load(ends_ptr + batch), 0), total)
    end = tl.minimum(tl.maximum(tl.load(ends_ptr + batch + 1), begin), total)
    return begin.to(tl.int64), end - begin


@triton.jit
def locate(index, order_ptr, num_packs, num_row_blocks):
    """The pack of heads, counted over the batch, and the row block of a program: pack after pack,
    so that programs at work share keys in the cache, and the last rows first; or in the order of a
    tensor, which counts packs first.
    """
    if order_ptr is None:
        return index // num_row_blocks, num_row_blocks - 1 - index % num_row_blocks
    else:
        index = tl.load(order_ptr + index)
        return index % num_packs, num_row_blocks - 1 - index // num_packs


@triton.jit
def rows_of_tile(begin, end, part, BLOCK_M: tl.constexpr, PACK: tl.constexpr):
    """Of the rows `begin` to `end` those of a tile, the head of each within its pack, which of them
    exist, and the first and the last one (less than the first if there is none).
    """
    slots = part * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = begin + slots // PACK
    first = begin + part * BLOCK_M // PACK
    last = begin + (part * BLOCK_M + BLOCK_M - 1) // PACK
    return rows, slots % PACK, rows < end, first, tl.minimum(last, end - 1)


@triton.jit
def even_part(tiles, split, num_splits):
    """The first tile of one of `num_splits` even parts, and the one behind its last."""
    split = split.to(tl.int64)
    begin = (split * tiles // num_splits).to(tl.int32)
    return begin, ((split + 1) * tiles // num_splits).to(tl.int32)


@triton.jit
def load_window(window_ptr, head):
    """The window of a head, at most `NO_LIMIT`, which stands for -1."""
    window = tl.load(window_ptr + head)
    return tl.where((window < 0) | (window > NO_LIMIT), NO_LIMIT, window)


@triton.jit
def load_sink(sink_ptr, head):
    """The number of first keys that a head always sees, at least 0 whatever is there."""
    return tl.maximum(tl.load(sink_ptr + head), 0)


@triton.jit
def list_of_row(counts_ptr, indices_ptr, row, width):
    """The list of a row: its first entry's address, and its length, which untrusted counts cannot
    lead beyond the width.
    """
    count = tl.load(counts_ptr + row)
    return indices_ptr + row.to(tl.int64) * width, tl.minimum(tl.maximum(count, 0), width)


@triton.jit
def listed_keys(indices_ptr, count, slots, limit, BLOCK_SIZE: tl.constexpr):
    """Key number `slots` of a list of blocks (or of keys, with a block size of 1), and whether it
    is there.
    """
    entry = slots // BLOCK_SIZE
    index = tl.load(indices_ptr + entry, mask=entry < count, other=-1)
    live = (index >= 0) & (index < limit)
    return tl.where(live, index * BLOCK_SIZE + slots % BLOCK_SIZE, 0), live


@triton.jit
def in_list(indices_ptr, count, x, STEPS: tl.constexpr):
    """Whether each of `x` is in an ascending list of less than ``2**STEPS`` entries."""
    low = tl.zeros_like(x)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        less = tl.load(indices_ptr + middle, mask=low < high, other=0) < x
        less = less & (low < high)
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return tl.load(indices_ptr + low, mask=low < count, other=-1) == x


@triton.jit
def in_band(p, j, sink, window, IS_CAUSAL: tl.constexpr):
    """Whether rows at positions `p` see keys `j` through the sink or the window."""
    distance = p - j
    if not IS_CAUSAL:
        distance = tl.abs(distance)
    return (j < sink) | (distance < window)


@triton.jit
def visible(p, j, live, sink, window, IS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """The pairs that a tile accounts for: those of the band in a tile of the band, all others in a
    tile of a list, so that no pair counts twice.
    """
    seen = in_band(p, j, sink, window, IS_CAUSAL)
    if IS_BAND:
        seen = live & seen
    else:
        seen = live & (seen == 0)
    if IS_CAUSAL:
        seen = seen & (j <= p)
    return seen


@triton.jit
def band_of_rows(
    p_low, p_high, seqlen_kv, sink, window, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """The keys that rows at positions `p_low` to `p_high` see through the sink and the window, as
    two ranges ``[0, sink_end)`` and ``[window_begin, window_end)``; the number of tiles of the
    first, of both, and the end of all keys that any of the rows may see.
    """
    key_end = seqlen_kv
    window_end = tl.minimum(p_high + window, seqlen_kv)
    if IS_CAUSAL:
        key_end = tl.maximum(tl.minimum(p_high + 1, seqlen_kv), 0)
        window_end = key_end
    sink_end = tl.minimum(sink, key_end)
    window_begin = tl.maximum(p_low - window + 1, 0)
    window_end = tl.where(window == 0, window_begin, window_end)
    one_range = window_begin <= sink_end
    window_end = tl.where(one_range, tl.maximum(window_end, sink_end), window_end)
    window_begin = tl.where(one_range, 0, window_begin)
    sink_end = tl.where(one_range, 0, sink_end)
    sink_tiles = tl.cdiv(sink_end, BLOCK_N)
    band_tiles = sink_tiles + tl.cdiv(tl.maximum(window_end - window_begin, 0), BLOCK_N)
    return sink_end, window_begin, window_end, sink_tiles, band_tiles, key_end


@triton.jit
def all_visible(
    p_low, p_high, j_low, j_high, sink, window, IS_BAND: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """Whether `visible` holds for every row and key of two ranges, so that no mask is needed."""
    if IS_BAND:
        farthest = p_high - j_low if IS_CAUSAL else tl.maximum(p_high - j_low, j_high - p_low)
        everything = (j_high < sink) | (farthest < window)
    else:
        nearest = p_low - j_high if IS_CAUSAL else tl.maximum(p_low - j_high, j_low - p_high)
        everything = (j_low >= sink) & (nearest >= window)
    if IS_CAUSAL:
        everything = everything & (j_high <= p_low)
    return everything


@triton.jit
def tile_of_band(
    tile, band, p_low, p_high, sink, window, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """The keys of a tile of the walk over sink and window; which of them count, and which are to be
    loaded: all, since those behind the last one repeat it; and whether every row sees every key.
    """
    sink_end, window_begin, window_end, sink_tiles, _, _ = band
    in_sink = tile < sink_tiles
    first = tl.where(in_sink, tile * BLOCK_N, window_begin + (tile - sink_tiles) * BLOCK_N)
    end = tl.where(in_sink, sink_end, window_end)
    j = first + tl.arange(0, BLOCK_N)
    last = first + BLOCK_N - 1
    full = (last < end) & all_visible(p_low, p_high, first, last, sink, window, True, IS_CAUSAL)
    return tl.minimum(j, end - 1), j < end, tl.full([BLOCK_N], True, tl.int1), full


@triton.jit
def tile_of_list(
    tile, p_low, p_high, sink, window, key_end, indices_ptr, count, limit,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The same of a tile of the walk over a list of blocks or, with a block size of 1, of keys;
    `key_end` is positive.
    """
    slot = tile * BLOCK_N
    slots = tl.arange(0, BLOCK_N)
    first, exists = listed_keys(indices_ptr, count, slot, limit, BLOCK_SIZE)
    if BLOCK_SIZE % BLOCK_N == 0:
        exists = exists & (first < key_end)
        last = first + BLOCK_N - 1
        j = first + slots
        live = exists & (j < key_end)
        loaded = tl.full([BLOCK_N], False, tl.int1) | exists
        j = tl.minimum(j, key_end - 1)
    else:
        last, last_exists = listed_keys(indices_ptr, count, slot + BLOCK_N - 1, limit, BLOCK_SIZE)
        exists = exists & last_exists
        j, live = listed_keys(indices_ptr, count, slot + slots, limit, BLOCK_SIZE)
        live = live & (j < key_end)
        loaded = live
    full = exists & (last < key_end)
    full = full & all_visible(p_low, p_high, first, last, sink, window, False, IS_CAUSAL)
    return j, live, loaded, full


@triton.jit
def tile_of_columns(
    tile, p_low, p_high, sink, window, key_end, columns_ptr, num_columns, seqlen_kv, blocks_ptr,
    num_blocks,
    BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The same of a tile of the walk over columns; those that lie in listed blocks do not count."""
    j, live, loaded, full = tile_of_list(
        tile, p_low, p_high, sink, window, key_end, columns_ptr, num_columns, seqlen_kv, BLOCK_N, 1,
        IS_CAUSAL,
    )  # fmt: skip
    if blocks_ptr is not None:
        live = live & (in_list(blocks_ptr, num_blocks, j // BLOCK_KV, SEARCH_STEPS) == 0)
        full = full & (tl.min(live.to(tl.int32), 0) == 1)
        loaded = live
    return j, live, loaded, full


@triton.jit
def tanh(x):
    """Hyperbolic tangent to the last bits of float32, from what every target has."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    large = (1 - e) / (1 + e)
    large = tl.where(x < 0, -large, large)
    y = x * x
    series = tl.fma(y, 0.021869488, -0.053968254)
    series = tl.fma(y, tl.fma(y, series, 0.13333333), -0.33333333)
    return tl.where(tl.abs(x) < 0.25, tl.fma(x * y, series, x), large)


@triton.jit
def first_bias(bias_ptr, batch, head, bias_run, bias_batch, seqlen_kv):
    """Where the biases of keys begin for a head, or for a pack of heads, which share them."""
    offset = tl.full([], 0, tl.int64)
    if bias_ptr is not None:
        offset += (batch * bias_batch + head // bias_run).to(tl.int64) * seqlen_kv
    return offset


@triton.jit
def distances(pairs, KEY_AXIS: tl.constexpr):
    """How far apart rows and keys are, as float32, which rounds no distance of less than 2**24."""
    _, i, shift, j, _ = pairs
    p = tl.expand_dims(i + shift, KEY_AXIS)
    return tl.abs(p - tl.expand_dims(j, 1 - KEY_AXIS)).to(tl.float32)


@triton.jit
def scores(qk, pairs, rule, KEY_AXIS: tl.constexpr, PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """``scale * qk``, or ``softcap * tanh(scale * qk / softcap)``, and the tanh; or, if not
    `PRESCALED`, `qk` as it is, which `unit` makes a score: ``2**((x - y) * unit * LOG2E)`` is then
    right for `x` and `y` of any size, their difference being taken first.

    With biases, which need `PRESCALED`, the score is the sum of that, the key's bias, and minus the
    head's slope times the distance of row and key. `pairs` are ``(heads, i, shift, j, live)`` of
    rows at the positions ``i + shift`` and of keys, which of them exist; `KEY_AXIS` is the
    dimension of the keys.
    """
    scale, _, softcap, inverse_softcap, bias_ptr, slopes_ptr, bias_row = rule
    heads, _, _, j, live = pairs
    x = qk
    capped = qk
    if PRESCALED:
        x = scale * qk
    if SOFTCAP:
        capped = tanh(x * inverse_softcap)
        x = softcap * capped
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + bias_row + j, mask=live, other=0.0)
        x += tl.expand_dims(bias, 1 - KEY_AXIS)
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads)
        x -= tl.expand_dims(slopes, KEY_AXIS) * distances(pairs, KEY_AXIS)
    return x, capped


@triton.jit
def online_sum(m_i, l_i, x, floor, unit):
    """Of the scores `x` of more keys ``exp((x - m_i) * unit)``, what sums so far are multiplied by,
    and the state ``(m_i, l_i)`` of each row: the largest score, within float32, and the sum of
    these, which is inf if a score is, and NaN if one is.

    `floor` is `LOWEST` for rows that see any of the keys, else -inf: so `m_i` is -inf only for rows
    that have seen no key, not for those whose scores are all -inf.
    """
    m_new = tl.minimum(tl.maximum(m_i, tl.maximum(tl.max(x, 1), floor)), HIGHEST)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2((x - m_safe[:, None]) * (unit * LOG2E))
    alpha = tl.exp2((m_i - m_safe) * (unit * LOG2E))
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def finish(m_i, l_i, sink_logit, unit):
    """What turns the sums of a state into out, and lse, with the sink logit (or -inf) in the
    softmax denominator: 0 and -inf for rows that saw no key and have no sink.
    """
    empty = m_i == float("-inf")
    largest = tl.where(l_i == 0, LOWEST, tl.maximum(m_i * unit, LOWEST))
    top = tl.minimum(tl.maximum(largest, sink_logit), HIGHEST)
    alpha = tl.where(largest == top, 1.0, tl.exp2((largest - top) * LOG2E))
    total = l_i * alpha + tl.exp2((sink_logit - top) * LOG2E)
    factor = tl.where(total < float("inf"), alpha / total, float("nan"))
    return tl.where(empty, 0.0, factor), top + tl.log(total)


@triton.jit
def probabilities(x, lse, unit):
    """``exp(x * unit - lse)``, lse in base 2; rows without keys have lse inf."""
    return tl.exp2(x * (unit * LOG2E) - lse)


@triton.jit
def score_gradients(ds, capped, SOFTCAP: tl.constexpr):
    """The gradients of products, up to the scale, from those of scores."""
    if SOFTCAP:
        ds = ds * (1 - capped * capped)
    return ds

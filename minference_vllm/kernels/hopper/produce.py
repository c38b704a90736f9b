# SPDX-License-Identifier: Apache-2.0
"""The producer warpgroup: finds the rows of a tile's kept keys in the pages and copies them into the ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE: gl.constexpr):
    """Element offsets of keys in the cache, 64-bit; keys past the request's end stand for its last one."""
    keys = gl.minimum(keys, last_key)
    pages = gl.load(table_ptr + keys // PAGE_SIZE)
    return pages.to(gl.int64) * stride_kp + (keys % PAGE_SIZE) * stride_kt


@gluon.jit
def _band_keys(start, num_bands, start_m, bands_ptr, o_n, BAND: gl.constexpr):
    """Keys of the bands listed from `start` on; past the list, keys of the tile itself."""
    listed = start + o_n // BAND
    offsets = gl.load(bands_ptr + listed, mask=listed < num_bands, other=0)
    return start_m - offsets * BAND + o_n % BAND


@gluon.jit
def _single_keys(
    start, rest, num_columns, start_m, bands_ptr, bands_below_ptr, columns_ptr, o_n, BAND: gl.constexpr
):  # fmt: skip
    """Entries from `start` on of the rest of the bands (`rest` keys) and then the columns, and which of them count."""
    entry = start + o_n
    in_band = entry < rest
    listed = entry < rest + num_columns
    offsets = gl.load(bands_ptr + entry // BAND, mask=in_band, other=0)
    columns = gl.load(columns_ptr + entry - rest, mask=listed & (entry >= rest), other=0)
    offset = start_m // BAND - columns // BAND
    below = gl.load(bands_below_ptr + offset, mask=listed, other=0)
    below_next = gl.load(bands_below_ptr + offset + 1, mask=listed, other=0)
    keys = gl.where(in_band, start_m - offsets * BAND + entry % BAND, columns)
    return keys, in_band | (listed & (below == below_next))


@gluon.jit
def _copy_rows(stage, offsets, source_ptr, tiles, full, empty, STAGES: gl.constexpr):
    """Copy a stage's rows into the ring, once the consumers have left their place."""
    slot = stage % STAGES
    mbarrier.wait(empty.index(slot), ((stage // STAGES) & 1) ^ 1)
    async_copy.async_load(tiles.index(slot), source_ptr + offsets)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def produce(
    k_ptr, v_ptr, table_ptr, bands_ptr, bands_below_ptr, columns_ptr, kept_ptr,
    start_m, first_row, last_key, num_bands, num_columns, stride_kp, stride_kt,
    bias, bias_full, ring,
    HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TILE: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    LANES: gl.constexpr = HEAD_DIM // 8
    # A key a thread to find the rows; 16 bytes a thread to copy them.
    KEYS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    BANDS_PER_TILE: gl.constexpr = TILE // BAND
    o_n = gl.arange(0, TILE, layout=KEYS)
    o_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    whole = num_bands // BANDS_PER_TILE

    # The rows of a stage are looked up while the stage before waits for its place.
    slots = _slots(start_m + o_n, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
    for stage in range(whole + 1):
        # [TILE, HEAD_DIM]
        offsets = gl.convert_layout(slots, gl.SliceLayout(1, ROWS))[:, None] + o_d[None, :]
        _copy_rows(stage, offsets, k_ptr, ks, k_full, k_empty, STAGES)
        keys = _band_keys(stage * BANDS_PER_TILE, num_bands, start_m, bands_ptr, o_n, BAND)
        slots = _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
        _copy_rows(stage, offsets, v_ptr, vs, v_full, v_empty, STAGES)

    bands_ptr += whole * BANDS_PER_TILE
    rest = (num_bands - whole * BANDS_PER_TILE) * BAND
    num_single = gl.cdiv(rest + num_columns, TILE)
    num_kept = gl.zeros([TILE], gl.int32, KEYS)
    keys, fresh = _single_keys(
        0, rest, num_columns, start_m, bands_ptr, bands_below_ptr, columns_ptr, o_n, BAND
    )  # fmt: skip
    slots = _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
    for i in range(num_single):
        offsets = gl.convert_layout(slots, gl.SliceLayout(1, ROWS))[:, None] + o_d[None, :]
        _copy_rows(whole + 1 + i, offsets, k_ptr, ks, k_full, k_empty, STAGES)
        # The consumers have left this place of the bias too: they read it before they leave that of K.
        bias.index(i % STAGES).store(gl.where(fresh, 0.0, float("-inf")))
        mbarrier.arrive(bias_full.index(i % STAGES), count=1)
        num_kept += fresh.to(gl.int32)
        keys, fresh = _single_keys(
            (i + 1) * TILE, rest, num_columns, start_m, bands_ptr, bands_below_ptr, columns_ptr, o_n, BAND
        )  # fmt: skip
        slots = _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
        _copy_rows(whole + 1 + i, offsets, v_ptr, vs, v_full, v_empty, STAGES)

    rows = gl.minimum(start_m + TILE, last_key + 1) - first_row
    own = rows * (first_row - start_m) + rows * (rows + 1) // 2
    kept = rows * (whole * TILE + gl.sum(num_kept, 0)) + own
    gl.atomic_add(kept_ptr, kept.to(gl.int64), sem="relaxed")

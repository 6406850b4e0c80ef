"""Which decode kernel computes a call of few queries, and into how many parts it splits their keys.

Pure functions of the call; no JAX, no GPU. docs/performance.md has what was measured of these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax_flash import heuristics
from jax_flash.kernel_spec import DecodeSpec

MOST_ROWS = 128
"""Rows of q that see a key, of all heads that share it, up to which this kernel may be the faster one."""

LEAST_KEYS = 4
"""For each query, from which on it is: with fewer, keys and values are not what takes time."""

TILES_M = (8, 16, 32, 64)
"""Rows of a CTA."""

LEAST_PACKED_ROWS = 16
"""Of a CTA where sequences are packed: a long one among single queries would have many tiles of fewer."""

RING_BYTES = (128 * 1024, 64 * 1024)
"""Of keys and values in shared memory, the best first: with less the memory idles."""

BUFFERS = 2
"""Of a warp that has keys of its own, that these bytes are divided into: while it works on one, the next is filled."""

WARPS = 4
"""That multiply, as kernels/decode/storage.cuh has it; more are not faster, even where they widen keys and values."""

MAX_CLUSTER = 8
"""CTAs of a cluster that every GPU of compute capability 9.0 takes."""

MOST_CLUSTERED = 64
"""CTAs of a call up to which they form clusters: these leave some multiprocessors empty."""

CLUSTERED_KEYS = 512
"""Keys of a CTA up to which clusters, which join their results fast, are faster than many more CTAs."""

MIN_SPLIT_KEYS = 128
"""Fewer keys than that are not worth a CTA."""

LONG_SPLIT_KEYS = 8192
"""Sequences that may have more keys are split though there are tiles enough: begun last, a long one would take the rest
of the time."""

LONG_SPLITS = 4
"""Into so many parts at most, for each takes memory for its results."""


def serves(queries: float, keys: float, heads_of_kv: int) -> bool:
    """Whether this kernel is the one for so many queries and keys of a sequence, on average."""
    return queries * heads_of_kv <= MOST_ROWS and keys >= LEAST_KEYS * queries


def tile_m(rows: float, *, packed: bool) -> int:
    """Rows of a CTA, by those of a sequence that share keys, on average; some packed ones have more."""
    if packed:
        rows = max(rows, LEAST_PACKED_ROWS)
    return next((m for m in TILES_M if rows <= m), TILES_M[-1])


def splits(tiles: int, keys: int, multiprocessors: int) -> int:
    """Parts that the keys of a sequence are split into.

    Args:
      tiles: of rows that there are.
      keys: that a row sees, at most.
      multiprocessors: of the GPU.
    """
    if tiles >= multiprocessors * 3 // 4:
        return max(1, min(LONG_SPLITS, keys // LONG_SPLIT_KEYS))
    if tiles * MAX_CLUSTER <= MOST_CLUSTERED and keys <= MAX_CLUSTER * CLUSTERED_KEYS:
        multiprocessors = tiles * MAX_CLUSTER
    return max(1, min(multiprocessors // tiles, keys // MIN_SPLIT_KEYS))


def decode_spec(
    *,
    element: str,
    kv_element: str,
    out: str,
    head_dim: int,
    head_dim_v: int,
    tile_m: int,
    tiles: int,
    most_tiles: int,
    page_size: int | None,
    num_splits: int,
    multiprocessors: int,
    **features: bool,
) -> DecodeSpec:
    """The decode kernel of a call.

    `element` is the dtype of q, `kv_element` that of k and v; `tiles` are those there are on average, and `most_tiles`
    at most; `page_size` is None without a page table; `features` are further flags of DecodeSpec.
    """
    widens = kv_element == "float8_e4m3fn"
    fixed: dict[str, Any] = {
        "element": "float16" if widens else element,
        "query": element,
        "widens": widens,
        "converts_q": widens and element == "bfloat16",
        "out": out,
        "head_dim": heuristics.padded_head_dim(head_dim),
        "head_dim_v": heuristics.padded_head_dim(head_dim_v),
        "tile_m": tile_m,
        "key_alignment": 1,
        **features,
    }
    joins = [{"cluster": 1, "partial": num_splits > 1, "draws": most_tiles * num_splits > multiprocessors}]
    if 1 < num_splits <= MAX_CLUSTER and tiles * num_splits <= MOST_CLUSTERED:
        joins.insert(0, {"cluster": num_splits, "partial": False, "draws": False})  # where there is room for it
    return next(spec for join in joins for spec in _tilings(fixed | join, page_size) if fits(spec))


def _tilings(fixed: dict[str, Any], page_size: int | None) -> Iterator[DecodeSpec]:
    """The best first. Every warp that has keys of its own has its own buffers."""
    for ring_bytes in RING_BYTES:
        stages = max(WARPS, BUFFERS * key_warps(fixed["tile_m"]))
        fitting = ring_bytes // stages // key_bytes(fixed)
        tile_n = next((n for n in (64, 32) if n <= fitting), 16)
        stages *= max(1, fitting // tile_n)
        box = heuristics.box_keys(page_size, tile_n)
        gathers = box < heuristics.LEAST_BOX_KEYS
        loaders = gathering_warps(fixed["tile_m"], max(fixed["head_dim"], fixed["head_dim_v"])) if gathers else 1
        part_floats = fixed["tile_m"] * (fixed["head_dim_v"] + 2)
        tiling: dict[str, Any] = {"tile_n": tile_n, "stages": stages}
        yield DecodeSpec(
            **fixed,
            **tiling,
            box_keys=box,
            gathers=gathers,
            part_floats=part_floats,
            threads=32 * (WARPS + loaders + 1),
            shared_bytes=shared_bytes(**fixed, **tiling),
        )


def fits(spec: DecodeSpec) -> bool:
    """Whether an SM has the shared memory for it."""
    return spec.shared_bytes <= heuristics.SHARED_LIMIT


def key_warps(tile_m: int) -> int:
    """Warps that have keys of their own; others share them, for each has 16 rows at most."""
    return WARPS // max(1, tile_m // 16)


def gathering_warps(tile_m: int, head_dim: int) -> int:
    """Warps that copy keys one by one, where pages allow TMA fewer than LEAST_BOX_KEYS: as many as leave those that
    multiply their registers."""
    if tile_m == 8 or head_dim <= 64:
        return 8
    return 4 if head_dim <= 128 else 2


def key_bytes(fixed: dict[str, Any]) -> int:
    """Of a key and its value in shared memory."""
    size = 1 if fixed["widens"] else 2
    return sum(-(-fixed[name] * size // 128) * 128 for name in ("head_dim", "head_dim_v"))


def received_bytes(cluster: int, tile_m: int, head_dim_v: int) -> int:
    """Of what a CTA of a cluster is sent by all: of each 32 vectors of eight columns, one CTA in turn joins parts."""
    rounds = -(-tile_m * head_dim_v // (8 * 32 * cluster))
    return cluster * rounds * 32 * 40 if cluster > 1 else 48


def shared_bytes(
    *, head_dim: int, head_dim_v: int, tile_m: int, tile_n: int, stages: int, cluster: int, draws: bool, **more
) -> int:
    """Bytes of SharedStorage in kernels/decode/storage.cuh, which checks this number."""
    ring = stages * tile_n * key_bytes({"head_dim": head_dim, "head_dim_v": head_dim_v, **more})
    received = received_bytes(cluster, tile_m, head_dim_v)
    parts = key_warps(tile_m) * tile_m * (4 * (head_dim_v + 4) + 8)
    works = 2 if draws else 1
    q = works * tile_m * (2 * head_dim + 16)
    work = works * (160 + 32 * tile_m)
    barriers = 24 * stages + 16
    return -(-(ring + received + q + parts + work + barriers) // 1024) * 1024

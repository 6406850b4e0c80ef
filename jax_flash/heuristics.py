"""Which kernel computes a call: candidates, the legal ones, the best. Pure functions of the call; no JAX, no GPU.

Every odd number here has its reason beside it; docs/design.md tells how they were found.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from jax_flash.kernel_spec import KernelSpec
from jax_flash.spec import UNBOUNDED

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one CTA may have on compute capability 9.0; each further one takes 1024 more."""

HEAD_DIMS = (64, 96, 128, 192, 256)
"""Head dims that kernels are compiled for; others are padded with zeros, up to the next."""

_SWIZZLE_BYTES = 128
"""A row of Q, K or 16-bit V in shared memory takes a multiple of this."""

_BASE_REGISTERS = {1: 36, 2: 36, 3: 32}
"""What a consumer thread takes besides output, scores and P, by consumers of a CTA: found by compiling."""
_FEATURE_REGISTERS = {"window_left": 4, "softcap": 11}
"""What features add to that, found in the same way."""
_FP8_REGISTERS = -4
"""And what FP8 does."""


TUNED: dict[tuple[int, int, bool], dict[str, int | bool]] = {
    (1, 64, False): {"tile_m": 192, "tile_n": 128, "q_stages": 1, "k_stages": 2, "overlap": 4, "integer_max": True},
    (1, 64, True): {"tile_m": 192, "tile_n": 128, "q_stages": 1, "k_stages": 2, "overlap": 0, "integer_max": True},
    (1, 96, False): {"tile_m": 192, "tile_n": 128, "q_stages": 2, "k_stages": 2, "overlap": 4, "integer_max": True},
    (1, 96, True): {"tile_m": 128, "tile_n": 192, "q_stages": 1, "k_stages": 2, "overlap": 0, "integer_max": True},
    (1, 128, False): {"tile_m": 128, "tile_n": 192, "q_stages": 2, "k_stages": 2, "overlap": 1, "integer_max": True},
    (1, 128, True): {"tile_m": 128, "tile_n": 192, "q_stages": 2, "k_stages": 2, "overlap": 0, "integer_max": True},
    (1, 192, False): {"tile_m": 128, "tile_n": 128, "q_stages": 1, "k_stages": 2, "overlap": 1, "integer_max": True},
    (1, 192, True): {"tile_m": 128, "tile_n": 128, "q_stages": 1, "k_stages": 2, "overlap": 0, "integer_max": True},
    (1, 256, False): {"tile_m": 128, "tile_n": 128, "q_stages": 1, "k_stages": 2, "overlap": 1, "integer_max": True},
    (1, 256, True): {"tile_m": 128, "tile_n": 96, "q_stages": 1, "k_stages": 2, "overlap": 0, "integer_max": True},
    (2, 64, False): {"tile_m": 192, "tile_n": 128, "q_stages": 2, "k_stages": 3, "overlap": 2, "integer_max": True},
    (2, 64, True): {"tile_m": 192, "tile_n": 96, "q_stages": 2, "k_stages": 3, "overlap": 0, "integer_max": True},
    (2, 96, False): {"tile_m": 192, "tile_n": 96, "q_stages": 1, "k_stages": 2, "overlap": 4, "integer_max": True},
    (2, 96, True): {"tile_m": 128, "tile_n": 128, "q_stages": 2, "k_stages": 2, "overlap": 0, "integer_max": True},
    (2, 128, False): {"tile_m": 128, "tile_n": 128, "q_stages": 2, "k_stages": 2, "overlap": 2, "integer_max": True},
    (2, 128, True): {"tile_m": 128, "tile_n": 128, "q_stages": 2, "k_stages": 2, "overlap": 0, "integer_max": True},
    (2, 192, False): {"tile_m": 128, "tile_n": 96, "q_stages": 1, "k_stages": 2, "overlap": 2, "integer_max": True},
    (2, 192, True): {"tile_m": 128, "tile_n": 80, "q_stages": 1, "k_stages": 2, "overlap": 0, "integer_max": True},
    (2, 256, False): {"tile_m": 128, "tile_n": 64, "q_stages": 1, "k_stages": 2, "overlap": 2, "integer_max": False},
    (2, 256, True): {"tile_m": 128, "tile_n": 64, "q_stages": 1, "k_stages": 2, "overlap": 0, "integer_max": True},
}
"""What was measured fastest on an H200, by bytes of an element, head dim and whether there is a softcap: fields of
KernelSpec. A call that needs more registers takes what comes nearest. A softcap is a polynomial only after integer
maxima. `python -m benchmarks tune` searches from here on."""

MOST_EXCESS = 1.25
"""Where the tiles of a sequence's queries would have more than so many times the rows that tiles of 128 rows have, on
average, those are faster."""

LOW: dict[tuple[int, int, bool], dict[str, int | bool]] = {
    (1, 64, False): {"tile_m": 128, "tile_n": 256},
    (1, 64, True): {"tile_m": 128, "tile_n": 192},
    (1, 96, False): {"tile_m": 128, "tile_n": 192},
    (2, 64, False): {"tile_m": 128, "tile_n": 128},
    (2, 64, True): {"tile_m": 128, "tile_n": 128},
    (2, 96, False): {"tile_m": 128, "tile_n": 128},
}
"""What is faster then, by bytes of an element, head dim and whether there is a softcap, for all that TUNED has tiles of
192 rows for."""

SHORT_KEYS = 1024
"""Sequences of so many keys on average, or fewer, are short, and such windows."""

SHORT: dict[tuple[int, int], dict[str, int | bool]] = {
    (1, 64): {"tile_n": 128},
    (1, 96): {"tile_n": 128},
    (1, 128): {"tile_n": 128},
    (2, 96): {"tile_m": 128, "tile_n": 128, "q_stages": 2},
}
"""What is faster then, by bytes of an element and head dim: wide steps waste much of the last one. It goes before what
is for low tiles."""

MOST_TRANSPOSED = {64: 3072, 96: 3072, 128: 1536, 192: 1536, 256: 768}
"""Where so many rows of q, of all heads that share a key, or fewer see it on average, the kernel transposes FP8 values,
by head dim; twice as many where keys are packed, four times as many where XLA would have to pad the rows first, eight
times as many where both. Each tile of queries transposes all values that it sees; from some tiles on it is cheaper to
do so once beforehand."""

V_ROWS = 16
"""FP8 values that come transposed lie in units of so many rows."""

V_UNIT = 32
"""Keys and columns that the kernel transposes at a time."""

LEAST_BOX_KEYS = 8
"""Of a copy of TMA: rows of fewer would not lie in shared memory as swizzling has them."""

LEAST_PAGE_KEYS = {2: 16, 1: V_UNIT}
"""The kernel of many queries reads pages in place that are multiples of so many keys, by bytes of an element: by copies
of fewer it is slower than after a copy of the whole cache by XLA, unless most of that is unused."""

TRANSPOSING = {(d, softcap): {"v_stages": 3} for d in HEAD_DIMS for softcap in (False, True)} | {
    (128, False): {"v_stages": 3, "overlap": 4}
}
"""What is faster then, by head dim and whether there is a softcap: a buffer of V is longer on its way."""

MOST_WIDENED = 1024
"""Where so many rows of q or fewer see a key, counted in the same way, the kernel widens FP8 keys and values under a
16-bit q."""

WIDENING: dict[int, dict[str, int | bool]] = {
    96: {"tile_n": 128, "q_stages": 1, "v_stages": 3},
    128: {"q_stages": 1, "v_stages": 3},
}
"""What is faster then, by head dim."""

TINY_ROWS = 64
"""Sequences of so many queries and keys on average, or fewer, are tiny: 64 rows of one are a tile."""

TINY: dict[tuple[int, int], dict[str, int | bool]] = {
    (1, 128): {"tile_m": 64, "tile_n": 64, "q_stages": 2, "k_stages": 3, "ctas_per_sm": 2, "ping_pong": False},
}
"""What is faster then; it goes before all else."""

FIRST_DEPOSIT = 384
"""Keys that an FP8 accumulator takes before its first deposit, as kernels/total.cuh has it."""


def padded_head_dim(head_dim: int) -> int:
    """The head dim of the kernel that serves `head_dim`."""
    return next(d for d in HEAD_DIMS if d >= head_dim)


def element_bytes(element: str) -> int:
    """Bytes of one element that is multiplied."""
    return 1 if element == "float8_e4m3fn" else 2


def ranked(
    *,
    element: str,
    kv_element: str,
    out: str,
    head_dim: int,
    head_dim_v: int,
    window_left: int,
    window_right: int,
    mean_queries: float,
    mean_keys: float,
    kv_rows: int,
    heads_of_kv: int,
    page_size: int | None,
    **features: bool,
) -> list[KernelSpec]:
    """The legal KernelSpecs of a call, the best first.

    `element` is the dtype of q, `kv_element` that of k and v; `mean_queries` and `mean_keys` are the average lengths of
    its sequences, `kv_rows` are those of a group, which bound the latter; `heads_of_kv` heads of q share one of k and
    v; `page_size` is that of a paged cache, which the kernel itself transposes or widens; `features` are further flags
    of KernelSpec.
    """
    bounded_left, bounded_right = window_left != UNBOUNDED, window_right != UNBOUNDED
    rows_of_key = heads_of_kv * queries_of_key(mean_queries, mean_keys, window_left, window_right)
    max_keys = kv_rows
    if bounded_left and bounded_right:
        width = window_left + window_right + 1
        mean_keys, max_keys = min(mean_keys, width), min(max_keys, width)

    def rows_of_tiles(tile_m: int) -> float:
        """Of a sequence's queries, on average; packed ones end anywhere in a tile."""
        return mean_queries + tile_m / 2 if features["packed_q"] else _up(math.ceil(mean_queries), tile_m)

    aligned = head_dim % 16 == head_dim_v % 16 == 0  # as TMA wants FP8 rows
    widens = kv_element != element and aligned and (rows_of_key <= MOST_WIDENED or page_size is not None)
    fixed: dict[str, Any] = {
        "element": "float16" if widens else element,
        "widens": widens,
        "converts_q": widens and element == "bfloat16",
        "out": out,
        "head_dim": padded_head_dim(head_dim),
        "head_dim_v": padded_head_dim(head_dim_v),
        "window_left": bounded_left,
        "window_right": bounded_right,
        **features,
    }
    size = element_bytes(element)
    dim = max(fixed["head_dim"], fixed["head_dim_v"])
    tuned = TUNED[size, dim, fixed["softcap"]]
    if rows_of_tiles(tuned["tile_m"]) > MOST_EXCESS * rows_of_tiles(128):
        tuned = tuned | LOW[size, dim, fixed["softcap"]]
    if mean_keys <= SHORT_KEYS:
        tuned = tuned | SHORT.get((size, dim), {})
    # Packed keys that come transposed share blocks with others.
    factor = (2 if fixed["packed_k"] else 1) * (4 if kv_rows % V_ROWS else 1)
    few = rows_of_key <= factor * MOST_TRANSPOSED[dim] or page_size is not None
    fixed["transposes"] = size == 1 and few and head_dim_v % V_UNIT == 0
    if widens:
        tuned = tuned | WIDENING.get(dim, {})
    if fixed["transposes"]:
        tuned = tuned | TRANSPOSING[dim, fixed["softcap"]]
    if max(mean_queries, mean_keys) <= TINY_ROWS:
        tuned = tuned | TINY.get((size, dim), {})
    return sorted(
        filter(legal, candidates(fixed, tuned, max_keys, page_size)), key=functools.partial(cost, tuned=tuned)
    )


def queries_of_key(mean_queries: float, mean_keys: float, window_left: int, window_right: int) -> float:
    """Queries that see a key of their sequence, on average over all its keys; fewer where queries outnumber keys. The
    last query is at the last key."""
    last = min(mean_queries, mean_keys)
    seeing = mean_queries if window_right == UNBOUNDED else last
    before, after = mean_keys - last / 2, last / 2  # keys beside one of those
    if window_left != UNBOUNDED:
        before = min(before, window_left)
    if window_right != UNBOUNDED:
        after = min(after, window_right)
    return seeing * (before + after) / max(mean_keys, 1)


def candidates(fixed: dict, tuned: dict, max_keys: int, page_size: int | None) -> Iterator[KernelSpec]:
    """Every tiling of a call whose other fields are `fixed`; what is no matter of registers is as in `tuned`."""
    is_fp8 = element_bytes(fixed["element"]) == 1
    step = 32 if is_fp8 else 16
    # A diagonal wastes half of each masked block, which narrower steps make smaller; what was tuned may be wider.
    widest = 256 if is_fp8 and not (fixed["window_left"] or fixed["window_right"]) else 128
    widths = {*range(step, widest + 1, step), tuned["tile_n"]}
    depths = {2, 3, tuned["k_stages"]}
    counts = {2, 3, tuned["tile_m"] // 64}
    for consumers, tile_n, q_stages, k_stages in itertools.product(counts, widths, (1, 2), depths):
        for v_stages in {k_stages, tuned.get("v_stages", k_stages)}:
            yield kernel_spec(
                **fixed,
                tile_m=64 * consumers,
                tile_n=tile_n,
                box_keys=box_keys(page_size, tile_n),
                q_stages=q_stages,
                k_stages=k_stages,
                v_stages=v_stages,
                ping_pong=tuned.get("ping_pong", True),
                overlap=tuned["overlap"],
                integer_max=tuned["integer_max"],
                ctas_per_sm=tuned.get("ctas_per_sm", 1) if consumers == 1 else 1,
                # Whole blocks, of which the last one may come on top.
                deposits=is_fp8 and max_keys > (FIRST_DEPOSIT // tile_n + 1) * tile_n,
            )


def kernel_spec(**fields: Any) -> KernelSpec:
    """The KernelSpec of all fields but those that follow from the others."""
    consumers = fields["tile_m"] // 64
    is_fp8 = element_bytes(fields["element"]) == 1
    packed = fields["packed_q"] or fields["packed_k"]
    # Producers that find dense tiles and clear nothing need few of these.
    slim = is_fp8 and not packed and not fields["seqused_k"]
    producer_registers, consumer_registers = register_split(consumers, registers(**fields), slim, fields["widens"])
    follows = {
        "box_keys": fields["box_keys"] if fields["page_table"] else fields["tile_n"],
        "v_box_keys": v_box_keys(is_fp8, fields["tile_n"], fields["transposes"]),
        "key_alignment": V_ROWS if is_fp8 and fields["packed_k"] and not fields["transposes"] else 1,
        "threads": 128 * (1 + consumers),
        "producer_registers": producer_registers,
        "consumer_registers": consumer_registers,
        "shared_bytes": shared_bytes(**fields),
    }
    return KernelSpec(**(fields | follows))


def box_keys(page_size: int | None, tile_n: int) -> int:
    """Keys of a block that one TMA copy brings: the most, a power of two, that divide both a page and the block."""
    return tile_n if page_size is None else min(page_size & -page_size, tile_n & -tile_n)


def v_box_keys(is_fp8: bool, tile_n: int, transposes: bool) -> int:
    """Keys of V that one TMA copy brings: transposed FP8 values lie in swizzled rows, as wide as fit the tile."""
    if not is_fp8:
        return tile_n
    widest = V_UNIT if transposes else 128
    return next(keys for keys in (128, 64, 32) if keys <= widest and tile_n % keys == 0)


def with_choices(spec: KernelSpec, **choices: Any) -> KernelSpec:
    """The same call's KernelSpec with other choices, legal or not."""
    return kernel_spec(**(dataclasses.asdict(spec) | choices))


def register_split(consumers: int, needed: int, slim: bool, widens: bool) -> tuple[int, int]:
    """Registers of a producer and of a consumer thread, of the 64 K that an SM has, by what a consumer needs: of those
    that need 217 or more some spill with 232. With one consumer two CTAs share an SM. A producer that is not `slim`
    spills with 24; one that widens is faster with what is left, up to 88."""
    if consumers == 2 and slim and needed > 216:
        return 24, 240
    if consumers == 2 and widens:
        consumer = max(208, min(_up(needed + 8, 8), 232))
        return 504 - 2 * consumer, consumer
    return {1: (40, 216), 2: (40, 232), 3: (32, 160)}[consumers]


def shared_bytes(
    *,
    element: str,
    head_dim: int,
    head_dim_v: int,
    tile_m: int,
    tile_n: int,
    q_stages: int,
    k_stages: int,
    v_stages: int,
    deposits: bool,
    **_: Any,
) -> int:
    """Bytes of SharedStorage in kernels/storage.cuh, which checks this number; of other fields it takes no notice."""
    size = element_bytes(element)
    q = tile_m * _up(head_dim * size, _SWIZZLE_BYTES)
    k = tile_n * _up(head_dim * size, _SWIZZLE_BYTES)
    v = tile_n * (head_dim_v if size == 1 else _up(head_dim_v * size, _SWIZZLE_BYTES))
    total = head_dim_v * (4 if head_dim_v <= 128 else 2) if deposits else 0
    out = tile_m * max(_SWIZZLE_BYTES * min(2, -(-head_dim_v // 64)), total)
    barriers = 16 * q_stages * tile_m // 64 + 24 * (k_stages + v_stages)
    work = 3 * (96 + 16 * tile_m // 64)
    return _up(q_stages * q + k_stages * k + v_stages * v + out + barriers + work, 1024)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def registers(*, element: str, head_dim_v: int, tile_m: int, tile_n: int, **features: Any) -> int:
    """What a consumer thread needs: for output, scores and P, for everything else, and for features."""
    size = element_bytes(element)
    accumulators = head_dim_v // 2 + tile_n // 2 + tile_n * size // 8
    others = _BASE_REGISTERS[tile_m // 64] + (_FP8_REGISTERS if size == 1 else 0)
    return accumulators + others + sum(count for name, count in _FEATURE_REGISTERS.items() if features[name])


def legal(spec: KernelSpec) -> bool:
    """Whether the tiling fits the machine. Rows are widened by 32, with more registers than three consumers leave."""
    if spec.widens and (spec.tile_n % 32 != 0 or spec.tile_m != 128):
        return False
    if spec.ctas_per_sm * (spec.shared_bytes + 1024) > SHARED_LIMIT + 1024:
        return False
    return registers(**dataclasses.asdict(spec)) <= spec.consumer_registers


def cost(spec: KernelSpec, tuned: dict) -> tuple:
    """Smaller is better: what differs from the tuned choice in the fewest fields; of equals, what has its buffers of V;
    then two consumers and wide steps, with deep buffers."""
    differs = {name: getattr(spec, name) != value for name, value in tuned.items()}
    nearest = sum(differs.values()), differs.get("v_stages", False)
    return *nearest, spec.tile_m, -spec.tile_n, -spec.q_stages, -spec.k_stages, -spec.v_stages

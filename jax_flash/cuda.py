"""How the CUDA kernels are called: which one, compiled for exactly the call at hand, in what grid, with which maps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_flash import canonical, codegen, decode, heuristics, jit, tensor_map
from jax_flash.kernel_spec import AppendSpec, KernelSpec
from jax_flash.launch import call_kernel, forward_result, multiprocessors
from jax_flash.order import Divisor, Order
from jax_flash.spec import UNBOUNDED, Append, Attention, Operands, Params

COUNTERS = 2
"""Which result of a forward kernel counts what CTAs have drawn: behind out and the LSE."""

MAX_ATTEMPTS = 4
"""Kernels compiled, at some seconds each, before one that spills is taken."""


def transpose_fp8_values(v):
    """V (G, S, Hk, Dv) as FP8 wgmma wants it: (G, Hk, Dv, S up to a multiple of 16), keys innermost.

    Within 16 keys the order is that in which a thread holds P in registers (kernels/fragment.cuh): position 4q + 2i + e
    holds key 8i + 2q + e. XLA fuses this into whatever computes V; into padding it must not, for that is slow.
    """
    groups, rows, heads, columns = v.shape
    if rows % heuristics.V_ROWS:
        v = jnp.pad(v, ((0, 0), (0, -rows % heuristics.V_ROWS), (0, 0), (0, 0)))
        v = jax.lax.optimization_barrier(v)
    v = v.reshape(groups, -1, 2, 4, 2, heads, columns)
    return v.transpose(0, 5, 6, 1, 3, 2, 4).reshape(groups, heads, columns, -1)


def _mean_lengths(operands: Operands) -> tuple[float, float]:
    """The average number of queries and of keys of a sequence, as far as shapes tell."""
    queries, keys = (math.prod(x.shape[:2]) / operands.batch for x in (operands.q, operands.k))
    return queries, keys if operands.has("cu_seqlens_k") else operands.capacity


def _page_size(operands: Operands) -> int | None:
    return operands.k.shape[1] if operands.has("page_table") else None


def _features(attention: Attention, operands: Operands) -> dict[str, bool]:
    """The flags of a kernel."""
    names = ("sinks", "page_table", "cache_batch_idx", "cache_leftpad", "seqused_q", "seqused_k")
    return {name: operands.has(name) for name in names} | {
        "softcap": attention.softcap > 0,
        "packed_q": operands.has("cu_seqlens_q"),
        "packed_k": operands.has("cu_seqlens_k"),
        "lse": attention.return_lse,
    }


def kernel_specs(attention: Attention, operands: Operands) -> list[KernelSpec]:
    """The kernels that could compute a call of many queries, the best first."""
    mean_queries, mean_keys = _mean_lengths(operands)
    return heuristics.ranked(
        element=operands.q.dtype.name,
        kv_element=operands.k.dtype.name,
        out=attention.out_dtype,
        head_dim=operands.q.shape[-1],
        head_dim_v=operands.v.shape[-1],
        window_left=attention.window_left,
        window_right=attention.window_right,
        mean_queries=mean_queries,
        mean_keys=mean_keys,
        kv_rows=operands.capacity,
        page_size=_page_size(operands),
        heads_of_kv=operands.q.shape[2] // operands.k.shape[2],
        **_features(attention, operands),
    )


def compile_best(entry: str, specs: list[KernelSpec]) -> tuple[KernelSpec, jit.Kernel]:
    """The first kernel that ptxas compiles without spills, which differs by its version; else the best one."""
    compiled = []
    for spec in specs[:MAX_ATTEMPTS]:
        compiled.append((spec, jit.compile(codegen.source(entry, spec))))
        if compiled[-1][1].clean:
            return compiled[-1]
    return compiled[0]


def forward(attention: Attention, operands: Operands):
    """The CUDA kernels: out and lse."""
    if decode.serves(*_mean_lengths(operands), operands.q.shape[2] // operands.k.shape[2]):
        return forward_decode(attention, operands)
    if operands.has("page_table") and not _reads_pages_in_place(operands):
        operands = canonical.gathered(operands)  # by XLA
    return forward_prefill(attention, operands)


def _reads_pages_in_place(operands: Operands) -> bool:
    """Whether TMA brings the keys of whole pages, and values in the units in which they are transposed."""
    size = operands.k.dtype.itemsize
    columns = heuristics.V_UNIT if operands.q.dtype.itemsize == 1 else 16 // size
    keys = heuristics.LEAST_PAGE_KEYS[size]
    return operands.k.shape[1] % keys == 0 and all(x.shape[-1] % columns == 0 for x in operands[1:3])


def forward_prefill(attention: Attention, operands: Operands, specs: list[KernelSpec] | None = None):
    """The kernel of many queries. `specs` are those to choose from, else those of heuristics.py."""
    spec, kernel = compile_best("forward.cu", specs or kernel_specs(attention, operands))
    params = Params.of(attention, operands)
    if not spec.widens:
        operands = operands.widened()
    size = operands.k.dtype.itemsize
    row_bytes = 64 if spec.widens else 128
    maps = [
        tensor_map.rows(0, operands.q.shape, operands.q.dtype.itemsize, 64),
        tensor_map.rows(1, operands.k.shape, size, spec.box_keys, row_bytes),
    ]
    if spec.transposes:
        maps.append(tensor_map.units(2, operands.v.shape, spec.v_box_keys, spec.head_dim_v))
    elif heuristics.element_bytes(spec.element) == 1:
        operands = operands._replace(v=transpose_fp8_values(operands.v))
        maps.append(tensor_map.columns(2, operands.v.shape, spec.v_box_keys, spec.head_dim_v))
    else:
        maps.append(tensor_map.rows(2, operands.v.shape, size, spec.box_keys, row_bytes))
    results = forward_result(attention, params)
    if results[0].dtype.itemsize == 2:
        maps.append(tensor_map.rows(len(operands), results[0].shape, 2, 16))
    # CTAs draw their tiles; where each has one at most there is no counter, and no memset in front of a short kernel.
    tiles = _max_tiles(spec, params)
    grid = min(tiles, spec.ctas_per_sm * multiprocessors())
    counters = [jax.ShapeDtypeStruct((1,), jnp.int32)] if spec.packed_q and tiles > grid else []
    out, lse, *_ = call_kernel(
        kernel,
        "forward",
        operands,
        [*results, *counters],
        params=params,
        maps=maps,
        grid=grid,
        threads=spec.threads,
        shared_bytes=spec.shared_bytes,
        counters=COUNTERS if counters else -1,
        order=Order.of(spec, params, grid, attention.max_seqlen_q).flat(),
    )
    return out, lse


def forward_decode(attention: Attention, operands: Operands):
    """The kernel of few queries."""
    params = Params.of(attention, operands)
    group = params.heads // params.kv_heads
    rows = _mean_lengths(operands)[0] * group
    tile_m = decode.tile_m(rows, packed=operands.has("cu_seqlens_q"))
    if not operands.k.shape[-1] % 16 == operands.v.shape[-1] % 16 == 0:  # rows of FP8 that TMA does not take
        operands = operands.widened()
    m_blocks = math.ceil(rows / tile_m)  # of packed sequences on average
    tiles = most_tiles = params.kv_heads * params.batch * m_blocks
    if operands.has("cu_seqlens_q"):  # each sequence, and the rows around them in a group, may end in a partial tile
        whole = params.q_groups * params.q_rows * group // tile_m
        most_tiles = params.kv_heads * (whole + params.batch + 2 * params.q_groups)
    keys = operands.capacity
    if UNBOUNDED not in (attention.window_left, attention.window_right):
        keys = min(keys, attention.window_left + attention.window_right + math.ceil(rows / group))
    splits = attention.num_splits or decode.splits(tiles, keys, multiprocessors())
    spec = decode.decode_spec(
        element=operands.q.dtype.name,
        kv_element=operands.k.dtype.name,
        out=attention.out_dtype,
        head_dim=params.head_dim,
        head_dim_v=params.head_dim_v,
        window_left=attention.window_left != UNBOUNDED,
        window_right=attention.window_right != UNBOUNDED,
        tile_m=tile_m,
        tiles=tiles,
        most_tiles=most_tiles,
        page_size=_page_size(operands),
        num_splits=splits,
        multiprocessors=multiprocessors(),
        **_features(attention, operands),
    )
    numbers = most_tiles * splits
    counted = spec.draws or spec.partial
    results = [
        *forward_result(attention, params),
        jax.ShapeDtypeStruct((1 + most_tiles if counted else 0,), jnp.int32),
        jax.ShapeDtypeStruct((numbers * spec.part_floats if spec.partial else 0,), jnp.float32),
    ]
    size = operands.k.dtype.itemsize
    divisors = [Divisor.of(x) for x in (splits, m_blocks, params.kv_heads, group)]
    out, lse, *_ = call_kernel(
        jit.compile(codegen.source("decode.cu", spec)),
        "decode",
        operands,
        results,
        params=params,
        maps=[tensor_map.rows(i, operands[i].shape, size, spec.box_keys) for i in (1, 2)],
        grid=min(numbers, multiprocessors()) if spec.draws else numbers,
        threads=spec.threads,
        shared_bytes=spec.shared_bytes,
        cluster=spec.cluster,
        counters=COUNTERS if counted else -1,
        order=[numbers, *(x for divisor in divisors for x in divisor)],
    )
    return out, lse


APPEND_THREADS = 128
"""Of a CTA of kernels/append.cu; a warp has a head of a row."""


def append(attention: Attention, arrays: Append):
    """The kernel that appends: q, rotated, and both caches, in place if XLA lets it."""
    rotates, quantises = arrays.rotary_cos.size > 0, arrays.k_descale.size > 0
    q_groups, q_rows, heads, head_dim = arrays.q.shape
    new_groups, new_rows, kv_heads, head_dim_v = arrays.v_new.shape
    kv_groups, kv_rows = arrays.k_cache.shape[:2]
    spec = AppendSpec(
        query=arrays.q.dtype.name,
        new=arrays.k_new.dtype.name,
        cache=arrays.k_cache.dtype.name,
        table=arrays.rotary_cos.dtype.name,
        threads=APPEND_THREADS,
        rotates=rotates,
        rotary_interleaved=attention.rotary_interleaved,
        windowed=attention.windowed,
        quantises=quantises,
        packed_q=arrays.cu_seqlens_q.size > 0,
        packed_new=arrays.cu_seqlens_new.size > 0,
        page_table=arrays.page_table.size > 0,
        cache_batch_idx=arrays.cache_batch_idx.size > 0,
    )
    layout = {
        "batch": arrays.batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "q_groups": q_groups,
        "q_rows": q_rows,
        "new_groups": new_groups,
        "new_rows": new_rows,
        "kv_groups": kv_groups,
        "kv_rows": kv_rows,
        "capacity": arrays.capacity,
        "rotary_rows": arrays.rotary_cos.shape[1] if rotates else 0,
        "rotary_pairs": arrays.rotary_cos.shape[2] if rotates else 0,
        "cos_batch_stride": _table_stride(arrays.rotary_cos),
        "sin_batch_stride": _table_stride(arrays.rotary_sin),
        **_descale_strides("k", arrays.k_descale),
        **_descale_strides("v", arrays.v_descale),
    }
    rows = 2 * new_groups * new_rows * kv_heads + (q_groups * q_rows * heads if rotates else 0)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (arrays.k_cache, arrays.v_cache, arrays.q)]
    k_cache, v_cache, *q = call_kernel(
        jit.compile(codegen.source("append.cu", spec)),
        "append",
        arrays,
        results if rotates else results[:2],
        grid=-(-rows * 32 // spec.threads),
        threads=spec.threads,
        order=layout.values(),
        aliases={Append._fields.index("k_cache"): 0, Append._fields.index("v_cache"): 1},
    )
    return q[0] if rotates else arrays.q, k_cache, v_cache


def _table_stride(table) -> int:
    """In rows, of a table (B or 1, rows, ..), which may be absent; 0 where one serves all."""
    return table.shape[1] if table.size and table.shape[0] > 1 else 0


def _descale_strides(side: str, descale) -> dict[str, int]:
    """Of a table (B or 1, heads or 1), which may be absent; 0 where one entry serves all."""
    batch, heads = descale.shape if descale.size else (1, 1)
    return {f"{side}_batch_stride": heads if batch > 1 else 0, f"{side}_head_stride": 1 if heads > 1 else 0}


def _max_tiles(spec: KernelSpec, params: Params) -> int:
    """No call has more tiles: each sequence, and the rows around them in a group, may end in a partial one."""
    whole = params.q_groups * -(-params.q_rows // spec.tile_m)
    partial = params.batch + params.q_groups if spec.packed_q else 0
    return params.heads * (whole + partial)

"""The arguments of a row: random normal q, k and v, and arrays that say where their sequences are."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suites import Row


def arrays_of(row: Row, q_key: jax.Array, k_key: jax.Array, v_key: jax.Array) -> tuple[jax.Array, ...]:
    """What a function of libraries.py takes. A KV cache is random past the end of its sequences too."""
    q_rows, kv_rows = (
        (sum(lengths),) if row.packed else (len(lengths), max(lengths)) for lengths in (row.q_lengths, row.kv_lengths)
    )
    index_arrays = []
    if row.packed:
        index_arrays.append(np.cumsum([0, *row.q_lengths]))
    if row.kv_cache:
        index_arrays.append(row.kv_lengths)
    if row.page_size:
        batch, capacity = kv_rows
        pages = batch * math.ceil(capacity / row.page_size)
        kv_rows = (pages, row.page_size)
        index_arrays.append(np.random.default_rng(0).permutation(pages).reshape(batch, -1))

    def normal(key, shape, dtype):
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    kv_dtype = row.kv_dtype or row.dtype
    return (
        normal(q_key, (*q_rows, row.heads, row.head_dim), row.dtype),
        normal(k_key, (*kv_rows, row.kv_heads, row.head_dim), kv_dtype),
        normal(v_key, (*kv_rows, row.kv_heads, row.head_dim_v), kv_dtype),
        *(jnp.asarray(x, jnp.int32) for x in index_arrays),
    )

"""The definition, in plain jnp, of how new keys and values get into a cache: rotated, quantised, row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash import canonical
from jax_flash.quantize import to_fp8
from jax_flash.spec import Append, Attention


def written(cache, rows, group, row):
    """The cache with each of `rows` in its group and row, or left out where there is no such group."""
    return cache.at[group, row].set(rows, mode="drop")


def append(attention: Attention, arrays: Append, write=written) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, rotated, and both caches with the new rows in them, by `write`; in place where a cache has no other use.

    Rows that belong to no sequence are not written, nor are those past the capacity or of a group that there is none
    of. Where several rows go to one place any of them may stay.
    """
    if 0 in (arrays.batch, *arrays.k_cache.shape):
        return arrays.q, arrays.k_cache, arrays.v_cache
    start = jnp.clip(arrays.cache_seqlens, 0, arrays.capacity)
    sequence, index, _ = canonical.located(arrays.k_new.shape[:2], arrays.cu_seqlens_new, arrays.batch)
    position = start[sequence] + index
    q, k_new, v_new = arrays.q, arrays.k_new, arrays.v_new
    if arrays.rotary_cos.size:
        q_sequence, q_index, _ = canonical.located(q.shape[:2], arrays.cu_seqlens_q, arrays.batch)
        q_position = start[q_sequence] + (q_index if attention.windowed else 0)
        q = _stored(_rotated(attention, arrays, q, q_sequence, q_position), q.dtype)
        k_new = _rotated(attention, arrays, k_new, sequence, position)
    if arrays.k_descale.size:
        k_new = k_new.astype(jnp.float32) * _factor(arrays.k_descale, sequence)
        v_new = v_new.astype(jnp.float32) * _factor(arrays.v_descale, sequence)
    place = _place(arrays, sequence, position)
    k_cache, v_cache = (
        write(cache, _stored(rows, cache.dtype), *place)
        for cache, rows in ((arrays.k_cache, k_new), (arrays.v_cache, v_new))
    )
    return q, k_cache, v_cache


def _place(arrays: Append, sequence, position):
    """Group and row of the cache that each new row goes to; the group is past the last where it goes nowhere."""
    groups, rows = arrays.k_cache.shape[:2]
    group, row = sequence, position
    if arrays.page_table.size:
        group, row = arrays.page_table[sequence, position // rows], position % rows
    elif arrays.cache_batch_idx.size:
        group = arrays.cache_batch_idx[sequence]
    written = (sequence >= 0) & (position < arrays.capacity) & (group >= 0)  # a negative index would count from the end
    return jnp.where(written, group, groups), row


def _rotated(attention: Attention, arrays: Append, x, sequence, position):
    """x (groups, rows, heads, D) with its first channels rotated by the angles of each row's position, float32."""

    def of_rows(table):
        values = table[_of_sequence(table, sequence), jnp.minimum(position, table.shape[1] - 1)]
        return values[:, :, None].astype(jnp.float32)

    cos, sin = of_rows(arrays.rotary_cos), of_rows(arrays.rotary_sin)
    x = x.astype(jnp.float32)
    half = cos.shape[-1]
    pairs, axis = ((half, 2), -1) if attention.rotary_interleaved else ((2, half), -2)
    x1, x2 = jnp.unstack(x[..., : 2 * half].reshape(*x.shape[:-1], *pairs), axis=axis)
    turned = jnp.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], axis=axis)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half), x[..., 2 * half :]], axis=-1)


def _factor(descale, sequence):
    """One over the descale of each row and head: a product, as in quantize.py, so that jit changes no result."""
    return 1 / descale[_of_sequence(descale, sequence)][..., None]


def _of_sequence(x, sequence):
    """Where in x (B or 1, ..) the entries of a sequence lie."""
    return sequence if x.shape[0] > 1 else jnp.zeros_like(sequence)


def _stored(x, dtype):
    if x.dtype == dtype:
        return x
    return to_fp8(x) if dtype == jnp.float8_e4m3fn else x.astype(dtype)

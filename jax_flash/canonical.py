"""From the user's words to the canonical form that every implementation takes, and back.

Differentiable in whatever the user may differentiate: q, k, v, softmax_scale, the descales and sinks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash.spec import UNBOUNDED, Append, Attention, CacheCall, Call, Operands, Request

MAX_WINDOW = 2**30
"""As good as unbounded, and a position plus or minus it still fits an int32."""


def canonical(call: Call) -> tuple[Attention, Operands]:
    """What a checked call computes, and the arrays it computes it from; these have no gradient where q is FP8."""
    k, v = (jnp.asarray(x) for x in (call.k, call.v))
    if k.dtype != call.q.dtype:  # FP8
        k, v = _without_fp8_gradient((k, v))
    operands = _operands(
        call,
        k=k[None] if call.packed_k else k,
        v=v[None] if call.packed_k else v,
        cu_seqlens_k=_boundaries(call.cu_seqlens_k),
        seqused_q=_indices(call.seqused_q),
        seqused_k=_indices(call.seqused_k),
    )
    if call.cu_seqlens_k is call.cu_seqlens_q:
        operands = operands._replace(cu_seqlens_k=operands.cu_seqlens_q)  # one buffer: so kernels know self-attention
    if call.q.dtype == jnp.float8_e4m3fn:
        operands = _without_fp8_gradient(operands)
    return _attention(call), operands


def over_cache(call: CacheCall) -> tuple[Attention, Operands, Append | None]:
    """What a checked call over a cache computes, from which arrays, without gradient; and what comes before, if any.

    The results of the append then take the places of q, k and v.
    """
    cache_seqlens = call.cache_seqlens
    if not isinstance(cache_seqlens, (jax.Array, np.ndarray)):
        cache_seqlens = np.int32(np.clip(cache_seqlens, 0, call.capacity))
    operands = _operands(
        call,
        k=jnp.asarray(call.k_cache),
        v=jnp.asarray(call.v_cache),
        seqused_k=jnp.broadcast_to(cache_seqlens, (call.batch,)),
        page_table=_indices(call.page_table),
        cache_batch_idx=_indices(call.cache_batch_idx),
        cache_leftpad=_indices(call.cache_leftpad),
    )
    append = None
    if call.k_new is not None:
        append = _append(call, operands)
        operands = operands._replace(seqused_k=_lengths_after(append))
    attention = _attention(
        call,
        num_splits=None if call.num_splits is None else int(call.num_splits),
        rotary_interleaved=bool(call.rotary_interleaved),
    )
    return (attention, *_without_cache_gradient((operands, append)))


def _attention(call: Request, **more) -> Attention:
    left, right = (-1, -1) if call.window_size is None else call.window_size
    return Attention(
        window_left=_window(left),
        window_right=0 if call.causal else _window(right),
        softcap=float(call.softcap),
        out_dtype=_out_dtype(call),
        return_lse=bool(call.return_lse),
        max_seqlen_q=_rounded(call.max_seqlen_q) if call.packed_q else None,
        implementation=call.implementation,
        **more,
    )


def _operands(call: Request, **more) -> Operands:
    """Those that follow from what is asked of q, and `more`; the rest is absent."""
    q = jnp.asarray(call.q)
    of_q = {
        "q": q[None] if call.packed_q else q,
        "scale": _scale(call),
        "v_scale": _descale(call.v_descale, heads=call.kv_heads),
        "sinks": _absent(np.float32) if call.sinks is None else jnp.asarray(call.sinks, jnp.float32)[None],
        "cu_seqlens_q": _boundaries(call.cu_seqlens_q),
    }
    return Operands(**(dict.fromkeys(Operands._fields, _absent(np.int32)) | of_q | more))


def _append(call: CacheCall, operands: Operands) -> Append:
    k_new, v_new = (jnp.asarray(x) for x in (call.k_new, call.v_new))
    quantises = k_new.dtype != operands.k.dtype
    rotates = call.rotary_cos is not None
    return Append(
        q=operands.q,
        k_new=k_new[None] if call.packed_new else k_new,
        v_new=v_new[None] if call.packed_new else v_new,
        k_cache=operands.k,
        v_cache=operands.v,
        cache_seqlens=operands.seqused_k,
        cu_seqlens_q=operands.cu_seqlens_q,
        cu_seqlens_new=operands.cu_seqlens_q if call.packed_new else _absent(np.int32),
        page_table=operands.page_table,
        cache_batch_idx=operands.cache_batch_idx,
        rotary_cos=jnp.asarray(call.rotary_cos)[None] if rotates else _absent(np.float32),
        rotary_sin=jnp.asarray(call.rotary_sin)[None] if rotates else _absent(np.float32),
        k_descale=_descale(call.k_descale, heads=call.kv_heads) if quantises else _absent(np.float32),
        v_descale=operands.v_scale if quantises else _absent(np.float32),
    )


def _lengths_after(append: Append):
    """The keys of each sequence after an append, int32 (B,)."""
    *_, new = located(append.k_new.shape[:2], append.cu_seqlens_new, append.batch)
    return jnp.minimum(jnp.clip(append.cache_seqlens, 0, append.capacity) + new, append.capacity)


def _without_gradient(why: str):
    """The identity of any arrays, but to differentiate it raises."""

    @jax.custom_jvp
    def identity(arrays):
        return arrays

    @identity.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(why)

    return identity


_without_fp8_gradient = _without_gradient(
    "attention has no gradient in float8_e4m3fn inputs, nor in any input where q is float8_e4m3fn; differentiate "
    "through float16, bfloat16 or float32 q, k and v, or put jax.lax.stop_gradient around what is constant."
)
_without_cache_gradient = _without_gradient(
    "attention_with_kv_cache is for inference and has no gradient; differentiate jax_flash.attention, or put "
    "jax.lax.stop_gradient around its result."
)


def restore(call: Request, out: jax.Array, lse: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The results of a call in the user's layout: out, or (out, lse)."""
    if call.packed_q:
        out = out[0]
        lse = lse[0] if call.return_lse else lse
    return (out, lse) if call.return_lse else out


def restore_over_cache(call: CacheCall, operands: Operands, out: jax.Array, lse: jax.Array) -> Any:
    """The same of a call over a cache, with the caches behind them if new keys and values were written there."""
    results = restore(call, out, lse)
    if call.k_new is None:
        return results
    return (*(results if call.return_lse else (results,)), operands.k, operands.v)


def segments(cu_seqlens, rows: int) -> tuple[jax.Array, jax.Array]:
    """Boundaries of packed sequences as every implementation reads them, and the segment of each row, int32.

    Args:
      cu_seqlens: int32 (G, B + 1), any values.
      rows: of each group.

    Returns:
      The running maximum of cu_seqlens, clamped to [0, rows]; and, (G, rows), 0 for rows before the first sequence,
      b + 1 for those of sequence b, B + 1 for rows after the last.
    """
    bounds = jnp.clip(jax.lax.cummax(cu_seqlens, axis=1), 0, rows)
    search = functools.partial(jnp.searchsorted, side="right", method="scan_unrolled")
    return bounds, jax.vmap(search, in_axes=(0, None))(bounds, jnp.arange(rows, dtype=jnp.int32)).astype(jnp.int32)


def located(shape: tuple[int, int], cu_seqlens, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the rows of an array (groups, rows, ..) belong, packed or dense, all int32.

    Args:
      shape: (groups, rows).
      cu_seqlens: int32 (groups, batch / groups + 1), any values; or absent, where each group is a sequence.
      batch: the number of sequences in all groups.

    Returns:
      The sequence of each row, -1 for rows of none, and its index there, both (groups, rows); the rows of each
      sequence, (batch,).
    """
    groups, rows = shape
    row = jnp.arange(rows, dtype=jnp.int32)
    if not cu_seqlens.size:
        sequence = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32)[:, None], shape)
        return sequence, jnp.broadcast_to(row[None], shape), jnp.full((batch,), rows, jnp.int32)
    bounds, segment = segments(cu_seqlens, rows)
    count = cu_seqlens.shape[1] - 1
    first = count * jnp.arange(groups, dtype=jnp.int32)[:, None]
    sequence = jnp.where((segment > 0) & (segment <= count), first + segment - 1, -1)
    index = row[None] - jnp.take_along_axis(jnp.pad(bounds, ((0, 0), (1, 0))), segment, axis=1)
    return sequence, index, jnp.diff(bounds).reshape(-1)


def gathered(operands: Operands) -> Operands:
    """The same with the keys that each sequence has in a cache as a dense group of its own."""
    if operands.has("page_table"):
        index = operands.page_table
    elif operands.has("cache_batch_idx"):
        index = operands.cache_batch_idx[:, None]
    else:
        return operands

    def of_sequences(x):
        x = x[jnp.clip(index, 0, x.shape[0] - 1)]
        return x.reshape(operands.batch, -1, *x.shape[3:])

    absent = _absent(np.int32)
    k, v = of_sequences(operands.k), of_sequences(operands.v)
    return operands._replace(k=k, v=v, page_table=absent, cache_batch_idx=absent)


def _rounded(length: int | None) -> int | None:
    """That or the next power of two: calls that differ in it are compiled one by one."""
    return None if length is None else 1 << max(0, int(length) - 1).bit_length()


def _window(size: int | None) -> int:
    return UNBOUNDED if size is None or size < 0 else min(int(size), MAX_WINDOW)


def _out_dtype(call: Request) -> str:
    if call.out_dtype is not None:
        return np.dtype(call.out_dtype).name
    return "bfloat16" if call.q.dtype == jnp.float8_e4m3fn else call.q.dtype.name


def _scale(call: Request):
    """The factor of q . k, (B or 1, H or 1); a constant when the user gives none of its parts."""
    heads = call.q.shape[-2]
    scale = call.q.shape[-1] ** -0.5 if call.softmax_scale is None else call.softmax_scale
    return _descale(scale, heads=heads) * _descale(call.q_descale, heads=heads) * _descale(call.k_descale, heads=heads)


def _descale(descale, *, heads: int):
    """A factor (), (B,) or (B, heads) as float32 (B or 1, heads or 1); fewer heads repeat over the heads of a group."""
    if not isinstance(descale, (jax.Array, np.ndarray)):
        return np.full((1, 1), 1.0 if descale is None else descale, np.float32)
    descale = jnp.asarray(descale).reshape(descale.shape + (1,) * (2 - descale.ndim))
    if descale.shape[1] not in (1, heads):
        descale = jnp.repeat(descale, heads // descale.shape[1], axis=1)
    return descale


def _boundaries(cu_seqlens):
    """Those of packed sequences, which are one group; or absent."""
    return _absent(np.int32) if cu_seqlens is None else jnp.asarray(cu_seqlens)[None]


def _indices(x):
    return _absent(np.int32) if x is None else jnp.asarray(x)


def _absent(dtype) -> np.ndarray:
    return np.zeros((0,), dtype)

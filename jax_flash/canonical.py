"""From the user's words to the canonical form that every implementation takes, and back.

Differentiable in whatever the user may differentiate: q, k, v, softmax_scale, the descales and sinks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash.spec import UNBOUNDED, Attention, Call, Operands

MAX_WINDOW = 2**30
"""As good as unbounded, and a position plus or minus it still fits an int32."""


def canonical(call: Call) -> tuple[Attention, Operands]:
    """What a checked call computes, and the arrays it computes it from; these have no gradient where q is FP8."""
    left, right = (-1, -1) if call.window_size is None else call.window_size
    attention = Attention(
        window_left=_window(left),
        window_right=0 if call.causal else _window(right),
        softcap=float(call.softcap),
        out_dtype=_out_dtype(call),
        return_lse=bool(call.return_lse),
        max_seqlen_q=_rounded(call.max_seqlen_q) if call.packed_q else None,
        implementation=call.implementation,
    )
    q, k, v = (jnp.asarray(x) for x in (call.q, call.k, call.v))
    if k.dtype != q.dtype:  # FP8
        k, v = _without_gradient((k, v))
    cu_seqlens_q = jnp.asarray(call.cu_seqlens_q)[None] if call.packed_q else _absent(np.int32)
    cu_seqlens_k = jnp.asarray(call.cu_seqlens_k)[None] if call.packed_k else _absent(np.int32)
    if call.cu_seqlens_k is call.cu_seqlens_q:
        cu_seqlens_k = cu_seqlens_q  # one buffer, by which kernels know self-attention
    operands = Operands(
        q=q[None] if call.packed_q else q,
        k=k[None] if call.packed_k else k,
        v=v[None] if call.packed_k else v,
        scale=_scale(call),
        v_scale=_descale(call.v_descale, heads=call.k.shape[-2]),
        sinks=_absent(np.float32) if call.sinks is None else jnp.asarray(call.sinks, jnp.float32)[None],
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=_absent(np.int32) if call.seqused_q is None else jnp.asarray(call.seqused_q),
        seqused_k=_absent(np.int32) if call.seqused_k is None else jnp.asarray(call.seqused_k),
    )
    if q.dtype == jnp.float8_e4m3fn:
        operands = _without_gradient(operands)
    return attention, operands


@jax.custom_jvp
def _without_gradient(arrays):
    return arrays


@_without_gradient.defjvp
def _refuse_gradient(primals, tangents):
    raise NotImplementedError(
        "attention has no gradient in float8_e4m3fn inputs, nor in any input where q is float8_e4m3fn; differentiate "
        "through float16, bfloat16 or float32 q, k and v, or put jax.lax.stop_gradient around what is constant."
    )


def restore(call: Call, out: jax.Array, lse: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The results of a call in the user's layout: out, or (out, lse)."""
    if call.packed_q:
        out = out[0]
        lse = lse[0] if call.return_lse else lse
    return (out, lse) if call.return_lse else out


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


def _rounded(length: int | None) -> int | None:
    """That or the next power of two: calls that differ in it are compiled one by one."""
    return None if length is None else 1 << max(0, int(length) - 1).bit_length()


def _window(size: int | None) -> int:
    return UNBOUNDED if size is None or size < 0 else min(int(size), MAX_WINDOW)


def _out_dtype(call: Call) -> str:
    if call.out_dtype is not None:
        return np.dtype(call.out_dtype).name
    return "bfloat16" if call.q.dtype == jnp.float8_e4m3fn else call.q.dtype.name


def _scale(call: Call):
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


def _absent(dtype) -> np.ndarray:
    return np.zeros((0,), dtype)

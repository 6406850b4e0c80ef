"""The definition of attention, in plain jnp: what runs where no kernel does, and whose gradients kernels are to give.

Any dense side is a packed side whose sequences are equally long. So there is one computation: groups of query rows
against groups of key rows, and a mask that compares the sequence and the position of a row with those of a key.
It goes over blocks of query rows, each against all keys of its group, so memory stays linear in the lengths.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_flash import append, canonical, validate, validate_cache
from jax_flash.spec import UNBOUNDED, Attention, CacheCall, Call, Operands

BLOCK_SCORES = 2**25
"""Scores of one block of query rows over all groups and heads: 128 MiB in float32."""

PROBABILITY_UNIT = 2.0**7
"""What probability 1 is before it is rounded: kernels use the range of a narrow dtype, not only that below 1."""


def attention(q, k, v, **arguments: Any):
    """`jax_flash.attention` by its definition: the same arguments and results, for any head dim, in float32.

    It computes in float64 under `jax_enable_x64`. `implementation` has no effect. Like any implementation it refuses
    gradients of FP8.
    """
    call = dataclasses.replace(Call(q, k, v, **arguments), implementation="xla")
    validate.check(call)
    return canonical.restore(call, *forward(*canonical.canonical(call)))


def attention_with_kv_cache(q, k_cache, v_cache, k_new=None, v_new=None, **arguments: Any):
    """`jax_flash.attention_with_kv_cache` by its definition, in the same way."""
    call = CacheCall(q, k_cache, v_cache, k_new, v_new, **arguments)
    call = dataclasses.replace(call, implementation="xla")
    validate_cache.check(call)
    attention, operands, new = canonical.over_cache(call)
    if new is not None:
        operands = operands.after(append.append(attention, new))
    return canonical.restore_over_cache(call, operands, *forward(attention, operands))


def forward(attention: Attention, operands: Operands, compute_dtype=None) -> tuple[jax.Array, jax.Array]:
    """out and lse of canonical operands, with exact masks and no approximation; differentiable.

    Args:
      attention: what to compute.
      operands: q, k and v may also be float64.
      compute_dtype: None computes in float32, or float64 under `jax_enable_x64`. A 16-bit dtype rounds scores to it,
        and probabilities to the dtype of q: the cost of the inputs' precision, which tests take as their tolerance.
    """
    groups, q_len, heads, _ = operands.q.shape
    if operands.q.size == 0 or operands.batch == 0:
        out, lse = jnp.zeros((groups, q_len, heads, operands.v.shape[3])), jnp.full((groups, q_len, heads), -jnp.inf)
    else:
        out, lse = _forward(attention, operands, compute_dtype)
        out = out.reshape(groups, q_len, heads, -1)
        lse = lse.reshape(groups, q_len, heads)
    lse = jnp.swapaxes(lse, 1, 2) if attention.return_lse else jnp.zeros((0,))
    return out.astype(attention.out_dtype), lse.astype(jnp.float32)


def _forward(attention, operands, compute_dtype):
    operands = canonical.gathered(operands)
    real = jnp.result_type(float)
    rounded = functools.partial(_rounded, dtype=compute_dtype)
    rows, keys = _rows_and_keys(operands, real)

    def block(rows: _Rows):
        visible = _visible(attention, rows, keys)
        scores = jnp.where(visible, _scores(attention, rows, keys, rounded), -jnp.inf)
        top = jax.lax.stop_gradient(scores).max(-1, keepdims=True, initial=-jnp.inf)
        if rows.sinks is not None:
            sinks = _columns(rows.sinks)
            top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.where(visible, jnp.exp(scores - top), 0)
        total = weights.sum(-1, keepdims=True)
        if rows.sinks is not None:
            total += jnp.exp(sinks - top)
        seen = total != 0
        total = jnp.where(seen, total, 1)
        if compute_dtype is not None:
            weights = _rounded(PROBABILITY_UNIT * weights, operands.q.dtype) / PROBABILITY_UNIT
        out = _columns(rows.v_scale) * _einsum("ghrqk,ghkd->ghrqd", weights / total, keys.v)
        out = jnp.where(visible.any(-1, keepdims=True), out, 0)  # whatever scales, values and cotangents hold
        lse = jnp.where(seen & rows.used[:, None, None, :, None], top + jnp.log(total), -jnp.inf)
        return _by_row(out), _by_row(lse[..., 0])

    blocks = _blocks(rows, rows, keys)
    return _joined(jax.lax.map(jax.checkpoint(block, prevent_cse=False), blocks), rows)


def backward(attention: Attention, operands: Operands, dout, lse, delta) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv, in the dtypes of q, k and v, from the log-sum-exp that the forward pass saved.

    The products take their factors in the dtype of q and add in float32, as kernels do.

    Args:
      attention: what was computed.
      operands: of the forward pass.
      dout: cotangent of out, (G, Sq, H, Dv).
      lse: float32 (G, H, Sq).
      delta: float32 (G, H, Sq), the sum over a row of probability times its cotangent, less the cotangent of lse.
    """
    narrow = operands.q.dtype
    rows, keys = _rows_and_keys(operands, narrow)
    like_q = rows.q.shape[:4]
    dout = dout.reshape(*like_q, -1).astype(narrow)
    lse, delta = (jnp.swapaxes(x, 1, 2).reshape(like_q) for x in (lse, delta))

    def block(sums, args):
        dk, dv = sums
        rows, dout, lse, delta = args
        visible = _visible(attention, rows, keys)
        dout = jnp.where(visible.any(-1, keepdims=True), _by_head(dout), 0)  # whatever rows that see no key hold
        scores = _scores(attention, rows, keys)
        weights = jnp.where(visible, jnp.exp(scores - _columns(lse)), 0)
        v_scale = _columns(rows.v_scale)
        dweights = v_scale * _einsum("ghrqd,ghkd->ghrqk", dout, keys.v)
        dscores = jnp.where(visible, weights * (dweights - _columns(delta)), 0)
        if attention.softcap:
            dscores *= 1 - jnp.square(scores / attention.softcap)
        dscores = dscores.astype(narrow)
        scale = _columns(rows.scale)
        dq = scale * _einsum("ghrqk,ghkd->ghrqd", dscores, keys.k)
        dk += _einsum("ghrqk,ghrqd->ghkd", dscores, (scale * _by_head(rows.q)).astype(narrow))
        dv += _einsum("ghrqk,ghrqd->ghkd", (v_scale * weights).astype(narrow), dout)
        return (dk, dv), _by_row(dq)

    sums = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, sums, _blocks((rows, dout, lse, delta), rows, keys))
    dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dk, dv))
    gradients = zip((_joined(dq, rows), dk, dv), operands[:3], strict=True)
    dq, dk, dv = (dx.reshape(x.shape).astype(x.dtype) for dx, x in gradients)
    return dq, dk, dv


# Which row belongs to which sequence, and what it sees.


class _Rows(NamedTuple):
    """Query rows, grouped as the packed side is; every array leads with (groups, rows)."""

    q: Any
    """(.., Hk, H / Hk, D), zero in unused rows."""
    scale: Any
    """(.., Hk, H / Hk or 1)."""
    v_scale: Any
    """(.., Hk, 1)."""
    sinks: Any
    """(.., Hk, H / Hk), or None."""
    used: Any
    """Whether the row counts."""
    sequence: Any
    """Index of its sequence."""
    position: Any
    """Index, in the sequence, of the key that the query lines up with; the last used ones line up."""


class _Keys(NamedTuple):
    """Keys and values of all groups, heads first."""

    k: Any
    """(groups, Hk, keys, D), zero in unused rows."""
    v: Any
    """(groups, Hk, keys, Dv), likewise."""
    sequence: Any
    """(groups, keys), -1 where unused."""
    position: Any
    """(groups, keys), in the sequence."""


def sequence_index(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The sequence of each row of q (G, Sq) and of k (G', Sk), int32: -1 for rows of none and those past seqused."""
    (q_sequence, _, _), (k_sequence, _, _) = _sides(operands)
    return q_sequence.reshape(operands.q.shape[:2]), k_sequence.reshape(operands.k.shape[:2])


def _sides(operands):
    """For q and for k: sequence and position of each row (groups, rows), and the used length of each sequence (B,)."""
    nothing = jnp.zeros((operands.batch,), jnp.int32)
    leftpad = operands.cache_leftpad if operands.has("cache_leftpad") else nothing
    return (
        _locate(operands, operands.q, operands.cu_seqlens_q, operands.seqused_q, nothing),
        _locate(operands, operands.k, operands.cu_seqlens_k, operands.seqused_k, leftpad),
    )


def _locate(operands, x, cu_seqlens, seqused, first):
    sequence, position, lengths = canonical.located(x.shape[:2], cu_seqlens, operands.batch)
    if seqused.size:
        lengths = jnp.clip(seqused, 0, lengths)
    used = (sequence >= 0) & (position >= first[sequence]) & (position < lengths[sequence])
    # Groups common to q and k: those of the packed side.
    packed = (cu.shape[0] for cu in (operands.cu_seqlens_q, operands.cu_seqlens_k) if cu.size)
    groups = next(packed, operands.q.shape[0])
    return jnp.where(used, sequence, -1).reshape(groups, -1), position.reshape(groups, -1), lengths


def _rows_and_keys(operands: Operands, dtype) -> tuple[_Rows, _Keys]:
    (q_sequence, q_position, q_lengths), (k_sequence, k_position, k_lengths) = _sides(operands)
    kv_heads = operands.k.shape[2]
    used = q_sequence >= 0

    def per_row(x):
        """What is given for each sequence, for each row of it, and 0 for rows of none."""
        x = x if x.shape[0] == 1 else jnp.take(x, q_sequence, axis=0, mode="clip")
        x = _used(jnp.broadcast_to(x, (*used.shape, max(x.shape[-1], kv_heads))), used)
        return x.reshape(*used.shape, kv_heads, -1)

    def per_key(x):
        x = _used(x.reshape(*k_sequence.shape, *x.shape[2:]), k_sequence >= 0)
        return jnp.swapaxes(x, 1, 2).astype(dtype)

    q = operands.q.reshape(*used.shape, kv_heads, -1, operands.q.shape[3])
    rows = _Rows(
        q=_used(q, used).astype(dtype),
        scale=per_row(operands.scale),
        v_scale=per_row(operands.v_scale),
        sinks=per_row(operands.sinks) if operands.has("sinks") else None,
        used=used,
        sequence=q_sequence,
        position=q_position + jnp.take(k_lengths - q_lengths, q_sequence, mode="clip"),
    )
    return rows, _Keys(k=per_key(operands.k), v=per_key(operands.v), sequence=k_sequence, position=k_position)


def _visible(attention: Attention, rows: _Rows, keys: _Keys):
    """Whether a row sees a key: (groups, 1, 1, rows, keys)."""
    visible = rows.used[:, :, None] & (rows.sequence[:, :, None] == keys.sequence[:, None])
    offset = keys.position[:, None] - rows.position[:, :, None]
    if attention.window_left != UNBOUNDED:
        visible &= offset >= -attention.window_left
    if attention.window_right != UNBOUNDED:
        visible &= offset <= attention.window_right
    return visible[:, None, None]


def _scores(attention: Attention, rows: _Rows, keys: _Keys, rounded=lambda x: x):
    """(groups, Hk, H / Hk, rows, keys), before masking."""
    scores = rounded(_columns(rows.scale) * _einsum("ghrqd,ghkd->ghrqk", _by_head(rows.q), keys.k))
    if attention.softcap:
        scores = rounded(attention.softcap * jnp.tanh(scores / attention.softcap))
    return scores


def _by_head(x):
    """(groups, rows, Hk, H / Hk, ..) as (groups, Hk, H / Hk, rows, ..), which is how scores lie."""
    return jnp.moveaxis(x, 1, 3)


def _by_row(x):
    """The inverse of `_by_head`."""
    return jnp.moveaxis(x, 3, 1)


def _columns(x):
    """A value of each row as a column beside scores."""
    return _by_head(x)[..., None]


def _used(x, used):
    """x (groups, rows, ..), zero in unused rows whatever they hold."""
    return jnp.where(used.reshape(*used.shape, *(1,) * (x.ndim - 2)), x, 0)


def _rounded(x, dtype):
    """Values of `dtype`, kept as they are stored: a pair of casts is what XLA may leave out."""
    if dtype is None:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _einsum(spec, x, y):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(spec, x, y, precision="highest", preferred_element_type=wide)


# Blocks of query rows.


def _blocks(tree, rows: _Rows, keys: _Keys):
    """Arrays (groups, rows, ..) as blocks (blocks, groups, rows of one, ..); the last one is filled with zeros."""
    groups, length, kv_heads, heads_per_kv_head, _ = rows.q.shape
    scores_per_row = groups * kv_heads * heads_per_kv_head * keys.position.shape[1]
    size = min(length, max(1, BLOCK_SCORES // max(1, scores_per_row)))
    count = -(-length // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(groups, count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _joined(tree, rows: _Rows):
    """The inverse of `_blocks`."""
    groups, length = rows.used.shape
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(groups, -1, *x.shape[3:])[:, :length], tree)

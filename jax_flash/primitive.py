"""The JAX primitives append_p, forward_p and backward_p: abstract evaluation, batching, lowering; and the gradient."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jax_flash import append as definition
from jax_flash import cuda, launch, reference
from jax_flash.spec import Append, Attention, Operands, Params


def append(attention: Attention, arrays: Append) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What append.py defines."""
    q, k_cache, v_cache = append_p.bind(*arrays, attention=attention)
    return q, k_cache, v_cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(attention: Attention, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Attention on canonical operands, differentiable in q, k, v, scale, v_scale and sinks.

    Returns:
      out (G, Sq, H, Dv) in `attention.out_dtype`, and lse float32 (G, H, Sq), empty unless `attention.return_lse`.
    """
    out, lse = forward_p.bind(*operands, attention=attention)
    return out, lse


def _attend_forward(attention: Attention, operands: Operands):
    out, lse = forward_p.bind(*operands, attention=dataclasses.replace(attention, return_lse=True))
    return (out, lse if attention.return_lse else jnp.zeros((0,), lse.dtype)), (operands, out, lse)


def _attend_backward(attention: Attention, saved, cotangents):
    operands, out, lse = saved
    kv_is_fp8 = operands.k.dtype != operands.q.dtype  # of which canonical.py has refused gradients
    operands = operands.widened()
    dout, dlse = cotangents
    # delta = sum over a row of P * dP. The cotangent of the LSE adds dlse * P to dS = P * (dP - delta).
    delta = jnp.swapaxes(_row_dot(out, dout), 1, 2)
    if attention.return_lse:
        delta = delta - dlse
    dq, dk, dv = backward_p.bind(*operands, dout, lse, delta, attention=attention)
    q_index, k_index = reference.sequence_index(operands)
    gradients = {
        "q": dq,
        "k": None if kv_is_fp8 else dk,
        "v": None if kv_is_fp8 else dv,
        "scale": _sum_rows(_row_dot(operands.q, dq), q_index, operands.batch, operands.scale) / operands.scale,
        "v_scale": _sum_rows(_row_dot(operands.v, dv), k_index, operands.batch, operands.v_scale) / operands.v_scale,
    }
    if operands.has("sinks"):
        sinks = jnp.broadcast_to(operands.sinks, (operands.batch, operands.sinks.shape[1]))
        row_lse, row_delta = (jnp.swapaxes(x, 1, 2) for x in (lse, delta))
        # A row that sees nothing, its sink being -inf too, gives nothing.
        rows = jnp.where(row_lse == -jnp.inf, 0, -jnp.exp(sinks[q_index] - row_lse) * row_delta)
        gradients["sinks"] = _sum_rows(rows, q_index, operands.batch, operands.sinks)
    return (Operands(**{name: gradients.get(name) for name in Operands._fields}),)


def _row_dot(x, dx):
    """Sums x * dx over the last axis; where x is 0, as in rows that see no key, dx may be NaN."""
    return jnp.where(x == 0, 0, x.astype(jnp.float32) * dx.astype(jnp.float32)).sum(-1)


def _sum_rows(rows, index, batch, like):
    """Sums rows (G, S, heads) over each sequence, and over the axes in which `like` (B or 1, heads or 1) has one entry.

    Rows of no sequence (index -1) do not count, and no row of another sequence, whatever they hold. One sequence of
    each group at a time: additions keep their order, which those of a scatter on a GPU do not, and memory stays linear.
    """
    groups = rows.shape[0]
    if like.shape[0] == 1:
        total = jnp.where(index[..., None] < 0, 0, rows).sum((0, 1))[None]
    else:
        sequences = jnp.arange(batch, dtype=index.dtype).reshape(groups, -1)

        def of_one(sequence):
            return jnp.where((index == sequence[:, None])[..., None], rows, 0).sum(1)

        total = jnp.swapaxes(jax.lax.map(of_one, sequences.T), 0, 1).reshape(batch, -1)
    return total if like.shape[1] > 1 else total.sum(1, keepdims=True)


attend.defvjp(_attend_forward, _attend_backward)


def _second_derivative(*_, **__):
    raise NotImplementedError(
        "jax_flash.attention has no second derivatives with kernels; use implementation='xla', which has them."
    )


# Abstract evaluation.


def _append_abstract(*arrays, attention: Attention):
    arrays = Append(*arrays)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in (arrays.q, arrays.k_cache, arrays.v_cache)]


def _forward_abstract(*arrays, attention: Attention):
    results = launch.forward_result(attention, Params.of(attention, Operands(*arrays)))
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in results]


def _backward_abstract(*arrays, attention: Attention):
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in Operands(*arrays[:-3])[:3]]


# Batching: every operand leads with groups or sequences, so a mapped axis folds into its leading axis.

_SHARED = ("scale", "v_scale", "sinks", "rotary_cos", "rotary_sin", "k_descale", "v_descale")
"""Operands whose leading axis may be 1 and then stands for every sequence."""

_INDICES = ("page_table", "cache_batch_idx")
"""Operands whose entries are groups of keys and values."""


def _batch(primitive, kind, arrays, axes, *, attention: Attention):
    """The batching rule of a primitive of `kind`, Operands or Append."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    one = [
        x if axis is None else jax.ShapeDtypeStruct(np.delete(x.shape, axis), x.dtype)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    if size == 0:  # an empty array would look like an absent operand
        results = jax.eval_shape(functools.partial(primitive.bind, attention=attention), *one)
        return [jnp.zeros((0, *x.shape), x.dtype) for x in results], [0 for _ in results]
    batch = kind(*one[: len(kind._fields)]).batch
    names = (*kind._fields, "dout", "lse", "delta")[: len(arrays)]  # the last three are the backward's
    arrays, axes = dict(zip(names, arrays, strict=True)), dict(zip(names, axes, strict=True))
    index = next((name for name in _INDICES if arrays[name].size), None)
    # A cache that all share stays one, unless each writes into its own.
    stays = ("k", "v") if index and kind is Operands and axes["k"] is None and axes["v"] is None else ()
    folded = {
        name: x if name in stays else _fold(x, axes[name], size, batch if name in _SHARED else None)
        for name, x in arrays.items()
    }
    if index and not stays:
        cache = folded["k" if kind is Operands else "k_cache"]
        folded[index] = _in_own_cache(folded[index], size, cache.shape[0] // size, reads=kind is Operands)
    results = primitive.bind(*folded.values(), attention=attention)
    # An empty result, the LSE that nobody asked for, has no axis to map.
    unfolded = [x.reshape(size, -1, *x.shape[1:]) if x.size else x for x in results]
    return unfolded, [0 if x.size else None for x in results]


def _in_own_cache(index, size, groups, reads):
    """Indices into a cache of `groups`, folded, as indices into `size` such caches, each into its own.

    What leads outside must not lead into another: it is clamped by who reads, and dropped, being -1, by who writes.
    """
    index_of_one = index.reshape(size, -1)
    within = jnp.clip(index_of_one, 0, groups - 1)
    moved = within + groups * jnp.arange(size, dtype=index.dtype)[:, None]
    return jnp.where(reads | (index_of_one == within), moved, -1).reshape(index.shape)


def _fold(x, axis, size, batch):
    """Folds a mapped axis of `x` into its leading axis, after broadcasting `x` where none is mapped (None).

    With `batch`, a leading 1 serves that many sequences: it stays where nothing is mapped and else is spread over them.
    """
    if x.size == 0:
        return x
    if axis is None:
        if batch and x.shape[0] == 1:
            return x
        x = jnp.broadcast_to(x, (size, *x.shape))
    else:
        x = jnp.moveaxis(x, axis, 0)
    if batch and x.shape[1] == 1:
        x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(-1, *x.shape[2:])


# Lowering.


@functools.cache
def _warn_reference(reason: str) -> None:
    warnings.warn(f"jax_flash.attention runs as plain jnp here: {reason}", stacklevel=2)


def _append_cpu(*arrays, attention: Attention):
    return definition.append(attention, Append(*arrays), launch.write_cpu)


def _append_cuda(*arrays, attention: Attention):
    arrays = Append(*arrays)
    if launch.why_not_appended(arrays):
        return definition.append(attention, arrays)
    return cuda.append(attention, arrays)


def _append_elsewhere(*arrays, attention: Attention):
    return definition.append(attention, Append(*arrays))


def _forward_cuda(*arrays, attention: Attention):
    operands = Operands(*arrays)
    if reason := launch.why_not_served(attention, operands):
        if attention.implementation == "cuda":  # what `vmap` made of a call that was served
            raise launch.cannot_run("cuda", reason)
        _warn_reference(reason)
        return reference.forward(attention, operands)
    return cuda.forward(attention, operands)


def _forward_cpu(*arrays, attention: Attention):
    return launch.forward_cpu(attention, Operands(*arrays))


def _forward_elsewhere(*arrays, attention: Attention):
    _warn_reference("this platform has no kernel")
    return reference.forward(attention, Operands(*arrays))


def _backward_cpu(*arrays, attention: Attention):
    *operands, dout, lse, delta = arrays
    return launch.backward_cpu(attention, Operands(*operands), dout, lse, delta)


def _backward_elsewhere(*arrays, attention: Attention):
    *operands, dout, lse, delta = arrays
    return reference.backward(attention, Operands(*operands), dout, lse, delta)


def _for(platform, function):
    """`function`, refusing an implementation asked for by name that belongs to another platform than `platform`."""

    def checked(*arrays, attention: Attention):
        if attention.implementation not in (None, platform):
            where = f"platform {platform}" if platform else "another platform"
            raise launch.cannot_run(attention.implementation, f"the computation is compiled for {where}.")
        return function(*arrays, attention=attention)

    return mlir.lower_fun(checked, multiple_results=True)


def _run(primitive, *arrays, attention: Attention):
    """Calls outside jax.jit are compiled all the same; under jax.disable_jit too, for there is no other way to run."""
    with jax.disable_jit(False):
        return _compiled(primitive, attention)(*arrays)


@functools.cache
def _compiled(primitive, attention):
    return jax.jit(functools.partial(primitive.bind, attention=attention))


def _primitive(name, kind, abstract, *, cpu, cuda, elsewhere):
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(_run, primitive))
    primitive.def_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = _second_derivative
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive, kind)
    mlir.register_lowering(primitive, _for("cpu", cpu), platform="cpu")
    mlir.register_lowering(primitive, _for("cuda", cuda), platform="cuda")
    mlir.register_lowering(primitive, _for(None, elsewhere))
    return primitive


append_p = _primitive(
    "jax_flash_append",
    Append,
    _append_abstract,
    cpu=_append_cpu,
    cuda=_append_cuda,
    elsewhere=_append_elsewhere,
)
forward_p = _primitive(
    "jax_flash_forward",
    Operands,
    _forward_abstract,
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    elsewhere=_forward_elsewhere,
)
backward_p = _primitive(
    "jax_flash_backward",
    Operands,
    _backward_abstract,
    cpu=_backward_cpu,
    cuda=_backward_elsewhere,
    elsewhere=_backward_elsewhere,
)

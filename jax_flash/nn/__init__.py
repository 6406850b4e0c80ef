"""Attention for Flax: `attention_fn` for its multi-head modules, and whole modules in `linen` and `nnx`.

`attention_fn` takes arrays alone, so it needs no flax; `jax_flash.nn.linen` and `jax_flash.nn.nnx` import it when used.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_flash import api, validate

__all__ = ["attention_fn", "linen", "nnx"]


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jax_flash.nn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | jax.Array | None = None,
    sinks: jax.Array | None = None,
    seqused_q: jax.Array | None = None,
    seqused_k: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax_flash.attention` as the `attention_fn` of Flax's multi-head modules, linen's and nnx's.

    The arguments down to `attn_weights_value_einsum` are those that Flax passes; `functools.partial` sets the others:

        attention_fn = functools.partial(jax_flash.nn.attention_fn, causal=True, window_size=(256, 0))
        flax.linen.MultiHeadDotProductAttention(num_heads=8, dtype=jnp.bfloat16, attention_fn=attention_fn)
        flax.nnx.MultiHeadAttention(8, 512, dtype=jnp.bfloat16, attention_fn=attention_fn, decode=False, rngs=rngs)

    The softmax is computed and products are added in float32 whatever `precision` and `force_fp32_for_softmax` say.

    Args:
      query: (batch.., Sq, H, D), with any number of batch dimensions, or none.
      key: (batch.., Sk, Hk, D), H a multiple of Hk.
      value: (batch.., Sk, Hk, Dv).
      bias: must be None.
      mask: must be None; `causal`, `window_size`, `seqused_q` and `seqused_k` say what is seen.
      broadcast_dropout: has no effect, for there is no dropout.
      dropout_rng: likewise.
      dropout_rate: must be 0 unless `deterministic`.
      deterministic: whether there is no dropout, whatever its rate.
      dtype: what query, key and value are cast to; the dtype that they promote to unless given.
      precision: has no effect.
      module: must be None: attention weights are never in memory, so none can be sown.
      is_causal: Flax's own causal mask, which lines up the first query with the first key; needs Sq == Sk, and both
        or none of seqused_q and seqused_k.
      force_fp32_for_softmax: has no effect.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.
      causal: query i sees keys j <= i + Sk - Sq, with the used lengths; where these are equal it is `is_causal`.
      window_size: as in `jax_flash.attention`; so are softcap, softmax_scale, sinks and implementation.
      softcap: see window_size.
      softmax_scale: see window_size.
      sinks: see window_size.
      seqused_q: int32 (batch..): only the first so many queries count. The outputs of the others are 0.
      seqused_k: int32 (batch..): only the first so many keys count; in place of a padding mask.
      implementation: see window_size.

    Returns:
      (batch.., Sq, H, Dv), in the dtype that query, key and value were cast to; bfloat16 where that is FP8.

    Raises:
      NotImplementedError: dropout, a bias, a mask or another argument that no kernel here serves.
      TypeError, ValueError: an argument is wrong, as `jax_flash.attention` says.
    """
    _must_be_none("bias", bias, "no kernel here adds one to the scores")
    _must_be_none(
        "mask",
        mask,
        "no kernel here takes one (nor Flax's decode=True, which makes one); what is seen is said by causal=True, "
        "window_size=, and lengths with seqused_q= and seqused_k=, as in functools.partial(attention_fn, causal=True)",
    )
    _must_be_none("module", module, "attention weights are never in memory, so sow_weights has none to sow")
    _must_be_none("qk_attn_weights_einsum", qk_attn_weights_einsum, "no kernel here calls it")
    _must_be_none("attn_weights_value_einsum", attn_weights_value_einsum, "no kernel here calls it")
    validate.check_bool("deterministic", deterministic)
    validate.check_bool("is_causal", is_causal)
    validate.check_bool("causal", causal)
    if not (deterministic or (validate.is_real(dropout_rate) and dropout_rate == 0)):
        raise NotImplementedError(
            f"dropout_rate must be 0 unless deterministic is True, got {validate.describe(dropout_rate)}: no kernel "
            f"here drops weights."
        )

    batch = _batch(query, key, value)
    q_len, kv_len = query.shape[-3], key.shape[-3]
    if is_causal and q_len != kv_len:
        raise NotImplementedError(
            f"is_causal needs as many queries as keys, got {q_len} and {kv_len}: Flax lines up the first query with "
            f"the first key, kernels here the last with the last; say causal=True if that is meant."
        )
    if is_causal and (seqused_q is None) != (seqused_k is None):
        given, missing = ("seqused_k", "seqused_q") if seqused_q is None else ("seqused_q", "seqused_k")
        raise NotImplementedError(
            f"is_causal needs {missing} where {given} is given, got None: kernels here line up the last used query "
            f"with the last used key."
        )
    if dtype is not None and validate.dtype_name(dtype) is None:
        raise TypeError(f"dtype must be None or a dtype, got {validate.describe(dtype)}.")
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype

    def folded(x):
        return jnp.asarray(x, dtype).reshape(math.prod(batch), *x.shape[-3:])

    def lengths(name, seqused):
        if seqused is None:
            return None
        validate.check_lengths(name, seqused, batch)
        return seqused.reshape(-1)

    out = api.attention(
        folded(query),
        folded(key),
        folded(value),
        causal=causal or is_causal,
        window_size=window_size,
        softcap=softcap,
        softmax_scale=softmax_scale,
        sinks=sinks,
        seqused_q=lengths("seqused_q", seqused_q),
        seqused_k=lengths("seqused_k", seqused_k),
        implementation=implementation,
    )
    return out.reshape(*batch, *out.shape[1:])


def _must_be_none(name: str, given: Any, reason: str) -> None:
    if given is not None:
        raise NotImplementedError(f"{name} must be None, got one of type {type(given).__name__}: {reason}.")


def _batch(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[int, ...]:
    """The batch dimensions. Folded ones would hide that they differ, so that is checked here."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if not validate.is_array(x):
            raise TypeError(f"{name} must be an array, got {validate.describe(x)}.")
        if x.ndim < 3:
            raise ValueError(f"{name} must have shape (batch.., length, heads, head_dim), got shape {x.shape}.")
    batch = query.shape[:-3]
    for name, x in arrays.items():
        if x.shape[:-3] != batch:
            raise ValueError(f"{name} must have the batch dimensions of query, {batch}, got shape {x.shape}.")
    return batch

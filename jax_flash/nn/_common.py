"""What the two `FlashAttention` modules have in common: all but how a Flax module is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from jax_flash import api, quantize, validate

NEEDS_FLAX = "{} needs flax; install it with: pip install 'flax>=0.12'."

Shape = tuple[int, ...]

# Flax's own defaults.
KERNEL_INIT = jax.nn.initializers.lecun_normal()
BIAS_INIT = jax.nn.initializers.zeros


class Fields(Protocol):
    """The fields of either module that decide what it computes; `linen.FlashAttention` describes them."""

    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    out_features: int | None
    causal: bool
    window_size: tuple[int | None, int | None] | None
    softcap: float
    dtype: DTypeLike | None
    fp8: bool
    implementation: str | None


def projections(module: Fields, features: int, name_of_features: str) -> dict[str, tuple[Shape, Shape]]:
    """Name, input dims and output dims of each projection, named and shaped as in Flax's multi-head modules.

    Raises:
      TypeError, ValueError, NotImplementedError: a field is wrong, or `features`, which the user knows by its name.
    """
    for name in ("num_heads", "num_kv_heads", "head_dim", "out_features"):
        if getattr(module, name) is not None:
            validate.check_positive(name, getattr(module, name))
    validate.check_positive(name_of_features, features)
    _check_dtype(module.dtype)
    validate.check_bool("fp8", module.fp8)
    num_heads = module.num_heads
    num_kv_heads = num_heads if module.num_kv_heads is None else module.num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}.")
    if module.head_dim is None and features % num_heads:
        raise ValueError(
            f"head_dim must be given where num_heads does not divide {name_of_features}, got {num_heads} heads and "
            f"{features} features."
        )
    head_dim = features // num_heads if module.head_dim is None else module.head_dim
    out_features = features if module.out_features is None else module.out_features
    return {
        "query": ((features,), (num_heads, head_dim)),
        "key": ((features,), (num_kv_heads, head_dim)),
        "value": ((features,), (num_kv_heads, head_dim)),
        "out": ((num_heads, head_dim), (out_features,)),
    }


def _check_dtype(dtype) -> None:
    if validate.dtype_name(dtype) == "float8_e4m3fn":
        raise NotImplementedError(
            "dtype must be float16, bfloat16 or float32, got float8_e4m3fn: projections are not computed in it; for "
            "attention in FP8 say fp8=True."
        )
    validate.check_float_dtype("dtype", dtype)


def check_arguments(x, cu_seqlens, seqused) -> None:
    """Checks what a module is called with."""
    if not validate.is_array(x):
        raise TypeError(f"x must be an array, got {validate.describe(x)}.")
    if x.ndim not in (2, 3):
        raise ValueError(
            f"x must have shape (batch, length, features) or, packed, (tokens, features), got shape {x.shape}."
        )
    if x.ndim == 2 and cu_seqlens is None:
        raise ValueError(f"cu_seqlens must be given for packed x of shape {x.shape}, got None.")
    if x.ndim == 3 and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens is for packed x of shape (tokens, features), got x of shape {x.shape}.")
    if cu_seqlens is not None:
        validate.check_boundaries("cu_seqlens", cu_seqlens)
    if seqused is not None:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        validate.check_lengths("seqused", seqused, (batch,))


def self_attention(
    module: Fields,
    layers: Mapping[str, Callable[[jax.Array], jax.Array]],
    x: jax.Array,
    cu_seqlens: jax.Array | None,
    seqused: jax.Array | None,
) -> jax.Array:
    """Projects x to queries, keys and values, attends within each sequence, and projects the result."""
    arrays: dict[str, Any] = {"q": layers["query"](x), "k": layers["key"](x), "v": layers["value"](x)}
    dtype = arrays["q"].dtype
    if module.fp8:
        for name in ("q", "k", "v"):
            arrays[name], arrays[f"{name}_descale"] = quantize.quantize_fp8(
                arrays[name], cu_seqlens=cu_seqlens, seqused=seqused, hadamard=name != "v"
            )
    attended = api.attention(
        **arrays,
        causal=module.causal,
        window_size=module.window_size,
        softcap=module.softcap,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        seqused_q=seqused,
        seqused_k=seqused,
        out_dtype=dtype,
        implementation=module.implementation,
    )
    return layers["out"](attended)

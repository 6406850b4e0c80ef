"""What the Flax layer refuses, and in which words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_nn import BATCH, FEATURES, LENGTH, flash_attention, flax_attention, in_each_framework, random

import jax_flash
from jax_flash.nn import attention_fn

ARRAYS = dict.fromkeys(("query", "key", "value"), np.ones((2, 3, 7, 4, 16), np.float32))
BAD = {
    "bias": ({"bias": np.zeros((7, 7))}, NotImplementedError, "bias must be None, got one of type ndarray: no kernel"),
    "mask": (
        {"mask": np.ones((7, 7), bool)},
        NotImplementedError,
        "mask must be None, got .* causal=True, window_size=, and lengths with seqused_q= and seqused_k=",
    ),
    "dropout": (
        {"dropout_rate": 0.25},
        NotImplementedError,
        "dropout_rate must be 0 unless deterministic is True, got 0.25",
    ),
    "dropout-negative": ({"dropout_rate": -1.0}, NotImplementedError, "dropout_rate must be 0 unless .* got -1.0"),
    "dropout-none": ({"dropout_rate": None}, NotImplementedError, "dropout_rate must be 0 unless .* got None"),
    "deterministic": ({"deterministic": None}, TypeError, "deterministic must be a Python bool .* got None"),
    "is-causal": ({"is_causal": np.ones(1)}, TypeError, "is_causal must be a Python bool .* got a float64 array"),
    "causal": ({"causal": None}, TypeError, "^causal must be a Python bool .* got None"),
    "dtype-class": ({"dtype": dict}, TypeError, "dtype must be None or a dtype, got <class 'dict'>"),
    "dtype": ({"dtype": "wide"}, TypeError, "dtype must be None or a dtype, got 'wide'"),
    "query-list": ({"query": [[1.0]]}, TypeError, r"query must be an array, got \[\[1.0\]\] of type list"),
    "value-none": ({"value": None}, TypeError, "value must be an array, got None"),
    "module": ({"module": object()}, NotImplementedError, "module must be None, got one of type object: .* sow"),
    "einsum-of-scores": (
        {"qk_attn_weights_einsum": jnp.einsum},
        NotImplementedError,
        "^qk_attn_weights_einsum must be",
    ),
    "einsum-of-values": ({"attn_weights_value_einsum": jnp.einsum}, NotImplementedError, "^attn_weights_value_einsum"),
    "is-causal-lengths": (
        {name: np.ones((2, 3, 9, 4, 16), np.float32) for name in ("key", "value")} | {"is_causal": True},
        NotImplementedError,
        "is_causal needs as many queries as keys, got 7 and 9: .* say causal=True",
    ),
    "is-causal-seqused": (
        {"seqused_k": np.ones((2, 3), np.int32), "is_causal": True},
        NotImplementedError,
        "is_causal needs seqused_q where seqused_k is given, got None",
    ),
    "batch-of-key": (
        {"key": np.ones((3, 2, 7, 4, 16), np.float32)},
        ValueError,
        r"key must have the batch dimensions of query, \(2, 3\), got shape \(3, 2, 7, 4, 16\)",
    ),
    "rank": (
        {"query": np.ones((4, 16))},
        ValueError,
        r"query must have shape \(batch.., length, .* got shape \(4, 16\)",
    ),
    "seqused": (
        {"seqused_k": np.ones((3, 2), np.int32)},
        ValueError,
        r"seqused_k must have shape \(2, 3\), one length a sequence, got shape \(3, 2\)",
    ),
    "seqused-dtype": ({"seqused_q": np.ones((2, 3))}, TypeError, "seqused_q must be an int32 array, got a float64"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_attention_fn_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: attention_fn(**(ARRAYS | changes)))


@in_each_framework
@pytest.mark.parametrize(
    ("fields", "call", "message"),
    [
        ({}, {"mask": np.ones((LENGTH, LENGTH), bool)}, "^mask must be None"),
        ({"dropout_rate": 0.25, "deterministic": False}, {}, "^dropout_rate must be 0"),
        ({}, {"sow_weights": True}, "^module must be None"),
    ],
)
def test_flax_modules_pass_the_refusal_on(framework, fields, call, message):
    def attend():
        layer = flax_attention(framework, attention_fn=attention_fn, **fields)
        layer.apply(layer.params, random(*BATCH, LENGTH, FEATURES), **call)

    with pytest.raises(NotImplementedError, match=message):
        attend()


@in_each_framework
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, ValueError, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": 4.0}, TypeError, "num_heads must be a Python int, got 4.0 of type float"),
        ({"num_kv_heads": -2}, ValueError, "num_kv_heads must be at least 1, got -2"),
        ({"head_dim": "a"}, TypeError, "head_dim must be a Python int, got 'a' of type str"),
        ({"out_features": 0}, ValueError, "out_features must be at least 1, got 0"),
        ({"num_heads": 5, "head_dim": None}, ValueError, "head_dim must be given where .* got 5 heads and 48 features"),
        ({"dtype": "wide"}, TypeError, "dtype must be None or one of .* got 'wide' of type str"),
        ({"dtype": jnp.int32}, TypeError, "dtype must be None or one of .* got int32"),
        ({"dtype": jnp.float8_e4m3fn}, NotImplementedError, "dtype must be .* got float8_e4m3fn: .* say fp8=True"),
        ({"fp8": None}, TypeError, "fp8 must be a Python bool known while tracing, got None of type NoneType"),
    ],
)
def test_module_refuses_fields(framework, fields, error, message):
    with pytest.raises(error, match=message):
        flash_attention(framework, **fields)


@in_each_framework
@pytest.mark.parametrize(
    ("x", "call", "error", "message"),
    [
        ([1.0], {}, TypeError, r"x must be an array, got \[1.0\] of type list"),
        (jax.random.key(0), {}, ValueError, r"x must have shape .* got shape \(\)"),
        (np.ones((2, 3, 5, FEATURES)), {}, ValueError, r"x must have shape .* got shape \(2, 3, 5, 48\)"),
        (np.ones((5, FEATURES)), {}, ValueError, r"cu_seqlens must be given for packed x of shape \(5, 48\), got None"),
        (
            np.ones((3, 5, FEATURES)),
            {"cu_seqlens": np.arange(4, dtype=np.int32)},
            ValueError,
            r"cu_seqlens is for packed x .* \(3, 5, 48\)",
        ),
        (
            np.ones((5, FEATURES)),
            {"cu_seqlens": np.arange(4.0)},
            TypeError,
            "cu_seqlens must be an int32 array, got a float64 array",
        ),
        (
            np.ones((3, 5, FEATURES)),
            {"seqused": np.ones(2, np.int32)},
            ValueError,
            r"seqused must have shape \(3,\), one length a sequence, got shape \(2,\)",
        ),
    ],
)
def test_module_refuses_arguments(framework, x, call, error, message):
    layer = flash_attention(framework)
    with pytest.raises(error, match=message):
        layer.apply(layer.params, x, **call)


@in_each_framework
def test_fp8_has_no_gradient(framework):
    layer = flash_attention(framework, fp8=True)
    with pytest.raises(NotImplementedError, match="attention has no gradient in float8_e4m3fn inputs"):
        jax.grad(lambda params: layer.apply(params, random(2, LENGTH, FEATURES)).sum())(layer.params)


@in_each_framework
def test_fp8_takes_head_dims_of_fp8(framework):
    def attend():
        layer = flash_attention(framework, fp8=True, head_dim=24)
        layer.apply(layer.params, random(2, LENGTH, FEATURES))

    with pytest.raises(NotImplementedError, match=r"head_dim of q and k must be a multiple of 16 up to 256 .* got 24"):
        attend()


def test_nnx_names_its_features():
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        jax_flash.nn.nnx.FlashAttention(4, 0, rngs=nnx.Rngs(0))


def test_nnx_refuses_other_features():
    layer = flash_attention("nnx")
    with pytest.raises(ValueError, match=r"x must have in_features, 48, features, got shape \(3, 5, 40\)"):
        layer.apply(layer.params, np.ones((3, 5, 40), np.float32))

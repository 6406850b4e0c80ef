"""The Flax layer: `attention_fn` in Flax's modules against Flax's own attention, and the `FlashAttention` modules."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import CPU, CUDA
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from tolerance import check_close, low_precision

import jax_flash
from jax_flash import canonical, reference
from jax_flash.nn import attention_fn
from jax_flash.spec import Call

BATCH, LENGTH, FEATURES, HEADS, HEAD_DIM = (2, 3), 11, 48, 4, 16
FRAMEWORKS = ("linen", "nnx")

ON_CPU = pytest.param(CPU, "float32", id="cpu-float32")
ON_CPU_16 = pytest.param(CPU, "bfloat16", id="cpu-bfloat16")
ON_CUDA = pytest.param("cuda", "bfloat16", id="cuda-bfloat16", marks=CUDA.marks)
in_each_framework = pytest.mark.parametrize("framework", FRAMEWORKS)


class Layer(NamedTuple):
    """A module of either framework as a function: apply(params, x, ..), where params[name] has kernel and bias."""

    params: Any
    apply: Callable[..., Any]


def linen_layer(module, batch) -> Layer:
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = module.init(rngs, jnp.ones((*batch, LENGTH, FEATURES)))
    return Layer(variables["params"], lambda params, x, **arguments: module.apply({"params": params}, x, **arguments))


def nnx_layer(module) -> Layer:
    graph, params, others = nnx.split(module, nnx.Param, ...)
    return Layer(params, lambda params, x, **arguments: nnx.merge(graph, params, others)(x, **arguments))


def flax_attention(framework, **fields) -> Layer:
    """Flax's own multi-head module."""
    fields = {"qkv_features": HEADS * HEAD_DIM, **fields}
    if framework == "linen":
        return linen_layer(linen.MultiHeadDotProductAttention(HEADS, **fields), BATCH)
    return nnx_layer(nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **fields))


def flash_attention(framework, **fields) -> Layer:
    fields = {"num_heads": HEADS, "head_dim": HEAD_DIM, **fields}
    if framework == "linen":
        return linen_layer(jax_flash.nn.linen.FlashAttention(**fields), BATCH[:1])
    return nnx_layer(jax_flash.nn.nnx.FlashAttention(in_features=FEATURES, rngs=nnx.Rngs(0), **fields))


def random(*shape, dtype=np.float32):
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


def varied(params):
    """Parameters with biases that are not zero."""
    return jax.tree.map(lambda x: x + 0.1 * random(*x.shape), params)


def output(apply, params, x) -> dict:
    return {"out": apply(params, x)}


def output_and_gradients(apply, params, x) -> dict:
    """Gradients of a random weighting of the output, in parameters and input."""

    def loss(params, x):
        out = apply(params, x)
        return (out * random(*out.shape)).sum(dtype=jnp.result_type(float)), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return {"out": out, "gradients": gradients}


def check(results, apply, low, truth, params, x, dtype) -> None:
    """Checks `results(apply, params, x)` by the rule of tolerance.py; low and truth are applied likewise.

    All gradients are compared as one vector, because some (of the bias of keys) are zero but for rounding.
    """

    def vectors(apply, params, x):
        computed = jax.jit(functools.partial(results, apply))(params, x)
        return {name: np.asarray(ravel_pytree(x)[0]) for name, x in computed.items()}

    result, low = vectors(apply, params, x), vectors(low, params, x)
    assert result["out"].dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, x))
        truth = vectors(truth, *wide)
    for name in result:
        check_close(name, result[name], low[name], truth[name], factor=4 if dtype == "float32" else 2)


# attention_fn


MASKS = {
    "causal": ({"causal": True}, {}, {"mask": np.tril(np.ones((LENGTH, LENGTH), bool))}),
    "window": (
        {"window_size": (3, 2)},
        {},
        {"mask": np.tri(LENGTH, k=2, dtype=bool) & ~np.tri(LENGTH, k=-4, dtype=bool)},
    ),
    "lengths": (
        {"seqused_k": np.array([[4, 11, 7], [2, 9, 5]], np.int32)},
        {},
        {"mask": np.arange(LENGTH) < np.array([[4, 11, 7], [2, 9, 5]])[..., None, None, None]},
    ),
    "is_causal": ({}, {"is_causal": True}, {"is_causal": True}),
}


@pytest.mark.parametrize(("kernel", "dtype"), [ON_CPU, ON_CUDA], indirect=["kernel"])
@pytest.mark.parametrize(
    ("framework", "options", "call", "flax_call"),
    [
        pytest.param(framework, *arguments, id=f"{framework}-{name}")
        for framework in FRAMEWORKS
        for name, arguments in MASKS.items()
        if (framework, name) != ("linen", "is_causal")
    ],
)
def test_attention_fn_is_flax_attention(kernel, dtype, framework, options, call, flax_call):
    function = functools.partial(attention_fn, implementation=kernel, **options)
    ours = flax_attention(framework, attention_fn=function, dtype=dtype)
    low, truth = flax_attention(framework, dtype=dtype), flax_attention(framework)
    if "mask" in flax_call:
        mask = np.broadcast_to(flax_call["mask"], (*BATCH, HEADS, LENGTH, LENGTH))
        flax_call = {"mask": mask}
    check(
        output_and_gradients,
        functools.partial(ours.apply, **call),
        functools.partial(low.apply, **flax_call),
        functools.partial(truth.apply, **flax_call),
        varied(ours.params),
        random(*BATCH, LENGTH, FEATURES),
        dtype,
    )


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_attention_fn_takes_any_batch(kernel, batch):
    count = math.prod(batch)
    options = {"causal": True, "softmax_scale": 0.3, "sinks": random(6), "implementation": kernel}
    arrays = {
        "query": random(count, 7, 6, 16, dtype=np.float16),
        "key": random(count, 9, 2, 16, dtype=np.float16),
        "value": random(count, 9, 2, 24, dtype=np.float16),
        "seqused_q": 2 + np.arange(count, dtype=np.int32),
        "seqused_k": 3 + np.arange(count, dtype=np.int32),
    }
    out = jax.jit(lambda arrays: attention_fn(**arrays, **options))(
        {name: x.reshape((*batch, *x.shape[1:])) for name, x in arrays.items()}
    )
    q, k, v = (arrays.pop(name) for name in ("query", "key", "value"))
    expected = jax.jit(lambda arrays: jax_flash.attention(q, k, v, **arrays, **options))(arrays)
    np.testing.assert_array_equal(out, expected.reshape(*batch, 7, 6, 24))


@pytest.mark.parametrize(
    ("dtypes", "dtype", "expected"),
    [
        (("float32", "float32", "float32"), "bfloat16", "bfloat16"),
        (("bfloat16", "float16", "float32"), None, "float32"),
        (("bfloat16", "bfloat16", "bfloat16"), None, "bfloat16"),
    ],
)
def test_attention_fn_casts_as_flax_does(dtypes, dtype, expected):
    arrays = [jnp.asarray(random(5, 7, 4, 16), dtype) for dtype in dtypes]
    out = attention_fn(*arrays, dtype=dtype)
    assert out.dtype == linen.dot_product_attention(*arrays, dtype=dtype).dtype == expected


@in_each_framework
def test_attention_fn_drops_nothing_when_deterministic(framework):
    x = random(*BATCH, LENGTH, FEATURES)
    plain = flax_attention(framework, attention_fn=attention_fn)
    dropping = flax_attention(framework, attention_fn=attention_fn, dropout_rate=0.5, deterministic=True)
    np.testing.assert_array_equal(plain.apply(plain.params, x), dropping.apply(plain.params, x))


# FlashAttention


def by_hand(params, x, *, dtype, low=None, **arguments):
    """The module's arithmetic from its parameters, with the definition of attention."""
    params, x = jax.tree.map(lambda x: x.astype(dtype), (params, x))

    def parameter(name, which):
        return params[name][which][...] if which in params[name] else 0

    def projected(name):
        return jnp.einsum("...f,fhd->...hd", x, parameter(name, "kernel")) + parameter(name, "bias")

    call = Call(projected("query"), projected("key"), projected("value"), **arguments)
    out, lse = reference.forward(*canonical.canonical(call), low)
    out = canonical.restore(call, out, lse)
    return jnp.einsum("...hd,hdf->...f", out, parameter("out", "kernel")) + parameter("out", "bias")


LENGTHS = (7, 0, 13)
BOUNDS = np.cumsum([0, *LENGTHS]).astype(np.int32)
USED = np.array([4, LENGTH, 0], np.int32)


def each_alone(by):
    """What `by` gives for packed x: each sequence as a dense batch of its own."""
    return lambda params, x: jnp.concatenate([by(params, x[None, a:b])[0] for a, b in itertools.pairwise(BOUNDS)])


@pytest.mark.parametrize(("kernel", "dtype"), [ON_CPU, ON_CPU_16, ON_CUDA], indirect=["kernel"])
@in_each_framework
@pytest.mark.parametrize(
    ("fields", "call"),
    [
        pytest.param({"num_kv_heads": 2, "causal": True}, {"cu_seqlens": BOUNDS}, id="gqa-causal-packed"),
        pytest.param(
            {"num_kv_heads": 1, "window_size": (3, 2), "softcap": 2.0}, {"seqused": USED}, id="mqa-window-used"
        ),
        pytest.param({"num_heads": 6, "head_dim": None, "num_kv_heads": 3, "causal": True}, {}, id="head-dim-causal"),
        pytest.param({"use_bias": False, "out_features": 20}, {"cu_seqlens": BOUNDS}, id="no-bias-packed"),
    ],
)
def test_module_is_the_definition(kernel, dtype, framework, fields, call):
    packed = "cu_seqlens" in call
    options = {name: fields[name] for name in ("causal", "window_size", "softcap") if name in fields}
    options |= {name: call["seqused"] for name in ("seqused_q", "seqused_k") if "seqused" in call}
    low = functools.partial(by_hand, dtype=dtype, low=low_precision(dtype), **options)
    truth = functools.partial(by_hand, dtype="float64", **options)
    layer = flash_attention(framework, implementation=kernel, dtype=dtype, **fields)
    check(
        output,
        functools.partial(layer.apply, **call),
        each_alone(low) if packed else low,
        each_alone(truth) if packed else truth,
        varied(layer.params),
        random(sum(LENGTHS), FEATURES) if packed else random(len(USED), LENGTH, FEATURES),
        dtype,
    )


FP8_CALLS = {
    "dense": {},
    "used": {"seqused": USED},
    "packed": {"cu_seqlens": BOUNDS},
    "packed-used": {"cu_seqlens": BOUNDS + 2, "seqused": np.array([5, 3, 13], np.int32)},
}


def input_of(call):
    """x for the arguments `call` of a module; packed it has rows of no sequence at both ends."""
    return random(sum(LENGTHS) + 4, FEATURES) if "cu_seqlens" in call else random(len(USED), LENGTH, FEATURES)


@pytest.mark.parametrize(("kernel", "dtype"), [ON_CPU, ON_CPU_16, ON_CUDA], indirect=["kernel"])
@pytest.mark.parametrize("call", FP8_CALLS.values(), ids=FP8_CALLS)
def test_fp8_is_near(kernel, dtype, call):
    fields = {"num_kv_heads": 2, "causal": True, "dtype": dtype, "implementation": kernel}
    wide = flash_attention("linen", **fields)
    ours, same = (flash_attention(framework, fp8=True, **fields) for framework in FRAMEWORKS)
    params, x = varied(wide.params), input_of(call)
    out, expected = ours.apply(params, x, **call), wide.apply(params, x, **call)
    assert out.dtype == dtype
    out, expected = (np.asarray(y, np.float32) for y in (out, expected))
    assert 0 < np.linalg.norm(out - expected) < 0.1 * np.linalg.norm(expected)

    params = jax.tree.unflatten(jax.tree.structure(same.params), jax.tree.leaves(params))
    np.testing.assert_array_equal(np.asarray(same.apply(params, x, **call), np.float32), out)


@pytest.mark.parametrize("bad", [np.nan, 1e9])
@pytest.mark.parametrize("call", ["used", "packed-used"])
def test_fp8_is_not_scaled_by_unused_rows(kernel, call, bad):
    call = FP8_CALLS[call]
    x = input_of(call)
    used = np.zeros(x.shape[:-1], bool)
    for rows in oracle.rows_of_sequences(x[..., None], call.get("cu_seqlens"), call["seqused"]):
        used.reshape(-1)[rows] = True
    layer = flash_attention("linen", fp8=True, implementation=kernel)
    out, expected = (layer.apply(layer.params, y, **call) for y in (np.where(used[..., None], x, bad), x))
    np.testing.assert_array_equal(out, expected)


@in_each_framework
def test_parameters_are_those_of_flax(framework):
    ours, expected = flash_attention(framework).params, flax_attention(framework).params
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


# Imports


def printed(program) -> list[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def test_attention_fn_imports_no_flax():
    program = """
import sys, jax_flash
jax_flash.nn.attention_fn
print("flax" in sys.modules)
jax_flash.nn.linen, jax_flash.nn.nnx
print("flax" in sys.modules)
"""
    assert printed(program) == ["False", "True", ""]


def test_missing_flax_says_how_to_install_it():
    program = """
import sys, jax_flash
sys.modules["flax"] = None
for name in ("linen", "nnx"):
    try:
        getattr(jax_flash.nn, name)
    except ImportError as error:
        print(error)
"""
    message = "jax_flash.nn.{} needs flax; install it with: pip install 'flax>=0.12'."
    assert printed(program) == [*(message.format(framework) for framework in FRAMEWORKS), ""]


def test_nn_has_no_other_name():
    with pytest.raises(AttributeError, match=r"module 'jax_flash.nn' has no attribute 'haiku'"):
        jax_flash.nn.haiku  # noqa: B018

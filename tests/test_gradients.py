"""Gradients of out and lse in every differentiable argument, against those of the definition."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEATURES, FP8_KEYS, HEAD_DIMS, SOFTCAPS, Case
from conftest import on_each_kernel
from jax.test_util import check_grads
from tolerance import check_close, factor, low_precision

import jax_flash
from jax_flash import canonical, reference
from jax_flash.spec import Call

DIFFERENTIABLE = ("q", "k", "v", "softmax_scale", "sinks", "q_descale", "k_descale", "v_descale")

CASES = [
    *(case for case in FEATURES if case.dtype != "float8_e4m3fn"),
    *(case for case in HEAD_DIMS if case.id in ("bfloat16-d8-8", "bfloat16-d256-256", "bfloat16-d64-256")),
    *(case for case in HEAD_DIMS if case.id in ("float16-d72-72", "float32-d8-72")),
    *SOFTCAPS,
    *FP8_KEYS,
    Case(id="no-lse", return_lse=False, causal=True),
    Case(id="empty-sequences", q_lens=(0, 9, 30), k_lens=(12, 0, 25), packed_q=True, packed_k=True, causal=True),
    Case(id="nonsense-seqused", q_lens=(23, 23), k_lens=(41, 41), seqused_q=(-5, 10**9), seqused_k=(10**9, 7)),
]


WEIGHTINGS = 16
"""Random sums of out and lse that are differentiated: enough for the error of a scalar's gradient to have a size."""


def gradients(arguments: dict, compute) -> dict:
    """Gradients of random sums of out and lse, where `compute(call)` gives these; the leading axis is the sum's."""
    floats = {name: jnp.asarray(arguments[name]) for name in DIFFERENTIABLE if name in arguments}
    floats = {name: x for name, x in floats.items() if x.dtype != jnp.float8_e4m3fn}
    if "softmax_scale" in floats:
        floats["softmax_scale"] = floats["softmax_scale"].astype(jnp.float32)

    def results(floats):
        results = compute(Call(**(arguments | floats)))
        return [jnp.where(jnp.isneginf(x), 0, x) for x in (results if isinstance(results, tuple) else (results,))]

    rng = np.random.default_rng(0)
    shapes = [x.shape for x in jax.eval_shape(results, floats)]
    weights = [rng.normal(size=(WEIGHTINGS, *shape)).astype(np.float32) for shape in shapes]

    def loss(floats, weights):
        return sum((x * w).sum(dtype=jnp.result_type(float)) for x, w in zip(results(floats), weights, strict=True))

    return jax.jit(lambda floats, weights: jax.lax.map(lambda w: jax.grad(loss)(floats, w), weights))(floats, weights)


def by_kernel(implementation):
    def compute(call):
        fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
        return jax_flash.attention(**(fields | {"implementation": implementation}))

    return compute


def by_definition(compute_dtype=None, **changes):
    """A function that computes a Call by the definition, where fields of Attention may be changed."""

    def compute(call):
        attention, operands = canonical.canonical(call)
        results = reference.forward(dataclasses.replace(attention, **changes), operands, compute_dtype)
        return canonical.restore(call, *results)

    return compute


@pytest.mark.parametrize(("kernel", "case"), on_each_kernel(CASES), indirect=["kernel"])
def test_gradients(kernel, case):
    arguments = case.arguments()
    result = gradients(arguments, by_kernel(kernel))
    low = gradients(arguments, by_definition(low_precision(case.dtype)))
    with jax.enable_x64(True):
        truth = gradients(arguments, by_definition(out_dtype="float64"))
    assert result.keys() == truth.keys()
    for name in result:
        assert result[name].dtype == (np.float32 if name == "softmax_scale" else arguments[name].dtype)
        check_close(f"d{name}", result[name], low[name], np.asarray(truth[name]), factor(arguments))


@pytest.mark.parametrize("packed", [False, True])
def test_definition_has_the_gradients_of_finite_differences(packed):
    case = Case(
        id="finite",
        dtype="float32",
        q_lens=(5, 5),
        k_lens=(7, 7),
        packed_q=packed,
        packed_k=packed,
        seqused_k=(6, 0),
        heads=4,
        head_dim=8,
        causal=True,
        softcap=3.0,
        sinks=True,
    )
    attention, operands = canonical.canonical(Call(**case.arguments()))
    names = ("q", "k", "v", "scale", "v_scale", "sinks")
    with jax.enable_x64(True):
        attention = dataclasses.replace(attention, out_dtype="float64")

        @jax.jit
        def compute(*floats):
            out, lse = reference.forward(attention, operands._replace(**dict(zip(names, floats, strict=True))))
            return out, jnp.where(jnp.isneginf(lse), 0, lse)

        floats = [jnp.nan_to_num(jnp.asarray(getattr(operands, name), jnp.float64)) for name in names]
        check_grads(compute, floats, order=1, modes=["rev"], atol=1e-3, rtol=1e-3, eps=1e-2)


@pytest.mark.parametrize("q_len", [9, 0])
def test_fp8_has_no_gradient(implementation, q_len):
    q, k, v = (jnp.ones((2, length, 4, 32), jnp.float8_e4m3fn) for length in (q_len, 9, 9))

    def loss(q, scale):
        out = jax_flash.attention(q, k, v, softmax_scale=scale, implementation=implementation)
        return out.astype(jnp.float32).sum()

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="nor in any input where q is float8_e4m3fn"):
            jax.grad(loss, argument)(q, jnp.float32(0.2))
    assert jax.grad(lambda scale: loss(*jax.lax.stop_gradient((q, scale))))(jnp.float32(0.2)) == 0


@pytest.mark.parametrize("name", ["k", "v"])
def test_fp8_keys_and_values_have_no_gradient(implementation, name):
    arguments = FP8_KEYS[0].arguments() | {"return_lse": False, "implementation": implementation}

    def loss(x):
        return jax_flash.attention(**(arguments | {name: x})).astype(jnp.float32).sum()

    x = jnp.asarray(arguments[name])
    with pytest.raises(NotImplementedError, match="attention has no gradient in float8_e4m3fn inputs"):
        jax.grad(loss)(x)
    assert not jax.grad(lambda x: loss(jax.lax.stop_gradient(x)))(x).any()


def test_second_derivatives_are_refused(kernel):
    def loss(x):
        return jnp.square(jax_flash.attention(x, x, x, implementation=kernel)).sum()

    x = jnp.ones((2, 9, 4, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no second derivatives with kernels; use implementation='xla'"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)


@pytest.mark.parametrize(
    "case",
    [
        Case(id="unused", seqused_q=(9, 37, 0), seqused_k=(50, 20, 53), sinks=True, descales="head"),
        Case(id="blind", k_lens=(20,) * 3, seqused_k=(20, 0, 13), causal=True, sinks=True, descales="head"),
    ],
    ids=str,
)
def test_nan_cotangents_of_rows_of_zeros_do_not_spread(implementation, case):
    """A NaN where a row of zeros is differentiated, as by a norm, and the result thrown away."""

    def results(call):
        out, lse = by_kernel(implementation)(call)
        norm = jnp.sqrt(jnp.square(out.astype(jnp.float32)).sum(-1))
        return jnp.where((out != 0).any(-1), norm, 0), lse

    for name, gradient in gradients(case.arguments() | {"softmax_scale": 0.2}, results).items():
        assert not np.isnan(np.asarray(gradient, np.float32)).any(), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_of_no_row_do_not_spread(implementation, bad):
    """The scales of a sequence without rows, the last one, which rows of no sequence must not take for theirs."""
    lens = {"q_lens": (60, 0), "k_lens": (90, 0)}
    case = Case(id="no-row", packed_q=True, packed_k=True, descales="kv_head", sinks=True, **lens)
    arguments = case.arguments()
    expected = gradients(arguments, by_kernel(implementation))
    for name in ("q_descale", "k_descale", "v_descale"):
        arguments[name][1] = bad
    result = gradients(arguments, by_kernel(implementation))
    for name in ("q", "k", "v", "sinks"):
        np.testing.assert_array_equal(result[name], expected[name], err_msg=f"d{name}")


def test_nan_of_a_sequence_stays_in_its_scale(kernel):
    case = Case(id="own-scale", packed_q=True, packed_k=True, descales="kv_head", q_lens=(30, 9, 20))
    arguments = case.arguments()
    arguments["q"][30:39] = np.nan

    def first(call):
        return by_kernel(kernel)(call)[0][:30]

    for name in ("q_descale", "k_descale"):
        gradient = np.asarray(gradients(arguments, first)[name])
        assert np.isfinite(gradient[:, 0]).all(), name


def test_memory_of_gradients_is_linear():
    """A row for each sequence of a packed call, or a score for each pair of rows, would take far more."""
    tokens, sequences, heads = 65536, 2048, 4
    x = jax.ShapeDtypeStruct((tokens, heads, 16), jnp.bfloat16)
    cu_seqlens = jax.ShapeDtypeStruct((sequences + 1,), jnp.int32)
    scales = jax.ShapeDtypeStruct((sequences,), jnp.float32)

    def loss(q, k, v, cu_seqlens, sinks, scale):
        out = jax_flash.attention(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, sinks=sinks, q_descale=scale, v_descale=scale
        )
        return out.astype(jnp.float32).sum()

    sinks = jax.ShapeDtypeStruct((heads,), jnp.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        gradient = jax.jit(jax.grad(loss, (0, 1, 2, 4, 5)))
        memory = gradient.lower(x, x, x, cu_seqlens, sinks, scales).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * sequences


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 7), (7, 0)])
def test_gradients_of_nothing(implementation, packed, q_len, k_len):
    case = Case(
        id="none", q_lens=(q_len,) * 2, k_lens=(k_len,) * 2, packed_q=packed, packed_k=packed, sinks=True, tail=0
    )
    for name, gradient in gradients(case.arguments(), by_kernel(implementation)).items():
        gradient = np.asarray(gradient, np.float32)
        # Without keys the LSE is the sink.
        assert gradient.any() if name == "sinks" and q_len else not gradient.any(), name


def test_sinks_of_minus_infinity_are_no_sinks(implementation):
    arguments = Case(id="minus-infinity", dtype="float16", k_lens=(29, 0, 53), packed_k=True).arguments()
    expected = gradients(arguments, by_kernel(implementation))
    sinks = {"sinks": np.full(6, -np.inf, np.float32)}
    result = gradients(arguments | sinks, by_kernel(implementation))
    assert not result.pop("sinks").any()
    for name, gradient in result.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-3, err_msg=f"d{name}")


def test_same_inputs_give_the_same_bits(kernel):
    case = Case(id="bits", packed_q=True, packed_k=True, heads=4, q_lens=(70, 31, 150), sinks=True, descales="head")
    arguments = case.arguments() | {"softmax_scale": 0.3}
    first, second = (gradients(arguments, by_kernel(kernel)) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])

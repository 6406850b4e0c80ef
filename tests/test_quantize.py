"""quantize_fp8 against NumPy, what the rotation keeps and brings, and every message."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES
from test_attention import NONSENSE

import jax_flash
from jax_flash import quantize

BATCH, LENGTH, TOKENS, HEADS, HEAD_DIM = 3, 7, 53, 5, 24
LARGEST = 448
ROUNDING = 2**-21
"""Of a few operations in float32."""

GRANULARITIES = ("tensor", "batch", "head")
FLOATS = ("float16", "bfloat16", "float32")
RAGGED = [2, 8, 8, 39, 48]
LAYOUTS = {"dense": None, "ragged": RAGGED, **NONSENSE}


def layout_of(name):
    """The shape of a layout, and its cu_seqlens or None."""
    if LAYOUTS[name] is None:
        return (BATCH, LENGTH, HEADS, HEAD_DIM), None
    return (TOKENS, HEADS, HEAD_DIM), np.array(LAYOUTS[name], np.int32)


def random(shape, dtype="float32", seed=0):
    """Random values that differ in size between rows and heads."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=(*shape[:-1], 1)))
    return (sizes * rng.normal(size=shape)).astype(DTYPES[dtype])


def sequences_of(x, cu_seqlens, seqused=None):
    """The rows (length, H, D) that count of each sequence, views of x."""
    flat = x.reshape(-1, *x.shape[-2:])
    return [flat[rows] for rows in oracle.rows_of_sequences(x, cu_seqlens, seqused)]


def descale_of(x, cu_seqlens, granularity):
    """What descale is to be, of finite x."""
    wide = np.asarray(x, np.float64)
    largest = np.array([np.abs(rows).max((0, 2), initial=0) for rows in sequences_of(wide, cu_seqlens)])
    largest = {"tensor": largest.max(), "batch": largest.max(1), "head": largest}[granularity]
    return np.where(largest > 0, largest / LARGEST, 1)


def by_head(descale, batch, heads):
    """A descale of any granularity as (B, H)."""
    return np.broadcast_to(descale.reshape(descale.shape + (1,) * (2 - descale.ndim)), (batch, heads))


def close_to(x, x8, descale):
    """Whether x8 * descale is within half an ulp of x: 2**-4 of it, or 2**-10 of a unit where FP8 is subnormal."""
    x, x8, descale = (np.asarray(y, np.float64) for y in (x, x8, descale))
    half_ulp = np.maximum(np.abs(x) * 2**-4, descale * 2**-10)
    return np.abs(x8 * descale - x) <= half_ulp * (1 + ROUNDING)


@functools.partial(jax.jit, static_argnames=("granularity", "hadamard"))
def quantized(x, cu_seqlens, granularity, hadamard=False):
    return jax_flash.quantize_fp8(x, granularity, cu_seqlens=cu_seqlens, hadamard=hadamard)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, dtype) for layout in ("dense", "ragged") for dtype in FLOATS] + [(name, "float32") for name in NONSENSE],
)
def test_values_and_scales(layout, dtype, granularity):
    shape, cu_seqlens = layout_of(layout)
    x = np.full(shape, 1000, DTYPES[dtype])  # rows of no sequence, which count for no scale
    for rows, values in zip(*(sequences_of(y, cu_seqlens) for y in (x, random(shape, dtype))), strict=True):
        rows[:] = values
    x8, descale = quantized(x, cu_seqlens, granularity)

    assert (x8.shape, x8.dtype, descale.dtype) == (x.shape, jnp.float8_e4m3fn, np.float32)
    np.testing.assert_allclose(descale, descale_of(x, cu_seqlens, granularity), rtol=ROUNDING)
    stored, values = (sequences_of(np.asarray(y), cu_seqlens) for y in (x8, x))
    units = by_head(np.asarray(descale), len(stored), HEADS)
    for rows, rows8, unit in zip(values, stored, units, strict=True):
        assert close_to(rows, rows8, unit[:, None]).all()
        largest = np.abs(rows8.astype(np.float32)).max((0, 2), initial=0)
        if granularity == "head" and rows.size:
            np.testing.assert_array_equal(largest, LARGEST)
    if layout == "ragged":
        ends = [*range(RAGGED[0]), *range(RAGGED[-1], TOKENS)]
        assert (np.asarray(x8[np.array(ends)], np.float32) == LARGEST).all()  # in units of 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_largest_becomes_448(granularity):
    x8, descale = jax_flash.quantize_fp8(np.full((2, 3, 4, 8), -0.3, np.float32), granularity)
    np.testing.assert_array_equal(np.asarray(x8, np.float32), -LARGEST)
    np.testing.assert_allclose(descale, 0.3 / LARGEST, rtol=ROUNDING)


def test_packed_as_one_tensor():
    """Without cu_seqlens all rows count."""
    x = random((TOKENS, HEADS, HEAD_DIM))
    x8, descale = jax_flash.quantize_fp8(x, "tensor")
    assert descale.shape == ()
    np.testing.assert_allclose(descale, np.abs(x).max() / LARGEST, rtol=ROUNDING)
    assert close_to(x, x8, descale).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unused_rows_count_for_no_scale(layout, granularity):
    shape, cu_seqlens = layout_of(layout)
    values = random(shape)
    count = len(sequences_of(values, cu_seqlens))
    seqused = np.resize(np.array([4, 2**31 - 1, -(2**31), 0], np.int32), count)
    x, zeroed = np.full(shape, 1000, np.float32), np.zeros(shape, np.float32)
    for y in (x, zeroed):
        for rows, used in zip(*(sequences_of(z, cu_seqlens, seqused) for z in (y, values)), strict=True):
            rows[:] = used
    x8, descale = jax_flash.quantize_fp8(x, granularity, cu_seqlens=cu_seqlens, seqused=seqused)
    expected, expected_descale = quantized(zeroed, cu_seqlens, granularity)
    np.testing.assert_array_equal(descale, expected_descale)
    for result, rows in zip(*(sequences_of(np.asarray(y), cu_seqlens, seqused) for y in (x8, expected)), strict=True):
        np.testing.assert_array_equal(result, rows)


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-45])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_to_scale(granularity, size):
    x8, descale = jax_flash.quantize_fp8(np.full((2, 3, 4, 8), size, np.float32), granularity)
    np.testing.assert_array_equal(np.asarray(x8, np.float32), 0)
    np.testing.assert_array_equal(descale, 1)


@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "expected"),
    [
        ((2, 0, 5, 8), None, (2, 5)),
        ((0, 3, 5, 8), None, (0, 5)),
        ((0, 5, 8), np.zeros(3, np.int32), (2, 5)),
        ((4, 5, 8), np.zeros(1, np.int32), (0, 5)),
    ],
    ids=["no-rows", "no-batch", "no-tokens", "no-sequences"],
)
def test_empty(shape, cu_seqlens, expected):
    for granularity in GRANULARITIES:
        x8, descale = jax_flash.quantize_fp8(np.zeros(shape, np.float16), granularity, cu_seqlens=cu_seqlens)
        assert x8.shape == shape
        assert descale.shape == {"tensor": (), "batch": expected[:1], "head": expected}[granularity]
        np.testing.assert_array_equal(descale, 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_nan_and_infinity(layout, granularity):
    shape, cu_seqlens = layout_of(layout)
    finite = random(shape)
    sequences_of(finite, cu_seqlens)[2][:4, 3, 2] = 0
    x = finite.copy()
    sequences_of(x, cu_seqlens)[2][:4, 3, 2] = [np.nan, np.inf, -np.inf, np.nan]
    x8, descale = quantized(x, cu_seqlens, granularity)
    expected, expected_descale = quantized(finite, cu_seqlens, granularity)

    np.testing.assert_array_equal(descale, expected_descale)
    expected = np.array(expected, np.float32)
    sequences_of(expected, cu_seqlens)[2][:4, 3, 2] = [np.nan, LARGEST, -LARGEST, np.nan]
    np.testing.assert_array_equal(np.asarray(x8, np.float32), expected)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_jit_changes_nothing(layout, hadamard):
    shape, cu_seqlens = layout_of(layout)
    x = random(shape, "bfloat16")
    results = quantized(x, cu_seqlens, "head", hadamard)
    for result, eager in zip(results, quantized.__wrapped__(x, cu_seqlens, "head", hadamard), strict=True):
        np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(eager, np.float32))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_vmap_is_the_loop(layout, granularity):
    shape, cu_seqlens = layout_of(layout)
    x = np.stack([random(shape, seed=seed) for seed in (1, 2)], axis=1)
    mapped = jax.vmap(quantized, in_axes=(1, None, None))(x, cu_seqlens, granularity)
    for index in range(2):
        for result, one in zip(mapped, quantized(x[:, index], cu_seqlens, granularity), strict=True):
            np.testing.assert_array_equal(np.asarray(result[index], np.float32), np.asarray(one, np.float32))


# The rotation.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 80])
def test_rotation_keeps_products(head_dim, dtype):
    q, k = (random((length, HEADS, head_dim), dtype, seed=length) for length in (31, 17))
    rotated_q, rotated_k = (np.asarray(quantize.rotated(x), np.float64) for x in (q, k))
    q, k = (x.astype(np.float64) for x in (q, k))
    sizes = np.einsum("qh,kh->hqk", *(np.linalg.norm(x, axis=-1) for x in (q, k)))
    error = np.abs(np.einsum("qhd,khd->hqk", rotated_q, rotated_k) - np.einsum("qhd,khd->hqk", q, k))
    assert (error <= sizes * 2**-20).all()


@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (96, 32), (128, 128), (80, 16), (7, 1)])
def test_rotation_spreads_a_channel_over_its_block(head_dim, block):
    spread = np.abs(quantize.rotated(np.eye(head_dim, dtype=np.float32)))
    same_block = np.arange(head_dim)[:, None] // block == np.arange(head_dim) // block
    np.testing.assert_allclose(spread, same_block / math.sqrt(block), rtol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 80])
def test_rotation_helps_against_outliers(head_dim):
    q, k = (np.random.default_rng(seed).normal(size=(2, 40, HEADS, head_dim)) for seed in (1, 2))
    for x in (q, k):
        x[..., [3, 17, 60]] *= 30

    def error(hadamard):
        dequantized = []
        for x in (q, k):
            x8, descale = jax_flash.quantize_fp8(x.astype(np.float32), hadamard=hadamard)
            dequantized.append(np.asarray(x8, np.float64) * np.asarray(descale, np.float64)[:, None, :, None])
        difference = np.einsum("bqhd,bkhd->bhqk", *dequantized) - np.einsum("bqhd,bkhd->bhqk", q, k)
        return np.sqrt(np.mean(difference**2))

    assert 2 * error(True) < error(False)


# With attention.


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed, granularity):
    rng = np.random.default_rng(3)
    rows = (TOKENS,) if packed else (BATCH, LENGTH)
    q, k, v = (rng.normal(size=(*rows, heads, 32)).astype(np.float32) for heads in (6, 2, 2))
    cu_seqlens = np.array(RAGGED, np.int32) if packed else None
    boundaries = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens} if packed else {}

    @jax.jit
    def attend(q, k, v, boundaries):
        (q8, q_descale), (k8, k_descale), (v8, v_descale) = (
            jax_flash.quantize_fp8(x, granularity, cu_seqlens=boundaries.get("cu_seqlens_q"), hadamard=hadamard)
            for x, hadamard in ((q, True), (k, True), (v, False))
        )
        descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        return jax_flash.attention(q8, k8, v8, **descales, **boundaries, out_dtype="float32")

    out = np.asarray(attend(q, k, v, boundaries))
    truth, _ = oracle.attention({"q": q, "k": k, "v": v, **boundaries})
    assert np.sqrt(np.mean((out - truth) ** 2)) < 2**-4 * np.sqrt(np.mean(truth**2))  # what rounds one FP8 number


# Messages.


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


DENSE, PACKED = zeros(3, 5, 6, 32), zeros(15, 6, 32)

BAD = {
    "x-not-array": ({"x": [1.0]}, TypeError, r"x must be an array, got \[1.0\] of type list"),
    "x-fp8": (
        {"x": zeros(3, 5, 6, 32, dtype=jnp.float8_e4m3fn)},
        TypeError,
        r"x must have one of the dtypes \('float16', 'bfloat16', 'float32'\), got float8_e4m3fn",
    ),
    "x-int": ({"x": zeros(3, 5, 6, 32, dtype="int32")}, TypeError, "x must have one of the dtypes .* got int32"),
    "x-rank": (
        {"x": zeros(5, 32)},
        ValueError,
        r"x must have shape \(batch, length, heads, head_dim\) or, packed, .* got shape \(5, 32\)",
    ),
    "x-no-head-dim": ({"x": zeros(3, 5, 6, 0)}, ValueError, "head_dim of x must be at least 1, got 0"),
    "granularity": (
        {"x": DENSE, "granularity": "channel"},
        ValueError,
        r"granularity must be one of \('tensor', 'batch', 'head'\), got 'channel' of type str",
    ),
    "granularity-array": (
        {"x": DENSE, "granularity": np.array(["head", "batch"])},
        ValueError,
        "granularity must be one of .* got a .* array of shape",
    ),
    "cu-missing": (
        {"x": PACKED},
        ValueError,
        r"cu_seqlens must be given for packed x of shape \(15, 6, 32\), got None",
    ),
    "cu-missing-batch": (
        {"x": PACKED, "granularity": "batch"},
        ValueError,
        "cu_seqlens must be given for packed x",
    ),
    "cu-dense": (
        {"x": DENSE, "granularity": "tensor", "cu_seqlens": zeros(4, dtype="int32")},
        ValueError,
        r"cu_seqlens is for packed x of shape \(tokens, heads, head_dim\), got x of shape \(3, 5, 6, 32\)",
    ),
    "cu-dtype": (
        {"x": PACKED, "cu_seqlens": zeros(4)},
        TypeError,
        r"cu_seqlens must be an int32 array, got a float32 array of shape \(4,\)",
    ),
    "cu-list": (
        {"x": PACKED, "granularity": "tensor", "cu_seqlens": [0, 15]},
        TypeError,
        r"cu_seqlens must be an int32 array, got \[0, 15\] of type list",
    ),
    "cu-rank": (
        {"x": PACKED, "cu_seqlens": zeros(2, 4, dtype="int32")},
        ValueError,
        r"cu_seqlens must have shape \(sequences \+ 1,\), got shape \(2, 4\)",
    ),
    "cu-empty": ({"x": PACKED, "cu_seqlens": zeros(0, dtype="int32")}, ValueError, "cu_seqlens must have shape"),
    "seqused": (
        {"x": DENSE, "seqused": zeros(4, dtype="int32")},
        ValueError,
        r"seqused must have shape \(3,\), one length a sequence, got shape \(4,\)",
    ),
    "seqused-packed": (
        {"x": PACKED, "cu_seqlens": zeros(3, dtype="int32"), "seqused": zeros(2)},
        TypeError,
        "seqused must be an int32 array, got a float32 array",
    ),
    "seqused-of-none": (
        {"x": PACKED, "granularity": "tensor", "seqused": zeros(2, dtype="int32")},
        ValueError,
        "cu_seqlens must be given for packed x",
    ),
    "hadamard": ({"x": DENSE, "hadamard": 1}, TypeError, "hadamard must be a Python bool .* got 1 of type int"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match) as raised:
        jax_flash.quantize_fp8(**arguments)
    assert str(raised.value).endswith(".")


def test_errors_are_raised_while_tracing():
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        jax.eval_shape(jax_flash.quantize_fp8, PACKED)
    with pytest.raises(ValueError, match=r"granularity must be one of .* got a traced bool array"):
        jax.eval_shape(jax_flash.quantize_fp8, DENSE, True)

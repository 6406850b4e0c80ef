"""`merge` against attention over all keys at once, and where one side or both saw no key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash

USED_A, USED_B = (9, 0, 4), (0, 0, 5)
"""Keys of each sequence in either half: of one or both some see none."""


def parts(packed):
    """q, and two halves of k and of v."""
    rng = np.random.default_rng(0)
    shapes = {"q": (7, 4, 16), "k_a": (9, 2, 16), "k_b": (5, 2, 16), "v_a": (9, 2, 24), "v_b": (5, 2, 24)}
    arrays = {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    if packed:
        arrays = {name: x.reshape(-1, *x.shape[2:]) for name, x in arrays.items()}
    return arrays


def attend(q, k, v, **more):
    cu_seqlens_q = 7 * np.arange(4, dtype=np.int32) if q.ndim == 3 else None
    return jax_flash.attention(q, k, v, cu_seqlens_q=cu_seqlens_q, return_lse=True, implementation="xla", **more)


def merged(q, k_a, k_b, v_a, v_b):
    def half(k, v, used):
        boundaries = k.shape[0] // 3 * np.arange(4, dtype=np.int32) if k.ndim == 3 else None
        return attend(q, k, v, cu_seqlens_k=boundaries, seqused_k=np.array(used, np.int32))

    return jax_flash.merge(*half(k_a, v_a, USED_A), *half(k_b, v_b, USED_B))


def at_once(q, k_a, k_b, v_a, v_b):
    """The used keys of both halves beside each other, in packed sequences."""

    def joined(a, b):
        a, b = (x.reshape(3, -1, *x.shape[-2:]) for x in (a, b))
        return jnp.concatenate([x for i in range(3) for x in (a[i, : USED_A[i]], b[i, : USED_B[i]])])

    boundaries = np.cumsum([0, *np.add(USED_A, USED_B)]).astype(np.int32)
    return attend(q, joined(k_a, k_b), joined(v_a, v_b), cu_seqlens_k=boundaries)


def scalar(out, lse):
    """What gradients are taken of."""
    return (out.astype(jnp.float32) ** 2).sum() + jnp.where(jnp.isneginf(lse), 0, jnp.sin(lse)).sum()


@pytest.mark.parametrize("packed", [False, True])
def test_merge_is_attention_over_all_keys(packed):
    arrays = parts(packed)
    for x, y in zip(jax.jit(merged)(**arrays), jax.jit(at_once)(**arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_attention_over_all_keys(packed):
    arrays = parts(packed)
    results, expected = (
        jax.jit(jax.grad(lambda arrays, function=function: scalar(*function(**arrays))))(arrays)
        for function in (merged, at_once)
    )
    for name, result in results.items():
        np.testing.assert_allclose(result, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("lse", [0.0, -1e4, 1e4, 80.0])
@pytest.mark.parametrize("bad", [0, np.nan, np.inf])
def test_a_side_that_saw_no_key_does_not_count(bad, lse):
    rng = np.random.default_rng(0)
    out = rng.normal(size=(2, 5, 3, 8)).astype(np.float16)
    some, none = np.full((2, 3, 5), lse, np.float32), np.full((2, 3, 5), -np.inf, np.float32)
    for arguments in ((out, some, np.full_like(out, bad), none), (np.full_like(out, bad), none, out, some)):
        merged_out, merged_lse = jax_flash.merge(*arguments)
        np.testing.assert_array_equal(merged_out, out)
        np.testing.assert_array_equal(merged_lse, some)
        for gradient in jax.grad(lambda *x: scalar(*jax_flash.merge(*x)), argnums=(0, 1, 2, 3))(*arguments):
            assert np.isfinite(gradient).all()
    empty, empty_lse = jax_flash.merge(np.full_like(out, bad), none, np.full_like(out, bad), none)
    assert not empty.any()
    assert np.isneginf(empty_lse).all()


def test_dtypes_promote():
    out, lse = jnp.ones((2, 5, 3, 8), jnp.float16), jnp.zeros((2, 3, 5), jnp.float32)
    assert jax_flash.merge(out, lse, out, lse)[0].dtype == jnp.float16
    assert jax_flash.merge(out, lse, out.astype(jnp.bfloat16), lse)[0].dtype == jnp.float32
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert [x.dtype for x in jax_flash.merge(out, lse, out, lse)] == [jnp.float16, jnp.float32]


def test_nan_is_not_hidden():
    out, lse = np.ones((1, 2, 1, 8), np.float32), np.zeros((1, 1, 2), np.float32)
    lse_nan = lse.copy()
    lse_nan[..., 1] = np.nan
    merged_out, merged_lse = jax_flash.merge(out, lse, out, lse_nan)
    np.testing.assert_array_equal(np.isnan(merged_lse[0, 0]), [False, True])
    np.testing.assert_array_equal(np.isnan(merged_out[0, :, 0, 0]), [False, True])


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"out_a": [1.0]}, TypeError, r"out_a must be an array, got \[1.0\] of type list"),
        ({"out_b": zeros(2, 5, 3, 8, dtype=np.int32)}, TypeError, "out_b must have one of the dtypes .* got int32"),
        ({"out_a": zeros(5, 8)}, ValueError, r"out_a must have shape .* got shape \(5, 8\)"),
        ({"out_b": zeros(2, 5, 3, 9)}, ValueError, r"out_b must have the shape of out_a, \(2, 5, 3, 8\), got shape"),
        ({"lse_a": zeros(2, 3, 5, dtype=np.float16)}, TypeError, "lse_a must be a float32 array, got a float16 array"),
        ({"lse_a": None}, TypeError, "lse_a must be a float32 array, got None of type NoneType"),
        (
            {"lse_b": zeros(2, 5, 3)},
            ValueError,
            r"lse_b must have shape \(2, 3, 5\) for out_b, got shape \(2, 5, 3\)",
        ),
    ],
)
def test_bad_input(arguments, error, match):
    good = {"out_a": zeros(2, 5, 3, 8), "lse_a": zeros(2, 3, 5), "out_b": zeros(2, 5, 3, 8), "lse_b": zeros(2, 3, 5)}
    with pytest.raises(error, match=match) as raised:
        jax_flash.merge(**(good | arguments))
    assert str(raised.value).endswith(".")

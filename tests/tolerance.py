"""What a result may differ by: FlashAttention-3's rule, a multiple of the error that the same precision costs."""

from __future__ import annotations

import jax
import numpy as np
import oracle

import jax_flash
from jax_flash.__main__ import largest_difference, tolerance

LSE_TOLERANCE = 1e-3
FP8_LSE_TOLERANCE = 2**-11
"""Of the largest: Hopper's tensor cores add FP8 products in about 14 bits and truncate, so a score is no more exact."""


def run(arguments: dict, **more):
    """The function that has these arguments, under jit: arrays are traced, everything else is static."""
    function = jax_flash.attention_with_kv_cache if "k_cache" in arguments else jax_flash.attention
    return jax.jit(lambda arrays: function(**(arguments | arrays), **more))(_arrays(arguments))


def _arrays(arguments: dict) -> dict:
    return {name: x for name, x in arguments.items() if isinstance(x, (jax.Array, np.ndarray))}


def factor(arguments: dict) -> int:
    """FlashAttention-3's: 2, and 3 with softcap; 4 for float32, where the order of additions alone makes the error."""
    if arguments["q"].dtype == np.float32:
        return 4
    return 3 if arguments.get("softcap") else 2


def low_precision(dtype):
    """The dtype in which the same-precision reference of inputs of `dtype` computes; None is float32 itself."""
    return {"float32": None, "float8_e4m3fn": "bfloat16"}.get(np.dtype(dtype).name, np.dtype(dtype).name)


def check(arguments: dict, out, lse=None) -> None:
    """Checks out, and lse if it is given, against oracle.py.

    Raises:
      AssertionError: they differ by more than the tolerance.
    """
    dtype = arguments["q"].dtype
    truth, truth_lse = oracle.attention(arguments)
    low, _ = oracle.attention(arguments, low_precision(dtype), np.float32)
    out_dtype = arguments.get("out_dtype") or low_precision(dtype) or dtype
    check_close("out", out, low.astype(out_dtype), truth, factor(arguments))
    if lse is not None:
        assert lse.dtype == np.float32
        check_lse(lse, truth_lse, FP8_LSE_TOLERANCE if dtype == "float8_e4m3fn" else 0)


def check_lse(lse, truth, of_largest: float = 0) -> None:
    """Checks a log-sum-exp: -inf where the truth is, elsewhere within 1e-3 or `of_largest` times the largest."""
    lse = np.asarray(lse)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(truth), err_msg="rows of lse that are -inf")
    seen = ~np.isneginf(truth)
    tolerance = max(LSE_TOLERANCE, of_largest * np.abs(truth[seen]).max(initial=0))
    np.testing.assert_allclose(lse[seen], truth[seen], rtol=0, atol=tolerance, err_msg="lse")


def check_close(name: str, result, low, truth, factor: float) -> None:
    """The rule: `result` and the same-precision `low` are of one dtype, `truth` is more precise."""
    result, low, truth = np.asarray(result), np.asarray(low), np.asarray(truth)
    assert result.shape == truth.shape == low.shape, f"{name}: shapes {result.shape}, {low.shape}, {truth.shape}"
    assert result.dtype == low.dtype, f"{name}: dtypes {result.dtype}, {low.dtype}"
    error, allowed = largest_difference(result, truth), tolerance(low, truth, factor)
    assert error <= allowed, f"{name}: error {error:.3g} is more than the tolerance {allowed:.3g}"

"""The kernels against NumPy: the shared cases, and what is known to go wrong elsewhere."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from conftest import CPU, CUDA, on_each_kernel
from tolerance import check, run

import jax_flash
from jax_flash import jit, primitive
from jax_flash.spec import Operands


@pytest.mark.parametrize(("kernel", "case"), on_each_kernel(CASES), indirect=["kernel"])
def test_case(kernel, case):
    arguments = case.arguments()
    result = run(arguments, implementation=kernel)
    check(arguments, *(result if case.return_lse else (result,)))


def test_platform_chooses_the_implementation(kernel):
    arguments = Case(id="default", causal=True).arguments()
    default, named = run(arguments), run(arguments, implementation=kernel)
    assert all(np.array_equal(x, y) for x, y in zip(default, named, strict=True))


def test_other_platforms_run_the_reference_and_warn():
    primitive._warn_reference.cache_clear()
    x = jax.ShapeDtypeStruct((2, 16, 4, 64), jnp.bfloat16)
    with pytest.warns(UserWarning, match="runs as plain jnp here"):
        jax.export.export(jax.jit(jax_flash.attention), platforms=["tpu"])(x, x, x)
    y = jax.ShapeDtypeStruct((3, 16, 4, 64), jnp.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        jax.export.export(jax.jit(jax_flash.attention), platforms=["tpu"])(y, y, y)


def test_same_inputs_give_the_same_bits(kernel):
    arguments = Case(id="bits", packed_q=True, packed_k=True, sinks=True, heads=4).arguments()
    first, second = run(arguments, implementation=kernel), run(arguments, implementation=kernel)
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("max_seqlen", [0, 5, 10**6])
def test_wrong_hint_changes_nothing(kernel, max_seqlen):
    lens = {"q_lens": (40, 590, 9), "k_lens": (51, 570, 30)}  # one of more than four tiles, which comes first
    arguments = Case(id="hint", head_dim=128, packed_q=True, packed_k=True, **lens).arguments()
    hinted = run(arguments, implementation=kernel, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
    for x, y in zip(hinted, run(arguments, implementation=kernel), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sinks", [{}, {"sinks": np.full(6, -np.inf, np.float32)}], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("keys", [4, slice(None)], ids=["one-key", "all-keys"])
def test_nan_in_a_used_row_is_not_hidden(implementation, keys, sinks):
    arguments = Case(id="used-nan").arguments() | sinks
    arguments["k"][1, keys, 1] = np.nan
    out, lse = (np.asarray(x, np.float32) for x in run(arguments, implementation=implementation))
    spoilt = np.zeros((3, 6), bool)
    spoilt[1, 3:] = True
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(spoilt[:, None, :, None], out.shape))
    np.testing.assert_array_equal(np.isnan(lse), np.broadcast_to(spoilt[:, :, None], lse.shape))


@pytest.mark.parametrize(
    ("kernel", "dtype", "bits"),
    [(CPU, "float32", bits) for bits in (0x7FC00001, 0x7F800001, 0xFFC00080, 0x7FC000FF)]
    + [(CPU, "bfloat16", 0x7F81), pytest.param("cuda", "bfloat16", 0x7F81, marks=CUDA.marks)],
    indirect=["kernel"],
)
def test_every_nan_is_one(kernel, dtype, bits):
    """Whatever a NaN holds besides being one."""
    arguments = Case(id="nan-bits", dtype=dtype).arguments()
    k = arguments["k"]
    k.view(f"u{k.itemsize}")[2] = bits
    out, lse = (np.asarray(x, np.float32) for x in run(arguments, implementation=kernel))
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2]).all()
    assert np.isfinite(out[:2]).all()


def test_nan_in_a_used_row_stays_in_its_sequence(kernel):
    case = Case(id="used-nan-packed", q_lens=(40, 13, 70), k_lens=(17, 150, 40), packed_q=True, packed_k=True)
    arguments = case.arguments()
    for name in ("k", "v"):
        arguments[name][17:167] = np.nan
    out, lse = (np.asarray(x, np.float32) for x in run(arguments, implementation=kernel))
    spoilt = np.zeros(len(out), bool)
    spoilt[40:53] = True
    np.testing.assert_array_equal(np.isnan(out).any((1, 2)), spoilt)
    np.testing.assert_array_equal(np.isnan(lse).any(0), spoilt)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_see_no_key_are_zero_whatever_is_there(implementation, bad, sinks):
    """Rows 0 to 9 of sequence 0 lie before its first key, sequence 1 has no key, and sequence 2 has no flaw."""
    case = Case(id="blind", q_lens=(30, 30, 30), k_lens=(20, 20, 20), seqused_k=(20, 0, 20), causal=True, sinks=sinks)
    arguments = case.arguments()
    arguments["q_descale"] = np.array([bad, bad, 1], np.float32)
    arguments["v_descale"] = np.array([bad, bad, 1], np.float32)
    arguments["v"][0] = bad
    out, lse = (np.asarray(x, np.float32) for x in run(arguments, implementation=implementation))
    blind = np.zeros((3, 30), bool)
    blind[0, :10] = blind[1] = blind[2, :10] = True
    assert not out[blind].any()
    expected = arguments["sinks"] if sinks else np.full(6, -np.inf, np.float32)
    np.testing.assert_allclose(np.swapaxes(lse, 1, 2)[blind], np.broadcast_to(expected, (blind.sum(), 6)), rtol=1e-6)
    assert not np.isfinite(out[0, 10:]).any()
    assert np.isfinite(out[2]).all()


# Nonsense in index arrays gives nonsense rows by the same definition everywhere, never a fault.

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
NONSENSE = {
    "decreasing": [40, 30, 20, 10],
    "beyond-the-end": [0, 20, 500, 10**9],
    "negative": [-7, -3, 12, 30],
    "extremes": [INT_MIN, INT_MAX, INT_MIN, INT_MAX],
    "up-and-down": [5, 50, 20, 53],
    "late-start": [35, 35, 40, 40],
    "minus-infinity": [INT_MIN] * 4,
}


@pytest.mark.parametrize("q_nonsense", NONSENSE)
@pytest.mark.parametrize("k_nonsense", ["extremes", "up-and-down", "valid"])
def test_nonsense_cu_seqlens(kernel, q_nonsense, k_nonsense):
    arguments = _packed(dtype="float16", causal=True)
    arguments["cu_seqlens_q"] = np.array(NONSENSE[q_nonsense], np.int32)
    arguments["cu_seqlens_k"] = np.array((NONSENSE | {"valid": [0, 17, 30, 53]})[k_nonsense], np.int32)
    check(arguments, *run(arguments, implementation=kernel))


@pytest.mark.parametrize("cu_seqlens", [[30, 20, INT_MAX, 5], [INT_MIN, 7, 610, 600], [600, INT_MAX, 0, 640]])
def test_nonsense_cu_seqlens_of_long_sequences(kernel, cu_seqlens):
    lens = {"q_lens": (40, 590, 9), "k_lens": (51, 570, 30), "tail": 0}
    arguments = Case(id="long", dtype="float16", head_dim=128, packed_q=True, packed_k=True, **lens).arguments()
    arguments["cu_seqlens_q"] = np.array(cu_seqlens, np.int32)
    check(arguments, *run(arguments, implementation=kernel))


@pytest.mark.parametrize("cu_seqlens", [[0, 20, 40, 53], *NONSENSE.values()], ids=["valid", *NONSENSE])
@pytest.mark.parametrize("used", [{}, {"seqused_q": [15, 30, 9], "seqused_k": [20, 4, 13]}], ids=["all", "used"])
def test_one_array_that_cuts_both_sides_gives_the_same_bits(kernel, cu_seqlens, used):
    """Kernels know then that keys lie where queries do, though they may be used to another length."""
    lens = {"q_lens": (20, 20, 13), "k_lens": (20, 20, 13), "tail": 0}
    arguments = Case(id="self", dtype="float16", causal=True, packed_q=True, packed_k=True, **lens).arguments()
    arguments |= {name: np.array(lengths, np.int32) for name, lengths in used.items()}
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = jnp.asarray(cu_seqlens, jnp.int32)
    one = run(arguments, implementation=kernel)
    arguments["cu_seqlens_k"] = np.asarray(arguments["cu_seqlens_q"])
    two = run(arguments, implementation=kernel)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    check(arguments, *two)


@pytest.mark.gpu
def test_one_array_that_cuts_both_sides_is_one_buffer():
    arguments = _packed(dtype="float16")
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens_q"))
    attend = jax.jit(lambda *x: jax_flash.attention(*x[:3], cu_seqlens_q=x[3], cu_seqlens_k=x[3]))
    lines = attend.lower(q, k, v, cu_seqlens).compile().as_text().splitlines()
    (call,) = (line for line in lines if "jax_flash_cuda_launch" in line)
    operands = re.findall(r"%[\w.-]+", call.partition("custom-call(")[2])
    assert operands[Operands._fields.index("cu_seqlens_q")] == operands[Operands._fields.index("cu_seqlens_k")]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seqused", [(-1, INT_MAX, 5), (INT_MIN, 0, 10**6)])
def test_nonsense_seqused(kernel, packed, seqused):
    case = Case(id="dense", causal=True)
    arguments = _packed(window_size=(9, 4), sinks=True) if packed else case.arguments()
    arguments["seqused_q"] = np.array(seqused, np.int32)
    arguments["seqused_k"] = np.array(seqused[::-1], np.int32)
    check(arguments, *run(arguments, implementation=kernel))


def _packed(**options):
    lens = {"q_lens": (20, 20, 13), "k_lens": (17, 13, 23)}
    return Case(id="packed", packed_q=True, packed_k=True, tail=0, **lens, **options).arguments()


# What is known to go wrong in other libraries; what goes wrong there in gradients and transforms is tested with these.


@pytest.mark.parametrize("packed", [False, True])
def test_nan_in_unused_rows_does_not_spread(kernel, packed):
    used = {"seqused_q": (30, 0, 11), "seqused_k": (29, 53, 1)}
    arguments = Case(id="nan", packed_q=packed, packed_k=packed, **used).arguments()
    assert np.isnan(arguments["k"].astype(np.float32)).any()
    out, lse = run(arguments, implementation=kernel)
    assert not np.isnan(np.asarray(out, np.float32)).any()
    assert not np.isnan(lse).any()
    check(arguments, out, lse)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_no_keys(implementation, packed, sinks):
    case = Case(id="no-keys", q_lens=(7, 7), k_lens=(0, 0), packed_q=packed, packed_k=packed, tail=0, sinks=sinks)
    arguments = case.arguments()
    out, lse = run(arguments, implementation=implementation)
    assert not np.asarray(out, np.float32).any()
    expected = arguments["sinks"][:, None] if sinks else -np.inf
    np.testing.assert_array_equal(lse, np.broadcast_to(expected, lse.shape))


@pytest.mark.parametrize("packed", [False, True])
def test_no_queries(implementation, packed):
    case = Case(id="no-queries", q_lens=(0, 0), k_lens=(9, 9), packed_q=packed, packed_k=packed, tail=0)
    out, lse = run(case.arguments(), implementation=implementation)
    assert out.shape == ((0, 6, 64) if packed else (2, 0, 6, 64))
    assert lse.shape == ((6, 0) if packed else (2, 6, 0))


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [((0, 5, 6, 64), (0, 7, 2, 64)), ((3, 5, 0, 64), (3, 7, 0, 64)), ((3, 5, 0, 64), (3, 7, 2, 64))],
)
def test_empty_batch_or_heads(implementation, q_shape, k_shape):
    q, k = jnp.zeros(q_shape, jnp.bfloat16), jnp.zeros(k_shape, jnp.bfloat16)
    out, lse = jax_flash.attention(q, k, k, return_lse=True, implementation=implementation)
    assert out.shape == q_shape
    assert lse.shape == (q_shape[0], q_shape[2], q_shape[1])


def test_no_sequences(implementation):
    q, k = jnp.ones((5, 6, 64), jnp.float16), jnp.ones((7, 2, 64), jnp.float16)
    cu_seqlens = jnp.zeros((1,), jnp.int32)
    out, lse = jax_flash.attention(
        q, k, k, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, return_lse=True, implementation=implementation
    )
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("head_dim_v", [128, 256])
def test_fp8_with_wider_values_writes_every_column(kernel, head_dim_v):
    case = Case(id="wide", dtype="float8_e4m3fn", head_dim=48, head_dim_v=head_dim_v)
    arguments = case.arguments() | {"v": np.ones((3, 53, 2, head_dim_v), case.arguments()["v"].dtype)}
    out, lse = run(arguments, implementation=kernel)
    # Each column is an average of ones, but for the rounding of probabilities to e4m3.
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=2**-4)
    check(arguments, out, lse)


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31():
    batch, length, heads, head_dim = 132, 1024, 128, 128
    assert batch * length * heads * head_dim > 2**31
    with jax.default_device(jax.devices("cuda")[0]):
        shape = (batch, length, heads, head_dim)
        q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
        out = jax_flash.attention(q, k, v, implementation="cuda")
        check({"q": q[-1:], "k": k[-1:], "v": v[-1:]}, out[-1:])


def test_window_without_causal_sees_no_future(kernel):
    arguments = Case(id="window", q_lens=(48, 48), k_lens=(48, 48), window_size=(5, 0)).arguments()
    out, lse = run(arguments, implementation=kernel)
    check(arguments, out, lse)
    future = arguments | {name: arguments[name].copy() for name in ("k", "v")}
    for name in ("k", "v"):
        future[name][:, 24:] = 7
    changed, _ = run(future, implementation=kernel)
    np.testing.assert_array_equal(out[:, :24], changed[:, :24])


@pytest.mark.parametrize("k_len", [2048, 16384])
def test_fp8_error_does_not_grow_with_length(kernel, k_len):
    case = Case(id=f"long-{k_len}", dtype="float8_e4m3fn", q_lens=(64,), k_lens=(k_len,), heads=2, head_dim=128)
    arguments = case.arguments() | {"out_dtype": "float32", "return_lse": False}
    arguments["v"] = (arguments["v"].astype(np.float32) + 1).astype(arguments["v"].dtype)
    truth = np.asarray(run(arguments, implementation="xla"))
    out = np.asarray(run(arguments, implementation=kernel))
    assert np.linalg.norm(out - truth) / np.linalg.norm(truth) < 0.005


def test_nan_scale_is_not_hidden(kernel):
    arguments = Case(id="nan-scale").arguments() | {"softmax_scale": np.array(np.nan, np.float32)}
    out, lse = run(arguments, implementation=kernel)
    assert np.isnan(np.asarray(out, np.float32)).all()
    assert np.isnan(lse).all()


def test_keys_that_score_minus_infinity(kernel):
    # An additive mask in a channel of its own: the last keys, which kernels may see first, score -inf.
    arguments = Case(id="infinite", dtype="float16", q_lens=(70, 70), k_lens=(600, 600)).arguments()
    arguments["q"][..., 0] = 1
    arguments["k"][..., 0] = 0
    arguments["k"][:, 150:, :, 0] = -np.inf
    out, lse = run(arguments, implementation=kernel)
    check(arguments | {name: arguments[name][:, :150] for name in ("k", "v")}, out, lse)


@pytest.mark.gpu
def test_damaged_image_is_refused(monkeypatch):
    compile_kernel = jit.compile

    def damaged(source):
        kernel = compile_kernel(source)
        return dataclasses.replace(kernel, cubin=kernel.cubin[:-1])

    monkeypatch.setattr(jit, "compile", damaged)
    jax.clear_caches()
    with pytest.raises(Exception, match="the kernel image is truncated"):
        run(Case(id="damaged", head_dim=72).arguments(), implementation="cuda")
    jax.clear_caches()


def test_memory_of_the_cpu_handler_is_linear():
    """32 768 scores of as many rows would take 4 GiB."""
    script = """
import resource
import jax, jax.numpy as jnp
import jax_flash
x = jnp.ones((1, 32768, 1, 16))
attend = jax.jit(jax.grad(lambda x: jax_flash.attention(x, x, x, causal=True, window_size=(4000, 0)).sum()))
compiled = attend.lower(x).compile()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jax.block_until_ready(compiled(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 256 * 1024, "KiB of growth"

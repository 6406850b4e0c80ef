"""Every message of validate_cache.py, and those of validate.py that name a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_validate import ints, zeros

import jax_flash
from jax_flash import launch

BATCH, Q_LEN, CAPACITY, PAGE_SIZE, PAGES, HEADS, KV_HEADS, HEAD_DIM = 3, 5, 40, 8, 17, 6, 2, 32


def dense(dtype="bfloat16", **changes):
    cache = jnp.ones((BATCH, CAPACITY, KV_HEADS, HEAD_DIM), dtype)
    arrays = {"q": jnp.ones((BATCH, Q_LEN, HEADS, HEAD_DIM), dtype), "k_cache": cache, "v_cache": cache}
    return arrays | {"cache_seqlens": 7 * jnp.ones(BATCH, jnp.int32)} | changes


def paged(dtype="bfloat16", **changes):
    pool = jnp.ones((PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM), dtype)
    return dense(dtype, k_cache=pool, v_cache=pool, page_table=ints(BATCH, 5)) | changes


def appending(dtype="bfloat16", **changes):
    new = jnp.ones((BATCH, 4, KV_HEADS, HEAD_DIM), dtype)
    return paged(dtype, k_new=new, v_new=new) | changes


def turning(**changes):
    return appending(rotary_cos=zeros(50, 8), rotary_sin=zeros(50, 8)) | changes


def packed(**changes):
    q, new = (jnp.ones((11, heads, HEAD_DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    cu_seqlens_q = jnp.array([0, 4, 4, 9], jnp.int32)
    return paged(q=q, k_new=new, v_new=new, cu_seqlens_q=cu_seqlens_q) | changes


BAD = {
    # Caches
    "cache-list": (dense(k_cache=[1.0]), TypeError, r"k_cache must be an array, got \[1.0\] of type list"),
    "cache-rank": (
        dense(v_cache=zeros(40, 2, 32, dtype="bfloat16")),
        ValueError,
        r"v_cache must have shape \(batch, length, heads, head_dim\) or, with a page_table, \(pages, page size, .* got",
    ),
    "cache-dtype": (
        dense(k_cache=zeros(3, 40, 2, 32), v_cache=zeros(3, 40, 2, 32)),
        TypeError,
        "q, k_cache and v_cache must have one dtype, or k_cache and v_cache both float8_e4m3fn, got bfloat16 for q, ",
    ),
    "cache-head-dim": (
        dense(k_cache=zeros(3, 40, 2, 40, dtype="bfloat16")),
        ValueError,
        r"k_cache must have the head_dim of q, 32, got shape \(3, 40, 2, 40\)",
    ),
    "cache-length": (
        dense(v_cache=zeros(3, 41, 2, 32, dtype="bfloat16")),
        ValueError,
        r"v_cache must have the shape of k_cache except in head_dim, \(3, 40, 2, 'head_dim'\), got shape \(3, 41,",
    ),
    "cache-heads": (
        dense(q=zeros(3, 5, 5, 32, dtype="bfloat16")),
        ValueError,
        "the 5 heads of q must be a multiple of the heads of k_cache and v_cache, got 2",
    ),
    "cache-batch": (
        dense(q=zeros(4, 5, 6, 32, dtype="bfloat16"), cache_seqlens=7),
        ValueError,
        r"k_cache must have a batch of 4 for the 4 sequences of q, or come with page_table .*, got shape \(3, 40,",
    ),
    "cache-capacity": (
        paged(page_table=np.broadcast_to(np.int32(0), (3, 2**27))),
        NotImplementedError,
        r"the capacity of a sequence must be below 2\*\*30 keys, got 1073741824 by k_cache .* of \(3, 134217728\)",
    ),
    "descale": (
        paged(k_descale=zeros(17)),
        ValueError,
        r"k_descale must have shape \(\) or \(3,\) or \(3, 2\), got shape \(17,\)",
    ),
    # Which keys a sequence has
    "lengths-list": (
        dense(cache_seqlens=[7, 7, 7]),
        TypeError,
        r"cache_seqlens must be an int32 array or a Python int, got \[7, 7, 7\] of type list",
    ),
    "lengths-float": (dense(cache_seqlens=7.0), TypeError, "cache_seqlens must be .* got 7.0 of type float"),
    "lengths-bool": (dense(cache_seqlens=True), TypeError, "cache_seqlens must be .* got True of type bool"),
    "lengths-dtype": (
        dense(cache_seqlens=zeros(3)),
        TypeError,
        "cache_seqlens must be an int32 array, got a float32 array",
    ),
    "lengths-shape": (
        dense(cache_seqlens=ints(4)),
        ValueError,
        r"cache_seqlens must have shape \(3,\), one length for each sequence of q, or \(\) for all, got shape \(4,\)",
    ),
    "leftpad-dtype": (dense(cache_leftpad=5), TypeError, "cache_leftpad must be an int32 array, got 5 of type int"),
    "leftpad-shape": (dense(cache_leftpad=ints(2)), ValueError, r"cache_leftpad must have shape \(3,\)"),
    "pages-list": (paged(page_table=[[1]]), TypeError, "page_table must be an int32 array, got .* of type list"),
    "pages-rank": (
        paged(page_table=ints(15)),
        ValueError,
        r"page_table must have shape \(3, pages of a sequence\), at least one page, got shape \(15,\)",
    ),
    "pages-batch": (paged(page_table=ints(4, 5)), ValueError, r"page_table must have shape \(3, .* got shape \(4, 5\)"),
    "pages-none": (paged(page_table=ints(3, 0)), ValueError, r"page_table must .* one page, got shape \(3, 0\)"),
    "pages-empty": (
        paged(k_cache=zeros(17, 0, 2, 32, dtype="bfloat16"), v_cache=zeros(17, 0, 2, 32, dtype="bfloat16")),
        ValueError,
        r"k_cache must have pages, and rows in a page, for page_table, got shape \(17, 0, 2, 32\)",
    ),
    "pages-and-rows": (
        paged(cache_batch_idx=ints(3)),
        ValueError,
        "cache_batch_idx must be None where page_table says which pages a sequence has, got both",
    ),
    "rows-dtype": (dense(cache_batch_idx=[0, 1, 2]), TypeError, "cache_batch_idx must be an int32 array, got"),
    "rows-shape": (
        dense(cache_batch_idx=ints(3, 1)),
        ValueError,
        r"cache_batch_idx must have shape \(3,\), one row of k_cache a sequence, got shape \(3, 1\)",
    ),
    "rows-none": (
        dense(
            k_cache=zeros(0, 40, 2, 32, dtype="bfloat16"),
            v_cache=zeros(0, 40, 2, 32, dtype="bfloat16"),
            cache_batch_idx=ints(3),
        ),
        ValueError,
        r"k_cache must have a row for cache_batch_idx to name, got shape \(0, 40, 2, 32\)",
    ),
    # What is appended
    "new-alone": (appending(v_new=None), ValueError, "k_new and v_new must be given together, got None for v_new"),
    "new-values-alone": (appending(k_new=None), ValueError, "given together, got None for k_new"),
    "new-list": (appending(k_new=[1]), TypeError, r"k_new must be an array, got \[1\] of type list"),
    "new-dtype": (
        appending(v_new=zeros(3, 4, 2, 32)),
        TypeError,
        "v_new must have the dtype of k_new, bfloat16, got float32",
    ),
    "new-dtype-cache": (
        appending(k_new=zeros(3, 4, 2, 32), v_new=zeros(3, 4, 2, 32)),
        TypeError,
        "k_new must have the dtype of k_cache, bfloat16, got float32",
    ),
    "new-dtype-fp8": (
        appending("float8_e4m3fn", k_new=ints(3, 4, 2, 32)),
        TypeError,
        "k_new must have one of the dtypes .*'float32', 'float8_e4m3fn'.*, got int32",
    ),
    "new-dtype-mix": (
        appending("float8_e4m3fn", k_new=zeros(3, 4, 2, 32)),
        TypeError,
        "v_new must have the dtype of k_new, float32, got float8_e4m3fn",
    ),
    "new-rank": (appending(k_new=zeros(4, 32, dtype="bfloat16")), ValueError, r"k_new must have shape .* \(4, 32\)"),
    "new-heads": (
        appending(k_new=zeros(3, 4, 6, 32, dtype="bfloat16")),
        ValueError,
        r"k_new must have the heads and head_dim of k_cache, \(2, 32\), got shape \(3, 4, 6, 32\)",
    ),
    "new-head-dim": (
        appending(v_new=zeros(3, 4, 2, 40, dtype="bfloat16")),
        ValueError,
        r"v_new must have the heads and head_dim of v_cache, \(2, 32\), got shape \(3, 4, 2, 40\)",
    ),
    "new-length": (
        appending(v_new=zeros(3, 5, 2, 32, dtype="bfloat16")),
        ValueError,
        "v_new must have the shape of k_new except in head_dim",
    ),
    "new-batch": (
        appending(k_new=zeros(4, 4, 2, 32, dtype="bfloat16"), v_new=zeros(4, 4, 2, 32, dtype="bfloat16")),
        ValueError,
        r"k_new must have a batch of 3 for the 3 sequences of q, got shape \(4, 4, 2, 32\)",
    ),
    "new-packed": (
        appending(k_new=zeros(9, 2, 32, dtype="bfloat16"), v_new=zeros(9, 2, 32, dtype="bfloat16")),
        ValueError,
        r"k_new must be dense, \(batch, length, heads, head_dim\), where q is, got shape \(9, 2, 32\)",
    ),
    "new-tokens": (
        packed(k_new=zeros(9, 2, 32, dtype="bfloat16"), v_new=zeros(9, 2, 32, dtype="bfloat16")),
        ValueError,
        r"packed k_new must have the 11 tokens of q, whose cu_seqlens_q cuts it, got shape \(9, 2, 32\)",
    ),
    "cu-missing": (packed(cu_seqlens_q=None), ValueError, "cu_seqlens_q must be given for packed q"),
    # Rotation
    "cos-alone": (turning(rotary_sin=None), ValueError, "rotary_cos and rotary_sin .* together, got None for rotary_s"),
    "sin-alone": (turning(rotary_cos=None), ValueError, "given together, got None for rotary_cos"),
    "cos-without-new": (
        turning(k_new=None, v_new=None),
        ValueError,
        "rotary_cos must be None without k_new, for q and k_new are rotated together, got a float32 array",
    ),
    "cos-list": (turning(rotary_cos=[1]), TypeError, r"rotary_cos must be an array, got \[1\] of type list"),
    "cos-dtype": (turning(rotary_cos=ints(50, 8)), TypeError, "rotary_cos must have one of the dtypes .* got int32"),
    "sin-dtype": (turning(rotary_sin=ints(50, 8)), TypeError, "rotary_sin must have one of the dtypes .* got int32"),
    "cos-rank": (turning(rotary_cos=zeros(50)), ValueError, r"rotary_cos must have shape .* got shape \(50,\)"),
    "cos-empty": (turning(rotary_cos=zeros(0, 8)), ValueError, r"rotary_cos must have shape .* got shape \(0, 8\)"),
    "cos-wide": (
        turning(rotary_cos=zeros(50, 17)),
        ValueError,
        r"rotary_cos must have shape \(positions, half of the channels .*\), .* from 1 to 16, got shape \(50, 17\)",
    ),
    "sin-shape": (
        turning(rotary_sin=zeros(50, 9)),
        ValueError,
        r"rotary_sin must have the shape and dtype of rotary_cos, float32 of shape \(50, 8\), got float32 of .* 9\)",
    ),
    "sin-other-dtype": (turning(rotary_sin=zeros(50, 8, dtype="float16")), ValueError, "got float16 of shape"),
    "interleaved": (turning(rotary_interleaved=1), TypeError, "rotary_interleaved must be a Python bool .* got 1"),
    # What attention checks too
    "causal": (dense(causal=None), TypeError, "causal must be a Python bool known while tracing, got None"),
    "softcap": (dense(softcap=-1.0), ValueError, "softcap must be 0"),
    "window": (dense(window_size=5), TypeError, "window_size must be a pair"),
    "sinks": (dense(sinks=zeros(2)), ValueError, r"sinks must have shape \(6,\)"),
    "max-seqlen": (packed(max_seqlen_q=-1), ValueError, "max_seqlen_q must be 0 or more, got -1"),
    "out-dtype": (dense(out_dtype="int8"), TypeError, "out_dtype must be None or one of"),
    "return-lse": (dense(return_lse=1), TypeError, "return_lse must be a Python bool"),
    "implementation": (dense(implementation="gpu"), ValueError, "implementation must be None or one of"),
    "splits-type": (dense(num_splits=2.0), TypeError, "num_splits must be a Python int from .*, got 2.0 of type float"),
    "splits-many": (dense(num_splits=257), ValueError, "num_splits must be .* from 1 to 256, .*, got 257 of type int"),
    "splits-none": (dense(num_splits=0), ValueError, "num_splits must be .*, or None to be chosen, got 0 of"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match) as raised:
        jax_flash.attention_with_kv_cache(**arguments)
    assert str(raised.value).endswith(".")
    if "implementation" not in arguments:
        with pytest.raises(error, match=match):
            jax_flash.reference.attention_with_kv_cache(**arguments)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "match"),
    [
        (20, 32, "head_dim of q and k_cache must be a multiple of 8 .* got 20: pad q and k_cache with zeros and give"),
        (32, 264, "head_dim of v_cache must be a multiple of 8 up to 256 for dtype bfloat16, got 264: use"),
        (32, 12, "head_dim of v_cache must be a multiple of 8 .* got 12: pad it with zeros and cut the output"),
    ],
)
def test_head_dim(head_dim, head_dim_v, match):
    q, k, v = (jnp.ones((BATCH, 9, KV_HEADS, dim), jnp.bfloat16) for dim in (head_dim, head_dim, head_dim_v))
    with pytest.raises(NotImplementedError, match=match):
        jax_flash.attention_with_kv_cache(q, k, v, cache_seqlens=5)
    out = jax_flash.attention_with_kv_cache(q, k, v, cache_seqlens=5, implementation="xla")
    assert out.shape == v.shape


def test_cuda_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(launch, "why_no_cuda", lambda: "JAX sees no CUDA GPU.")
    with pytest.raises(NotImplementedError, match="'cuda' cannot run here: JAX sees no CUDA GPU"):
        jax_flash.attention_with_kv_cache(**paged(), implementation="cuda")


def test_good_input():
    """What checks must let pass: other spellings of arguments, and shapes that look odd."""

    def shapes(arguments):
        results = jax.eval_shape(lambda: jax_flash.attention_with_kv_cache(**arguments))
        return [x.shape for x in jax.tree.leaves(results)]

    out, caches = (BATCH, Q_LEN, HEADS, HEAD_DIM), [(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)] * 2
    fp8 = dense("float8_e4m3fn")
    for arguments in (
        dense(cache_seqlens=-(10**30), num_splits=np.int32(4), window_size=None),
        paged(cache_seqlens=np.int64(9), cache_leftpad=np.zeros(3, np.int32), k_descale=zeros(3, 2), max_seqlen_q=9),
        dense(k_cache=fp8["k_cache"], v_cache=fp8["v_cache"]),
        dense(cache_batch_idx=np.zeros(3, np.int32)),
        dense(cache_seqlens=np.array(7, np.int32)),
    ):
        assert shapes(arguments) == [out]
    for arguments in (
        turning(rotary_cos=zeros(1, 16), rotary_sin=zeros(1, 16), rotary_interleaved=np.bool_(True)),
        appending("float8_e4m3fn", k_new=zeros(3, 4, 2, 32), v_new=zeros(3, 4, 2, 32)),
    ):
        assert shapes(arguments | {"return_lse": True}) == [out, (BATCH, HEADS, Q_LEN), *caches]
    assert shapes(packed()) == [(11, HEADS, HEAD_DIM), *caches]

"""Every message of validate.py, and that each is raised while tracing."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash import launch

BATCH, Q_LEN, K_LEN, HEADS, KV_HEADS, HEAD_DIM = 3, 5, 7, 6, 2, 32


def dense(dtype="bfloat16", **changes):
    arrays = {
        "q": jnp.ones((BATCH, Q_LEN, HEADS, HEAD_DIM), dtype),
        "k": jnp.ones((BATCH, K_LEN, KV_HEADS, HEAD_DIM), dtype),
        "v": jnp.ones((BATCH, K_LEN, KV_HEADS, HEAD_DIM), dtype),
    }
    return arrays | changes


def packed(**changes):
    arrays = {name: x.reshape(-1, *x.shape[2:]) for name, x in dense().items()}
    boundaries = {
        "cu_seqlens_q": Q_LEN * jnp.arange(BATCH + 1, dtype=jnp.int32),
        "cu_seqlens_k": K_LEN * jnp.arange(BATCH + 1, dtype=jnp.int32),
    }
    return arrays | boundaries | changes


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


BAD = {
    # q, k and v
    "q-not-array": (dense(q=[[1.0]]), TypeError, r"q must be an array, got \[\[1.0\]\] of type list"),
    "q-long-list": (
        dense(q=np.ones((4, 90, 80, 70)).tolist()),
        TypeError,
        r"q must be an array, got \[\[\[...\], .{,99} of type list",
    ),
    "q-masked": (
        dense(q=np.ma.ones((3, 5, 6, 32), np.float32)),
        TypeError,
        r"q must be an array, got a masked float32 array of shape \(3, 5, 6, 32\)",
    ),
    "q-byte-order": (
        dense(q=np.ones((3, 5, 6, 32), np.dtype(np.float32).newbyteorder())),
        TypeError,
        r"q must be an array, got a byte-swapped float32 array of shape \(3, 5, 6, 32\)",
    ),
    "q-random-key": (
        dense(q=jax.random.key(0)),
        TypeError,
        "q must have one of the dtypes .* got key<fry>",
    ),
    "dtype": (dense("int32"), TypeError, r"q must have one of the dtypes .*'float8_e4m3fn'.*, got int32"),
    "fp8-e5m2": (dense("float8_e5m2"), TypeError, "q must have one of the dtypes .* got float8_e5m2"),
    "dtype-mix-k": (
        dense(k=dense("float16")["k"]),
        TypeError,
        "q, k and v must have one dtype, or k and v both float8_e4m3fn, got bfloat16 for q, float16 for k and bfloat16",
    ),
    "dtype-mix-v": (dense(v=dense("float32")["v"]), TypeError, "got bfloat16 for q, bfloat16 for k and float32 for v"),
    "dtype-mix-kv": (
        dense(k=dense("float16")["k"], v=dense("float16")["v"]),
        TypeError,
        "got bfloat16 for q, float16 for k and float16 for v",
    ),
    "fp8-q": (
        dense(q=dense("float8_e4m3fn")["q"]),
        TypeError,
        "got float8_e4m3fn for q, bfloat16 for k and bfloat16 for v",
    ),
    "fp8-k": (dense(k=dense("float8_e4m3fn")["k"]), TypeError, "for q, float8_e4m3fn for k and bfloat16 for v"),
    "fp8-v": (dense(v=dense("float8_e4m3fn")["v"]), TypeError, "for q, bfloat16 for k and float8_e4m3fn for v"),
    "rank-q": (dense(q=zeros(5, 32, dtype="bfloat16")), ValueError, r"q must have shape .* got shape \(5, 32\)"),
    "rank-k": (dense(k=zeros(1, 1, 7, 2, 32, dtype="bfloat16")), ValueError, "k must have shape .* got shape"),
    "rank-v": (dense(v=zeros(32, dtype="bfloat16")), ValueError, r"v must have shape .* got shape \(32,\)"),
    "k-head-dim": (
        dense(k=zeros(3, 7, 2, 40, dtype="bfloat16")),
        ValueError,
        r"k must have the head_dim of q, 32, got shape \(3, 7, 2, 40\)",
    ),
    "v-length": (
        dense(v=zeros(3, 8, 2, 32, dtype="bfloat16")),
        ValueError,
        r"v must have the shape of k except in head_dim, \(3, 7, 2, 'head_dim'\), got shape \(3, 8, 2, 32\)",
    ),
    "v-heads": (dense(v=zeros(3, 7, 3, 32, dtype="bfloat16")), ValueError, "v must have the shape of k"),
    "v-packed": (dense(v=zeros(7, 2, 32, dtype="bfloat16")), ValueError, "v must have the shape of k"),
    "k-batch": (
        dense(k=zeros(4, 7, 2, 32, dtype="bfloat16"), v=zeros(4, 7, 2, 32, dtype="bfloat16")),
        ValueError,
        r"k must have a batch of 3 for the 3 sequences of q, got shape \(4, 7, 2, 32\)",
    ),
    "heads": (
        dense(q=zeros(3, 5, 5, 32, dtype="bfloat16")),
        ValueError,
        "the 5 heads of q must be a multiple of the heads of k and v, got 2",
    ),
    "no-kv-heads": (
        dense(k=zeros(3, 7, 0, 32, dtype="bfloat16"), v=zeros(3, 7, 0, 32, dtype="bfloat16")),
        ValueError,
        "must be a multiple of the heads of k and v, got 0",
    ),
    "no-head-dim": (
        dense(v=zeros(3, 7, 2, 0, dtype="bfloat16")),
        ValueError,
        "head_dim of v must be at least 1, got 0",
    ),
    # Sequences
    "cu-missing-q": (packed(cu_seqlens_q=None), ValueError, "cu_seqlens_q must be given for packed q .* got None"),
    "cu-missing-k": (packed(cu_seqlens_k=None), ValueError, "cu_seqlens_k must be given for packed k .* got None"),
    "cu-dense-q": (dense(cu_seqlens_q=ints(4)), ValueError, "cu_seqlens_q is for packed q .* got q of shape"),
    "cu-dense-k": (dense(cu_seqlens_k=ints(4)), ValueError, "cu_seqlens_k is for packed k .* got k of shape"),
    "cu-dtype": (
        packed(cu_seqlens_q=np.zeros(4, np.int64)),
        TypeError,
        r"cu_seqlens_q must be an int32 array, got an int64 array of shape \(4,\)",
    ),
    "cu-byte-order": (
        packed(cu_seqlens_q=np.zeros(4, np.dtype(np.int32).newbyteorder())),
        TypeError,
        "cu_seqlens_q must be an int32 array, got a byte-swapped int32 array",
    ),
    "cu-list": (packed(cu_seqlens_k=[0, 7]), TypeError, "cu_seqlens_k must be an int32 array, got .* of type list"),
    "cu-random-key": (
        packed(cu_seqlens_q=jax.random.key(0)),
        TypeError,
        r"cu_seqlens_q must be an int32 array, got a key<fry> array of shape \(\)",
    ),
    "cu-rank": (packed(cu_seqlens_q=ints(2, 4)), ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\)"),
    "cu-empty": (packed(cu_seqlens_k=ints(0)), ValueError, r"cu_seqlens_k must have shape \(sequences \+ 1,\)"),
    "cu-length": (
        packed(cu_seqlens_k=ints(6)),
        ValueError,
        r"cu_seqlens_k must have shape \(4,\) for the 3 sequences of q, got shape \(6,\)",
    ),
    "mixed-packed-q": (
        packed(k=dense()["k"], v=dense()["v"], cu_seqlens_k=None, cu_seqlens_q=ints(6)),
        ValueError,
        "k must have a batch of 5 for the 5 sequences of q",
    ),
    "mixed-packed-k": (
        packed(q=dense()["q"], cu_seqlens_q=None, cu_seqlens_k=ints(6)),
        ValueError,
        r"cu_seqlens_k must have shape \(4,\) for the 3 sequences of q",
    ),
    "max-seqlen-float": (packed(max_seqlen_q=5.0), TypeError, "max_seqlen_q must be a Python int .* got 5.0 of type"),
    "max-seqlen-bool": (packed(max_seqlen_k=True), TypeError, "max_seqlen_k must be a Python int .* got True"),
    "max-seqlen-negative": (packed(max_seqlen_k=-1), ValueError, "max_seqlen_k must be 0 or more, got -1"),
    "seqused-dtype": (dense(seqused_q=zeros(3)), TypeError, "seqused_q must be an int32 array, got a float32 array"),
    "seqused-shape": (
        dense(seqused_k=ints(4)),
        ValueError,
        r"seqused_k must have shape \(3,\), one length a sequence, got shape \(4,\)",
    ),
    "seqused-packed": (packed(seqused_q=ints(3, 1)), ValueError, r"seqused_q must have shape \(3,\)"),
    # Scores
    "q-descale-dtype": (
        dense(q_descale=zeros(dtype=jnp.bfloat16)),
        TypeError,
        "q_descale must be a Python float or a float32 array, got a bfloat16 array",
    ),
    "q-descale-shape": (
        dense(q_descale=zeros(3, 3)),
        ValueError,
        r"q_descale must have shape \(\) or \(3,\) or \(3, 2\) or \(3, 6\), got shape \(3, 3\)",
    ),
    "k-descale-shape": (
        dense(k_descale=zeros(3, 6)),
        ValueError,
        r"k_descale must have shape \(\) or \(3,\) or \(3, 2\), got shape \(3, 6\)",
    ),
    "v-descale-shape": (packed(v_descale=zeros(2)), ValueError, r"v_descale must have shape .* got shape \(2,\)"),
    "v-descale-list": (
        dense(v_descale=[1.0]),
        TypeError,
        "v_descale must be .*float32 array, got .* of type list",
    ),
    "scale-type": (dense(softmax_scale="1"), TypeError, "softmax_scale must be a Python float or a float32 array"),
    "scale-overflow": (dense(softmax_scale=10**400), ValueError, "softmax_scale must fit a float32, got 1000"),
    "descale-overflow": (dense(v_descale=1e39), ValueError, r"v_descale must fit a float32, got 1e\+39"),
    "scale-dtype": (dense(softmax_scale=ints()), TypeError, "softmax_scale must be .* got an int32 array"),
    "scale-shape": (dense(softmax_scale=zeros(3)), ValueError, r"softmax_scale must have shape \(\), got shape \(3,\)"),
    "softcap-type": (dense(softcap=None), TypeError, "softcap must be a Python float .* got None of type NoneType"),
    "softcap-array": (dense(softcap=zeros()), TypeError, "softcap must be a Python float .* got a float32 array"),
    "softcap-negative": (dense(softcap=-1.0), ValueError, r"softcap must be 0 \(off\) or positive, .* got -1"),
    "softcap-nan": (dense(softcap=float("nan")), ValueError, r"softcap must be .* 1e\+30, got nan"),
    "softcap-subnormal": (dense(softcap=1e-40), ValueError, r"softcap must be .* 1e\+30, got 1e-40"),
    "softcap-overflow": (dense(softcap=1e39), ValueError, r"softcap must be .* 1e\+30, got 1e\+39"),
    "softcap-infinite": (dense(softcap=np.inf), ValueError, r"softcap must be .* 1e\+30, got inf"),
    "window-int": (dense(window_size=5), TypeError, r"window_size must be a pair \(left, right\) .* got 5 of type int"),
    "window-three": (dense(window_size=(1, 2, 3)), TypeError, "window_size must be a pair"),
    "window-float": (dense(window_size=(1.0, 2)), TypeError, "window_size must be a pair"),
    "window-bool": (dense(window_size=(True, 2)), TypeError, "window_size must be a pair"),
    "window-negative": (
        dense(window_size=(-2, 2)),
        ValueError,
        r"window_size must have entries of -1 \(unbounded\) or more, got \(-2, 2\)",
    ),
    "sinks-shape": (dense(sinks=zeros(2)), ValueError, r"sinks must have shape \(6,\), one logit a query head, got"),
    "sinks-dtype": (dense(sinks=ints(6)), TypeError, "sinks must be an array of one of the dtypes .* got an int32"),
    "causal": (dense(causal=1), TypeError, "causal must be a Python bool known while tracing, got 1 of type int"),
    # Results and who computes them
    "return-lse": (dense(return_lse=None), TypeError, "return_lse must be a Python bool"),
    "out-dtype": (dense(out_dtype="float64"), TypeError, "out_dtype must be None or one of .* got float64"),
    "out-dtype-fp8": (dense(out_dtype=jnp.float8_e4m3fn), TypeError, "out_dtype must be .* got float8_e4m3fn"),
    "out-dtype-nonsense": (dense(out_dtype="no"), TypeError, "out_dtype must be .* got 'no'"),
    "out-dtype-class": (dense(out_dtype=dict), TypeError, "out_dtype must be .* got <class 'dict'> of type type"),
    "out-dtype-array": (dense(out_dtype=np.float32(1)), TypeError, "out_dtype must be .* of type float32"),
    "out-dtype-list": (dense(out_dtype=[]), TypeError, r"out_dtype must be .* got \[\] of type list"),
    "implementation-array": (
        dense(implementation=np.array(["cpu", "xla"])),
        ValueError,
        "implementation must be None or one of .*, got a .* array of shape",
    ),
    "implementation": (
        dense(implementation="cudnn"),
        ValueError,
        r"implementation must be None or one of \('cuda', 'cpu', 'xla'\), got 'cudnn'",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match) as raised:
        jax_flash.attention(**arguments)
    assert str(raised.value).endswith(".")
    if "implementation" not in arguments:
        with pytest.raises(error, match=match):
            jax_flash.reference.attention(**arguments)


def test_errors_are_raised_while_tracing():
    def wrong(q, k, v):
        return jax_flash.attention(q, k, v, softcap=-1.0)

    with pytest.raises(ValueError, match="softcap"):
        jax.eval_shape(wrong, *dense().values())


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("max_seqlen_q", 5, "max_seqlen_q must be a Python int known while tracing, or None, got a traced int32 array"),
        ("softcap", 1.0, "softcap must be a Python float known while tracing, got a traced float32 array"),
        ("window_size", (1, 2), "window_size must be a pair"),
        ("causal", True, "causal must be a Python bool known while tracing, got a traced bool array"),
    ],
)
def test_static_arguments_must_not_be_traced(name, value, match):
    with pytest.raises(TypeError, match=match):
        jax.jit(lambda x: jax_flash.attention(**dense(), **{name: x}))(value)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v", "match"),
    [
        (
            "bfloat16",
            20,
            32,
            "head_dim of q and k must be a multiple of 8 up to 256 for dtype bfloat16, got 20: pad .* or ",
        ),
        ("float16", 264, 32, "head_dim of q and k must be a multiple of 8 up to 256 for dtype float16, got 264: "),
        ("float32", 32, 12, "head_dim of v must be a multiple of 8 up to 256 for dtype float32, got 12: pad .* or "),
        ("float8_e4m3fn", 40, 32, "head_dim of q and k must be a multiple of 16 up to 256 for .*, got 40: pad .* or "),
        ("float8_e4m3fn", 32, 512, "head_dim of v must be a multiple of 16 up to 256 for .*, got 512: "),
    ],
)
def test_head_dim(dtype, head_dim, head_dim_v, match):
    q, k, v = (jnp.ones((2, 9, 4, dim), dtype) for dim in (head_dim, head_dim, head_dim_v))
    with pytest.raises(NotImplementedError, match=f"{match}use implementation='xla'"):
        jax_flash.attention(q, k, v)
    assert jax_flash.attention(q, k, v, implementation="xla").shape == v.shape


def test_cuda_needs_a_gpu(no_gpu):
    with pytest.raises(NotImplementedError, match=r"'cuda' cannot run here: JAX sees no CUDA GPU\.$"):
        jax_flash.attention(**dense(), implementation="cuda")


@pytest.mark.parametrize(
    "reason",
    [
        "JAX sees no CUDA GPU.",
        "the GPU has compute capability 8.0; the kernels need 9.0 (Hopper).",
        "NVRTC is missing; install jax_flash with its extra cuda13.",
    ],
)
def test_cuda_says_why_it_cannot_run(monkeypatch, reason):
    monkeypatch.setattr(launch, "why_no_cuda", lambda: reason)
    with pytest.raises(NotImplementedError) as raised:
        jax_flash.attention(**dense(), implementation="cuda")
    assert str(raised.value) == f"implementation 'cuda' cannot run here: {reason}"


def test_cpu_says_why_it_cannot_run(monkeypatch):
    def devices(platform=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(NotImplementedError, match="implementation 'cpu' cannot run here: JAX has no CPU backend"):
        jax_flash.attention(**dense(), implementation="cpu")


def test_good_input():
    """What checks must let pass: one request with every optional argument, and the other spelling of some."""
    shape = (BATCH, Q_LEN, HEADS, HEAD_DIM)
    more = {
        "window_size": [None, np.int64(3)],
        "softcap": np.float16(30),
        "softmax_scale": np.float64(0.1),
        "sinks": zeros(HEADS, dtype=jnp.bfloat16),
        "q_descale": zeros(BATCH, HEADS),
        "k_descale": zeros(BATCH),
        "v_descale": 2.0,
        "seqused_q": np.zeros(BATCH, np.int32),
        "max_seqlen_q": np.int32(4),
        "out_dtype": jnp.float32,
        "causal": np.bool_(True),
        "implementation": "xla",
    }
    assert jax_flash.attention(**dense(**more)).shape == shape
    assert jax_flash.attention(**dense(window_size=None, softmax_scale=1), implementation="xla").shape == shape
    assert jax_flash.attention(**packed(), implementation="xla").shape == (BATCH * Q_LEN, HEADS, HEAD_DIM)
    for dtype in ("float16", "bfloat16", "float32"):
        over_fp8 = dense("float8_e4m3fn", q=dense(dtype)["q"])
        assert jax_flash.attention(**over_fp8, implementation="xla").dtype == dtype


def test_import_takes_neither_flax_nor_cuda_nor_long():
    program = """
import sys, time, jax
start = time.process_time()
import jax_flash
print(time.process_time() - start, [name for name in ("flax", "cuda", "jax_flash._ffi") if name in sys.modules])
"""
    results = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(" ", 1)
        for _ in range(3)
    ]
    assert {modules.strip() for _, modules in results} == {"[]"}
    assert min(float(seconds) for seconds, _ in results) < 0.05

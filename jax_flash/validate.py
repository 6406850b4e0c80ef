"""Every check of what a user asks for. They read shapes, dtypes and static values alone, so they raise while tracing.

TypeError and ValueError: the request is wrong. NotImplementedError: it is right and no kernel serves it.
"""

from __future__ import annotations

import math
import numbers
import reprlib

import jax
import numpy as np

from jax_flash.spec import Call, Request

DTYPES = ("float16", "bfloat16", "float32", "float8_e4m3fn")
FLOAT_DTYPES = ("float16", "bfloat16", "float32")
IMPLEMENTATIONS = ("cuda", "cpu", "xla")
GRANULARITIES = ("tensor", "batch", "head")
MAX_HEAD_DIM = 256
SOFTCAP_RANGE = (1e-30, 1e30)
"""Beyond it a score over the softcap, or the softmax scale over it, leaves the normal float32."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple = 2, 3, 3


def check(call: Call) -> None:
    """Checks all arguments of one call of `attention`, except whether its implementation can run on this machine."""
    check_request(call)
    _check_sequences(call)


def check_request(call: Request) -> None:
    """Checks what calls of both functions ask for, but for the lengths of keys."""
    _check_implementation(call.implementation)
    _check_qkv(call)
    (k, _), (v, values) = call.kv.items()
    _check_head_dim(f"q and {k}", call.q.shape[-1], call)
    _check_head_dim(v, values.shape[-1], call)
    check_cu_seqlens("cu_seqlens_q", call.cu_seqlens_q, "q", call.q)
    _check_max_seqlen("max_seqlen_q", call.max_seqlen_q)
    _check_descales(call)
    _check_softmax(call)
    check_float_dtype("out_dtype", call.out_dtype)
    check_bool("causal", call.causal)
    check_bool("return_lse", call.return_lse)


def check_quantization(x, granularity, cu_seqlens, seqused, hadamard) -> None:
    """Checks all arguments of one call of `quantize_fp8`."""
    check_rows("x", x, FLOAT_DTYPES)
    if not (isinstance(granularity, str) and granularity in GRANULARITIES):
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {describe(granularity)}.")
    if cu_seqlens is not None or seqused is not None or granularity != "tensor":
        check_cu_seqlens("cu_seqlens", cu_seqlens, "x", x)
    if seqused is not None:
        check_lengths("seqused", seqused, (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,))
    check_bool("hadamard", hadamard)


def check_partial_results(out_a, lse_a, out_b, lse_b) -> None:
    """Checks all arguments of one call of `merge`."""
    check_rows("out_a", out_a, FLOAT_DTYPES)
    check_rows("out_b", out_b, FLOAT_DTYPES)
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b must have the shape of out_a, {out_a.shape}, got shape {out_b.shape}.")
    *batch, rows, heads, _ = out_a.shape
    for name, lse, out in (("lse_a", lse_a, "out_a"), ("lse_b", lse_b, "out_b")):
        if not is_array(lse) or lse.dtype != np.float32:
            raise TypeError(f"{name} must be a float32 array, got {describe(lse)}.")
        if lse.shape != (*batch, heads, rows):
            raise ValueError(f"{name} must have shape {(*batch, heads, rows)} for {out}, got shape {lse.shape}.")


def _check_implementation(implementation) -> None:
    if implementation is None or (isinstance(implementation, str) and implementation in IMPLEMENTATIONS):
        return
    raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {describe(implementation)}.")


def _check_qkv(call: Request) -> None:
    q, ((k_name, k), (v_name, v)) = call.q, call.kv.items()
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        check_rows(name, x, DTYPES)
    if k.dtype != v.dtype or k.dtype.name not in (q.dtype.name, "float8_e4m3fn"):
        raise TypeError(
            f"q, {k_name} and {v_name} must have one dtype, or {k_name} and {v_name} both float8_e4m3fn, got "
            f"{q.dtype.name} for q, {k.dtype.name} for {k_name} and {v.dtype.name} for {v_name}."
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have the head_dim of q, {q.shape[-1]}, got shape {k.shape}.")
    check_like(v_name, v, k_name, k)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"the {heads} heads of q must be a multiple of the heads of {k_name} and {v_name}, got {kv_heads} of these."
        )


def check_rows(name, x, dtypes) -> None:
    """Checks queries, keys or values by themselves."""
    check_array(name, x, dtypes)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have shape (batch, length, heads, head_dim) or, packed, (tokens, heads, head_dim), "
            f"got shape {x.shape}."
        )
    if x.shape[-1] == 0:
        raise ValueError(f"head_dim of {name} must be at least 1, got 0.")


def check_array(name, x, dtypes) -> None:
    """Checks that x is an array of one of the dtypes."""
    if not is_array(x):
        raise TypeError(f"{name} must be an array, got {describe(x)}.")
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {dtypes}, got {x.dtype.name}.")


def check_like(v_name, v, k_name, k) -> None:
    """Checks that values go with keys."""
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{v_name} must have the shape of {k_name} except in head_dim, {(*k.shape[:-1], 'head_dim')}, "
            f"got shape {v.shape}."
        )


def _check_head_dim(name, head_dim, call: Request) -> None:
    dtype = call.q.dtype  # that of the computation
    multiple = 16 if dtype.itemsize == 1 else 8
    if head_dim > MAX_HEAD_DIM:
        advice = ""
    elif name.startswith("v"):
        advice = "pad it with zeros and cut the output, or "
    else:
        advice = f"pad {name} with zeros and give softmax_scale, which is {head_dim} ** -0.5 unless you chose one, or "
    if call.implementation != "xla" and (head_dim % multiple or head_dim > MAX_HEAD_DIM):
        raise NotImplementedError(
            f"head_dim of {name} must be a multiple of {multiple} up to {MAX_HEAD_DIM} for dtype {dtype.name}, "
            f"got {head_dim}: {advice}use implementation='xla', which takes any."
        )


def _check_sequences(call: Call) -> None:
    check_cu_seqlens("cu_seqlens_k", call.cu_seqlens_k, "k", call.k)
    _check_max_seqlen("max_seqlen_k", call.max_seqlen_k)
    batch = call.batch
    if call.packed_k and call.cu_seqlens_k.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k must have shape ({batch + 1},) for the {batch} sequences of q, "
            f"got shape {call.cu_seqlens_k.shape}."
        )
    if not call.packed_k:
        check_batch("k", call.k, batch)
    for name in ("seqused_q", "seqused_k"):
        if getattr(call, name) is not None:
            check_lengths(name, getattr(call, name), (batch,))


def check_batch(name, x, batch, unless: str = "") -> None:
    """Checks that a dense array has as many sequences as q; `unless` says what else it may have."""
    if x.shape[0] != batch:
        raise ValueError(
            f"{name} must have a batch of {batch} for the {batch} sequences of q{unless}, got shape {x.shape}."
        )


def check_cu_seqlens(name, cu_seqlens, side, x) -> None:
    """Checks the boundaries of x, which has them where it is packed."""
    packed = x.ndim == 3
    if packed and cu_seqlens is None:
        raise ValueError(f"{name} must be given for packed {side} of shape {x.shape}, got None.")
    if not packed and cu_seqlens is not None:
        raise ValueError(
            f"{name} is for packed {side} of shape (tokens, heads, head_dim), got {side} of shape {x.shape}."
        )
    if packed:
        check_boundaries(name, cu_seqlens)


def check_boundaries(name, x) -> None:
    """Checks boundaries of packed sequences."""
    check_int32(name, x)
    if x.ndim != 1 or not x.shape[0]:
        raise ValueError(f"{name} must have shape (sequences + 1,), got shape {x.shape}.")


def check_lengths(name, x, shape) -> None:
    """Checks lengths of sequences."""
    check_int32(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one length a sequence, got shape {x.shape}.")


def check_int32(name, x) -> None:
    """Checks the dtype of an index array."""
    if not is_array(x) or x.dtype != np.int32:
        raise TypeError(f"{name} must be an int32 array, got {describe(x)}.")


def check_positive(name, x) -> None:
    """Checks a number of heads, features and the like."""
    if not is_int(x):
        raise TypeError(f"{name} must be a Python int, got {describe(x)}.")
    if x < 1:
        raise ValueError(f"{name} must be at least 1, got {_SHORT.repr(x)}.")


def _check_max_seqlen(name, x) -> None:
    if x is None:
        return
    if not is_int(x):
        raise TypeError(f"{name} must be a Python int known while tracing, or None, got {describe(x)}.")
    if x < 0:
        raise ValueError(f"{name} must be 0 or more, got {_SHORT.repr(x)}.")


def _check_descales(call: Request) -> None:
    batch, heads, kv_heads = call.batch, call.q.shape[-2], call.kv_heads
    shapes = ((), (batch,), (batch, kv_heads))
    _check_factor("q_descale", call.q_descale, (*shapes, (batch, heads)))
    _check_factor("k_descale", call.k_descale, shapes)
    _check_factor("v_descale", call.v_descale, shapes)


def _check_factor(name, x, shapes) -> None:
    if x is None:
        return
    if is_real(x):
        if not _fits_float32(x):
            raise ValueError(f"{name} must fit a float32, got {_SHORT.repr(x)}.")
    elif not is_array(x) or x.dtype != np.float32:
        raise TypeError(f"{name} must be a Python float or a float32 array, got {describe(x)}.")
    elif x.shape not in shapes:
        words = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name} must have shape {words}, got shape {x.shape}.")


def _check_softmax(call: Request) -> None:
    _check_factor("softmax_scale", call.softmax_scale, ((),))
    if not is_real(call.softcap):
        raise TypeError(f"softcap must be a Python float known while tracing, got {describe(call.softcap)}.")
    least, most = SOFTCAP_RANGE
    if call.softcap and not (_fits_float32(call.softcap) and least <= float(call.softcap) <= most):
        raise ValueError(
            f"softcap must be 0 (off) or positive, from {least} to {most}, got {_SHORT.repr(call.softcap)}."
        )

    window = call.window_size
    if window is not None:
        pair = isinstance(window, (tuple, list)) and len(window) == 2
        if not pair or not all(side is None or is_int(side) for side in window):
            raise TypeError(
                "window_size must be a pair (left, right) of Python ints or None, known while tracing, "
                f"got {describe(window)}."
            )
        if any(side is not None and side < -1 for side in window):
            raise ValueError(f"window_size must have entries of -1 (unbounded) or more, got {_SHORT.repr(window)}.")

    if call.sinks is not None:
        if not is_array(call.sinks) or call.sinks.dtype.name not in FLOAT_DTYPES:
            raise TypeError(f"sinks must be an array of one of the dtypes {FLOAT_DTYPES}, got {describe(call.sinks)}.")
        heads = call.q.shape[-2]
        if call.sinks.shape != (heads,):
            raise ValueError(f"sinks must have shape ({heads},), one logit a query head, got shape {call.sinks.shape}.")


def check_float_dtype(name, x) -> None:
    """Checks a dtype of results."""
    if x is None:
        return
    dtype = dtype_name(x)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be None or one of {FLOAT_DTYPES}, got {dtype or describe(x)}.")


def dtype_name(x) -> str | None:
    """The name of a dtype, however it is spelled; None where x is none. An array is none, though it has one."""
    if not isinstance(x, (str, type, np.dtype)):
        return None
    try:
        name = np.dtype(x).name
    except (TypeError, ValueError):
        return None
    return None if name == "object" else name  # what NumPy makes of any class


def check_bool(name, x) -> None:
    """Checks a flag."""
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} must be a Python bool known while tracing, got {describe(x)}.")


def is_array(x) -> bool:
    """Whether JAX takes x as an array as it is: neither masked nor of foreign byte order."""
    return isinstance(x, (jax.Array, np.ndarray)) and not isinstance(x, np.ma.MaskedArray) and _is_native(x.dtype)


def _is_native(dtype) -> bool:
    return getattr(dtype, "isnative", True)  # JAX's own, such as that of random keys, do not say


def is_int(x) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_real(x) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _fits_float32(x) -> bool:
    """Whether a real number stays finite as a float32, or was not finite before."""
    try:
        return not math.isfinite(x) or abs(float(x)) <= float(np.finfo(np.float32).max)
    except OverflowError:  # an int that is too large for any float
        return False


def describe(x) -> str:
    """An argument in an error message: what matters of an array is its dtype and shape, not its values."""
    if isinstance(x, jax.core.Tracer):
        return f"a traced {x.dtype.name} array of shape {x.shape}"
    if isinstance(x, (jax.Array, np.ndarray)):
        kind = "masked " if isinstance(x, np.ma.MaskedArray) else ""
        kind += "" if _is_native(x.dtype) else "byte-swapped "
        kind += x.dtype.name
        return f"{'an' if kind.startswith('int') else 'a'} {kind} array of shape {x.shape}"
    return f"{_SHORT.repr(x)} of type {type(x).__name__}"

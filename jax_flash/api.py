"""The public functions: user words -> checks -> canonical operands -> whoever computes them -> the user's layout."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from jax_flash import append, canonical, reference, validate, validate_cache
from jax_flash.spec import Append, Attention, CacheCall, Call, Operands


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | jax.Array | None = None,
    sinks: jax.Array | None = None,
    q_descale: ArrayLike | None = None,
    k_descale: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    cu_seqlens_q: jax.Array | None = None,
    cu_seqlens_k: jax.Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: jax.Array | None = None,
    seqused_k: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Exact attention, softmax(scale * q @ k.T) @ v, in memory linear in the sequence lengths.

    B is the batch or, for packed arrays, the number of sequences; Sq and Sk are query and key lengths; Tq and Tk the
    tokens of all packed sequences; H and Hk the query and key/value heads, H a multiple of Hk; D the head dim of q and
    k, Dv that of v. Packed q may go with dense k and v and the reverse.

    A row that sees no key gives 0 and an LSE of -inf (with a sink: the sink), rows that belong to no sequence or lie
    past `seqused_q` give 0 and -inf. What lies in unused rows of q, k and v, NaN included, reaches no used row and no
    gradient. Index arrays may hold any values: they are made increasing and cut to the arrays they index. The same
    inputs give the same bits. There is no dropout, bias or mask: causal, window_size and seqused say what is seen.

    Gradients flow to q, k, v, softmax_scale, sinks and the descales; with kernels those of scale factors are NaN where
    their product is 0. To differentiate in FP8 k or v raises, and in any of these where q is FP8; so do, with kernels,
    second derivatives and forward mode, which "xla" has.

    Args:
      q: queries, dense (B, Sq, H, D) or packed (Tq, H, D); float16, bfloat16, float32 or float8_e4m3fn. D and Dv are
        multiples of 8 (16 for FP8 q) up to 256, any for "xla".
      k: keys, (B, Sk, Hk, D) or (Tk, Hk, D), of the dtype of q, or float8_e4m3fn, which is widened to it; a CUDA
        kernel may convert a bfloat16 q to float16 then: infinite from 65 520 on, fewer bits below 6e-5, 0 below 3e-8.
      v: values, (B, Sk, Hk, Dv) or (Tk, Hk, Dv), of the dtype of k.
      causal: query i sees keys j <= i + Sk - Sq, in each sequence, with the used lengths.
      window_size: (left, right): query i sees keys i + Sk - Sq - left <= j <= i + Sk - Sq + right; -1 or None is
        unbounded. `causal` makes right 0.
      softcap: scores become softcap * tanh(score / softcap) before masking; 0 is off. From 1e-30 to 1e30; above
        10 000 no CUDA kernel serves it.
      softmax_scale: a Python float, or a float32 scalar that may be traced; D ** -0.5 unless given.
      sinks: float (H,), one logit a query head that takes part in the softmax and has no value.
      q_descale: float32 (), (B,), (B, Hk) or (B, H): what one unit of the stored q is worth. Allowed with any dtype.
      k_descale: float32 (), (B,) or (B, Hk), likewise.
      v_descale: float32 (), (B,) or (B, Hk), likewise.
      cu_seqlens_q: int32 (B + 1,), for packed q: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1], which may
        be none.
      cu_seqlens_k: int32 (B + 1,), for packed k and v.
      max_seqlen_q: the longest query sequence if known: a hint for speed, which never changes the result.
      max_seqlen_k: the longest key sequence, likewise.
      seqused_q: int32 (B,): only the first seqused_q[b] query rows of each sequence count.
      seqused_k: int32 (B,): only the first seqused_k[b] keys of each sequence count.
      out_dtype: float16, bfloat16 or float32; the dtype of q unless given, bfloat16 for FP8 q.
      return_lse: whether to return the log-sum-exp of the scores too.
      implementation: "cuda" (a GPU of compute capability 9.0), "cpu" or "xla" (plain jnp); None takes the one that
        serves the platform, "xla" with a warning where none does.

    Returns:
      out, of the shape of q with Dv for D; with `return_lse` also the natural-log sum of exponentials, float32
      (B, H, Sq) or, for packed q, (H, Tq), which is differentiable.

    Raises:
      TypeError, ValueError: an argument is wrong; raised while tracing, names the argument, what was expected and came.
        TypeError also by jax.jvp with kernels.
      NotImplementedError: the request is right, and no kernel serves it, or none of the implementation asked for here;
        or a gradient of FP8 is asked for, or a second derivative of a kernel.

    Source: FlashAttention-3, https://arxiv.org/abs/2407.08608; names follow its interface.
    """
    call = Call(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        softmax_scale=softmax_scale,
        sinks=sinks,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        out_dtype=out_dtype,
        return_lse=return_lse,
        implementation=implementation,
    )
    validate.check(call)
    computed, operands = canonical.canonical(call)
    _check_machine(computed, operands)
    return canonical.restore(call, *_attended(computed, operands))


def attention_with_kv_cache(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    k_new: jax.Array | None = None,
    v_new: jax.Array | None = None,
    *,
    cache_seqlens: int | jax.Array,
    page_table: jax.Array | None = None,
    cache_batch_idx: jax.Array | None = None,
    cache_leftpad: jax.Array | None = None,
    cu_seqlens_q: jax.Array | None = None,
    max_seqlen_q: int | None = None,
    rotary_cos: jax.Array | None = None,
    rotary_sin: jax.Array | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | jax.Array | None = None,
    sinks: jax.Array | None = None,
    q_descale: ArrayLike | None = None,
    k_descale: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    num_splits: int | None = None,
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`attention` over keys and values that lie in a cache, to which it may first append new ones; for inference.

        step = jax.jit(jax_flash.attention_with_kv_cache, donate_argnames=("k_cache", "v_cache"))
        out, k_cache, v_cache = step(q, k_cache, v_cache, k_new, v_new, cache_seqlens=cache_seqlens)

    What is not an array (`window_size`, `num_splits`, ..) must be known while tracing: by functools.partial, say.

    B is the number of sequences, the other letters are those of `attention`. A cache is dense, (B, S, ..), or paged: a
    pool of pages that all sequences share, (pages, page size, ..), of which `page_table` gives each sequence its own.
    The capacity of a sequence is S, or its number of pages times the page size. Keys have positions from 0 on, and the
    queries of a sequence are its last positions: of n queries over `length` keys, new ones included, query i is at
    position i + length - n.

    Of a cache only used rows are read, and nothing else that it holds, NaN included, reaches a result. Index arrays may
    hold any values: lengths are clamped to the capacity, pages and rows that are read to those that there are, and what
    would be written past the capacity or outside the cache is dropped. Nonsense for one sequence changes no other,
    unless both are led to the same rows of a cache. A gradient of anything through this function raises.

    Args:
      q: queries, dense (B, Sq, H, D) or packed (Tq, H, D); dtypes and head dims are those of `attention`.
      k_cache: keys, (B, S, Hk, D) or, paged, (pages, page size, Hk, D), of the dtype of q or float8_e4m3fn.
      v_cache: values, (B, S, Hk, Dv) or (pages, page size, Hk, Dv), of the dtype of k_cache.
      k_new: keys to append, dense (B, S_new, Hk, D) or, where q is packed, packed like it, (Tq, Hk, D). They are of the
        dtype of k_cache, and copied bit for bit unless rotated; or float16, bfloat16 or float32 over a float8_e4m3fn
        cache, which takes k_new / k_descale, 448 at most.
      v_new: values to append, of the shape of k_new with Dv for D, and its dtype.
      cache_seqlens: int32 (B,), or an int or int32 () for all: the keys that each sequence has in the cache, before
        the new ones.
      page_table: int32 (B, pages of a sequence): key j of sequence b is row j % page size of page
        page_table[b, j // page size]. A page may have any number of rows.
      cache_batch_idx: int32 (B,), for a dense cache of any batch: the row of it that each sequence has.
      cache_leftpad: int32 (B,): the first keys of each sequence that do not count; positions stay as they are.
      cu_seqlens_q: int32 (B + 1,), for packed q, as in `attention`.
      max_seqlen_q: the longest query sequence if known, a hint for speed, as in `attention`.
      rotary_cos: (positions, R / 2), float16, bfloat16 or float32: rotates the first R channels of row j of k_new, and
        of q, by the angles of position cache_seqlens + j, as FlashAttention does; where neither `causal` nor a window
        is given, all rows of q by those of cache_seqlens. Positions past the table use its last row. Needs k_new; where
        that has another length than q, these positions of q are not those that masks go by.
      rotary_sin: the like of rotary_cos.
      rotary_interleaved: whether channels 2i and 2i + 1 are a pair, else i and i + R / 2.
      causal, window_size, softcap, softmax_scale, sinks, q_descale, k_descale, v_descale: as in `attention`; but
        `causal` is True unless given.
      num_splits: parts that the keys of a sequence are split into, up to 256, which a GPU works on side by side; chosen
        unless given. It changes results by rounding alone, and nothing on the CPU or where many queries see each key.
      out_dtype, return_lse, implementation: as in `attention`.

    Returns:
      out, or (out, lse) with `return_lse`, as of `attention`; with k_new also k_cache and v_cache behind them, updated
      in place when they are donated, for which there must be no other use of them.

    Raises:
      TypeError, ValueError: an argument is wrong; raised while tracing, names the argument, what was expected and came.
      NotImplementedError: the request is right, and no kernel serves it, or none of the implementation asked for here;
        or a gradient is asked for.

    Source: FlashAttention's flash_attn_with_kvcache, https://github.com/Dao-AILab/flash-attention, whose names it has.
    """
    call = CacheCall(
        q,
        k_cache,
        v_cache,
        k_new,
        v_new,
        cache_seqlens=cache_seqlens,
        page_table=page_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        softmax_scale=softmax_scale,
        sinks=sinks,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        num_splits=num_splits,
        out_dtype=out_dtype,
        return_lse=return_lse,
        implementation=implementation,
    )
    validate_cache.check(call)
    computed, operands, new = canonical.over_cache(call)
    _check_machine(computed, operands)
    if new is not None:
        operands = operands.after(_appended(computed, new))
    return canonical.restore_over_cache(call, operands, *_attended(computed, operands))


# The primitives are imported where they are used, as launch is, for with the part of JAX that they need they take as
# long as all the rest.


def _attended(computed: Attention, operands: Operands) -> tuple[jax.Array, jax.Array]:
    # Without a query, a key or a value there is nothing for a kernel to do.
    if computed.implementation == "xla" or 0 in (*operands.q.shape, *operands.v.shape, operands.batch):
        return reference.forward(computed, operands)
    from jax_flash import primitive

    return primitive.attend(computed, operands)


def _appended(computed: Attention, new: Append) -> tuple[jax.Array, jax.Array, jax.Array]:
    if computed.implementation == "xla" or 0 in (*new.q.shape, *new.k_new.shape, *new.k_cache.shape, new.batch):
        return append.append(computed, new)
    from jax_flash import primitive

    return primitive.append(computed, new)


def _check_machine(computed: Attention, operands: Operands) -> None:
    """Raises where an implementation asked for by name cannot run a call on this machine."""
    if computed.implementation is None:
        return
    from jax_flash import launch

    reason = None
    if computed.implementation == "cuda":
        reason = launch.why_no_cuda() or launch.why_not_served(computed, operands)
    if computed.implementation == "cpu":
        try:
            jax.devices("cpu")
        except RuntimeError as error:
            reason = f"JAX has no CPU backend ({error})."
    if reason:
        raise launch.cannot_run(computed.implementation, reason)

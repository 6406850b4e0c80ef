"""The checks of what a user asks for over a KV cache, after the rules of validate.py."""

from __future__ import annotations

from jax_flash.spec import CacheCall
from jax_flash.validate import (
    DTYPES,
    FLOAT_DTYPES,
    check_array,
    check_batch,
    check_bool,
    check_int32,
    check_lengths,
    check_like,
    check_request,
    check_rows,
    describe,
    is_array,
    is_int,
)

MAX_CAPACITY = 2**30
"""Of a sequence: positions, and a window beside them, fit an int32."""

MAX_SPLITS = 256
"""More would be smaller than what a multiprocessor works on at a time, or leave none to work on them."""


def check(call: CacheCall) -> None:
    """Checks all arguments of one call of `attention_with_kv_cache`, except whether its implementation can run here."""
    for name, x in call.kv.items():
        if is_array(x) and x.ndim != 4:
            raise ValueError(
                f"{name} must have shape (batch, length, heads, head_dim) or, with a page_table, (pages, page size, "
                f"heads, head_dim), got shape {x.shape}."
            )
    check_request(call)
    _check_sequences(call)
    _check_new(call)
    _check_rotary(call)
    _check_splits(call.num_splits)


def _check_splits(num_splits) -> None:
    if num_splits is None or (is_int(num_splits) and 1 <= num_splits <= MAX_SPLITS):
        return
    error = ValueError if is_int(num_splits) else TypeError
    raise error(
        f"num_splits must be a Python int from 1 to {MAX_SPLITS}, or None to be chosen, got {describe(num_splits)}."
    )


def _check_sequences(call: CacheCall) -> None:
    batch = call.batch
    if not is_int(call.cache_seqlens):
        if not is_array(call.cache_seqlens):
            raise TypeError(
                f"cache_seqlens must be an int32 array or a Python int, got {describe(call.cache_seqlens)}."
            )
        check_int32("cache_seqlens", call.cache_seqlens)
        if call.cache_seqlens.shape not in ((), (batch,)):
            raise ValueError(
                f"cache_seqlens must have shape ({batch},), one length for each sequence of "
                f"{'cu_seqlens_q' if call.packed_q else 'q'}, or () for all, got shape {call.cache_seqlens.shape}."
            )
    if call.cache_leftpad is not None:
        check_lengths("cache_leftpad", call.cache_leftpad, (batch,))
    if call.page_table is not None:
        _check_pages(call)
    elif call.cache_batch_idx is None:
        check_batch("k_cache", call.k_cache, batch, ", or come with page_table or cache_batch_idx")
    else:
        check_int32("cache_batch_idx", call.cache_batch_idx)
        if call.cache_batch_idx.shape != (batch,):
            raise ValueError(
                f"cache_batch_idx must have shape ({batch},), one row of k_cache a sequence, "
                f"got shape {call.cache_batch_idx.shape}."
            )
        if batch and not call.k_cache.shape[0]:
            raise ValueError(f"k_cache must have a row for cache_batch_idx to name, got shape {call.k_cache.shape}.")
    if call.capacity >= MAX_CAPACITY:
        raise NotImplementedError(
            f"the capacity of a sequence must be below 2**30 keys, got {call.capacity} by k_cache of shape "
            f"{call.k_cache.shape}{'' if call.page_table is None else f' and page_table of {call.page_table.shape}'}."
        )


def _check_pages(call: CacheCall) -> None:
    if call.cache_batch_idx is not None:
        raise ValueError("cache_batch_idx must be None where page_table says which pages a sequence has, got both.")
    check_int32("page_table", call.page_table)
    shape = call.page_table.shape
    if len(shape) != 2 or shape[0] != call.batch or not shape[1]:
        raise ValueError(
            f"page_table must have shape ({call.batch}, pages of a sequence), at least one page, got shape {shape}."
        )
    if 0 in call.k_cache.shape[:2]:
        raise ValueError(
            f"k_cache must have pages, and rows in a page, for page_table, got shape {call.k_cache.shape}."
        )


def _check_pair(first_name, first, second_name, second) -> None:
    if (first is None) != (second is None):
        missing = first_name if first is None else second_name
        raise ValueError(f"{first_name} and {second_name} must be given together, got None for {missing}.")


def _check_new(call: CacheCall) -> None:
    _check_pair("k_new", call.k_new, "v_new", call.v_new)
    if call.k_new is None:
        return
    check_rows("k_new", call.k_new, DTYPES)
    check_rows("v_new", call.v_new, DTYPES)
    cache_dtype = call.k_cache.dtype.name
    if call.k_new.dtype.name != cache_dtype != "float8_e4m3fn":
        raise TypeError(f"k_new must have the dtype of k_cache, {cache_dtype}, got {call.k_new.dtype.name}.")
    if call.v_new.dtype != call.k_new.dtype:
        raise TypeError(f"v_new must have the dtype of k_new, {call.k_new.dtype.name}, got {call.v_new.dtype.name}.")
    for new, cache in (("k_new", "k_cache"), ("v_new", "v_cache")):
        heads_and_dim = getattr(call, cache).shape[-2:]
        if getattr(call, new).shape[-2:] != heads_and_dim:
            raise ValueError(
                f"{new} must have the heads and head_dim of {cache}, {heads_and_dim}, "
                f"got shape {getattr(call, new).shape}."
            )
    check_like("v_new", call.v_new, "k_new", call.k_new)
    if not call.packed_new:
        check_batch("k_new", call.k_new, call.batch)
    elif not call.packed_q:
        raise ValueError(
            f"k_new must be dense, (batch, length, heads, head_dim), where q is, got shape {call.k_new.shape}."
        )
    elif call.k_new.shape[0] != call.q.shape[0]:
        raise ValueError(
            f"packed k_new must have the {call.q.shape[0]} tokens of q, whose cu_seqlens_q cuts it, "
            f"got shape {call.k_new.shape}."
        )


def _check_rotary(call: CacheCall) -> None:
    check_bool("rotary_interleaved", call.rotary_interleaved)
    cos, sin = call.rotary_cos, call.rotary_sin
    _check_pair("rotary_cos", cos, "rotary_sin", sin)
    if cos is None:
        return
    if call.k_new is None:
        raise ValueError(
            f"rotary_cos must be None without k_new, for q and k_new are rotated together, got {describe(cos)}."
        )
    check_array("rotary_cos", cos, FLOAT_DTYPES)
    check_array("rotary_sin", sin, FLOAT_DTYPES)
    most = call.q.shape[-1] // 2
    if cos.ndim != 2 or not cos.shape[0] or not 1 <= cos.shape[1] <= most:
        raise ValueError(
            f"rotary_cos must have shape (positions, half of the channels that are rotated), at least 1 and from 1 to "
            f"{most}, got shape {cos.shape}."
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"rotary_sin must have the shape and dtype of rotary_cos, {cos.dtype.name} of shape {cos.shape}, "
            f"got {sin.dtype.name} of shape {sin.shape}."
        )

"""Attention in NumPy, one head of one sequence at a time: shares no computation with the definition, which it tests."""

from __future__ import annotations

import itertools
import math

import numpy as np

from jax_flash.reference import PROBABILITY_UNIT

BLOCK_ROWS = 128
"""Rows whose scores stay in a CPU's cache."""


@np.errstate(all="ignore")
def attention(arguments: dict, low=None, real=np.float64):
    """out and lse of the arguments of `attention`, of dtype `real`, in the user's layout.

    With a dtype `low` scores are rounded to it, and probabilities to the dtype of q: what the inputs' precision costs.
    """
    dtype = arguments["q"].dtype
    q, k, v = (np.asarray(arguments[name]).astype(real) for name in "qkv")
    q_rows = rows_of_sequences(q, arguments.get("cu_seqlens_q"), arguments.get("seqused_q"))
    k_rows = rows_of_sequences(k, arguments.get("cu_seqlens_k"), arguments.get("seqused_k"))
    heads, kv_heads = q.shape[-2], k.shape[-2]
    scales = {name: _scales(arguments.get(f"{name}_descale", 1.0), len(q_rows), heads) for name in "qkv"}
    scales["q"] = scales["q"] * np.float64(arguments.get("softmax_scale", q.shape[-1] ** -0.5))
    softcap = arguments.get("softcap", 0)

    def rounded(x, narrow):
        return x if low is None else x.astype(narrow).astype(real)

    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    out = np.zeros((*flat_q.shape[:2], v.shape[-1]), real)
    lse = np.full(flat_q.shape[:2], -np.inf, real)
    for (b, (rows, keys)), h in itertools.product(enumerate(zip(q_rows, k_rows, strict=True)), range(heads)):
        scale, v_scale = real(scales["q"][b, h] * scales["k"][b, h]), real(scales["v"][b, h])
        sink = real(arguments["sinks"][h]) if "sinks" in arguments else real(-np.inf)
        head_k, head_v = (x[keys, h * kv_heads // heads] for x in (flat_k, flat_v))
        for block in _blocks(rows):
            scores = rounded(scale * (flat_q[block, h] @ head_k.T), low)
            if softcap:
                scores = rounded(real(softcap) * np.tanh(scores / real(softcap)), low)
            aligned = np.arange(block.start, block.stop) - rows.stop + len(head_k)
            scores = np.where(_visible(arguments, aligned, len(head_k)), scores, -np.inf)
            top = np.maximum(scores.max(-1, initial=-np.inf), sink)
            top = np.where(top == -np.inf, 0, top)
            weights = np.exp(scores - top[:, None])
            total = weights.sum(-1) + np.exp(sink - top)
            lse[block, h] = top + np.log(total)
            weights = rounded(real(PROBABILITY_UNIT) * weights, dtype) / real(PROBABILITY_UNIT)
            weights /= np.where(total == 0, 1, total)[:, None]
            out[block, h] = v_scale * (weights @ head_v)
    return out.reshape(*q.shape[:-1], v.shape[-1]), np.swapaxes(lse.reshape(q.shape[:-1]), -1, -2)


def over_cache(arguments: dict) -> tuple[dict, np.ndarray, np.ndarray]:
    """The arguments of `attention` that give what those of `attention_with_kv_cache` do; and the caches, written to.

    The keys of each sequence that count are packed. Those that do not come first, so all others keep their distance
    from the last, from which positions are counted there.
    """
    arguments = dict(arguments)
    caches = {name: arguments.pop(f"{name}_cache").copy() for name in "kv"}
    new = {name: arguments.pop(f"{name}_new") for name in "kv" if f"{name}_new" in arguments}
    table, index = arguments.pop("page_table", None), arguments.pop("cache_batch_idx", None)
    cos, sin = arguments.pop("rotary_cos", None), arguments.pop("rotary_sin", None)
    interleaved = arguments.pop("rotary_interleaved", False)
    arguments.pop("num_splits", None)
    q, boundaries = arguments["q"], arguments.get("cu_seqlens_q")
    q_rows = rows_of_sequences(q, boundaries)
    groups, size = caches["k"].shape[:2]
    capacity = size if table is None else size * table.shape[1]
    lengths = np.clip(np.broadcast_to(arguments.pop("cache_seqlens"), len(q_rows)), 0, capacity)

    def place(b, position):
        """Group and row of a position of sequence b, as the index arrays say."""
        if table is not None:
            return table[b, position // size], position % size
        return b if index is None else index[b], position

    if cos is not None:
        q = arguments["q"] = q.copy()
        flat_q = q.reshape(-1, *q.shape[-2:])
        left, right = arguments.get("window_size", (-1, -1))
        by_row = arguments.get("causal", True) or max(left, right) >= 0
        for b, rows in enumerate(q_rows):
            for i, row in enumerate(range(rows.start, rows.stop)):
                turned = _turned(flat_q[row], lengths[b] + (i if by_row else 0), cos, sin, interleaved)
                flat_q[row] = _stored(turned, q.dtype)
    if new:
        new_rows = rows_of_sequences(new["k"], boundaries if new["k"].ndim == 3 else None)
        flat = {name: x.reshape(-1, *x.shape[-2:]) for name, x in new.items()}
        for (b, rows), name in itertools.product(enumerate(new_rows), "kv"):
            cache = caches[name]
            for position, row in enumerate(flat[name][rows], lengths[b]):
                if position >= capacity or not 0 <= place(b, position)[0] < groups:
                    continue
                if name == "k" and cos is not None:
                    row = _turned(row, position, cos, sin, interleaved)
                if new[name].dtype != cache.dtype:
                    descale = np.asarray(arguments.get(f"{name}_descale", 1.0), np.float32)
                    descale = descale[b] if descale.ndim else descale
                    row = row.astype(np.float32) * (1 / descale)[..., None]
                cache[place(b, position)] = _stored(row, cache.dtype)
        lengths = np.minimum(lengths + [rows.stop - rows.start for rows in new_rows], capacity)
    first = np.clip(arguments.pop("cache_leftpad", np.zeros_like(lengths)), 0, lengths)
    for name, cache in caches.items():
        places = [place(b, i) for b, length in enumerate(lengths) for i in range(first[b], length)]
        rows = [cache[min(max(group, 0), groups - 1), row] for group, row in places]
        arguments[name] = np.stack(rows) if rows else np.zeros((0, *cache.shape[2:]), cache.dtype)
    arguments["cu_seqlens_k"] = np.cumsum([0, *(lengths - first)]).astype(np.int32)
    return {"causal": True} | arguments, caches["k"], caches["v"]


def _turned(x, position, cos, sin, interleaved):
    """x (heads, D) with its first channels rotated by a row of the tables, float32."""
    cos, sin = (table[min(position, len(table) - 1)].astype(np.float32) for table in (cos, sin))
    first = np.arange(len(cos)) * (2 if interleaved else 1)
    second = first + (1 if interleaved else len(cos))
    x = x.astype(np.float32)
    turned = x.copy()
    turned[:, first] = x[:, first] * cos - x[:, second] * sin
    turned[:, second] = x[:, first] * sin + x[:, second] * cos
    return turned


def _stored(x, dtype):
    return np.clip(x, -448, 448).astype(dtype) if dtype == "float8_e4m3fn" and x.dtype != dtype else x.astype(dtype)


def _visible(arguments: dict, aligned, keys: int):
    """Whether rows see keys, where `aligned` are the keys that the rows line up with."""
    left, right = arguments.get("window_size", (-1, -1))
    right = 0 if arguments.get("causal") else right
    offset = np.arange(keys) - aligned[:, None]
    visible = np.ones(offset.shape, bool)
    if left >= 0:
        visible &= offset >= -left
    if right >= 0:
        visible &= offset <= right
    return visible


def _blocks(rows: slice) -> list[slice]:
    return [slice(a, min(a + BLOCK_ROWS, rows.stop)) for a in range(rows.start, rows.stop, BLOCK_ROWS)]


def rows_of_sequences(x, cu_seqlens=None, seqused=None) -> list[slice]:
    """The rows that count of each sequence, in x with its leading axes flattened."""
    if cu_seqlens is None:
        boundaries = [b * x.shape[1] for b in range(x.shape[0] + 1)]
    else:
        highest = itertools.accumulate(np.asarray(cu_seqlens).tolist(), max)
        boundaries = [min(max(boundary, 0), x.shape[0]) for boundary in highest]
    used = itertools.repeat(math.inf) if seqused is None else np.asarray(seqused).tolist()
    return [slice(a, min(b, a + max(0, n))) for (a, b), n in zip(itertools.pairwise(boundaries), used, strict=False)]


def _scales(descale, batch: int, heads: int):
    """A descale for each sequence and query head."""
    descale = np.asarray(descale, np.float64)
    descale = descale.reshape(len(descale), -1) if descale.ndim else descale.reshape(1, 1)
    return np.broadcast_to(np.repeat(descale, heads // descale.shape[1], axis=1), (batch, heads))

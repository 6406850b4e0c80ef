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
    return out.reshape(*q.shape[:-1], -1), np.swapaxes(lse.reshape(q.shape[:-1]), -1, -2)


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
